"""The layer on the simulated GPU: running statistics change there, state goes through the host, sides do not mix."""

from typing import Any

import numpy as np
import pytest

import fastbn
from tests.cuda.simulated import gpu

NAMES = ("gamma", "beta", "running_mean", "running_var")
X = np.random.default_rng(0).normal(3, 2, (6, 3, 5)).astype(np.float32)
DY = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)


def _pair(**options: Any) -> tuple[fastbn.BatchNorm, fastbn.BatchNorm]:
    return fastbn.BatchNorm(3, **options), fastbn.BatchNorm(3, **options).to("cuda", "numba")


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"unbiased_running_var": False}, {"affine": False}, {"track_running_stats": False}],
)
def test_training_and_evaluation_as_on_the_host(options: dict[str, Any]) -> None:
    host, device = _pair(**options)
    for scale in (1, 2, 3):
        y, dx = host(X * scale), host.backward(DY)
        np.testing.assert_allclose(gpu.on_host(device(gpu.on_gpu(X * np.float32(scale)))), y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gpu.on_host(device.backward(gpu.on_gpu(DY))), dx, rtol=1e-5, atol=1e-6)
        for name in ("dgamma", "dbeta"):
            if getattr(host, name) is not None:
                np.testing.assert_allclose(
                    gpu.on_host(getattr(device, name)), getattr(host, name), rtol=1e-5, atol=1e-5
                )
    state = device.state_dict()
    assert list(state) == list(host.state_dict())
    for key, value in host.state_dict().items():
        assert type(state[key]) is np.ndarray
        assert state[key].dtype == value.dtype
        np.testing.assert_allclose(state[key], value, rtol=1e-6)
    y = host.eval()(X)
    np.testing.assert_allclose(gpu.on_host(device.eval()(gpu.on_gpu(X))), y, rtol=1e-5, atol=1e-6)


def test_backward_has_the_parameters_and_statistics_of_its_forward() -> None:
    _, device = _pair()
    device.eval(backward=True)(gpu.on_gpu(X))
    want = gpu.on_host(device.backward(gpu.on_gpu(DY))).copy()
    device(gpu.on_gpu(X))
    gpu.on_host(device.gamma)[...] *= 10
    fastbn.cuda.moments.track(fastbn.moments(gpu.on_gpu(X)), 1.0, 1.0, device.running_mean, device.running_var)
    np.testing.assert_array_equal(gpu.on_host(device.backward(gpu.on_gpu(DY))), want)


def test_evaluation_keeps_x_only_where_asked() -> None:
    _, device = _pair()
    device.eval()(gpu.on_gpu(X))
    with pytest.raises(RuntimeError, match=r"keeps no x unless asked to: bn.eval\(backward=True\)"):
        device.backward(gpu.on_gpu(DY))


def test_recalibrate_and_folded_affine_as_on_the_host() -> None:
    host, device = _pair()
    arrays = [getattr(device, name) for name in NAMES]
    host.recalibrate([X, X[:2] * 3], progress=False)
    device.recalibrate([gpu.on_gpu(X), gpu.on_gpu(X[:2] * np.float32(3))], progress=False)
    assert [getattr(device, name) for name in NAMES] == arrays  # changed in place
    for key, value in host.state_dict().items():
        np.testing.assert_allclose(device.state_dict()[key], value, rtol=1e-6)
    for mine, theirs in zip(device.folded_affine(), host.folded_affine(), strict=True):
        assert type(mine) is np.ndarray
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    before = device.state_dict()
    with pytest.raises(
        TypeError, match=r"running_mean: this layer's is on a GPU, x on the host: move the layer, bn\.to\('cpu'\)"
    ):
        device.recalibrate([gpu.on_gpu(X), X], progress=False)
    for key, value in device.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_to_and_fro_keeps_every_value() -> None:
    host, device = _pair()
    device(gpu.on_gpu(X))
    state = device.state_dict()
    device.to("cpu")
    for name in NAMES:
        assert type(getattr(device, name)) is np.ndarray
    for key, value in device.state_dict().items():
        np.testing.assert_array_equal(value, state[key])
    with pytest.raises(RuntimeError, match="backward before forward"):
        device.backward(DY)
    host.load_state_dict(state)
    again = fastbn.BatchNorm(3).to("cuda:0", "numba")
    arrays = [getattr(again, name) for name in NAMES]
    again.load_state_dict(state)
    assert [getattr(again, name) for name in NAMES] == arrays  # changed in place
    for key, value in again.state_dict().items():
        np.testing.assert_array_equal(value, state[key])
    again.reset_parameters()
    assert [getattr(again, name) for name in NAMES] == arrays
    for key, value in fastbn.BatchNorm(3).state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key], value)


