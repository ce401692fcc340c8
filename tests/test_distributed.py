"""BatchNorm and RunningMoments over real ranks: four under MPI, three of torch.distributed; each checks its own, in rank_checks.py."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import across
import launch
import numpy as np
import pytest
import rank_checks

import fastbn
from fastbn.distributed import Exchange

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = str(Path(__file__).with_name("ranks.py"))
ENGINES = {"mpi": ("mpi4py", 4), "gloo": ("torch", 3)}


class Ended(NamedTuple):
    engine: str
    status: list[int]
    said: str
    found: list[dict[str, Any]]  # what each rank wrote


@pytest.fixture(scope="module", params=ENGINES)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """All ranks of an engine, after they have done everything."""
    package, size = ENGINES[request.param]
    pytest.importorskip(package)
    across.warm(size)
    folder = tmp_path_factory.mktemp(request.param)
    status, said = launch.mpi(size, SCRIPT, str(folder), folder=folder) if package == "mpi4py" else launch.gloo(size, SCRIPT, folder)
    files = [folder / f"{rank}.json" for rank in range(size)]
    return Ended(request.param, status, said, [json.loads(file.read_text()) if file.exists() else {} for file in files])


def test_every_rank_did_everything(ended: Ended) -> None:
    assert not any(ended.status), ended.said
    wanted = [work.__name__ for work in rank_checks.CHECKS]
    if ended.engine == "gloo":
        import torch_ranks

        wanted += [work.__name__ for work in torch_ranks.CHECKS]
    for found in ended.found:
        assert found["did"] == wanted


def test_every_rank_has_the_same_bits(ended: Ended) -> None:
    bits = [found["bits"] for found in ended.found]
    assert len(bits[0]) > 2 * len(across.CASES)
    assert all(mine == bits[0] for mine in bits)


def test_a_rank_that_raises_elsewhere_ends_the_others(tmp_path: Path) -> None:
    """As the README launches it: the others wait in a collective of fastbn, for which MPI knows no timeout."""
    pytest.importorskip("mpi4py")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, numpy, fastbn\nfrom mpi4py import MPI\nbn = fastbn.BatchNorm(2, comm=MPI.COMM_WORLD)\n"
        "if MPI.COMM_WORLD.rank == 1:\n    raise KeyError('elsewhere')\nbn(numpy.ones((2, 2), 'float32'))\nprint('went on')\n"
    )
    status, said = launch.mpi(4, str(script), folder=tmp_path)
    assert status != [0]
    assert "KeyError: 'elsewhere'" in said
    assert "went on" not in said


LAUNCHED = {"mpi": ("mpi4py", "mpiexec "), "torch": ("torch", "torchrun ")}


@pytest.mark.parametrize("extra", LAUNCHED)
def test_the_readme_launches_as_it_says(extra: str, tmp_path: Path) -> None:
    package, command = LAUNCHED[extra]
    pytest.importorskip(package)
    found = re.findall(
        rf"^```python {extra}\n(.*?)^```\n\n    (pip install [^\n]+)\n    ({command}[^\n]+)$", README, re.MULTILINE | re.DOTALL
    )
    assert len(found) == 1
    block, install, line = found[0]
    assert install == f"pip install '.[{extra}]'"
    (tmp_path / line.split()[-1]).write_text(block)
    status, said = launch.together([line.split()], tmp_path)
    assert status == [0], said


@pytest.mark.parametrize("comm", ["world", object(), 3, np.zeros(2), fastbn], ids=lambda comm: type(comm).__name__)
def test_a_communicator_of_another_kind(comm: Any) -> None:
    for make in (lambda: fastbn.BatchNorm(4, comm=comm), lambda: Exchange(comm, 4), lambda: fastbn.RunningMoments(4).reduce(comm)):
        with pytest.raises(TypeError, match=r"comm: given .*mpi4py.*'fastbn\[mpi\]'.*torch\.distributed.*'fastbn\[torch\]'"):
            make()


def test_none_is_no_communicator_to_reduce_over() -> None:
    """Such as torch.distributed.group.WORLD before init_process_group."""
    assert fastbn.BatchNorm(4, comm=None).comm is None
    with pytest.raises(TypeError, match="comm: given None"):
        fastbn.RunningMoments(4).reduce(None)


def test_the_extras_that_errors_name_are_there() -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert re.search(r'^mpi = \["mpi4py', extras, re.MULTILINE)
    assert re.search(r'^torch = \["torch', extras, re.MULTILINE)


ABSENT = """
import sys
sys.modules[{0!r}] = None
import fastbn
try:
    {1}
except {2} as error:
    print(error)
print(sorted({{"mpi4py", "torch"}} & {{name for name, module in sys.modules.items() if module}}))
"""


@pytest.mark.parametrize(
    ("package", "code", "error", "words"),
    [
        ("torch", "import fastbn.torch", "fastbn.errors.MissingExtra", "fastbn.torch needs PyTorch: pip install 'fastbn[torch]'\n"),
        ("mpi4py", "fastbn.BatchNorm(4, comm='world')", "TypeError", "pip install 'fastbn[mpi]'"),
    ],
)
def test_without_the_package(package: str, code: str, error: str, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABSENT.format(package, code, error)],
        env=launch.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert done.stdout.endswith("\n[]\n")  # neither was imported
