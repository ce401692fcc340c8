"""What the kernels' arguments are: type and meaning of each, said once for all kernels that have one of its name.

A type is that of a number, i4, i8 or f (float64), or of what a pointer leads to: x, memory as it is kept; w, what that
is computed in, float32 for half precision; s, float64; t, statistics of a dtype of their own. Arrays are
compact, but for those of x's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

ARGUMENTS = {
    # arrays of x's shape, (N, C, S) with S contiguous, or (R, C) and so many columns with these contiguous
    "x": "x input",
    "dy": "x gradient with respect to y, of x's shape",
    "y": "x result, of x's shape",
    "dx": "x result, gradient with respect to x, of x's shape",
    # of a channel
    "gamma": "w (C,), scale; anything where there is none",
    "beta": "w (C,), shift; anything where there is none",
    "affine": "i4 1 with gamma, 2 with beta, 3 with both",
    "mean": "t (C,), mean",
    "var": "t (C,), variance",
    "m2": "t (C,), variance times `count`",
    "count": "f what m2 is divided by",
    "eps": "f added to the variance",
    "values": "f values of a channel, in x and all that is summed with it",
    # results of a channel
    "stats": "s (2, C), takes mean and m2",
    "sums": "s (2, C), takes the sums of dy and of dy * xhat",
    "grads": "w (2, C), takes dbeta and dgamma, the same sums",
    "result": "s (C,), takes the result",
    # sizes and steps, in elements
    "N": "i8 images",
    "C": "i4 channels",
    "S": "i8 values of a channel in an image",
    "sn": "i8 outer stride of x: from an image to the next",
    "sc": "i8 inner stride of x: from a channel to the next",
    "dn": "i8 outer stride of dy",
    "dc": "i8 inner stride of dy",
    "yn": "i8 outer stride of the result",
    "yc": "i8 inner stride of the result",
    # rows, cut into slots of 16 bytes that begin on 16-byte boundaries
    "base": "i4 elements between the boundary before x and x",
    "base_dy": "i4 the same of dy",
    "base_y": "i4 the same of the result",
    "slots": "i8 of a row",
    "rest": "i8 elements of a row outside slots",
    "step_n": "i4 rows that a block goes on at once",
    "step_v": "i4 slots, beside these rows",
    "chunk": "i8 slots of a part of a channel",
    "chunk_rest": "i8 elements of it outside slots",
    # columns, in groups of 16 bytes; S to a channel
    "R": "i8 rows",
    "W": "i8 columns",
    "step": "i8 from a row of x to the next",
    "step_dy": "i8 from a row of dy to the next",
    "step_y": "i8 from a row of the result to the next",
    "across": "i4 groups side by side in a block",
    "units": "i4 blocks side by side",
    "copies": "i4 images side by side in a row, of x where a block has not all of it, or of coefficients; else 1",
    "aligned": "i4 whether every group lies on a 16-byte boundary",
    # partial results, and coefficients of the pass over elements
    "partial": "s (entries, 3, C) of count, mean, m2, or (entries, 2, C) of sums of dy, of dy * (x - mean)",
    "entries": "i4 partial results of a channel",
    "coefs": "w (3 or 4, pad), coefficients",
    "columns": "i4 of a channel in a row of coefficients, side by side",
    "pad": "i4 length of a row of coefficients",
    # runs of contiguous memory, in groups of 16 bytes
    "runs": "i8 pieces without gaps: 1, N or R, or N * C",
    "length": "i8 elements of a run",
    "per_run": "i8 channels of a run",
    "inner": "i4 runs of one step of the outer stride",
    "groups": "i4 of a run",
    "mode": "i4 ONE, TWO or TABLE: the channels of a group",
    "apart": "i4 groups between one of a thread's and the next",
    "xd": "i8 elements between them in x; 0 where the next is no such step further",
    "dd": "i8 elements between them in dy",
    "yd": "i8 elements between them in the result",
}


def described(body: Callable[..., Any], own: Mapping[str, str]) -> dict[str, str]:
    """Every parameter of a kernel as "TYPE MEANING", in their order, from its own lines and those above.

    A line that is a type alone changes the type, where the meaning above stands.

    Raises
    ------
    TypeError
        A parameter without a line, or a line without a parameter.
    """
    names = body.__code__.co_varnames[: body.__code__.co_argcount]
    if wrong := [name for name in names if name not in ARGUMENTS and " " not in own.get(name, "")]:
        raise TypeError(f"kernel {body.__name__}: no line says what {', '.join(wrong)} is")
    if wrong := [name for name in own if name not in names]:
        raise TypeError(f"kernel {body.__name__}: lines for {', '.join(wrong)}, which are no parameters")
    found = {}
    for name in names:
        kind, _, meaning = own.get(name, "").partition(" ")
        shared_kind, _, shared = ARGUMENTS.get(name, "").partition(" ")
        found[name] = f"{kind or shared_kind} {meaning or shared}"
    return found
