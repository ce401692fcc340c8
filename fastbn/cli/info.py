"""What this machine and installation are: the `info` command, and the facts that `bench` prints beside its numbers."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import fastbn
from fastbn.backends import availability
from fastbn.cpu import pool, threads

VARIABLES = (
    "FASTBN_BACKEND",
    "FASTBN_STREAM_BYTES",
    "FASTBN_KEEP_BYTES",
    "NUMBA_NUM_THREADS",
    "NUMBA_THREADING_LAYER",
    "NUMBA_CACHE_DIR",
    "NUMBA_DISABLE_JIT",
)


def version(package: str) -> str:
    """Look up the installed version of a package, or "not installed"; the package is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Name the processor as its maker does, or the architecture where the system does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_directory() -> str:
    """Where compiled kernels are kept between runs."""
    from numba import config

    from fastbn.cpu.kernels import cache

    if config.DISABLE_JIT:
        return "nowhere: NUMBA_DISABLE_JIT is set; unset it to compile any"
    places = cache.directories()
    if not places:
        return (
            "nowhere: this program's importer does not show fastbn's modules, so old kernels could not be told from "
            "new ones"
        )
    partly = (
        "; most are compiled anew at each start, since NUMBA_OPT=0 leaves addresses in them" if config.OPT == 0 else ""
    )
    for place in places:
        if cache.writable(place):
            return f"{place}{partly}"
        if any(place.glob("*.nbi")):
            return f"{place} (read-only){partly}"
    return "nowhere: no directory can be written; set NUMBA_CACHE_DIR to one"


def vector_width() -> str:
    """Find the widest vector unit that the compiler uses here."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    for feature, bits in (("avx512f", 512), ("avx", 256), ("sse2", 128), ("neon", 128), ("vsx", 128)):
        if features.get(feature):
            return f"{bits} bits ({feature}): {bits // 32} float32 or {bits // 64} float64 at a time"
    return "unknown"


def facts() -> Iterator[tuple[str, str]]:
    """(name, value) of everything worth knowing in a bug report; an empty name continues the line above."""
    from llvmlite import binding

    yield "fastbn", f"{fastbn.__version__} in {Path(fastbn.__file__).parent}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}) on {platform.platform()}"
    for package in ("numpy", "numba", "llvmlite", "tbb"):
        yield package, version(package)
    yield "processor", f"{cpu_name()} ({platform.machine()}, compiled for {binding.get_host_cpu_name()})"
    yield "vectors", vector_width()
    yield "cores", f"{cores()} usable of {os.cpu_count()}"
    yield "threads", threads.describe()
    yield "threading layer", pool.layer()
    yield "kernel cache", cache_directory()
    yield from _labelled("backends", availability())
    yield from _labelled(
        "environment",
        [f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set" for name in VARIABLES],
    )


def _labelled(name: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    yield from zip([name] + [""] * (len(lines) - 1), lines, strict=True)


def machine() -> dict[str, str]:
    """What measured numbers depend on."""
    return {
        "processor": cpu_name(),
        "threads": str(fastbn.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fastbn": fastbn.__version__,
        **{name: version(name) for name in ("numpy", "numba", "torch")},
        "date": datetime.date.today().isoformat(),
    }


def sentence(facts: Mapping[str, str]) -> str:
    """One line on a machine."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("fastbn", "python", "numpy", "numba", "torch"))
    return f"{facts['processor']}, {facts['threads']} threads, {facts['system']}; {versions}; {facts['date']}"


def run(args: argparse.Namespace) -> int:
    """Run the `info` command."""
    for name, value in facts():
        print(f"{name:15}  {value}")
    return 0
