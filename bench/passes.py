"""The four passes on real layers' shapes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

import fastbn
from bench.cases import CASES, array, check
from fastbn import reference


class _Pass:
    """Arrays, statistics and the expected results of one case."""

    params: ClassVar[list[list[str]]] = [list(CASES), ["float32", "float64"]]
    param_names: ClassVar[list[str]] = ["shape", "dtype"]
    timeout = 120

    def setup(self, name: str, dtype: str) -> None:
        self.x, self.dy = array(name, dtype), array(name, dtype, seed=1)
        self.out = np.empty_like(self.x)
        C = self.x.shape[1]
        self.gamma, self.beta = np.full(C, 1.5, dtype), np.full(C, 0.5, dtype)
        self.flat = np.moveaxis(self.x, 1, -1).reshape(-1, C)
        self.expected = reference.moments(self.flat)
        self.limit = 1e-5 if dtype == "float32" else 1e-10
        self.prepare()

    def prepare(self) -> None:
        """What a class needs besides, and its check."""

    def by_row(self, array: Any) -> Any:
        """An array of x's shape as (R, C)."""
        return np.moveaxis(array, 1, -1).reshape(self.flat.shape)


class Forward(_Pass):
    """Training forward into a given output."""

    def prepare(self) -> None:
        self.run()
        y = reference.forward(self.flat, self.gamma, self.beta, 1e-5, np.empty(self.flat.shape))[0]
        check(self.by_row(self.out), y, self.limit)

    def run(self) -> None:
        fastbn.batch_norm(self.x, self.gamma, self.beta, out=self.out)

    def time_forward(self, name: str, dtype: str) -> None:
        self.run()


class Backward(_Pass):
    """Training backward into a given output."""

    def prepare(self) -> None:
        self.moments = fastbn.moments(self.x)
        self.run()
        m = self.expected
        dx = reference.backward(self.by_row(self.dy), self.flat, m.mean, m.rstd(1e-5), self.gamma, np.empty(self.flat.shape))[0]
        check(self.by_row(self.out), dx, self.limit)

    def run(self) -> None:
        fastbn.batch_norm_backward(self.dy, self.x, self.moments, self.gamma, out=self.out)

    def time_backward(self, name: str, dtype: str) -> None:
        self.run()


class Inference(_Pass):
    """Normalization by given statistics into a given output."""

    def prepare(self) -> None:
        self.mean, self.var = self.expected.mean, self.expected.var()
        self.run()
        m = self.expected
        y = reference.normalize(self.flat, m.mean, m.rstd(1e-5), self.gamma, self.beta, np.empty(self.flat.shape))
        check(self.by_row(self.out), y, self.limit)

    def run(self) -> None:
        fastbn.batch_norm_inference(self.x, self.mean, self.var, self.gamma, self.beta, out=self.out)

    def time_inference(self, name: str, dtype: str) -> None:
        self.run()


class Statistics(_Pass):
    """Mean and variance alone."""

    def prepare(self) -> None:
        found = fastbn.moments(self.x)
        check(found.mean, self.expected.mean, self.limit)
        check(found.var(), self.expected.var(), self.limit)

    def time_moments(self, name: str, dtype: str) -> None:
        fastbn.moments(self.x)
