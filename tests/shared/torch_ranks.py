"""What every process of torch.distributed does and checks beside rank_checks.py: fastbn.torch.SyncBatchNorm, on the CPU
with gloo.
"""

import copy
import pickle
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from across import SECONDS, Ranks
from torch import distributed, nn

from fastbn.torch import SyncBatchNorm, convert_sync_batchnorm

ORDINARY: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
FORMATS: dict[int, Any] = {4: torch.channels_last, 5: torch.channels_last_3d}


def join(folder: Path, rank: int, size: int) -> Ranks:
    """The group of all processes, which meet at a file."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    return Ranks(distributed.group.WORLD, rank, size)


def draw(shares: tuple[int, ...], rest: tuple[int, ...], dtype: Any, offset: float, last: bool = False) -> Any:
    """The whole batch, its gradient, and a function that cuts out a rank's part."""
    generator = torch.Generator().manual_seed(0)
    ends = [sum(shares[:i]) for i in range(len(shares) + 1)]
    given = [(torch.randn(ends[-1], *rest, generator=generator) * 2 + at).to(dtype) for at in (offset, 0.0)]
    if last:
        given = [tensor.to(memory_format=FORMATS[tensor.ndim]) for tensor in given]
    return (*given, lambda tensor, rank: tensor[ends[rank] : ends[rank + 1]])


def pair(channels: int, dims: int, dtype: Any = torch.float32, **options: Any) -> tuple[SyncBatchNorm, Any]:
    """A synchronized module, and PyTorch's ordinary one in float64 with the same parameters."""
    generator = torch.Generator().manual_seed(1)
    bn, want = SyncBatchNorm(channels, dtype=dtype, **options), ORDINARY[dims](channels, dtype=torch.float64, **options)
    with torch.no_grad():
        for own, theirs in zip(bn.parameters(), want.parameters(), strict=True):
            own.copy_(torch.randn(channels, generator=generator))
            theirs.copy_(own)
    return bn, want


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks."""
    found = tensor.detach().double().clone()
    distributed.all_reduce(found)
    return found


SHARES = ((3, 1, 5), (2, 0, 4), (0, 3, 1), (1, 1, 1))
CASES = [
    *(
        (shares, rest, torch.float32, 1e2, False, {})
        for shares in SHARES
        for rest in ((4,), (4, 5), (4, 3, 5), (4, 2, 3, 2))
    ),
    *(((3, 0, 2), (4, 3, 5), torch.float32, offset, True, {}) for offset in (0.0, 1e2, 1e4)),
    ((3, 0, 2), (4, 2, 3, 2), torch.float32, 1.0, True, {}),
    ((3, 0, 2), (4, 3, 5), torch.float64, 1e4, False, {}),
    ((3, 0, 2), (4, 3, 5), torch.float16, 8.0, False, {}),
    ((3, 0, 2), (4, 3, 5), torch.bfloat16, 8.0, False, {}),
    ((3, 0, 2), (4, 5), torch.float32, 1.0, False, {"momentum": None}),
    ((3, 0, 2), (4, 5), torch.float32, 1.0, False, {"affine": False}),
    ((3, 0, 2), (4, 5), torch.float32, 1.0, False, {"track_running_stats": False}),
]


def synchronized_training(r: Ranks) -> None:
    """Two steps, then evaluation, beside PyTorch's module on the whole batch in float64."""
    for number, (shares, rest, dtype, offset, last, options) in enumerate(CASES):
        x, dy, part = draw(shares, rest, dtype, offset, last)
        bn, want = pair(4, x.ndim, torch.float64 if dtype == torch.float64 else torch.float32, **options)
        for _ in range(2):
            whole = x.clone().double().requires_grad_()
            y_whole = want(whole)
            want.zero_grad(), y_whole.backward(dy.double())
            mine = part(x, r.rank).detach().requires_grad_()
            bn.zero_grad()
            y = bn(mine)
            y.backward(part(dy, r.rank))
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        close: Any = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
        assert y.dtype == mine.grad.dtype == dtype
        torch.testing.assert_close(y.double(), part(y_whole, r.rank).detach(), **close)
        torch.testing.assert_close(mine.grad.double(), part(whole.grad, r.rank), **close)
        if mine.numel() and last:
            assert y.is_contiguous(memory_format=FORMATS[y.ndim])
            assert mine.grad.is_contiguous(memory_format=FORMATS[y.ndim])
        for own, theirs in zip(bn.parameters(), want.parameters(), strict=True):
            assert own.grad.dtype == own.dtype
            torch.testing.assert_close(total(own.grad), theirs.grad, rtol=1e-5, atol=1e-4)
        if bn.track_running_stats:
            assert int(bn.num_batches_tracked) == int(want.num_batches_tracked) == 2
            r.same(f"SyncBatchNorm {number}", bn.running_mean, bn.running_var)
            torch.testing.assert_close(bn.running_mean, want.running_mean, rtol=1e-6, atol=1e-6, check_dtype=False)
            torch.testing.assert_close(bn.running_var, want.running_var, rtol=1e-6, atol=1e-6, check_dtype=False)
            torch.testing.assert_close(bn.eval()(mine).double(), part(want.eval()(whole), r.rank), **close)


