"""Batch normalization over the processes of `torch.distributed`: PyTorch's SyncBatchNorm, on the CPU too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.lazy import LazyModuleMixin

from fastbn.arguments import scalars
from fastbn.backends import backend_for
from fastbn.distributed import Exchange
from fastbn.functional import batch_norm_backward_reduce
from fastbn.statistics import Moments
from fastbn.torch import eligibility, tensors
from fastbn.torch.eligibility import parameter_dtype
from fastbn.torch.modules import Served, check_module
from fastbn.torch.private import AnyBatchNorm, is_functional, is_zero_tensor, profiled, shown_as

HALF = (torch.float16, torch.bfloat16)


class SyncBatchNorm(Served, AnyBatchNorm):
    """`torch.nn.SyncBatchNorm` with fastbn's kernels.

    In training, the statistics are those of the batches of all ranks together.
    It runs on the CPU (gloo) as on CUDA, with other numbers of values on other ranks and none on some. Same parameters,
    buffers and `state_dict` as PyTorch's; not a subclass of it, which DistributedDataParallel refuses on the CPU. In
    evaluation, without an initialized process group, or alone in one, it is `BatchNorm2d` for any rank; on a GPU that
    fastbn can't serve, PyTorch's SyncBatchNorm.

    Every rank must call the same modules in the same order. A forward is one collective and a backward one, where x
    needs a gradient; the first is preceded by one that compares the channels. Statistics are merged in rank order in
    float64 on the host, and are the same bits on every rank. Gradients of weight and bias are the sums of this rank,
    for DistributedDataParallel to add up. No double backward.

    Parameters
    ----------
    num_features : int
        Channels, C, of inputs of shape (N, C, ...).
    eps : float
        Added to the variance, in units of x squared.
    momentum : float or None
        Weight of the new value in the running statistics; None for the cumulative average.
    affine : bool
        Whether there are parameters weight and bias: float32 beside half and single input, float64 beside double.
    track_running_stats : bool
        Whether running statistics are kept.
    process_group : torch.distributed.ProcessGroup, optional
        Whose ranks share a batch; default all. A deep copy shares it.
    device, dtype
        As in `torch.nn.BatchNorm2d`.
    options
        What newer versions of PyTorch's module take beside: `bias`.

    Raises
    ------
    ValueError
        In forward: below two dimensions, no channels, one value per channel on all ranks together, other channels on
        other ranks; beside other ranks, `eps` that is not positive or not finite, `momentum` beyond float64.
    TypeError
        In forward, beside other ranks: `eps` or `momentum` is no number.
    RuntimeError
        In forward: as PyTorch's for channels and dtypes that don't go together. In both passes: another rank failed.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015.
    """

    RANKS = range(2, 65)  # of PyTorch's tensors

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **options
        )
        self.process_group = process_group
        self._exchange: Exchange | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_exchange": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.process_group)] = self.process_group  # which can't be copied
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call] # as torch has it
        return twin

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _check_non_zero_input_channels(self, input: Tensor) -> None:
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, scale and shift.

        In training with the statistics of all ranks, which the running statistics follow.

        Parameters
        ----------
        input : Tensor, shape (N, C, ...)
            On some ranks it may be empty. Its memory format is the result's.
        """
        eligibility.refuse_proxy(self, input)
        group = self._group() if self.training else None
        if group is not None and _served(input):
            y: Tensor = self._synchronized(input, group)
            return y
        if group is not None:
            # it asks for no more of self than is here
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        return super().forward(input)

    def _group(self) -> Any:
        """The process group of more than one rank that this process shares its batches with, or None."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        group = self.process_group or distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None

    @torch.compiler.disable  # type: ignore[untyped-decorator] # a collective and NumPy views: nothing to trace
    def _synchronized(self, input: Tensor, group: Any) -> Any:
        if self._exchange is None or self._exchange.comm is not group:
            self._exchange = Exchange(group, self.num_features)
        parameters: list[Tensor | None] = [self.weight, self.bias]
        with self._exchange.declining("forward"):
            self._check_input_dim(input)
            self._check_non_zero_input_channels(input)
            self._let_pytorch_refuse(input)
            if self.momentum is not None:
                scalars.number(self.momentum, "momentum")
            if input.dtype in HALF:  # a converted model's half parameters: fastbn takes float32 beside half input
                parameters = [p.float() if p is not None and p.dtype in HALF else p for p in parameters]
        # as above
        return _Synchronized.apply(input, *parameters, self.eps, self._exchange, self._track)  # type: ignore[no-untyped-call]

    def _let_pytorch_refuse(self, input: Tensor) -> None:
        """Raise PyTorch's error, in its words, for input that does not go with this module."""
        dtypes = (parameter_dtype(input), input.dtype)
        alike = all(
            value is None or (value.dtype in dtypes and value.shape == (self.num_features,))
            for value in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        if not (alike and input.is_floating_point() and input.size(1) == self.num_features):
            mean, var = (None if value is None else value.clone() for value in (self.running_mean, self.running_var))
            functional.batch_norm(input.detach(), mean, var, self.weight, self.bias, True, 0.0, self.eps)

    def _track(self, m: Moments) -> None:
        if not (
            self.track_running_stats and self.running_mean is not None and self.running_var is not None and m.count
        ):
            return
        assert self.num_batches_tracked is not None  # a buffer beside the other two
        self.num_batches_tracked.add_(1)
        weight = (
            1.0 / int(self.num_batches_tracked) if self.momentum is None else scalars.number(self.momentum, "momentum")
        )
        for running, batch in ((self.running_mean, m.mean), (self.running_var, m.var(ddof=1))):
            running.copy_((1.0 - weight) * running.double() + weight * torch.as_tensor(batch, device=running.device))

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replace every batch norm of a model by one that is synchronized, in place; see `convert_sync_batchnorm`."""
        return _converted(cls, module, process_group, {})


class _Synchronized(torch.autograd.Function):
    """Training over all ranks: a collective forward, and one backward where x needs a gradient, as PyTorch has it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        exchange: Exchange,
        track: Callable[[Moments], None],
    ) -> Tensor:
        with exchange.declining("forward"):
            y = torch.empty_like(x)  # in the memory format of x
            *inputs, out = map(_array, (x, weight, bias, y))
            served = backend_for(out)
        _, m = _shown("sync_batch_norm", exchange.forward, served, *inputs, 1, eps, out)
        track(m)
        ctx.save_for_backward(x, weight)
        ctx.moments, ctx.eps, ctx.exchange = m, eps, exchange
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        m, eps, exchange = ctx.moments, ctx.eps, ctx.exchange
        dx: Tensor | None = None
        if not ctx.needs_input_grad[0]:  # the first layer: nobody waits for it
            x, _ = map(_array, ctx.saved_tensors)
            reduce = batch_norm_backward_reduce
            dbias, dweight = _shown("sync_batch_norm_backward", reduce, _array(dy), x, m.mean, m.var(), 1, eps)
        else:
            with exchange.declining("backward"):
                x, weight = ctx.saved_tensors
                dx = torch.empty_like(x)
                *inputs, gamma, out = map(_array, (dy, x, weight, dx))
                served = backend_for(out)
            run = exchange.backward
            _, dweight, dbias = _shown("sync_batch_norm_backward", run, served, *inputs, m, gamma, 1, eps, out)
        grads = (
            torch.as_tensor(grad).to(parameter_dtype(dy)) if needed else None
            for grad, needed in zip((dweight, dbias), ctx.needs_input_grad[1:3], strict=True)
        )
        return dx, *grads, None, None, None


