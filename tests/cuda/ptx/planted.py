"""Faults planted in a kernel's PTX, one each, that the machine must see; and none, where it must see nothing."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import fastbn

from .driver import Device
from .memory import Fault

Change = Callable[[str], str]
BARRIER = r"bar\.sync\s+0;"


class Planted(NamedTuple):
    what: str
    kernel: str
    change: Change
    seen: str  # a pattern of what the machine says
    shape: tuple[int, ...] = (3, 2, 70, 72)


def _without_a_barrier(text: str) -> str:
    """The first one behind a store to shared memory taken out."""
    found = re.compile(BARRIER).search(text, text.index("st.shared"))
    return text if found is None else text[: found.start()] + text[found.end() :]


def _moved(instruction: str, by: int) -> Change:
    """All such accesses, so many bytes further."""
    return lambda text: re.sub(rf"({instruction}\s+[^;\[]*\[%rd\d+)\]", rf"\1+{by}]", text)


def _put(pattern: str, instead: str) -> Change:
    return lambda text: re.sub(pattern, instead, text)


ONE_LEAVES = "{ .reg .u32 t; .reg .pred q; mov.u32 t, %tid.x; setp.eq.u32 q, t, 5; @q ret; } bar.sync 0;"
LOAD, STORE = r"ld\.global\.v4\.f32", r"st\.global\.v4\.f32"
ROWS, COLUMNS, APPLY, FUSED = "rows.moments_rows", "columns.moments_columns", "apply.normalize", "fused.forward_rows"
FLAT, SMALL = (4096, 16), (4, 3, 8, 8)
FAULTS = (
    Planted("a barrier of rows taken out", ROWS, _without_a_barrier, "race"),
    Planted("a barrier of fused rows taken out", FUSED, _without_a_barrier, "race", SMALL),
    Planted("every barrier of rows taken out", ROWS, _put(BARRIER, ""), "race"),
    Planted("every barrier of columns taken out", COLUMNS, _put(BARRIER, ""), "race", FLAT),
    Planted("every barrier of fused rows taken out", FUSED, _put(BARRIER, ""), "race", SMALL),
    Planted(
        "a barrier that a thread of each block does not reach", ROWS, _put(BARRIER, ONE_LEAVES), "others have ended"
    ),
    Planted("loads a megabyte further", APPLY, _moved(LOAD, 1 << 20), "not an element|lies nowhere"),
    Planted("loads off their boundary", APPLY, _moved(LOAD, 4), "off its boundary"),
    Planted("stores 16 bytes further", APPLY, _moved(STORE, 16), "not its to write|lies nowhere|race"),
    Planted("stores to a wild address", APPLY, _put(rf"({STORE}\s+)\[%rd\d+\]", r"\1[1048576]"), "lies nowhere"),
    Planted("stores to shared memory taken out", ROWS, _put(r"st\.shared[^;]*;", ""), "undefined"),
    Planted(
        "reads behind an array in shared memory",
        ROWS,
        _moved(r"ld\.shared\.f32", 1024),
        "not an element|outside of shared",
    ),
    Planted("differences made sums", ROWS, _put(r"sub\.f32", "add.f32"), "value"),
    Planted(
        "an instruction that nobody knows",
        ROWS,
        _put(r"sub\.f32", "sub.rz.f32"),
        r"NotImplementedError.*sub\.rz\.f32 %",
    ),
    # As the commits before these mends compiled it: reads of another array than was written, and raw bits of half
    # precision.
    Planted(
        "NaN where shared memory should be read",
        FUSED,
        _put(r"ld\.shared\.f32\s+(%f\d+),[^;]*;", r"mov.f32 \1, 0f7FC00000;"),
        "value",
        SMALL,
    ),
)
CONTROLS = (
    Planted("nothing", ROWS, str, "nothing"),
    Planted("nothing", COLUMNS, str, "nothing", FLAT),
    Planted("nothing", APPLY, str, "nothing"),
    Planted("nothing", FUSED, str, "nothing", SMALL),
)


def expected(planted: Planted, said: str) -> bool:
    """Whether the machine says what it should."""
    return re.search(planted.seen, said) is not None


def seen(planted: Planted, architecture: str) -> str:
    """What the machine says of a kernel with a fault: the fault, "value" for a wrong result, "nothing"."""
    changed: list[bool] = []

    def change(text: str) -> str:
        altered = planted.change(text)
        changed.append(altered != text)
        return altered

    device = Device(architecture, altered={planted.kernel: change})
    axes = tuple(a for a in range(len(planted.shape)) if a != 1)
    try:
        with device:
            x = device.array(np.random.default_rng(0).standard_normal(planted.shape), "float32", "x")
            values = x.get()
            mean, var = values.mean(axes, keepdims=True), values.var(axes, keepdims=True)
            if planted.kernel == APPLY:
                given = (device.array(each.reshape(-1), "float32", "given") for each in (mean, var))
                found, want = fastbn.batch_norm_inference(x, *given).get(), (values - mean) / np.sqrt(var + 1e-5)
            elif planted.kernel == FUSED:
                found, want = fastbn.batch_norm(x)[0].get(), (values - mean) / np.sqrt(var + 1e-5)
            else:
                m = fastbn.moments(x)
                found, want = np.stack([m.mean.get(), m.var().get()]), np.stack([mean.reshape(-1), var.reshape(-1)])
            if changed != [planted not in CONTROLS]:
                return "not planted: the kernel was not launched, or its PTX has no such place"
            return "nothing" if np.allclose(found, want, rtol=1e-5, atol=1e-5) else "value"
    except Exception as error:
        inner = error.__cause__ or error
        return str(inner) if isinstance(inner, Fault) else f"{type(inner).__name__}: {inner}"
