"""fastbn.torch's modules beside torch.nn's: results, gradients, running statistics, strides."""

import copy
import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bridge to PyTorch: pip install 'fastbn[torch]'")

from torch_pairs import LAYOUTS, channels_last, draw, pair, step  # noqa: E402

import fastbn.torch  # noqa: E402

pytestmark = pytest.mark.peers
SHAPES = {
    "1d, rank 2": ("BatchNorm1d", (33, 5)),
    "1d, rank 3": ("BatchNorm1d", (6, 5, 9)),
    "2d": ("BatchNorm2d", (4, 5, 7, 6)),
    "2d, rows of one": ("BatchNorm2d", (8, 5, 1, 1)),
    "2d, two threads": ("BatchNorm2d", (8, 5, 64, 60)),
    "3d": ("BatchNorm3d", (2, 5, 3, 4, 5)),
}
# Every shape in every layout; an offset in turn, so that each meets every layout.
OFFSETS = itertools.cycle((0.0, 1e2, 1e4, 1e6))
STEPS = [(*case, next(OFFSETS)) for case in itertools.product(("contiguous", "channels_last", "crop"), SHAPES)]


@pytest.mark.parametrize(("layout", "name", "offset"), STEPS)
def test_training_then_evaluation(layout: str, name: str, offset: float) -> None:
    kind, shape = SHAPES[name]
    ours, theirs = pair(kind)
    steps = [[LAYOUTS[layout](tensor) for tensor in draw(shape, offset, seed)] for seed in range(3)]
    for x, dy in steps[:2]:
        step(ours, theirs, x, dy)
    step(ours.eval(), theirs.eval(), *steps[2])
    assert ours.num_batches_tracked == 2


MOMENTA = (0.1, 0.0, 1.0, None)


@pytest.mark.parametrize(
    ("dtype", "momentum", "eps"),
    [
        *itertools.product([torch.float32], MOMENTA, (1e-5, 0.7)),
        (torch.float64, None, 0.7),
        (torch.float16, 0.1, 1e-5),
        (torch.bfloat16, 0.1, 1e-5),
    ],
    ids=str,
)
def test_momentum_eps_and_dtype(dtype: Any, momentum: float | None, eps: float) -> None:
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    ours, theirs = pair("BatchNorm1d", parameters, momentum=momentum, eps=eps)
    for seed in range(3):
        step(ours, theirs, *draw((36, 5), 3.0, seed, dtype))
    before = ours.running_mean.clone()
    step(ours.eval(), theirs.eval(), *draw((36, 5), 3.0, 3, dtype))
    assert torch.equal(ours.running_mean, before)
    assert bool((before == 0).all()) == (momentum == 0.0)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_without_parameters_or_running_statistics(training: bool, options: dict[str, Any]) -> None:
    ours, theirs = pair("BatchNorm2d", **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for seed in range(2):
        step(ours.train(training), theirs.train(training), *draw((4, 5, 3, 3), 1e2, seed))


def test_statistics_that_are_switched_off_later_stay_as_they_are() -> None:
    """PyTorch's rule: in training they are left alone, in evaluation still used."""
    ours, theirs = pair("BatchNorm2d")
    step(ours, theirs, *draw((4, 5, 3, 3), 3.0, 0))
    ours.track_running_stats = theirs.track_running_stats = False
    before = copy.deepcopy(ours.state_dict())
    step(ours, theirs, *draw((4, 5, 3, 3), 3.0, 1))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    step(ours.eval(), theirs.eval(), *draw((4, 5, 3, 3), 3.0, 2))


def test_cumulative_average_without_a_count() -> None:
    ours, theirs = pair("BatchNorm1d", momentum=None)
    ours.num_batches_tracked = theirs.num_batches_tracked = None
    x, _ = draw((6, 5), 3.0, 0)
    ours(x), theirs(x.double())
    assert torch.equal(ours.running_mean.double(), theirs.running_mean)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 9), (4, 5, 7, 6), (4, 5, 2, 3, 4), (4, 1, 3, 3)], ids=str)
def test_memory_format_is_pytorchs(shape: tuple[int, ...], layout: str, training: bool) -> None:
    """Strides of y and dx, whatever those of x and dy."""
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)]
    x, _ = draw(shape, 1.0, 0)
    dy = torch.tensor([0.75]).expand(shape)  # as y.sum().backward() has it
    strides, grads = [], []
    for library in (torch.nn, fastbn.torch):
        for other in (dy, channels_last(dy), dy.contiguous()):
            module = getattr(library, kind)(shape[1]).train(training)
            given = LAYOUTS[layout](x).detach().requires_grad_()
            y = module(given)
            y.backward(other)
            strides.append([[t.stride(a) for a in range(t.dim()) if t.shape[a] > 1] for t in (y, given.grad)])
            grads.append(given.grad)
    assert strides[:3] == strides[3:]
    # expanded: rstd is 316
    torch.testing.assert_close(grads[3:], grads[:3], rtol=1e-4, atol=1e-3 if layout == "expanded" else 1e-5)


def test_a_frozen_layer_keeps_no_input_and_has_the_same_gradient() -> None:
    ours, theirs = pair("BatchNorm2d")
    step(ours, theirs, *draw((4, 5, 3, 3), 3.0, 0))
    for module in (ours.eval(), theirs.eval()):
        module.requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    x, dy = draw((4, 5, 3, 3), 1e2, 1)
    for layout in ("contiguous", "channels_last"):
        given, wide = LAYOUTS[layout](x).requires_grad_(), x.double().requires_grad_()
        y = ours(given)
        assert y.grad_fn.saved_tensors[0] is None
        y.backward(dy)
        theirs(wide).backward(dy.double())
        torch.testing.assert_close(given.grad.double(), wide.grad, rtol=1e-6, atol=0)
        assert given.grad.stride() == given.stride()


def test_a_change_of_the_statistics_before_backward_changes_no_gradient() -> None:
    for dtype in (torch.float32, torch.float64):
        ours, _ = pair("BatchNorm1d", dtype)
        x, dy = draw((6, 5), 3.0, 0, dtype)
        grads = []
        for change in (False, True):
            given = x.clone().requires_grad_()
            y = ours.eval()(given)
            if change:
                ours.train()(x * 7 + 5)
            y.backward(dy)
            grads.append(given.grad)
        assert torch.equal(*grads)


def test_a_change_of_x_before_backward_is_refused_as_pytorch_does() -> None:
    for library in (torch.nn, fastbn.torch):
        x = torch.randn(6, 5, requires_grad=True) * 1.0
        y = library.BatchNorm1d(5)(x)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
