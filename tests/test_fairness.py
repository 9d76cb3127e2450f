"""Equity metrics on hand-worked numbers, by property, and against scipy."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from compdiff import fairness

TABLE = pd.DataFrame(
    {
        "age": ["0-18", "80+", "80+", "0-18", "80+"],
        "sex": ["Male", "Male", "Female", "Male", "Female"],
        "race": ["White", "Black", "Black", "White", "White"],
        "held_out": [0, 1, 0, 0, 0],
    }
)


def test_groups_come_from_the_table_and_each_attribute_covers_every_row_once():
    found = fairness.groups(TABLE, ["age", "sex", "race"], joint=[("sex", "race")])
    by_name = {(g.kind, g.name): g.mask.tolist() for g in found}
    assert by_name["overall", ""] == [True] * 5
    assert by_name["sex", "Female"] == [False, False, True, False, True]
    assert by_name["sex x race", "Male Black"] == [False, True, False, False, False]
    assert by_name["cell", "80+ Female Black"] == [False, False, True, False, False]
    assert by_name["held_out", ""] == [False, True, False, False, False]
    for kind in ("age", "sex", "race", "sex x race", "cell"):
        np.testing.assert_array_equal(sum(g.mask.astype(int) for g in found if g.kind == kind), 1)
    assert all(g.mask.any() for g in found)
    assert "held_out" not in {g.kind for g in fairness.groups(TABLE.assign(held_out=0), ["age", "sex"])}


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


def test_small_groups_are_marked_and_keep_their_numbers():
    rate = fairness.underdiagnosis(np.array([0] * 19 + [1]), np.zeros(20))
    assert rate.note == "ineligible: 19 negatives < 20"
    assert rate.interval.value == pytest.approx(0.5 / 20)
    assert fairness.underdiagnosis(np.array([0] * 20), np.zeros(20)).note == ""
    assert fairness.auroc_note(np.array([1] * 9 + [0] * 50)) == "ineligible: 9 positives < 10"
    assert fairness.auroc_note(np.array([1] * 50 + [0] * 9)) == "ineligible: 9 negatives < 10"
    assert fairness.auroc_note(np.array([1] * 10 + [0] * 10)) == ""
    assert fairness.images_note(29) == "ineligible: n = 29 < 30"
    assert fairness.images_note(30) == fairness.images_note(16, least=16) == ""
