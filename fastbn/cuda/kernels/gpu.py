"""What kernels are written in.

`_device` for a GPU, `_simulated` for numba's simulator (NUMBA_ENABLE_CUDASIM=1), under the same names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.cuda import config as _config  # of numba's own target and of NVIDIA's alike

SIMULATED = bool(_config.ENABLE_CUDASIM)

if not hasattr(np, "row_stack"):  # gone from NumPy 2.5; numba-cuda 0.30 asks for it when it first compiles
    np.row_stack = np.vstack  # noqa: NPY201

_form: Any
if SIMULATED:
    from fastbn.cuda.kernels import simulated as _form
else:
    from fastbn.cuda.kernels import device as _form

device, block, blocks, thread, threads, sync = (
    _form.device,
    _form.block,
    _form.blocks,
    _form.thread,
    _form.threads,
    _form.sync,
)
lanes, scalar, broadcast, quotient = _form.lanes, _form.scalar, _form.broadcast, _form.quotient
load, load_group, load_any, load_table, gather = (
    _form.load,
    _form.load_group,
    _form.load_any,
    _form.load_table,
    _form.gather,
)
store, store_group, store_any = _form.store, _form.store_group, _form.store_any
few, put, take = _form.few, _form.put, _form.take
many, put_lane, take_lane, put_group, take_group = (
    _form.many,
    _form.put_lane,
    _form.take_lane,
    _form.put_group,
    _form.take_group,
)
first, split, total, inverse, half = _form.first, _form.split, _form.total, _form.inverse, _form.half
