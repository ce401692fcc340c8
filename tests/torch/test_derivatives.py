"""PyTorch's own samples of its batch norm modules through fastbn.torch, and its checks of first and second
derivatives.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bridge to PyTorch: pip install 'fastbn[torch]'")
pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest: pip install 'fastbn[peers]'")

from torch.testing._internal.common_modules import module_db  # noqa: E402
from torch_pairs import LAYOUTS, draw, served, step  # noqa: E402

import fastbn.torch  # noqa: E402
from fastbn.torch import custom_ops  # noqa: E402

MODULES = [module for module in module_db if module.name in {"nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d"}]

pytestmark = pytest.mark.peers


def _samples(dtype: Any) -> Iterator[Any]:
    for info, training in itertools.product(MODULES, (True, False)):
        torch.manual_seed(0)
        for number, sample in enumerate(info.module_inputs_func(info, "cpu", dtype, True, training)):
            rank = sample.forward_input.args[0].ndim
            for layout in ("contiguous", "channels_last")[: rank - 1]:  # of rank 2 there is one
                label = f"{info.name}-{number}-{sample.desc}-{'train' if training else 'eval'}-{layout}"
                yield pytest.param(info, sample, dtype, training, layout, id=label)


SAMPLES, WIDE = (list(_samples(dtype)) for dtype in (torch.float32, torch.float64))
fields = ("info", "sample", "dtype", "training", "layout")


def _pair(info: Any, sample: Any, dtype: Any, training: bool) -> tuple[Any, Any]:
    """fastbn's module and PyTorch's in float64, as the sample makes them, with parameters that are not 1 and 0."""
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    theirs = info.module_cls(*args, **kwargs, dtype=torch.float64).train(training)
    ours = getattr(fastbn.torch, info.module_cls.__name__)(*args, **kwargs, dtype=dtype).train(training)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (ours.weight, ours.bias, ours.running_mean):
            if tensor is not None:
                tensor.normal_(generator=generator)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize(fields, SAMPLES)
def test_forward_backward_and_state(info: Any, sample: Any, dtype: Any, training: bool, layout: str) -> None:
    ours, theirs = _pair(info, sample, dtype, training)
    (given,) = sample.forward_input.args
    x = LAYOUTS[layout](given.detach())
    if given.numel():
        for seed in range(2):
            dy = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
            step(ours, theirs, x, dy)
    else:
        assert not training or not served(ours, x)
        assert ours(x).shape == theirs(x.double()).shape == x.shape
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    fresh = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=dtype)
    fresh.load_state_dict(state, strict=True)
    ours.load_state_dict(fresh.state_dict(), strict=True)
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


@pytest.mark.compile
@pytest.mark.parametrize(fields, WIDE)
def test_derivatives(info: Any, sample: Any, dtype: Any, training: bool, layout: str) -> None:
    ours, _ = _pair(info, sample, dtype, training)
    (given,) = sample.forward_input.args
    x = LAYOUTS[layout](given.detach()).requires_grad_()
    assert not given.numel() or served(ours, x)
    names = [name for name, _ in ours.named_parameters()]

    def call(x: Any, *parameters: Any) -> Any:
        fresh = copy.deepcopy(dict(ours.named_buffers()))  # running statistics move with each call
        return torch.func.functional_call(ours, {**fresh, **dict(zip(names, parameters, strict=True))}, (x,))

    arguments = (x, *(p.detach().clone().requires_grad_() for p in ours.parameters()))
    fast = x.numel() > 100  # one random projection of the Jacobian
    assert torch.autograd.gradcheck(call, arguments, fast_mode=fast)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=fast)


def test_samples_were_collected() -> None:
    assert {module.name for module in MODULES} == {"nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d"}
    found = Counter((p.values[0].name, *p.values[2:]) for p in [*SAMPLES, *WIDE])
    assert len(found) == len(MODULES) * 2 * 2 * 2
    assert min(found.values()) >= 3


def _leaves(case: tuple[bool | None, ...]) -> list[Any]:
    """x, gamma, beta: each trained, not trained or, None, absent."""
    x = draw((3, 2, 2, 2), 1.0, 0, torch.float64)[0]
    made = [x, torch.linspace(0.5, 2.0, 2, dtype=torch.float64), torch.linspace(-1.0, 1.0, 2, dtype=torch.float64)]
    return [
        None if trained is None else values.requires_grad_(trained) for values, trained in zip(made, case, strict=True)
    ]


CASES = [case for case in itertools.product((True, False), (True, False, None), (True, False, None)) if True in case]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if all(c) else pytest.mark.compile) for c in CASES], ids=str)
@pytest.mark.parametrize("way", ["module", "operator"])
def test_any_combination_of_what_is_trained(way: str, case: tuple[bool | None, ...], training: bool) -> None:
    x, gamma, beta = _leaves(case)
    mean, var = torch.ones(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)

    def call(*trained: Any) -> Any:
        given = iter(trained)
        a, g, b = (next(given) if kind else leaf for kind, leaf in zip(case, (x, gamma, beta), strict=True))
        if way == "operator":
            return (
                custom_ops.batch_norm(a, g, b, 1e-5)[0]
                if training
                else custom_ops.batch_norm_inference(a, mean, var, g, b, 1e-5)
            )
        module = fastbn.torch.BatchNorm2d(2, dtype=torch.float64).train(training)
        for name, value in (("weight", g), ("bias", b)):
            module._parameters.pop(name)
            setattr(module, name, value)
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)
        assert served(module, a)
        return module(a)

    arguments = tuple(leaf for leaf, trained in zip((x, gamma, beta), case, strict=True) if trained)
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


@pytest.mark.parametrize("training", [True, False])
def test_third_derivatives(training: bool) -> None:
    module = fastbn.torch.BatchNorm1d(2, dtype=torch.float64).train(training)
    x = draw((4, 2), 1.0, 0, torch.float64)[0].requires_grad_()
    gamma = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)

    def slope(x: Any, gamma: Any) -> Any:
        y = torch.func.functional_call(module, {"weight": gamma}, (x,))
        return torch.autograd.grad(y.sin().sum(), (x, gamma), create_graph=True)

    assert torch.autograd.gradgradcheck(slope, (x, gamma))


@pytest.mark.parametrize(
    ("dtype", "offset"), [*itertools.product([torch.float32], (0.0, 1e2, 1e4, 1e6)), (torch.bfloat16, 0.0)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_keep_their_digits(training: bool, dtype: Any, offset: float) -> None:
    """Against float64 on the same data; x of float32 alone would lose them far from zero."""
    x, dy = draw((16, 3, 5), offset, 0, dtype)
    found = []
    for kind, module in (
        (dtype, fastbn.torch.BatchNorm1d(3)),
        (torch.float64, torch.nn.BatchNorm1d(3, dtype=torch.float64)),
    ):
        module.train(training)
        if not training:
            module.running_mean.fill_(offset)
        given = x.to(kind, copy=True).requires_grad_()
        slope = torch.autograd.grad(module(given), (given, *module.parameters()), dy.to(kind), create_graph=True)
        total = sum((s * torch.linspace(-1, 1, s.numel(), dtype=s.dtype).view(s.shape)).sum() for s in slope)
        found.append([given, *module.parameters()])
        total.backward()
    for got, want in zip(*found, strict=True):
        if want.grad is None:
            assert got.grad is None or not got.grad.any()
            continue
        scale = float(want.grad.abs().max())
        limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=0, atol=limit * scale + 1e-6)


PENALTIES = {  # of y: its gradient depends on x, on nothing, on what comes behind
    "square": lambda y: y.square().sum(),
    "sum": lambda y: y.sum(),
    "weighed": lambda y: (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum(),
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_a_gradient_penalty_is_pytorchs(options: dict[str, Any], training: bool, frozen: bool, penalty: str) -> None:
    """The gradient of a gradient, through a layer that is frozen too, where PyTorch records a dx on which nothing
    depends.
    """
    x, found = draw((4, 2, 3), 1.0, 0, torch.float64)[0], []
    for library in (torch.nn, fastbn.torch):
        module = library.BatchNorm1d(2, dtype=torch.float64, **options).train(training).requires_grad_(not frozen)
        for k, parameter in enumerate(module.parameters()):
            parameter.data.copy_(torch.tensor([0.5, -2.0]) + k)
        given = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(PENALTIES[penalty](module(given)), given, create_graph=True)
        assert dx.requires_grad
        assert not dx.is_leaf
        (dx.square().sum(1).sqrt() - 1).square().mean().backward()
        found.append(
            [dx.detach(), *(torch.zeros_like(v) if v.grad is None else v.grad for v in (given, *module.parameters()))]
        )
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
def test_a_penalty_through_a_frozen_layer_between_others(options: dict[str, Any]) -> None:
    """Also in half precision, and behind `convert`: the weights around it get their gradients."""
    for dtype, limit in ((torch.float64, 1e-9), (torch.bfloat16, 2e-2)):
        torch.manual_seed(0)
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
        layers = (
            torch.nn.Linear(3, 4, dtype=dtype),
            torch.nn.BatchNorm1d(4, dtype=parameters, **options),
            torch.nn.Linear(4, 1, dtype=dtype),
        )
        model = torch.nn.Sequential(*layers)
        model[1].eval().requires_grad_(False)
        x, found = torch.randn(5, 3).to(dtype), []
        for change in (lambda m: m, fastbn.torch.convert):
            given = x.clone().requires_grad_()
            model.zero_grad()
            (dx,) = torch.autograd.grad(change(model)(given).sum(), given, create_graph=True)
            (dx.double().norm(dim=1) - 1).square().mean().backward()
            found.append([dx.detach(), model[0].weight.grad.clone(), model[2].weight.grad.clone()])
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)


def test_the_operators_penalty_through_constants() -> None:
    x = draw((4, 2, 3), 1.0, 0, torch.float64)[0].requires_grad_()
    mean, var = torch.ones(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)
    (dx,) = torch.autograd.grad(
        custom_ops.batch_norm_inference(x, mean, var, None, None, 1e-5).sum(), x, create_graph=True
    )
    assert dx.requires_grad
    dx.square().sum().backward()
    assert x.grad is None
