"""Result frames -> the papers' tables: CSV (every number), Markdown and LaTeX (what a page shows). No torch, no arithmetic but means.

A table is a long frame with one row per cell (CELL_COLUMNS); `wide` turns a panel of it into text. Published numbers are cells
of their own columns, taken from compdiff/published_results.csv and from nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from compdiff import config, paths, record
from compdiff.attributes import Schema

PUBLISHED = paths.ROOT / "compdiff" / "published_results.csv"
PUBLISHED_METHOD = {"text": "baseline", "fairdiffusion": "fairdiffusion", "hcn": "compdiff"}
NOT_IN_RECORD, NOT_AVAILABLE = "not in the record", "not available"
CONTROLS = {
    "real_test": "Real test images (the judge's own score)",
    "real_train": "Real training images (floor)",
    "vae": "Autoencoder only",
    "untrained": "Untrained",
    "shuffled": "Shuffled attributes",
    "copy": "Copy of the training set",
}
TITLES = {key: method.title for key, method in config.METHODS.items()} | CONTROLS
ABLATION = ("flat", "flat_separate", "hcn", "hcn_no_aux", "hcn_no_consistency", "hcn_age_from_prompt")
CELL_COLUMNS = ("panel", "key", "row", "column", "value", "lo", "hi", "std", "seeds", "n", "n_ref", "note")  # fmt: skip
IDENTITY = [c for c in record.RESULT_COLUMNS if c not in ("seed", "value", "lo", "hi", "n", "n_ref", "note")]
HELD_OUT = {"held_out": "all held-out cells", "seen": "all other cells"}  # groups of the kind held_out
COMPARABLE = "Published columns: other data, image size and feature extractor. Compare the direction between methods, never the size of a number."
ES_FID = "ES-FID = FID (1 + mean over groups of |FID_group - FID| / FID); the papers' code gives no formula, this one fits their numbers."
SEX_NAMES = (
    "The reference metric code and its labels disagree on sex: Male and Female may be swapped in the published columns."
)


# --- reading --------------------------------------------------------------------------------------------------------
def published() -> pd.DataFrame:
    """The numbers of the papers' public pages: source, table, modality, method, group, metric, value, std, caution."""
    return pd.read_csv(
        PUBLISHED, dtype={"table": str, "group": str}, keep_default_na=False, na_values={"value": [""], "std": [""]}
    )


