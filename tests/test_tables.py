"""Tables and README blocks, on a small results frame with invented numbers (`made_up`, also for report and figures)."""

import json
import re
from itertools import product

import numpy as np
import pandas as pd
import pytest

from compdiff import config, frames, paths, readme, record, rendering, sources, tables
from compdiff.attributes import SCHEMAS

SCHEMA = SCHEMAS["chest"]
HELD_OUT = ["18-40 Female Asian", "80+ Male Hispanic"]
COUNTS = {
    SCHEMA.cell_name(c): 0 if SCHEMA.cell_name(c) in HELD_OUT else 3 + 11 * i for i, c in enumerate(SCHEMA.cells())
}
FID = {"real_train": 5.0, "vae": 8.0, "untrained": 90.0, "shuffled": 20.0, "copy": 5.0} | {
    m: 20.0 + 2 * i for i, m in enumerate(config.MAIN_METHODS)
}


def made_up(seeds=(0,), methods=config.MAIN_METHODS, cells=True) -> pd.DataFrame:
    """Results of 06 and 07 with invented numbers: text has FID 20 [18, 22], flat 22 [20, 24] ...; each seed adds 1."""
    rows = []
    for seed, key in product(seeds, [*methods, "real_train", "vae", "untrained", "shuffled", "copy", "real_test"]):

        def add(stage, metric, value, kind="overall", group="", half=2.0, n=480, seed=seed, key=key, **more):
            row = dict(dataset="chest", seed=seed, stage=stage, method=key, group_kind=kind, group=group)
            row |= dict(metric=metric, value=value, lo=value - half, hi=value + half, n=n, n_ref=n, note="")
            rows.append(row | {"setting": "test", "extractor": "lite0@96" if stage == "quality" else "judge"} | more)

        fid = FID.get(key, 25.0) + seed
        if key != "real_test":
            add("quality", "FID", fid)
            add("quality", "KID", fid / 1000, half=0.002)
            add("quality", "precision", 0.5, half=0.05)
            add("quality", "recall", 0.4, half=0.05)
            add("quality", "MS-SSIM-3 paired", 0.3, half=0.02, extractor="pixels")
            for name in SCHEMA.names:
                add("quality", "ES-FID", fid + 3, name)
                for group in SCHEMA[name].categories:
                    add("quality", "FID", fid + 2, name, group, n=120)
        for name in SCHEMA.names:
            score = {"real_test": 0.9, "shuffled": 0.3, "untrained": 0.3}.get(key, 0.85 if name != "race" else 0.6)
            add("alignment", f"accuracy:{name}", score, half=0.04)
        if key in config.METHODS:
            add("alignment", "age RMSE", 9.0, half=0.5)
            add("quality", "KID", 0.05, "held_out", "held_out", half=0.01, n=24)
            add("memorisation", "suspected copies", 0.01, half=0.01)
            add("memorisation", "nearest training distance", 9.0, lo=np.nan, hi=np.nan)
            for label, value in (("No Finding", 0.8), ("Pneumothorax", 0.7)):
                add("alignment", f"AUROC:{label}", value, half=0.05)
            mean = dict(lo=np.nan, hi=np.nan, note="mean of No Finding, Pneumothorax")
            add("alignment", "disease AUROC", 0.75, **mean)
            add("measured", "r:heart", 0.7, half=0.1, extractor="pixels")
            for name in map(SCHEMA.cell_name, SCHEMA.cells() if cells else ()):
                add("quality", "FID", np.nan, "cell", name, n=12, lo=np.nan, hi=np.nan, note="ineligible: n = 12 < 30")
                add("quality", "KID", 0.04, "cell", name, half=0.01, n=12, note="ineligible: n = 12 < 30")
        if key == "copy":
            add("memorisation", "suspected copies", 1.0, half=0.0)
            add("memorisation", "nearest training distance", 0.0, lo=np.nan, hi=np.nan)
        for setting in {"text": ("1b", "2b"), "hcn": ("1b", "2b"), "real_train": ("1a",)}.get(key, ()):
            add("downstream", "macro AUROC", 0.8, half=0.03, setting=setting, note="mean of No Finding, Pneumothorax")
            for name in SCHEMA.names:
                add("downstream", "gap macro AUROC", 0.1, name, half=0.05, setting=setting)
                add("downstream", "gap underdiagnosis", 0.2, name, half=0.05, setting=setting)
    return record.results(rows)


