"""Gates: statements declared before a run, and whether they hold, in sentences made from the tables' numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pandas as pd

from compdiff import frames
from compdiff.attributes import Schema
from compdiff.frames import NOT_AVAILABLE, TITLES, Item, known, trained
from compdiff.rendering import markdown_table, said

SHARE_OF_JUDGE = 0.9  # of the judge's own real-test score that a trained method must reach


@dataclass(frozen=True)
class Finding:
    """A gate's verdict on a method, with its numbers. holds: None = cannot be said, for want of a number."""

    gate: str
    method: str
    holds: bool | None
    ours: str
    against: str
    about: str = ""  # an attribute, "" for the gates of a whole method
    remark: str = ""


def accuracy_gates(results: pd.DataFrame, schema: Schema) -> list[Finding]:
    """Accuracy >= 90 % of the judge's own real-test score, and the whole interval above the shuffled-attributes row.

    A judge whose own interval is not above the shuffled row's sees nothing: then the first cannot be said.
    """
    out = []
    for method, name in product(trained(results), schema.names):
        item = Item("alignment", f"accuracy:{name}")
        ours, judge, shuffled = (item.of(results, m) for m in (method, "real_test", "shuffled"))
        whole = known(ours, judge, shuffled) and pd.notna(judge["lo"])
        blind = whole and not frames.reads(judge, shuffled)
        share = f" ({100 * ours['value'] / judge['value']:.0f} %)" if whole and judge["value"] > 0 else ""
        remark = ", no better than with shuffled attributes" if blind else ""
        holds = bool(ours["value"] >= SHARE_OF_JUDGE * judge["value"]) if whole and not blind else None
        against = f"judge on real test images {said(judge)}"
        out.append(Finding("accuracy", method, holds, said(ours) + share, against, name, remark))
        both = known(ours, shuffled) and pd.notna(ours["lo"])
        holds = bool(ours["lo"] > shuffled["value"]) if both else None
        out.append(Finding("above shuffled", method, holds, said(ours), f"shuffled attributes {said(shuffled)}", name))
    return out


def kid_gates(results: pd.DataFrame) -> list[Finding]:
    """KID below the untrained row."""
    out, item = [], Item("quality", "KID")
    untrained = item.of(results, "untrained")
    for method in trained(results):
        ours = item.of(results, method)
        holds = bool(ours["value"] < untrained["value"]) if known(ours, untrained) else None
        out.append(Finding("KID below untrained", method, holds, said(ours), f"untrained {said(untrained)}"))
    return out


def ranking_gates(results: pd.DataFrame) -> list[Finding]:
    """FID and KID can rank a method only between clear ends (`frames.ranks`)."""
    out = []
    for method, metric in product(trained(results), ("FID", "KID")):
        ours, vae, untrained = (Item("quality", metric).of(results, m) for m in (method, "vae", "untrained"))
        if not len(Item("quality", metric).rows(results)):
            continue
        holds = frames.ranks(results, metric, method)
        against = f"autoencoder only {said(vae)}, untrained {said(untrained)}"
        out.append(Finding("distances can rank", method, holds, said(ours), against, metric))
    return out


def ranking_lines(found: Sequence[Finding]) -> list[str]:
    """Where the gate "distances can rank" does not hold: say what cannot be ranked, and what to read instead."""
    lines = []
    for metric in dict.fromkeys(f.about for f in found):
        unclear = [TITLES[f.method] for f in found if f.about == metric and f.holds is not True]
        if unclear:
            lines.append(f"**{metric} cannot rank here** {', '.join(unclear)}: the autoencoder's own {metric} is not "
                         "clearly below, or the untrained model's not clearly above. Attribute accuracy is what to "
                         "read.")  # fmt: skip
    return [x for line in lines for x in (line, "")]


def copy_gates(results: pd.DataFrame) -> list[Finding]:
    """The memorising row is told apart from a trained method when the intervals of no memorisation metric touch."""
    here, out = results[(results["stage"] == "memorisation") & (results["group_kind"] == "overall")], []
    for method in trained(results, ("memorisation",)):
        apart, texts, others = [], [], []
        for metric, setting in here[["metric", "setting"]].drop_duplicates().itertuples(index=False):
            item = Item("memorisation", metric, setting=setting)
            ours, copy = item.of(here, method), item.of(here, "copy")
            if known(ours, copy) and frames.has_interval(ours) and frames.has_interval(copy):
                apart.append(frames.apart(ours, copy))
                texts.append(f"{metric} {said(ours)}")
                others.append(f"{metric} {said(copy)}")
        holds, against = all(apart) if apart else None, f"copy: {', '.join(others) or NOT_AVAILABLE}"
        out.append(Finding("told apart from a copy", method, holds, ", ".join(texts) or NOT_AVAILABLE, against))
    return out


HEADINGS = {
    "accuracy": f"attribute accuracy (higher is better) is at least {100 * SHARE_OF_JUDGE:.0f} % of the judge's own on "
    "real test images (point value)",
    "above shuffled": "the accuracy's interval lies above the row with shuffled attributes",
    "KID below untrained": "KID (lower is better) is below that of the untrained model (point value)",
    "distances can rank": "the autoencoder's interval lies clearly below the method's, that of the untrained model "
    "clearly above",
    "told apart from a copy": "the copy of the training set is told apart by all memorisation metrics with intervals",
}
WORDS = {True: "holds", False: "DOES NOT HOLD", None: "cannot be said"}


def findings(results: pd.DataFrame, schema: Schema) -> list[Finding]:
    return [*accuracy_gates(results, schema), *kid_gates(results), *ranking_gates(results), *copy_gates(results)]


def gate_table(found: Sequence[Finding]) -> pd.DataFrame:
    """Methods x gates in words: "holds", or for several attributes "holds: age, sex; DOES NOT HOLD: race"."""
    cells: dict[str, dict[str, str]] = {}
    for method, gate in dict.fromkeys((f.method, f.gate) for f in found):
        mine = [f for f in found if (f.method, f.gate) == (method, gate)]
        by_word = {word: [f.about for f in mine if f.holds is v] for v, word in WORDS.items()}
        parts = [f"{w}: {', '.join(names)}" if len(mine) > 1 else w for w, names in by_word.items() if names]
        cells.setdefault(TITLES[method], {})[gate] = "; ".join(parts)
    return pd.DataFrame(cells).T.reindex(columns=[g for g in HEADINGS if any(f.gate == g for f in found)]).fillna("-")


def gate_lines(found: Sequence[Finding]) -> list[str]:
    """The table, what its columns mean, and the numbers of every gate that does not hold or cannot be said."""
    if not found:
        return [f"{NOT_AVAILABLE}.", ""]
    lines = [markdown_table(gate_table(found), "method"), ""]
    for gate, heading in HEADINGS.items():
        mine = [f for f in found if f.gate == gate]
        counts = [(word, sum(f.holds is v for f in mine)) for v, word in WORDS.items()]
        lines.append(f"- *{gate}*: {heading}: " + "; ".join(f"{w} in {n} of {len(mine)}" for w, n in counts if n) + ".")
        alike: dict[tuple, list[str]] = {}  # methods that fall alike stand in one line
        for f in (f for f in mine if f.holds is not True):
            key = (f"{f.about}, " if f.about else "") + f.against + f.remark, WORDS[f.holds]
            alike.setdefault(key, []).append(f"{TITLES[f.method]} {f.ours}")
        lines += [f"  - {against}: **{word}** for {'; '.join(texts)}" for (against, word), texts in alike.items()]
    return [*lines, ""]
