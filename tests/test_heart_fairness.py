"""Rates counted by hand and by scikit-learn, criteria by fairlearn, paired changes whose truth is known."""

import fairlearn.metrics as fairlearn
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta
from sklearn import metrics as sk

from compdiff import cardiac, heart_fairness, stats
from compdiff.heart_fairness import MAIN, OVERALL


def drawn(n=160, repeats=3, seed=0):
    """Labels, probabilities of repeats that err more on women, and the masks of two groups."""
    rng = np.random.default_rng(seed)
    y, female = rng.integers(0, 2, n), rng.random(n) < 0.5
    p = np.stack([np.where(rng.random(n) < np.where(female, 0.35, 0.1), 1 - y, y) for _ in range(repeats)]) * 0.8 + 0.1
    return y, p, {OVERALL: np.ones(n, bool), ("sex", "Female"): female, ("sex", "Male"): ~female}


@given(st.integers(0, 50))
def test_rates_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    y, called = np.r_[0, 1, rng.integers(0, 2, 20)], rng.integers(0, 2, (2, 22)).astype(float)
    counts = np.vstack([np.ones(22), np.r_[1, 1, rng.integers(0, 4, 20)]])
    found = heart_fairness.rates(y, called, counts)
    for b, r in np.ndindex(2, 2):
        weights = {"sample_weight": counts[b]}
        tn, fp, fn, tp = sk.confusion_matrix(y, called[r], **weights).ravel()
        want = {
            MAIN: sk.balanced_accuracy_score(y, called[r], **weights), "accuracy": sk.accuracy_score(y, called[r], **weights),
            "F1": sk.f1_score(y, called[r], **weights), "FPR": fp / (fp + tn), "FNR": fn / (fn + tp), "TPR": tp / (tp + fn),
            "selection rate": (tp + fp) / counts[b].sum(),
        }  # fmt: skip
        assert {k: v[b, r] for k, v in found.items()} == pytest.approx(want)
        assert set(found) == set(heart_fairness.RATES)


def test_rows_hold_the_mean_the_spread_and_an_interval_that_covers_repeats_too():
    y, p, masks = drawn()
    judged = heart_fairness.judge(y, p, masks, 400, seed=0)
    rows = {(r["group"], r["metric"]): r for r in heart_fairness.rate_rows(judged, masks)}
    each = [sk.balanced_accuracy_score(y, q >= 0.5) for q in p]
    row = rows["", MAIN]
    assert row["value"] == pytest.approx(np.mean(each)) and row["std"] == pytest.approx(np.std(each, ddof=1))
    assert row["lo"] < row["value"] < row["hi"] and row["repeats"] == 3 and row["n"] == 160 and row["note"] == ""
    assert rows["Female", MAIN]["hi"] < rows["Male", MAIN]["lo"], "women were served worse"
    rng = np.random.default_rng(0)  # repeats that disagree widen the interval, patients alone do not show them
    many = np.stack([np.where(rng.random(160) < share, 1 - y, y) for share in (0.02, 0.45)]).astype(float)
    wide, narrow = (heart_fairness.judge(y, m, masks, 400, seed=0) for m in (many, many[:1]))
    widths = [np.ptp(np.quantile(j.mean(j.rates[OVERALL][MAIN])[1], [0.025, 0.975])) for j in (wide, narrow)]
    assert widths[0] > 2 * widths[1]


def test_criteria_are_fairlearns():
    y, p, masks = drawn(repeats=2)
    judged = heart_fairness.judge(y, p, masks, 100, seed=0)
    rows = {r["metric"]: r for r in heart_fairness.parity_rows(judged, masks)}
    sex = np.where(masks["sex", "Female"], "F", "M")
    for name in heart_fairness.CRITERIA:
        for how in heart_fairness.HOW:
            function = getattr(fairlearn, f"{name.replace(' ', '_')}_{how}")
            want = np.mean([function(y, q >= 0.5, sensitive_features=sex) for q in p])
            row = rows[f"{name} {how}"]
            assert row["value"] == pytest.approx(want) and row["note"] == "" and row["lo"] <= row["hi"]
            keys = [("sex", "Female"), ("sex", "Male")]
            own = heart_fairness.criterion(judged, keys, name, how)[0].mean()
            assert own == pytest.approx(want), "what is resampled is what fairlearn computes"


