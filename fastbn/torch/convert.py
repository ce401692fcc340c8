"""Swap the batch norms of a model, in place: by their class alone, so that all else about them stays as it is."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from fastbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, Served, check_module
from fastbn.torch.private import AnyBatchNorm
from fastbn.torch.sync import SyncBatchNorm

Model = TypeVar("Model", bound=nn.Module)

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
THEIRS: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in OURS.items()} | {
    SyncBatchNorm: nn.SyncBatchNorm
}
SERVED = {*OURS, *THEIRS}


def convert(model: Model) -> Model:
    """Let fastbn's kernels serve every `torch.nn.BatchNorm1d`, `2d` and `3d` of a model, in place.

    The modules stay the same objects, as do their parameters and buffers: optimizers, hooks, names, shared modules and
    the training flag are untouched, only the class changes. Others are left alone, with a warning that lists them:
    subclasses, `torch.nn.SyncBatchNorm` among them (see `convert_sync_batchnorm`), and what is a batch norm by its name
    alone, such as torchvision's FrozenBatchNorm2d. Revert before `torch.jit.script`, `torch.fx.symbolic_trace`,
    quantization or an export to ONNX, which look for PyTorch's own classes.

    Parameters
    ----------
    model : Module
        May be a batch norm itself.

    Returns
    -------
    Module
        The model.

    Warns
    -----
    UserWarning
        Where batch norms of other classes were left alone, see `left_alone`, or where the model has none at all.

    Raises
    ------
    TypeError
        `model` is no Module.
    """
    _swap(model, OURS)
    if others := left_alone(model):
        warnings.warn(
            f"fastbn.torch.convert left alone, for they are of other classes than PyTorch's own three: "
            f"{_listed(others)}",
            stacklevel=2,
        )
    elif not any(isinstance(module, Served) for module in model.modules()):
        given = f"{type(model).__module__}.{type(model).__qualname__}"
        warnings.warn(
            f"fastbn.torch.convert found no batch norm in {given}: nothing runs on fastbn's kernels", stacklevel=2
        )
    return model


def revert(model: Model) -> Model:
    """Undo `convert`: PyTorch's own batch norms again, in place, with what they have learned since.

    A `SyncBatchNorm` becomes `torch.nn.SyncBatchNorm`, which trains on GPUs alone. Classes derived from fastbn's are
    left alone, with a warning that lists them: a batch norm that was parametrized after `convert` among them, whose
    parametrizations are to be removed first.

    Parameters
    ----------
    model : Module

    Returns
    -------
    Module
        The model.

    Warns
    -----
    UserWarning
        Where batch norms of classes derived from fastbn's were left alone.

    Raises
    ------
    TypeError
        `model` is no Module.
    """
    _swap(model, THEIRS)
    if others := {name: type(m) for name, m in model.named_modules() if issubclass(type(m), Served)}:
        warnings.warn(
            f"fastbn.torch.revert left alone, for they are of classes derived from fastbn's: {_listed(others)}",
            stacklevel=2,
        )
    return model


def left_alone(model: nn.Module) -> dict[str, type[nn.Module]]:
    """The batch norms of a model that `convert` leaves alone.

    Subclasses of PyTorch's, and others by the name of their class.

    Parameters
    ----------
    model : Module

    Returns
    -------
    dict of str to type
        Name and class of each.

    Raises
    ------
    TypeError
        `model` is no Module.
    """
    check_module(model, "model")
    return {name: type(m) for name, m in model.named_modules() if type(m) not in SERVED and _is_batch_norm(m)}


def _listed(classes: dict[str, type[nn.Module]]) -> str:
    return ", ".join(
        f"{name or 'the model itself'} ({cls.__module__}.{cls.__qualname__})" for name, cls in classes.items()
    )


def _is_batch_norm(module: nn.Module) -> bool:
    """Also a scripted one, and by its name one that holds no other: a block does, a frozen one holds its activation."""
    _, *below = module.modules()
    return isinstance(module, AnyBatchNorm) or (
        _so_named(module) and not any(isinstance(m, AnyBatchNorm) or _so_named(m) for m in below)
    )


def _so_named(module: nn.Module) -> bool:
    # of what torch.jit.script made it from
    return "BatchNorm" in str(getattr(module, "original_name", type(module).__name__))


def _swap(model: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> None:
    check_module(model, "model")
    for module in model.modules():
        if (new := table.get(type(module))) is not None:
            module.__class__ = new  # as PyTorch's own lazy modules do it
            vars(module).pop("_exchange", None)  # of a SyncBatchNorm, with the other ranks
