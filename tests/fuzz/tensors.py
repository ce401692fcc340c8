"""fastbn.torch for the fuzz test: tensors of every kind in modules and operators; what fastbn's kernels decline,
PyTorch's own serve.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastbn.torch
from fastbn.torch import tensors

from .arrays import BFLOAT16, DTYPES, draw, strides
from .judge import Judge, Truth, Wrong, near
from .kinds import ODD, RIGHT, UNKNOWN, WRONG, Given, Maker, dtype_of, values
from .words import JUNK, label

NORMS = {
    2: fastbn.torch.BatchNorm1d,
    3: fastbn.torch.BatchNorm1d,
    4: fastbn.torch.BatchNorm2d,
    5: fastbn.torch.BatchNorm3d,
}
SHAPES = (
    (9, 5),
    (33, 70),
    (3, 4, 5),
    (2, 3, 7, 7),
    (7, 6, 1, 1),
    (4, 1, 6, 6),
    (2, 8, 3, 5),
    (2, 2, 130),
    (2, 2, 3, 2, 3),
    (300, 9, 8),
)
KINDS = {name: getattr(torch, name) for name in DTYPES}
# PyTorch refuses in its own words, in what its checks and kernels raise.
ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    IndexError,
    AssertionError,
    AttributeError,
    torch._C._LinAlgError,
)


def tensor(make: Maker, found: np.ndarray, dtype: torch.dtype, steps: list[int] | None = None) -> Tensor:
    """Values in guarded memory."""
    if dtype is torch.bfloat16:
        return torch.from_numpy(make.put(found, BFLOAT16, steps).view(np.int16)).view(torch.bfloat16)
    name = str(dtype).removeprefix("torch.")
    return torch.from_numpy(make.put(found, name, steps))


def read_only(make: Maker, found: np.ndarray, dtype: torch.dtype) -> Tensor:
    array = make.put(found, str(dtype).removeprefix("torch."))
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def wide(found: Tensor) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = found.detach().resolve_neg().to(torch.float64).numpy().copy()
    return result


Build = Callable[[Maker, np.ndarray, torch.dtype], Any]
FLOATS = (torch.float32, torch.float64)
# Of (C,), with what they are to PyTorch.
VECTORS: dict[str, tuple[Build, int]] = {
    "strided": (lambda make, v, d: tensor(make, v, d, [d.itemsize * 2]), RIGHT),
    "a column": (lambda make, v, d: tensor(make, np.stack([v, v + 9, v], 1), d)[:, 0], RIGHT),
    "expanded": (lambda make, v, d: tensor(make, v[:1], d).expand(v.size), UNKNOWN),
    "read-only": (read_only, RIGHT),
    "other float": (lambda make, v, d: tensor(make, v, FLOATS[d is torch.float32]), UNKNOWN),
    "float16": (lambda make, v, d: tensor(make, v, torch.float16), UNKNOWN),
    "bfloat16": (lambda make, v, d: tensor(make, v, torch.bfloat16), UNKNOWN),
    "int32": (lambda make, v, d: tensor(make, v, torch.int32), UNKNOWN),
    "int64": (lambda make, v, d: tensor(make, v, torch.int64), UNKNOWN),
    "complex": (lambda make, v, d: tensor(make, v, torch.complex64), UNKNOWN),
    "bool": (lambda make, v, d: tensor(make, v > 1, torch.bool), UNKNOWN),
    "short": (lambda make, v, d: tensor(make, v[:-1], d), WRONG),
    "long": (lambda make, v, d: tensor(make, np.append(v, 1.0), d), WRONG),
    "row": (lambda make, v, d: tensor(make, v[None], d), UNKNOWN),
    "image": (lambda make, v, d: tensor(make, v[None, :, None, None], d), UNKNOWN),
    "0-d": (lambda make, v, d: tensor(make, v[0], d), UNKNOWN),
    "of rank 20": (lambda make, v, d: tensor(make, v.reshape((1,) * 20 + v.shape), d), UNKNOWN),
    "empty": (lambda make, v, d: tensor(make, v[:0], d), WRONG),
    "meta": (lambda make, v, d: torch.empty(v.size, dtype=d, device="meta"), UNKNOWN),
    "sparse": (lambda make, v, d: torch.from_numpy(v).to(d).to_sparse(), UNKNOWN),
    "negative view": (lambda make, v, d: torch._neg_view(tensor(make, -v, d)), RIGHT),
}


def vector(make: Maker, name: str, found: np.ndarray, dtype: torch.dtype, odd: bool) -> Given:
    """A parameter, buffer, or argument of an operator."""
    if not odd:
        return Given(name, tensor(make, found, dtype), found)
    kind = make.rng.choice(list(VECTORS))
    build, status = VECTORS[kind]
    return Given(name, build(make, found, dtype), found, kind, status)


def data(
    make: Maker, name: str, found: np.ndarray, dtype: torch.dtype, odd: bool = False, channels: bool = True
) -> Given:
    """x or dy."""
    rng = make.rng
    if odd:
        if rng.random() < 0.3:
            whole = np.abs(np.round(found))
            return Given(name, tensor(make, whole, torch.uint8), whole, "uint8", UNKNOWN)
        other = rng.choice((torch.int32, torch.complex64, torch.bool)) if name == "x" else torch.complex64
        kind, value = rng.choice(
            (
                (str(other), lambda: tensor(make, np.abs(found), other)),
                ("sparse", lambda: torch.from_numpy(found).to(dtype).to_sparse()),
                ("meta", lambda: torch.empty(found.shape, dtype=dtype, device="meta")),
                ("of rank 1", lambda: tensor(make, found.ravel(), dtype)),
                *(
                    ("of more channels", lambda: tensor(make, np.concatenate([found, found], 1), dtype))
                    for _ in range(channels)
                ),
            )
        )
        return Given(name, value(), None, kind, UNKNOWN if kind == "meta" else WRONG)
    twist = rng.choice(("", "", "gaps", "steps", "ones", "broadcast", "windows", "far", "rows apart"))
    size = dtype.itemsize
    steps = strides(rng, found.shape, size, 1, twist)
    if any(step < 0 or step % size for step in steps):
        steps, twist = strides(rng, found.shape, size, 1, "gaps"), "gaps"
    steps = [abs(step) for step in steps]
    value = tensor(make, found, dtype, steps)
    return Given(name, value, wide(value), twist)


def module(judge: Judge, make: Maker) -> None:
    """A module whose parameters and buffers are exchanged; a forward or two, and a backward."""
    rng = make.rng
    shape = rng.choice(SHAPES)
    C, dtype = shape[1], KINDS[dtype_of(make, judge.dtypes).name]
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    bn = NORMS[len(shape)](C, dtype=kind, momentum=rng.choice((0.1, 0.5, None)), affine=rng.random() < 0.8)
    odd = rng.choice(("", "", "running_mean", "running_var", "weight", "bias", "x", "both"))
    given: dict[str, Given] = {}
    for name in ("running_mean", "running_var", "weight", "bias"):
        if getattr(bn, name) is not None:
            given[name] = vector(
                make,
                name,
                np.abs(draw(rng, (C,), 1.0, 0.25)) + 0.125,
                kind,
                odd == name or (odd == "both" and "running" in name),
            )
    for name, one in list(given.items()):
        value = one.value
        if name in ("weight", "bias"):
            value = torch.nn.Parameter(value, requires_grad=value.is_floating_point() and rng.random() < 0.5)
        setattr(bn, name, value)
    bn.train(rng.random() < 0.6)
    x = data(make, "x", values(make, shape), dtype, odd == "x")
    asked = (
        rng.random() < 0.5
        and x.value.is_floating_point()
        and x.value.device.type == "cpu"
        and x.value.layout is torch.strided
    )
    own = [
        one._replace(status=UNKNOWN) if one.kind == "negative view" and "running" in one.name else one
        for one in (x, *given.values())
    ]
    for turn in range(2):  # the second call of an inference goes another way
        before = {
            name: wide(getattr(bn, name)) for name in ("running_mean", "running_var") if given[name].status == RIGHT
        }
        running = [
            one._replace(status=min(UNKNOWN, one.status)) if one.name in before or not bn.training else one
            for one in own
        ]
        _forward(judge, bn, x, running, before, dtype, asked, turn)
        if asked and bn.training:
            return


def _unless_theirs(bn: Any, x: Tensor, y: Tensor, slack: float, bad: Wrong | None) -> Wrong | None:
    """None where PyTorch's kernels, which may serve it, give the same bits: at 1e4 standard deviations from 0 its
    variance is 0.4 % off.
    """
    if bad is None or slack == 1.0 or not bn.training:
        return bad
    with torch.no_grad():
        theirs = torch.nn.functional.batch_norm(x.detach(), None, None, bn.weight, bn.bias, True, 0.0, bn.eps)
    return None if torch.equal(theirs, y) else bad


def _forward(
    judge: Judge, bn: Any, x: Given, given: list[Given], before: Any, dtype: torch.dtype, asked: bool, turn: int
) -> None:
    rng, by = judge.rng, {one.name: one for one in given}
    leaf = x.value.detach().requires_grad_(asked) if asked else x.value
    steep = data(Maker(judge.world, rng), "dy", draw(rng, x.value.shape), dtype) if asked else None
    seen = int(bn.num_batches_tracked)
    accurate = "float64" if dtype is torch.float64 else "float32"

    def run() -> Any:
        with torch.set_grad_enabled(asked):
            y = bn(leaf)
        if steep is not None:
            y.backward(steep.value)
        return y

    def right(y: Any) -> Iterator[Wrong | None]:
        parts = [by[name].wide if name in by else None for name in ("weight", "bias")]
        truth = Truth(x.wide, 1, bn.eps, None if steep is None else steep.wide, *parts)
        if any(one.kind and one.name != "x" for one in given):  # PyTorch's kernels may serve it, and round more often
            truth.slack = 100.0 if dtype.itemsize > 2 else 1000.0
        kept = () if bn.training else (before["running_mean"], before["running_var"])
        yield Wrong("y is of another dtype") if y.dtype != dtype else None
        yield _unless_theirs(bn, x.value, y, truth.slack, truth.y(accurate, tensors.array(y.detach()), *kept))
        if steep is not None:
            yield from truth.gradients(accurate, tensors.array(leaf.grad), None, None, *kept)
        weight = 1.0 / (seen + 1) if bn.momentum is None else bn.momentum
        count, mean, var = truth.batch
        for name, new in (("running_mean", mean), ("running_var", var * count / (count - 1))):
            old, got = before[name], wide(getattr(bn, name))
            want = (1.0 - weight) * old + weight * new if bn.training else old
            # PyTorch's kernels add squares up in float32, 2e-5 off where these are 2400
            bad = near(
                "mean", "float32", got, want, min(100.0, truth.slack) * (np.abs(old) + np.abs(new) + np.sqrt(var))
            )
            yield bad and bad._replace(outcome=bad.outcome.replace("mean", name, 1))

    written = [one.value for name, one in by.items() if "running" in name and bn.training]
    arrays = [
        tensors.array(value)
        for value in written
        if value.device.type == "cpu" and value.layout is torch.strided and not value.is_neg()
    ]
    name = f"{type(bn).__name__}{' again' if turn else ''}"
    if any(value.is_neg() for value in written):
        return
    judge.call(
        f"torch.{name}", given, run, right, [a for a in arrays if isinstance(a, np.ndarray)], RIGHT, ERRORS, own=False
    )


def operators(judge: Judge, make: Maker) -> None:
    """The operators as torch.ops has them."""
    rng = make.rng
    shape = rng.choice(SHAPES)
    C, dtype = shape[1], KINDS[dtype_of(make, judge.dtypes).name]
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    accurate = "float64" if dtype is torch.float64 else "float32"
    odd = rng.choice(("", "x", "dy", "mean", "var", "gamma", "beta"))
    x = data(make, "x", values(make, shape), dtype, odd == "x", False)
    dy = data(make, "dy", draw(rng, shape), dtype, odd == "dy")
    mean = vector(make, "mean", draw(rng, (C,)), torch.float64, odd == "mean")
    var = vector(make, "var", np.abs(draw(rng, (C,))) + 0.25, torch.float64, odd == "var")._replace(
        says=("m2", "moments")
    )
    gamma, beta = (vector(make, name, draw(rng, (C,), 1.0, 0.5), kind, odd == name) for name in ("gamma", "beta"))
    ops, eps = torch.ops.fastbn, 1e-5
    truth = (
        Truth(x.wide, 1, eps, dy.wide, gamma.wide, beta.wide) if x.wide is not None and dy.wide is not None else None
    )
    given = {
        "moments": [x],
        "batch_norm": [x, gamma, beta],
        "batch_norm_inference": [x, mean, var, gamma, beta],
        "batch_norm_backward": [dy, x, mean, var, gamma],
        "batch_norm_inference_backward": [dy, x, mean, var, gamma],
    }
    name = rng.choice(list(given))
    tail = () if name == "moments" else (eps,)

    def right(found: Any) -> Iterator[Wrong | None]:
        if truth is None:
            return
        arrays = [tensors.array(one) for one in (found if isinstance(found, tuple) else (found,))]
        if name in ("batch_norm", "batch_norm_inference"):
            yield truth.y(accurate, arrays[0], *(() if name == "batch_norm" else (mean.wide, var.wide)))
        elif name == "batch_norm_inference_backward":
            yield from truth.gradients(accurate, *arrays, mean.wide, var.wide)

    used = [
        one._replace(status=max(one.status, ODD)) if one.kind in ("strided", "a column", "negative view") else one
        for one in given[name]
    ]
    judge.call(
        f"torch.ops.{name}",
        used,
        lambda: getattr(ops, name)(*(one.value for one in used), *tail),
        right,
        (),
        RIGHT,
        ERRORS,
        own=False,
    )


def others(judge: Judge, make: Maker) -> None:
    """What takes modules, given anything else; the model stays as it is."""
    rng = make.rng
    value = rng.choice((*JUNK, torch.ones(3), torch.nn.ReLU, "model"))
    name = rng.choice(("convert", "revert", "fuse", "left_alone", "convert_sync_batchnorm", "explain"))
    call = getattr(fastbn.torch, name)
    one = Given("module" if name == "explain" else "model", value, None, label(value), WRONG, ("module", "model"))
    if name == "explain":
        judge.call("torch.explain", [one], lambda: call(value, torch.ones(2, 3)))
    else:
        judge.call(f"torch.{name}", [one], lambda: call(value))


CALLS = {module: 30, operators: 10, others: 1}
