"""The training of a network: its inputs, optimizers, and the loop.

By default it is the experiment of Ioffe & Szegedy (2015), section 4.1: batches of 60, plain gradient descent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import progress
from fastbn.cli.train.data import Dataset
from fastbn.cli.train.network import Array, Network, cross_entropy
from fastbn.functional import batch_norm_inference, moments

Indices = NDArray[np.intp]

PIXEL_EPS = 0.1  # added to the variance of each pixel, in units of the ink
# The last part of the steps, over which the learning rate falls linearly to 0. Over 16 seeds of the digits from weights
# of 0.03, 2000 steps at 0.1, this kept the last ten checks of each from 97.8 % up; at a constant rate single ones went
# down to 94.9 %, for training then jumps now and again, and recovers. From Xavier's weights neither jumps (96.9 %).
COOLDOWN = 0.25
CHUNK = 4096  # images
CHECKS = 40  # how often the test accuracy is taken


def need(command: str) -> None:
    """MissingExtra where a package is absent that the commands which train need."""
    packages = "rich, matplotlib, scikit-learn and threadpoolctl"
    progress.need("rich", "matplotlib", "sklearn", "threadpoolctl", command=command, named=packages)


def one_blas_thread() -> AbstractContextManager[Any]:
    """Matrices this small gain nothing from a second BLAS thread; on a busy machine its waiting cost a factor of 20."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits


class Inputs:
    """A network's inputs: every pixel with mean 0 and about unit variance over the training images.

    The test images take the same shift and scale. The large eps keeps pixels that hardly ever carry ink from being
    blown up. Images stay bytes until they are asked for: 60,000 of MNIST's are 47 MB so, and 188 MB as float32.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data
        m = moments(data.images, num_threads=1)
        self.mean, self.var = m.mean.astype(np.float32), m.var().astype(np.float32)
        self.eps = PIXEL_EPS * data.ink**2
        self.test = self._normalized(data.test_images.astype(np.float32))

    def __getitem__(self, chosen: Indices | slice) -> Array:
        """Training images, shape (chosen, pixels) of float32."""
        images = self.data.images
        if isinstance(chosen, slice):
            return self._normalized(images[chosen].astype(np.float32))
        x = np.empty((len(chosen), images.shape[1]), np.float32)
        for start in range(0, len(chosen), CHUNK):  # a copy in bytes is of a few images only
            x[start : start + CHUNK] = images[chosen[start : start + CHUNK]]
        return self._normalized(x)

    def _normalized(self, x: Array) -> Array:
        return batch_norm_inference(x, self.mean, self.var, eps=self.eps, out=x, num_threads=1)


class Optimizer:
    """Plain gradient descent, and the frame of the others.

    They differ in `change`, and in what they remember of each parameter.
    """

    rate = 0.1
    memories = 0  # arrays kept beside each parameter, zeros at first

    def __init__(self) -> None:
        self.steps = 0
        self.memory: list[list[Array]] = []

    def step(self, network: Network, rate: float) -> None:
        """Change every parameter in place, after `backward`."""
        self.steps += 1
        for i, (parameter, gradient) in enumerate(network.parameters()):
            if i == len(self.memory):
                self.memory.append([np.zeros_like(parameter) for _ in range(self.memories)])
            parameter -= rate * self.change(gradient, self.memory[i])

    def change(self, gradient: Array, memory: list[Array]) -> Array:
        """Give what the rate multiplies, updating the memory in place."""
        return gradient


class Momentum(Optimizer):
    """The gradient plus 0.9 of the last change."""

    rate = 0.01
    memories = 1

    def change(self, gradient: Array, memory: list[Array]) -> Array:
        """Memory: the last change."""
        (velocity,) = memory
        velocity *= 0.9
        velocity += gradient
        return velocity


class RMSprop(Optimizer):
    """The gradient divided by a running root mean square of itself (Tieleman & Hinton 2012)."""

    rate = 0.001
    memories = 1

    def change(self, gradient: Array, memory: list[Array]) -> Array:
        """Memory: the running average of the squared gradient."""
        (square,) = memory
        square += 0.1 * (gradient * gradient - square)
        return gradient / (np.sqrt(square) + 1e-8)


class Adam(Optimizer):
    """Both: a running average of the gradient over its root mean square, less their start at 0 (Kingma & Ba 2015)."""

    rate = 0.001
    memories = 2

    def change(self, gradient: Array, memory: list[Array]) -> Array:
        """Memory: running averages of the gradient and of its square."""
        mean, square = memory
        mean += 0.1 * (gradient - mean)
        square += 0.001 * (gradient * gradient - square)
        return mean / (1 - 0.9**self.steps) / (np.sqrt(square / (1 - 0.999**self.steps)) + 1e-8)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": Optimizer, "momentum": Momentum, "rmsprop": RMSprop, "adam": Adam}


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Indices]:
    """Indices of each step's images: a shuffled pass over all of them, then another; the same for the same seed."""
    rng = np.random.default_rng((seed, 1))
    order = rng.permutation(count)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(count)
        yield order[:batch]
        order = order[batch:]


