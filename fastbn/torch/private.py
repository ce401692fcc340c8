"""What fastbn.torch uses of PyTorch that PyTorch does not document, by name, with what rests on it.

An upgrade may take any of it away: tests/torch/test_private.py says which. What a subclass of torch.nn.Module inherits
(`_parameters`, `_buffers`, `_modules`, `_check_input_dim`, the hooks) is used where it is needed, and asked for there
too.
"""

from __future__ import annotations

import ctypes
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad, profiler
from torch.nn.modules.batchnorm import _BatchNorm

_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
Function = TypeVar("Function", bound=Callable[..., Any])

RESTS: dict[str, str] = {}  # on each interface: which file, what for, and what to do without


def gone(name: str) -> str:
    """The words for an interface that is not there any more, or not what it was."""
    return f"{name}: gone or changed in PyTorch {torch.__version__}; fastbn/torch/{RESTS[name]}"


def _interface(name: str, rests: str) -> Any:
    RESTS[name] = rests
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ImportError(gone(name)) from error


_interface(
    "torch.nn.modules.batchnorm._BatchNorm",
    "convert.py, sync.py, eligibility.py and fastbn/fold.py rest on it: the base of all batch norms. Without: a tuple "
    "of the public classes",
)
AnyBatchNorm = _BatchNorm  # imported by name, for the type checker
TensorGuards = _interface(
    "torch._C._dynamo.guards.TensorGuards",
    "inference_cache.py rests on it: whether five tensors are what they were, in 0.2 us. Without: ask each, in 1 us",
)
# None but where Dynamo follows eager code: around its graph breaks
dynamo_callback = _interface(
    "torch._C._dynamo.eval_frame.get_eval_frame_callback",
    "modules.py and eager.py rest on it: whether Dynamo follows eager code. Without: torch.compiler.disable for every "
    "call, in 5 us",
)
_modes = _interface(
    "torch._C._len_torch_dispatch_stack",
    "private.py rests on it: watched() sees modes of torch.utils._python_dispatch. Without: they miss fastbn's calls",
)
_transforms = _interface(
    "torch._C._are_functorch_transforms_active",
    "private.py rests on it: watched() sees transforms of torch.func. Without: a wrapped tensor has no address",
)
_interface(
    "torch.autograd.forward_ad._current_level",
    "private.py rests on it: watched() sees forward derivatives. Without: unpack_dual of every tensor",
)
_interface(
    "torch.autograd.profiler._is_profiler_enabled",
    "private.py rests on it: profiled() asks in 20 ns whether a profiler runs. Without: record_function in every "
    "call, in 7 us",
)
is_functional = _interface(
    "torch._is_functional_tensor",
    "sync.py rests on it: such a tensor has no memory, in place of which NumPy takes any. Without: ask for its address",
)
is_zero_tensor = _interface(
    "torch.Tensor._is_zerotensor",
    "sync.py rests on it: zeros without memory, which NumPy refuses. Without: clone what has the address 0",
)
RESTS["torch/lib/libtorch_cpu.so"] = (
    "openmp.py rests on it: PyTorch's threads by the symbols of GNU OpenMP. Without: numba's threads, beside PyTorch's"
)
RESTS["_dynamo_marked_constant"] = (
    "eligibility.py rests on it: Dynamo asks gpu_declines once. Without: torch.compiler.assume_constant_result, which "
    "imports Dynamo, for 2 s"
)


def watched() -> str | None:
    """Who looks at every operation of this thread now, as only PyTorch's own kernels let them; None: nobody."""
    if _modes():
        return "a mode of torch.utils._python_dispatch looks at every operation"
    if _transforms():
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "derivatives are taken forwards (torch.autograd.forward_ad)"
    if _tracing():
        return "torch.jit.trace records PyTorch's own operators"
    return None


def profiled() -> bool:
    """Whether somebody looks at what `shown_as` shows."""
    return profiler._is_profiler_enabled


def shown_as(name: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """A call that torch.profiler shows as fastbn::name."""
    with profiler.record_function(f"fastbn::{name}"):
        return run(*arguments)


def openmp_addresses(names: Iterable[str]) -> list[int] | None:
    """Functions of the GNU OpenMP that PyTorch is linked with; None where it has another, or none."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        # loaded already; its names, and those it needs
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
    except (OSError, AttributeError):
        return None


def constant_when_compiled(function: Function) -> Function:
    """As `torch.compiler.assume_constant_result`."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
