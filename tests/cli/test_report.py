"""What the `train` command shows of two histories: table, closing lines, plot."""

from pathlib import Path

import numpy as np
import pytest

from fastbn.cli import plots, train
from fastbn.cli.train import network as nets
from fastbn.cli.train import report, training

from .test_training import toy


def histories(ours: list[int], twin: list[int], steps: int = 100, diverged: int | None = None) -> report.Histories:
    """Of a network and its twin, which diverged or not, by how many of 450 images each had right at even checks."""
    checked = training.checked_steps(steps, len(ours) - 1)
    return {
        True: training.History(450, checked, ours, 1.26),
        False: training.History(450, checked[: len(twin)], twin, 0.5, diverged),
    }


CHANCE = 46 / 450
SOON = "reached 97.8 % (99 % of the better) after 200 steps, 98.7 % at the end"
DIVERGED = "diverged at step 240 (the loss is no longer a number; try a smaller --lr or --init)"


@pytest.mark.parametrize(
    ("ours", "twin", "diverged", "want"),
    [
        ([45, 441, 444], [45, 46, 46], None, [SOON, "on a plateau, still near chance (10.2 %), 10.2 % at the end"]),
        ([45, 441, 444], [45, 50, 60], None, [SOON, "still near chance (10.2 %), 13.3 % at the end"]),
        ([45, 300, 410], [45, 430, 444], None,
         ["slower, 88.9 % (90 % of the better) after 400 steps, 91.1 % at the end", SOON.replace("200", "400")]),
        ([45, 444, 444], [45, 444, 444], None, [SOON, SOON]),
        ([45, 441, 444], [45, 100, 200], None, [SOON, "slower, 44.4 % at the end"]),
        ([45, 441, 444], [45, 200, 202], None,
         [SOON, "on a plateau over the last half of the steps, 44.9 % at the end"]),
        ([45, 441, 444], [45, 300, 60], None,
         [SOON, "rose to 66.7 % and fell back, 13.3 % at the end (try a smaller --lr)"]),
        ([45, 441, 444], [45, 441, 130], None,
         [SOON, "rose to 98.0 % and fell back, 28.9 % at the end (try a smaller --lr)"]),
        ([45, 441, 441, 441, 444], [45, 290, 300, 240, 290], None,
         [SOON.replace("200", "100"), "unsteady, 64.4 % at the end (try a smaller --lr)"]),
        ([45, 441, 444], [45, 400], 240, [SOON, DIVERGED]),
    ],
    ids=["plateau at chance", "near chance", "the twin is better", "both", "slower", "plateau", "fell to chance",
         "reached and fell", "unsteady", "diverged"],
)  # fmt: skip
def test_the_closing_lines_say_what_each_network_did(
    ours: list[int], twin: list[int], diverged: int | None, want: list[str]
) -> None:
    found = report.summary(histories(ours, twin, 400, diverged), CHANCE)
    assert found == [f"With batch normalization: {want[0]}.", f"Without: {want[1]}."]


def test_what_is_near_depends_on_chance() -> None:
    """Where a class is 97 % of all, more than that is learned."""
    given = histories([436, 450, 450], [436, 436, 436], 400)
    assert report.summary(given, 436 / 450) == [
        "With batch normalization: reached 99.1 % (99 % of the better) after 200 steps, 100.0 % at the end.",
        "Without: on a plateau, still near chance (96.9 %), 96.9 % at the end.",
    ]


def test_where_nothing_was_learned_nothing_was_reached() -> None:
    given = histories([45, 41], [41, 45], 1)
    rows = report.rows(given, 1, CHANCE)
    assert not [row for row in rows if row[0].startswith(("steps needed", "  for"))]
    assert all("still near chance" in line for line in report.summary(given, CHANCE))


def test_after_a_few_steps_nothing_is_a_plateau() -> None:
    assert "plateau" not in " ".join(report.summary(histories([45] * 42, [200] * 42, 41), CHANCE))


def test_one_step_is_one() -> None:
    given = histories([45, 300], [45, 400], 1)
    assert report.summary(given, CHANCE)[1].startswith("Without: reached 88.0 % (99 % of the better) after 1 step, ")
    rows = report.rows(given, 1, CHANCE)
    assert [row[0].strip() for row in rows[:3]] == ["test accuracy after step", "0", "1"]
    assert ("steps needed, checked 1 time", "", "") in rows


