"""What a process has held."""

from __future__ import annotations

import sys
from pathlib import Path


def peak() -> int:
    """Bytes that this process has held at most. Not ru_maxrss on Linux.

    That begins with what the process that started this one held.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
