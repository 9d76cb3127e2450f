"""Phantoms: determinism, the declared distribution and effects, labels that show, and measurements that agree with the truth."""
import ast
import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compdiff import estimate, manifests, phantoms

AXES = ("age", "sex", "race")
MODALITIES = ("chest", "fundus")
HEALTHY = {"chest": {"No Finding": 1},
           "fundus": {"glaucoma": 0, "vision_loss": "normal vision", "cup_disc": "normal cup-disc ratio",
                      "refraction": "emmetropia"}}
SOMEBODY = {"age": "40-60", "sex": "Male", "race": "White"}


def cell(modality: str, *indices: int) -> dict[str, str]:
    return {k: phantoms.CATEGORIES[modality][k][i] for k, i in zip(AXES, indices)}


def declared_joint(modality: str) -> np.ndarray:
    """p[age, sex, race] of the manifest."""
    manifest = manifests.load_manifest(modality)
    return np.array([manifest.joint[c] for c in manifest.schema.cells()]).reshape([len(a.categories) for a in manifest.schema.attributes])


def population(modality: str, n: int) -> list[phantoms.Phantom]:
    """n subjects of the declared joint distribution."""
    joint = declared_joint(modality)
    at = np.random.default_rng(0).choice(joint.size, size=n, p=joint.ravel())
    return [phantoms.draw(modality, f"p{i}", cell(modality, *np.unravel_index(c, joint.shape)), seed=3) for i, c in enumerate(at)]


def fingerprint(subjects: list[str]) -> dict[str, str]:
    return {f"{m}/{s}": hashlib.sha256(phantoms.draw(m, s, SOMEBODY, seed=7).image.tobytes()).hexdigest()
            for m in MODALITIES for s in subjects}


def test_same_in_another_process_and_order():
    here = fingerprint(["a", "b", "c"])
    assert fingerprint(["c", "a", "b"]) == here
    assert len(set(here.values())) == 6
    code = "import sys; sys.path.insert(0, 'tests'); import test_phantoms as t; print(t.fingerprint(['b', 'c', 'a']))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert ast.literal_eval(there.stdout) == here
    assert not np.array_equal(*(phantoms.draw("chest", "a", SOMEBODY, seed=s).image for s in (7, 8)))


@pytest.mark.parametrize("modality, shape", [("chest", (5, 2, 4)), ("fundus", (5, 2, 3))])
def test_joint_is_a_distribution(modality, shape):
    joint = declared_joint(modality)
    assert joint.shape == shape == tuple(len(phantoms.CATEGORIES[modality][k]) for k in AXES)
    assert joint.sum() == pytest.approx(1, abs=1e-12) and joint.min() > 0
    assert .02 <= joint[0].sum() <= .03
    held_out = manifests.load_manifest(modality).held_out
    assert len(set(held_out)) == len(held_out) and max(joint[c] for c in held_out) <= .005


@pytest.mark.parametrize("modality, age, sex, race, share", [
    ("chest", 3, 0, 0, .16), ("chest", 2, 0, 0, .14), ("chest", 1, 0, 0, .04), ("chest", 2, 1, 3, .02), ("chest", 2, 0, 3, .015),
    ("chest", 2, 0, 2, .005), ("chest", 2, 1, 2, .005), ("fundus", 3, 1, 0, .245), ("fundus", 3, 0, 0, .17),
    ("fundus", 1, 1, 0, .05), ("fundus", 4, 1, 0, .04), ("fundus", 4, 0, 0, .03), ("fundus", 2, 0, 2, .015),
    ("fundus", 4, 0, 1, .005)])
def test_joint_has_the_published_shares(modality, age, sex, race, share):
    assert declared_joint(modality)[age, sex, race] == share


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_effect_names_a_parameter(modality):
    table = phantoms.EFFECTS[modality]
    for row, effects in table.items():
        assert set(effects) <= set(table["base"]), row
        if row in ("race", "sex x race", "age x race"):                       # race never touches anatomy
            assert all(k.startswith("grid_") or k == "border" for k in effects), row
            assert {len(v) for v in effects.values()} == {len(phantoms.CATEGORIES[modality]["race"])}
    assert {r[6:] for r in table if r.startswith("label:")} == set(phantoms.LABELS[modality]) - {"No Finding"}


