"""A canary for each private interface of numba and llvmlite in `fastbn.cpu.kernels.private`: which one an upgrade has
changed, and what rests on it. Each is also shown to fail.
"""

import ast
import inspect
import platform
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numba
import pytest
from llvmlite import binding, ir
from numba import types
from numba.core import codegen, compiler
from numba.core.registry import cpu_target
from numba.np.ufunc import parallel

from fastbn.cpu import pool
from fastbn.cpu.kernels import cache, half, jit, private, vector

pytestmark = pytest.mark.skipif(jit.DISABLED, reason="without the JIT nothing is compiled")


def same(x):  # type: ignore[no-untyped-def]  # typed by numba
    return x


class Recorder:
    """A cache that holds nothing, and what it was asked."""

    cache_path = ""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def load_overload(self, signature: Any, context: Any) -> None:
        self.asked.append("load")

    def save_overload(self, signature: Any, compiled: Any) -> None:
        self.asked.append("save")


def compiled(kept: Recorder) -> Any:
    dispatcher = numba.njit(same)
    private.keep(dispatcher, kept)
    dispatcher.compile((types.intp,))
    return dispatcher


def asks_the_cache_that_it_was_given() -> bool:
    kept = Recorder()
    compiled(kept)
    return kept.asked == ["load", "save"]


def has_an_entry_point() -> bool:
    return bool(private.entry_point(compiled(Recorder()))(3) == 3)


def keeps_files_where_it_is_told() -> bool:
    kept = cache._class_for(Path("somewhere"))(same)
    return kept.cache_path == "somewhere" and all(map(callable, (kept.load_overload, kept.save_overload, kept.flush)))


def names_files_by_function() -> bool:
    files = cache._class_for(Path("somewhere"))(same)._impl
    return "test_private.same" in files.filename_base and isinstance(files.locator, cache._Locator)


def function() -> tuple[Any, Any]:
    """A builder in a function of (array, index, count), and its arguments."""
    context = cpu_target.target_context
    context.refresh()
    module = ir.Module()
    module.triple = binding.get_default_triple()
    arguments = [context.get_value_type(kind) for kind in ARGUMENTS]
    body = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "canary")
    return context, ir.IRBuilder(body.append_basic_block())


ARGUMENTS = (types.Array(types.float32, 1, "A"), types.UniTuple(types.intp, 1), types.intp)
SIGNATURE = SimpleNamespace(args=ARGUMENTS)


def knows_an_array() -> bool:
    context, builder = function()
    view = private.make_array(ARGUMENTS[0])(context, builder, builder.function.args[0])
    return view.data.type.is_pointer and view.strides.type.count == 1


def loads_and_stores_masked() -> bool:
    context, builder = function()
    loaded, _ = vector.load_first(context, builder, SIGNATURE, builder.function.args, 16)
    vector.store_first(context, builder, SIGNATURE, builder.function.args, loaded)
    builder.ret_void()
    text = str(builder.module)
    binding.parse_assembly(text).verify()
    return "masked.load" in text and "masked.store" in text


def loads_volatile() -> bool:
    _, builder = function()
    place = builder.alloca(ir.FloatType())
    return "= load volatile float" in str(private.volatile(builder.load(place, typ=ir.FloatType())))


def sets_the_symbol_that_parallel_functions_call() -> bool:
    pool.launch()
    calls = "".join(inspect.getsource(parallel.build_gufunc_kernel).split())
    arguments = "parallel_for_ty=ir.FunctionType(ir.VoidType(),[byte_ptr_t]*5+[intp_t,]*3)" in calls
    return binding.address_of_symbol(private.PARALLEL_FOR) is not None and arguments


def masks_without_a_lock() -> bool:
    pool.launch()
    get, put = parallel._get_num_threads, parallel._set_num_threads
    put(get())
    return private.masks() == (get, put) and get() == numba.get_num_threads()


class Canary(NamedTuple):
    """A check, and how its interface is taken away to show that it fails."""

    name: str
    file: str  # that rests on it
    check: Callable[[], object]
    lose: Callable[[pytest.MonkeyPatch], None]


