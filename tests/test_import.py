"""What `import fastbn` costs and does: little time, no compilation, no driver, no warning; and the names that it
gives.
"""

import importlib.metadata
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest

import fastbn

# Whoever runs the suite may have set these; the import of a user has none of them.
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("FASTBN_", "COVERAGE", "COV_"))}


def _python(code: str, *options: str) -> str:
    run = subprocess.run([sys.executable, *options, "-c", code], env=CLEAN, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout


@pytest.mark.alone
def test_takes_no_longer_than_numba_and_50_ms() -> None:
    """In the processor's time, which others' take little from; in turn, until a best of fastbn's is seen to."""
    numba, own = [], []
    for _ in range(7):
        for module, seconds in (("numba", numba), ("fastbn", own)):
            code = f"from time import process_time as now; start = now(); import {module}; print(now() - start)"
            seconds.append(float(_python(code)))
        if min(own) <= min(numba) + 0.050:
            return
    pytest.fail(f"fastbn {sorted(own)}, numba {sorted(numba)}")


def test_is_clean_with_warnings_as_errors() -> None:
    assert _python("import fastbn; print(fastbn.__version__)", "-W", "error") == f"{fastbn.__version__}\n"


HEAVY = (
    "numba.cuda", "numba_cuda", "cuda", "cupy", "ml_dtypes", "torch", "jax", "onnx", "scipy", "sklearn", "matplotlib",
    "rich", "dask",
    "distributed", "mpi4py",
)  # fmt: skip


def test_imports_nothing_that_touches_a_driver_or_is_a_framework() -> None:
    code = f"import sys, fastbn; print([name for name in {HEAVY} if name in sys.modules])"
    assert _python(code) == "[]\n"


COMPILED = """
from numba.core import event
with event.install_recorder("numba:compile") as seen:
    {0}
print(sorted({{str(e.data["dispatcher"].py_func.__name__) for _, e in seen.buffer}}))
"""


def test_a_bridge_whose_package_is_absent_names_its_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\ntry:\n    import fastbn.torch\nexcept ImportError as e:\n    "
        "print(type(e).__name__, e)"
    )
    assert _python(code) == "MissingExtra fastbn.torch needs PyTorch: pip install 'fastbn[torch]'\n"


def test_compiles_nothing_and_neither_do_the_kernels_until_called() -> None:
    backend = "import fastbn, fastbn.cpu.passes"
    assert _python(COMPILED.format(backend)) == "[]\n"
    control = "import numba; numba.njit(lambda: 0)()"
    assert _python(COMPILED.format(control)) != "[]\n"


def test_a_call_runs_in_a_process_that_imported_only_fastbn() -> None:
    code = "import fastbn; print(fastbn.moments([[1.0, 2.0], [3.0, 6.0]]).mean)"
    assert _python(code, "-W", "error") == f"{np.array([2.0, 4.0])}\n"


def test_version_is_that_of_the_installation() -> None:
    assert fastbn.__version__ == importlib.metadata.version("fastbn")


def test_all_names_are_there_and_sorted() -> None:
    assert fastbn.__all__ == sorted(fastbn.__all__)
    namespace: dict[str, object] = {}
    exec("from fastbn import *", namespace)
    assert set(fastbn.__all__) <= namespace.keys()


def test_nothing_public_is_missing_from_all() -> None:
    own = {name for name, value in vars(fastbn).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert own == {name for name in fastbn.__all__ if not name.startswith("_")}


@pytest.mark.parametrize("name", [name for name in fastbn.__all__ if not name.startswith("__")])
def test_every_public_name_has_a_docstring_and_comes_from_its_room(name: str) -> None:
    value = getattr(fastbn, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("fastbn.")