@pytest.fixture(scope="module")
def results():
    return frames.over_seeds(made_up())


# --- numbers --------------------------------------------------------------------------------------------------------
NUMBERS = {122.94: "122.9", 64.3: "64.3", 6.8: "6.80", 0.8123: "0.812", 0.0041234: "0.0041", 0.00002: "0.00002", 0: "0",
           -0.012: "-0.012", np.nan: "-"}  # fmt: skip


@pytest.mark.parametrize("value, text", NUMBERS.items())
def test_numbers_have_no_exponent(value, text):
    assert rendering.number(value) == text


def test_table1_places_every_number(results):
    table = tables.table1(results, SCHEMA, "chest")
    text = rendering.wide(table, "Quality")
    assert text.loc["Flat encoder", "FID-lite0@96 (n = 480)"] == "22.0 [20.0, 24.0]"
    assert list(text.index) == [
        frames.TITLES[m] for m in [*config.MAIN_METHODS, "real_train", "vae", "untrained", "shuffled", "copy"]
    ]
    assert text.loc["HCN (CompDiff)", "FID-lite0@96, published"] == "64.3 (0.3)"
    assert (
        text.loc["Flat encoder", "FID-lite0@96, published"]
        == text.loc["Untrained", "FID-lite0@96, published"]
        == "not in the record"
    )
    assert "MS-SSIM-3 paired (n = 480)" in text.columns, "no extractor's name on a metric of pixels"
    asked = rendering.wide(table, "What was asked for")
    assert asked.loc["Text baseline", "disease AUROC (n = 480)"] == "0.75"
    assert asked.loc["Untrained", "disease AUROC (n = 480)"] == "not available"
    assert asked.loc["Text baseline", "disease AUROC, published"].startswith("0.8")
    assert asked.loc["HCN (CompDiff)", "race accuracy (n = 480)"] == "0.6 [0.56, 0.64]"
    assert (
        rendering.wide(table, "Measured against requested (correlation)").loc["Flat encoder", "heart r (n = 480)"]
        == "0.7 [0.6, 0.8]"
    )


def test_measured_errors_stand_in_their_own_panel(results):
    """Between correlation and signed error, with every control's, by the metric's name; no panel without their rows."""
    title, rows = "Measured against requested (mean absolute error)", made_up()
    like = rows[(rows["stage"] == "measured") & (rows["metric"] == "r:heart")]
    new = [like.assign(metric=f"MAE:{name}", value=v, lo=v - 0.01, hi=v + 0.01) for name, v in (("heart", 0.03), ("cup", 0.05))]
    new.append(new[0].head(1).assign(method="real_train", value=0.02, lo=0.01, hi=0.04))
    table = tables.table1(frames.over_seeds(pd.concat([rows, *new])), SCHEMA, "chest")
    text = rendering.wide(table, title)
    assert list(text.columns) == ["heart MAE (n = 480)", "cup MAE (n = 480)"]
    assert text.loc["HCN (CompDiff)"].tolist() == ["0.03 [0.02, 0.04]", "0.05 [0.04, 0.06]"]
    assert text.loc[frames.TITLES["real_train"], "heart MAE (n = 480)"] == "0.02 [0.01, 0.04]"
    assert frames.better_is("heart MAE") == frames.better_is("MAE:heart") == "lower"
    assert title not in set(tables.table1(results, SCHEMA, "chest")["panel"])


