"""Every place where an array reaches compiled code, or its address is taken, and the check that it has passed: read
from the source.

Entry points look at no type, stride or length, and write where the address says. So whoever calls one, or takes an
address, stands below: in CONTRACT where its arrays come from callers that stand there too, in CHECKED with the check of
each. Who is new fails until listed.
"""

import ast
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests import ROOT

PACKAGE = ROOT / "fastbn"

# What makes a function a call site: an attribute of this name, whatever it is an attribute of, a call, or a function of
# CONTRACT.
ATTRIBUTES = {
    "form",
    "compiled",
    "entry_point",
    "launch",
    "compact",
    "passes",
    "track",
    "from_address",
    "address",
    "ctypes",
    "data_ptr",
}
ATTRIBUTES |= {"__cuda_array_interface__", "__array_interface__"}
READY = {"queue.run"}  # a program, with its arrays
HARMLESS = {"layout.compact"}  # arithmetic on shapes

# Functions that ask nothing: their arrays are views by a `layout.Plan` or buffers of `cuda.buffers.view`, and rows of
# (C,), which their callers have from `arguments.checks` and `cuda.checks`, or memory that they make. Whoever calls one
# is a call site too. A direct call, `passes.moments(view)` in a test or a benchmark, is internal: it has to hold the
# contract of `fastbn.cpu.backend.Passes` itself.
CONTRACT = {
    *(f"cpu.passes.{name}" for name in ("moments", "rstd", "track", "normalize", "grad_reduce", "grad_input")),
    *(f"cpu.passes.{name}" for name in ("forward", "backward", "Decided._forward_in_two", "Decided._backward_in_two")),
    *(
        f"cpu.passes.Decided.{name}{run}"
        for name in ("moments", "normalize", "sums", "grad_input")
        for run in ("", ".run")
    ),
    *(f"cpu.passes.Decided.{name}{run}" for name in ("forward", "backward") for run in ("", ".run")),
    *(f"cpu.passes.Decided.inference{run}" for run in ("", ".run")),  # addresses: see torch.inference_cache.inference
    *("cpu.backend.Host.track", "cuda.backend.Device.track"),  # rows that a layer, or torch.tensors.track, checks
    "cpu.passes.warmup",  # compiles, without an array
    *(f"cuda.passes.{name}" for name in ("moments", "forward", "inference", "backward", "grad_reduce", "grad_input")),
    *(f"cuda.passes.{name}" for name in ("_arrays", "_sums", "_affine")),
    *(f"cuda.passes.{name}" for name in ("_reduce", "_fused", "_elementwise", "_alike", "_wide")),
    *(f"cuda.launches.{name}" for name in ("pointer", "fresh", "Call.launch", "Queue._launch", "clear", "copy")),
    # that a library gives, with shape and strides beside it
    *(f"cuda.buffers.{name}" for name in ("view", "_tensor", "address")),
    "cuda.buffers.pair",
    *(f"cuda.backend.{name}" for name in ("canonical", "workspace_view", "result_view", "fresh_like", "_moments")),
    *(f"cuda.moments.{name}" for name in ("_each", "_join", "_same")),
}

# Addresses that nothing is read from or written to, and backends that are asked for words or for functions of a shape.
NO_ARRAY = {
    **{
        f"cuda.buffers.{name}": "arithmetic on an address"
        for name in ("Buffer", "Buffer.span", "Buffer.geometry", "stand_in")
    },
    "cuda.launches.Queue.run": "its workspace is memory of its own; its arrays are those of the program, whose call "
    "sites are listed",
    "cuda.streams.workspace": "memory of its own",
    "cpu.backend.CallPlan.__init__": "functions of a shape",
    "cpu.backend.Host.__init__": "who serves",
    "cpu.backend.Host.describe": "words about a shape",
    "progress.tracked": "a bar",
    "torch.eager.normalize": "calls torch.tensors.track, which is listed",
    "cuda.checks.check_out": "compares addresses",
    "cuda.buffers.device_of": "asks the driver whose memory it is",
    "cuda.views.View.base": "arithmetic on an address",
    "cli.warmup.run": "compiles",
    "cuda.checks._Interface.__init__": "for NumPy's arithmetic on addresses; nobody reads that memory",
    "cuda.checks.same_memory": "compares addresses",
    "distributed._beside": "asks on which GPU x is",
    "arguments.layout.Plan.empty": "memory of its own",
    "arguments.overlap.same_memory": "compares addresses",
    "torch.allocator._allocated": "memory of its own",
    "torch.inference_cache._call_plan": "a function of a shape",
    "torch.inference_cache.store": "keeps the addresses of what torch.eligibility.declines let through",
    "torch.inference_cache.lookup": "compares addresses",
    "torch.eligibility.apart": "compares addresses",
    "torch.eligibility.plain": "asks whether there is one",
}

