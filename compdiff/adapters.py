"""Real data in the layout of its release: manifest and folder -> checked records, splits, new names, and tasks.

Each layout adds only where its files lie (`PLACES`); the table, the checks and the splits are the same for all.

Names. Images and patients get new names, HMAC-SHA-256 under a key. For open data the key is the content of the
source's own table: the same release gives the same names everywhere. For credentialed data that would not do, since
everybody with access holds that table and could compute the names back: there the key is a secret salt of 32 random
bytes. It lies in a file beside the prepared folder that only its owner can read (`.<name>.salt`), not in the folder, so
that a copy of the folder does not carry it; who needs equal names at two places copies that file or passes `salt`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from compdiff import nih, paths, pictures
from compdiff.manifests import Manifest
from compdiff.parts import Rejected, Task
from compdiff.problems import DataError, Problems
from compdiff.progress import interactive
from compdiff.sheet import Record, Sheet

TREES = {  # what the folder must hold, in words
    "nih": "{table}, {train_val}, {test}, PNG files in {images}",
    "mimic": "{table}, and files/pNN/pNNNNNNNN/sNNNNNNNN/<dicom id>.jpg (MIMIC-CXR-JPG) or .dcm (MIMIC-CXR)",
    "fairgenmed": "{table}, and folders Training, Validation, Test (or train, val, test), an NPZ and a JPG per subject",
    "chexpert": "{table}, and the images at the paths of its column Path",
    "folder": "{table}, and the images at the paths of its image column",
}
FOLDERS = {"train": ("Training", "train"), "val": ("Validation", "val"), "test": ("Test", "test")}  # FairGenMed


def read(
    manifest: Manifest, size: int, seed: int, data_root: str, salt: Callable[[], bytes]
) -> tuple[list[Task], list[dict], dict[str, str]]:
    """-> (tasks by split, images left out [{id, row, reason}], sha256 of the text files).

    salt: called for credentialed data only, once everything is checked. DataError: one report of all that is wrong.
    """
    root = find_root(manifest, data_root)
    table, *lists = _text_files(manifest, root)
    text = (root / table).read_bytes()
    sheet = Sheet(manifest, root, table, seed)
    sheet.read(text)
    PLACES[manifest.layout](sheet)
    _check_any_image(sheet)
    sheet.one_split_per_patient()
    if manifest.image_errors == "report":
        sheet.check_images()
    sheet.problems.check()
    secret = salt() if manifest.access == "credentialed" else text
    names = Names(hashlib.sha256(b"compdiff names\0" + secret).digest())
    splits, others = assign(sheet, [row for row in sheet.rows if not row.reason])
    for row in others:
        row.reason = "other image of a patient in a held-out cell"
    left_out = [row for row in sheet.rows if row.reason]
    excluded = [{"id": names.image(row), "row": sheet.where(row), "reason": row.reason} for row in left_out]
    source = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in (table, *lists)}
    return list(_tasks(splits, sheet, names, size)), sorted(excluded, key=lambda e: e["id"]), source


class Names:
    """New names for images and patients: HMAC-SHA-256 under `key` (64 bits of it)."""

    def __init__(self, key: bytes):
        self.key = key

    def _hash(self, kind: str, text: str) -> str:
        return hmac.new(self.key, f"{kind}\0{text}".encode(), "sha256").hexdigest()[:16]

    def image(self, row: Record) -> str:
        return "i" + self._hash("image", row.image)

    def patient(self, row: Record) -> str:
        return "p" + self._hash("patient", row.patient)


# --- the folder ---------------------------------------------------------------------------------------------------
def find_root(manifest: Manifest, data_root: str) -> Path:
    """The data folder, if it looks like one; else a DataError that says what to get, where, and what it looks like."""
    tree = _tree(manifest)
    get = f"get it from: {manifest.source} (licence: {manifest.licence}); then DATA_ROOT=<folder that holds {tree}>"
    if manifest.cost:
        get += f"; it will cost: {manifest.cost}"
    if not data_root:
        raise DataError(manifest.title, [f"DATA_ROOT: not given; this dataset is not in the repository -> {get}"])
    root = (paths.ROOT / Path(data_root).expanduser()).resolve()
    if not root.is_dir():
        raise DataError(manifest.title, [f"DATA_ROOT {root}: no such folder -> {get}"])
    problems = Problems(f"{manifest.title} in {root}")
    for name in _text_files(manifest, root):
        try:
            if not paths.inside(root, name).is_file():
                problems.add(name, "missing", get)
        except ValueError:
            problems.add(name, "is a link that leaves the data folder", "put the file itself there")
    if manifest.layout == "nih" and not nih.folders(manifest, root):
        problems.add(" or ".join(manifest.files["images"]), "no such folder", get)
    problems.check()
    return root


def _tree(manifest: Manifest) -> str:
    words = {k: " or ".join(v) if isinstance(v, list) else v for k, v in manifest.files.items()}
    return TREES[manifest.layout].format(**words)


def _text_files(manifest: Manifest, root: Path) -> list[str]:
    """The table (the first of its possible names that is there) and, for NIH, the lists."""
    files = manifest.files
    if manifest.layout == "nih":
        return [files["table"], files["train_val"], files["test"]]
    return [next((name for name in files["table"] if (root / name).is_file()), files["table"][0])]


# --- where the files lie, layout by layout ------------------------------------------------------------------------
def _mimic(sheet: Sheet) -> None:
    """files/p10/p10000000/s50000000/<dicom id>.jpg; the table's image is that path or the bare id. One kind for all."""
    for row in [row for row in sheet.rows if row.image and row.patient and row.study]:
        patient, study = row.patient.removeprefix("p"), row.study.removeprefix("s")
        folder = f"files/p{patient[:2]}/p{patient}/s{study}"
        stem = row.image.rsplit("/", 1)[-1].removesuffix(".jpg").removesuffix(".dcm")
        if ".." in Path(row.image).parts:
            sheet.place(row, [row.image])  # says that it leaves the folder
        elif "/" in row.image and not f"/{row.image}".rsplit("/", 1)[0].endswith(f"/p{patient}/s{study}"):
            sheet.bad(row.line, "image", "path is not that of its patient and study", "correct the row")
        else:
            sheet.place(row, [f"{folder}/{stem}.{kind}" for kind in sheet.manifest.files["kinds"]])
    if len({Path(row.file).suffix for row in sheet.rows if row.file}) > 1:
        remedy = "keep one release, or one entry of files: kinds in the manifest"
        sheet.problems.add("files", "JPG and DICOM are mixed, which look different", remedy)


