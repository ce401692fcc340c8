"""The pages are right: their code runs, their commands and options exist, signatures and links too; docstrings have
their sections.
"""

import importlib.metadata
import importlib.util
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import cli
from fastbn.arguments import config
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
# packages that only an extra installs: blocks that import one, or its bridge, run by themselves
NEEDS = ("dask", "torch")
PYTHON = re.compile(r"^```python( \w+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Those of "python mpi" and "python torch" are files to be launched: see test_distributed.py.
BLOCKS = {page: [block for launched, block in PYTHON.findall(text) if not launched] for page, text in PAGES.items()}
PROSE = PYTHON.sub("", "\n".join(PAGES.values()))
# indented lines, inline code
CODE = [*re.findall(r"^    (\S.*)$", PROSE, re.MULTILINE), *re.findall(r"`([^`\n]+)`", PROSE)]


def _needed(block: str) -> str | None:
    """The package of NEEDS that a block imports."""
    imported = re.findall(r"^\s*(?:import|from) (?:fastbn\.)?(\w+)", block, re.MULTILINE)
    return next((package for package in NEEDS if package in imported), None)


def _run(page: str, needed: str | None) -> dict[str, Any]:
    """The names that a page's blocks leave, run in order, those with the same need in one namespace."""
    namespace: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS[page], 1):
        if _needed(block) == needed:
            exec(compile(block, f"{page}, python block {number}", "exec"), namespace)
    assert namespace
    return namespace


def _with(needed: str | None) -> list[str]:
    return [page for page, blocks in BLOCKS.items() if needed in map(_needed, blocks)]