# By call site: how many times it is one, and each array's check, which it calls before the first, itself or in what it
# calls; or "CHECK in FUNCTION before CALLED".
X, DY, OUT = (
    {"x": "arguments.checks.as_input"},
    {"dy": "arguments.checks.check_like"},
    {"out": "arguments.checks.check_out"},
)
PARAMETERS = {"gamma": "arguments.checks.as_parameter", "beta": "arguments.checks.as_parameter"}
STATISTICS = {"mean": "arguments.checks.as_statistic", "var": "arguments.checks.as_statistic"}
ON_GPU = {"x": "cuda.checks.as_input", "out": "cuda.checks.check_out"}
# of what writes a program for such arrays
LYING = {"gamma": "cuda.checks.check_parameter", "out": "cuda.checks.check_room"}
CHECKED: dict[str, tuple[int, dict[str, str]]] = {
    "cpu.backend.Host.moments": (1, X),
    "cpu.backend.Host._of_integers": (
        1,
        {"x": "arguments.checks.as_input in cpu.backend.Host.moments before cpu.backend.Host._of_integers"},
    ),
    "cpu.backend.Host.forward": (3, X | PARAMETERS | OUT),
    "cpu.backend.Host.inference": (4, X | STATISTICS | PARAMETERS | OUT),
    "cpu.backend.Host._backward": (4, X | DY | STATISTICS | PARAMETERS | OUT | {"moments": "statistics.check_moments"}),
    "cpu.backend.Host.grad_reduce": (2, X | DY | STATISTICS),
    "cpu.backend.Host.grad_input": (
        2,
        X | DY | STATISTICS | PARAMETERS | OUT | {"sum_dy": "arguments.checks.as_statistic"},
    ),
    "batchnorm.BatchNorm._track": (
        1,
        {
            "running_mean, running_var": "arguments.checks.well_kept in batchnorm.BatchNorm.forward before "
            "batchnorm.BatchNorm._track",
            "strided ones": "cuda.placement.check_kept in batchnorm.BatchNorm.forward before "
            "batchnorm.BatchNorm._track",
        },
    ),
    "cuda.checks.as_input": (1, {"any": "arguments.foreign.on_device"}),
    "cuda.checks.check_kept": (2, {"running_mean": "cuda.checks.check_parameter"}),
    "cuda.moments.DeviceMoments._of_m2": (3, {"m2": "cuda.checks.as_moment"}),
    "cuda.moments.DeviceMoments.merge": (3, {"mean": "cuda.checks.as_moment", "m2": "cuda.checks.as_moment"}),
    "cuda.moments._copy": (
        2,
        {"running_mean": "cuda.checks.as_input in cuda.moments.statistic_copy before cuda.moments._copy"},
    ),
    "cuda.moments.parameter_copy": (1, {"gamma": "cuda.checks.as_input"}),
    "cuda.moments._widen": (3, {"running_mean": "cuda.checks.check_statistic"}),
    "cuda.moments.track": (1, {"moments": "cuda.checks.as_moment", "running_mean": "cuda.checks.as_input"}),
    "cuda.moments._track": (
        6,
        {"running_mean": "cuda.checks.check_statistic", "running_var": "cuda.checks.check_parameter"},
    ),
    "cuda.backend.Device.moments": (3, {"x": "cuda.checks.as_input"}),
    "cuda.backend.Device.forward": (3, ON_GPU),
    "cuda.backend._forward": (5, LYING),
    "cuda.backend.Device.inference": (2, ON_GPU),
    "cuda.backend._inference": (3, LYING | {"mean": "cuda.checks.check_statistic"}),
    "cuda.backend.Device._backward": (
        3,
        ON_GPU | {"dy": "cuda.checks.check_pair", "moments": "statistics.check_moments"},
    ),
    "cuda.backend._backward": (6, LYING | {"mean": "cuda.checks.check_statistic"}),
    "cuda.backend.Device.grad_reduce": (2, {"x": "cuda.checks.as_input", "dy": "cuda.checks.check_pair"}),
    "cuda.backend._grad_reduce": (5, {"mean": "cuda.checks.check_statistic"}),
    "cuda.backend.Device.grad_input": (2, ON_GPU | {"dy": "cuda.checks.check_pair"}),
    "cuda.backend._grad_input": (4, LYING | {"mean": "cuda.checks.check_statistic"}),
    "torch.tensors.track": (
        1,
        {"running_mean": "torch.eligibility.declines in torch.modules.Served.forward before torch.modules._eager"},
    ),
    "torch.inference_cache.inference": (
        3,
        {
            "x": "torch.inference_cache._call_plan in torch.inference_cache.inference before torch.allocator.like",
            "mean, var, gamma, beta": "torch.eligibility.declines in torch.modules.Served.forward before "
            "torch.inference_cache.store",
        },
    ),
}


