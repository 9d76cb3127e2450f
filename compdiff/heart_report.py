"""The cardiac report: the compiled table as pages, and sentences with intervals, whichever way they fell.

Everything is read from frames: `rates` (heart_fairness.rate_rows and parity_rows with input, source, sampling),
`changes` (heart_fairness.changes with the same), `generation` (tidy results of notebook 09), `matrix` (faithful.matrix).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from compdiff.fairness import MIN_CLASS
from compdiff.heart_fairness import CEILING, CRITERIA, ENOUGH_REPEATS, HOW, MAIN, RATES
from compdiff.rendering import DAGGER, number, said

TITLES = {"cine": "cine (2D+t)", "four_chamber": "four-chamber cine", "volume": "volume (3D)",
          "slice": "single slice (ED)", "frame": "single frame (ES)", "stacked": "stacked ED/ES"}  # fmt: skip
METHODS = {"real_test": "real test images", "text": "the base alone (unconditioned)", "control": "ControlNet",
           "pasted": "pasted mask (control)", "diagnosis": "the diagnosis alone (no image)"}  # fmt: skip
RIVALS = {"text": "the base alone", "diagnosis": "the diagnosis alone"}
PAIRS = (("control", "text"), ("pasted", "text"), ("control", "diagnosis"))  # compared patient by patient
EJECTION, GAIN = "ejection fraction error", "Dice gain of the own mask"
GATE = 0.7  # Dice that was declared before the run
NAMED = 8  # intersections that are named one by one
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


def main_input(frame: pd.DataFrame) -> str:
    """The input that the first sentences are about."""
    return "stacked" if "stacked" in set(frame["input"]) else frame["input"].iloc[0]


def pages(rates: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The compiled table: balanced accuracy by group of each input, then all rates and criteria of the stacked one."""
    out = {}
    who = rates["group_kind"].where(rates["group"] == "", rates["group_kind"] + ": " + rates["group"])
    sizes = rates[["n", "positives"]].fillna(0).astype(int).astype(str)
    who += " (n = " + sizes["n"] + ", " + sizes["positives"] + " positive)"
    for name in rates["input"].unique():
        mine = (rates["input"] == name) & (rates["metric"] == MAIN)
        out[f"Balanced accuracy, {TITLES[name]}"] = _page(rates[mine], who[mine])
    first = main_input(rates)
    mine = (rates["input"] == first) & (rates["group_kind"] == "overall") & rates["metric"].isin(["AUROC", *RATES])
    out[f"All rates, everybody, {TITLES[first]}"] = _page(rates[mine], rates.loc[mine, "metric"])
    names = [f"{c} {h}" for c in CRITERIA for h in HOW]
    mine = (rates["input"] == first) & rates["metric"].isin(names)
    what = rates["group_kind"] + ": " + rates["metric"]
    out[f"Fairness criteria (fairlearn), {TITLES[first]}"] = _page(rates[mine], what[mine])
    return out


# --- sentences --------------------------------------------------------------------------------------------------------
def minus(metric: str, rival: str) -> str:
    """Name of a metric of which the same patients' value by a rival was taken away."""
    return f"{metric} minus that of {RIVALS[rival]}"


def generation_lines(generation: pd.DataFrame) -> list[str]:
    """What was found about the generators: Dice beside its ceiling and floor, KID, ejection fraction, gate by gate."""
    row = {(r["method"], r["metric"]): r for r in generation.to_dict("records")}
    by = row["control", "KID"]["extractor"]
    lines = [f"KID by {by}; that of real test images is one half of them against the other.", ""]
    for m in METHODS:
        if (m, "Dice") in row:
            line = f"- {METHODS[m]}: Dice {said(row[m, 'Dice'])} (n = {_count(row[m, 'Dice'])})"
            if (m, "KID") in row:
                sizes = f"n = {_count(row[m, 'KID'])} against {_count(row[m, 'KID'], 'n_ref')}"
                line += f", KID to real test images {said(row[m, 'KID'])} ({sizes})"
            lines.append(f"{line}.")
    lines += [f"- Ejection fraction implied by the cavities found in ED and ES, {METHODS[m]}: mean absolute error "
              f"{said(row[m, EJECTION])} (fraction)." for m in METHODS if (m, EJECTION) in row]  # fmt: skip
    if ("control", GAIN) in row:
        lines.append(f"- {METHODS['control']}: its own mask fits better than another patient's with the same diagnosis, "
                     f"by Dice {said(row['control', GAIN])}.")  # fmt: skip
    for m, rival in PAIRS:
        told = [f"{k} {said(row[m, minus(k, rival)])}" for k in ("Dice", "KID", EJECTION) if (m, minus(k, rival)) in row]
        lines += [f"- {METHODS[m]} minus {RIVALS[rival]}, the same patients: {', '.join(told)}."] if told else []
    return lines + gates(row)


