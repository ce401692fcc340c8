"""Small errors in the functions of the package, chosen and told: what `python -m tests.mutants` asks the tests to
catch.
"""

import ast
import random
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from tests import ROOT

# what compiles, and what a kernel is made of
HOSTS = ("__init__", "cache", "half", "jit", "plain", "private", "simd", "vector")
KERNELS = [
    f"cpu/kernels/{path.name}" for path in sorted((ROOT / "fastbn/cpu/kernels").glob("*.py")) if path.stem not in HOSTS
]
SCOPE = (
    *KERNELS,
    "cpu/schedule.py",
    "cpu/passes.py",
    "cpu/backend.py",
    "arguments/layout.py",
    "arguments/overlap.py",
    "arguments/checks.py",
    "arguments/dtypes.py",
    "arguments/scalars.py",
    "arguments/foreign.py",
)

# A pattern of "file:function: operator" and the changed lines: why no result can show it.
EQUIVALENT = {
    r"cpu/passes.py:warmup:": "compiles, and plain Python does not",
    r"schedule.py:streams: (?!lost)|\+ .*\bstream\b.* = .*schedule.streams\(": "past the cache or not: speed, "
    "never a bit",
    r"serial.py:.*\+ .*True, (y|dx)\)|affine_rest:.*\+ .*(True|1, False), rest_y": "past the cache or not: speed, "
    "never a bit",
    r"schedule.py:of_rows:.* prefetch, back_prefetch|affine_units:.*k, c, 1, y": "what is fetched meanwhile: speed",
    r"schedule.py:(tasks|group_of_statistics): (?!lost)|cpu/passes.py:.*\b(tasks|group) = ": "who does what: speed",
    r"schedule.py:(short: (?!lost)|of_rows:.*fused = |of_columns:.*fold >= 1|route:.*\bC, 2)": "another walk, as right",
    r"cpu/passes.py:.*grad_input:.*applied=False": "another walk, as right as the first",
    r"(whole_rows|one_stream):.*> (W|lanes)|affine_block:.*far|tile_sums:.*PANELS": "one of two loops that do the same",
    r"affine_block:.*0 <= first|gradient_row:.*s <= s1|(grad_reduce|grad_input):.*rest >= 0": "a turn for nothing more",
    r"(wide_deviations|affine_row):.*\+ .*(8|W) < s1": "the last vector goes to the loop behind, which takes what is "
    "left",
    r"affine_rest: dropped.*fill_affine": "task 0 has left them there",
    r"as_row:.*\(2, size\)|cpu/passes.py:.*inference.*\(3, C\)|serial.py:.*\+ 17": "more room than is used",
    r"columns.py:(task_units|unit_of):.*(block \+ 1\)|task \+ 2\))|tile_sums:.*4 \+ W": "units of nothing, or the same "
    "ones twice",
    r"workspace_of:.*& 64": "a boundary for speed",
    r"block_gradient:.*6 if training": "a row spread that is not read",
    r"group_rows: (?!lost)": "how many values share a sum: the last digits",
    r"Plan.__init__:.*>= abs": "axes of one stride: elements that share memory",
    r"Plan.empty:.*<= ALIGNED": "a boundary for speed",
    r"overlap.py:.*strict=False": "strides and shape have one length",
    r"view_as:.*isnative": "a copy that was not needed",
    r"check_axis:.*rank > 2|_overlap:.*100001|check_shape:.*default=1": "left to a slower way to the same",
}


class Mutant(NamedTuple):
    file: str
    function: str
    operator: str
    change: str  # the lines that differ, as `ast` writes them
    old: str  # the function's text, and what stands for it
    new: str
    lines: range  # of it that the error is on, from 0

    def __str__(self) -> str:
        return f"{self.file}:{self.function}: {self.operator}\n{self.change}"

    def place(self, root: Path) -> tuple[str, range]:
        """The file that holds the function in a checkout, wherever it lies there, and the lines of the error in it."""
        for path in (root / "fastbn" / self.file, *sorted((root / "fastbn").rglob("*.py"))):
            before, *after = path.read_text(encoding="utf-8").split(self.old) if path.exists() else ["", "", ""]
            if len(after) == 1:
                first = before.count("\n") + 1
                return path.relative_to(root).as_posix(), range(first + self.lines.start, first + self.lines.stop)
        return "", range(0)


