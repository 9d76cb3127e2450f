"""The datasheet of prepared real data: what it is, who is in it, what was left out. Counts only, no identifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from compdiff.manifests import Manifest


def text(manifest: Manifest, index: dict, table: pd.DataFrame) -> str:
    """Markdown: source and terms, images and patients, ages, label prevalence, images per cell, reasons of rejects.

    index: as in index.json. table: as in samples.csv.
    """
    splits = list(index["images"])
    groups = {split: table[table["split"] == split] for split in splits}
    reasons = pd.Series([entry["reason"] for entry in index["excluded"]], dtype=str).value_counts()
    ages = {split: group["age_years"].quantile([0, 0.25, 0.5, 0.75, 1]) for split, group in groups.items()}
    facts = [("source", manifest.source), ("licence", manifest.licence), ("access", manifest.access),
             ("citation", manifest.citation), ("image size", f"{index['size']} x {index['size']}, 8-bit grey"),
             ("held out of training", "; ".join(index["held_out"]) or "nothing")]  # fmt: skip
    lines = [f"# {manifest.title}: datasheet of the prepared data", "", *markdown(("", ""), facts)]
    lines += ["## Images and patients", ""]
    lines += markdown(("split", "images", "patients"), [(s, index["images"][s], index["patients"][s]) for s in splits])
    lines += ["## Age in years", ""]
    lines += markdown(("split", "least", "quartile", "median", "quartile", "most"),
                    [(s, *(f"{v:g}" for v in ages[s])) for s in splits])  # fmt: skip
    lines += ["## Findings: images, and share of the split", ""]
    lines += markdown(("finding", *splits), list(_prevalence(manifest, groups)))
    lines += ["## Images per cell", ""]
    cells = [(name, *(index["cells"][s][name] for s in splits)) for name in next(iter(index["cells"].values()))]
    lines += markdown((", ".join(manifest.schema.names), *splits), cells)
    lines += [f"## Left out: {len(index['excluded'])} images (rejects.csv)", ""]
    lines += markdown(("reason", "images"), list(reasons.items()))
    return "\n".join(lines)


def _prevalence(manifest: Manifest, groups: dict[str, pd.DataFrame]) -> Iterable[tuple]:
    """One row per value of every label; of a yes/no label only the yes."""
    for label, phrases in manifest.labels.items():
        for value in range(len(phrases)) if len(phrases) > 2 else (1,):
            name = f"{label}: {phrases[value]}" if len(phrases) > 2 else label
            found = [(group[f"y_{label}"] == value).sum() for group in groups.values()]
            shares = zip(found, groups.values(), strict=True)
            yield name, *(f"{n} ({n / len(group):.1%})" for n, group in shares)


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table, and an empty one."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *map(line, rows), ""]
