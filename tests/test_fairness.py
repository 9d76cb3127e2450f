"""Equity metrics on hand-worked numbers, by property, and against scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from compdiff import fairness, stats

SEX, RACE, AGE = np.array([0, 0, 1, 0, 1]), np.array([0, 1, 1, 0, 0]), np.array([0, 1, 1, 0, 1])
MASKS = {("overall", ""): np.ones(5, bool)}
MASKS |= {("sex", name): i == SEX for i, name in enumerate(["Male", "Female"])}
MASKS |= {("race", name): i == RACE for i, name in enumerate(["White", "Black", "Asian"])}
MASKS |= {("age", name): i == AGE for i, name in enumerate(["0-18", "80+"])}


def test_intersections_are_the_rows_of_all_their_groups_and_cover_every_row_once():
    found = fairness.intersections(MASKS, ["age", "sex", "race"])
    assert {k[0] for k in found} == {"age x sex", "age x race", "sex x race", "age x sex x race"}
    assert found["sex x race", "Male Black"].tolist() == [False, True, False, False, False]
    assert found["age x sex x race", "80+ Female Black"].tolist() == [False, False, True, False, False]
    assert ("sex x race", "Male Asian") not in found, "nobody is in it"
    for kind in {k[0] for k in found}:
        np.testing.assert_array_equal(sum(m.astype(int) for k, m in found.items() if k[0] == kind), 1)
    assert {k[0] for k in fairness.intersections(MASKS, ["sex", "race"], most=2)} == {"sex x race"}


def test_es_fid_and_es_metric_by_hand():
    # FID 80, groups 90 and 60: deviations 10 and 20. Mean: 80 (1 + 15/80) = 95; sum: 80 (1 + 30/80) = 110.
    assert fairness.es_fid(80, [90, 60]) == pytest.approx(95)
    assert fairness.es_fid(80, [90, 60], combine="sum") == pytest.approx(110)
    assert fairness.es_fid(0.0, [0.1, -0.1]) == pytest.approx(0.1)  # KID may be zero
    # AUROC 0.8, groups 0.9 and 0.65: 0.8 / (1 + 0.25) = 0.64
    assert fairness.es_metric(0.8, [0.9, 0.65]) == pytest.approx(0.64)
    assert fairness.es_metric(0.8, [0.9, 0.65], alpha=2) == pytest.approx(0.8 / 1.5)
    assert fairness.es_metric(0.8, [0.9, 0.65], combine="mean") == pytest.approx(0.8 / 1.125)


values = st.lists(st.floats(0.01, 500), min_size=1, max_size=8)


@given(overall=st.floats(0.01, 500), by_group=values, combine=st.sampled_from(["mean", "sum"]))
def test_unequal_groups_only_ever_cost(overall, by_group, combine):
    fid, metric = fairness.es_fid(overall, by_group, combine), fairness.es_metric(overall, by_group, combine=combine)
    assert fid >= overall and metric <= overall
    assert fid == pytest.approx(overall * (1 + getattr(np, combine)(np.abs(np.array(by_group) - overall)) / overall))
    assert fairness.es_fid(overall, by_group, "mean") <= fairness.es_fid(overall, by_group, "sum") * (1 + 1e-12)
    assert fairness.es_fid(overall, [overall]) == fairness.es_metric(overall, [overall]) == overall


def test_a_missing_group_is_an_error_not_a_nan():
    for groups in ([], [1.0, np.nan]):
        for function in (fairness.es_fid, fairness.es_metric, fairness.gaps):
            with pytest.raises(ValueError, match="finite values"):
                function(1.0, groups)
    with pytest.raises(ValueError, match="combine"):
        fairness.es_fid(1.0, [1.0], combine="median")


def test_gaps_by_hand():
    found = fairness.gaps(0.8, [0.7, 0.8, 0.9])
    assert found == pytest.approx(
        {"max-min": 0.2, "p90-p10": 0.16, "std/overall": np.sqrt(2 / 300) / 0.8, "max-min/overall": 0.25}
    )
    assert set(fairness.gaps(0.8, [0.7]).values()) == {0.0}


def test_underdiagnosis_counts_ill_patients_called_healthy():
    truth = np.array([0] * 24 + [1] * 6)
    called = np.array([1] * 3 + [0] * 21 + [1] * 6)
    rate = fairness.underdiagnosis(truth, called)
    assert (rate.negatives, rate.note) == (24, "")
    assert rate.interval.value == pytest.approx((3 + 0.5) / (24 + 1))
    assert (rate.interval.lo, rate.interval.hi) == pytest.approx(
        scipy_stats.beta(3.5, 21.5).ppf([0.025, 0.975]).tolist()
    )


def test_the_interval_of_underdiagnosis_counts_patients_not_their_images():
    """24 ill images of 8 patients, 6 called healthy: the value of 24 images, the interval of 2 hits in 8 trials."""
    truth, called = np.array([0] * 24 + [1] * 9), np.array([1, 0, 0, 0] * 6 + [1] * 9)
    one = fairness.underdiagnosis(truth, called)
    assert one == fairness.underdiagnosis(truth, called, patients=np.array([f"p{i}" for i in range(33)])), "bit-equal"
    assert one.interval == stats.jeffreys(6, 24) and one.patients == 24
    few = fairness.underdiagnosis(truth, called, patients=np.arange(33) // 3)  # the healthy are 3 others
    assert (few.negatives, few.patients, few.interval.value) == (24, 8, one.interval.value)
    ends = scipy_stats.beta(2.5, 6.5).ppf([0.025, 0.975]).tolist()
    assert [few.interval.lo, few.interval.hi] == pytest.approx(ends)
    assert few.interval.lo < one.interval.lo and one.interval.hi < few.interval.hi
    none = fairness.underdiagnosis(truth, np.zeros(33), patients=np.arange(33) // 3).interval
    assert none.hi == pytest.approx(scipy_stats.beta(0.5, 8.5).ppf(0.975)) and none.lo < none.value < none.hi


def test_small_groups_are_marked_and_keep_their_numbers():
    rate = fairness.underdiagnosis(np.array([0] * 19 + [1]), np.zeros(20))
    assert rate.note == "ineligible: 19 negatives < 20"
    assert rate.interval.value == pytest.approx(0.5 / 20)
    assert fairness.underdiagnosis(np.array([0] * 20), np.zeros(20)).note == ""
    assert fairness.auroc_note(np.array([1] * 9 + [0] * 50)) == "ineligible: 9 positives < 10"
    assert fairness.auroc_note(np.array([1] * 50 + [0] * 9)) == "ineligible: 9 negatives < 10"
    assert fairness.auroc_note(np.array([1] * 10 + [0] * 10)) == ""
    y, whose = np.array([1] * 10 + [0] * 10), np.arange(20)
    assert fairness.auroc_note(y, whose) == fairness.auroc_note(y, whose % 2) == ""
    for one in (y == 1, y == 0):
        assert fairness.auroc_note(y, np.where(one, 99, whose)) == "ineligible: one patient only in a class"
        two = np.where(one, 99 + whose % 2, whose).astype(str)
        assert fairness.auroc_note(y, two) == "", "two patients, by name"
    assert fairness.auroc_note(y[1:], np.zeros(19)) == "ineligible: 9 positives < 10", "what is too few comes first"
    assert fairness.images_note(29) == "ineligible: n = 29 < 30"
    assert fairness.images_note(30) == fairness.images_note(16, least=16) == ""


def decisions(n=400, seed=0):
    rng = np.random.default_rng(seed)
    group = rng.choice(["White", "Black", "Asian"], n)
    truth = rng.random(n) < 0.4
    return truth.astype(int), (rng.random(n) < 0.2 + 0.4 * truth + 0.2 * (group == "Black")).astype(int), group


def test_parity_criteria_are_spreads_of_the_groups_rates():
    truth, called, group = decisions()
    found = fairness.parity(truth, called, group)
    rate = lambda rows: [called[rows & (group == g)].mean() for g in ("White", "Black", "Asian")]  # noqa: E731
    spread = lambda r: (max(r) - min(r), min(r) / max(r))  # noqa: E731
    chosen, tpr, fpr = (spread(rate(rows)) for rows in (truth >= 0, truth == 1, truth == 0))
    expected = {"demographic parity": chosen, "equal opportunity": tpr,
                "equalized odds": (max(tpr[0], fpr[0]), min(tpr[1], fpr[1]))}  # fmt: skip
    for criterion, (difference, ratio) in expected.items():
        assert found.values[f"{criterion} difference"] == pytest.approx(difference)
        assert found.values[f"{criterion} ratio"] == pytest.approx(ratio)
    assert len(found.values) == 6 and found.note == ""


def test_parity_leaves_small_groups_out_instead_of_taking_their_rate_as_zero():
    truth, called, group = decisions()
    lonely = group.astype("<U8")
    lonely[:5], truth[:5], called[:5] = "Hispanic", 0, 0  # no positive: fairlearn alone would call its TPR 0
    found = fairness.parity(truth, called, lonely)
    assert found.note == "without Hispanic (ineligible)"
    assert found.values == fairness.parity(truth[5:], called[5:], group[5:]).values
    assert fairness.parity(truth, called, np.full(400, "all")).values == {}


def test_a_classifier_without_skill_has_no_gap_and_full_parity():
    rng = np.random.default_rng(0)
    y, group = rng.integers(0, 2, 400), np.repeat(["a", "b"], 200)
    same = fairness.card(y, np.full(400, y.mean()), group)
    assert same["AUROC"] == same["ES-AUROC"] == 0.5 and same["gap AUROC"] == 0 and same["ECE"] < 1e-9
    assert all(value == 0 for name, value in same.items() if name.endswith("difference"))
    ill = fairness.card(y, np.zeros(400), group)
    assert ill["underdiagnosis"] == pytest.approx(0.5 / ((y == 0).sum() + 1))
    missed = fairness.card(1 - y, np.zeros(400), group, label="Edema")  # nobody called ill: all are sent home
    assert missed["underdiagnosis"] == pytest.approx(((y == 0).sum() + 0.5) / ((y == 0).sum() + 1))
    one = fairness.card(y, rng.uniform(size=400), np.repeat(["a", "b"], (395, 5)))
    assert not {"gap AUROC", "ES-AUROC", "demographic parity difference"} & set(one)


def test_the_card_holds_the_numbers_of_the_functions_that_it_names():
    rng = np.random.default_rng(1)
    y, group = rng.integers(0, 2, 300), rng.choice(["a", "b", "c"], 300)
    p = np.clip(rng.normal(0.3 + 0.3 * y * (group == "a"), 0.2), 0, 1)
    found, by_group = fairness.card(y, p, group), [stats.auroc(y[group == g], p[group == g])[0] for g in "abc"]
    assert found["gap AUROC"] == pytest.approx(np.ptp(by_group)) and found["gap AUROC"] > 0.1
    assert found["ES-AUROC"] == pytest.approx(found["AUROC"] / (1 + sum(abs(g - found["AUROC"]) for g in by_group)))
    calls = [(p[(group == g)] >= 0.5).mean() for g in "abc"]
    assert found["demographic parity difference"] == pytest.approx(max(calls) - min(calls))
