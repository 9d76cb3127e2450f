"""Memorisation: planted copies are found, clean data alarm at the calibrated rate, and no patient is named or drawn."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from panel import fake, make_reference, people, value
from scipy import ndimage

from compdiff import controls, evaluate, galleries, memorisation, metrics, phantoms
from compdiff.memorisation import feature_distances, nearest, pixel_distances


def pictures(n, seed, size=48):
    """Smooth random pictures that share a strong common pattern, as radiographs do."""
    rng = np.random.default_rng(seed)
    own = ndimage.gaussian_filter(rng.normal(size=(n, size, size)), (0, 3, 3))
    common = np.cos(np.linspace(0, 6, size))[:, None] * np.cos(np.linspace(0, 4, size))
    return np.clip(128 + 60 * common + 25 * own / own.std(), 0, 255).astype(np.uint8)


def plain_distance(a, b):
    """The best correlation over all shifts, window by window."""
    best, s = -1.0, len(a)
    for y in range(7):
        for x in range(7):
            best = max(best, np.corrcoef(a[3 : s - 3, 3 : s - 3].ravel(), b[y : y + s - 6, x : x + s - 6].ravel())[0, 1])
    return np.sqrt(2 - 2 * best)


# --- distances --------------------------------------------------------------------------------------------------------
def test_pixel_distance_is_the_best_correlation_over_shifts():
    a, b = pictures(3, 0), pictures(4, 1)
    plain = [[plain_distance(x.astype(float), y.astype(float)) for y in b] for x in a]
    np.testing.assert_allclose(pixel_distances(a, b), plain, atol=1e-3)


@settings(max_examples=25)
@given(dy=st.integers(-3, 3), dx=st.integers(-3, 3), gain=st.floats(0.4, 1.3), offset=st.integers(-20, 20))
def test_shift_brightness_and_contrast_do_not_hide_a_copy(dy, dx, gain, offset):
    train = pictures(6, 2)
    moved = np.roll(train[3].astype(float), (dy, dx), (0, 1))
    copy = np.clip(gain * (moved - 128) + 128 + offset, 0, 255).round().astype(np.uint8)
    found = nearest(pixel_distances, copy[None], train)
    assert found.index[0] == 3 and found.distance[0] < 0.2 < pixel_distances(train[:1], train[1:]).min()


def test_large_pictures_are_reduced_and_odd_ones_refused():
    a = pictures(2, 3, 64)
    big = a.repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_allclose(pixel_distances(big, big), pixel_distances(a, a), atol=1e-3)
    with pytest.raises(ValueError, match="one shape"):
        pixel_distances(a, pictures(2, 3, 48))
    flat = np.full((1, 48, 48), 9, dtype=np.uint8)
    assert pixel_distances(flat, pictures(1, 0)) == pytest.approx(np.sqrt(2))


def test_nearest_is_a_plain_search_in_any_order():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(700, 5)), rng.normal(size=(30, 5))  # more than one chunk
    plain = np.linalg.norm(a[:, None] - b, axis=2)
    found = nearest(feature_distances, a, b)
    np.testing.assert_allclose(found.distance, plain.min(1), atol=1e-9)
    assert (found.index == plain.argmin(1)).all()
    order, back = rng.permutation(700), rng.permutation(30)
    again = nearest(feature_distances, a[order], b[back])
    np.testing.assert_allclose(again.distance, found.distance[order], atol=1e-9)
    assert (back[again.index] == found.index[order]).all()


def test_an_image_is_not_its_own_patients_copy():
    x, patients = np.arange(6.0)[:, None] ** 2, np.array(["a", "a", "b", "b", "c", "c"])
    assert nearest(feature_distances, x, x).distance.tolist() == [0] * 6
    found = nearest(feature_distances, x, x, (patients, patients))
    assert found.distance.tolist() == [4, 3, 3, 7, 7, 16]
    with pytest.raises(ValueError, match="another patient"):
        nearest(feature_distances, x, x[:2], (patients, patients[:2]))
    with pytest.raises(ValueError, match="no training images"):
        nearest(feature_distances, x, x[:0])


# --- threshold --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "rank"), [(50, 1), (99, 1), (200, 2), (999, 10)])
def test_threshold_is_an_order_statistic_with_its_exact_rate(n, rank):
    d = np.random.default_rng(n).permutation(np.arange(n, dtype=float))
    limit, rate = memorisation.threshold(d)
    assert limit == rank - 1 and rate == pytest.approx(rank / (n + 1))
    with pytest.raises(ValueError, match="real validation"):
        memorisation.threshold(d[:0])


def test_clean_images_alarm_at_the_calibrated_rate():
    rng, alarms = np.random.default_rng(5), []
    for _ in range(2000):
        limit, rate = memorisation.threshold(rng.exponential(size=199))
        alarms.append((rng.exponential(size=50) < limit).mean())
    assert rate == 0.01
    assert abs(np.mean(alarms) - rate) < 4 * np.std(alarms) / np.sqrt(len(alarms))


@pytest.fixture(scope="module")
def chest():
    """Training and test phantoms of one cell each draw differently: 150 and 120 subjects, no copies."""
    def draw(n, seed):
        people = [{"age": "40-60", "sex": ("Male", "Female")[i % 2], "race": "White"} for i in range(n)]
        return np.stack([phantoms.draw("chest", f"s{i}", p, seed=seed).image for i, p in enumerate(people)])

    return draw(150, 1), draw(120, 2), draw(120, 3)


def test_planted_copies_of_phantoms_are_found_and_fresh_ones_do_not_alarm(chest):
    train, test, fresh = chest
    limit, rate = memorisation.threshold(nearest(pixel_distances, test, train).distance)
    moved = np.roll(train[:40], (2, -2), (1, 2))
    rescaled = (0.8 * moved.astype(float) + 20).astype(np.uint8)
    planted = nearest(pixel_distances, np.concatenate([train[:40], moved, rescaled]), train)
    assert (planted.distance < limit).all() and (planted.index == np.tile(np.arange(40), 3)).all()
    assert (nearest(pixel_distances, fresh, train).distance < limit).mean() < 0.05  # 1 % expected, 6 of 120 at most


# --- rows and pairs ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ref():
    return make_reference()


@pytest.fixture(scope="module")
def train():
    return people(120, 1, without=(1, 1))


def rows_of(s, ref, features):
    real, found = (nearest(feature_distances, x, features) for x in (people(300, 2)[1], s.features))
    return memorisation.audit(s, ref, found, real, len(features), "lite0", 20, 0)


def test_only_the_copies_are_suspected(ref, train):
    table, features, images = train
    share = {s.method: value(rows_of(s, ref, features), "suspected copies")
             for s in (controls.copies(ref, table, images, features, seed=0), controls.real_test(ref),
                       fake(ref))}  # fmt: skip
    assert share["copy"]["value"] == 1.0 and share["copy"]["hi"] == 1 > share["copy"]["lo"] > 0.8
    assert "1.0% of real validation images alarm" in share["real_test"]["note"]
    assert 0 <= share["real_test"]["lo"] <= 0.01 <= share["real_test"]["hi"]  # no patient of it set the threshold
    assert share["hcn"]["value"] < 0.1 and share["hcn"]["hi"] > share["hcn"]["lo"]


def test_pixel_rows_have_names_of_their_own(ref, train):
    found = nearest(pixel_distances, ref.images, train[2])
    rows = memorisation.audit(controls.real_test(ref), ref, found, found, 120, "pixels", 20, 0)
    assert [r["metric"] for r in rows] == ["nearest training distance (pixels)", "suspected copies (pixels)"]
    assert {r["extractor"] for r in rows} == {"pixels"} and rows[0]["value"] == np.median(found.distance)


def test_closest_pairs_are_sorted_and_name_no_patient(ref, train):
    table, features, images = train
    s = controls.copies(ref, table, images, features, seed=0)
    found = nearest(feature_distances, s.features, features)
    generated = pd.DataFrame({"id": ref.rows["id"].to_numpy()[s.at]})
    open_ids = memorisation.pairs(s, found, 1.5, *(memorisation.names(t, "generated") for t in (generated, table)), "lite0")
    assert list(open_ids.columns) == memorisation.PAIR_COLUMNS and len(open_ids) == 10
    assert open_ids["distance"].is_monotonic_increasing and set(open_ids["threshold"]) == {1.5}
    first = open_ids.iloc[0]
    i, j = (int(first[c].split("-")[1]) for c in ("generated", "training"))
    assert (s.images[i] == images[j]).all()
    for access in ("open", "credentialed"):
        hidden = memorisation.pairs(s, found, 1.5, *(memorisation.names(t, access) for t in (generated, table)), "lite0")
        assert hidden["training"].tolist() == [str(found.index[r]) for r in memorisation.closest(found)]
        assert not set(hidden["training"]) & set(table["id"]) and not set(hidden["generated"]) & set(ref.rows["id"])


def test_pairs_of_phantoms_are_drawn_and_of_patients_are_not():
    a, b = pictures(2, 0), pictures(2, 1)
    figure = galleries.copies(a, a, ["hcn", "text"], "phantom")
    images = [ax.images[0].get_array() for ax in figure.axes]
    assert len(images) == 6 and (images[4] == 128).all() and (images[1] == images[3]).all() and "phantom" in figure.get_suptitle()
    white, black = np.full((1, 8, 8), 255, np.uint8), np.zeros((1, 8, 8), np.uint8)
    drawn = [galleries.copies(x, y, [""], "phantom").axes[2].images[0].get_array() for x, y in ((white, black), (black, white))]
    assert (drawn[0] == 255).all() and (drawn[1] == 0).all()
    with pytest.raises(ValueError, match="'radiograph'"):
        galleries.copies(a, b, ["hcn", "text"], "radiograph")


def test_real_test_images_are_a_control_of_the_validation_threshold(ref, train):
    """Test images that lie on training images alarm, although they are real: they have no part in the threshold."""
    _, features, images = train
    near = nearest(feature_distances, people(300, 2)[1], features)
    leaked = replace(ref, features=np.vstack([features + 1e-6, ref.features[len(features) :]]))
    found = nearest(feature_distances, leaked.features, features)
    rows = memorisation.audit(controls.real_test(leaked), leaked, found, near, 120, "lite0", 20, 0)
    share = value(rows, "suspected copies")
    assert share["value"] == pytest.approx(120 / 200, abs=0.03)
    assert memorisation.threshold(near.distance)[1] == pytest.approx(3 / 301)


# --- MiFID ------------------------------------------------------------------------------------------------------------
def test_mifid_of_a_memory_is_penalised_and_of_fresh_images_is_fid(ref, train):
    table, features, images = train
    limit = memorisation.tau(ref, features, 200, 0)
    real = metrics.nearest_cosine(ref.features, features)
    assert real.mean() * 0.7 < limit < real.mean()
    copy, fresh = controls.copies(ref, table, images, features, seed=0), fake(ref)
    found = {}
    for s in (copy, fresh):
        quality = evaluate.quality(s, ref, 20, 0)
        (row,) = memorisation.informed_fid(quality, s, ref, features, limit)
        fid = value(quality, "FID")
        found[s.method] = {k: row[k] / fid[k] for k in ("value", "hi")}
    assert found["copy"]["value"] == pytest.approx(1000, rel=1e-3) == pytest.approx(found["copy"]["hi"])
    assert found["hcn"]["value"] in (1.0, pytest.approx(1 / (metrics.nearest_cosine(fresh.features, features).mean() + 1e-3)))
