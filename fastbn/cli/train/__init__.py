"""The `train` command: the paper's network on real handwritten digits, with batch normalization and without.

Its options and its run; the network is in `fastbn.cli.train.network`, the loop in `training`, what is shown in
`report`.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fastbn import progress
from fastbn.arguments.errors import DataError
from fastbn.cli import files, options, plots
from fastbn.cli.train import kernels, report, training
from fastbn.cli.train import network as nets
from fastbn.cli.train.data import Dataset, load

PLOT_KINDS = (".png", ".pdf", ".svg")
EXAMPLES = 8


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
    add(
        "--steps",
        type=options.whole_from(1),
        default=2000,
        metavar="N",
        help="training steps, each on one batch (default: %(default)s)",
    )
    add(
        "--lr",
        type=options.above_zero,
        metavar="RATE",
        help=f"learning rate, falling to 0 in the last quarter of the steps (default: {rates})",
    )
    add(
        "--init",
        type=_init,
        # From weights of 0.03 the plain network stays near chance on the digits, for all of 16 seeds.
        default="xavier",
        metavar="INIT",
        help="standard deviation of the initial weights: xavier, he, or a number, 0.03 say (default: %(default)s)",
    )
    add(
        "--hidden",
        type=_hidden,
        default="100,100,100",
        metavar="UNITS",
        help="units of each hidden layer, with commas (default: %(default)s)",
    )
    add(
        "--seed",
        type=options.whole_from(0),
        default=0,
        metavar="N",
        help="of the initial weights and the batches; same seed, same run (default: %(default)s)",
    )
    add(
        "--plot",
        type=_plot,
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
    rate = training.OPTIMIZERS[args.optimizer].rate if args.lr is None else args.lr
    with ExitStack() as stack:
        plot, file = _open_plot(args.plot, stack)
        training.need("train")
        data = load(args.data)
        if not 2 <= args.batch <= len(data.images):
            raise DataError(
                f"--batch: given {args.batch}, want 2 (a variance needs two images) to {len(data.images)}, the "
                "training images"
            )
        stack.enter_context(training.one_blas_thread())
        sizes = (data.images.shape[1], *args.hidden, data.classes)
        network = f"{'-'.join(map(str, sizes))} units, {args.activation}, initial weights {_said(args.init)}"
        lessons = f"{report.counted(args.steps, 'step')} of {args.batch} images, {args.optimizer} at rate {rate:g}"
        _print_task(args, data, network, lessons)
        weights = nets.initial_weights(sizes, args.init, args.seed)
        with kernels.announced():
            inputs = training.Inputs(data)
            _rehearse(args, inputs, weights)
        networks, histories = _train_both(args, inputs, weights, rate)
        title = f"{data.name}\n{network}\n{lessons}"
        plots.save(report.figure(histories, title, args.steps, data.chance), file, plot.suffix[1:].lower())
    # The plot is in its place before anything is shown, which a terminal may not take.
    progress.table(("", *plots.NAMES.values()), report.rows(histories, args.steps, data.chance))
    _print_examples(networks, inputs, args.seed)
    print("", *report.summary(histories, data.chance), sep="\n")
    print(f"plot of both curves: {plot}")
    return 0


def _init(text: str) -> str | float:
    return text if text in nets.INITS else options.above_zero(text, "xavier, he, or a number above 0, like 0.03")


def _said(init: str | float) -> str:
    return init if isinstance(init, str) else f"of standard deviation {init:g}"


def _hidden(text: str) -> tuple[int, ...]:
    """Units of the hidden layers."""
    try:
        hidden = tuple(int(units) for units in text.split(","))
    except ValueError:
        hidden = (0,)
    if min(hidden) < 1:
        want = "whole numbers above 0 with commas between them, like 100,100,100"
        raise argparse.ArgumentTypeError(f"given {text!r}, want {want}")
    return hidden


def _plot(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PLOT_KINDS:
        raise argparse.ArgumentTypeError(f"given '{text}', want a file name that ends in {options.listed(PLOT_KINDS)}")
    return path


def _open_plot(path: Path, stack: ExitStack) -> tuple[Path, IO[bytes]]:
    """Open what takes the plot's place at the end.

    A plot that can't be written is found now, not after the training.
    """
    try:
        path = files.check_output(path, 0)
        return path, stack.enter_context(files.replacing(path))
    except ValueError as error:
        raise DataError(f"--plot: {error}") from error
    except OSError as error:
        raise DataError(f"--plot: {path} can't be written: {error.strerror}") from error


def _print_task(args: argparse.Namespace, data: Dataset, network: str, lessons: str) -> None:
    height, width = data.pixels
    print(
        f"data:     {data.name}, {height} x {width} pixels: {len(data.images):,} to train on, "
        f"{len(data.test_images):,} to test"
    )
    print(f"network:  {network}; the same weights and batches for both (seed {args.seed})")
    print(f"training: {lessons} (over the last quarter falling to 0)", flush=True)


def _rehearse(args: argparse.Namespace, inputs: training.Inputs, weights: list[nets.Array]) -> None:
    """Call every kernel once that the run will need, by a throw-away step, so that no network's seconds count it."""
    trial = nets.Network(weights, args.activation, nets.batch_norm)
    chosen = training.batches(len(inputs.data.images), args.batch, 1, args.seed)
    training.train(trial, training.Optimizer(), 0.0, inputs, chosen, 1)
    _answer(trial, inputs.test[:1])


def _train_both(
    args: argparse.Namespace, inputs: training.Inputs, weights: list[nets.Array], rate: float
) -> tuple[dict[bool, nets.Network], report.Histories]:
    norms = {True: nets.batch_norm, False: None}
    networks = {batch_norm: nets.Network(weights, args.activation, norm) for batch_norm, norm in norms.items()}
    histories = {}
    with progress.counted() as start:
        for batch_norm, network in networks.items():
            task = start(plots.NAMES[batch_norm], args.steps)
            optimizer = training.OPTIMIZERS[args.optimizer]()
            chosen = training.batches(len(inputs.data.images), args.batch, args.steps, args.seed)
            show = partial(_show, task)
            histories[batch_norm] = training.train(network, optimizer, rate, inputs, chosen, args.steps, show)
            task.end()
    return networks, histories


def _show(task: progress.Task, step: int, accuracy: float) -> None:
    task.update(step, f"{100 * accuracy:.1f} % right")


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
    progress.table(("one at a time", "true class", *plots.NAMES.values()), rows)
    print("Each image above went through alone, a batch of one: in use, the running averages of")
    print("mean and variance that training gathered stand in for those of a batch.")


def _answer(network: nets.Network, image: NDArray[np.float32]) -> str:
    """Name the likeliest class of one image, shape (1, pixels), and its probability."""
    with np.errstate(over="ignore", invalid="ignore"):  # a network that diverged
        probability = network.predict(image)[0]
    best = int(probability.argmax())
    return f"{best} ({100 * probability[best]:.0f} %)" if np.isfinite(probability[best]) else "diverged"
