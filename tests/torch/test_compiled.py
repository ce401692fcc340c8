"""fastbn.torch under torch.compile, torch.export and autocast: no graph breaks, the same tolerances; and PyTorch's own
opcheck.
"""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bridge to PyTorch: pip install 'fastbn[torch]'")

from torch_pairs import LAYOUTS, draw, pair, step  # noqa: E402

import fastbn.torch  # noqa: E402
from fastbn import functional  # noqa: E402
from fastbn.torch import custom_ops, eligibility  # noqa: E402

# Inductor imports and Dynamo uses what PyTorch deprecates.
DEPRECATED = ("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*should not be instantiated.*:DeprecationWarning")
pytestmark = [pytest.mark.peers, *map(pytest.mark.filterwarnings, DEPRECATED)]

KINDS = {"BatchNorm1d": (6, 5, 9), "BatchNorm2d": (4, 5, 6, 7), "BatchNorm3d": (2, 5, 3, 4, 5)}
long = pytest.mark.compile  # one of each kind of test is left to the default run


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "layout", "options"),
    [
        ("BatchNorm2d", "channels_last", {}),
        pytest.param("BatchNorm2d", "contiguous", {"momentum": None}, marks=long),
        pytest.param("BatchNorm1d", "contiguous", {"affine": False}, marks=long),
        pytest.param("BatchNorm1d", "channels_last", {"track_running_stats": False}, marks=long),
        pytest.param("BatchNorm3d", "channels_last", {"bias": False}, marks=long),
        pytest.param("BatchNorm3d", "contiguous", {}, marks=long),
    ],
    ids=str,
)
def test_compiled_without_a_graph_break(kind: str, layout: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(kind, **options)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for seed, offset in enumerate((0.0, 1e6)):
        x, dy = (LAYOUTS[layout](t) for t in draw(KINDS[kind], offset, seed))
        for training in (True, False):
            step(ours.train(training), theirs.train(training), x, dy, compiled)
            assert compiled(x).stride() == ours(x).stride()
            theirs.load_state_dict(ours.state_dict())


@long
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.float64, "channels_last"), (torch.bfloat16, "channels_last")],
    ids=str,
)
def test_inductor_holds_the_tolerances(dtype: Any, layout: str) -> None:
    ours, theirs = pair("BatchNorm2d", torch.float64 if dtype == torch.float64 else torch.float32)
    compiled = torch.compile(ours, fullgraph=True)
    for seed, offset in enumerate((0.0, 1e2 if dtype == torch.bfloat16 else 1e6)):
        x, dy = (LAYOUTS[layout](t) for t in draw((6, 5, 20, 21), offset, seed, dtype))
        for training in (True, False):
            step(ours.train(training), theirs.train(training), x, dy, compiled)
            theirs.load_state_dict(ours.state_dict())


@long
def test_between_neighbours_the_compiler_lays_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a convolution gives reaches the kernel in the memory order that the compiler chose for it, and all of it
    gives eager's step.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, bias=False), fastbn.torch.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 3)
    )
    other, seen, moments = copy.deepcopy(model), [], functional.moments
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 3, 12, 12)
    with monkeypatch.context() as patch:
        patch.setattr(
            functional, "moments", lambda x, *given, **more: seen.append(x.strides) or moments(x, *given, **more)
        )
        compiled(x).square().sum().backward()
    other(x).square().sum().backward()
    assert seen == [(4 * 16 * 10 * 10, 4, 4 * 16 * 10, 4 * 16)]
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4 * float(want.grad.abs().max()))


