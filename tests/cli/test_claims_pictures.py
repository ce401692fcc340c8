"""The pictures of the `claims` command: what is drawn is what was found, on its own side."""

from typing import Any

import numpy as np
import pytest

from fastbn.cli import plots
from fastbn.cli.claims import CLAIMS, sweeps
from fastbn.cli.claims.runs import Plan, Result, Run

from .test_claims_experiments import swept
from .test_claims_noise import gaps

PLAN = Plan(20, 0, 60_000, 24, 33.0)


def drawn(name: str, results: dict[Run, Result]) -> Any:
    """The axes of a claim's picture."""
    figure = plots.figure("title", (10, 5))
    CLAIMS[name].draw(figure, PLAN, results)
    return figure.axes


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_a_sweep_draws_both_sides_what_is_usable_and_what_diverged() -> None:
    ours, twin = [80.0, 90.0, 90.0, 50.0, None], [85.5, 60.0, None, None, None]
    axes = drawn("depth", swept(sweeps.DEPTH, ours, twin))
    assert len(axes) == 3 and [a.get_title() for a in axes] == [s.name for s in sweeps.DEPTH.settings]
    found = lines(axes[0])
    for norm, values in ((True, ours), (False, twin)):
        name = plots.NAMES[norm]
        np.testing.assert_array_equal(found[name].get_ydata(), [np.nan if v is None else v for v in values])
        np.testing.assert_array_equal(found[name].get_xdata(), sweeps.DEPTH.values)
        assert found[name].get_color() == plots.STYLES[norm]["color"]
        crosses = found[f"{name}: diverged, no accuracy"]
        gone = [x for x, v in zip(sweeps.DEPTH.values, values, strict=True) if v is None]
        np.testing.assert_array_equal(crosses.get_xdata(), gone)
        assert not np.any(crosses.get_ydata()) and crosses.get_linestyle() == "None"
    assert found[plots.NAMES[True]].get_marker() != found[plots.NAMES[False]].get_marker()
    assert list(found["5 points below the best"].get_ydata()) == [85, 85]
    assert list(found["chance"].get_ydata()) == [33, 33]
    hollow = [line for line in axes[0].get_lines() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[80, 50], [60]]
    shades = {shade.get_label(): shade.get_datalim(axes[0].transData) for shade in axes[0].collections}
    assert len(shades) == 2 and all(box.y0 == 85 for box in shades.values())
    assert [box.y1 for box in shades.values()] == [90, 85.5]
    legend = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert len(legend) == len(set(legend)) == 8


def test_the_claim_of_speed_shows_the_early_accuracies_too() -> None:
    axes = drawn("rate", swept(sweeps.RATE, [90.0] * 9, [10.0] * 9))
    assert (
        len(axes) == 6 and axes[0].get_ylabel().endswith("after 20 steps") and axes[3].get_ylabel().endswith("2 steps")
    )
    np.testing.assert_array_equal(lines(axes[0])[plots.NAMES[True]].get_ydata(), [90] * 9)
    np.testing.assert_array_equal(lines(axes[3])[plots.NAMES[False]].get_ydata(), [5] * 9)


@pytest.mark.parametrize("value", [None, 0.0, 100.0])
def test_a_sweep_of_runs_that_are_all_alike_is_drawn(value: float | None) -> None:
    assert len(drawn("init", swept(sweeps.INIT, [value] * 9, [value] * 9))) == 2


def test_shift_draws_each_side_in_its_column_on_one_scale() -> None:
    claim = CLAIMS["shift"]
    numbers = {"move": 1.0, "ratio": 1.0, "span": 1.0}

    def side(by: float) -> Result:
        layer = {"all": numbers, "afterwards": numbers, "unit": 7, "band": [[-by, -by], [0, by / 2], [by, by]]}
        return {"accuracy": 80.0, "diverged": None, "steps": [0, 20], "layers": [layer] * 3}

    axes = drawn("shift", dict(zip(claim.runs(PLAN), (side(2.0), side(9.0)), strict=True)))
    assert len(axes) == 6 and len({a.get_ylim() for a in axes}) == 1
    for i, a in enumerate(axes):
        norm, by = i % 2 == 0, 9.0 if i % 2 else 2.0
        np.testing.assert_array_equal(lines(a)["median"].get_ydata(), [0, by / 2])
        box = a.collections[0].get_datalim(a.transData)
        assert (box.y0, box.y1) == (-by, by)
        assert a.get_title() == f"hidden layer {i // 2 + 1}, unit 7, {plots.NAMES[norm]}"


def test_noise_draws_its_slope_and_the_gaps() -> None:
    left, right = drawn("noise", gaps([1, 2, 3], [4, 5, 6.1], [7, 8, 9]) | {})
    half = lines(left)["slope -1/2"]
    np.testing.assert_allclose(np.diff(np.log(half.get_ydata())) / np.diff(np.log(half.get_xdata())), -0.5)
    first = lines(left)["hidden layer 1, slope -0.50"]
    np.testing.assert_allclose(first.get_ydata(), [4**-0.5, 8**-0.5, 16**-0.5])
    assert (left.get_xscale(), left.get_yscale(), right.get_xscale()) == ("log", "log", "log")
    (bars,) = right.containers
    np.testing.assert_allclose(bars.lines[0].get_xydata(), [[8, 2], [32, 3.5], [128, 3.5], [512, 15.1 / 3]])
    assert list(lines(right)[plots.NAMES[False]].get_ydata()) == [8, 8]


def test_serving_draws_both_estimates_and_the_batches() -> None:
    claim = CLAIMS["test"]
    result = {
        "compared": [{"step": 5, "running": 10.0, "whole": 40.0}, {"step": 20, "running": 70.0, "whole": 80.0}],
        "own": [[2, 30.0], [8, 75.0]],
    }
    left, right = drawn("test", {claim.runs(PLAN)[0]: result})
    found = lines(left)
    np.testing.assert_array_equal(found["running averages"].get_xydata(), [[5, 10], [20, 70]])
    np.testing.assert_array_equal(found["whole training set"].get_xydata(), [[5, 40], [20, 80]])
    found = lines(right)
    np.testing.assert_array_equal(found["the batch's own"].get_xydata(), [[2, 30], [8, 75]])
    assert list(found["running averages"].get_ydata()) == [70, 70]


def test_a_users_settings_do_not_matter() -> None:
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}), plots.defaults():
        assert not matplotlib.rcParams["text.usetex"]
