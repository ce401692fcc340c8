"""Arrays on a GPU, as far as no GPU is needed: what their interface says, what is refused and with which words, who
serves them.
"""

import importlib
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from launch import python

import fastbn
from fastbn.arguments import config
from fastbn.cuda import buffers, placement, streams


class OnGpu:
    """An array that claims to lie on a GPU."""

    def __init__(self, **changed: Any) -> None:
        whole = {
            "shape": (2, 3, 4),
            "typestr": "<f4",
            "data": (4096, False),
            "version": 3,
            "strides": None,
            "stream": 7,
        }
        self.__cuda_array_interface__ = {key: value for key, value in (whole | changed).items() if value != "absent"}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose CUDA backend declines nothing."""
    monkeypatch.setattr(buffers, "declines", lambda: None)


def test_what_the_interface_says() -> None:
    found = buffers.view(OnGpu(), "x")
    assert found[:6] == (4096, (2, 3, 4), (12, 4, 1), "float32", False, 7)
    assert (found.size, found.itemsize, found.span()) == (24, 4, (4096, 4096 + 96))
    strided = buffers.view(
        OnGpu(strides=(-96, 8, 16), data=(8192, True), typestr="<f2", version=2, stream="absent"), "x"
    )
    assert strided[1:6] == ((2, 3, 4), (-48, 4, 8), "float16", True, None)
    assert strided.span() == (8192 - 96, 8192 + 2 * 8 + 3 * 16 + 2)
    assert buffers.view(OnGpu(shape=(0, 3), data=(0, False)), "x").span() == (0, 0)


def test_numbers_of_an_interface_are_pythons_whatever_they_were() -> None:
    for kind in (np.int32, np.int64, np.uint64):
        shape, strides = (tuple(map(kind, numbers)) for numbers in ((2, 3, 4), (48, 16, 4)))
        found = buffers.view(OnGpu(shape=shape, strides=strides, data=(kind(8192), np.True_), stream=kind(7)), "x")
        assert found[:6] == (8192, (2, 3, 4), (12, 4, 1), "float32", True, 7)
        assert {type(number) for number in (found.address, *found.shape, *found.strides, found.stream)} == {int}
    assert buffers.view(OnGpu(stream=np.int64(0)), "x").stream == buffers.LEGACY


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"typestr": "<i4"}, TypeError, "x: given dtype <i4.*want float16, bfloat16, float32 or float64"),
        ({"typestr": ">f4"}, TypeError, "typestr '>f4'"),
        ({"typestr": "<c8"}, TypeError, "typestr '<c8'"),
        ({"version": 1}, TypeError, "version 1, want 2 or 3"),
        ({"typestr": "absent", "data": "absent"}, TypeError, "lacks typestr, data"),
        ({"mask": object()}, TypeError, "masked array"),
        ({"strides": (12, 4)}, ValueError, r"strides \(12, 4\) for shape \(2, 3, 4\)"),
        (
            {"shape": (2, 3.0, 4)},
            TypeError,
            r"x: its __cuda_array_interface__ has \(2, 3.0, 4\) where it should have whole numbers",
        ),
        ({"strides": (48, 16, 4.0)}, TypeError, "4.0.* where it should have whole numbers"),
        ({"shape": None}, TypeError, "has None where it should have whole numbers"),
        ({"stream": "7"}, TypeError, "has \\('7',\\) where it should"),
        ({"strides": (24, 8, 2)}, ValueError, "off its elements' boundary"),
        ({"data": (4098, False)}, ValueError, "off its elements' boundary"),
        ({"data": (0, False)}, ValueError, "null pointer"),
        ({"data": (None, False)}, ValueError, "null pointer"),
    ],
)
def test_interfaces_that_are_refused(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        buffers.view(OnGpu(**changed), "x")


def test_what_lives_on_a_gpu() -> None:
    assert buffers.on_device(OnGpu())
    for value in (np.zeros(3), [1.0], 3.0, None, "x"):
        assert not buffers.on_device(value)


CALLS = {
    "moments": lambda x, **k: fastbn.moments(x, **k),
    "batch_norm": lambda x, **k: fastbn.batch_norm(x, **k),
    "batch_norm_inference": lambda x, **k: fastbn.batch_norm_inference(x, x, x, **k),
    "batch_norm_backward": lambda x, **k: fastbn.batch_norm_backward(x, x, None, **k),
    "batch_norm_inference_backward": lambda x, **k: fastbn.batch_norm_inference_backward(x, x, x, x, **k),
}
every_call = pytest.mark.parametrize("call", CALLS)


@every_call
def test_another_backend_can_not_take_an_array_on_a_gpu(
    call: str, served: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend in ("cpu", "reference"):
        with pytest.raises(
            fastbn.BackendUnavailable,
            match=f"backend='{backend}' can't take an array on a GPU: copy it to the host first",
        ):
            CALLS[call](OnGpu(), backend=backend)
    monkeypatch.setattr(config, "BACKEND", "cpu")
    with pytest.raises(fastbn.BackendUnavailable, match="FASTBN_BACKEND='cpu' can't take an array on a GPU"):
        CALLS[call](OnGpu())


@every_call
def test_an_array_on_the_host_is_not_copied_to_a_gpu(call: str, served: None) -> None:
    x = np.ones((4, 3), np.float32)
    with pytest.raises(
        fastbn.BackendUnavailable,
        match="backend='cuda' takes arrays on a GPU, and this one lives on the host: copy it there",
    ):
        CALLS[call](x, backend="cuda")
    with pytest.raises(TypeError, match="stream: given one for an array on the host"):
        CALLS[call](x, stream=0)


@every_call
def test_why_cuda_declines_is_said(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "declines", lambda: "the dog ate it")
    for options in ({}, {"backend": "cuda"}):
        with pytest.raises(
            fastbn.BackendUnavailable, match="this array lives on a GPU, which backend cuda can't serve: the dog ate it"
        ):
            CALLS[call](OnGpu(), **options)
    assert "cuda: the dog ate it" in fastbn.explain((4, 3)).text


def test_parameters_on_a_gpu_beside_an_array_on_the_host() -> None:
    x = np.ones((4, 3), np.float32)
    with pytest.raises(
        TypeError, match=r"gamma: given an array on a GPU \(OnGpu\), want a host array: copy it to the host first"
    ):
        fastbn.batch_norm(x, OnGpu(shape=(3,)))


class Machine(SimpleNamespace):
    """numba.cuda as it is on some machine."""

    def is_available(self) -> bool:
        return bool(self.driver)


@pytest.fixture
def declines(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `declines` says on a machine like that."""
    from numba import config as numba_config

    def ask(installed: bool, machine: Machine | None) -> str | None:
        monkeypatch.setattr(numba_config, "ENABLE_CUDASIM", 0)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(buffers, "_numba_cuda", lambda: machine)
        buffers.declines.cache_clear()
        try:
            return buffers.declines()
        finally:
            buffers.declines.cache_clear()

    return ask


