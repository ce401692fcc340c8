"""The one table of tolerances, per quantity and dtype, and the natural scale that each is relative to.

y and dx of float16 and bfloat16 may also differ by half a unit in the last place, their rounding; all else of them is
as for float32. A tolerance is relative to what the quantity is made of, not to its own value, which may cancel to
nothing:

    mean     max(|mean|, std)                                    of the channel
    var      var                                                 of the channel
    y        max(1, |gamma * xhat|, |beta|)                      of the element
    dx       |gamma| * rstd * (|dy| + D + max(1, |xhat|) * G)    of the element, D and G the next two scales / m; |gamma
    * dy| * rstd
                                                                 at inference
    dgamma   sum of |dy * xhat|, G * m                           of the channel
    dbeta    sum of |dy|, D * m                                  of the channel
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import published
from shapes import HALF, parameter_dtype


class Tolerance(NamedTuple):
    relative: float
    reason: str


_STATED = "the project's stated limit, at any mean/std up to 1e6 and in any layout"
_ROUNDINGS = "about 17 roundings to float32, 6e-8 each, of the terms in the natural scale"
_CONDITION = "xhat loses 6 of float64's 16 digits at mean/std 1e6, in the oracle too; ten times that"
_SUMS = "float64 sums of up to 1e6 terms in another order than the oracle's"

# Held by fastbn against the float64 formulas, for the same input, at any offset up to 1e6.
TOLERANCE: dict[tuple[str, str], Tolerance] = {
    ("mean", "float32"): Tolerance(1e-6, _STATED),
    ("var", "float32"): Tolerance(1e-6, _STATED),
    ("y", "float32"): Tolerance(1e-6, _STATED),
    ("dx", "float32"): Tolerance(1e-6, _ROUNDINGS),
    ("dgamma", "float32"): Tolerance(1e-6, _ROUNDINGS),
    ("dbeta", "float32"): Tolerance(1e-6, _ROUNDINGS),
    ("mean", "float64"): Tolerance(1e-14, _SUMS),
    ("var", "float64"): Tolerance(
        1e-10, "squares of deviations that carry the condition number's error to first order in a merge"
    ),
    ("y", "float64"): Tolerance(1e-9, _CONDITION),
    ("dx", "float64"): Tolerance(1e-9, _CONDITION),
    ("dgamma", "float64"): Tolerance(1e-9, _CONDITION),
    ("dbeta", "float64"): Tolerance(1e-14, _SUMS),
}


def tolerance(quantity: str, dtype: Any) -> Tolerance:
    """The tolerance of a quantity computed from x of this dtype."""
    return TOLERANCE[quantity, parameter_dtype(dtype)]


def rounding(quantity: str, got: np.ndarray) -> Any:
    """What rounding a result to the half precision that it is stored in may add to its error: half a unit in the last
    place.
    """
    if quantity not in ("y", "dx") or got.dtype.name not in HALF:
        return 0.0
    info = ml_dtypes.finfo(got.dtype)
    exponent = np.frexp(np.abs(got.astype(np.float64)))[1] - 1
    return np.ldexp(0.5, np.maximum(exponent, info.minexp) - info.nmant)


class Scales(NamedTuple):
    """The natural scales, each in the shape of its quantity."""

    mean: np.ndarray
    var: np.ndarray
    y: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray


def scales(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    axis: int,
    eps: float,
    training: bool,
) -> Scales:
    """The natural scales of everything computed from x and dy, with these statistics."""
    others, m = published.others_of(x, axis), x.size // x.shape[axis]
    hat = np.abs(published.xhat(x, mean, var, axis, eps))
    steep = np.abs(np.asarray(dy, np.float64))
    dgamma, dbeta = (steep * hat).sum(others), steep.sum(others)

    def beside(values: Any) -> np.ndarray:
        return published.along(np.abs(values), x, axis)

    weight = beside(1.0 if gamma is None else gamma)
    height = np.maximum(1.0, np.maximum(weight * hat, beside(0.0 if beta is None else beta)))
    terms = steep + beside(dbeta / m) + np.maximum(1.0, hat) * beside(dgamma / m) if training else steep
    return Scales(
        np.maximum(np.abs(mean), np.sqrt(var)), var, height, weight * terms / np.sqrt(beside(var) + eps), dgamma, dbeta
    )


def excess(quantity: str, dtype: Any, got: np.ndarray, want: np.ndarray, scale: Any = 1.0, slack: Any = 1.0) -> float:
    """The worst error as a multiple of what is allowed: at most 1 within the tolerance, inf where either side is not
    finite.

    Where the scale is 0 nothing is allowed. `slack` widens the tolerance: for peers that round more than fastbn does.
    """
    rounded = rounding(quantity, got)
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{quantity}: shape {got.shape}, want {want.shape}"
    if got.size == 0:
        return 0.0
    error = np.abs(got - want)
    allowed = np.broadcast_to(tolerance(quantity, dtype).relative * np.asarray(slack) * scale + rounded, error.shape)
    ratio = np.divide(error, allowed, out=np.where(error == 0, 0.0, np.inf), where=allowed > 0)
    return float(np.where(np.isfinite(error), ratio, np.inf).max())


def check(quantity: str, dtype: Any, got: np.ndarray, want: np.ndarray, scale: Any = 1.0, slack: Any = 1.0) -> None:
    """Fail where the error exceeds the tolerance."""
    found = excess(quantity, dtype, got, want, scale, slack)
    assert found <= 1.0, (
        f"{quantity} of {np.dtype(dtype).name}: error {found:.3g} times what is allowed ({tolerance(quantity, dtype)})"
    )
