"""fastbn.torch in use: whose memory, whose threads, copies, files, forks, hooks of autograd."""

import copy
import io
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from launch import at_once, python

torch = pytest.importorskip("torch", reason="the bridge to PyTorch: pip install 'fastbn[torch]'")

from torch_pairs import CHANNELS, LAYOUTS, draw  # noqa: E402

import fastbn.torch  # noqa: E402
from fastbn.torch import eager, tensors  # noqa: E402

pytestmark = pytest.mark.peers


def test_kernels_see_the_memory_of_the_tensors_and_pytorch_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found = real(*arguments, **options)
            seen.append(
                ([a for a in arguments if isinstance(a, np.ndarray)], found[0] if isinstance(found, tuple) else found)
            )
            return found

        monkeypatch.setattr(module, name, call)

    for name in ("batch_norm", "batch_norm_inference", "batch_norm_backward", "batch_norm_inference_backward"):
        watch(tensors.functional, name)

    def address(array: Any) -> int:
        return int(array.__array_interface__["data"][0])

    for dtype, shape in ((torch.float32, (4, 5, 6, 7)), (torch.bfloat16, (36, 5, 1, 1))):
        for layout in ("contiguous", "channels_last"):
            for training in (True, False):
                module = fastbn.torch.BatchNorm2d(CHANNELS).train(training)
                x, dy = (LAYOUTS[layout](t) for t in draw(shape, 0.0, 0, dtype))
                x.requires_grad_()
                y = module(x)
                (inputs, result) = seen.pop()
                assert address(inputs[0]) == x.data_ptr()
                assert {module.weight.data_ptr(), module.bias.data_ptr()} <= {address(a) for a in inputs}
                assert address(result) == y.data_ptr()
                (dx,) = torch.autograd.grad(y, x, dy)
                (inputs, result) = seen.pop()
                if len(inputs) > 3:  # else frozen parameters: a normalization of dy
                    assert address(inputs[1]) == x.data_ptr()
                assert address(inputs[0]) == dy.data_ptr()
                assert address(result) == dx.data_ptr()
    assert not seen


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_large_is_allocated_but_the_results(layout: str) -> None:
    module = fastbn.torch.BatchNorm2d(CHANNELS)
    x, dy = (LAYOUTS[layout](t) for t in draw((16, 5, 128, 100), 0.0, 0))
    x.requires_grad_()
    module(x).backward(dy)
    x.grad = None
    tracemalloc.start()
    try:
        y = module(x)
        assert tracemalloc.get_traced_memory()[1] < 1.05 * x.nbytes
        tracemalloc.reset_peak()
        y.backward(dy)
        assert tracemalloc.get_traced_memory()[1] < 2.1 * x.nbytes  # y, and dx now
    finally:
        tracemalloc.stop()


def test_inference_and_no_grad_record_nothing() -> None:
    module = fastbn.torch.BatchNorm2d(5)
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    want = module(x)
    with torch.no_grad():
        y = module(x)
    assert not y.requires_grad
    assert torch.equal(y, want)
    with torch.inference_mode():
        y = module(x)
        assert y.is_inference()
        assert torch.equal(y, want)
    assert module.num_batches_tracked == 3
    module.requires_grad_(False)
    assert not module(x.detach()).requires_grad


