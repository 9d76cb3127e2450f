"""Rows of judges from outside: absent ones say so, present ones are plain computations of their outputs."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from panel import fake, make_reference, value

from compdiff import controls, features, judges, metrics, stats, weights


@pytest.fixture(scope="module")
def ref():
    return make_reference()


def describe(name, s):
    """Stands for features.cached: 8 numbers per image, another view for each judge."""
    return (s.features * (1 + len(name))).astype(np.float32)


def test_absent_judges_give_rows_with_the_remedy_for_every_set(ref, tmp_path):
    ref = replace(ref, extractor="lite0@96")  # the main extractor, whatever it was fed
    sets = [fake(ref), controls.real_test(ref)]
    (tmp_path / weights.entries()["age"].file).write_bytes(b"mine")  # there, but of a network that is not built in
    rows = judges.outside(sets, ref, ("Pleural Effusion", "No Finding"), "chest", None, str(tmp_path), 20, 0)
    assert all(np.isnan(r["value"]) and r["note"].startswith("not available: ") for r in rows)
    metric = {(r["extractor"], r["metric"]) for r in rows}
    assert metric == {("inception", "FID"), ("inception", "KID"), ("radimagenet", "FID"), ("radimagenet", "KID"),
                      ("biovil", "cosine paired"), ("xrv", "AUROC:Pleural Effusion"), ("sex", "accuracy:sex"),
                      ("age", "age RMSE")}  # fmt: skip  # this schema has no race, and the main extractor is no outsider
    assert len(rows) == 2 * len(metric) and {r["stage"] for r in rows} == {"judges"}
    assert {r["extractor"] for r in rows if "is there, but its architecture is not built in" in r["note"]} == {"age"}
    assert {r["extractor"] for r in judges.outside(sets, ref, ("glaucoma",), "fundus", None, str(tmp_path), 20, 0)} == {
        "inception", "radimagenet"}  # fmt: skip


@pytest.fixture
def present(monkeypatch, tmp_path):
    """Every file is there; a judge of findings, sex or race says what the first features say."""
    (tmp_path / "mine.pt").write_bytes(b"mine")
    monkeypatch.setattr(judges, "weight_file", lambda name, folder: tmp_path / "mine.pt")
    monkeypatch.setattr(features, "logits", lambda f, name, folder: np.tile(f, 3)[:, : len(weights.entries()[name].outputs)])


def test_present_judges_compute_from_their_own_features(ref, present):
    s = fake(ref)
    rows = judges.outside([s], ref, (), "chest", describe, "", 20, 0)
    whole = {(r["extractor"], r["metric"]): r for r in rows if r["group_kind"] == "overall"}
    assert whole["inception", "FID"]["value"] == pytest.approx(metrics.fid(10 * s.features, 10 * ref.features), rel=1e-4)
    assert whole["radimagenet", "FID"]["value"] > whole["inception", "FID"]["value"]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s.features, ref.features)]
    assert whole["biovil", "cosine paired"]["value"] == pytest.approx((unit[0] * unit[1]).sum(1).mean(), rel=1e-5)
    assert whole["biovil", "cosine paired"]["note"] == ""
    assert whole["inception", "FID"]["note"] == f"weights unverified, sha256 {hashlib.sha256(b'mine').hexdigest()[:12]}"
    asked = (ref.rows["sex"] == "Female").to_numpy()
    assert whole["sex", "accuracy:sex"]["value"] == ((s.features[:, 1] > s.features[:, 0]) == asked).mean()
    assert value([r for r in rows if r["extractor"] == "inception"], "KID", ("sex", "Male"))["n"] == (~asked).sum()


def test_rows_of_a_judge_trained_on_the_judged_data_say_so(ref, present):
    labelled = replace(ref, rows=ref.rows.rename(columns={"y_spot": "y_Pleural Effusion"}))
    for dataset, judges_of_it in (("nih", {"xrv", "age"}), ("chest", set()), ("", set())):
        rows = judges.outside([fake(ref)], labelled, ("Pleural Effusion",), "chest", describe, "", 20, 0, dataset)
        assert {r["extractor"] for r in rows if f"trained on {dataset} itself" in r["note"]} == judges_of_it
        assert {"xrv", "sex", "inception"} <= {r["extractor"] for r in rows}


def test_findings_are_scored_by_the_output_of_that_name(ref, present):
    labelled = replace(ref, rows=ref.rows.rename(columns={"y_spot": "y_Pleural Effusion"}))
    s = fake(ref)
    (row,) = [r for r in judges.outside([s], labelled, ("Pleural Effusion",), "chest", describe, "", 20, 0) if r["extractor"] == "xrv"]
    at = weights.entries()["xrv"].outputs.index("Effusion")
    expected = stats.auroc(labelled.rows["y_Pleural Effusion"].to_numpy(), np.tile(s.features, 3)[:, at])[0]
    assert row["metric"] == "AUROC:Pleural Effusion" and row["value"] == pytest.approx(expected)
    assert row["lo"] < row["value"] < row["hi"]


def test_a_category_the_judge_does_not_know_is_left_out_and_named(ref, present):
    known = weights.entries()["race"]
    rng = np.random.default_rng(0)
    race = rng.choice(["White", "Black", "Asian", "Hispanic"], len(ref.rows))
    wider = replace(ref, rows=ref.rows.assign(race=race))
    s = fake(ref)
    (row,) = judges.category(s, replace(wider, extractor="race"), judges.Judge(known, ["accuracy:race"], ""), 20, 0)
    said = np.array(known.outputs)[s.features[:, :3].argmax(1)]
    assert row["n"] == (race != "Hispanic").sum() and row["note"] == "without Hispanic, no answer of this judge"
    assert row["value"] == (said == race)[race != "Hispanic"].mean()
    perfect = replace(wider, rows=wider.rows.assign(race=said), extractor="race")
    (row,) = judges.category(s, perfect, judges.Judge(known, ["accuracy:race"], ""), 20, 0)
    assert row["value"] == row["hi"] == 1 > row["lo"] > 0.97


def test_a_wrong_file_is_an_error_not_a_missing_number(ref, tmp_path):
    (tmp_path / weights.entries()["biovil"].file).write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256"):
        judges.outside([fake(ref)], ref, (), "chest", describe, str(tmp_path), 20, 0)
