"""PTX of the CUDA kernels, by numba-cuda and libNVVM as on a machine with a GPU, and kept on disk: without a GPU or a
driver.
"""

import hashlib
import importlib
import importlib.metadata
import os
import pkgutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from numba import cuda as numba_cuda
from numba.cuda import dispatcher
from numba.cuda.cudadrv import nvrtc

import fastbn.cuda.kernels
from fastbn.cuda.kernels import jit

# The targets that numba-cuda compiles for on A100, H100 and H200, B200: a is for what only that architecture has.
ARCHITECTURES = {"sm_80": (8, 0, ""), "sm_90a": (9, 0, "a"), "sm_100a": (10, 0, "a")}
# as the kernels see memory of a dtype
STORED = {"float32": "float32", "float64": "float64", "float16": "uint16", "bfloat16": "int16"}
STATISTICS = ("float32", "float64")


@cache
def kernels() -> dict[str, jit.Kernel]:
    """Every kernel of the package, as "module.name"."""
    found = {}
    for module in pkgutil.iter_modules(fastbn.cuda.kernels.__path__):
        names = vars(importlib.import_module(f"fastbn.cuda.kernels.{module.name}"))
        mine = {f"{module.name}.{name}": value for name, value in names.items() if isinstance(value, jit.Kernel)}
        found |= {name: kernel for name, kernel in mine.items() if kernel.body.__module__ == names["__name__"]}
    return found


def takes_statistics(kernel: jit.Kernel) -> bool:
    """Whether it is compiled for given statistics of either dtype."""
    return "t" in kernel.arguments


@contextmanager
def without_a_driver(target: jit.Target) -> Iterator[None]:
    """Answers where numba-cuda would ask a driver."""
    known = sorted(each[:2] for each in ARCHITECTURES.values())
    current = SimpleNamespace(compute_capability=target[:2])
    with (
        mock.patch.object(nvrtc, "get_supported_ccs", lambda: known),
        mock.patch.object(dispatcher, "get_current_device", lambda: current),
    ):
        yield


def compiled(body: Any, signature: Any, architecture: str, lto: bool = False) -> str:
    """PTX of a function as a kernel."""
    target = ARCHITECTURES[architecture]
    with without_a_driver(target):
        kind = "ltoir" if lto else "ptx"
        found, _ = numba_cuda.compile(
            body, signature, cc=target, device=False, abi="numba", output=kind, **jit.Kernel.options
        )
    return _linked(found, architecture) if lto else str(found)


def ptx(name: str, stored: str, statistic: str, architecture: str, lto: bool = False) -> str:
    """PTX of a kernel for memory of a dtype, as numba names it, and for statistics of another."""
    kernel = kernels()[name]
    file = folder() / f"{name}-{stored}-{statistic}-{architecture}{'-lto' * lto}.ptx"
    if not file.exists():
        types = np.dtype(stored), np.dtype(statistic)
        if lto:
            text = compiled(kernel.body, kernel.signature(*types), architecture, lto)
        else:  # by the project's own hand
            with without_a_driver(ARCHITECTURES[architecture]):
                text = kernel.ptx(*types, ARCHITECTURES[architecture])
        # another process may compile the same
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as partial:
            partial.write(text)
        os.replace(partial.name, file)
    return file.read_text()


def _linked(code: bytes, architecture: str) -> str:
    """PTX behind link-time optimization, as numba-cuda itself has it at run time wherever nvJitLink loads."""
    from cuda.bindings import nvjitlink

    link = nvjitlink.create(3, [f"-arch={architecture}", "-lto", "-ptx"])
    nvjitlink.add_data(link, nvjitlink.InputType.LTOIR, code, len(code), "kernel")
    nvjitlink.complete(link)
    text = bytearray(nvjitlink.get_linked_ptx_size(link))
    nvjitlink.get_linked_ptx(link, text)
    nvjitlink.destroy(link)
    return text.decode().strip("\0")


@cache
def folder() -> Path:
    """Where PTX is kept: by a digest of the kernels' sources and of what compiles them."""
    digest = hashlib.sha256()
    for path in sorted(Path(fastbn.cuda.kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    packages = ("numba", "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink")
    digest.update(
        repr([[each.version for each in importlib.metadata.distributions(name=name)] for name in packages]).encode()
    )
    found = Path(os.environ.get("NUMBA_CACHE_DIR") or tempfile.gettempdir(), "fastbn-ptx", digest.hexdigest()[:16])
    found.mkdir(parents=True, exist_ok=True)
    return found
