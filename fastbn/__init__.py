"""Batch normalization as fast CPU (and, not yet run on one, GPU) kernels.

Faster than the big frameworks', more accurate, without one.
The names below are the public ones. Importing fastbn compiles nothing and touches no driver.
"""

from fastbn import kernels as kernels
from fastbn.arguments.errors import BackendUnavailable
from fastbn.backends import explain
from fastbn.batchnorm import BatchNorm
from fastbn.cpu.threads import get_num_threads, set_num_threads
from fastbn.functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_input,
    batch_norm_backward_reduce,
    batch_norm_inference,
    batch_norm_inference_backward,
    moments,
)
from fastbn.running import RunningMoments
from fastbn.statistics import Moments

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BatchNorm",
    "Moments",
    "RunningMoments",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_input",
    "batch_norm_backward_reduce",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "explain",
    "get_num_threads",
    "moments",
    "set_num_threads",
]