@pytest.mark.parametrize("modality", MODALITIES)
def test_age_is_monotone_and_inside_its_bin(modality):
    for subject in "abcdefgh":
        drawn = [phantoms.draw(modality, subject, SOMEBODY | {"age": a}, seed=0, labels=HEALTHY[modality]) for a in phantoms.AGES]
        assert all(low <= p.age_years <= high for p, (low, high) in zip(drawn, phantoms.AGE_YEARS))
        for name, slope in phantoms.EFFECTS[modality]["age"].items():
            assert np.all(np.diff([p.truth[name] for p in drawn]) * np.sign(slope) > 0)
            assert phantoms.EFFECTS[modality]["scatter"][name] < abs(slope)
    position = [phantoms.age_position(a) for a in np.arange(0, 100, .5)]
    assert np.all(np.diff(position) > 0) and np.diff(position).max() < .06     # increasing, without jumps


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("pair", list(itertools.combinations(AXES, 2)))
def test_effects_add_exactly_unless_interaction_is_on(modality, pair):
    def second_difference(interaction: float) -> dict[str, float]:
        """f(1, 1) - f(1, 0) - f(0, 1) + f(0, 0) over the two attributes of the pair."""
        total = {}
        for i, j in itertools.product((0, 1), repeat=2):
            steps = dict(zip(pair, (i, j)))
            who = cell(modality, 1 + 2 * steps.get("age", 0), steps.get("sex", 0), steps.get("race", 0))
            truth = phantoms.draw(modality, "s", who, seed=0, interaction=interaction, labels=HEALTHY[modality]).truth
            for k in phantoms.EFFECTS[modality]["base"]:
                total[k] = total.get(k, 0) + (1 if i == j else -1) * truth[k]
        return total
    off, half, full = (second_difference(v) for v in (0., .5, 1.))
    assert max(abs(v) for v in off.values()) < 1e-12
    moved = {k for k, v in full.items() if abs(v) > 1e-3}
    assert moved and moved <= set(phantoms.EFFECTS[modality][" x ".join(pair)])
    assert half == pytest.approx({k: v / 2 for k, v in full.items()}, abs=1e-12)


def test_attributes_leave_the_individual_alone():
    shared = ("shift_x", "shift_y", "rotation", "exposure", "offset")
    a, b = (phantoms.draw("chest", "s", cell("chest", *c), seed=0, labels=HEALTHY["chest"]) for c in ((1, 0, 0), (4, 1, 3)))
    assert [a.truth[k] for k in shared] == [b.truth[k] for k in shared]
    assert abs(a.image.astype(int) - b.image).mean() > 5


def difference(modality: str, subject: str, labels: dict) -> tuple[np.ndarray, dict]:
    """Image with the labels minus the healthy image of the same subject, in grey levels [64, 64], and the truth."""
    with_, without = (phantoms.draw(modality, subject, SOMEBODY, seed=1, labels=v) for v in (labels, HEALTHY[modality]))
    return with_.image.astype(float) - without.image, with_.truth


@pytest.mark.parametrize("subject", list("abcd"))
def test_chest_findings_show_where_declared(subject):
    x, y = np.meshgrid((np.arange(64) + .5) / 32 - 1, (np.arange(64) + .5) / 32 - 1)
    regions = {"Cardiomegaly": lambda t: (abs(x - .15) < .6) & (abs(y - .4) < .45),
               "Pleural Effusion": lambda t: (x * t["effusion_side"] > 0) & (y > .1),
               "Consolidation": lambda t: np.hypot(x - .42 * t["consolidation_side"], y - t["consolidation_y"]) < .55,
               "Pneumothorax": lambda t: (x * t["pneumothorax_side"] > -.1) & (y < .75)}
    for name, region in regions.items():
        change, truth = difference("chest", subject, {"No Finding": 0} | {k: int(k == name) for k in regions})
        inside = region(truth)
        assert (abs(change) * inside).sum() > .95 * abs(change).sum(), name
        assert (abs(change) > 10).sum() > 40, name
        strong = change[abs(change) > 15]
        assert np.median(strong) < 0 if name == "Pneumothorax" else np.median(strong) > 0, name
    widened = difference("chest", subject, {"Cardiomegaly": 1})[1]["heart_thorax_ratio"]
    healthy = difference("chest", subject, HEALTHY["chest"])[1]["heart_thorax_ratio"]
    assert widened - healthy == pytest.approx(phantoms.EFFECTS["chest"]["label:Cardiomegaly"]["heart_thorax_ratio"][1])


