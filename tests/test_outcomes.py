"""Rows of notebook 07 from predictions, against scikit-learn, fairlearn, and plain counting."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from compdiff import comparisons, config, datasets, fairness, frames, outcomes, record, significance, stats, tables
from compdiff.attributes import AGE, SEX, Schema
from compdiff.downstream import REAL, Judged

SCHEMA = Schema((AGE, SEX))
LABELS = ("spot", "rare")


def table_of(n=400, seed=0, skill=0.3):
    """n rows with attributes, labels and scores; `rare` has 12 positives, all in the first rows."""
    rng = np.random.default_rng(seed)
    cells = [SCHEMA.decode(SCHEMA.cells()[i]) for i in rng.integers(0, 10, n)]
    t = pd.DataFrame(cells).assign(id=[f"i{i}" for i in range(n)], patient=[f"p{i // 2}" for i in range(n)])
    t["y_spot"], t["y_rare"] = rng.integers(0, 2, n), (np.arange(n) < 12).astype(int)
    t["p_spot"] = np.clip(skill * t["y_spot"] + rng.random(n) * (1 - skill), 0, 1)
    t["p_rare"] = rng.random(n)
    return t


def masks_of(t, joint=False):
    masks = {("overall", ""): np.ones(len(t), bool)}
    for a in SCHEMA.attributes:
        masks |= {(a.name, c): (t[a.name] == c).to_numpy() for c in a.categories}
    if joint:
        pairs = [(a, s) for a in AGE.categories for s in SEX.categories]
        masks |= {("age x sex", f"{a} {s}"): masks["age", a] & masks["sex", s] for a, s in pairs}
    return masks


def value(rows, metric, key=("overall", "")):
    (found,) = [r for r in rows if r["metric"] == metric and (r["group_kind"], r["group"]) == key]
    return found


@pytest.fixture(scope="module")
def judged():
    t, val = table_of(), table_of(seed=1)
    return t, val, outcomes.judge(("1b", "hcn"), t, val, masks_of(t, True), SCHEMA.names, LABELS, 40, 0)


# --- groups -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fundus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fundus") / "data"
    datasets.prepare("fundus", folder, config.DataConfig(size=32, train_n=30, val_n=6, test_per_cell=2))
    return datasets.load(folder)


def test_groups_are_attributes_intersections_and_conditions(fundus):
    rows = fundus.rows("test")
    masks = outcomes.groups_of(fundus, rows, conditions=True)
    kinds = {k[0] for k in masks}
    joint = {"age x sex", "age x race", "sex x race", "age x sex x race"}
    assert kinds == {"overall", *fundus.schema.names, "held_out", *joint, *fundus.label_names}
    female_asian = (rows["sex"] == "Female") & (rows["race"] == "Asian")
    assert (masks["sex x race", "Female Asian"] == female_asian.to_numpy()).all()
    assert masks["vision_loss", "severe vision loss"].sum() == (rows["y_vision_loss"] == 3).sum()
    assert set(outcomes.groups_of(fundus, rows)) == {k for k in masks if k[0] not in fundus.label_names}


@pytest.fixture
def fairgenmed(copy):
    """Its layout's manifest and schema, ethnicity included, and 600 rows with every category and condition."""
    data, rng = copy("fairgenmed").prepare(), np.random.default_rng(0)
    rows = data.table.sample(600, replace=True, random_state=0).reset_index(drop=True)
    rows = rows.assign(patient=[f"p{i}" for i in range(600)])
    for attribute in data.schema.attributes:
        rows[attribute.name] = rng.choice(attribute.categories, 600)
    for label in data.label_names:
        rows[f"y_{label}"] = rng.integers(0, len(data.manifest.labels[label]), 600)
    return data, rows


