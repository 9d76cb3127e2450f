"""The cardiac report says what the numbers say: verdicts, gates, what is missing and what cannot be concluded."""

import numpy as np
import pandas as pd
import pytest

from compdiff import cardiac, faithful, heart_fairness, heart_report, plots_heart, readme, record, rendering
from compdiff.heart_fairness import MAIN


def generation(dice=0.8, kid=0.2):
    rows = {"real_test": (0.9, 0.01), "text": (0.5, 0.3), "control": (dice, kid), "pasted": (0.95, 2.0)}
    return pd.DataFrame(
        [{"method": m, "metric": k, "value": v, "lo": v - 0.01, "hi": v + 0.01, "note": ""}
         for m, pair in rows.items() for k, v in zip(("Dice", "KID"), pair, strict=True)]
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
        p = np.stack([np.where(rng.random(120) < np.where(women, share, 0.05), 1 - y, y) for _ in range(3)])
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
    text = heart_report.report("Phantoms", generation(), matrix(), rates, changes, {"cine, synthetic": "no frames"}, [0], True)
    first = next(line for line in text.splitlines() if line.startswith("**Did"))
    assert "worst group by sex" in first and "helped" in first and "[" in first
    assert "120 test patients, 48 with heart failure" in text and "phantoms: no number says anything" in text
    assert "cine, synthetic: no frames" in text and "floor" in text
    back = changes.assign(value=-changes["value"], lo=-changes["hi"], hi=-changes["lo"], verdict="harmed")
    assert "harmed" in heart_report.verdict_line(back), "it is said either way"


@pytest.mark.parametrize(
    "dice, kid, words",
    [(0.8, 0.2, ["holds"] * 4), (0.6, 0.2, ["does not hold", "holds", "holds", "holds"]),
     (0.4, 0.5, ["does not hold", "does not hold", "does not hold", "holds"])],
)  # fmt: skip
def test_gates(dice, kid, words):
    lines = [line for line in heart_report.generation_lines(generation(dice, kid)) if line.startswith("- Gate")]
    assert [line.rpartition(": ")[2].rstrip(".") for line in lines] == words


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
    shown = {line.get_label() for line in plots_heart.faithfulness(generation(), "t").axes[0].containers}
    assert shown == set(heart_report.METHODS.values())
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
