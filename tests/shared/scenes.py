"""Scenes of processes' lives, told apart by what comes first: `processes.play` has a process of its own for each life.

A scene finds a process that has been through all before it, and raises where anything is wrong.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import numba
import numpy as np
from child import WANT, at_once, beside, call, how, in_child, right

import fastbn
from fastbn.cpu import pool
from fastbn.cpu.kernels import jit
from fastbn.cpu.threads import limited

HOW = os.environ.get("HOW", "")  # what `how` should say
LAYER = HOW.partition(" ")[0]
SERIAL = f"{LAYER} serial"


class Scene(NamedTuple):
    """One of a life."""

    name: str
    run: Callable[[], None]
    warnings: tuple[int, ...]  # how many warnings of one thread there may be, where TBB is not there


LIVES: dict[str, list[Scene]] = {}


def scene(life: str, *warnings: int, forks: bool = True) -> Callable[[Callable[[], None]], None]:
    """Add a function to a life, where the system can do it."""

    def add(run: Callable[[], None]) -> None:
        if hasattr(os, "fork") or not forks:
            LIVES.setdefault(life, []).append(Scene(run.__name__, run, warnings or (0,)))

    return add


def play(life: str) -> None:
    """Run a life; each scene says its name first, and then what is wrong, if anything."""
    for name, run, _ in LIVES[life]:
        print(f"scene: {name}", file=sys.stderr, flush=True)
        try:
            run()
        except Exception:
            traceback.print_exc()


def expect(got: object, want: object) -> None:
    """An assertion that tells both, and holds under `python -O`."""
    if got != want:
        raise AssertionError(f"{got!r}, want {want!r}")


def said() -> tuple[bool, str]:
    """Whether calls are right, and how they ran."""
    return right(), how()


# A fork, after a first call


@scene("fork", 1)
def fork_after_use() -> None:
    expect(said(), (True, HOW))
    expect(in_child(lambda: (*said(), in_child(said))), str((True, HOW, str((True, HOW)))))


@scene("fork")
def threads_in_a_forked_child() -> None:
    expect(in_child(lambda: (right(times=10, threads=4), how())), str((True, HOW)))


# The main thread is the first to use fastbn


@scene("main thread", 1)
def fork_before_use() -> None:
    expect(in_child(said), str((True, HOW)))


@scene("main thread", forks=False)
def small_arrays_and_one_thread_launch_nothing() -> None:
    fastbn.batch_norm(np.ones((4, 8), np.float32))
    fastbn.set_num_threads(1)
    expect((right(), pool.running()), (True, None))
    fastbn.set_num_threads(None)


@scene("main thread", 1, forks=False)
def what_explain_and_info_say_before_and_after_the_first_call() -> None:
    from fastbn.cli import info

    def facts() -> tuple[str, str, str]:
        known = dict(info.facts())
        return known["threads"], known["threading layer"], str(fastbn.explain((4, 16, 64, 64)))

    before = count, layer, lines = facts()
    expect(pool.running(), None)  # asking launches nothing
    expect((right(), facts()), (True, before))
    expect((layer, pool.running()), (LAYER, "tbb" if LAYER == "tbb" else None))
    expect(count.startswith("2 threads (tbb)" if LAYER == "tbb" else "one thread: numba's "), True)
    expect([f"\nthreads: {count}\n" in lines, f"(float32, {HOW.split()[1]})\n" in lines], [True, True])


@scene("main thread")  # Windows has one start method
def the_start_method_stays_the_users_to_set() -> None:
    expect(multiprocessing.get_start_method(allow_none=True), None)  # numba fixes it at the first parallel function
    multiprocessing.set_start_method("spawn")
    expect(multiprocessing.get_start_method(), "spawn")
    multiprocessing.set_start_method(None, force=True)


@scene("main thread")
def fork_in_another_thread() -> None:
    """As when a server calls in a thread and forks in another: numba can't shut TBB down then, and says so."""
    with ThreadPoolExecutor(1) as worker:
        expect(worker.submit(in_child, said).result(), str((True, SERIAL)))
    expect(said(), (True, HOW))


def compiling(stage: str, nth: int) -> tuple[str, list[str]]:
    """What a child compiles that is forked while another thread is at the nth event of a stage, and what the parent
    then does.
    """
    import tiny
    from numba.core import event
    from numba.core.registry import cpu_target

    # of numba's, while it infers the types of a function that calls another
    inferring = cpu_target.typing_context.callstack._lock
    begun, forked, passed = threading.Event(), threading.Event(), iter(range(1, 10**6))

    class Listener(event.Listener):
        def on_start(self, event: event.Event) -> None:
            if threading.current_thread() is thread and next(passed) == nth:
                with inferring:
                    begun.set()
                    forked.wait(100)

        def on_end(self, event: event.Event) -> None:
            pass

    thread = threading.Thread(target=tiny.compiled)
    with event.install_listener(stage, Listener()):
        thread.start()
        expect(begun.wait(100), True)
        child = in_child(lambda: [tiny.compiled(), tiny.compiled("float64")])
        forked.set()
        thread.join()
    return child, tiny.compiled()


