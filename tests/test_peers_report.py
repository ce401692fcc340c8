"""What `python -m bench.peers` makes of a result: tables, plot, the README's block; its options, and its errors."""

import copy
import json

import pytest

from bench import cases, peers, plot, report, rounds
from bench.problem import PASSES
from fastbn import quickbench, timing

pytest.importorskip("rich", reason="tables and progress need rich")
pytest.importorskip("matplotlib", reason="the plot needs matplotlib")

MACHINE = {
    "processor": "A Processor", "threads": "2", "cores": 2, "cache": 2**25, "system": "Linux x86_64", "python": "3.12", "fastbn": "0.1.0",
    "numpy": "2.0", "numba": "0.62", "torch": "2.9", "jax": "0.8", "onnxruntime": "1.23", "date": "2020-01-02",
}  # fmt: skip


def _record(shape, what, ratio, times_limit, **more):
    case = cases.CASES[shape]
    record = {"shape": shape, "group": case.group, "bytes": 30_000_000, "pass": what, "seconds": {"fastbn": 1.5e-3, "JAX": ratio * 1.5e-3}}
    return {**record, "fastest": "JAX", "ratio": ratio, "limit": "copy", "times_limit": times_limit, "refused": {"oneDNN": "no"}, **more}


@pytest.fixture
def result():
    ratios = {"32x64x112x112": 8.0, "32x512x7x7": 1.125, "32x64x56x56 last": 2.0, "4096x256": 0.5}
    records = [_record(shape, what, ratio, 1.0 + i / 4) for shape, ratio in ratios.items() for i, what in enumerate(PASSES)]
    calls = {"shape": "32x64", "seconds": {"batch_norm": 4e-6, "BatchNorm": 6e-6}, "ratios": {"batch_norm / native_batch_norm.out": 2.04}}
    return {"kind": "peers", "dtype": "float32", "machine": MACHINE, "method": {}, "doubt": None, "records": records, "small": [calls]}