def test_ineligible_cells_say_so_and_stay(results):
    text = rendering.wide(tables.table2(results, SCHEMA, COUNTS, "chest"), "FID-lite0@96")
    assert len(text) == len(SCHEMA.cells()) and text.loc["0-18 Male White", "training images"] == "3"
    assert text.loc["80+ Female Asian", "HCN (CompDiff) (n = 12)"] == "ineligible: n = 12 < 30"
    kid = rendering.wide(tables.table2(results, SCHEMA, COUNTS, "chest"), "KID-lite0@96")
    assert kid.iloc[0, 1] == "0.04 [0.03, 0.05] †"
    assert text.loc["60-80 Male White", "HCN (CompDiff), published"] == "97.6 (2.00)"


def test_zero_shot_table_has_the_held_out_cells_and_their_sum(results):
    text = rendering.wide(tables.table3(results, SCHEMA, HELD_OUT, COUNTS, "chest"), "KID-lite0@96")
    assert list(text.index) == [*HELD_OUT, "all held-out cells"]
    fid = rendering.wide(tables.table3(results, SCHEMA, HELD_OUT, COUNTS, "chest"), "FID-lite0@96")
    assert fid.loc["18-40 Female Asian", "Text baseline, published"].startswith("183.3")


def test_zero_shot_has_the_controls_that_give_its_numbers_a_scale():
    """Untrained, shuffled, copy and the floor stand beside the methods, with all that is known of them."""
    rows = made_up()
    like = rows[(rows["group_kind"] == "held_out") & (rows["method"] == "text")]
    more = [like.assign(method=m, value=v, lo=v, hi=v) for m, v in (("untrained", 0.9), ("vae", 0.01), ("copy", 0.02))]
    more.append(like.assign(method="real_train", value=np.nan, n=0, note="ineligible: n = 0 < 2"))
    table = tables.table3(frames.over_seeds(pd.concat([rows, *more])), SCHEMA, HELD_OUT, COUNTS, "chest")
    text = rendering.wide(table, "KID-lite0@96").loc["all held-out cells"]
    at = {name.split(" (n")[0]: value for name, value in text.items()}
    assert at["Untrained"].startswith("0.9 ") and at["Autoencoder only"].startswith("0.01 ")
    assert at["Copy of the training set"].startswith("0.02 ") and at["Shuffled attributes"] == "not available"
    assert at["Real training images (floor)"] == tables.NO_FLOOR, "nobody can have a floor there"


def test_kid_by_category_has_its_interval_its_training_images_and_its_patients():
    rows = made_up()
    like = rows[(rows["group_kind"] == "sex") & (rows["metric"] == "FID") & rows["method"].isin(["text", "copy"])]
    note = np.where(like["group"] == "Female", "120 images of 50 patients", "")
    note = np.where(like["method"] == "copy", "120 images of 9 patients", note)
    kid = like.assign(metric="KID", value=0.5, lo=0.4, hi=0.6, note=note)
    nobody = kid.assign(group_kind="race", group="Black", n=0, value=np.nan, note="ineligible: n = 0 < 2")
    kid = pd.concat([kid, nobody.drop_duplicates("method")])
    table = tables.table2(frames.over_seeds(pd.concat([rows, kid])), SCHEMA, COUNTS, "chest")
    text = rendering.wide(table, "KID-lite0@96 by category")
    assert list(text.index) == ["sex Male", "sex Female (120 images of 50 patients)"]
    assert set(text["Text baseline (n = 120)"]) == {"0.5 [0.4, 0.6]"}
    both = [sum(n for name, n in COUNTS.items() if f" {sex} " in name) for sex in ("Male", "Female")]
    assert list(text["training images"]) == [str(n) for n in both]
    copies = text["Copy of the training set (n = 120)"]
    assert set(copies) == {"0.5 [0.4, 0.6]; 9 patients"} and "9 patients" not in " ".join(rendering.footnotes(table))
    assert "by category" not in " ".join(tables.table2(frames.over_seeds(rows), SCHEMA, COUNTS, "chest")["panel"])