def _fairgenmed(sheet: Sheet) -> None:
    """<folder of the split>/<name>.npz or .jpg, each folder in two spellings; the NPZ's codes must fit the table.

    A JPG's NPZ stands beside it; a copy that holds only the JPGs is taken too, and then knows no language.
    """
    for row in tqdm(sheet.rows, "finding files", unit="row", disable=not interactive()):
        row.patient = row.image.rsplit(".", 1)[0]
        number = row.patient.rsplit("_", 1)[-1]  # data_00001.npz stands beside slo_fundus_00001.jpg
        stems = dict.fromkeys([row.patient, f"data_{number}", f"slo_fundus_{number}"])
        folders = [folder for split in row.splits for folder in FOLDERS[split]]
        kind = sheet.manifest.files["kinds"][0]
        if row.image:
            sheet.place(row, [f"{folder}/{stem}.{kind}" for folder in folders for stem in stems])
        row.slo = kind == "jpg"
        row.carried = {name: "" for name, _ in sheet.manifest.npz.values() if name not in sheet.manifest.schema.names}
        if row.file and (npz := sheet.find(row, [f"{Path(row.file).parent}/{stem}.npz" for stem in stems])):
            _check_codes(sheet, row, npz)


def _check_codes(sheet: Sheet, row: Record, npz: str) -> None:
    """Numbers of the NPZ -> names; one that contradicts the table is a problem, one without attribute is carried."""
    for name, (attribute, values) in sheet.manifest.npz.items():
        try:
            array = pictures.read_member(sheet.root / npz, name)
            value = values.get(int(array.item())) if array.size == 1 else None
        except (pictures.Unreadable, *pictures.UNREADABLE, TypeError) as error:
            problem = getattr(error, "problem", "truncated or not an NPZ")
            sheet.leave_out(row, "image_errors", "image", problem, "get the file again", f"image {problem}")
            return
        if attribute not in sheet.manifest.schema.names:
            row.carried[attribute] = value or ""
        elif value and row.attributes.get(attribute) and value != row.attributes[attribute]:
            sheet.bad(row.line, attribute, f"contradicts {name} in the NPZ", "correct one of them")


def _chexpert(sheet: Sheet) -> None:
    """The paths of the table start with the release's name, which may also be DATA_ROOT itself."""
    for row in sheet.rows:
        row.splits = {"test"}
        if row.image and not row.patient:
            sheet.bad(row.line, "image", "path names no patient", "use the table of the release, unchanged")
        if not row.reason and "_lateral" in row.image:
            row.reason = "not a frontal view"
        _at_path(sheet, row, [row.image, row.image.split("/", 1)[-1]])


def _folder(sheet: Sheet) -> None:
    for row in sheet.rows:
        _at_path(sheet, row, [row.image])
    if sheet.manifest.split["rule"] == "external":
        for row in sheet.rows:
            row.splits = {"test"}
    elif sheet.manifest.split["rule"] == "by_patient":
        order = _shuffled({row.patient for row in sheet.rows}, sheet.seed)
        n_val, n_test = (round(sheet.manifest.split[f"{name}_share"] * len(order)) for name in ("val", "test"))
        side = dict.fromkeys(order[:n_test], "test") | dict.fromkeys(order[n_test : n_test + n_val], "val")
        for row in sheet.rows:
            row.splits = {side.get(row.patient, "train")}