NVVM = SimpleNamespace(is_available=lambda: True)


def _gpus(*versions: tuple[int, int]) -> list[Any]:
    return [SimpleNamespace(compute_capability=version) for version in versions]


def test_each_reason_to_decline_has_its_remedy(declines: Any) -> None:
    assert "not installed: pip install 'fastbn[cuda13]'" in declines(False, None)
    assert "import _numba_cuda_redirector" in declines(True, Machine(implementation="Built-in"))
    broken = SimpleNamespace(
        driver=SimpleNamespace(driver=SimpleNamespace(initialization_error="no libcuda.so")), nvvm=NVVM
    )
    without = declines(True, Machine(implementation="NVIDIA", driver=False, cudadrv=broken))
    assert "no CUDA driver that works (no libcuda.so)" in without
    assert "install NVIDIA's driver" in without
    works = SimpleNamespace(driver=SimpleNamespace(initialization_error=None))
    silent = declines(
        True, Machine(implementation="NVIDIA", driver=False, cudadrv=SimpleNamespace(driver=works, nvvm=NVVM))
    )
    assert "no CUDA driver that works (which reports no error)" in silent
    uncompiled = SimpleNamespace(driver=works, nvvm=SimpleNamespace(is_available=lambda: False))
    said = declines(True, Machine(implementation="NVIDIA", driver=False, cudadrv=uncompiled))
    assert said.startswith("libNVVM, which compiles the kernels, is not installed: pip install 'fastbn[cuda13]'")
    assert "driver that works" not in said
    assert "CUDA_VISIBLE_DEVICES" in declines(True, Machine(implementation="NVIDIA", driver=True, gpus=[]))
    assert "compute capability 7.5, want 8.0 or later" in declines(
        True, Machine(implementation="NVIDIA", driver=True, gpus=_gpus((7, 0), (7, 5)))
    )
    assert declines(True, Machine(implementation="NVIDIA", driver=True, gpus=_gpus((7, 5), (9, 0)))) is None


