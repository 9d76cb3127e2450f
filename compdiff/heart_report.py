"""The cardiac report: the compiled table as pages, and sentences with intervals, whichever way they fell.

Everything is read from frames: `rates` (heart_fairness.rate_rows and parity_rows with input, source, sampling),
`changes` (heart_fairness.changes with the same), `generation` (tidy results of notebook 09), `matrix` (faithful.matrix).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from compdiff.heart_fairness import CRITERIA, HOW, MAIN, RATES
from compdiff.rendering import DAGGER, number, said

TITLES = {"cine": "cine (2D+t)", "four_chamber": "four-chamber cine", "volume": "volume (3D)",
          "slice": "single slice (ED)", "frame": "single frame (ES)", "stacked": "stacked ED/ES"}  # fmt: skip
METHODS = {"real_test": "real test images", "text": "the base alone (unconditioned)", "control": "ControlNet",
           "pasted": "pasted mask (control)"}  # fmt: skip
GATE = 0.7  # Dice that was declared before the run
NOTES = (
    "Value ± standard deviation over repeats [95 % interval of resampled patients and repeats].",
    f"{DAGGER} fewer than 10 patients with or without heart failure, or fewer than 20 without: no claim rests on it.",
)


def cell(row: Mapping[str, object]) -> str:
    """Value ± std [lo, hi], with a dagger where the group is too small; the note alone where there is no value."""
    if pd.isna(row["value"]):
        return str(row["note"])
    text = number(row["value"]) + (f" ± {number(row['std'])}" if pd.notna(row["std"]) else "")
    text += f" [{number(row['lo'])}, {number(row['hi'])}]" if pd.notna(row["lo"]) else ""
    return f"{text} {DAGGER}" if str(row["note"]).startswith("ineligible") else text


def _page(rows: pd.DataFrame, index: pd.Series) -> pd.DataFrame:
    columns = rows["source"] + ", " + rows["sampling"]
    long = pd.DataFrame({"row": index, "column": columns, "text": [cell(r) for r in rows.to_dict("records")]})
    wide = long.pivot(index="row", columns="column", values="text")
    return wide.reindex(index=long["row"].unique(), columns=long["column"].unique()).fillna("")


def pages(rates: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The compiled table: balanced accuracy by group of each input, then all rates and criteria of the stacked one."""
    out = {}
    who = rates["group_kind"].where(rates["group"] == "", rates["group_kind"] + ": " + rates["group"])
    sizes = rates[["n", "positives"]].fillna(0).astype(int).astype(str)
    who += " (n = " + sizes["n"] + ", " + sizes["positives"] + " positive)"
    for name in rates["input"].unique():
        mine = (rates["input"] == name) & (rates["metric"] == MAIN)
        out[f"Balanced accuracy, {TITLES[name]}"] = _page(rates[mine], who[mine])
    first = "stacked" if "stacked" in set(rates["input"]) else rates["input"].iloc[0]
    mine = (rates["input"] == first) & (rates["group_kind"] == "overall") & rates["metric"].isin(RATES)
    out[f"All rates, everybody, {TITLES[first]}"] = _page(rates[mine], rates.loc[mine, "metric"])
    names = [f"{c} {h}" for c in CRITERIA for h in HOW]
    mine = (rates["input"] == first) & rates["metric"].isin(names)
    what = rates["group_kind"] + ": " + rates["metric"]
    out[f"Fairness criteria (fairlearn), {TITLES[first]}"] = _page(rates[mine], what[mine])
    return out


# --- sentences --------------------------------------------------------------------------------------------------------
def generation_lines(generation: pd.DataFrame) -> list[str]:
    """What was found about the generators: Dice beside its ceiling and KID, gate by gate."""
    row = {(r["method"], r["metric"]): r for r in generation.to_dict("records")}
    lines = [f"- {METHODS[m]}: Dice {said(row.get((m, 'Dice')))}, KID to real test images {said(row.get((m, 'KID')))}."
             for m in METHODS if (m, "Dice") in row]  # fmt: skip
    lines += [f"- Ejection fraction implied by the cavities found in ED and ES, {METHODS[m]}: mean absolute error "
              f"{said(row[m, 'ejection fraction error'])}." for m in METHODS if (m, "ejection fraction error") in row]  # fmt: skip
    dice, kid = ({m: row[m, metric]["value"] for m in METHODS if (m, metric) in row} for metric in ("Dice", "KID"))
    for what, holds in (
        (f"Dice of the ControlNet is at least {GATE}", dice["control"] >= GATE),
        ("Dice of the ControlNet is above the unconditioned model's", dice["control"] > dice["text"]),
        ("KID of the ControlNet is no worse than the unconditioned model's", kid["control"] <= kid["text"]),
        ("the pasted mask fails by KID", kid["pasted"] > kid["text"]),
    ):
        lines.append(f"- Gate: {what}: {'holds' if holds else 'does not hold'}.")
    return lines