def test_fairdiffusions_19_groups_ethnicity_included(fairgenmed):
    """Race 3, sex 2, ethnicity 2, and the conditions: glaucoma 2, vision loss 4, cup-disc 2, refraction 4."""
    data, rows = fairgenmed
    masks = outcomes.groups_of(data, rows, conditions=True)
    kinds = ("race", "sex", "ethnicity", *data.label_names)
    theirs = {k: m for k, m in masks.items() if k[0] in kinds}
    assert len(theirs) == 19 and {k[1] for k in theirs if k[0] == "ethnicity"} == {"Hispanic", "Non-Hispanic"}
    for kind in kinds:  # every row is in one group of each kind
        assert (sum(m.astype(int) for k, m in theirs.items() if k[0] == kind) == 1).all()
    assert (masks["ethnicity", "Hispanic"] == (rows["ethnicity"] == "Hispanic").to_numpy()).all()
    assert "sex x race x ethnicity" in {k[0] for k in masks}


def test_a_task_is_judged_by_ethnicity(fairgenmed):
    """AUROC of both groups is scikit-learn's, ES-AUROC the formula of them; parity of decisions is there, too."""
    data, rows = fairgenmed
    rng, hispanic = np.random.default_rng(1), (rows["ethnicity"] == "Hispanic").to_numpy()
    skill = np.where(hispanic, 0.1, 0.6)
    rows = rows.assign(p_glaucoma=np.clip(skill * rows["y_glaucoma"] + (1 - skill) * rng.random(600), 0, 1))
    found = outcomes.rows_of(Judged("vit-real", REAL, data, rows, rows, "glaucoma"), 10, 0)
    plain = lambda here: sk.roc_auc_score(rows["y_glaucoma"][here], rows["p_glaucoma"][here])  # noqa: E731
    whole, his, other = plain(hispanic | True), plain(hispanic), plain(~hispanic)
    at = {name: value(found, "AUROC:glaucoma", ("ethnicity", name))["value"] for name in ("Hispanic", "Non-Hispanic")}
    assert at == {"Hispanic": pytest.approx(his, abs=1e-6), "Non-Hispanic": pytest.approx(other, abs=1e-6)}
    es = value(found, "ES-AUROC:glaucoma", ("ethnicity", ""))["value"]
    assert es == pytest.approx(whole / (1 + abs(his - whole) + abs(other - whole)), abs=1e-6) and es < whole
    masks, names = outcomes.groups_of(data, rows), data.schema.names
    every = outcomes.judge(("1a", REAL), rows, rows, masks, names, ["glaucoma"], 10, 0)
    called = rows["p_glaucoma"] >= outcomes.threshold(rows["y_glaucoma"].to_numpy(), rows["p_glaucoma"].to_numpy())
    gap = abs(called[hispanic].mean() - called[~hispanic].mean())
    assert value(every, "demographic parity difference:glaucoma", ("ethnicity", ""))["value"] == pytest.approx(gap)


# --- one classifier ---------------------------------------------------------------------------------------------------
def test_label_rows_are_scikit_learns_at_the_validation_threshold(judged):
    t, val, rows = judged
    cut = outcomes.threshold(val["y_spot"].to_numpy(), val["p_spot"].to_numpy())
    f1 = [sk.f1_score(val["y_spot"], val["p_spot"] >= c) for c in val["p_spot"]]
    assert sk.f1_score(val["y_spot"], val["p_spot"] >= cut) == pytest.approx(max(f1))
    for key, mask in masks_of(t).items():
        y, p = t["y_spot"][mask], t["p_spot"][mask]
        plain = {"AUROC": sk.roc_auc_score(y, p), "AUPRC": sk.average_precision_score(y, p),
                 "F1": sk.f1_score(y, p >= cut),
                 "balanced accuracy": sk.balanced_accuracy_score(y, p >= cut)}  # fmt: skip
        for metric, expected in plain.items():
            row = value(rows, f"{metric}:spot", key)
            assert row["value"] == pytest.approx(expected, abs=1e-6), (metric, key)
            assert row["lo"] <= row["value"] <= row["hi"], (metric, key)
    edges = np.minimum((t["p_spot"] * 10).astype(int), 9)
    by_hand = sum(abs((t["y_spot"] - t["p_spot"])[edges == b].sum()) for b in range(10)) / len(t)
    assert value(rows, "ECE:spot")["value"] == pytest.approx(by_hand)


