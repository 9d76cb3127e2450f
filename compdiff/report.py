"""What the tables say, in sentences made from their numbers: which gates hold, which differences are within noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import pandas as pd

from compdiff import config
from compdiff.attributes import Schema
from compdiff.tables import NOT_AVAILABLE, TITLES, Item, methods_in, number

SHARE_OF_JUDGE = 0.9  # of the judge's own real-test score that a trained method must reach
COMPARED = (("quality", "FID"), ("quality", "KID"))


@dataclass(frozen=True)
class Finding:
    """One sentence with its numbers. holds: None = cannot be said (a number is missing or ineligible)."""

    gate: str
    method: str
    holds: bool | None
    text: str


def said(row: dict | None) -> str:
    """A number as text: value [interval]."""
    if row is None or pd.isna(row["value"]):
        return (row or {}).get("note") or NOT_AVAILABLE
    return number(row["value"]) + (f" [{number(row['lo'])}, {number(row['hi'])}]" if pd.notna(row["lo"]) else "")


def _known(*rows: dict | None) -> bool:
    return all(r is not None and pd.notna(r["value"]) for r in rows)


def _bounds(row: dict) -> tuple[float, float]:
    """The interval; the value itself where none was computed."""
    return (row["lo"], row["hi"]) if pd.notna(row["lo"]) else (row["value"], row["value"])


def trained(results: pd.DataFrame) -> list[str]:
    return [m for m in methods_in(results, ("quality", "alignment")) if m in config.METHODS]


# --- gates --------------------------------------------------------------------------------------------------------
def accuracy_gates(results: pd.DataFrame, schema: Schema) -> list[Finding]:
    """Accuracy >= 90 % of the judge's own real-test score, and the whole interval above the shuffled-attributes row.

    A judge whose own interval is not above the shuffled row sees nothing: then the first cannot be said.
    """
    out = []
    for method, name in product(trained(results), schema.names):
        item = Item("alignment", f"accuracy:{name}")
        ours, judge, shuffled = (item.of(results, m) for m in (method, "real_test", "shuffled"))
        known = _known(ours, judge, shuffled) and pd.notna(judge["lo"])
        blind = known and judge["lo"] <= shuffled["value"]
        share = f", {100 * ours['value'] / judge['value']:.0f} % of it" if known and judge["value"] > 0 else ""
        share += "; the judge itself is no better than with shuffled attributes" if blind else ""
        holds = bool(ours["value"] >= SHARE_OF_JUDGE * judge["value"]) if known and not blind else None
        out.append(
            Finding("accuracy", method, holds, f"{name}: {said(ours)}; judge on real test images {said(judge)}{share}")
        )
        known = _known(ours, shuffled) and pd.notna(ours["lo"])
        out.append(Finding("above shuffled", method, bool(ours["lo"] > shuffled["value"]) if known else None,
                           f"{name}: {said(ours)}; shuffled attributes {said(shuffled)}"))  # fmt: skip
    return out


def kid_gates(results: pd.DataFrame) -> list[Finding]:
    """KID below the untrained row."""
    out, item = [], Item("quality", "KID")
    untrained = item.of(results, "untrained")
    for method in trained(results):
        ours = item.of(results, method)
        holds = bool(ours["value"] < untrained["value"]) if _known(ours, untrained) else None
        out.append(Finding("KID below untrained", method, holds, f"{said(ours)}; untrained {said(untrained)}"))
    return out


def copy_gates(results: pd.DataFrame) -> list[Finding]:
    """The memorising row is told apart from a trained method when one memorisation metric's intervals do not touch."""
    here, out = results[(results["stage"] == "memorisation") & (results["group_kind"] == "overall")], []
    for method in [m for m in methods_in(results, ("memorisation",)) if m in config.METHODS]:
        apart, texts = [], []
        for metric, setting in here[["metric", "setting"]].drop_duplicates().itertuples(index=False):
            item = Item("memorisation", metric, setting=setting)
            ours, copy = item.of(here, method), item.of(here, "copy")
            if _known(ours, copy) and pd.notna(ours["lo"]) and pd.notna(copy["lo"]):
                apart.append(_apart(ours, copy))
                texts.append(f"{metric} {said(ours)}; copy {said(copy)}")
        out.append(
            Finding("told apart from a copy", method, any(apart) if apart else None, "; ".join(texts) or NOT_AVAILABLE)
        )
    return out


# --- differences --------------------------------------------------------------------------------------------------
def _apart(a: dict, b: dict) -> bool:
    """Do two intervals not touch? Equal values are never apart."""
    (a_lo, a_hi), (b_lo, b_hi) = _bounds(a), _bounds(b)
    return bool(a_lo > b_hi or b_lo > a_hi)