def gates(row: Mapping[tuple[str, str], Mapping]) -> list[str]:
    """What the generator had to show, each with its word: it holds where the bounds of the interval say so, not the
    value alone. Methods are compared by their paired differences. {(method, metric): row} of a run's results.

    "No worse" can be said only where the comparison sees a worse one: the pasted mask.
    """
    nobody = {"lo": float("nan"), "hi": float("nan")}
    ends = lambda method, metric: row.get((method, metric), nobody)  # noqa: E731
    kid = {m: ends(m, minus("KID", "text")) for m in ("control", "pasted")}
    lines = []
    for what, larger, smaller in (
        (f"Dice of the ControlNet is at least {GATE}", ends("control", "Dice")["lo"], GATE),
        ("Dice of the ControlNet is above the unconditioned model's", ends("control", minus("Dice", "text"))["lo"], 0),
        ("Dice of the ControlNet is above that of the diagnosis alone", ends("control", minus("Dice", "diagnosis"))["lo"], 0),
        ("the ControlNet fits its own mask better than that of another with this diagnosis", ends("control", GAIN)["lo"], 0),
        ("the ControlNet's ejection fraction is closer than that of the diagnosis alone",
         0, ends("control", minus(EJECTION, "diagnosis"))["hi"]),
        ("KID of the pasted mask is worse than the unconditioned model's", kid["pasted"]["lo"], 0),
    ):  # fmt: skip
        known = pd.notna(larger) and pd.notna(smaller)
        word = ("holds" if larger > smaller else "does not hold") if known else "not available"
        lines.append(f"- Gate: {what}: {word}.")
    what = "KID of the ControlNet is no worse than the unconditioned model's"
    if pd.isna(kid["control"]["lo"]) or pd.isna(kid["pasted"]["lo"]):
        word = "not available"
    elif kid["pasted"]["lo"] <= 0:
        word = "cannot be said, for the pasted mask is not seen to be worse either"
    elif kid["control"]["lo"] > 0:
        word = "does not hold"
    else:
        worst = kid["control"]["hi"]
        word = "holds, it is better" if worst < 0 else f"holds within noise, at most {number(worst)} worse"
    return [*lines, f"- Gate: {what}: {word}."]


def _count(row: Mapping[str, object], name: str = "n") -> str:
    return f"{row[name]:.0f}" if pd.notna(row.get(name)) else "?"


def change_sentence(row: Mapping[str, object]) -> str:
    """One change with where it started, its interval and its verdict."""
    where = {"overall": "overall", "worst group": f"of the worst group by {row['group_kind']}"}.get(
        row["group"] or row["group_kind"], f"of {row['group_kind']} {row['group']}")  # fmt: skip
    what = f"balanced accuracy {where}"
    if row["metric"] == "gap":
        what = f"the gap in balanced accuracy by {row['group_kind']} ({row['note'].rpartition('; ')[2]})"
    mark = f" {DAGGER}" if str(row["note"]).startswith("ineligible") else ""
    return f"{what} changed from {number(row['before'])} by {said(row)}: {row['verdict']}{mark}"


def change_lines(changes: pd.DataFrame) -> list[str]:
    """Whether augmentation helped, for every input, source and sampling that was compared with real images as found:
    overall, and with enough repeats for a verdict the worst groups and gaps, too."""
    lines = []
    for (name, source, sampling), part in changes.groupby(["input", "source", "sampling"], sort=False):
        told = part[part["group"].isin(["", "worst group"]) | (part["metric"] == "gap")].to_dict("records")
        what, repeats = f"- {TITLES[name]}, {source}, sampling {sampling}", int(part["repeats"].iloc[0])
        if repeats < ENOUGH_REPEATS:
            overall = next(row for row in told if row["group_kind"] == "overall")
            lines.append(f"{what} ({repeats} repeats: too few for a verdict): {change_sentence(overall)}.")
        else:
            lines += [f"{what}, against real, as found:", *(f"  - {change_sentence(row)}." for row in told)]
    return lines