@cache
def _modules() -> dict[str, ast.Module]:
    """Of the package, by name; kernels are what is compiled, not who calls it."""
    files = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    return {
        name.removesuffix(".__init__"): ast.parse(path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if not name.startswith(("cpu.kernels.", "cuda.kernels."))
    }


@cache
def _functions() -> dict[str, ast.AST]:
    """Every function, "module.Class.method" or "module.outer.inner", and each module's own statements, "module"."""

    def within(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield f"{name}.{child.name}", child
                yield from within(child, f"{name}.{child.name}")
            else:
                yield from within(child, name)

    return {name: node for module, tree in _modules().items() for name, node in ((module, tree), *within(tree, module))}


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, those of functions and classes inside it left out."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child
            yield from _own(child)


def _module(name: str) -> str:
    return max((module for module in _modules() if f"{name}.".startswith(f"{module}.")), key=len)


@cache
def _imported(module: str) -> dict[str, str]:
    """Names that a module, or a function of it, imports from the package: what each stands for."""
    found = {}
    for node in ast.walk(_modules()[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastbn" and not node.level:
            base = node.module.partition(".")[2]
            found |= {alias.asname or alias.name: f"{base}.{alias.name}".lstrip(".") for alias in node.names}
    return found


@cache
def _resolved(text: str, name: str) -> str:
    """The function of the package that an expression in function `name` means, or ""."""
    first, _, rest = text.partition(".")
    dotted, outer = f".{rest}" if rest else "", name.split(".")
    places = [".".join([*outer[:k], text]) for k in range(len(outer), 0, -1)]  # its own, the class's, the module's
    places += [
        _imported(_module(name)).get(first, "") + dotted,
        name.rpartition(".")[0] + dotted if first == "self" else "",
    ]
    return next((place for place in places if place in _functions()), "")


def _line(node: ast.AST) -> int:
    return int(getattr(node, "lineno", 0))


def _text(node: ast.AST) -> str:
    """A dotted name, or "": ast.unparse takes a second for all of them."""
    if isinstance(node, ast.Attribute):
        return f"{base}.{node.attr}" if (base := _text(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


@cache
def _sites(name: str) -> list[int]:
    """The lines of a function that make it a call site: one for each attribute, call or function of CONTRACT."""
    lines = []
    for node in _own(_functions()[name]):
        text = _text(node)
        attribute = (
            isinstance(node, ast.Attribute) and (node.attr in ATTRIBUTES or text in READY) and text not in HARMLESS
        )
        contract = name not in CONTRACT and text and _resolved(text, name) in CONTRACT
        if attribute or contract:
            lines.append(_line(node))
    return lines


def _calls(name: str) -> Iterator[tuple[str, int]]:
    """Functions of the package that a function calls, and where."""
    for node in _own(_functions()[name]):
        if isinstance(node, ast.Call) and (found := _resolved(_text(node.func), name)):
            yield found, _line(node)


def _reaches(name: str, wanted: str, last: float = float("inf"), seen: tuple[str, ...] = ()) -> bool:
    """Whether a function calls another up to a line, itself or through what it calls there."""
    before = [called for called, line in _calls(name) if line <= last]
    return wanted in before or any(
        _reaches(called, wanted, seen=(*seen, called)) for called in before if called not in seen
    )


def test_every_call_site_is_listed() -> None:
    assert set(_functions()) >= CONTRACT, "gone"
    found = {name for name in _functions() if _sites(name)} | CONTRACT
    listed = CONTRACT | set(NO_ARRAY) | set(CHECKED)
    assert sorted(found - listed) == [], "calls compiled code or takes an address: say where its arrays are checked"
    assert sorted(listed - found) == [], "no call site any more"
    assert len(listed) == len(CONTRACT) + len(NO_ARRAY) + len(CHECKED)


@pytest.mark.parametrize("site", CHECKED)
def test_its_arrays_come_from_the_named_checks(site: str) -> None:
    count, arrays = CHECKED[site]
    assert len(_sites(site)) == count, "more call sites or fewer: say where their arrays are checked"
    for array, said in arrays.items():
        check, *route = said.replace(" before ", " in ").split(" in ")
        assert check in _functions(), f"{site}: {array}: no {check}"
        place, before = site, min(_sites(site))
        if route:
            place, target = route
            before = min(line for called, line in _calls(place) if called == target)
        assert _reaches(place, check, before), f"{site}: {array}: {place} does not call {check} before line {before}"


def _known(argument: Any, token: str, dtype: np.dtype[Any]) -> bool:
    """Whether an argument is what the first word of its line in a kernel's table promises to compiled code."""
    kind, rank = token[0], int(token[1:] or 1)
    if kind in "ifb":
        return isinstance(argument, {"i": int | np.integer, "f": int | float | np.number, "b": bool}[kind])
    computed = np.dtype(np.float64) if kind in "ms" or dtype == np.float64 else np.dtype(np.float32)
    flags = argument.flags
    return (
        isinstance(argument, np.ndarray)
        and argument.ndim == rank
        and argument.dtype == (dtype if kind in "xy" else computed)
        and argument.dtype.isnative
        and (kind in "xy" or flags.c_contiguous)
        and (kind not in "yws" or flags.writeable)
        and (kind not in "ws" or flags.aligned)
        and (kind != "x" or not argument.size or argument.shape[-1] == 1 or argument.strides[-1] == argument.itemsize)
    )


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that run, each with all its arguments looked at first."""
    from fastbn.cpu.kernels import jit

    seen: set[str] = set()
    compiled = jit.Kernel.compiled

    def watching(self: jit.Kernel, dtype: np.dtype[Any], parallel: Any) -> Callable[..., Any]:
        run, tokens = compiled(self, dtype, parallel), [line.split()[0] for line in self.arguments.values()]

        def watch(*arguments: Any) -> Any:
            seen.add(self.name)
            for token, argument in zip(tokens, arguments, strict=True):
                assert _known(argument, token, np.dtype(dtype)), f"{self.name}: {token} given {argument!r:.200}"
            rows = {
                a.size
                for a, token in zip(arguments, tokens, strict=True)
                if token in ("m1", "p1") or (token == "w1" and len(tokens) == 6)
            }
            assert len(rows - {0}) <= 1, f"{self.name}: rows of {rows} channels"
            return run(*arguments)

        return watch

    monkeypatch.setattr(jit.Kernel, "compiled", watching)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_reaches_an_entry_point_is_what_it_was_compiled_for(dtype: str, watched: set[str]) -> None:
    from shapes import LAYOUTS, Case, arrange

    import fastbn
    from fastbn.cpu.kernels import jit
    from tests.test_contract import CALLS as EVERY
    from tests.test_contract import STATISTICS as TAKING
    from tests.test_contract import inputs

    for case in (
        Case((9, 5), 1, "columns"),
        Case((70, 33), 1, "panels"),
        Case((3, 4, 21), 1, "rows"),
        Case((2, 3, 600), 1, "long rows"),
    ):
        for arrangement in LAYOUTS:
            i = inputs(case, dtype, arrangement)
            rows = "C" if arrangement == "big_endian" else arrangement
            i = i._replace(**{name: arrange(rows, getattr(i, name), 0) for name in ("gamma", "beta", "mean", "var")})
            for name, call in EVERY.items():
                call(i, "cpu", *([] if name in TAKING else [np.empty(case.shape, dtype)]))
            sums = fastbn.batch_norm_backward_reduce(i.dy, i.x, i.mean, i.var, case.axis)
            count = i.x.size // i.mean.size
            fastbn.batch_norm_backward_input(i.dy, i.x, i.mean, i.var, *sums, count, i.gamma, case.axis)
            bn = fastbn.BatchNorm(case.shape[1], dtype=dtype)
            if arrangement not in ("broadcast", "one_channel_for_all", "big_endian"):
                bn.running_mean, bn.running_var = (
                    LAYOUTS[arrangement](np.ones(case.shape[1], dtype), 0) for _ in range(2)
                )
            bn(i.x)
    assert watched == {kernel.name for kernel in jit.KERNELS if not kernel.name.startswith("inference.")}