# How code goes wrong

SIGNS: dict[type, tuple[str, type]] = {
    ast.Add: ("sign", ast.Sub),
    ast.Sub: ("sign", ast.Add),
    ast.Mult: ("factor", ast.Add),
    ast.Div: ("factor", ast.Mult),
    ast.FloorDiv: ("factor", ast.Mult),
    ast.Lt: ("bound", ast.LtE),
    ast.LtE: ("bound", ast.Lt),
    ast.Gt: ("bound", ast.GtE),
    ast.GtE: ("bound", ast.Gt),
    ast.Eq: ("negated", ast.NotEq),
    ast.NotEq: ("negated", ast.Eq),
    ast.Is: ("negated", ast.IsNot),
    ast.IsNot: ("negated", ast.Is),
    ast.And: ("and, or", ast.Or),
    ast.Or: ("and, or", ast.And),
}
SYMMETRIC = (
    "min",
    "max",
    "isinstance",
    "hasattr",
    "may_share_memory",
    "shares_memory",
    "same_memory",
    "shared",
    "_overlap",
    "gcd",
)
QUIET = ("prefetch", "fence", "form", "compiled")  # nothing to plain Python, or all the same


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""


def _names(node: ast.AST, context: type = ast.Name) -> set[str]:
    return {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and (context is ast.Name or isinstance(n.ctx, context))
    }


def _less(bound: ast.expr) -> ast.expr:
    return ast.BinOp(bound, ast.Sub(), ast.Constant(1))


def _swapped(nodes: list[Any], first: int = 0) -> Iterator[list[Any]]:
    """Two neighbours that differ the other way round."""
    for i, (a, b) in enumerate(pairwise(nodes)):
        if i >= first and ast.unparse(a) != ast.unparse(b) and not {type(a), type(b)} & {ast.Starred, ast.GeneratorExp}:
            yield [*nodes[:i], b, a, *nodes[i + 2 :]]


def _quiet(node: Any) -> bool:
    if isinstance(node, ast.If):
        return all(_quiet(each) for each in node.body) and not node.orelse
    return _called(node.value if isinstance(node, ast.Expr) else node) in QUIET


def _code(node: ast.AST) -> Iterator[tuple[Any, ast.AST]]:
    """What a function does, in order, each node with its parent: not its signature, annotations, texts or functions
    within.
    """
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if (
                not isinstance(child, ast.AST)
                or isinstance(child, (ast.arguments, ast.FunctionDef, ast.JoinedStr))
                or _quiet(child)
            ):
                continue
            if field not in ("annotation", "returns", "decorator_list"):
                if hasattr(child, "lineno"):
                    yield child, node
                if not isinstance(child, ast.Raise):
                    yield from _code(child)


def _errors(node: Any, parent: Any, bound: set[str]) -> Iterator[tuple[str, Any, str, Any]]:
    """(operator, node, field, its wrong value)."""
    if type(getattr(node, "op", None)) in SIGNS:
        name, wrong = SIGNS[type(node.op)]
        yield name, node, "op", wrong()
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in SIGNS:
                name, wrong = SIGNS[type(op)]
                yield name, node, "ops", [*node.ops[:i], wrong(), *node.ops[i + 1 :]]
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield "negated", node, "test", ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Call) and _called(node) == "range":
        where = min(1, len(node.args) - 1)
        yield "off by one", node, "args", [*node.args[:where], _less(node.args[where]), *node.args[where + 1 :]]
    elif isinstance(node, ast.Call) and _called(node) not in SYMMETRIC:
        alike = _called(node) == "muladd"  # its first two
        yield from (("swapped", node, "args", args) for args in _swapped(node.args, alike))
    elif (
        isinstance(node, ast.Tuple)
        and isinstance(node.ctx, ast.Load)
        and not isinstance(parent, (ast.ExceptHandler, ast.Compare))
    ):
        if _called(parent) not in SYMMETRIC:
            yield from (("swapped", node, "elts", elements) for elements in _swapped(node.elts))
    elif isinstance(node, ast.Slice) and node.upper is not None:
        yield "off by one", node, "upper", _less(node.upper)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "negated", node, "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "off by one", node, "value", node.value + 1
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "lost", node, "value", ast.Constant(None)
    ends = isinstance(parent, ast.While) and _names(parent.test) & _names(node, ast.Store)  # else it never does
    replaced = isinstance(node, (ast.Assign, ast.AugAssign)) and _names(node, ast.Store) - {"_"} <= bound and not ends
    if replaced or isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and _called(node.value) != ""):
        field = next(name for name in ("body", "orelse") if node in getattr(parent, name, []))
        yield "dropped", parent, field, [ast.Pass() if each is node else each for each in getattr(parent, field)]


