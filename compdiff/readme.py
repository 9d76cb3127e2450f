"""The generated parts of README.md (short) and docs/results.md (whole): findings, results beside published numbers, budget.

`python -m compdiff.readme` renews them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from compdiff import paths, provenance, record
from compdiff.frames import NOT_AVAILABLE, TITLES
from compdiff.published import NOT_IN_RECORD
from compdiff.rendering import markdown_table, number, number_range, said, shown

NO_RESULTS = "No results here yet: run `make paper`."
ITEMS = (  # paper item, table file, panel ("" = any), columns that begin with, notebook
    ("Table 1, FID (lower is better)", "table1", "Quality", "FID-", "06, 08"),
    ("Table 1, ES-FID (lower is better)", "table1", "Equity", "ES-FID-", "06, 08"),
    ("Table 1, disease AUROC (higher is better)", "table1", "What was asked for", "disease AUROC", "06, 08"),
    (
        "Figure, attribute accuracy (higher is better)",
        "table1",
        "What was asked for",
        ("age accuracy", "sex accuracy", "race accuracy", "view accuracy"),
        "06, 08",
    ),
)
SHOWN = ("text", "fairdiffusion", "hcn")  # the three methods that the paper compares
WHOLE_TABLES = {  # file: its link's text
    "table2": "Table 2, intersections",
    "table3": "Table 3, zero-shot",
    "table4": "Table 4, downstream",
    "table5": "Table 5, ablation (with `ABLATION=1`)",
    "published": "every published number, and the direction of each comparison",
}


def command(dataset: str) -> str:
    real = "" if dataset in ("chest", "fundus") else " DATA_ROOT=<folder>"
    return f"`make paper DATASETS={dataset}{real}`"


def _read(file: Path) -> pd.DataFrame:
    text = dict.fromkeys(("panel", "key", "row", "column", "note"), str)
    return pd.read_csv(
        file,
        dtype=text,
        keep_default_na=False,
        na_values={c: [""] for c in ("value", "lo", "hi", "std", "seeds", "n", "n_ref")},
    )


def _three(table: pd.DataFrame, panel: str, column: str) -> str:
    """The three compared methods' cells of one column, "text / FairDiffusion / HCN"."""
    found = []
    for key in SHOWN:
        here = table[(table["panel"] == panel) & (table["key"] == key) & (table["column"] == column)]
        entry = (
            here.iloc[0].to_dict() | {"n": float("nan")}
            if len(here)
            else {"value": float("nan"), "note": NOT_AVAILABLE}
        )
        found.append(shown(entry))
    if len(set(found)) > 1:
        return " / ".join(found)
    return found[0] if found[0] in (NOT_IN_RECORD, NOT_AVAILABLE) else f"all three {found[0]}"


def item_rows(dataset: str, folder: Path, whole: bool = True) -> list[dict[str, str]]:
    """Rows of one dataset: every item in every column, and links; or of Table 1 the first column of each item alone."""
    rows = []
    for title, file, panel, prefix, notebook in ITEMS if whole else ITEMS[:-1]:
        table = _read(folder / f"{file}.csv")
        here = table[table["panel"] == panel]
        columns = [c for c in here["column"].unique() if c.startswith(prefix) and not c.endswith("published")]
        for column in columns if whole else columns[:1]:
            sizes = here.loc[(here["column"] == column) & here["key"].isin(SHOWN), "n"].dropna()
            paper = f"{column}, published"
            size = f"; n = {sizes.min():.0f}" if len(sizes) else ""
            rows.append({"paper item": f"{dataset}: {title}", "notebook": notebook, "command": command(dataset),
                         "published": _three(table, panel, paper) if paper in set(here["column"]) else NOT_IN_RECORD,
                         "ours": f"{column}: {_three(table, panel, column)}{size}"})  # fmt: skip
    links = [f"[{title}](../figures/{dataset}/{file}.md)" for file, title in WHOLE_TABLES.items()
             if (folder / f"{file}.csv").exists()]  # fmt: skip
    if links and whole:
        rows.append({"paper item": f"{dataset}: whole tables", "notebook": "06, 07, 08", "command": command(dataset),
                     "published": "beside ours in each", "ours": "; ".join(links)})  # fmt: skip
    return rows


