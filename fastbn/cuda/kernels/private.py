"""What fastbn.cuda uses of numba-cuda and PyTorch that these do not document, by name, with what rests on it.

An upgrade may take any of it away: tests/cuda/test_private.py says which.
"""

from __future__ import annotations

import pkgutil
from importlib import metadata
from typing import Any

__all__ = [
    "RESTS",
    "block_of",
    "driver_error",
    "gone",
    "has_compiler",
    "interface",
    "is_nvidias",
    "raw_stream",
    "simulated_array",
]

# On each interface: which file of fastbn/cuda rests on it and for what, and what to do without.
RESTS = {
    "numba.cuda.cudadecl.registry": "kernels/group.py: types of + - * / on groups. Without: an intrinsic for each",
    "numba.cuda.cudaimpl.registry": "kernels/group.py: code of + - * / on groups. Without: an intrinsic for each",
    "numba.cuda.typing.templates.AbstractTemplate": "kernels/group.py: types of + - * /. Without: intrinsics",
    "numba.cuda.typing.templates.signature": "kernels/group.py: types of + - * /. Without: result(*arguments)",
    "numba.cuda.datamodel.PrimitiveModel": "kernels/group.py: a group is an LLVM vector. Without: a tuple of its lanes",
    "numba.cuda.models.register_model": "kernels/group.py: a group is an LLVM vector. Without: a tuple of its lanes",
    "numba.cuda.cgutils.add_global_variable": "kernels/group.py: shared memory. Without: llvmlite's GlobalVariable",
    "numba.cuda.compile": "kernels/jit.py: cc=(9, 0, 'a') and launch_bounds. Without: cuda.jit, and a driver",
    "numba.cuda.config": "kernels/disk.py: the settings that change code. Without: variables of the environment",
    "numba.cuda.implementation": "buffers.py: whether it is NVIDIA's. Without: where numba.cuda lies",
    "numba.cuda.cudadrv.driver.driver.initialization_error": "buffers.py: why there is no driver. Without: nothing",
    "numba.cuda.cudadrv.nvvm.is_available": "buffers.py: whether kernels can be compiled. Without: try to",
    "numba.cuda.simulator.kernel.BlockThread": "kernels/simulated.py: a thread's block. Without: cuda.blockIdx",
    "numba.cuda.simulator.cudadrv.devicearray.FakeCUDAArray": "buffers.py: the simulator's memory. Without: a copy",
    "torch._C._cuda_getCurrentRawStream": "streams.py: a handle without an object. Without: current_stream, as below",
}


def gone(name: str) -> str:
    """The words for an interface that is not there any more, or not what it was."""
    root = "torch" if name.startswith("torch.") else "numba-cuda"
    try:
        version = metadata.version(root)
    except metadata.PackageNotFoundError:  # numba's own target, which is another
        version = "(not installed)"
    return f"{name}: gone or changed in {root} {version}; fastbn/cuda/{RESTS[name]}"


def interface(name: str) -> Any:
    """An interface that is listed above.

    Raises
    ------
    ImportError
        It is not there.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ImportError(gone(name)) from error


def is_nvidias(cuda: Any) -> bool:
    """Whether numba.cuda is NVIDIA's numba-cuda."""
    return getattr(cuda, "implementation", "") == "NVIDIA"


def driver_error(cuda: Any) -> Any:
    """Why the driver could not be initialized; None where it does not say."""
    return getattr(cuda.cudadrv.driver.driver, "initialization_error", None)


def has_compiler(cuda: Any) -> bool:
    """Whether libNVVM is there."""
    return bool(cuda.cudadrv.nvvm.is_available())


def block_of(thread: Any) -> tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]:
    """Of a thread of the simulator: what its block has, threads of the block, blocks of the grid."""
    manager = thread._manager
    return manager.__dict__, manager._block_dim, manager._grid_dim


def simulated_array(array: Any) -> Any:
    """NumPy's array in one of the simulator."""
    return array._ary


def raw_stream(torch: Any, device: int) -> int:
    """PyTorch's current stream of a device, as a handle."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(raw(device) if raw is not None else torch.cuda.current_stream(device).cuda_stream)
