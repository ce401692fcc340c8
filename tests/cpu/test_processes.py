"""fastbn in processes of every kind: forked, spawned, with threads, beside PyTorch; with TBB, with other layers.

Each test runs scenes, or a script, in a process of its own, which may hang or abort without harm to this one. Results
are compared bit by bit.
"""

import pytest
from processes import LAYERS, Run, compiled, forks, once, play, warned

pytestmark = compiled
process = pytest.mark.process


@forks
def test_a_fork(run: Run, layer: str) -> None:
    play(run, "fork", layer)


@process
@pytest.mark.parametrize("first", ["main thread", "other threads", "user"])
def test_a_life(run: Run, layer: str, first: str) -> None:
    play(run, first, layer)


@process
@pytest.mark.peers
@pytest.mark.parametrize("first", ["torch", "fastbn"])
def test_beside_pytorch(run: Run, layer: str, first: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    code = """
        import torch
        x = torch.ones(500, 500)
        def right_too():
            return bool(((x @ x).sum() == 500**3) & ((x + 1).exp().max() == x.add(1).exp().min()))
        torch.set_num_threads(2)
        print(right_too(), right(), right_too(), right())
        results = set()
        with beside(lambda: results.add(right_too())):
            print(right(times=10))
        print(results, how())
        """
    out, err = run(code, layer, **({"TORCH_FIRST": "1"} if first == "torch" else {}))
    assert out == f"True True True True\nTrue\n{{True}} {LAYERS[layer].how}\n"
    assert once(err, layer)


@process
def test_the_user_launches_numbas_threads_before_fastbn_is_there(run: Run, layer: str) -> None:
    """fastbn uses the layer that they chose, where it is safe, and says what would make it better."""
    out, err = run("import numba; print(numba.threading_layer(), right(), how())", layer, USER_FIRST="1")
    chosen = out.split()[0]
    assert out == f"{chosen} True {chosen} {'parallel' if chosen == 'tbb' else 'serial'}\n"
    assert warned(err) == (chosen != "tbb")
    if layer == "tbb" and chosen != "tbb":
        assert "import fastbn before the first parallel function runs" in err
    if layer != "tbb":
        assert chosen == layer


@process
@forks
def test_openmp_when_asked_for_by_name(run: Run) -> None:
    """Parallel in the process that launches it, serial in its children, which GNU OpenMP would end."""
    code = "print(right(times=3, threads=4), how()); print(in_child(lambda: (right(), how()))); print(right(), how())"
    out, err = run(code, "omp", NUMBA_THREADING_LAYER="omp")
    assert out == "True omp parallel\n(True, 'omp serial')\nTrue omp parallel\n"
    assert warned(err) == 1
    assert "end a forked child" in err
    out, err = run("print(in_child(right)); print(right())", "omp", NUMBA_THREADING_LAYER="omp", USER_FIRST="1")
    assert out == "True\nTrue\n"  # a pool that was there before fastbn may be a parent's


@process
@pytest.mark.parametrize("asked", ["workqueue", "tbb", "safe", "threadsafe", "nonsense"])
def test_layers_asked_for_that_are_unsafe_or_not_there(run: Run, asked: str) -> None:
    out, err = run("print(right(times=5, threads=4), how())", "omp", NUMBA_THREADING_LAYER=asked)
    named = {"workqueue": "workqueue", "threadsafe": "omp"}.get(asked, "none")
    assert out == f"True {named} serial\n"
    assert once(err, "omp")
    assert "NUMBA_THREADING_LAYER" in err


@process
def test_a_numba_without_its_tbb_layer_is_told_from_a_missing_tbb(run: Run) -> None:
    """As the wheels of 0.62.0 were, and as those of some systems are."""
    out, err = run("sys.modules['numba.np.ufunc.tbbpool'] = None; print(right(), how().split()[1])", "tbb")
    assert out == "True serial\n"
    assert "install a numba with its TBB layer, which this " in err
    assert "(pip install -U numba, or conda install numba tbb)" in err
    assert "pip install tbb" not in err


@process
@pytest.mark.parametrize(
    "call", ["fastbn.moments(x)", "fastbn.BatchNorm(16)(x)", "bn.backward(bn(x))", "seen.update(x)"]
)
def test_the_warning_points_at_the_users_line(run: Run, call: str) -> None:
    code = f"""
        x, bn, seen = np.ones((4, 16, 64, 64), np.float32), fastbn.BatchNorm(16), fastbn.RunningMoments(16)
        {call}  # mine
        """
    _, err = run(code, "workqueue")
    assert warned(err) == 1
    assert err.splitlines()[1].strip() == f"{call}  # mine"


@process
def test_one_processor_needs_no_threads_and_no_warning(run: Run, layer: str) -> None:
    out, err = run("print(right(times=2, threads=4), how(), threads.describe())", layer, NUMBA_NUM_THREADS="1")
    assert out == f"True {layer} serial one thread: numba has only one\n"
    assert warned(err) == 0
