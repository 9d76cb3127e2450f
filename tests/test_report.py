"""The sentences of report.md fall where the numbers say, and name methods by their titles."""

import re

import numpy as np
import pandas as pd
import pytest
from test_tables import SCHEMA, made_up

from compdiff import config, frames, gates, record, rendering, report, tables


@pytest.fixture(scope="module")
def results():
    return frames.over_seeds(made_up())


def test_gates_fall_either_way(results):
    found = {(f.gate, f.method, f.about): f.holds for f in gates.findings(results, SCHEMA)}
    assert (
        found["accuracy", "hcn", "age"] is True and found["accuracy", "hcn", "race"] is False
    )  # .85 and .6 against .9 x .9
    assert found["above shuffled", "hcn", "race"] is True
    by_gate = {f.gate: f for f in gates.findings(results, SCHEMA) if f.method == "text"}
    assert by_gate["KID below untrained"].holds is True and by_gate["told apart from a copy"].holds is True
    worse = results.copy()
    worse.loc[(worse["metric"] == "KID") & (worse["method"] == "untrained"), "value"] = 0.001
    worse.loc[(worse["stage"] == "memorisation"), ["value", "lo", "hi"]] = (0.5, 0.4, 0.6)
    worse.loc[(worse["metric"] == "accuracy:race") & (worse["method"] == "shuffled"), "value"] = 0.57
    fallen = {
        f.gate: f.holds
        for f in gates.findings(worse, SCHEMA)
        if f.method == "text" and f.about not in ("age", "sex")
    }
    assert fallen == dict.fromkeys(gates.HEADINGS, False)
    blind = results.copy()
    blind.loc[(blind["metric"] == "accuracy:age") & (blind["method"] == "real_test"), ["value", "lo"]] = (0.3, 0.26)
    assert {f.holds for f in gates.findings(blind, SCHEMA) if f.gate == "accuracy" and f.about == "age"} == {
        None
    }, "a judge that guesses"
    pixels = results[results["metric"] == "suspected copies"].assign(metric="suspected copies (pixels)", lo=0.4, hi=0.6)
    blurred = gates.copy_gates(pd.concat([results, pixels]))
    assert {f.holds for f in blurred} == {False}, "one metric of two is not enough"
    assert all("(point value)" in gates.HEADINGS[gate] for gate in ("accuracy", "KID below untrained"))
    missing = {f.holds for f in gates.findings(results[results["method"].isin(config.METHODS)], SCHEMA)}
    assert missing == {None}, "without controls nothing can be said"


def test_differences_use_intervals_unless_a_paired_one_exists(results):
    verdict = lambda r: report.differences(r, SCHEMA).set_index(["metric", "a", "b"])["verdict"]  # noqa: E731
    assert verdict(results)["FID-lite0@96", "text", "flat"] == "within noise"  # [18, 22] and [20, 24] touch
    assert verdict(results)["FID-lite0@96", "text", "hcn_fairdiffusion"] == "below"  # [18, 22] and [26, 30] do not
    paired = frames.Item("quality", "FID").of(results, "text") | {
        "stage": "difference",
        "metric": "FID minus flat",
        "value": -2.0,
        "lo": -3.0,
        "hi": -1.0,
    }
    assert verdict(pd.concat([results, pd.DataFrame([paired])]))["FID-lite0@96", "text", "flat"] == "below"


def test_report_reads_as_text(results):
    text = report.report(results, SCHEMA, "Chest phantoms", "phantoms", [0])
    (line,) = [x for x in text.splitlines() if x.startswith("  - race, judge on real test images 0.9 [0.86, 0.94]: ")]
    assert "**DOES NOT HOLD** for Text baseline 0.6 [0.56, 0.64] (67 %); Flat encoder 0.6" in line
    row = "| holds: age, sex; DOES NOT HOLD: race | holds: age, sex, race | holds | holds: FID, KID | holds |"
    assert f"| HCN (CompDiff) {row}" in text
    assert len(text.splitlines()) < 80, "one page"
    assert text.count("n = 1 training seed") == 1 and "nan" not in text
    keys = "|".join(m for m in config.METHODS if "_" in m)
    assert not re.search(rf"\b({keys}|real_train|vae)\b", text), "a key instead of a title"


