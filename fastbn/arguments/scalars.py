"""Arguments that are one value.

Numbers, whole numbers, flags. Each becomes Python's own, or a TypeError or ValueError that names it.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

WHOLE = 2**63  # counts are below: state_dict holds one as int64
RANK = 64  # NumPy's largest


def shown(value: Any) -> str:
    """A value in a message: on one line, of a length that can be read."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whose repr fails; an integer of more than 4300 digits
        return f"a {type(value).__name__} that can't be shown"
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def _plain(value: Any) -> Any:
    """Python's own value of NumPy's scalars and of arrays and tensors without axes.

    None of what is no number: booleans, words, arrays.
    """
    if getattr(value, "shape", ()) != () or getattr(getattr(value, "dtype", None), "kind", "f") in "bcmMSU":
        return None
    if isinstance(value, np.ma.MaskedArray):
        return None
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, bool) else value


def number(value: Any, name: str, wanted: str = "a number") -> float:
    """A real number as a float, NaN and infinities too."""
    if type(value) is float:
        return value
    try:
        plain = _plain(value)
        if hasattr(type(plain), "__float__") or hasattr(type(plain), "__index__"):
            return float(plain)
    except OverflowError:
        raise ValueError(f"{name}: given {shown(value)}, beyond the largest float64; want {wanted}") from None
    except Exception:  # whatever a library's object raises, it is no number
        pass
    raise TypeError(f"{name}: given {shown(value)}, want {wanted}")


def whole(value: Any, name: str, wanted: str) -> int:
    """An integer; a float is none."""
    if type(value) is int:
        return value
    try:
        return operator.index(_plain(value))
    except Exception:
        raise TypeError(f"{name}: given {shown(value)}, want {wanted}") from None


def count(value: Any, name: str = "count") -> int:
    """How many there are: a whole number, of floats too, that is not negative."""
    wanted = "a whole number, 0 or more"
    if type(value) is int:
        found = value
    else:
        try:
            found = operator.index(_plain(value))
        except Exception:
            approximate = number(value, name, wanted)
            if not approximate.is_integer():  # NaN and infinities are none
                raise ValueError(f"{name}: given {shown(value)}, want {wanted}") from None
            found = int(approximate)
    if not 0 <= found < WHOLE:
        raise ValueError(f"{name}: given {shown(value)}, want {wanted}" + (", below 2**63" if found > 0 else ""))
    return found


def flag(value: Any, name: str) -> bool:
    """True or False, also as 1 or 0."""
    if type(value) is bool:
        return value
    try:
        shape = getattr(value, "shape", ())
        plain = value.item() if shape == () and hasattr(value, "item") else value
        if isinstance(plain, bool | int) and plain in (0, 1):
            return bool(plain)
    except Exception:  # as in `number`
        pass
    raise TypeError(f"{name}: given {shown(value)}, want True or False")


def check_eps(eps: Any, training: bool) -> float:
    """eps: positive in training, not negative at inference; in units of x squared."""
    if type(eps) is float and 0.0 < eps < math.inf:
        return eps
    value = number(eps, "eps")
    if training and not 0 < value < math.inf:
        raise ValueError(f"eps: given {eps}, want a positive number in training, e.g. 1e-5")
    if not 0 <= value < math.inf:
        raise ValueError(f"eps: given {eps}, want a number that is not negative")
    return value


def check_ddof(ddof: Any) -> float:
    """What a count is lessened by where a variance is taken: any number."""
    if type(ddof) is int and -WHOLE < ddof < WHOLE:
        return ddof
    value = number(ddof, "ddof")
    if not math.isfinite(value):
        raise ValueError(f"ddof: given {ddof}, want a number: 0 for the biased variance, 1 for the unbiased one")
    return value


def check_momentum(momentum: Any) -> float | None:
    """The weight of the new value.

    None for the cumulative average. Outside 0 to 1 it extrapolates, as PyTorch lets it.
    """
    if momentum is None:
        return None
    value = number(momentum, "momentum", "a number from 0 to 1, or None for the cumulative average")
    if not math.isfinite(value):
        raise ValueError(
            f"momentum: given {momentum}, want a finite number: the weight of the new value (1 - decay elsewhere)"
        )
    return value


def check_axis(axis: Any) -> int:
    """A channel axis of arrays that are not there yet."""
    channel = whole(axis, "axis", "an integer")
    if not -RANK <= channel < RANK:
        raise ValueError(f"axis: given {shown(channel)}, want one from {-RANK} to {RANK - 1}: arrays have no more axes")
    return channel


def check_backend(backend: Any) -> str | None:
    """The name of a backend, which may be none that is there, or None."""
    if backend is None or isinstance(backend, str):
        return backend
    raise TypeError(
        f"backend: given {shown(backend)}, want a name, 'cpu', 'cuda' or 'reference', or None: where the "
        f"array lives decides"
    )
