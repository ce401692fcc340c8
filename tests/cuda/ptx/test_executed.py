"""The CUDA kernels executed from their PTX, by a machine that checks every access: a covering set of cases, and faults
that it must see.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'fastbn[cuda13]'")
pytest.importorskip("nvidia", reason="needs nvidia-nvvm, or a CUDA toolkit")

from fastbn.cuda.kernels import gpu

if gpu.SIMULATED:
    pytest.skip("the simulator and the compiler can't share a process", allow_module_level=True)

from tests.cuda.ptx import arrays, cases, checks, compiler, driver, planted

pytestmark = [pytest.mark.ptx, pytest.mark.peers]

# One target for each dtype: both are of the older of libNVVM's two code generators. `python -m tests.cuda.ptx.run` runs
# any.
ARCHITECTURE = {"float32": "sm_90a", "float64": "sm_80", "float16": "sm_90a", "bfloat16": "sm_80"}
NEVER = {("finish.rstd", "float64", "float32")}  # the moments that it is given are float64
EVERY = [case for dtype in cases.DTYPES for case in cases.covering(dtype)]


@pytest.fixture(autouse=True, scope="module")
def plans() -> Iterator[None]:
    """Kept from case to case, as in any program, and neither from the tests before nor for those after."""
    driver.plans_forgotten()
    yield
    driver.plans_forgotten()


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_pass(case: cases.Case) -> None:
    report = checks.Report()
    checks.check(driver.device(ARCHITECTURE[case.dtype]), case, report)
    assert len(report.records) > 15
    assert not report.problems


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_no_values(dtype: str) -> None:
    report = checks.Report()
    checks.check_empty(driver.device(ARCHITECTURE[dtype]), dtype, report)
    assert len(report.records) == 6
    assert not report.problems


def test_every_kernel_is_launched_for_every_dtype() -> None:
    """By the covering set, each kernel that the modules hold, for memory of each dtype and given statistics of both."""
    device, report = driver.Device("sm_90a", dry=True), checks.Report()
    for case in EVERY:
        checks.check(device, case, report)
    for dtype in cases.DTYPES:
        checks.check_empty(device, dtype, report)
    wanted = set()
    for name, kernel in compiler.kernels().items():
        # What a kernel is compiled for: memory of x, or what x is computed in, or float64 alone.
        stored: Any = (
            compiler.STORED.values()
            if "x" in kernel.arguments
            else compiler.STATISTICS
            if "w" in kernel.arguments
            else ["float64"]
        )
        wanted |= set(product([name], stored, compiler.STATISTICS if compiler.takes_statistics(kernel) else [""]))
    assert len(compiler.kernels()) > 20
    assert {(launch.kernel, launch.stored, launch.statistic) for launch in device.launches} == wanted - NEVER


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_the_set_covers_pairs(dtype: str) -> None:
    found = cases.covering(dtype)
    whole = cases.everything(dtype)
    assert {(case.layout, case.shifts) for case in found} == set(product(arrays.LAYOUTS, cases.SHIFTS))
    assert {(case.affine, case.statistics) for case in found} == set(
        product(range(4), (cases.SINGLE, cases.DOUBLE, cases.MIXED))
    )
    for name in ("shape", "layout", "shifts", "affine", "statistics", "axis"):
        assert {getattr(case, name) for case in whole} <= {getattr(case, name) for case in found}, name
    assert {word for case in whole for word in case.more} == {word for case in found for word in case.more}
    assert len(whole) > 6 * len(found)


@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_seen(fault: planted.Planted) -> None:
    said = planted.seen(fault, "sm_90a")
    assert planted.expected(fault, said), said


@pytest.mark.parametrize("control", planted.CONTROLS, ids=lambda control: control.kernel)
def test_a_kernel_without_a_fault_passes(control: planted.Planted) -> None:
    assert planted.seen(control, "sm_90a") == "nothing"
