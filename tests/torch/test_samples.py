"""Every sample of batch normalization that the PyTorch wheel tests itself with: fastbn agrees, forward, statistics and
gradients.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from tolerances import check, scales

import fastbn

torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install 'fastbn[peers]'")
pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest: pip install 'fastbn[peers]'")

from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db  # noqa: E402

pytestmark = pytest.mark.peers

DTYPES = (torch.float32, torch.float64)
MEMORY = ("contiguous", "channels_last")


class Arguments(NamedTuple):
    """A sample in one form, whatever the order of its operator's arguments."""

    x: Any
    running_mean: Any
    running_var: Any
    weight: Any
    bias: Any
    training: bool
    momentum: float
    eps: float


def _functional(
    x: Any, rm: Any, rv: Any, w: Any, b: Any, training: bool = False, momentum: float = 0.1, eps: float = 1e-5
) -> Arguments:
    return Arguments(x, rm, rv, w, b, training, momentum, eps)


def _native(x: Any, w: Any, b: Any, rm: Any, rv: Any, training: bool, momentum: float, eps: float) -> Arguments:
    return Arguments(x, rm, rv, w, b, training, momentum, eps)


class Operator(NamedTuple):
    parse: Callable[..., Arguments]
    arrange: Callable[[Arguments], tuple[Any, ...]]  # the inverse


# PyTorch has the same samples for every name of the operator; the native one gives mean and rstd too, the rest nothing.
OPERATORS = {
    "nn.functional.batch_norm": Operator(_functional, tuple),
    "native_batch_norm": Operator(_native, lambda a: (a.x, *a[3:5], *a[1:3], *a[5:])),
}
SAME = {"_native_batch_norm_legit", "_batch_norm_with_update"}

KNOWN = {op.name: op for op in op_db if op.name in OPERATORS and not op.variant_test_name}
MODULES = [module for module in module_db if module.name in {"nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d"}]


class Sample(NamedTuple):
    op: Any
    arguments: Arguments
    dtype: Any
    memory: str
    refused: bool  # by fastbn: rank 1, a batch without channels


def _formats(rank: int) -> tuple[str, ...]:
    return MEMORY if rank > 2 else MEMORY[:1]  # of rank 2 there is one memory order


def _samples() -> Iterator[Any]:
    """Each sample in each memory format, as it stands and in the other mode where it has running statistics for it."""
    for name, op in KNOWN.items():
        marks = () if name == "nn.functional.batch_norm" else pytest.mark.full
        for dtype in DTYPES:
            torch.manual_seed(0)
            for number, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True)):
                given = OPERATORS[name].parse(sample.input, *sample.args, **sample.kwargs)
                for training in (True, False) if given.running_mean is not None else (given.training,):
                    for memory in _formats(given.x.ndim):
                        label = f"{name}-{number}-{str(dtype)[6:]}-{'train' if training else 'eval'}-{memory}"
                        case = Sample(op, given._replace(training=training), dtype, memory, given.x.ndim < 2)
                        yield pytest.param(case, id=label, marks=marks)


SAMPLES = list(_samples())


def _fresh(tensor: Any, memory: str = "contiguous") -> Any:
    """A leaf of its own with the same values."""
    if tensor is None:
        return None
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if memory == "channels_last":
        copy = copy.movedim(1, -1).contiguous().movedim(-1, 1)
    return copy.requires_grad_(tensor.requires_grad)


def _copied(a: Arguments, memory: str) -> Arguments:
    return a._replace(
        x=_fresh(a.x, memory),
        weight=_fresh(a.weight),
        bias=_fresh(a.bias),
        running_mean=_fresh(a.running_mean),
        running_var=_fresh(a.running_var),
    )


def _array(tensor: Any) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().numpy()


def _layer(channels: int, a: Arguments, dtype: str) -> fastbn.BatchNorm:
    """A layer with the sample's parameters."""
    track = a.running_mean is not None
    layer = fastbn.BatchNorm(channels, a.eps, a.momentum, track_running_stats=track, dtype=dtype)
    layer.gamma, layer.beta = _array(a.weight), _array(a.bias)
    if a.running_mean is not None:
        layer.running_mean, layer.running_var = _array(a.running_mean), _array(a.running_var)
    return layer if a.training else layer.eval(backward=True)


def _condition(mean: np.ndarray, var: np.ndarray, eps: float) -> float:
    """PyTorch rounds the mean to the dtype of x, which costs its xhat a rounding of mean/std."""
    return float(4.0 * np.maximum(1.0, np.abs(mean) / np.sqrt(var + eps)).max())


