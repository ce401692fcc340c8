"""Real ranks: processes under mpiexec, and processes of torch.distributed, which end by themselves or are ended."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fastbn

HERE = Path(__file__).parent
SECONDS = 600  # for all, even beside others; in half of it each rank reports where it hangs

# Open MPI's mpiexec wants to be asked for what MPICH's does as it is: to start as root, and more ranks than cores.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def environment() -> dict[str, str]:
    """The commands of this Python's environment first, fastbn as it is here, and the tests' own modules."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("FASTBN_", "OMPI_", "PMI", "PMIX_"))
    }
    places = [str(HERE), str(Path(fastbn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return clean | _OPEN_MPI | {"PATH": path, "PYTHONPATH": os.pathsep.join(places)}


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