def test_macro_compares_groups_on_shared_labels_and_names_the_ineligible(judged):
    _, _, rows = judged
    assert {r["method"] for r in rows} == {"hcn"} and {r["setting"] for r in rows} == {"1b"}
    whole = [value(rows, f"AUROC:{x}")["value"] for x in LABELS]
    assert value(rows, "macro AUROC")["value"] == pytest.approx(np.mean(whole))
    for sex in SEX.categories:
        assert value(rows, "macro AUROC", ("sex", sex))["value"] == value(rows, "AUROC:spot", ("sex", sex))["value"]
        assert value(rows, "AUROC:rare", ("sex", sex))["note"].startswith("ineligible")
    male, female = (value(rows, "macro AUROC", ("sex", s))["value"] for s in SEX.categories)
    assert value(rows, "gap macro AUROC", ("sex", ""))["value"] == pytest.approx(abs(male - female))
    m = whole[0]  # the overall value on the one label that men and women are compared on
    expected = m / (1 + abs(male - m) + abs(female - m))
    assert value(rows, "ES-macro AUROC", ("sex", ""))["value"] == pytest.approx(expected)
    mean = m / (1 + (abs(male - m) + abs(female - m)) / 2)
    assert value(rows, "ES-macro AUROC-mean", ("sex", ""))["value"] == pytest.approx(mean)
    assert value(rows, "ES-AUROC:rare", ("sex", ""))["note"].startswith("ineligible")


def test_between_group_disparity_by_hand():
    """Groups 0.6, 0.9 and 0.75 around 0.8: their standard deviation is sqrt(0.015), their range 0.3."""
    at = [(("overall", ""), 0.8), (("age", "a"), 0.6), (("age", "b"), 0.9), (("age", "c"), 0.75), (("age", "few"), None)]
    rows = [outcomes.row(("1a", REAL), key, "AUROC:spot", v, 50) for key, v in at]
    found = outcomes.disparity(rows, "age", ["AUROC:spot"], ("1a", REAL))
    by_hand = {"gap": 0.3, "range": 0.3 / 0.8, "std": np.sqrt(0.015) / 0.8, "gap90": 0.24}
    for what, expected in by_hand.items():
        row = value(found, f"{what} AUROC:spot", ("age", ""))
        assert row["value"] == pytest.approx(expected) and row["note"] == "without few (ineligible)"
        assert frames.better_is(row["metric"]) == "lower", "though AUROC itself is better high"
    equal = outcomes.disparity([r | {"value": 0.7} for r in rows], "age", ["AUROC:spot"], ("1a", REAL))
    assert value(equal, "range AUROC:spot", ("age", ""))["value"] == 0
    one = outcomes.disparity([*rows[:2], rows[-1]], "age", ["AUROC:spot"], ("1a", REAL))
    assert value(one, "range AUROC:spot", ("age", ""))["note"] == "ineligible: fewer than two eligible groups"


def test_a_finding_of_one_ill_patient_is_left_out_of_the_means_which_keep_their_intervals():
    """All macro numbers are those of the other findings, the note says which one is missing and why."""
    t, val = table_of(), table_of(seed=1)
    t.loc[t["y_rare"] == 1, "patient"] = "p0"
    masks = {("overall", ""): np.ones(len(t), bool)}
    found = outcomes.judge(("1b", "hcn"), t, val, masks, (), LABELS, 60, 0)
    alone = outcomes.judge(("1b", "hcn"), t, val, masks, (), ("spot",), 60, 0)
    for metric in tables.DOWNSTREAM[:-1]:
        mean, other = value(found, metric), value(alone, metric)
        assert mean["note"] == "mean of spot; without rare (one patient only in a class)"
        assert other["note"] == "mean of spot"
        ends = ("value",) if metric == "macro ECE" else ("value", "lo", "hi")
        assert [mean[e] for e in ends] == [other[e] for e in ends] and np.isfinite([mean[e] for e in ends]).all()
    for metric in ("AUROC", "AUPRC", "F1", "balanced accuracy", "ECE"):
        rare = value(found, f"{metric}:rare")
        assert np.isnan(rare["value"]) and rare["note"] == "ineligible: one patient only in a class"
    base = t.assign(p_spot=t["p_spot"].to_numpy()[::-1])
    minus = comparisons.against_real({("1a", REAL): base, ("1b", "hcn"): t}, LABELS, 60, 0)
    whole = value(found, "macro AUROC")["value"] - sk.roc_auc_score(base["y_spot"], base["p_spot"])
    assert value(minus, "macro AUROC minus 1a")["value"] == pytest.approx(whole), "the same findings on both sides"


