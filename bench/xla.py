"""JAX's calls: the published formulas under jit, in the memory order of the array."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from bench.problem import EPS, Call, Maker, Problem, Refused
from fastbn.cli.bench import numpy_backward


def set_threads(number: int) -> None:
    """Give XLA as many threads as fastbn has; before JAX is imported."""
    os.environ["PJRT_NPROC"] = os.environ["NPROC"] = str(number)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _call(p: Problem, what: str, squares: bool) -> Call:
    if p.dtype == "float64":
        raise Refused("float64 needs jax_enable_x64, a setting of the whole process")
    import jax
    from jax import numpy as jnp

    rank, single = p.x.ndim, jnp.float32
    # channels last: the same memory as an array whose last axis is the channels'
    channel = rank - 1 if p.case.last else 1
    axes = tuple(axis for axis in range(rank) if axis != channel)
    shape = tuple(-1 if axis == channel else 1 for axis in range(rank))

    def statistics(x: Any) -> tuple[Any, Any]:
        mean = x.mean(axes)
        return mean, ((x * x).mean(axes) - mean * mean if squares else x.var(axes))

    def normalized(x: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> Any:
        scale = gamma * jax.lax.rsqrt(var + EPS)
        return ((x - mean.reshape(shape)) * scale.reshape(shape) + beta.reshape(shape)).astype(p.x.dtype)

    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        x = x.astype(single)
        mean, var = statistics(x)
        return normalized(x, mean, var, gamma, beta), mean, var

    def backward(dy: Any, x: Any, *per_channel: Any) -> Any:
        mean, var, gamma = (values.reshape(shape) for values in per_channel)
        dx, *sums = numpy_backward(dy.astype(single), x.astype(single), mean, var, gamma, axes)
        return dx.astype(p.x.dtype), *(values.reshape(-1) for values in sums)

    x, dy = p.rows(p.x), p.rows(p.dy)
    choices: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "forward": (forward, (x, p.gamma, p.beta)),
        "backward": (backward, (dy, x, p.mean, p.var, p.gamma)),
        "inference": (lambda x, *values: (normalized(x.astype(single), *values),), (x, p.mean, p.var, p.gamma, p.beta)),
        "moments": (lambda x: statistics(x.astype(single)), (x,)),
    }
    function, given = choices[what]
    wait: Any = jax.block_until_ready
    compiled, arguments = jax.jit(function), [jnp.asarray(a) for a in given]
    back = np.argsort(p.case.memory)

    def read(result: Any) -> tuple[Any, ...]:
        arrays = tuple(np.asarray(a) for a in result)
        if what == "moments":
            return arrays
        return (arrays[0].transpose(back), *(arrays[1:] if what == "backward" else ()))

    return Call(lambda: wait(compiled(*arguments)), read)


def calls(p: Problem, what: str) -> dict[str, Maker]:
    """JAX, where it takes a variance also as Flax does.

    E[x²] - E[x]², one pass less, and wrong where the mean is large.
    """
    makers: dict[str, Maker] = {"JAX": lambda: _call(p, what, squares=False)}
    if what in ("forward", "moments"):
        makers["JAX E[x²]"] = lambda: _call(p, what, squares=True)
    return makers
