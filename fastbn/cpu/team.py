"""Parallel kernels on threads that another library keeps: a GNU OpenMP runtime's, which PyTorch brings.

Two pools in one program take the processors from each other: after each of its operations OpenMP's threads spin for
milliseconds, in which TBB's find a processor late. Beside a PyTorch operation on 32 x 128 x 16 x 16 a forward took 245
us on PyTorch's threads, 390 on TBB's. numba's parallel functions call a symbol, `numba_parallel_for`, that numba sets
to its layer's function; kernels that are linked while it means the function below run on a team of OpenMP's, as numba's
own OpenMP layer would.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numba
from llvmlite import binding

from fastbn.cpu.kernels.private import PARALLEL_FOR, global_compiler_lock

__all__ = ["Runtime", "linked"]


class Runtime(NamedTuple):
    """Addresses of an OpenMP runtime's functions."""

    GOMP_parallel: int
    omp_get_thread_num: int
    omp_get_num_threads: int


# A loop of numba's: `dims[0]` calls of a function, each with places of its own in its arrays; every member of the team
# takes its share.
_PROGRAM = """
%loop = type {{ ptr, ptr, ptr, ptr, ptr, i64, i64 }}

define internal void @run(ptr %loop_at) {{
start:
  %loop = load %loop, ptr %loop_at
  %call = extractvalue %loop %loop, 0
  %arrays = extractvalue %loop %loop, 1
  %dims = extractvalue %loop %loop, 2
  %steps = extractvalue %loop %loop, 3
  %data = extractvalue %loop %loop, 4
  %inner = extractvalue %loop %loop, 5
  %count = extractvalue %loop %loop, 6
  %me = call i32 inttoptr (i64 {omp_get_thread_num} to ptr)()
  %all = call i32 inttoptr (i64 {omp_get_num_threads} to ptr)()
  %first = sext i32 %me to i64
  %stride = sext i32 %all to i64
  %ranks = add i64 %inner, 1
  %sizes = alloca i64, i64 %ranks
  %places = alloca ptr, i64 %count
  %size = load i64, ptr %dims
  %bytes = mul i64 %ranks, 8
  br label %next
next:
  %r = phi i64 [ %first, %start ], [ %after, %run ]
  %more = icmp slt i64 %r, %size
  br i1 %more, label %prepare, label %done
prepare:
  call void @llvm.memcpy.p0.p0.i64(ptr %sizes, ptr %dims, i64 %bytes, i1 false)
  store i64 1, ptr %sizes
  br label %each
each:
  %j = phi i64 [ 0, %prepare ], [ %onwards, %place ]
  %left = icmp slt i64 %j, %count
  br i1 %left, label %place, label %run
place:
  %at = getelementptr ptr, ptr %arrays, i64 %j
  %base = load ptr, ptr %at
  %by = getelementptr i64, ptr %steps, i64 %j
  %step = load i64, ptr %by
  %offset = mul i64 %step, %r
  %here = getelementptr i8, ptr %base, i64 %offset
  %to = getelementptr ptr, ptr %places, i64 %j
  store ptr %here, ptr %to
  %onwards = add i64 %j, 1
  br label %each
run:
  call void %call(ptr %places, ptr %sizes, ptr %steps, ptr %data)
  %after = add i64 %r, %stride
  br label %next
done:
  ret void
}}

declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define void @team(ptr %call, ptr %arrays, ptr %dims, ptr %steps, ptr %data, i64 %inner, i64 %count, i32 %threads) {{
  %loop = alloca %loop
  %a = insertvalue %loop undef, ptr %call, 0
  %b = insertvalue %loop %a, ptr %arrays, 1
  %c = insertvalue %loop %b, ptr %dims, 2
  %d = insertvalue %loop %c, ptr %steps, 3
  %e = insertvalue %loop %d, ptr %data, 4
  %f = insertvalue %loop %e, i64 %inner, 5
  %g = insertvalue %loop %f, i64 %count, 6
  store %loop %g, ptr %loop
  call void inttoptr (i64 {GOMP_parallel} to ptr)(ptr @run, ptr %loop, i32 %threads, i32 0)
  ret void
}}
"""

_lock = threading.Lock()
_engines: dict[Runtime, Any] = {}  # kept: the code lives as long as its engine


def _address(runtime: Runtime) -> int:
    """Where the compiled program begins."""
    with _lock:
        if runtime not in _engines:
            module = binding.parse_assembly(_PROGRAM.format(**runtime._asdict()))
            module.verify()
            machine = binding.Target.from_default_triple().create_target_machine(opt=2, jit=True)
            engine = binding.create_mcjit_compiler(module, machine)
            engine.finalize_object()
            _engines[runtime] = engine
        return int(_engines[runtime].get_function_address("team"))


@contextmanager
def linked(runtime: Runtime) -> Iterator[None]:
    """What numba links inside runs on this runtime's threads.

    numba's pool is launched already, and no other thread links meanwhile.
    """
    with global_compiler_lock:
        before = binding.address_of_symbol(PARALLEL_FOR)
        if before is None or struct.calcsize("P") != 8:
            raise RuntimeError(
                f"numba {numba.__version__} has no {PARALLEL_FOR} of 64 bits to replace: please report this"
            )
        binding.add_symbol(PARALLEL_FOR, _address(runtime))
        try:
            yield
        finally:
            binding.add_symbol(PARALLEL_FOR, before)