def test_small_groups_are_shown_and_marked():
    y = np.r_[np.ones(3, int), np.zeros(3, int), np.ones(12, int), np.zeros(25, int)]
    few = np.arange(43) < 6
    masks = {OVERALL: np.ones(43, bool), ("sex", "Female"): few, ("sex", "Male"): ~few}
    judged = heart_fairness.judge(y, y[None].astype(float), masks, 50, seed=0)
    rows = {r["group"]: r for r in heart_fairness.rate_rows(judged, masks) if r["metric"] == MAIN}
    assert rows["Female"]["note"].startswith("ineligible: 3 positives") and rows["Female"]["value"] == 1
    parity = heart_fairness.parity_rows(judged, masks)
    assert len(parity) == 6 and all(r["note"].startswith("ineligible") and np.isfinite(r["value"]) for r in parity)
    nobody = {OVERALL: masks[OVERALL], ("sex", "Female"): np.arange(43) < 3, ("sex", "Male"): np.arange(43) >= 3}
    judged = heart_fairness.judge(y, y[None].astype(float), nobody, 50, seed=0)
    rows = {r["metric"]: r for r in heart_fairness.rate_rows(judged, nobody) if r["group"] == "Female"}
    assert np.isnan(rows["FPR"]["value"]) and rows["FPR"]["note"].startswith("not available"), "no healthy woman"
    assert heart_fairness.parity_rows(judged, nobody)[0]["note"].startswith("not available")


def test_groups_and_intersections_of_a_study():
    studies = cardiac.phantom_studies(40, "test", seed=0, balanced=True)
    masks = heart_fairness.group_masks(studies, np.arange(5, 40))
    assert masks[OVERALL].sum() == 35 and {k[0] for k in masks} >= {"overall", "sex", "bmi", "age x sex", "sex x bmi"}
    women = (studies.table["sex"].iloc[5:] == "Female").to_numpy()
    assert np.array_equal(masks["sex", "Female"], women)
    assert np.array_equal(masks["sex x bmi", "Female obese"], women & (studies.table["bmi"].iloc[5:] == "obese"))


# --- did it help? -----------------------------------------------------------------------------------------------------
def test_a_true_improvement_of_one_group_is_found_and_named():
    y, p, masks = drawn(n=400)
    p = np.concatenate([p, p[:2]])
    better = np.where(masks["sex", "Female"], np.where(np.random.default_rng(5).random((5, 400)) < 0.1, 1 - y, y), p)
    before, after = (heart_fairness.judge(y, q, masks, 300, seed=0) for q in (p, better))
    rows = {(r["group_kind"], r["group"], r["metric"]): r for r in heart_fairness.changes(before, after, masks, ["sex"])}
    assert rows["sex", "Female", MAIN]["verdict"] == "helped" and rows["sex", "worst group", "worst group"]["verdict"] == "helped"
    assert rows["sex", "gap", "gap"]["note"] == "Male minus Female" and rows["sex", "gap", "gap"]["before"] > 0.2
    assert rows["sex", "gap", "gap"]["value"] < 0 and rows["sex", "gap", "gap"]["verdict"] == "helped"
    assert rows["sex", "Male", MAIN]["verdict"] == "undecided" and rows["sex", "Male", MAIN]["value"] == 0
    back = {(r["group_kind"], r["group"]): r for r in heart_fairness.changes(after, before, masks, ["sex"])}
    assert back["sex", "Female"]["verdict"] == "harmed" and back["sex", "gap"]["verdict"] == "harmed"


def test_nothing_changed_is_undecided_and_other_draws_are_refused():
    y, p, masks = drawn()
    judged = heart_fairness.judge(y, p, masks, 50, seed=0)
    assert {r["verdict"] for r in heart_fairness.changes(judged, judged, masks, ["sex"])} == {"undecided"}
    with pytest.raises(ValueError, match="same patients"):
        heart_fairness.changes(judged, heart_fairness.judge(y, p, masks, 50, seed=1), masks, ["sex"])


def alarmed(rng, y, shares, rows, repeats=5):
    """Decisions [repeats, n] that miss nobody and alarm a share of the well rows of each group, the same in each repeat."""
    wrong = (rng.random(len(y)) < np.select(rows, shares)) & (y == 0)
    return np.stack([np.where(wrong, 1, y)] * repeats).astype(float)


