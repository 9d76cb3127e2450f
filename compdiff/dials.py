"""The phantoms' interaction dial: the results of runs that differ in it, and their zero-shot error. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from compdiff import record
from compdiff.frames import Item, over_seeds


def read_dials(folders: Sequence[Path], seeds: Sequence[int]) -> dict[float, pd.DataFrame]:
    """{`interaction` of a run's phantoms: its `over_seeds` of notebook 06}, over those of `seeds` that all runs share.

    folders: `<runs>/<profile>/<dataset>` of each run. Runs without the dial (real data), or with none of the seeds, are
    left out; empty when the others share none. ValueError names two runs with the same dial: which would be drawn?
    """
    found: dict[float, dict[int, Path]] = {}  # dial: results of each seed
    whose: dict[float, str] = {}
    for folder in folders:
        files = {seed: folder / f"seed{seed}" / "results" / "06_metrics.csv" for seed in seeds}
        files = {seed: file for seed, file in files.items() if file.is_file()}
        index = folder / "data" / "index.json"
        if not (files and index.is_file()):
            continue
        dial, name = json.loads(index.read_text())["settings"].get("interaction"), "/".join(folder.parts[-3:])
        if dial is None:
            continue
        if dial in found:
            remedy = "remedy: move one of them away, or give it another INTERACTION"
            raise ValueError(f"{whose[dial]} and {name} both have interaction = {dial:g}; {remedy}")
        found[dial], whose[dial] = files, name
    shared = [seed for seed in seeds if all(seed in files for files in found.values())]
    combined = lambda files: over_seeds(record.load_results([files[s] for s in shared]))  # noqa: E731
    return {dial: combined(files) for dial, files in found.items() if shared}


def zero_shot(results: pd.DataFrame, metric: str, method: str) -> dict[str, object] | None:
    """One method's number over all held-out cells together."""
    return Item("quality", metric, "held_out", "held_out").of(results, method)


def by_dial_rows(by_dial: Mapping[float, pd.DataFrame], methods: Sequence[str]) -> pd.DataFrame:
    """Zero-shot KID of every method and dial, for `plots_groups.interaction_dial`: rows of `over_seeds` and dial."""
    found = [(dial, zero_shot(frame, "KID", m)) for dial, frame in by_dial.items() for m in methods]
    return pd.DataFrame([row | {"dial": dial} for dial, row in found if row is not None])
