"""BatchNorm and RunningMoments over real ranks: four under MPI, three of torch.distributed; each checks its own, in
rank_checks.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import across
import launch
import numpy as np
import pytest
import rank_checks

import fastbn
from fastbn.distributed import Exchange
from tests import ROOT

PAGE = (ROOT / "docs" / "processes.md").read_text(encoding="utf-8")
SCRIPT = str(ROOT / "tests" / "shared" / "ranks.py")
ENGINES = {"mpi": ("mpi4py", 4), "gloo": ("torch", 3)}


@pytest.mark.peers
@pytest.mark.ranks
@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_does_everything_and_has_the_same_bits(engine: str, tmp_path: Path) -> None:
    """All checks of an engine in one launch."""
    package, size = ENGINES[engine]
    pytest.importorskip(package)
    checks = rank_checks.CHECKS
    across.warm(size)
    if engine == "mpi":
        status, said = launch.mpi(size, SCRIPT, str(tmp_path), folder=tmp_path)
    else:
        import torch_ranks

        checks += torch_ranks.CHECKS
        status, said = launch.gloo(size, SCRIPT, tmp_path)
    assert not any(status), said
    first, *others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size))
    assert first["did"] == [work.__name__ for work in checks]
    assert len(first["bits"]) > 2 * len(across.CASES)
    assert others == [first] * (size - 1)


@pytest.mark.peers
@pytest.mark.ranks
def test_a_rank_that_raises_elsewhere_ends_the_others(tmp_path: Path) -> None:
    """As the page launches it: the others wait in a collective of fastbn, for which MPI knows no timeout."""
    pytest.importorskip("mpi4py")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, numpy, fastbn\nfrom mpi4py import MPI\nbn = fastbn.BatchNorm(2, comm=MPI.COMM_WORLD)\n"
        "if MPI.COMM_WORLD.rank == 1:\n    raise KeyError('elsewhere')\nbn(numpy.ones((2, 2), "
        "'float32'))\nprint('went on')\n"
    )
    status, said = launch.mpi(4, str(script), folder=tmp_path)
    assert status != [0]
    assert "KeyError: 'elsewhere'" in said
    assert "went on" not in said


LAUNCHED = {"mpi": ("mpi4py", "mpiexec "), "torch": ("torch", "torchrun ")}


@pytest.mark.peers
@pytest.mark.ranks
@pytest.mark.parametrize("extra", LAUNCHED)
def test_the_page_launches_as_it_says(extra: str, tmp_path: Path) -> None:
    package, command = LAUNCHED[extra]
    pytest.importorskip(package)
    found = re.findall(
        rf"^```python {extra}\n(.*?)^```\n\n    (pip install [^\n]+)\n    ({command}[^\n]+)$",
        PAGE,
        re.MULTILINE | re.DOTALL,
    )
    assert len(found) == 1
    block, install, line = found[0]
    assert install == f"pip install '.[{extra}]'"
    (tmp_path / line.split()[-1]).write_text(block)
    status, said = launch.together([line.split()], tmp_path)
    assert status == [0], said


@pytest.mark.parametrize("comm", ["world", object(), 3, np.zeros(2), fastbn], ids=lambda comm: type(comm).__name__)
def test_a_communicator_of_another_kind(comm: Any) -> None:
    for make in (
        lambda: fastbn.BatchNorm(4, comm=comm),
        lambda: Exchange(comm, 4),
        lambda: fastbn.RunningMoments(4).reduce(comm),
    ):
        with pytest.raises(
            TypeError, match=r"comm: given .*mpi4py.*'fastbn\[mpi\]'.*torch\.distributed.*'fastbn\[torch\]'"
        ):
            make()


def test_none_is_no_communicator_to_reduce_over() -> None:
    """Such as torch.distributed.group.WORLD before init_process_group."""
    assert fastbn.BatchNorm(4, comm=None).comm is None
    with pytest.raises(TypeError, match="comm: given None"):
        fastbn.RunningMoments(4).reduce(None)


def test_the_extras_that_errors_name_are_there() -> None:
    extras = (
        (ROOT / "pyproject.toml")
        .read_text(encoding="utf-8")
        .split("[project.optional-dependencies]")[1]
        .split("\n[")[0]
    )
    assert re.search(r'^mpi = \["mpi4py', extras, re.MULTILINE)
    assert re.search(r'^torch = \["torch', extras, re.MULTILINE)


def test_without_mpi4py_its_extra_is_named_and_pytorch_is_not_imported() -> None:
    code = """if True:
        import sys
        sys.modules["mpi4py"] = None
        import fastbn
        try:
            fastbn.BatchNorm(4, comm="world")
        except TypeError as error:
            print("pip install 'fastbn[mpi]'" in str(error), "torch" in sys.modules)
        """
    assert launch.python("-c", code) == "True False\n"
