"""The tests, in folders like the package's and named after its files.

What they share lies in `shared`, whose modules are imported by their bare names: no other folder of tests may be where
Python looks, for `torch` and `bench` are names of folders here.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path.insert(0, str(ROOT / "tests" / "shared"))