def test_pytorchs_number_of_threads_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = fastbn.torch.BatchNorm2d(5), draw((8, 5, 64, 60), 0.0, 0)[0]
    seen: list[Any] = []
    real = tensors.functional.batch_norm

    def watched(*arguments: Any, **options: Any) -> Any:
        if "backend" not in options:  # as it calls itself on fewer threads
            seen.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(tensors.functional, "batch_norm", watched)
    monkeypatch.setattr(tensors.threads, "get_num_threads", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = module(x)
        torch.set_num_threads(1)
        one, _ = module(x), module(x[:1, :, :2])
    finally:
        torch.set_num_threads(before)
    assert seen == [{}, {"num_threads": 1}, {}]
    assert torch.equal(one, two)


def test_two_python_threads_at_once() -> None:
    x, dy = draw((8, 5, 64, 60), 1e2, 0)

    def run() -> list[Any]:
        module = fastbn.torch.BatchNorm2d(5)
        found = []
        for _ in range(10):
            given = x.clone().requires_grad_()
            y = module(given)
            y.backward(dy)
            found += [y.detach(), given.grad]
        return [*found, module.weight.grad, *module.state_dict().values()]

    want = run()
    got: list[list[Any]] = []
    at_once([lambda: got.append(run())] * 2)
    assert len(got) == 2
    assert all(map(torch.equal, got[0] + got[1], want + want))


class _Normalized(torch.utils.data.Dataset):  # type: ignore[misc,type-arg]
    def __init__(self, module: Any, x: Any) -> None:
        self.module, self.x = module, x

    def __len__(self) -> int:
        return 6

    def __getitem__(self, k: int) -> Any:
        with torch.no_grad():
            return self.module(self.x + k)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def workers_of_a_dataloader() -> None:
    module, x = fastbn.torch.BatchNorm2d(5), draw((8, 5, 64, 60), 1e2, 0)[0]
    module(x)
    module.eval()
    data = _Normalized(module, x)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    for k, y in enumerate(loader):
        assert torch.equal(y, data[k])
    module.train()(x).sum().backward()


@pytest.mark.process
def test_workers_of_a_dataloader_that_are_forked_after_use() -> None:
    """In a process of its own: other libraries of this one, such as JAX, warn of any fork."""
    python("-c", "from tests.torch import test_use; test_use.workers_of_a_dataloader()")


def test_copies_pickles_and_files() -> None:
    module = fastbn.torch.BatchNorm2d(5, momentum=None)
    x = torch.randn(4, 5, 3, 3)
    module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    want = module(x)
    for other in copies:
        assert type(other) is fastbn.torch.BatchNorm2d
        assert torch.equal(other(x), want)
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in other.state_dict().items())


