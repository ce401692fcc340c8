"""A network with batch normalization, written out: layers, initial weights and loss.

Every layer is called forwards, ``y = layer(x)``, and then backwards, ``dx = layer.backward(dy)``, which leaves the
gradients of its parameters beside them: `dweight` beside `weight`, `dgamma` beside `gamma`. `fastbn.BatchNorm` is such
a layer already. What was kept for it is let go by backward: beside the next batch, the last one would take as much
memory again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn.batchnorm import BatchNorm

Array = NDArray[Any]
Norm = Callable[[Array], BatchNorm]  # that which goes behind a matrix

# Standard deviation of the initial weights between so many inputs and so many outputs.
INITS: dict[str, Callable[[int, int], float]] = {
    "xavier": lambda inputs, outputs: math.sqrt(2 / (inputs + outputs)),  # Glorot & Bengio (2010)
    "he": lambda inputs, outputs: math.sqrt(2 / inputs),  # He et al. (2015)
}


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
        if self.bias is not None:
            y += self.bias
        return y

    def backward(self, dy: Array) -> Array:
        """(batch, outputs) -> (batch, inputs)."""
        self.gradients(dy)
        dx: Array = dy @ self.weight.T
        return dx

    def gradients(self, dy: Array) -> None:
        """Only those of the parameters: of a network's first layer nobody needs dx."""
        self.dweight = self.x.T @ dy
        del self.x
        if self.bias is not None:
            self.dbias = dy.sum(axis=0)


class Sigmoid:
    """y = 1 / (1 + exp(-x)), in the form that never overflows."""

    def __call__(self, x: Array) -> Array:
        """Element by element."""
        self.y: Array = 0.5 * x
        np.tanh(self.y, out=self.y)
        self.y *= 0.5
        self.y += 0.5
        return self.y

    def backward(self, dy: Array) -> Array:
        """dy * y * (1 - y)."""
        dx: Array = dy * self.y * (1 - self.y)
        del self.y
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
        del self.y
        return dx


class ReLU:
    """y = max(x, 0)."""

    def __call__(self, x: Array) -> Array:
        """Element by element."""
        self.y: Array = np.maximum(x, 0)
        return self.y

    def backward(self, dy: Array) -> Array:
        """The part of dy where y is positive."""
        dx: Array = dy * (self.y > 0)
        del self.y
        return dx


ACTIVATIONS: dict[str, Callable[[], Layer]] = {"sigmoid": Sigmoid, "relu": ReLU, "tanh": Tanh}


def initial_weights(sizes: Sequence[int], init: str | float, seed: int, dtype: DTypeLike = np.float32) -> list[Array]:
    """Gaussian matrices (inputs, outputs), one for each pair of neighbouring sizes, the same for the same seed.

    `init` is a name of `INITS`, or the standard deviation of all.
    """
    rng = np.random.default_rng((seed, 0))
    with np.errstate(over="ignore"):  # of a standard deviation far too high: the network diverges, which is reported
        return [
            ((INITS[init](*pair) if isinstance(init, str) else init) * rng.standard_normal(pair)).astype(dtype)
            for pair in itertools.pairwise(sizes)
        ]


def batch_norm(weight: Array) -> BatchNorm:
    """The normalization behind a matrix.

    On one thread, which layers this small are fastest on.
    """
    return BatchNorm(weight.shape[1], dtype=weight.dtype, num_threads=1)


class Network:
    """Linear layers with an activation between them, and before each activation a batch normalization, or none.

    `norm` makes that of a matrix.
    """

    def __init__(self, weights: Sequence[Array], activation: str, norm: Norm | None) -> None:
        self.layers: list[Layer] = []
        self.first = Linear(weights[0], bias=norm is None or len(weights) == 1)
        for weight in weights[:-1]:
            self.layers.append(Linear(weight, bias=norm is None) if self.layers else self.first)
            if norm is not None:
                self.layers.append(norm(weight))
            self.layers.append(ACTIVATIONS[activation]())
        self.layers.append(Linear(weights[-1], bias=True) if self.layers else self.first)

    def __call__(self, x: Array) -> Array:
        """Scores, shape (batch, classes)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Array) -> None:
        """Set the gradient of every parameter, from that of the scores."""
        for layer in reversed(self.layers[1:]):
            dy = layer.backward(dy)
        self.first.gradients(dy)

    @property
    def norms(self) -> list[BatchNorm]:
        """The batch normalizations, from the first layer on."""
        return [layer for layer in self.layers if isinstance(layer, BatchNorm)]

    def set_training(self, training: bool) -> None:
        """Batch statistics (training) or running averages (evaluation).

        Only batch normalization knows the difference.
        """
        for norm in self.norms:
            norm.train(training)

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
