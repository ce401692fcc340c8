"""fastbn in PyTorch models (the extra `torch`)."""

from fastbn.errors import MissingExtra

try:
    import torch as _torch  # noqa: F401 # asked for here, so that its absence has a name
except ImportError as error:
    raise MissingExtra("fastbn.torch needs PyTorch: pip install 'fastbn[torch]'") from error

from fastbn.torch.fuse import fuse
from fastbn.torch.sync import SyncBatchNorm, convert_sync_batchnorm

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm", "fuse"]