def half_parameters(r: Ranks) -> None:
    """A model after .half(), which PyTorch takes: parameters and running statistics are half, the arithmetic is not."""
    x, dy, part = draw((3, 0, 2), (4, 5), torch.float16, 1.0)
    bn, want = pair(4, 3)
    bn = bn.half()
    with torch.no_grad():
        for own, theirs in zip(bn.parameters(), want.parameters(), strict=True):
            theirs.copy_(own)
    y = bn(part(x, r.rank))
    y.backward(part(dy, r.rank))
    torch.testing.assert_close(y.double(), part(want(x.double()), r.rank), rtol=2e-3, atol=2e-3)
    assert bn.weight.grad.dtype == bn.running_mean.dtype == torch.float16
    torch.testing.assert_close(bn.running_var.double(), want.running_var, rtol=2e-3, atol=0)


def alone(r: Ranks) -> None:
    """Evaluation, a backward that x does not need, and a group of one rank ask nothing of the others."""
    x, _, _ = draw((4,), (3, 5), torch.float32, 1.0)
    first, bn, own = (
        SyncBatchNorm(3),
        SyncBatchNorm(3),
        SyncBatchNorm(3, process_group=[distributed.new_group([n]) for n in range(3)][r.rank]),
    )
    y = first(x)
    if r.rank == 0:
        y.sum().backward()
        assert first.weight.grad is not None
        torch.testing.assert_close(first.bias.grad, torch.full((3,), 20.0))
        want = nn.BatchNorm1d(3)
        torch.testing.assert_close(own(x), want(x))
        torch.testing.assert_close(own.running_var, want.running_var)
        torch.testing.assert_close(bn.eval()(x), nn.BatchNorm1d(3).eval()(x))
        with r.fails(
            ValueError, "Expected more than 1 value per channel when training, got input size torch.Size([1, 3])"
        ):
            own(torch.ones(1, 3))
    bn.train()(x)


def refused(r: Ranks) -> None:
    """PyTorch's errors, in its words, on the rank that has the bad input; at once an error on the others too; nothing
    has changed.
    """
    x = torch.randn(2, 3, 4)
    bn = SyncBatchNorm(3)
    fresh = copy.deepcopy(bn.state_dict())
    bad: tuple[tuple[Any, type[Exception], str], ...] = (
        (torch.ones(2, 3, 4, dtype=torch.int64), NotImplementedError, "\"batch_norm\" not implemented for 'Long'"),
        (torch.ones(2, 5, 4), RuntimeError, "running_mean should contain 5 elements not 3"),
        (torch.ones(4), ValueError, "expected at least 2D input (got 1D input)"),
        (torch.ones(2, 0, 4), ValueError, "SyncBatchNorm number of input channels should be non-zero"),
        (x.double(), RuntimeError, "mixed dtype (CPU)"),
    )
    for on, (wrong, kind, words) in enumerate(bad):
        with r.fails(kind, words, on=on % 3):
            bn(wrong if r.rank == on % 3 else x)
    with r.fails(ValueError, "Expected more than 1 value per channel when training, got input size"):
        bn(x[: int(r.rank == 1), :, :1])
    with r.fails(ValueError, "4 on ranks 0, 2, 6 on rank 1"):
        n = 6 if r.rank == 1 else 4
        SyncBatchNorm(n)(torch.zeros(2, n))
    for key, value in bn.state_dict().items():
        assert torch.equal(value, fresh[key])
    y = bn(x.requires_grad_())
    with r.fails(RuntimeError, "once_differentiable"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum().backward()


def in_a_model(r: Ranks) -> None:
    """DistributedDataParallel over a converted model: the gradients of one process on the whole batch; compiled and
    copied models too.
    """
    torch.manual_seed(0)
    want = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    ).double()
    model = convert_sync_batchnorm(copy.deepcopy(want))
    x, dy, part = draw((3, 1, 2), (3, 6, 6), torch.float64, 1.0)
    (want(x) * dy[:, :2, :2, :2]).sum().backward()
    parallel = nn.parallel.DistributedDataParallel(model)
    y = parallel(part(x, r.rank))
    (y * part(dy, r.rank)[:, :2, :2, :2]).sum().backward()
    for own, theirs in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(own.grad * r.size, theirs.grad)  # DistributedDataParallel takes the mean
        r.same(f"gradient {len(r.bits)}", own.grad)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(part(x, r.rank)), y, rtol=0, atol=0)
    with warnings.catch_warnings():  # the tracer's own, where it goes around a module
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.compile(model, backend="eager")(part(x, r.rank)), y, rtol=0, atol=0)
    shared = SyncBatchNorm(3, process_group=r.comm)
    assert copy.deepcopy(shared).process_group is r.comm
    with torch.no_grad():
        assert not shared(part(x, r.rank).float()).requires_grad


def agrees_with_the_layer(r: Ranks) -> None:
    """The same statistics, bit for bit, as fastbn.BatchNorm of NumPy arrays over the same group."""
    import fastbn

    x = np.random.default_rng(r.rank).normal(1e2, 2, (3 + r.rank, 5, 4)).astype(np.float32)
    layer, module = fastbn.BatchNorm(5, comm=r.comm), SyncBatchNorm(5)
    np.testing.assert_array_equal(layer(x), module(torch.from_numpy(x)).detach().numpy())
    np.testing.assert_allclose(layer.running_var, module.running_var.numpy(), rtol=1e-7)


def a_rank_that_is_gone(r: Ranks) -> None:
    """The last: one process ends, and the others find out within the engine's timeout."""
    bn = SyncBatchNorm(3)
    bn(torch.ones(2, 3))
    if r.rank < 2:
        with r.fails(RuntimeError):
            bn(torch.ones(2, 3))


CHECKS = (
    synchronized_training,
    half_parameters,
    alone,
    refused,
    in_a_model,
    agrees_with_the_layer,
    a_rank_that_is_gone,
)