@scene("main thread")
def fork_that_gives_up_waiting_for_a_compilation() -> None:
    """Locks of fastbn, numba and LLVM are held by a thread that the child has not: its own first compilation must not
    wait for it.
    """
    from fastbn.cpu.kernels import cache

    with mock.patch.object(cache, "directories", list), mock.patch.object(pool, "_PATIENCE", 0.1):
        for stage in (("numba:compile", 1), ("numba:run_pass", 20), ("numba:llvm_lock", 1), ("numba:llvm_lock", 400)):
            expect((stage, compiling(*stage)), (stage, ("[['double_serial'], ['double_serial']]", ["double_serial"])))


@scene("main thread")
def fork_while_another_thread_compiles() -> None:
    """A fork waits for it: numba's lock, held in the child by a thread that is not there, would never be free."""
    import tiny
    from numba.core import event

    from fastbn.cpu.kernels import cache

    begun, forking = threading.Event(), threading.Event()

    class Listener(event.Listener):
        def on_start(self, event: event.Event) -> None:
            begun.set()
            forking.wait(100)

        def on_end(self, event: event.Event) -> None:
            pass

    os.register_at_fork(before=forking.set)  # the last one is the first to be called: fastbn's then waits
    with mock.patch.object(cache, "directories", list), event.install_listener("numba:compile", Listener()):
        thread = threading.Thread(target=tiny.compiled)
        thread.start()
        begun.wait()
        expect(in_child(tiny.compiled), "['double_serial']")
        thread.join()


def workers_are_right(method: str, executor: bool) -> None:
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, context) if executor else context.Pool(2) as workers:
        expect(set(workers.map(right, [2] * 8)), {True})
    expect(right(), True)


@scene("main thread")
def forked_workers() -> None:
    workers_are_right("fork", False)
    workers_are_right("fork", True)


@scene("main thread", 1, 2, forks=False)  # in each worker that got work
def spawned_workers() -> None:
    workers_are_right("spawn", False)


@scene("main thread", 1, 2)
def workers_of_a_fork_server() -> None:
    workers_are_right("forkserver", True)


@scene("main thread")
def fork_beside_busy_threads() -> None:
    """TBB's locks are then held in one of ten children or so, for ever: the child must not wait for them."""
    small = np.ones((40, 16, 120), np.float32)  # on threads, just
    sys.setswitchinterval(1e-5)
    with beside(lambda: fastbn.batch_norm(small), threads=3):
        found = {in_child(lambda: (right(times=1), how())) for _ in range(30)}
    expect((found, said()), ({str((True, SERIAL))}, (True, HOW)))


# Other threads are the first to use fastbn


@scene("other threads", 1, forks=False)
def eight_threads_at_once() -> None:
    expect((right(times=20, threads=8), how()), (True, HOW))


@scene("other threads", forks=False)
def futures() -> None:
    with ThreadPoolExecutor(8) as workers:
        expect({digest == WANT for digest in workers.map(lambda _: call(), range(100))}, {True})
    expect(right(), True)


@scene("other threads")
def fork_in_the_main_thread() -> None:
    expect(in_child(said), str((True, SERIAL)))
    expect(said(), (True, HOW))


@scene("other threads")
def fork_beside_idle_threads() -> None:
    with ThreadPoolExecutor(4) as workers:
        expect(set(workers.map(lambda _: right(), range(8))), {True})
        expect(in_child(right), "True")
        expect(set(workers.map(lambda _: right(), range(8))), {True})


def beside_the_user() -> tuple[bool, set[float]]:
    """Whether calls are right while the user's own parallel function runs in another thread, and what that gives."""
    import user_code

    totals: set[float] = set()
    with beside(lambda: totals.add(user_code.total(50000))):
        return right(times=50), totals


@scene("other threads", forks=False)
def the_users_parallel_function_after_fastbn() -> None:
    expect(beside_the_user(), (True, {50000.0}))


# The user's parallel functions launch numba's threads; first, children of a process where nobody has


