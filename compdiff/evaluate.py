"""06. Image sets -> tidy result rows (record.RESULT_COLUMNS without dataset and seed); the metrics live elsewhere.

Every set lies row by row beside the real image of the same request: image i of a set answers the prompt of reference
row at[i]. So one table of groups serves all sets, and every number of a group compares images of the SAME cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from compdiff import clouds, estimate, fairness, frames, metrics, sample, stats
from compdiff.attributes import Schema
from compdiff.datasets import Data
from compdiff.fairness import Key
from compdiff.stats import Interval, Resamples

REPEATS = 10  # random subsets of a size-matched FID
PAIRS_PER_CELL = 4  # images per cell whose pairs measure diversity
LARGE = 1000  # reference images from which several images per patient are no obstacle to subgroup FIDs
ABSENT = (("quality", "FID"), ("alignment", "accuracy"), ("memorisation", "suspected copies"))  # rows of a lost set
Halves = tuple[float, np.ndarray]  # an overall FID, and that of random halves of the patients [repeats]
Features = Callable[[str, np.ndarray], np.ndarray]  # (name, uint8 [n, S, S]) -> float32 [n, d], e.g. features.cached


@dataclass(frozen=True)
class Reference:
    """The real images that the requests were taken from, with the masks of all groups."""

    rows: pd.DataFrame
    images: np.ndarray  # uint8 [n, S, S]
    features: np.ndarray  # float32 [n, d]
    masks: Mapping[Key, np.ndarray]  # (group_kind, group) -> bool [n]
    schema: Schema
    extractor: str = "lite0"  # of `features.column`

    @property
    def patients(self) -> np.ndarray:
        return self.rows["patient"].to_numpy()

    @property
    def subgroup_fid(self) -> bool:
        """FID of parts only where each image is another patient's, or images abound; else overall FID and KID."""
        return self.rows["patient"].is_unique or len(self.rows) >= LARGE


@dataclass(frozen=True)
class ImageSet:
    """Images to judge. `at` [n] are the rows of the reference whose request each answers."""

    method: str
    images: np.ndarray  # uint8 [n, S, S]
    features: np.ndarray  # float32 [n, d]
    patients: np.ndarray  # [n] whose image, or whose prompt
    at: np.ndarray  # int64 [n]


# --- image sets -------------------------------------------------------------------------------------------------------
def reference(data: Data, features: Features, extractor: str = "lite0") -> Reference:
    """Real images of split test, and of zero_shot where the dataset has it."""
    rows = data.table[data.table["split"].isin(["test", "zero_shot"])].reset_index(drop=True)
    images = data.images(rows)
    return Reference(rows, images, features("real_test", images), data.group_masks(rows), data.schema, extractor)


def table(rows: Sequence[dict], metrics: Sequence[str], key: Key = ("overall", "")) -> pd.DataFrame:
    """Values of one group as a small table: a row per method, a column per metric; ineligible values are empty."""
    frame = pd.DataFrame([r for r in rows if (r["group_kind"], r["group"]) == key and r["metric"] in metrics])
    order = list(dict.fromkeys(frame["method"]))
    return frame.pivot(index="method", columns="metric", values="value").reindex(index=order, columns=list(metrics))


def read_rows(folder: Path) -> pd.DataFrame:
    """samples.csv of a generated set. FileNotFoundError names the notebook that makes it."""
    file = Path(folder) / "samples.csv"
    if not file.is_file():
        raise FileNotFoundError(f"{'/'.join(file.parts[-4:])} is not there: run notebook 05_generation")
    return pd.read_csv(file, dtype={"id": str, "patient": str, "prompt": str}, keep_default_na=False)


def generated(method: str, folder: Path, ref: Reference, features: Features) -> ImageSet:
    """A generated set, each image beside the real one with its id. ValueError for ids that the reference lacks."""
    rows = read_rows(folder)
    at = pd.Index(ref.rows["id"]).get_indexer(rows["id"])
    if (at < 0).any():
        raise ValueError(f"{method}: {int((at < 0).sum())} of {len(at)} images answer no prompt of the real test set")
    try:
        images = sample.read_images(folder, rows["id"].tolist())
    except FileNotFoundError:  # its message holds an id
        where = "/".join(Path(folder).parts[-3:])
        raise FileNotFoundError(f"an image of {where} is not there: run notebook 05_generation") from None
    return ImageSet(method, images, features(method, images), ref.patients[at], at)