@pytest.fixture
def saved(result, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- peers:begin -->\nold\n<!-- peers:end -->\nafter\n")
    return path


def test_targets_beside_what_was_measured(result):
    headers, lines = report.summary(result)
    table = {line[0]: line[1:] for line in lines}
    assert next(iter(table)) == "channels first, forward"
    # 8 and 1.125: geometric mean 3; 1.0 of the limit where 1.7 (7x7) and 1.35 are allowed.
    assert table["channels first, forward"] == [
        "1.12x, 32x512x7x7 forward, JAX; 1 of 2 at 1.2x", "3.00x (target 3x)", "1.00, 32x64x112x112 forward (target 1.35); 2 of 2 within"
    ]  # fmt: skip
    assert table["channels last and flat, forward and backward"][0] == "0.50x, 4096x256 forward, JAX; 2 of 4 at 1x"
    assert table["inference"][2] == "1.50, 32x64x112x112 inference (target 1.1); 0 of 4 within"
    assert table["moments"][2] == "-"
    assert len(headers) == len(lines[0])


def test_a_line_per_shape_and_a_column_per_pass(result):
    headers, lines = report.tables(result)[-1]
    assert headers == ["shape", *PASSES]
    assert [line[0] for line in lines] == ["32x64x112x112", "32x512x7x7", "32x64x56x56 last", "4096x256"]
    assert lines[0][1:3] == ["1.5 ms, 8.00x JAX, 1.00", "1.5 ms, 8.00x JAX, 1.25"]
    result["records"][0].update(fastest=None, ratio=None)
    assert report.tables(result)[-1][1][0][1] == "1.5 ms, no peer, 1.00"
    assert report.refusals(result) == ["oneDNN (16x): no"]


def test_small_calls_show_times_and_multiples(result):
    headers, lines = report.small_calls(result)
    row = dict(zip(headers, lines[0], strict=True))
    assert row["batch_norm (target 5 µs)"] == "4 µs"
    assert row["native_batch_norm.out (target 1.5x)"] == "2.0x"
    assert row["F.batch_norm (target 4x)"] == "-"


def test_half_precision_and_scaling_have_tables_of_their_own(result):
    half = {**result, "dtype": "bfloat16", "records": [_record("4096x256", "forward", 2.0, 1.1, float32=1.75)]}
    assert report.tables(half) == [(["shape", "forward"], [["4096x256", "1.5 ms, 1.75x float32, 2.00x JAX, 1.10"]])]
    assert report.block(half) == "bfloat16"
    record = {"shape": "4096x256", "pass": "forward", "seconds": {"1": 3e-3, "2": 1.6e-3}, "speedup": {"1": 1.0, "2": 1.875}}
    scaling = {**result, "kind": "scaling", "records": [record]}
    assert report.tables(scaling) == [(["shape", "forward"], [["4096x256", "3 ms / 1.6 ms, 1.88x"]])]
    assert "at 1 / 2 threads" in report.note(scaling)
    assert report.block(scaling) == "scaling"


def test_the_readme_is_written_from_a_file(saved, readme, capsys):
    picture = saved.with_suffix(".png")
    assert peers.main(["--from", str(saved), "--readme", str(readme), "--plot"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- peers:begin -->\n| ")
    assert text.endswith("\n<!-- peers:end -->\nafter\n")
    assert "old" not in text
    assert "| 32x512x7x7 | 1.5 ms, 1.12x JAX, 1.00 |" in text
    assert "](result.png)" in text
    assert "`python -m bench.peers --from result.json --readme README.md`" in text
    for fact in ("A Processor", "2 threads", "2 cores", "jax 0.8", "2020-01-02"):
        assert fact in text
    widths = [
        {row.count("|") for row in part.splitlines()} for part in text.split("\n\n") if part.lstrip("befor\n<!->psgin:").startswith("|")
    ]
    assert len(widths) >= 2
    assert all(len(width) == 1 for width in widths)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert "32x64x112x112" in capsys.readouterr().out
    # Again, without drawing: the picture beside the file is still linked.
    assert peers.main(["--from", str(saved), "--readme", str(readme)]) == 0
    assert "](result.png)" in readme.read_text()


def test_the_plot_shows_every_shape_with_labels_and_targets(result, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.append(self))
    plot.draw(result, tmp_path / "plot.png")
    left, right = drawn[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["32x64x112x112", "32x512x7x7", "32x64x56x56 last", "4096x256"]
    for axes, points in ((left, 16), (right, 16)):
        assert axes.get_xlabel()
        assert sum(line.get_marker() in "os^D" for line in axes.lines) == points
    assert left.get_ylabel()
    targets = [line for line in right.lines if line.get_marker() == "None" and len(set(line.get_xdata())) == 1]
    assert len(targets) == 4 * 3 + 1  # no target for moments; and the line at 1


def test_timings_in_doubt_leave_the_readme(result, saved, readme, capsys):
    saved.write_text(json.dumps({**result, "doubt": "other processes used 1.2 of 2 processors meanwhile"}))
    before = readme.read_text()
    assert peers.main(["--from", str(saved), "--readme", str(readme)]) == 1
    assert readme.read_text() == before
    err = capsys.readouterr().err
    assert "other processes used" in err
    assert "is left as it was" in err


def test_a_run_writes_all_that_it_was_asked_for(tmp_path, readme, monkeypatch, capsys):
    monkeypatch.setattr(timing, "turn", lambda call: (call(), 1e-3)[1])
    monkeypatch.setattr(rounds, "LEAST", 1)
    monkeypatch.setattr(peers.machine, "keep_memory", lambda: True)  # a setting of the whole process
    monkeypatch.setattr(peers.measure.limit, "calls", lambda p, what, threads: {"copy": lambda: None})  # uncompiled
    monkeypatch.setattr(quickbench, "others", lambda: 0.0)
    for name in ("NPROC", "PJRT_NPROC", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, "")  # as they were, afterwards
    data, picture = tmp_path / "out.json", tmp_path / "out.png"
    words = ["--shapes", "32x64", "2x16x8x8", "--peers", "NumPy", "--passes", "forward", "moments", "--seconds", "0.001"]
    assert peers.main([*words, "--json", str(data), "--plot", str(picture), "--readme", str(readme)]) == 0
    result = peers.load(data)
    assert [(r["shape"], r["pass"]) for r in result["records"]] == [
        ("32x64", "forward"), ("32x64", "moments"), ("2x16x8x8", "forward"), ("2x16x8x8", "moments")
    ]  # fmt: skip
    assert all(r["fastest"] == "NumPy" and r["ratio"] == 1.0 for r in result["records"])
    assert [r["shape"] for r in result["small"]] == ["32x64", "2x16x8x8"]
    assert result["doubt"] is None
    assert {"threads", "cores", "numpy", "numba", "torch", "jax", "onnxruntime", "processor", "date"} <= result["machine"].keys()
    assert len(data.read_text().splitlines()) == 7  # a line for each record, for git
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert "](out.png)" in readme.read_text()
    captured = capsys.readouterr()
    assert "calls on 2x16x8x8" in captured.err
    assert f"wrote {data}" in captured.out


def test_numbers_are_rounded_and_nothing_else():
    assert peers._rounded({"a": [1.234567891, {"b": 2}], "c": "x", "d": None}) == {"a": [1.2346, {"b": 2}], "c": "x", "d": None}


def test_shapes_are_chosen_by_name_and_group():
    assert peers.chosen(None, quick=False) == list(cases.CASES)
    assert peers.chosen(None, quick=True) == list(peers.QUICK)
    assert {cases.CASES[name].group for name in peers.QUICK} == set(cases.GROUPS)
    assert peers.chosen(["small", "4096x256"], quick=True) == ["4096x256", *cases.names("small")]


def test_a_complete_run_is_kept_under_the_name_of_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(peers.machine, "facts", lambda threads, kept: MACHINE)

    def paths(*words, kind="peers", dtype="float32"):
        found = peers._paths(peers._parser().parse_args(words), {"kind": kind, "dtype": dtype})
        return [path and path.relative_to(tmp_path).as_posix() for path in found]

    assert paths() == ["results/peers-2020-01-02-a-processor-2.json", "results/peers-2020-01-02-a-processor-2.png"]
    assert paths("--scaling", kind="scaling") == ["results/scaling-2020-01-02-a-processor-2.json", None]
    assert paths("--dtype", "float16", dtype="float16")[0] == "results/peers-float16-2020-01-02-a-processor-2.json"
    assert paths("--quick") == paths("--passes", "forward") == paths("--peers", "JAX") == [None, None]
    assert paths("--quick", "--json")[0] == "results/peers-2020-01-02-a-processor-2.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "32x65"], r"--shapes: given '32x65', want one of first, last, flat, small, '32x64x112x112'"),
        (["--threads", "0"], "--threads: given 0, want more than 0"),
        (["--seconds", "-1"], "--seconds: given -1.0, want more than 0"),
        (["--scaling", "--plot"], "a scaling result has none"),
        (["--from", "nowhere.json"], "nowhere.json"),
        (["--json", "no/such/folder/x.json"], "there is no directory"),
        (["--readme", "CHANGELOG.md"], "has 0 blocks from <!-- peers:begin -->"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr(peers, "measured", lambda *_: pytest.fail("measured before it looked"))
    assert peers.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m bench.peers: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_result_is_refused(saved, result, capsys):
    for text in ("no JSON", "[]", json.dumps({**result, "records": []}), json.dumps({"kind": "peers"})):
        saved.write_text(text)
        assert peers.main(["--from", str(saved)]) == 2
        assert "is no result of python -m bench.peers" in capsys.readouterr().err
    saved.write_text(json.dumps(copy.deepcopy(result)))
    assert peers.main(["--from", str(saved), "--json"]) == 2
    assert "nothing is measured with --from" in capsys.readouterr().err


def test_unknown_options_are_refused(capsys):
    for words in (["--dtype", "int8"], ["--passes", "sideways"], ["--peers", "Keras"]):
        with pytest.raises(SystemExit) as exit:
            peers.main(words)
        assert exit.value.code == 2
        assert "invalid choice" in capsys.readouterr().err
