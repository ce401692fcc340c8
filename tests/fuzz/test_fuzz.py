"""The fuzz test finds nothing in fastbn, and finds what is broken on purpose: a check that can't fail is none."""

import copy
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from launch import PLACES

import fastbn

from .arrays import TWISTS, World, draw, lay, strides
from .judge import Finding, Judge, Truth, near
from .kinds import MEANING, ODD, RIGHT, UNKNOWN, WRONG, Given, Maker, vector
from .layer import Layer

KERNELS = "float32,float64"  # those that other tests have compiled

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="guard pages are of mmap and mprotect, processes of fork"
)


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | PLACES | {"NUMBA_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, "-c", script, *words], env=environment, capture_output=True, text=True, check=False
    )


def test_nothing_is_found() -> None:
    """Of the first calls; .ci/run makes as many as a minute holds."""
    done = run(
        "import sys; from tests.fuzz import __main__ as fuzz; sys.exit(fuzz.main())",
        *f"--calls 150 --seconds 600 --jobs 1 --no-torch --dtypes {KERNELS}".split(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "findings: 0" in done.stdout


# What breaks fastbn, in which calls, and what must then be found: one of these, in the words of a finding.
ENDS = "ends the process (SIG"
BROKEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "checks.check_place = lambda *_, **__: None": ("batch_norm", ("out=over x): y is wrong",)),
    "checks.check_out = lambda *_, **__: None": (
        "batch_norm_inference",
        ("out=row): was accepted", "out=swapped): y is wrong"),
    ),
    "checks.check_like = lambda array, x, name: np.asarray(array)": (
        "batch_norm_backward_reduce",
        ("Error that names no argument",),
    ),
    "checks.as_parameter = lambda value, *_: value": ("batch_norm_inference", ("gamma=short): was accepted", ENDS)),
    "checks.as_statistic = lambda value, *_: value": (
        "batch_norm_inference",
        ("mean=short): was accepted", "y is wrong", ENDS),
    ),
    "after('batch_norm', lambda result, x, *_: put(x, 0))": ("batch_norm", ("wrote where it should not", ENDS)),
    "after('batch_norm', lambda result, *_: scale(result[0]))": ("batch_norm", ("y is wrong",)),
    "after('moments', lambda result, *_: scale(result.m2))": ("moments", ("var is wrong",)),
    "after('moments', lambda result, *_: [][0])": ("moments", ("refused what is right (IndexError)",)),
    "after('moments', lambda result, *_: os.abort())": ("moments", (f"{ENDS}ABRT)",)),
    "after('batch_norm_backward', lambda result, *_: scale(result[1]))": ("batch_norm_backward", ("dgamma is wrong",)),
    "after('batch_norm_inference', lambda y, *_: beyond(y, 1))": (
        "batch_norm_inference",
        ("wrote where it should not", ENDS),
    ),
    "after('batch_norm_inference', lambda y, *_: beyond(y, -1))": (
        "batch_norm_inference",
        ("wrote where it should not", ENDS),
    ),
    "layer(lambda bn: scale(bn.running_var), lambda bn: None)": ("layer", ("running_var is wrong",)),
    "layer(lambda bn: scale(bn.gamma), lambda bn: None)": (
        "layer",
        ("BatchNorm.forward(): wrote", "BatchNorm.state_dict(): weight is wrong"),
    ),
    "layer(lambda bn: None, lambda bn: setattr(bn, 'num_batches_tracked', 77))": (
        "layer",
        ("an error, but state was changed",),
    ),
}
BREAK = """
import contextlib, ctypes, json, os, sys
import numpy as np
import fastbn
from fastbn.arguments import checks
from tests.fuzz import __main__ as fuzz

fuzz.load(False)
modules = [module for name, module in sys.modules.items() if name.startswith("fastbn")]
whole = [(module, dict(vars(module))) for module in modules]

def after(name, act):
    "Let something happen behind each call of a function."
    own = getattr(fastbn, name)
    def broken(*given, **words):
        result = own(*given, **words)
        act(result, *given)
        return result
    for module in modules:
        if getattr(module, name, None) is own:
            setattr(module, name, broken)

def layer(act, refused):
    "Behind each forward, and behind each error of it."
    class Broken(fastbn.BatchNorm):
        def forward(self, *given):
            try:
                y = super().forward(*given)
            except Exception:
                refused(self)
                raise
            act(self)
            return y
    fastbn.BatchNorm = Broken

def scale(array):
    if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.flags.writeable:
        array *= array.dtype.type(1.01)

def put(array, value):
    if isinstance(array, np.ndarray) and array.flags.writeable and array.dtype.kind == "f":
        array[...] = value

def beyond(y, way):
    "Change the byte behind an array's last element, or before its first."
    ends = [way * max(0, way * (n - 1) * step) for n, step in zip(y.shape, y.strides)]
    ctypes.memset(y.ctypes.data + sum(ends) + (y.itemsize if way > 0 else -1), 0, int(y.size > 0))

for broken, (only, parts) in json.loads(sys.argv.pop(1)).items():
    exec(broken)
    runner = fuzz.Runner(fuzz.parsed([*sys.argv[1:], "--only", only]))
    runner.enough = lambda found: any(part in f"{found.same} {found.detail}" for part in parts)
    runner.run()
    print(json.dumps([f"{found.same} {found.detail}" for found in runner.found.values()]))
    for module, names in whole:
        vars(module).update(names)
"""


@pytest.mark.process
def test_what_is_broken_is_found() -> None:
    words = "--calls 4000 --seconds 600 --jobs 1 --no-torch --dtypes float32"
    done = run(BREAK, json.dumps(BROKEN), *words.split())
    assert done.returncode == 0, done.stderr
    for (broken, (_, parts)), line in zip(BROKEN.items(), done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert any(part in text for part in parts for text in found), (broken, found)


# Its parts


@pytest.fixture
def make() -> Maker:
    return Maker(World(), random.Random(0))


@pytest.mark.parametrize("twist", sorted(set(TWISTS)))
def test_what_changes_beside_an_array_is_seen(make: Maker, twist: str) -> None:
    world, shape = make.world, (2, 3, 4)
    for _ in range(20):
        array = lay(world, make.rng, shape, np.dtype("f4"), strides(make.rng, shape, 4, 1, twist))
        array[...] = draw(make.rng, shape)
        world.look()
        assert not world.changed()
        array[1, 2, 3] += 1
        assert world.changed()
        kept = array.copy()
        assert not world.changed(array)
        assert array.tobytes() == kept.tobytes()
        room = world.home(array)
        assert room is not None
        free = [window for window in room.windows if (window == 0xFF).any()][-1]
        free[np.flatnonzero(free == 0xFF)[-1]] = 0
        assert world.changed(array)
        world.end()


def test_what_a_wrong_array_means(make: Maker) -> None:
    """Each odd kind holds its values, where it is none that must be refused."""
    values, kinds = np.array([1.0 / 3.0, 0.0, 3.0]), set()
    for turn in range(2000):
        one = vector(make, "gamma", values, ("f4", "f8")[turn % 2], True)
        kinds.add(one.kind)
        assert (one.wide is None) == (one.status == WRONG)
        if one.status == ODD and one.kind not in ("wrapped", "tensor", "memoryview", "interface"):
            np.testing.assert_array_equal(np.array(one.value, np.float64), one.wide)
    assert len(kinds) > 45
    make.world.end()


def test_what_a_layer_holds_is_known(make: Maker) -> None:
    """Of copies too: arrays of a subclass stay of it, a mapped one can then be written; of a count that a state does
    not replace.
    """
    found: list[Finding] = []
    judge = Judge(0, ["float32"], lambda text: None, found.append)
    for kind in ("mapped", "subclass", "read-only", "list"):
        bn = fastbn.BatchNorm(3)
        model = Layer(judge, make, bn, np.dtype("f4"), (4, 3), 1, [])
        value, wide = MEANING[kind](make, np.array([1.0, 2.0, 4.0]), np.dtype("f4"))
        model.put("running_var", Given("running_var", value, wide, kind, ODD))
        model.bn = copy.deepcopy(bn)
        model.learn()
        if kind != "list":
            model.bn.running_var[0] = 7.0
        model.learn()
        held = model.is_["running_var"]
        assert (held.value is model.bn.running_var, held.status) == (
            True,
            {"read-only": RIGHT, "list": UNKNOWN}.get(kind, ODD),
        )
        assert held.wide is None if kind == "list" else list(held.wide) == [7.0, 2.0, 4.0]
        model.forward()
    model = Layer(judge, make, fastbn.BatchNorm(3, track_running_stats=False), np.dtype("f4"), (4, 3), 1, [])
    model.put("num_batches_tracked", Given("num_batches_tracked", [], None, "a list", UNKNOWN))
    for _ in range(9):
        model.load_state_dict()
    assert model.is_["num_batches_tracked"].value == []
    assert not found
    make.world.end()


def test_a_wrong_number_is_none_that_passes() -> None:
    x = np.arange(24.0).reshape(4, 6)
    truth = Truth(x, 1)
    right = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    assert truth.y("float32", right.astype(np.float32)) is None
    for wrong in (right * 1.0001, right + 1e-4, np.full_like(right, np.nan), right[:3], right.astype(int)):
        assert truth.y("float32", wrong) is not None
    nothing = np.full(3, np.nan)
    assert near("y", "float32", nothing, nothing) is None
    assert near("y", "float32", np.ones(3), nothing) is not None
