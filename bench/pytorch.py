"""PyTorch's calls: eager, compiled, and oneDNN through its mkldnn tensors.

All on the memory of the problem's arrays.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.problem import EPS, Call, Maker, Problem, Refused

Array = NDArray[Any]

MASK = [True, True, True]  # all three gradients


@functools.cache
def library() -> Any:
    """PyTorch."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else it keeps processes of its own
    import torch

    return torch


def there() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def no_autograd() -> AbstractContextManager[Any]:
    """Let PyTorch record no graph, since nobody else does; nothing where it is not installed."""
    if not there():
        return nullcontext()
    context: AbstractContextManager[Any] = library().no_grad()
    return context


def set_threads(number: int) -> None:
    """Give PyTorch as many threads as fastbn has, where it is installed."""
    if there():
        library().set_num_threads(number)


def tensor(array: Array, rank: int = 0) -> Any:
    """The same memory as a tensor, with axes of length 1 behind up to a rank."""
    torch = library()
    if array.dtype.name == "bfloat16":
        made = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    else:
        made = torch.from_numpy(array)
    while made.ndim < rank:
        made = made.unsqueeze(-1)
    return made


def _numpy(value: Any, shape: tuple[int, ...]) -> Array:
    wide = value.to_dense() if value.is_mkldnn else value
    array: Array = (wide.float() if wide.dtype == library().bfloat16 else wide).numpy().reshape(shape)
    return array


class _Tensors:
    """A problem's arrays as tensors.

    Channels-last data of rank 3 gets a fourth axis: only then PyTorch knows it as channels last, at nine times the
    speed.
    """

    def __init__(self, p: Problem) -> None:
        rank = 4 if p.case.last else 0
        self.x, self.dy, self.out = (tensor(a, rank) for a in (p.x, p.dy, p.out))
        self.gamma, self.beta, self.mean, self.var, self.rstd = (
            tensor(a) for a in (p.gamma, p.beta, p.mean, p.var, p.rstd)
        )
        self.axes = [axis for axis in range(self.x.ndim) if axis != 1]
        self.shapes = (p.x.shape, p.gamma.shape, p.gamma.shape)

    def first(self, result: Any) -> tuple[Array, ...]:
        """Reader of y."""
        return (_numpy(result[0] if isinstance(result, tuple) else result, self.shapes[0]),)

    def gradients(self, result: Any) -> tuple[Array, ...]:
        """Reader of dx, dgamma and dbeta."""
        return tuple(_numpy(value, shape) for value, shape in zip(result, self.shapes, strict=True))


def _mean_var(result: Any) -> tuple[Array, ...]:
    return tuple(_numpy(value, value.shape) for value in result)


def _var_mean(result: Any) -> tuple[Array, ...]:
    return _mean_var(result[::-1])


def _eager(p: Problem, what: str) -> Call:
    torch, t = library(), _Tensors(p)
    aten = torch.ops.aten
    x, gamma, beta, mean, var = t.x, t.gamma, t.beta, t.mean, t.var
    if what == "forward":
        saved = {"out": t.out, "save_mean": torch.empty_like(mean), "save_invstd": torch.empty_like(mean)}
        return Call(lambda: aten.native_batch_norm.out(x, gamma, beta, None, None, True, 0.1, EPS, **saved), t.first)
    if what == "backward":  # its .out copies what this returns: slower, but where memory is fresh
        return Call(
            lambda: aten.native_batch_norm_backward(t.dy, x, gamma, None, None, mean, t.rstd, True, EPS, MASK),
            t.gradients,
        )
    if what == "inference":
        saved = {"out": t.out, "save_mean": torch.empty_like(mean[:0]), "save_invstd": torch.empty_like(mean[:0])}
        return Call(lambda: aten.native_batch_norm.out(x, gamma, beta, mean, var, False, 0.1, EPS, **saved), t.first)
    return Call(lambda: aten.batch_norm_update_stats(x, None, None, 0.1), _mean_var)


