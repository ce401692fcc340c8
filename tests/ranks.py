"""One rank of several: runs its checks, notes how far it came. Started by test_distributed.py with mpiexec, or as processes with gloo.

    ranks.py FOLDER                    under mpiexec
    ranks.py FOLDER RANK RANKS         with gloo

Each rank writes what it did, and digests of what must be the same bits on all of them, to FOLDER/RANK.json.
"""

import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def measured() -> Iterator[None]:
    """Coverage of this process too, where the tests run under it: to be combined with theirs."""
    if not os.environ.get("COVERAGE_RUN"):
        yield
        return
    import coverage

    root = Path(__file__).parents[1]
    found = coverage.Coverage(root / ".coverage", data_suffix=True, config_file=root / "pyproject.toml")
    with found.collect():
        yield
    found.save()


def main(folder: str, *place: str) -> None:
    import rank_checks
    from across import Ranks

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
    faulthandler.dump_traceback_later(120, exit=True)
    with measured():
        main(*sys.argv[1:])