def _shown(name: str, run: Callable[..., Any], *arguments: Any) -> Any:
    return shown_as(name, run, *arguments) if profiled() else run(*arguments)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Replace every batch norm of a model (`nn.BatchNorm*d` and subclasses) by a `SyncBatchNorm`.

    As PyTorch's classmethod does.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place; a batch norm by itself is left as it is.
    process_group : torch.distributed.ProcessGroup, optional
        Whose ranks share a batch; default all.

    Returns
    -------
    torch.nn.Module
        `module`, or the SyncBatchNorm for a batch norm. Parameters and buffers are the same objects, training flag and
        qconfig the same values; a module that the model has in two places is one module again.

    Raises
    ------
    TypeError
        No module.
    ValueError
        A lazy batch norm that has not seen its channels yet.
    """
    check_module(module, "module")
    return _converted(SyncBatchNorm, module, process_group, {})


def _converted(
    cls: type[SyncBatchNorm], module: nn.Module, process_group: Any, done: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module in done:
        return done[module]
    converted = done[module] = module
    if isinstance(module, AnyBatchNorm):
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            given = f"given {type(module).__name__} without channels yet"
            raise ValueError(f"{given}; want one that has seen a batch: run the model once")
        converted = done[module] = _counterpart(cls, module, process_group)
    for name, child in list(module._modules.items()):
        if child is not None:
            converted.add_module(name, _converted(cls, child, process_group, done))
    return converted


def _counterpart(cls: type[SyncBatchNorm], module: AnyBatchNorm, process_group: Any) -> SyncBatchNorm:
    new = cls(module.num_features, module.eps, module.momentum, False, module.track_running_stats, process_group)
    new.affine, new.weight, new.bias = module.affine, module.weight, module.bias
    new.running_mean, new.running_var = module.running_mean, module.running_var
    new.num_batches_tracked, new.training = module.num_batches_tracked, module.training
    if hasattr(module, "qconfig"):
        new.qconfig = module.qconfig
    return new


def _served(tensor: Tensor) -> bool:
    """Whether fastbn takes tensors on this device."""
    return eligibility.gpu_declines() is None if tensor.is_cuda else tensor.is_cpu


def _array(tensor: Tensor | None) -> Any:
    """What fastbn's functions take for a tensor of any kind."""
    if tensor is None:
        return None
    tensor = tensor.detach().resolve_neg()
    # the next two have no memory, in place of which NumPy takes any, or refuses
    if is_functional(tensor):
        raise TypeError(
            "given a functional tensor, which has no memory; want a plain one: torch._from_functional_tensor(x)"
        )
    return tensors.array(tensor.clone() if is_zero_tensor(tensor) else tensor)
