"""Calls to execute: every shape, layout, alignment and kind of data in product, and a covering set of them."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from .arrays import LAYOUTS, Ints

DTYPES = ("float32", "float64", "float16", "bfloat16")


class Case(NamedTuple):
    """One set of arrays, on which all passes run."""

    dtype: str
    shape: Ints
    layout: str = "first"  # of x, dy and out, unless `layouts` says of each
    shifts: tuple[int, int, int] = (0, 0, 0)  # of x, dy and out, in elements behind a boundary
    affine: int = 3  # 1 gamma, 2 beta, 3 both
    statistics: tuple[str, str] = ("float64", "float64")  # dtypes of given mean and var
    mean: float = 0.0
    spread: float = 1.0
    layouts: tuple[str, str, str] | None = None
    axis: int = 1
    # of "own": results without out=, "in place", "track", "long": the kernels for 64-bit positions
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = [self.dtype, "x".join(map(str, self.shape)), "/".join(self.layouts or (self.layout,))]
        shown += [
            f"shifts {self.shifts}",
            f"affine {self.affine}",
            f"statistics {'/'.join(sorted(set(self.statistics)))}",
        ]
        shown += [
            f"{name} {value:g}"
            for name, value, usual in (("mean", self.mean, 0), ("spread", self.spread, 1))
            if value != usual
        ]
        shown += [f"axis {self.axis}"] if self.axis != 1 else []
        return " ".join([*shown, *self.more])


SINGLE, DOUBLE, MIXED = ("float32",) * 2, ("float64",) * 2, ("float32", "float64")

FLAT = ((32, 64), (9, 5), (70, 3), (2, 1), (515, 7), (3, 300), (4099, 3), (2100, 40))
IMAGES = ((4, 3, 7, 7), (2, 5, 9, 35), (3, 2, 70, 71), (5, 3, 2, 64), (2, 3, 1, 515), (1, 2, 33, 128))
SHORT = ((32, 43, 7, 7), (37, 450, 2, 2))  # rows of channels first as columns: more than grids.SMALL values
LANES = {"float64": 2, "float32": 4}  # of 16 bytes; of half precision 8
SHIFTS = ((0, 0, 0), (1, 1, 1), (3, 3, 3), (0, 1, 0), (1, 0, 2), (2, 2, 1))


def _shifts(shape: Ints, layout: str) -> tuple[tuple[int, int, int], ...]:
    return SHIFTS[:2] if shape in SHORT else SHIFTS if layout == "first" else SHIFTS[:3]


def _plain(dtype: str) -> Iterator[Case]:
    for (k, shape), (j, layout) in product(enumerate((*FLAT, *IMAGES, *SHORT)), enumerate(LAYOUTS)):
        if (len(shape) == 2 and layout in ("last", "channel outermost")) or (
            shape in SHORT and layout not in ("first", "crop", "reversed")
        ):
            continue
        for shifts in _shifts(shape, layout):
            yield Case(
                dtype, shape, layout, shifts, (3, 0, 1, 2, 3)[(k + 2 * j) % 5], (DOUBLE, SINGLE, MIXED)[(k + j) % 3]
            )


def _special(dtype: str) -> Iterator[Case]:
    mean = 8.0 if dtype.endswith("16") else 1e4
    for shape in ((70, 3), (2, 5, 9, 35), (3, 2, 70, 71), (515, 7), (64, 40)):
        yield Case(dtype, shape, mean=mean)
        if dtype != "float16":
            yield from (Case(dtype, shape, spread=spread) for spread in (1e-18, 1e17, 1e30))
        images = len(shape) > 2
        yield Case(dtype, shape, layouts=("first", "last", "first") if images else ("first", "crop", "reversed"))
        yield Case(dtype, shape, layouts=("last", "last", "first") if images else ("first", "first", "fortran"))
    yield Case(dtype, (5, 6, 37), axis=2)
    yield Case(dtype, (5, 6, 37), axis=0)


def _whole(dtype: str) -> Iterator[Case]:
    """One launch each, in which every thread has more than one step of four loads: 1250 groups of a channel, and 1280
    of columns.
    """
    lanes = LANES.get(dtype, 8)
    yield Case(dtype, (2, 5, 25 * lanes, 25), more=("own",))
    # and what lies outside groups
    yield Case(dtype, (2, 5, 25 * lanes + 1, 25), shifts=(1, 1, 1), affine=0, statistics=SINGLE)
    yield Case(dtype, (20 * lanes, 64), affine=1, statistics=SINGLE)


def everything(dtype: str) -> list[Case]:
    """The whole product of a dtype; what else a case runs is dealt out in turn."""
    plain = [*_plain(dtype), *_special(dtype), *_whole(dtype)]
    found = [*plain, *(case._replace(more=("long",)) for case in plain[::9])]
    turns = (("own", 3), ("in place", 4), ("track", 5))
    return [
        case._replace(more=case.more + tuple(name for name, every in turns if k % every == 0))
        for k, case in enumerate(found)
    ]


# The covering set: 53 cases of each dtype instead of 372. Each of these rows stands for a way through grids and
# kernels, which its comment names; layouts and alignments are spread over them, and `covering` adds those pairs of the
# two that no row has, on shapes that take no time. So every pair of layout and alignment is there, every pair of
# parameters and given statistics, every shape and kind of data. That every kernel is launched for every dtype, and that
# these pairs are there, `test_executed` checks; `run` prints the basic blocks that are left.
ROWS = (
    ((32, 64), "first", (0, 0, 0), 3, SINGLE, ("own", "track")),  # one launch, a channel to a column, whole groups
    ((9, 5), "fortran", (1, 1, 1), 0, DOUBLE, ("in place",)),  # the same, unaligned, fewer columns than a group
    ((2100, 40), "first", (0, 1, 0), 1, MIXED, ()),  # several parts, x aligned and dy not
    ((4099, 3), "first", (0, 0, 0), 2, SINGLE, ("track",)),  # rows folded, rows left over, several parts
    ((6000, 33), "first", (0, 0, 0), 3, SINGLE, ("own",)),  # more parts than threads of a channel that finish it
    ((515, 7), "crop", (2, 2, 1), 3, DOUBLE, ()),  # rows with gaps, an odd width
    ((3, 300), "strided", (0, 0, 0), 0, SINGLE, ("own",)),  # a copy first, few rows and many channels
    ((70, 3), "reversed", (1, 0, 2), 2, MIXED, ("in place",)),  # a negative stride
    ((2, 1), "first", (3, 3, 3), 0, MIXED, ()),  # the smallest
    # one launch, rows that are no whole groups
    ((4, 3, 7, 7), "channel outermost", (0, 0, 0), 1, SINGLE, ("in place", "own")),
    ((2, 5, 9, 35), "last", (0, 0, 0), 2, DOUBLE, ()),  # channels last, folded
    ((2, 5, 9, 35), "first", (1, 0, 2), 3, DOUBLE, ("long",)),  # arrays that don't lie alike: element by element
    # several parts of a channel, slots and rests of rows
    ((3, 2, 70, 71), "first", (1, 1, 1), 3, MIXED, ("long", "own")),
    ((5, 3, 2, 64), "crop", (3, 3, 3), 3, SINGLE, ("track",)),  # images apart: N * C runs
    ((2, 3, 1, 515), "reversed", (0, 1, 0), 1, DOUBLE, ()),  # images backwards
    ((1, 2, 33, 128), "last", (2, 2, 1), 2, SINGLE, ("own",)),  # two channels last, unaligned
    ((32, 43, 7, 7), "first", (0, 0, 0), 3, MIXED, ()),  # short rows of channels first as columns
    ((37, 450, 2, 2), "crop", (1, 1, 1), 3, DOUBLE, ()),  # the same, unaligned, with gaps between images
)


def covering(dtype: str) -> list[Case]:
    """The covering set of a dtype."""
    found = [
        Case(dtype, shape, layout, shifts, affine, stats, more=more)
        for shape, layout, shifts, affine, stats, more in ROWS
    ]
    missing = [pair for pair in product(LAYOUTS, SHIFTS) if pair not in {(case.layout, case.shifts) for case in found}]
    shapes = (IMAGES[1], IMAGES[3], IMAGES[0])  # rows of whole groups and others
    for k, (layout, shifts) in enumerate(missing):
        affine, statistics = k % 4, (DOUBLE, SINGLE, MIXED)[k // 4 % 3]
        found.append(
            Case(
                dtype,
                shapes[k % 3],
                layout,
                shifts,
                affine,
                statistics,
                more=(("own",), ("in place",), ("long",), ("track",), ("long", "own"))[k % 5],
            )
        )
    mean = 8.0 if dtype.endswith("16") else 1e4
    small, large = (1.0, 1.0) if dtype == "float16" else (1e-18, 1e30)
    found += [
        Case(dtype, (64, 40), mean=mean, layouts=("first", "first", "fortran")),  # a copy last
        Case(dtype, (3, 2, 70, 71), spread=large, layouts=("first", "last", "first"), more=("long",)),  # dy copied
        Case(dtype, (2, 5, 9, 35), spread=small, layouts=("last", "last", "first")),  # out otherwise than x
        Case(dtype, (5, 6, 37), axis=2),
        Case(dtype, (5, 6, 37), axis=0),
        *_whole(dtype),
    ]
    return found
