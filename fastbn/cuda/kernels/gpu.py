"""What kernels are written in.

`gpu`, which is `device` for a GPU and `simulated` for numba's simulator (NUMBA_ENABLE_CUDASIM=1), under the same names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.cuda import config as _config  # of numba's own target and of NVIDIA's alike

__all__ = ["SIMULATED", "gpu"]

SIMULATED = bool(_config.ENABLE_CUDASIM)

if not hasattr(np, "row_stack"):  # gone from NumPy 2.5; numba-cuda 0.30 asks for it when it first compiles
    np.row_stack = np.vstack  # noqa: NPY201

gpu: Any
if SIMULATED:
    from fastbn.cuda.kernels import simulated as gpu
else:
    from fastbn.cuda.kernels import device as gpu
