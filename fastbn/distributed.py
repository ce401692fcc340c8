"""Batch normalization of a batch that is spread over processes.

Count, mean and m2 of every rank, merged in rank order in float64.
Each rank calls the same layers in the same order, with the values that it has. A forward is one collective, a backward
is one; both gather every rank's row at every rank, so that all compute the same bits of them, and all learn of an error
on one.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn.arguments import checks, dtypes, scalars
from fastbn.backends import Backend
from fastbn.cuda import buffers, placement
from fastbn.statistics import Moments

Array = NDArray[Any]
Wide = NDArray[np.float64]

OPERATIONS = ("forward", "backward", "reduce")
HEAD = 3  # of a row: which operation, whether its rank failed, count; then two numbers for each channel
COMMUNICATORS = (
    "an intracommunicator of mpi4py, such as MPI.COMM_WORLD (pip install 'fastbn[mpi]'), or a process group of "
    "torch.distributed, such as torch.distributed.group.WORLD after init_process_group (pip install 'fastbn[torch]')"
)


class Exchange:
    """What the ranks of a communicator tell each other about one layer.

    The first call is preceded by one more collective, in which the ranks compare their numbers of channels: from then
    on every row has the same size, and buffers and sizes are the same at every call.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm or torch.distributed.ProcessGroup
        What joins the ranks.
    channels : int
        C, the same on every rank.

    Raises
    ------
    TypeError
        A communicator of another kind, or one that this process does not belong to.
    """

    def __init__(self, comm: Any, channels: int) -> None:
        self.rank, self.size = rank_and_size(comm)
        self.comm = comm
        self.channels = channels
        self._row: Wide | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return Exchange(self.comm, self.channels)  # a communicator is no data: copies of a layer share it

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            pickle.dumps(self.comm)
        except Exception as error:
            raise TypeError(
                f"comm: this one can't be pickled ({error}), and so its layer can't: pickle its state_dict()"
            ) from error
        return Exchange, (self.comm, self.channels)

    def _meet(self) -> Wide:
        """The row that this rank sends; before the first, compare the numbers of channels."""
        if self._row is None:
            counts = np.empty((self.size, 1))
            gathering(self.comm, np.array([float(self.channels)]), counts)()
            if (counts != self.channels).any():
                given = [f"{int(n)} on {_named(counts[:, 0] == n)}" for n in np.unique(counts)]
                raise ValueError(f"channels: given {', '.join(given)}; want the same number on every rank")
            row, self._rows = np.empty(HEAD + 2 * self.channels), np.empty((self.size, HEAD + 2 * self.channels))
            self._gather = gathering(self.comm, row, self._rows)
            self._row = row
        return self._row

    def decline(self, operation: str) -> None:
        """Take part in an operation that this rank can't do: the others raise at once instead of waiting for it."""
        row = self._meet()
        row[:] = 0.0
        row[:2] = OPERATIONS.index(operation), 1.0
        self._gather()

    @contextmanager
    def declining(self, operation: str) -> Iterator[None]:
        """A context in which an error of this rank declines the operation."""
        try:
            yield
        except Exception:
            self.decline(operation)
            raise

    def _swap(self, operation: str, count: int, first: Any, second: Any) -> Wide:
        """Every rank's (2, C) numbers, and what else is in its row.

        Where all ranks are at the same operation and none failed.
        """
        row, code = self._meet(), OPERATIONS.index(operation)
        row[:HEAD] = code, 0.0, count
        row[HEAD:].reshape(2, self.channels)[:] = first, second
        self._gather()
        failed, other = self._rows[:, 1] != 0, self._rows[:, 0] != code
        if failed.any():
            raise RuntimeError(
                f"{operation}: {_named(failed)} of {self.size} raised an error, see there; this one has changed nothing"
            )
        if other.any():
            theirs = f"a {OPERATIONS[int(self._rows[other][0, 0])]} on {_named(other)} of {self.size}"
            raise RuntimeError(
                f"{operation}: given here, but {theirs}; want the same calls in the same order on every rank"
            )
        return self._rows

    def merged(self, operation: str, m: Moments) -> Moments:
        """Moments of all ranks together, on the host, the same bits on every rank.

        `m` is this rank's, on the host or on a GPU.
        Merged from rank 0 on with the formula of Chan, Golub & LeVeque (1979).

        Raises
        ------
        ValueError
            Other numbers of channels on other ranks.
        RuntimeError
            A rank failed, or is at another operation.
        """
        C, none = self.channels, Moments(0, np.zeros(self.channels), np.zeros(self.channels))
        rows = self._swap(operation, m.count, placement.to_host(m.mean), placement.to_host(m.m2))
        return reduce(
            Moments.merge, (Moments(int(row[2]), row[HEAD : HEAD + C], row[HEAD + C :]) for row in rows), none
        )

    def forward(
        self,
        served: Backend,
        x: ArrayLike,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        axis: int,
        eps: float,
        out: Array | None,
    ) -> tuple[Array, Moments]:
        """`fastbn.batch_norm` of this rank's x with the statistics of all ranks.

        (y, moments of the whole batch). One collective.

        Raises
        ------
        TypeError, ValueError
            As `fastbn.batch_norm`; one value per channel on all ranks together.
        RuntimeError
            Another rank failed, or is at another operation.
        """
        with self.declining("forward"):
            self._check(served, axis, eps, out, (x,), {"gamma": gamma, "beta": beta}, {})
            local = served.moments(x, axis)
        m = self.merged("forward", local)
        if m.count == 1:
            here = f"got input size {np.shape(x)} on rank {self.rank} of {self.size}"
            raise ValueError(
                f"Expected more than 1 value per channel when training, {here} and 1 value on all of them together"
            )
        if buffers.on_device(x):
            from fastbn.cuda.moments import DeviceMoments

            m = DeviceMoments(m.count, *_beside(x, m.mean, m.m2))
        return served.inference(x, m.mean, m.var(), gamma, beta, axis, eps, out), m

    def backward(
        self,
        served: Backend,
        dy: ArrayLike,
        x: ArrayLike,
        moments: Moments,
        gamma: ArrayLike | None,
        axis: int,
        eps: float,
        out: Array | None,
    ) -> tuple[Array, Array, Array]:
        """`fastbn.batch_norm_backward` of this rank's part.

        dx of the whole batch's loss, dgamma and dbeta of this rank. One collective. `moments` is what `forward`
        returned.

        Raises
        ------
        TypeError, ValueError
            As `fastbn.batch_norm_backward`.
        RuntimeError
            Another rank failed, or is at another operation.
        """
        with self.declining("backward"):
            mean, var = moments.mean, moments.var()
            statistics = {"moments.mean": mean, "moments.m2": moments.m2}
            dtype = self._check(served, axis, eps, out, (x, dy), {"gamma": gamma}, statistics)
            dbeta, dgamma = served.grad_reduce(dy, x, mean, var, axis, eps)
            sums = np.stack((placement.to_host(dbeta), placement.to_host(dgamma)))
        rows = self._swap("backward", moments.count, *sums)
        with np.errstate(all="ignore"):  # NaN and Inf propagate without a warning; a float32 gradient may overflow
            total = reduce(np.add, rows[:, HEAD:]).reshape(2, self.channels)
            own = sums.astype(dtype)
        sum_dy, sum_dy_xhat, dbeta, dgamma = _beside(x, *total, *own)
        dx = served.grad_input(dy, x, mean, var, sum_dy, sum_dy_xhat, moments.count, gamma, axis, eps, out)
        return dx, dgamma, dbeta

    def _check(
        self,
        served: Backend,
        axis: int,
        eps: float,
        out: Any,
        inputs: tuple[Any, ...],
        parameters: Mapping[str, Any],
        statistics: Mapping[str, Any],
    ) -> dtypes.Dtype:
        """Raise before the exchange what would be raised behind it, on this rank alone; the dtype of parameters."""
        checks.check_eps(eps, training=True)
        channels, dtype = served.check_part(inputs[0], inputs[1:], axis, out, parameters, statistics)
        if channels != self.channels:
            raise ValueError(f"x: given {channels} channels along axis {axis}, want {self.channels}")
        return dtype


