"""A small tree in exactly the layout of a real dataset, with drawn phantoms and invented ids, to rehearse preparation.

The texts of its table are those that the manifest lists, in turn, so an edited manifest gets the tree that it asks for.
Ids lie outside the ranges of the releases (subjects 99..., studies 99...).
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from compdiff import phantoms
from compdiff.columns import Column
from compdiff.manifests import Manifest, load_manifest
from compdiff.problems import DataError

README = """{title}: a rehearsal tree, written by compdiff/skeleton.py.

Every image here is a PHANTOM, drawn by compdiff/phantoms.py. No patient is shown, all ids are invented, and nothing in
these files comes from {title}. Only names, folders and columns are those of its release.
"""
PATIENTS = 240  # a sixth of their images is test: more than the 30 that FID asks for
SPLITS = ("train",) * 4 + ("val", "test")  # patient by patient, again and again
SIZE = 128  # pixels of a chest image
NIH_NAMES = {"Pleural Effusion": "Effusion"}  # besides their own


@dataclass(frozen=True)
class Shot:
    """One invented image and what the table says of it."""

    patient: int
    number: int  # of the patient's images
    split: str
    attributes: dict[str, str]
    age_years: int
    labels: dict[str, int]
    pixels: np.ndarray  # uint8 [SIZE, SIZE]
    none: bool  # its table names none of the categories


def write(dataset: str, root: Path, kind: str = "", patients: int = PATIENTS) -> Path:
    """Write the tree for a manifest's name or path into `root`, which must be empty or absent; returns it.

    kind: of the images, one of the manifest's (mimic: jpg, dcm), "" = its first. DataError where the layout has no
    tree, or the manifest no such kind.
    """
    manifest, root = load_manifest(dataset), Path(root).expanduser().resolve()
    if manifest.layout not in TREES:
        raise DataError(manifest.title, [f"layout {manifest.layout}: needs no folder -> use it as it is"])
    kinds = manifest.files.get("kinds", ["png"])  # NIH has PNG files only
    if kind and kind not in kinds:
        raise DataError(manifest.title, [f"kind {kind}: none of the manifest's -> use one of: {', '.join(kinds)}"])
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(manifest.title, [f"{root}: is not empty -> name another folder"])
    root.mkdir(parents=True, exist_ok=True)
    (root / "README.txt").write_text(README.format(title=manifest.title))
    TREES[manifest.layout](manifest, root, list(_shots(manifest, patients)), kind)
    return root


def _shots(manifest: Manifest, patients: int) -> Iterator[Shot]:
    """Every third patient has two images; number 1 belongs to a held-out cell; the last names no category.

    They come from at most ten cells, so that the splits share some: what compares them cell by cell finds a pair.
    """
    cells = manifest.schema.cells()
    allowed = [cell for cell in cells if cell not in manifest.held_out]
    for n in range(patients):
        cell = manifest.held_out[0] if n == 1 and manifest.held_out else allowed[7 * (n % 10) % len(allowed)]
        who = manifest.schema.decode(cell)
        drawn_as = {k: who.get(k, v[0]) for k, v in phantoms.CATEGORIES[manifest.modality].items()}
        for number in range(2 if n % 3 == 0 else 1):
            drawn = phantoms.draw(manifest.modality, f"skeleton-{n}-{number}", drawn_as, seed=0, size=64)
            known = phantoms.LABELS[manifest.modality]
            labels = {k: known[k].index(v) for k, v in drawn.labels.items()}
            labels |= {name: labels[k] for k, name in NIH_NAMES.items() if k in labels}
            pixels = np.asarray(Image.fromarray(drawn.image).resize((SIZE, SIZE)))
            values = {label: labels.get(label, 0) for label in manifest.labels}
            split = SPLITS[n % len(SPLITS)]
            yield Shot(n, number, split, who, drawn.age_years, values, pixels, none=n == patients - 1)


def _text(column: Column, value: object, turn: int) -> str:
    """One of the texts that stand for `value`, in turn."""
    texts = [text for text, meaning in column.values.items() if meaning == value]
    return texts[turn % len(texts)]


def _cells(manifest: Manifest, shot: Shot, given: dict[str, str]) -> dict[str, str]:
    """{header: text} of one row; `given` holds what the layout itself says (image, patient, ...)."""
    row, turn = {}, shot.patient
    for name, column in manifest.columns.items():
        head, value = column.header[0], shot.attributes.get(name)
        if name in given:
            row[head] = given[name]
        elif name == "age":
            row[head] = str(shot.age_years)
        elif name == "split":
            row[head] = _text(column, shot.split, turn)
        elif name == "frontal":
            row[head] = _text(column, "frontal", turn)
        elif name == "findings":
            row[head] = manifest.describe(shot.labels)
        elif column.none and shot.none:
            row[head] = column.none[0]
            row |= {column.first.header[0]: column.first.none[0]} if column.first else {}
        elif column.first and value in column.first.values.values():
            row |= {head: column.none[0], column.first.header[0]: _text(column.first, value, turn)}
        elif value:
            row[head] = _text(column, value, turn)
            row |= {column.first.header[0]: _text(column.first, "", turn)} if column.first else {}
    for k, (label, column) in enumerate(manifest.label_columns.items()):
        if isinstance(column, Column):
            row[column.header[0]] = _text(column, shot.labels[label], turn + k)
    return row


def _table(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _save(pixels: np.ndarray, path: Path, turn: int = 0) -> None:
    """Grey image as the kind that the suffix says; of DICOM files every second is MONOCHROME1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".dcm":
        save_dicom(pixels.astype(np.uint16) * 16, path, "MONOCHROME1" if turn % 2 else "MONOCHROME2")
    else:
        Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def save_dicom(values: np.ndarray, path: Path, photometric: str, **tags: object) -> None:
    """uint16 [h, w], 12 bits in use, -> a small DICOM file. The picture is `values` whatever `photometric` says."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"  # computed radiography
    name = generate_uid(entropy_srcs=[path.name])
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = name
    stored = 4095 - values if photometric == "MONOCHROME1" else values
    data.Rows, data.Columns = values.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, photometric, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.WindowCenter, data.WindowWidth = 2048, 4096
    for tag, value in tags.items():
        setattr(data, tag, value)
    data.PixelData = np.ascontiguousarray(stored, dtype="<u2").tobytes()
    data.save_as(path, enforce_file_format=True)


# --- layout by layout -----------------------------------------------------------------------------------------------
def _mimic(manifest: Manifest, root: Path, shots: list[Shot], kind: str) -> None:
    rows = []
    for shot in shots:
        patient, study = f"99{shot.patient:06d}", f"99{10 * shot.patient + shot.number:06d}"
        digest = hashlib.sha256(f"skeleton/{study}".encode()).hexdigest()[:40]
        image = "-".join(digest[i : i + 8] for i in range(0, 40, 8))
        file = root / f"files/p{patient[:2]}/p{patient}/s{study}/{image}.{kind or manifest.files['kinds'][0]}"
        _save(shot.pixels, file, shot.patient)
        rows.append(_cells(manifest, shot, {"image": image, "patient": patient, "study": study}))
    rows[-2] |= {manifest.columns["frontal"].header[0]: "LATERAL"}
    _table(root / manifest.files["table"][0], rows)


def _fairgenmed(manifest: Manifest, root: Path, shots: list[Shot], kind: str) -> None:
    folders = {"train": "Training", "val": "Validation", "test": "Test"}
    rows = []
    for n, shot in enumerate(shots):  # one image per subject
        folder, number = root / folders[shot.split], f"{90_000 + n}"
        picture = Image.fromarray(shot.pixels).resize((512, 664)).rotate(90, expand=True)  # lies on its side
        _save(np.asarray(picture), folder / f"slo_fundus_{number}.jpg")
        slo = np.repeat(np.asarray(Image.fromarray(shot.pixels).resize((200, 200)))[..., None], 3, axis=2)
        codes = {}
        for name, (attribute, values) in manifest.npz.items():
            codes[name] = next((k for k, v in values.items() if v == shot.attributes.get(attribute)), 0)
        codes |= {"glaucoma": shot.labels.get("glaucoma", 0), "maritalstatus": -1}
        np.savez(folder / f"data_{number}.npz", slo_fundus=slo, oct_bscans=np.zeros((4, 4, 4), np.uint8), **codes)
        rows.append(_cells(manifest, shot, {"image": f"data_{number}.npz"}))
    _table(root / manifest.files["table"][0], rows)


def _chexpert(manifest: Manifest, root: Path, shots: list[Shot], kind: str) -> None:
    rows = []
    for shot in shots:
        view = "lateral" if shot.number else "frontal"
        path = f"CheXpert-v1.0/train/patient{99_000 + shot.patient}/study1/view{shot.number + 1}_{view}.jpg"
        _save(shot.pixels, root / path)
        row = _cells(manifest, shot, {"image": path})
        rows.append(row | {manifest.columns["frontal"].header[0]: view.capitalize()})
    _table(root / manifest.files["table"][0], rows)


def _folder(manifest: Manifest, root: Path, shots: list[Shot], kind: str) -> None:
    rows = []
    for n, shot in enumerate(shots):
        path = f"images/{n:04d}.{kind or manifest.files['kinds'][0]}"
        _save(shot.pixels, root / path, shot.patient)
        rows.append(_cells(manifest, shot, {"image": path, "patient": f"subject-{99_000 + shot.patient}"}))
    _table(root / manifest.files["table"][0], rows)


def _nih(manifest: Manifest, root: Path, shots: list[Shot], kind: str) -> None:
    rows, lists = [], {"train_val": [], "test": []}
    labels = manifest.columns["labels"].separator
    for shot in shots:
        image = f"{99_000_000 + shot.patient}_{shot.number:03d}.png"
        _save(shot.pixels, root / "images" / image)
        found = [name for name, value in shot.labels.items() if value and name != "No Finding"] or ["No Finding"]
        given = {"image": image, "patient": str(99_000_000 + shot.patient), "labels": labels.join(found)}
        rows.append(_cells(manifest, shot, given))
        lists["test" if shot.split == "test" else "train_val"].append(image)
    _table(root / manifest.files["table"], rows)
    for name, images in lists.items():
        (root / manifest.files[name]).write_text("\n".join(images) + "\n")


TREES: dict[str, Callable[[Manifest, Path, list[Shot], str], None]] = {
    "mimic": _mimic, "fairgenmed": _fairgenmed, "chexpert": _chexpert, "folder": _folder, "nih": _nih,
}  # fmt: skip
