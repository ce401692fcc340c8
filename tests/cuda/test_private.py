"""What fastbn.cuda uses of numba-cuda and PyTorch that these do not document is there and does what it did.

A canary for each interface of fastbn/cuda/kernels/private.py, which says what rests on it.
"""

import ast
import operator
import pkgutil
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'fastbn[cuda13]'")

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.descriptor import cuda_target

import fastbn.cuda
from fastbn.cuda.kernels import disk, group, jit, private, simulated

pytestmark = pytest.mark.peers

GROUP = group.Group(types.float32)


def _types_of_operators(find: Callable[[], Any]) -> None:
    assert any(function is operator.add for function, _ in find().globals)
    cuda_target.typing_context.refresh()
    found = cuda_target.typing_context.resolve_function_type(operator.add, (GROUP, GROUP), {})
    assert found.return_type == GROUP


def _code_of_operators(find: Callable[[], Any]) -> None:
    assert {key for _, key, given in find().functions if group.Group in given} == {
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
    }


def _template(find: Callable[[], Any]) -> None:
    added = group.signature(GROUP, GROUP, GROUP)
    template = type("Adds", (find(),), {"key": operator.add, "generic": lambda self, args, kws: added})
    assert template(cuda_target.typing_context).apply((GROUP, GROUP), {}) == added


def _signature(find: Callable[[], Any]) -> None:
    found = find()(types.float32, types.int32, GROUP)
    assert (found.return_type, found.args) == (types.float32, (types.int32, GROUP))


def _model(find: Callable[[], Any]) -> None:
    assert find()(None, GROUP, GROUP.ir).get_value_type() == ir.VectorType(ir.FloatType(), 4)


def _registered(find: Callable[[], Any]) -> None:
    assert callable(find()(type("Other", (types.Type,), {})))
    assert type(cuda_target.target_context.data_model_manager[GROUP]) is group._GroupModel


def _global(find: Callable[[], Any]) -> None:
    module = ir.Module()
    found = find()(module, ir.IntType(8), "name", addrspace=3)
    assert (module.globals["name"], found.addrspace) == (found, 3)


def _compile(find: Callable[[], Any]) -> None:
    known = SimpleNamespace(compute_capability=(9, 0))
    with mock.patch("numba.cuda.cudadrv.nvrtc.get_supported_ccs", lambda: [(9, 0)]):
        with mock.patch("numba.cuda.dispatcher.get_current_device", lambda: known):
            given = {"cc": (9, 0, "a"), "device": False, "abi": "numba", **jit.Kernel.options}
            ptx, _ = find()(lambda x: None, types.void(types.CPointer(types.float32)), **given)
    assert ".target sm_90a" in ptx
    assert re.search(r"\.maxntid 256\b.*\n\.minnctapersm 2\b", ptx)
    assert len(jit._ENTRY.findall(ptx)) == 1


def _settings(find: Callable[[], Any]) -> None:
    assert [name for name in disk._SETTINGS if not hasattr(find(), name)] == []


def _implementation(find: Callable[[], Any]) -> None:
    assert find() == "NVIDIA"
    assert private.is_nvidias(cuda)


def _driver_error(find: Callable[[], Any]) -> None:
    assert cuda.is_available() == (find() is None)
    assert find() is None or isinstance(find(), str | Exception)
    assert private.driver_error(cuda) is find()


def _nvvm(find: Callable[[], Any]) -> None:
    assert find()() in (False, True)
    assert private.has_compiler(cuda) == find()()


def _thread(find: Callable[[], Any]) -> None:
    from numba.cuda.simulator.kernel import BlockManager

    manager = BlockManager(None, (3, 1, 1), (8, 1, 1), False)
    thread = find()(lambda: None, manager, (2, 0, 0), (5, 0, 0), False)
    own, threads, blocks = private.block_of(thread)
    assert (own, threads, blocks) == (manager.__dict__, (8, 1, 1), (3, 1, 1))
    with mock.patch.object(simulated, "_mine", lambda: thread):
        assert (simulated.block(), simulated.thread(), simulated.threads(), simulated.blocks()) == (2, 5, 8, 3)
    assert callable(thread.syncthreads)


