"""Where the `moments` command reads and writes: refused before any work, nothing half-written; links, names,
permissions.
"""

import os
import sys

import numpy as np
import pytest

from fastbn import functional
from fastbn.arguments.errors import DataError
from fastbn.cli import files, main, npy_moments

from .test_npy_moments import SHAPE, data, left


@pytest.fixture
def npy(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, data())
    return path


def test_missing_file_and_directory(tmp_path, capsys):
    assert main(["moments", str(tmp_path / "none.npy")]) == 2
    assert "none.npy: no such file" in capsys.readouterr().err
    assert main(["moments", str(tmp_path)]) == 2
    assert "is not a file" in capsys.readouterr().err


def test_places_where_no_file_is_are_one_line(npy, tmp_path, capsys, monkeypatch):
    def refused(*words):
        assert main(["moments", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    for name, target in (("loop.npy", "loop.npy"), ("there", "back"), ("back", "there"), ("broken.npy", "none")):
        (tmp_path / name).symlink_to(target)
    assert "broken.npy: is a link to nothing; want a .npy file" in refused(tmp_path / "broken.npy")
    for path in (tmp_path / "loop.npy", tmp_path / "there" / "x.npy"):
        assert f"{path}: leads in a circle of links; want a .npy file" in refused(path)
        for option in ("--save", "--normalize"):
            assert f"{path}: leads in a circle of links; give another name" in refused(npy, option, path)
    assert "no such file" in refused(npy / "x.npy")
    for name in ("x" * 300, "x\0y"):
        refused(tmp_path / name)
        refused(npy, "--save", tmp_path / name)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    if sys.platform != "win32":
        (tmp_path / "gone").rmdir()
        assert "no such file" in refused("x.npy")
        assert "y.npy: the current directory is gone; change into another, or give an absolute name" in refused(
            npy, "--save", "y.npy"
        )
    monkeypatch.undo()


def test_an_output_of_the_longest_name_there_is(npy, tmp_path):
    longest = tmp_path / ("\N{SNOWMAN}" * 83 + ".npz")  # 253 bytes
    assert main(["moments", str(npy), "--save", str(longest)]) == 0
    assert longest.stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--normalize", "x.npy"], "is the input itself"),
        (["--normalize", "link.npy"], "is the input itself"),
        (["--save", "x.npy"], "is the input itself"),
        (["--normalize", "none/y.npy"], "there is no directory"),
        (["--save", "none/s.npz"], "there is no directory"),
        (["--save", "."], "is not a file and can't be replaced"),
        (["--normalize", "y.npy", "--save", "y.npy"], "given to both --save and --normalize"),
        (["--normalize", "y.npy", "--eps", "-1"], "eps: given -1.0, want a number that is not negative"),
        (["--normalize", "loop.npy"], "leads in a circle of links"),
        (["--save", "loop.npy"], "leads in a circle of links"),
        (["--chunk-mb", "0"], "--chunk-mb: given 0, want a positive number"),
        (["--chunk-mb", "nan"], "--chunk-mb: given nan, want a positive number"),
    ],
)
def test_bad_outputs_are_refused_before_any_work(options, message, npy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(npy_moments, "file_moments", lambda *_: pytest.fail("worked before it looked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.npy").symlink_to(npy)
    (tmp_path / "loop.npy").symlink_to("loop.npy")
    assert main(["moments", "x.npy", *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert left(tmp_path) == ["link.npy", "loop.npy", "x.npy"]
    np.testing.assert_array_equal(np.load(npy), data())


def test_a_full_disk_is_noticed_before_any_work(npy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert main(["moments", str(npy), "--normalize", str(tmp_path / "y.npy")]) == 2
    assert "needs 2,648 bytes, its disk has 1,000 left" in capsys.readouterr().err
    assert left(tmp_path) == ["x.npy"]


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)])
@pytest.mark.parametrize("before", [None, b"precious"], ids=["new", "replacing"])
def test_an_interrupt_in_the_middle_leaves_nothing(raised, code, before, npy, tmp_path, capsys, monkeypatch):
    inference, calls = functional.batch_norm_inference, []

    def interrupted(*args, **options):
        assert any(name.endswith(".part") for name in left(tmp_path))
        calls.append(args)
        if len(calls) == 3:
            raise raised
        return inference(*args, **options)

    monkeypatch.setattr(functional, "batch_norm_inference", interrupted)
    y = tmp_path / "y.npy"
    if before:
        y.write_bytes(before)
    assert (
        main(["moments", str(npy), "--normalize", str(y), "--save", str(tmp_path / "s.npz"), "--chunk-mb", "0.0005"])
        == code
    )
    assert len(calls) == 3
    assert left(tmp_path) == (["x.npy", "y.npy"] if before else ["x.npy"])
    assert before is None or y.read_bytes() == before
    err = capsys.readouterr().err
    assert err.startswith("fastbn: ")
    assert "Traceback" not in err


def test_a_file_cut_short_while_it_is_read(npy):
    header = npy_moments.open_npy(npy, 1)
    os.truncate(npy, npy.stat().st_size - 400)
    with pytest.raises(DataError, match="was cut short while it was read"):
        npy_moments.file_moments(header, 500, lambda done: None)


def test_outputs_get_ordinary_permissions_and_follow_links(npy, tmp_path):
    (tmp_path / "target.npy").write_bytes(b"old")
    (tmp_path / "y.npy").symlink_to(tmp_path / "target.npy")
    assert main(["moments", str(npy), "--normalize", str(tmp_path / "y.npy"), "--save", str(tmp_path / "s.npz")]) == 0
    assert (tmp_path / "y.npy").is_symlink()
    assert np.load(tmp_path / "target.npy").shape == SHAPE
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "s.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode
