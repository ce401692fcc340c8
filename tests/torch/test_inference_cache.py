"""Inference that is served as the call before it was: the same bits, and nothing that has changed since is missed."""

import copy
import gc
import pickle
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
from launch import at_once

torch = pytest.importorskip("torch", reason="the bridge to PyTorch: pip install 'fastbn[torch]'")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_pairs import CHANNELS, LAYOUTS, draw  # noqa: E402

from fastbn.arguments import config  # noqa: E402
from fastbn.torch import BatchNorm1d, BatchNorm2d, inference_cache, tensors  # noqa: E402

pytestmark = pytest.mark.peers

SHAPE = (4, CHANNELS, 6, 7)
HALF = [pytest.param(dtype, marks=pytest.mark.full) for dtype in (torch.float16, torch.bfloat16)]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def called(cls: Any = BatchNorm2d, dtype: Any = torch.float32, shape: Any = SHAPE, **options: Any) -> tuple[Any, Any]:
    """A module in evaluation with statistics of its own, which has been called once, on x."""
    module = cls(CHANNELS, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **options).eval()
    module.running_mean.copy_(torch.linspace(-2, 3, CHANNELS))
    module.running_var.copy_(torch.linspace(0.5, 2, CHANNELS))
    for k, parameter in enumerate(module.parameters()):
        parameter.copy_(torch.linspace(0.5, -1.5, CHANNELS) + k)
    x = draw(shape, 1.0, 0, dtype)[0]
    module(x)
    return module, x


def again(module: Any, x: Any) -> Any:
    """y as the call before found it; None where x is looked over."""
    entry, state = inference_cache.lookup(module, x)
    return None if entry is None or not entry.channels else inference_cache.inference(module, x, entry, state)


def fresh(module: Any, x: Any) -> Any:
    """What a module that was never called answers."""
    return copy.deepcopy(module)(x)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_the_second_call_is_prepared_and_has_the_same_bits(
    dtype: Any, layout: str, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = called(dtype=dtype, affine=affine)
    x = LAYOUTS[layout](x)
    for large in (tensors.LARGE, 1):
        monkeypatch.setattr(tensors, "LARGE", large)
        inference_cache._call_plan.cache_clear()
        y = again(module, x)
        assert y is not None
        assert torch.equal(module(x), y)
        assert torch.equal(fresh(module, x), y)
        assert (y.dtype, y.stride(), y.is_contiguous()) == (dtype, x.stride(), x.is_contiguous())
        assert y.data_ptr() % 64 == 0
        assert y._base is None
        torch.relu_(y)
    inference_cache._call_plan.cache_clear()


@pytest.mark.parametrize("shape", [(32, CHANNELS), (3, CHANNELS, 1), (2, CHANNELS, 4001)])
def test_other_ranks_and_lengths(shape: Any) -> None:
    module, x = called(BatchNorm1d, shape=shape)
    y = again(module, x)
    assert y is not None
    assert torch.equal(y, fresh(module, x))


def test_large_inputs_run_on_pytorchs_threads_as_many_as_it_has() -> None:
    module, x = called(shape=(8, CHANNELS, 120, 120))
    assert x.nbytes >= config.SERIAL_BYTES
    y = again(module, x)
    assert y is not None
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if before > 1:
            assert again(module, x) is None
        assert torch.equal(module(x), y)
    finally:
        torch.set_num_threads(before)


CHANGES: dict[str, Any] = {
    "statistics in place": lambda m: m.running_mean.add_(1.0),
    "statistics through NumPy": lambda m: m.running_var.numpy().__imul__(2.0),
    "parameters in place": lambda m: m.weight.mul_(3.0),
    "data": lambda m: setattr(m.weight, "data", torch.full((CHANNELS,), 7.0)),
    "a new parameter": lambda m: setattr(m, "bias", torch.nn.Parameter(torch.full((CHANNELS,), 7.0))),
    "a new buffer": lambda m: setattr(m, "running_var", torch.full((CHANNELS,), 7.0)),
    "a state": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "eps": lambda m: setattr(m, "eps", 0.5),
    "no parameters": lambda m: (setattr(m, "weight", None), setattr(m, "bias", None)),
    "shared memory": lambda m: (m.share_memory(), m.running_mean.add_(1.0)),
    "float64 and back": lambda m: (m.double(), m.weight.add_(1.0), m.float()),
    "strides at the same address": lambda m: setattr(
        m.running_mean, "data", m.running_mean.data.as_strided((CHANNELS,), (0,))
    ),
    "in place at the same address": lambda m: m.running_var.as_strided_((CHANNELS,), (0,)),
    "signs at the same address": lambda m: (
        setattr(m, "bias", None) or setattr(m.weight, "data", torch._neg_view(m.weight.data))
    ),
    "a parametrization": lambda m: torch.nn.utils.parametrizations.weight_norm(m, dim=None) and m.weight,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_is_seen(change: str) -> None:
    module, x = called()
    before = module(x)
    CHANGES[change](module)
    y = module(x)
    theirs = torch.nn.BatchNorm2d(CHANNELS, eps=module.eps).eval()
    theirs.weight.copy_(1.0 if module.weight is None else module.weight)
    theirs.bias.copy_(0.0 if module.bias is None else module.bias)
    theirs.running_mean.copy_(module.running_mean)
    theirs.running_var.copy_(module.running_var)
    torch.testing.assert_close(y, theirs(x))
    assert torch.equal(module(x), y)
    if change != "a parametrization":
        assert not torch.equal(y, before)


def _shorter(module: Any) -> None:
    module.running_mean.data = module.running_mean.data[:3]


def _integers(module: Any) -> None:
    module.running_var.data = module.running_var.data.view(torch.int32)


@pytest.mark.parametrize("change", [_shorter, _integers])
def test_what_pytorch_refuses_is_refused_though_it_lies_at_the_same_address(change: Any) -> None:
    module, x = called()
    theirs = torch.nn.BatchNorm2d(CHANNELS).eval()
    raised = []
    for run in (module, theirs):
        change(run)
        with pytest.raises(RuntimeError) as error:
            run(x)
        raised.append(str(error.value))
    assert raised[0] == raised[1]


def test_training_between_calls() -> None:
    module, x = called()
    assert not torch.equal(module.train()(x), module.eval()(x))
    assert torch.equal(module(x), fresh(module, x))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.ones(4, CHANNELS + 1, 6, 7), "running_mean should contain 6 elements not 5"),
        (torch.ones(4, CHANNELS, 6), "expected 4D input"),
        (torch.ones(SHAPE, dtype=torch.int64), "not implemented for 'Long'"),
        (torch.tensor(1.0), "expected 4D input"),
    ],
    ids=["channels", "rank", "integers", "a number"],
)
def test_errors_are_pytorchs(given: Any, words: str) -> None:
    module, _ = called()
    theirs = torch.nn.BatchNorm2d(CHANNELS).eval()
    raised = []
    for run in (module, theirs):
        with pytest.raises((ValueError, RuntimeError), match=words) as error:
            run(given)
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("layout", ["crop", "expanded", "every other", "channels outermost"])
def test_memory_with_gaps_or_another_order_is_looked_over(layout: str) -> None:
    module, x = called()
    given = LAYOUTS[layout](x)
    assert again(module, given) is None
    torch.testing.assert_close(module(given), fresh(module, given.contiguous()))


def test_empty_and_absent_memory() -> None:
    module, _ = called()
    assert module(torch.empty(0, CHANNELS, 6, 7)).shape == (0, CHANNELS, 6, 7)
    with pytest.raises(RuntimeError, match="device"):
        module(torch.empty(SHAPE, device="meta"))
    torch.testing.assert_close(module(torch._efficientzerotensor(SHAPE)), module(torch.zeros(SHAPE)))


def test_gradients_are_recorded_where_they_are_wanted() -> None:
    module, x = called()
    with torch.enable_grad():
        y = module(x)
        assert y.requires_grad
        module.requires_grad_(False)
        assert not module(x).requires_grad
        assert again(module, x) is not None
        assert module(x.requires_grad_()).requires_grad


def test_modes_and_transforms_see_pytorchs_operators() -> None:
    module, x = called()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    with Seen():
        module(x)
    assert any("batch_norm" in name for name in names)
    torch.testing.assert_close(torch.func.vmap(module)(x.unsqueeze(1)).squeeze(1), module(x))
    with warnings.catch_warnings():
        # of torch.jit, which PyTorch calls for derivatives forwards
        warnings.simplefilter("ignore", DeprecationWarning)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(module(dual)).tangent is not None
        assert "batch_norm" in str(torch.jit.trace(module, x, check_trace=False).graph)


def test_nothing_of_it_stays_with_the_module() -> None:
    module, x = called()
    assert module in inference_cache._entries
    keys = set(vars(module))
    assert keys == set(vars(BatchNorm2d(CHANNELS)))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    assert len([key for key in inference_cache._entries if key.num_features == CHANNELS]) == 0


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_kept_alive(training: bool) -> None:
    module, x = called()
    module.train(training)(x)
    replaced = [weakref.ref(module.weight), weakref.ref(module.running_mean)]
    module.weight, module.running_mean = torch.nn.Parameter(torch.ones(CHANNELS)), torch.zeros(CHANNELS)
    assert [old() for old in replaced] == [None, None]
    module(x)
    module.weight.owner = module.running_var.owner = module.bias.owner = module  # as the closure of a hook holds it
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_another_backend_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = called()
    monkeypatch.setattr(config, "BACKEND", "reference")
    assert again(module, x) is None
    torch.testing.assert_close(module(x), fresh(module, x))


def test_python_threads_beside_each_other() -> None:
    module, x = called(shape=(8, CHANNELS, 120, 120))
    want, found = module(x), [[] for _ in range(3)]

    def work(k: int) -> None:
        with torch.no_grad():
            found[k].extend(module(x) for _ in range(20))

    at_once([partial(work, k) for k in range(3)])
    assert [len(ys) for ys in found] == [20] * 3
    assert all(torch.equal(y, want) for ys in found for y in ys)
