"""Result frames -> the papers' tables: long frames with one row per cell (CELL_COLUMNS). No torch, no arithmetic.

Published numbers are cells of their own columns, taken from compdiff/published_results.csv and from nowhere else.
compdiff/rendering.py turns tables into text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from compdiff import frames, published
from compdiff.attributes import Schema
from compdiff.dials import zero_shot
from compdiff.fairness import disparity_label
from compdiff.frames import NOT_AVAILABLE, TITLES, Item, methods_in
from compdiff.published import NOT_IN_RECORD

ABLATION = ("flat", "flat_separate", "hcn", "hcn_no_aux", "hcn_no_consistency", "hcn_no_uncertainty", "hcn_age_from_prompt")
CELL_COLUMNS = ("panel", "key", "row", "column", "value", "lo", "hi", "std", "seeds", "n", "n_ref", "note")
HELD_OUT = {"held_out": "all held-out cells", "seen": "all other cells"}  # groups of the kind held_out
NO_INTERVAL = (
    " What compares groups (ES-, gap, std, range, differences of rates) has no interval with one seed: several give "
    "it one."
)
ES_FID = (
    "M = FID, KID or matched FID: ES-M = M (1 + mean over groups of |M_group - M| / M), ES-M-sum with the sum instead; "
    "the papers' code gives no formula, this one fits their numbers. Higher is better for accuracy: ES-accuracy = "
    "accuracy / (1 + sum over groups of |accuracy_group - accuracy|), ES-accuracy-mean with the mean instead. Matched "
    "FID: of categories and of the whole, not of intersections, whose few images would set everybody's n."
    + NO_INTERVAL
)
MIFID = "MiFID of the floor and of the copy carries the full penalty: training images are copies by definition."
ES_LABELS = (
    "ES-M = M / (1 + sum over groups of |M_group - M|), ES-M-mean with the mean instead. ES-AUROC of an attribute may "
    "lie above the overall macro AUROC: the groups, and the whole beside them, are compared on the labels that are "
    "eligible in all groups. std M = standard deviation of the eligible groups' M (their number in the denominator) / M "
    "of the whole; range M = (max - min of them) / M of the whole; both 0 for equal groups."
    + NO_INTERVAL
)
NO_FLOOR = "no training images of these cells"  # real_train where training held them out
BLUR = (
    "Suspected copies (pixels): blur alone brings an image nearer to all others. The images of the row Autoencoder "
    "only are new and merely blurred, so what alarms there is no copy: read a method's share beside that row, not "
    "beside the declared rate."
)


def cell(panel: str, key: str, row: str, column: str, number: Mapping[str, object] | None) -> dict[str, object]:
    """One cell of a table; `number` = None says "not available"."""
    base = {"panel": panel, "key": key, "row": row, "column": column, "note": NOT_AVAILABLE}
    return base | {c: number[c] for c in CELL_COLUMNS[4:]} if number is not None else base


def paper_cell(
    panel: str, key: str, row: str, column: str, modality: str, metric: str, group: str
) -> dict[str, object]:
    """One published number as a cell, or "not in the record"."""
    table, names = published.read(), {ours: theirs for theirs, ours in published.METHOD.items()}
    wanted = {"modality": modality, "method": names.get(key, ""), "metric": metric, "group": group}
    found = table[np.logical_and.reduce([table[c] == v for c, v in wanted.items()])]
    base = {"panel": panel, "key": key, "row": row, "column": f"{column}, published"}
    if not len(found):
        return base | {"note": NOT_IN_RECORD}
    return base | {"value": found["value"].iloc[0], "std": found["std"].iloc[0]}


def frame_of(cells: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    table = pd.DataFrame(list(cells), columns=list(CELL_COLUMNS))
    table["note"] = table["note"].fillna("")
    return table


# --- Table 1 ----------------------------------------------------------------------------------------------------------
def names_in(results: pd.DataFrame, stage: str, *beginnings: str) -> list[str]:
    """The metrics of a stage whose names begin so, in order of first appearance."""
    metrics = results.loc[results["stage"] == stage, "metric"].unique()
    return [m for m in metrics if m.startswith(beginnings)]


def table1_items(schema: Schema, results: pd.DataFrame) -> dict[str, list[Item]]:
    """Panels of Table 1: title -> its columns. Metrics that not every run has are shown where the results hold them."""
    images = results[(results["stage"] == "quality") & (results["metric"] == "FID")]
    extractors = list(images["extractor"].unique()) or [""]
    quality = [Item("quality", "FID", extractor=extractors[0], paper=("FID", "overall"))]
    quality += [Item("quality", "FID", extractor=e) for e in extractors[1:]]
    quality += [Item("quality", m) for m in ("KID", "precision", "recall")]
    others = names_in(results, "quality", "density", "coverage", "IS", "MiFID", "MS-SSIM")
    quality += [Item("quality", m) for m in others]
    matched = [
        Item("quality", "FID-matched"),
        *(Item("quality", m, a) for m in ("ES-FID-matched", "ES-KID") for a in schema.names),
    ]
    sums = [m for m in names_in(results, "quality", "ES-") if m.endswith("-sum")]
    asked = [Item("alignment", f"accuracy:{a}", paper=(f"{a} accuracy", "overall")) for a in schema.names]
    asked += [Item("alignment", "age RMSE", paper=("age RMSE", "overall"))] if "age" in schema.names else []
    asked += [Item("alignment", "disease AUROC", paper=("disease AUROC", "overall"))]
    outside = results[(results["stage"] == "judges") & (results["group_kind"] == "overall")]
    outside = outside[["metric", "extractor"]].drop_duplicates()
    panels = {
        "Quality": quality,
        "Equity": [Item("quality", "ES-FID", a, paper=("ES-FID", a)) for a in schema.names],
        "Equity at one group size": matched,
        "Equity, deviations added instead of averaged": [Item("quality", m, a) for m in sums for a in schema.names],
        "What was asked for": asked,
        "Equity of what was asked for": [
            Item("alignment", m, a) for m in names_in(results, "alignment", "ES-accuracy") for a in schema.names
        ],
        "Measured against requested (correlation)": [Item("measured", m) for m in names_in(results, "measured", "r:")],
        "Measured against requested (mean absolute error)": [
            Item("measured", m) for m in names_in(results, "measured", "MAE:")
        ],
        "Measured minus requested (mean)": [Item("measured", m) for m in names_in(results, "measured", "bias:")],
        "Judges and extractors from outside": [Item("judges", m, extractor=e) for m, e in outside.to_numpy()],
        "Memorisation": [Item("memorisation", m) for m in names_in(results, "memorisation", "suspected", "nearest")],
    }
    return {panel: items for panel, items in panels.items() if items}


def table1(results: pd.DataFrame, schema: Schema, modality: str) -> pd.DataFrame:
    """Quality and equity, one row per method and control. `results`: from `frames.over_seeds`."""
    cells = []
    for panel, items in table1_items(schema, results).items():
        stages = sorted({i.stage for i in items})
        for key in methods_in(results, stages):
            title = frames.title(key, stages[0])
            for item in items:
                number, label = item.of(results, key), item.label(results)
                if why := frames.incomparable(results, item, number):
                    number = number | dict.fromkeys(("value", "lo", "hi", "std"), np.nan) | {"note": why}
                cells.append(cell(panel, key, title, label, number))
                if item.paper:
                    cells.append(paper_cell(panel, key, title, label, modality, *item.paper))
    return frame_of(cells)


# --- Tables 2 and 3 ---------------------------------------------------------------------------------------------------
Row = tuple[str, str, float]  # group_kind, group, its training images (NaN = not counted)


def group_cells(results: pd.DataFrame, rows: Sequence[Row], modality: str, items: Sequence[Item], paper: str = "",
                ending: str = "") -> list[dict[str, object]]:  # fmt: skip
    """One row per group and one column per method and control, a panel per item; `paper` = the published name of FID,
    `ending` of the panels' titles. How many patients a row's images show stands in its title, where they are fewer.
    """
    cells = []
    for item in items:
        panel = item.label(results) + ending
        for kind, name, images in rows:
            at = Item(item.stage, item.metric, kind, name, item.setting)
            found = {key: at.of(results, key) for key in methods_in(results, (item.stage,))}
            first = (next(iter(found.values()), None) or {}).get("note", "")  # a method's, no control's
            whose = first if first.endswith(" patients") else ""
            row = HELD_OUT.get(name, name) if kind in ("cell", "held_out") else f"{kind} {name}"
            row = f"{row} ({whose})" if whose else row
            train = {"value": images, "note": "", "seeds": 1} if np.isfinite(images) else {"note": "-"}
            cells.append({"panel": panel, "key": "", "row": row, "column": "training images"} | train)
            for key, number in found.items():
                nobody = key == "real_train" and not (number or {}).get("n")
                cells.append(cell(panel, key, row, TITLES[key], None if nobody else number))
                if nobody:
                    cells[-1]["note"] = NO_FLOOR
                note = cells[-1]["note"]  # a control's patients stand in its cell, a method's in the row's title
                cells[-1]["note"] = "" if whose and note == whose else re.sub(r"^\d+ images of ", "", note)
                if item.metric == "FID" and key in published.METHOD.values():
                    cells.append(paper_cell(panel, key, row, TITLES[key], modality, paper, name))
    return cells


def judged_rows(results: pd.DataFrame, schema: Schema, counts: Mapping[str, int]) -> tuple[list[Row], list[Row]]:
    """The cells, and the categories, of which there are test images; a category's `counts` are those of its cells."""
    tested = results[(results["stage"] == "quality") & (results["metric"] == "KID") & (results["n"] > 0)]
    held = set(tested[["group_kind", "group"]].itertuples(index=False, name=None))
    names = {schema.cell_name(c): schema.decode(c) for c in schema.cells()}
    cells = [("cell", name, counts.get(name, np.nan)) for name in names if ("cell", name) in held]
    return cells, [(a.name, c, sum(n for name, n in counts.items() if names[name][a.name] == c))
                   for a in schema.attributes for c in a.categories if (a.name, c) in held]  # fmt: skip


