"""A network with batch normalization, written out: layers, loss, optimizers and the loop of the `train` command.

Every layer is called forwards, ``y = layer(x)``, and then backwards, ``dx = layer.backward(dy)``, which leaves the
gradients of its parameters beside them: `dweight` beside `weight`, `dgamma` beside `gamma`. `fastbn.BatchNorm` is such
a layer already.

By default it is the experiment of Ioffe & Szegedy (2015), section 4.1: three hidden layers of 100 sigmoid units,
batches of 60.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn.batchnorm import BatchNorm
from fastbn.cli.train.data import Dataset
from fastbn.functional import batch_norm_inference, moments

Array = NDArray[Any]
Indices = NDArray[np.intp]

INITIAL_STD = 0.03  # of the weights: small Gaussian values, as in the paper
PIXEL_EPS = 0.1  # added to the variance of each pixel
# The last part of the steps, over which the learning rate falls linearly to 0. Over 16 seeds of the default run this
# kept the last ten checks of each from 97.8 % up; at a constant rate single ones went down to 94.9 %, for training then
# jumps now and again, and recovers.
COOLDOWN = 0.25
CHECKS = 40  # how often the test accuracy is taken


class Layer(Protocol):
    """Forwards and backwards; x and y have shape (batch, features)."""

    def __call__(self, x: Array, /) -> Array:
        """Give y, and keep what backward needs."""

    def backward(self, dy: Array, /) -> Array:
        """Gradient of the loss with respect to x."""


class Linear:
    """y = x @ weight + bias.

    There is no bias before a batch normalization: subtracting the batch's mean would remove it, and beta takes its
    place.
    """

    def __init__(self, weight: Array, bias: bool) -> None:
        self.weight = weight.copy()
        self.bias = np.zeros(weight.shape[1], weight.dtype) if bias else None

    def __call__(self, x: Array) -> Array:
        """(batch, inputs) -> (batch, outputs)."""
        self.x = x
        y: Array = x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, dy: Array) -> Array:
        """(batch, outputs) -> (batch, inputs)."""
        self.dweight = self.x.T @ dy
        if self.bias is not None:
            self.dbias = dy.sum(axis=0)
        dx: Array = dy @ self.weight.T
        return dx


class Sigmoid:
    """y = 1 / (1 + exp(-x)), in the form that never overflows."""

    def __call__(self, x: Array) -> Array:
        """Element by element."""
        self.y: Array = 0.5 * np.tanh(0.5 * x) + 0.5
        return self.y

    def backward(self, dy: Array) -> Array:
        """dy * y * (1 - y)."""
        dx: Array = dy * self.y * (1 - self.y)
        return dx


class Tanh:
    """y = tanh(x)."""

    def __call__(self, x: Array) -> Array:
        """Element by element."""
        self.y: Array = np.tanh(x)
        return self.y

    def backward(self, dy: Array) -> Array:
        """dy * (1 - y^2)."""
        dx: Array = dy * (1 - self.y * self.y)
        return dx


class ReLU:
    """y = max(x, 0)."""

    def __call__(self, x: Array) -> Array:
        """Element by element."""
        self.y: Array = np.maximum(x, 0)
        return self.y

    def backward(self, dy: Array) -> Array:
        """The part of dy where y is positive."""
        return dy * (self.y > 0)


ACTIVATIONS: dict[str, Callable[[], Layer]] = {"sigmoid": Sigmoid, "relu": ReLU, "tanh": Tanh}


def initial_weights(sizes: Sequence[int], seed: int, dtype: DTypeLike = np.float32) -> list[Array]:
    """One matrix (inputs, outputs) for each pair of neighbouring sizes, the same for the same seed."""
    rng = np.random.default_rng((seed, 0))
    return [(INITIAL_STD * rng.standard_normal(pair)).astype(dtype) for pair in itertools.pairwise(sizes)]


class Network:
    """Linear layers with an activation between them, and before each activation a batch normalization, or none."""

    def __init__(self, weights: Sequence[Array], activation: str, batch_norm: bool) -> None:
        self.layers: list[Layer] = []
        for weight in weights[:-1]:
            self.layers.append(Linear(weight, bias=not batch_norm))
            if batch_norm:
                self.layers.append(BatchNorm(weight.shape[1], dtype=weight.dtype))
            self.layers.append(ACTIVATIONS[activation]())
        self.layers.append(Linear(weights[-1], bias=True))

    def __call__(self, x: Array) -> Array:
        """Scores, shape (batch, classes)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Array) -> None:
        """Set the gradient of every parameter, from that of the scores."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def set_training(self, training: bool) -> None:
        """Batch statistics (training) or running averages (evaluation).

        Only batch normalization knows the difference.
        """
        for layer in self.layers:
            if isinstance(layer, BatchNorm):
                layer.train(training)

    def predict(self, x: Array) -> Array:
        """Probability of each class, by the running averages: an image's answer does not depend on the others in x."""
        self.set_training(False)
        probabilities = softmax(self(x))
        self.set_training(True)
        return probabilities

    def parameters(self) -> Iterator[tuple[Array, Array]]:
        """Every parameter with its gradient, after `backward`; gamma and beta are parameters like the others."""
        for layer in self.layers:
            for name in ("weight", "bias", "gamma", "beta"):
                if getattr(layer, name, None) is not None:
                    yield getattr(layer, name), getattr(layer, f"d{name}")


