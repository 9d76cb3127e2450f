"""Tables as text: cells in words, Markdown and LaTeX pages, files. A page shows strings, its CSV every number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from compdiff import published, record
from compdiff.frames import NOT_AVAILABLE, TITLES

DAGGER = "†"
MAX_NOTES = 6  # of one column below a table
INELIGIBLE = f"{DAGGER} ineligible (the CSV says why): shown, but no claim rests on it."
Pages = Mapping[str, pd.DataFrame]  # panel title -> strings, the index is the first column


# --- cells ------------------------------------------------------------------------------------------------------------
def number(x: float) -> str:
    """Three significant digits or one decimal, never an exponent: 122.9, 64.3, 0.812, 0.0041."""
    if not np.isfinite(x):
        return "-"
    if abs(x) >= 1:
        return f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"
    return np.format_float_positional(x, precision=3 if abs(x) >= 0.1 else 2, fractional=False, trim="-")


def said(row: Mapping[str, object] | None) -> str:
    """A number in a sentence: value [interval], or why there is none."""
    if row is None or pd.isna(row["value"]):
        return (row or {}).get("note") or NOT_AVAILABLE
    return number(row["value"]) + (f" [{number(row['lo'])}, {number(row['hi'])}]" if pd.notna(row["lo"]) else "")


def shown(entry: Mapping[str, object]) -> str:
    """A cell as text: value [interval], or mean (standard deviation) over seeds, with its note; else the note alone."""
    value, note = entry["value"], entry["note"]
    if pd.isna(value):
        return NOT_AVAILABLE if is_remedy(note) else note or NOT_AVAILABLE
    if entry["column"] == "training images":
        return f"{value:.0f}"
    text = f"{number(value)} ({number(entry['std'])})" if pd.notna(entry["std"]) else said(entry)
    ours = entry["key"] and "published" not in entry["column"]
    size = f"n = {entry['n']:.0f}" if pd.notna(entry["n"]) and ours else ""
    text = f"{text} {DAGGER}" if is_inline(note) else text
    whose = counted(note)
    return "; ".join(filter(None, [text, size, whose[1] if whose else ""]))


def is_remedy(note: str) -> bool:
    """Does a note say how to obtain what is missing? Then it stands once, below the table."""
    return note.startswith(f"{NOT_AVAILABLE}: ")


def is_inline(note: str) -> bool:
    """Does a note speak against its number? Others explain a column and stand below the table."""
    return note.startswith("ineligible")


def counted(note: str) -> re.Match[str] | None:
    """Does a note only count a number's patients ("22 patients")? Then its own cell says so."""
    return re.fullmatch(r"(\d+ patients)(?: \(seed \d+\))?", note)


# --- pages ------------------------------------------------------------------------------------------------------------
def footnotes(table: pd.DataFrame) -> list[str]:
    """What the daggers mean, and the explaining notes, once per column or for all columns that share them, with the
    rows that they are about.
    """
    valued = table[table["value"].notna() & (table["note"] != "")]
    inline = valued["note"].map(is_inline).astype(bool)
    lines = [INELIGIBLE] if inline.any() else []
    missing = table[table["value"].isna() & table["note"].map(is_remedy).astype(bool)]
    told = pd.concat([valued[~inline & ~valued["note"].map(counted).astype(bool)], missing])
    columns: dict[str, list[str]] = {}
    for column, part in told.groupby("column", sort=False):
        there = table[(table["column"] == column) & (table["value"].notna() | table.index.isin(missing.index))]
        texts = [whose(mine, there) + note for note, mine in part.groupby("note", sort=False)]
        text = f"{'; '.join(texts[:MAX_NOTES])}{' ...' if len(texts) > MAX_NOTES else ''}."
        columns.setdefault(text, []).append(column)
    return lines + [f"{', '.join(names)}: {text}" for text, names in columns.items()]


def whose(part: pd.DataFrame, there: pd.DataFrame) -> str:
    """Of which panels of a column, and of which of their rows, a note is told: "Text baseline, Flat encoder: "; "" for
    all of it.
    """
    panels, here = part["panel"].unique(), there[there["panel"].isin(part["panel"])]
    names = [", ".join(panels)] if len(panels) < there["panel"].nunique() else []
    names += [", ".join(part["row"].unique())] if part["row"].nunique() < here["row"].nunique() else []
    return f"{', '.join(names)}: " if names else ""


def seeds_note(table: pd.DataFrame) -> str:
    """What brackets and parentheses mean, said once per table."""
    ours = table[~table["column"].str.contains("published") & (table["column"] != "training images")]
    seeds = int(ours["seeds"].max()) if len(ours) and ours["seeds"].notna().any() else 0
    if seeds > 1:
        fewer = " (fewer where the CSV says so)" if (ours.loc[ours["value"].notna(), "seeds"] < seeds).any() else ""
        return (f"Ours: mean (standard deviation) over n = {seeds} training seeds{fewer}; lo and hi of the CSV: "
                "95 % interval over trainings (t-interval of the seeds) and, where a seed has one, over test patients, not "
                "clipped: few seeds make it wide, and it may pass the metric's range (an accuracy above 1).")  # fmt: skip
    return "Ours: n = 1 seed, value [95 % interval of the resampled patients]. Published: value (standard deviation)."


def wide(table: pd.DataFrame, panel: str) -> pd.DataFrame:
    """One panel of a table of cells as strings, in order of first appearance; a column's head says its commonest n."""
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


