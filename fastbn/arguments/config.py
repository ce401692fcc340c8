"""Environment variables and named constants, read once, at import.

Environment
-----------
FASTBN_BACKEND
    Name of the backend that serves every call without an explicit ``backend=``: ``cpu``, ``cuda`` or ``reference``.
FASTBN_STREAM_BYTES
    Calls whose arrays, inputs and result, are together at least this large write the result past the cache with
    streaming stores. Default: 40 MiB. Changes speed, never a bit of the result.
FASTBN_KEEP_BYTES
    `fastbn.torch` keeps this much memory, at most, of large results that are gone for the next ones. Default: 1 GiB; 0
    keeps none.
"""

import os


def _bytes(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        value = int(text) if text else default
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(
            f"{name}={text!r}: want a whole number of bytes, 0 or more; unset it for the default, {default}"
        )
    return value


BACKEND: str | None = os.environ.get("FASTBN_BACKEND") or None

EPS = 1e-5
MOMENTUM = 0.1

# Below this size of x the serial kernel wins: waking the threads costs 4 to 5 us, more than two of them save (arrays of
# 128 to 250 KB take 0.94 to 2.4 times as long on two threads; from 256 KB on, 0.7 to 0.8 times).
SERIAL_BYTES = 256 * 1024
# Arrays that overflow the last-level cache, 32 MB for a few cores on most servers, leave it anyway; smaller results
# should stay there for the next layer. 12 MB arrays lose a third of their speed past the cache, 24 MB arrays gain a
# third.
STREAM_BYTES = _bytes("FASTBN_STREAM_BYTES", 40 * 2**20)
# MobileNetV2 on 32 x 3 x 128 x 128 leaves 220 MB after a training step. Where the system lacks memory it takes these
# pages first.
KEEP_BYTES = _bytes("FASTBN_KEEP_BYTES", 2**30)
