"""Cardiac studies: phantoms, prompts, stacking, sampling weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compdiff import cardiac

SHAPES = {
    "cine": (12, 64, 64),
    "four_chamber": (12, 64, 64),
    "volume": (8, 64, 64),
    "slice": (64, 64),
    "frame": (64, 64),
    "stacked": (64, 64, 3),
}


# --- phantoms ---------------------------------------------------------------------------------------------------------
def test_phantoms_have_every_input():
    studies = cardiac.phantom_studies(3, "test", seed=0)
    assert set(SHAPES) == set(cardiac.INPUTS) and not studies.missing
    for name, shape in SHAPES.items():
        images, masks = studies.images(name), studies.masks(name)
        assert images.shape == masks.shape == (3, *shape) and images.dtype == masks.dtype == np.uint8
        assert set(np.unique(masks)) <= {0, 1, 2, 3}
    ed, es = cardiac.unstack(studies.images("stacked"))
    assert np.array_equal(ed, studies.images("slice")) and np.array_equal(es, studies.images("frame"))
    assert np.array_equal(studies.images("cine")[:, 0], ed) and studies.images("slice", 32, [2]).shape == (1, 32, 32)
    with pytest.raises(ValueError, match="unknown input"):
        studies.images("x-ray")


def test_phantom_cohort_is_what_was_asked_for():
    studies = cardiac.phantom_studies(400, "train", seed=0, prevalence=0.25)
    table = studies.table
    assert table["y_heart failure"].sum() == 100 and table["id"].is_unique
    for name in studies.schema.names:
        shares = table[name].value_counts(normalize=True).reindex(studies.schema[name].categories, fill_value=0)
        assert np.abs(shares.to_numpy() - cardiac.SHARES[name]).max() < 0.08
    assert set(table["findings"]) == {"healthy", "heart failure"} and (table["age"] != "0-18").all()
    assert studies.attributes().shape == (400, 3) and studies.attributes()[0, 1] == (table["sex"][0] == "Female")
    even = cardiac.phantom_studies(400, "train", seed=0, balanced=True).table
    assert abs((even["sex"] == "Female").mean() - 0.5) < 0.1 and abs((even["bmi"] == "obese").mean() - 1 / 3) < 0.1
    again, other = (cardiac.phantom_studies(400, c, seed=0, prevalence=0.25).table for c in ("train", "val"))
    assert again.equals(table) and not set(other["id"]) & set(table["id"])
    with pytest.raises(ValueError):
        cardiac.phantom_studies(0, "train", seed=0)


# --- prompts, stacking, weights ---------------------------------------------------------------------------------------
def test_prompt_is_the_papers_and_hides_what_is_not_named():
    row = {"sex": "Male", "age_years": 67, "age": "60-80", "bmi": "overweight", "findings": "heart failure"}
    told = lambda *names: cardiac.prompt(row, names, cardiac.PHANTOM_SCHEMA)  # noqa: E731
    assert told("sex", "age", "bmi") == "Male, age in 60s, overweight BMI, heart failure"
    assert told("bmi") == "overweight BMI, heart failure" and told() == "heart failure"
    with pytest.raises(ValueError, match="no attribute 'race'"):
        told("race")
    assert cardiac.findings({"a": 1, "b": 0, "c": 1}) == "a, c" and cardiac.findings({"a": 0}) == "healthy"


def test_stacking():
    ed, es = np.arange(4, dtype=np.uint8).reshape(2, 2), np.full((2, 2), 9, np.uint8)
    stacked = cardiac.stack(ed, es)
    assert stacked.shape == (2, 2, 3) and stacked[1, 0].tolist() == [2, 9, 2]
    stacked[..., 2] += 2  # a generator's two ED channels differ
    assert np.array_equal(cardiac.unstack(stacked)[0], ed + 1) and np.array_equal(cardiac.unstack(stacked)[1], es)


def test_sampling_weights_by_hand():
    prompts = ["common"] * 200 + ["rare"] * 50 + ["single"]
    assert np.allclose(cardiac.sampling_weights(prompts, 20), [1 / 200] * 200 + [1 / 180] * 51)
    assert np.allclose(cardiac.sampling_weights(prompts, 5), [1 / 200] * 200 + [1 / 50] * 50 + [1 / 45])
    with pytest.raises(ValueError):
        cardiac.sampling_weights(prompts, 0)


def test_weighted_rows_follow_the_weights():
    prompts = ["common"] * 90 + ["rare"] * 10
    weights = cardiac.sampling_weights(prompts, 20 / 9)  # 1/90 and 1/20: clipped below 20
    rows = cardiac.weighted_rows(weights, 20_000, seed=0)
    assert (rows >= 90).mean() == pytest.approx(0.5 / 1.5, abs=0.02)
    assert np.array_equal(rows, cardiac.weighted_rows(weights, 20_000, seed=0)) and set(rows) == set(range(100))


@given(st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5, 7.0]), min_size=1, max_size=40).filter(any), st.integers(1, 90),
       st.integers(0, 9))  # fmt: skip
def test_a_weighted_row_comes_as_often_as_expected_to_within_one(weights, n, seed):
    rows = cardiac.weighted_rows(np.array(weights), n, seed)
    seen, expected = np.bincount(rows, minlength=len(weights)), n * np.array(weights) / np.sum(weights)
    assert len(rows) == n and (np.abs(seen - expected) < 1 + 1e-9).all()
    assert sorted(cardiac.weighted_rows(np.ones(n), n, seed)) == list(range(n))  # equal weights: everybody, once


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.floats(0.1, 30))
def test_sampling_weights_never_favour_the_frequent(prompts, clip):
    weights = cardiac.sampling_weights(prompts, clip)
    total = {p: weights[np.array(prompts) == p].sum() for p in set(prompts)}
    each = {p: weights[prompts.index(p)] for p in total}
    for p, q in ((p, q) for p in total for q in total if prompts.count(p) > prompts.count(q)):
        assert each[p] <= each[q] and total[p] >= total[q] - 1e-12