def with_disease_auroc(frame: pd.DataFrame) -> pd.DataFrame:
    """The results and, per seed and method, "disease AUROC": the mean of the eligible AUROC:<finding> rows, without an interval."""
    here = frame[(frame["stage"] == "alignment") & frame["metric"].str.startswith("AUROC:") & frame["value"].notna()]
    same = ["dataset", "seed", "stage", "method", "setting", "group_kind", "group", "extractor"]
    names = lambda metrics: "mean of " + ", ".join(m.removeprefix("AUROC:") for m in metrics)  # noqa: E731
    groups = here.groupby(same, sort=False, as_index=False)
    means = groups.agg(value=("value", "mean"), n=("n", "min"), n_ref=("n_ref", "min"), note=("metric", names))
    means = means.assign(metric="disease AUROC", lo=np.nan, hi=np.nan)
    return pd.concat([frame, means[list(record.RESULT_COLUMNS)]], ignore_index=True) if len(means) else frame


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per number: mean, standard deviation (n - 1), seeds, smallest n; lo and hi span the seeds' intervals.

    The mean AUROC over findings is added. ValueError when a seed holds the same number twice.
    """
    frame = with_disease_auroc(frame)
    twice = frame.duplicated([*IDENTITY, "seed"])
    if twice.any():
        raise ValueError(f"the results hold a number twice: {frame.loc[twice.idxmax(), IDENTITY].to_dict()}")
    groups = frame.groupby(IDENTITY, sort=False, dropna=False)
    table = groups.agg(value=("value", "mean"), std=("value", "std"), seeds=("value", "count"), lo=("lo", "min"), hi=("hi", "max"),
                       n=("n", "min"), n_ref=("n_ref", "min"), note=("note", "max"))  # fmt: skip
    return table.reset_index()


@dataclass(frozen=True)
class Item:
    """Which number of the results a column shows, and which published number stands beside it."""

    stage: str
    metric: str
    kind: str = "overall"
    group: str = ""
    setting: str = "test"
    paper: tuple[str, str] | None = None  # metric and group in published_results.csv; None = no published column

    def of(self, results: pd.DataFrame, method: str) -> dict[str, object] | None:
        """The row of `over_seeds` for one method, None where there is none."""
        found = results
        for column in ("stage", "metric", "group", "setting"):
            found = found[found[column] == getattr(self, column)]
        found = found[(found["group_kind"] == self.kind) & (found["method"] == method)]
        return found.iloc[0].to_dict() if len(found) else None

    def label(self, results: pd.DataFrame) -> str:
        """FID-lite0, ES-FID-lite0 sex, sex accuracy ..."""
        here = results[(results["stage"] == self.stage) & (results["metric"] == self.metric)]
        extractors = [e for e in here["extractor"].unique() if e and e != "pixels"] if self.stage == "quality" else []
        metric = " ".join(reversed(self.metric.split(":", 1)))  # accuracy:sex -> sex accuracy
        return " ".join(
            filter(None, ["-".join([metric, *extractors]), "" if self.kind in ("overall", "cell") else self.kind])
        )


def cell(panel: str, key: str, row: str, column: str, number: Mapping[str, object] | None) -> dict[str, object]:
    """One cell of a table; `number` = None says "not available"."""
    base = {"panel": panel, "key": key, "row": row, "column": column, "note": NOT_AVAILABLE}
    return base | {c: number[c] for c in CELL_COLUMNS[4:]} if number is not None else base


def paper_cell(
    panel: str, key: str, row: str, column: str, modality: str, metric: str, group: str
) -> dict[str, object]:
    """One published number as a cell, or "not in the record"."""
    table, method = published(), PUBLISHED_METHOD.get(key, "")
    wanted = {"modality": modality, "method": method, "metric": metric, "group": group}
    found = table[np.logical_and.reduce([table[c] == v for c, v in wanted.items()])]
    base = {"panel": panel, "key": key, "row": row, "column": f"{column}, published"}
    if not len(found):
        return base | {"note": NOT_IN_RECORD}
    return base | {"value": found["value"].iloc[0], "std": found["std"].iloc[0]}


def frame_of(cells: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    table = pd.DataFrame(list(cells), columns=list(CELL_COLUMNS))
    table["note"] = table["note"].fillna("")
    return table


# --- the tables ---------------------------------------------------------------------------------------------------
def methods_in(results: pd.DataFrame, stages: Sequence[str]) -> list[str]:
    """Methods, then controls, that the results of these stages hold, in the order of TITLES."""
    held = set(results.loc[results["stage"].isin(stages), "method"])
    return [m for m in [*config.METHODS, *CONTROLS] if m in held]


def table1_items(schema: Schema, results: pd.DataFrame) -> dict[str, list[Item]]:
    """Panels of Table 1: title -> its columns."""
    similar = [m for m in results.loc[results["stage"] == "quality", "metric"].unique() if m.startswith("MS-SSIM")]
    quality = [
        Item("quality", "FID", paper=("FID", "overall")),
        Item("quality", "KID"),
        Item("quality", "precision"),
        Item("quality", "recall"),
    ]
    quality += [Item("quality", m, paper=None) for m in similar]
    equity = [Item("quality", "ES-FID", a, paper=("ES-FID", a)) for a in schema.names]
    matched = [
        Item("quality", "FID-matched"),
        *(Item("quality", m, a) for m in ("ES-FID-matched", "ES-KID") for a in schema.names),
    ]
    asked = [Item("alignment", f"accuracy:{a}", paper=(f"{a} accuracy", "overall")) for a in schema.names]
    asked += [Item("alignment", "age RMSE", paper=("age RMSE", "overall"))] if "age" in schema.names else []
    asked += [Item("alignment", "disease AUROC", paper=("disease AUROC", "overall"))]
    measured = [m for m in results.loc[results["stage"] == "measured", "metric"].unique() if m.startswith("r:")]
    panels = {"Quality": quality, "Equity": equity, "Equity at one group size": matched, "What was asked for": asked}
    return panels | (
        {"Measured against requested (correlation)": [Item("measured", m) for m in measured]} if measured else {}
    )


def table1(results: pd.DataFrame, schema: Schema, modality: str) -> pd.DataFrame:
    """Quality and equity, one row per method and control. `results`: from `over_seeds`."""
    cells = []
    for panel, items in table1_items(schema, results).items():
        stages = sorted({i.stage for i in items})
        for key in methods_in(results, stages):
            for item in items:
                number, label = item.of(results, key), item.label(results)
                cells.append(cell(panel, key, TITLES[key], label, number))
                if item.paper:
                    cells.append(paper_cell(panel, key, TITLES[key], label, modality, *item.paper))
    return frame_of(cells)


def cell_table(results: pd.DataFrame, names: Sequence[str], counts: Mapping[str, int], modality: str, items: Sequence[Item],
               paper: str, extra: Sequence[tuple[str, str]] = ()) -> pd.DataFrame:  # fmt: skip
    """One row per demographic cell and one column per method, a panel per item; `paper` = the metric's published name.

    `counts`: training images per cell. `extra`: (group_kind, group) rows that stand after the cells.
    """
    cells = []
    for item in items:
        panel = item.label(results)
        for kind, name in [*(("cell", n) for n in names), *extra]:
            row = HELD_OUT.get(name, name)
            train = {"value": counts.get(name, np.nan), "note": "", "seeds": 1}
            cells.append(
                {"panel": panel, "key": "", "row": row, "column": "training images"}
                | (train if kind == "cell" else {"note": "-"})
            )
            for key in [m for m in methods_in(results, (item.stage,)) if m in config.METHODS]:
                here = Item(item.stage, item.metric, kind, name, item.setting)
                cells.append(cell(panel, key, row, TITLES[key], here.of(results, key)))
                if item.metric == "FID" and key in PUBLISHED_METHOD:
                    cells.append(paper_cell(panel, key, row, TITLES[key], modality, paper, name))
    return frame_of(cells)


def table2(results: pd.DataFrame, schema: Schema, counts: Mapping[str, int], modality: str) -> pd.DataFrame:
    """Intersections: FID and KID of every cell that has test images, with n; small cells say that they are ineligible."""
    held = set(results.loc[(results["stage"] == "quality") & (results["group_kind"] == "cell"), "group"])
    names = [n for n in map(schema.cell_name, schema.cells()) if n in held]
    return cell_table(
        results, names, counts, modality, [Item("quality", "FID", "cell"), Item("quality", "KID", "cell")], "FID"
    )


def table3(
    results: pd.DataFrame, schema: Schema, held_out: Sequence[str], counts: Mapping[str, int], modality: str
) -> pd.DataFrame:
    """Zero-shot: the held-out cells alone and together, and all cells that were seen; accuracy = mean over the attributes."""
    items = [Item("quality", "FID", "cell"), Item("quality", "KID", "cell")]
    items += [Item("alignment", "accuracy", "cell")]
    known = set(results.loc[results["group_kind"] == "held_out", "group"])
    extra = [("held_out", group) for group in HELD_OUT if group in known]
    return cell_table(results, held_out, counts, modality, items, "zero-shot FID", extra)


DOWNSTREAM = {
    "Overall": ("macro AUROC", "macro AUPRC", "underdiagnosis"),
    "By": ("gap macro AUROC", "ES-macro AUROC", "gap underdiagnosis"),
}


def table4(results: pd.DataFrame) -> pd.DataFrame:
    """Downstream: one row per strategy and generator; means over findings, gaps between groups, underdiagnosis."""
    here = results[(results["stage"] == "downstream") & (results["group"] == "")]
    cells = []
    for metric, kind in (
        here[["metric", "group_kind"]]
        .drop_duplicates()
        .sort_values("group_kind", kind="stable", key=lambda k: k != "overall")
        .to_numpy()
    ):
        panel = "Overall" if kind == "overall" else f"By {kind}"
        if metric not in DOWNSTREAM[panel.split()[0]]:
            continue
        for setting, key in (
            here[["setting", "method"]].drop_duplicates().sort_values("setting", kind="stable").to_numpy()
        ):
            row = f"{setting} {downstream_title(key)}"
            cells.append(cell(panel, key, row, metric, Item("downstream", metric, kind, "", setting).of(here, key)))
            if kind == "overall":
                cells.append(
                    {"panel": panel, "key": key, "row": row, "column": f"{metric}, published", "note": NOT_IN_RECORD}
                )
    return frame_of(cells)


def downstream_title(key: str) -> str:
    return "real images only" if key == "real_train" else TITLES.get(key, key)


def zero_shot(results: pd.DataFrame, metric: str, method: str) -> dict[str, object] | None:
    """One method's number over all held-out cells together."""
    return Item("quality", metric, "held_out", "held_out").of(results, method)