def test_kid_by_requested_finding_has_its_panel_where_the_results_hold_it():
    rows = made_up()
    like = rows[(rows["metric"] == "KID") & (rows["group_kind"] == "overall") & rows["method"].isin(["text", "hcn"])]
    new = [like.assign(stage="conditions", group_kind="glaucoma", group=group, value=v, lo=v - 0.1, hi=v + 0.1, n=60)
           for group, v in (("no glaucoma", 0.5), ("glaucoma", 0.7))]  # fmt: skip
    table = tables.table2(frames.over_seeds(pd.concat([rows, *new])), SCHEMA, COUNTS, "fundus")
    text = rendering.wide(table, "KID-lite0@96 by condition")
    assert list(text.index) == ["glaucoma no glaucoma", "glaucoma glaucoma"]
    assert list(text["HCN (CompDiff) (n = 60)"]) == ["0.5 [0.4, 0.6]", "0.7 [0.6, 0.8]"]
    assert "by condition" not in " ".join(tables.table2(frames.over_seeds(rows), SCHEMA, COUNTS, "fundus")["panel"])


def test_equity_has_its_sums_and_that_of_accuracy_where_the_results_hold_them(results):
    rows = made_up()
    like = rows[(rows["metric"] == "ES-FID") & (rows["method"] == "hcn")]
    new = [like.assign(metric="ES-FID-sum", value=31.0)]
    new += [like.assign(stage="alignment", extractor="judge", metric=m, value=v)
            for m, v in (("ES-accuracy", 0.5), ("ES-accuracy-mean", 0.625))]  # fmt: skip
    table = tables.table1(frames.over_seeds(pd.concat([rows, *new])), SCHEMA, "chest")
    table = {(row.key, row.column): row.value for row in table.itertuples()}
    assert table["hcn", "ES-FID-sum-lite0@96 race"] == 31.0
    assert (table["hcn", "ES-accuracy sex"], table["hcn", "ES-accuracy-mean sex"]) == (0.5, 0.625)
    old = set(tables.table1(results, SCHEMA, "chest")["column"])
    assert not [c for c in old if "-sum" in c or "ES-accuracy" in c]


def test_ablation_table_only_with_ablation_methods(results):
    assert tables.table5(results, SCHEMA).empty
    full = frames.over_seeds(made_up(methods=[*config.MAIN_METHODS, "hcn_no_aux"]))
    table = tables.table5(full, SCHEMA)
    assert list(table["key"].unique()) == ["flat", "hcn", "hcn_no_aux"]
    fewer = results[results["method"].isin(["flat", "hcn"])]
    both = tables.table5(results, SCHEMA, {1.0: results, 0.0: fewer})
    assert list(both["row"].unique()) == ["interaction = 0", "interaction = 1"]
    text = rendering.wide(both, both["panel"].iloc[0])
    assert [c.split(" (n")[0] for c in text.columns] == [frames.TITLES[m] for m in config.MAIN_METHODS]
    assert (text.iloc[0] == "not available").tolist() == [m not in ("flat", "hcn") for m in config.MAIN_METHODS]
    assert (text.iloc[1] == "0.05 [0.04, 0.06]").all()


def test_downstream_table(results):
    table = tables.table4(results)
    text = rendering.wide(table, "Overall")
    assert list(text.index) == [
        "1a real images only",
        "1b Text baseline",
        "1b HCN (CompDiff)",
        "2b Text baseline",
        "2b HCN (CompDiff)",
    ]
    assert text.loc["1b HCN (CompDiff)", "macro AUROC (n = 480)"] == "0.8 [0.77, 0.83]"
    assert set(text["macro AUROC, published"]) == {"not in the record"}
    assert rendering.footnotes(table) == ["macro AUROC: mean of No Finding, Pneumothorax."]


