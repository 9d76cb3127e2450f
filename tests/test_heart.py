"""Cardiac phantoms: determinism, declared effects, exact masks, true ejection fraction, what a picture must show."""

import ast
import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from compdiff import heart

SOMEBODY = {"age": "40-60", "sex": "Male", "bmi": "normal"}
HEALTHY, FAILING = {"heart failure": 0}, {"heart failure": 1}


def somebody(subject="s", labels=HEALTHY, interaction=0.0, **changes):
    return heart.draw(subject, SOMEBODY | changes, labels, seed=1, interaction=interaction)


def fingerprint(subjects):
    out = {}
    for subject in subjects:
        drawn = heart.draw(subject, SOMEBODY, HEALTHY, seed=7)
        arrays = [
            *heart.pair(drawn),
            *heart.pair(drawn, "four_chamber"),
            *heart.volume(drawn, slices=3),
            *heart.cine(drawn, 4),
        ]
        out[subject] = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    return out


def test_same_in_another_process_and_order():
    here = fingerprint(["a", "b"])
    assert fingerprint(["b", "a"]) == here and len(set(here.values())) == 2
    code = "import sys; sys.path.insert(0, 'tests'); import test_heart as t; print(t.fingerprint(['b', 'a']))"
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert ast.literal_eval(there.stdout) == here
    a, b = (heart.pair(heart.draw("a", SOMEBODY, HEALTHY, seed=s))[0] for s in (7, 8))
    assert not np.array_equal(a, b)


# --- effects ----------------------------------------------------------------------------------------------------------
def test_every_effect_names_a_parameter():
    base = set(heart.EFFECTS["base"])
    assert set(heart.EFFECTS["scatter"]) == base and set(heart.LIMITS) <= base
    assert all(set(effects) <= base for effects in heart.EFFECTS.values())
    touched = set(heart.EFFECTS["heart failure"])
    assert {"wall_thickness", "cavity_radius", "ejection_fraction", "contrast"} <= touched


@pytest.mark.parametrize("row, two, labels", [("sex", {"sex": "Female"}, HEALTHY), ("heart failure", {}, FAILING)])
def test_an_effect_is_what_the_table_says(row, two, labels):
    one, other = somebody(), somebody(labels=labels, **two)
    for name in heart.EFFECTS["base"]:
        assert other.truth[name] - one.truth[name] == pytest.approx(heart.EFFECTS[row].get(name, 0.0), abs=1e-12)
    shared = ("shift_x", "shift_y", "rotation", "oblong", "exposure", "dome")
    assert [one.truth[k] for k in shared] == [other.truth[k] for k in shared], "a counterfactual pair"


def test_age_and_bmi_act_per_decade_and_per_five_units():
    for row, name, values in (("age", "age", heart.CATEGORIES["age"][1:]), ("bmi", "bmi", heart.CATEGORIES["bmi"])):
        drawn = [somebody(**{name: v}) for v in values]
        steps = np.diff([d.age_years / 10 if row == "age" else d.bmi / 5 for d in drawn])
        assert (steps > 0).all()
        for parameter, effect in heart.EFFECTS[row].items():
            assert np.diff([d.truth[parameter] for d in drawn]) == pytest.approx(effect * steps, abs=1e-9), parameter


def test_interaction_acts_on_failing_women_only_and_linearly():
    for sex, labels in itertools.product(("Male", "Female"), (HEALTHY, FAILING)):
        off, half, full = (somebody(labels=labels, interaction=i, sex=sex).truth["cavity_radius"] for i in (0, 0.5, 1))
        if labels is FAILING and sex == "Female":
            assert full - off == pytest.approx(2 * (half - off)) and abs(full - off) > 0.5
        elif labels is HEALTHY:
            assert off == half == full


def test_categories_and_years_agree():
    for n, (age, bmi) in enumerate(itertools.product(heart.CATEGORIES["age"], heart.CATEGORIES["bmi"])):
        drawn = somebody(f"p{n}", age=age, bmi=bmi)
        low, high = heart.BMI_RANGE[bmi]
        assert low <= drawn.bmi <= high and drawn.attributes["age"] == age
        assert (
            heart.AGE_YEARS[heart.AGE_BINS.index(age)][0]
            <= drawn.age_years
            <= heart.AGE_YEARS[heart.AGE_BINS.index(age)][1]
        )


