"""Every kernel compiled ahead: the `warmup` command."""

from __future__ import annotations

import argparse
import time
from typing import Any

from fastbn.arguments import checks
from fastbn.cli import console, info, selftest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `warmup` command."""
    all_of_them = ", ".join(selftest.DTYPES).replace("bfloat16", "bfloat16 where ml_dtypes is installed")
    help = f"compile for these dtypes only, like float32 (default: {all_of_them})"
    parser.add_argument("dtypes", metavar="DTYPE", nargs="*", help=help)


def _pytorch() -> Any:
    """PyTorch's threads, where it is installed and kernels run on them."""
    try:
        from fastbn.torch import openmp
    except (ImportError, OSError):  # the second from an installation that lacks a library
        return None
    return openmp.runtime()


def run(args: argparse.Namespace) -> int:
    """Run the `warmup` command; 1 where kernels can be kept nowhere."""
    from numba.core import event

    from fastbn.cpu import passes

    start, forms, compiled = time.perf_counter(), 0, 0
    chosen = [checks.check_dtype(dtype) for dtype in args.dtypes] or selftest.installed()
    kept = info.cache_directory()
    if kept.startswith("nowhere"):  # an image that carries nothing must not look well built, and that takes minutes
        console.complain(f"warmup has not begun, for kernels would be kept {kept}")
        return 1
    with event.install_recorder("numba:compile") as seen:
        for name in passes.warmup(chosen, _pytorch()):
            forms, compiled = forms + 1, compiled + bool(seen.buffer)
            seen.buffer.clear()
            print(f"{time.perf_counter() - start:6.1f} s  {name}", flush=True)
    found = f"{compiled} compiled, {forms - compiled} found compiled"
    print(f"{forms} forms of kernels in {time.perf_counter() - start:.1f} s: {found}; kept in {kept}")
    return 0