def test_out_over_x_leaves_no_backward() -> None:
    _, device = _pair()
    x = gpu.on_gpu(X.copy())
    device.forward(x, x)
    with pytest.raises(RuntimeError, match="backward needs the x of the forward"):
        device.backward(gpu.on_gpu(DY))
    x = gpu.on_gpu(X.copy())
    device(x)
    device.backward(gpu.on_gpu(DY), x)
    with pytest.raises(RuntimeError, match="backward needs the x of the forward"):
        device.backward(gpu.on_gpu(DY))


def test_sides_do_not_mix() -> None:
    host, device = _pair()
    with pytest.raises(
        TypeError, match=r"gamma: this layer's is on the host, x on a GPU: move the layer, bn.to\('cuda'\)"
    ):
        host(gpu.on_gpu(X))
    with pytest.raises(
        TypeError, match=r"gamma: this layer's is on a GPU, x on the host: move the layer, bn.to\('cpu'\)"
    ):
        device(X)
    assert device.num_batches_tracked == host.num_batches_tracked == 0
    for x, error, words in (
        (X.astype("f8"), TypeError, "x: given dtype float64, want float32, this layer's"),
        (X[:, :2], ValueError, r"x: given 2 channels along axis 1 of shape \(6, 2, 5\), want 3"),
    ):
        with pytest.raises(error, match=words):
            device(gpu.on_gpu(x))


def test_devices_and_kinds_that_are_none() -> None:
    bn = fastbn.BatchNorm(3)
    for device in ("gpu", "cuda:x", "cpu:0", "cuda:-1", 0):
        with pytest.raises(ValueError, match=r"device: given .*, want 'cpu', 'cuda' or 'cuda:N'"):
            bn.to(device)
    with pytest.raises(ValueError, match="kind: given 'jax', want one of torch, cupy, numba"):
        bn.to("cuda", "jax")
    assert type(bn.gamma) is np.ndarray


def test_arrays_that_no_kernel_may_have_are_refused_before_anything_is_computed() -> None:
    """Kernels go by addresses: without gaps, (C,), of the layer's dtype; in training writeable, and apart from each
    other.
    """
    one, memory = np.ones(3, np.float32), np.ones(6, np.float32)
    frozen = one.copy()
    frozen.flags.writeable = False
    wrong: list[tuple[Any, type[Exception], str, bool]] = [
        (
            memory[::2],
            ValueError,
            r"given an array with gaps \(strides \(2,\) elements\), want a contiguous one: copy it first",
            True,
        ),
        (memory, ValueError, r"given shape \(6,\), want \(3,\)", True),
        (np.ones(3), TypeError, "given dtype float64, want float32", False),
        (frozen, ValueError, "given a read-only array, want one that can be written: give it a copy", False),
    ]
    for training in (True, False):
        for name in ("running_mean", "running_var"):
            for array, error, words, always in wrong:
                _, device = _pair()
                setattr(device.train(training), name, gpu.on_gpu(array))
                if always or training:
                    out = np.full(X.shape, -7, np.float32)
                    with pytest.raises(error, match=f"^{name}: {words}"):
                        device(gpu.on_gpu(X), gpu.on_gpu(out))
                    assert (out == -7).all()
                    assert device.num_batches_tracked == 0
                else:
                    device(gpu.on_gpu(X))
        _, device = _pair()
        device.running_mean, device.gamma = gpu.on_gpu(memory[:3]), gpu.on_gpu(memory[2:5])
        if training:
            with pytest.raises(
                ValueError, match=r"^running_mean: given an array that overlaps gamma, want memory apart from it"
            ):
                device(gpu.on_gpu(X))
            with pytest.raises(
                ValueError, match=r"^gamma: given an array that overlaps running_mean, want memory apart from it"
            ):
                device.load_state_dict(fastbn.BatchNorm(3).state_dict())
        else:
            device.eval()(gpu.on_gpu(X))