@pytest.mark.parametrize(
    "attributes, labels, options",
    [
        (SOMEBODY | {"bmi": "unknown"}, HEALTHY, {}),
        (SOMEBODY | {"race": "White"}, HEALTHY, {}),
        ({"age": "40-60"}, HEALTHY, {}),
        (SOMEBODY, {}, {}),
        (SOMEBODY, {"heart failure": 2}, {}),
        (SOMEBODY, HEALTHY, {"interaction": 1.5}),
    ],
)
def test_what_is_unknown_raises(attributes, labels, options):
    with pytest.raises(ValueError):
        heart.draw("s", attributes, labels, seed=0, **options)


@pytest.mark.parametrize(
    "options", [{"size": 16}, {"size": 513}, {"view": "two_chamber"}, {"level": 1.0}, {"level": -0.9}]
)
def test_impossible_pictures_raise(options):
    with pytest.raises(ValueError, match="not possible"):
        heart.render(somebody(), **options)


# --- masks and the truth ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("labels", [HEALTHY, FAILING])
def test_masks_have_the_true_areas(labels):
    drawn = somebody(labels=labels)
    for time, level in itertools.product((0.0, heart.SYSTOLE, 0.6), (0.0, 0.5)):
        inner, outer = heart.radii(drawn.truth, time, level)
        found = heart.measure(heart.render(drawn, time, level, size=256)[1])
        assert found["cavity_area"] == pytest.approx(np.pi * inner**2, rel=0.02)
        assert found["myocardium_area"] == pytest.approx(np.pi * (outer**2 - inner**2), rel=0.02)
        assert found["wall_thickness"] == pytest.approx(outer - inner, rel=0.03)
    ed = heart.measure(heart.render(drawn, size=256)[1])
    assert ed["wall_thickness"] == pytest.approx(drawn.truth["wall_thickness"], rel=0.03)
    assert ed["cavity_area"] == pytest.approx(np.pi * drawn.truth["cavity_radius"] ** 2, rel=0.02)


@pytest.mark.parametrize("view", heart.VIEWS)
@pytest.mark.parametrize("labels", [HEALTHY, FAILING])
def test_masks_imply_the_true_ejection_fraction(view, labels):
    for subject in "abc":
        drawn = somebody(subject, labels)
        _, (ed, es) = heart.pair(drawn, view, 256)
        assert heart.implied_ejection_fraction(ed, es, view) == pytest.approx(
            drawn.truth["ejection_fraction"], abs=0.015
        )
    stacks = [heart.volume(drawn, phase, size=128)[1] for phase in ("ED", "ES")]
    assert heart.implied_ejection_fraction(*stacks) == pytest.approx(drawn.truth["ejection_fraction"], abs=0.015)


def test_implied_ejection_fraction_by_hand():
    ed, es = np.zeros((8, 8), int), np.zeros((8, 8), int)
    ed[:4, :4], es[:2, :4] = heart.CAVITY, heart.CAVITY  # 16 and 8 pixels
    ed[6], es[6] = heart.MYOCARDIUM, heart.RIGHT  # do not count
    assert heart.implied_ejection_fraction(ed, es) == 0.5
    assert heart.implied_ejection_fraction(ed, es, "four_chamber") == 0.75
    for wrong in ((np.zeros((8, 8)), es), (ed, es[:4])):
        with pytest.raises(ValueError, match="no ejection fraction"):
            heart.implied_ejection_fraction(*wrong)
    four = np.zeros((4, 4), int)
    four[:2, :2] = heart.CAVITY
    assert heart.measure(four, field=8.0)["cavity_area"] == 16.0 and heart.measure(four)["wall_thickness"] == 0.0


@settings(max_examples=20)
@given(
    st.sampled_from(heart.VIEWS),
    st.floats(0, 0.99),
    st.floats(heart.BASE_LEVEL, heart.APEX_LEVEL),
    st.integers(0, 50),
    st.booleans(),
)
def test_masks_are_one_heart(view, time, level, subject, failing):
    """Only known values; the cavity touches myocardium and never the right ventricle or the frame."""
    drawn = somebody(str(subject), FAILING if failing else HEALTHY)
    image, mask = heart.render(drawn, time, level, view)
    assert image.shape == mask.shape == (64, 64) and image.dtype == mask.dtype == np.uint8
    assert {0, 1, 2} <= set(np.unique(mask)) <= {0, 1, 2, 3}
    cavity = np.pad(mask == heart.CAVITY, 1)
    around = np.zeros_like(cavity)
    for shift, axis in itertools.product((-1, 1), (0, 1)):
        around |= np.roll(cavity, shift, axis)
    ring = mask[(around & ~cavity)[1:-1, 1:-1]]
    assert not (ring == heart.RIGHT).any() and (view == "four_chamber" or (ring == heart.MYOCARDIUM).all())
    assert not (mask[0] + mask[-1] + mask[:, 0] + mask[:, -1]).any()