def test_distances_rank_only_between_clear_ends(results):
    assert {f.holds for f in gates.ranking_gates(results)} == {True} and not gates.ranking_lines(
        gates.ranking_gates(results)
    )
    narrow = results.copy()
    narrow.loc[(narrow["metric"] == "KID") & (narrow["method"] == "vae"), ["value", "lo", "hi"]] = (0.021, 0.019, 0.023)
    found = gates.ranking_gates(narrow)
    text = " ".join(gates.ranking_lines(found))
    assert {f.about for f in found if f.holds is False} == {"KID"} and "**KID cannot rank here** Text baseline" in text
    assert "Attribute accuracy" in text and "FID cannot" not in text


def test_better_and_worse_follow_the_metric():
    words = {("above", "FID-lite0@96"): "above (worse)", ("below", "ECE:x"): "below (better)",
             ("above", "macro AUROC"): "above (better)", ("below", "gap macro AUROC by sex"): "below (better)"}  # fmt: skip
    assert {key: frames.worth(*key) for key in words} == words
    assert frames.worth("within noise", "FID") == "within noise" and frames.beside("r:heart") == ""


def test_seeds_and_holm_are_named():
    three = made_up((0, 1, 2))
    text = report.report(frames.over_seeds(three), SCHEMA, "Chest phantoms", "phantoms", [0, 1, 2])
    assert "n = 3 training seeds" in text and "count other trainings (t-interval of the seeds' values)" in text and "p-values are twice the mean" in text
    assert "not clipped" in text and "uncertainty (seed 0)" in text and "(run.json)" in text
    assert "not clipped" in rendering.seeds_note(tables.table1(frames.over_seeds(three), SCHEMA, "chest"))
    base = made_up().iloc[0].to_dict() | {"stage": "difference", "setting": "1b", "method": "hcn"}
    base |= {"lo": np.nan, "hi": np.nan}
    rows = [base | {"metric": "macro AUROC minus 1a", "value": -0.1, "lo": -0.2, "hi": -0.02},
            base | {"metric": "p (bootstrap, Holm) macro AUROC minus 1a", "value": 0.03},
            base | {"metric": "p (DeLong, Holm) AUROC:x minus 1a", "value": 0.9},
            *(base | {"metric": f"AUPRC:{x} minus 1a", "value": 0.2} for x in "xyz"),
            *(base | {"metric": f"p (permutation, Holm) AUPRC:{x} minus 1a", "value": p}
              for x, p in (("x", 0.049), ("y", 0.051)))]  # fmt: skip
    lines = report.downstream_lines(frames.over_seeds(record.results(rows)))
    assert "- **macro AUROC** (higher is better) of 1 classifiers, by p: 1 below (worse)." in lines
    assert [f"- **AUPRC:{x}** (higher is better) of 1 classifiers, by {by}: 1 {word}." in lines for x, by, word in
            (("x", "p", "above (better)"), ("y", "p", "within noise"), ("z", "interval", "cannot be said"))] == [True] * 3  # fmt: skip
    assert lines[2].startswith("By the p-value adjusted by Holm (0.05)")
    assert "  - below (worse): 1b HCN (CompDiff) -0.1 [-0.2, -0.02], p = 0.03 (bootstrap, Holm)" in lines
    rows[1] |= {"value": 0.06}  # one of several methods: its own interval excludes 0, the family's test does not
    lines = report.downstream_lines(frames.over_seeds(record.results(rows)))
    assert "- **macro AUROC** (higher is better) of 1 classifiers, by p: 1 within noise." in lines


