"""The hard cases of a process's life: forks beside threads, layers chosen by others, and what fastbn then says of itself."""

import sys

import pytest
from processes import LAYERS, Run, compiled, forks, once, warned

pytestmark = compiled


@forks
def test_fork_beside_busy_threads(run: Run, layer: str) -> None:
    """TBB's locks are then held in one of ten children or so, for ever: the child must not wait for them."""
    code = """
        sys.setswitchinterval(1e-5)
        small = np.ones((40, 16, 120), np.float32)  # on threads, just
        call()
        ended = threading.Event()
        def busy():
            while not ended.is_set():
                fastbn.batch_norm(small)
        workers = [threading.Thread(target=busy) for _ in range(3)]
        for worker in workers:
            worker.start()
        print("said", {in_child(lambda: (right(times=1), how())) for _ in range(60)}, file=sys.stderr)
        ended.set()
        for worker in workers:
            worker.join()
        print("said", right(), how(), file=sys.stderr)
        """
    _, err = run(code.replace("sys.", "import threading; sys.", 1), layer)  # numba writes to stdout from C, a page at a time
    name = LAYERS[layer].how.split()[0]
    said = [line.removeprefix("said ") for line in err.splitlines() if line.startswith("said ")]
    assert said == [f"""{{"(True, '{name} serial')"}}""", f"True {LAYERS[layer].how}"]
    assert once(err, layer)


@forks
def test_fork_beside_idle_threads(run: Run, layer: str) -> None:
    code = """
        from concurrent.futures import ThreadPoolExecutor
        workers = ThreadPoolExecutor(4)
        print(set(workers.map(lambda _: right(), range(8))))
        print(in_child(right))
        print(set(workers.map(lambda _: right(), range(8))))
        """
    out, err = run(code, layer)
    assert [line for line in out.splitlines() if line and not line.startswith("Unable")] == ["{True}", "True", "{True}"]
    assert once(err, layer)


@forks
@pytest.mark.parametrize("where", ["thread", "main"])
def test_fork_in_another_thread_than_the_first_call(run: Run, layer: str, where: str) -> None:
    """As when a server calls in a thread and forks in another: numba can't shut TBB down then, and says so."""
    code = """
        import threading
        def elsewhere(work):
            said = []
            thread = threading.Thread(target=lambda: said.append(work()))
            thread.start()
            thread.join()
            return said[0]
        fork = lambda: in_child(lambda: (right(), how()))
        print(*[elsewhere(right), fork()] if sys.argv[0] and "MAIN" in os.environ else [right(), elsewhere(fork)])
        print(right(), how())
        """
    out, err = run(code, layer, **({"MAIN": "1"} if where == "main" else {}))
    name = LAYERS[layer].how.split()[0]
    assert out == f"True (True, '{name} serial')\nTrue {LAYERS[layer].how}\n"
    assert once(err, layer)


@forks
def test_fork_while_another_thread_compiles(run: Run, layer: str, tmp_path) -> None:
    """A fork waits for it: numba's lock, held in the child by a thread that is not there, would never be free."""
    code = """
        import threading
        import time
        from fastbn.backends import cpu
        from fastbn.kernels import _jit
        from numba.core import event
        x = np.ones((4, 8), np.float32)
        compiling = threading.Event()
        class Listener(event.Listener):
            def on_start(self, event):
                compiling.set()
            def on_end(self, event):
                pass
        event.register("numba:compile", Listener())
        thread = threading.Thread(target=lambda: fastbn.batch_norm(x))
        thread.start()
        compiling.wait()
        print(in_child(lambda: float(fastbn.batch_norm_inference(x, np.zeros(8), np.ones(8))[0, 0])))
        thread.join()
        """
    assert float(run(code, layer, NUMBA_CACHE_DIR=str(tmp_path))[0]) == pytest.approx(1.0, rel=1e-4)


def test_the_user_launches_numbas_threads_first(run: Run, layer: str) -> None:
    """fastbn uses the layer that they chose, where it is safe, and says what would make it better."""
    out, err = run("import numba; print(numba.threading_layer(), right(), how())", layer, USER_FIRST="1")
    chosen = out.split()[0]
    assert out == f"{chosen} True {chosen} {'parallel' if chosen == 'tbb' else 'serial'}\n"
    assert warned(err) == (chosen != "tbb")
    if layer == "tbb" and chosen != "tbb":
        assert "import fastbn before the first parallel function runs" in err
    if layer != "tbb":
        assert chosen == layer


def test_the_users_parallel_functions_get_tbb_too(run: Run, layer: str) -> None:
    out, _ = run("import user_code, numba; print(user_code.total(1000), numba.threading_layer(), right(), how())", layer)
    assert out == f"1000.0 {layer} True {LAYERS[layer].how}\n"


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


@pytest.mark.parametrize("asked", ["workqueue", "tbb", "safe", "threadsafe", "nonsense"])
def test_layers_asked_for_that_are_unsafe_or_not_there(run: Run, asked: str) -> None:
    out, err = run("print(right(times=5, threads=4), how())", "omp", NUMBA_THREADING_LAYER=asked)
    named = {"workqueue": "workqueue", "threadsafe": "omp"}.get(asked, "none")
    assert out == f"True {named} serial\n"
    assert once(err, "omp")
    assert "NUMBA_THREADING_LAYER" in err


def test_one_processor_needs_no_threads_and_no_warning(run: Run, layer: str) -> None:
    out, err = run("print(right(times=2, threads=4), how(), threads.describe())", layer, NUMBA_NUM_THREADS="1")
    assert out == f"True {layer} serial one thread: numba has only one\n"
    assert warned(err) == 0


def test_it_says_what_it_does(run: Run, layer: str) -> None:
    """explain and info, before the first call and after it, agree; asking launches nothing."""
    code = """
        from fastbn import info
        def said():
            facts = dict(info.facts())
            lines = str(fastbn.explain((4, 16, 64, 64))).splitlines()
            return facts["threads"], facts["threading layer"], [line for line in lines if line.startswith(("threads", "kernels"))]
        before = said()
        print(pool.running(), before == (right(), said())[1], pool.running())
        print(*before, sep="|")
        """
    out, _ = run(code, layer)
    first, second = out.splitlines()
    assert first == f"None True {'tbb' if layer == 'tbb' else None}"
    count, name, lines = second.split("|")
    assert name == layer
    assert count.startswith("2 threads (tbb)" if layer == "tbb" else "one thread: numba's ")
    assert f"threads: {count}" in lines
    assert f"(float32, {LAYERS[layer].how.split()[1]})" in lines


def test_it_asks_for_no_more_than_it_needs(run: Run, layer: str) -> None:
    """Small arrays, and large ones on one thread, launch no threads and warn of none."""
    code = """
        fastbn.batch_norm(np.ones((4, 8), np.float32))
        fastbn.set_num_threads(1)
        print(right(), pool.running())
        """
    out, err = run(code, layer)
    assert out == "True None\n"
    assert warned(err) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has one start method")
def test_the_start_method_stays_the_users_to_set(run: Run, layer: str) -> None:
    """numba fixes it at the first parallel function."""
    code = """
        import multiprocessing
        print(right(), multiprocessing.get_start_method(allow_none=True))
        multiprocessing.set_start_method("spawn")
        print(multiprocessing.get_start_method())
        """
    assert run(code, layer)[0] == "True None\nspawn\n"
