"""Batch normalization in PyTorch models: modules with PyTorch's own names and state, run by fastbn's kernels.

`convert(model)` swaps a model's batch norms in place, `revert(model)` swaps them back; `convert_sync_batchnorm(model)`
lets processes share a batch; `fuse(model)` folds them away for inference. PyTorch comes with the extra `torch`.
"""

from fastbn.arguments.errors import MissingExtra

try:
    import torch as _torch  # noqa: F401 # asked for here, so that its absence has a name
except ImportError as error:
    raise MissingExtra("fastbn.torch needs PyTorch: pip install 'fastbn[torch]'") from error

from fastbn.torch.allocator import empty_cache
from fastbn.torch.convert import convert, left_alone, revert
from fastbn.torch.eligibility import explain
from fastbn.torch.fuse import fuse
from fastbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.torch.sync import SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "convert",
    "convert_sync_batchnorm",
    "empty_cache",
    "explain",
    "fuse",
    "left_alone",
    "revert",
]
