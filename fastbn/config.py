"""Environment variables and named constants, read once, at import.

Environment
-----------
FASTBN_BACKEND
    Name of the backend that serves every call without an explicit ``backend=``: ``cpu``, ``cuda`` or ``reference``.
FASTBN_STREAM_BYTES
    Calls whose arrays, inputs and result, are together at least this large write the result past the cache with streaming stores.
    Default: five quarters of the last-level cache. Changes speed, never a bit of the result.
"""

import os


def _bytes(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        value = int(text) if text else default
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(f"{name}={text!r}: want a whole number of bytes, 0 or more; unset it for the default, {default}")
    return value


BACKEND: str | None = os.environ.get("FASTBN_BACKEND") or None

EPS = 1e-5
MOMENTUM = 0.1

# Below this size of x the serial kernel wins: waking the threads costs more than they save.
SERIAL_BYTES = 96 * 1024


def _last_level_cache() -> int:
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 * 2**20
    except (AttributeError, ValueError, OSError):
        return 32 * 2**20


# Arrays that overflow the last-level cache leave it anyway; the results of smaller calls should stay there for the next layer.
STREAM_BYTES = _bytes("FASTBN_STREAM_BYTES", _last_level_cache() * 5 // 4)
