"""Folds by patient: nobody in two parts, strata dealt evenly, generators that have not seen their fold's test."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compdiff import cardiac, cardiac_cohorts, config, paths
from compdiff.problems import DataError

REAL = paths.ROOT.parent / "shared" / "data" / "sunnybrook"
LABEL = "heart failure"


@pytest.fixture(scope="module")
def phantoms():
    return cardiac_cohorts.studies("cardiac", "", config.settings("smoke", "cardiac"))


def test_phantoms_are_a_training_and_a_test_cohort(phantoms):
    c = config.settings("smoke", "cardiac").heart
    assert phantoms.table["cohort"].value_counts().to_dict() == {"train": c.hearts, "test": c.test_hearts}
    assert phantoms.table["id"].is_unique and phantoms.table.index.tolist() == list(range(c.hearts + c.test_hearts))
    alone = cardiac.phantom_studies(c.test_hearts, "test", seed=1, prevalence=0.4, interaction=0.5, balanced=True)
    both = phantoms.images("slice", 32, [c.hearts, c.hearts + 1])
    assert np.array_equal(both, alone.images("slice", 32, [0, 1])), "a row of the whole is the cohort's own patient"


def test_cohorts_of_other_labels_are_not_joined(phantoms):
    with pytest.raises(ValueError, match="same attributes and labels"):
        cardiac_cohorts.joined({"train": phantoms, "test": replace(phantoms, labels=("diabetes",))})


def test_phantom_folds_share_one_test_cohort_and_one_generator(phantoms):
    folds = cardiac_cohorts.folds(phantoms.table, LABEL, 3, ("sex",), seed=0)
    train = set(np.flatnonzero(phantoms.table["cohort"] == "train"))
    assert {f.generator for f in folds} == {"all"} and len(cardiac_cohorts.generators(folds)) == 1
    assert set().union(*(set(f.val) for f in folds)) == train
    for f in folds:
        assert set(f.train) | set(f.val) == train and not set(f.train) & set(f.val)
        assert (phantoms.table["cohort"].iloc[f.test] == "test").all() and len(f.test) == 24


def people(n, seed):
    rng = np.random.default_rng(seed)
    who = {"id": [f"p{i}" for i in range(n)], "sex": rng.choice(["Male", "Female"], n)}
    return pd.DataFrame(who | {f"y_{LABEL}": rng.integers(0, 2, n)})


@given(st.integers(12, 60), st.integers(3, 6), st.integers(0, 99))
def test_without_a_test_cohort_everybody_is_tested_once_and_no_generator_knows_its_fold(n, k, seed):
    table = people(n, seed)
    folds = cardiac_cohorts.folds(table, LABEL, k, ("sex",), seed)
    assert sorted(np.concatenate([f.test for f in folds])) == list(range(n))
    assert len({f.generator for f in folds}) == k == len(cardiac_cohorts.generators(folds))
    for f in folds:
        parts = [set(f.train), set(f.val), set(f.test)]
        assert sum(map(len, parts)) == n == len(set.union(*parts)) and all(parts)


@given(st.lists(st.sampled_from("abc"), min_size=6, max_size=40), st.integers(2, 6), st.integers(0, 9))
def test_a_stratum_is_dealt_evenly(groups, k, seed):
    groups = np.array(groups)
    parts = cardiac_cohorts.dealt(groups, k, seed)
    assert np.bincount(parts, minlength=k).max() - np.bincount(parts, minlength=k).min() <= 1
    for g in np.unique(groups):
        counts = np.bincount(parts[groups == g], minlength=k)
        assert counts.max() - counts.min() <= 1


def test_folds_come_back_from_their_file(phantoms, tmp_path):
    folds = cardiac_cohorts.folds(phantoms.table, LABEL, 4, ("sex",), seed=3)
    cardiac_cohorts.save_folds(phantoms.table, folds, tmp_path / "folds.csv")
    again = cardiac_cohorts.load_folds(phantoms.table, tmp_path / "folds.csv")
    for a, b in zip(folds, again, strict=True):
        assert (a.number, a.generator) == (b.number, b.generator)
        assert all(np.array_equal(np.sort(getattr(a, p)), getattr(b, p)) for p in ("train", "val", "test"))
    with pytest.raises(ValueError, match="do not hold"):
        cardiac_cohorts.load_folds(phantoms.table.iloc[5:], tmp_path / "folds.csv")


def test_an_unknown_disease_is_refused():
    with pytest.raises(ValueError, match="knows: heart failure"):
        cardiac_cohorts.studies("cardiac", "", config.settings("smoke", "cardiac", disease="gout"))


def test_too_few_folds_or_patients_are_refused(phantoms):
    for k in (2, 99):
        with pytest.raises(ValueError, match="between 3"):
            cardiac_cohorts.folds(phantoms.table, LABEL, k, ("sex",), seed=0)


def test_who_may_be_shown():
    names = ("cardiac", "sunnybrook", "biobank", "no such manifest")
    assert [cardiac_cohorts.access(n) for n in names] == ["generated", "open", "credentialed", "credentialed"]


def test_real_data_without_a_folder_say_where_to_get_it():
    with pytest.raises(DataError, match="DATA_ROOT"):
        cardiac_cohorts.studies("sunnybrook", "", config.settings("smoke", "sunnybrook"))


@pytest.mark.skipif(not REAL.is_dir(), reason="skipped: no real data")
def test_sunnybrooks_five_ill_women_are_tested_in_five_folds():
    studies = cardiac_cohorts.studies("sunnybrook", str(REAL), config.settings("smoke", "sunnybrook"))
    folds = cardiac_cohorts.folds(studies.table, LABEL, 5, ("sex",), seed=1)
    ill_women = np.flatnonzero((studies.table["sex"] == "Female") & (studies.table[f"y_{LABEL}"] == 1))
    assert [len(set(f.test) & set(ill_women)) for f in folds] == [1] * 5
    assert all(len(f.test) == 9 and set(studies.table[f"y_{LABEL}"].iloc[f.train]) == {0, 1} for f in folds)