def table2(results: pd.DataFrame, schema: Schema, counts: Mapping[str, int], modality: str) -> pd.DataFrame:
    """Intersections: FID and KID of every cell that has test images, with n; small cells say they are ineligible. Then
    KID of the categories, which are large enough for intervals that tell something, and of the findings that were asked
    for, where the results hold them (FairDiffusion's conditions). `counts`: training images per cell.
    """
    rows, categories = judged_rows(results, schema, counts)
    cells = group_cells(results, rows, modality, [Item("quality", m, "cell") for m in ("FID", "KID")], "FID")
    cells += group_cells(results, categories, modality, [Item("quality", "KID")], ending=" by category")
    found = results[(results["stage"] == "conditions") & (results["n"] > 0)]
    asked = found[["group_kind", "group"]].drop_duplicates().assign(images=np.nan)
    items = [Item("conditions", "KID", extractor=e) for e in found["extractor"].unique()]
    return frame_of(cells + group_cells(results, list(asked.itertuples(index=False, name=None)), modality, items,
                                        ending=" by condition"))  # fmt: skip


def table3(
    results: pd.DataFrame, schema: Schema, held_out: Sequence[str], counts: Mapping[str, int], modality: str
) -> pd.DataFrame:
    """Zero-shot: held-out cells alone and together, and all cells that were seen; accuracy = mean over attributes."""
    items = [Item("quality", "FID", "cell"), Item("quality", "KID", "cell")]
    items += [Item("alignment", "accuracy", "cell")]
    known = set(results.loc[results["group_kind"] == "held_out", "group"])
    rows = [("cell", name, counts.get(name, np.nan)) for name in held_out]
    rows += [("held_out", group, np.nan) for group in HELD_OUT if group in known]
    return frame_of(group_cells(results, rows, modality, items, "zero-shot FID"))