def results_block(figures: Path = paths.FIGURES, whole: bool = True) -> str:
    """Paper item -> notebook -> command -> published -> ours, from figures/*/table*.csv; no number is typed."""
    folders = sorted(f.parent for f in Path(figures).glob("*/table1.csv"))
    rows = [row for folder in folders for row in item_rows(folder.name, folder, whole)]
    if not rows:
        return NO_RESULTS
    table = pd.DataFrame(rows).set_index("paper item")
    order = " / ".join(TITLES[m] for m in SHOWN)
    return f"Each cell: {order}.\n\n{markdown_table(table, 'paper item')}"


CLASSIFIERS = "*/*/*/*/run.json"  # of hearts: input, source, sampling, repeat; their notebook is not done when it writes
GATE = re.compile(r"- \*(?P<gate>[^*]+)\*: .*?(?:holds in (?P<holds>\d+)|DOES NOT HOLD in \d+) of (?P<all>\d+)"
                  r"(?:.*?cannot be said in (?P<mute>\d+) of)?")
VERDICT = re.compile(r"- (?P<method>[^:|*]+): \*\*(?P<word>composes|falls short|within noise|cannot be said)\*\* \(")
UNSEEN = "unseen combinations: "
HEARTS = {"real_test": "real test images", "control": "ControlNet", "text": "base alone"}
AUGMENTED = ["stacked", "real + synthetic", "as found", "overall"]  # of changes.csv, against real images as found
AUGMENTED_TITLE = "balanced accuracy, real + synthetic minus real"


def findings_block(figures: Path = paths.FIGURES) -> str:
    """Each dataset's gates and verdicts on unseen combinations, from figures/*/report.md (notebook 08 writes it)."""
    rows = {}
    for file in sorted(f for f in Path(figures).glob("*/report.md") if not f.with_name("generation.csv").exists()):
        lines = file.read_text().splitlines()
        gates = [m for m in map(GATE.match, lines) if m]
        words = {m["method"]: m["word"] for m in map(VERDICT.match, lines) if m}
        row = {m["gate"]: f"{m['holds'] or 0} of {m['all']}" + (f" ({m['mute']} cannot be said)" if m["mute"] else "") for m in gates}
        for word in dict.fromkeys(words.values()):
            row[UNSEEN + word] = ", ".join(name for name, w in words.items() if w == word)
        rows[f"[{file.parent.name}](figures/{file.parent.name}/report.md)"] = row
    if not rows:
        return NO_RESULTS
    return markdown_table(pd.DataFrame.from_dict(rows, orient="index").fillna("-"), "dataset (its report)")


def hearts_block(figures: Path = paths.FIGURES) -> str:
    """Whether the ControlNet obeys its mask, and whether augmentation helped, from figures/*/{generation,changes}.csv."""
    rows = {}
    for file in sorted(Path(figures).glob("*/generation.csv")):
        found = record.load_results([file]).set_index(["metric", "method"])
        each = {f"{metric}, {HEARTS[method]}": said(found.loc[(metric, method)].to_dict())
                for metric in ("Dice", "KID") for method in HEARTS if (metric, method) in found.index}  # fmt: skip
        changes = pd.read_csv(file.with_name("changes.csv"), keep_default_na=False, na_values={c: [""] for c in ("value", "lo", "hi")})
        mine = changes[(changes[["input", "source", "sampling", "group_kind"]] == AUGMENTED).all(axis=1)]
        each |= {AUGMENTED_TITLE: f"{said(r)}: {r['verdict']}" for r in mine.to_dict("records")}
        rows[f"[{file.parent.name}](figures/{file.parent.name}/report.md)"] = each
    return markdown_table(pd.DataFrame.from_dict(rows, orient="index"), "hearts (report)") if rows else NO_RESULTS


