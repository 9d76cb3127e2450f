"""Mask faithfulness on pictures whose answer is known; the group matrix against its definition."""

import numpy as np
import pandas as pd
import pytest

from compdiff import cardiac, faithful, metrics, segment


@pytest.fixture(scope="module")
def phantoms():
    return cardiac.phantom_studies(24, "train", seed=0, prevalence=0.5)


@pytest.fixture(scope="module")
def net(phantoms):
    return faithful.finder(phantoms.images("stacked", 32), phantoms.masks("stacked", 32), 500, seed=0)


def test_the_finder_sees_both_frames_of_real_images(phantoms, net):
    test = cardiac.phantom_studies(10, "test", seed=0, prevalence=0.5)
    images, masks = test.images("stacked", 32), test.masks("stacked", 32)
    seen = faithful.found(net, images)
    assert seen.shape == (10, 32, 32, 2)
    both = faithful.dice(seen, masks)
    assert both.mean() > 0.85 and faithful.dice(np.roll(seen, 1, axis=0), masks).mean() < both.mean()
    by_hand = [segment.dice(seen[i : i + 1, ..., k], masks[i : i + 1, ..., k])[0] for i in range(10) for k in (0, 1)]
    assert np.allclose(both, np.reshape(by_hand, (10, 2)).mean(1))
    implied = faithful.ejection(seen)
    assert np.corrcoef(implied, test.table["true_ejection_fraction"])[0, 1] > 0.7


def test_an_image_without_a_cavity_has_no_ejection_fraction_and_is_counted():
    seen = np.zeros((3, 8, 8, 2), np.uint8)
    seen[0, :4, :, 0], seen[0, :2, :, 1], seen[1, 0, 0, 1] = 1, 1, 1
    values = faithful.ejection(seen)
    assert values[0] == 0.5 and np.isnan(values[1:]).all()
    row = faithful.mean_row("ejection", values, np.arange(3), 50, 0)
    assert row["value"] == 0.5 and row["n"] == 1 and row["note"].startswith("without 2 images")
    assert faithful.mean_row("ejection", values[1:], np.arange(2), 50, 0)["note"].startswith("not available")


def test_a_pasted_mask_is_flat_in_the_greys_of_real_images(phantoms):
    images, masks = phantoms.images("stacked", 32), phantoms.masks("stacked", 32)
    pasted = faithful.paste(masks[:2], images, masks)
    for value in range(4):
        inside = pasted[masks[:2] == value]
        assert (inside == inside[0]).all() and abs(int(inside[0]) - images[masks == value].mean()) <= 0.5
    nothing = faithful.paste(np.full((1, 4, 4, 3), 2, np.uint8), images, np.where(masks == 2, 0, masks))
    assert not nothing.any(), "a mask value that no real mask has gets no grey of its own"


def test_kid_row_is_small_for_the_same_distribution_and_large_for_another():
    rng = np.random.default_rng(0)
    real, same, other = rng.normal(size=(60, 8)), rng.normal(size=(60, 8)), rng.normal(2, 1, size=(60, 8))
    rows = [faithful.kid_row(x, real, np.arange(60), 60 + np.arange(60), 100, 0) for x in (same, other)]
    assert rows[0]["lo"] < 0 < rows[0]["hi"] and rows[1]["lo"] > rows[0]["hi"]
    assert rows[1]["value"] == pytest.approx(metrics.kid(other, real)), "one image a patient: KID as it is defined"
    own = faithful.kid_row(real, real, np.arange(60), np.arange(60), 100, 0)
    assert own["value"] == pytest.approx(0, abs=1e-9), "a patient's pair of images counts nowhere"


