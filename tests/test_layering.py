"""The house plan, read from the source: who may import whom, what is imported where, how long a file may be."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastbn"

# A file imports only from lower tiers; the fraction orders the files of one tier. Tier 6 may import within itself, without cycles.
TIERS = {
    "config.py": 0.0,
    "errors.py": 0.0,
    "interrupts.py": 0.0,
    "scalars.py": 0.0,
    "dtypes.py": 0.1,
    "overlap.py": 0.1,
    "foreign.py": 0.15,
    "checks.py": 0.2,
    "layout.py": 0.3,
    "kernels/__init__.py": 0.0,
    "kernels/welford.py": 0.0,
    "moments.py": 0.16,
    "pool.py": 0.0,
    "threads.py": 0.1,
    "reference.py": 1,
    "kernels/_cache.py": 2.0,
    "kernels/_jit.py": 2.01,
    "kernels/_team.py": 2.0,
    "kernels/_plain.py": 2.0,
    "kernels/_half.py": 2.0,
    "kernels/_vector.py": 2.01,
    "kernels/blocks.py": 2.0,
    "kernels/_simd.py": 2.1,
    "kernels/_memory.py": 2.1,
    "kernels/beyond.py": 2.2,
    "kernels/elementwise.py": 2.3,
    "kernels/tiles.py": 2.2,
    "kernels/statistics.py": 2.4,
    "kernels/channels_first.py": 2.4,
    "kernels/channels_first_backward.py": 2.5,
    "kernels/channels_last.py": 2.5,
    "kernels/channels_last_apply.py": 2.6,
    "kernels/channels_last_backward.py": 2.7,
    "kernels/inference.py": 2.7,
    "kernels/serial.py": 2.8,
    "kernels/cuda/__init__.py": 2.0,
    "kernels/cuda/_group.py": 2.0,
    "kernels/cuda/_simulated.py": 2.0,
    "kernels/cuda/_device.py": 2.1,
    "kernels/cuda/_gpu.py": 2.2,
    "kernels/cuda/_disk.py": 2.25,
    "kernels/cuda/_jit.py": 2.3,
    "kernels/cuda/merging.py": 2.4,
    "kernels/cuda/rows.py": 2.5,
    "kernels/cuda/columns.py": 2.5,
    "kernels/cuda/finish.py": 2.5,
    "kernels/cuda/apply.py": 2.5,
    "kernels/cuda/fused.py": 2.6,
    "kernels/cuda/moving.py": 2.5,
    **dict.fromkeys(("backends/schedule.py", "backends/grids.py", "backends/devices.py"), 3.0),
    **dict.fromkeys(("backends/streams.py", "device_checks.py"), 3.01),
    "backends/views.py": 3.02,
    "backends/model.py": 3.05,
    "backends/launches.py": 3.1,
    "backends/__init__.py": 3.1,
    "backends/routes.py": 3.05,
    "backends/cpu.py": 3.1,
    "backends/cuda.py": 3.2,
    "ready.py": 3.2,
    "device.py": 3.3,
    "device_gradients.py": 3.35,
    "results.py": 3.4,
    "functional.py": 4,
    "gradients.py": 4,
    "split.py": 4,
    "residence.py": 4,
    "collective.py": 0.1,
    "distributed.py": 4.1,
    "affine.py": 5.0,
    "running.py": 5.0,
    "screen.py": 5.0,
    "recalibration.py": 5.1,
    "state.py": 5.0,
    "batchnorm.py": 5.2,
    "__init__.py": 6,
    "__main__.py": 6,
    "cases.py": 6,
    "check.py": 6,
    "cli.py": 6,
    "dask.py": 6,
    "data.py": 6,
    "demo.py": 6,
    "demo_network.py": 6,
    "fold.py": 6,
    "info.py": 6,
    "quickbench.py": 6,
    "stream.py": 6,
    "timing.py": 6,
    "torch/__init__.py": 6,
    "torch/convert.py": 6,
    "torch/derivatives.py": 6,
    "torch/functions.py": 6,
    "torch/kernels.py": 6,
    "torch/memory.py": 6,
    "torch/modules.py": 6,
    "torch/operator.py": 6,
    "torch/prepared.py": 6,
    "torch/serves.py": 6,
    "torch/fuse.py": 6,
    "torch/sync.py": 6,
    "torch/team.py": 6,
    "torch/traced.py": 6,
}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    module: str  # as written, absolute
    names: tuple[str, ...]  # of a from-import
    deferred: bool  # inside a function, or for the type checker only
    line: int


def _imports(tree: ast.AST, package: str, deferred: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, (), deferred, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*up, *([node.module] if node.module else [])])
            yield Import(module, tuple(alias.name for alias in node.names), deferred, node.lineno)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside |= isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        yield from _imports(node, package, deferred or inside)


def _parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"), file)


def imports(file: str) -> list[Import]:
    package = ".".join(["fastbn", *Path(file).parts[:-1]])
    return list(_imports(_parse(file), package))


def _file_of(module: str) -> str | None:
    """The file of a module of the package, or None."""
    parts = module.split(".")[1:]
    for candidate in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
        if candidate in FILES:
            return candidate
    return None


def own_imports(file: str) -> Iterator[tuple[str, int]]:
    """(file imported, line) for every import of the package's own."""
    for found in imports(file):
        if found.module.split(".")[0] != "fastbn":
            continue
        submodules = [_file_of(f"{found.module}.{name}") for name in found.names]
        if not found.names or None in submodules:  # names of the module itself
            target = _file_of(found.module)
            assert target is not None, f"{file}:{found.line} imports {found.module}, which is not there"
            yield target, found.line
        yield from ((target, found.line) for target in submodules if target is not None)


