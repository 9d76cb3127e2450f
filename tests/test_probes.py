"""06: linear probes find what is drawn, within a stratum and not through its companion, and say what they cannot."""

import re

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from test_tables import made_up

from compdiff import controls, evaluate, frames, probe_report, probes, readme, record, stats
from compdiff.attributes import SCHEMAS

SCHEMA = SCHEMAS["nih"]  # age, sex (Male, Female), view (PA, AP)
PA, OVERALL = ("view", "PA"), ("overall", "")
MEN_PA, MEN_AP, WOMEN_PA, WOMEN_AP = (("Male", "PA"), ("Male", "AP"), ("Female", "PA"), ("Female", "AP"))
CONFOUNDED = {MEN_PA: 150, MEN_AP: 15, WOMEN_PA: 30, WOMEN_AP: 150}  # a woman is an AP image, mostly


def people(sizes, name, per_patient=1):
    cells = [cell for cell, n in sizes.items() for _ in range(n)]
    rows = pd.DataFrame(cells, columns=["sex", "view"]).assign(age="40-60")
    return rows.assign(patient=[f"{name}{i // per_patient}" for i in range(len(rows))])


def drawn(rows, seed, sex=1.5, view=3.0):
    """Features [n, 6]: the first follows the view, the second the sex, as far as they do."""
    z = np.random.default_rng(seed).normal(size=(len(rows), 6))
    z[:, 0] += view * (rows["view"] == "AP")
    z[:, 1] += sex * (rows["sex"] == "Female")
    return z.astype(np.float32)


def reference(sizes, per_patient=1):
    rows = people(sizes, "test", per_patient)
    images = np.zeros((len(rows), 2, 2), np.uint8)
    return evaluate.Reference(rows, images, drawn(rows, 1), {OVERALL: np.ones(len(rows), bool)}, SCHEMA, "lite0")


def made(ref, method, **signal):
    return evaluate.ImageSet(method, ref.images, drawn(ref.rows, 2, **signal), ref.patients, np.arange(len(ref.rows)))


def asked(sets, ref, train, seed=0):
    rows = probes.probed(sets, ref, train, drawn(train, 3), 100, seed)
    return {(r["method"], r["metric"], (r["group_kind"], r["group"])): r for r in rows}


@pytest.fixture(scope="module")
def found():
    ref, train = reference(CONFOUNDED), people(CONFOUNDED, "train")
    sets = [made(ref, "hcn"), made(ref, "text", sex=0.0), controls.real_test(ref)]
    sets += [made(ref, "copy"), made(ref, "real_train")]
    return asked(sets, ref, train)


def test_strata_are_the_two_category_attributes_within_each_other():
    names = [(a.name, key) for a, key in probes.strata(SCHEMA)]
    assert names == [("sex", OVERALL), ("sex", PA), ("sex", ("view", "AP")),
                     ("view", OVERALL), ("view", ("sex", "Male")), ("view", ("sex", "Female"))]  # fmt: skip
    assert [(a.name, key) for a, key in probes.strata(SCHEMAS["chest"])] == [("sex", OVERALL)]


def test_within_a_stratum_the_companion_no_longer_fools(found):
    """`text` draws the view alone: overall it seems to draw the sex, among PA images it does not."""
    fooled, honest = found["text", "AUROC:sex", OVERALL], found["text", "AUROC:sex", PA]
    assert fooled["lo"] > 0.7 and honest["lo"] < 0.5 < honest["hi"]
    both = found["hcn", "AUROC:sex", PA]
    assert both["lo"] > 0.6 and both["value"] < 1 and honest["n"] == both["n"] == 180
    assert both["stage"] == "probe" and both["extractor"] == "lite0" and both["n_ref"] == 0
    assert both["note"] == "180 images of 180 patients; probe of 180 training images of 180 patients"


def test_sets_of_training_images_are_left_out(found):
    assert {method for method, _, _ in found} == {"hcn", "text", "real_test"}


def test_value_is_that_of_a_plain_logistic_regression_on_the_stratum(found):
    ref, train = reference(CONFOUNDED), people(CONFOUNDED, "train")
    pa, theirs = (train["view"] == "PA").to_numpy(), (ref.rows["view"] == "PA").to_numpy()
    z = drawn(train, 3)[pa].astype(float)
    mean, std, y = z.mean(0), z.std(0), (train["sex"] == "Female").to_numpy()[pa]
    weights = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
    plain = LogisticRegression(C=probes.C, max_iter=1000).fit((z - mean) / std, y, sample_weight=weights)
    p = plain.predict_proba((made(ref, "hcn").features[theirs].astype(float) - mean) / std)[:, 1]
    expected = roc_auc_score(ref.rows["sex"][theirs] == "Female", p)
    assert found["hcn", "AUROC:sex", PA]["value"] == pytest.approx(expected, abs=1e-3)


def test_the_interval_is_one_of_patients_not_of_images():
    """Ten images of each patient, all alike, are no more than one image each."""
    sizes = {MEN_PA: 400, WOMEN_PA: 400}
    ref, train = reference(sizes, per_patient=10), people(CONFOUNDED, "train")
    once = drawn(ref.rows, 2, sex=1.0)[::10].repeat(10, axis=0)
    s = evaluate.ImageSet("hcn", ref.images, once, ref.patients, np.arange(800))
    many = asked([s], ref, train)["hcn", "AUROC:sex", PA]
    part = evaluate.ImageSet("hcn", ref.images[::10], once[::10], ref.patients[::10], np.arange(0, 800, 10))
    one = asked([part], ref, train)["hcn", "AUROC:sex", PA]
    assert many["note"].startswith("800 images of 80 patients; ")
    assert [many[k] for k in ("value", "lo", "hi")] == pytest.approx([one[k] for k in ("value", "lo", "hi")])