# --- Table 4 ----------------------------------------------------------------------------------------------------------
STAGES = {"downstream": "", "tasks": "Single tasks: "}  # and how the titles of their panels begin
# As outcomes.judge writes them; {label} is the disparity label, on which intersections are compared.
DOWNSTREAM = ("macro AUROC", "macro AUPRC", "macro F1", "macro balanced accuracy", "macro ECE", "underdiagnosis")
GAPS = ("gap {metric}", "gap90 {metric}", "std {metric}", "range {metric}", "ES-{metric}", "ES-{metric}-mean",
        "gap underdiagnosis", "gap90 underdiagnosis", "demographic parity difference:{label}", "equalized odds difference:{label}",
        "equal opportunity difference:{label}")  # fmt: skip


def table4(results: pd.DataFrame) -> pd.DataFrame:
    """Downstream: one row per strategy and generator; means over findings, gaps between groups, underdiagnosis; then
    each group by itself.
    """
    cells = []
    for stage, kind, panel, metrics in table4_panels(results):
        here = results[(results["stage"] == stage) & (results["group"] == "")]
        rows = here[["setting", "method"]].drop_duplicates().sort_values("setting", kind="stable").to_numpy()
        for metric in metrics:
            for setting, key in rows:
                row = f"{setting} {downstream_title(key)}"
                cells.append(cell(panel, key, row, metric, Item(stage, metric, kind, "", setting).of(here, key)))
                if metric == "macro AUROC":
                    column = f"{metric}, published"
                    cells.append({"panel": panel, "key": key, "row": row, "column": column, "note": NOT_IN_RECORD})
    return frame_of(cells + each_group(results))