def test_the_reader_sees_every_kind_of_import() -> None:
    """The check itself: each spelling, also inside a function, is resolved."""
    source = (
        "import fastbn.layout\nfrom fastbn import config as c\nfrom . import cpu\nfrom ..errors import X\n"
        "def f():\n    from fastbn.kernels import _jit\nif TYPE_CHECKING:\n    import rich\n"
    )
    found = list(_imports(ast.parse(source), "fastbn.backends"))
    assert [(i.module, i.names, i.deferred) for i in found] == [
        ("fastbn.layout", (), False),
        ("fastbn", ("config",), False),
        ("fastbn.backends", ("cpu",), False),
        ("fastbn.errors", ("X",), False),
        ("fastbn.kernels", ("_jit",), True),
        ("rich", (), True),
    ]
    assert ("backends/schedule.py", "layout.py", "kernels/_jit.py") == tuple(
        map(_file_of, ("fastbn.backends.schedule", "fastbn.layout", "fastbn.kernels._jit"))
    )
    assert _file_of("fastbn") == "__init__.py"
    assert _file_of("fastbn.explain") is None
    assert "config.py" in {target for target, _ in own_imports("functional.py")}


def test_every_file_has_a_tier_and_every_tier_a_file() -> None:
    assert sorted(TIERS) == FILES


def test_imports_only_from_lower_tiers() -> None:
    upwards = [
        f"fastbn/{file}:{line}: tier {TIERS[file]} imports {target}, tier {TIERS[target]}"
        for file in FILES
        for target, line in own_imports(file)
        if not (TIERS[target] < TIERS[file] or TIERS[target] == TIERS[file] == 6)
    ]
    assert not upwards


