"""What a call costs beside its kernel: small arrays, the first call, the import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import ClassVar

import numpy as np

import fastbn

from .cases import CASES, array, check, names


class CallOverhead:
    """Small arrays, where a call is mostly overhead."""

    params: ClassVar[list[str]] = names("small")
    param_names: ClassVar[list[str]] = ["shape"]

    def setup(self, name: str) -> None:
        self.x, self.dy = array(CASES[name], "float32"), array(CASES[name], "float32", seed=1)
        self.out = np.empty_like(self.x)
        self.layer = fastbn.BatchNorm(self.x.shape[1])
        check(self.layer(self.x), fastbn.batch_norm(self.x, backend="reference")[0], 1e-5)
        self.layer.backward(self.dy)

    def time_function(self, name: str) -> None:
        fastbn.batch_norm(self.x, out=self.out)

    def time_layer(self, name: str) -> None:
        self.layer(self.x, out=self.out)

    def time_layer_both_ways(self, name: str) -> None:
        self.layer(self.x, out=self.out)
        self.layer.backward(self.dy)


FIRST_CALL = """
import numpy as np, fastbn
layer = fastbn.BatchNorm(4)
x = np.arange(32, dtype=np.float32).reshape(8, 4)
y = layer(x)
layer.backward(y)
assert abs(y.mean()) < 1e-6
"""


def _seconds(code: str, cache: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "NUMBA_CACHE_DIR": cache})
    return time.perf_counter() - start


class ColdStart:
    """A fresh process, from the interpreter's start to the first gradient, in seconds."""

    params: ClassVar[list[str]] = ["import only", "warm cache", "empty cache"]
    param_names: ClassVar[list[str]] = ["state"]
    timeout = 600
    unit = "s"

    def setup(self, state: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        if state == "warm cache":
            _seconds(FIRST_CALL, self.folder.name)

    def teardown(self, state: str) -> None:
        self.folder.cleanup()

    def track_seconds(self, state: str) -> float:
        return _seconds("import fastbn" if state == "import only" else FIRST_CALL, self.folder.name)
