"""The backend protocol, the ordered registry, and which backend serves a call.

A backend is a module that satisfies `Backend`. Where the array lives decides (host array: cpu); ``backend=`` or
FASTBN_BACKEND overrides. A request that can't be served raises `BackendUnavailable` and names what is registered and
why each declines.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn.arguments import checks, config, layout, scalars
from fastbn.arguments.errors import BackendUnavailable
from fastbn.cpu import interrupts
from fastbn.statistics import Moments

Array = NDArray[Any]
Sums = tuple[NDArray[np.float64], NDArray[np.float64]]


class Backend(Protocol):
    """The contract: canonical views (N, C, S) or (R, C) in, `out` given by the caller, float64 statistics (C,).

    x, dy and `out` are of one dtype: float16, bfloat16, float32 or float64. `gamma` and `beta` are float64 beside
    float64 and float32 beside all others, or None. A half result is the float32 one, rounded to nearest even. `out` may
    be x or dy itself. Statistics and sums are allocated by the backend.
    """

    def moments(self, x: Array) -> Moments:
        """Count, mean and m2 of each channel."""

    def rstd(self, m2: Array, count: float, eps: float) -> Array:
        """1 / sqrt(m2 / count + eps), float64 of shape (C,)."""

    def track(self, m: Moments, freedom: float, weight: float, running_mean: Array, running_var: Array) -> None:
        """Running statistics, of the dtype of parameters, move towards m.mean and m.m2 / freedom by `weight`.

        In place.
        """

    def normalize(
        self, x: Array, mean: Array, rstd: Array, gamma: Array | None, beta: Array | None, out: Array
    ) -> Array:
        """y = gamma * (x - mean) * rstd + beta."""

    def grad_reduce(self, dy: Array, x: Array, mean: Array, rstd: Array) -> Sums:
        """(sum of dy, sum of dy * xhat)."""

    def grad_input(
        self,
        dy: Array,
        x: Array,
        mean: Array,
        rstd: Array,
        gamma: Array | None,
        sums: Sums | None,
        count: int,
        out: Array,
    ) -> Array:
        """dx; `sums` None for constant statistics (inference)."""

    def forward(
        self, x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array
    ) -> tuple[Array, Moments]:
        """moments + normalize, fused: (y, moments)."""

    def backward(
        self,
        dy: Array,
        x: Array,
        mean: Array,
        rstd: Array,
        gamma: Array | None,
        out: Array,
        training: bool = True,
        grads: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """grad_reduce + grad_input, fused: (dx, dgamma, dbeta).

        `grads` (2, C) takes dbeta, dgamma in the dtype of parameters.
        """

    def compact(
        self,
        method: Literal["forward", "backward", "normalize", "inference"],
        shape: tuple[int, ...],
        dims: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> Callable[..., Any] | None:
        """A method with all decided, for C-contiguous arrays of `shape` that reshape to `dims`.

        None where that saves nothing.
        "inference" is `rstd` and `normalize` in one, of memory: addresses of x, y, mean, var, gamma and beta, and eps;
        perhaps a team of threads (`kernels._team.Runtime`). Mean and var are of the dtype of parameters; 0 is the
        address of an absent gamma or beta.
        """

    def describe(self, dims: tuple[int, ...], dtype: np.dtype[Any]) -> str:
        """What runs for a canonical shape, for a person to read."""


class Entry(NamedTuple):
    """One line of the registry."""

    name: str
    module: str
    decline: Callable[[], str | None]  # why it can't serve on this machine; None where it can
    automatic: bool  # whether an array's home alone may choose it
    device: bool = False  # whether it takes arrays on a GPU


def _cuda_declines() -> str | None:
    from fastbn.cuda import buffers

    return buffers.declines()


def _serves() -> str | None:
    return None


REGISTRY: tuple[Entry, ...] = (
    Entry("cuda", "fastbn.cuda.passes", _cuda_declines, True, True),
    Entry("cpu", "fastbn.cpu.backend", _serves, True),
    Entry("reference", "fastbn.reference", _serves, False),
)
_loaded: dict[str, Backend] = {}


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
    wanted = name if type(name) is str else scalars.check_backend(name) or config.BACKEND or "cpu"
    backend = _loaded.get(wanted)
    return backend if backend is not None else _load(wanted, given=name is not None)


def select_device(name: str | None = None) -> None:
    """Make sure that the CUDA backend serves an array on a GPU.

    Parameters
    ----------
    name : str, optional
        An explicit request, else FASTBN_BACKEND, else CUDA, for there the array lives.

    Raises
    ------
    BackendUnavailable
        Another backend is requested, or CUDA declines.
    """
    wanted = name if type(name) is str else scalars.check_backend(name) or config.BACKEND or "cuda"
    if wanted != "cuda":
        raise BackendUnavailable(
            f"{_request(wanted, name is not None)} can't take an array on a GPU: copy it to the host first, or name "
            f"no backend"
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
                backend = cast(Backend, importlib.import_module(entry.module))
            _loaded[wanted] = backend
            return backend
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
    kind = checks.check_dtype(dtype)
    plan = layout.plan_for(shape, kind, axis, channels_last)
    name = config.BACKEND or "cpu" if backend is None else backend
    if name == "cuda":  # which needs no GPU to be explained
        from fastbn.cuda import cost

        home = "requested" if (reason := _cuda_declines()) is None else f"requested; not served here: {reason}"
        schedule = cost.describe(plan.dims, kind) if plan.count else ""
    else:
        served = select(backend)
        home = "requested" if backend or config.BACKEND else "the array lives on the host"
        schedule = served.describe(plan.dims, kind) if plan.count else ""
    dims = " x ".join(str(n) for n in plan.dims)
    lines = [
        f"shape {shape}, {kind}, channel axis {axis}: {plan.channels} channels of {plan.count} values",
        f"canonical view: {plan.kind} ({'R x C' if len(plan.dims) == 2 else 'N x C x S'} = {dims}), no copy",
        f"backend: {name} ({home})",
        schedule or "schedule: nothing to do, the array is empty",
        "other backends:",
        *(f"  {line}" for entry, line in zip(REGISTRY, availability(), strict=True) if entry.name != name),
    ]
    return Explanation(name, plan.kind, plan.dims, "\n".join(lines))
