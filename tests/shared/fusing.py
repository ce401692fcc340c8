"""Models for the tests of fastbn.torch.fuse, and how a fused one is held against the model as it was."""

import copy
from typing import Any

import torch
from torch import nn

from fastbn.torch import SyncBatchNorm, fuse

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def used(model: Any, dtype: Any = torch.float64) -> Any:
    """The model in evaluation, with statistics and parameters as after some training."""
    for module in model.modules():
        if isinstance(module, NORMS):
            if module.running_mean is not None:
                module.running_mean.normal_(0.5)
                module.running_var.uniform_(0.3, 3.0)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.to(dtype).eval()


def left_in(model: Any) -> list[str]:
    """The names of the batch norms that are still there."""
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def check(model: Any, *inputs: Any, left: tuple[str, ...] = ()) -> Any:
    """The fused model gives what the model gives, which is as it was, and has the batch norms `left` and no other."""
    before = copy.deepcopy(model.state_dict())
    want = model(*inputs)
    fused = fuse(model)
    assert left_in(fused) == list(left)
    relative = TOLERANCE[inputs[0].dtype]
    torch.testing.assert_close(fused(*inputs), want, rtol=relative, atol=relative * float(want.detach().abs().max()))
    assert type(fused) is type(model)
    assert not any(module.training for module in fused.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    return fused


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