def softmax(scores: Array) -> Array:
    """Probabilities (batch, classes) from scores."""
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: Array = e / e.sum(axis=1, keepdims=True)
    return probabilities


def cross_entropy(scores: Array, labels: Array) -> tuple[float, Array]:
    """Mean of -log(probability of the true class) over the batch, and its gradient with respect to the scores."""
    rows = np.arange(len(labels))
    gradient = softmax(scores)
    loss = -np.log(np.maximum(gradient[rows, labels], np.finfo(scores.dtype).tiny)).mean()
    gradient[rows, labels] -= 1
    gradient /= len(labels)
    return float(loss), gradient


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


def normalize_inputs(data: Dataset) -> Dataset:
    """Give every pixel mean 0 and about unit variance over the training images.

    The test images take the same shift and scale.
    The large eps (pixels go from 0 to 1) keeps pixels that hardly ever carry ink from being blown up.
    """
    m = moments(data.images)
    images, test_images = (
        batch_norm_inference(x, m.mean, m.var(), eps=PIXEL_EPS) for x in (data.images, data.test_images)
    )
    return data._replace(images=images, test_images=test_images)


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Indices]:
    """Indices of each step's images: a shuffled pass over all of them, then another; the same for the same seed."""
    rng = np.random.default_rng((seed, 1))
    order = rng.permutation(count)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(count)
        yield order[:batch]
        order = order[batch:]


@dataclass
class History:
    """How the test accuracy of one network went.

    After `steps[i]` steps, `correct[i]` of `total` test images were right.
    """

    total: int
    steps: list[int] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    seconds: float = 0.0  # in training, the checks of the accuracy not counted
    diverged: int | None = None  # the step at which the loss was no longer finite, where training stopped

    @property
    def accuracy(self) -> list[float]:
        """At each check, from 0 to 1."""
        return [correct / self.total for correct in self.correct]

    def first(self, percent: int) -> int | None:
        """Steps at the first check that found at least so many percent right, None where none did."""
        return next(
            (step for step, n in zip(self.steps, self.correct, strict=True) if 100 * n >= percent * self.total), None
        )


def train(
    network: Network,
    optimizer: Optimizer,
    rate: float,
    data: Dataset,
    chosen: Iterable[Indices],
    steps: int,
    report: Callable[[int, float], object] = lambda step, accuracy: None,
) -> History:
    """Train on the chosen batches; `report(steps so far, test accuracy)` is called at every check."""
    history = History(len(data.test_labels))

    def check(step: int) -> None:
        history.steps.append(step)
        history.correct.append(int((network.predict(data.test_images).argmax(axis=1) == data.test_labels).sum()))
        report(step, history.accuracy[-1])

    with np.errstate(over="ignore", invalid="ignore"):  # a rate far too high is reported as `diverged`
        check(0)
        for step, batch in enumerate(chosen, start=1):
            start = time.perf_counter()
            loss, gradient = cross_entropy(network(data.images[batch]), data.labels[batch])
            network.backward(gradient)
            optimizer.step(network, rate * min(1.0, (steps - step + 1) / (COOLDOWN * steps)))
            history.seconds += time.perf_counter() - start
            if not np.isfinite(loss):
                history.diverged = step
                break
            if step % max(1, steps // CHECKS) == 0 or step == steps:
                check(step)
    return history