def _compare(dtype: str, ours: Any, theirs: Any, natural: Any, slack: float) -> None:
    """Compare (y, dx, dgamma, dbeta) of both; those that PyTorch has not are None there."""
    for name, got, want in zip(("y", "dx", "dgamma", "dbeta"), ours, theirs, strict=True):
        if want is not None:
            check(name, dtype, got, want, getattr(natural, name), slack)


@pytest.mark.parametrize("sample", SAMPLES)
def test_operator_sample(sample: Sample) -> None:
    a, dtype = sample.arguments, str(sample.dtype)[6:]
    if sample.refused:
        with pytest.raises(ValueError, match="x: given rank 1"):
            fastbn.BatchNorm(1, dtype=dtype)(_array(a.x))
        with pytest.raises(ValueError, match="x: given rank 1"):
            fastbn.batch_norm(_array(a.x))
        return

    theirs, ours = _copied(a, sample.memory), _copied(a, sample.memory)
    results = sample.op.op(*OPERATORS[sample.op.name].arrange(theirs))
    y = results if isinstance(results, torch.Tensor) else results[0]
    dy = torch.randn(y.shape, dtype=sample.dtype, generator=torch.Generator().manual_seed(1))
    y.backward(dy)

    layer = _layer(a.x.shape[1], ours, dtype)
    x = _array(ours.x)
    got = layer(x)
    dx = layer.backward(dy.numpy())

    if a.training:
        m = fastbn.moments(x)
        mean, var = m.mean, m.var()
    else:
        mean, var = (_array(s).astype(np.float64) for s in (a.running_mean, a.running_var))
    slack = _condition(mean, var, a.eps)
    natural = scales(dy.numpy(), x, mean, var, layer.gamma, layer.beta, 1, a.eps, a.training)
    grads = [_array(None if leaf is None else leaf.grad) for leaf in (theirs.x, theirs.weight, theirs.bias)]
    _compare(dtype, (got, dx, layer.dgamma, layer.dbeta), (_array(y), *grads), natural, slack)

    if a.training and not isinstance(results, torch.Tensor):  # the native operator gives the batch's mean and rstd too
        check("mean", dtype, m.mean, _array(results[1]), natural.mean, slack)
        check("y", dtype, m.rstd(a.eps), _array(results[2]), m.rstd(a.eps), slack)
    if a.running_mean is not None:
        for kind, now, before, want in (
            ("mean", layer.running_mean, a.running_mean, theirs.running_mean),
            ("var", layer.running_var, a.running_var, theirs.running_var),
        ):
            made_of = abs(1.0 - a.momentum) * np.abs(_array(before)) + abs(a.momentum) * np.abs(getattr(natural, kind))
            check(kind, dtype, now, _array(want), made_of, slack)
            if not a.training:
                np.testing.assert_array_equal(now, _array(a.running_mean if kind == "mean" else a.running_var))


def test_operator_samples_were_collected() -> None:
    """Every operator that the wheel has is known here, and each gave samples in every dtype, mode and memory format."""
    assert {op.name for op in op_db if "batch_norm" in op.name} <= OPERATORS.keys() | SAME
    assert KNOWN.keys() == OPERATORS.keys()
    cases = [p.values[0] for p in SAMPLES]
    found = Counter((c.op.name, c.dtype, c.arguments.training, c.memory) for c in cases if not c.refused)
    for name, op in KNOWN.items():
        for dtype in DTYPES:
            whole = [s for s in op.sample_inputs("cpu", dtype, requires_grad=True) if s.input.ndim > 1]
            for training in (True, False):
                last, contiguous = (found[name, dtype, training, memory] for memory in MEMORY[::-1])
                assert 0 < last < contiguous
                assert contiguous >= len(whole) - 1  # one has no statistics to evaluate with
    assert sum(found.values()) + sum(c.refused for c in cases) == len(cases)


def _module_samples() -> Iterator[Any]:
    for module in MODULES:
        for dtype in DTYPES:
            for training in (True, False):
                torch.manual_seed(0)
                inputs = module.module_inputs_func(module, "cpu", dtype, True, training)
                for number, sample in enumerate(inputs):
                    for memory in _formats(sample.forward_input.args[0].ndim):
                        mode = "train" if training else "eval"
                        label = f"{module.name}-{number}-{sample.desc}-{str(dtype)[6:]}-{mode}-{memory}"
                        yield pytest.param(module, sample, dtype, training, memory, id=label)


MODULE_SAMPLES = list(_module_samples())


