"""What ptxas makes of the GPU's kernels: instructions, loads on their way at once, registers.

`python -m bench.sass`, see --help.
No GPU is needed: numba-cuda, nvidia-nvvm, nvidia-cuda-nvcc (ptxas) and nvidia-cuda-nvdisasm are. Nothing is timed: an
instruction of a warp takes an issue slot, of which a multiprocessor of an H100 has four a clock, and memory is kept
busy by what is on its way at once.
"""

from __future__ import annotations

import argparse
import heapq
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from bench import command
from fastbn.arguments.errors import MissingExtra

COMMAND = "python -m bench.sass"
STORED = {"float32": "float32", "float64": "float64", "float16": "uint16", "bfloat16": "int16"}
LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:(@\S+)\s+)?(\S+)\s*(.*?)\s*;")
WIDE_LOAD, WIDE_STORE = r"LDG\S*\.128", r"STG\S*\.128"
LABEL = re.compile(r"^\.?(\S+):\s*$")


class Instruction(NamedTuple):
    """One of SASS; `target` is a label's place among the instructions."""

    guard: str
    name: str
    operands: str
    target: int | None


class Stretch(NamedTuple):
    """The way through a loop, or through a kernel without one, that is cheapest for each group of 16 bytes it stores.

    Else reads.
    """

    instructions: int
    loads: int  # of 16 bytes
    stores: int
    singles: int  # loads of less
    at_once: int  # loads of 16 bytes asked for before the first is needed


def parsed(text: str) -> list[Instruction]:
    """The instructions of one kernel, as nvdisasm prints them, and of its subroutines."""
    places: dict[str, int] = {}
    raw: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if found := LINE.match(line):
            raw.append((found[2] or "", found[3], found[4]))
        elif found := LABEL.match(line):
            places[found[1]] = len(raw)
    made = []
    for guard, name, operands in raw:
        label = re.search(r"`\(\.?([^)]+)\)", operands)
        jumps = label is not None and name.startswith(("BRA", "CALL"))
        made.append(Instruction(guard, name, operands, places[label[1]] if label is not None and jumps else None))
    return made


def _nexts(code: Sequence[Instruction], at: int) -> list[tuple[int, int]]:
    """Where a thread may be after an instruction, and what it has spent until then."""
    one = code[at]
    if one.name.startswith("CALL"):
        return [(at + 1, 1 + len(_routine(code, at)))]
    found = [] if one.name.startswith(("EXIT", "RET")) and not one.guard else [(at + 1, 1)]
    if one.target is not None:
        found = [(one.target, 1)] + (found if one.guard or ("P" in one.operands.split("`")[0]) else [])
    return [step for step in found if step[0] < len(code)]


def _routine(code: Sequence[Instruction], at: int) -> list[int]:
    """What a call runs."""
    target = code[at].target
    return [] if target is None else cheapest(code, target, lambda k: code[k].name.startswith("RET")) or []


def cheapest(code: Sequence[Instruction], start: int, ends: Any, what: str = "", wide: int = 0) -> list[int] | None:
    """The shortest way from an instruction to one where `ends` is true, over so many that match `what`.

    None if there is none.
    """
    begin = (start, 0)
    spent, came, queue = {begin: 0}, {begin: begin}, [(0, begin)]
    while queue:
        cost, state = heapq.heappop(queue)
        if cost > spent[state]:
            continue
        at, had = state
        had = min(wide, had + bool(re.match(what, code[at].name)))
        if had >= wide and ends(at) and (at != start or cost):
            way = [at]
            while came[state] != state:
                state = came[state]
                way.append(state[0])
            return [
                k
                for step in way[::-1]
                for k in [step, *(_routine(code, step) if code[step].name.startswith("CALL") else [])]
            ]
        for then, price in _nexts(code, at):
            if cost + price < spent.get((then, had), 1 << 60):
                spent[then, had], came[then, had] = cost + price, state
                heapq.heappush(queue, (cost + price, (then, had)))
    return None


