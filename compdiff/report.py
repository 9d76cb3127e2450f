"""What the tables say, in sentences made from their numbers: which gates hold, what differs, what is within noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import pandas as pd

from compdiff import config, frames, probe_report, published, unseen
from compdiff.attributes import Schema
from compdiff.frames import NOT_AVAILABLE, TITLES, Item, known, trained
from compdiff.rendering import markdown_table, number, said
from compdiff.tables import downstream_title

ALPHA = 0.05  # of a p-value that Holm adjusted
SHARE_OF_JUDGE = 0.9  # of the judge's own real-test score that a trained method must reach
WITH_NUMBERS = (("quality", "FID"), ("quality", "KID"), ("alignment", "accuracy"))  # told pair by pair


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


# --- gates ------------------------------------------------------------------------------------------------------------
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
    """FID and KID can rank a method only between clear ends: autoencoder clearly below it, untrained clearly above."""
    out = []
    for method, metric in product(trained(results), ("FID", "KID")):
        ours, vae, untrained = (Item("quality", metric).of(results, m) for m in (method, "vae", "untrained"))
        if not len(Item("quality", metric).rows(results)):
            continue
        can = known(ours, vae, untrained)
        holds = can and ours["value"] > vae["value"] and untrained["value"] > ours["value"]
        holds = bool(holds and frames.apart(ours, vae) and frames.apart(ours, untrained)) if can else None
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


# --- differences ------------------------------------------------------------------------------------------------------
def p_row(results: pd.DataFrame, metric: str, methods: Sequence[str], setting: str) -> pd.Series | None:
    """The p-value's row of one difference ("KID minus flat"), None where none was computed."""
    here = results[(results["stage"] == "difference") & results["method"].isin(methods) & results["value"].notna()
                   & (results["setting"] == setting) & (results["group"] == "")]  # fmt: skip
    here = here[frames.is_p_value(here["metric"]) & here["metric"].str.endswith(f") {metric}")]
    return None if here.empty else here.iloc[0]


def p_value(results: pd.DataFrame, metric: str, methods: Sequence[str], setting: str = "test") -> str:
    """", p = 0.012 (bootstrap, Holm)" of one difference, "" where none was computed."""
    row = p_row(results, metric, methods, setting)
    if row is None:
        return ""
    text = "< 0.001" if row["value"] < 0.001 else f"= {number(row['value'])}"
    return f", p {text} {row['metric'].removeprefix('p ').removesuffix(metric).strip()}"


def differences(results: pd.DataFrame, schema: Schema) -> pd.DataFrame:
    """Every pair of methods and compared metric: a, b, metric, values, verdict (`frames.verdict`), what it rests on."""
    rows = []
    compared = [*WITH_NUMBERS, *(("alignment", f"accuracy:{name}") for name in schema.names)]
    for (stage, metric), (a, b) in product(compared, combinations(trained(results), 2)):
        item = Item(stage, metric)
        if not len(item.rows(results)):
            continue
        found = frames.verdict(results, item, a, b)
        rests = f"difference {said(found.paired)}" if found.rests_on == "difference" else found.rests_on
        p = p_value(results, f"{metric} minus {b}", (a,)) or p_value(results, f"{metric} minus {a}", (b,))
        rows.append({"a": a, "b": b, "metric": item.label(results), "value a": said(item.of(results, a)),
                     "value b": said(item.of(results, b)), "verdict": found.word, "rests on": rests + p})  # fmt: skip
    return pd.DataFrame(rows, columns=["a", "b", "metric", "value a", "value b", "verdict", "rests on"])


def difference_lines(table: pd.DataFrame) -> list[str]:
    """Per metric: how many pairs differ; pairs of WITH_NUMBERS one by one, of single attributes by name."""
    lines = []
    for metric, part in table.groupby("metric", sort=False):
        names = [f"{TITLES[r.a]} / {TITLES[r.b]}" for r in part.itertuples() if r.verdict == "within noise"]
        differ = part[part["verdict"].isin(["above", "below"])].to_dict("records")
        unsaid = int((part["verdict"] == "cannot be said").sum())
        head = f"**{metric}**{frames.beside(metric)}: {len(differ)} of {len(part)} pairs differ, "
        head += f"{len(names)} are within noise"
        lines.append(f"- {head}{f', {unsaid} cannot be said' if unsaid else ''}.")
        told = [(r, frames.worth(r["verdict"], metric)) for r in differ]
        if metric.startswith(tuple(m for _, m in WITH_NUMBERS)):
            lines += [f"  - {TITLES[r['a']]} is **{word}** {TITLES[r['b']]}: {r['value a']} against "
                      f"{r['value b']} ({r['rests on']})" for r, word in told]  # fmt: skip
            lines += [f"  - within noise: {'; '.join(names)}"] if names else []
        elif differ:
            lines[-1] += " " + "; ".join(f"{TITLES[r['a']]} {word} {TITLES[r['b']]}" for r, word in told) + "."
    return [*lines, ""]


def word_against_real(results: pd.DataFrame, row: dict) -> tuple[str, str]:
    """(above | below | within noise | cannot be said, by what): by the adjusted p-value, else by the interval."""
    p = p_row(results, row["metric"], [row["method"]], row["setting"])
    if p is None:
        return frames.word_of(row), "interval"
    return "within noise" if p["value"] >= ALPHA else "above" if row["value"] > 0 else "below", "p"


