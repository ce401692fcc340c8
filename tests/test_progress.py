"""Progress of what is counted: bars on a terminal, elsewhere a line now and again, and tidy ends."""

import re
import threading
import time

import pytest

from fastbn import progress


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No terminal, whatever the environment asks of rich; a line every 0.02 seconds."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)


def awaited(capfd, line):
    """What stderr has up to a line that matches."""
    deadline, err = time.monotonic() + 10, ""
    while not re.search(line, err, re.MULTILINE) and time.monotonic() < deadline:
        time.sleep(0.005)
        err += capfd.readouterr().err
    assert re.search(line, err, re.MULTILINE), err
    return err


def test_lines_where_there_is_no_terminal(capfd):
    """Of each task that is not over; none after the end."""
    with progress.counted() as start:
        first = start("training", 2000)
        first.update(500, "93.1 % right")
        awaited(capfd, r"^training: 0 s, 500/2,000, 93\.1 % right$")
        second = start("reading", None)
        awaited(capfd, r"^reading: 0 s$")
        first.update(2000)
        second.update(3, "3 files")
        awaited(capfd, r"^reading: 0 s, 3 files$")
        capfd.readouterr()
        assert "training" not in awaited(capfd, "reading")
        second.end()
        time.sleep(0.05)
        capfd.readouterr()
        time.sleep(0.1)
        assert capfd.readouterr() == ("", "")
    assert "fastbn-progress" not in [thread.name for thread in threading.enumerate()]


def test_an_error_ends_the_lines(capfd):
    with pytest.raises(ZeroDivisionError), progress.counted() as start:
        start("training", 10)
        raise ZeroDivisionError
    assert "fastbn-progress" not in [thread.name for thread in threading.enumerate()]


def test_what_is_short_says_nothing(capfd, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 10.0)
    with progress.counted() as start:
        start("training", 10).update(10)
    assert capfd.readouterr() == ("", "")


def test_bars_on_a_terminal(capfd, monkeypatch):
    """Whose text is no markup; and no lines beside them."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with progress.counted() as start:
        start("with [b]", 2000).update(500, "[93] right")
        task = start("diverged", 10)
        task.update(3)
        task.end()
        time.sleep(0.1)
    out, err = capfd.readouterr()
    assert out == ""
    for text in (r"with \[b\] ", r" 500/2,000 ", r" \[93\] right", r"diverged .* 3/10 "):
        assert re.search(text, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err)), err
    assert "500/2,000, [93] right" not in err
