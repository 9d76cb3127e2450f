"""Weighted statistics against scikit-learn, the patient bootstrap against a plain loop, intervals against scipy."""

import runpy

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy import stats as scipy_stats
from sklearn.metrics import average_precision_score, roc_auc_score

from compdiff import clouds, metrics, paths, stats


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 60),
    levels=st.integers(1, 12),
    dtype=st.sampled_from(["float32", "int64"]),
)
def test_weighted_auroc_and_auprc_are_scikit_learns_with_ties_and_integer_weights(seed, n, levels, dtype):
    rng = np.random.default_rng(seed)
    y, score = rng.integers(0, 2, n), rng.integers(0, levels, n) / levels
    y[:2] = 0, 1
    counts = rng.integers(0, 4, (3, n)).astype(dtype)
    counts[:, :2] = np.maximum(counts[:, :2], 1)
    aurocs, auprcs = stats.auroc(y, score, counts), stats.auprc(y, score, counts)
    for weight, auroc, auprc in zip(counts, aurocs, auprcs, strict=True):
        assert auroc == pytest.approx(roc_auc_score(y, score, sample_weight=weight), abs=1e-6)
        assert auprc == pytest.approx(average_precision_score(y, score, sample_weight=weight), abs=1e-6)
    assert stats.auroc(y, score)[0] == pytest.approx(roc_auc_score(y, score), abs=1e-12)


def test_a_long_count_matrix_is_computed_in_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    y, score, counts = rng.integers(0, 2, 50), rng.normal(size=50), rng.integers(0, 3, (40, 50))
    whole = stats.auroc(y, score, counts)
    monkeypatch.setattr(stats, "CHUNK", 150)
    np.testing.assert_array_equal(stats.auroc(y, score, counts), whole)


def test_absent_classes_give_nan_and_wrong_labels_raise():
    assert np.isnan(stats.auroc(np.ones(3), np.arange(3))[0])
    assert np.isnan(stats.auprc(np.zeros(3), np.arange(3))[0])
    for y, score in (([0, 2], [0, 1]), ([0, 1, 1], [0, 1]), ([0, 1], [np.nan, 1])):
        with pytest.raises(ValueError):
            stats.auroc(np.array(y), np.array(score, dtype=float))


def test_patient_bootstrap_is_a_plain_loop_over_the_same_draws():
    rng = np.random.default_rng(1)
    patients = rng.integers(0, 25, 80)
    y, score = rng.integers(0, 2, 80), rng.normal(size=80).round(1)
    resamples = stats.resample_patients(patients, 30, seed=7)
    names = np.unique(patients)
    expected = []
    for draw in resamples.draws:
        drawn = np.repeat(names, draw)
        assert len(drawn) == len(names)
        rows = np.concatenate(
            [np.flatnonzero(patients == p) for p in drawn]
        )  # every image of a patient, each time it is drawn
        expected.append((roc_auc_score(y[rows], score[rows]), score[rows].mean()))
    np.testing.assert_allclose(stats.auroc(y, score, resamples.counts()), [e[0] for e in expected], atol=1e-6)
    np.testing.assert_allclose(stats.mean(score, resamples.counts()), [e[1] for e in expected], atol=1e-6)


def test_draws_depend_on_the_seed_and_on_patients_but_not_on_row_order():
    patients = np.array(["p3", "p1", "p2", "p1", "p3"])
    a, b = stats.resample_patients(patients, 20, 0), stats.resample_patients(patients[::-1], 20, 0)
    np.testing.assert_array_equal(a.counts(), b.counts()[:, ::-1])
    assert (a.draws != stats.resample_patients(patients, 20, 1).draws).any()
    np.testing.assert_array_equal(a.counts()[:, 0], a.counts()[:, 4])
    mask = patients == "p1"
    np.testing.assert_array_equal(a.rows(mask).counts(), a.counts()[:, mask])


def test_intervals_of_correlated_images_are_wider_by_patient_than_by_image():
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(40), 6)
    values = np.repeat(rng.normal(size=40), 6)  # six identical images each
    by_patient = stats.mean(values, stats.resample_patients(patients, 400, 0).counts()).std()
    by_image = stats.mean(values, stats.resample_patients(np.arange(240), 400, 0).counts()).std()
    assert by_patient / by_image == pytest.approx(np.sqrt(6), rel=0.2)


