"""Communicators of other libraries as one thing: every rank's numbers to every rank, in rank order.

The libraries are imported only where a communicator of theirs is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import scalars

Wide = NDArray[np.float64]

KNOWN = (
    "an intracommunicator of mpi4py, such as MPI.COMM_WORLD (pip install 'fastbn[mpi]'), or a process group of "
    "torch.distributed, such as "
    "torch.distributed.group.WORLD after init_process_group (pip install 'fastbn[torch]')"
)


def place(comm: Any) -> tuple[int, int]:
    """The rank of this process in a communicator, and how many there are.

    Raises
    ------
    TypeError
        A communicator of no known kind, or one that this process does not belong to.
    """
    if (kind := _kind(comm)) == "mpi4py":
        return int(comm.Get_rank()), int(comm.Get_size())
    if kind == "torch":
        return int(comm.rank()), int(comm.size())
    raise TypeError(f"comm: given {scalars.shown(comm)} of type {type(comm).__name__}, want {KNOWN}")


def gathering(comm: Any, row: Wide, rows: Wide) -> Callable[[], object]:
    """A function that sends this rank's `row`, shape (k,), and fills `rows`, shape (ranks, k).

    As often as it is called.
    """
    if _kind(comm) == "mpi4py":
        return partial(comm.Allgather, row, rows)
    import torch
    from torch import distributed

    if "cpu:" in distributed.get_backend_config(comm):
        return partial(distributed.all_gather, list(torch.from_numpy(rows)), torch.from_numpy(row), group=comm)
    device = torch.device("cuda", torch.cuda.current_device())  # NCCL takes no memory of the host
    near, far = (
        torch.empty(row.size, dtype=torch.float64, device=device),
        torch.empty(rows.shape, dtype=torch.float64, device=device),
    )

    def gather() -> None:
        near.copy_(torch.from_numpy(row))
        distributed.all_gather(list(far), near, group=comm)
        torch.from_numpy(rows).copy_(far)

    return gather


def _kind(comm: Any) -> str | None:
    """The library that a communicator is of, found without an import of any that the caller has not imported."""
    roots = {base.__module__.partition(".")[0] for base in type(comm).__mro__}
    if "mpi4py" in roots:
        from mpi4py import MPI

        return "mpi4py" if isinstance(comm, MPI.Intracomm) and comm != MPI.COMM_NULL else None
    if "torch" in roots:
        from torch import distributed

        return "torch" if distributed.is_available() and isinstance(comm, distributed.ProcessGroup) else None
    return None