def stretches(code: Sequence[Instruction]) -> list[Stretch]:
    """Of each loop that reads global memory and holds no other such loop.

    Of the whole, where none stores what it is there for.
    """
    reads = [k for k, one in enumerate(code) if one.name.startswith("LDG")]
    back = sorted(
        {
            (one.target, k)
            for k, one in enumerate(code)
            if one.target is not None and one.target <= k and one.name.startswith("BRA")
        }
    )
    loops = [(low, high) for low, high in back if any(low <= k <= high for k in reads)]
    inner = [
        loop
        for loop in loops
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
    stores = [k for k, one in enumerate(code) if re.match(WIDE_STORE, one.name)]
    if not inner or any(not any(low <= k <= high for low, high in loops) for k in stores):
        inner = [(0, len(code) - 1)]
    found = []
    for low, high in inner:
        names = [one.name for one in code[low : high + 1]]
        what = next(what for what in (WIDE_STORE, WIDE_LOAD, "LDG", "") if any(re.match(what, name) for name in names))
        most = sum(bool(re.match(what, name)) for name in names) if what else 0
        ends = (lambda k, high=high: k == high) if low else lambda k: code[k].name == "EXIT" and not code[k].guard
        ways = {wide: way for wide in range(most + 1) if (way := cheapest(code, low, ends, what, wide)) is not None}
        found.append(measured([code[k] for k in ways[min(ways, key=lambda wide: len(ways[wide]) / max(wide, 0.01))]]))
    return found


def measured(way: Sequence[Instruction]) -> Stretch:
    """What a way is made of."""
    loads = [one for one in way if re.match(WIDE_LOAD, one.name)]
    singles = sum(one.name.startswith("LDG") for one in way) - len(loads)
    waiting: set[str] = set()
    now = most = 0
    for one in way:
        registers = re.findall(r"\bU?R\d+\b", one.operands)
        if re.match(WIDE_LOAD, one.name):
            first = int(registers[0][1:])
            waiting |= {f"R{first + k}" for k in range(4)}
            now += 1
            most = max(most, now)
        elif waiting & set(registers):
            waiting, now = set(), 0
    return Stretch(len(way), len(loads), sum(bool(re.match(WIDE_STORE, one.name)) for one in way), singles, most)


def tool(name: str, package: str) -> str:
    """A program of NVIDIA's wheels.

    Raises
    ------
    MissingExtra
        None is installed.
    """
    try:
        import nvidia  # type: ignore[import-untyped]  # a namespace that wheels share, without types
    except ImportError:
        raise MissingExtra(f"{COMMAND} needs {package}: pip install {package}") from None
    found = [path for root in nvidia.__path__ for path in Path(root).rglob(name) if path.is_file()]
    if not found:
        raise MissingExtra(f"{COMMAND} needs {package}: pip install {package}")
    return str(found[0])


def assembled(kernel: Any, stored: str, statistic: str, arch: str) -> tuple[int, list[Instruction]]:
    """(registers, instructions) of a kernel for memory of a dtype."""
    from numba import cuda
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv import nvrtc

    capability = int(arch.rstrip("af")[:-1]), int(arch.rstrip("af")[-1]), *([arch[-1]] if arch[-1] in "af" else [])
    nvrtc.get_supported_ccs = lambda: [(8, 0), (9, 0), (10, 0), (12, 0)]  # where there is no driver to ask
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability[:2])
    signature = kernel.signature(np.dtype(STORED[stored]), np.dtype(statistic))
    text, _ = cuda.compile(kernel.body, signature, cc=capability, device=False, abi="numba", **kernel.options)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        line = [tool("ptxas", "nvidia-cuda-nvcc"), f"-arch=sm_{arch}", "-v", str(source), "-o", str(binary)]
        log = subprocess.run(line, check=True, capture_output=True, text=True).stderr
        shown = subprocess.run(
            [tool("nvdisasm", "nvidia-cuda-nvdisasm"), "-c", str(binary)], check=True, capture_output=True, text=True
        )
    return max(map(int, re.findall(r"Used (\d+) registers", log))), parsed(shown.stdout)


def run(args: argparse.Namespace) -> int:
    """Print a table."""
    for module in ("rows", "columns", "finish", "apply", "fused"):
        importlib.import_module(f"fastbn.cuda.kernels.{module}")
    from fastbn.cuda.kernels import jit

    print(
        "| kernel | dtype | registers | instructions: loads + stores of 16 bytes, other loads, at once "
        "|\n|---|---|---|---|"
    )
    for kernel in jit.KERNELS:
        for stored in args.dtype if kernel.name.startswith(tuple(args.only)) else ():
            registers, code = assembled(kernel, stored, args.statistic, args.arch)
            shown = "; ".join(
                f"{s.instructions}: {s.loads} + {s.stores}, {s.singles}, {s.at_once}" for s in stretches(code)
            )
            print(f"| {kernel.name} | {stored} | {registers} | {shown} |", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90a", help="target, as in sm_90a (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=STORED, default=["float32", "bfloat16"])
    parser.add_argument(
        "--statistic", choices=("float32", "float64"), default="float64", help="dtype of given statistics"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=["rows", "columns", "apply", "finish.finish", "fused"]
    )
    return parser


main = partial(command.main, _parser, run)

if __name__ == "__main__":
    sys.exit(main())
