"""What every rank of a communicator of either engine does and checks: run by ranks.py."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import published
from across import CASES, EPS, Batch, Ranks, batch, layer
from tolerances import check, scales

import fastbn
from fastbn import distributed
from fastbn.distributed import Exchange


def training(r: Ranks) -> None:
    """Two steps as one process on the whole batch, and as the formulas; then evaluation, with what each rank has."""
    for name, case in CASES.items():
        given = batch(case, r.size)
        x, dy = given.part(r.rank)
        s = published.statistics(given.x, given.axis)
        bn, one, part = layer(given, r.comm), layer(given, None), given.parts[r.rank]
        assert bn.comm is r.comm
        for step in range(2):
            y, whole = bn(x), one(given.x)
            dx, dx_whole = bn.backward(dy), one.backward(given.dy)
            m = bn._saved.statistics
            r.same(f"{name}, step {step}", m.count, m.mean, m.m2, bn.running_mean, bn.running_var)
        assert y.strides == dx.strides == fastbn.batch_norm_inference(x, s.mean, s.var, axis=given.axis).strides
        assert bn.num_batches_tracked == one.num_batches_tracked == 2

        g = published.gradients(given.dy, given.x, s.mean, s.var, given.gamma, given.axis, EPS, training=True)
        want = published.normalized(given.x, s.mean, s.var, given.gamma, given.beta, given.axis, EPS)
        scale = scales(given.dy, given.x, s.mean, s.var, given.gamma, given.beta, given.axis, EPS, training=True)
        assert m.count == s.count
        check("mean", case.dtype, m.mean, s.mean, scale.mean)
        check("var", case.dtype, m.var(), s.var, scale.var)
        check("y", case.dtype, y, want[part], scale.y[part])
        check("dx", case.dtype, dx, g.dx[part], scale.dx[part])
        # sums of this rank's values
        own = published.gradients(dy, x, s.mean, s.var, given.gamma, given.axis, EPS, training=False)
        check("dgamma", case.dtype, bn.dgamma, own.dgamma, scale.dgamma)
        check("dbeta", case.dtype, bn.dbeta, own.dbeta, scale.dbeta)
        assert bn.dgamma.dtype == bn.dbeta.dtype == given.gamma.dtype

        close = {"rtol": 1e-6, "atol": 0} if case.dtype != "float64" else {"rtol": 1e-12, "atol": 0}
        np.testing.assert_allclose(bn.running_var, one.running_var, **close)
        np.testing.assert_allclose(bn.running_mean, one.running_mean, rtol=close["rtol"], atol=1e-6)
        if case.dtype == "float32":
            np.testing.assert_allclose(y, whole[part], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(dx, dx_whole[part], rtol=1e-5, atol=1e-5)
        mean, var = bn.running_mean.astype(float), bn.running_var.astype(float)
        wide = (mean, var, given.gamma, given.beta, given.axis, EPS)
        check("y", case.dtype, bn.eval()(x), published.normalized(x, *wide), scales(dy, x, *wide, training=False).y)


def evaluation(r: Ranks) -> None:
    """Evaluation, forward and backward, is this rank's own: the others need not take part. So is training's without a
    communicator.
    """
    bn = fastbn.BatchNorm(3, comm=r.comm).eval(backward=True)
    plain = fastbn.BatchNorm(3, track_running_stats=False, comm=r.comm).eval(backward=True)
    if r.rank == 0:
        x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
        np.testing.assert_array_equal(bn(x), fastbn.BatchNorm(3).eval()(x))
        np.testing.assert_array_equal(
            bn.backward(x), fastbn.batch_norm_inference_backward(x, x, np.zeros(3), np.ones(3))[0]
        )
        np.testing.assert_array_equal(plain(x), fastbn.batch_norm(x)[0])  # this batch's statistics, as PyTorch has it
        plain.backward(x)
    assert bn.train()(np.full((2, 3), float(r.rank), np.float32)).shape == (2, 3)


def one_collective_each(r: Ranks) -> None:
    """One before the first call, then one forward and one backward, with the same buffers."""
    calls, made = [], []
    real = distributed.gathering

    def counted(comm: Any, row: Any, rows: Any) -> Callable[[], object]:
        gather = real(comm, row, rows)
        made.append(row.size)

        def call() -> None:
            calls.append((row.size, row.ctypes.data, rows.ctypes.data))
            gather()

        return call

    distributed.gathering = counted
    try:
        bn = fastbn.BatchNorm(4, comm=r.comm)
        assert not calls
        x = np.random.default_rng(r.rank).normal(size=(3, 4)).astype(np.float32)
        bn(x)
        assert [size for size, *_ in calls] == [1, 3 + 2 * 4]
        bn.backward(x)
        for _ in range(2):
            bn(x), bn.backward(x)
    finally:
        distributed.gathering = real
    assert len(calls) == 1 + 6
    assert len(set(calls[1:])) == 1
    assert made == [1, 11]


def in_place(r: Ranks) -> None:
    """out=x and out=dy; a backward whose x is gone on one rank fails on all."""
    given = batch(CASES["uneven"], r.size)
    x, dy = given.part(r.rank)
    bn, want = layer(given, r.comm), layer(given, r.comm)
    y, dx = want(x), want.backward(dy)
    np.testing.assert_array_equal(bn(x), y)
    steep = dy.copy()
    assert bn.backward(steep, out=steep) is steep
    np.testing.assert_array_equal(steep, dx)
    level = x.copy()
    np.testing.assert_array_equal(bn(level, out=level if r.rank == 1 else None), y)
    with r.fails(RuntimeError, "overwritten by out=x", on=1):
        bn.backward(dy)


def errors(r: Ranks) -> None:
    """What is wrong on one rank is an error on all, at once; nothing has changed, and the next call is right."""
    given = batch(CASES["uneven"], r.size)
    x, dy = given.part(r.rank)
    bn = layer(given, r.comm)
    fresh = copy.deepcopy(bn.state_dict())
    bad: dict[str, tuple[Any, type[Exception], str]] = {
        "dtype": (x.astype(int), TypeError, "given dtype int64"),
        "channels": (x[:, :3], ValueError, "given 3 channels"),
        "rank": (x[0, 0], ValueError, "want rank 2 or more"),
        "ragged": ([[1.0], [2.0, 3.0]], TypeError, "ragged"),
    }
    for on, (wrong, kind, words) in zip(itertools.cycle(range(r.size)), bad.values(), strict=False):
        with r.fails(kind, words, on=on):
            bn(wrong if r.rank == on else x)
    with r.fails(ValueError, "out: given shape", on=1):
        bn(x, out=np.empty((9, 5, 7), np.float32) if r.rank == 1 else np.empty_like(x))
    inside = np.ones(x.size, np.float32)
    for name in ("gamma", "running_var"):
        kept = getattr(bn, name)
        if r.rank == 0:
            setattr(bn, name, inside[: given.gamma.size])
        with r.fails(ValueError, f"out: given an array that overlaps {name}", on=0):
            bn(x, out=inside.reshape(x.shape) if r.rank == 0 else None)
        setattr(bn, name, kept)
    if r.rank == 2:
        bn.running_mean = np.zeros(1)
    with r.fails(TypeError, "running_mean: given dtype float64", on=2):
        bn(x)
    bn.running_mean = fresh["running_mean"].copy()
    if r.rank == 1:
        bn.gamma = np.ones(5)
    with r.fails(TypeError, "gamma: given dtype float64", on=1):
        bn(x)
    bn.gamma = given.gamma.copy()
    with r.fails(RuntimeError, "backward before forward"):
        bn.backward(dy)
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, fresh[key])

    y = bn(x)
    before = bn.state_dict()
    with r.fails(ValueError, "dy: given shape", on=2):
        bn.backward(dy[:, :1] if r.rank == 2 else dy)
    with r.fails(TypeError, "out: given dtype float64", on=0):
        bn.backward(dy, out=np.empty(dy.shape) if r.rank == 0 else None)
    statistics = bn._saved.statistics
    for name in ("mean", "m2"):  # of this rank's layer, for a moment: in the memory of out
        if r.rank == 1:
            inside = np.ones(x.size, np.float32)
            row = inside[: 2 * given.gamma.size].view(np.float64)
            moments = fastbn.Moments(
                statistics.count, *({"mean": statistics.mean, "m2": statistics.m2} | {name: row}).values()
            )
            bn._saved = bn._saved._replace(statistics=moments)
        with r.fails(ValueError, f"out: given an array that overlaps moments.{name}", on=1):
            bn.backward(dy, out=inside.reshape(x.shape) if r.rank == 1 else None)
        bn._saved = bn._saved._replace(statistics=statistics)
    beta = bn.beta
    if r.rank == 1:
        bn.beta = inside[: beta.size]
    with r.fails(ValueError, "out: given an array that overlaps beta", on=1):
        bn.backward(dy, out=inside.reshape(x.shape) if r.rank == 1 else None)
    bn.beta = beta
    with r.fails(
        RuntimeError,
        "rank 0 of" if r.rank else "ranks 1, 2",
        f"but a {'forward' if r.rank else 'backward'} on",
        "the same calls",
    ):
        bn.backward(dy) if r.rank else bn(x)
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    np.testing.assert_array_equal(bn.backward(dy), layer_gradient(given, r, x, dy))
    np.testing.assert_array_equal(bn(x), y)


def layer_gradient(given: Batch, r: Ranks, x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    bn = layer(given, r.comm)
    bn(x)
    return bn.backward(dy)


def other_channels(r: Ranks) -> None:
    """Layers, or running moments, of other channels on one rank: an error on all that names both, every time."""
    bn = fastbn.BatchNorm(7 if r.rank == 1 else 4, comm=r.comm)
    others = ", ".join(str(rank) for rank in range(r.size) if rank != 1)
    for _ in range(2):
        with r.fails(ValueError, f"4 on ranks {others}", "7 on rank 1", "same number on every rank"):
            bn(np.zeros((2, bn.num_features), np.float32))
    assert bn.num_batches_tracked == 0
    with r.fails(ValueError, "5 on rank 0", "4 on ranks 1, 2"):
        fastbn.RunningMoments(4 + (r.rank == 0)).reduce(r.comm)


def few_values(r: Ranks) -> None:
    """One value per channel of all ranks together is refused on all of them; an empty batch gives an empty result and
    changes nothing.
    """
    bn = fastbn.BatchNorm(4, comm=r.comm)
    fresh = bn.state_dict()
    with r.fails(ValueError, "Expected more than 1 value per channel when training, got input size"):
        bn(np.ones((int(r.rank == 1), 4), np.float32))
    empty = np.empty((0, 4), np.float32)
    assert bn(empty).shape == bn.backward(empty).shape == (0, 4)
    assert not bn.dgamma.any()
    assert not bn.dbeta.any()
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, fresh[key])


def not_finite(r: Ranks) -> None:
    """NaN and Inf on one rank stay in their channel, on all ranks, without a warning."""
    given = batch(CASES["uneven"], r.size)
    x, dy = given.part(r.rank)
    want, want_dx = layer(given, r.comm), layer_gradient(given, r, x, dy)
    clean = want(x)
    if r.rank == 1:
        x[0, 1, 0], x[0, 3, 2] = np.nan, np.inf
    bn = layer(given, r.comm)
    y, dx = bn(x), bn.backward(dy)
    for got, fine in ((y, clean), (dx, want_dx)):
        assert np.isnan(got[:, [1, 3]]).all()
        np.testing.assert_array_equal(got[:, [0, 2, 4]], fine[:, [0, 2, 4]])


def copies(r: Ranks) -> None:
    """Copies share the communicator, and each is a layer of its own; pickle takes the layer where it takes the
    communicator.
    """
    given = batch(CASES["uneven"], r.size)
    x, dy = given.part(r.rank)
    bn = layer(given, r.comm, momentum=None)
    y = bn(x)
    deep, shallow = copy.deepcopy(bn), copy.copy(bn)
    for other in (deep, shallow):
        assert other.comm is r.comm
        np.testing.assert_array_equal(other(x), y)
        np.testing.assert_array_equal(other.backward(dy), bn.backward(dy))
    assert deep.running_mean is not bn.running_mean
    loaded = fastbn.BatchNorm(5)
    loaded.load_state_dict(bn.state_dict())
    assert loaded.comm is None
    try:
        whole = pickle.dumps(r.comm)
    except Exception:
        with r.fails(TypeError, "can't be pickled", "state_dict()"):
            pickle.dumps(bn)
    else:
        twin = pickle.loads(pickle.dumps(bn))
        assert twin.comm == pickle.loads(whole)
        np.testing.assert_array_equal(twin(x), y)


def running_moments(r: Ranks) -> None:
    """A data set over ranks: the same as in one piece, the same bits everywhere; each rank's own go on unchanged."""
    for offset in (0.0, 1e2, 1e4, 1e6):
        data = np.random.default_rng(3).normal(offset, 2, (4 * r.size, 5, 3)).astype(np.float32)
        shares = np.cumsum([0, *np.roll([0, 4, 8, 4][: r.size], 1)])
        own = fastbn.RunningMoments(5)
        for chunk in np.array_split(data[shares[r.rank] : shares[r.rank + 1]], 2):
            own.update(chunk)
        count, mean = own.count, own.mean.copy()
        whole = own.reduce(r.comm)
        s = published.statistics(data[: shares[-1]], 1)
        assert whole.count == s.count
        check("mean", "float32", whole.mean, s.mean, np.maximum(np.abs(s.mean), np.sqrt(s.var)))
        check("var", "float32", whole.var(), s.var, s.var)
        r.same(f"reduce at {offset}", whole.count, whole.mean, whole.moments.m2)
        assert own.count == count
        np.testing.assert_array_equal(own.mean, mean)
        again = own.update(data[:1]).reduce(r.comm)
        assert again.count == s.count + 3 * r.size
    nothing = fastbn.RunningMoments(5).reduce(r.comm)
    assert nothing.count == 0
    assert not nothing.mean.any()