@long
def test_one_compilation_serves_every_batch_size() -> None:
    ours = fastbn.torch.BatchNorm2d(5)
    compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"):
        for size in (4, 6):
            x, _ = draw((size, 5, 6, 7), 3.0, size)
            torch.testing.assert_close(compiled(x), ours(x), rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        x, _ = draw((9, 5, 6, 7), 3.0, 9)
        torch.testing.assert_close(compiled(x), ours(x), rtol=1e-5, atol=1e-5)


def test_compiled_calls_that_pytorch_refuses_or_serves_are_pytorchs() -> None:
    compiled = {
        library: torch.compile(library.BatchNorm2d(5), backend="aot_eager") for library in (torch.nn, fastbn.torch)
    }
    for shape, words in (
        ((1, 5, 1, 1), "Expected more than 1 value per channel when training"),
        ((2, 5), "expected 4D input"),
    ):
        kinds = []
        for call in compiled.values():
            with pytest.raises((ValueError, RuntimeError), match=words) as caught:
                call(torch.ones(shape))
            kinds.append(caught.type)
        assert kinds[0] is kinds[1]
    half, theirs = fastbn.torch.BatchNorm2d(5).half(), torch.nn.BatchNorm2d(5).half()
    x = torch.randn(4, 5, 3, 3).half()
    assert torch.equal(torch.compile(half, backend="aot_eager", fullgraph=True)(x), theirs(x))
    assert compiled[fastbn.torch](torch.empty(0, 5, 3, 3)).shape == (0, 5, 3, 3)


@long
def test_around_a_graph_break_eager_calls_are_not_followed() -> None:
    """A hook that prints, and a backward in the compiled function: Dynamo would trace NumPy's calls as PyTorch's."""
    module = fastbn.torch.BatchNorm2d(5)
    plain = copy.deepcopy(module)
    seen: list[Any] = []
    module.register_forward_hook(lambda *_: seen.append(torch._dynamo.graph_break()))
    x, dy = draw((4, 5, 6, 7), 3.0, 0)

    def step(x: Any) -> Any:
        y = module(x)
        y.backward(dy)
        return y

    compiled = torch.compile(step, backend="aot_eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            given, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, want = compiled(given), plain(other)
            want.backward(dy)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(given.grad, other.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2
    assert not [w for w in said if "fastbn" in str(w.message)]


def test_what_a_gpu_can_do_is_a_constant_of_the_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbn.cuda.buffers.declines", lambda: "none here")

    def call(x: Any) -> Any:
        return x + 1 if eligibility.gpu_declines() is None else x - 1

    assert torch.compile(call, backend="eager", fullgraph=True)(torch.ones(1)) == 0


@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=long)])
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=long)])
def test_exported(training: bool, strict: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), fastbn.torch.BatchNorm2d(5), torch.nn.ReLU()).train(training)
    x, plain = torch.randn(4, 3, 8, 8), copy.deepcopy(model)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    # evaluation is ordinary operations, to be joined to others
    assert ("fastbn.batch_norm.default" in targets) == training
    assert not any("batch_norm" in target and "fastbn" not in target for target in targets)
    module = program.module()
    for size in (4, 7):
        x = torch.randn(size, 3, 8, 8)
        assert torch.equal(module(x), plain(x))
    exported = module.state_dict()
    assert {"1.weight", "1.running_mean", "1.running_var"} <= exported.keys()
    for key, value in exported.items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-6, atol=1e-7)
    assert int(plain[1].num_batches_tracked) == 2 * training


@pytest.mark.parametrize("compile_it", [False, pytest.param(True, marks=long)])
def test_autocast(compile_it: bool) -> None:
    """A convolution gives bfloat16, parameters stay float32, and so do their gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.ReLU())
    ours = fastbn.torch.convert(copy.deepcopy(model))
    call = torch.compile(ours, backend="aot_eager", fullgraph=True) if compile_it else ours
    x = torch.randn(4, 3, 8, 8)
    results = []
    for module, run in ((model, model), (ours, call)):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        results.append([y.detach().float(), *(p.grad for p in module.parameters()), *(b for b in module.buffers())])
    for got, want in zip(*results[::-1], strict=True):
        assert got.dtype == want.dtype
        scale = float(want.float().abs().max())
        torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.01 * scale)
    assert not torch.equal(model[1].running_var, torch.ones(5))


def _optional(values: Any, kind: str) -> Any:
    """A parameter that is trained, frozen or absent."""
    return None if kind == "absent" else values.requires_grad_(kind == "trained")


@pytest.mark.parametrize(
    ("dtype", "layout", "gamma"),
    [
        (torch.float32, "contiguous", "trained"),
        pytest.param(torch.float32, "channels_last", "frozen", marks=long),
        pytest.param(torch.float64, "channels outermost", "trained", marks=long),
        pytest.param(torch.float64, "crop", "absent", marks=long),
        pytest.param(torch.bfloat16, "channels_last", "trained", marks=long),
    ],
    ids=str,
)
def test_opcheck(dtype: Any, layout: str, gamma: str) -> None:
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (LAYOUTS[layout](t) for t in draw((4, 5, 6, 7), 3.0, 0, dtype))
    weight = _optional(torch.linspace(0.5, 2.0, 5, dtype=kind), gamma)
    bias = _optional(torch.linspace(-1.0, 1.0, 5, dtype=kind), gamma)
    mean, var = torch.ones(5, dtype=kind), torch.full((5,), 2.0, dtype=kind)
    _, found, m2 = custom_ops.batch_norm(x, weight, bias, 1e-5)
    assert not found.requires_grad
    assert not m2.requires_grad
    for given in (x, x.detach().requires_grad_()):
        calls = (
            (custom_ops.moments, (given,)),
            (custom_ops.batch_norm, (given, weight, bias, 1e-5)),
            (custom_ops.batch_norm_inference, (given, mean, var, weight, bias, 1e-5)),
            (custom_ops.batch_norm_backward, (dy, given, found, m2, weight, 1e-5)),
            (custom_ops.batch_norm_inference_backward, (dy, given, mean, var, weight, 1e-5)),
        )
        for op, arguments in calls:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.library.opcheck(op, arguments)