class Function:
    """One function of a file and all errors in it."""

    def __init__(self, file: str, name: str, source: str, node: ast.FunctionDef) -> None:
        self.file, self.name, self.node = file, name, node
        self.old = ast.get_source_segment(source, node) or ""
        self.errors = []
        bound = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        for part, parent in _code(node):
            self.errors += [(part, error) for error in _errors(part, parent, bound)]
            if isinstance(part, (ast.Assign, ast.For)):
                bound |= _names(part.target if isinstance(part, ast.For) else part, ast.Store)

    def mutant(self, part: Any, error: tuple[str, Any, str, Any]) -> Mutant:
        operator, changed, field, wrong = error
        kept, self.node.decorator_list = (getattr(changed, field), self.node.decorator_list), []
        right = ast.unparse(self.node)
        setattr(changed, field, wrong)
        new = ast.unparse(ast.fix_missing_locations(self.node))
        setattr(changed, field, kept[0])
        self.node.decorator_list = kept[1]
        pairs = zip_longest(right.splitlines(), new.splitlines(), fillvalue="")
        change = "\n".join(f"    - {a.strip()}\n    + {b.strip()}" for a, b in pairs if a != b)
        new = textwrap.indent(new, " " * self.node.col_offset).lstrip()
        lines = range(part.lineno - self.node.lineno, part.end_lineno - self.node.lineno + 1)
        return Mutant(self.file, self.name, operator, change, self.old, new, lines)

    def chosen(self, rng: random.Random, used: Counter[str]) -> Iterator[Mutant]:
        """One mutant of a short function, more of a long one, each by another operator where there are so many: those
        least used.
        """
        kinds: dict[str, list[Any]] = {}
        for part, error in rng.sample(self.errors, len(self.errors)):
            kinds.setdefault(error[0], []).append((part, error))
        order = sorted(kinds, key=lambda kind: (kind == "lost", used[kind], rng.random()))
        drawn = (self.mutant(*one) for lot in zip_longest(*(kinds[kind] for kind in order)) for one in lot if one)
        for mutant in islice((m for m in drawn if not why_equivalent(m)), 1 + self.old.count("\n") // 20):
            used[mutant.operator] += 1
            yield mutant


def functions(file: str) -> Iterator[Function]:
    """Of a module, of its classes, and those within others."""
    source = (ROOT / "fastbn" / file).read_text(encoding="utf-8")

    def within(tree: ast.AST, prefix: str) -> Iterator[Function]:
        for node in ast.iter_child_nodes(tree):
            # of a protocol a function is its docstring alone
            if isinstance(node, ast.FunctionDef) and not (len(node.body) == 1 and isinstance(node.body[0], ast.Expr)):
                yield Function(file, prefix + node.name, source, node)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield from within(node, f"{prefix}{node.name}.")

    return within(ast.parse(source), "")


def why_equivalent(mutant: Mutant) -> str:
    return next((why for pattern, why in EQUIVALENT.items() if re.search(pattern, str(mutant), re.DOTALL)), "")


def chosen(seed: int = 0) -> list[Mutant]:
    """Of every function in scope."""
    found = []
    for file in SCOPE:
        used: Counter[str] = Counter()
        for function in functions(file):
            found += function.chosen(random.Random(f"{seed} {file} {function.name}"), used)
    return found
