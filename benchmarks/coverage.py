"""How often do 95 % intervals of the AUROC hold the truth? Simulated sets with a known AUROC.

Binormal model: positives N(delta, 1), negatives N(0, 1), AUROC = Phi(delta / sqrt 2). A set has 300 images; where a
patient has several, a share RHO of the score's variance is the patient's own. Their label is the patient's, or each
image's own. Writes benchmarks/results/coverage.csv: per interval the share of sets covered, its standard error, the
mean width, and the shares of sets whose interval lies below and above the truth. About a minute for each scenario on
one core; `--scenarios` runs a part and keeps the other rows of that file.
    python benchmarks/coverage.py
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from compdiff import paths, record, significance, stats

N, RHO, LEVEL = 300, 0.5, 0.95


@dataclass(frozen=True)
class Scenario:
    """prevalence: share of positives; images: per patient; shared: the label is the patient's."""

    name: str
    auroc: float
    prevalence: float
    images: int = 1
    shared: bool = True


SCENARIOS = (
    Scenario("reference", 0.80, 0.5),
    Scenario("rare finding", 0.80, 0.1),
    Scenario("weak classifier", 0.65, 0.3),
    Scenario("strong classifier", 0.95, 0.3),
    Scenario("strong, rare", 0.95, 0.1),
    Scenario("3 images, one label", 0.80, 0.3, images=3),
    Scenario("3 images, own labels", 0.80, 0.3, images=3, shared=False),
)


def simulate(s: Scenario, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and patients of one set, [N] each; drawn again in the rare case of fewer than two of a class."""
    patients = np.arange(N) // s.images
    while True:
        y = (rng.random(N) < s.prevalence).astype(int)
        y = y[patients * s.images] if s.shared else y
        if min(len(np.unique(patients[y == label])) for label in (0, 1)) > 1:
            break
    own, common = rng.normal(size=N), rng.normal(size=N)[patients]
    rho = RHO if s.images > 1 else 0.0
    noise = np.sqrt(rho) * common + np.sqrt(1 - rho) * own
    return y, np.sqrt(2) * scipy_stats.norm.ppf(s.auroc) * y + noise, patients


def intervals(y: np.ndarray, score: np.ndarray, patients: np.ndarray, resamples: int,
              seed: int) -> dict[str, stats.Interval]:  # fmt: skip
    """All candidates on one set."""
    value, by_image = stats.auroc(y, score)[0], np.arange(len(y))
    drawn = {"patient": stats.resample_patients(patients, resamples, seed).counts()}
    if (patients != by_image).any():
        drawn["image"] = stats.resample_patients(by_image, resamples, seed).counts()
    out = {}
    for unit, counts in drawn.items():
        resampled = stats.auroc(y, score, counts)
        out[f"bootstrap by {unit}, percentile"] = stats.percentile_interval(value, resampled, LEVEL)
        out[f"bootstrap by {unit}, logit"] = stats.logit_interval(value, resampled, LEVEL)
    for scale in ("linear", "logit"):
        out[f"DeLong by patient, {scale}"] = significance.delong_interval(y, score, patients, LEVEL, scale)
    if "image" in drawn:
        out["DeLong by image, logit"] = significance.delong_interval(y, score, None, LEVEL, "logit")
    return out


def study(s: Scenario, sets: int, resamples: int, seed: int) -> list[dict]:
    """One row per interval: the share of `sets` whose interval holds the truth (one without bounds holds nothing)."""
    rng, found = np.random.default_rng([seed, SCENARIOS.index(s)]), []
    for _ in range(sets):
        y, score, patients = simulate(s, rng)
        found.append(intervals(y, score, patients, resamples, int(rng.integers(2**31))))
    design = {"scenario": s.name, "auroc": s.auroc, "prevalence": s.prevalence, "n": N, "images_per_patient": s.images,
              "rho": RHO if s.images > 1 else 0.0, "label_of": "patient" if s.shared else "image"}  # fmt: skip
    recipe = {"sets": sets, "resamples": resamples, "seed": seed}
    rows = []
    for name in found[0]:
        lo, hi = np.array([(f[name].lo, f[name].hi) for f in found]).T
        covered = float(((lo <= s.auroc) & (s.auroc <= hi)).mean())
        result = {"covered": covered, "error": np.sqrt(covered * (1 - covered) / sets),
                  "width": np.nanmean(hi - lo), "below": (hi < s.auroc).mean(), "above": (lo > s.auroc).mean(),
                  "unbounded": int(np.isnan(lo).sum())}  # fmt: skip
        rows.append({**design, "interval": name, **result, **recipe})
    return rows


def main() -> None:
    names = [s.name for s in SCENARIOS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    file = paths.ROOT / "benchmarks" / "results" / "coverage.csv"
    table = pd.read_csv(file) if file.is_file() else pd.DataFrame()
    for s in SCENARIOS:
        if s.name in args.scenarios:
            began = time.perf_counter()
            new = pd.DataFrame(study(s, args.sets, args.resamples, args.seed))
            print(new[["scenario", "interval", "covered", "error", "width"]].to_string(index=False, header=False),
                  f"  ({time.perf_counter() - began:.0f} s)", flush=True)  # fmt: skip
            table = pd.concat([table[table["scenario"] != s.name] if len(table) else table, new])
    table = table.sort_values("scenario", key=lambda c: c.map(names.index), kind="stable")
    with record.atomic(file) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
