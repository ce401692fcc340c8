"""What every test shares: a fresh numba cache, the hypothesis profile, and the backends."""

import atexit
import os
import shutil
import sys
import tempfile

import pytest
from hypothesis import settings
from shapes import BACKENDS

# numba's disk cache does not see edits in another file (a kernel keeps the old leaf): every run starts without one.
if os.environ.get("FASTBN_TEST_CACHE") != "keep":
    if "numba" in sys.modules:
        raise RuntimeError("numba was imported before tests/conftest.py could give it a fresh NUMBA_CACHE_DIR")
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="fastbn-numba-")
    atexit.register(shutil.rmtree, os.environ["NUMBA_CACHE_DIR"], ignore_errors=True)

# A first call compiles for seconds, so there is no deadline; the same examples in every run, so that a failure repeats.
settings.register_profile("fastbn", deadline=None, derandomize=True, max_examples=40, database=None, print_blob=True)
settings.load_profile("fastbn")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that serves host arrays."""
    return str(request.param)