def test_table4_shows_every_group_by_itself():
    """AUROC and underdiagnosis of each group, 19 groups' conditions among them; not intersections, not what gaps tell."""
    rows = made_up()
    like = rows[rows["metric"] == "macro AUROC"]
    new = [like.assign(metric=metric, group_kind=kind, group=group, value=value, lo=value - 0.1, hi=value + 0.1, n=n, note=note)
           for metric, value, n, note in (("macro AUROC", 0.8, 240, "mean of x"), ("underdiagnosis", 0.25, 90, "FPR of x"))
           for kind, group in (("sex", "Female"), ("sex", "Male"), ("held_out", "seen"), ("age x sex", "80+ Male"))]  # fmt: skip
    new[1] = new[1].assign(note="ineligible: few", value=np.nan, lo=np.nan, hi=np.nan)
    tasks = [like[like["method"] == m].head(1).assign(stage="tasks", setting=f"vit-{s}", metric=metric, group_kind=kind, group=group)
             for m, s in (("real_train", "real"), ("hcn", "generated"))
             for metric, kind, group in (("AUROC:glaucoma", "race", "Asian"), ("AUROC:glaucoma", "myopia", "mild"),
                                         ("AUROC:myopia", "race", "Asian"))]  # fmt: skip
    table = tables.table4(frames.over_seeds(pd.concat([rows, *new, *tasks])))
    text = rendering.wide(table, "Each group of sex")
    assert list(text.columns) == ["macro AUROC Female (n = 240)", "macro AUROC Male (n = 240)", "underdiagnosis Female (n = 90)",
                                  "underdiagnosis Male (n = 90)"]  # fmt: skip
    assert text.loc["1b HCN (CompDiff)"].tolist() == ["0.8 [0.7, 0.9]", "ineligible: few", *["0.25 [0.15, 0.35]"] * 2]
    assert list(text.index) == list(rendering.wide(table, "Overall").index)
    assert "macro AUROC all other cells (n = 240)" in rendering.wide(table, "Cells")
    assert not table["panel"].str.contains("age x sex").any()
    assert "underdiagnosis Female, underdiagnosis Male, underdiagnosis all other cells: FPR of x." in rendering.footnotes(table)
    race = rendering.wide(table, "Single tasks: each group of race")
    assert list(race.index) == ["vit-generated HCN (CompDiff)", "vit-real real images only"]
    assert [c.split(" (")[0] for c in race.columns] == ["AUROC:glaucoma Asian", "AUROC:myopia Asian"]
    (column,) = rendering.wide(table, "Single tasks: each group of myopia").columns
    assert column.startswith("AUROC:glaucoma mild")


def test_a_footnote_names_the_rows_it_is_about(results):
    noted = results.copy()
    mine = (noted["metric"] == "KID") & (noted["group_kind"] == "overall")
    noted.loc[mine & (noted["method"] == "text"), "note"] = "s = 0.1"
    noted.loc[mine & (noted["method"].isin(["flat", "hcn"])), "note"] = "s = 0.2"
    lines = rendering.footnotes(tables.table1(noted, SCHEMA, "chest"))
    assert "KID-lite0@96: Text baseline: s = 0.1; Flat encoder, HCN (CompDiff): s = 0.2." in lines
    cells = [dict(panel=p, key="text", row=r, column=c, value=1.0, note=f"{c[0]} of {r}" if p == "B" else "")
             for p in "AB" for r in ("x", "y") for c in ("M", "M2")]  # fmt: skip
    lines = rendering.footnotes(tables.frame_of(cells))
    assert lines == ["M, M2: B, x: M of x; B, y: M of y."], "panel and row; columns with the same notes in one line"


def test_a_control_at_another_size_is_not_compared(results):
    """The floor at n = 43 beside methods at 96: named, not shown; the copy at 96 stays, and so does an ineligible one."""
    base = results.iloc[0].to_dict() | {"stage": "quality", "setting": "test", "extractor": "lite0@96", "note": ""}
    rows = [base | {"method": m, "metric": metric, "group_kind": kind, "group": "", "value": 30.0, "n": n}
            for m, n in (("text", 96), ("hcn", 96), ("real_train", 43), ("copy", 96))
            for metric, kind in (("FID-matched", "overall"), ("ES-FID-matched", "sex"))]  # fmt: skip
    rows.append(rows[0] | {"method": "vae", "value": np.nan, "n": 0, "note": "ineligible: n = 0 < 30"})
    table = tables.table1(pd.concat([results, pd.DataFrame(rows)]), SCHEMA, "chest")
    text = rendering.wide(table, "Equity at one group size")
    for column in ("FID-matched-lite0@96 (n = 96)", "ES-FID-matched-lite0@96 sex (n = 96)"):
        assert text.loc["Real training images (floor)", column] == "at n = 43: not comparable"
        assert text.loc[["HCN (CompDiff)", "Copy of the training set"], column].str.startswith("30.0").all()
    assert text.loc["Autoencoder only", "FID-matched-lite0@96 (n = 96)"] == "ineligible: n = 0 < 30"


