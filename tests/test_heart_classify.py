"""Classifiers of the five inputs: shapes, sources, repeats that differ, folds that keep patients apart."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from compdiff import cardiac, cardiac_cohorts, config, heart_classify, record
from compdiff.heart_classify import Run, Synthetic
from compdiff.problems import DataError

LABEL = "heart failure"
CONFIG = config.settings("smoke", "cardiac", hearts=30, test_hearts=10, prevalence=0.4, size=32)


@pytest.fixture(scope="module")
def studies():
    return cardiac_cohorts.studies("cardiac", "", CONFIG)


@pytest.fixture(scope="module")
def folds(studies):
    return cardiac_cohorts.folds(studies.table, LABEL, 3, ("sex",), seed=0)


@pytest.fixture(scope="module")
def synthetic():
    made = cardiac.phantom_studies(12, "made", seed=9, prevalence=0.5)
    return {"all": Synthetic(made.table.assign(donor=-1), made.images("stacked", 32))}  # made from nobody's mask


def test_every_input_is_trained_and_what_cannot_be_is_named(studies):
    todo, absent = heart_classify.runs(studies, CONFIG)
    assert {r.input for r in todo} == set(cardiac.INPUTS)
    assert {r.source for r in todo if r.input == "cine"} == {"real"} and "cine, synthetic" in absent
    of = lambda name: sum(r.input == name and r.source == "real" and r.sampling == "weighted" for r in todo)  # noqa: E731
    assert of("stacked") == CONFIG.heart.repeats and of("volume") == CONFIG.heart.other_repeats
    assert ("synthetic", "weighted") not in {(r.source, r.sampling) for r in todo} and "even" in absent["synthetic, weighted"]
    drawn = replace(CONFIG, heart=replace(CONFIG.heart, augment_with="random"))
    assert ("synthetic", "weighted") in {(r.source, r.sampling) for r in heart_classify.runs(studies, drawn)[0]}
    less = replace(studies, missing={"cine": "no frames"})
    todo, absent = heart_classify.runs(less, CONFIG)
    assert "cine" not in {r.input for r in todo} and absent["cine"] == "no frames"


@pytest.mark.parametrize("name, dims", [("stacked", 2), ("slice", 2), ("frame", 2), ("cine", 3), ("volume", 3)])
def test_networks_of_every_input(studies, name, dims):
    images, y = studies.images(name, 32, range(8)), np.array([0, 1] * 4)
    net = heart_classify.fit(images, y, np.ones(8), 1, seed=0)
    first = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    assert isinstance(first, torch.nn.Conv3d) == (dims == 3) and first.in_channels == (3 if name == "stacked" else 1)
    p = heart_classify.predict(net, images, batch=3)
    assert p.shape == (8,) and ((0 < p) & (p < 1)).all()


def test_brightness_and_contrast_do_not_reach_the_network():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 100, (2, 16, 16), dtype=np.uint8)
    torch.testing.assert_close(heart_classify.prepare(image), heart_classify.prepare(image * 2 + 20))
    assert heart_classify.prepare(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 3, 16, 16)


def test_the_papers_network_takes_a_short_series():
    x = heart_classify.prepare(np.random.default_rng(0).integers(0, 255, (2, 8, 32, 32), dtype=np.uint8), full=True)
    net = heart_classify.build(3, 1, full=True).eval()
    with torch.no_grad():
        assert x.shape == (2, 1, 32, 32, 32) and net(x).shape == (2, 1)


def test_it_learns_what_can_be_seen():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 48)
    images = rng.integers(0, 60, (48, 32, 32), dtype=np.uint8)
    images[y == 1, 8:24, 8:24] += 120
    net = heart_classify.fit(images[:32], y[:32], np.ones(32), 40, seed=0)
    assert ((heart_classify.predict(net, images[32:]) > 0.5) == y[32:]).mean() > 0.9
    with pytest.raises(ValueError, match="both labels"):
        heart_classify.fit(images[y == 1], y[y == 1], np.ones((y == 1).sum()), 1, seed=0)


def test_seeds_decide_everything_random():
    images, y = np.random.default_rng(0).integers(0, 255, (8, 16, 16), dtype=np.uint8), np.array([0, 1] * 4)
    state = torch.get_rng_state()
    first, again, other = (heart_classify.predict(heart_classify.fit(images, y, np.ones(8), 3, s), images) for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.allclose(first, other) and torch.equal(state, torch.get_rng_state())


def test_sources_hold_what_they_say(studies, folds, synthetic):
    real = studies.images("frame", 32)
    for source, n in (("real", len(folds[0].train)), ("synthetic", 12), ("real + synthetic", len(folds[0].train) + 12)):
        x, table = heart_classify.training_images(studies, real, folds[0], synthetic, Run("frame", source, "as found", 0))
        assert len(x) == n == len(table) and table[f"y_{LABEL}"].isin([0, 1]).all()
    assert np.array_equal(x[-12:], synthetic["all"].images[..., 1]), "frame = ES"
    assert np.array_equal(synthetic["all"].input("slice"), synthetic["all"].images[..., 0]), "slice = ED"
    for part in (folds[0].val, folds[0].test):
        leak = {"all": replace(synthetic["all"], table=synthetic["all"].table.assign(donor=part[0]))}
        with pytest.raises(ValueError, match="1 patients who validate or test"):
            heart_classify.training_images(studies, real, folds[0], leak, Run("frame", "synthetic", "as found", 0))
    with pytest.raises(DataError, match="mid slice at ED and ES"):
        synthetic["all"].input("cine")


def test_prevalence_takes_the_largest_part_with_that_share():
    y = np.r_[np.ones(30, int), np.zeros(70, int)]
    for share, ones, zeros in ((0.0, 30, 70), (0.25, 23, 70), (0.1, 8, 70), (0.5, 30, 30)):
        rows = heart_classify.at_prevalence(y, share, seed=0)
        assert (y[rows].sum(), (y[rows] == 0).sum()) == (ones, zeros) and len(set(rows)) == len(rows)
    assert np.array_equal(rows, heart_classify.at_prevalence(y, 0.5, seed=0))
    with pytest.raises(ValueError, match="below 1"):
        heart_classify.at_prevalence(y, 1.0, seed=0)


def test_a_run_is_read_back_and_repeats_differ(studies, folds, synthetic, tmp_path):
    images = studies.images("stacked", 32)

    def go(run, made=synthetic, c=CONFIG):
        return heart_classify.carry_out(run, studies, folds, made, images, tmp_path, c, seed=0)

    run = Run("stacked", "real + synthetic", "weighted", 0)
    first, file = go(run), tmp_path / run.folder / "predictions.csv"
    stamp = file.stat().st_mtime_ns
    assert go(run).equals(first) and file.stat().st_mtime_ns == stamp
    assert set(first["part"]) == {"val", "test"} and set(first["fold"]) == {0}
    repeat = go(replace(run, repeat=1))
    code = json.loads((file.parent / "run.json").read_text())["inputs"]["code"]
    assert code["compdiff/cardiac.py"] == record.source_sha256(Path(cardiac.__file__)), "what it calls counts, too"
    assert set(repeat["fold"]) == {0} and not np.allclose(*(f[f["part"] == "test"]["p"] for f in (first, repeat)))
    other = {"all": Synthetic(synthetic["all"].table, synthetic["all"].images[::-1])}
    go(run, other)
    assert file.stat().st_mtime_ns != stamp, "other synthetic images, another classifier"
    real = replace(run, source="real")
    go(real)
    stamp = (tmp_path / real.folder / "predictions.csv").stat().st_mtime_ns
    go(real, other)
    assert (tmp_path / real.folder / "predictions.csv").stat().st_mtime_ns == stamp, "real images do not care"
    rows, y, p = heart_classify.pooled([first, repeat])
    assert len(rows) == 10 and p.shape == (2, 10) and np.array_equal(y, studies.table[f"y_{LABEL}"].to_numpy()[rows])


def test_without_a_test_cohort_predictions_are_pooled_out_of_fold(tmp_path):
    alone = cardiac.phantom_studies(18, "train", seed=0, prevalence=0.5)
    folds = cardiac_cohorts.folds(alone.table, LABEL, 3, ("sex",), seed=0)
    run = Run("slice", "real", "as found", 0)
    found = heart_classify.carry_out(run, alone, folds, {}, alone.images("slice", 32), tmp_path, CONFIG, 0)
    test = found[found["part"] == "test"]
    assert sorted(test["row"]) == list(range(18)) and set(test["fold"]) == {0, 1, 2}
    assert all(row in folds[f].test for f, row in zip(test["fold"], test["row"], strict=True))
    rows, y, p = heart_classify.pooled([found])
    assert rows.tolist() == list(range(18)) and p.shape == (1, 18)
    with pytest.raises(ValueError, match="same patients"):
        heart_classify.pooled([found, found[found["fold"] != 2]])
    with pytest.raises(ValueError, match="same patients"):
        heart_classify.pooled([pd.concat([found, found])])


def test_thresholds_come_from_the_networks_own_validation_patients():
    y = np.repeat([0, 1], 15)
    low, high = np.linspace(0.6, 0.7, 15), np.linspace(0.8, 0.9, 15)  # ranks well, calls everybody ill at 0.5
    val = pd.DataFrame({"y": y, "p": np.r_[low, high]})
    assert heart_classify.threshold(val) == pytest.approx(0.75)
    noisy = val.assign(y=np.where(np.arange(30) == 20, 0, y))
    best = max(balanced_accuracy_score(noisy["y"], noisy["p"] >= c) for c in np.linspace(0, 1, 1001))
    assert balanced_accuracy_score(noisy["y"], noisy["p"] >= heart_classify.threshold(noisy)) == pytest.approx(best)
    for few in (val.iloc[8:27], val[val["y"] == 1], val.assign(p=0.3)):
        assert heart_classify.threshold(few) == 0.5
    test = pd.DataFrame({"fold": [1, 0, 1], "part": "test", "row": [7, 5, 6], "y": 0, "p": 0.0})
    parts = [val.assign(fold=0, part="val", row=-1), val.assign(fold=1, part="val", row=-1, p=val["p"] - 0.5), test]
    assert heart_classify.cuts([pd.concat(parts)])[0] == pytest.approx([0.75, 0.25, 0.25])


def test_folds_whose_patients_the_generator_has_seen_are_left_out(studies, folds):
    (own,) = cardiac_cohorts.generators(folds)
    assert all(set(f.val) & set(own.train) for f in folds if f is not own), "it learnt from who validates there"
    assert heart_classify.taken(folds) == [own]
    alone = cardiac_cohorts.folds(studies.table.drop(columns="cohort"), LABEL, 3, ("sex",), seed=0)
    assert heart_classify.taken(alone) == alone


class Counter(torch.nn.Module):
    """A network that learns nothing and counts the bright pixels of every picture that it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x):
        self.seen += (x > 0).flatten(1).sum(1).tolist() if self.training else []
        return self.weight * x.flatten(1)[:, :1]


