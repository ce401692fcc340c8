"""The layer beside torch.nn.BatchNorm1d/2d/3d: through training steps, evaluation, state_dict, and where the two differ
by design.
"""

from typing import Any

import numpy as np
import published
import pytest
from shapes import COMPACT
from tolerances import check, scales

import fastbn

torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install 'fastbn[peers]'")

pytestmark = pytest.mark.peers

SHAPES = {  # the module, and one shape of each rank it takes
    "1d, rank 2": (torch.nn.BatchNorm1d, (33, 5)),
    "1d, rank 3": (torch.nn.BatchNorm1d, (6, 5, 9)),
    "2d": (torch.nn.BatchNorm2d, (4, 5, 7, 6)),
    "2d, short rows": (torch.nn.BatchNorm2d, (8, 5, 1, 1)),
    "3d": (torch.nn.BatchNorm3d, (2, 5, 3, 4, 5)),
}
CHANNELS = 5
OFFSETS = (0.0, 1e2, 1e4, 1e6)
LAYOUTS = ("C", "channels_last")
STEPS = [(name, at, LAYOUTS[(i + k) % 2]) for i, name in enumerate(SHAPES) for k, at in enumerate(OFFSETS)]


def _draw(shape: tuple[int, ...], offset: float, seed: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(x, dy); the channels have scales 1 to 3."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(1.0, 3.0, shape[1]).reshape(-1, *(1,) * (len(shape) - 2))
    return (offset + scale * rng.standard_normal(shape)).astype(dtype), rng.standard_normal(shape).astype(dtype)


def _pair(module: Any, dtype: Any = np.float32, **options: Any) -> tuple[fastbn.BatchNorm, Any]:
    """A fastbn layer of `dtype` and PyTorch's in float64, with the same parameters: PyTorch's arithmetic, without
    float32's error.
    """
    theirs = module(CHANNELS, dtype=torch.float64, **options)
    ours = fastbn.BatchNorm(CHANNELS, dtype=dtype, **options)
    if ours.gamma is not None and ours.beta is not None:
        ours.gamma[:], ours.beta[:] = np.linspace(0.5, -1.5, CHANNELS), np.linspace(-1.0, 1.0, CHANNELS)
        with torch.no_grad():
            theirs.weight.copy_(torch.from_numpy(ours.gamma))
            theirs.bias.copy_(torch.from_numpy(ours.beta))
    return ours, theirs


def _step(ours: fastbn.BatchNorm, theirs: Any, x: np.ndarray, dy: np.ndarray) -> None:
    """One forward and backward of both, compared: y, gradients, statistics."""
    batch = ours.training or ours.running_mean is None
    if not batch:  # rounded to float32 at every training step, compared there: from here on the same numbers
        theirs.running_mean.copy_(torch.from_numpy(ours.running_mean))
        theirs.running_var.copy_(torch.from_numpy(ours.running_var))
    wide = torch.from_numpy(x).double().requires_grad_()
    theirs.zero_grad()
    want = theirs(wide)
    want.backward(torch.from_numpy(dy).double())
    stats = published.statistics(x, 1)
    mean, var = (stats.mean, stats.var) if batch else (ours.running_mean.astype(float), ours.running_var.astype(float))
    y, dx = ours(x), ours.backward(dy)
    natural = scales(dy, x, mean, var, ours.gamma, ours.beta, 1, ours.eps, batch)
    check("y", x.dtype, y, want.detach().numpy(), natural.y)
    check("dx", x.dtype, dx, wide.grad.numpy(), natural.dx)
    if ours.gamma is not None:
        check("dgamma", x.dtype, ours.dgamma, theirs.weight.grad.numpy(), natural.dgamma)
        check("dbeta", x.dtype, ours.dbeta, theirs.bias.grad.numpy(), natural.dbeta)
    if ours.running_mean is not None:
        check("mean", x.dtype, ours.running_mean, theirs.running_mean.numpy(), np.maximum(1.0, np.abs(stats.mean)))
        check("var", x.dtype, ours.running_var, theirs.running_var.numpy(), 1.0 + stats.var)
        assert ours.num_batches_tracked == int(theirs.num_batches_tracked)


@pytest.mark.parametrize(("name", "offset", "layout"), STEPS)
def test_training_then_evaluation(name: str, offset: float, layout: str) -> None:
    module, shape = SHAPES[name]
    ours, theirs = _pair(module)
    steps = [[COMPACT[layout](array, 1) for array in _draw(shape, offset, seed)] for seed in range(4)]
    for x, dy in steps[:3]:
        _step(ours, theirs, x, dy)
    _step(ours.eval(backward=True), theirs.eval(), *steps[3])
    assert ours.num_batches_tracked == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.7])
