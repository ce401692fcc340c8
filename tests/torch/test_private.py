"""What fastbn.torch uses of PyTorch that PyTorch does not document is there and does what it did: a canary for each
interface of fastbn/torch/private.py, which says what rests on it.
"""

import ast
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from fastbn.cpu.team import Runtime  # noqa: E402
from fastbn.torch import private  # noqa: E402
from fastbn.torch.fuse import HOOKS  # noqa: E402

pytestmark = pytest.mark.peers


def _batch_norm(find: Callable[[], Any]) -> None:
    ours = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d)
    assert all(issubclass(cls, find()) for cls in ours)
    assert not issubclass(nn.InstanceNorm2d, find())
    assert find()(3, 1e-5, 0.1, True, True, device=None, dtype=None).running_var.shape == (3,)


def _guards(find: Callable[[], Any]) -> None:
    x, row = torch.ones(2, 3), torch.ones(3)
    same = find()(x, row, dynamic_dims_sizes=[[None, None], [3]], dynamic_dims_strides=[[None, None], [1]]).check
    assert same(x, row)
    assert same(torch.ones(5, 3), row)
    other = [(x.double(), row), (x[0], row), (nn.Parameter(x), row), (x, torch.ones(4)), (x, torch.ones(6)[::2])]
    assert not any(same(*tensors) for tensors in other)


def _callback(find: Callable[[], Any]) -> None:
    assert find()() is None
    found = []

    def call(x: Any) -> Any:
        with nullcontext():  # which Dynamo can't break in two: it leaves all of this to Python
            torch._dynamo.graph_break()
            found.append(find()())
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it can't trace this interface
        torch.compile(call, backend="eager")(torch.ones(1))
    assert found[-1] is not None


def _modes(find: Callable[[], Any]) -> None:
    assert find()() == 0
    with TorchDispatchMode():
        assert find()() == 1


def _transforms(find: Callable[[], Any]) -> None:
    assert find()() is False
    assert torch.func.vmap(lambda v: v * find()())(torch.ones(2)).tolist() == [1, 1]


def _level(find: Callable[[], Any]) -> None:
    assert find() == -1
    with forward_ad.dual_level():
        assert find() == 0


def _profiler(find: Callable[[], Any]) -> None:
    assert find() is False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert find() is True


def _told(odd: Callable[[], Any], find: Callable[[], Any]) -> None:
    assert find()(torch.ones(3)) is False
    assert find()(odd()) is True


def _openmp(_: Callable[[], Any]) -> None:
    addresses = private.openmp_addresses(Runtime._fields)
    assert addresses is not None
    assert len(set(addresses)) == len(Runtime._fields)
    assert all(addresses)


def _constant(_: Callable[[], Any]) -> None:
    assert torch.compiler.assume_constant_result(lambda: 0)._dynamo_marked_constant is True


CANARIES: dict[str, Callable[[Callable[[], Any]], None]] = {
    "torch.nn.modules.batchnorm._BatchNorm": _batch_norm,
    "torch._C._dynamo.guards.TensorGuards": _guards,
    "torch._C._dynamo.eval_frame.get_eval_frame_callback": _callback,
    "torch._C._len_torch_dispatch_stack": _modes,
    "torch._C._are_functorch_transforms_active": _transforms,
    "torch.autograd.forward_ad._current_level": _level,
    "torch.autograd.profiler._is_profiler_enabled": _profiler,
    "torch._is_functional_tensor": partial(_told, lambda: torch._to_functional_tensor(torch.ones(3))),
    "torch.Tensor._is_zerotensor": partial(_told, lambda: torch._efficientzerotensor(3)),
    "torch/lib/libtorch_cpu.so": _openmp,
    "_dynamo_marked_constant": _constant,
}
MARKS = {  # these import Dynamo; of the wheels' OpenMP, only Linux's is known
    "torch._C._dynamo.eval_frame.get_eval_frame_callback": pytest.mark.compile,
    "_dynamo_marked_constant": pytest.mark.compile,
    "torch/lib/libtorch_cpu.so": pytest.mark.skipif(sys.platform != "linux", reason="needs a wheel for Linux"),
}
EACH = [pytest.param(name, marks=MARKS.get(name, ())) for name in CANARIES]


def _sing(name: str) -> None:
    try:
        CANARIES[name](partial(pkgutil.resolve_name, name))
    except Exception as error:
        raise AssertionError(private.gone(name)) from error


def test_every_interface_has_a_canary() -> None:
    assert CANARIES.keys() == private.RESTS.keys()
    for rests in private.RESTS.values():
        files, rest = rests.split(" rests on it: " if " rests" in rests else " rest on it: ")
        assert all((Path(private.__file__).parents[2] / _path(file)).is_file() for file in re.split(", | and ", files))
        assert ". Without: " in rest


def _path(file: str) -> str:
    return file if "/" in file else f"fastbn/torch/{file}"


@pytest.mark.parametrize("name", EACH)
def test_an_interface_is_what_it_was(name: str) -> None:
    _sing(name)


@pytest.mark.parametrize("name", EACH)
def test_its_canary_says_what_broke(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "torch/lib/libtorch_cpu.so":
        monkeypatch.setattr(private.ctypes, "CDLL", lambda path: object())  # without the symbols
    elif name == "_dynamo_marked_constant":
        monkeypatch.setattr(torch.compiler, "assume_constant_result", lambda function: function)
    else:
        home, _, attribute = name.rpartition(".")
        monkeypatch.setattr(pkgutil.resolve_name(home), attribute, object())
    with pytest.raises(
        AssertionError, match=f"^{re.escape(name)}: gone or changed in PyTorch .*; fastbn/torch/.* rest"
    ):
        _sing(name)


def test_without_one_the_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "RESTS", {})
    for name in ("torch._C._no_such", "torch._no_such.name"):
        with pytest.raises(
            ImportError, match=rf"^{name}: gone or changed in PyTorch .*; fastbn/torch/x\.py rests on it"
        ):
            private._interface(name, "x.py rests on it")


def test_what_modules_inherit_is_there() -> None:
    norm = vars(nn.BatchNorm2d(3))
    assert norm["_parameters"].keys() == {"weight", "bias"}
    assert norm["_buffers"].keys() == {"running_mean", "running_var", "num_batches_tracked"}
    assert vars(nn.Sequential(nn.Linear(1, 1)))["_modules"].keys() == {"0"}
    assert norm.keys() >= set(HOOKS)
    methods = [(nn.BatchNorm2d, "_get_name"), (nn.BatchNorm2d, "_check_input_dim"), (nn.Conv2d, "_conv_forward")]
    methods += [(nn.SyncBatchNorm, "_check_non_zero_input_channels")]
    assert [name for cls, name in methods if not callable(getattr(cls, name, None))] == []


def test_nothing_else_of_fastbn_torch_is_private_to_pytorch() -> None:
    """Neither a module or name that it imports, nor an attribute of one."""
    found = []
    for path in sorted(Path(private.__file__).parent.glob("*.py")):
        tree, modules = ast.parse(path.read_text(encoding="utf-8")), {"torch"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
                modules |= {alias.asname or alias.name for alias in node.names}
                words = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                found += [(path.name, word) for word in words if word.startswith("_")]
        for node in ast.walk(tree):
            root = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(node, ast.Attribute) and isinstance(root, ast.Name) and root.id in modules:
                found += [(path.name, node.attr)] * (node.attr.startswith("_") and not node.attr.startswith("__"))
    assert {name for name, _ in found} == {"private.py"}, found