def test_one_image_per_patient_is_judged_as_images_are(fundus):
    """Phantoms: nothing changes by looking at patients."""
    assert fundus.table["patient"].is_unique
    y = table_of()["y_spot"].to_numpy()
    for n in (15, 19, 40, 400):
        assert fairness.auroc_note(y[:n], np.arange(n)) == fairness.auroc_note(y[:n])


def test_gaps_between_intersections_leave_small_groups_out_by_name(judged):
    t, _, rows = judged
    parts = {r["group"]: r for r in rows if r["metric"] == "AUROC:spot" and r["group_kind"] == "age x sex"}
    good = [r["value"] for r in parts.values() if np.isfinite(r["value"])]
    small = {g for g, r in parts.items() if r["note"]}
    for group, row in parts.items():
        y = t["y_spot"][masks_of(t, True)["age x sex", group]]
        assert (min(y.sum(), (1 - y).sum()) < 10) == (group in small) == row["note"].startswith("ineligible")
    gap = value(rows, "gap AUROC:spot", ("age x sex", ""))
    assert gap["value"] == pytest.approx(max(good) - min(good)) and all(g in gap["note"] for g in small)
    found = {r["metric"] for r in rows if r["group_kind"] == "age x sex" and r["group"]}
    assert found == {"AUROC:spot", "underdiagnosis"}
    low, high = np.quantile(good, [0.1, 0.9])
    assert value(rows, "gap90 AUROC:spot", ("age x sex", ""))["value"] == pytest.approx(high - low)


def test_parity_is_the_range_of_the_groups_rates(judged):
    t, val, rows = judged
    cut = outcomes.threshold(val["y_spot"].to_numpy(), val["p_spot"].to_numpy())
    called = t["p_spot"] >= cut
    share, tpr, fpr = ([called[(t["sex"] == s) & rows_].mean() for s in SEX.categories]
                       for rows_ in (t["y_spot"] >= 0, t["y_spot"] == 1, t["y_spot"] == 0))  # fmt: skip
    expected = {"demographic parity": np.ptp(share), "equal opportunity": np.ptp(tpr)}
    expected["equalized odds"] = max(np.ptp(tpr), np.ptp(fpr))
    for criterion, difference in expected.items():
        assert value(rows, f"{criterion} difference:spot", ("sex", ""))["value"] == pytest.approx(difference)
    assert value(rows, "demographic parity ratio:spot", ("sex", ""))["value"] == pytest.approx(min(share) / max(share))
    assert value(rows, "equalized odds difference:rare", ("sex", ""))["note"].startswith("ineligible")