def test_in_the_audit_real_images_are_a_control_not_a_judges_score(results):
    real = results[(results["stage"] == "memorisation") & (results["method"] == "text")].assign(method="real_test")
    table = tables.table1(pd.concat([results, real]), SCHEMA, "chest")
    panels = table[table["key"] == "real_test"].groupby("row")["panel"].unique()
    assert list(panels[frames.REAL_TEST["memorisation"]]) == ["Memorisation"] and len(panels) == 2
    measured = results[(results["stage"] == "measured") & (results["method"] == "text")].assign(method="real_test")
    table = tables.table1(pd.concat([results, measured]), SCHEMA, "chest")
    rows = table.loc[(table["key"] == "real_test") & table["panel"].str.startswith("Measured"), "row"].unique()
    assert list(rows) == ["Real test images (measured against themselves)"], "no judge scored it"


def test_latex_and_markdown_have_the_same_cells(results, tmp_path):
    table = tables.table1(results, SCHEMA, "chest")
    rendering.write(table, tmp_path, "table1", "Table 1 & co", ["50 % of a_b"])
    tex, md = (tmp_path / "table1.tex").read_text(), (tmp_path / "table1.md").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == md.count("\n## ") == 6
    assert (
        r"Table 1 \& co" in tex and r"50 \% of a\_b" in tex and "22.0 [20.0, 24.0]" in tex and "22.0 [20.0, 24.0]" in md
    )
    bodies = [line for line in tex.splitlines() if line.endswith(r" \\")]
    assert len(bodies) == md.count("\n| "), "one LaTeX line per Markdown row and head"
    assert md.count("n = 1 seed") == 1
    rendering.write(table.iloc[:0], tmp_path, "table1", "")
    assert not list(tmp_path.iterdir()), "an empty table leaves no stale file"


def test_nothing_here_needs_torch():
    """08 opens where only numpy, pandas and matplotlib are installed: walk the imports of its modules."""
    modules = ("tables", "report", "readme", "plots_results", "plots_groups", "plots_downstream", "plots_training",
               "plots_pictures", "datasets", "pictures")  # fmt: skip
    code = sources.closure(
        {f"compdiff.{m}" for m in modules},
        paths.ROOT / "compdiff",
    )
    texts = {name: (paths.ROOT / name).read_text() for name in code}
    assert len(texts) > 8 and not [
        n for n, t in texts.items() if re.search(r"^\s*(import|from) (torch|diffusers|botorch)\b", t, re.M)
    ]


# --- README -----------------------------------------------------------------------------------------------------------
def test_blocks_take_numbers_from_the_tables(results, tmp_path):
    assert {text for blocks in readme.pages(tmp_path).values() for text in blocks.values()} == {readme.NO_RESULTS}
    rendering.write(tables.table1(results, SCHEMA, "chest"), tmp_path / "chest", "table1", "Table 1")
    block = readme.results_block(tmp_path)
    assert "82.8 (2.20) / 75.1 (0.1) / 64.3 (0.3)" in block
    assert "FID-lite0@96: 20.0 [18.0, 22.0] / 24.0 [22.0, 26.0] / 26.0 [24.0, 28.0]; n = 480" in block
    assert block.count("| chest: whole tables |") == 0 and "FID (lower is better)" in block
    rendering.write(tables.table4(results), tmp_path / "chest", "table4", "Table 4")
    (whole,) = [line for line in readme.results_block(tmp_path).splitlines() if line.startswith("| chest: whole tables |")]
    assert "(../figures/chest/table4.md)" in whole and "table2.md" not in whole
    assert "`make paper DATASETS=chest`" in block and "sex accuracy: all three 0.85 [0.81, 0.89]; n = 480" in block
    short = readme.results_block(tmp_path, whole=False).splitlines()[4:]
    items = [line.split(" | ")[0] for line in short]
    assert set(short) <= set(block.splitlines()) and len(items) == len(set(items)) == 3, "one row an item, none new"