def some_of_them(r: Ranks) -> None:
    """A communicator of some ranks: each half normalizes by its own."""
    half = r.rank % 2
    members = [rank for rank in range(r.size) if rank % 2 == half]
    if hasattr(r.comm, "Split"):
        comm = r.comm.Split(half, r.rank)
    else:
        from torch import distributed

        groups = [distributed.new_group(list(range(parity, r.size, 2))) for parity in (0, 1)]
        comm = groups[half]
    data = np.random.default_rng(0).normal(3, 2, (2 * r.size, 4)).astype(np.float32)
    bn = fastbn.BatchNorm(4, comm=comm)
    bn(data[2 * r.rank : 2 * r.rank + 2])
    mine = np.concatenate([data[2 * rank : 2 * rank + 2] for rank in members]).astype(np.float64)
    np.testing.assert_allclose(bn.running_mean, 0.1 * mine.mean(0), rtol=1e-5)
    np.testing.assert_allclose(bn.running_var, 0.9 + 0.1 * mine.var(0, ddof=1), rtol=1e-5)


def no_communicator(r: Ranks) -> None:
    """What looks like one, and is none that joins this process with others."""
    wrong: list[Any] = []
    if hasattr(r.comm, "Split"):
        from mpi4py import MPI

        wrong += [MPI.COMM_NULL, MPI.INFO_NULL]
        local = r.comm.Split(r.rank % 2, r.rank)
        wrong.append(local.Create_intercomm(0, r.comm, 1 - r.rank % 2))  # gathers what the other side has, not its own
    else:
        import torch
        from torch import distributed

        other = distributed.new_group([0])
        wrong += [torch.zeros(2), distributed.Backend] + ([other] if r.rank else [])
    for comm in wrong:
        for make in (lambda c: fastbn.BatchNorm(4, comm=c), lambda c: Exchange(c, 4), fastbn.RunningMoments(4).reduce):
            with r.fails(TypeError, "comm: given", "mpi4py", "torch.distributed"):
                make(comm)


CHECKS = (
    training,
    evaluation,
    one_collective_each,
    in_place,
    errors,
    other_channels,
    few_values,
    not_finite,
    copies,
    running_moments,
    some_of_them,
    no_communicator,
)
