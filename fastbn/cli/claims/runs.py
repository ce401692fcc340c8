"""One run: a network trained, and what is looked at meanwhile and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastbn.batchnorm import BatchNorm
from fastbn.cli.train import network as nets
from fastbn.cli.train import training
from fastbn.functional import batch_norm, batch_norm_backward

WIDTH = 100  # units of each hidden layer
BATCH = 60


class Run(NamedTuple):
    """All that decides a run's result, the data aside.

    `init` is a name of `network.INITS` or a standard deviation. `group` is the number of images whose statistics
    normalize, None the whole batch; `images` the number of training images, None all.
    """

    measure: str
    activation: str
    init: str | float
    rate: float
    batch_norm: bool
    steps: int
    seed: int
    hidden: int = 3
    batch: int = BATCH
    group: int | None = None
    images: int | None = None

    @property
    def twin(self) -> Run:
        """The same without batch normalization."""
        return self._replace(batch_norm=False)


Result = dict[str, Any]  # what JSON holds
Results = Mapping[Run, Result]
Report = Callable[[int], object]  # (steps so far)
Measure = Callable[[Run, training.Inputs, Report], Result]


class Plan(NamedTuple):
    """What the runs of all claims have in common."""

    steps: int
    seed: int
    images: int
    test_images: int
    chance: float = 0.0  # percent of the test images that the commonest class makes


class Finding(NamedTuple):
    """What a claim's runs showed: how it was tried, by which rule it is judged, and what came of it."""

    done: str
    rule: str
    headers: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    outcome: str  # "holds", "holds in part", "does not hold", "undecided"
    verdict: Sequence[str]  # sentences, each with its numbers


class GhostBatchNorm(BatchNorm):
    """Batch normalization of groups within a batch, each by its own statistics (Hoffer et al. 2017, ghost batches).

    Group g has the images g, g + groups, g + 2 groups, ..., so that (batch, features) is (group, groups * features) as
    it lies in memory, whose columns are normalized in one call.
    """

    def __init__(self, num_features: int, group: int) -> None:
        super().__init__(num_features, num_threads=1)
        self.group = group

    def __call__(self, x: nets.Array) -> nets.Array:  # type: ignore[override]  # x alone, of two axes
        """Shape (batch, features), the batch a multiple of the group."""
        if not self.training:
            return super().__call__(x)
        self.groups = len(x) // self.group
        self.columns = x.reshape(self.group, -1)
        gamma, beta = self._repeated(self.gamma), self._repeated(self.beta)
        y, self.m = batch_norm(self.columns, gamma, beta, eps=self.eps, num_threads=1)
        for running, seen in ((self.running_mean, self.m.mean), (self.running_var, self.m.var(ddof=1))):
            running += self.momentum * (seen.reshape(self.groups, -1).mean(axis=0) - running)
        return y.reshape(x.shape)

    def backward(self, dy: nets.Array) -> nets.Array:  # type: ignore[override]  # dy alone
        """Set dgamma and dbeta; returns dx."""
        columns = dy.reshape(self.group, -1)
        gamma = self._repeated(self.gamma)
        dx, dgamma, dbeta = batch_norm_backward(columns, self.columns, self.m, gamma, eps=self.eps, num_threads=1)
        self.dgamma, self.dbeta = (sums.reshape(self.groups, -1).sum(axis=0) for sums in (dgamma, dbeta))
        return dx.reshape(dy.shape)

    def _repeated(self, parameter: Any) -> nets.Array:
        """For each group once."""
        return np.tile(parameter, self.groups)


def build(run: Run, inputs: training.Inputs) -> nets.Network:
    """The network of a run, before its training."""
    data, group = inputs.data, run.group
    sizes = (data.images.shape[1], *[WIDTH] * run.hidden, data.classes)

    def grouped(weight: nets.Array) -> BatchNorm:
        return nets.batch_norm(weight) if group is None else GhostBatchNorm(weight.shape[1], group)

    weights = nets.initial_weights(sizes, run.init, run.seed)
    return nets.Network(weights, run.activation, grouped if run.batch_norm else None)


def descend(
    run: Run, network: nets.Network, inputs: training.Inputs, report: Report, after: Report = lambda step: None
) -> int | None:
    """Train it; returns the step at which it diverged, or None."""

    def step(number: int) -> None:
        report(number)
        after(number)

    chosen = training.batches(len(inputs.data.images), run.batch, run.steps, run.seed)
    return training.descend(network, training.Optimizer(), run.rate, inputs, chosen, run.steps, step)[1]


def accuracy(network: nets.Network, inputs: training.Inputs) -> float:
    """Percent of the test images that a network names right."""
    return 100 * training.correct(network, inputs) / len(inputs.data.test_labels)


def hidden_inputs(network: nets.Network, x: nets.Array) -> Iterator[tuple[nets.Array, nets.Array]]:
    """Of each hidden layer in turn: what its activation gets for x as one batch, and that without gamma and beta.

    By x's own statistics, and leaving the running averages as they are; without batch normalization both are the same.
    """
    for layer in network.layers[:-1]:
        if isinstance(layer, BatchNorm):
            normalized = batch_norm(x, eps=layer.eps, num_threads=1)[0]
            x = layer.gamma * normalized + layer.beta
        elif isinstance(layer, nets.Linear):
            x = normalized = layer(x)
        else:
            yield x, normalized
            x = layer(x)
