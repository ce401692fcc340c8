"""Memory of NumPy's own arrays for the fuzz test: results and workspaces too end at a page that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numba
import numpy as np

PAGE = mmap.PAGESIZE
BLANK = 0xFF
SHARE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
BOTH, READ = mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ
SIZE = ctypes.c_size_t


def _of_libc(name: str, *kinds: Any) -> Any:
    found = ctypes.CDLL(None)[name]  # not the one that others declare
    found.argtypes, found.restype = kinds, SIZE
    return found


_map = _of_libc("mmap", SIZE, SIZE, ctypes.c_int, ctypes.c_int, ctypes.c_int, SIZE)
_unmap = _of_libc("munmap", SIZE, SIZE)
_protect = _of_libc("mprotect", SIZE, SIZE, ctypes.c_int)
_fill = _of_libc("memset", SIZE, ctypes.c_int, SIZE)
_copy = _of_libc("memcpy", SIZE, SIZE, SIZE)

# Compiled: NumPy frees while an error is on its way, where Python can't run. A page with the size, the data's, and one
# for nobody; the data begin within the first of theirs, on 16 bytes as malloc has it.


@numba.njit
def _lend(size, blank):  # type: ignore[no-untyped-def]
    size = max(size, 1)
    whole = (size + PAGE - 1) // PAGE * PAGE
    base = _map(0, whole + 2 * PAGE, BOTH, SHARE, -1, 0)
    if blank:
        _fill(base + PAGE, BLANK, whole)
    _fill(base, 0, 8)
    header = numba.carray(_pointer(base), (1,))
    header[0] = whole
    _protect(base, PAGE, READ)
    _protect(base + PAGE + whole, PAGE, 0)
    return base + PAGE + (whole - size) // 16 * 16


@numba.extending.intrinsic
def _pointer(typing, address):  # type: ignore[no-untyped-def]
    """An address as a pointer to numbers."""
    kind = numba.types.CPointer(numba.types.uintp)

    def make(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(address), make


@numba.njit
def _give_back(address):  # type: ignore[no-untyped-def]
    base = address // PAGE * PAGE - PAGE
    _unmap(base, numba.carray(_pointer(base), (1,))[0] + 2 * PAGE)


_WORD = numba.types.uintp


@numba.cfunc(_WORD(_WORD, _WORD))
def _malloc(ctx, size):  # type: ignore[no-untyped-def]
    return _lend(size, True)


@numba.cfunc(_WORD(_WORD, _WORD, _WORD))
def _calloc(ctx, n, size):  # type: ignore[no-untyped-def]
    return _lend(n * size, False)


@numba.cfunc(numba.types.void(_WORD, _WORD, _WORD))
def _free(ctx, address, size):  # type: ignore[no-untyped-def]
    if address != 0:
        _give_back(address)


@numba.cfunc(_WORD(_WORD, _WORD, _WORD))
def _realloc(ctx, old, size):  # type: ignore[no-untyped-def]
    found = _lend(size, True)
    if old != 0:
        base = old // PAGE * PAGE
        _copy(found, old, min(size, base + numba.carray(_pointer(base - PAGE), (1,))[0] - old))
        _give_back(old)
    return found


class _Handler(ctypes.Structure):
    """PyDataMem_Handler of NumPy's C interface (NEP 49)."""

    _fields_ = (
        *(("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("ctx", ctypes.c_void_p)),
        *(
            ("malloc", ctypes.c_void_p),
            ("calloc", ctypes.c_void_p),
            ("realloc", ctypes.c_void_p),
            ("free", ctypes.c_void_p),
        ),
    )


class Guarded:
    """Within it, memory of new NumPy arrays lies before a guard page, and what is freed is gone."""

    def __init__(self) -> None:
        functions = (_malloc.address, _calloc.address, _realloc.address, _free.address)
        self._handler = _Handler(b"guarded", 1, None, *functions)
        new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
            ("PyCapsule_New", ctypes.pythonapi)
        )
        self._capsule = new(ctypes.addressof(self._handler), b"mem_handler", None)
        get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        core = np._core if hasattr(np, "_core") else np.core
        table = ctypes.cast(get(core._multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
        self._set = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[304])  # PyDataMem_SetHandler
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before.append(self._set(self._capsule))

    def __exit__(self, *_: Any) -> None:
        self._set(self._before.pop())
