"""The layer: parameters, running statistics, training and evaluation, PyTorch's state_dict."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import distributed, running
from fastbn.arguments import checks, config, dtypes, scalars
from fastbn.backends import Backend, backend_for
from fastbn.cpu import threads
from fastbn.cuda import placement
from fastbn.statistics import Moments, affine_of

sys.modules["fastbn.state"] = sys.modules[__name__]  # where older pickles look for `_Saved`

Array = NDArray[Any]
Layer = TypeVar("Layer", bound="BatchNorm")


class IncompatibleKeys(NamedTuple):
    """What a state had not, or too much, as PyTorch's `load_state_dict` returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


# PyTorch's names of a layer's arrays
STATE_KEYS = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}
# What an option may be, and becomes: of the constructor, or assigned later. A call looks at those that its functions
# would not.
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "num_features": checks.check_channels,
    "eps": partial(checks.check_eps, training=False),
    "momentum": checks.check_momentum,
    "axis": scalars.check_axis,
    "dtype": checks.check_parameter_dtype,
    "backend": scalars.check_backend,
    "num_threads": threads.check,
    "num_batches_tracked": partial(scalars.count, name="num_batches_tracked"),
    **{
        name: partial(scalars.flag, name=name)
        for name in ("affine", "track_running_stats", "unbiased_running_var", "training")
    },
}


class Saved(NamedTuple):
    """What backward needs of the last forward, as it was then."""

    x: Any  # not a copy
    statistics: Any  # Moments of the batch, or the constants (mean, var) of inference
    gamma: Any  # a copy: optimizers change it in place
    shifted: bool  # there was a beta
    axis: int
    eps: float
    across: Any  # the `Exchange`, where the statistics are of the batch of all ranks


class _Saved(NamedTuple):
    """The last forward in pickles of before there was `Saved`: read, and dropped."""

    x: Any
    statistics: Any
    overwritten: Any
    across: Any


class Gone(NamedTuple):
    """Why the last forward has no backward."""

    why: str
    across: Any


BEFORE = "backward before forward: call the layer on x first, y = bn(x)"
OVERWRITTEN = "backward needs the x of the forward, which was overwritten by out=x: give another out, or none"
EVALUATION = (
    "backward after a forward in evaluation, which keeps no x unless asked to: bn.eval(backward=True), then y = bn(x)"
)
FAILED = "backward after a forward that raised an error: call the layer again, y = bn(x)"