def test_several_seeds_must_agree_beside_the_p_value():
    """p knows of other test patients: of one seed it decides, of three the seeds' interval must not hold 0 either."""
    base = made_up().iloc[0].to_dict() | {"stage": "difference", "metric": "macro AUROC minus 1a", "setting": "1b"}
    p = base | {"metric": "p (bootstrap, Holm) macro AUROC minus 1a", "value": 0.001, "lo": np.nan, "hi": np.nan}
    for values, word in (((-0.1, -0.11, -0.09), "below"), ((-0.3, 0.05, -0.02), "within noise")):
        rows = [base | {"value": v, "seed": s, "lo": -0.2, "hi": -0.01} for s, v in enumerate(values)]
        frame = record.results([*rows, *(p | {"seed": s} for s in range(3))])
        results = frames.over_seeds(frame)
        row = results[results["metric"] == "macro AUROC minus 1a"].iloc[0].to_dict()
        assert report.word_against_real(results, row) == (word, "p and interval")
        one = frame[frame["seed"] == 0]  # as notebook 07 has it: no column `seeds`
        assert report.word_against_real(one, one.iloc[0].to_dict()) == ("below", "p")


def test_a_second_training_of_1a_is_no_classifier_but_the_measure_of_chance():
    """Two of three are clearly below 1a, one by no more than 1a-again lies above it; p of three seeds is twice the mean."""
    base = made_up().iloc[0].to_dict() | {"stage": "difference", "metric": "macro AUROC minus 1a"}
    given = {("1a-again", "real_train"): 0.03, ("1b", "text"): -0.09, ("1d", "text"): -0.03, ("2b", "hcn"): -0.031}
    rows = []
    for (setting, method), value in given.items():
        mine = base | {"setting": setting, "method": method, "value": value}
        rows += [mine | {"lo": value - 0.01, "hi": value + 0.01},
                 mine | {"metric": "p (bootstrap, Holm) macro AUROC minus 1a", "value": 0.02476, "lo": np.nan, "hi": np.nan}]  # fmt: skip
    lines = report.downstream_lines(frames.over_seeds(record.results(rows)))
    head = "- **macro AUROC** (higher is better) of 3 classifiers, by p: 2 below (worse); 1 no larger than a second training of 1a."
    at = lines.index(head)
    p = ", p = 0.0248 (bootstrap, Holm)"
    assert lines[at + 1] == ("  - below (worse): 1b Text baseline -0.09 [-0.1, -0.08]" + p
                             + "; 2b HCN (CompDiff) -0.031 [-0.041, -0.021]" + p)  # fmt: skip
    assert lines[at + 2] == f"  - no larger than a second training of 1a: 1d Text baseline -0.03 [-0.04, -0.02]{p}"
    assert lines[at + 3] == f"  - 1a-again, macro AUROC: 0.03 [0.02, 0.04]{p}" and "above (better)" not in "".join(lines)
    three = pd.concat([record.results(rows).assign(seed=s) for s in range(3)])
    text = " ".join(report.downstream_lines(frames.over_seeds(three)))
    assert "p = 0.0495 (bootstrap, Holm)" in text, "not rounded to 0.05, the limit that it lies below"
    alone = report.downstream_lines(frames.over_seeds(record.results(rows[:2])))
    assert not [line for line in alone if " of 0 classifiers" in line] and f"  - 1a-again, macro AUROC: 0.03 [0.02, 0.04]{p}" in alone


def test_published_directions_stand_in_the_report_under_both_readings(results):
    text = report.report(results, SCHEMA, "Chest phantoms", "phantoms", [0], "chest")
    section = text[text.index("## Direction of the published comparisons") :]
    assert section.count("Table 2, FID") == section.count("Table 3, zero-shot FID") == 2
    assert section.count("Table 1, FID (lower is better):") == 1 and "no published number" in report.report(
        results, SCHEMA, "Hearts", "phantoms", [0], "heart"
    )
