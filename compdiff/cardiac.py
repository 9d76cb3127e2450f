"""Cardiac studies, whatever their source: one row per patient, and pictures and masks in the five classifier inputs
on demand.

Here: the table, the inputs, frames stacked as colour channels, prompts, sampling weights, and studies made of phantoms
(`heart`). Studies from files are read by `cardiac_files`. Method section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from compdiff import heart
from compdiff.attributes import AGE, SEX, Attribute, Schema
from compdiff.problems import DataError

BMI_EDGES = (25.0, 30.0)  # kg/m2; underweight (< 18.5) counts as normal
BMI = Attribute("bmi", heart.CATEGORIES["bmi"])
UNKNOWN = "unknown"  # the group of patients whose value is missing, where the manifest allows that
CINE_FRAMES, VOLUME_SLICES = 12, 8  # of every patient, by nearest frame and slice
# The inputs of a classifier, and the shape of one patient's.
INPUTS = {
    "cine": "[T, S, S] one beat of the mid short-axis slice, frame 0 = ED",
    "four_chamber": "[T, S, S] one beat in the four-chamber view",
    "volume": "[D, S, S] short-axis stack at ED, base to apex",
    "slice": "[S, S] mid short-axis slice at ED",
    "frame": "[S, S] one other time, ES, of the mid slice",
    "stacked": "[S, S, 3] mid slice: ED, ES, ED as colour channels",
}
PHRASES = {"sex": "{}", "age": "age in {}s", "bmi": "{} BMI", "townsend": "{} Townsend index"}
REHEARSAL = "phantoms"  # the generator that learns from phantoms first, where patients are few
NO_PATHOLOGY = "no heart failure"  # said of patients without the label where a source knows other pathologies

Picture = tuple[np.ndarray, np.ndarray | None]  # image and mask (None: not drawn), uint8, shape as in INPUTS


class NotAvailable(DataError):
    """A source does not hold what was asked for; the text names the remedy."""


@dataclass(frozen=True)
class Studies:
    """Patients and their pictures. Columns of `table`: id, age_years, the attributes, findings, y_<label>."""

    title: str
    schema: Schema
    labels: tuple[str, ...]
    table: pd.DataFrame
    missing: Mapping[str, str]  # input -> why it is not there
    read: Callable[[int, str, int], Picture]  # row number, input, size
    source: Mapping[str, str] = field(default_factory=dict)  # sha256 of the tables

    def images(self, name: str, size: int = 64, rows: Iterable[int] | None = None) -> np.ndarray:
        """uint8 [n, *INPUTS[name]] of some row numbers (default: all). NotAvailable; ValueError: unknown input."""
        return np.stack([image for image, _ in self._pictures(name, size, rows)])

    def masks(self, name: str, size: int = 64, rows: Iterable[int] | None = None) -> np.ndarray:
        """As `images`: 0 background, 1 cavity, 2 myocardium, 3 right ventricle. NotAvailable where one is not drawn."""
        masks = [mask for _, mask in self._pictures(name, size, rows)]
        if absent := sum(mask is None for mask in masks):
            raise NotAvailable(
                self.title, [f"masks of {name}: not drawn for {absent} patients -> leave those rows out"]
            )
        return np.stack(masks)

    def _pictures(self, name: str, size: int, rows: Iterable[int] | None) -> list[Picture]:
        if name not in INPUTS:
            raise ValueError(f"unknown input {name!r}; known: {', '.join(INPUTS)}")
        if name in self.missing:
            raise NotAvailable(self.title, [f"input {name}: not available: {self.missing[name]}"])
        return [self.read(int(row), name, size) for row in (range(len(self.table)) if rows is None else rows)]

    def attributes(self) -> np.ndarray:
        """Category indices, int64 [n, K] in schema order."""
        return np.array([self.schema.encode(row) for row in self.table.to_dict("records")], dtype=np.int64)

    def prompts(self, named: Sequence[str] | None = None) -> list[str]:
        """One prompt per patient, naming the attributes in `named` (None: all) and no other."""
        names = self.schema.names if named is None else tuple(named)
        return [prompt(row, names, self.schema) for row in self.table.to_dict("records")]


# --- pictures, prompts, weights ---------------------------------------------------------------------------------------
def stack(ed: np.ndarray, es: np.ndarray) -> np.ndarray:
    """Frames [..., S, S] as colour channels ED, ES, ED: [..., S, S, 3]. Masks keep their values."""
    return np.stack([ed, es, ed], axis=-1)


def unstack(stacked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., S, S, 3] -> ED (mean of its two channels, which a generator may draw differently) and ES."""
    ed = stacked[..., [0, 2]].mean(axis=-1)
    return (np.rint(ed).astype(stacked.dtype) if stacked.dtype.kind in "iu" else ed), stacked[..., 1]