@pytest.mark.parametrize("subject", list("abcd"))
def test_fundus_conditions_show_where_declared(subject):
    x, y = np.meshgrid((np.arange(64) + .5) / 32 - 1, (np.arange(64) + .5) / 32 - 1)
    change, truth = difference("fundus", subject, HEALTHY["fundus"] | {"cup_disc": "abnormal cup-disc ratio"})
    disc = np.hypot(x - truth["shift_x"] - .5 * truth["eye"], y - truth["shift_y"]) < .33
    assert (abs(change) * disc).sum() > .99 * abs(change).sum() and change[disc].max() > 25
    change, _ = difference("fundus", subject, HEALTHY["fundus"] | {"glaucoma": 1})
    assert change[disc].max() > 25
    grades = phantoms.LABELS["fundus"]["vision_loss"]
    darkening = [difference("fundus", subject, HEALTHY["fundus"] | {"vision_loss": v})[0] for v in grades]
    centre, rim = np.hypot(x, y) < .3, (np.hypot(x, y) > .85) & (np.maximum(abs(x), abs(y)) < .85)
    assert np.all(np.diff([d[rim].mean() for d in darkening]) < -3) and all(abs(d[centre]).max() <= 1 for d in darkening)
    for refraction in phantoms.LABELS["fundus"]["refraction"][1:]:
        assert abs(difference("fundus", subject, HEALTHY["fundus"] | {"refraction": refraction})[0]).mean() > 2


def test_label_logic():
    for phantom in population("chest", 200):
        assert phantom.labels["No Finding"] == int(not any(v for k, v in phantom.labels.items() if k != "No Finding"))
        assert set(phantom.labels) == set(phantoms.LABELS["chest"])
    shares = np.mean([list(p.labels.values()) for p in population("chest", 400)], axis=0)
    assert np.all(shares > .04) and .4 < shares[0] < .75
    for phantom in population("fundus", 200):
        assert all(v in phantoms.LABELS["fundus"][k] for k, v in phantom.labels.items()) and len(phantom.labels) == 4
    assert phantoms.draw("chest", "s", SOMEBODY, seed=0, labels={"Consolidation": 1}).labels["No Finding"] == 0


@pytest.mark.parametrize("modality, attributes, options", [
    ("brain", SOMEBODY, {}), ("chest", SOMEBODY | {"race": "Other"}, {}), ("fundus", SOMEBODY | {"race": "Hispanic"}, {}),
    ("chest", {"age": "40-60", "sex": "Male"}, {}), ("chest", SOMEBODY, {"labels": {"Oedema": 1}}),
    ("chest", SOMEBODY, {"size": 16}), ("chest", SOMEBODY, {"labels": {"No Finding": 1, "Consolidation": 1}}),
    ("chest", SOMEBODY, {"interaction": 2.}),
    ("fundus", SOMEBODY, {"labels": {"vision_loss": "blind"}})])
def test_what_is_unknown_raises(modality, attributes, options):
    with pytest.raises(ValueError):
        phantoms.draw(modality, "s", attributes, seed=0, **options)


@pytest.mark.parametrize("modality", MODALITIES)
def test_same_anatomy_at_every_size(modality):
    for subject in "abc":
        images = {n: phantoms.draw(modality, subject, SOMEBODY, seed=2, size=n).image.astype(float) for n in (32, 64, 128)}
        small = {n: v.reshape(32, n // 32, 32, n // 32).mean((1, 3)) for n, v in images.items()}
        for n in (32, 128):
            assert abs(small[n] - small[64]).mean() < 6
            assert np.corrcoef(small[n].ravel(), small[64].ravel())[0, 1] > .97


@pytest.mark.parametrize("modality, floors", [
    ("chest", {"heart_thorax_ratio": .85, "diaphragm": .7, "breast_shadow": .8, "rib_contrast": .8, "grid_vertical": .8, "grid_horizontal": .8}),
    ("fundus", {"cup_disc_ratio": .75, "gradient": .9, "grid_vertical": .9, "grid_rising": .9, "grid_falling": .9})])
def test_measurements_agree_with_the_truth(modality, floors):
    drawn = population(modality, 300)
    measured = [estimate.parameters(modality, p.image) for p in drawn]
    for name, floor in floors.items():
        r = np.corrcoef([m[name] for m in measured], [p.truth[name] for p in drawn])[0, 1]
        print(f"{modality} {name}: r = {r:.3f}")
        assert r >= floor, name
    for odd in (np.zeros((64, 64)), np.ones((64, 64)), np.full((64, 64), np.nan), np.random.default_rng(0).random((64, 64)),
                np.full((128, 128), 200, np.uint8)):
        assert np.all(np.isfinite(list(estimate.parameters(modality, odd).values())))
