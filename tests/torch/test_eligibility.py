"""What fastbn.torch leaves to PyTorch's own kernels: everything that PyTorch refuses, in its words, and what only it
takes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the bridge to PyTorch: pip install 'fastbn[torch]'")

import fastbn.torch  # noqa: E402
from fastbn.torch import eligibility, tensors  # noqa: E402

pytestmark = pytest.mark.peers


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


WRONG: dict[str, tuple[str, Callable[[Any], Any], Callable[[], Any]]] = {
    "integers": ("BatchNorm2d", lambda m: m, lambda: torch.ones(2, 5, 3, 3, dtype=torch.int64)),
    "complex": ("BatchNorm2d", lambda m: m, lambda: torch.ones(2, 5, 3, 3, dtype=torch.complex64)),
    "boolean, evaluation": ("BatchNorm2d", lambda m: m.eval(), lambda: torch.ones(2, 5, 3, 3, dtype=torch.bool)),
    "channels": ("BatchNorm2d", lambda m: m, lambda: torch.ones(2, 4, 3, 3)),
    "channels, evaluation": ("BatchNorm2d", lambda m: m.eval(), lambda: torch.ones(2, 6, 3, 3)),
    "channels, no statistics": (
        "BatchNorm1d",
        lambda m: m._buffers.update(running_mean=None, running_var=None) or m,
        lambda: torch.ones(2, 3),
    ),
    "rank 1": ("BatchNorm1d", lambda m: m, lambda: torch.ones(5)),
    "rank 0": ("BatchNorm1d", lambda m: m, lambda: torch.ones(())),
    "rank 4 in 1d": ("BatchNorm1d", lambda m: m, lambda: torch.ones(2, 5, 3, 3)),
    "rank 3 in 2d": ("BatchNorm2d", lambda m: m, lambda: torch.ones(2, 5, 3)),
    "rank 4 in 3d": ("BatchNorm3d", lambda m: m, lambda: torch.ones(2, 5, 3, 3)),
    "one value": ("BatchNorm1d", lambda m: m, lambda: torch.ones(1, 5)),
    "one value, rank 4": ("BatchNorm2d", lambda m: m, lambda: torch.ones(1, 5, 1, 1)),
    "eps 0 in training": ("BatchNorm1d", lambda m: setattr(m, "eps", 0.0) or m, lambda: torch.ones(3, 5)),
    "eps below 0": ("BatchNorm1d", lambda m: setattr(m.eval(), "eps", -1.0) or m, lambda: torch.ones(3, 5)),
    "float32 layer, double x": ("BatchNorm1d", lambda m: m, lambda: torch.ones(3, 5, dtype=torch.float64)),
    "float64 layer, single x": ("BatchNorm1d", lambda m: m.double(), lambda: torch.ones(3, 5)),
    "half layer, single x": ("BatchNorm1d", lambda m: m.half(), lambda: torch.ones(3, 5)),
    "one statistic": (
        "BatchNorm1d",
        lambda m: m._buffers.update(running_mean=None) or m.eval(),
        lambda: torch.ones(3, 5),
    ),
    "sparse": ("BatchNorm1d", lambda m: m, lambda: torch.ones(3, 5).to_sparse()),
    "a NumPy array": ("BatchNorm1d", lambda m: m, lambda: np.ones((3, 5), np.float32)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_pytorch_refuses_is_refused_in_its_words(what: str) -> None:
    name, change, make = WRONG[what]
    theirs, ours = (change(getattr(library, name)(5)) for library in (torch.nn, fastbn.torch))
    want = _outcome(lambda: theirs(make()))
    assert isinstance(want, tuple)
    assert _outcome(lambda: ours(make())) == want
    for key, value in theirs.state_dict().items():  # also what it counts before it refuses
        assert torch.equal(ours.state_dict()[key], value), key


NUMBERS = {  # as eps and as momentum
    "a string": "0.1", "a tensor": torch.tensor(0.1), "a tensor of (1,)": torch.tensor([0.1]),
    "a list": [0.1], "an array": np.array([0.1]),
    "an array without axes": np.array(0.1), "NumPy's single": np.float32(0.1), "NumPy's double": np.float64(0.1),
    "large": 10**400,
    "one": 1, "true": True, "nan": np.nan, "infinite": np.inf, "below 0": -np.inf, "none": None,
}  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("name", ["eps", "momentum"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["BatchNorm1d", "SyncBatchNorm"])
def test_odd_numbers_are_taken_or_refused_as_pytorch_does(kind: str, training: bool, name: str, value: Any) -> None:
    """The running statistics and the count too, in the first call as in those that are served as the call before."""
    x = torch.randn(4, 5, 3)
    for calls in (1, 2):
        found = []
        for make in (torch.nn.BatchNorm1d, getattr(fastbn.torch, kind)):
            module = make(5).train(training).requires_grad_(False)
            for _ in range(calls - 1):
                module(x)
            setattr(module, name, value)
            y = _outcome(lambda module=module: module(x))
            found.append([*y] if isinstance(y, tuple) else [y, *module.buffers()])
            found[-1].append(int(module.num_batches_tracked))
        for theirs, ours in zip(*found, strict=True):
            if isinstance(theirs, torch.Tensor):
                torch.testing.assert_close(ours, theirs, equal_nan=True)
            else:
                assert ours == theirs


OWN: dict[str, tuple[Callable[[Any], Any], Callable[[], Any], str]] = {
    "half parameters": (lambda m: m.half(), lambda: torch.randn(4, 5, 3, 3).half(), "float16"),
    "bfloat16 parameters": (lambda m: m.bfloat16(), lambda: torch.randn(4, 5, 3, 3).bfloat16(), "bfloat16"),
    "empty": (lambda m: m, lambda: torch.randn(0, 5, 3, 3), "less than two values"),
    "empty, evaluation": (lambda m: m.eval(), lambda: torch.randn(0, 5, 3, 3), ""),
    "negated view": (
        lambda m: m,
        lambda: torch.randn(4, 5, 3, 3, dtype=torch.complex64).conj().imag,
        "no plain memory",
    ),
    "on meta": (lambda m: m.to("meta"), lambda: torch.empty(4, 5, 3, 3, device="meta"), "on meta"),
}


@pytest.mark.parametrize("what", OWN)
def test_what_only_pytorch_takes_is_as_pytorch_has_it(what: str) -> None:
    change, make, reason = OWN[what]
    torch.manual_seed(0)
    x = make()
    theirs, ours = (change(library.BatchNorm2d(5)) for library in (torch.nn, fastbn.torch))
    told = fastbn.torch.explain(ours, x)
    assert (
        (told.startswith("PyTorch's own kernels") and reason in told) if reason else told.startswith("fastbn's kernels")
    )
    results = []
    for module in (theirs, ours):
        given = x.detach().requires_grad_()
        y = module(given)
        y.sum().backward()
        results.append([y, given.grad, module.weight.grad, module.bias.grad, *module.state_dict().values()])
    for got, want in zip(results[1], results[0], strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert got.is_meta or torch.equal(got, want)


def test_explain_says_why_and_refuses_what_is_no_batch_norm() -> None:
    x = torch.ones(2, 5, 3, 3)
    assert "channels_first" in fastbn.torch.explain(fastbn.torch.BatchNorm2d(5), x)
    assert "channels_last (R x C" in fastbn.torch.explain(
        fastbn.torch.BatchNorm2d(5), x.to(memory_format=torch.channels_last)
    )
    assert "in training" not in fastbn.torch.explain(fastbn.torch.BatchNorm2d(5), x)
    told = fastbn.torch.explain(fastbn.torch.BatchNorm2d(5).eval(), x)
    assert told.startswith("fastbn's kernels, with the running statistics; below, what runs in training\n")
    assert "convert" in fastbn.torch.explain(torch.nn.BatchNorm2d(5), x)
    with pytest.raises(TypeError, match="module: given Linear, want a batch norm"):
        fastbn.torch.explain(torch.nn.Linear(2, 2), x)


def test_a_gpu_is_served_by_fastbn_or_by_pytorch_as_its_backend_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        """What is asked of a CUDA tensor before any kernel runs."""

        dtype, shape, device, is_cuda, is_cpu = torch.float32, (2, 5, 3, 3), torch.device("cuda", 0), True, False
        data = "its memory"

        def dim(self) -> int:
            return 4

        def numel(self) -> int:
            return 90

    given = eligibility.Operands(None, None, None, None, True)
    monkeypatch.setattr("fastbn.cuda.buffers.declines", lambda: "no GPU here")
    told = eligibility.declines(given, OnGpu(), (4,), 1e-5, 0.1)
    assert told is not None
    assert "no GPU here" in told
    monkeypatch.setattr("fastbn.cuda.buffers.declines", lambda: None)
    assert eligibility.declines(given, OnGpu(), (4,), 1e-5, 0.1) is None
    assert tensors.array(OnGpu()) == "its memory"  # to fastbn's functions, without what autograd has of it
