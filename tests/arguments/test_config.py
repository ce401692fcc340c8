"""Environment variables: what config.py makes of them, and that they are read at import."""

import os
import runpy
import subprocess
import sys
from typing import Any

import pytest

from fastbn.arguments import config
from fastbn.backends import explain, select


def _configured(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> dict[str, Any]:
    """What config.py holds in a process with this variable."""
    monkeypatch.setenv(name, text)
    return runpy.run_path(config.__file__)


@pytest.mark.parametrize(
    ("variable", "default"), [("reference", "reference"), ("cpu", "cpu.passes"), ("", "cpu.passes")]
)
def test_the_variable_overrides_the_default_and_not_the_request(
    variable: str, default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "BACKEND", _configured(monkeypatch, "FASTBN_BACKEND", variable)["BACKEND"])
    assert [select(name).passes.__name__ for name in (None, "cpu")] == [f"fastbn.{default}", "fastbn.cpu.passes"]
    assert explain((4, 3)).backend == (variable or "cpu")


BYTES = "FASTBN_{}_BYTES={!r}: want a whole number of bytes, 0 or more; unset it for the default, {}"


@pytest.mark.parametrize(("name", "default"), [("STREAM", 40 * 2**20), ("KEEP", 2**30)])
def test_a_variable_of_bytes(name: str, default: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, value in (("", default), ("0", 0), ("25", 25)):
        assert _configured(monkeypatch, f"FASTBN_{name}_BYTES", text)[f"{name}_BYTES"] == value
    for text in ("-1", "24MB", "1.5"):
        with pytest.raises(ValueError) as caught:
            _configured(monkeypatch, f"FASTBN_{name}_BYTES", text)
        assert str(caught.value) == BYTES.format(name, text, default)


@pytest.mark.parametrize(
    ("name", "text", "out", "error"),
    [
        ("FASTBN_BACKEND", "numpy", "imported\n", "BackendUnavailable: FASTBN_BACKEND='numpy' can't be served."),
        ("FASTBN_STREAM_BYTES", "24MB", "", f"ValueError: {BYTES.format('STREAM', '24MB', 40 * 2**20)}"),
    ],
    ids=["backend", "bytes"],
)
def test_variables_are_read_at_import(name: str, text: str, out: str, error: str) -> None:
    code = "import fastbn; print('imported'); fastbn.moments([[1.0]])"
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, env=os.environ | {name: text}, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, out)
    assert error in run.stderr
