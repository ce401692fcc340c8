"""The machine as the numbers depend on it: facts, threads for everyone, and memory."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import fastbn
from bench import onnx_runtime, pytorch, xla
from fastbn.arguments import config
from fastbn.cli import info

PACKAGES = ("llvmlite", "tbb", "jax", "jaxlib", "onnx", "onnxruntime", "ml_dtypes")


def keep_memory() -> bool:
    """Let malloc keep what is freed, so that nobody pays for fresh pages who allocates a result.

    Whether it does (glibc).
    The peers without ``out=`` get memory that is already there, which is more than their users do. To be called before
    threads start.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    one_arena, no_mmap, never_trim = (-8, 1), (-4, 0), (-1, 2**31 - 1)
    return all([mallopt(*option) == 1 for option in (one_arena, no_mmap, never_trim)])


def give_threads(number: int | None) -> int:
    """Give fastbn and every peer the same number of threads, by default as many as fastbn takes.

    To be called before JAX is imported.
    """
    import numba

    if number is not None:
        fastbn.set_num_threads(number)
        numba.set_num_threads(number)  # for the limits
    number = number or int(info.machine()["threads"])
    xla.set_threads(number)
    onnx_runtime.set_threads(number)
    pytorch.set_threads(number)
    return number


def last_level_cache() -> int:
    """Bytes of the processor's last-level cache; where the system does not tell, what fastbn assumes."""
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    sizes = [int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]] for text in texts if re.fullmatch(r"\d+[KM]", text)]
    return max(sizes, default=config.STREAM_BYTES)


def facts(threads: int, kept: bool) -> dict[str, Any]:
    """Processor, cores, threads, cache and versions of everything."""
    return {
        **info.machine(),
        **{name: info.version(name) for name in PACKAGES},
        "threads": str(threads),
        "cores": info.cores(),
        "cache": last_level_cache(),
        "layer": dict(info.facts())["threading layer"],
        "memory": "freed memory stays with the process" if kept else "malloc as it is",
    }


def slug(machine: dict[str, Any]) -> str:
    """Date, processor and cores, for a file's name."""
    processor = re.sub(r"[^a-z0-9]+", "-", machine["processor"].lower()).strip("-")
    return f"{machine['date']}-{processor}-{machine['cores']}"


def sentence(machine: dict[str, Any]) -> str:
    """One line on the machine."""
    peers = ", ".join(f"{name} {machine[name]}" for name in ("jax", "onnxruntime"))
    return f"{info.sentence(machine)}; {machine['cores']} cores, {machine['cache'] / 2**20:.0f} MB of cache; {peers}"


def peak() -> int:
    """Bytes that this process has held at most."""
    # Not ru_maxrss on Linux: that begins with what the process that started this one held.
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available() -> int | None:
    """Bytes that a process may still take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
