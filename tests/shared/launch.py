"""Threads and processes that tests start: Pythons, and real ranks, which end by themselves or are ended."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import ROOT

SECONDS = 600  # for all, even beside others; in half of it each rank reports where it hangs

# Where a process finds the tests' own modules, and fastbn as it is here.
PLACES = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "shared"), str(ROOT), os.environ.get("PYTHONPATH", "")])}

# Open MPI's mpiexec wants to be asked for what MPICH's does as it is: to start as root, and more ranks than cores.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def at_once(works: Sequence[Callable[[], object]]) -> None:
    """Each in a thread of its own; they begin together."""
    barrier = threading.Barrier(len(works))
    workers = [threading.Thread(target=lambda work=work: (barrier.wait(), work())) for work in works]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def python(*words: str, **environment: str) -> str:
    """What a Python prints that is started with these words, in the project's folder."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | PLACES | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def environment() -> dict[str, str]:
    """That of ranks: the commands of this Python's environment first."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("FASTBN_", "OMPI_", "PMI", "PMIX_"))
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return clean | _OPEN_MPI | {"PATH": path} | PLACES


def together(commands: Sequence[Sequence[str]], folder: Path) -> tuple[list[int], str]:
    """Run commands at the same time; their exit statuses, and all that they said."""
    said = [folder / f"said-{number}" for number in range(len(commands))]
    started = []
    try:
        for command, file in zip(commands, said, strict=True):
            with file.open("w") as sink:
                started.append(
                    subprocess.Popen(command, cwd=folder, env=environment(), stdout=sink, stderr=subprocess.STDOUT)
                )
        status = [process.wait(SECONDS) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()  # mpiexec ends its ranks
                process.wait()
    return status, "".join(file.read_text(errors="replace") for file in said)


def mpi(ranks: int, *arguments: str, folder: Path) -> tuple[list[int], str]:
    """A Python script under mpiexec, as the page has it."""
    return together([["mpiexec", "-n", str(ranks), "python", "-m", "mpi4py", *arguments]], folder)


def gloo(ranks: int, script: str, folder: Path) -> tuple[list[int], str]:
    """A Python script in processes that meet at a file."""
    return together([[sys.executable, script, str(folder), str(rank), str(ranks)] for rank in range(ranks)], folder)
