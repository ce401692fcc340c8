"""What is asked of the ratios, on two cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Target(NamedTuple):
    """Least ratios of the fastest peer's time to fastbn's."""

    label: str
    groups: tuple[str, ...]
    passes: tuple[str, ...]
    every: float | None  # shape
    geomean: float | None

    def holds(self, cell: Mapping[str, Any]) -> bool:
        """Whether it is about this shape and pass."""
        return cell["group"] in self.groups and cell["pass"] in self.passes


LARGE = ("first", "last", "flat")
TARGETS = (
    Target("channels first, forward", ("first",), ("forward",), 1.2, 3.0),
    Target("channels first, backward", ("first",), ("backward",), 1.1, 1.8),
    Target("channels last and flat, forward and backward", ("last", "flat"), ("forward", "backward"), 1.0, 1.4),
    Target("inference", LARGE, ("inference",), 1.0, 1.1),
    Target("moments", LARGE, ("moments",), None, None),
)
LIMIT_BYTES = 4 * 2**20  # of the array, above which the limit is a target
HALF = 1.5  # times the speed of float32, on arrays over the cache


def peer_target(cell: Mapping[str, Any]) -> float | None:
    """The least ratio to the fastest peer wanted of a shape and pass."""
    return next((target.every for target in TARGETS if target.holds(cell)), None)


def limit_target(cell: Mapping[str, Any], cache: int) -> float | None:
    """The largest multiple of the limit's time wanted; None for small arrays and for moments."""
    if cell["bytes"] <= LIMIT_BYTES or cell["pass"] == "moments":
        return None
    if cell["pass"] == "inference":
        return 1.1
    if cell["group"] == "first":
        short = cell["shape"].endswith("x7x7")
        return 1.5 if cell["pass"] == "backward" else 1.7 if short else 1.35
    return 2.0 if cell["bytes"] > cache else 1.6
