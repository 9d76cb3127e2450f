"""06: quality rows, equity, differences and their intervals against plain computations."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from panel import CELLS, HELD, SCHEMA, fake, make_reference, oracle, people, value
from scipy import linalg

from compdiff import alignment, clouds, controls, evaluate, frames, metrics, paired
from compdiff.attributes import AGE, SEX


@pytest.fixture(scope="module")
def ref():
    return make_reference()


@pytest.fixture(scope="module")
def train():
    return people(120, 1, without=HELD)


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


def test_pairs_of_image_and_request_stay_together_in_every_matched_group(ref):
    """An image that is its own original but for a little noise is as near in the whole as in its groups: no inequality
    where everybody is treated alike. Rows drawn apart on both sides would keep the pairs of the smallest group only."""
    near = replace(fake(ref), features=ref.features + 0.1 * np.random.default_rng(0).normal(size=ref.features.shape))
    found = {r["group"]: r["value"] for r in evaluate.matched(near, ref, 0)}
    assert max(found.values()) < 1.5 * min(found.values())
    apart = metrics.matched_fid(near.features, ref.features, ref.rows["sex"].value_counts().min(), 10, 0).mean()
    assert apart > 3 * max(found.values())
    with pytest.raises(ValueError, match="3 and 4 rows are not paired"):
        metrics.matched_fid(np.zeros((3, 2)), np.zeros((4, 2)), 2, 1, 0, paired=True)


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