def test_percentile_interval_leaves_undefined_resamples_out_up_to_a_tenth():
    draws = np.arange(1000.0)
    draws[:50] = np.nan
    interval = stats.percentile_interval(5, draws)
    assert (interval.lo, interval.hi) == pytest.approx(tuple(np.quantile(draws[50:], [0.025, 0.975])))
    draws[:150] = np.nan
    assert np.isnan(stats.percentile_interval(5, draws).lo)


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (0, 25), (3, 25), (25, 25)])
def test_jeffreys_is_scipys_beta(hits, trials):
    interval = stats.jeffreys(hits, trials)
    assert interval.value == pytest.approx((hits + 0.5) / (trials + 1))
    assert (interval.lo, interval.hi) == pytest.approx(scipy_stats.beta.interval(0.95, hits + 0.5, trials - hits + 0.5))
    with pytest.raises(ValueError):
        stats.jeffreys(trials + 1, trials)


def plain_kid_apart(a, b, pa, pb, cross=()):
    """Mean kernel over explicit lists of rows, pairs of one patient left out. cross: names of the rows of a and of b;
    the cross term leaves out pairs of one name, and is the mean over several such ways."""
    d = a.shape[1]

    def average(x, y, px, py, apart):
        values = [
            (u @ v / d + 1) ** 3
            for u, p in zip(x, px, strict=True)
            for v, q in zip(y, py, strict=True)
            if not (apart and p == q)
        ]
        return np.mean(values)

    crosses = [average(a, b, *names, True) for names in cross] or [average(a, b, pa, pb, False)]
    return average(a, a, pa, pa, True) + average(b, b, pb, pb, True) - 2 * np.mean(crosses)


@pytest.mark.parametrize("leave_out", ["paired", "patients", "rows", "nothing"])
def test_kid_bootstrap_is_a_plain_loop_over_the_same_draws(leave_out):
    rng = np.random.default_rng(3)
    pa = rng.permutation(np.repeat(np.arange(7), [1, 3, 2, 1, 1, 2, 2]))
    others = rng.permutation(np.repeat(np.arange(5), 2 if leave_out == "nothing" else [2, 3, 1, 4, 2]))
    pb = {"paired": pa, "patients": rng.permutation(pa)}.get(leave_out, others)
    a, b = rng.normal(size=(len(pa), 4)), rng.normal(size=(len(pb), 4)) + 0.5
    ra, rb = (stats.resample_patients(p, 6, 0 if p is not others else 1) for p in (pa, pb))
    more = () if leave_out == "paired" else (rb, leave_out)
    value, resampled = clouds.kid_bootstrap(a, b, ra, *more)
    for i in range(-1, 6):
        rows_a, rows_b = (np.repeat(np.arange(len(p)), r.draws[i][p] if i >= 0 else 1) for p, r in ((pa, ra), (pb, rb)))
        ways = {"nothing": [], "rows": [(pa, pa), (pb, pb)]}.get(leave_out, [(pa, pb)])
        cross = [(x[rows_a], y[rows_b]) for x, y in ways]
        expected = plain_kid_apart(a[rows_a], b[rows_b], pa[rows_a], pb[rows_b], cross)
        assert (resampled[i] if i >= 0 else value) == pytest.approx(expected, rel=1e-9)


