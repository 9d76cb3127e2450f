"""Published numbers beside ours, and whether our comparison of the methods points the same way. No number stands here:
all come from compdiff/published_results.csv. Sizes are not compared (other images, other features), directions are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations

import numpy as np
import pandas as pd

from compdiff import frames, paths
from compdiff.attributes import Schema
from compdiff.frames import NOT_AVAILABLE, TITLES, Item

PUBLISHED = paths.ROOT / "compdiff" / "published_results.csv"
METHOD = {"baseline": "text", "fairdiffusion": "fairdiffusion", "compdiff": "hcn"}  # the papers' name -> ours
NOT_IN_RECORD = "not in the record"
AS_PRINTED, SWAPPED, EITHER = "sexes as printed", "sexes swapped", "no sex named"
PAIRINGS = ("paired", "intra-prompt")  # between which images MS-SSIM is, the record does not say: both readings
COMPARABLE = (
    "Published columns: other data, image size and feature extractor. Compare the direction between methods, never the "
    "size of a number."
)
SEX_NAMES = (
    "The reference metric code and its labels disagree on sex: Male and Female may be swapped in the published columns."
)
OUTSIDE = {"FID-RadImageNet": ("FID", "radimagenet"), "BioViL": ("cosine paired", "biovil")}  # of stage "judges"
DISTANCES = ("FID", "KID")  # that rank only between clear ends
WHY_NOT = {
    "FID-RadImageNet": "RadImageNet features were not computed; FID of another extractor is another quantity",
    "BioViL": "the judge BioViL was not run",
}


@cache
def read() -> pd.DataFrame:
    """The numbers of the papers' public pages: source, table, modality, method, group, metric, value, std, caution.

    One frame for all callers: not to be changed.
    """
    return pd.read_csv(
        PUBLISHED, dtype={"table": str, "group": str}, keep_default_na=False, na_values={"value": [""], "std": [""]}
    )


# --- which of our numbers stands beside a published one ---------------------------------------------------------------
def swapped(group: str) -> str:
    """A cell's name with the sexes exchanged."""
    other = {"Male": "Female", "Female": "Male"}
    return " ".join(other.get(word, word) for word in group.split(" "))


def pairings(metric: str) -> tuple[str, ...]:
    """The readings of a metric of which the record does not say between which images it is; ("",) = there is one."""
    return PAIRINGS if metric == "MS-SSIM" else ("",)


def counterpart(metric: str, group: str, schema: Schema, results: pd.DataFrame, pairing: str = "") -> Item | str:
    """Our number for a published metric and group (of MS-SSIM under one of PAIRINGS), or why there can be none.

    The papers' own judge or extractor where its weights were there (stage "judges"), else ours. For FID of a cell that
    is too small for one, KID: also a distance, and unbiased in the number of images.
    """
    if pairing:
        names = results.loc[results["stage"] == "quality", "metric"].unique()  # MS-SSIM, or MS-SSIM-3 of small images
        ours = [n for n in names if n.startswith(metric) and n.endswith(f" {pairing}")]
        return Item("quality", ours[0]) if ours else f"no {metric} {pairing} in these results"
    if metric in OUTSIDE:
        return Item("judges", OUTSIDE[metric][0], extractor=OUTSIDE[metric][1])
    if metric == "disease AUROC":
        return Item("alignment", metric)
    name = group if metric == "ES-FID" else metric.split()[0]
    if metric.endswith(" accuracy") or metric in ("age RMSE", "ES-FID"):
        ours = metric if " accuracy" not in metric else f"accuracy:{name}"
        if name not in schema.names:
            return f"this dataset has no {name}"
        if metric == "ES-FID":
            return Item("quality", metric, group)
        return first_with_values([Item("judges", ours, extractor=name), Item("alignment", ours)], results)
    if group != "overall" and group not in {schema.cell_name(cell) for cell in schema.cells()}:
        return "this dataset has no such cell"
    where = {"kind": "overall"} if group == "overall" else {"kind": "cell", "group": group}
    kid = [] if group == "overall" else [Item("quality", "KID", **where)]  # FID of a small cell is not computed
    fids = [Item("judges", "FID", extractor="inception", **where), Item("quality", "FID", **where)]
    return first_with_values([*fids, *kid], results)