def test_too_few_patients_are_said_in_numbers():
    few = {MEN_PA: 40, MEN_AP: 40, WOMEN_PA: 40, WOMEN_AP: 18}
    ref, train = reference(few, per_patient=2), people(few | {WOMEN_AP: 8}, "train", per_patient=2)
    rows = asked([controls.real_test(ref)], ref, train)
    row = rows["real_test", "AUROC:sex", ("view", "AP")]
    assert row["note"] == "ineligible: 4 training patients of Female < 10; 9 reference patients of Female < 10"
    assert np.isnan(row["value"]) and row["n"] == 58 and np.isfinite(rows["real_test", "AUROC:sex", PA]["value"])
    small = reference({MEN_PA: 14, WOMEN_PA: 15})
    notes = {r["note"] for r in asked([controls.real_test(small)], small, people(CONFOUNDED, "t")).values()}
    assert "ineligible: n = 29 < 30" in notes


def test_separation_has_the_interval_of_its_disjoint_pairs():
    y, drawn_once = np.repeat([0, 1], (40, 12)), stats.resample_patients(np.arange(52), 50, 0)
    whole, none = (probes.interval(y, score, drawn_once) for score in (y.astype(float), -y.astype(float)))
    assert whole.value == whole.hi == 1 and whole.lo == stats.jeffreys(12, 12).lo
    assert none.value == none.lo == 0 and none.hi == pytest.approx(1 - whole.lo)


def test_a_probe_that_reads_nothing_says_so():
    ref, train = reference(CONFOUNDED), people(CONFOUNDED, "train")
    rows = asked([made(ref, "real_test", sex=0.0)], ref, train)
    assert rows["real_test", "AUROC:sex", PA]["note"].endswith(probe_report.BLIND)
    assert probe_report.BLIND not in rows["real_test", "AUROC:view", OVERALL]["note"]


# --- the report -------------------------------------------------------------------------------------------------------
def rows_of(numbers, seeds=(0,), note="90 images of 43 patients; probe of 283", group=PA):
    base = made_up().iloc[0].to_dict() | {"stage": "probe", "metric": "AUROC:sex", "extractor": "lite0", "n": 90}
    base |= {"group_kind": group[0], "group": group[1], "note": note}
    return [base | {"method": m, "seed": s, "value": v, "lo": lo, "hi": hi}
            for s in seeds for m, (lo, v, hi) in numbers.items()]  # fmt: skip


REAL = {"real_test": (0.8, 0.9, 0.95), "shuffled": (0.4, 0.52, 0.6)}
NUMBERS = {"hcn": (0.7, 0.8, 0.9), "text": (0.51, 0.7, 0.8), "flat": (0.45, 0.6, 0.7), "fairdiffusion": (0.1, 0.2, 0.3)}


def test_words_follow_the_intervals(tmp_path):
    note = "ineligible: 4 training patients of Female < 10"
    absent = rows_of(dict.fromkeys(REAL | NUMBERS, (np.nan,) * 3), note=note, group=("view", "AP"))
    lines = probe_report.probe_lines(frames.over_seeds(record.results(rows_of(REAL | NUMBERS) + absent)))
    text = "\n".join(lines)
    told = dict(re.findall(r"- sex within view PA: \*\*(.+?)\*\* for (.+) \(real test images 0.9 \[0.8, 0.95\]", text))
    assert told == {"follows the request": "HCN (CompDiff) 0.8 [0.7, 0.9]",
                    "runs against it": "FairDiffusion 0.2 [0.1, 0.3]",
                    "within noise": "Text baseline 0.7 [0.51, 0.8]; Flat encoder 0.6 [0.45, 0.7]"}  # fmt: skip
    assert "| method or control | sex within view PA (90 images of 43 patients) |" in text
    assert "- sex within view AP: ineligible: 4 training patients of Female < 10." in text and "nan" not in text
    assert text.count("\n| ") == 1 + len(REAL | NUMBERS)
    (tmp_path / "nih").mkdir()  # the README's block reads verdicts on unseen combinations from the same page
    (tmp_path / "nih" / "report.md").write_text(text)
    assert "unseen" not in readme.findings_block(tmp_path)


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_blind_probe_judges_nobody(seeds):
    """Also over seeds, whose values of the real images are one and the same number."""
    blind = rows_of({"real_test": (0.45, 0.6, 0.7)}, seeds, note=f"90 images; {probe_report.BLIND}")
    rest = rows_of({k: v for k, v in (REAL | NUMBERS).items() if k != "real_test"}, seeds)
    lines = probe_report.probe_lines(frames.over_seeds(record.results(blind + rest)))
    assert re.findall(r"\*\*(.+?)\*\*", "\n".join(lines)) == ["cannot be said"]


def test_several_seeds_are_read_by_their_own_interval():
    hcn = [r for s, v in enumerate((0.55, 0.75, 0.95)) for r in rows_of({"hcn": (v, v, v)}, (s,))]
    rows = rows_of(REAL, (0, 1, 2)) + hcn
    results = frames.over_seeds(record.results(rows))
    (line,) = [x for x in probe_report.probe_lines(results) if x.startswith("- sex")]
    assert "**within noise** for HCN (CompDiff) 0.75 [0.253, 1.25]" in line  # t(2) = 4.303, std 0.2, n = 3


def test_results_without_probes_have_no_section():
    assert probe_report.probe_lines(frames.over_seeds(made_up())) == []
