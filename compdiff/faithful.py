"""Does a generated heart show the mask that was asked for, and is it still a picture of a heart? Method section 5.

Faithfulness: Dice of the requested cavity and the one that `segment` finds; the finder's own Dice on real test images
is what can be reached, and what the diagnosis alone tells (`typical`, no image) is what must be beaten. A picture that
is the mask, painted in flat greys, shows the mask by construction; the finder, trained on real images, finds only part
of it. So Dice, too, needs an image that the finder can read, and a distance to real images (KID) says whether it is a
heart. Group x group: FID of every real group against every synthetic one, all at one size, beside the floor: halves of
real patients against other real patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import nn

from compdiff import clouds, heart, metrics, segment, stats
from compdiff.cardiac import unstack
from compdiff.fairness import images_note

FEW = 10  # patients of a group, below which it has no column in a matrix: halves of fewer say nothing by FID


def finder(images: np.ndarray, masks: np.ndarray, steps: int, seed: int) -> nn.Module:
    """A cavity finder trained on the ED and ES frames of real stacked images and masks uint8 [N, S, S, 3]."""
    x, y = (np.concatenate([stacked[..., 0], stacked[..., 1]]) for stacked in (images, masks))
    net = None
    for _, _, net in segment.fit(x, y, steps=steps, seed=seed):
        pass
    return net


def found(net: nn.Module, images: np.ndarray) -> np.ndarray:
    """Cavities that the finder sees in stacked images [N, S, S, 3] -> masks uint8 [N, S, S, 2], ED and ES."""
    return np.stack([segment.predict(net, frame) for frame in unstack(images)], axis=-1)


def dice(seen: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Mean of the ED and ES Dice of found cavities [N, S, S, 2] and requested stacked masks [N, S, S, 3] -> [N]."""
    return (segment.dice(seen[..., 0], masks[..., 0]) + segment.dice(seen[..., 1], masks[..., 1])) / 2


def ejection(seen: np.ndarray) -> np.ndarray:
    """Ejection fractions implied by found cavities [N, S, S, 2] -> [N]; NaN, to be counted, where none was found at ED."""
    out = np.full(len(seen), np.nan)
    there = (seen[..., 0] == heart.CAVITY).any(axis=(1, 2))
    if there.any():
        out[there] = segment.ejection_fractions(seen[there][..., 0], seen[there][..., 1])
    return out


def paste(masks: np.ndarray, images: np.ndarray, real_masks: np.ndarray) -> np.ndarray:
    """The control: requested masks [N, S, S, 3] painted with the mean grey that each mask value has in real images."""
    greys = np.array([images[real_masks == v].mean() if (real_masks == v).any() else 0 for v in range(4)])
    return greys[masks].round().astype(np.uint8)