def test_track_and_moments_refuse_arrays_with_gaps() -> None:
    m, memory = fastbn.moments(gpu.on_gpu(X)), gpu.on_gpu(np.ones(6, np.float32)[::2])
    for arrays in ((memory, gpu.on_gpu(np.ones(3, np.float32))), (gpu.on_gpu(np.ones(3, np.float32)), memory)):
        with pytest.raises(ValueError, match=r"given an array with gaps"):
            fastbn.cuda.moments.track(m, 1.0, 1.0, *arrays)
    with pytest.raises(TypeError, match=r"^running_var: given dtype float64, want float32"):
        fastbn.cuda.moments.track(m, 1.0, 1.0, gpu.on_gpu(np.ones(3, np.float32)), gpu.on_gpu(np.ones(3)))
    with pytest.raises(ValueError, match=r"^statistics: given an array with gaps"):
        fastbn.cuda.moments.statistic_copy(memory)
    for wrong, error in ((np.ones(6)[::2], ValueError), (np.ones(3, np.float32), TypeError)):
        made = type(m)(m.count, m.mean, gpu.on_gpu(wrong))
        for use in (
            made.var,
            made.std,
            lambda made=made: made.rstd(1e-5),
            lambda made=made: made.merge(m),
            lambda made=made: m.merge(made),
        ):
            with pytest.raises(error, match=r"^(moments|other)\.m2: given"):
                use()


def test_out_lies_apart_from_what_the_layer_keeps() -> None:
    for name in NAMES:
        memory = np.ones(X.size, np.float32)
        out = memory.reshape(X.shape)
        _, device = _pair()
        setattr(device, name, gpu.on_gpu(memory[4:7]))
        message = f"^out: given an array that overlaps {name}; want memory apart from it$"
        for turn in (lambda bn: bn.train(), lambda bn: bn.eval(backward=True)):
            layer = turn(device)
            with pytest.raises(ValueError, match=message):
                layer(gpu.on_gpu(X), gpu.on_gpu(out))
            layer(gpu.on_gpu(X))
            with pytest.raises(ValueError, match=message):
                layer.backward(gpu.on_gpu(DY), gpu.on_gpu(out))


def test_the_same_memory_in_other_strides_of_axes_of_length_1_is_in_place() -> None:
    image = X.copy()
    y, _ = fastbn.batch_norm(gpu.on_gpu(image[None]), out=gpu.on_gpu(image.reshape(1, *X.shape)))
    np.testing.assert_array_equal(gpu.on_host(y), gpu.on_host(fastbn.batch_norm(gpu.on_gpu(X[None]))[0]))
    bn, image = fastbn.BatchNorm(X.shape[0]).to("cuda", "numba"), gpu.on_gpu(X.copy())
    bn(gpu.on_gpu(image._ary[None]), gpu.on_gpu(image._ary.reshape(1, *X.shape)))
    with pytest.raises(RuntimeError, match="which was overwritten"):
        bn.backward(gpu.on_gpu(X[None]))