def test_the_readmes_blocks_run_in_order_in_one_namespace(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS["README.md"]) >= 3
    namespace = _run("README.md", None)
    assert "channels_first" in capsys.readouterr().out  # print(fastbn.explain(...))
    # What its comments say of the quickstart.
    assert namespace["dx"].shape == namespace["x"].shape
    assert namespace["one"].shape == (1, *namespace["x"].shape[1:])
    whole = namespace["x"].astype(np.float64)
    np.testing.assert_allclose(namespace["seen"].mean, whole.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(namespace["seen"].var(), whole.var((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("page", [page for page in _with(None) if page != "README.md"])
def test_a_pages_blocks_run_in_order_in_one_namespace(page: str) -> None:
    _run(page, None)


@pytest.mark.peers
def test_blocks_with_dask_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dask.array", reason="the pages' blocks with dask: pip install 'fastbn[dask]'")
    pytest.importorskip("distributed", reason="the pages' blocks with dask: pip install 'fastbn[dask]'")
    assert _with("dask") == ["docs/data.md"]
    namespace = _run("docs/data.md", "dask")
    shown = capsys.readouterr().out
    assert "100% Completed" in shown
    assert abs(float(shown.split()[-1])) < 1e-4  # print(y.mean().compute())
    assert namespace["y"].shape == namespace["x"].shape


@pytest.mark.peers
@pytest.mark.parametrize("page", _with("torch"))
def test_blocks_with_torch_run(page: str) -> None:
    torch = pytest.importorskip("torch", reason="the pages' blocks with PyTorch: pip install 'fastbn[torch]'")
    namespace = _run(page, "torch")
    if fused := namespace.get("fused"):
        assert [type(module) for module in fused] == [torch.nn.Conv2d, torch.nn.Identity, torch.nn.ReLU]
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(fused(x), namespace["model"](x), rtol=1e-5, atol=1e-5)
    else:
        assert namespace["fastbn"].torch.BatchNorm2d in map(type, namespace["model"])


def test_the_two_commands_stand_there_as_promised() -> None:
    for command in ("pip install '.[demo]' && python -m fastbn train", "pip install '.[test]' && pytest"):
        assert README.count(f"\n    {command}\n") == 1
    assert {"demo", "test"} <= set(importlib.metadata.metadata("fastbn").get_all("Provides-Extra") or ())


def _command_lines() -> Iterator[list[str]]:
    """The arguments of every `fastbn ...` in code."""
    for line in CODE:
        for part in line.split("&&"):
            found = re.match(r"(?:python -m )?fastbn ((?:[a-z]|-)[^|]*)$", part.strip())
            if found:
                yield shlex.split(found[1], comments=True)


def test_commands_parse() -> None:
    lines = [line for line in _command_lines() if line != ["COMMAND"]]
    assert len(lines) >= 3
    for line in lines:
        assert cli._parser().parse_args(line).run is not None, line


def test_the_table_of_commands_has_them_all_and_its_examples_parse() -> None:
    section = PROSE.split("\n## The command line\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([a-z]+)([^`|]*)` \|(.*)\|$", section, re.MULTILINE)
    assert [name for name, _, _ in rows] == [command.name for command in cli.COMMANDS]
    for name, arguments, text in rows:
        options = shlex.split(arguments)
        assert cli._parser().parse_args([name, *options]).run is not None
        for option in re.findall(r"`(--[^`]+)`", text):
            assert cli._parser().parse_args([name, *options, *shlex.split(option)]).run is not None


def _variables(text: str) -> set[str]:
    return set(re.findall(r"\bFASTBN_[A-Z_]+\b", text))


def test_variables_are_those_of_config() -> None:
    assert (
        _variables(PROSE)
        == _variables(config.__doc__ or "")
        == {"FASTBN_BACKEND", "FASTBN_KEEP_BYTES", "FASTBN_STREAM_BYTES"}
    )


def _named(value: inspect.Parameter) -> str:
    if value.default is inspect.Parameter.empty:
        return value.name
    default = "np.float32" if value.default is np.float32 else str(value.default)
    return f"{value.name}={default.replace('e-05', 'e-5')}"


def test_the_signature_of_the_layer_is_the_real_one() -> None:
    parameters = inspect.signature(fastbn.BatchNorm).parameters.values()
    wanted = f"`BatchNorm({', '.join(map(_named, parameters))})`"
    assert wanted in re.sub(r"\s+", " ", PROSE)


def test_every_attribute_of_fastbn_that_is_named_is_there() -> None:
    named = set(re.findall(r"\bfastbn\.([A-Za-z_]+)", "\n".join(PAGES.values()))) - {"py"}
    assert {"BatchNorm", "moments"} <= named
    assert {
        name for name in named if not hasattr(fastbn, name) and importlib.util.find_spec(f"fastbn.{name}") is None
    } == set()


def _anchors(text: str) -> set[str]:
    """What links into a page may name: its headings, as they are turned into anchors."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        if not link.startswith("http"):
            target = ((ROOT / page).parent / link).resolve() if link else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target.read_text(encoding="utf-8")), f"{link}#{anchor}"


def test_every_page_is_linked_from_the_readme() -> None:
    assert {page for page in PAGES if page != "README.md"} == set(re.findall(r"\((docs/\w[\w-]*\.md)", README))


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.splitlines()) <= 250
    assert len(README.encode()) < 16_000


def test_the_figures_of_the_readme_are_those_of_the_tables() -> None:
    rows = re.findall(
        r"^\| .* \| (\d[^|]*) \| (\d[^|]*) \|$", README.split("\n## Is it for me?\n")[1].split("\n## ")[0], re.MULTILINE
    )
    assert len(rows) == 7
    measured = PAGES["docs/benchmarks.md"] + PAGES["docs/accuracy.md"]
    assert [figure for row in rows for figure in row if figure not in measured] == []


def test_paths_that_are_named_are_there() -> None:
    paths = [path for line in CODE for path in re.findall(r"(?:^|\s)((?:\.ci|bench|tests)/[\w./-]*)", line)]
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["accuracy", "speed"])
def test_the_measured_tables_were_written(name: str) -> None:
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", "\n".join(PAGES.values()), re.DOTALL)
    assert found, f"no place for the {name} table"
    rows = [line for line in found[1].splitlines() if line.startswith("|")]
    assert len(rows) >= 4
    assert len({row.count("|") for row in rows}) == 1
    # versions, machine, how it was written
    for fact in ("fastbn ", "numpy ", "numba ", "threads", "Written by `python -m "):
        assert fact in found[1], f"the {name} table does not say its {fact}"


FUNCTIONS = [name for name in fastbn.__all__ if inspect.isfunction(getattr(fastbn, name))]
CLASSES = [name for name in ("BatchNorm", "Moments", "RunningMoments") if name in fastbn.__all__]


def _sections(value: Callable[..., Any]) -> set[str]:
    return set(re.findall(r"^([A-Z][a-z]+)\n-{3,}$", inspect.getdoc(value) or "", re.MULTILINE))


def _parameters(value: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name != "self"]


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_docstrings_have_their_sections_and_name_every_parameter(name: str) -> None:
    value = getattr(fastbn, name)
    wanted = {"Parameters"} if _parameters(value) else set()
    if name in FUNCTIONS:
        wanted |= {"Raises"} if _parameters(value) else set()
        wanted |= {"Returns"} if inspect.signature(value).return_annotation != "None" else set()
    assert wanted
    assert wanted <= _sections(value)
    listed = (inspect.getdoc(value) or "").partition("Parameters\n")[2]
    for parameter in _parameters(value):
        assert re.search(rf"^(\w+, )*{parameter}(, \w+)*( :|$)", listed, re.MULTILINE), (
            f"{name}: {parameter} is not documented"
        )


METHODS = [
    (name, method)
    for name in CLASSES
    for method, value in vars(getattr(fastbn, name)).items()
    if not method.startswith("_") and inspect.isfunction(value)
]


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_methods_name_their_parameters_or_where_they_are_explained(name: str, method: str) -> None:
    value = getattr(getattr(fastbn, name), method)
    text = inspect.getdoc(value) or ""
    assert text
    for parameter in _parameters(value):
        assert re.search(rf"\b{parameter}\b", text) or re.search(r"`[\w.]+`", text), (
            f"{name}.{method}: {parameter} is not explained"
        )