def differences(results: pd.DataFrame, schema: Schema) -> pd.DataFrame:
    """Every pair of methods, every compared metric: a, b, metric, both values, verdict and on what it rests.

    A row "<metric> minus <method b>" of method a in the results' stage "difference" is a paired difference (same resampled patients) and decides: within
    noise means that its interval holds 0. Else two intervals that touch are within noise, which is the more cautious rule.
    """
    rows = []
    compared = [*COMPARED, ("alignment", "accuracy"), *(("alignment", f"accuracy:{name}") for name in schema.names)]
    for (stage, metric), (a, b) in product(compared, combinations(trained(results), 2)):
        item = Item(stage, metric)
        va, vb = item.of(results, a), item.of(results, b)
        paired = Item("difference", f"{metric} minus {b}").of(results, a) or Item(
            "difference", f"{metric} minus {a}"
        ).of(results, b)
        if not _known(va, vb):
            verdict, rests = "cannot be said", NOT_AVAILABLE
        elif paired is not None and pd.notna(paired["lo"]):
            verdict, rests = (
                "within noise" if paired["lo"] <= 0 <= paired["hi"] else "apart",
                f"paired difference {said(paired)}",
            )
        elif pd.isna(va["lo"]) or pd.isna(vb["lo"]):
            verdict, rests = "cannot be said", "no interval"
        else:
            verdict, rests = (
                ("apart", "intervals do not touch") if _apart(va, vb) else ("within noise", "intervals overlap")
            )
        rows.append(
            {
                "a": a,
                "b": b,
                "metric": item.label(results),
                "value a": said(va),
                "value b": said(vb),
                "verdict": verdict,
                "rests on": rests,
            }
        )
    return pd.DataFrame(rows, columns=["a", "b", "metric", "value a", "value b", "verdict", "rests on"])


# --- text ---------------------------------------------------------------------------------------------------------
HEADINGS = {
    "accuracy": f"Attribute accuracy reaches {100 * SHARE_OF_JUDGE:.0f} % of the judge's own score on real test images",
    "above shuffled": "The accuracy's interval lies above the row with shuffled attributes",
    "KID below untrained": "KID is below that of the untrained model",
    "told apart from a copy": "The copy of the training set is told apart",
}
WORDS = {True: "holds", False: "DOES NOT HOLD", None: "cannot be said"}


def findings(results: pd.DataFrame, schema: Schema) -> list[Finding]:
    return [*accuracy_gates(results, schema), *kid_gates(results), *copy_gates(results)]


def gate_lines(found: Sequence[Finding]) -> list[str]:
    lines = []
    for gate, heading in HEADINGS.items():
        mine = [f for f in found if f.gate == gate]
        tally = "; ".join(
            f"{word} in {sum(f.holds is v for f in mine)} of {len(mine)}"
            for v, word in WORDS.items()
            if any(f.holds is v for f in mine)
        )
        lines += [f"### {heading}", "", f"{tally or NOT_AVAILABLE}.", ""]
        lines += [f"- {TITLES[f.method]}: **{WORDS[f.holds]}** - {f.text}" for f in mine] + [""]
    return lines


def difference_lines(table: pd.DataFrame) -> list[str]:
    lines = []
    for metric, part in table.groupby("metric", sort=False):
        noise = [f"{TITLES[r.a]} / {TITLES[r.b]}" for r in part.itertuples() if r.verdict == "within noise"]
        unsaid = int((part["verdict"] == "cannot be said").sum())
        lines += [
            f"### {metric}",
            "",
            f"{len(noise)} of {len(part)} pairs are within noise"
            + (f", {unsaid} cannot be said" if unsaid else "")
            + ".",
        ]
        lines += [f"Within noise: {'; '.join(noise)}."] if noise else []
        lines += [f"- apart: {TITLES[row['a']]} {row['value a']}, {TITLES[row['b']]} {row['value b']} ({row['rests on']})"
                  for row in part[part["verdict"] == "apart"].to_dict("records")] + [""]  # fmt: skip
    return lines


def downstream_lines(results: pd.DataFrame) -> list[str]:
    """Every classifier against the one trained on real images only (strategy 1a), by paired differences."""
    here = results[(results["stage"] == "difference") & (results["metric"] == "macro AUROC minus 1a")]
    lines = ["## Downstream: macro AUROC against real images only (1a)", ""] if len(here) else []
    for row in here.to_dict("records"):
        verdict = (
            "cannot be said"
            if pd.isna(row["lo"])
            else "within noise"
            if row["lo"] <= 0 <= row["hi"]
            else "above"
            if row["value"] > 0
            else "below"
        )
        lines.append(f"- {row['setting']} {TITLES.get(row['method'], row['method'])}: **{verdict}** - {said(row)}")
    return lines


def report(results: pd.DataFrame, schema: Schema, title: str, kind: str, seeds: Sequence[int]) -> str:
    """The page figures/<dataset>/report.md. `results`: from `tables.over_seeds`; kind: "phantoms" or "real images"."""
    many = (
        f"{len(seeds)} training seeds"
        if len(seeds) > 1
        else "n = 1 training seed: nothing here says how much another seed would differ"
    )
    lines = [
        f"# {title}: what the numbers say",
        "",
        f"Made from the tables, not typed. {kind.capitalize()}; {many}.",
        "",
    ]
    lines += ["## Gates", "", *gate_lines(findings(results, schema)), "## Differences between methods", ""]
    lines += [
        "Within noise = the paired difference's interval holds 0 or, where none was computed, the two 95 % intervals touch.",
        "",
    ]
    lines += [*difference_lines(differences(results, schema)), *downstream_lines(results)]
    return "\n".join(lines).rstrip() + "\n"