def change_sentence(row: Mapping[str, object]) -> str:
    """One change with its interval and its verdict."""
    where = {"overall": "overall", "worst group": f"of the worst group by {row['group_kind']}"}.get(
        row["group"] or row["group_kind"], f"of {row['group_kind']} {row['group']}")  # fmt: skip
    what = f"balanced accuracy {where}"
    if row["metric"] == "gap":
        what = f"the gap in balanced accuracy by {row['group_kind']}"
    mark = f" {DAGGER}" if str(row["note"]).startswith("ineligible") else ""
    return f"{what} changed by {said(row)}: {row['verdict']}{mark}"


def change_lines(changes: pd.DataFrame) -> list[str]:
    """Whether augmentation helped, for every input, source and sampling that was compared with real images as found."""
    lines = []
    for (name, source, sampling), part in changes.groupby(["input", "source", "sampling"], sort=False):
        told = part[part["group"].isin(["", "worst group"]) | (part["metric"] == "gap")]
        lines.append(f"- {TITLES[name]}, {source}, sampling {sampling}, against real, as found:")
        lines += [f"  - {change_sentence(row)}." for row in told.to_dict("records")]
    return lines


def verdict_line(changes: pd.DataFrame) -> str:
    """The one sentence: real + synthetic against real, stacked ED/ES, both as found."""
    mine = changes[(changes["source"] == "real + synthetic") & (changes["sampling"] == "as found")]
    mine = mine[mine["input"] == ("stacked" if "stacked" in set(mine["input"]) else mine["input"].iloc[0])]
    told = mine[(mine["group_kind"] == "overall") | mine["group"].isin(["worst group", "gap"])]
    return "Did augmentation help? " + "; ".join(change_sentence(r) for r in told.to_dict("records")) + "."


def limits(rates: pd.DataFrame) -> list[str]:
    """What cannot be concluded: the groups that are too small, with their numbers."""
    small = rates[(rates["metric"] == MAIN) & rates["note"].str.startswith("ineligible")]
    small = small[~small["group_kind"].str.contains(" x ")].drop_duplicates(["group_kind", "group"])
    told = [f"{r['group_kind']} {r['group']} ({int(r['n'])} patients, {int(r['positives'])} with heart failure)"
            for r in small.to_dict("records")]  # fmt: skip
    lines = []
    if told:
        lines.append(
            f"- Too small to judge: {', '.join(told)}. Their rates are shown with {DAGGER}; one patient more or less on "
            "the right side moves them visibly, so neither fairness nor its absence follows."
        )
    lines.append(
        "- An interval that holds 0 shows neither that augmentation helps nor that it does not: it says how large an "
        "effect would have to be to be seen with these patients."
    )
    return lines


def matrix_lines(matrix: pd.DataFrame) -> list[str]:
    """Group x group FID: own synthetic group, beside the floor of real halves."""
    lines = []
    for attribute, part in matrix.groupby("attribute", sort=False):
        own = part[part["real"] == part["other"]].pivot(index="real", columns="kind", values="value")
        if {"synthetic", "real"} <= set(own.columns):
            texts = [f"{g} {number(r['synthetic'])} (floor {number(r['real'])})" for g, r in own.iterrows()]
            lines.append(f"- FID of each {attribute} group to its own synthetic images, n = {int(part['n'].iloc[0])}: "
                         f"{', '.join(texts)}.")  # fmt: skip
    return lines or ["- Group x group FID: not available, fewer than four patients in a group."]


def report(title: str, generation: pd.DataFrame, matrix: pd.DataFrame, rates: pd.DataFrame, changes: pd.DataFrame,
           absent: Mapping[str, str], seeds: Sequence[int], generated: bool) -> str:  # fmt: skip
    """report.md."""
    people = rates.loc[(rates["group_kind"] == "overall") & (rates["metric"] == MAIN), ["n", "positives"]].iloc[0]
    kind = "phantoms: no number says anything about patients" if generated else "real patients, synthetic images"
    lines = [f"# {title}: fairness report", "", f"Made from {kind}; {int(people['n'])} test patients, "
             f"{int(people['positives'])} with heart failure; generator seeds {', '.join(map(str, seeds))}; "
             "intervals 95 %.",
             "", f"**{verdict_line(changes)}**", "", "## Generated images", "", *generation_lines(generation), "",
             "## Groups against groups", "", *matrix_lines(matrix), "", "## Augmentation and weighting", "",
             *change_lines(changes), "", "## What cannot be concluded", "", *limits(rates), "", "## Not available", ""]  # fmt: skip
    lines += [f"- {name}: {why}." for name, why in absent.items()] or ["- Nothing is missing."]
    return "\n".join(lines) + "\n"