def test_underdiagnosis_counts_the_ill_called_healthy():
    t = table_of().rename(columns={"y_spot": "y_No Finding", "p_spot": "p_No Finding"})
    masks = masks_of(t)
    rows = outcomes.missed(t, t, masks, ["sex"], ["No Finding"], ("1a", REAL))
    rate = value(rows, "underdiagnosis")
    cut = outcomes.threshold(t["y_No Finding"].to_numpy(), t["p_No Finding"].to_numpy())
    ill = t[t["y_No Finding"] == 0]
    called_healthy = (ill["p_No Finding"] >= cut).sum()
    assert rate["n"] == len(ill) and rate["value"] == pytest.approx((called_healthy + 0.5) / (len(ill) + 1))
    male, female = (value(rows, "underdiagnosis", ("sex", s))["value"] for s in SEX.categories)
    assert value(rows, "gap underdiagnosis", ("sex", ""))["value"] == pytest.approx(abs(male - female))
    assert value(rows, "gap90 underdiagnosis", ("sex", ""))["value"] == pytest.approx(0.8 * abs(male - female))
    people = ill["patient"].nunique()
    few = stats.jeffreys(called_healthy * people / len(ill), people)  # two images each
    assert people < len(ill) and [rate["lo"], rate["hi"]] == pytest.approx([few.lo, few.hi])
    assert rate["note"] == "FPR of No Finding" + outcomes.FEWER
    each = outcomes.missed(t.assign(patient=t["id"]), t, masks, ["sex"], ["No Finding"], ("1a", REAL))
    plain, exact = value(each, "underdiagnosis"), stats.jeffreys(int(called_healthy), len(ill))
    assert (plain["value"], plain["lo"], plain["hi"]) == (exact.value, exact.lo, exact.hi)
    assert plain["note"] == "FPR of No Finding" and plain["value"] == rate["value"]
    t = t.rename(columns={"y_No Finding": "y_glaucoma", "p_No Finding": "p_glaucoma"})
    rate = value(outcomes.missed(t, t, masks, [], ["glaucoma"], ("1a", REAL)), "underdiagnosis")
    ill = t[t["y_glaucoma"] == 1]
    assert rate["value"] == pytest.approx(((ill["p_glaucoma"] < cut).sum() + 0.5) / (len(ill) + 1))


def test_no_number_is_missing_without_a_reason(judged):
    frame = pd.DataFrame(judged[2])
    absent = frame[frame["value"].isna()]
    assert len(absent) and absent["note"].str.startswith("ineligible").all()
    assert not frame.duplicated(["method", "setting", "group_kind", "group", "metric"]).any()


def test_table4_shows_what_is_written_here(judged):
    """Every name that Table 4 may show is written for some kind of group, and its numbers are those rows'."""
    written = {kind: {r["metric"] for r in judged[2] if (r["group_kind"], r["group"]) == (kind, "")}
               for kind in ("overall", *SCHEMA.names, "age x sex")}  # fmt: skip
    results = frames.over_seeds(record.results(judged[2], dataset="chest", seed=0))
    panels = {kind: metrics for _, kind, _, metrics in tables.table4_panels(results)}
    assert set(tables.DOWNSTREAM) <= written["overall"] and panels["overall"] == list(tables.DOWNSTREAM)
    for kind in (*SCHEMA.names, "age x sex"):
        assert panels[kind] == [m for m in tables.disparity_metrics(kind, "spot") if m in written[kind]]
    assert panels["sex"] == tables.disparity_metrics("sex", "spot")
    assert {"gap90 underdiagnosis", "equalized odds difference:spot", "gap macro AUROC"} <= set(panels["sex"])
    assert {"std macro AUROC", "range macro AUROC"} <= set(panels["sex"])
    assert all(f"{what} M = " in tables.ES_LABELS for what in ("std", "range")), "the footnote says what they are"
    assert {"gap AUROC:spot", "equalized odds difference:spot"} <= set(panels["age x sex"])
    table = tables.table4(results).set_index(["panel", "column"])
    row = value(judged[2], "equalized odds difference:spot", ("sex", ""))
    assert table.loc[("By sex", "equalized odds difference:spot"), "value"] == row["value"]


# --- tasks ------------------------------------------------------------------------------------------------------------
def test_a_task_of_several_classes_is_the_mean_of_each_against_the_rest(fundus):
    rows = pd.concat([fundus.rows("test")] * 40, ignore_index=True).assign(patient=lambda t: t.index.astype(str))
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), len(rows)) + 0.4 * np.eye(4)[rows["y_vision_loss"]]
    p /= p.sum(1, keepdims=True)
    t = rows.assign(**{f"p_vision_loss={c}": p[:, c] for c in range(4)})
    j = Judged("vit-real", REAL, fundus, t, t, "vision_loss", "small ViT", "small ViT, from scratch", 3)
    found = outcomes.rows_of(j, 20, 0)
    assert {r["stage"] for r in found} == {"tasks"} and {r["extractor"] for r in found} == {"small ViT"}
    whole = value(found, "AUROC:vision_loss")
    assert whole["value"] == pytest.approx(sk.roc_auc_score(t["y_vision_loss"], p, multi_class="ovr"), abs=1e-6)
    parts = [value(found, "AUROC:vision_loss", ("sex", s)) for s in SEX.categories]
    for part, sex in zip(parts, SEX.categories, strict=True):
        here = (t["sex"] == sex).to_numpy()
        plain = sk.roc_auc_score(t["y_vision_loss"][here], p[here], multi_class="ovr")
        assert part["value"] == pytest.approx(plain, abs=1e-6)
    es = value(found, "ES-AUROC:vision_loss", ("sex", ""))["value"]
    assert es == pytest.approx(whole["value"] / (1 + sum(abs(r["value"] - whole["value"]) for r in parts)))
    conditions = {(r["group_kind"], r["group"]) for r in found if r["metric"] == "AUROC:vision_loss"}
    assert {("glaucoma", "no glaucoma"), ("refraction", "hyperopia")} <= conditions
    assert value(found, "epochs trained:vision_loss")["note"] == "small ViT, from scratch"


