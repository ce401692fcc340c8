"""All that a BatchNorm does, for the fuzz test, with what `model` put into it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .arrays import draw
from .calls import SHAPES
from .judge import DOCUMENTED, Judge, Truth, Wrong, near, result_is
from .kinds import MEANING, ODD, RIGHT, UNKNOWN, WRONG, Given, Maker, data, dtype_of, out, values, vector
from .model import ARRAYS, KEYS, Model, constructed
from .words import HUGE, JUNK, label


class Layer(Model):
    """What it is asked."""

    def forward(self) -> None:
        """Training or evaluation, as the layer is set."""
        bn, make = self.bn, self.make
        odd = self.rng.choice(("", "", "", "x", "out"))
        x = data(make, "x", values(make, self.shape), self.dtype, self.axis, odd == "x")
        others = [self.is_[name] for name in ARRAYS]
        to = out(make, x, self.axis, odd == "out", [one for one in others if type(one.value) is np.ndarray], ("x",))
        training = bool(self.flag("training"))
        batch = training or not self.tracked
        moves = training and self.tracked and self.flag("track_running_stats")
        words = self.usable("eps", "axis", "backend", "num_threads", "training", "track_running_stats")
        if moves:
            words += self.usable("momentum", "unbiased_running_var", "num_batches_tracked")
        given = [x, to, *self.given("gamma", "beta"), *words]
        statistics = self.written() if moves else self.given("running_mean", "running_var")
        if batch and not moves:
            statistics = [one._replace(status=max(one.status, UNKNOWN)) if one.status else one for one in statistics]
        given += [*statistics, *self.halves()]
        given += self.beside(*given)
        before = {name: self.wide(name) for name in ARRAYS}
        seen = bn.num_batches_tracked

        def right(y: Any) -> Iterator[Wrong | None]:
            truth = Truth(x.wide, self.axis, self.number("eps", 1e-5), None, before["gamma"], before["beta"])
            yield result_is(y, x.value, to.value)
            kept = () if batch else (before["running_mean"], before["running_var"])
            yield truth.y(self.judged(x), y, *kept)
            yield from self._moved(truth, before, seen, bool(moves))

        written = [to.value, *((bn.running_mean, bn.running_var) if moves else ())]
        done = self.judge.call("BatchNorm.forward", given, lambda: bn(x.value, to.value), right, written)
        self.learn()
        self.saved = None
        clean = np.isfinite(np.asarray(x.wide if x.wide is not None else np.nan)).all()
        if done is not None and clean and max(one.status for one in given) in (RIGHT, ODD) and x.value is not to.value:
            like = isinstance(x.value, np.ndarray) and x.value.dtype.newbyteorder("=") == self.dtype
            if like and not to.kind.startswith(("over", "x itself")):
                self.saved = x, batch, training, before, self.number("eps", 1e-5)

    def _moved(self, truth: Truth, before: dict[str, Any], seen: Any, moves: bool) -> Iterator[Wrong | None]:
        """The running statistics after a forward."""
        bn, (count, mean, var) = self.bn, truth.batch
        moves = moves and count > 0
        counted = seen + 1 if moves else seen
        # the same NaN, or list, is right
        if counted is not bn.num_batches_tracked and not counted == bn.num_batches_tracked:
            yield Wrong("num_batches_tracked is wrong", f"{bn.num_batches_tracked!r} after {seen!r}")
        momentum = self.number("momentum", 0.1)
        weight = 0.0 if not moves else 1.0 / counted if momentum is None else momentum
        if moves and self.flag("unbiased_running_var"):
            var = var * count / max(1, count - 1)
        for name, new in (("running_mean", mean), ("running_var", var)):
            old = before[name]
            if old is None:
                continue
            want = (1.0 - weight) * old + weight * new if moves else old
            scale = np.abs(old) + np.abs(new) + np.sqrt(np.abs(truth.batch.var))
            got = np.asarray(getattr(bn, name))
            bad = near("mean", self.kind, got, want, scale, coarse=got.dtype.itemsize < 8)
            yield bad and bad._replace(outcome=bad.outcome.replace("mean", name, 1))

    def backward(self) -> None:
        """Of the last forward, where that was right."""
        bn, saved, shape = self.bn, self.saved, self.shape
        if saved is None:
            return
        x, batch, training, before, eps = saved
        odd = self.rng.choice(("", "", "dy", "out"))
        dy = data(self.make, "dy", draw(self.rng, shape), self.dtype, self.axis, odd == "dy", like=x)
        to = out(self.make, x, self.axis, odd == "out", [dy], ("dy",))

        def right(dx: Any) -> Iterator[Wrong | None]:
            truth = Truth(x.wide, self.axis, eps, dy.wide, before["gamma"])
            kept = () if batch else (before["running_mean"], before["running_var"])
            yield result_is(dx, x.value, to.value)
            yield from truth.gradients(self.judged(x), dx, bn.dgamma, bn.dbeta, *kept)

        given = [dy, to, *self.usable("backend", "num_threads"), *self.halves()]
        if not training:  # of a forward in evaluation, which need not have kept x
            given.append(Given("backward", None, kind="in evaluation", status=ODD))
        given += self.beside(*given)
        self.judge.call("BatchNorm.backward", given, lambda: bn.backward(dy.value, to.value), right, [to.value])
        self.saved = None

    def state_dict(self) -> None:
        """All that the layer holds, as copies."""

        def right(state: Any) -> Iterator[Wrong | None]:
            for name, key in KEYS.items():
                want = self.wide(name)
                if want is None or (key.startswith("running") and not self.tracked):
                    continue
                got = np.asarray(state[key])
                if not np.array_equal(got.astype(np.float64), want, equal_nan=True):
                    yield Wrong(f"{key} is wrong", f"{got} want {want}")
                if got is getattr(self.bn, name):
                    yield Wrong(f"{key} is no copy")

        self.judge.call("BatchNorm.state_dict", [*self.beside(), *self.halves()], self.bn.state_dict, right)

    def load_state_dict(self) -> None:
        """A state, of which a part may be of any kind."""
        bn, rng = self.bn, self.rng
        try:
            own = bn.state_dict()
        except Exception:
            return
        state: Any = {}
        for key, value in own.items():
            state[key] = (
                draw(rng, value.shape, 1.0, 0.25).astype(self.kind) if value.shape else np.array(rng.randrange(9))
            )
        odd = rng.choice(("", "", "value", "value", "value", "key", "state"))
        one = Given("state_dict", state)
        vectors = [key for key in state if state[key].ndim]
        if odd == "value" and vectors:
            key = rng.choice(vectors)
            part = vector(
                self.make, key, state[key].astype(np.float64), self.kind, True, tuple(MEANING), optional=False
            )
            state[key] = part.value
            soft = (
                RIGHT
                if part.kind in ("strided", "reversed", "read-only", "mapped", "list", "own memory", "other float")
                else ODD
            )
            one = Given(
                "state_dict",
                state,
                part.wide,
                f"{key} {part.kind}",
                WRONG if part.wide is None else soft,
                (key, "state_dict"),
            )
        elif odd == "value" and "num_batches_tracked" in state:
            value = rng.choice((np.inf, np.nan, -1, 0.5, HUGE, *JUNK))
            state["num_batches_tracked"] = value
            one = Given(
                "state_dict", state, None, f"num_batches_tracked {label(value)}", WRONG, ("num_batches_tracked",)
            )
        elif odd == "key" and state:
            key = rng.choice(list(state))
            value = state.pop(key)
            if rng.random() < 0.5 or key == "num_batches_tracked":
                state[rng.choice(("bn." + key, 5, None, "x"))] = value
            one = Given(
                "state_dict", state, None, f"other keys than {key}", WRONG, ("state_dict", "missing", "running")
            )
        elif odd == "state":
            # of an empty layer, {} is right
            value = rng.choice([junk for junk in JUNK if type(junk) is not dict or junk or own])
            one = Given("state", value, None, label(value), WRONG, ("state_dict",))
        layer = [*(kept._replace(status=UNKNOWN) for kept in self.beside()), *self.halves()]
        wanted = (
            {
                key: np.asarray(state[key], np.float64)
                for key in vectors
                if key in state and not (one.kind and key in one.says)
            }
            if state
            else {}
        )
        if one.wide is not None and one.kind:
            wanted[one.says[0]] = one.wide

        def run() -> bool:
            bn.load_state_dict(one.value)
            return True

        def right(_: Any) -> Iterator[Wrong | None]:
            for name, key in KEYS.items():
                if key in wanted and one.status in (RIGHT, ODD):
                    yield self._same(key, np.asarray(getattr(bn, name)), wanted[key])

        written = [getattr(bn, name) for name in ARRAYS]
        if (
            self.judge.call("BatchNorm.load_state_dict", [one, *layer], run, right, written)
            and "num_batches_tracked" in one.value
        ):
            self.is_.pop("num_batches_tracked", None)
        self.learn()

    @staticmethod
    def _same(key: str, got: np.ndarray, want: np.ndarray) -> Wrong | None:
        close = got.shape == want.shape and np.allclose(got.astype(np.float64), want, 1e-6, 0.0, equal_nan=True)
        return None if close else Wrong(f"{key} is wrong", f"{got}, want {want}")

    def folded(self) -> None:
        """folded_affine."""

        def right(found: Any) -> Iterator[Wrong | None]:
            scale = 1.0 / np.sqrt(self.wide("running_var") + self.number("eps", 1e-5))
            scale = scale if self.wide("gamma") is None else scale * self.wide("gamma")
            shift = -self.wide("running_mean") * scale + (0.0 if self.wide("beta") is None else self.wide("beta"))
            yield near("y", np.float64, found[0], scale, np.abs(scale))
            yield near("y", np.float64, found[1], shift, np.abs(shift) + np.abs(scale))

        given = [*(one._replace(status=UNKNOWN) for one in self.beside()), *self.halves(WRONG)]
        self.judge.call("BatchNorm.folded_affine", given, self.bn.folded_affine, right)

    def recalibrate(self) -> None:
        """Batches, of which one may be odd, or what holds none."""
        rng, bn = self.rng, self.bn
        odd = rng.random() < 0.5
        batches = [
            data(self.make, "batches", values(self.make, self.shape), self.dtype, self.axis, False) for _ in range(2)
        ]
        if odd and rng.random() < 0.7:
            batches[1] = data(self.make, "batches", values(self.make, self.shape), self.dtype, self.axis, True)
        elif odd:
            value = rng.choice(JUNK)
            batches = [Given("batches", value, None, label(value), WRONG)]
        whole = [one.value for one in batches] if len(batches) == 2 else batches[0].value
        given = [one._replace(says=("x", "recalibrate", "num_features")) for one in batches]
        given += self.written()
        given += [
            one._replace(status=UNKNOWN)
            for one in self.usable("axis", "backend", "num_threads", "unbiased_running_var")
        ]
        given += self.halves(WRONG)
        given += self.beside(*given)
        status = RIGHT
        if any(one.wide is not None and not np.isfinite(one.wide).all() for one in batches):
            status = UNKNOWN

        def right(_: Any) -> Iterator[Wrong | None]:
            truth = Truth(np.concatenate([one.wide for one in batches], 0 if self.axis else 1), self.axis)
            count, mean, var = truth.batch
            var = var * count / (count - 1) if self.flag("unbiased_running_var") else var
            if bn.num_batches_tracked != len(batches):
                yield Wrong("num_batches_tracked is wrong", f"{bn.num_batches_tracked!r}, want {len(batches)}")
            for name, want in (("running_mean", mean), ("running_var", var)):
                bad = near(
                    "mean",
                    self.kind,
                    np.asarray(getattr(bn, name)),
                    want,
                    np.abs(want) + np.sqrt(truth.batch.var),
                    1e-6,
                )
                yield bad and bad._replace(outcome=bad.outcome.replace("mean", name, 1))

        written = [bn.running_mean, bn.running_var]
        self.judge.call(
            "BatchNorm.recalibrate", given, lambda: bn.recalibrate(whole, progress=False), right, written, status
        )
        self.learn()

    def copied(self) -> None:
        """The layer goes on as a copy of itself."""
        way = self.rng.choice((copy.deepcopy, copy.copy, lambda bn: pickle.loads(pickle.dumps(bn))))
        given = [*(one._replace(status=UNKNOWN) for one in self.beside()), *self.halves()]
        kept = self.judge.call(
            "BatchNorm, copied", given, lambda: way(self.bn), allowed=(*DOCUMENTED, pickle.PicklingError), own=False
        )
        if kept is not None:
            self.bn = kept
            self.saved = None
            self.learn()

    def other(self) -> None:
        """What sets it back, moves it, shows it."""
        bn, rng = self.bn, self.rng
        device = rng.choice(("cpu", "cpu", "cuda", "cpu:1", 5, None, [], object()))
        runs: dict[str, Callable[[], Any]] = {
            "reset_running_stats": bn.reset_running_stats,
            "reset_parameters": bn.reset_parameters,
            "to": lambda: bn.to(device),
            "repr": lambda: repr(bn),
            "eval": bn.eval,
            "train": bn.train,
        }
        name = rng.choice(list(runs))
        given = [*(one._replace(status=UNKNOWN) for one in self.beside()), *self.halves()]
        nothing = all(getattr(bn, array) is None for array in (*ARRAYS, "dgamma", "dbeta"))
        # where nothing is to move, as PyTorch has it
        if name == "to" and device != "cpu" and not (nothing and device == "cuda"):
            given.append(Given("device", device, None, label(device), WRONG, ("cuda", "backend", "CUDA")))
        if name in ("eval", "train"):
            self.is_.pop("training", None)
        written = [getattr(bn, array) for array in ARRAYS]
        done = self.judge.call(f"BatchNorm.{name}", given, lambda: (runs[name](), 1), lambda _: (), written)
        if done and name.startswith("reset"):
            self.is_.pop("num_batches_tracked", None)
        if name == "to":
            self.saved = None
        self.learn()


STEPS: dict[Callable[[Any], None], int] = {
    Model.assign: 12, Model.scalar: 4, Layer.forward: 14, Layer.backward: 8, Layer.state_dict: 2,
    Layer.load_state_dict: 5,
    Layer.folded: 2, Layer.recalibrate: 3, Layer.copied: 1, Layer.other: 3,
}  # fmt: skip
_steps, _weights = list(STEPS), list(STEPS.values())


def layer(judge: Judge, make: Maker) -> None:
    """A layer from its construction on."""
    rng = make.rng
    shape = rng.choice(SHAPES)
    axis = 1 if rng.random() < 0.7 else rng.randrange(len(shape))
    if np.prod(shape) // shape[axis] < 2:
        return
    dtype = dtype_of(make, judge.dtypes)
    bn, words = constructed(judge, make, shape[axis], axis, dtype)
    if bn is None:
        return
    one = Layer(judge, make, bn, dtype, shape, axis, words)
    for _ in range(rng.choice((2, 3, 4, 6))):
        rng.choices(_steps, _weights)[0](one)


CALLS = {layer: 40}