def _at_path(sheet: Sheet, row: Record, candidates: list[str]) -> None:
    kind = Path(row.image).suffix.lower().lstrip(".").replace("jpeg", "jpg")
    if row.image and kind not in sheet.manifest.files["kinds"]:
        sheet.bad(row.line, "image", "is no image of a declared kind", "see files: kinds in the manifest")
    elif row.image:
        sheet.place(row, candidates)


PLACES: dict[str, Callable[[Sheet], None]] = {
    "nih": nih.place, "mimic": _mimic, "fairgenmed": _fairgenmed, "chexpert": _chexpert, "folder": _folder,
}  # fmt: skip


def _check_any_image(sheet: Sheet) -> None:
    """DataError where the folder has none of the table's images: one line before those of each image, if any.

    NIH's image folders have been looked for already (`find_root`), and say themselves what is wrong with them.
    """
    if sheet.manifest.layout != "nih" and 0 < sheet.missing == len(sheet.rows):
        remedy = f"DATA_ROOT must be the folder that holds {_tree(sheet.manifest)}"
        line = f"files: none of the {sheet.missing} images of {sheet.table} is there -> {remedy}"
        raise DataError(sheet.problems.title, [line, *sheet.problems.lines])


# --- splits and tasks ---------------------------------------------------------------------------------------------
def _shuffled(patients: set[str], seed: int) -> list[str]:
    return sorted(sorted(patients), key=lambda p: hashlib.sha256(f"{seed}/{p}".encode()).digest())


def assign(sheet: Sheet, rows: list[Record]) -> tuple[dict[str, list[Record]], list[Record]]:
    """{split: rows} and the rows left out. Images of held-out cells become zero_shot; the other images of those
    patients must not be trained on."""
    manifest = sheet.manifest
    held = {row.line for row in rows if manifest.schema.encode(row.attributes) in manifest.held_out}
    gone = {row.patient for row in rows if row.line in held}
    seen = [row for row in rows if row.line not in held and row.splits != {"test"}]
    left_out = [row for row in seen if row.patient in gone]
    seen = [row for row in seen if row.patient not in gone]
    if manifest.split["rule"] == "official_lists":
        order = _shuffled({row.patient for row in seen}, sheet.seed)
        val = set(order[: round(manifest.split["val_share"] * len(order))])
    else:
        val = {row.patient for row in seen if row.splits == {"val"}}
    splits = {
        "train": [row for row in seen if row.patient not in val],
        "val": [row for row in seen if row.patient in val],
        "test": [row for row in rows if row.splits == {"test"} and row.line not in held],
        "zero_shot": [row for row in rows if row.line in held],
    }
    needed = ("test",) if manifest.split["rule"] == "external" else ("train", "val", "test")
    if empty := [split for split in needed if not splits[split]]:
        reasons = Counter(row.reason for row in sheet.rows if row.reason).most_common(3)
        gone = f" (left out: {', '.join(f'{n} {reason}' for reason, n in reasons)})" if reasons else ""
        remedy = "use a larger part of the release"
        raise DataError(manifest.title, [f"split {split}: no images left{gone} -> {remedy}" for split in empty])
    return splits, left_out


def _tasks(splits: dict[str, list[Record]], sheet: Sheet, names: Names, size: int) -> Iterator[Task]:
    """Rows of each split in the order of their new names, which says nothing about the source's order."""
    manifest = sheet.manifest
    index = {cell: i for i, cell in enumerate(manifest.schema.cells())}
    for split, rows in splits.items():
        for row in sorted(rows, key=names.image):
            cell = manifest.schema.encode(row.attributes)
            sample = {"id": names.image(row), "patient": names.patient(row), "split": split}
            sample |= {"held_out": int(cell in manifest.held_out), "cell": index[cell], "age_years": row.age_years}
            sample |= manifest.schema.decode(cell) | {"findings": row.findings or manifest.describe(row.labels)}
            sample |= row.carried | {f"y_{label}": value for label, value in row.labels.items()}
            file = sheet.root / row.file
            state = file.stat()
            made_from = [sample, row.file, state.st_size, state.st_mtime_ns]
            yield Task(split, made_from, partial(_load, sample, file, size, row.slo, manifest, sheet.where(row)))


def _load(sample: dict, file: Path, size: int, slo: bool, manifest: Manifest, where: str) -> tuple[dict, np.ndarray]:
    try:
        return sample, pictures.load_square(file, size, slo)
    except pictures.Unreadable as error:
        if manifest.image_errors == "exclude":
            raise Rejected(sample["id"], f"image {error.problem}", where) from None
        raise DataError(manifest.title, [f"{where}, image file: changed while it was read -> run again"]) from None