def _fake_array(find: Callable[[], Any]) -> None:
    values = np.ones(3)
    assert private.simulated_array(find()(values)) is values
    assert fastbn.cuda.buffers.is_simulated(find()(values))


def _raw_stream(find: Callable[[], Any]) -> None:
    assert find()(0) == pytest.importorskip("torch").cuda.current_stream(0).cuda_stream


CANARIES: dict[str, Callable[[Callable[[], Any]], None]] = {
    "numba.cuda.cudadecl.registry": _types_of_operators,
    "numba.cuda.cudaimpl.registry": _code_of_operators,
    "numba.cuda.typing.templates.AbstractTemplate": _template,
    "numba.cuda.typing.templates.signature": _signature,
    "numba.cuda.datamodel.PrimitiveModel": _model,
    "numba.cuda.models.register_model": _registered,
    "numba.cuda.cgutils.add_global_variable": _global,
    "numba.cuda.compile": _compile,
    "numba.cuda.config": _settings,
    "numba.cuda.implementation": _implementation,
    "numba.cuda.cudadrv.driver.driver.initialization_error": _driver_error,
    "numba.cuda.cudadrv.nvvm.is_available": _nvvm,
    "numba.cuda.simulator.kernel.BlockThread": _thread,
    "numba.cuda.simulator.cudadrv.devicearray.FakeCUDAArray": _fake_array,
    "torch._C._cuda_getCurrentRawStream": _raw_stream,
}
MARKS = {"numba.cuda.compile": pytest.mark.ptx}
EACH = [pytest.param(name, marks=MARKS.get(name, ())) for name in CANARIES]


def _sing(name: str) -> None:
    try:
        CANARIES[name](partial(pkgutil.resolve_name, name))
    except Exception as error:
        raise AssertionError(private.gone(name)) from error


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def test_every_interface_has_a_canary() -> None:
    assert CANARIES.keys() == private.RESTS.keys()
    for rests in private.RESTS.values():
        assert (Path(fastbn.cuda.__file__).parent / rests.partition(": ")[0]).is_file()
        assert ". Without: " in rests


@pytest.mark.parametrize("name", EACH)
def test_an_interface_is_what_it_was(name: str) -> None:
    if name.startswith("torch.") and not _has_gpu():
        torch = pytest.importorskip("torch")
        assert torch.version.cuda or not hasattr(torch._C, name.rpartition(".")[2])  # a build without CUDA has none
    else:
        _sing(name)


@pytest.mark.parametrize("name", EACH)
def test_its_canary_says_what_broke(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("torch."):
        pytest.importorskip("torch")
    home, _, attribute = name.rpartition(".")
    monkeypatch.setattr(pkgutil.resolve_name(home), attribute, object(), raising=False)
    with pytest.raises(AssertionError, match=rf"^{re.escape(name)}: gone or changed in .* \d.*; fastbn/cuda/.*\.py: "):
        _sing(name)


def test_without_one_the_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numba.cuda.no_such", "numba.no_such.name"):
        monkeypatch.setitem(private.RESTS, name, "x.py: this and that")
        with pytest.raises(ImportError, match=rf"^{name}: gone or changed in numba-cuda \d.*; fastbn/cuda/x\.py: this"):
            private.interface(name)
    with pytest.raises(KeyError):
        private.interface("numba.not_listed")


# what numba-cuda documents: its API, types of signatures, its way to extend them
PUBLIC = {"numba.cuda", "numba.cuda.types", "numba.cuda.extending.intrinsic", "numba.cuda.config", "numba.config"}


def test_nothing_else_of_fastbn_cuda_is_private_to_its_libraries() -> None:
    """Neither a module or name of numba-cuda's that it imports, nor an attribute that begins with one underscore."""
    found = set()
    for path in sorted(Path(fastbn.cuda.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "numba":
                found |= {(path.name, f"{node.module}.{alias.name}") for alias in node.names}
            if isinstance(node, ast.Import):
                found |= {(path.name, each.name) for each in node.names if each.name.split(".")[0] == "numba"}
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and ast.unparse(node.value) != "self":
                found |= {(path.name, node.attr)} - {(path.name, "_replace"), (path.name, "_asdict")}
    assert {(file, name) for file, name in found if name not in PUBLIC and file != "private.py"} == set()
