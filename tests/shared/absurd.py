"""What no argument that is one value takes, and the check that it is refused in the documented words."""

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

import numpy as np
import pytest

import fastbn


class _Hostile:
    """Raises at whatever is asked of it."""

    shape, dtype = (), np.dtype(float)

    def _raise(self, *_: Any) -> NoReturn:
        raise KeyError("hostile")

    __float__ = __index__ = __int__ = __bool__ = __len__ = __iter__ = __str__ = __repr__ = __eq__ = item = _raise
    __hash__ = None  # type: ignore[assignment]


# No argument takes one of these, but for those in TAKEN.
ABSURD: dict[str, Any] = {
    "word": "x", "digits": "1e-5", "empty word": "", "bytes": b"1", "list": [], "tuple": (), "dict": {}, "set": set(),
    "lambda": lambda: 1,
    "object": object(), "hostile": _Hostile(), "type": complex, "array": np.ones(2), "array of one": np.array([1.0]),
    "array of one integer": np.array([1]), "no values": np.ones(0), "array of words": np.array(["1"]),
    "0-d word": np.array("1"),
    "0-d object": np.array("1", object), "complex": 1j, "NumPy's complex": np.complex64(1),
    "wide complex": np.clongdouble(1),
    "date": np.datetime64(1, "s"), "masked": np.ma.masked, "nan": float("nan"), "NumPy's nan": np.float32("nan"),
    "inf": float("inf"),
    "-inf": -np.inf, "signalling": Decimal("sNaN"), "huge": 10**400, "-huge": -(10**400), "unprintable": 10**5000,
    "huge fraction":
    Fraction(10**400), "half": 0.5, "quarter": np.float32(0.25), "negative": -7, "true": True, "False": np.False_,
    "None": None,
}  # fmt: skip
NUMBERS = ("half", "quarter")
TAKEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("axis", "stream", "count", "num_features", "shape", "groups", "device", "state", "num_batches_tracked"), ()
    ),
    **dict.fromkeys(("backend", "num_threads", "stream", "comm", "kind"), ("None",)),
    **dict.fromkeys(("affine", "track_running_stats", "unbiased_running_var", "mode", "training"), ("true", "False")),
    **dict.fromkeys(("channels_last", "transposed", "strict", "progress", "backward"), ("true", "False")),
    "eps": NUMBERS,
    "momentum": (*NUMBERS, "negative", "None"),
    "ddof": (*NUMBERS, "negative"),
    "dtype": ("hostile",),  # which has a dtype
}


def held_by(value: Any) -> Any:
    """What an object holds, to compare."""
    if isinstance(value, np.ndarray):
        return np.ma.getdata(value).tobytes()
    if isinstance(value, fastbn.Moments):
        return value.count, value.mean.tobytes(), value.m2.tobytes()
    return (
        {key: held_by(kept) for key, kept in vars(value).items()}
        if isinstance(value, fastbn.BatchNorm | fastbn.RunningMoments)
        else None
    )


def refused(act: Callable[[], Any], argument: str, absurd: str, held: list[Any]) -> None:
    before, threads = [held_by(value) for value in held], fastbn.get_num_threads()
    errors = (TypeError, ValueError, *((fastbn.BackendUnavailable,) if argument == "backend" else ()))
    with pytest.raises(Exception) as caught:  # of which type is asked below
        act()
    assert type(caught.value) in errors, f"{argument}={absurd}: {type(caught.value).__name__}: {caught.value}"
    message = str(caught.value)
    assert re.search(rf"\b{argument}", message), f"{argument}={absurd}: {message}"
    assert len(message) < 500
    assert [held_by(value) for value in held] == before
    assert fastbn.get_num_threads() == threads
