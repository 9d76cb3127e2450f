"""The cardiac report says what the numbers say: verdicts, gates, what is missing and what cannot be concluded."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from compdiff import cardiac, faithful, heart_fairness, heart_report, plots_heart, readme, record, rendering
from compdiff.attributes import AGE, SEX, Attribute, Schema
from compdiff.heart_fairness import MAIN
from compdiff.heart_report import EJECTION, GAIN, PAIRS, minus


def generation(dice=0.8, kid=0.2, gain=0.1, ejection=0.02):
    rows = {"real_test": (0.9, 0.01), "text": (0.5, 0.3), "control": (dice, kid), "pasted": (0.3, 2.0)}
    found = [(m, k, v) for m, pair in rows.items() for k, v in zip(("Dice", "KID"), pair, strict=True)]
    found += [("control", GAIN, gain), ("control", EJECTION, ejection), ("diagnosis", "Dice", 0.55), ("diagnosis", EJECTION, 0.05)]
    value = {(m, k): v for m, k, v in found}
    found += [(m, minus(k, rival), value[m, k] - value[rival, k]) for m, rival in PAIRS for k in ("Dice", "KID", EJECTION)
              if {(m, k), (rival, k)} <= value.keys()]
    return pd.DataFrame(
        [{"method": m, "metric": k, "value": v, "lo": v - 0.01, "hi": v + 0.01, "n": 120.0, "n_ref": 60.0, "note": "",
          "extractor": "lite0@96"} for m, k, v in found]
    )  # fmt: skip


@pytest.fixture(scope="module")
def tables():
    """Rates and changes of two configurations: women are served badly on real images, well with synthetic ones."""
    studies = cardiac.phantom_studies(120, "test", seed=0, prevalence=0.4, balanced=True)
    y, rows = studies.table["y_heart failure"].to_numpy(), np.arange(120)
    masks, rng = heart_fairness.group_masks(studies, rows), np.random.default_rng(0)
    women = masks["sex", "Female"]
    judged = {}
    for source, share in (("real", 0.45), ("real + synthetic", 0.02)):
        p = np.stack([np.where(rng.random(120) < np.where(women, share, 0.05), 1 - y, y) for _ in range(5)])
        judged[source] = heart_fairness.judge(y, p, masks, 200, seed=0)
    rates = pd.DataFrame([{"input": "stacked", "source": s, "sampling": "as found", **line} for s, j in judged.items()
                          for line in heart_fairness.rate_rows(j, masks) + heart_fairness.parity_rows(j, masks)])  # fmt: skip
    changes = heart_fairness.changes(judged["real"], judged["real + synthetic"], masks, ["sex", "bmi"])
    own = {"input": "stacked", "source": "real + synthetic", "sampling": "as found"}
    return rates, pd.DataFrame([own | line for line in changes])


def matrix():
    rng = np.random.default_rng(0)
    groups = faithful.groups(pd.DataFrame({"sex": ["Male", "Female"] * 40}), ["sex"])
    return faithful.matrix(rng.normal(size=(80, 4)), groups, rng.normal(size=(80, 4)), groups, 2, 0)


def test_the_report_states_whether_augmentation_helped(tables):
    rates, changes = tables
    text = heart_report.report("Phantoms", generation(), matrix(), rates, changes, {"cine, synthetic": "no frames"}, [0], True, (1, 3))
    lines = text.splitlines()
    first = next(line for line in lines if line.startswith("**Did"))
    before = rates[(rates["source"] == "real") & (rates["group_kind"] == "overall") & (rates["metric"] == MAIN)]["value"].item()
    assert f"overall changed from {rendering.number(before)} by" in first and "helped" in first and ";" not in first
    listed = lines[lines.index(first) + 2]
    assert listed.startswith("- balanced accuracy of the worst group by sex changed from") and "helped" in listed
    assert f"{len(changes)} comparisons" in text and "exploratory" in text
    assert "on 1 of 3 folds and judged on the test cohort" in text
    assert "on each of 5 folds and their predictions pooled" in heart_report.folds_line(5, 5)
    assert "120 test phantoms, 48 with heart failure" in text and "phantoms: no number says anything" in text
    assert "cine, synthetic: no frames" in text and "floor" in text
    back = changes.assign(value=-changes["value"], lo=-changes["hi"], hi=-changes["lo"], verdict="harmed")
    assert "harmed" in heart_report.verdict_lines(back)[0], "it is said either way"


def test_a_ceiling_is_named(tables):
    rates, changes = tables
    everybody = (rates["source"] == "real") & (rates["group_kind"] == "overall") & (rates["metric"] == MAIN)
    for value, word in ((0.997, "at most 0.003 can be gained; above 0.98 a gain cannot be seen here, only harm."),
                        (0.9, "at most 0.1 can be gained.")):  # fmt: skip
        line = heart_report.ceiling_line(rates.assign(value=rates["value"].mask(everybody, value)))
        assert f"balanced accuracy {value} [" in line and line.endswith(word)
        assert heart_report.ceiling_line(rates) in heart_report.limits(rates)
    few = heart_report.change_lines(changes.assign(repeats=2))
    assert "2 repeats: too few" in few[0] and "too few" not in heart_report.change_lines(changes)[0]
    assert all("overall changed" in line for line in few), "without a verdict only everybody is told, a line for each"


SUNNYBROOK = {("18-40", "Male"): (1, 2), ("40-60", "Male"): (9, 3), ("60-80", "Male"): (7, 7), ("80+", "Male"): (2, 1),
              ("40-60", "Female"): (0, 4), ("60-80", "Female"): (4, 3), ("80+", "Female"): (1, 1)}  # fmt: skip


def test_the_few_are_named_with_how_few_of_them_are_ill():
    """Counts of the Sunnybrook data: 45 patients (ill, well), 24 of them ill, five of these women."""
    rows = [{"age": age, "sex": sex, "pathology": "failing" if ill else "other", "y_heart failure": int(ill)}
            for (age, sex), (n, well) in SUNNYBROOK.items() for ill in [True] * n + [False] * well]  # fmt: skip
    schema = Schema((AGE, SEX, Attribute("pathology", ("failing", "other"))))
    studies = replace(cardiac.phantom_studies(2, "test", seed=0), schema=schema, table=pd.DataFrame(rows))
    masks = heart_fairness.group_masks(studies, np.arange(45))
    y = studies.table["y_heart failure"].to_numpy()
    judged = heart_fairness.judge(y, np.random.default_rng(0).random((5, 45)), masks, 50, seed=0)
    own = {"input": "stacked", "source": "real", "sampling": "as found"}
    text = "\n".join(heart_report.limits(pd.DataFrame([own | row for row in heart_fairness.rate_rows(judged, masks)])))
    assert "sex Female (13 patients, 5 with heart failure)" in text
    assert "Female with heart failure: 5." in text and "Male with heart failure" not in text, "19 men are"
    assert "- 7 of 7 intersections of two attributes are too small to judge, fewest ill first: age x sex 40-60 Female (4" in text
    assert all(f"age x sex {age} {sex} ({n + well} patients, {n} with heart failure)" in text
               for (age, sex), (n, well) in SUNNYBROOK.items()), "every intersection with its own counts"  # fmt: skip
    assert "pathology" not in text, "a diagnosis has no rates of its own: all of its patients are ill, or none"


def test_the_matrix_says_which_group_is_closest():
    found = pd.DataFrame([{"attribute": "sex", "real": a, "other": b, "kind": kind, "value": v, "n": 9, "note": ""}
                          for kind in ("synthetic", "real") for a, b, v in
                          (("F", "F", 3.0), ("F", "M", 2.0), ("M", "F", 5.0), ("M", "M", 4.0))])  # fmt: skip
    text = " ".join(heart_report.matrix_lines(found))
    few = found.iloc[[0]].assign(real="X", value=np.nan, note="not available: 3 patients, fewer than 10")
    told = heart_report.matrix_lines(pd.concat([found, few]))
    assert "- sex X: not available: 3 patients, fewer than 10." in told and told[:-1] == heart_report.matrix_lines(found)
    assert "diagonal in 1 of 2 groups" in text and "most often it is synthetic M, in 2 of 2 rows" in text


@pytest.mark.parametrize(
    "dice, kid, words",
    [(0.8, 0.2, "1111111"), (0.6, 0.2, "0111111"), (0.705, 0.2, "0111111"), (0.565, 0.305, "0111111"), (0.515, 0.305, "0101111"), (0.505, 0.315, "0001110"), (0.4, 0.5, "0001110")],
)
def test_gates_hold_by_the_bounds_of_the_intervals(dice, kid, words):
    found = gates(generation(dice, kid))
    assert ["1" if word.startswith("holds") else "0" for word in found] == list(words) and not any("available" in w for w in found)


def test_no_worse_is_said_only_where_a_worse_one_would_be_seen():
    assert gates(generation())[-1] == "holds, it is better"
    assert gates(generation(kid=0.305))[-1] == "holds within noise, at most 0.015 worse"
    assert gates(generation(kid=0.32))[-1] == "does not hold"
    blind = generation()
    pasted = (blind["method"] == "pasted") & (blind["metric"] == minus("KID", "text"))
    blind.loc[pasted, "lo"] = -0.1
    assert gates(blind)[-2:] == ["does not hold", "cannot be said, for the pasted mask is not seen to be worse either"]


def gates(frame):
    lines = [line for line in heart_report.generation_lines(frame) if line.startswith("- Gate")]
    return [line.rpartition(": ")[2].rstrip(".") for line in lines]


def test_obedience_is_more_than_the_diagnosis():
    assert gates(generation(gain=0.005))[3] == "does not hold" and gates(generation(ejection=0.06))[4] == "does not hold"
    older = generation()
    assert gates(older[older["metric"] != GAIN])[3] == "not available"
    lines = heart_report.generation_lines(generation())
    assert lines[0].startswith("KID by lite0@96") and any("KID to real test images 0.2 [0.19, 0.21] (n = 120 against 60)" in x for x in lines)
    assert any(x.endswith("mean absolute error 0.02 [0.01, 0.03] (fraction).") for x in lines)


def test_pages_show_every_group_and_mark_the_small_ones(tables, tmp_path):
    rates, _ = tables
    pages = heart_report.pages(rates)
    first = pages["Balanced accuracy, stacked ED/ES"]
    assert list(first.columns) == ["real, as found", "real + synthetic, as found"] and (first != "").all().all()
    marked = {name.split(" (")[0] for name in first.index[first["real, as found"].str.contains("†")]}
    small = rates[(rates["metric"] == MAIN) & rates["note"].str.startswith("ineligible")]
    assert marked == {f"{k}: {g}" for k, g in zip(small["group_kind"], small["group"], strict=True)} and marked
    assert len(pages["Fairness criteria (fairlearn), stacked ED/ES"]) >= 12
    rendering.write_pages(rates, pages, tmp_path, "fairness", "Phantoms", heart_report.NOTES)
    assert {f.suffix for f in tmp_path.iterdir()} == {".csv", ".md", ".tex"}
    assert "Too small to judge" in " ".join(heart_report.limits(rates))


def test_a_number_that_is_missing_says_why():
    assert heart_report.cell({"value": np.nan, "note": "not available: nobody"}) == "not available: nobody"
    row = {"value": 0.81, "std": 0.02, "lo": 0.7, "hi": 0.9, "note": "ineligible: few"}
    assert heart_report.cell(row) == "0.81 ± 0.02 [0.7, 0.9] †"
    assert heart_report.cell(row | {"std": np.nan, "lo": np.nan, "note": ""}) == "0.81"


def test_figures_show_what_they_are_given(tables):
    rates, changes = tables
    groups = rates[rates["group_kind"].isin(["overall", "sex", "bmi"])]["group"].nunique()
    figure = plots_heart.by_group(rates, "stacked", ["sex", "bmi"], "t")
    assert len(figure.axes) == 4 and len(figure.axes[-1].get_xticks()) == groups
    figure = plots_heart.change_forest(changes, "stacked", "t")
    assert len(figure.axes[0].get_yticks()) == len(changes[changes["group"].isin(["", "worst group", "gap"])])
    assert len(plots_heart.matrices(matrix(), "t").axes) == 2
    axes = plots_heart.faithfulness(generation(), "t").axes[0]
    assert {line.get_label() for line in axes.containers} == {n for m, n in heart_report.METHODS.items() if m != "diagnosis"}
    assert [t.get_text() for t in axes.texts] == ["gate 0.7"]
    near = rates.assign(value=1.0, lo=0.97, hi=1.0)
    assert plots_heart.by_group(near, "stacked", ["sex"], "t").axes[0].get_ylim() == pytest.approx((0.92, 1.03))
    studies = cardiac.phantom_studies(2, "test", seed=0)
    images, masks = studies.images("stacked", 32), studies.masks("stacked", 32)
    drawn = plots_heart.pairs(masks, {"phantom": images}, ["a", "b"], "t")
    assert np.array_equal(drawn.axes[3].images[0].get_array(), images[0, ..., 1]) and len(drawn.axes) == 8


def test_the_readme_shows_hearts_in_a_table_of_their_own(tmp_path):
    folder = tmp_path / "sunnybrook"
    folder.mkdir()
    rows = [{"stage": "cardiac", "method": m, "metric": metric, "value": v, "lo": v - 0.1, "hi": v + 0.1, "n": 45}
            for m, metric, v in (("control", "Dice", 0.75), ("text", "Dice", 0.5), ("control", "KID", 2.0))]  # fmt: skip
    record.save_results(record.results(rows, dataset="sunnybrook", seed=0), folder / "generation.csv")
    (folder / "changes.csv").write_text(
        "input,source,sampling,group_kind,group,metric,value,lo,hi,verdict,note\n"
        "stacked,real + synthetic,as found,overall,,balanced accuracy,0.02,-0.05,0.09,undecided,\n"
        "stacked,real + synthetic,weighted,overall,,balanced accuracy,0.5,0.4,0.6,helped,\n"
    )
    (folder / "report.md").write_text("- *accuracy*: something: holds in 3 of 3.\n")
    head, _, line = readme.hearts_block(tmp_path).splitlines()
    cells = dict(zip(*(map(str.strip, text.strip("|").split("|")) for text in (head, line)), strict=True))
    assert cells["Dice, ControlNet"] == "0.75 [0.65, 0.85]" and cells["KID, ControlNet"] == "2.00 [1.90, 2.10]"
    assert cells["balanced accuracy, real + synthetic minus real"] == "0.02 [-0.05, 0.09]: undecided"
    assert readme.findings_block(tmp_path) == readme.NO_RESULTS, "its gates are others: they stand in the table of hearts"


def test_classifiers_of_hearts_count_in_the_budget(tmp_path):
    for repeat, minutes in (("repeat_0", 0.25), ("repeat_1", 0.5)):
        made = {"minutes": minutes, "peak_memory_mib": 100 + minutes, "machine": {"cores": 2}}
        record.write_json(tmp_path / "seed0/downstream/stacked/real/as_found" / repeat / "run.json", made)
    (row,) = readme.budget(tmp_path, "cardiac", [0, 1]).to_dict("records")
    assert (row["stage"], row["runs"], row["minutes"], row["peak MiB"]) == ("10_cardiac_fairness", 2, 0.75, 100.5)