def first_with_values(items: Sequence[Item], results: pd.DataFrame) -> Item:
    """The first item of which a compared method has a number, else the last."""
    for item in items:
        rows = item.rows(results)
        if rows.loc[rows["method"].isin(METHOD.values()), "value"].notna().any():
            return item
    return items[-1]


def ours(
    results: pd.DataFrame, schema: Schema, metric: str, group: str, method: str, pairing: str
) -> dict[str, object]:
    """Our row for a published number; without one, a row whose note says why ("not available: ...")."""
    item = counterpart(metric, group, schema, results, pairing)
    row = None if isinstance(item, str) else item.of(results, METHOD[method])
    if row is not None and pd.notna(row["value"]):
        return row
    if isinstance(item, str):
        why = item
    elif row is not None:
        why = row["note"].removeprefix(f"{NOT_AVAILABLE}: ") or "no value"
    elif METHOD[method] not in set(results["method"]):
        why = f"{TITLES[METHOD[method]]} was not run"
    else:
        why = WHY_NOT.get(metric, "not in these results")
    return dict.fromkeys(frames.COLUMNS, np.nan) | {"extractor": "", "note": f"{NOT_AVAILABLE}: {why}"}


def differs(row: Mapping[str, object], kind: str) -> str:
    """In what our number is another quantity than the printed one."""
    if pd.isna(row["value"]):
        return ""
    name = row["metric"] if row["extractor"] == "pixels" else f"{row['metric']}-{row['extractor']}"
    how = "judge trained here" if row["stage"] == "alignment" else name
    return f"{kind}; {how}"


def beside(results: pd.DataFrame, schema: Schema, modality: str, kind: str) -> pd.DataFrame:
    """One row per published number of a modality, of MS-SSIM two: as printed, then ours. `results`: of
    `frames.over_seeds`.

    kind: "phantoms" or "real images". Columns: those of the record (published, published std), pairing ("" or one of
    PAIRINGS), then ours, lo, hi, std, n, seeds, extractor, differs (in what ours is another quantity) and note (why
    there is none).
    """
    table = read()
    rows = []
    printed_rows = table[table["modality"] == modality].to_dict("records")
    for printed, pairing in [(row, pairing) for row in printed_rows for pairing in pairings(row["metric"])]:
        own = ours(results, schema, printed["metric"], printed["group"], printed["method"], pairing)
        base = {k: printed[k] for k in ("source", "table", "modality", "method", "group", "metric")}
        base |= {"pairing": pairing, "published": printed["value"], "published std": printed["std"]}
        base |= {"caution": printed["caution"]}
        base |= {"ours": own["value"]} | {k: own[k] for k in ("lo", "hi", "std", "n", "seeds", "extractor")}
        note = own["note"] if pd.isna(own["value"]) or own["note"].startswith("ineligible") else ""
        rows.append(base | {"differs": differs(own, kind), "note": note})
    return pd.DataFrame(rows)


# --- directions -------------------------------------------------------------------------------------------------------
PAIR_COLUMNS = ["table", "metric", "group", "reading", "our group", "a", "b", "published a", "published b", "published",
                "ours a", "ours b", "ours", "lo", "hi", "verdict", "rests on"]  # fmt: skip


VERDICTS = ("agrees", "disagrees", "within our noise", "agrees, no claim", "disagrees, no claim", "equal in print",
            NOT_AVAILABLE)  # fmt: skip


