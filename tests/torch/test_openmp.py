"""fastbn's kernels on PyTorch's threads: the same bits, from the disk cache too, nothing left changed, and never in a
forked child.
"""

import os
from functools import partial

import numpy as np
import pytest
from launch import at_once, python

torch = pytest.importorskip("torch", reason="its threads")

from llvmlite import binding  # noqa: E402
from numba import njit, prange  # noqa: E402

import fastbn  # noqa: E402
from fastbn.cpu import pool, team, threads  # noqa: E402
from fastbn.cpu.kernels import jit  # noqa: E402
from fastbn.torch import BatchNorm2d, explain, openmp, private  # noqa: E402

pytestmark = pytest.mark.peers

SHAPE = (8, 24, 40, 40)  # over the size from which kernels are parallel


@pytest.fixture
def runtime() -> team.Runtime:
    found = openmp._runtime()
    if found is None or jit.DISABLED or not pool.ready() or fastbn.get_num_threads() < 2:
        pytest.skip("needs a PyTorch on GNU OpenMP, TBB and two processors")
    fastbn.moments(np.ones((2, 1)))  # as in a kernel's life: before numba has begun nothing can be linked
    return found


def _calls(x: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
    gamma, beta = np.linspace(0.5, 2.0, 24, dtype=np.float32), np.linspace(-1.0, 1.0, 24, dtype=np.float32)
    y, m = fastbn.batch_norm(x, gamma, beta)
    one = fastbn.batch_norm_inference(x, m.mean, m.var(), gamma, beta)
    given = fastbn.batch_norm_inference_backward(dy, x, m.mean, m.var(), gamma)
    return [y, m.mean, m.m2, one, *given, *fastbn.batch_norm_backward(dy, x, m, gamma), fastbn.moments(x).m2]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("members", [2, None])
def test_the_bits_are_those_of_numbas_threads(runtime: team.Runtime, last: bool, members: int | None) -> None:
    x, dy = (np.random.default_rng(seed).normal(3.0, 2.0, SHAPE).astype(np.float32) for seed in range(2))
    if last:
        x, dy = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in (x, dy))
    want = _calls(x, dy)
    with threads.on_team(runtime), threads.limited(members):
        assert "OpenMP team" in threads.describe()
        found = _calls(x, dy)
    assert "OpenMP team" not in threads.describe()
    for a, b in zip(found, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_linking_leaves_numbas_own_threads_to_everyone_else(runtime: team.Runtime) -> None:
    before = binding.address_of_symbol(team.PARALLEL_FOR)
    with team.linked(runtime):
        assert binding.address_of_symbol(team.PARALLEL_FOR) not in (None, before)
    assert binding.address_of_symbol(team.PARALLEL_FOR) == before

    @njit(parallel=True)
    def squares(n):
        found = np.empty(n)
        for i in prange(n):
            found[i] = i * i
        return found

    np.testing.assert_array_equal(squares(1000), np.arange(1000.0) ** 2)


def test_every_step_of_a_loop_is_taken_once(runtime: team.Runtime) -> None:
    with team.linked(runtime):

        @njit("i8[:](i8)", parallel=True)
        def count(n):
            found = np.zeros(n, np.int64)
            for i in prange(n):
                found[i] += i + 1
            return found

    for size in (0, 1, 2, 3, 7, 1000):
        np.testing.assert_array_equal(count(size), np.arange(1, size + 1))


def test_modules_run_on_pytorchs_threads(runtime: team.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    form = jit.Kernel.form
    monkeypatch.setattr(jit.Kernel, "form", lambda kernel, *given: seen.append(threads.team()) or form(kernel, *given))
    x = torch.randn(SHAPE, requires_grad=True)
    bn = BatchNorm2d(24)
    bn(x).sum().backward()
    bn.eval()(x)
    assert seen == [runtime] * 3
    assert threads.team() is None
    assert "OpenMP team" in explain(bn, x)


def test_python_threads_have_teams_of_their_own(runtime: team.Runtime) -> None:
    bn, x = BatchNorm2d(24, track_running_stats=False), torch.randn(SHAPE)
    want, found = bn(x), [None] * 3

    def work(k: int) -> None:
        for _ in range(20):
            found[k] = bn(x)

    at_once([partial(work, k) for k in range(3)])
    assert all(torch.equal(y, want) for y in found)


FORKS = f"""
import os
import torch
from fastbn.torch import BatchNorm2d, openmp
torch.manual_seed(0)
x, bn = torch.randn{SHAPE}, BatchNorm2d(24)
want = bn(x).detach().numpy()
child = os.fork()
if not child:
    inside = openmp.of_pytorch()._runtime
    same = (bn(x).detach().numpy() == want).all()  # not PyTorch's own comparison, which waits for the parent's threads
    os._exit(0 if inside is None and same else 1)
assert os.waitpid(child, 0)[1] == 0
print(abs(want.astype("f8")).sum().hex())
"""


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_from_the_disk_cache_and_in_a_forked_child(runtime: team.Runtime) -> None:
    torch.manual_seed(0)
    x, bn = torch.randn(SHAPE), BatchNorm2d(24)
    want = abs(bn(x).detach().numpy().astype("f8")).sum().hex()
    assert python("-c", FORKS) == f"{want}\n"


LAYERS = """
import torch
from numba.core import event
from fastbn.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d, explain
torch.set_num_threads(2)
shapes = (64, 32), (4096, 70), (300, 300), (4, 3, 5, 5), (32, 64, 7, 7), (2, 2, 300, 300), (4, 64, 64, 64)
shapes += (8, 24, 40, 40), (4, 8, 4, 4, 4)
with event.install_recorder("numba:compile") as seen:
    for shape in shapes:
        for transposed in (False, True):
            x = torch.randn(shape).movedim(1, -1).contiguous().movedim(-1, 1) if transposed else torch.randn(shape)
            bn = {2: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}[len(shape)](shape[1])
            for mode in (True, False):
                bn.train(mode)(x.requires_grad_()).square().sum().backward()
            with torch.no_grad():
                bn(x), bn(x)
names = [e.data["dispatcher"].py_func.__name__ for _, e in seen.buffer]
print(names, "OpenMP team" in explain(bn, torch.randn(8, 8, 16, 16, 16)))
"""


@pytest.mark.process
def test_after_warmup_layers_compile_nothing(runtime: team.Runtime) -> None:
    """In another process, on PyTorch's threads; of one dtype, for two minutes where nothing is kept yet."""
    assert "inference.columns float32 team" in python("-m", "fastbn", "warmup", "float32")
    assert python("-c", LAYERS) == "[] True\n"


def test_without_a_known_runtime_numbas_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool")
    assert openmp._runtime.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setattr(private.ctypes, "CDLL", lambda path: (_ for _ in ()).throw(OSError("no such file")))
    assert openmp._runtime.__wrapped__() is None