def test_state_dict_both_ways() -> None:
    for first, second in ((torch.nn, fastbn.torch), (fastbn.torch, torch.nn)):
        one, other = first.BatchNorm2d(5), second.BatchNorm2d(5)
        one(torch.randn(4, 5, 3, 3))
        file = io.BytesIO()
        torch.save(one.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file), strict=True)
        assert list(one.state_dict()) == list(other.state_dict())
        assert one.state_dict()._metadata == other.state_dict()._metadata
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_a_gradient_whose_sign_is_not_in_memory() -> None:
    module, x = fastbn.torch.BatchNorm1d(5), torch.randn(6, 5, requires_grad=True)
    dy = torch.randn(6, 5, dtype=torch.complex64).conj().imag
    assert dy.is_neg()
    assert torch.equal(*(torch.autograd.grad(module(x), x, given)[0] for given in (dy, dy.resolve_neg())))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batched_gradients_are_those_of_one_after_the_other(training: bool, frozen: bool) -> None:
    module = fastbn.torch.BatchNorm1d(5, dtype=torch.float64).train(training).requires_grad_(not frozen)
    x, steep = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, 5, dtype=torch.float64)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    y = module(x)
    got = torch.autograd.grad(y, wanted, steep, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(y, wanted, dy, retain_graph=True) for dy in steep]
    for k, batch in enumerate(got):
        torch.testing.assert_close(batch, torch.stack([grads[k] for grads in want]), rtol=1e-10, atol=1e-10)

    def third(x: Any) -> Any:
        return module(x).pow(3).sum()

    again = (torch.autograd.functional.hessian(third, x, vectorize=vectorize) for vectorize in (True, False))
    torch.testing.assert_close(*again, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_a_penalty_on_batched_gradients_is_pytorchs(options: dict[str, Any], frozen: bool, batched: bool) -> None:
    """Also where nothing depends on them; of the operators as of the modules."""
    x, steep, found = torch.randn(5, 6, 4, 4), torch.randn(2, 5, 6, 4, 4) if batched else torch.randn(5, 6, 4, 4), []
    theirs, ours = (
        library.BatchNorm2d(6, **options).eval().requires_grad_(not frozen) for library in (torch.nn, fastbn.torch)
    )
    calls = [theirs, ours]
    if theirs.running_mean is not None:
        constants = (theirs.running_mean, theirs.running_var)
        calls.append(lambda x: torch.ops.fastbn.batch_norm_inference(x, *constants, ours.weight, ours.bias, ours.eps))
    for call in calls:
        given = x.clone().requires_grad_()
        y = call(given)
        (dx,) = torch.autograd.grad(y, given, steep, is_grads_batched=batched, create_graph=True)
        assert dx.requires_grad
        dx.square().sum().backward()
        found.append((dx.detach(), torch.zeros_like(x) if given.grad is None else given.grad))
        if batched:
            slopes = torch.autograd.functional.jacobian(
                call, x[:2, :, 0, 0, None, None], vectorize=True, create_graph=True
            )
            assert slopes.requires_grad
    for dx, grad in found[1:]:
        torch.testing.assert_close(dx, found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad, found[0][1], rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of PyTorch's own forward derivatives
def test_forward_derivatives_and_transforms_are_pytorchs() -> None:
    module, x = fastbn.torch.BatchNorm1d(5), torch.randn(6, 5, requires_grad=True)
    module(x)
    plain, t = torch.nn.BatchNorm1d(5).eval(), torch.randn(6, 5)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(torch.func.jvp(module.eval(), (x,), (t,))[1], torch.func.jvp(plain, (x,), (t,))[1])
    fresh = fastbn.torch.BatchNorm1d(5, track_running_stats=False)
    for call in (torch.func.vmap(fresh), torch.func.vmap(torch.func.grad(lambda x: fresh(x).sin().sum()))):
        given = torch.randn(3, 6, 5)
        want = torch.stack([call(one[None])[0] for one in given])
        torch.testing.assert_close(call(given), want)
    with pytest.raises(RuntimeError, match="must override the setup_context staticmethod"):
        torch.func.grad(lambda x: torch.ops.fastbn.batch_norm(x, None, None, 1e-5)[0].sum())(x)


def test_saved_tensors_go_through_hooks() -> None:
    module = fastbn.torch.BatchNorm2d(5)
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    (want,) = torch.autograd.grad(module(x).square().sum(), x)
    with torch.autograd.graph.save_on_cpu():
        y = module(x)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(got, want)
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "back", [lambda v: torch._neg_view(-v), torch.nn.Parameter, lambda v: torch._efficientzerotensor(v.shape)]
)
def test_hooks_of_saved_tensors_may_give_back_any_kind(back: Any, training: bool) -> None:
    found = []
    for way in (lambda v: back(v.detach()).clone(), lambda v: back(v.detach())):
        module, x = fastbn.torch.BatchNorm1d(5).train(training), torch.linspace(-1, 2, 30).view(6, 5).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda v: v, way):
            y = module(x)
        found.append(torch.autograd.grad(y.square().sum(), [x, module.weight, module.bias]))
    torch.testing.assert_close(found[1], found[0])


def test_the_function_is_what_autograd_shows() -> None:
    y = fastbn.torch.BatchNorm1d(5)(torch.randn(3, 5))
    assert isinstance(y.grad_fn, eager.Normalize._backward_cls)


def _shown(run: Any) -> dict[str, float]:
    """What torch.profiler shows of a call: names, and the microseconds of each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
    return {event.key: event.cpu_time_total for event in seen.key_averages() if event.key.startswith("fastbn")}


def test_the_profiler_shows_every_pass_by_name() -> None:
    module, x = fastbn.torch.BatchNorm2d(5), torch.randn(4, 5, 12, 12, requires_grad=True)
    assert set(_shown(lambda: module(x))) == {"fastbn::batch_norm"}
    assert set(_shown(lambda: module(x).sum().backward())) == {"fastbn::batch_norm", "fastbn::batch_norm_backward"}
    module.eval()
    once = {"fastbn::batch_norm_inference"}
    assert set(_shown(lambda: module(x).sum().backward())) == once | {"fastbn::batch_norm_inference_backward"}
    with torch.no_grad():
        for run in (lambda: module(x), lambda: module(x)):  # looked over, then served as the call before
            shown = _shown(run)
            assert set(shown) == once
            assert shown["fastbn::batch_norm_inference"] > 0
        y = module(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            assert torch.equal(module(x), y)
            torch.testing.assert_close(torch.func.vmap(module)(x[:, None])[:, 0], y)
            state = dict(module.named_buffers()) | dict(module.named_parameters())
            assert torch.equal(torch.func.functional_call(module, state, (x,)), y)