def descend(
    network: Network,
    optimizer: Optimizer,
    rate: float,
    inputs: Inputs,
    chosen: Iterable[Indices],
    steps: int,
    after: Callable[[int], object] = lambda step: None,
) -> tuple[float, int | None]:
    """Train on the chosen batches, the rate falling to 0 in the last part of so many steps.

    `after(steps so far)` is called before the first step and after each. Returns the seconds of processor time that the
    steps took, of this thread, which does all the work, and the step at which the loss was no longer a number, where
    training stops, or None.
    """
    seconds, labels = 0.0, inputs.data.labels
    with np.errstate(over="ignore", invalid="ignore"):  # a rate far too high is reported
        after(0)
        for step, batch in enumerate(chosen, start=1):
            start = time.thread_time()
            loss, gradient = cross_entropy(network(inputs[batch]), labels[batch])
            network.backward(gradient)
            optimizer.step(network, rate * min(1.0, (steps - step + 1) / (COOLDOWN * steps)))
            seconds += time.thread_time() - start
            if not np.isfinite(loss):
                return seconds, step
            after(step)
    return seconds, None


def correct(network: Network, inputs: Inputs) -> int:
    """Test images that the network names right, by its running averages; none where its scores are no numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        scores = network.predict(inputs.test)
    right = (scores.argmax(axis=1) == inputs.data.test_labels) & np.isfinite(scores).all(axis=1)
    return int(right.sum())


@dataclass
class History:
    """How the test accuracy of one network went.

    After `steps[i]` steps, `correct[i]` of `total` test images were right.
    """

    total: int
    steps: list[int] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    seconds: float = 0.0  # of processor time in training, the checks of the accuracy not counted
    diverged: int | None = None  # the step at which the loss was no longer a number, where training stopped

    @property
    def accuracy(self) -> list[float]:
        """At each check, from 0 to 1."""
        return [correct / self.total for correct in self.correct]

    def first(self, accuracy: float) -> int | None:
        """Steps at the first check that found at least this part right, None where none did."""
        return next((step for step, found in zip(self.steps, self.accuracy, strict=True) if found >= accuracy), None)


def checked_steps(steps: int, checks: int = CHECKS) -> list[int]:
    """The steps after which a run of so many is looked at: from 0 to the last, as even as whole numbers are."""
    return sorted({round(steps * i / checks) for i in range(checks + 1)})


def train(
    network: Network,
    optimizer: Optimizer,
    rate: float,
    inputs: Inputs,
    chosen: Iterable[Indices],
    steps: int,
    report: Callable[[int, float], object] = lambda step, accuracy: None,
) -> History:
    """Train, and follow the test accuracy; `report(steps so far, the last found)` is called before and after each."""
    history, checked = History(len(inputs.data.test_labels)), set(checked_steps(steps))

    def check(step: int) -> None:
        if step in checked:
            history.steps.append(step)
            history.correct.append(correct(network, inputs))
        report(step, history.correct[-1] / history.total)

    history.seconds, history.diverged = descend(network, optimizer, rate, inputs, chosen, steps, check)
    return history