def test_importing_fastbn_touches_no_cuda() -> None:
    code = (
        "import sys, fastbn; assert not [name for name in sys.modules if name.startswith(('numba.cuda', 'cuda', "
        "'fastbn.cuda.kernels'))]"
    )
    python("-c", code)


class Tensor:
    """CuPy's array, as far as fastbn asks it, in host memory."""

    __module__ = "cupy"

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype, self.device = array, array.dtype, Device()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__ | {"version": 3}

    def transpose(self, axes: tuple[int, ...]) -> "Tensor":
        return Tensor(self.array.transpose(axes))

    def get(self) -> np.ndarray:
        return self.array.copy()

    def set(self, values: np.ndarray) -> None:
        self.array[...] = values


class Device:
    id = 3

    def __enter__(self) -> None:
        pass

    def __exit__(self, *reason: object) -> None:
        pass


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for CuPy."""
    stream = SimpleNamespace(
        get_current_stream=lambda device: SimpleNamespace(ptr=9 if device == 3 else 0), Device=lambda index: Device()
    )
    module = SimpleNamespace(
        empty=lambda sizes, kind: Tensor(np.empty(sizes, kind)), array=lambda a: Tensor(a.copy()), cuda=stream
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_results_and_streams_are_those_of_cupy(cupy: Any) -> None:
    x = buffers.view(Tensor(np.zeros((2, 3, 4), np.float32)), "x")
    assert (buffers.device_of(x), streams.current_stream(x, 3)) == (3, 9)
    made = buffers.empty((2, 3, 4), (0, 2, 1), "float32", x)
    assert isinstance(made, Tensor)
    assert buffers.view(made, "y")[1:4] == ((2, 3, 4), (12, 1, 3), "float32")


@pytest.mark.peers
def test_results_are_tensors_beside_tensors() -> None:
    torch = pytest.importorskip("torch", reason="its tensors are made and read")
    assert not buffers.on_device(torch.zeros(3))  # which has the interface, and raises when asked for it
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = buffers.view(torch.zeros((2, 3, 4), dtype=dtype), "x")
        assert x[1:5] == ((2, 3, 4), (12, 4, 1), str(dtype).partition(".")[2], False)
        made = buffers.empty((2, 3, 4), (0, 2, 1), x.dtype, x)
        assert (made.dtype, tuple(made.stride())) == (dtype, (12, 1, 3))
    with pytest.raises(TypeError, match=r"x: given dtype torch.int32, want float16.*x.float\(\)"):
        buffers.view(torch.zeros(3, dtype=torch.int32), "x")


@pytest.mark.peers
def test_tensors_whose_values_are_not_those_of_their_memory_are_refused() -> None:
    torch = pytest.importorskip("torch", reason="its tensors are made and read")
    plain = torch.ones(2, 3)
    negated = torch.complex(plain, plain).conj().imag
    for given, words in (
        (
            plain.clone().requires_grad_(),
            r"x: given a tensor that requires a gradient, .*: x.detach\(\), or a module of fastbn.torch, such as",
        ),
        (torch.nn.Parameter(plain), r"x: given a tensor that requires a gradient"),
        (negated, r"x: given a view whose memory holds the negated values, want memory of its own: x.resolve_neg\(\)"),
        (torch._efficientzerotensor((2, 3)), r"x: given a tensor without memory .*: x.clone\(\)"),
        (plain.to_sparse(), r"x: given a tensor without memory of its own .*: x.to_dense\(\)"),
    ):
        with pytest.raises(TypeError, match=words):
            buffers.view(given, "x")
    with pytest.raises(TypeError, match="x: given a tensor without memory of its own"):
        torch.func.vmap(lambda row: buffers.view(row, "x"))(plain)
    assert buffers.view(negated.resolve_neg(), "x").shape == (2, 3)
    kind = type("Mine", (torch.Tensor,), {})
    assert buffers.library(plain.as_subclass(kind)) == "torch"
    assert buffers.view(plain.as_subclass(kind), "x").owner is not None


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fresh_memory_has_an_address_on_a_boundary() -> None:
    torch = pytest.importorskip("torch", reason="its tensors are made and read")
    tensor = torch.empty(16)
    assert buffers.address(tensor) == tensor.data_ptr()
    assert buffers.address(tensor[:0]) % 16 == 0
    with pytest.raises(RuntimeError, match="want a 16-byte boundary"):
        buffers.address(tensor[1:])
    with pytest.raises(RuntimeError, match=r"PyTorch makes tensors without memory here, .*: call fastbn outside of it"):
        buffers.address(torch._efficientzerotensor(3))
    with (
        importlib.import_module("torch._subclasses").FakeTensorMode(),
        pytest.raises(RuntimeError, match="without memory here"),
    ):
        buffers.address(torch.empty(3))


@pytest.mark.peers
def test_the_bridge_to_pytorch_gives_what_is_not_refused() -> None:
    torch = pytest.importorskip("torch", reason="its tensors are made and read")
    kernels = importlib.import_module("fastbn.torch.tensors")
    elsewhere = torch.nn.Parameter(torch.ones(3, device="meta"))  # as one on a GPU: not on the host
    assert not kernels.array(elsewhere).requires_grad
    assert kernels.array(elsewhere).is_meta


@pytest.mark.peers
def test_values_come_and_go_whatever_a_tensor_records(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="its tensors are made and read")
    monkeypatch.setattr(buffers, "on_device", lambda array: True)
    gamma = torch.nn.Parameter(torch.ones(3))
    assert list(placement.to_host(gamma)) == [1, 1, 1]
    placement.overwrite(gamma, np.arange(3.0))
    assert gamma.tolist() == [0, 1, 2]
    assert gamma.requires_grad
    assert list(placement.to_host(torch.complex(gamma.detach(), gamma.detach()).conj().imag)) == [0, -1, -2]


def test_values_are_overwritten_without_a_copy_to_the_host(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "get", lambda self: pytest.fail("copied to learn its dtype"))
    target = Tensor(np.ones(3, np.float32))
    placement.overwrite(target, np.arange(3))
    assert target.array.tolist() == [0, 1, 2]


def test_a_layer_moves_to_cupy_and_back(cupy: Any, served: None) -> None:
    bn = fastbn.BatchNorm(3).to("cuda:3", "cupy")
    assert isinstance(bn.gamma, Tensor)
    assert list(bn.state_dict()["running_var"]) == [1, 1, 1]
    bn.load_state_dict({key: value + 1 for key, value in bn.state_dict().items()})
    assert isinstance(bn.running_var, Tensor)
    assert list(bn.to("cpu").running_var) == [2, 2, 2]
    assert fastbn.BatchNorm(3).to("cuda").gamma is not None  # CuPy is imported, and chosen
    bare = fastbn.BatchNorm(3, affine=False).to("cuda")
    assert bare.gamma is None
    assert isinstance(bare.running_mean, Tensor)


def test_a_layer_does_not_move_where_cuda_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "declines", lambda: "no GPU today")
    bn = fastbn.BatchNorm(3)
    with pytest.raises(fastbn.BackendUnavailable, match="no GPU today"):
        bn.to("cuda")
    assert type(bn.gamma) is np.ndarray
    bare = fastbn.BatchNorm(3, affine=False, track_running_stats=False)
    assert bare.to("cuda") is bare  # nothing is to move, as PyTorch has it