def test_budget_counts_steps_and_images(tmp_path):
    folder = tmp_path / "seed0"
    for method in ("text", "flat"):
        record.write_text(folder / "train" / method / "log.csv", "step,loss\n1,2.0\n300,1.0\n")
    content = {"inputs": {"setting batch": 64}, "minutes": 1.5, "peak_memory_mib": 900, "machine": {"cores": 2},
               "outputs": {f"seed0/train/{m}/log.csv": {} for m in ("text", "flat")}}  # fmt: skip
    record.write_text(folder / "notebooks" / "03_train_baselines.run.json", json.dumps(content))
    (row,) = readme.budget(tmp_path, "chest", [0]).to_dict("records")
    assert (row["runs"], row["steps"], row["images"], row["minutes"]) == (2, 600, 600 * 64, 1.5)


def test_short_budget_puts_the_datasets_side_by_side(tmp_path):
    head = "dataset,stage,runs,steps,images,minutes,peak MiB,cores\n"
    record.write_text(tmp_path / "a" / "budget.csv", f"{head}a,01_x,1,0,50,1.24,700,2\na,02_y,2,600,90,2.5,900,2\n")
    record.write_text(tmp_path / "b" / "budget.csv", f"{head}b,01_x,1,0,70,9.6,800,2\n")
    record.write_text(tmp_path / "c" / "budget.csv", head)
    lines = readme.short_budget_block(tmp_path).splitlines()
    assert lines[0] == "| stage | runs | steps | images | MiB | a, minutes | b, minutes |"
    assert lines[2:] == ["| 01_x | 1 | 0 | 50-70 | 800 | 1.2 | 9.6 |", "| 02_y | 2 | 600 | 90 | 900 | 2.5 | - |",
                         "| together |  |  |  | 900 | 4 | 10 |"]  # fmt: skip
    assert len(readme.budget_block(tmp_path).splitlines()) == 2 + 3 + 2


def test_markers_are_needed():
    text = "a\n<!-- results:begin (generated) -->\nold\n<!-- results:end -->\nb\n"
    assert readme.renew(text, {"results": r"new \1"}) == text.replace("old", r"new \1")
    with pytest.raises(ValueError, match="budget:begin"):
        readme.renew(text, {"budget": "x"})


def test_findings_are_read_from_the_report(tmp_path):
    assert readme.findings_block(tmp_path) == readme.NO_RESULTS
    text = """- *accuracy*: at least 90 % (point value): holds in 7 of 15; DOES NOT HOLD in 8 of 15.
- *told apart from a copy*: by every metric: holds in 5 of 5.
- *distances can rank*: clearly: DOES NOT HOLD in 10 of 10.
- Text baseline: **falls short** (accuracy 0.6 [0.5, 0.7], n = 36, against 0.8).
- HCN (CompDiff): **within noise** (accuracy 0.7 [0.5, 0.8], n = 36, against 0.8).
- **KID** of 9 classifiers: 3 above
"""
    record.write_text(tmp_path / "chest" / "report.md", text)
    row = readme.findings_block(tmp_path).splitlines()[-1]
    assert row == "| [chest](figures/chest/report.md) | 7 of 15 | 5 of 5 | 0 of 10 | Text baseline | HCN (CompDiff) |"


def test_readme_and_results_page_show_what_lies_in_figures():
    for name, blocks in readme.pages().items():
        text = (paths.ROOT / name).read_text()
        assert readme.renew(text, blocks) == text, f"{name}: run `python -m compdiff.readme`"


def test_links_of_readme_and_results_page_lead_somewhere():
    for name in readme.pages():
        page = paths.ROOT / name
        links = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in t]
        assert links and [t for t in links if not (page.parent / t).exists()] == []
