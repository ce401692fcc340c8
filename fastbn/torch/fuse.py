"""Batch norms of a PyTorch model folded into the convolutions and linear layers before them, for inference.

Pairs are found by torch.fx, as torch.fx.experimental.optimization finds them. The weights are folded in float64:
torch.nn.utils.fusion rounds at every step in the dtype of the weights.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fastbn.fold import fold
from fastbn.torch.modules import check_module
from fastbn.torch.sync import SyncBatchNorm

__all__ = ["fuse"]

Pair = tuple[str, str]  # names of a layer and of the batch norm after it

NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}
SYNCHRONIZED = (nn.SyncBatchNorm, SyncBatchNorm)  # which take any rank
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation in which batch norms are part of the layers before them.

    A batch norm is folded into the Linear, Conv1d to 3d or ConvTranspose1d to 3d whose output goes to it alone. Both
    must be modules that the model calls once, by PyTorch's own forward or fastbn's, without hooks or parametrizations,
    the batch norm in evaluation with running statistics; others are left as they are. Folding is in float64, rounded
    once to the dtype of the weights.

    Pairs are found by `torch.fx.symbolic_trace`. A model that can't be traced is searched part by part: what can be
    traced of it, and neighbours in `torch.nn.Sequential`.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation; left as it is.

    Returns
    -------
    torch.nn.Module
        Of the same class and in evaluation, with new modules in the places of the pairs: the layer with its folded
        weight and bias, and an Identity (for a BatchNorm1d or SyncBatchNorm, one that refuses inputs of another rank).

    Raises
    ------
    TypeError
        Not a module.
    RuntimeError
        A model in training mode.
    """
    check_module(model, "model")
    if model.training:
        raise RuntimeError(
            "model: given in training mode, where batch norms use their batch's statistics: call model.eval() first"
        )
    fused = copy.deepcopy(model)
    for before, after in _pairs(model):
        layer, norm = _folded(fused.get_submodule(before), fused.get_submodule(after))
        _put(fused, before, layer)
        _put(fused, after, norm)
    return fused


class Folded(nn.Module):
    """Where a batch norm of any rank was: x as it is, of the rank in which both layers share a channel axis."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def extra_repr(self) -> str:
        """Show the rank."""
        return f"rank={self.rank}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x; ValueError where the batch norm would have normalized another axis than the one it was folded along."""
        if x.dim() != self.rank:
            raise ValueError(
                f"x: given rank {x.dim()}, want {self.rank}: the batch norm here was folded into the layer before it"
            )
        return x


def _folded(layer: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What stands in their places: new modules, for the old ones may be known by other references."""
    new = copy.deepcopy(layer)
    groups = getattr(layer, "groups", 1)
    weight, bias = fold(norm, layer.weight, layer.bias, transposed=isinstance(layer, TRANSPOSED), groups=groups)
    trained = bool(getattr(layer.weight, "requires_grad", False))
    new.weight, new.bias = nn.Parameter(weight, trained), nn.Parameter(bias, trained)
    one_rank = isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d))
    place = nn.Identity() if one_rank else Folded(new.weight.dim())  # of a batch of the layer's outputs
    return new, place.eval()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _pairs(model: nn.Module) -> list[Pair]:
    """All that can be folded."""
    # traced is a copy, on which stays what forward leaves behind on `self`; it shares the parameters
    shadow = copy.deepcopy(
        model, {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    )
    names = Counter(id(module) for _, module in shadow.named_modules(remove_duplicate=False))
    pairs = []
    for before, after in _search(shadow, ""):
        layer, norm = shadow.get_submodule(before), shadow.get_submodule(after)
        if names[id(layer)] == names[id(norm)] == 1 and _together(layer, norm):
            pairs.append((before, after))
    return pairs


def _search(module: nn.Module, prefix: str) -> Iterator[Pair]:
    """Neighbours in a module, traced as a whole or else part by part."""
    pairs = _traced(module)
    if pairs is not None:
        yield from ((prefix + before, prefix + after) for before, after in pairs)
        return
    children = [(prefix + name, child) for name, child in module.named_children()]
    if type(module).forward is nn.Sequential.forward:
        yield from ((before, after) for (before, _), (after, _) in itertools.pairwise(children))
    for name, child in children:
        if next(child.children(), None) is not None:
            yield from _search(child, name + ".")


class _Tracer(fx.Tracer):
    """Does not look into layers and batch norms, subclasses of other packages among them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_layer(m) or _is_norm(m) or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module) -> set[Pair] | None:
    """Neighbours with a module's optional arguments and without; None where it can't be traced."""
    pairs: list[set[Pair]] = []
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        optional = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        for constants in ({}, optional) if optional else ({},):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pairs.append(set(_neighbours(_Tracer().trace(module, constants or None))))
    except Exception:  # whatever the model's code raises when it is given no tensor
        return None
    return set.intersection(*pairs)


def _neighbours(graph: fx.Graph) -> Iterator[Pair]:
    """Calls of two modules, each called once, the second of which alone takes what the first gives."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # whose parameters are used elsewhere
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            continue
        source = node.all_input_nodes[0]
        before, after = str(source.target), str(node.target)
        once = source.op == "call_module" and calls[before] == calls[after] == 1 and len(source.users) == 1
        if once and not {before, after} & read:
            yield before, after


def _together(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether the batch norm can be folded into the layer."""
    if not (_is_layer(layer) and _is_norm(norm)) or norm.training or norm.running_mean is None:
        return False
    if any(getattr(module, hooks) for module in (layer, norm) for hooks in HOOKS) or parametrize.is_parametrized(layer):
        return False
    norm_class = next(norms for layers, norms in NORMS.items() if isinstance(layer, layers))
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    # not pruned, normalized or quantized
    plain = type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()
    return plain and isinstance(norm, (norm_class, *SYNCHRONIZED)) and outputs == norm.num_features


def _is_layer(module: nn.Module) -> bool:
    """A layer that computes what PyTorch's own does: a subclass may change its weight or its output first."""
    if not isinstance(module, tuple(NORMS)):
        return False
    methods = ("forward",) if isinstance(module, nn.Linear) else ("forward", "_conv_forward")
    homes = ("torch.nn.modules.linear", "torch.nn.modules.conv")
    return all(_home(module, method) in homes for method in methods if hasattr(module, method))


def _is_norm(module: nn.Module) -> bool:
    """A batch norm that computes what PyTorch's own does: a subclass may also activate."""
    if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *SYNCHRONIZED)):
        return False
    home = _home(module, "forward")
    return home == "torch.nn.modules.batchnorm" or home.startswith("fastbn.")


def _home(module: nn.Module, method: str) -> str:
    """The package and file that a method comes from; "" where the object has its own."""
    if method in vars(module):
        return ""
    return next(cls.__module__ for cls in type(module).__mro__ if method in vars(cls))
