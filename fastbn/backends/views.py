"""Arrays on a GPU as the kernels walk them: canonical views, and the grids of the passes over them. Nothing here needs numba."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastbn import layout
from fastbn.backends import grids
from fastbn.backends.devices import STORED, Buffer

DOUBLE = STORED["float64"]


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
    axes = plan.order or tuple(range(len(buffer.shape)))
    cut = axes.index(plan.axis)
    outer, inner = (_joined(buffer, [a for a in part if buffer.shape[a] != 1]) for part in (axes[:cut], axes[cut + 1 :]))
    if outer is None or inner is None or inner[1] != 1:
        return None
    (N, step), (S, _), C = outer, inner, buffer.shape[plan.axis]
    inside = S if C == 1 else buffer.strides[plan.axis]
    if plan.kind == "channels_last" and inside != 1:
        return None
    return View(buffer, N, C, S, C * S if N == 1 else step, inside)


def _joined(buffer: Buffer, axes: list[int]) -> tuple[int, int] | None:
    """(size, stride) of several axes as one."""
    for a, b in pairwise(axes):
        if buffer.strides[a] != buffer.strides[b] * buffer.shape[b]:
            return None
    return int(np.prod([buffer.shape[a] for a in axes], dtype=np.int64)), buffer.strides[axes[-1]] if axes else 1


class Sized(NamedTuple):
    """What a call on arrays of one canonical shape needs: which kernels, on which grid, with how much workspace."""

    rows: grids.Rows | None
    columns: grids.Columns | None
    entries: int  # parts of the partial results
    fold: int
    share: int  # columns of a channel; 1 for rows
    width: int  # values of one quantity of a part
    lanes: int
    even: bool  # whether every row and column group of all arrays lies on 16-byte boundaries


def sized(*views: View) -> Sized:
    """The grids for statistics of arrays that are read together."""
    x = views[0]
    lanes = 16 // x.buffer.itemsize
    if x.S <= grids.SHORT and all(v.inner == v.S for v in views):
        contiguous = all(v.outer == v.C * v.S for v in views)
        cut = grids.columns(x.N, x.C, x.S, lanes, contiguous)
        steps = [cut.fold * v.outer for v in views]
        even = cut.W % lanes == 0 and all(grids.even_rows(v.base, [step], lanes) for v, step in zip(views, steps, strict=True))
        return Sized(None, cut, cut.parts + (cut.rest > 0), cut.fold, x.S, cut.W, lanes, even)
    even = x.S % lanes == 0 and all(grids.even_rows(v.base, (v.outer, v.inner), lanes) for v in views)
    plan = grids.rows(x.N, x.C, x.S, lanes, even)
    if any((v.base - x.base) % lanes or (v.outer - x.outer) % lanes or (v.inner - x.inner) % lanes for v in views):
        plan = grids.rows(x.N, x.C, x.S, x.S + 1, False)._replace(slots=1)  # none of them lies alike: element by element
        plan = plan._replace(chunk=0)
    return Sized(plan, None, plan.parts, 1, 1, x.C, lanes, even)


def kind_of(x: View) -> np.dtype[Any]:
    """What x is computed in."""
    return DOUBLE if x.buffer.dtype == "float64" else STORED["float32"]


def pad_of(C: int) -> int:
    """Length of a row of coefficients: rows begin on 16-byte boundaries."""
    return -(-C // 8) * 8