def _ours(args: tuple[Any, ...], kwargs: dict[str, Any], dtype: str) -> fastbn.BatchNorm:
    """A layer by PyTorch's constructor arguments; its `bias=False` is fastbn's `beta = None`."""
    kwargs = dict(kwargs)
    bias = kwargs.pop("bias", True)
    layer = fastbn.BatchNorm(*args, **kwargs, dtype=dtype)
    if not bias:
        layer.beta = None
    return layer


@pytest.mark.parametrize(("module", "sample", "dtype", "training", "memory"), MODULE_SAMPLES)
def test_module_sample(module: Any, sample: Any, dtype: Any, training: bool, memory: str) -> None:
    name = str(dtype)[6:]
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    theirs = module.module_cls(*args, **kwargs, dtype=dtype).train(training)
    ours = _ours(args, kwargs, name)
    ours = ours.train() if training else ours.eval(backward=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (theirs.weight, theirs.bias, theirs.running_mean):
            if tensor is not None:
                tensor.normal_(generator=generator)
    ours.load_state_dict(theirs.state_dict())

    (given,) = sample.forward_input.args
    inputs = _fresh(given, memory)
    dy = torch.randn(given.shape, dtype=dtype, generator=generator)
    y = theirs(inputs)
    y.backward(dy)
    got, dx = ours(_array(_fresh(given, memory))), ours.backward(dy.numpy())
    if given.numel() == 0:
        assert got.shape == dx.shape == tuple(given.shape)
        for statistic in ("running_mean", "running_var"):
            np.testing.assert_array_equal(getattr(ours, statistic), _array(getattr(theirs, statistic)))
        return

    x = _array(inputs)
    batch = training or theirs.running_mean is None
    m = fastbn.moments(x)
    mean, var = (m.mean, m.var()) if batch else (_array(theirs.running_mean), _array(theirs.running_var))
    slack = _condition(mean, var, ours.eps)
    natural = scales(dy.numpy(), x, mean, var, ours.gamma, ours.beta, 1, ours.eps, batch)
    grads = [_array(None if leaf is None else leaf.grad) for leaf in (inputs, theirs.weight, theirs.bias)]
    _compare(name, (got, dx, ours.dgamma, ours.dbeta), (_array(y), *grads), natural, slack)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    if ours.running_mean is not None:
        check("mean", name, ours.running_mean, _array(theirs.running_mean), natural.mean, slack)
        check("var", name, ours.running_var, _array(theirs.running_var), 1.0 + m.var(1), slack)
        assert ours.num_batches_tracked == int(state["num_batches_tracked"]) == int(training)


def test_module_samples_were_collected() -> None:
    assert {module.name for module in MODULES} == {"nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d"}
    found = Counter((p.values[0].name, *p.values[2:]) for p in MODULE_SAMPLES)
    assert len(found) == len(MODULES) * len(DTYPES) * 2 * len(MEMORY)
    assert sum(found.values()) == len(MODULE_SAMPLES)


def _module_errors() -> Iterator[Any]:
    for module in MODULES:
        if module.module_error_inputs_func is not None:
            for dtype in DTYPES:
                errors = module.module_error_inputs_func(
                    module, device="cpu", dtype=dtype, requires_grad=False, training=True
                )
                yield from (
                    pytest.param(module, error, dtype, id=f"{module.name}-{n}-{str(dtype)[6:]}")
                    for n, error in enumerate(errors)
                )


MODULE_ERRORS = list(_module_errors())


@pytest.mark.parametrize(("module", "error", "dtype"), MODULE_ERRORS)
def test_module_error_sample(module: Any, error: Any, dtype: Any) -> None:
    """What PyTorch refuses, fastbn refuses with the same kind of error, no later than PyTorch does."""
    made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
    assert error.error_on is ModuleErrorEnum.FORWARD_ERROR
    assert error.error_type in (ValueError, TypeError)
    with pytest.raises(error.error_type, match=error.error_regex):
        module.module_cls(*made.args, **made.kwargs, dtype=dtype)(*given.args)
    with pytest.raises(error.error_type, match="eps: given"):
        _ours(made.args, made.kwargs, str(dtype)[6:])(*(_array(x) for x in given.args))


def test_error_samples_were_collected() -> None:
    """The modules carry error samples; the operators have none, and this fails when a wheel brings some."""
    assert {p.values[0].name for p in MODULE_ERRORS} == {module.name for module in MODULES}
    assert [op.name for op in KNOWN.values() if op.error_inputs_func is not None] == []
