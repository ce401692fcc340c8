"""One rank of several: runs its checks, notes how far it came. Started by test_distributed.py with mpiexec, or as
processes with gloo.

    ranks.py FOLDER                    under mpiexec
    ranks.py FOLDER RANK RANKS         with gloo

Each rank writes what it did, and digests of what must be the same bits on all of them, to FOLDER/RANK.json.
"""

import faulthandler
import json
import sys
import warnings
from pathlib import Path

import launch
import rank_checks
from across import Ranks


def main(folder: str, *place: str) -> None:
    checks = rank_checks.CHECKS
    if place:
        import torch_ranks

        r = torch_ranks.join(Path(folder), *map(int, place))
        checks += torch_ranks.CHECKS
    else:
        from mpi4py import MPI

        r = Ranks(MPI.COMM_WORLD, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for work in checks:
            work(r)
            r.did.append(work.__name__)
            Path(folder, f"{r.rank}.json").write_text(json.dumps({"did": r.did, "bits": r.bits}))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(launch.SECONDS / 2, exit=True)
    main(*sys.argv[1:])