def test_a_rate_far_too_high_is_said_not_warned_of() -> None:
    inputs, network = training.Inputs(toy()), nets.Network(nets.initial_weights((4, 12, 3), 0.03, 0), "relu", None)
    history = training.train(network, training.Optimizer(), 1e30, inputs, training.batches(60, 20, 40, 0), 40)
    (said,) = report.summary({False: history}, 1 / 3)
    assert said.startswith(f"Without: diverged at step {history.diverged} ")
    assert train._answer(network, inputs.test[:1]) == "diverged"


def test_table_rows() -> None:
    rows = report.rows(histories([45] + [441] * 40, [45] * 40 + [400], 2000), 2000, CHANCE)
    assert [row[0].strip() for row in rows[1:14]] == [f"{n:,}" for n in (0, 50, 100, *range(200, 2001, 200))]
    assert rows[2] == ("  50", "98.0 %", "10.0 %")
    assert rows[-7:] == [
        ("", "", ""),
        ("steps needed, checked 40 times", "", ""),
        ("  for 88.2 % (90 % of the better)", "50", "2,000"),
        ("  for 93.1 % (95 % of the better)", "50", "not within 2,000"),
        ("  for 97.1 % (99 % of the better)", "50", "not within 2,000"),
        ("", "", ""),
        ("processor seconds, checks apart", "1.3", "0.5"),
    ]


def test_a_network_that_diverged_has_one_row_that_says_so() -> None:
    rows = report.rows(histories([45] + [441] * 40, [45, 420], 2000, 60), 2000, CHANCE)
    assert rows[2:4] == [("  50", "98.0 %", "93.3 %"), ("  100", "98.0 %", "-")]
    assert [row for row in rows if "diverged" in " ".join(row)] == [("diverged at step", "-", "60")]
    assert [row[1:] for row in rows if row[0].startswith("  for")] == [("50", "50"), ("50", "50"), ("50", "-")]
    both = {norm: training.History(450, [0], [45], 0.0, 7) for norm in (True, False)}
    assert ("diverged at step", "7", "7") in report.rows(both, 2000, CHANCE)
    assert not [row for row in report.rows(both, 2000, CHANCE) if row[0].startswith("steps needed")]


def test_the_plot_shows_both_curves_and_says_what_they_are() -> None:
    (axes,) = report.figure(histories([45, 450], [45, 90], 10), "data\nnetwork", 10, CHANCE).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training steps", "test accuracy (%)")
    assert axes.get_figure().get_suptitle() == "data\nnetwork"
    ours, twin, _ = axes.get_lines()
    np.testing.assert_allclose(ours.get_xydata(), [[0, 10], [10, 100]])
    np.testing.assert_allclose(twin.get_xydata(), [[0, 10], [10, 20]])
    for look in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(ours, look)() != getattr(twin, look)()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["with batch normalization", "without", "chance"]


def test_the_axis_fits_the_data() -> None:
    """And chance is drawn where it lies in sight."""
    (axes,) = report.figure(histories([400, 440], [410, 430], 10), "data", 10, CHANCE).axes
    low, high = axes.get_ylim()
    assert 85 < low < 100 * 400 / 450 and 100 * 440 / 450 < high < 102
    assert len(axes.get_lines()) == 2
    (axes,) = report.figure(histories([45, 45], [45, 45], 1), "data", 1, CHANCE).axes
    assert axes.get_ylim() == (9, 11)


def test_a_network_that_diverged_ends_in_a_cross() -> None:
    (axes,) = report.figure(histories([45, 440, 445], [45, 90], 100, 60), "data", 100, CHANCE).axes
    _, twin, cross, _ = axes.get_lines()
    np.testing.assert_allclose(twin.get_xydata(), [[0, 10], [50, 20]])
    np.testing.assert_allclose(cross.get_xydata(), [[60, 20]])
    assert (cross.get_marker(), cross.get_color()) == ("X", twin.get_color())
    assert "without: diverged at step 60" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("name", ["\udcff", "a $x_{$", "\u6570\u5b57", "two\nlines"])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_plot_takes_any_name_of_a_directory(name: str, kind: str, tmp_path: Path) -> None:
    """No text, no formula, no letters that its font has: the training is over when it is drawn, and warnings may be
    errors.
    """
    with (tmp_path / "p").open("wb") as file:
        plots.save(report.figure(histories([45, 450], [45, 90], 10), name, 10, CHANCE), file, kind)
    assert (tmp_path / "p").stat().st_size > 1000
