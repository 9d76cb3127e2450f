"""From the checked rows and frames of patients to `Studies`: new names, bins, and the pictures of every input.

All frames of an input share one window and one square around the heart.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from compdiff import cardiac, heart
from compdiff.attributes import age_bin
from compdiff.cardiac import BMI_EDGES, CINE_FRAMES, NO_PATHOLOGY, VOLUME_SLICES, Studies, findings
from compdiff.cardiac_manifest import NUMBERS, CardiacManifest

MIN_CINE, MIN_SLICES = 4, 3  # below that a series is no cine, a stack no volume


@dataclass
class Patient:
    """A line of the patients' table and the frames that belong to it."""

    line: int  # in the patients' table; the header is line 1
    numbers: dict[str, float] = field(default_factory=dict)  # as far as they are known
    categories: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)


@dataclass
class Frame:
    """A line of the pictures' table."""

    line: int  # in the pictures' table
    view: str
    phase: str  # ED, ES or ""
    slice: int
    frame: int
    mid: bool | None  # None: the table does not say
    image: Path
    mask: Path | None


def studies(manifest: CardiacManifest, people: dict[str, Patient], texts: dict[str, bytes]) -> Studies:
    """Checked patients by their ids -> studies under new names: a hash keyed with the source's tables."""
    key = hashlib.sha256(b"compdiff cardiac names\0" + b"\0".join(texts.values())).digest()
    named = {hmac.new(key, k.encode(), "sha256").hexdigest()[:16]: p for k, p in people.items()}
    patients = [named[k] for k in sorted(named)]  # an order that says nothing about the source's
    known = [p.numbers["townsend"] for p in patients if "townsend" in p.numbers]
    tertiles = np.quantile(known, [1 / 3, 2 / 3]) if known else ()
    none = NO_PATHOLOGY if "pathology" in manifest.attributes else "healthy"
    rows = []
    for name, patient in zip(sorted(named), patients, strict=True):
        binned = {k: _bin(k, v, tertiles) for k, v in patient.numbers.items()}
        row = {"id": f"p{name}", "age_years": math.floor(patient.numbers["age"]), **patient.categories, **binned}
        rows.append(
            row | {"findings": findings(patient.labels, none)} | {f"y_{k}": v for k, v in patient.labels.items()}
        )
    order = ["id", "age_years", *manifest.schema.names, "findings", *(f"y_{k}" for k in manifest.labels)]
    source = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    return Studies(
        manifest.title,
        manifest.schema,
        tuple(manifest.labels),
        pd.DataFrame(rows)[order],
        missing(patients),
        lambda row, name, size: picture(manifest, patients[row], name, size),
        source,
    )


def _bin(name: str, value: float, tertiles) -> str:
    if name == "age":
        return age_bin(value)
    edges = BMI_EDGES if name == "bmi" else tertiles
    return NUMBERS[name].categories[int(sum(value >= e for e in edges))]


def missing(patients: list[Patient]) -> dict[str, str]:
    """Inputs that not every patient has -> why, and what would bring them."""
    remedy = "choose another input, or leave out the patients that lack it"
    out = {}
    for name, needs, what in (
        ("cine", MIN_CINE, "frames of the mid short-axis slice"),
        ("four_chamber", MIN_CINE, "four-chamber frames"),
        ("volume", MIN_SLICES, "short-axis slices at ED"),
    ):
        least = min(len(series(p, name)) for p in patients)
        if least < needs:
            out[name] = f"a patient has {least} {what}, {needs} are needed -> {remedy}"
    return out


def mid_frame(patient: Patient, phase: str) -> Frame:
    """The mid short-axis slice at ED or ES."""
    return next(f for f in patient.frames if f.mid and f.phase == phase)


def series(patient: Patient, name: str) -> list[Frame]:
    """The frames of an input in order: one beat from ED for a cine, from base to apex for a volume."""
    frames = [f for f in patient.frames if f.view == ("four_chamber" if name == "four_chamber" else "short_axis")]
    if name == "volume":
        return sorted((f for f in frames if f.phase == "ED"), key=lambda f: f.slice)
    level = mid_frame(patient, "ED").slice
    beat = sorted((f for f in frames if name == "four_chamber" or f.slice == level), key=lambda f: f.frame)
    first = next((i for i, f in enumerate(beat) if f.phase == "ED"), 0)
    return beat[first:] + beat[:first]


def chosen(patient: Patient, name: str) -> list[Frame]:
    """The frames that make an input; CINE_FRAMES or VOLUME_SLICES of a series, evenly, by nearest frame."""
    ends = {"slice": ("ED",), "frame": ("ES",), "stacked": ("ED", "ES")}
    if name in ends:
        return [mid_frame(patient, phase) for phase in ends[name]]
    found = series(patient, name)
    at = (
        np.linspace(0, len(found) - 1, VOLUME_SLICES)
        if name == "volume"
        else np.arange(CINE_FRAMES) * len(found) / CINE_FRAMES
    )
    return [found[round(float(i)) % len(found)] for i in at]  # a beat is a circle


def picture(manifest: CardiacManifest, patient: Patient, name: str, size: int) -> cardiac.Picture:
    """One input of one patient: 8 bits, one window and one square around the heart for all its frames."""
    frames, ends = chosen(patient, name), [mid_frame(patient, phase) for phase in heart.TIMES]
    white = max(1.0, np.percentile([grey(f.image) for f in ends], manifest.window))
    square = box(frames[0] if frames[0].view == "four_chamber" else ends[0], manifest.crop)
    windowed = (np.clip(grey(f.image) * (255 / white), 0, 255).round() for f in frames)
    images = [_cut(image, square, size, Image.Resampling.LANCZOS) for image in windowed]
    masks = [_cut(grey(f.mask), square, size, Image.Resampling.NEAREST) for f in frames if f.mask is not None]
    return _join(name, images), _join(name, masks) if len(masks) == len(frames) else None


def _join(name: str, frames: list[np.ndarray]) -> np.ndarray:
    if name == "stacked":
        return cardiac.stack(*frames)
    return frames[0] if name in ("slice", "frame") else np.stack(frames)


def _cut(grey_values: np.ndarray, square: tuple[int, int, int, int], size: int, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(grey_values.astype(np.uint8)).crop(square).resize((size, size), how))


def grey(path: Path) -> np.ndarray:
    """PNG file -> float32 [H, W], 0 to 255 (mask values stay as they are)."""
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image.convert("L"), dtype=np.float32)


def box(frame: Frame, share: float) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a square inside the picture, centred on the cavity (else on the picture)."""
    height, width = grey(frame.image).shape
    side = round(share * min(height, width))
    inside = np.argwhere(grey(frame.mask) == heart.CAVITY) if frame.mask is not None else np.zeros((0, 2))
    row, column = inside.mean(axis=0) if len(inside) else (height / 2, width / 2)
    top, left = (int(np.clip(round(at - side / 2), 0, n - side)) for at, n in ((row, height), (column, width)))
    return left, top, left + side, top + side
