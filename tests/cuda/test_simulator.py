"""The CUDA kernels in numba's simulator: `tests/cuda/simulated`, in a process of its own, for the simulator and the
compiler can't share one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.simulator
def test_the_simulated_gpu_holds_the_contract() -> None:
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(HERE / "simulated")]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1], timeout=900)
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout
