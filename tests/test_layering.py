"""The house plan, read from the source: who may import whom, what is imported where, how long a file may be."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

PACKAGE = ROOT / "fastbn"

# Folders and files, from the ground up: each imports from its own floor and from lower ones, and nothing in a circle.
FLOORS = (
    ("arguments", "progress"),
    # what computes, and the machine
    ("cpu/pool", "cpu/threads", "cpu/interrupts", "cpu/team", "cpu/kernels", "cuda/kernels"),
    ("statistics",),
    ("reference", "cpu", "cuda"),
    ("backends",),
    ("functional",),
    ("batchnorm", "running", "distributed", "fold"),
    ("kernels", "torch", "dask"),
    ("__init__", "__main__", "cli"),
)


def floor(file: str) -> int:
    """Of a file: that of the longest name which it or its folder has."""
    found = {
        len(name): n for n, names in enumerate(FLOORS) for name in names if file.startswith((f"{name}.", f"{name}/"))
    }
    return found[max(found)]


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
    """The check itself: each spelling, also inside a function, is resolved; and floors are found."""
    source = (
        "import fastbn.functional\nfrom fastbn import running as r\nfrom . import pool\nfrom ..reference import X\n"
        "def f():\n    from fastbn.cpu.kernels import jit\nif TYPE_CHECKING:\n    import rich\n"
    )
    found = list(_imports(ast.parse(source), "fastbn.cpu"))
    assert [(i.module, i.names, i.deferred) for i in found] == [
        ("fastbn.functional", (), False),
        ("fastbn", ("running",), False),
        ("fastbn.cpu", ("pool",), False),
        ("fastbn.reference", ("X",), False),
        ("fastbn.cpu.kernels", ("jit",), True),
        ("rich", (), True),
    ]
    modules = ("fastbn.cpu.schedule", "fastbn.cpu.kernels.jit", "fastbn.cli.train", "fastbn", "fastbn.explain")
    assert [_file_of(name) for name in modules] == [
        "cpu/schedule.py",
        "cpu/kernels/jit.py",
        "cli/train/__init__.py",
        "__init__.py",
        None,
    ]
    assert "arguments/config.py" in {target for target, _ in own_imports("functional.py")}
    files = (
        "arguments/checks.py",
        "cpu/kernels/jit.py",
        "statistics.py",
        "cpu/schedule.py",
        "kernels.py",
        "cli/train/data.py",
    )
    assert [floor(file) for file in files] == [0, 1, 2, 3, 7, 8]


def test_imports_only_from_lower_floors() -> None:
    upwards = [
        f"fastbn/{file}:{line}: floor {floor(file)} imports {target}, floor {floor(target)}"
        for file in FILES
        for target, line in own_imports(file)
        if floor(target) > floor(file)
    ]
    assert not upwards


def test_no_cycles() -> None:
    graph = {file: {target for target, _ in own_imports(file)} for file in FILES}
    while graph:
        leaves = {file for file, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"these import each other in a circle: {sorted(graph)}"
        graph = {file: targets for file, targets in graph.items() if file not in leaves}


# Who may import which of the dependencies: with the module, and only when a function asks.
CUDA = [f"cuda/kernels/{name}.py" for name in ("device", "disk", "group", "gpu", "jit")]
AT_IMPORT = {
    "numpy": FILES,
    "dask": ["dask.py"],
    "numba": [
        "cpu/team.py",
        *(f"cpu/kernels/{name}.py" for name in ("cache", "jit", "private", "simd", "vector")),
        *CUDA,
    ],
    "torch": [file for file in FILES if file.startswith("torch/")],  # the bridge to it
    "llvmlite": [
        "cpu/team.py",
        *(f"cpu/kernels/{name}.py" for name in ("cache", "half", "private", "simd", "vector")),
        *(f"cuda/kernels/{name}.py" for name in ("device", "group")),
    ],
}
CLAIMS = ("__init__", "noise", "serving", "shift", "sweeps")  # each draws its picture
IN_FUNCTIONS = {
    # These show or ask for numba's settings; pool launches its threads, buffers asks for a driver, the command line
    # counts what compiles.
    "numba": [
        "cli/warmup.py",
        "cli/train/kernels.py",
        "cli/info.py",
        "cpu/pool.py",
        "cpu/threads.py",
        "cuda/buffers.py",
        "cuda/kernels/jit.py",
    ],
    # NVIDIA's bindings: on which device memory lies; which compiler
    "cuda": ["cuda/kernels/jit.py", "cuda/kernels/disk.py"],
    "cupy": ["cuda/buffers.py", "cuda/placement.py"],  # whose arrays come in, and hold a layer's parameters
    "llvmlite": ["cli/info.py"],  # shows the processor as the compiler sees it
    "ml_dtypes": ["arguments/dtypes.py"],  # when bfloat16 is asked for by name
    "rich": ["progress.py"],
    "matplotlib": ["cli/plots.py", "cli/train/report.py", *(f"cli/claims/{name}.py" for name in CLAIMS)],
    "threadpoolctl": ["cli/train/training.py"],
    "sklearn": ["cli/train/data.py"],
    "scipy": ["cli/claims/noise.py"],  # scikit-learn's own, a quantile
    # A peer, where installed; as CuPy; whose process groups join ranks; whose weights are folded.
    "torch": ["cli/bench.py", "cuda/buffers.py", "cuda/placement.py", "distributed.py", "fold.py"],
    "mpi4py": ["distributed.py"],  # whose communicators join ranks
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
        return not cuda or file in CUDA or (file == "cuda/buffers.py" and found.deferred)

    assert not offenders(allowed)


def test_the_kernels_of_cuda_are_imported_only_by_its_backend_or_when_asked_for() -> None:
    def allowed(file: str, found: Import) -> bool:
        asked = found.deferred or file.startswith("cuda/")
        named = (found.module, *(f"{found.module}.{name}" for name in found.names))
        return asked or not any(f"{name}.".startswith("fastbn.cuda.kernels.") for name in named)

    assert not offenders(allowed)


def test_what_a_kernel_is_compiled_from_lies_under_the_stamp_of_the_cache() -> None:
    """Files of kernels import each other, NumPy and the compiler, nothing else of fastbn's: a digest of them all sees
    every edit.
    """
    # what compiles, and is not compiled: threads, the pool, interrupts
    hosts = ("cpu/kernels/jit.py", "cpu/kernels/cache.py")

    def allowed(file: str, found: Import) -> bool:
        kernels = file.startswith("cpu/kernels/") and file not in hosts
        elsewhere = found.module.split(".")[0] == "fastbn" and not f"{found.module}.".startswith("fastbn.cpu.kernels.")
        return not (kernels and elsewhere)

    assert not offenders(allowed)


def test_a_bridge_is_imported_by_itself_and_by_the_command_that_warms_it_up() -> None:
    own = [f for f in FILES if f.startswith("torch/") or f == "cli/warmup.py"]
    assert not [
        f"fastbn/{f}:{line}"
        for f in FILES
        for target, line in own_imports(f)
        if target.startswith("torch/") > (f in own)
    ]


ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
READS_ENVIRONMENT = ["arguments/config.py", "cli/info.py"]  # info shows what is set


def test_only_config_reads_the_environment() -> None:
    def reads(node: ast.AST) -> bool:
        named = (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and ENVIRONMENT & {alias.name for alias in node.names}
        )
        return bool(named) or (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT)

    assert [file for file in FILES if any(map(reads, ast.walk(_parse(file))))] == READS_ENVIRONMENT


def test_no_exec_eval_or_globals() -> None:
    def banned(node: ast.AST) -> bool:
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"exec", "eval", "globals"}
        )

    # a Call
    found = [(file, node.lineno) for file in FILES for node in ast.walk(_parse(file)) if banned(node)]  # type: ignore[attr-defined]
    assert not found


def test_asserts_guard_nothing() -> None:
    """`python -O` leaves them out: they may tell the type checker that something is there, no more."""
    stand_ins = ("cpu/kernels/plain.py", "cuda/kernels/simulated.py")  # for the kernels' tests

    def narrows(test: ast.expr) -> bool:
        parts = test.values if isinstance(test, ast.BoolOp) else [test]
        return all(isinstance(part, ast.Compare) and isinstance(part.ops[0], ast.IsNot) for part in parts)

    found = [
        (file, node)
        for file in FILES
        if file not in stand_ins
        for node in ast.walk(_parse(file))
        if isinstance(node, ast.Assert)
    ]
    assert found
    assert not [f"fastbn/{file}:{node.lineno}" for file, node in found if not narrows(node.test)]


def _code_lines(path: Path) -> int:
    """Lines of a file that are code: no docstring, comment or blank line."""
    text = path.read_text(encoding="utf-8")
    tree, docstrings = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    code = [line.strip() for n, line in enumerate(text.splitlines(), 1) if n not in docstrings]
    return sum(bool(line) and not line.startswith("#") for line in code)


def test_no_file_over_350_lines_of_code() -> None:
    every = [path for folder in ("fastbn", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert len(every) > len(FILES)
    too_long = {path.relative_to(ROOT).as_posix(): n for path in every if (n := _code_lines(path)) > 350}
    assert not too_long
