"""fastbn in processes of every kind: forked, spawned, with threads, beside PyTorch; with TBB, and with numba's unsafe layers instead of it.

Each test runs a script in a process of its own, which may hang or abort without harm to this one. Results are compared bit by bit.
"""

import multiprocessing

import pytest
from processes import LAYERS, Run, compiled, forks, once, warned

pytestmark = compiled
METHODS = ["fork", "forkserver", "spawn"]


@forks
def test_fork_after_use(run: Run, layer: str) -> None:
    out, err = run("print(right(), how()); print(in_child(lambda: (right(), how(), in_child(lambda: (right(), how())))))", layer)
    how = LAYERS[layer].how
    assert out == f"""True {how}\n(True, '{how}', "(True, '{how}')")\n"""
    assert once(err, layer)


@forks
def test_fork_before_use(run: Run, layer: str) -> None:
    out, err = run("print(in_child(lambda: (right(), how()))); print(right(), how())", layer)
    assert out == f"(True, '{LAYERS[layer].how}')\nTrue {LAYERS[layer].how}\n"
    assert warned(err) == 2 * (layer != "tbb")  # each of the two began by itself


def test_eight_threads_at_once(run: Run, layer: str) -> None:
    out, err = run("print(right(times=20, threads=8), how())", layer)
    assert out == f"True {LAYERS[layer].how}\n"
    assert once(err, layer)


@forks
def test_threads_in_a_forked_child(run: Run, layer: str) -> None:
    out, err = run("print(right()); print(in_child(lambda: (right(times=10, threads=4), how())))", layer)
    assert out == f"True\n(True, '{LAYERS[layer].how}')\n"
    assert once(err, layer)


def test_futures(run: Run, layer: str) -> None:
    code = """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            print({digest == WANT for digest in pool.map(lambda _: call(), range(100))})
        print(right())
        """
    out, err = run(code, layer)
    assert out == "{True}\nTrue\n"
    assert once(err, layer)


@pytest.mark.parametrize("method", METHODS)
def test_multiprocessing(run: Run, layer: str, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    code = f"""
        import multiprocessing
        print(right())
        multiprocessing.set_start_method({method!r})  # fastbn has left it to the user
        with multiprocessing.Pool(2) as workers:
            print(set(workers.map(right, [2] * 8)))
        print(right())
        """
    out, err = run(code, layer)
    assert out == "True\n{True}\nTrue\n"
    if method == "fork":
        assert once(err, layer)
    else:  # one in this process, and one in each worker that got work
        assert (warned(err) in (2, 3)) if layer != "tbb" else (warned(err) == 0)


@pytest.mark.parametrize("method", METHODS)
def test_process_pool_executor(run: Run, layer: str, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    code = f"""
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        print(right())
        with ProcessPoolExecutor(2, multiprocessing.get_context({method!r})) as workers:
            print(set(workers.map(right, [2] * 4)))
        """
    assert run(code, layer)[0] == "True\n{True}\n"


def test_beside_the_users_own_parallel_function(run: Run, layer: str) -> None:
    """At the same time, in another Python thread; the user's may be the first to launch numba's threads, or fastbn."""
    code = """
        import user_code
        import threading
        if "CALL_FIRST" in os.environ:
            call()
        ended, totals = threading.Event(), set()
        def user():
            while not ended.is_set():
                totals.add(user_code.total(50000))
        thread = threading.Thread(target=user)
        thread.start()
        print(right(times=50))
        ended.set()
        thread.join()
        print(totals)
        """
    for first in ({}, {"CALL_FIRST": "1"}):
        out, err = run(code, layer, **first)
        assert out == "True\n{50000.0}\n"
        assert once(err, layer)


@pytest.mark.parametrize("first", ["torch", "fastbn"])
def test_beside_pytorch(run: Run, layer: str, first: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    code = """
        import threading
        import torch
        x = torch.ones(500, 500)
        def right_too():
            return bool(((x @ x).sum() == 500**3) & ((x + 1).exp().max() == x.add(1).exp().min()))
        torch.set_num_threads(2)
        print(right_too(), right(), right_too(), right())
        results = []
        thread = threading.Thread(target=lambda: results.extend(right_too() for _ in range(50)))
        thread.start()
        print(right(times=10))
        thread.join()
        print(set(results), how())
        """
    out, err = run(code, layer, **({"TORCH_FIRST": "1"} if first == "torch" else {}))
    assert out == f"True True True True\nTrue\n{{True}} {LAYERS[layer].how}\n"
    assert once(err, layer)


def test_an_interrupt_leaves_no_library_half_imported(run: Run) -> None:
    """One whenever a module of numba's registers a type while a first call imports it: it can't do so again."""
    code = """
        import signal
        from numba.core import pythonapi
        class Registry(dict):
            def __setitem__(self, kind, function):
                super().__setitem__(kind, function)
                interrupts.append(signal.raise_signal(signal.SIGINT))
        interrupts, registry = [], pythonapi._unboxers
        registry.functions = Registry(registry.functions)
        try:
            call()
        except KeyboardInterrupt:
            registry.functions = dict(registry.functions)
        print(right(), len(interrupts) > 0)
        """
    assert run(code, "tbb")[0] == "True True\n"


def test_an_interrupt_leaves_all_as_it_was(run: Run, layer: str) -> None:
    """While kernels run, on all threads and on fewer, and while they are loaded, which is where numba can't take one."""
    code = """
        import signal
        import threading
        import numba
        for limit in (None, 1, 2):
            fastbn.set_num_threads(limit)
            for _ in range(25):
                timer = threading.Timer(0.003, signal.raise_signal, [signal.SIGINT])
                try:
                    timer.start()
                    while True:
                        call()
                except KeyboardInterrupt:
                    timer.join()
            print(right(), fastbn.get_num_threads(), numba.get_num_threads())
        """
    assert run(code, layer)[0] == "True 2 2\nTrue 1 2\nTrue 2 2\n"