def each_group(results: pd.DataFrame) -> list[dict[str, object]]:
    """A panel per attribute, of single tasks per condition, too: AUROC and underdiagnosis of every one of its groups.

    Intersections are left to the results: their gaps stand in Table 4, and most are too small to be shown alone.
    """
    cells = []
    for stage, prefix in STAGES.items():
        here = results[(results["stage"] == stage) & (results["group"] != "")]
        here = here[~here["group_kind"].str.contains(" x ", regex=False)]
        single = here["metric"].str.startswith("AUROC:") & (stage == "tasks")
        here = here[single | here["metric"].isin(["macro AUROC", "underdiagnosis"])]
        rows = here[["setting", "method"]].drop_duplicates().sort_values("setting", kind="stable").to_numpy()
        for kind, part in here.groupby("group_kind", sort=False):
            panel = f"{prefix}{'cells' if kind == 'held_out' else f'each group of {kind}'}"
            columns = part[["metric", "group"]].drop_duplicates().sort_values("metric", kind="stable")
            for metric, group in columns.to_numpy():
                at = part[(part["metric"] == metric) & (part["group"] == group)]
                for setting, key in rows:
                    number = Item(stage, metric, kind, group, setting).of(at, key)
                    row, column = f"{setting} {downstream_title(key)}", f"{metric} {HELD_OUT.get(group, group)}"
                    cells.append(cell(panel[0].upper() + panel[1:], key, row, column, number))
    return cells


def disparity_metrics(kind: str, label: str) -> list[str]:
    """Names of the gaps between the groups of a kind: of macro AUROC, between intersections of the label's AUROC."""
    metric = f"AUROC:{label}" if " x " in kind else "macro AUROC"
    return [gap.format(metric=metric, label=label) for gap in GAPS]


def table4_panels(results: pd.DataFrame) -> list[tuple[str, str, str, list[str]]]:
    """(stage, kind of group, title, metrics) of every panel: classifiers of all findings, then one task each."""
    out = []
    for stage, prefix in STAGES.items():
        here = results[(results["stage"] == stage) & (results["group"] == "")]
        labels = [m.removeprefix("AUROC:") for m in here["metric"].unique() if m.startswith("AUROC:")]
        label = disparity_label(labels) if labels else ""
        for kind in sorted(here["group_kind"].unique(), key=lambda k: k != "overall"):
            present = here.loc[here["group_kind"] == kind, "metric"].unique()
            if stage == "tasks":
                metrics = [m for m in present if m.startswith(("AUROC:", "ES-AUROC:", "gap AUROC:"))]
            else:
                wanted = DOWNSTREAM if kind == "overall" else disparity_metrics(kind, label)
                metrics = [m for m in wanted if m in present]
            title = prefix + (kind if kind == "overall" else f"by {kind}")
            out.append((stage, kind, title[0].upper() + title[1:], metrics))
    return out


def downstream_title(key: str) -> str:
    return "real images only" if key == "real_train" else TITLES.get(key, key)


# --- Table 5 ----------------------------------------------------------------------------------------------------------
def table5(
    results: pd.DataFrame, schema: Schema, by_dial: Mapping[float, pd.DataFrame] | None = None
) -> pd.DataFrame:
    """Ablation: flat against hierarchy and without its losses; zero-shot error against the interaction dial, if run.

    Empty when the results hold no ablation method besides flat and hcn, and `by_dial` fewer than two dials.
    """
    cells, present = [], [m for m in ABLATION if m in set(results["method"])]
    items = [Item("quality", m) for m in ("FID", "KID")] + [Item("alignment", f"accuracy:{a}") for a in schema.names]
    for key in present if set(present) - {"flat", "hcn"} else ():
        row = TITLES[key]
        cells += [cell("Ablation", key, row, item.label(results), item.of(results, key)) for item in items]
        for metric in ("FID", "KID"):
            label = f"zero-shot {Item('quality', metric).label(results)}"
            cells.append(cell("Ablation", key, row, label, zero_shot(results, metric, key)))
        cells.append({"panel": "Ablation", "key": key, "row": row, "column": "FID, published", "note": NOT_IN_RECORD})
    by_dial = by_dial if by_dial and len(by_dial) > 1 else {}
    run = {m for frame in by_dial.values() for m in frames.trained(frame, ("quality",))}
    for dial, frame in sorted(by_dial.items()):
        panel = f"zero-shot {Item('quality', 'KID').label(frame)} by interaction"
        for key in [m for m in TITLES if m in run]:
            cells.append(cell(panel, key, f"interaction = {dial:g}", TITLES[key], zero_shot(frame, "KID", key)))
    return frame_of(cells)