# --- against real images only -----------------------------------------------------------------------------------------
def test_differences_to_1a_and_their_p_values(judged):
    base, worse, same = table_of(skill=0.4), table_of(skill=0.05), table_of(skill=0.4)
    same["p_spot"] += 1e-9
    tables = {("1a", REAL): base, ("1b", "hcn"): worse, ("1b", "text"): same, ("1d", "hcn"): worse}
    rows = comparisons.against_real(tables | {("5a", REAL): base.copy()}, LABELS, 60, 0)
    assert {(r["setting"], r["method"]) for r in rows} == set(tables) - {("1a", REAL)}  # 5a is the same classifier

    def at(setting, method, metric):
        (row,) = [r for r in rows if (r["setting"], r["method"], r["metric"]) == (setting, method, metric)]
        return row

    drop = at("1b", "hcn", "AUROC:spot minus 1a")
    plain = sk.roc_auc_score(worse["y_spot"], worse["p_spot"]) - sk.roc_auc_score(base["y_spot"], base["p_spot"])
    assert drop["value"] == pytest.approx(plain) and drop["hi"] < 0
    y, a, b = (t.to_numpy() for t in (base["y_spot"], worse["p_spot"], base["p_spot"]))
    raw = significance.delong_test(y, a, b, base["patient"].to_numpy()).p
    assert "p (DeLong, Holm) AUROC:rare minus 1a" in {r["metric"] for r in rows}
    metric = "p (DeLong, Holm) AUROC:spot minus 1a"
    assert at("1b", "hcn", metric)["value"] == pytest.approx(min(1, 2 * raw))  # the smaller of two
    assert at("1d", "hcn", metric)["value"] == pytest.approx(raw)  # alone in its family
    assert "Holm over 2 methods" in at("1b", "text", metric)["note"] and at("1b", "text", metric)["value"] == 1
    permuted = [at("1b", m, "p (permutation, Holm) AUPRC:spot minus 1a")["value"] for m in ("hcn", "text")]
    assert permuted == [pytest.approx(2 / 61), 1]
    macro = at("1b", "hcn", "p (bootstrap, Holm) macro AUROC minus 1a")["value"]
    interval = at("1b", "hcn", "macro AUROC minus 1a")
    assert (macro < 0.025) == (not interval["lo"] <= 0 <= interval["hi"])
    assert all(0 <= r["value"] <= 1 for r in rows if r["metric"].startswith("p ("))


def test_a_label_of_one_patient_is_ineligible_and_an_absent_class_in_a_resample_no_zero():
    base = table_of(60).assign(patient=lambda t: np.where(t["y_rare"] == 1, "one", t["patient"]))
    other = base.assign(p_spot=base["p_spot"].to_numpy()[::-1], p_rare=base["p_rare"].to_numpy()[::-1])
    rows = comparisons.against_real({("1a", REAL): base, ("1b", "hcn"): other}, LABELS, 40, 0)
    (rare,) = [r for r in rows if "rare" in r["metric"]]
    assert np.isnan(rare["value"]) and rare["note"] == "ineligible: one patient only in a class"
    few = table_of(24).assign(patient=lambda t: np.where(t["y_rare"] == 1, "a", "b") + t["sex"])
    few.loc[few.index[:12], "patient"] = ["a", "b"] * 6
    other = few.assign(p_rare=few["p_rare"].to_numpy()[::-1])
    drawn = stats.resample_patients(few["patient"], 40, 0)
    assert np.isnan(stats.auroc(few["y_rare"].to_numpy(), few["p_rare"].to_numpy(), drawn.counts())).any()
    rows = comparisons.against_real({("1a", REAL): few, ("1b", "hcn"): other}, ["rare"], 40, 0)
    p = next(r["value"] for r in rows if r["metric"].startswith("p (bootstrap"))
    assert 0 < p <= 1