def in_turn(texts: Sequence[str]) -> str:
    """Several methods in one cell: "82.8 / 75.1 / 64.3"; said once where all are the same."""
    texts = list(texts)
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def published_pages(numbers: pd.DataFrame, pairs: pd.DataFrame) -> Pages:
    """The pages of `published.beside` and `published.directions`: numbers, directions under both readings, tallies."""
    if numbers.empty:
        return {}
    rows = {}
    for (table, metric, group, pairing), part in numbers.groupby(["table", "metric", "group", "pairing"], sort=False):
        other = other_metric(part, metric)
        own = [shown({**r, "value": r["ours"], "column": "", "key": ""}).split(":")[0] for r in part.to_dict("records")]
        own = [f"{other} {text}" if other and text[:1].isdigit() else text for text in own]
        why = dict.fromkeys(n.removeprefix(f"{NOT_AVAILABLE}: ") for n in part["note"] if n)
        printed = [number(v) + (f" ({number(s)})" if pd.notna(s) else "")
                   for v, s in zip(part["published"], part["published std"], strict=True)]  # fmt: skip
        other = f"reading: {pairing}" if pairing else f"ours: {other}" if other else ""
        rows[f"{table}: {metric}{f' ({other})' if other else ''}, {group}"] = {
            "published": " / ".join(printed), "ours": in_turn(own), "n": number_range(part["n"].dropna()),
            "seeds": number_range(part["seeds"].dropna()),
            "differs, or why not": "; ".join([*filter(None, part["differs"].unique()), *why]),
        }  # fmt: skip
    order = " / ".join(TITLES[published.METHOD[m]] for m in numbers["method"].unique())
    pages = {f"Numbers ({order})": pd.DataFrame(rows).T}
    for reading in pairs["reading"].unique():
        here = pairs[pairs["reading"] == reading]
        name = here["table"] + ": " + here["metric"] + ", " + here["group"]
        columns = here["a"].map(TITLES) + " - " + here["b"].map(TITLES)
        cells = pd.DataFrame({"row": name, "column": columns, "text": here["published"] + ": " + here["verdict"]})
        grid = cells.pivot(index="row", columns="column", values="text")
        grid = grid.reindex(index=name.unique(), columns=columns.unique()).fillna("")
        pages[f"Direction, {reading} (published sign: what ours says)"] = grid
        pages[f"Pairs of methods, {reading}"] = published.tally(pairs, reading).astype(str)
    return pages


def other_metric(part: pd.DataFrame, metric: str) -> str:
    """The metric that stands for the printed one in ours (KID where a cell is too small for FID), "" if the same."""
    told = [d.split("; ")[-1].split("-")[0] for d in part["differs"].unique() if "-" in d]
    return next((t for t in told if t == "KID" and "FID" in metric), "")


def number_range(sizes: pd.Series) -> str:
    """ "480", "12-48" or "-"."""
    if not len(sizes):
        return "-"
    low, high = int(sizes.min()), int(sizes.max())
    return str(low) if low == high else f"{low}-{high}"


# --- Markdown and LaTeX -----------------------------------------------------------------------------------------------
def markdown_table(text: pd.DataFrame, corner: str = "") -> str:
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"  # noqa: E731
    body = [line([i, *row]) for i, row in zip(text.index, text.to_numpy(), strict=True)]
    return "\n".join([line([corner, *text.columns]), "|" + "---|" * (len(text.columns) + 1), *body])


def markdown(pages: Pages, title: str, notes: Sequence[str]) -> str:
    parts = [f"# {title}", *(f"## {panel}\n\n{markdown_table(text)}" for panel, text in pages.items())]
    return "\n\n".join([*parts, "\n".join(f"- {n}" for n in notes)]) + "\n"


LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", DAGGER: r"\dag{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}"}
)


def latex(pages: Pages, title: str, notes: Sequence[str]) -> str:
    """One tabular (booktabs) per panel in a table environment."""
    escape = lambda s: str(s).translate(LATEX)  # noqa: E731
    row = lambda cells: " & ".join(map(escape, cells)) + r" \\"  # noqa: E731
    lines = [r"\begin{table}", r"\centering\scriptsize", rf"\caption{{{escape(title)}. {escape(' '.join(notes))}}}"]
    for panel, text in pages.items():
        lines += [rf"\textbf{{{escape(panel)}}}\\", rf"\begin{{tabular}}{{l{'r' * len(text.columns)}}}", r"\toprule"]
        lines += [row(["", *text.columns]), r"\midrule"]
        lines += [row([i, *cells]) for i, cells in zip(text.index, text.to_numpy(), strict=True)]
        lines += [r"\bottomrule", r"\end{tabular}\par\medskip"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def write_pages(
    numbers: pd.DataFrame, pages: Pages, folder: Path, name: str, title: str, notes: Sequence[str] = ()
) -> None:
    """<name>.csv (`numbers`), .md and .tex (`pages`) below `folder`; without rows all are removed: none stays stale."""
    for ending in (".csv", ".md", ".tex"):
        (Path(folder) / f"{name}{ending}").unlink(missing_ok=True)
    if len(numbers):
        record.write_text(Path(folder) / f"{name}.csv", numbers.to_csv(index=False, float_format="%.6g"))
        record.write_text(Path(folder) / f"{name}.md", markdown(pages, title, notes))
        record.write_text(Path(folder) / f"{name}.tex", latex(pages, title, notes))


def write(table: pd.DataFrame, folder: Path, name: str, title: str, notes: Sequence[str] = ()) -> None:
    """A table of cells (tables.CELL_COLUMNS) as <name>.csv, .md and .tex."""
    pages = {panel: wide(table, panel) for panel in table["panel"].unique()}
    write_pages(table, pages, folder, name, title, [seeds_note(table), *footnotes(table), *notes] if len(table) else ())
