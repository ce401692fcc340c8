"""Every case of the product, executed: `python -m tests.cuda.ptx.run` from the project's folder, with numba-cuda and
NVIDIA's compiler.

Needs no GPU. Takes minutes for a dtype on one core, less with `--thin N`, every Nth case only. Prints what is off,
which of the kernels' basic blocks never ran, and last the numbers of comparisons, launches, results that are off and
faults; fails where there is one.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from . import cases, checks, compiler, planted
from .driver import Device
from .machine import uncovered


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.ptx.run", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--arch", default="sm_80", choices=compiler.ARCHITECTURES)
    parser.add_argument("--lto", action="store_true", help="PTX behind link-time optimization; needs nvidia-nvjitlink")
    parser.add_argument("--dtype", nargs="*", default=list(cases.DTYPES), choices=cases.DTYPES)
    parser.add_argument("--thin", type=int, default=1, metavar="N", help="every Nth case only")
    parser.add_argument("--covering", action="store_true", help="the covering set instead of the product")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name has this in it")
    parser.add_argument("--planted", action="store_true", help="only the faults that the machine must see")
    parser.add_argument("--json", metavar="FILE", help="write every comparison")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = parsed(words)
    if args.planted:
        return see_planted(args.arch)
    device, report = Device(args.arch, args.lto), checks.Report()
    for dtype in args.dtype:
        begun = time.perf_counter()
        every = cases.covering(dtype) if args.covering else cases.everything(dtype)
        chosen = [case for case in every[:: args.thin] if args.only in str(case)]
        checks.check_empty(device, dtype, report)
        for case in chosen:
            checks.check(device, case, report)
        seconds = time.perf_counter() - begun
        print(f"{dtype}: {len(chosen)} cases, {seconds:.0f} s; so far {counts(device, report)}", flush=True)
    show(device, report)
    if args.json:
        records = [{"case": str(r.case), "what": r.what, "error": r.error, "words": r.words} for r in report.records]
        Path(args.json).write_text(
            json.dumps({"arguments": vars(args), "records": records, "launches": device.launches})
        )
    return int(bool(report.problems))


def counts(device: Device, report: checks.Report) -> str:
    faults = sum(bool(record.words) for record in report.records)
    off = len(report.problems) - faults
    return f"{len(report.records) - faults} comparisons, {len(device.launches)} launches, {off} off, {faults} faults"


def show(device: Device, report: checks.Report) -> None:
    worst: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for record in report.records:
        of = worst[record.case.dtype]
        of[record.what] = max(of[record.what], record.error)
    print("largest errors as shares of their limits:")
    for dtype, found in worst.items():
        print(f"  {dtype}: " + ", ".join(f"{what} {share:.2f}" for what, share in found.items()))
    launched = {launch.kernel for launch in device.launches}
    print(f"kernels never launched: {', '.join(sorted(compiler.kernels().keys() - launched)) or 'none'}")
    machines = device.machines.values()
    total, left = sum(len(machine.kernel.after) for machine in machines), 0
    for machine in machines:
        lines = uncovered(machine)
        left += len(lines)
        if lines:
            print(
                f"  {machine.kernel.name}: {len(lines)} of {len(machine.kernel.after)} basic blocks not run, at "
                f"{'; '.join(lines[:3])}"
            )
    print(f"basic blocks run: {total - left} of {total}")
    for problem in report.problems:
        print(f"PROBLEM {problem}")
    print(counts(device, report))


def see_planted(architecture: str) -> int:
    missed = 0
    for fault in (*planted.FAULTS, *planted.CONTROLS):
        said = planted.seen(fault, architecture)
        ok = planted.expected(fault, said)
        missed += not ok
        print(f"{'seen  ' if ok else 'MISSED'} {fault.what}, {fault.kernel}: {said[:160]}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
