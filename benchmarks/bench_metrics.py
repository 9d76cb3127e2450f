"""Time the evaluation library against plain loops, in one process on one core (`make bench`).

1,000 patient-bootstraps of the AUROC of 14 labels in 30 groups beside a loop over scikit-learn's roc_auc_score, and FID
overall and in 40 groups from cached features, at 1k, 5k and 20k rows. The loop would run for minutes to hours, so it
is timed on a random share of its calls and extrapolated; the table says so. Writes benchmarks/results/metrics.csv, the
same as a page that says which goals are met, metrics.md, and metrics.svg.
    python benchmarks/bench_metrics.py
    python benchmarks/bench_metrics.py --rows 200 --resamples 20   # seconds; its numbers mean nothing
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # one core; numpy reads it when it is imported

import argparse
import operator
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from compdiff import fairness, metrics, paths, record, stats
from compdiff.datasheet import markdown

LABELS, WIDTH, CALLS = 14, 1280, 420  # calls of the plain loop that are timed
CATEGORIES = {"age": 5, "sex": 2, "race": 4}
RESULTS = paths.ROOT / "benchmarks" / "results"
AT = 5000  # rows at which the goals are set
GOALS = (  # goal, how `what` begins, column, comparison, bound
    ("1,000 patient-bootstraps of the AUROC of 14 labels in 30 groups: at most 15 s",
     "1000 patient-bootstraps of AUROC, 14 labels, 30 groups", "seconds", operator.le, 15),
    ("the same: at least 30 times as fast as the loop",
     "1000 patient-bootstraps of AUROC, 14 labels, 30 groups", "ratio", operator.ge, 30),
    ("FID overall and in 40 groups, from cached features: at most 60 s",
     "FID overall and in 40 groups", "seconds", operator.le, 60),
)  # fmt: skip


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def groups(n: int, rng: np.random.Generator, joint: tuple[str, ...]) -> dict[fairness.Key, np.ndarray]:
    """overall, the categories of age, sex and race (with unequal shares), and the intersections named in `joint`."""
    masks = {("overall", ""): np.ones(n, dtype=bool)}
    for name, k in CATEGORIES.items():
        value = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
        masks |= {(name, str(i)): value == i for i in range(k)}
    return masks | {k: m for k, m in fairness.intersections(masks, list(CATEGORIES)).items() if k[0] in joint}


def bootstrap(n: int, resamples: int, rng: np.random.Generator) -> dict:
    """Ours and the loop on the same labels, scores, groups and patients (about two images each)."""
    masks = groups(n, rng, ("age x sex", "sex x race"))
    y = (rng.random((n, LABELS)) < np.linspace(0.03, 0.4, LABELS)).astype(int)
    score, patients = (y + 1.2 * rng.normal(size=y.shape)).astype(np.float32), rng.integers(0, n // 2, n)
    found = []

    def ours() -> None:
        found.extend(stats.bootstrap("AUROC", y, score, masks, stats.resample_patients(patients, resamples, 0)))

    took = seconds(ours)
    draws = stats.resample_patients(patients, resamples, 0).counts().astype(int)
    cells = rng.permutation(resamples * len(masks) * LABELS)[:CALLS]
    keys, wrong, loop = list(masks), 0.0, 0.0  # wrong: largest difference of a value
    for cell in cells:
        r, g, label = np.unravel_index(cell, (resamples, len(masks), LABELS))
        where = np.flatnonzero(masks[keys[g]])
        rows = np.repeat(where, draws[r, where])  # outside the clock: a loop would draw rows, not counts
        if len(set(y[rows, label])) == 2:
            value = []
            loop += seconds(lambda: value.append(roc_auc_score(y[rows, label], score[rows, label])))
            wrong = max(wrong, abs(value[0] - found[1][r, g, label]))
    whole = loop * resamples * len(masks) * LABELS / CALLS
    return {"what": f"{resamples} patient-bootstraps of AUROC, {LABELS} labels, {len(masks)} groups", "rows": n,
            "seconds": took, "baseline": "loop over sklearn roc_auc_score", "baseline_seconds": whole,
            "ratio": whole / took, "largest_difference": wrong,
            "baseline_measured": f"extrapolated from {CALLS} random calls ({loop:.2f} s)"}  # fmt: skip


def distances(n: int, rng: np.random.Generator) -> dict:
    """FID of a generated and a real set, overall and in 40 groups; no baseline."""
    masks = dict(list(groups(n, rng, ("age x sex", "sex x race", "age x race")).items())[:41])
    real, fake = (rng.normal(size=(n, WIDTH)).astype(np.float32) for _ in range(2))
    took = seconds(lambda: [metrics.fid(fake[mask], real[mask]) for mask in masks.values() if mask.sum() > 1])
    return {"what": f"FID overall and in {len(masks) - 1} groups, {WIDTH} features", "rows": n, "seconds": took}


def draw(table: pd.DataFrame, file: Path) -> None:
    """Seconds against rows, both axes logarithmic."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for what, part in table.groupby("what", sort=False):
        axes.plot(part["rows"], part["seconds"], marker="o", label=what)
        if part["baseline_seconds"].notna().any():
            label = f"{part['baseline'].iloc[0]} (extrapolated)"
            axes.plot(part["rows"], part["baseline_seconds"], marker="o", ls="--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="images", ylabel="seconds on one core")
    axes.set_xticks(sorted(set(table["rows"])), [f"{n:,}" for n in sorted(set(table["rows"]))], minor=False)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    with record.atomic(file) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


# --- the page ---------------------------------------------------------------------------------------------------------
def page(table: pd.DataFrame) -> str:
    """The table as Markdown: the goals first, then every row."""
    first, told = table.iloc[0], []
    for _, r in table.iterrows():
        names = ("seconds", "baseline_seconds", "ratio", "largest_difference")
        told.append((r["what"], f"{r['rows']:,}", *("-" if pd.isna(r[n]) else number(r[n]) for n in names)))
    goals = [(goal, *judged(table, *asked)) for goal, *asked in GOALS]
    return "\n".join([
        "# Speed of the evaluation library", "",
        f"Written by `make bench` from `metrics.csv`. Processor: {first['cpu']}; one core, Python {first['python']}, "
        f"numpy {first['numpy']}, scipy {first['scipy']}, scikit-learn {first['scikit-learn']}; random labels, scores "
        "and features.", "",
        *markdown((f"goal at {AT:,} images", "measured", ""), goals),
        f"The loop calls scikit-learn's `roc_auc_score` for each resample, group and label. It is timed on {CALLS} of "
        "these calls, drawn at random, and extrapolated; the largest difference is between a value of these calls and "
        "ours. Labels are positive in 3 to 40 % of the images, a patient has about two.", "",
        *markdown(("what", "images", "seconds", "the loop, seconds", "ratio", "largest difference"), told),
        "![seconds against images](metrics.svg)", "",
    ])  # fmt: skip


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def judged(table: pd.DataFrame, what: str, column: str, meets: Callable, bound: float) -> tuple[str, str]:
    """(the measured number, "met" or "not met") of one goal."""
    found = table.loc[(table["rows"] == AT) & table["what"].str.startswith(what), column]
    if found.empty:
        return "not measured", "-"
    unit = " s" if column == "seconds" else " times"
    return number(found.iloc[0]) + unit, "met" if meets(found.iloc[0], bound) else "not met"


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, AT, 20000])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, rows = parser.parse_args(words), []
    for n in args.rows:
        rows += [bootstrap(n, args.resamples, np.random.default_rng(n)), distances(n, np.random.default_rng(n))]
        for row in rows[-2:]:
            print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    table = pd.DataFrame(rows).assign(cpu=record.machine()["cpu"], cores=1, **record.versions())
    with record.atomic(args.out / "metrics.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")
    draw(table, args.out / "metrics.svg")
    record.write_text(args.out / "metrics.md", page(pd.read_csv(args.out / "metrics.csv")))


if __name__ == "__main__":
    main(sys.argv[1:])