@scene("user", 0, 1)
def an_interrupt_leaves_no_library_half_imported() -> None:
    """One whenever a module of numba's registers a type while a first call imports it: it can't do so again."""
    from numba.core import pythonapi

    interrupts: list[None] = []

    class Registry(dict):
        def __setitem__(self, kind, function):
            super().__setitem__(kind, function)
            interrupts.append(signal.raise_signal(signal.SIGINT))

    def interrupted() -> tuple[bool, bool]:
        registry = pythonapi._unboxers
        registry.functions = Registry(registry.functions)
        try:
            call()
        except KeyboardInterrupt:
            registry.functions = dict(registry.functions)
        return right(), len(interrupts) > 0

    expect(in_child(interrupted), "(True, True)")


@scene("user", 0, 1)  # the warning may be what is interrupted
def an_interrupt_leaves_all_as_it_was() -> None:
    """While kernels run, on all threads and on fewer, and while they are loaded, where numba can't take one."""

    def interrupted(limit: int | None) -> tuple[bool, int, int]:
        fastbn.set_num_threads(limit)
        for _ in range(25):
            timer = threading.Timer(0.003, signal.raise_signal, [signal.SIGINT])
            try:
                timer.start()
                while True:
                    call()
            except KeyboardInterrupt:
                timer.join()
        return right(), fastbn.get_num_threads(), numba.get_num_threads()

    found = in_child(lambda: [interrupted(limit) for limit in (None, 1, 2)])
    expect(found, "[(True, 2, 2), (True, 1, 2), (True, 2, 2)]")


@scene("user", 1)
def the_user_or_fastbn_first() -> None:
    expect(in_child(beside_the_user), str((True, {50000.0})))


@scene("user", 1, forks=False)
def the_user_first() -> None:
    """Their parallel functions get TBB too, where fastbn is imported."""
    import user_code

    expect((user_code.total(1000), numba.threading_layer(), *said()), (1000.0, LAYER, True, HOW))


# Four threads, and limits of them


Form = Callable[..., None]


def replaced(work: Callable[[], object], change: Callable[[str, Form], Form]) -> object:
    """What some work returns with each compiled form replaced."""
    kept = {kernel: kernel._compiled for kernel in jit.KERNELS if kernel.parallel}  # the others know no limit
    try:
        for kernel, forms in kept.items():
            kernel._compiled = {key: change("parallel" if key[-1] else "serial", run) for key, run in forms.items()}
        return work()
    finally:
        for kernel, forms in kept.items():
            kernel._compiled = forms


def ran() -> tuple[object, set[tuple[str, int]], int]:
    """Whether calls are right; in which forms, and on how many threads, kernels ran; numba's own number after it."""
    found: set[tuple[str, int]] = set()

    def spied(name: str, run: Form) -> Form:
        def spy(*arguments: Any) -> None:
            found.add((name, numba.get_num_threads()))
            run(*arguments)

        return spy

    right(1)  # which loads what it needs
    return replaced(lambda: right(2), spied), found, numba.get_num_threads()


@scene("four threads", forks=False)
def a_limit_takes_effect_and_leaves_numbas_number() -> None:
    expect(ran(), (True, {("parallel", 4)}, 4))
    for limit, want in ((1, ("serial", 4)), (2, ("parallel", 2)), (3, ("parallel", 3)), (None, ("parallel", 4))):
        with limited(limit):
            expect((limit, *ran()), (limit, True, {want}, 4))
    for mask, limit, want in ((3, None, "parallel"), (3, 2, "parallel"), (3, 4, "parallel"), (1, None, "serial")):
        numba.set_num_threads(mask)
        with limited(limit):
            count = fastbn.get_num_threads()
            expect((count, *ran()), (limit or mask, True, {(want, count)}, mask))
    numba.set_num_threads(4)


@scene("four threads", forks=False)
def numbas_number_is_restored_after_an_error_in_a_kernel() -> None:
    def broken(*arguments: Any) -> None:
        raise MemoryError(numba.get_num_threads())

    def failed() -> object:
        try:
            return call()
        except MemoryError as error:
            return error.args

    with limited(3):
        said = replaced(failed, lambda name, run: broken)
        expect((said, numba.get_num_threads(), fastbn.get_num_threads()), ((3,), 4, 3))


@scene("four threads", forks=False)
def limits_in_several_threads_at_once() -> None:
    results: list[tuple[bool, bool, int]] = []

    def work(limit: int) -> None:
        fastbn.set_num_threads(limit)
        results.extend((call() == WANT, fastbn.get_num_threads() == limit, numba.get_num_threads()) for _ in range(20))

    at_once([lambda limit=limit: work(limit) for limit in (1, 2, 3, 4)])
    expect((set(results), len(results), fastbn.get_num_threads()), ({(True, True, 4)}, 80, 4))
