"""The `claims` command: what is said of batch normalization, each claim an experiment on real images.

Its options, the order of things and what is shown. What a run is: `runs`; the claims: `sweeps`, `shift`, `noise`,
`serving`; how runs are spread: `processes`; what is kept and told of them: `report`; the pictures: `plots`.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastbn import progress
from fastbn.arguments.errors import DataError
from fastbn.cli import console, files, info, options, plots
from fastbn.cli.claims import noise, processes, report, serving, shift, sweeps
from fastbn.cli.claims.runs import BATCH, Finding, Plan, Results, Run
from fastbn.cli.train import kernels, training
from fastbn.cli.train.data import Dataset, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, QUICK_STEPS = 2000, 400


class Claim(Protocol):
    """Something that is said of batch normalization, and how it is tried."""

    @property
    def name(self) -> str:
        """Of the option --only, and of the picture."""

    @property
    def sentence(self) -> str:
        """What is said."""

    @property
    def network(self) -> str:
        """What is trained, for the picture's title."""

    def runs(self, plan: Plan) -> list[Run]:
        """What it takes to try it."""

    def conclude(self, plan: Plan, results: Results) -> Finding:
        """What they showed."""

    def draw(self, figure: Figure, plan: Plan, results: Results) -> None:
        """The picture."""


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (sweeps.RATE, sweeps.INIT, sweeps.DEPTH, shift.Shift(), noise.Noise(), serving.Serving())
}
HEIGHTS = {"rate": 7.0, "shift": 8.0}  # inches, of 10 x 4.5
OUT, QUICK_OUT = Path("fastbn-claims"), Path("fastbn-claims-quick")  # a look does not replace a report
ABOUT = (
    "rate (of learning), init (the weights at the start), depth, shift (of what hidden layers see), noise (of a "
    "batch's statistics), test (without a batch)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `claims` command."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="MNIST-style IDX files, as of `train` (default: the digits inside scikit-learn; nothing is downloaded)",
    )
    add("--only", metavar="NAMES", help=f"some of {ABOUT}, with commas between them (default: all)")
    add(
        "--quick",
        action="store_true",
        help=f"runs of {QUICK_STEPS} steps in place of {STEPS:,}, a quarter of a minute in place of one or two; some "
        "verdicts are others then",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where {report.PAGE}, {report.FILE} and the pictures go; runs that are finished there are not made again "
        f"(default: {OUT}, with --quick {QUICK_OUT})",
    )
    add(
        "--seed",
        type=options.whole_from(0),
        default=0,
        metavar="N",
        help="of the initial weights and the batches; same seed, same runs (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the `claims` command.

    Raises
    ------
    DataError
        An option out of range, a directory that can't be written, bad IDX files: all before the training.
    MissingExtra
        A package of the extra `demo` is absent.
    """
    chosen = _chosen(args.only)
    training.need("claims")
    data = load(args.data)
    if len(data.images) < BATCH:
        raise DataError(f"--data: {data.name} has {len(data.images)} training images, want {BATCH} or more, a batch")
    if len(data.test_images) < 2:
        raise DataError(f"--data: {data.name} has one test image, want two or more: one has no variance")
    out = _directory(args.out or (QUICK_OUT if args.quick else OUT))
    kept = report.Kept(out / report.FILE, data)
    plan = Plan(
        QUICK_STEPS if args.quick else STEPS, args.seed, len(data.images), len(data.test_images), 100 * data.chance
    )
    runs = list(dict.fromkeys(run for claim in chosen for run in claim.runs(plan)))
    height, width = data.pixels
    print(
        f"data:     {report.plain(data.name)}, {height} x {width} pixels: {len(data.images):,} to train on, "
        f"{len(data.test_images):,} to test"
    )
    _make(runs, kept, data)
    # Claims whose runs are all there are told of, too: of an earlier call, which was for them only.
    told = [claim for claim in CLAIMS.values() if all(run in kept.results for run in claim.runs(plan))]
    print(f"pictures: {', '.join(f'{claim.name}.png' for claim in told)}", flush=True)
    with kept.believed():
        findings = [(claim, claim.conclude(plan, kept.results)) for claim in told]
        for claim in told:
            _draw(claim, out / f"{claim.name}.png", data, plan, kept.results)
    seconds = sum(kept.results[run]["seconds"] for claim in told for run in claim.runs(plan))
    _write(out / report.PAGE, report.page(data, plan, findings, seconds).encode())
    print("", *(f"{claim.name:7} {finding.outcome:14} {claim.sentence}" for claim, finding in findings), "", sep="\n")
    print(f"report:   {out / report.PAGE}")
    return 0


def _chosen(only: str | None) -> list[Claim]:
    names = list(CLAIMS) if only is None else only.split(",")
    if wrong := [name for name in names if name not in CLAIMS]:
        raise DataError(f"--only: given {wrong[0]!r}, want some of {', '.join(CLAIMS)}, with commas between them")
    return [CLAIMS[name] for name in CLAIMS if name in names]


def _directory(out: Path) -> Path:
    """Make the directory, and look whether all that goes into it can be written."""
    try:
        out.mkdir(exist_ok=True)
        for name in (report.FILE, report.PAGE, *(f"{name}.png" for name in CLAIMS)):
            files.check_output(out / name, 0)
        with tempfile.TemporaryFile(dir=out):
            return out
    except ValueError as error:
        raise DataError(f"--out: {error}") from error
    except OSError as error:
        raise DataError(f"--out: {out} can't be written: {error.strerror}") from error


def _make(runs: list[Run], kept: report.Kept, data: Dataset) -> None:
    """Make the runs that are not there yet, each kept as it ends."""
    missing = [run for run in runs if run not in kept.results]
    if len(missing) < len(runs):
        print(f"runs:     {len(runs) - len(missing)} of {len(runs)} are there already, in {kept.path}")
    if not missing:
        return

    def count() -> str:
        return f"{sum(run in kept.results for run in runs)} of {len(runs)} runs"

    kept_where = info.cache_directory()
    if kept_where.startswith("nowhere"):
        print(f"kernels:  kept {kept_where}: {processes.PROCESSES} processes compile them anew, too")
    _compile(missing, data)
    try:
        with progress.counted() as start:
            task = start("steps", sum(run.steps for run in missing))
            for run, result in processes.results(missing, data, lambda steps: task.update(steps, count())):
                kept.add(run, result)
    except BaseException:
        console.complain(f"{count()} are kept in {kept.path}: the same command goes on there")
        raise


def _compile(runs: list[Run], data: Dataset) -> None:
    """Compile what the runs need in this process, which the others then find compiled: a step of each kind of them."""
    kinds = {(run.measure, run.group): run for run in runs if run.batch_norm}
    with training.one_blas_thread(), kernels.announced():
        inputs = training.Inputs(data)
        for run in kinds.values():
            processes.measured(run._replace(steps=1, hidden=1), inputs, lambda step: None)


def _draw(claim: Claim, path: Path, data: Dataset, plan: Plan, results: Results) -> None:
    setting = f"{plan.steps:,} steps of {BATCH} images; seed {plan.seed}"
    name = data.name if data.pixels == (8, 8) else Path(data.name).name or data.name
    image = io.BytesIO()
    with plots.defaults():
        size = (10, HEIGHTS.get(claim.name, 4.5))
        figure = plots.figure(f"{claim.sentence}\n{name}; {claim.network}, {setting}", size)
        claim.draw(figure, plan, results)
        plots.save(figure, image, "png")
    _write(path, image.getvalue())


def _write(path: Path, content: bytes) -> None:
    with files.replacing(path) as file:
        file.write(content)
