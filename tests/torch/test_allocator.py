"""Memory of large results: taken again when they are gone and never before, bounded, and the system's when it asks."""

import gc
import mmap
from functools import partial
from typing import Any

import pytest
from launch import at_once
from processes import Run, compiled, forks

torch = pytest.importorskip("torch", reason="the bridge to PyTorch: pip install 'fastbn[torch]'")

from torch_pairs import LAYOUTS, draw  # noqa: E402

import fastbn.torch  # noqa: E402
from fastbn.arguments import config  # noqa: E402
from fastbn.torch import BatchNorm2d, allocator, tensors  # noqa: E402

pytestmark = pytest.mark.peers

MB = 2**20
keeps = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="memory is kept where the system can take it back")


@pytest.fixture(scope="module", autouse=True)
def no_garbage() -> None:
    """What other modules' tests left could come back in the midst of these. Once: beside all of PyTorch it takes 0.5
    s.
    """
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_kept() -> Any:
    fastbn.torch.empty_cache()
    yield
    fastbn.torch.empty_cache()


def result(nbytes: int = 4 * MB) -> Any:
    return allocator.like(torch.empty(nbytes // 4))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_like_x(dtype: Any, layout: str) -> None:
    x = LAYOUTS[layout](torch.zeros(3, 5, 7, 11, dtype=dtype))
    y = allocator.like(x)
    assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)
    assert (y.storage_offset(), y.untyped_storage().nbytes(), y._base) == (0, x.nbytes, None)
    assert y.data_ptr() % allocator.HUGE == 0
    assert torch.equal(y.copy_(x), x)


@keeps
def test_memory_is_taken_again_by_a_result_of_the_same_size() -> None:
    first = result(5 * MB)
    address = first.data_ptr()
    assert allocator.kept() == 0
    del first
    assert allocator.kept() == 5 * MB
    other, same = result(6 * MB), result(5 * MB)
    assert (same.data_ptr(), allocator.kept()) == (address, 0)
    assert other.data_ptr() != address


@keeps
@pytest.mark.parametrize(
    "hold", [lambda y: y[3:5], lambda y: y.numpy(), lambda y: y.detach(), lambda y: y.untyped_storage()]
)
def test_it_is_not_taken_while_anything_sees_it(hold: Any) -> None:
    y = result()
    address, held = y.data_ptr(), hold(y)
    del y
    assert allocator.kept() == 0
    assert result().data_ptr() != address
    del held
    assert address in {result().data_ptr() for _ in range(2)} | {y.data_ptr() for y in [result(), result()]}


@keeps
def test_no_more_is_kept_than_the_limit_and_the_longest_unused_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "KEEP_BYTES", 16 * MB)
    for size in (4, 5, 6, 7):
        result(size * MB)
    assert allocator.kept() == 13 * MB  # of 6 and 7
    result(17 * MB)
    assert allocator.kept() == 13 * MB
    monkeypatch.setattr(config, "KEEP_BYTES", 0)
    results = [result(6 * MB), result(7 * MB)]
    assert allocator.kept() == 0
    results.clear()
    assert allocator.kept() == 0


@keeps
def test_empty_cache_gives_it_back() -> None:
    result()
    assert allocator.kept() == 4 * MB
    fastbn.torch.empty_cache()
    assert allocator.kept() == 0


def test_nothing_is_kept_that_the_system_could_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where there is no such advice, and where pages are locked."""
    for name in ("MADV_FREE", "MADV_HUGEPAGE", "MAP_PRIVATE"):
        monkeypatch.delattr(mmap, name, raising=False)
        y = result().fill_(2)
        assert float(y.sum()) == 2 * y.numel()
        del y
        assert allocator.kept() == 0


@keeps
def test_where_memory_is_short_what_is_kept_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    result()
    own, asked = allocator._mapped, []

    def mapped(size: int) -> Any:
        asked.append(allocator.kept())
        if asked[-1]:
            raise OSError(12, "Cannot allocate memory")
        return own(size)

    monkeypatch.setattr(allocator, "_mapped", mapped)
    assert result(8 * MB).nbytes == 8 * MB
    assert asked == [4 * MB, 0]


def test_a_result_that_has_no_room_is_a_memory_error() -> None:
    x = torch.empty(1, device="meta").expand(1 << 60)
    with pytest.raises(MemoryError, match=f"result: {x.nbytes} bytes can't be allocated; want a smaller batch"):
        allocator._bytes(x.nbytes)


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_step_in_memory_of_the_last_has_the_same_bits(layout: str) -> None:
    """Whatever lies in it: here what is no number."""
    x = LAYOUTS[layout](draw((8, 6, 160, 160), 1.0, 0, torch.float32)[0])
    assert x.nbytes >= tensors.LARGE
    found = []
    for _ in range(3):
        module, leaf = BatchNorm2d(6), x.clone().requires_grad_()
        y = module(leaf)
        y.backward(x.cos())
        inferred = [module.eval()(x).detach() for _ in range(2)]
        found.append(
            [value.clone() for value in (y.detach(), leaf.grad, *inferred, module.weight.grad, module.bias.grad)]
        )
        for value in (y.detach(), leaf.grad, *inferred):
            value.fill_(torch.nan)
        del y, leaf, value, inferred
    assert allocator.kept() > 0 or not hasattr(mmap, "MADV_FREE")
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_threads_never_get_the_same_memory() -> None:
    wrong, before = [], set(allocator._lent)

    def work(number: int) -> None:
        for k in range(200):
            y = result(4 * MB + 4096 * (k % 3))
            y[::1024] = number
            if not bool((y[::1024] == number).all()):
                wrong.append((number, k))

    at_once([partial(work, k) for k in range(4)])
    assert not wrong
    gc.collect()
    assert not set(allocator._lent) - before


@keeps
@forks
@pytest.mark.process
def test_a_child_has_memory_of_its_own(run: Run) -> None:
    """The parent keeps none beyond a fork; results on either side stay what they are, and the process ends in silence,
    with one alive.
    """
    code = """
        import torch
        from fastbn.torch import allocator
        torch.set_num_threads(1)  # a child that uses PyTorch's threads waits for ever
        like = torch.empty(2**20)
        y = allocator.like(like).fill_(1)
        allocator.like(like)
        print(allocator.kept())
        def child():
            seen = float(y.mean())
            y.fill_(2)
            z = allocator.like(like).fill_(3)
            return seen, float(z.mean()), float(y.mean()), allocator.kept()
        print(in_child(child), float(y.mean()), allocator.kept())
        """
    out, err = run(code, "tbb")
    assert out == f"{4 * MB}\n(1.0, 3.0, 2.0, 0) 1.0 0\n"
    assert not err
