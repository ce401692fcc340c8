"""Tensors of every kind in every place of a batch norm: what memory does not hold, or holds with gaps, goes as PyTorch
has it.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bridge to PyTorch: pip install 'fastbn[torch]'")

import fastbn.torch  # noqa: E402

pytestmark = pytest.mark.peers

C = 5
STATISTICS = ("running_mean", "running_var")


class Sub(torch.Tensor):  # type: ignore[misc]
    pass


def _escaped(transform: Any) -> Callable[[Any], Any]:
    def make(v: Any) -> Any:
        box: list[Any] = []
        transform(lambda a: box.append(a) or a.sum())(v)
        return box[0]

    return make


def _column(v: Any) -> Any:
    return torch.stack([v, torch.full_like(v, 9.0)], -1)[..., 0]


KINDS: dict[str, Callable[[Any], Any]] = {
    "negated": lambda v: torch._neg_view(-v),
    "imaginary part of a conjugate": lambda v: torch.complex(torch.zeros_like(v), -v).conj().imag,
    "column of a table": _column,
    "every second": lambda v: torch.repeat_interleave(v, 2, -1)[..., ::2],
    "subclass": lambda v: v.clone().as_subclass(Sub),
    "parameter": lambda v: torch.nn.Parameter(v.clone()),
    "requires a gradient": lambda v: v.clone().requires_grad_(),
    "zeros without memory": lambda v: torch._efficientzerotensor(v.shape),
    "functional": lambda v: torch._to_functional_tensor(v),
    "escaped from grad": _escaped(torch.func.grad),
    "escaped from vmap": _escaped(torch.func.vmap),
    "sparse": lambda v: v.to_sparse(),
    "mkldnn": lambda v: v.to_mkldnn(),
    "quantized": lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.quint8),
    "on meta": lambda v: v.to("meta"),
    "int64": lambda v: v.to(torch.int64),
    "int32": lambda v: v.to(torch.int32),
    "float64": lambda v: v.double(),
    "float16": lambda v: v.half(),
    "complex": lambda v: v.to(torch.complex64),
    "too short": lambda v: v[..., :3].clone(),
    "too long": lambda v: torch.cat([v, v], -1),
    "a number": lambda v: v.flatten()[0].clone(),
    "an axis more": lambda v: v.unsqueeze(0),
}
GAPS = ("column of a table", "every second")
PLACES = ("x", "weight", "bias", *STATISTICS, "dy")
# which PyTorch refuses, here only in training
CASES = [case for case in itertools.product(PLACES, KINDS) if case != ("dy", "sparse")]


def _module(library: Any) -> Any:
    torch.manual_seed(0)
    module = library.BatchNorm1d(C)
    with torch.no_grad():
        for value in (module.weight, module.bias, module.running_mean, module.running_var):
            value.uniform_(0.5, 2.0)
    return module


def _put(module: Any, place: str, value: Any) -> None:
    (module._buffers if place in STATISTICS else module._parameters)[place] = value


def _run(library: Any, place: str, kind: str, training: bool, recorded: bool) -> Any:
    """Two calls, of which the second may be served as the first was, and gradients; the type and first words of an
    error.
    """
    module = _module(library).train(training)
    given = {"x": torch.randn(6, C), "dy": torch.randn(6, C), **module._parameters, **module._buffers}
    value = KINDS[kind](given[place].detach())
    try:
        if library is torch.nn and place in STATISTICS and kind in GAPS:
            # PyTorch 2.13 takes the gaps for statistics in the derivative of weight, in evaluation
            value = value.contiguous()
        if place in ("x", "dy"):
            given[place] = value
        else:
            _put(module, place, value)
        if place == "dy":
            given["x"].requires_grad_()
        x = given["x"]
        with torch.set_grad_enabled(recorded):
            found = [module(x), module(x)]
        if found[1].requires_grad:
            wanted = [tensor for tensor in (x, module.weight, module.bias) if tensor.requires_grad]
            found += torch.autograd.grad(found[1], wanted, given["dy"])
    except Exception as error:
        return type(error), str(error).split(" ")[:3]
    return [tensor.detach() for tensor in (*found, *module._buffers.values())]


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of sparse and quantized tensors
@pytest.mark.parametrize(("place", "kind"), CASES)
def test_every_kind_of_tensor_in_every_place(place: str, kind: str) -> None:
    for training, recorded in itertools.product((True, False), (True, False)):
        if (place == "dy" and not recorded) or (recorded and place in STATISTICS and kind == "zeros without memory"):
            continue  # of the second PyTorch's own derivative reads what is not there
        want, got = (_run(library, place, kind, training, recorded) for library in (torch.nn, fastbn.torch))
        if "escaped from vmap" == kind and isinstance(want, tuple):
            assert isinstance(got, tuple)  # both refuse what has no meaning any more, here and there in other words
        elif isinstance(want, tuple):
            assert got == want
        else:
            assert isinstance(got, list), got
            for a, b in zip(got, want, strict=True):
                assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
                if not b.is_meta:
                    torch.testing.assert_close(a.to_dense(), b.to_dense(), rtol=1e-5, atol=1e-5)


def _shared(where: str, module: Any) -> None:
    """Running statistics that lie where they can't be moved one after the other."""
    table = torch.linspace(1.0, 2.0, 4 * C)
    makes: dict[str, Callable[[], Any]] = {
        "columns": lambda: table.view(2 * C, 2)[:C].unbind(1),
        "expanded": lambda: (table[:1].expand(C), table[C : 2 * C]),
        "backwards over each other": lambda: (table[3 : 3 + C], table[:C]),
        "the same": lambda: (table[:C], table[:C]),
        "weight": lambda: (table[:C], module.weight.detach()),
        "bias, shifted": lambda: (table[C : 2 * C], table[:C]),
        "columns of parameters": lambda: (table[C : 2 * C], table[3 * C :]),
    }
    for name, value in zip(STATISTICS, makes[where](), strict=True):
        _put(module, name, value)
    if where == "bias, shifted":
        module.bias = torch.nn.Parameter(table[C - 1 : 2 * C - 1])
    if where == "columns of parameters":
        module.weight = torch.nn.Parameter(table.view(C, 4)[:, 1])