def _backward_out(p: Problem) -> Call:
    torch, t = library(), _Tensors(p)
    backward, mean, rstd = torch.ops.aten.native_batch_norm_backward.out, t.mean, t.rstd
    outs = {"out0": t.out, "out1": torch.empty_like(mean), "out2": torch.empty_like(mean)}
    return Call(lambda: backward(t.dy, t.x, t.gamma, None, None, mean, rstd, True, EPS, MASK, **outs), t.gradients)


def _moments(p: Problem, name: str) -> Call:
    torch, t = library(), _Tensors(p)
    if name == "var_mean":
        return Call(lambda: torch.var_mean(t.x, t.axes, correction=0), _var_mean)
    return Call(lambda: torch.batch_norm_stats(t.x, EPS), _mean_var)


def eager(p: Problem, what: str) -> dict[str, Maker]:
    """PyTorch as it is, both ways of a backward and all of the moments."""
    makers: dict[str, Maker] = {"PyTorch": lambda: _eager(p, what)}
    if what == "backward":
        makers["PyTorch out="] = lambda: _backward_out(p)
    if what == "moments":
        makers["PyTorch var_mean"] = lambda: _moments(p, "var_mean")
        makers["PyTorch batch_norm_stats"] = lambda: _moments(p, "batch_norm_stats")
    return makers


def _compiled(p: Problem, what: str) -> Call:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise Refused(f"torch.compile needs a C++ compiler, and {compiler} is not there")
    torch, t = library(), _Tensors(p)
    torch._dynamo.reset()  # a new shape is compiled for itself, not made general
    normalize = torch.nn.functional.batch_norm
    function: Any
    arguments: tuple[Any, ...]
    if what == "forward":
        function, arguments = (
            lambda x, gamma, beta: normalize(x, None, None, gamma, beta, True, 0.1, EPS),
            (t.x, t.gamma, t.beta),
        )
    elif what == "backward":

        def function(dy: Any, x: Any, gamma: Any, mean: Any, rstd: Any) -> Any:
            return torch.ops.aten.native_batch_norm_backward(dy, x, gamma, None, None, mean, rstd, True, EPS, MASK)

        arguments = (t.dy, t.x, t.gamma, t.mean, t.rstd)
    elif what == "inference":
        constants = (t.x, t.mean, t.var, t.gamma, t.beta)
        function, arguments = (
            lambda x, mean, var, gamma, beta: normalize(x, mean, var, gamma, beta, False, 0.1, EPS),
            constants,
        )
    else:
        function, arguments = lambda x: torch.var_mean(x, t.axes, correction=0), (t.x,)
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    read = {"backward": t.gradients, "moments": _var_mean}.get(what, t.first)
    return Call(lambda: compiled(*arguments), read)


def compiled(p: Problem, what: str) -> dict[str, Maker]:
    """Compile `torch.nn.functional.batch_norm`, the formula of its gradient, or `torch.var_mean`, for this shape."""
    return {"torch.compile": lambda: _compiled(p, what)}


def _onednn(p: Problem, what: str) -> Call:
    torch, t = library(), _Tensors(p)
    if what == "moments":
        raise Refused("mkldnn tensors have no var_mean")
    if p.case.last:
        raise Refused("to_mkldnn() makes channels first of channels last: not the same memory order")
    x = tensor(p.x, 4).to_mkldnn()  # it takes rank 4 only
    gamma, beta, mean, var = t.gamma, t.beta, t.mean, t.var
    if what == "backward":
        dy, backward = tensor(p.dy, 4).to_mkldnn(), torch.ops.aten.native_batch_norm_backward
        # it takes its own forward's statistics only
        _, *saved = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
        return Call(lambda: backward(dy, x, gamma, None, None, *saved, True, EPS, MASK), t.gradients)
    if what == "forward":
        return Call(lambda: torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS), t.first)
    return Call(lambda: torch.native_batch_norm(x, gamma, beta, mean, var, False, 0.1, EPS), t.first)


def onednn(p: Problem, what: str) -> dict[str, Maker]:
    """Run oneDNN's kernels on mkldnn tensors."""
    return {"oneDNN": lambda: _onednn(p, what)}