def test_momentum_and_eps(momentum: float | None, eps: float, dtype: Any) -> None:
    ours, theirs = _pair(torch.nn.BatchNorm2d, dtype, momentum=momentum, eps=eps)
    for seed in range(3):
        _step(ours, theirs, *_draw((4, 5, 3, 3), 1e2, seed, dtype))
    before = ours.running_mean.copy()
    _step(ours.eval(backward=True), theirs.eval(), *_draw((4, 5, 3, 3), 1e2, 3, dtype))
    np.testing.assert_array_equal(ours.running_mean, before)
    assert (momentum == 0.0) == bool((before == 0.0).all())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_without_parameters_or_running_statistics(affine: bool, track: bool, training: bool) -> None:
    ours, theirs = _pair(torch.nn.BatchNorm2d, affine=affine, track_running_stats=track)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for seed in range(2):
        _step(
            (ours.train() if training else ours.eval(backward=True)),
            theirs.train(training),
            *_draw((4, 5, 3, 3), 1e2, seed),
        )
    assert (ours.dgamma is None) == (ours.dbeta is None) == (not affine)


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1), (1, 5, 1, 1), (1, 5, 1, 1, 1)])
def test_one_value_per_channel(shape: tuple[int, ...]) -> None:
    module = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}[
        len(shape)
    ]
    ours, theirs = _pair(module)
    x, dy = _draw(shape, 0.0, 0)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as torchs:
        theirs(torch.from_numpy(x).double())
    with pytest.raises(
        ValueError, match="Expected more than 1 value per channel when training, got input size"
    ) as fastbns:
        ours(x)
    assert [c for c in str(torchs.value) if c.isdigit()] == [c for c in str(fastbns.value) if c.isdigit()]
    assert ours.num_batches_tracked == 0
    theirs.num_batches_tracked.zero_()  # PyTorch has counted the batch that it refused
    _step(ours.eval(backward=True), theirs.eval(), x, dy)


def test_an_empty_batch_is_not_counted() -> None:
    """By design unlike PyTorch, which leaves the running statistics alone but counts the batch: its next cumulative
    average is off.
    """
    ours, theirs = _pair(torch.nn.BatchNorm2d, momentum=None)
    empty = np.empty((0, 5, 3, 3), np.float32)
    before = {key: value.copy() for key, value in ours.state_dict().items()}
    assert (
        ours(empty).shape
        == ours.backward(empty).shape
        == tuple(theirs(torch.from_numpy(empty).double()).shape)
        == empty.shape
    )
    assert not ours.dgamma.any()
    assert not ours.dbeta.any()
    for key, value in ours.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    assert ours.num_batches_tracked == 0
    assert int(theirs.num_batches_tracked) == 1


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_dict_both_ways(dtype: str, options: dict[str, Any]) -> None:
    theirs = torch.nn.BatchNorm2d(CHANNELS, dtype=getattr(torch, dtype), **options)
    x, _ = _draw((4, 5, 3, 3), 3.0, 0, dtype)
    for _ in range(2):
        theirs(torch.from_numpy(x))
    ours = fastbn.BatchNorm(CHANNELS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    state = theirs.state_dict()

    ours.load_state_dict(state)
    mine = ours.state_dict()
    assert list(mine) == list(state)
    for key, value in mine.items():
        assert value.dtype.name == str(state[key].dtype)[6:], key
        assert value.shape == tuple(state[key].shape), key
        np.testing.assert_array_equal(value, state[key].numpy())
    if "num_batches_tracked" in mine:
        assert mine["num_batches_tracked"].dtype == np.int64
        assert mine["num_batches_tracked"].shape == ()
        assert ours.num_batches_tracked == 2

    fresh = torch.nn.BatchNorm2d(CHANNELS, dtype=getattr(torch, dtype), **options)
    fresh.load_state_dict({key: torch.from_numpy(value) for key, value in mine.items()}, strict=True)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_biased_running_variance(momentum: float | None, offset: float) -> None:
    """The switch for ONNX, Keras and Flax, against the formula: m2 / count moves the running variance, and y is the
    same.
    """
    biased = fastbn.BatchNorm(CHANNELS, momentum=momentum, unbiased_running_var=False)
    plain = fastbn.BatchNorm(CHANNELS, momentum=momentum)
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)
    for step in range(1, 4):
        x, _ = _draw((2, 5, 3, 1), offset, step)  # 6 values: the two variances differ by a fifth
        weight = 1.0 / step if momentum is None else momentum
        stats = published.statistics(x, 1)
        mean, var = mean + weight * (stats.mean - mean), var + weight * (stats.var - var)
        np.testing.assert_array_equal(biased(x), plain(x))
        check("mean", np.float32, biased.running_mean, mean, np.maximum(1.0, np.abs(stats.mean)))
        check("var", np.float32, biased.running_var, var, 1.0 + stats.var)
        assert (plain.running_var > biased.running_var * 1.001).all()