def rank_and_size(comm: Any) -> tuple[int, int]:
    """The rank of this process in a communicator, and how many there are.

    Raises
    ------
    TypeError
        A communicator of no known kind, or one that this process does not belong to.
    """
    if (library := _library(comm)) == "mpi4py":
        return int(comm.Get_rank()), int(comm.Get_size())
    if library == "torch":
        return int(comm.rank()), int(comm.size())
    raise TypeError(f"comm: given {scalars.shown(comm)} of type {type(comm).__name__}, want {COMMUNICATORS}")


def gathering(comm: Any, row: Wide, rows: Wide) -> Callable[[], object]:
    """A function that sends this rank's `row`, shape (k,), and fills `rows`, shape (ranks, k).

    As often as it is called.
    """
    if _library(comm) == "mpi4py":
        return partial(comm.Allgather, row, rows)
    import torch
    from torch import distributed

    if "cpu:" in distributed.get_backend_config(comm):
        return partial(distributed.all_gather, list(torch.from_numpy(rows)), torch.from_numpy(row), group=comm)
    device = torch.device("cuda", torch.cuda.current_device())  # NCCL takes no memory of the host
    sent, received = (torch.empty(shape, dtype=torch.float64, device=device) for shape in (row.shape, rows.shape))

    def gather() -> None:
        sent.copy_(torch.from_numpy(row))
        distributed.all_gather(list(received), sent, group=comm)
        torch.from_numpy(rows).copy_(received)

    return gather


def _library(comm: Any) -> str | None:
    """The library that a communicator is of, found without an import of any that the caller has not imported."""
    roots = {base.__module__.partition(".")[0] for base in type(comm).__mro__}
    if "mpi4py" in roots:
        from mpi4py import MPI

        return "mpi4py" if isinstance(comm, MPI.Intracomm) and comm != MPI.COMM_NULL else None
    if "torch" in roots:
        from torch import distributed

        return "torch" if distributed.is_available() and isinstance(comm, distributed.ProcessGroup) else None
    return None


def _named(ranks: NDArray[np.bool_]) -> str:
    """Rank 2; ranks 0, 1, 3; no more of them than a person reads."""
    numbers = np.flatnonzero(ranks).tolist()
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:8]))}{more}"


def _beside(x: Any, *arrays: Array) -> tuple[Any, ...]:
    """Arrays of the host where x is: themselves, or copies on its GPU of its library's kind."""
    if not buffers.on_device(x):
        return arrays
    index, library = buffers.device_of(buffers.view(x, "x")), buffers.library(x)
    if library not in placement.LIBRARIES:
        library = "numba"
    return tuple(placement.to_device(array, index, library) for array in arrays)