def test_no_cycles() -> None:
    graph = {file: {target for target, _ in own_imports(file)} for file in FILES}
    while graph:
        leaves = {file for file, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"these import each other in a circle: {sorted(graph)}"
        graph = {file: targets for file, targets in graph.items() if file not in leaves}


def test_the_kernel_contract_is_a_docstring_and_names_found_when_asked_for() -> None:
    body = _parse("kernels/__init__.py").body
    assert [type(node) for node in body] == [ast.Expr, ast.Import, ast.ImportFrom, ast.FunctionDef]
    assert isinstance(body[-1], ast.FunctionDef)
    assert body[-1].name == "__getattr__"


# Who may import which of the dependencies: with the module, and only when a function asks.
CUDA = [f"kernels/cuda/{name}.py" for name in ("_device", "_disk", "_group", "_gpu", "_jit")]
AT_IMPORT = {
    "numpy": FILES,
    "dask": ["dask.py"],
    "numba": [f"kernels/{name}.py" for name in ("_cache", "_jit", "_memory", "_simd", "_team", "_vector")] + CUDA,
    "torch": [file for file in FILES if file.startswith("torch/")],  # the bridge to it
    "llvmlite": [
        "kernels/_cache.py",
        "kernels/_half.py",
        "kernels/_memory.py",
        "kernels/_simd.py",
        "kernels/_team.py",
        "kernels/_vector.py",
        "kernels/cuda/_device.py",
        "kernels/cuda/_group.py",
    ],
}
IN_FUNCTIONS = {
    # These show or ask for numba's settings; pool.py also launches its threads, devices.py asks for a driver, cli.py counts what compiles.
    "numba": ["cli.py", "info.py", "pool.py", "threads.py", "backends/devices.py", "kernels/cuda/_jit.py"],
    "cuda": ["kernels/cuda/_jit.py", "kernels/cuda/_disk.py"],  # NVIDIA's bindings: on which device memory lies; which compiler
    "cupy": ["backends/devices.py", "residence.py"],  # whose arrays come in, and hold a layer's parameters
    "llvmlite": ["info.py"],  # shows the processor as the compiler sees it
    "ml_dtypes": ["dtypes.py"],  # when bfloat16 is asked for by name
    "rich": ["screen.py", "demo.py"],
    "matplotlib": ["demo.py"],
    "threadpoolctl": ["demo.py"],
    "sklearn": ["data.py"],
    # A peer, where installed; as CuPy; whose process groups join ranks; whose weights are folded.
    "torch": ["quickbench.py", "cases.py", "backends/devices.py", "residence.py", "collective.py", "fold.py"],
    "mpi4py": ["collective.py"],  # whose communicators join ranks
}


def offenders(allowed: Callable[[str, Import], bool]) -> list[str]:
    """The imports of the package that a rule forbids."""
    return [
        f"fastbn/{file}:{found.line} imports {found.module}{', in a function' if found.deferred else ''}"
        for file in FILES
        for found in imports(file)
        if not allowed(file, found)
    ]


def test_dependencies_are_imported_where_they_belong() -> None:
    def allowed(file: str, found: Import) -> bool:
        root = found.module.split(".")[0]
        own = root == "fastbn" or root in sys.stdlib_module_names
        return own or file in AT_IMPORT.get(root, []) or (found.deferred and file in IN_FUNCTIONS.get(root, []))

    assert not offenders(allowed)


def test_numba_cuda_is_imported_by_its_kernels_only_or_when_asked_for() -> None:
    def allowed(file: str, found: Import) -> bool:
        named = {found.module, *(f"{found.module}.{name}" for name in found.names)}
        cuda = any(f"{name}.".startswith("numba.cuda.") for name in named)
        return not cuda or file in CUDA or (file == "backends/devices.py" and found.deferred)

    assert not offenders(allowed)


def test_the_kernels_of_cuda_are_imported_only_by_its_backend_or_when_asked_for() -> None:
    def allowed(file: str, found: Import) -> bool:
        asked = found.deferred or file.startswith("kernels/cuda/") or file in ("backends/launches.py", "backends/cuda.py", "device.py")
        return asked or not found.module.startswith("fastbn.kernels.cuda")

    assert not offenders(allowed)


def test_what_a_kernel_is_compiled_from_lies_under_the_stamp_of_the_cache() -> None:
    """Files of kernels import each other, NumPy and the compiler, nothing else of fastbn's: a digest of them all sees every edit."""
    hosts = ("kernels/_jit.py", "kernels/_cache.py")  # what compiles, and is not compiled: threads, the pool, interrupts

    def allowed(file: str, found: Import) -> bool:
        kernels = file.startswith("kernels/") and not file.startswith("kernels/cuda/") and file not in hosts
        elsewhere = found.module.split(".")[0] == "fastbn" and not f"{found.module}.".startswith("fastbn.kernels.")
        return not (kernels and elsewhere)

    assert not offenders(allowed)


def test_a_bridge_is_imported_by_itself_and_by_the_command_that_warms_it_up() -> None:
    own = [f for f in FILES if f.startswith("torch/") or f == "cli.py"]
    assert not [f"fastbn/{f}:{line}" for f in FILES for target, line in own_imports(f) if target.startswith("torch/") > (f in own)]


ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
READS_ENVIRONMENT = ["config.py", "info.py"]  # info shows what is set


def test_only_config_reads_the_environment() -> None:
    def reads(node: ast.AST) -> bool:
        named = isinstance(node, ast.ImportFrom) and node.module == "os" and ENVIRONMENT & {alias.name for alias in node.names}
        return bool(named) or (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT)

    assert [file for file in FILES if any(map(reads, ast.walk(_parse(file))))] == READS_ENVIRONMENT


def test_no_exec_eval_or_globals() -> None:
    def banned(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"exec", "eval", "globals"}

    found = [(file, node.lineno) for file in FILES for node in ast.walk(_parse(file)) if banned(node)]  # type: ignore[attr-defined] # a Call
    assert not found


def test_asserts_guard_nothing() -> None:
    """`python -O` leaves them out: they may tell the type checker that something is there, no more."""
    stand_ins = ("kernels/_plain.py", "kernels/cuda/_simulated.py")  # for the kernels' tests

    def narrows(test: ast.expr) -> bool:
        parts = test.values if isinstance(test, ast.BoolOp) else [test]
        return all(isinstance(part, ast.Compare) and isinstance(part.ops[0], ast.IsNot) for part in parts)

    found = [(file, node) for file in FILES if file not in stand_ins for node in ast.walk(_parse(file)) if isinstance(node, ast.Assert)]
    assert found
    assert not [f"fastbn/{file}:{node.lineno}" for file, node in found if not narrows(node.test)]


def test_no_file_over_350_lines() -> None:
    every = [path for folder in ("fastbn", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert len(every) > len(FILES)
    too_long = {path.relative_to(ROOT).as_posix(): n for path in every if (n := len(path.read_text(encoding="utf-8").splitlines())) > 350}
    assert not too_long
