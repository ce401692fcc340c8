"""The table of shapes, and the asv suite over it: every class runs, checks itself, and its check can fail."""

import inspect
import itertools
import json
import math
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
    sizes = {name: math.prod(case.shape) for name, case in cases.CASES.items()}
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
    assert {"Forward", "Backward", "Inference", "Statistics", "PeakMemory", "CallOverhead", "ColdStart"} <= names
    for cls in (passes.Forward, passes.Backward, passes.Inference, passes.Statistics):
        assert [name for name, dtype in _parameters(cls) if dtype == "float32"] == list(cases.CASES)


def test_the_table_has_every_shape_in_its_orders():
    sizes = {group: len(cases.names(group)) for group in cases.GROUPS}
    assert sizes == {"first": 17, "last": 17, "flat": 6, "small": 4}
    assert len(cases.CASES) == 44
    assert [f"{name} last" for name in cases.names("first")] == cases.names("last")


@pytest.mark.parametrize("name", [*cases.names("small"), "1x256x24x26", "1x256x24x26 last", "32x512x7x7 last"])
def test_arrays_have_their_memory_order_and_begin_on_a_cache_line(name):
    case, x = cases.CASES[name], cases.array(name, "float32")
    assert x.shape == case.shape
    assert (np.moveaxis(x, 1, -1) if case.last else x).flags.c_contiguous
    assert x.ctypes.data % cases.ALIGNMENT == 0


def test_both_orders_hold_the_same_values():
    np.testing.assert_array_equal(cases.array("1x256x24x26", "float32"), cases.array("1x256x24x26 last", "float32"))


def test_half_precision_arrays_have_single_precision_parameters():
    assert cases.array("32x64", "float16").dtype == np.float16
    assert [a.dtype for a in cases.parameters("32x64", "float16")] == [np.float32, np.float32]
    assert [a.dtype for a in cases.parameters("32x64", "float64")] == [np.float64, np.float64]


@pytest.mark.parametrize(
    ("cls", "function", "wrong"),
    [
        (passes.Forward, "batch_norm", lambda x, *rest, out: out.fill(0.0)),
        (passes.Backward, "batch_norm_backward", lambda dy, x, *rest, out: out.fill(0.0)),
        (passes.Inference, "batch_norm_inference", lambda x, *rest, out: out.fill(0.0)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_result_is_not_timed(cls, function, wrong, monkeypatch):
    import fastbn

    monkeypatch.setattr(fastbn, function, wrong)
    with pytest.raises(AssertionError, match="off by"):
        cls().setup("128x2048", "float32")


def test_wrong_statistics_are_not_timed(monkeypatch):
    import fastbn

    right = fastbn.moments
    monkeypatch.setattr(fastbn, "moments", lambda x: fastbn.Moments(1, right(x).mean, right(x).m2))
    with pytest.raises(AssertionError, match="off by"):
        passes.Statistics().setup("32x64", "float32")


def test_asv_finds_the_configuration():
    config = json.loads((ROOT / "asv.conf.json").read_text())
    assert (ROOT / config["benchmark_dir"]).is_dir()
    assert config["branches"] == ["main"]
