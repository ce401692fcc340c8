"""The command line: help that shows examples, one clear line for bad input, quick start, `explain`, `info`, `bench`,
`warmup`.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from launch import python

import fastbn
from fastbn import cli
from fastbn.arguments.errors import MissingExtra
from fastbn.cli import info, main, selftest, warmup
from fastbn.cpu import interrupts, threads

NAMES = ["train", "claims", "moments", "explain", "info", "check", "bench", "warmup"]


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "fastbn", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def refused(capsys, *arguments):
    """The one line on stderr of a command that ends with 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastbn: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_help_lists_every_command():
    done = run("--help", env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    assert re.findall(r"^    (\w+) ", done.stdout, re.MULTILINE) == NAMES
    assert "python -m fastbn train\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stderr == ""


@pytest.mark.parametrize("name", NAMES)
def test_help_of_each_command_has_examples_that_parse(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    examples = re.findall(r"^  .*python -m fastbn (.+)$", out.partition("examples:\n")[2], re.MULTILINE)
    assert 1 <= len(examples) <= 3
    for example in examples:
        assert cli._parser().parse_args(example.split()).run is not None


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"fastbn {fastbn.__version__}\n"


COMMANDS = f"{', '.join(NAMES[:-1])} or {NAMES[-1]}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", f"COMMAND: given none, want {COMMANDS}"),
        ("trian", f"COMMAND: given 'trian', want {COMMANDS}"),
        ("--frob", "--frob: not taken here; `python -m fastbn --help` shows what is"),
        *(
            (f"{name} {more}--frob", f"--frob: not taken here; `python -m fastbn {name} --help` shows what is")
            for name in NAMES
            for more in ["4,4 " if name in ("moments", "explain") else ""]
        ),
        ("info more", "more: not taken here; `python -m fastbn info --help` shows what is"),
        ("moments", "missing: FILE.npy; `python -m fastbn moments --help` shows what is"),
        ("train --lr", "--lr: expected one argument; `python -m fastbn train --help` shows what is"),
        ("moments x.npy --axis y", "--axis: given 'y', want a whole number"),
        ("explain 4,4 --axis 1.5", "--axis: given '1.5', want a whole number"),
        ("bench --repeats x", "--repeats: given 'x', want a whole number"),
        ("moments x.npy --eps small", "--eps: given 'small', want a number"),
        ("train --optimizer sg", "--optimizer: given 'sg', want sgd, momentum, rmsprop or adam"),
    ],
)
def test_a_bad_command_line_is_one_line(words, line, capsys):
    """Whatever is wrong with it, and without the usage."""
    assert refused(capsys, *words.split()) == f"fastbn: {line}\n"


def test_starting_imports_nothing_heavy():
    code = (
        "import sys, fastbn.cli\n"
        "try: fastbn.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numba', 'rich', 'matplotlib', 'sklearn', 'torch', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    python("-c", code)


@pytest.mark.parametrize("text", ["32,64,56,56", "32x64x56x56", "(32, 64, 56, 56)"])
def test_explain(text, capsys):
    assert main(["explain", text, "float32"]) == 0
    assert capsys.readouterr().out == f"{fastbn.explain((32, 64, 56, 56), 'float32')}\n"


def test_explain_options(capsys):
    assert main(["explain", "8,4,4,16", "float64", "--axis", "-1", "--backend", "reference"]) == 0
    assert capsys.readouterr().out == f"{fastbn.explain((8, 4, 4, 16), 'float64', -1, backend='reference')}\n"
    for words in (["8,16,4,4", "--channels-last"], ["8,16,4,4 last"], ["8x16x4x4 last", "--channels-last"]):
        assert main(["explain", *words]) == 0
        assert capsys.readouterr().out == f"{fastbn.explain((8, 16, 4, 4), channels_last=True)}\n"


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("shape", [(4096, 70), (3, 5, 7), (2, 3, 4, 5, 6), (2, 3, 1, 2, 3, 1)])
def test_explain_takes_any_rank_and_order(shape, dtype, capsys):
    for axis, (last, behind), backend in itertools.product((0, 1, -1), ((False, ""), (True, " last")), ("cpu", "cuda")):
        text = "x".join(map(str, shape)) + behind
        assert main(["explain", text, dtype, "--axis", str(axis), "--backend", backend]) == 0
        wanted = fastbn.explain(shape, dtype, axis, channels_last=last, backend=backend)
        assert capsys.readouterr().out == f"{wanted}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["32,a"], "SHAPE: given '32,a', want whole numbers with commas"),
        (["32,-4"], "SHAPE: given '32,-4'"),
        ([""], "SHAPE: given ''"),
        (["32xx4"], "SHAPE: given '32xx4'"),
        (["32x4 lost"], "like 32x64x56x56, and ' last' behind them where the channels are last in memory"),
        (["32"], "want rank 2 or more"),
        (["32,4", "--axis", "2"], "axis: given 2, want one from -2 to 1"),
        (["32,4", "int8"], "given int8, want float16, bfloat16, float32 or float64"),
        (["32,4", "flout32"], "given 'flout32', want float16, bfloat16, float32 or float64"),
        (["32,4", "--backend", "gpu"], "backend='gpu' can't be served. Registered: cuda: "),
    ],
)
def test_explain_refuses(arguments, message, capsys):
    assert message in refused(capsys, "explain", *arguments)