def prompt(row: Mapping[str, object], named: Iterable[str], schema: Schema) -> str:
    """Such as "Male, age in 60s, overweight BMI, heart failure": the attributes in `named`, then the findings.

    A named pathology stands in the place of the findings, which it tells in more detail.
    ValueError for an attribute that the schema does not have.
    """
    names = set(named)
    for name in names:
        schema[name]
    others = [n for n in schema.names if n not in PHRASES and n != "pathology"]
    order = [n for n in (*PHRASES, *others) if n in names]
    said = {n: int(row["age_years"]) // 10 * 10 if n == "age" else row[n] for n in order}
    last = "pathology" if "pathology" in names else "findings"
    return ", ".join([*(PHRASES.get(n, "{}").format(said[n]) for n in order), str(row[last])])


def findings(labels: Mapping[str, int], none: str = "healthy") -> str:
    """{label: 0 or 1} -> the labels that are present, joined, or `none`."""
    return ", ".join(name for name, value in labels.items() if value) or none


def sampling_weights(prompts: Sequence[str], clip: float) -> np.ndarray:
    """w_i = min(1 / n_prompt(i), 1 / (9 clip)), float64 [n]: rows of prompts with more than 9 clip rows count less.

    clip: 20 in training (method section 5). ValueError unless clip > 0.
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    _, kind, counts = np.unique(np.asarray(prompts, dtype=str), return_inverse=True, return_counts=True)
    return np.minimum(1 / counts[kind], 1 / (9 * clip))


def weighted_rows(weights: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n row numbers in proportion to `weights`, int64 [n], shuffled: what an epoch of training sees.

    Systematic resampling: a row comes floor(e) or floor(e) + 1 times, e = n w_i / sum(w) its expected number; so equal
    weights and n = len(weights) give every row once, where independent draws would leave 37 % of them out.
    """
    share = np.cumsum(np.asarray(weights, dtype=float))
    rng = np.random.default_rng(seed)
    points = (np.arange(n) + rng.random()) / n * share[-1]
    return rng.permutation(np.searchsorted(share, points, side="right").clip(max=len(share) - 1))


# --- studies made of phantoms -----------------------------------------------------------------------------------------
PHANTOM_SCHEMA = Schema((AGE, SEX, BMI))
# Declared shares of the generated population: independent, long-tailed, ours.
SHARES = {"age": (0.0, 0.07, 0.38, 0.48, 0.07), "sex": (0.65, 0.35), "bmi": (0.35, 0.42, 0.23)}


def phantom_studies(
    n: int, cohort: str, *, seed: int, prevalence: float = 0.25, interaction: float = 0.5, balanced: bool = False
) -> Studies:
    """`n` generated patients of a cohort ("train", "test", ...; cohorts share nobody), all inputs available.

    prevalence: share of heart failure, exact up to rounding. balanced: even over age (from 18), sex and BMI instead
    of SHARES.
    true_<parameter> columns hold the truth. ValueError: n below 1, prevalence or interaction outside [0, 1].
    """
    if n < 1 or not 0 <= prevalence <= 1:
        raise ValueError(f"n must be at least 1 and prevalence in [0, 1], got {n} and {prevalence}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, *cohort.encode()]))
    shares = {k: np.array(v) for k, v in SHARES.items()}
    shares = {k: (v > 0) / (v > 0).sum() for k, v in shares.items()} if balanced else shares
    drawn = {k: rng.choice(PHANTOM_SCHEMA[k].categories, size=n, p=p) for k, p in shares.items()}
    failing = rng.permutation(np.arange(n) < round(prevalence * n)).astype(int)
    hearts, rows = [], []
    for i in range(n):
        who = {k: str(drawn[k][i]) for k in PHANTOM_SCHEMA.names}
        labels = {"heart failure": int(failing[i])}
        made = heart.draw(f"heart-{cohort}-{i:06d}", who, labels, seed=seed, interaction=interaction)
        hearts.append(made)
        rows.append(
            {
                "id": made.subject,
                "age_years": made.age_years,
                **who,
                "bmi_value": made.bmi,
                "findings": findings(labels),
                **{f"y_{k}": v for k, v in labels.items()},
                **{f"true_{k}": v for k, v in made.truth.items()},
            }
        )
    return Studies(
        "cardiac phantoms",
        PHANTOM_SCHEMA,
        ("heart failure",),
        pd.DataFrame(rows),
        {},
        lambda row, name, size: _phantom_picture(hearts[row], name, size),
    )


def _phantom_picture(one: heart.Heart, name: str, size: int) -> Picture:
    if name in ("cine", "four_chamber"):
        return heart.cine(one, CINE_FRAMES, "short_axis" if name == "cine" else name, size)
    if name == "volume":
        return heart.volume(one, "ED", VOLUME_SLICES, size)
    if name == "stacked":
        images, masks = heart.pair(one, size=size)
        return stack(*images), stack(*masks)
    return heart.render(one, heart.TIMES["ED" if name == "slice" else "ES"], size=size)