def verdict_lines(changes: pd.DataFrame) -> list[str]:
    """Real + synthetic against real, both as found: a bold sentence about everybody, then the worst groups."""
    mine = changes[(changes["source"] == "real + synthetic") & (changes["sampling"] == "as found")]
    mine = mine[mine["input"] == main_input(mine)]
    (overall,) = mine[mine["group_kind"] == "overall"].to_dict("records")
    what = f"{TITLES[overall['input']]}, real + synthetic against real"
    worst = mine[mine["group"] == "worst group"].to_dict("records")
    first = f"**Did augmentation help? {what}: {change_sentence(overall)}.**"
    return [first, "", *(f"- {change_sentence(r)}." for r in worst)]


def ceiling_line(rates: pd.DataFrame) -> str:
    """How much augmentation could gain at most over real images alone."""
    mine = (rates["source"] == "real") & (rates["sampling"] == "as found") & (rates["input"] == main_input(rates))
    (row,) = rates[mine & (rates["group_kind"] == "overall") & (rates["metric"] == MAIN)].to_dict("records")
    line = (f"- Real images alone reach balanced accuracy {said(row)} overall ({TITLES[row['input']]}): at most "
            f"{number(1 - row['value'])} can be gained")  # fmt: skip
    return f"{line}; above {CEILING} a gain cannot be seen here, only harm." if row["value"] > CEILING else f"{line}."


def few_lines(rates: pd.DataFrame) -> list[str]:
    """Groups and intersections too small to judge, and how few ill patients a group's TPR is taken over. An attribute
    of whose groups each holds one label only, such as the diagnosis itself, is passed over."""
    people = rates[rates["metric"] == MAIN].drop_duplicates(["group_kind", "group"])
    mixed = (people["positives"] > 0) & (people["positives"] < people["n"])
    people = people[people["group_kind"].isin(people.loc[mixed, "group_kind"])]
    crossed = people["group_kind"].str.contains(" x ")
    few = people["note"].str.contains("ineligible")  # also said where there is no rate at all
    single = people[few & ~crossed].to_dict("records")
    lines = []
    if single:
        lines.append(
            f"- Too small to judge: {', '.join(map(_who, single))}. Their rates are shown with {DAGGER}; one patient "
            "more or less on the right side moves them visibly, so neither fairness nor its absence follows."
        )
    ill = [f"{r['group'] or 'everybody'} with heart failure: {r['positives']:.0f}"
           for r in single if 0 < r["positives"] < MIN_CLASS]  # fmt: skip
    if ill:
        lines.append(f"- A group's TPR is a share of its ill, and these are few; {'; '.join(ill)}. One decision moves "
                     "the rate by one over that number.")  # fmt: skip
    both = people[few & crossed].sort_values(["positives", "n"], kind="stable").to_dict("records")
    if both:
        more = f", and {len(both) - NAMED} more in fairness.csv" if len(both) > NAMED else ""
        lines.append(f"- {len(both)} of {crossed.sum()} intersections of two attributes are too small to judge, fewest "
                     f"ill first: {', '.join(map(_who, both[:NAMED]))}{more}.")  # fmt: skip
    return lines


def _who(row: Mapping[str, object]) -> str:
    name = f"{row['group_kind']} {row['group']}".strip()
    return f"{name} ({row['n']:.0f} patients, {row['positives']:.0f} with heart failure)"


def limits(rates: pd.DataFrame) -> list[str]:
    """What cannot be concluded: what lies above the ceiling, and who is too few, with numbers."""
    lines = [ceiling_line(rates), *few_lines(rates)]
    lines.append(
        "- An interval that holds 0 shows neither that augmentation helps nor that it does not: it says how large an "
        "effect would have to be to be seen with these patients. Where both ends are 0, no resample held a changed "
        f'decision, which is no certainty; "saturated": from above {CEILING}, where only harm can be seen, or a gap '
        "between groups of which every one lies above it."
    )
    return lines