@pytest.mark.parametrize(
    "where",
    [
        "columns",
        "expanded",
        "backwards over each other",
        "the same",
        "weight",
        "bias, shifted",
        "columns of parameters",
    ],
)
def test_running_statistics_that_share_memory_or_have_gaps_are_pytorchs_to_move(where: str) -> None:
    found = []
    for library in (torch.nn, fastbn.torch):
        module = _module(library)
        _shared(where, module)
        x = torch.randn(6, C)
        if library is fastbn.torch:
            assert "the running statistics lie in memory with gaps, or share it" in fastbn.torch.explain(module, x)
            assert fastbn.torch.explain(module.eval(), x).startswith("fastbn's kernels")  # which only read them
            module.train()
        found.append(
            [module(x).detach(), *module._buffers.values(), *(v.detach() for v in module._parameters.values())]
        )
    if "columns" in where:  # what overlaps PyTorch's threads write by turns
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_statistics_side_by_side_are_served() -> None:
    """As frameworks lay them that flatten a model's buffers: no gap, no overlap."""
    flat, module = torch.rand(4 * C), _module(fastbn.torch)
    for place, value in zip(STATISTICS, flat.split(C), strict=False):
        _put(module, place, value)
    module.weight = torch.nn.Parameter(flat[2 * C : 3 * C])
    assert fastbn.torch.explain(module, torch.randn(6, C)).startswith("fastbn's kernels")


@pytest.mark.filterwarnings("ignore")  # as above
def test_operators_of_torch_ops_refuse_or_serve_every_kind() -> None:
    """Called by hand: the values of the tensor, or an error, whatever lies at its address."""
    x, dy, mean, var, gamma = (
        torch.randn(6, C),
        torch.randn(6, C),
        torch.randn(C),
        torch.rand(C) + 0.5,
        torch.rand(C) + 0.5,
    )
    calls = {
        "moments": [x],
        "batch_norm": [x, gamma, mean, 1e-5],
        "batch_norm_inference": [x, mean, var, gamma, mean, 1e-5],
        "batch_norm_backward": [dy, x, mean, var, gamma, 1e-5],
        "batch_norm_inference_backward": [dy, x, mean, var, gamma, 1e-5],
    }
    same = (
        "negated",
        "imaginary part of a conjugate",
        *GAPS,
        "subclass",
        "parameter",
        "requires a gradient",
        "functional",
    )
    refused = (TypeError, ValueError, RuntimeError)  # NotImplementedError of the dispatcher is one of the last
    for name, arguments in calls.items():
        call = getattr(torch.ops.fastbn, name)
        want = call(*arguments)
        for k, kind in itertools.product(range(len(arguments)), KINDS):
            if not isinstance(arguments[k], torch.Tensor):
                continue
            try:
                got = call(*arguments[:k], KINDS[kind](arguments[k]), *arguments[k + 1 :])
            except refused:
                assert kind not in same, (name, k, kind)
                continue
            assert kind != "on meta" or len(arguments) == 1, (name, k)  # beside others on the CPU
            if kind in same:
                for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, want)), strict=True):
                    torch.testing.assert_close(
                        torch._from_functional_tensor(a) if torch._is_functional_tensor(a) else a.detach(), b
                    )