@pytest.mark.parametrize("clip, most", [(0.01, 1), (0.5, 4.5), (1.0, 9)])
def test_drawn_shares_of_several_sensitive_attributes(clip, most, tmp_path, monkeypatch):
    c = config.settings("smoke", "cardiac", hearts=180, test_hearts=10, prevalence=0.4, size=32, sensitive=["sex", "age"],
                        classifier_steps=250, classifier_clip=clip)  # fmt: skip
    studies = cardiac_cohorts.studies("cardiac", "", c)
    folds = cardiac_cohorts.folds(studies.table, LABEL, 3, ("sex",), seed=0)
    who = (studies.table["sex"] + " " + studies.table["age"]).to_numpy()
    names, kind = np.unique(who, return_inverse=True)
    images = np.zeros((len(who), 32 * 32), dtype=np.uint8)
    for image, k in zip(images, kind, strict=True):
        image[: 100 * (k + 1)] = 255  # a group's pictures show its number, wherever they are shifted
    counter, images = Counter(), images.reshape(-1, 32, 32)
    monkeypatch.setattr(heart_classify, "build", lambda *_: counter)
    for sampling in heart_classify.SAMPLINGS:
        counter.seen.clear()
        heart_classify.carry_out(Run("slice", "real", sampling, 0), studies, folds, {}, images, tmp_path, c, seed=0)
        n = np.bincount(kind[folds[0].train], minlength=len(names))
        worth = n if sampling == "as found" else np.minimum(1, n / most)  # clipped: a row counts 1 / most at the most
        drawn = np.bincount(np.rint(np.array(counter.seen) / 100).astype(int) - 1, minlength=len(names))
        assert len(names) > 4 and n.min() < 4.5 < 9 < n.max() and drawn.sum() == 250 * heart_classify.BATCH
        np.testing.assert_allclose(drawn / drawn.sum(), worth / worth.sum(), atol=4 * 0.5 / drawn.sum() ** 0.5)