def test_kid_against_a_base_that_drew_for_the_same_patients_is_paired():
    """What two methods share falls out of their difference: its interval is far narrower than one beside the other."""
    rng = np.random.default_rng(1)
    real, base = rng.normal(size=(60, 8)), rng.normal(0.5, 1, size=(60, 8))
    own = [np.arange(60)] * 2
    alone, better = (faithful.kid_row(x, real, *own, 200, 0) for x in (base, base - 0.1))
    paired = faithful.kid_row(base - 0.1, real, *own, 200, 0, base=base)
    assert paired["value"] == pytest.approx(better["value"] - alone["value"]) and paired["hi"] < 0
    assert paired["hi"] - paired["lo"] < 0.5 * (alone["hi"] - alone["lo"]) and better["hi"] > alone["lo"]
    same = faithful.kid_row(base, real, *own, 200, 0, base=base)
    assert same["value"] == same["lo"] == same["hi"] == 0


def test_halves_of_a_group_share_nobody():
    a = np.arange(40.0)[:, None] * np.ones(3)
    values = faithful.split_fid(a, a, True, 20, 3, seed=0)
    assert (values > 0).all() and len(values) == 3, "the same 40 rows against themselves would give 0"
    assert metrics.fid(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="need 42 patients"):
        faithful.split_fid(a, a, True, 21, 1, seed=0)


def test_the_matrix_names_the_closest_group_and_its_floor():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"sex": ["Male"] * 80 + ["Female"] * 80 + ["Other"] * 2})
    shift = np.repeat([0.0, 2.0, 0.0], (80, 80, 2))[:, None]
    real, fake = (rng.normal(size=(162, 4)) + shift for _ in range(2))
    groups = faithful.groups(table, ["sex"])
    every = faithful.matrix(real, groups, fake, groups, repeats=3, seed=0)
    left, found = every[every["value"].isna()], every[every["value"].notna()]
    assert left[["real", "n", "note"]].values.tolist() == [["Other", 2, "not available: 2 patients, fewer than 10"]]
    wide = {k: part.pivot(index="real", columns="other", values="value") for k, part in found.groupby("kind")}
    for part in wide.values():
        assert list(part.columns) == ["Female", "Male"], "two patients are no group"
        assert (part.idxmin(axis=1) == part.index).all()
    assert wide["synthetic"].to_numpy().diagonal() == pytest.approx(wide["real"].to_numpy().diagonal(), rel=0.7)
    assert set(found["n"]) == {40} and (found["note"] == "").all()
    few = {k: m[68:92] for k, m in groups.items()}
    marked = faithful.matrix(real[68:92], few, fake[68:92], few, 2, 0).dropna(subset="value")
    assert len(marked) == 8 and marked["note"].str.startswith("ineligible").all()
    alone = faithful.matrix(real[:30], {k: m[:30] for k, m in groups.items()}, fake[:30], groups, 2, 0)
    assert alone["value"].isna().all() and "no other group" in alone.set_index("real")["note"]["Male"]


def test_the_diagnosis_alone_and_the_mask_of_another():
    masks, y = np.zeros((5, 4, 4, 3), np.uint8), np.array([0, 0, 0, 1, 1])
    masks[:3, 0, 0, 0], masks[:2, 1, 1, 1], masks[0, 2, 2, 0], masks[3:, 3, 3, :2], masks[:, 0, 1] = 1, 1, 1, 1, 2
    guess = faithful.typical(masks, y, np.array([1, 0, 1]))
    assert guess.shape == (3, 4, 4, 2) and np.array_equal(guess[0], guess[2])
    assert [tuple(np.argwhere(guess[1, ..., k])[0]) for k in (0, 1)] == [(0, 0), (1, 1)] and guess[1].sum() == 2
    assert [tuple(x) for x in np.argwhere(guess[0])] == [(3, 3, 0), (3, 3, 1)]
    labels = np.array([0, 1, 0, 1, 0, 2])
    other = faithful.exchanged(labels)
    assert np.array_equal(labels[other], labels) and sorted(other) == list(range(6))
    assert (other[:5] != np.arange(5)).all() and other[5] == 5
