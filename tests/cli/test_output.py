"""What commands print arrives, in any encoding and width, wherever it goes, or the exit code says that it did not."""

import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

import fastbn
from fastbn import progress
from fastbn.cli import info, main


@pytest.fixture
def odd_file(tmp_path):
    """A .npy file whose name is no text, where the system has such names, and whose numbers are long."""
    path = tmp_path / (os.fsdecode(b"\xff.npy") if sys.platform == "linux" else "x.npy")
    np.save(path, np.random.default_rng(0).normal(123456.789, 1, (10, 4, 5)).astype(np.float32))
    return path


def printed(monkeypatch, encoding, *arguments):
    """What a command that ends with 0 prints on streams of an encoding that take nothing else."""
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict", newline="\n") for name in ("stdout", "stderr")
    }
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        assert main([str(word) for word in arguments]) == 0
        assert [stream.errors for stream in streams.values()] == ["strict"] * 2  # as it was
    assert streams["stderr"].buffer.getvalue() == b""
    return streams["stdout"].buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "latin-1", "utf-8"])
def test_finished_work_is_shown_in_any_encoding_and_width(encoding, odd_file, monkeypatch):
    monkeypatch.setenv("FASTBN_STREAM_BYTES", "\u2026\udcff")
    m = fastbn.moments(np.load(odd_file))
    for columns in ("1", "20", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        out = printed(monkeypatch, encoding, "moments", odd_file, "--save", odd_file.with_suffix(".npz"))
        lines = out.splitlines()
        assert lines[0].startswith(ascii(str(odd_file))[1:-1].replace("\\\\", "\\"))
        assert [line.split() for line in lines if line[:1].isdigit()] == [
            [str(c), f"{mean:.9g}", f"{std:.9g}"] for c, (mean, std) in enumerate(zip(m.mean, m.std(), strict=True))
        ]
        assert "wrote " in lines[-1]
        assert "FASTBN_STREAM_BYTES=" in printed(monkeypatch, encoding, "info")
        assert "kernels: " in printed(monkeypatch, encoding, "explain", "8,4")


def test_a_table_cuts_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "5")
    progress.table(
        ("", "with batch normalization", "x"), [("  50", "98.0 %", "1"), ("seconds of training", "", "123456.789")]
    )
    assert capsys.readouterr().out.splitlines() == [
        "",
        "                     with batch normalization           x",
        "-------------------  ------------------------  ----------",
        "  50                                   98.0 %           1",
        "seconds of training                            123456.789",
        "",
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("words", [["info"], ["--help"], ["train", "--help"], ["--version"], ["explain", "4,4"]])
def test_output_that_can_not_be_written_is_said(words, unbuffered, capfd, monkeypatch):
    with open("/dev/full", "wb", 0 if unbuffered else -1) as raw, monkeypatch.context() as patch:
        full = io.TextIOWrapper(raw, write_through=unbuffered)
        patch.setattr(sys, "stdout", full)
        assert main(words) == 2
        if not unbuffered:
            full.write("left at the exit")  # goes nowhere from then on
        full.close()
    assert capfd.readouterr() == ("", "fastbn: [Errno 28] No space left on device\n")
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert main(["explain", "x"]) == 2  # the exit code must say it


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error on Windows")
def test_a_closed_pipe_is_silent(capfd, monkeypatch):
    for words in (["info"], ["--help"], ["explain", "4,4"]):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            assert main(words) == 141
            pipe.write("left at the exit")
    assert capfd.readouterr() == ("", "")


def test_warnings_of_fastbns_are_plain_lines(capsys, monkeypatch):
    def warns(name):
        warnings.warn("fastbn runs on one thread: so it is.", RuntimeWarning, stacklevel=1)
        warnings.warn("another's", UserWarning, stacklevel=1)
        return "nowhere"

    monkeypatch.setattr(info, "version", warns)
    with pytest.warns(UserWarning) as others:
        before = warnings.showwarning
        assert main(["info"]) == 0
        assert warnings.showwarning is before
    assert {str(warning.message) for warning in others} == {"another's"}
    assert set(capsys.readouterr().err.splitlines()) == {"fastbn: runs on one thread: so it is."}


def test_closed_streams_are_none_of_a_commands_business(odd_file, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["moments", str(odd_file), "--save", str(odd_file.with_suffix(".npz"))]) == 0
    assert np.load(odd_file.with_suffix(".npz"))["count"] == 50
    assert main(["explain", "x"]) == 2
    assert sys.stdout is sys.stderr is None


@pytest.mark.process
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "code"),
    [("2>&1 >/dev/full", 2), ("2>&1 >&-", 0), ("2>&-", 0), ("2>/dev/full", 0), ("2>&1 | true", 141)],
)
def test_a_process_ends_quietly_whatever_takes_its_output(redirection, code, unbuffered):
    for words in ("info", "explain 4,4", "--help"):
        command = f"set -o pipefail; '{sys.executable}' -m fastbn {words} {redirection}"
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}
        )
        assert (done.returncode, done.stderr) == (code, "")
        assert "Traceback" not in done.stdout
        assert "ignored" not in done.stdout


def test_what_can_not_be_encoded_is_no_bad_input(monkeypatch):
    """A stream that is no file of the system's keeps its ways; a program shows then where it is wrong."""

    class Strict:
        def write(self, text):
            text.encode("ascii")

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Strict())
    monkeypatch.setenv("FASTBN_STREAM_BYTES", "\u2026")
    with pytest.raises(UnicodeEncodeError):
        main(["info"])
