"""The backend protocol, the ordered registry, and which backend serves a call.

Where the array lives decides (host array: cpu); ``backend=`` or FASTBN_BACKEND overrides. A request that can't be
served raises `BackendUnavailable` and names what is registered and why each declines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import DTypeLike

from fastbn.arguments import checks, config, dtypes, layout, scalars
from fastbn.arguments.errors import BackendUnavailable
from fastbn.arguments.foreign import on_device
from fastbn.cpu import interrupts, threads
from fastbn.statistics import Moments


class Backend(Protocol):
    """Batch normalization of arrays as users hold them: of `cpu.backend.Host` and `cuda.backend.Device`.

    Each function checks its arguments, before anything is allocated, and does what the public one says that its
    docstring names. Arrays are Any: NumPy's, what becomes one, or a GPU library's.
    """

    def moments(self, x: Any, axis: int) -> Moments:
        """`fastbn.moments`."""

    def forward(self, x: Any, gamma: Any, beta: Any, axis: int, eps: float, out: Any) -> tuple[Any, Moments]:
        """`fastbn.batch_norm`."""

    def inference(self, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, axis: int, eps: float, out: Any) -> Any:
        """`fastbn.batch_norm_inference`."""

    def backward(
        self, dy: Any, x: Any, moments: Moments, gamma: Any, axis: int, eps: float, out: Any
    ) -> tuple[Any, Any, Any]:
        """`fastbn.batch_norm_backward`."""

    def inference_backward(
        self, dy: Any, x: Any, mean: Any, var: Any, gamma: Any, axis: int, eps: float, out: Any
    ) -> tuple[Any, Any, Any]:
        """`fastbn.batch_norm_inference_backward`."""

    def grad_reduce(self, dy: Any, x: Any, mean: Any, var: Any, axis: int, eps: float) -> tuple[Any, Any]:
        """`fastbn.batch_norm_backward_reduce`."""

    def grad_input(
        self,
        dy: Any,
        x: Any,
        mean: Any,
        var: Any,
        sum_dy: Any,
        sum_dy_xhat: Any,
        count: int,
        gamma: Any,
        axis: int,
        eps: float,
        out: Any,
    ) -> Any:
        """`fastbn.batch_norm_backward_input`."""

    def track(self, moments: Moments, freedom: float, weight: float, running_mean: Any, running_var: Any) -> None:
        """Running statistics move towards moments.mean and moments.m2 / freedom by `weight`, in place."""

    def check_part(
        self,
        x: Any,
        inputs: tuple[Any, ...],
        axis: int,
        out: Any,
        parameters: Mapping[str, Any],
        statistics: Mapping[str, Any],
    ) -> tuple[int, dtypes.Dtype]:
        """What a call on one part of a batch would refuse, refused; else (channels, dtype of parameters)."""

    def check_features(self, x: Any, axis: int, channels: int, dtype: dtypes.Dtype) -> Any:
        """An input, as calls take it, that goes with a layer's parameters, of so many channels and this dtype."""

    def same_memory(self, a: Any, b: Any) -> bool:
        """Whether two arrays are the same elements of memory."""

    def statistic_copy(self, values: Any) -> Any:
        """A copy of a layer's running statistics in float64."""

    def parameter_copy(self, values: Any, dtype: dtypes.Dtype) -> Any:
        """A copy of a layer's gamma, as it is now."""

    def describe(self, dims: tuple[int, ...], dtype: dtypes.Dtype) -> str:
        """What runs for a canonical shape, for a person to read."""


class Entry(NamedTuple):
    """One line of the registry."""

    name: str
    decline: Callable[[], str | None]  # why it can't serve on this machine; None where it can
    load: Callable[[], Backend]
    device: bool = False  # whether it takes arrays on a GPU


def _cuda_declines() -> str | None:
    from fastbn.cuda import buffers

    return buffers.declines()


def _cuda() -> Backend:
    from fastbn.cuda import backend

    return backend.Device()


def _cpu() -> Backend:
    from fastbn.cpu import backend, passes

    return backend.Host(passes)


def _reference() -> Backend:
    from fastbn import reference
    from fastbn.cpu import backend

    return backend.Host(reference)


REGISTRY: tuple[Entry, ...] = (
    Entry("cuda", _cuda_declines, _cuda, device=True),
    Entry("cpu", lambda: None, _cpu),
    Entry("reference", lambda: None, _reference),
)
_loaded: dict[str, Backend] = {}


def backend_for(x: Any, name: str | None = None, num_threads: int | None = None, stream: Any = None) -> Backend:
    """The backend that serves a call on x, on so many threads of the host, or on a stream of x's GPU.

    Parameters
    ----------
    x : array_like
        Asked only where it lives.
    name : str, optional
        An explicit request, else FASTBN_BACKEND, else where x lives.
    num_threads, stream
        As in `fastbn.batch_norm`; threads are the host's, and change nothing on a GPU.

    Raises
    ------
    BackendUnavailable
        The requested backend is not registered, declines, or takes no such array.
    TypeError
        A stream for an array on the host.
    """
    if type(x) is not np.ndarray and on_device(x):
        check_device(name)
        from fastbn.cuda import backend

        return backend.Device(stream)
    if stream is not None:
        raise TypeError("stream: given one for an array on the host, want an array on a GPU, or no stream")
    if num_threads is None:
        return select(name)
    threads.check(num_threads)
    from fastbn.cpu.backend import Limited

    return cast(Backend, Limited(select(name), num_threads))