def available(folders: Mapping[str, Path], ref: Reference, features: Features) -> tuple[list[ImageSet], list[dict]]:
    """The `generated` sets of {method: folder} that are whole, and rows that say why the others have no number.

    A lost set, or one lost image, costs no other method anything. FileNotFoundError when no method's set is left.
    """
    sets, rows = [], []
    for method, folder in folders.items():
        try:
            sets.append(generated(method, folder, ref, features))
        except FileNotFoundError as error:
            n, note = len(ref.rows), f"{frames.NOT_AVAILABLE}: {error}"
            rows += [result(stage, method, ("overall", ""), metric, None, n, n,
                            ref.extractor if stage == "quality" else "", note) for stage, metric in ABSENT]  # fmt: skip
    if not any(s.method != sample.UNTRAINED for s in sets):
        raise FileNotFoundError("; ".join(dict.fromkeys(r["note"] for r in rows)))
    return sets, rows


# --- quality ----------------------------------------------------------------------------------------------------------
def result(stage: str, method: str, key: Key, metric: str, value: float | Interval | None, n: int, n_ref: int,
           extractor: str = "", note: str = "", setting: str = "test") -> dict:  # fmt: skip
    """One row; a plain number has no interval, None (with a note) no value."""
    plain = Interval(np.nan, np.nan, np.nan) if value is None else value
    interval = plain if isinstance(plain, Interval) else Interval(float(plain), np.nan, np.nan)
    return {"stage": stage, "method": method, "setting": setting, "group_kind": key[0], "group": key[1],
            "metric": metric, "value": interval.value, "lo": interval.lo, "hi": interval.hi, "n": n, "n_ref": n_ref,
            "extractor": extractor, "note": note}  # fmt: skip


def draws(s: ImageSet, ref: Reference, resamples: int, seed: int) -> tuple[Resamples, Resamples]:
    """Resampled patients of a set and of its reference rows; the same draws where they are the same patients."""
    theirs = ref.patients[s.at]
    same = set(s.patients) == set(theirs)
    own = stats.resample_patients(s.patients, resamples, seed if same else seed + 1)
    return own, stats.resample_patients(theirs, resamples, seed)


def kid_of(s: ImageSet, ref: Reference, mask: np.ndarray, ra: Resamples, rb: Resamples) -> tuple[float, np.ndarray]:
    """KID of the images in `mask` [n], with its resampled values. Row-by-row patients are drawn together; of a control,
    the cross term leaves out the pairs of one patient where its patients are the reference's in another order
    (shuffled), else, as other patients answer the same requests (real_train, copy), the pairs of one request.
    """
    theirs = ref.patients[s.at]
    a, b = s.features[mask], ref.features[s.at][mask]
    if np.array_equal(s.patients, theirs):
        return clouds.kid_bootstrap(a, b, ra.rows(mask))
    together = "patients" if set(s.patients) == set(theirs) else "rows"
    return clouds.kid_bootstrap(a, b, ra.rows(mask), rb.rows(mask), together)