def test_traceback_on_demand():
    with pytest.raises(ValueError, match="SHAPE"):
        main(["--traceback", "explain", "32,a"])


def test_a_real_process_fails_in_one_line():
    done = run("explain", "32,64", env={**os.environ, "FASTBN_BACKEND": "gpu"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fastbn: FASTBN_BACKEND='gpu' can't be served. Registered: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows processes are not ended by signals")
@pytest.mark.parametrize(
    "names",
    ["SIGINT", "SIGTERM"]
    + [
        pytest.param(names, marks=pytest.mark.process)
        for names in (
            *("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU"),
            # at the same moment
            *("SIGHUP SIGTERM", "SIGINT SIGTERM", "SIGHUP SIGINT SIGTERM", "SIGUSR1 SIGUSR2 SIGTERM"),
        )
    ],
)
def test_a_signal_leaves_nothing_behind(names, tmp_path):
    """Nor do several at once, of which the first, in the order of their numbers, is the exit code."""
    np.save(tmp_path / "x.npy", np.zeros((2000, 50), np.float32))
    # A copy that never ends: every chunk takes a second. Whoever runs the tests may ignore signals, as nohup does.
    slow = (
        "import signal, sys, time\nfrom fastbn import functional\nfrom fastbn.cpu import interrupts\nfrom fastbn.cli "
        "import main\n"
        "for number in interrupts.ENDING:\n"
        "    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)\n"
        "functional.batch_norm_inference = lambda *a, **k: time.sleep(1)\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = ["moments", str(tmp_path / "x.npy"), "--normalize", str(tmp_path / "y.npy"), "--chunk-mb", "0.004"]
    with subprocess.Popen([sys.executable, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".y.npy.*.part")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        numbers = [getattr(signal, name) for name in names.split()]
        for number in (signal.SIGSTOP, *numbers, signal.SIGCONT):
            process.send_signal(number)
        err = process.communicate(timeout=60)[1]
    assert process.returncode in [128 + number for number in numbers]
    assert err in ("", "fastbn: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows processes are not ended by signals")
def test_signals_that_end_a_process_let_it_tidy_up():
    taken = interrupts.ENDING
    assert {"SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU"} <= {
        number.name for number in taken
    }
    before = [signal.signal(number, signal.SIG_DFL) for number in taken]
    try:
        for number in taken:
            raised = KeyboardInterrupt if number == signal.SIGINT else SystemExit
            with pytest.raises(raised) as exit, interrupts.terminable():
                try:
                    with interrupts.deferred():
                        signal.raise_signal(number)
                finally:
                    for other in taken:
                        signal.raise_signal(other)  # which a terminal that goes may send as well
            assert getattr(exit.value, "code", 130) == 128 + number
            assert [signal.getsignal(other) for other in taken] == [signal.SIG_DFL] * len(taken)
        with pytest.raises(SystemExit) as exit, interrupts.terminable():
            # no more: each takes 3 KB, and faulthandler, which pytest enables, leaves 16 KB for all
            both = [signal.SIGTERM, signal.SIGHUP]
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            for number in both:
                signal.raise_signal(number)
            # at the same moment: Python complains of one that is ignored by then
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        assert exit.value.code == 128 + signal.SIGHUP
        for own in (signal.SIG_IGN, lambda *_: None):  # as under nohup, or in a program that calls `main`
            for number in taken:
                signal.signal(number, own)
            with interrupts.terminable():
                for number in taken:
                    signal.raise_signal(number)
            assert [signal.getsignal(number) for number in taken] == [own] * len(taken)
    finally:
        for number, handler in zip(taken, before, strict=True):
            signal.signal(number, handler)


def test_info_in_a_real_process():
    environment = {**os.environ, "FASTBN_STREAM_BYTES": "1000"}
    environment.pop("NUMBA_THREADING_LAYER", None)
    done = run("info", env=environment)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    facts = {line[:15].strip(): line[17:] for line in lines if line[:15].strip()}
    assert list(facts) == [
        "fastbn", "python", "numpy", "numba", "llvmlite", "tbb", "processor", "vectors", "cores", "threads",
        "threading layer", "kernel cache", "backends", "environment",
    ]  # fmt: skip
    assert facts["fastbn"].startswith(f"{fastbn.__version__} in ")
    assert facts["numpy"] == np.__version__
    assert facts["threading layer"] in ("tbb", "omp", "workqueue")
    assert re.match(r"(128|256|512) bits .*|unknown", facts["vectors"])
    for line in (
        "cuda: ",
        "cpu: available",
        "reference: available",
        "FASTBN_STREAM_BYTES=1000",
        "NUMBA_THREADING_LAYER is not set",
    ):
        assert any(given[17:].startswith(line) for given in lines), line


def test_the_kernel_cache_named_is_the_one_used(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DISABLE_JIT": "0"}
    code = (
        "import numpy\nfrom fastbn.cli import info\nfrom fastbn.cpu import passes\nfrom fastbn.cpu.kernels import jit\n"
        "jit.KERNELS[0].form(numpy.dtype('f4'), False)\nprint(info.cache_directory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    used = {path.parent for path in tmp_path.rglob("*.nbi")}
    assert used == {type(tmp_path)(done.stdout.strip())}


def test_info_without_extras_and_without_a_jit(capsys, monkeypatch):
    import numba

    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    monkeypatch.setattr(
        info.metadata, "version", lambda name: (_ for _ in ()).throw(info.metadata.PackageNotFoundError(name))
    )
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "tbb              not installed\n" in out
    assert "nowhere: NUMBA_DISABLE_JIT is set" in out


def test_warmup_compiles_and_says_what(capsys, monkeypatch):
    """Every dtype there is, for numba's threads and PyTorch's; which kernels there are, and that they are compiled,
    others test.
    """
    from fastbn.cpu import passes, team  # noqa: F401 # passes registers the kernels
    from fastbn.cpu.kernels import jit

    asked = []
    monkeypatch.setattr(jit, "KERNELS", [next(kernel for kernel in jit.KERNELS if kernel.parallel)])
    monkeypatch.setattr(jit.Kernel, "compiled", lambda kernel, dtype, form: asked.append((dtype.name, form)))
    kernel, stored = jit.KERNELS[0].name, {"float16": "uint16", "bfloat16": "int16"}
    runtime = team.Runtime(1, 2, 3)
    every = [str(dtype) for dtype in selftest.installed()]
    assert {"float16", "float32", "float64"} <= set(every)
    for words, dtypes in (([], every), (["float64"], ["float64"]), (["f4", "half"], ["float32", "float16"])):
        for members in (None, runtime):
            monkeypatch.setattr(warmup, "_pytorch", lambda members=members: members)
            asked.clear()
            assert main(["warmup", *words]) == 0
            *lines, last = capsys.readouterr().out.splitlines()
            names = {"serial": False, "parallel": True, "team": members}
            forms = [name for name in names if name == "serial" or (names[name] and threads.usable())]
            assert [line.split("  ")[-1] for line in lines] == [
                f"{kernel} {dtype} {name}" for dtype in dtypes for name in forms
            ]
            assert asked == [(stored.get(dtype, dtype), names[name]) for dtype in dtypes for name in forms]
            assert re.match(
                rf"{len(lines)} forms of kernels in \d+\.\d s: 0 compiled, {len(lines)} found compiled; kept in ", last
            )
            assert last.endswith(info.cache_directory())


@pytest.mark.parametrize(
    "why", ["NUMBA_DISABLE_JIT is set; unset it", "no directory can be written; set NUMBA_CACHE_DIR"]
)
def test_warmup_that_can_keep_nothing_is_refused_before_any_work(why, tmp_path, capsys, monkeypatch):
    import numba

    from fastbn.cpu import passes
    from fastbn.cpu.kernels import cache

    monkeypatch.setattr(passes, "warmup", lambda *_: pytest.fail("worked before it looked"))
    monkeypatch.setattr(numba.config, "DISABLE_JIT", int("JIT" in why))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(cache, "directories", lambda: [tmp_path / "file" / "below"])
    assert main(["warmup", "float32"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fastbn: warmup has not begun, for kernels would be kept nowhere: {why}")
    assert err.count("\n") == 1


def test_warmup_names_every_dtype_once(capsys):
    with pytest.raises(SystemExit):
        main(["warmup", "--help"])
    words = re.findall(r"\w+", capsys.readouterr().out.partition("default:")[2].partition(")")[0])
    assert [word for word in words if word in selftest.DTYPES] == list(selftest.DTYPES)


def test_warmup_of_what_is_no_dtype(capsys):
    assert main(["warmup", "float32", "int32"]) == 2
    assert "int32" in capsys.readouterr().err


def test_missing_extras_are_import_errors():
    assert issubclass(MissingExtra, ImportError)
