"""Who is timed beside fastbn, and the comparison that each must pass before it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import onnx_runtime, pytorch, xla
from bench.problem import EPS, Call, Maker, Problem, Refused, own
from fastbn.cli.bench import numpy_backward, numpy_forward
from fastbn.cli.selftest import error

Array = NDArray[Any]

# Largest difference from fastbn's result, in units of max(1, |value|), of dgamma and dbeta max(count, |value|): they
# are sums of that many terms. float32 sums of a million values lose up to three digits, a wrong formula loses all; half
# precision rounds to 11 or 8 bits.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "float16": 4e-3, "bfloat16": 3e-2}
BLOCK = 2**18  # values compared at a time, so that the comparison stays in the cache


def _numpy(p: Problem, what: str) -> Call:
    if p.dtype in ("float16", "bfloat16"):
        raise Refused("NumPy sums in the dtype of the array, and no formula is right in half precision")
    x, y, gamma, beta, mean, var = p.x, p.out, *map(p.shaped, (p.gamma, p.beta, p.mean, p.var))
    if what == "forward":
        return Call(lambda: numpy_forward(x, gamma, beta, y, p.axes), tuple)
    if what == "backward":
        gradients = Call(lambda: numpy_backward(p.dy, x, mean, var, gamma, p.axes), tuple)
        return gradients._replace(read=lambda result: (result[0], result[1].reshape(-1), result[2].reshape(-1)))
    if what == "inference":

        def affine() -> tuple[Array]:
            scale = gamma / np.sqrt(var + x.dtype.type(EPS))
            np.multiply(x, scale, out=y)
            np.add(y, beta - mean * scale, out=y)
            return (y,)

        return Call(affine, tuple)
    return Call(lambda: (x.mean(p.axes), x.var(p.axes)), tuple)


def numpy_peer(p: Problem, what: str) -> dict[str, Maker]:
    """NumPy, as its users write it."""
    return {"NumPy": lambda: _numpy(p, what)}


# Each peer's calls of a pass, by name: some have two ways. No peer is imported before one of its makers runs.
PEERS: dict[str, Callable[[Problem, str], Mapping[str, Maker]]] = {
    "PyTorch": pytorch.eager,
    "torch.compile": pytorch.compiled,
    "oneDNN": pytorch.onednn,
    "JAX": xla.calls,
    "ONNX Runtime": onnx_runtime.calls,
    "NumPy": numpy_peer,
}


def _blocks(array: Array) -> list[Array]:
    rows = max(1, BLOCK * len(array) // array.size)
    return [array[i : i + rows] for i in range(0, len(array), rows)]


def apart(actual: Array, expected: Array, least: float = 1.0) -> float:
    """Largest difference in units of max(least, |expected|).

    NaN where a value is no number, infinite where the shapes differ.
    """
    if actual.shape != expected.shape:
        return float("inf")
    worst = []
    for a, e in zip(_blocks(actual), _blocks(expected), strict=True):
        wide = e.astype(np.float64)
        worst.append(error(a.astype(np.float64), wide, np.maximum(least, np.abs(wide))))
    return float(np.max(worst))


def disagreement(call: Call, expected: Sequence[Array], dtype: str, count: int) -> str | None:
    """Run a call; what is wrong with its result, None where it is fastbn's."""
    actual = call.read(call.run())
    if len(actual) != len(expected):
        return f"wrong: {len(actual)} results, want {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a_sum = i > 0 and len(expected) == 3  # dgamma, dbeta
        worst = apart(np.asarray(a), e, count if a_sum else 1.0)
        if not worst <= TOLERANCE[dtype]:
            return f"wrong: result {i} is off by {worst:.1e}, want at most {TOLERANCE[dtype]:g}"
    return None


def field(p: Problem, what: str, peers: Sequence[str] = tuple(PEERS)) -> tuple[dict[str, Call], dict[str, str]]:
    """Whoever can run a pass and is right, fastbn first; and why each of the others is not timed."""
    calls = {"fastbn": own(p, what)}
    result = calls["fastbn"].read(calls["fastbn"].run())
    expected = [np.array(a, order="K") for a in result]  # a copy: the others write over it
    refused: dict[str, str] = {}
    makers: dict[str, Maker] = {}
    for peer in peers:
        makers |= PEERS[peer](p, what)
    for name, make in makers.items():
        try:
            call = make()
            reason = disagreement(call, expected, p.dtype, p.count)
        except Exception as problem:  # whatever a peer raises is its reason
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        if reason is None:
            calls[name] = call
        else:
            refused[name] = reason
    return calls, refused
