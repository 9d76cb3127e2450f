"""What the linear probes (probes.py) say, in sentences made from numbers: which methods follow the request?"""

from __future__ import annotations

import pandas as pd

from compdiff import frames
from compdiff.frames import TITLES, Item
from compdiff.rendering import markdown_table, said

STAGE = "probe"
# In the note of real_test; the interval itself is no longer that of the patients when several seeds are combined.
BLIND = "its own interval reaches 0.5"
WORDS = ("follows the request", "within noise", "runs against it", "cannot be said")


def name_of(item: Item) -> str:
    return f"{item.metric.partition(':')[2]} {f'within {item.kind} {item.group}' if item.group else 'overall'}"


def word(ours: dict | None, real: dict | None, shuffled: dict | None) -> str:
    """One of WORDS; follows = the whole interval lies above 0.5 and above the value with shuffled attributes.

    Cannot be said: a number is missing, or the probe itself does not tell real test images apart.
    """
    sees = frames.known(real) and frames.has_interval(real) and real["lo"] > 0.5 and BLIND not in real["note"]
    if not (sees and frames.known(ours, shuffled) and frames.has_interval(ours)):
        return "cannot be said"
    if ours["lo"] > max(0.5, shuffled["value"]):
        return "follows the request"
    return "runs against it" if ours["hi"] < 0.5 else "within noise"


def verdict_lines(results: pd.DataFrame, item: Item) -> list[str]:
    """One sentence per verdict on one stratum."""
    real, shuffled = (item.of(results, m) for m in ("real_test", "shuffled"))
    told: dict[str, list[str]] = {w: [] for w in WORDS}
    for method in frames.trained(results, (STAGE,)):
        ours = item.of(results, method)
        told[word(ours, real, shuffled)].append(f"{TITLES[method]} {said(ours)}")
    against = f"real test images {said(real)}, shuffled attributes {said(shuffled)}"
    return [f"- {name_of(item)}: **{w}** for {'; '.join(texts)} ({against})." for w, texts in told.items() if texts]


def probe_lines(results: pd.DataFrame) -> list[str]:
    """The section; [] where the results hold no row of this stage. results: of `frames.over_seeds`."""
    here = results[results["stage"] == STAGE]
    keys = here[["metric", "group_kind", "group"]].drop_duplicates().itertuples(index=False, name=None)
    items = [Item(STAGE, *key) for key in keys]
    if not items:
        return []
    lines = ["## Read by a linear probe", "", "AUROC (higher is better) of the requested category, by a logistic "
             "regression on the extractor's features of real training images, overall or within one category of "
             "another attribute, so that it cannot take the one for the other.", ""]  # fmt: skip
    able = [i for i in items if i.rows(here)["value"].notna().any()]
    heads = {i: name_of(i) + size(i.of(here, "real_test")) for i in able}
    rows = {frames.title(m, STAGE): {head: said(i.of(here, m)) for i, head in heads.items()}
            for m in frames.methods_in(here, (STAGE,))}  # fmt: skip
    lines += [markdown_table(pd.DataFrame(rows).T, "method or control"), ""] if able else []
    lines += [line for item in able for line in verdict_lines(here, item)]
    lines += [f"- {name_of(i)}: {i.rows(here)['note'].iloc[0]}." for i in items if i not in able]
    if able:
        lines += ["", "Follows the request = the whole interval lies above 0.5 and above the value with shuffled "
                  "attributes; runs against it = it lies below 0.5; cannot be said = the probe's own interval on real "
                  "test images reaches 0.5, or a number is missing."]  # fmt: skip
    return [*lines, ""]


def size(row: dict | None) -> str:
    """ " (90 images of 43 patients)", from the note of an eligible row."""
    return f" ({row['note'].split(';')[0]})" if frames.known(row) else ""
