"""Batch normalization inside the caller's own @njit functions, as serial functions.

`moments_channels_first`, `moments_channels_last`, and likewise `forward_`, `normalize_` and `backward_`: see
`fastbn.cpu.kernels.serial`, where they are.
"""

from typing import Any


def __getattr__(name: str) -> Any:  # numba is imported only when one of them is asked for
    if name.endswith(("_channels_first", "_channels_last")):
        from fastbn.cpu.kernels import serial

        if name in serial.__all__:
            return getattr(serial, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