def test_an_external_set_is_compared_with_1a_on_the_same_set():
    t = table_of()
    tables = {("1a", REAL): t, ("1b on there", "hcn"): table_of(300, 3), ("1a on there", REAL): table_of(300, 3, 0.1)}
    rows = comparisons.against_real(tables, LABELS, 20, 0)
    assert {r["setting"] for r in rows} == {"1b on there"} and {r["n"] for r in rows} == {300}


def test_labels_that_a_test_set_lacks_are_not_judged(fundus):
    rows = fundus.rows("test")
    t = rows.assign(**{f"p_{label}": 0.5 for label in fundus.label_names})
    val = t.rename(columns={c: c + "!" for c in t if c.startswith(("y_", "p_"))}).assign(y_other=0, p_other=0.5)
    (about, none) = outcomes.rows_of(Judged("1a on x", REAL, fundus, t, val), 10, 0)
    assert about["metric"] == "epochs trained" and none["note"].startswith("not available") and np.isnan(none["value"])


def test_a_ratio_of_nothing_to_nothing_says_so():
    t = table_of().assign(p_spot=0.1)  # nobody is called
    rows = outcomes.parity_rows(t, masks_of(t), ("sex",), (), ("spot",), {"spot": 0.5}, ("1a", REAL))
    assert value(rows, "equalized odds difference:spot", ("sex", ""))["value"] == 0
    ratio = value(rows, "equalized odds ratio:spot", ("sex", ""))
    assert np.isnan(ratio["value"]) and ratio["note"].startswith("not available: 0 / 0")


def test_without_1a_or_with_other_images_every_classifier_has_a_row_that_says_so():
    base, other = table_of(200, 0), table_of(200, 1)
    (row,) = comparisons.against_real({("1b", "hcn"): other}, LABELS, 20, 0)
    assert (row["setting"], row["method"], row["note"]) == ("1b", "hcn", "not available: strategy 1a was not run")
    assert np.isnan(row["value"]) and row["metric"] == "macro AUROC minus 1a"
    (row,) = comparisons.against_real({("1a", REAL): base, ("1b", "hcn"): other.assign(id=other["id"] + "x")}, LABELS, 20, 0)
    assert row["note"] == "not available: 1a was judged on other images"
    assert comparisons.against_real({("5a on synthetic", "text"): other}, LABELS, 20, 0) == [], "nobody else is judged on those"


def test_a_label_that_no_validation_image_has_is_cut_at_one_half_and_says_so():
    t, val = table_of(), table_of(seed=1)
    said = "threshold 0.5: no validation image has the label"
    for rare, wanted in ((0, True), (val["y_rare"], False)):
        rows = outcomes.judge(("1a", REAL), t, val.assign(y_rare=rare), masks_of(t), SCHEMA.names, LABELS, 20, 0)
        for metric in ("F1:rare", "balanced accuracy:rare", "macro F1"):
            assert (said in value(rows, metric)["note"]) == wanted, metric
        assert not any(said in value(rows, metric)["note"] for metric in ("AUROC:rare", "F1:spot", "macro ECE", "ECE:rare"))
        parity = [r for r in rows if "difference:rare" in r["metric"]]
        assert parity and all((said in r["note"]) == wanted for r in parity)
    blind = outcomes.judge(("1a", REAL), t, val.assign(y_spot=0), masks_of(t), SCHEMA.names, LABELS, 20, 0)
    assert said in value(blind, "underdiagnosis")["note"]