def fid_of(s: ImageSet, ref: Reference, resamples: int, seed: int) -> Halves | None:
    """Overall FID, with that of resamples / 4 random halves of the patients, the same halves for sets of the same
    patients. None where there are too few images for an FID."""
    real = ref.features[s.at]
    if few_images(s, ref, np.ones(len(s.at), bool)):
        return None
    return clouds.fid_halves(s.features, real, s.patients, ref.patients[s.at], max(10, resamples // 4), seed)


def quality(s: ImageSet, ref: Reference, resamples: int, seed: int, whole_fid: Halves | None = None) -> list[dict]:
    """FID, KID, precision, recall, density, coverage and MS-SSIM of one set, overall and per group.

    whole_fid: `fid_of` the set, where it is known already.
    """
    drawn = draws(s, ref, resamples, seed)[0]
    return distances(s, ref, resamples, seed, whole_fid) + matched(s, ref, seed) + similarity(s, ref, drawn)


def distances(s: ImageSet, ref: Reference, resamples: int, seed: int, whole_fid: Halves | None = None) -> list[dict]:
    """What compares two clouds of features, overall and per group; FID intervals overall only (half-samples).

    Intervals resample patients. Where there are fewer of them than images, the note of FID and KID says how many.
    """
    ra, rb = draws(s, ref, resamples, seed)
    real = ref.features[s.at]
    out = []
    for key, whole in ref.masks.items():
        mask = whole[s.at]
        n, a, b = int(mask.sum()), s.features[mask], real[mask]
        here = {"n": n, "n_ref": n, "extractor": ref.extractor}
        few = note = few_images(s, ref, mask)
        if not note and key[0] != "overall" and not ref.subgroup_fid:
            note = f"ineligible: {len(set(ref.patients))} patients in all"
        if key[0] == "overall" and not note:
            value = clouds.halves_interval(*(whole_fid or fid_of(s, ref, resamples, seed)))
        else:
            value = None if note else metrics.fid(a, b)
        out.append(result("quality", s.method, key, "FID", value, note=note or whose(s, ref, mask), **here))
        out.append(kid_row("quality", s, ref, key, mask, (ra, rb)))
        if key[0] != "cell":
            found = (None,) * 4 if few else metrics.precision_recall(b, a) + metrics.density_coverage(b, a)
            out += [result("quality", s.method, key, m, v, note=few, **here)
                    for m, v in zip(("precision", "recall", "density", "coverage"), found, strict=True)]  # fmt: skip
    return out


def kid_row(stage: str, s: ImageSet, ref: Reference, key: Key, mask: np.ndarray,
            drawn: tuple[Resamples, Resamples]) -> dict:  # fmt: skip
    """KID of the images in `mask` [n], also of few; the note says of how few, or of how many patients."""
    n = int(mask.sum())
    value = stats.percentile_interval(*kid_of(s, ref, mask, *drawn)) if n >= 2 else None
    note = f"ineligible: n = {n} < 2" if n < 2 else few_images(s, ref, mask) or whose(s, ref, mask)
    return result(stage, s.method, key, "KID", value, n, n, ref.extractor, note)


def by_condition(s: ImageSet, ref: Reference, labels: Mapping[str, Sequence[str]], resamples: int,
                 seed: int) -> list[dict]:  # fmt: skip
    """KID by requested finding: rows of a stage of their own, "conditions", beside the attributes' categories.

    labels: of the manifest. Only those whose every value has a phrase in the prompts: fundus has FairDiffusion's
    conditions, glaucoma and its absence; in chest prompts the absence of a finding is not a thing one asks for.
    """
    named = {label: phrases for label, phrases in labels.items() if all(phrases)}
    drawn = draws(s, ref, resamples, seed)
    return [kid_row("conditions", s, ref, key, mask[s.at], drawn)
            for key, mask in fairness.conditions(ref.rows, named).items() if mask.any()]  # fmt: skip


def matched(s: ImageSet, ref: Reference, seed: int) -> list[dict]:
    """FID of every attribute's categories and of the whole at ONE number of images n, the smallest eligible category's;
    of no intersection, because a few small cells would bring everybody's n down to theirs (KID needs no matching).

    Value: mean over random subsets of n rows, the same of both, as each image stands beside its request. Interval:
    +- t std(FID of a subset's half - FID of the subset), how much the FID of n such images differs between samples of
    that size (halves without replacement, as in clouds.fid_halves), at least: it is wider where the distance is small
    against its bias. The choice of a subset alone would say nothing about the smallest group, which has only one. Where
    images of one patient repeat, halves of images would count them as independent: no interval, and the note says so.
    Categories with too few images have rows without a value that say
    so; no rows at all where `subgroup_fid` forbids them.
    """
    sizes = {k: int(m[s.at].sum()) for k, m in ref.masks.items() if k[0] in (*ref.schema.names, "overall")}
    fitting = {k: n for k, n in sizes.items() if not fairness.images_note(n)}
    if not ref.subgroup_fid or not fitting:
        return []
    n, real, out = min(fitting.values()), ref.features[s.at], []
    for k, size in sizes.items():
        if k not in fitting:
            note = few_images(s, ref, ref.masks[k][s.at])
            out.append(result("quality", s.method, k, "FID-matched", None, size, size, ref.extractor, note))
            continue
        mask = ref.masks[k][s.at]
        people = patients_of(s, ref, mask)
        whole, half = (metrics.matched_fid(s.features[mask], real[mask], m, REPEATS, seed, paired=True) for m in (n, n // 2))
        value = clouds.halves_interval(whole.mean(), half - whole)  # one seed: a half is the first half of its subset
        note = f"mean of {REPEATS} random subsets of {n}"
        if people < size:
            value, note = value.value, f"{note}; no interval: {size} images of {people} patients"
        out.append(result("quality", s.method, k, "FID-matched", value, n, n, ref.extractor, note))
    return out


def patients_of(s: ImageSet, ref: Reference, mask: np.ndarray) -> int:
    """Patients among the images in `mask` [n] of a set and of the reference, whichever are fewer."""
    return min(len(set(s.patients[mask])), len(set(ref.patients[s.at][mask])))


def whose(s: ImageSet, ref: Reference, mask: np.ndarray) -> str:
    """How many images in `mask` [n] of how many patients, where those are fewer; else ""."""
    n, people = int(mask.sum()), patients_of(s, ref, mask)
    return f"{n} images of {people} patients" if people < n else ""


def few_images(s: ImageSet, ref: Reference, mask: np.ndarray) -> str:
    """`fairness.images_note` of the images in `mask` [n], which names their patients where they are fewer."""
    return fairness.images_note(int(mask.sum()), patients=patients_of(s, ref, mask))


def classified(s: ImageSet, ref: Reference, probabilities: np.ndarray, real: np.ndarray, resamples: int,
               seed: int) -> list[dict]:  # fmt: skip
    """ "IS" of one set, from the extractor's own class probabilities [n, C]; interval from random halves of patients.

    real: those of the real test images. No real image enters the score; theirs stands in the note, for comparison.
    """
    names, code = np.unique(s.patients, return_inverse=True)
    rng, value = np.random.default_rng(seed), metrics.inception_score(probabilities)
    halves = [(rng.permutation(len(names)) < (len(names) + 1) // 2)[code] for _ in range(max(10, resamples // 4))]
    scores = np.array([metrics.inception_score(probabilities[h]) for h in halves])
    n = len(s.at)
    return [result("quality", s.method, ("overall", ""), "IS", clouds.halves_interval(value, scores - value), n, 0,
                   ref.extractor, f"real test images: {metrics.inception_score(real):.4g}")]  # fmt: skip


def similarity(s: ImageSet, ref: Reference, ra: Resamples) -> list[dict]:
    """MS-SSIM with the real image of the same request, per group, and among images of one cell (low = diverse).

    "intra-prompt" goes by cells, not by the prompts' words: those of a method with demographic tokens leave out the
    attributes, so equal words would mean another thing for each method.
    """
    name, scales = metrics.ms_ssim_variant(s.images.shape[-1])
    values, counts = metrics.ms_ssim(s.images, ref.images[s.at], scales), ra.counts()
    out = []
    for key, whole in ref.masks.items():
        mask = whole[s.at]
        if key[0] != "cell" and mask.any():
            interval = stats.percentile_interval(values[mask].mean(), stats.mean(values[mask], counts[:, mask]))
            n = int(mask.sum())
            out.append(result("quality", s.method, key, f"{name} paired", interval, n, n, "pixels"))
    cells = ref.rows["cell"].to_numpy()[s.at]
    first = pd.Series(cells).groupby(cells).cumcount().to_numpy() < PAIRS_PER_CELL
    means = metrics.ms_ssim_intra(s.images[first], cells[first], scales)
    value = float(means.mean()) if len(means) else None
    who = ("quality", s.method, ("overall", ""))
    return [*out, result(*who, f"{name} intra-prompt", value, int(first.sum()), 0, "pixels", "images of one cell")]


def equity(rows: Sequence[dict], names: Sequence[str], metric: str) -> list[dict]:
    """ES-<metric> per attribute from the rows of ONE set; absent, with a note, unless every category counts.

    Of a distance M (1 + mean_a |M_a - M| / M), and "-sum"; of an accuracy M / (1 + sum_a |M_a - M|), and "-mean".
    Categories without any image are no part of the comparison.
    """
    distance, share = (fairness.es_fid, {"": "mean", "-sum": "sum"}), (fairness.es_metric, {"": "sum", "-mean": "mean"})
    scaled, ways = share if frames.better_is(metric) == "higher" else distance
    rows = [r for r in rows if r["metric"] == metric]
    whole = next((r for r in rows if r["group_kind"] == "overall"), None)
    out = []
    for name in names if whole is not None else ():
        parts = [r for r in rows if r["group_kind"] == name and r["n"] > 0]
        missing = [r["group"] for r in parts if r["note"].startswith("ineligible")]
        note = f"ineligible: {', '.join(missing)}" if missing else "" if parts else "ineligible: no category"
        for ending, how in ways.items():
            value = None if note else scaled(whole["value"], [r["value"] for r in parts], combine=how)
            out.append(result(whole["stage"], whole["method"], (name, ""), f"ES-{metric}{ending}", value, whole["n"],
                              whole["n_ref"], whole["extractor"], note))  # fmt: skip
    return out


# --- measurement ------------------------------------------------------------------------------------------------------
def measure(modality: str, images: np.ndarray) -> pd.DataFrame:
    """`estimate.parameters` of every image: a row each, a column per generative parameter; 0 where there is none."""
    with np.errstate(invalid="ignore"):
        found = pd.DataFrame([estimate.parameters(modality, image) for image in images])
    return found.where(np.isfinite(found), 0.0)