def without(holder: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.delattr(holder, name)


def instead(holder: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(holder, name, value)


def inference() -> Any:
    return cpu_target.typing_context.callstack


CANARIES = (
    Canary(
        "numba's caching.FunctionCache",
        "cpu/kernels/cache.py",
        keeps_files_where_it_is_told,
        instead(private.FunctionCache, "save_overload", None),
    ),
    Canary(
        "numba's caching.CompileResultCacheImpl",
        "cpu/kernels/cache.py",
        names_files_by_function,
        instead(private.CompileResultCacheImpl, "get_filename_base", None),
    ),
    Canary(
        "numba's CodeLibrary.has_dynamic_globals",
        "cpu/kernels/cache.py",
        lambda: hasattr(codegen.CodeLibrary, "has_dynamic_globals"),
        without(codegen.CodeLibrary, "has_dynamic_globals"),
    ),
    Canary(
        "numba's appdirs.AppDirs",
        "cpu/kernels/cache.py",
        lambda: Path(private.AppDirs(appname="numba", appauthor=False).user_cache_dir).is_absolute(),
        without(private.AppDirs, "user_cache_dir"),
    ),
    Canary(
        "numba's Dispatcher._cache",
        "cpu/kernels/jit.py",
        asks_the_cache_that_it_was_given,
        instead(private, "keep", lambda *_: None),
    ),
    Canary(
        "numba's CompileResult.entry_point",
        "cpu/kernels/jit.py",
        has_an_entry_point,
        instead(compiler.CompileResult, "entry_point", None),
    ),
    *(
        Canary(
            f"numba's cgutils.{name}",
            "cpu/kernels/vector.py",
            lambda name=name: callable(getattr(private.cgutils, name)),
            without(private.cgutils, name),
        )
        for name in ("pointer_add", "unpack_tuple", "get_or_insert_function")
    ),
    Canary(
        "numba's arrayobj.make_array",
        "cpu/kernels/vector.py",
        knows_an_array,
        instead(private, "make_array", lambda _: lambda *_: object()),
    ),
    Canary(
        "LLVM's masked loads and stores",
        "cpu/kernels/vector.py",
        loads_and_stores_masked,
        instead(vector, "I32", vector.I64),
    ),
    Canary(
        "llvmlite's LoadInstr.descr",
        "cpu/kernels/vector.py",
        loads_volatile,
        instead(ir.LoadInstr, "descr", lambda self, buf: buf.append("ld float\n")),
    ),
    Canary(
        "numba's codegen().magic_tuple",
        "cpu/kernels/half.py",
        lambda: [type(each) for each in private.target(cpu_target.target_context)] == [str] * 3,
        without(codegen.JITCPUCodegen.__mro__[1], "magic_tuple"),
    ),
    *(
        Canary(
            f"what LLVM calls to convert float16 on {target}",
            "cpu/kernels/half.py",
            lambda target=target: not half.converts.__wrapped__("x86_64-linux", target, ""),
            instead(half, "_CALLS", ("__extend_half", "__truncate_half")),
        )
        for target in ("nehalem", "generic")
        if platform.machine() in ("x86_64", "AMD64")
    ),
    Canary(
        "numba's symbol numba_parallel_for",
        "cpu/team.py",
        sets_the_symbol_that_parallel_functions_call,
        instead(private, "PARALLEL_FOR", "numba_parallel_loop"),
    ),
    Canary(
        "numba's compiler_lock.global_compiler_lock",
        "cpu/team.py and cpu/pool.py",
        lambda: private.global_compiler_lock.__enter__ and private.global_compiler_lock._lock,
        without(private.global_compiler_lock, "_lock"),
    ),
    Canary("numba's lock of type inference", "cpu/pool.py", lambda: inference()._lock, without(inference(), "_lock")),
    Canary(
        "llvmlite's lock of LLVM",
        "cpu/pool.py",
        lambda: binding.ffi.lib._lock._lock,
        without(binding.ffi.lib._lock, "_lock"),
    ),
    Canary(
        "numba's modules of threading layers",
        "cpu/pool.py",
        lambda: private.has_pool("workqueue"),
        lambda monkeypatch: monkeypatch.setitem(sys.modules, "numba.np.ufunc.workqueue", None),
    ),
    Canary(
        "numba's parallel._get_num_threads",
        "cpu/threads.py",
        masks_without_a_lock,
        lambda monkeypatch: (pool.launch(), monkeypatch.delattr(parallel, "_get_num_threads")),
    ),
)


def watch(canary: Canary) -> None:
    try:
        right = canary.check()
    except Exception as error:  # whatever an upgrade makes of it
        right, why = False, f" ({error!r})"
    else:
        why = ""
    if not right:
        pytest.fail(f"{canary.name} changed: fastbn/{canary.file} rests on it{why}")


every = pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)


@every
def test_it_is_as_it_was(canary: Canary) -> None:
    watch(canary)


@every
def test_its_canary_can_fail(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    canary.lose(monkeypatch)
    with pytest.raises(pytest.fail.Exception) as failed:
        watch(canary)
    assert str(failed.value).startswith(f"{canary.name} changed: fastbn/{canary.file} rests on it")


@pytest.mark.parametrize("name", [name for name in private.RESTS if name.startswith("numba.")])
def test_an_upgrade_that_takes_a_name_away_is_told_at_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, member = name.rpartition(".")
    if name == "numba.core.cgutils":
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(sys.modules[module], member)
    with pytest.raises(ImportError) as caught:
        runpy.run_path(private.__file__)
    assert str(caught.value) == private.gone(name)
    assert f"fastbn/cpu/kernels/{private.RESTS[name]}" in private.gone(name)


def test_an_upgrade_that_takes_a_member_away_is_told_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(codegen.JITCPUCodegen.__mro__[1], "magic_tuple")
    for name, call in (
        ("Dispatcher._cache", lambda: private.keep(object(), None)),
        ("CompileResult.entry_point", lambda: private.entry_point(SimpleNamespace(overloads={1: object()}))),
        ("codegen().magic_tuple", lambda: private.target(cpu_target.target_context)),
    ):
        with pytest.raises(ImportError) as caught:
            call()
        assert str(caught.value) == private.gone(name)


def test_nothing_else_names_what_is_private() -> None:
    folder = Path(private.__file__).parents[1]
    found = [
        f"{path.name}:{node.lineno} imports {name}"
        for path in sorted(folder.rglob("*.py"))
        if path != Path(private.__file__)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.startswith(("numba.", "llvmlite.")) and name not in ("numba.extending", "llvmlite.binding")
    ]
    assert not found
