"""Kernels compiled before a clock starts, with a line that says so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fastbn import progress


@contextmanager
def announced() -> Iterator[None]:
    """Around what calls each kernel once: say that it compiles, before it does, and how long that took.

    Or that nothing was to be compiled. Where it takes long, a bar on a terminal, else a line every ten seconds.
    """
    from numba.core import event

    class Said(event.Listener):  # type: ignore[misc]  # numba has no types
        task: progress.Task | None = None

        def on_start(self, started: Any) -> None:
            if self.task is None:
                print("kernels:  compiling what these shapes need, once; up to a minute or two ...", flush=True)
                self.task = stack.enter_context(progress.counted())("compiling", None)
                self.task.update(0, "0 functions")

        def on_end(self, ended: Any) -> None:
            if self.task is not None:
                done = self.task.done + 1
                self.task.update(done, f"{done} functions")

    said, start = Said(), time.perf_counter()
    with ExitStack() as stack, event.install_listener("numba:compile", said):
        yield
        if said.task is not None:
            said.task.end()
    ready = "there already, nothing to compile"
    if said.task is not None:
        ready = f"ready after {time.perf_counter() - start:.1f} s"
    print(f"kernels:  {ready}", flush=True)