def downstream_lines(results: pd.DataFrame) -> list[str]:
    """Every classifier against the one trained on real images only (strategy 1a), by paired differences."""
    here = results[(results["stage"] == "difference") & results["metric"].str.endswith(" minus 1a")]
    here = here[(here["group"] == "") & ~frames.is_p_value(here["metric"])]
    rule = f"By the p-value adjusted by Holm ({ALPHA:g}) where there is one (by p), else by the interval (holds it 0?)."
    if (here["setting"] == "1a-again").any():
        rule += " 1a-again is 1a with another seed: no gain is one that is not larger than its difference."
    rule += (" All strategies take equally many optimiser steps. The generators' base learnt from further phantoms "
             "(real data: from further images), so a gain of 1b is not a gain at equal data.")  # fmt: skip
    lines = ["## Downstream: against real images only (1a)", "", rule, ""] if len(here) else []
    for (metric, kind), part in here.groupby(["metric", "group_kind"], sort=False):
        told: dict[str, list[str]] = {"above": [], "below": [], "within noise": [], "cannot be said": []}
        bases = []
        for row in part.to_dict("records"):
            text = f"{row['setting']} {downstream_title(row['method'])} {said(row)}"
            word, basis = word_against_real(results, row)
            bases.append(basis)
            told[word].append(text + p_value(results, metric, [row["method"]], row["setting"]))
        name = metric.removesuffix(" minus 1a") + ("" if kind == "overall" else f" by {kind}")
        counts = "; ".join(f"{len(texts)} {frames.worth(word, name)}" for word, texts in told.items() if texts)
        by = " or ".join(dict.fromkeys(bases))
        lines.append(f"- **{name}**{frames.beside(name)} of {len(part)} classifiers, by {by}: {counts}.")
        told = told if ":" not in metric else {}  # of single findings only how many
        lines += [f"  - {frames.worth(word, name)}: {'; '.join(texts)}" for word, texts in told.items() if texts]
    return [*lines, ""] if lines else []


def published_lines(pairs: pd.DataFrame) -> list[str]:
    """Does our order of the methods agree with the printed one, under both readings of the sex names?"""
    lines = ["## Direction of the published comparisons", ""]
    if pairs.empty:
        return [*lines, f"{NOT_AVAILABLE}: no published number for this kind of image.", ""]
    lines += [f"Signs of the differences between {', '.join(TITLES[m] for m in published.METHOD.values())}. No claim: "
              "without interval, or too few images.", ""]  # fmt: skip
    for reading in pairs["reading"].unique():
        lines.append(f"- {reading}:")
        for name, row in published.tally(pairs, reading).iterrows():
            said_so = "; ".join(f"{n} {verdict}" for verdict, n in row.items() if n)
            lines.append(f"  - {name}{frames.beside(name)}: of {row.sum()} pairs {said_so}.")
    return [*lines, ""]


# --- the page ---------------------------------------------------------------------------------------------------------
def head(results: pd.DataFrame, title: str, kind: str, seeds: Sequence[int]) -> list[str]:
    """Title, and on what every sentence rests: images, features, seeds, intervals, and where its provenance stands."""
    many = (
        f"n = {len(seeds)} training seeds: numbers are means, intervals are 95 % t-intervals of the seeds' values, not "
        "clipped (few seeds make them wide, and they may pass a metric's range: an accuracy above 1)"
        if len(seeds) > 1
        else "n = 1 training seed: intervals are over resampled patients, and nothing here says how much another seed "
        "would differ"
    )
    images = Item("quality", "FID").rows(results)
    images = images[images["method"].isin(config.METHODS)]
    size = f"n = {images['n'].min():.0f} images a method; " if len(images) else ""
    features = ", ".join(e for e in images["extractor"].unique() if e) or NOT_AVAILABLE
    basis = f"Made from the tables, not typed. {kind.capitalize()}; {size}features: {features}; {many}."
    made = "Commit, settings, seeds, versions, hashes, minutes and machine, of the runs before, too: [run.json](run.json)."
    return [f"# {title}: what the numbers say", "", basis, "", made, ""]


def report(
    results: pd.DataFrame, schema: Schema, title: str, kind: str, seeds: Sequence[int], modality: str = "",
    sigma: pd.DataFrame | None = None, held_out: Sequence[str] = (),
) -> str:  # fmt: skip
    """The page figures/<dataset>/report.md. `results`: of `frames.over_seeds`; kind: "phantoms" or "real images".

    sigma: HCN's uncertainty.csv of the first seed (name, sigma, train_n); held_out: names of cells.
    """
    lines = [*head(results, title, kind, seeds), "## Gates", "", *gate_lines(findings(results, schema))]
    lines += [*unseen.composition_lines(results), *unseen.uncertainty_lines(sigma, held_out, seeds[0])]
    lines += probe_report.probe_lines(results)
    lines += ["## Differences between methods", "", *ranking_lines(ranking_gates(results))]
    lines += ["Within noise = the interval of the difference holds 0 or, where none was computed, the two intervals "
              "touch. Verdicts are not corrected for the number of pairs; p-values that are say so.", ""]  # fmt: skip
    lines += [*difference_lines(differences(results, schema)), *downstream_lines(results)]
    lines += published_lines(published.directions(results, schema, modality)) if modality else []
    return "\n".join(lines).rstrip() + "\n"
