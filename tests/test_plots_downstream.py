"""Pictures of lesson 07: the areas drawn are the numbers named, and gaps by chance are what an exchange of names gives."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as reference

from compdiff import fairness, plots_downstream, scores, stats


def made_up(n=120, seed=0):
    """Labels and scores with ties."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(int)
    return y, np.round(np.clip(0.3 * y + 0.6 * rng.random(n), 0, 1), 2)


def test_curves_are_those_of_scikit_learn_with_weights_too():
    y, p = made_up()
    for counts in (None, np.where(y == 1, 1, 10), np.random.default_rng(1).integers(1, 4, len(y))[None]):
        found = plots_downstream.curves(y, p, counts)
        weight = None if counts is None else np.ravel(counts)
        fpr, recall, cuts = reference.roc_curve(y, p, sample_weight=weight, drop_intermediate=False)
        assert np.allclose(found[["fpr", "recall", "cut"]], np.c_[fpr, recall, cuts][1:])  # theirs starts at (0, 0)
        precision, _, cuts = reference.precision_recall_curve(y, p, sample_weight=weight)
        assert np.allclose(found["precision"][::-1], precision[:-1]) and np.allclose(found["cut"][::-1], cuts)
        for cut, f1 in found[["cut", "f1"]].to_numpy()[::7]:
            assert f1 == pytest.approx(reference.f1_score(y, p >= cut, sample_weight=weight))


@pytest.mark.parametrize("label", (0, 1))
def test_curves_of_one_class_are_refused(label):
    with pytest.raises(ValueError, match="with and without the label"):
        plots_downstream.curves(np.full(5, label), np.linspace(0, 1, 5))


def test_areas_below_the_lines_are_the_numbers_beside_them_and_only_precision_sees_the_prevalence():
    y, p = made_up()
    many = np.where(y == 1, 1, 10)[None]
    cases = {"as it is": (p, None), "10x": (p, many), "^ 5": (p**5, None)}
    fig = plots_downstream.ranking(y, cases, "x")
    roc, pr = fig.axes[:2]
    slanted, steps = ({t.get_label().split(":")[0]: t for t in ax.lines if ": AU" in str(t.get_label())} for ax in (roc, pr))
    assert set(slanted) == set(steps) == set(cases)
    for name, (q, counts) in cases.items():
        x, up = slanted[name].get_data()
        assert np.trapezoid(up, x) == pytest.approx(stats.auroc(y, q, counts)[0])
        x, up = steps[name].get_data()
        assert steps[name].get_drawstyle() == "steps-pre"
        assert (np.diff(x) * up[1:]).sum() == pytest.approx(stats.auprc(y, q, counts)[0])
    for line, same in ((slanted, ("10x", "^ 5")), (steps, ("^ 5",))):
        for name in same:
            assert np.allclose(line["as it is"].get_data(), line[name].get_data())
    few, rare = (steps[name].get_ydata() for name in ("as it is", "10x"))
    assert (rare[few < 1] < few[few < 1]).all() and (few < 1).any(), "one healthy among those called now counts ten times"
    best = {ax.get_title().split("\n")[0]: ax.lines[1].get_xdata()[0] for ax in fig.axes[2:]}
    assert best["as it is"] == scores.f1_threshold(y, p) and best["^ 5"] == pytest.approx(best["as it is"] ** 5)
    assert best["10x"] == scores.f1_threshold(np.repeat(y, many[0]), np.repeat(p, many[0]))


def test_a_threshold_that_calls_nobody_has_f1_0_and_a_fourth_case_is_refused():
    y, p = made_up()
    fig = plots_downstream.ranking(y, {"low": (p / 3, None)}, "x")
    assert "F1: 0.00 at 0.5" in fig.axes[2].get_title()
    with pytest.raises(ValueError, match="at most 3"):
        plots_downstream.ranking(y, {str(k): (p, None) for k in range(4)}, "x")


def test_the_observed_gap_is_that_of_the_eligible_groups_and_an_exchange_keeps_their_numbers(monkeypatch):
    y, p = made_up(300)
    group = np.array(["a", "b", "c", "d"])[np.random.default_rng(3).choice(4, 300, p=[0.5, 0.28, 0.2, 0.02])]
    names, gap, drawn = plots_downstream.chance_gaps(y, p, group, 50, 0)
    by_hand = [reference.roc_auc_score(y[group == g], p[group == g]) for g in "abc"]
    assert names == ["a", "b", "c"] and fairness.auroc_note(y[group == "d"]), "d is too small"
    assert gap == pytest.approx(max(by_hand) - min(by_hand)) and drawn.shape == (50,) and (drawn >= 0).all()
    rows = []
    monkeypatch.setattr(stats, "auroc", lambda y, p, counts: rows.append((y, counts)) or counts[:, 0])
    plots_downstream.chance_gaps(y, p, group, 20, 0)
    for (labels, counts), g in zip(rows, "abc", strict=True):
        assert (counts[:, labels == 1].sum(1) == (y[group == g] == 1).sum()).all()
        assert (counts[:, labels == 0].sum(1) == (y[group == g] == 0).sum()).all()
        assert len(np.unique(counts, axis=0)) > 15, "the names were not exchanged"


def test_names_without_meaning_give_even_p_values_and_a_planted_gap_a_small_one(monkeypatch):
    monkeypatch.setattr(fairness, "auroc_note", lambda y: "")  # few rows, so that all exchanges can be counted
    y, p, group = np.array([1, 1, 1, 0, 0, 0]), np.array([0.9, 0.4, 0.2, 0.3, 0.7, 0.1]), np.array(list("aabbab"))
    every = []
    for ill, healthy in itertools.product(itertools.permutations(group[:3]), itertools.permutations(group[3:])):
        g = np.array([*ill, *healthy])
        every.append(abs(np.subtract(*(reference.roc_auc_score(y[g == k], p[g == k]) for k in "ab"))))
    _, gap, drawn = plots_downstream.chance_gaps(y, p, group, 4000, 1)
    assert {round(x, 9) for x in drawn} == {round(x, 9) for x in every}
    assert (drawn >= gap - 1e-9).mean() == pytest.approx(np.mean(np.array(every) >= gap - 1e-9), abs=0.03)  # 4 se
    y, p = made_up(400)
    group = np.where(np.random.default_rng(2).random(400) < 0.5, "a", "b")
    p = np.where(group == "a", p, np.random.default_rng(3).random(400))  # a guess for b
    _, gap, drawn = plots_downstream.chance_gaps(y, p, group, 200, 0)
    assert gap > drawn.max()


def test_no_gap_without_two_eligible_groups_and_the_picture_says_so():
    y, p = made_up(40)
    assert plots_downstream.chance_gaps(y, p, np.arange(40).astype(str), 5, 0) is None
    (axis,) = plots_downstream.gaps_by_chance({}, "x").axes
    assert "no attribute has two eligible groups" in axis.texts[0].get_text()


def test_the_line_is_the_observed_gap_and_the_bars_hold_every_exchange():
    drawn = np.linspace(0.01, 0.1, 99)
    fig = plots_downstream.gaps_by_chance({"sex": (["f", "m"], 0.095, drawn), "age": (["x", "y", "z"], 0.2, drawn)}, "AUROC")
    for ax, gap, p in zip(fig.axes, (0.095, 0.2), ((1 + (drawn >= 0.095).sum()) / 100, 0.01), strict=False):
        assert ax.lines[0].get_xdata()[0] == gap and sum(b.get_height() for b in ax.patches) == 99
        assert f"p = {p:.2g}" in ax.get_title()