def select(name: str | None = None) -> Backend:
    """The backend that serves a host array.

    Parameters
    ----------
    name : str, optional
        An explicit request, else FASTBN_BACKEND, else the CPU.

    Raises
    ------
    BackendUnavailable
        The requested backend is not registered or declines.
    """
    if name is None:
        wanted = config.BACKEND or "cpu"
    else:
        wanted = name if type(name) is str else scalars.check_backend(name) or config.BACKEND or "cpu"
    backend = _loaded.get(wanted)
    return backend if backend is not None else _load(wanted, given=name is not None)


def check_device(name: str | None = None) -> None:
    """BackendUnavailable where the CUDA backend does not serve an array on a GPU.

    Parameters
    ----------
    name : str, optional
        An explicit request, else FASTBN_BACKEND, else CUDA, for there the array lives.
    """
    wanted = name if type(name) is str else scalars.check_backend(name) or config.BACKEND or "cuda"
    if wanted != "cuda":
        raise BackendUnavailable(
            f"{_request(wanted, name is not None)} can't take an array on a GPU: copy it to the host first, or name no "
            f"backend"
        )
    from fastbn.cuda import buffers

    buffers.check_served()


def _request(wanted: str, given: bool) -> str:
    return f"backend={wanted!r}" if given else f"FASTBN_BACKEND={wanted!r}"


def _load(wanted: str, given: bool) -> Backend:
    for entry in REGISTRY:
        if entry.name == wanted and entry.decline() is None:
            if entry.device:
                raise BackendUnavailable(
                    f"{_request(wanted, given)} takes arrays on a GPU, and this one lives on the host: copy it there "
                    f"first"
                )
            with interrupts.deferred():  # numba can't be imported again where that was broken off
                return _loaded.setdefault(wanted, entry.load())
    raise BackendUnavailable(f"{_request(wanted, given)} can't be served. Registered: {'; '.join(availability())}.")


def availability() -> list[str]:
    """One line per registered backend: its name, and 'available' or why it declines."""
    return [f"{entry.name}: {entry.decline() or 'available'}" for entry in REGISTRY]


class Explanation(NamedTuple):
    """What will run for a shape, and why nothing else; `str()` gives the text."""

    backend: str
    kind: str
    dims: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return self.text


def explain(
    shape: tuple[int, ...],
    dtype: DTypeLike = np.float32,
    axis: int = 1,
    *,
    channels_last: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend, kernel and schedule will run for an array, and why the others were refused.

    Parameters
    ----------
    shape : tuple of int
        Of the array, which need not exist.
    dtype : dtype
        float16, bfloat16 (of `ml_dtypes`), float32 or float64.
    axis : int
        The channel axis.
    channels_last : bool
        Whether the channels are innermost in memory (as a transposed view of channels-last data has them).
    backend : str, optional
        An explicit request.

    Returns
    -------
    Explanation
        A tuple (backend, kind, dims, text); ``print`` shows the text.

    Raises
    ------
    BackendUnavailable
        The request can't be served; "cuda" is explained without a GPU too, with the bytes that its kernels move.
    TypeError, ValueError
        As the functions would raise for such an array.
    MissingExtra
        "bfloat16" where `ml_dtypes` is not installed.
    """
    backend, channels_last = scalars.check_backend(backend), scalars.flag(channels_last, "channels_last")
    shape = checks.check_shape(shape)
    axis = checks.check_axis(shape, axis)
    x_dtype = checks.check_dtype(dtype)
    plan = layout.plan_for(shape, x_dtype, axis, channels_last)
    name = config.BACKEND or "cpu" if backend is None else backend
    if name == "cuda":  # which needs no GPU to be explained
        from fastbn.cuda import cost

        home = "requested" if (reason := _cuda_declines()) is None else f"requested; not served here: {reason}"
        schedule = cost.describe(plan.dims, x_dtype) if plan.count else ""
    else:
        served = select(backend)
        home = "requested" if backend or config.BACKEND else "the array lives on the host"
        schedule = served.describe(plan.dims, x_dtype) if plan.count else ""
    dims = " x ".join(str(n) for n in plan.dims)
    lines = [
        f"shape {shape}, {x_dtype}, channel axis {axis}: {plan.channels} channels of {plan.count} values",
        f"canonical view: {plan.kind} ({'R x C' if len(plan.dims) == 2 else 'N x C x S'} = {dims}), no copy",
        f"backend: {name} ({home})",
        schedule or "schedule: nothing to do, the array is empty",
        "other backends:",
        *(f"  {line}" for entry, line in zip(REGISTRY, availability(), strict=True) if entry.name != name),
    ]
    return Explanation(name, plan.kind, plan.dims, "\n".join(lines))
