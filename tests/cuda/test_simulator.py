"""The CUDA kernels in numba's simulator: `tests/cuda/simulated`, in a process of its own, for the simulator and the
compiler can't share one.
"""

import pytest
from launch import python


@pytest.mark.simulator
def test_the_simulated_gpu_holds_the_contract() -> None:
    words = ("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/cuda/simulated")
    said = python(*words, NUMBA_ENABLE_CUDASIM="1")
    assert " passed" in said
    assert "skipped" not in said