# --- budget -------------------------------------------------------------------------------------------------------
def budget(root: Path, dataset: str, seeds: Sequence[int]) -> pd.DataFrame:
    """What one dataset's run took, from its notebooks' run.json: stage, runs, steps, images, minutes, peak memory.

    steps: optimiser steps of its generators' trainings (no judge, no classifier); images: made (01, 05) or seen in training (steps x batch). A notebook
    that found its trainings finished counts with the minutes that they took.
    """
    rows = []
    for file in provenance.run_files(root, seeds):
        run = record.read_run(file)
        if run is None:
            continue
        base = file.parent.parent if file.parent.parent == Path(root) else file.parent.parent.parent
        logs = [base / n for n in run["outputs"] if n.endswith("log.csv") and (base / n).exists()]
        listings = [base / n for n in run["outputs"] if n.endswith("samples.csv") and (base / n).exists()]
        steps = [int(pd.read_csv(f)["step"].max()) for f in logs]
        trainings = sum((record.read_run(f.parent) or {"minutes": 0})["minutes"] for f in logs)
        batch = run["inputs"].get("setting batch")
        images = sum(len(pd.read_csv(f)) for f in listings) + (sum(steps) * batch if batch else 0)
        rows.append({"stage": file.name.removesuffix(".run.json"), "runs": len(logs) or 1, "steps": sum(steps),
                     "images": images, "minutes": max(run["minutes"], trainings), "peak MiB": run["peak_memory_mib"],
                     "cores": run["machine"].get("threads", run["machine"]["cores"])})  # fmt: skip
    trained = [record.read_run(f) for s in seeds for f in sorted(Path(root).glob(f"seed{s}/downstream/{CLASSIFIERS}"))]
    rows += [{"stage": "10_cardiac_fairness", "runs": 1, "steps": 0, "images": 0, "minutes": run["minutes"],
              "peak MiB": run["peak_memory_mib"], "cores": run["machine"]["cores"]} for run in trained]  # fmt: skip
    if not rows:
        return pd.DataFrame(columns=["dataset", "stage", "runs", "steps", "images", "minutes", "peak MiB", "cores"])
    sums = pd.DataFrame(rows).groupby("stage", as_index=False)
    table = sums.agg(
        {"runs": "sum", "steps": "sum", "images": "sum", "minutes": "sum", "peak MiB": "max", "cores": "max"}
    )
    return table.assign(dataset=dataset)[["dataset", *table.columns]]


def _budgets(figures: Path) -> pd.DataFrame:
    """figures/*/budget.csv in one (notebooks 08 and 10 write them from the run.json files)."""
    tables = [pd.read_csv(f) for f in sorted(Path(figures).glob("*/budget.csv"))]
    return pd.concat([t for t in tables if len(t)]) if any(map(len, tables)) else pd.DataFrame()


def budget_block(figures: Path = paths.FIGURES) -> str:
    """The budget, one row for each dataset and stage."""
    table = _budgets(figures)
    if table.empty:
        return NO_RESULTS
    text = table.assign(minutes=table["minutes"].map(number)).astype(str).set_index("dataset")
    sums = f"In all {table['minutes'].sum():.0f} minutes, at most {table['peak MiB'].max():.0f} MiB."
    return f"{markdown_table(text, 'dataset')}\n\n{sums}"


def short_budget_block(figures: Path = paths.FIGURES) -> str:
    """The budget, one row for each stage: what one dataset takes (at most), and all datasets' minutes side by side."""
    table = _budgets(figures)
    if table.empty:
        return NO_RESULTS
    text = table.groupby("stage")[["runs", "steps", "images"]].agg(number_range)
    text["MiB"] = table.groupby("stage")["peak MiB"].max().round().astype(int).astype(str)
    minutes = table.pivot(index="stage", columns="dataset", values="minutes").add_suffix(", minutes")
    text = text.join(minutes.map(lambda x: "-" if pd.isna(x) else f"{x:.1f}"))
    text.loc["together"] = ["", "", "", f"{table['peak MiB'].max():.0f}", *(f"{x:.0f}" for x in minutes.sum())]
    return markdown_table(text, "stage")


# --- between the markers ----------------------------------------------------------------------------------------------
def renew(text: str, blocks: dict[str, str]) -> str:
    """`text` with what stands between <!-- name:begin --> and <!-- name:end --> replaced.

    ValueError when a marker is missing.
    """
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name}:begin[^\n]*-->\n).*?(<!-- {name}:end -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"no markers {name}:begin and {name}:end")
        text = pattern.sub(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
    return text


def pages(figures: Path = paths.FIGURES) -> dict[str, dict[str, str]]:
    """{file of the repository: {name of its markers: what stands between them}}."""
    short = {"results": results_block(figures, whole=False), "budget": short_budget_block(figures)}
    return {
        "README.md": {"findings": findings_block(figures), "hearts": hearts_block(figures), **short},
        "docs/results.md": {"results": results_block(figures), "budget": budget_block(figures)},
    }


if __name__ == "__main__":
    for name, blocks in pages().items():
        record.write_text(paths.ROOT / name, renew((paths.ROOT / name).read_text(), blocks))
