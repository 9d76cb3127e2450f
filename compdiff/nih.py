"""What only the official layout of NIH ChestX-ray14 has: two lists of image names, and folders of PNG files."""

from __future__ import annotations

import os
from pathlib import Path

from compdiff.manifests import Manifest
from compdiff.sheet import Sheet


def place(sheet: Sheet) -> None:
    """Sets `file` and `splits` (train_val, test) of the sheet's rows."""
    _find_images(sheet)
    for name in ("train_val", "test"):
        _read_list(sheet, name)
    lists = f"{sheet.manifest.files['train_val']} and {sheet.manifest.files['test']}"
    for row in sheet.rows:
        if row.image and len(row.splits) != 1:
            problem = "image is in both lists" if row.splits else "image is in neither list"
            sheet.bad(row.line, "image", problem, f"name it in exactly one of {lists}")


def folders(manifest: Manifest, root: Path) -> list[Path]:
    return sorted({folder for pattern in manifest.files["images"] for folder in root.glob(pattern) if folder.is_dir()})


def _find_images(sheet: Sheet) -> None:
    """The one file of that name in the image folders, inside the root."""
    where: dict[str, list[str]] = {}
    for folder in folders(sheet.manifest, sheet.root):
        if not folder.resolve().is_relative_to(sheet.root):
            remedy = "put the folder itself there, or set DATA_ROOT to where it is"
            name = folder.relative_to(sheet.root)
            sheet.problems.add(f"{name}/", "is a link that leaves the data folder", remedy)
            continue
        for item in os.scandir(folder):
            where.setdefault(item.name, []).append(str((folder / item.name).relative_to(sheet.root)))
    for row in sheet.rows:
        found = where.get(row.image, [])
        if not row.image:
            continue
        if Path(row.image).name != row.image or "\\" in row.image:
            sheet.bad(row.line, "image", "path leaves the image folders", "give the bare file name")
        elif len(found) > 1:
            sheet.bad(row.line, "image", "image in several folders", "keep one copy")
        else:
            sheet.place(row, found)


def _read_list(sheet: Sheet, name: str) -> None:
    """Adds `name` to the splits of the rows that one list of image names holds."""
    file, by_name = sheet.manifest.files[name], {row.image: row for row in sheet.rows if row.image}
    if not by_name:  # already reported
        return
    first: dict[str, int] = {}
    text = (sheet.root / file).read_text(encoding="utf-8", errors="replace")
    for line, entry in enumerate(text.splitlines(), 1):
        image = entry.strip()
        if image and image not in by_name:
            problem = f"names an image that {sheet.table} does not have"
            sheet.problems.add(f"{file}, line {line}", problem, "use table and lists of one release")
        elif image and first.setdefault(image, line) != line:
            sheet.problems.add(f"{file}, line {line}", f"same image as line {first[image]}", "keep one of them")
        elif image:
            by_name[image].splits.add(name)
