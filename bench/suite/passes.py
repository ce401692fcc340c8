"""The four passes on the shapes of the table: their time, and the memory that they need."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

import fastbn
from fastbn import reference

from .cases import CASES, array, check, empty, parameters

EPS = 1e-5
# of errors against float64, in units of max(1, |value|)
LIMITS = {"float32": 1e-5, "float64": 1e-10, "float16": 2e-3, "bfloat16": 1e-2}


class _Pass:
    """Arrays of one case, and how its results are checked: on three channels, against float64."""

    params: ClassVar[list[list[str]]] = [list(CASES), ["float32"]]
    param_names: ClassVar[list[str]] = ["shape", "dtype"]
    timeout = 600  # the first of its kind compiles
    processes = 1  # the shapes are many
    repeat = (3, 9, 1.0)
    warmup_time = 0.05

    def setup(self, name: str, dtype: str) -> None:
        case = CASES[name]
        self.x, self.dy = array(case, dtype), array(case, dtype, seed=1)
        self.gamma, self.beta = parameters(case, dtype)
        self.out = empty(case, dtype)
        self.out[...] = 0  # its pages exist before anything is timed
        self.limit = LIMITS[dtype]
        self.some = np.unique([0, self.gamma.size // 2, self.gamma.size - 1])  # the channels that are checked
        self.prepare()

    def prepare(self) -> None:
        """What a class needs besides, and its check."""

    def expected(self) -> tuple[Any, fastbn.Moments]:
        """The checked channels of x, and their statistics."""
        rows = self.rows(self.x)
        return rows, reference.moments(rows)

    def rows(self, array: Any) -> Any:
        """Some channels of an array of x's shape, as float64 (R, C)."""
        return np.moveaxis(array[:, self.some], 1, -1).reshape(-1, self.some.size).astype(np.float64)

    def prepare_forward(self) -> None:
        """Check the forward."""
        self.forward()
        rows, m = self.expected()
        y = reference.normalize(
            rows, m.mean, m.rstd(EPS), self.gamma[self.some], self.beta[self.some], np.empty(rows.shape)
        )
        check(self.rows(self.out), y, self.limit)

    def prepare_backward(self) -> None:
        """Take the statistics, check the backward."""
        self.moments = fastbn.moments(self.x)
        self.backward()
        rows, m = self.expected()
        dx = reference.backward(
            self.rows(self.dy), rows, m.mean, m.rstd(EPS), self.gamma[self.some], np.empty(rows.shape)
        )[0]
        check(self.rows(self.out), dx, self.limit)

    def forward(self) -> None:
        """Training forward into a given output."""
        fastbn.batch_norm(self.x, self.gamma, self.beta, out=self.out)

    def backward(self) -> None:
        """Training backward into a given output."""
        fastbn.batch_norm_backward(self.dy, self.x, self.moments, self.gamma, out=self.out)


class Forward(_Pass):
    """Training forward."""

    def prepare(self) -> None:
        self.prepare_forward()

    def time_forward(self, name: str, dtype: str) -> None:
        self.forward()


class Backward(_Pass):
    """Training backward."""

    def prepare(self) -> None:
        self.prepare_backward()

    def time_backward(self, name: str, dtype: str) -> None:
        self.backward()


class Inference(_Pass):
    """Normalization by given statistics into a given output."""

    def prepare(self) -> None:
        m = fastbn.moments(self.x)
        self.mean, self.var = m.mean, m.var()
        self.inference()
        rows, m = self.expected()
        y = reference.normalize(
            rows, m.mean, m.rstd(EPS), self.gamma[self.some], self.beta[self.some], np.empty(rows.shape)
        )
        check(self.rows(self.out), y, self.limit)

    def inference(self) -> None:
        """Inference into a given output."""
        fastbn.batch_norm_inference(self.x, self.mean, self.var, self.gamma, self.beta, out=self.out)

    def time_inference(self, name: str, dtype: str) -> None:
        self.inference()


class Statistics(_Pass):
    """Mean and variance alone."""

    def prepare(self) -> None:
        found, (_, m) = fastbn.moments(self.x), self.expected()
        check(found.mean[self.some], m.mean, LIMITS["float32"])
        check(found.var()[self.some], m.var(), LIMITS["float32"])

    def time_moments(self, name: str, dtype: str) -> None:
        fastbn.moments(self.x)


FEW = ["32x64x56x56", "32x64x56x56 last", "65536x64"]
OTHERS = ["float64", "float16", "bfloat16"]


class OtherForward(Forward):
    """The forward in the other dtypes, on a shape of each kind."""

    params: ClassVar[list[list[str]]] = [FEW, OTHERS]


class OtherBackward(Backward):
    """The backward in the other dtypes."""

    params: ClassVar[list[list[str]]] = [FEW, OTHERS]


class PeakMemory(_Pass):
    """Peak of the process, in bytes.

    The three arrays, the interpreter and what a pass takes besides, which should be next to nothing.
    """

    params: ClassVar[list[list[str]]] = [["32x64x112x112", "32x64x112x112 last"], ["float32"]]

    def setup(self, name: str, dtype: str) -> None:
        super().setup(name.replace("112x112", "56x56"), dtype)  # loads the kernels: hundreds of megabytes
        self.prepare_forward()
        self.prepare_backward()
        super().setup(name, dtype)

    def peakmem_arrays(self, name: str, dtype: str) -> None:
        """Nothing besides: what the others are held against."""

    # Checked without copies, and after the call: what setup needs would count too.
    def peakmem_forward(self, name: str, dtype: str) -> None:
        self.forward()
        check(self.out[:, 0].mean(dtype=np.float64), self.beta[0], self.limit)

    def peakmem_backward(self, name: str, dtype: str) -> None:
        m = fastbn.moments(self.x)
        _, dgamma, dbeta = fastbn.batch_norm_backward(self.dy, self.x, m, self.gamma, out=self.out)
        check(dbeta[0], self.dy[:, 0].sum(dtype=np.float64), self.limit)
        rstd = m.rstd(EPS)[0]
        xhat = (self.x[0, 0].astype(np.float64) - m.mean[0]) * rstd
        check(
            self.out[0, 0],
            self.gamma[0] * rstd * (self.dy[0, 0] - dbeta[0] / m.count - xhat * dgamma[0] / m.count),
            self.limit,
        )