def test_kid_of_the_same_requests_is_to_the_bit_what_it_was_before_controls_had_their_own_cross_term():
    """The formula of the committed results, written out for images that are alone with their patient."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(30, 6)), rng.normal(size=(30, 6)) + 0.2
    drawn = stats.resample_patients(np.arange(30), 50, 0)
    w, ones = np.vstack([np.ones(30), drawn.draws]), np.ones(30)

    def mean(k):
        pairs = (w @ ones) * (w @ ones) - (w * w) @ (ones * ones)
        return (((w @ k) * w).sum(1) - (w * w) @ np.diagonal(k)) / pairs

    # a product with a sparse identity orders memory as the module's does: without it sums differ in the last bit
    one = sparse.identity(30, format="csr")
    k = [one @ (one @ metrics.kernel(x, y).T).T for x, y in ((a, a), (b, b), (a, b))]
    expected = mean(k[0]) + mean(k[1]) - 2 * mean(k[2])
    value, resampled = clouds.kid_bootstrap(a, b, drawn)
    assert value == expected[0] and resampled.tolist() == expected[1:].tolist()


@pytest.mark.parametrize("images", [1, 2])
def test_kid_of_matched_cells_is_unbiased_without_the_pairs_of_one_request(images):
    """Two draws of one design, three patients in each of ten cells: the true distance is 0."""
    rng = np.random.default_rng(0)
    cell = np.repeat(np.arange(10), 3 * images)
    centres = 1.5 * rng.normal(size=(10, 4))
    pa = np.arange(len(cell)) // images
    pb = np.concatenate([rng.permutation(pa[cell == c]) for c in range(10)])  # other neighbours in a row's cell
    drawn = [stats.resample_patients(p, 1, i) for i, p in enumerate((pa, pb))]

    def draw(patients):
        return centres[cell] + rng.normal(size=(30, 4))[patients] + 0.5 * rng.normal(size=(len(cell), 4))

    found = {"rows": [], "nothing": []}
    for _ in range(500):
        a, b = draw(pa), draw(pb)
        for leave_out, values in found.items():
            values.append(clouds.kid_bootstrap(a, b, *drawn, leave_out)[0])
    mean, error = ({k: f(v) for k, v in found.items()} for f in (np.mean, lambda v: np.std(v) / np.sqrt(500)))
    assert abs(mean["rows"]) < 3 * error["rows"]
    assert mean["nothing"] < -10 * error["nothing"], "pairs of one cell are too many: below 0"


def test_kid_leaves_out_only_what_is_there():
    rng = np.random.default_rng(0)
    a, b, more = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)), rng.normal(size=(9, 3))
    one, other = (stats.resample_patients(np.arange(8), 5, seed) for seed in (0, 1))
    with pytest.raises(ValueError, match="same patients are drawn"):
        clouds.kid_bootstrap(a, b, one, other, "patients")
    with pytest.raises(ValueError, match="rows out of 8 x 9"):
        clouds.kid_bootstrap(a, more, one, stats.resample_patients(np.arange(9), 5, 1), "rows")
    with pytest.raises(ValueError, match="cells"):
        clouds.kid_bootstrap(a, b, one, other, "cells")


def test_kid_bootstrap_of_single_images_starts_from_kid_and_is_centred_on_it():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(60, 8)), rng.normal(size=(50, 8)) + 0.4
    ra, rb = stats.resample_patients(np.arange(60), 400, 0), stats.resample_patients(np.arange(50), 400, 1)
    value, resampled = clouds.kid_bootstrap(a, b, ra, rb)
    assert value == pytest.approx(metrics.kid(a, b), rel=1e-9)
    assert abs(resampled.mean() - value) < 4 * resampled.std() / 20
    naive = np.mean(
        [metrics.kid(np.repeat(a, i, axis=0), np.repeat(b, j, axis=0)) for i, j in zip(ra.draws, rb.draws, strict=True)]
    )
    assert naive - value > 4 * resampled.std() / 20  # what repeating images does to an unbiased estimator


def test_fid_interval_has_the_spread_of_fresh_samples():
    rng = np.random.default_rng(5)
    draw = lambda: (rng.normal(size=(80, 6)), 1.5 * rng.normal(size=(80, 6)) + 1)  # noqa: E731
    fresh = np.std([metrics.fid(*draw()) for _ in range(300)])
    widths = []
    for i in range(6):
        a, b = draw()
        interval = clouds.halves_interval(*clouds.fid_halves(a, b, np.arange(80), np.arange(100, 180), 60, seed=i))
        assert interval.value == metrics.fid(a, b)
        widths.append((interval.hi - interval.lo) / (2 * 1.96))
    assert np.mean(widths) == pytest.approx(fresh, rel=0.25)


def test_a_distance_does_not_reach_below_0_but_a_difference_does():
    halves = np.array([1.0, 3.0])  # standard deviation sqrt(2)
    assert clouds.halves_interval(1.0, halves).lo == 0
    found = clouds.halves_interval(1.0, halves, least=-np.inf)
    assert (found.lo, found.hi) == pytest.approx((1 - 12.706 * np.sqrt(2), 1 + 12.706 * np.sqrt(2)), abs=1e-3)  # t(1), 97.5 %


def test_fid_halves_hold_whole_patients_and_the_same_ones_on_both_sides(monkeypatch):
    seen = []
    monkeypatch.setattr(clouds, "fid", lambda a, b: seen.append((set(a[:, 0]), set(b[:, 0]))) or float(len(seen)))
    patients = np.repeat(np.arange(10), 3)
    clouds.fid_halves(patients[:, None], patients[::-1, None], patients, patients[::-1], 5, seed=0)
    halves = [s for s in seen if len(s[0]) < 10]
    assert len(halves) == 5 and all(a == b and len(a) == 5 for a, b in halves)
    clouds.fid_halves(patients[::-1, None], patients[:, None], patients[::-1], patients, 5, seed=0)
    assert [s for s in seen if len(s[0]) < 10][5:] == halves, "another set of the same patients has the same halves"


def test_difference_and_seeds():
    rng = np.random.default_rng(6)
    noise = rng.normal(size=500)
    shared = stats.difference(1.1, 1.1 + noise, 1.0, 1.0 + noise + 0.01 * rng.normal(size=500))
    assert 0 < shared.lo < shared.value == pytest.approx(0.1)
    assert stats.over_seeds([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    mean, std, n = stats.over_seeds([4.0, np.nan])
    assert (mean, n) == (4.0, 1) and np.isnan(std)
    assert stats.over_seeds([np.nan])[2] == 0


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), levels=st.integers(2, 30))
def test_bootstrap_of_all_labels_and_groups_is_scikit_learn_on_repeated_rows(seed, levels):
    rng = np.random.default_rng(seed)
    n = 40
    y, score = rng.integers(0, 2, (n, 3)), rng.integers(0, levels, (n, 3)) / levels
    patients, sex = rng.integers(0, 25, n), rng.integers(0, 2, n)
    masks = {"all": np.ones(n, bool), "men": sex == 0, "women": sex == 1}
    drawn = stats.resample_patients(patients, 4, seed)
    for metric, reference in (("AUROC", roc_auc_score), ("AUPRC", average_precision_score)):
        values, resampled = stats.bootstrap(metric, y, score, masks, drawn)
        assert values.shape == (3, 3) and resampled.shape == (4, 3, 3)
        for g, mask in enumerate(masks.values()):
            for label in range(3):
                for r, count in [(-1, np.ones(n, int)), *enumerate(drawn.draws[:, drawn.patient])]:
                    rows = np.repeat(np.flatnonzero(mask), count[mask])
                    found = values[g, label] if r < 0 else resampled[r, g, label]
                    if len(set(y[rows, label])) == 2:
                        assert found == pytest.approx(reference(y[rows, label], score[rows, label]), abs=1e-6)
                    elif metric == "AUROC" or not y[rows, label].any():
                        assert np.isnan(found)


def test_bootstrap_does_not_depend_on_chunks_and_says_what_is_wrong(monkeypatch):
    rng = np.random.default_rng(0)
    y, score, drawn = rng.integers(0, 2, (50, 2)), rng.normal(size=(50, 2)), stats.resample_patients(range(50), 30, 0)
    whole = stats.bootstrap("AUROC", y, score, {"all": np.ones(50, bool)}, drawn)[1]
    monkeypatch.setattr(stats, "CHUNK", 150)
    np.testing.assert_array_equal(stats.bootstrap("AUROC", y, score, {"all": np.ones(50, bool)}, drawn)[1], whole)
    np.testing.assert_allclose(whole[:, 0, 1], stats.auroc(y[:, 1], score[:, 1], drawn.counts()), atol=1e-12)
    with pytest.raises(ValueError, match="F1"):
        stats.bootstrap("F1", y, score, {}, drawn)
    with pytest.raises(ValueError, match="patients"):
        stats.bootstrap("AUROC", y[:40], score[:40], {}, drawn)
    with pytest.raises(ValueError, match="0 or 1"):
        stats.bootstrap("AUROC", y + 1, score, {}, drawn)


def test_logit_interval_is_a_normal_one_of_the_log_odds():
    rng = np.random.default_rng(0)
    odds = 1.5 + 0.4 * rng.normal(size=4000)
    found = stats.logit_interval(1 / (1 + np.exp(-1.5)), 1 / (1 + np.exp(-odds)))
    assert np.log([found.lo / (1 - found.lo), found.hi / (1 - found.hi)]) == pytest.approx(
        [1.5 - 1.96 * odds.std(ddof=1), 1.5 + 1.96 * odds.std(ddof=1)], abs=1e-3
    )


def test_logit_interval_at_the_edge():
    resampled = np.r_[np.full(50, 1.0), np.linspace(0.9, 0.98, 950)]
    found = stats.logit_interval(0.95, resampled)
    moved = stats.logit_interval(0.95, np.r_[np.full(50, 0.99), np.linspace(0.9, 0.98, 950)])
    assert (found.lo, found.hi) == pytest.approx((moved.lo, moved.hi)) and found.hi < 1
    for value, draws in ((1.0, np.ones(100)), (0.9, np.r_[np.full(20, np.nan), np.full(80, 0.9)]), (0.9, np.ones(9))):
        edge = stats.logit_interval(value, draws)
        assert edge.value == value and np.isnan(edge.lo) and np.isnan(edge.hi)


# --- coverage: benchmarks/coverage.py ---------------------------------------------------------------------------------
COVERAGE = runpy.run_path(str(paths.ROOT / "benchmarks" / "coverage.py"))
BY_NAME = {s.name: s for s in COVERAGE["SCENARIOS"]}


def committed(scenario):
    table = pd.read_csv(paths.ROOT / "benchmarks" / "results" / "coverage.csv")
    return table[table["scenario"] == scenario].set_index("interval")


def test_simulated_sets_have_the_auroc_that_they_claim():
    for s in COVERAGE["SCENARIOS"]:
        rng = np.random.default_rng(0)
        found = [stats.auroc(y, score)[0] for y, score, _ in (COVERAGE["simulate"](s, rng) for _ in range(300))]
        assert np.mean(found) == pytest.approx(s.auroc, abs=4 * np.std(found) / np.sqrt(300)), s.name


def test_intervals_cover_in_a_shortened_study():
    """200 sets of 300 images: 95 % +- 4 standard errors; images taken for patients cover too seldom."""
    found = {r["interval"]: r for r in COVERAGE["study"](BY_NAME["3 images, one label"], 200, 300, seed=1)}
    for name in ("bootstrap by patient, percentile", "bootstrap by patient, logit", "DeLong by patient, logit"):
        assert 0.88 <= found[name]["covered"] <= 1, name
    for name in ("bootstrap by image, percentile", "DeLong by image, logit"):
        assert found[name]["covered"] < 0.88, name


def test_committed_coverage_is_the_full_study_and_holds_where_it_is_claimed():
    for name, s in BY_NAME.items():
        table = committed(name)
        assert (table["sets"] == 2000).all() and (table["resamples"] == 1000).all() and (table["n"] == 300).all()
        assert (table["auroc"] == s.auroc).all()
        assert 0.93 <= table.loc["bootstrap by patient, logit", "covered"] <= 0.97, name
    reference = committed("reference")["covered"]
    assert reference.between(0.93, 0.97).all(), "every interval where nothing is difficult"


@pytest.mark.slow
def test_the_full_study_gives_the_committed_numbers():
    again = pd.DataFrame(COVERAGE["study"](BY_NAME["reference"], 2000, 1000, seed=0)).set_index("interval")
    pd.testing.assert_series_equal(again["covered"], committed("reference")["covered"], rtol=1e-3)


# --- shares -----------------------------------------------------------------------------------------------------------
def test_a_share_of_0_or_1_has_the_jeffreys_interval_of_its_patients():
    """Twelve images of four patients, against scipy's beta; anything between is the percentile bootstrap."""
    drawn = stats.resample_patients(np.repeat(list("abcd"), 3), 200, 0)
    all_right = stats.share_interval(np.ones(12), drawn)
    assert (all_right.value, all_right.hi) == (1, 1) and all_right.lo == pytest.approx(scipy_stats.beta.ppf(0.025, 4.5, 0.5))
    none = stats.share_interval(np.zeros(6), drawn.rows(np.arange(12) < 6))  # patients a and b only
    assert (none.value, none.lo) == (0, 0) and none.hi == pytest.approx(scipy_stats.beta.ppf(0.975, 0.5, 2.5))
    hits = np.arange(12) % 5 < 3
    plain = stats.percentile_interval(hits.mean(), stats.mean(hits, drawn.counts()))
    assert stats.share_interval(hits, drawn) == plain and plain.lo < plain.hi