def judged(published_sign: int, found: frames.Verdict, ineligible: bool = False) -> str:
    """One of VERDICTS for the sign of a minus b in print and ours; no claim: we have no interval, too few images, or a
    distance that cannot rank these methods."""
    if not published_sign:
        return "equal in print"
    if found.word == "within noise":
        return "within our noise"
    sign = {"above": 1, "below": -1}.get(found.word, found.sign)
    if not sign:
        return NOT_AVAILABLE
    verdict = "agrees" if sign == published_sign else "disagrees"
    return f"{verdict}, no claim" if ineligible or found.word == "cannot be said" else verdict


def directions(results: pd.DataFrame, schema: Schema, modality: str) -> pd.DataFrame:
    """One row per pair of methods, metric, group and reading: does the sign of our difference agree with the printed?

    Cells whose sex names may be swapped are compared under both readings: with our cell of the printed name, and with
    our cell of the other sex; so is MS-SSIM, under PAIRINGS. "within our noise": the interval of our difference holds 0
    (`frames.verdict`).
    """
    table = read()
    rows = []
    for (number, metric, group), family in table[table["modality"] == modality].groupby(
        ["table", "metric", "group"], sort=False
    ):
        printed = family.set_index("method")["value"]
        doubtful = family["caution"].str.contains("swapped").any() and swapped(group) != group
        sexes = (AS_PRINTED, SWAPPED) if doubtful else (EITHER,)
        for sex, pairing in [(sex, pairing) for sex in sexes for pairing in pairings(metric)]:
            here = swapped(group) if sex == SWAPPED else group
            reading = f"{metric} read as {pairing}" if pairing else sex
            item = counterpart(metric, here, schema, results, pairing)
            for a, b in combinations([m for m in METHOD if m in printed], 2):
                rows.append({"table": number, "metric": metric, "group": group, "reading": reading, "our group": here,
                             "a": METHOD[a], "b": METHOD[b], "published a": printed[a], "published b": printed[b],
                             **pair(results, item, METHOD[a], METHOD[b], printed[a] - printed[b])})  # fmt: skip
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def pair(results: pd.DataFrame, item: Item | str, a: str, b: str, printed: float) -> dict[str, object]:
    """The half of a row of `directions` that is ours; `printed` is the published difference."""
    sign = int(np.sign(printed))
    out = {"published": {1: "above", -1: "below", 0: "equal"}[sign]}
    if isinstance(item, str):
        return out | {"verdict": NOT_AVAILABLE, "rests on": item}
    found, rows = frames.verdict(results, item, a, b), [item.of(results, m) for m in (a, b)]
    if not frames.known(*rows):
        notes = [r["note"] for r in rows if r is not None and r["note"]]
        return out | {"verdict": NOT_AVAILABLE, "rests on": notes[0] if notes else "not in these results"}
    out |= {"ours a": rows[0]["value"], "ours b": rows[1]["value"], "ours": rows[0]["value"] - rows[1]["value"]}
    if found.paired is not None:
        out |= {k: found.paired[k] for k in ("lo", "hi")} | {"ours": found.paired["value"]}
    note = next((r["note"] for r in rows if r["note"].startswith("ineligible")), "")
    distance = item.metric.removeprefix("ES-") if item.stage == "quality" else ""
    unclear = distance in DISTANCES and any(frames.ranks(results, distance, m) is False for m in (a, b))
    rests = "; ".join(filter(None, [item.metric, found.rests_on, note, f"{distance} cannot rank here" * unclear]))
    return out | {"verdict": judged(sign, found, bool(note) or unclear), "rests on": rests}


def tally(pairs: pd.DataFrame, reading: str) -> pd.DataFrame:
    """How many pairs of methods agree, per table and metric, under one reading of the sex names; columns VERDICTS."""
    here = pairs[pairs["reading"] == reading]
    if here.empty:
        return pd.DataFrame(columns=list(VERDICTS))
    names = "Table " + here["table"].where(here["table"] != "figure", "-") + ", " + here["metric"]
    names = names.str.replace("Table -", "Figure")
    found = pd.crosstab(names.to_numpy(), here["verdict"].to_numpy())
    return found.reindex(index=names.unique(), columns=list(VERDICTS), fill_value=0)
