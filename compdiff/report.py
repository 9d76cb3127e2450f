"""What the tables say, in sentences made from their numbers: what differs, what is within noise; the whole page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import pandas as pd

from compdiff import config, frames, gates, probe_report, published, unseen
from compdiff.attributes import Schema
from compdiff.frames import NOT_AVAILABLE, TITLES, Item, trained
from compdiff.rendering import number, said
from compdiff.tables import downstream_title

ALPHA = 0.05  # of a p-value that Holm adjusted
CHANCE = "1a-again"  # the strategy that differs from 1a by its seeds alone
NO_LARGER = "no larger than a second training of 1a"
WITH_NUMBERS = (("quality", "FID"), ("quality", "KID"), ("alignment", "accuracy"))  # told pair by pair


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
    p = row["value"]  # three digits where it matters on which side of ALPHA it lies
    text = "< 0.001" if p < 0.001 else f"= {p:.3g}" if p < 0.1 else f"= {number(p)}"
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
    """(above | below | within noise | cannot be said, by what): by the adjusted p-value, else by the interval.

    Of several seeds by both: p knows of other test patients, the seeds' interval of other trainings.
    """
    p = p_row(results, row["metric"], [row["method"]], row["setting"])
    word = frames.word_of(row)
    if p is None:
        return word, "interval"
    by = "p and interval" if row.get("seeds", 1) > 1 else "p"  # rows of one seed need not say so (notebook 07)
    if by != "p" and word == "within noise":
        return word, by
    return "within noise" if p["value"] >= ALPHA else "above" if row["value"] > 0 else "below", by


def downstream_lines(results: pd.DataFrame) -> list[str]:
    """Every classifier against the one trained on real images only (strategy 1a), by paired differences."""
    here = results[(results["stage"] == "difference") & results["metric"].str.endswith(" minus 1a")]
    here = here[(here["group"] == "") & ~frames.is_p_value(here["metric"])]
    if here.empty:
        return []
    rule = (f"By the p-value adjusted by Holm ({ALPHA:g}) where there is one (by p), else by the interval (holds it "
            "0?); of several seeds by both.")  # fmt: skip
    if (here["setting"] == CHANCE).any():
        rule += (f" {CHANCE} is 1a once more with other seeds, so its difference is what chance alone makes: it is "
                 "counted nowhere, and differences that are no larger say so. A larger one has beaten one draw of "
                 "chance, not all; a small p of its own says that p knows of other test patients, not of other "
                 "trainings.")  # fmt: skip
    rule += (" All strategies take equally many optimiser steps. The generators' base learnt from further phantoms "
             "(real data: from further images), so a gain of 1b is not a gain at equal data.")  # fmt: skip
    lines = ["## Downstream: against real images only (1a)", "", rule, ""]
    for (metric, kind), part in here.groupby(["metric", "group_kind"], sort=False):
        lines += against_real_lines(results, metric, kind, part)
    return [*lines, ""]


def against_real_lines(results: pd.DataFrame, metric: str, kind: str, part: pd.DataFrame) -> list[str]:
    """One metric of `downstream_lines`: how many classifiers are better or worse, each by name, and chance's own line.

    part: the differences' rows; of single findings (metric "AUROC:<finding> minus 1a") the counts alone.
    """
    chance = part[part["setting"] == CHANCE]
    limit = chance["value"].abs().max() if len(chance) else float("nan")
    told: dict[str, list[str]] = {w: [] for w in ("above", "below", NO_LARGER, "within noise", "cannot be said")}
    bases = []
    numbers = lambda row: said(row) + p_value(results, metric, [row["method"]], row["setting"])  # noqa: E731
    for row in part[part["setting"] != CHANCE].to_dict("records"):
        word, basis = word_against_real(results, row)
        bases.append(basis)
        word = NO_LARGER if word in ("above", "below") and abs(row["value"]) <= limit else word
        told[word].append(f"{row['setting']} {downstream_title(row['method'])} {numbers(row)}")
    name = metric.removesuffix(" minus 1a") + ("" if kind == "overall" else f" by {kind}")
    counts = "; ".join(f"{len(texts)} {frames.worth(word, name)}" for word, texts in told.items() if texts)
    by = " or ".join(dict.fromkeys(bases))
    lines = [f"- **{name}**{frames.beside(name)} of {len(bases)} classifiers, by {by}: {counts}."] if bases else []
    if ":" not in metric:
        lines += [f"  - {frames.worth(word, name)}: {'; '.join(texts)}" for word, texts in told.items() if texts]
    return lines + [f"  - {CHANCE}, {name}: {numbers(row)}" for row in chance.to_dict("records")]


def published_lines(pairs: pd.DataFrame) -> list[str]:
    """Does our order of the methods agree with the printed one, under both readings of the sex names?"""
    lines = ["## Direction of the published comparisons", ""]
    if pairs.empty:
        return [*lines, f"{NOT_AVAILABLE}: no published number for this kind of image.", ""]
    lines += [f"Signs of the differences between {', '.join(TITLES[m] for m in published.METHOD.values())}. No claim: "
              "without interval, too few images, or a distance that cannot rank here.", ""]  # fmt: skip
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
        f"n = {len(seeds)} training seeds: numbers are means, 95 % intervals count other trainings (t-interval of the "
        "seeds' values) and, where one seed's number has an interval, other test patients, and are not clipped (few "
        "seeds make them wide, and they may pass a metric's range: an accuracy above 1), p-values are twice the mean of "
        "the seeds' (valid however these depend on each other), at most 1"
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
    lines = [*head(results, title, kind, seeds), "## Gates", "", *gates.gate_lines(gates.findings(results, schema))]
    lines += [*unseen.composition_lines(results), *unseen.uncertainty_lines(sigma, held_out, seeds[0])]
    lines += probe_report.probe_lines(results)
    lines += ["## Differences between methods", "", *gates.ranking_lines(gates.ranking_gates(results))]
    lines += ["Within noise = the interval of the difference holds 0 or, where none was computed, the two intervals "
              "touch. Verdicts are not corrected for the number of pairs; p-values that are say so.", ""]  # fmt: skip
    lines += [*difference_lines(differences(results, schema)), *downstream_lines(results)]
    lines += published_lines(published.directions(results, schema, modality)) if modality else []
    return "\n".join(lines).rstrip() + "\n"