class BatchNorm:
    """Batch normalization of one channel axis, with PyTorch's semantics.

    In training each channel is normalized by its batch's mean and biased variance, and the running statistics move
    towards the batch's (the variance unbiased). In evaluation the running statistics normalize.

    Parameters
    ----------
    num_features : int
        Channels, C.
    eps : float
        Added to the variance, in units of x squared.
    momentum : float or None
        Weight of the NEW value in the running statistics; None for the cumulative average over all batches.
    affine : bool
        Whether there are parameters gamma (ones) and beta (zeros); either may be set to None later.
    track_running_stats : bool
        Whether running statistics are kept; without them evaluation uses the batch's. Set to False later, training
        leaves them as they are.
    axis : int
        The channel axis.
    dtype : dtype
        Of parameters and running statistics: float32, for x of float16, bfloat16 and float32, or float64, for x of
        float64.
    backend : str, optional
        "cpu" or "reference"; default where the array lives.
    unbiased_running_var : bool
        Whether the running variance takes m2 / (count - 1), as PyTorch; False for ONNX, Keras, Flax.
    num_threads : int, optional
        Of the kernels in each call, from 1 to NUMBA_NUM_THREADS; changes speed, never a bit. Default as
        `set_num_threads` says.
    comm : mpi4py.MPI.Intracomm or torch.distributed.ProcessGroup, optional
        In training the statistics are those of the batches of all its ranks together: each must call the same layers in
        the same order. A forward is one collective and a backward one, the first of all after one that compares the
        channels; statistics, of arrays on a GPU too, are merged on the host. dgamma and dbeta stay the sums of this
        rank, for the optimizer to add up over the ranks, as PyTorch's SyncBatchNorm has it. Copies of a layer share its
        communicator; pickle takes the layer only where it takes that.

    Attributes
    ----------
    gamma, beta : ndarray, shape (C,), or None
        Parameters; update them in place with any optimizer.
    dgamma, dbeta : ndarray, shape (C,), or None
        Their gradients, of the last `backward`.
    running_mean, running_var : ndarray, shape (C,), of `dtype`, or None
        Training changes them in place, whatever their strides: writeable, and in memory apart from all other arrays of
        the layer.
    num_batches_tracked : int
    training : bool

    Notes
    -----
    Pickles and copies of a layer hold all of it but its last forward.

    Raises
    ------
    TypeError, ValueError
        A parameter of the wrong kind or out of range, for momentum any finite number, as PyTorch has it; what is
        assigned to its attribute later is refused when it is used.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015.
    """

    _saved: Any = None  # of the last forward: None where there is none
    _backward_in_eval: bool = False  # which older pickles lack, and subclasses whose `train` does not call this one's

    def __init__(
        self,
        num_features: int,
        eps: float = config.EPS,
        momentum: float | None = config.MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        backend: str | None = None,
        *,
        unbiased_running_var: bool = True,
        num_threads: int | None = None,
        comm: Any = None,
    ) -> None:
        self.num_threads = num_threads
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.axis = axis
        self.dtype: Any = dtype
        self.backend = backend
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.unbiased_running_var = unbiased_running_var
        self.training = True  # not by train(), which in a subclass may need what that has not made yet
        self._backward_in_eval = False
        self.gamma: Array | None = None
        self.beta: Array | None = None
        self.dgamma: Array | None = None
        self.dbeta: Array | None = None
        self.running_mean: Array | None = None
        self.running_var: Array | None = None
        self.num_batches_tracked = 0
        self._settle()
        self._saved: Saved | Gone | None = None
        self._exchange = None if comm is None else distributed.Exchange(comm, self.num_features)
        self.reset_parameters()

    def __repr__(self) -> str:
        dtype = getattr(dtypes.find(self.dtype), "name", self.dtype)
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, axis={self.axis}, dtype={dtype})"
        )

    @property
    def comm(self) -> Any:
        """The communicator whose ranks share a batch in training, or None."""
        return None if self._exchange is None else self._exchange.comm

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batches counted."""
        self._settle(
            **({"num_batches_tracked": 0} if scalars.flag(self.track_running_stats, "track_running_stats") else {})
        )
        if self.track_running_stats:
            self.running_mean = placement.renewed(self.running_mean, np.zeros(self.num_features, self.dtype))
            self.running_var = placement.renewed(self.running_var, np.ones(self.num_features, self.dtype))

    def reset_parameters(self) -> None:
        """Gamma 1, beta 0, and fresh running statistics."""
        self.reset_running_stats()
        if self.affine:
            self.gamma = placement.renewed(self.gamma, np.ones(self.num_features, self.dtype))
            self.beta = placement.renewed(self.beta, np.zeros(self.num_features, self.dtype))

    def train(self, mode: bool = True) -> BatchNorm:
        """Use batch statistics from here on (mode=False: `eval`); returns self."""
        self.training = scalars.flag(mode, "mode")
        self._backward_in_eval = False
        return self

    def eval(self, *, backward: bool = False) -> BatchNorm:
        """Use running statistics from here on; returns self.

        Parameters
        ----------
        backward : bool
            Whether a forward keeps its x for `backward`, as in training: for layers that are frozen in a network that
            trains.
        """
        self.train(False)
        self._backward_in_eval = scalars.flag(backward, "backward")
        return self

    def __call__(self, x: ArrayLike, out: Array | None = None) -> Array:
        """Forward: see `forward`."""
        return self.forward(x, out)

    def forward(self, x: ArrayLike, out: Array | None = None) -> Array:
        """Normalize, scale and shift; in training also update the running statistics.

        Parameters
        ----------
        x : array_like, shape (..., C, ...), of a dtype that goes with this layer's
            Kept by reference for `backward`, until the next forward, in training and after `eval(backward=True)`: leave
            it as it is.
        out : ndarray, shape and dtype of x, optional
            Takes y; may be x itself, but then there is no backward.

        Returns
        -------
        ndarray, shape and dtype of x
            y, in the memory order of x, or `out`.

        Raises
        ------
        TypeError
            x is of a dtype that does not go with this layer's, or not floating point; so are parameters, or in training
            running statistics, which in evaluation are float32 or float64.
        ValueError
            Another number of channels, one value per channel in training, a bad axis or `out`; parameters or running
            statistics of another shape; in training running statistics that are read-only or share memory.
        RuntimeError
            Another rank of this layer's communicator failed.
        """
        across = self._exchange if self.training is not False else None
        try:
            if self.training is not False and not (
                self.training is True
                and type(self.num_batches_tracked) is int
                and 0 <= self.num_batches_tracked < scalars.WHOLE
                and type(self.track_running_stats) is type(self.unbiased_running_var) is bool
                and (self.momentum is None or (type(self.momentum) is float and self.momentum - self.momentum == 0.0))
            ):
                self._settle()  # to what may be, or raise: nothing below looks at these before it has computed
                across = self._exchange if self.training else None
            served = backend_for(x, self.backend)
            x, overwritten = self._checked(served, x, out)
            if self.num_threads is not None:
                served = backend_for(x, self.backend, self.num_threads)
        except Exception:
            if across is not None:
                across.decline("forward")
            raise
        running_mean, running_var = self.running_mean, self.running_var
        statistics: Moments | tuple[Array, Array]
        if self.training or running_mean is None or running_var is None:
            given = self.gamma, self.beta, self.axis, self.eps, out
            y, m = served.forward(x, *given) if across is None else across.forward(served, x, *given)
            statistics = m
            if (
                self.training
                and self.track_running_stats
                and running_mean is not None
                and running_var is not None
                and m.count
            ):
                # should that raise, y is lost, and the forward before is not the last
                self._saved = Gone(FAILED, across)
                self._track(running_mean, running_var, m, served)
        else:
            mean, var = served.statistic_copy(running_mean), served.statistic_copy(running_var)
            statistics = mean, var
            y = served.inference(x, mean, var, self.gamma, self.beta, self.axis, self.eps, out)
        if not (self.training or self._backward_in_eval):  # a server would keep its last request
            self._saved = Gone(EVALUATION, None)
        elif overwritten:
            self._saved = Gone(OVERWRITTEN, across)
        else:
            gamma = None if self.gamma is None else served.parameter_copy(self.gamma, self.dtype)
            self._saved = Saved(x, statistics, gamma, self.beta is not None, self.axis, self.eps, across)
        return y

    def _checked(self, served: Backend, x: Any, out: Array | None) -> tuple[Any, bool]:
        """A forward's input, and whether `out` will overwrite it."""
        x = served.check_features(x, self.axis, self.num_features, self.dtype)
        overwritten = out is not None and served.same_memory(out, x)
        mean, var, gamma, beta = self.running_mean, self.running_var, self.gamma, self.beta
        written, host = self.training and self.track_running_stats, isinstance(x, np.ndarray)
        if not host or not checks.well_kept(mean, var, gamma, beta, self.num_features, self.dtype, written):
            checks.check_running(mean, var)
            statistics = {"running_mean": mean, "running_var": var}
            placement.check(not host, gamma=gamma, beta=beta, **statistics)
            placement.check_kept(statistics, self.num_features, self.dtype, written, gamma=gamma, beta=beta)
        if out is not None:
            placement.check_apart(out, running_mean=mean, running_var=var)
        return x, overwritten

    def _track(self, running_mean: Array, running_var: Array, m: Moments, served: Backend) -> None:
        batches = self.num_batches_tracked + 1
        weight = 1.0 / batches if self.momentum is None else self.momentum
        freedom = m.count - 1 if self.unbiased_running_var else m.count
        served.track(m, freedom, weight, running_mean, running_var)
        self.num_batches_tracked = batches

    def backward(self, dy: ArrayLike, out: Array | None = None) -> Array:
        """Gradient with respect to the input of the last forward; sets `dgamma` and `dbeta` too.

        After a forward in training the statistics depend on x; after one in evaluation they are constants. gamma, eps,
        axis and the statistics are those of the forward, whatever has become of them since.

        Parameters
        ----------
        dy : array_like, shape and dtype of x
            Gradient of the loss with respect to y.
        out : ndarray, shape and dtype of x, optional
            Takes dx; may be dy or x itself.

        Returns
        -------
        ndarray, shape and dtype of x
            dx, in the memory order of x, or `out`.

        Raises
        ------
        RuntimeError
            There was no forward, or one in evaluation without `eval(backward=True)`, or it (or an earlier backward)
            overwrote x; another rank of this layer's communicator failed.
        TypeError, ValueError
            dy or out unlike x.
        """
        saved = self._saved
        if not isinstance(saved, Saved):
            across = (self._exchange if self.training else None) if saved is None else saved.across
            if across is not None:
                across.decline("backward")
            raise RuntimeError(BEFORE if saved is None else saved.why)
        x, statistics, gamma, shifted, axis, eps, across = saved
        try:
            served = backend_for(x, self.backend, self.num_threads)
            placement.check_apart(
                out, gamma=self.gamma, beta=self.beta, running_mean=self.running_mean, running_var=self.running_var
            )
        except Exception:
            if across is not None:
                across.decline("backward")
            raise
        if not isinstance(statistics, Moments):
            result = served.inference_backward(dy, x, statistics[0], statistics[1], gamma, axis, eps, out)
        elif across is None:
            result = served.backward(dy, x, statistics, gamma, axis, eps, out)
        else:
            result = across.backward(served, dy, x, statistics, gamma, axis, eps, out)
        if out is not None and served.same_memory(out, x):
            self._saved = Gone(OVERWRITTEN, across)
        dx: Array
        dx, dgamma, dbeta = result
        self.dgamma = dgamma if gamma is not None else None
        self.dbeta = dbeta if shifted else None
        return dx

    def recalibrate(self, batches: Iterable[ArrayLike], progress: bool = True) -> BatchNorm:
        """Set the running statistics to those of all batches together, each value counted once; returns self.

        For inference after training, where Ioffe & Szegedy (2015, Algorithm 2) average over batches.
        num_batches_tracked becomes the number of batches that are not empty. After any error the statistics are as they
        were.

        Parameters
        ----------
        batches : iterable of array_like
            Inputs of this layer: arrays, nested lists of numbers, and tuples or lists that begin with an input, as a
            loader's (input, target): that is taken, as PyTorch's `update_bn` does. A list of three or more arrays of
            one shape is refused: stack samples.
        progress : bool
            Show a bar on stderr, where that is a terminal and rich is installed.

        Raises
        ------
        TypeError, ValueError
            No batch, a dict, one tuple, or a batch that `forward` would refuse, by its number; one value per channel in
            all; a layer without running statistics.
        """
        running.recalibrate(self, batches, progress)
        return self

    def folded_affine(self) -> tuple[Array, Array]:
        """(scale, shift), both (C,) of float64 on the host.

        Evaluation is y = scale * x + shift. ValueError without running statistics.
        """
        arrays = self._arrays()
        if self.running_mean is None:
            raise ValueError("folded_affine: this layer keeps no running statistics, and so has no fixed map")
        host = {name: placement.to_host(array) for name, array in arrays.items()}
        eps = checks.check_eps(self.eps, training=False)
        return affine_of(host["running_mean"], host["running_var"], host.get("gamma"), host.get("beta"), eps)

    def __getstate__(self) -> Any:
        """All but the last forward, whose x is a call's: pickles and copies of a layer would carry a batch of data."""
        state = self.__dict__ | {"_saved": None}
        # of subclasses, as object.__getstate__ of Python 3.11 has them; typeshed leaves this function out
        names = copyreg._slotnames(type(self))  # type: ignore[attr-defined]
        slots = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return (state, slots) if slots else state

    def __setstate__(self, state: Any) -> None:
        attributes, slots = state if isinstance(state, tuple) else (state, {})
        self.__dict__.update(attributes, _saved=None)  # an older pickle has its last forward
        for name, value in slots.items():
            setattr(self, name, value)

    def _arrays(self, written: bool = False) -> dict[str, Any]:
        """Parameters and running statistics that there are; TypeError or ValueError for one that no call would take."""
        checks.check_running(self.running_mean, self.running_var)
        arrays = {name: array for name in STATE_KEYS if (array := getattr(self, name)) is not None}
        placement.check_kept(arrays, self.num_features, self.dtype, written)
        return arrays

    def _settle(self, **instead: Any) -> None:
        """Make every option, or these instead, what it should be; TypeError or ValueError, and none changed, if not."""
        options = {
            name: check(instead[name] if name in instead else getattr(self, name)) for name, check in OPTIONS.items()
        }
        for name, value in options.items():
            setattr(self, name, value)

    def to(self: Layer, device: str, kind: str | None = None) -> Layer:
        """Move parameters, their gradients and running statistics to a GPU or back.

        Returns self. Forgets the last forward.

        Parameters
        ----------
        device : str
            "cuda", "cuda:1" or "cpu".
        kind : str, optional
            "torch", "cupy" or "numba", the library of the arrays on a GPU; default the first of them that is imported
            and reaches one.

        Raises
        ------
        ValueError
            No such device or kind.
        BackendUnavailable
            No CUDA here. A layer that holds no arrays, which has nothing to move, is taken as it is, as PyTorch's.
        """
        index, library = placement.parsed(device), placement.chosen(kind)
        self._arrays()
        names = ("gamma", "beta", "dgamma", "dbeta", "running_mean", "running_var")
        moved = {name: placement.to_host(array) for name in names if (array := getattr(self, name)) is not None}
        if index is not None:
            moved = {name: placement.to_device(array, index, library) for name, array in moved.items()}
        for name, array in moved.items():
            setattr(self, name, array)
        self._saved = None
        return self

    def state_dict(self) -> dict[str, Array]:
        """Copies on the host under PyTorch's keys: weight, bias, running_mean, running_var, num_batches_tracked."""
        return self._copies(self._arrays(), self.num_batches_tracked)

    def _copies(self, arrays: Mapping[str, Any], batches: Any) -> dict[str, Array]:
        state = {STATE_KEYS[name]: placement.to_host(array) for name, array in arrays.items()}
        if self.running_mean is not None:
            state["num_batches_tracked"] = np.array(OPTIONS["num_batches_tracked"](batches), np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Take over parameters and statistics, all or none of them.

        Parameters
        ----------
        state : mapping of str to array_like
            As `state_dict` gives it, or PyTorch's, of tensors, of bfloat16 too; num_batches_tracked may be absent.
        strict : bool
            Whether missing and unexpected keys are an error; else the values of all other keys are taken over.

        Returns
        -------
        IncompatibleKeys
            A named tuple of two lists, missing_keys and unexpected_keys.

        Raises
        ------
        ValueError
            Missing or unexpected keys and running_mean without running_var, if strict; other shapes; an array of this
            layer that can't be written.
        TypeError
            No mapping, or values that are not numbers; an array of this layer of another dtype than its own.
        """
        targets = self._arrays(written=True)
        replaced = isinstance(state, Mapping) and "num_batches_tracked" in state  # then this layer's may be a bad one
        own = self._copies(targets, 0 if replaced else self.num_batches_tracked)
        checked, missing, unexpected = checks.check_state(state, own, scalars.flag(strict, "strict"))
        for key, value in checked.items():
            own[key][...] = value
        for name, target in targets.items():
            placement.overwrite(target, own[STATE_KEYS[name]])
        if "num_batches_tracked" in own:
            self.num_batches_tracked = int(own["num_batches_tracked"])
        return IncompatibleKeys(missing, unexpected)
