"""Every asv class runs, checks itself, and its check can fail."""

import inspect
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from bench import calls, cases, passes

ROOT = Path(__file__).parents[1]
CLASSES = [
    cls
    for module in (passes, calls)
    for name, cls in inspect.getmembers(module, inspect.isclass)
    if cls.__module__ == module.__name__ and not name.startswith("_")
]


def _parameters(cls):
    params = cls.params if isinstance(cls.params[0], list) else [cls.params]
    return list(itertools.product(*params))


def _smallest(cls):
    """One set of parameters: the smallest array."""
    sizes = {name: np.prod(case.shape) for name, case in (cases.CASES | cases.SMALL).items()}
    return min(_parameters(cls), key=lambda p: sizes.get(p[0], 0))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_runs(cls):
    runs = [name for name in dir(cls) if name.startswith(("time_", "track_", "peakmem_"))]
    assert runs
    parameters = _smallest(cls)
    for name in runs:
        bench = cls()
        bench.setup(*parameters)
        getattr(bench, name)(*parameters)
        if hasattr(bench, "teardown"):
            bench.teardown(*parameters)


def test_the_suite_has_what_it_promises():
    names = {cls.__name__ for cls in CLASSES}
    assert {"Forward", "Backward", "Inference", "Statistics", "CallOverhead", "ColdStart"} <= names


def test_cases_have_their_memory_order():
    for name, case in (cases.CASES | cases.SMALL).items():
        x = cases.array(name, "float32")
        assert x.shape == case.shape
        assert np.moveaxis(x, 1, -1).flags.c_contiguous if case.last else x.flags.c_contiguous


def test_a_wrong_result_is_not_timed(monkeypatch):
    import fastbn

    monkeypatch.setattr(fastbn, "batch_norm_inference", lambda x, *rest, out: out.fill(0.0))
    with pytest.raises(AssertionError, match="off by"):
        passes.Inference().setup("128x2048", "float32")


def test_asv_finds_the_configuration():
    config = json.loads((ROOT / "asv.conf.json").read_text())
    assert (ROOT / config["benchmark_dir"]).is_dir()
    assert config["branches"] == ["main"]