def test_equal_harm_to_all_groups_opens_no_gap_and_an_unequal_one_does():
    y, ages = np.tile([0, 1], 120), [np.arange(240) // 2 % 4 == k for k in range(4)]
    masks = {OVERALL: np.ones(240, bool)} | {("age", str(k)): m for k, m in enumerate(ages)}
    words = {"equal": [], "unequal": []}
    for seed in range(25):
        rng = np.random.default_rng(seed)
        before = heart_fairness.judge(y, alarmed(rng, y, [0.2] * 4, ages), masks, 200, seed)
        for name, shares in (("equal", [0.35] * 4), ("unequal", [0.2, 0.2, 0.2, 0.9])):
            after = heart_fairness.judge(y, alarmed(rng, y, shares, ages), masks, 200, seed)
            words[name] += [r["verdict"] for r in heart_fairness.changes(before, after, masks, ["age"]) if r["metric"] == "gap"]
    assert words["equal"].count("undecided") >= 20 and words["unequal"].count("harmed") >= 20


def test_above_the_ceiling_only_harm_is_seen_and_few_repeats_decide_nothing():
    y, p, masks = drawn(n=400)
    perfect = np.stack([y] * 5).astype(float)
    worse = np.concatenate([p, p[:2]])
    before, same, after = (heart_fairness.judge(y, q, masks, 100, seed=0) for q in (perfect, perfect, worse))
    assert {r["verdict"] for r in heart_fairness.changes(before, same, masks, ["sex"])} == {"saturated"}
    rows = {r["group"]: r for r in heart_fairness.changes(before, after, masks, ["sex"])}
    assert rows[""]["verdict"] == rows["worst group"]["verdict"] == "harmed" and rows["gap"]["verdict"] == "saturated"
    assert rows[""]["before"] == 1
    few = [heart_fairness.judge(y, q[:4], masks, 100, seed=0) for q in (worse, perfect)]
    for pair in (few, few[::-1]):
        found = heart_fairness.changes(*pair, masks, ["sex"])
        assert {(r["verdict"], r["repeats"]) for r in found} == {("undecided", 4)}


def test_rates_of_exactly_0_or_1_have_jeffreys_bounds():
    y = np.repeat([0, 1], (30, 20))
    rows = {r["metric"]: r for r in heart_fairness.rate_rows(heart_fairness.judge(y, y[None] * 1.0, {OVERALL: y >= 0}, 50, 0), {OVERALL: y >= 0})}
    assert (rows["TPR"]["lo"], rows["TPR"]["hi"]) == (pytest.approx(beta(20.5, 0.5).ppf(0.025)), 1)
    assert (rows["FPR"]["lo"], rows["FPR"]["hi"]) == (0, pytest.approx(beta(0.5, 30.5).ppf(0.975)))
    assert rows[MAIN]["lo"] == pytest.approx((rows["TPR"]["lo"] + 1 - rows["FPR"]["hi"]) / 2) and rows[MAIN]["hi"] == 1
    assert np.isnan(rows["F1"]["lo"]) and rows["F1"]["value"] == 1
    assert rows["selection rate"]["lo"] < 0.4 < rows["selection rate"]["hi"], "any other rate is resampled"


def test_thresholds_move_decisions_and_the_auroc_does_not_see_them():
    y = np.tile([0, 1], 40)
    p = np.stack([0.6 + 0.2 * y] * 2)
    at_half, at_val = (heart_fairness.judge(y, p, {OVERALL: y >= 0}, 20, 0, c) for c in (0.5, np.full(p.shape, 0.7)))
    assert at_half.rates[OVERALL][MAIN][0].mean() == 0.5 and at_val.rates[OVERALL][MAIN][0].mean() == 1
    row = heart_fairness.auroc_row(y, p)
    assert (row["metric"], row["value"], row["repeats"]) == ("AUROC", 1, 2)


@pytest.mark.parametrize(
    "lo, hi, higher, word",
    [(0.1, 0.2, True, "helped"), (-0.2, -0.1, True, "harmed"), (-0.1, 0.2, True, "undecided"),
     (-0.2, -0.1, False, "helped"), (0.1, 0.2, False, "harmed"), (np.nan, np.nan, True, "undecided")],
)  # fmt: skip
def test_verdicts(lo, hi, higher, word):
    assert heart_fairness.verdict(stats.Interval(0.0, lo, hi), higher) == word


def test_the_table_is_a_frame_without_empty_numbers():
    y, p, masks = drawn()
    judged = heart_fairness.judge(y, p[:1], masks, 20, seed=0)
    frame = pd.DataFrame(heart_fairness.rate_rows(judged, masks) + heart_fairness.parity_rows(judged, masks))
    assert (frame["value"].notna() | (frame["note"] != "")).all() and frame["std"].isna().all(), "one repeat has no spread"