# --- cine, stack and sizes --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("frames", [4, 12, 25])
def test_cine_goes_from_ed_to_es_and_back(frames):
    drawn = somebody()
    images, masks = heart.cine(drawn, frames)
    areas = [heart.measure(m)["cavity_area"] for m in masks]
    es = heart.systole(frames)
    assert images.shape == masks.shape == (frames, 64, 64)
    assert (np.diff(areas[: es + 1]) < 0).all() and (np.diff(areas[es:]) > 0).all() and max(areas) == areas[0]
    ends = heart.pair(drawn)
    for n, frame in ((0, 0), (1, es)):
        assert np.array_equal(images[frame], ends[0][n]) and np.array_equal(masks[frame], ends[1][n])
    still = images.astype(float).std(axis=0)
    assert still[:12, 40:].mean() < 8 < still[masks.min(0) != masks.max(0)].mean(), "the heart beats, the lung does not"
    with pytest.raises(ValueError, match="4 frames"):
        heart.systole(3)


def test_stack_tapers_to_the_apex():
    images, masks = heart.volume(somebody(), "ED", slices=8)
    areas = {k: [heart.measure(m)[k] for m in masks] for k in ("cavity_area", "right_area")}
    widest = int(np.argmax(areas["cavity_area"]))
    assert (
        images.shape == (8, 64, 64) and 1 <= widest <= 4 and min(areas["cavity_area"]) == areas["cavity_area"][-1] > 0
    )
    assert areas["right_area"][0] > 0 and areas["right_area"][-1] == 0, "the right ventricle does not reach the apex"
    smaller = heart.volume(somebody(), "ES", slices=8)[1]
    assert all((a == 1).sum() > (b == 1).sum() for a, b in zip(masks, smaller, strict=True))


@pytest.mark.parametrize("view", heart.VIEWS)
def test_same_anatomy_at_every_size(view):
    images = {n: heart.render(somebody(), 0.2, 0.0, view, n) for n in (32, 64, 256)}
    small = {n: im.reshape(32, n // 32, 32, n // 32).mean((1, 3)) for n, (im, _) in images.items()}
    for n in (32, 256):
        assert np.corrcoef(small[n].ravel(), small[64].ravel())[0, 1] > 0.97
        shares = [np.bincount(images[s][1].ravel(), minlength=4) / s**2 for s in (n, 64)]
        assert np.abs(np.subtract(*shares)).max() < 0.01


# --- what a picture must show -----------------------------------------------------------------------------------------
def test_blood_is_bright_muscle_and_lung_are_dark():
    for n, (view, labels) in enumerate(itertools.product(heart.VIEWS, (HEALTHY, FAILING))):
        drawn = somebody(f"q{n}", labels)
        image, mask = heart.render(drawn, view=view, size=128)
        cavity, muscle, right = (float(np.median(image[mask == v])) / 255 / drawn.truth["exposure"] for v in (1, 2, 3))
        assert cavity - muscle == pytest.approx(drawn.truth["contrast"], abs=0.06) and right - muscle > 0.2
        assert image[20:40, 100:].mean() / 255 < 0.15, "lung beside the heart"


def test_chest_fat_follows_bmi():
    thin, thick = (heart.render(somebody(bmi=b), size=128)[0] for b in ("normal", "obese"))
    assert (thick > 180).sum() > (thin > 180).sum() + 200


def test_heart_failure_shows_in_most_masks_but_not_in_all():
    """The label is in the picture, and a classifier of it has something left to learn: implied ejection fractions of
    the two groups overlap a little (without interaction)."""
    cells = list(itertools.product(heart.CATEGORIES["age"][1:], heart.CATEGORIES["sex"], heart.CATEGORIES["bmi"]))
    implied = {failing: [] for failing in (0, 1)}
    for n, (cell, failing) in enumerate(itertools.product(cells, implied)):
        drawn = heart.draw(
            f"r{n}", dict(zip(("age", "sex", "bmi"), cell, strict=True)), {"heart failure": failing}, seed=0
        )
        implied[failing].append(heart.implied_ejection_fraction(*heart.pair(drawn)[1]))
    failing = [0] * len(implied[0]) + [1] * len(implied[1])
    assert 0.85 < roc_auc_score(failing, [-v for v in implied[0] + implied[1]]) < 0.99
