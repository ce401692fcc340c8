"""Scenes of a process with four threads, and limits of them."""

from collections.abc import Callable
from typing import Any

import numba
from child import WANT, at_once, call, right
from scenes import expect, scene

import fastbn
from fastbn.cpu.kernels import jit
from fastbn.cpu.threads import limited

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
