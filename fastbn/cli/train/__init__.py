"""The `train` command: the paper's network on real handwritten digits, with batch normalization and without.

Its options and what is shown; the network, its optimizers and the training loop are in `fastbn.cli.train.network`.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastbn import progress
from fastbn.arguments.errors import DataError
from fastbn.cli import files
from fastbn.cli.train import network as nets
from fastbn.cli.train import training
from fastbn.cli.train.data import Dataset, load_digits, load_idx

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {True: "with batch normalization", False: "without"}
TARGETS = (80, 90, 95, 97, 98)  # percent of the test images right
PLOT_KINDS = (".png", ".pdf", ".svg")
ROWS = 10  # of the accuracies in the table, beside those of the first two checks
EXAMPLES = 8
INIT = "xavier"
NEAR_CHANCE = 0.05  # accuracy above chance that is still called near

Histories = dict[bool, training.History]  # by whether the network has batch normalization


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `train` command."""
    rates = ", ".join(f"{optimizer.rate:g} for {name}" for name, optimizer in training.OPTIMIZERS.items())
    add = parser.add_argument
    add(
        "--optimizer",
        choices=list(training.OPTIMIZERS),
        default="sgd",
        help="how weights, gamma and beta are updated (default: %(default)s)",
    )
    add(
        "--activation",
        choices=list(nets.ACTIVATIONS),
        default="sigmoid",
        help="of the hidden units (default: %(default)s)",
    )
    add(
        "--batch",
        type=int,
        default=60,
        metavar="IMAGES",
        help="images per training step, 2 or more (default: %(default)s)",
    )
    add("--steps", type=int, default=2000, metavar="N", help="training steps, each on one batch (default: %(default)s)")
    add(
        "--lr",
        type=float,
        metavar="RATE",
        help=f"learning rate, falling to 0 in the last quarter of the steps (default: {rates})",
    )
    add(
        "--hidden",
        default="100,100,100",
        metavar="UNITS",
        help="units of each hidden layer, with commas (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the initial weights and the batches; same seed, same run (default: %(default)s)",
    )
    add(
        "--plot",
        type=Path,
        default=Path("fastbn-train.png"),
        metavar="FILE",
        help="image of both curves: .png, .pdf or .svg (default: %(default)s)",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="MNIST-style IDX files, plain or .gz: train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (default: the digits inside scikit-learn; nothing is "
        "downloaded)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the `train` command.

    Raises
    ------
    DataError
        An option out of range, a plot that can't be written, bad IDX files: all before the training.
    MissingExtra
        A package of the extra `demo` is absent.
    """
    hidden, rate = _check_options(args)
    with ExitStack() as stack:
        plot, file = _open_plot(args.plot, stack)
        progress.need(
            "rich",
            "matplotlib",
            "sklearn",
            "threadpoolctl",
            command="train",
            named="rich, matplotlib, scikit-learn and threadpoolctl",
        )
        from threadpoolctl import threadpool_limits

        data = load_digits() if args.data is None else load_idx(args.data)
        if not 2 <= args.batch <= len(data.images):
            raise DataError(
                f"--batch: given {args.batch}, want 2 (a variance needs two images) to {len(data.images)}, the "
                "training images"
            )
        # Matrices this small gain nothing from a second BLAS thread, and on a busy machine its waiting cost a factor of
        # 20.
        stack.enter_context(threadpool_limits(1, user_api="blas"))
        sizes = (data.images.shape[1], *hidden, data.classes)
        _print_task(args, data, sizes, rate)
        inputs = _prepare(data, args, sizes)
        networks, histories = _train_both(args, inputs, sizes, rate)
        _save(_figure(histories, data), file, plot.suffix[1:].lower())
    # The plot is in its place before anything is shown, which a terminal may not take.
    progress.table(("", *NAMES.values()), _rows(histories, args.steps))
    _print_examples(networks, inputs, args.seed)
    print("", *_summary(histories, args.steps, data.chance), sep="\n")
    print(f"plot of both curves: {plot}")
    return 0


def _check_options(args: argparse.Namespace) -> tuple[tuple[int, ...], float]:
    """(units of the hidden layers, learning rate)."""
    try:
        hidden = tuple(int(units) for units in args.hidden.split(","))
    except ValueError:
        hidden = (0,)
    if min(hidden) < 1:
        raise DataError(
            f"--hidden: given {args.hidden!r}, want whole numbers above 0 with commas between them, like 100,100,100"
        )
    rate = training.OPTIMIZERS[args.optimizer].rate if args.lr is None else args.lr
    if not 0 < rate < math.inf:
        raise DataError(f"--lr: given {rate:g}, want a number above 0, like 0.1")
    if args.steps < 1:
        raise DataError(f"--steps: given {args.steps}, want 1 or more")
    if args.seed < 0:
        raise DataError(f"--seed: given {args.seed}, want 0 or more")
    return hidden, rate


def _open_plot(path: Path, stack: ExitStack) -> tuple[Path, IO[bytes]]:
    """Open what takes the plot's place at the end.

    A plot that can't be written is found now, not after the training.
    """
    if path.suffix.lower() not in PLOT_KINDS:
        raise DataError(
            f"--plot: given '{path}', want a file name that ends in {', '.join(PLOT_KINDS[:-1])} or {PLOT_KINDS[-1]}"
        )
    try:
        path = files.check_output(path, 0)
        return path, stack.enter_context(files.replacing(path))
    except ValueError as error:
        raise DataError(f"--plot: {error}") from error
    except OSError as error:
        raise DataError(f"--plot: {path} can't be written: {error.strerror}") from error


def _print_task(args: argparse.Namespace, data: Dataset, sizes: tuple[int, ...], rate: float) -> None:
    height, width = data.pixels
    print(
        f"data:     {data.name}, {height} x {width} pixels: {len(data.images)} to train on, {len(data.test_images)} to "
        "test"
    )
    print(
        f"network:  {'-'.join(map(str, sizes))} units, {args.activation}; same initial weights and batches for both "
        f"(seed {args.seed})"
    )
    print(
        f"training: {args.steps} steps of {args.batch} images, {args.optimizer} at rate {rate:g} (over the last "
        "quarter falling to 0)"
    )


def _prepare(data: Dataset, args: argparse.Namespace, sizes: tuple[int, ...]) -> training.Inputs:
    """Normalize the inputs, and compile every kernel with a throw-away step, so that no network's seconds count it."""
    print("kernels:  ", end="", flush=True)
    start = time.perf_counter()
    inputs = training.Inputs(data)
    trial = nets.Network(nets.initial_weights(sizes, INIT, args.seed), args.activation, nets.batch_norm)
    training.train(
        trial, training.Optimizer(), 0.0, inputs, training.batches(len(data.images), args.batch, 1, args.seed), 1
    )
    print(
        f"ready after {time.perf_counter() - start:.1f} s (the first run compiles them, later ones find them compiled)",
        flush=True,
    )
    return inputs


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], Callable[[int, float], object]]]:
    """Bars on stderr, nothing where that is no terminal: name -> (steps so far, test accuracy) -> None."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    named, accuracy = TextColumn("{task.description:>24}"), TextColumn("{task.fields[accuracy]:>6.1%} right")
    with progress.bars(named, BarColumn(20), MofNCompleteColumn(), accuracy, TimeElapsedColumn()) as bars:

        def start(name: str) -> Callable[[int, float], object]:
            task = bars.add_task(name, total=steps, accuracy=0.0)
            return lambda step, accuracy: bars.update(task, completed=step, accuracy=accuracy)

        yield start


def _train_both(
    args: argparse.Namespace, inputs: training.Inputs, sizes: tuple[int, ...], rate: float
) -> tuple[dict[bool, nets.Network], Histories]:
    weights = nets.initial_weights(sizes, INIT, args.seed)
    norms = {True: nets.batch_norm, False: None}
    networks = {batch_norm: nets.Network(weights, args.activation, norm) for batch_norm, norm in norms.items()}
    histories = {}
    with _progress(args.steps) as start:
        for batch_norm, network in networks.items():
            chosen = training.batches(len(inputs.data.images), args.batch, args.steps, args.seed)
            optimizer = training.OPTIMIZERS[args.optimizer]()
            histories[batch_norm] = training.train(
                network, optimizer, rate, inputs, chosen, args.steps, start(NAMES[batch_norm])
            )
    return networks, histories


def _percent(history: training.History, i: int) -> str:
    """Accuracy at check i, with digits enough to tell one image more from none."""
    return f"{100 * history.accuracy[i]:.{1 if history.total < 1000 else 2}f} %"


def _rows(histories: Histories, steps: int) -> list[tuple[str, ...]]:
    """Build the table: accuracy after so many steps, steps until an accuracy, seconds."""
    checks = max((history.steps for history in histories.values()), key=len)
    shown = sorted({0, 1, 2, *np.linspace(0, len(checks) - 1, ROWS + 1).astype(int).tolist()} & set(range(len(checks))))
    both = histories.values()
    rows: list[tuple[str, ...]] = [("test accuracy after step", "", "")]
    rows += [(f"  {checks[i]}", *(_percent(h, i) if i < len(h.steps) else "diverged" for h in both)) for i in shown]
    rows += [("", "", ""), (f"steps needed, checked every {max(1, steps // training.CHECKS)}", "", "")]
    for target in TARGETS:
        needed = (h.first(target / 100) for h in both)
        rows.append(
            (f"  for {target} %", *(f"not within {steps}" if first is None else str(first) for first in needed))
        )
    rows += [("", "", ""), ("seconds of training", *(f"{h.seconds:.1f}" for h in both))]
    return rows


def _print_examples(networks: dict[bool, nets.Network], inputs: training.Inputs, seed: int) -> None:
    """Classify some test images one by one."""
    data = inputs.data
    chosen = np.random.default_rng((seed, 2)).permutation(len(data.test_images))[:EXAMPLES]
    rows = [
        (
            f"image {i}",
            str(data.test_labels[i]),
            *(_answer(network, inputs.test[i : i + 1]) for network in networks.values()),
        )
        for i in chosen
    ]
    progress.table(("one at a time", "is a", *NAMES.values()), rows)
    print("Each image above went through alone, a batch of one: in use, the running averages of")
    print("mean and variance that training gathered stand in for those of a batch.")


def _answer(network: nets.Network, image: NDArray[np.float32]) -> str:
    """Name the likeliest class of one image, shape (1, pixels), and its probability."""
    with np.errstate(over="ignore", invalid="ignore"):  # a network that diverged
        probability = network.predict(image)[0]
    best = int(probability.argmax())
    return f"{best} ({100 * probability[best]:.0f} %)" if np.isfinite(probability[best]) else "diverged"


def _summary(histories: Histories, steps: int, chance: float) -> list[str]:
    """One sentence for each network, on the highest target that either reached."""
    reached = [target for target in TARGETS if any(h.first(target / 100) is not None for h in histories.values())]
    sentences = []
    for batch_norm, history in histories.items():
        parts = []
        if reached:
            first = history.first(reached[-1] / 100)
            never, after = (
                f"never {reached[-1]} % within {steps} steps",
                (f"{reached[-1]} % of the test images right after {first} steps"),
            )
            parts.append(never if first is None else after)
        end = f"{_percent(history, -1)} at the end"
        if history.diverged:
            end = f"diverged at step {history.diverged} (the loss is no longer a number; try a smaller --lr)"
        elif history.accuracy[-1] < chance + NEAR_CHANCE:
            end += f", near chance ({100 * chance:.1f} %)"
        sentences.append(f"{NAMES[batch_norm].capitalize()}: {', '.join([*parts, end])}.")
    return sentences


def _figure(histories: Histories, data: Dataset) -> Figure:
    """Draw both test accuracies over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    axes = figure.add_subplot()
    for batch_norm, history in histories.items():
        axes.plot(history.steps, [100 * accuracy for accuracy in history.accuracy], label=NAMES[batch_norm])
    axes.axhline(100 * data.chance, color="gray", linestyle=":", label="chance")
    axes.set(xlabel="training steps", ylabel="test accuracy (%)", ylim=(0, 101))
    # a directory's name, of any letters
    axes.set_title(data.name.encode(errors="backslashreplace").decode(), parse_math=False)
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _save(figure: Figure, file: IO[bytes], suffix: str) -> None:
    with warnings.catch_warnings():
        # of the title's letters: the font's box stands for them
        warnings.filterwarnings("ignore", "Glyph .* missing from ")
        figure.savefig(file, format=suffix, dpi=150)
