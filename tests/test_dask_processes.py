"""fastbn.dask in processes of its own: with dask's query planning, without dask, its benchmark."""

import re
import subprocess
import sys

import pytest
from launch import python

pytest.importorskip("dask.array", reason="a bridge to dask: pip install 'fastbn[dask]'")
pytest.importorskip("distributed", reason="a bridge to dask: pip install 'fastbn[dask]'")
import bench.dask
from tests import ROOT

pytestmark = pytest.mark.peers

PLANNING = """
import dask.array as da, numpy as np
import fastbn, fastbn.dask as bridge
x = np.random.default_rng(0).normal(3, 2, (8, 6)).astype("f4")
array = da.from_array(x, (4, 3))
m = bridge.moments(array)
try:
    y = bridge.normalize(array, m, np.full(6, 2, "f4"))
except NotImplementedError as error:
    print(error)
    y = bridge.normalize(array, m.compute(), np.full(6, 2, "f4"))
m = m.compute()
want = fastbn.batch_norm_inference(x, m.mean, m.var(), np.full(6, 2, "f4"))
print(hasattr(array, "expr"), m.count, (y.compute() == want).all())
"""


@pytest.mark.process
def test_query_planning_works_or_its_remedies_do() -> None:
    # read when dask's arrays are imported
    on, off = (
        python("-c", PLANNING, DASK_ARRAY__QUERY_PLANNING=planning).splitlines() for planning in ("True", "False")
    )
    assert off == ["False 8 True"]
    if on[-1] != "False 8 True":  # this dask has it
        assert on[-1] == "True 8 True"
        assert [line.partition(",")[0] for line in on[:-1]] in ([], ["moments: given lazy ones"])


def test_without_dask_the_extra_is_named() -> None:
    code = """if True:
        import sys
        for absent in ("dask.array", "dask"):
            sys.modules[absent] = None
            try:
                import fastbn.dask
            except ImportError as error:
                print(type(error).__name__, error)
        """
    assert python("-c", code) == 2 * "MissingExtra fastbn.dask needs dask with its arrays: pip install 'fastbn[dask]'\n"


@pytest.mark.bench
def test_the_benchmark_holds_its_limit_and_says_when_not(capsys: pytest.CaptureFixture[str]) -> None:
    """0.5 GB in 0.45: the interpreter takes 0.2 of it. The array itself would not fit."""
    options = "-W error -m bench.dask --gb 0.5 --limit-gb 0.45 --chunk-mb 8 --threads 2"
    run = subprocess.run([sys.executable, *options.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    begin = r"0\.51 GB of float32 in blocks of 8\.0 MB on 2 threads: moments .* GB/s.*; "
    assert re.match(begin + r"peak memory 0\.[1-4]\d GB of 0\.45 allowed\n", run.stdout)
    assert bench.dask.main(["--gb", "0.1", "--limit-gb", "0.05"]) == 1
    assert re.match(r"python -m bench\.dask: held \d\.\d+ GB, want at most 0\.05 GB\n", capsys.readouterr().err)
    assert bench.dask.main(["--chunk-mb", "0"]) == 2
    assert capsys.readouterr().err == "python -m bench.dask: --chunk-mb: given 0, want a number above 0\n"
