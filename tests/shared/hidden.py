"""What is there before fastbn in a process that a test starts: libraries hidden from it, other users of numba's
threads, PyTorch.

HIDE names threading layers whose libraries this process is not to find: as on a machine where nobody installed them.
"""

import ctypes
import os
import sys

_POOLS = {"tbb": "tbbpool", "omp": "omppool"}
_hidden = os.environ.get("HIDE", "").split()
for _name in _hidden:
    # what the import system takes for "not there"
    sys.modules[f"numba.np.ufunc.{_POOLS[_name]}"] = None  # type: ignore[assignment]
if "tbb" in _hidden:
    _CDLL = ctypes.CDLL

    def _without_tbb(name, *arguments, **options):
        if "tbb" in str(name):
            raise OSError(f"{name}: hidden from this process")
        return _CDLL(name, *arguments, **options)

    ctypes.CDLL = _without_tbb  # type: ignore[assignment,misc] # a function in its place

if "USER_FIRST" in os.environ:  # numba picks its layer before fastbn is there
    import user_code

    user_code.total(1000)

if "TORCH_FIRST" in os.environ:
    import torch  # noqa: F401 # what matters is that it is there
