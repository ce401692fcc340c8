"""What the CUDA backend would do for a shape, and how many bytes that must move.

Known without a GPU, and without numba.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastbn.arguments import layout
from fastbn.cuda import grids, views
from fastbn.cuda.buffers import Buffer

BANDWIDTH = 3350.0  # GB/s, the memory of an H100 SXM as its data sheet has it: an example to multiply


class Launch(NamedTuple):
    """One kernel of a pass, and the bytes of whole arrays that it reads and writes."""

    kernel: str
    blocks: int
    reads: int
    writes: int


def _compact(dims: tuple[int, ...], dtype: str) -> views.View:
    N, C, S = (*dims, 1)[:3]
    buffer = Buffer(0, (N, C, S), layout.compact((N, C, S)), dtype, False, None, None)
    return views.View(buffer, N, C, S, C * S, S)


def launches(name: str, dims: tuple[int, ...], dtype: str) -> list[Launch]:
    """The kernels of a pass over compact arrays: forward, backward, inference or moments.

    Parameters
    ----------
    name : str
        The pass.
    dims : tuple of int
        (N, C, S), or (R, C) for channels last.
    dtype : str
        float32, float64, float16 or bfloat16.

    Returns
    -------
    list of Launch
        In their order.
    """
    x = _compact(dims, dtype)
    size = x.buffer.size * x.buffer.itemsize
    reduction, whole = (
        views.reduction(x),
        {"forward": views.fused_reduction(x, x).whole, "backward": views.fused_reduction(x, x, x).whole},
    )
    walked = "columns" if reduction.columns is not None else "rows"
    if reduction.columns is not None:
        blocks = reduction.columns.blocks
    else:
        assert reduction.rows is not None
        blocks = reduction.rows.blocks(x.C)
    if whole.get(name):
        return [Launch(f"fused.{name}_{walked}", blocks, size if name == "forward" else 2 * size, size)]
    flat = grids.runs(x.N, x.C, x.S, 16 // x.buffer.itemsize, [(x.outer, x.inner)]).blocks(grids.THREADS)
    wide = "_long" if x.buffer.size >= grids.LONG else ""
    merging = -(-x.C // grids.finish(reduction.entries, x.C))
    statistics = Launch(f"{walked}.moments_{walked}", blocks, size, 0)
    normalize = Launch(f"apply.normalize{wide}", flat, size, size)
    return {
        "moments": [statistics, Launch("finish.finish_moments", merging, 0, 0)],
        "forward": [statistics, Launch("finish.finish_forward", merging, 0, 0), normalize],
        "inference": [Launch("finish.normalize_coefs", grids.blocks(x.C), 0, 0), normalize],
        "backward": [
            Launch(f"{walked}.sums_{walked}", blocks, 2 * size, 0),
            Launch("finish.finish_backward", merging, 0, 0),
            Launch(f"apply.gradient{wide}", flat, 2 * size, size),
        ],
    }[name]


def moved(name: str, dims: tuple[int, ...], dtype: str) -> int:
    """Bytes of whole arrays that a pass reads and writes."""
    return sum(launch.reads + launch.writes for launch in launches(name, dims, dtype))


def describe(dims: tuple[int, ...], dtype: np.dtype[np.generic], bandwidth: float = BANDWIDTH) -> str:
    """Kernels, bytes and the time that these take at a bandwidth in GB/s, for a person to read."""
    lines = []
    for name in ("forward", "backward", "inference", "moments"):
        each = launches(name, dims, dtype.name)
        kernels = ", ".join(f"{launch.kernel} ({launch.blocks} blocks)" for launch in each)
        megabytes = moved(name, dims, dtype.name) / 1e6
        lines.append(f"{name}: {kernels}")
        lines.append(f"  moves {megabytes:.4g} MB, {megabytes / bandwidth * 1e3:.4g} us at {bandwidth:.0f} GB/s")
    return "\n".join(lines)
