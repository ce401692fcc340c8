"""PTX read: kernels with their parameters, registers, shared memory and instructions in basic blocks."""

import re
from dataclasses import dataclass, field
from typing import Any

GAP = 256  # bytes that belong to nobody behind an array in shared memory

# What a directive inside of a body says that does not matter here.
SILENT = (".loc", ".pragma", ".shared")
KINDS = {"bar": "barrier", "barrier": "barrier", "shfl": "shuffle", "bra": "branch", "ret": "end", "exit": "end"}


@dataclass(slots=True)
class Instruction:
    """One line: `@predicate opcode arguments`."""

    predicate: str | None
    negated: bool
    opcode: str
    arguments: list[str]
    line: str
    target: int = -1  # of a branch: an index into the code
    run: Any = None  # what the machine makes of it

    @property
    def parts(self) -> list[str]:
        """The opcode's parts, the type last."""
        return self.opcode.split(".")

    @property
    def kind(self) -> str:
        """Whether it is a barrier, a shuffle, a branch, an end, or an operation of each thread by itself."""
        return KINDS.get(self.parts[0], "operation")


@dataclass(slots=True)
class Parameter:
    name: str
    kind: str
    size: int
    at: int  # bytes from the first


@dataclass
class Kernel:
    """One entry of a module."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)  # bits by name
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # (offset, size) by name
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    most_threads: int | None = None
    after: dict[int, int] = field(default_factory=dict)  # of each basic block's first instruction: the next block's

    @property
    def parameter_bytes(self) -> int:
        return max((p.at + p.size for p in self.parameters), default=0)

    @property
    def shared_bytes(self) -> int:
        return max((offset + size + GAP for offset, size in self.shared.values()), default=0)


def parse(text: str) -> Kernel:
    """The one kernel of a module.

    Raises
    ------
    NotImplementedError, SyntaxError
        What is not known, with its line.
    """
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", text), flags=re.DOTALL)
    if found := re.search(r"[^\n]*\.func\b[^\n]*", text):
        raise NotImplementedError(f"a function that is not inlined: {found[0].strip()}")
    (entry,) = re.finditer(r"\.entry\s+([\w$]+)\s*\(", text)
    kernel = Kernel(entry[1])
    end = _closing(text, entry.end() - 1)
    _parameters(kernel, split(text[entry.end() : end]))
    begin = text.index("{", end)
    if bound := re.search(r"\.maxntid\s+(\d+)", text[end:begin]):
        kernel.most_threads = int(bound[1])
    for found in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.[a-z](\d+)\s+([\w$.]+)(?:\[(\d+)\])?;", text):
        align, size = int(found[1]), int(found[2]) // 8 * int(found[4] or 1)
        kernel.shared[found[3]] = (-(-kernel.shared_bytes // align) * align, size)
    _Body(kernel, text[begin + 1 : _closing(text, begin)]).read()
    _blocks(kernel)
    return kernel


def split(operands: str) -> list[str]:
    """By commas that are not within braces or brackets."""
    found, depth = [""], 0
    for letter in operands:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found if part.strip()]


def _closing(text: str, at: int) -> int:
    """Where the bracket closes that opens there."""
    left, depth = text[at], 0
    right = {"(": ")", "{": "}"}[left]
    for k in range(at, len(text)):
        depth += (text[k] == left) - (text[k] == right)
        if depth == 0:
            return k
    raise SyntaxError(f"a {left} that is not closed")


def _parameters(kernel: Kernel, declared: list[str]) -> None:
    pattern = r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?([\w$]+)$"
    for text in declared:
        found = re.match(pattern, text)
        if found is None:
            raise NotImplementedError(f"a parameter: {text}")
        size = int(found[1][1:]) // 8
        kernel.parameters.append(Parameter(found[2], found[1], size, -(-kernel.parameter_bytes // size) * size))


class _Body:
    """A kernel's statements, in scopes whose registers have names of their own."""

    def __init__(self, kernel: Kernel, text: str) -> None:
        self.kernel, self.text = kernel, text
        self.scopes: list[dict[str, str]] = [{}]
        self.scoped = 0

    def read(self) -> None:
        at = 0
        while begin := re.compile(r"\s*(?=\S)").match(self.text, at):
            at = begin.end()
            if self.text[at] in "{}":
                self.scopes = [*self.scopes, {}] if self.text[at] == "{" else self.scopes[:-1]
                at += 1
            elif label := re.compile(r"([$%\w]+):").match(self.text, at):
                self.kernel.labels[label[1]] = len(self.kernel.code)
                at = label.end()
            else:
                stop = self.text.index(";", at)
                self._statement(" ".join(self.text[at:stop].split()))
                at = stop + 1

    def _statement(self, line: str) -> None:
        if line.startswith(".reg"):
            self._registers(line)
        elif line.startswith("."):
            if line.split()[0] not in SILENT:
                raise NotImplementedError(line)
        else:
            found = re.match(r"(?:@(!?)([%\w]+) )?([\w.:]+)(?: (.*))?$", line)
            if found is None:
                raise SyntaxError(line)
            negated, predicate, opcode, rest = found.groups()
            arguments = split(self._resolved(rest or ""))
            self.kernel.code.append(
                Instruction(self._resolved(predicate or "") or None, bool(negated), opcode, arguments, line)
            )

    def _registers(self, line: str) -> None:
        _, kind, names = line.split(maxsplit=2)
        width = 1 if kind == ".pred" else int(re.sub(r"\D", "", kind))
        for name in split(names):
            if many := re.match(r"(.*)<(\d+)>$", name):
                self.kernel.registers |= {f"{many[1]}{k}": width for k in range(int(many[2]))}
            elif len(self.scopes) > 1:
                self.scoped += 1
                own = self.scopes[-1][name] = f"{name}#{self.scoped}"
                self.kernel.registers[own] = width
            else:
                self.kernel.registers[name] = width

    def _resolved(self, operands: str) -> str:
        for scope in reversed(self.scopes):
            for name, own in scope.items():
                operands = re.sub(rf"(?<![\w%#]){re.escape(name)}(?![\w#])", own, operands)
        return operands


def _blocks(kernel: Kernel) -> None:
    """Find the basic blocks: they begin at labels, and at and behind what threads wait or part at."""
    code = kernel.code
    first = {0, *kernel.labels.values()}
    for k, instruction in enumerate(code):
        if instruction.kind in ("barrier", "shuffle"):
            first |= {k, k + 1}
        elif instruction.kind != "operation":
            first.add(k + 1)
        if instruction.kind == "branch":
            instruction.target = kernel.labels[instruction.arguments[-1]]
    begins = sorted(k for k in first if k < len(code))
    kernel.after = dict(zip(begins, [*begins[1:], len(code)], strict=True))
