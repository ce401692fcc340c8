"""Arrays on a GPU as the kernels walk them.

Canonical views, and the grids of the passes over them. Nothing here needs numba.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from fastbn.arguments import dtypes, layout
from fastbn.cuda import grids
from fastbn.cuda.buffers import Buffer

DOUBLE = dtypes.FLOAT64
Ints = tuple[int, ...]


class View(NamedTuple):
    """A buffer as (N, C, S), S contiguous; channels last as (R, C, 1)."""

    buffer: Buffer
    N: int
    C: int
    S: int
    outer: int  # strides, in elements
    inner: int

    @property
    def base(self) -> int:
        """Elements between the last 16-byte boundary and the first."""
        return self.buffer.address % 16 // self.buffer.itemsize


def view(buffer: Buffer, plan: layout.Plan) -> View | None:
    """The canonical view of a buffer of a plan's shape; None where two strides can't describe it."""
    found = _walk(buffer.shape, buffer.strides, plan.order, plan.axis, plan.kind)
    return None if found is None else View(buffer, *found)


def _walk(
    shape: Ints, strides: Ints, order: Ints | None, axis: int, kind: str
) -> tuple[int, int, int, int, int] | None:
    axes = order or tuple(range(len(shape)))
    cut = axes.index(axis)
    outer, inner = (
        _joined(shape, strides, [a for a in part if shape[a] != 1]) for part in (axes[:cut], axes[cut + 1 :])
    )
    if outer is None or inner is None or inner[1] != 1:
        return None
    (N, step), (S, _), C = outer, inner, shape[axis]
    grids.check_channels(C)
    inside = S if C == 1 else strides[axis]
    if kind == "channels_last" and inside != 1:
        return None
    return N, C, S, C * S if N == 1 else step, inside


def _joined(shape: Ints, strides: Ints, axes: list[int]) -> tuple[int, int] | None:
    """(size, stride) of several axes as one."""
    for a, b in pairwise(axes):
        if strides[a] != strides[b] * shape[b]:
            return None
    return math.prod(shape[a] for a in axes), strides[axes[-1]] if axes else 1


class Reduction(NamedTuple):
    """What a call on arrays of one canonical shape needs: which kernels, on which grid, with how much workspace."""

    rows: grids.Rows | None
    columns: grids.Columns | None
    entries: int  # partial results of a channel
    even: bool  # whether every row and column group of all arrays lies on 16-byte boundaries
    whole: bool = False  # whether a block takes all of a channel, so that statistics and result are one launch


def reduction(*views: View) -> Reduction:
    """The grids for statistics of arrays that are read together."""
    return _reduction(views[0][1:4], tuple((v.base, v.outer, v.inner) for v in views), 16 // views[0].buffer.itemsize)


def fused_reduction(out: View, *views: View) -> Reduction:
    """The same for a pass that also writes."""
    arrays = tuple((v.base, v.outer, v.inner) for v in views)
    return _fused_reduction((out.base, out.outer, out.inner), views[0][1:4], arrays, 16 // views[0].buffer.itemsize)


def _fused_reduction(
    out: tuple[int, int, int], dims: tuple[int, int, int], arrays: tuple[tuple[int, int, int], ...], lanes: int
) -> Reduction:
    reduction, (N, C, S) = _reduction(dims, arrays, lanes), dims
    if reduction.rows is not None:
        alike = reduction.rows.chunk == 0 or not any(
            (one - first) % lanes for one, first in zip(out, arrays[0], strict=True)
        )
        if not alike or N * S * (16 // lanes) > grids.SLAB or (reduction.entries > 1 and C < grids.ENOUGH):
            return reduction
        return reduction._replace(rows=grids.undivided(reduction.rows, N), entries=1, whole=True)
    if reduction.entries > 1:
        return reduction
    base, outer, inner = out
    even = reduction.even and grids.even_rows(base, [outer], lanes)
    assert reduction.columns is not None
    return reduction._replace(whole=True, even=even) if reduction.columns.fold == S == inner == 1 else reduction


def _reduction(dims: tuple[int, int, int], arrays: tuple[tuple[int, int, int], ...], lanes: int) -> Reduction:
    """For (N, C, S), and (base, outer, inner) of each array."""
    N, C, S = dims
    if S <= grids.SHORT and all(inner == S for _, _, inner in arrays) and (S == 1 or N * C * S > grids.SMALL):
        cut = grids.columns(N, C, S, lanes, all(outer == C * S for _, outer, _ in arrays))
        even = cut.W % lanes == 0 and all(grids.even_rows(base, [cut.fold * outer], lanes) for base, outer, _ in arrays)
        return Reduction(None, cut, cut.parts * cut.copies, even)
    even = S % lanes == 0 and all(grids.even_rows(base, (outer, inner), lanes) for base, outer, inner in arrays)
    grid = grids.rows(N, C, S, lanes, even)
    if any((one - first) % lanes for array in arrays for one, first in zip(array, arrays[0], strict=True)):
        grid = grids.rows(N, C, S, S + 1, False)  # none of them lies alike: element by element
    return Reduction(grid, None, grid.parts, even)


class Flat(NamedTuple):
    """An elementwise pass over arrays that lie as they do."""

    grid: grids.Runs
    steps: Ints  # outer and inner of each array; 0 where there is but one run
    aligned: bool  # whether every group of every array lies on a 16-byte boundary

    @property
    def table(self) -> tuple[int, int, int]:
        """What kernels need to know of the table of coefficients.

        Columns of a channel, copies of all, and the length of a row.
        """
        grid = self.grid
        return grid.columns, grid.copies, pad_of(grid.S if grid.mode == grids.TABLE else grid.C)


def flat(*views: View) -> Flat:
    """How an elementwise pass walks its arrays."""
    return _flat(views[0][1:4], tuple((v.base, v.outer, v.inner) for v in views), 16 // views[0].buffer.itemsize)


def _flat(dims: tuple[int, int, int], arrays: tuple[tuple[int, int, int], ...], lanes: int) -> Flat:
    grid = grids.runs(*dims, lanes, [(outer, inner) for _, outer, inner in arrays])
    apart = [(0, 0) if grid.runs == 1 else (outer, inner if grid.inner > 1 else 0) for _, outer, inner in arrays]
    aligned = all(grids.even_rows(base, step, lanes) for (base, _, _), step in zip(arrays, apart, strict=True))
    return Flat(
        grid, tuple(n for step in apart for n in step), aligned and (grid.runs == 1 or grid.length % lanes == 0)
    )


def pad_of(C: int) -> int:
    """Length of a row of coefficients: rows begin on 16-byte boundaries."""
    return -(-C // 8) * 8