def table5(results: pd.DataFrame, schema: Schema, by_dial: Mapping[float, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Ablation: flat against hierarchy and without its losses; zero-shot error against the interaction dial where several were run.

    Empty when the results hold no ablation method besides flat and hcn, and `by_dial` fewer than two dials.
    """
    cells, present = [], [m for m in ABLATION if m in set(results["method"])]
    if set(present) - {"flat", "hcn"}:
        for key in present:
            row = TITLES[key]
            for item in [
                Item("quality", "FID"),
                Item("quality", "KID"),
                *(Item("alignment", f"accuracy:{a}") for a in schema.names),
            ]:
                cells.append(cell("Ablation", key, row, item.label(results), item.of(results, key)))
            for metric in ("FID", "KID"):
                label = f"zero-shot {Item('quality', metric).label(results)}"
                cells.append(cell("Ablation", key, row, label, zero_shot(results, metric, key)))
            cells.append(
                {"panel": "Ablation", "key": key, "row": row, "column": "FID, published", "note": NOT_IN_RECORD}
            )
    for dial, frame in sorted((by_dial or {}).items()) if len(by_dial or {}) > 1 else ():
        for key in [m for m in methods_in(frame, ("quality",)) if m in config.METHODS]:
            panel = f"zero-shot {Item('quality', 'KID').label(frame)} by interaction"
            cells.append(cell(panel, key, f"interaction = {dial:g}", TITLES[key], zero_shot(frame, "KID", key)))
    return frame_of(cells)


# --- text ---------------------------------------------------------------------------------------------------------
def number(x: float) -> str:
    """Three significant digits or one decimal, never an exponent: 122.9, 64.3, 0.812, 0.0041."""
    if not np.isfinite(x):
        return "-"
    if abs(x) >= 1:
        return f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"
    return np.format_float_positional(x, precision=3 if abs(x) >= 0.1 else 2, fractional=False, trim="-")


def shown(entry: Mapping[str, object]) -> str:
    """A cell as text: value [interval], or mean (standard deviation) over seeds, with its note; else the note alone."""
    value, note = entry["value"], entry["note"]
    if pd.isna(value):
        return note or NOT_AVAILABLE
    if entry["column"] == "training images":
        return f"{value:.0f}"
    if pd.notna(entry["std"]):
        text = f"{number(value)} ({number(entry['std'])})"
    else:
        text = (
            f"{number(value)} [{number(entry['lo'])}, {number(entry['hi'])}]"
            if pd.notna(entry["lo"])
            else number(value)
        )
    size = (
        f"n = {entry['n']:.0f}" if pd.notna(entry["n"]) and entry["key"] and "published" not in entry["column"] else ""
    )
    text = f"{text} {DAGGER}" if is_inline(note) else text
    return f"{text}; {size}" if size else text


DAGGER = "†"


def is_inline(note: str) -> bool:
    """Does a note speak against its number? Others explain a column and stand below the table."""
    return note.startswith("ineligible")


def footnotes(table: pd.DataFrame) -> list[str]:
    """What the daggers mean, and the explaining notes, once per column."""
    valued = table[table["value"].notna() & (table["note"] != "")]
    inline = valued["note"].map(is_inline).astype(bool)
    lines = [f"{DAGGER} ineligible (the CSV says why): shown, but no claim rests on it."] if inline.any() else []
    for column, notes in valued[~inline].groupby("column", sort=False)["note"].unique().items():
        lines.append(f"{column}: {'; '.join(notes[:4])}{' ...' if len(notes) > 4 else ''}.")
    return lines


def wide(table: pd.DataFrame, panel: str) -> pd.DataFrame:
    """One panel as strings: rows and columns in order of first appearance. The commonest n of a column goes to its head."""
    part = table[table["panel"] == panel].copy()
    for column, cells in part.groupby("column", sort=False):
        sizes = cells["n"].dropna()
        if len(sizes) and "published" not in column and column != "training images":
            n = sizes.mode().iloc[0]
            part.loc[cells.index, "n"] = cells["n"].where(cells["n"] != n)
            part.loc[cells.index, "column"] = f"{column} (n = {n:.0f})"
    part["text"] = [shown(entry) for entry in part.to_dict("records")]
    out = part.pivot(index="row", columns="column", values="text")
    return out.reindex(index=part["row"].unique(), columns=part["column"].unique()).fillna("")


def seeds_note(table: pd.DataFrame) -> str:
    """What brackets and parentheses mean, said once per table."""
    ours = table[~table["column"].str.contains("published") & (table["column"] != "training images")]
    seeds = int(ours["seeds"].max()) if len(ours) and ours["seeds"].notna().any() else 0
    if seeds > 1:
        return f"Ours: mean (standard deviation) over n = {seeds} seeds."
    return "Ours: n = 1 seed, value [95 % interval of the resampled patients]. Published: value (standard deviation)."


def markdown_table(text: pd.DataFrame, corner: str = "") -> str:
    head = [corner, *text.columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(
        [
            *lines,
            *(
                "| " + " | ".join([str(i), *map(str, row)]) + " |"
                for i, row in zip(text.index, text.to_numpy(), strict=True)
            ),
        ]
    )


def markdown(table: pd.DataFrame, title: str, notes: Sequence[str]) -> str:
    parts = [f"# {title}", *(f"## {p}\n\n{markdown_table(wide(table, p))}" for p in table["panel"].unique())]
    return "\n\n".join([*parts, "\n".join(f"- {n}" for n in [seeds_note(table), *footnotes(table), *notes])]) + "\n"


LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def latex(table: pd.DataFrame, title: str, notes: Sequence[str]) -> str:
    """One tabular (booktabs) per panel in a table environment."""
    escape = lambda s: str(s).translate(LATEX)  # noqa: E731
    lines = [
        r"\begin{table}",
        r"\centering\scriptsize",
        rf"\caption{{{escape(title)}. {escape(' '.join([seeds_note(table), *footnotes(table), *notes]))}}}",
    ]
    for panel in table["panel"].unique():
        text = wide(table, panel)
        lines += [rf"\textbf{{{escape(panel)}}}\\", rf"\begin{{tabular}}{{l{'r' * len(text.columns)}}}", r"\toprule"]
        lines += [" & ".join(["", *map(escape, text.columns)]) + r" \\", r"\midrule"]
        lines += [
            " & ".join(map(escape, [i, *row])) + r" \\" for i, row in zip(text.index, text.to_numpy(), strict=True)
        ]
        lines += [r"\bottomrule", r"\end{tabular}\par\medskip"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def write(table: pd.DataFrame, folder: Path, name: str, title: str, notes: Sequence[str] = ()) -> None:
    """<name>.csv, .md and .tex below `folder`; an empty table removes them, so that no stale one stays."""
    for ending in (".csv", ".md", ".tex"):
        (Path(folder) / f"{name}{ending}").unlink(missing_ok=True)
    if len(table):
        record.write_text(Path(folder) / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
        record.write_text(Path(folder) / f"{name}.md", markdown(table, title, notes))
        record.write_text(Path(folder) / f"{name}.tex", latex(table, title, notes))
