"""The table of shapes, and the asv suite over it: asv can import it, every class runs, and its check can fail."""

import importlib.machinery
import importlib.util
import itertools
import json
import math
import pkgutil
import sys

import numpy as np
import pytest

import fastbn
from bench.suite import calls, cases, passes
from tests import ROOT

PASSES = (passes.Forward, passes.Backward, passes.Inference, passes.Statistics)
REST = (passes.OtherForward, passes.OtherBackward, passes.PeakMemory, calls.ColdStart)  # halves, large, processes
SLOW = [pytest.param(cls, marks=pytest.mark.bench) for cls in REST]


def test_asv_imports_its_suite_with_pytorch_hidden(monkeypatch):
    """As asv does in its own environment: a package named after its folder, with nothing else of bench/ to be found."""
    folder = ROOT / json.loads((ROOT / "asv.conf.json").read_text())["benchmark_dir"]
    for name in ("bench", "torch", "jax", "onnx", "rich", "matplotlib", *sys.modules):
        if name.partition(".")[0] in ("bench", "torch", "jax", "onnx", "rich", "matplotlib"):
            monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.machinery.PathFinder.find_spec(folder.name, [str(folder.parent)])
    suite = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, folder.name, suite)
    spec.loader.exec_module(suite)
    names = [module.name for module in pkgutil.walk_packages(suite.__path__, f"{folder.name}.")]
    try:
        found = {name for each in map(importlib.import_module, names) for name in vars(each)}
    finally:
        for name in names:
            sys.modules.pop(name, None)
    assert {cls.__name__ for cls in (*PASSES, *REST, calls.CallOverhead)} <= found


def _parameters(cls):
    """Its smallest arrays, in each of its dtypes."""
    every = list(itertools.product(*(cls.params if isinstance(cls.params[0], list) else [cls.params])))
    size = {name: math.prod(case.shape) for name, case in cases.CASES.items()}
    least = min(every, key=lambda words: size.get(words[0], 0))[0]
    return [words for words in every if words[0] == least]


@pytest.mark.parametrize("cls", [*PASSES, calls.CallOverhead, *SLOW])
def test_every_class_runs(cls):
    runs = [name for name in dir(cls) if name.startswith(("time_", "track_", "peakmem_"))]
    assert runs
    for name, parameters in itertools.product(runs, _parameters(cls)):
        bench = cls()
        bench.setup(*parameters)
        getattr(bench, name)(*parameters)
        getattr(bench, "teardown", lambda *_: None)(*parameters)


def test_the_passes_take_every_shape_of_the_table_in_its_orders():
    assert [len(cases.names(group)) for group in ("first", "last", "flat", "small")] == [17, 17, 6, 4]
    assert [f"{name} last" for name in cases.names("first")] == cases.names("last")
    assert all(cls.params[0] == list(cases.CASES) for cls in PASSES)


@pytest.mark.parametrize("name", [*cases.names("small"), "1x256x24x26", "1x256x24x26 last", "32x512x7x7 last"])
def test_arrays_are_what_their_names_say(name):
    case = cases.CASES[name]
    x = cases.array(case, "float32")
    assert x.shape == case.shape == tuple(map(int, name.removesuffix(" last").split("x")))
    assert (np.moveaxis(x, 1, -1) if name.endswith("last") else x).flags.c_contiguous
    assert x.ctypes.data % cases.ALIGNMENT == 0
    np.testing.assert_array_equal(
        x, cases.array(cases.CASES[name.removesuffix(" last")], "float32")
    )  # in either memory order
    for dtype in ("float16", "float32", "float64"):
        kinds = [cases.array(case, dtype).dtype, *(parameter.dtype for parameter in cases.parameters(case, dtype))]
        assert kinds == [dtype, *["float64" if dtype == "float64" else "float32"] * 2]


@pytest.mark.parametrize(
    ("cls", "function", "wrong"),
    [
        (passes.Forward, "batch_norm", lambda *_, out: out.fill(0.0)),
        (passes.Backward, "batch_norm_backward", lambda *_, out: out.fill(0.0)),
        (passes.Inference, "batch_norm_inference", lambda *_, out: out.fill(0.0)),
        (passes.Statistics, "moments", lambda x: fastbn.Moments(1, x.mean(0, np.float64), x.var(0) + 0.1)),
        (calls.CallOverhead, "BatchNorm", lambda C: lambda x: x),
    ],
)
def test_a_wrong_result_is_not_timed(cls, function, wrong, monkeypatch):
    monkeypatch.setattr(fastbn, function, wrong)
    with pytest.raises(AssertionError, match="off by"):
        cls().setup("32x64", *["float32"] * (cls is not calls.CallOverhead))
