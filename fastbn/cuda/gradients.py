"""The gradients' names of before, until `functional` calls a `cuda.backend.Device`."""

from __future__ import annotations

from typing import Any

from fastbn.cuda.backend import Device


def backward(
    dy: Any, x: Any, m: Any, constant: Any, gamma: Any, axis: int, eps: float, out: Any, stream: Any
) -> tuple[Any, Any, Any]:
    """`Device.backward`, or `Device.inference_backward` with `constant` statistics."""
    if constant is None:
        return Device(stream).backward(dy, x, m, gamma, axis, eps, out)
    return Device(stream).inference_backward(dy, x, constant[0], constant[1], gamma, axis, eps, out)


def batch_norm_backward_reduce(dy: Any, x: Any, mean: Any, var: Any, axis: int, eps: float, stream: Any) -> Any:
    """`Device.grad_reduce`."""
    return Device(stream).grad_reduce(dy, x, mean, var, axis, eps)


def batch_norm_backward_input(*arguments: Any) -> Any:
    """`Device.grad_input`, with the stream behind."""
    return Device(arguments[-1]).grad_input(*arguments[:-1])