def matrix_lines(matrix: pd.DataFrame) -> list[str]:
    """Group x group FID: own synthetic group, beside the floor of real halves, and how often it is the closest one."""
    lines = []
    left = matrix[matrix["value"].isna()]
    for attribute, part in matrix[matrix["value"].notna()].groupby("attribute", sort=False):
        own = part[part["real"] == part["other"]].pivot(index="real", columns="kind", values="value")
        if {"synthetic", "real"} <= set(own.columns):
            texts = [f"{g} {number(r['synthetic'])} (floor {number(r['real'])})" for g, r in own.iterrows()]
            note = part["note"].dropna().iloc[0] if part["note"].notna().any() else ""
            lines.append(f"- FID of each {attribute} group to its own synthetic images, n = {int(part['n'].iloc[0])}: "
                         f"{', '.join(texts)}{f' ({note})' if note else ''}.")  # fmt: skip
            wide = part[part["kind"] == "synthetic"].pivot(index="real", columns="other", values="value")
            closest = wide.idxmin(axis=1)
            most, rows = closest.value_counts().index[0], closest.value_counts().iloc[0]
            own, n = (closest == closest.index).sum(), len(closest)
            draws = f"; most often it is synthetic {most}, in {rows} of {n} rows" if rows > 1 else ""
            lines.append(f"  - The smallest of its row stands on the diagonal in {own} of {n} groups{draws}.")
    if lines:
        lines.append("- On the diagonal stand images made from the masks of the very patients that they are compared "
                     "with, elsewhere never: the diagonal is favoured.")  # fmt: skip
    lines += [f"- {r['attribute']} {r['real']}: {r['note']}." for r in left.to_dict("records")]
    return lines or ["- Group x group FID: not available, no attribute has two groups of ten patients."]


def folds_line(used: int, made: int) -> str:
    """On which folds the classifiers were trained: `used` of the `made`."""
    if used == made:
        return (f"Classifiers are trained on each of {made} folds and their predictions pooled: whoever is judged was "
                "shown neither to the network nor to the generator of its images.")  # fmt: skip
    return (f"Classifiers are trained on {used} of {made} folds and judged on the test cohort: the generator has "
            "learnt from patients who validate in the other folds. No number holds a spread over folds.")  # fmt: skip


def rehearsal_lines(steps: int) -> list[str]:
    """That the generators have learnt from phantoms first, where they have."""
    told = ("The generators, the base alone as well as ControlNet, learnt from heart phantoms first "
            f"({steps:,} steps each of base and branch), then from the patients of each fold.")  # fmt: skip
    return ["", told] if steps else []


def report(title: str, generation: pd.DataFrame, matrix: pd.DataFrame, rates: pd.DataFrame, changes: pd.DataFrame,
           absent: Mapping[str, str], seeds: Sequence[int], generated: bool, folds: tuple[int, int],
           rehearsal: int = 0) -> str:  # fmt: skip
    """report.md. folds: how many the classifiers were trained on, and how many there are; rehearsal: steps that the
    generators learnt from phantoms first."""
    people = rates.loc[(rates["group_kind"] == "overall") & (rates["metric"] == MAIN), ["n", "positives"]].iloc[0]
    kind = "phantoms: no number says anything about patients" if generated else "real patients, synthetic images"
    one = f" of generator seed {seeds[0]}" if len(seeds) > 1 else ""
    lines = [f"# {title}: fairness report", "", f"Made from {kind}; {int(people['n'])} test "
             f"{'phantoms' if generated else 'patients'}, "
             f"{int(people['positives'])} with heart failure; generator seeds {', '.join(map(str, seeds))}; "
             "intervals 95 %.", "", folds_line(*folds), *rehearsal_lines(rehearsal),
             "", *verdict_lines(changes), "", f"## Generated images{one}", "", *generation_lines(generation), "",
             f"## Groups against groups{one}", "", *matrix_lines(matrix), "", "## Augmentation and weighting", "",
             f"{len(changes)} comparisons with real images as found in changes.csv, the main ones here; none is "
             "corrected for their number, so all but the first sentence are exploratory.", "", *change_lines(changes), "",
             "## What cannot be concluded", "", *limits(rates), "", "## Not available", ""]  # fmt: skip
    lines += [f"- {name}: {why}." for name, why in absent.items()] or ["- Nothing is missing."]
    return "\n".join(lines) + "\n"