def typical(masks: np.ndarray, y: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """What the diagnosis alone tells: pixels that are cavity in most training masks [N, S, S, 3] with the label y [N],
    one answer for every label of `wanted` [n] -> uint8 [n, S, S, 2], as `found` would return it."""
    each = {v: ((masks[y == v][..., :2] == heart.CAVITY).mean(axis=0) > 0.5) * heart.CAVITY for v in np.unique(wanted)}
    return np.stack([each[v] for v in wanted]).astype(np.uint8)


def exchanged(y: np.ndarray) -> np.ndarray:
    """Row numbers [n] that give every row the mask of another row with its label [n]; a lone row keeps its own."""
    out = np.arange(len(y))
    for rows in (np.flatnonzero(y == v) for v in np.unique(y)):
        out[rows] = np.roll(rows, len(rows) // 2)
    return out


def mean_row(metric: str, values: np.ndarray, patients: np.ndarray, resamples: int, seed: int) -> dict:
    """A row of results: mean of per-image values [n] with the interval of resampled patients; NaN values are left out
    and counted in the note."""
    good = np.isfinite(values)
    left = int((~good).sum())
    if not good.any():
        return {"metric": metric, "n": 0, "note": "not available: no ED cavity was found in any image"}
    drawn = stats.resample_patients(np.asarray(patients)[good], resamples, seed)
    mean = stats.percentile_interval(values[good].mean(), stats.mean(values[good], drawn.counts()))
    note = f"without {left} images, in which no ED cavity was found" if left else ""
    return {"metric": metric, "value": mean.value, "lo": mean.lo, "hi": mean.hi, "n": int(good.sum()), "note": note}


def kid_row(features: np.ndarray, real: np.ndarray, patients: np.ndarray, real_patients: np.ndarray, resamples: int,
            seed: int, base: np.ndarray | None = None) -> dict:  # fmt: skip
    """KID to real images, resampled by patient; features [n, d] and [m, d]. Of the same patients, row by row, no image
    is compared with the one it was asked for. base [n, d]: what another method drew for the same patients; then KID
    minus that of the base, every resample with the same patients in both."""
    a, b = (stats.resample_patients(p, resamples, seed + i) for i, p in enumerate((patients, real_patients)))
    b = None if np.array_equal(patients, real_patients) else b
    value, resampled = clouds.kid_bootstrap(features, real, a, b)
    made = stats.percentile_interval(value, resampled)
    if base is not None:
        made = stats.difference(value, resampled, *clouds.kid_bootstrap(base, real, a, b))
    return {"metric": "KID", "value": made.value, "lo": made.lo, "hi": made.hi, "n": len(features), "n_ref": len(real)}


# --- groups against groups --------------------------------------------------------------------------------------------
def split_fid(a: np.ndarray, b: np.ndarray, same: bool, n: int, repeats: int, seed: int) -> np.ndarray:
    """FID of n rows of a and n rows of b -> [repeats]; where both are the `same` group, of halves that share no row."""
    if not same:
        return metrics.matched_fid(a, b, n, repeats, seed)
    if 2 * n > len(a):
        raise ValueError(f"two halves of {n} need {2 * n} patients, the group has {len(a)}")
    rng, out = np.random.default_rng(seed), []
    for _ in range(repeats):
        order = rng.permutation(len(a))
        out.append(metrics.fid(a[order[:n]], a[order[n : 2 * n]]))
    return np.array(out)


def groups(table: pd.DataFrame, names: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
    """{(attribute, category): bool [n]} of the categories that occur."""
    return {(n, value): (table[n] == value).to_numpy() for n in names for value in sorted(table[n].unique())}


def matrix(real: np.ndarray, real_groups: Mapping, fake: np.ndarray, fake_groups: Mapping, repeats: int, seed: int
           ) -> pd.DataFrame:  # fmt: skip
    """FID of every real group against every synthetic group of the same attribute, and the real-real floor.

    One image per patient: features [n, d] and [m, d]. All cells of an attribute are measured at one size, half of its
    smallest group. A group of fewer than FEW, or without another group beside it, has one row that says so, without a
    value. Columns: attribute, real, other, kind (synthetic | real), value, std, n, note.
    """
    rows = []
    for attribute in dict.fromkeys(k[0] for k in real_groups):
        everyone = {k[1]: m for k, m in real_groups.items() if k[0] == attribute}
        mine = {name: m for name, m in everyone.items() if m.sum() >= FEW}
        mine = mine if len(mine) > 1 else {}
        for name in sorted(everyone.keys() - mine.keys()):
            people = int(everyone[name].sum())
            why = f"{people} patients, fewer than {FEW}" if people < FEW else "no other group to compare it with"
            rows.append({"attribute": attribute, "real": name, "other": name, "kind": "synthetic", "n": people,
                         "note": f"not available: {why}"})  # fmt: skip
        others = {k[1]: m for k, m in fake_groups.items() if k[0] == attribute and k[1] in mine}
        n = min([*(int(m.sum()) // 2 for m in mine.values()), *(int(m.sum()) for m in others.values())], default=0)
        for a, mask in mine.items():
            for kind, features, against in (("synthetic", fake, others), ("real", real, mine)):
                for b, other in against.items():
                    if n < 2:
                        continue
                    values = split_fid(real[mask], features[other], kind == "real" and a == b, n, repeats, seed)
                    rows.append({"attribute": attribute, "real": a, "other": b, "kind": kind, "value": values.mean(),
                                 "std": values.std(ddof=1) if repeats > 1 else np.nan, "n": n,
                                 "note": images_note(2 * n)})  # fmt: skip
    return pd.DataFrame(rows, columns=["attribute", "real", "other", "kind", "value", "std", "n", "note"])
