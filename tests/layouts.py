"""A skeleton of a real layout, to spoil (test_adapters.py) and to prepare (test_preparation.py)."""

import csv
from pathlib import Path

import pytest
import yaml

from compdiff import datasets, paths
from compdiff.config import DataConfig
from compdiff.problems import DataError

LAYOUTS = ("mimic", "fairgenmed", "chexpert", "folder")
SALT = "a salt for tests, not a secret"
SIZE = 64


class Tree:
    """A copy of a skeleton and of its manifest, to spoil."""

    def __init__(self, dataset, root, kind=""):
        self.raw = yaml.safe_load((paths.MANIFESTS / f"{dataset}.yaml").read_text())
        if dataset == "fairgenmed" and kind:
            self.raw["files"]["kinds"] = [kind]
        self.root, self.dataset = root, dataset
        self.file = root / self.raw["files"]["table"][0]
        with open(self.file, newline="") as file:
            reader = csv.DictReader(file)
            self.rows, self.header = list(reader), list(reader.fieldnames)

    def head(self, name):
        entry = self.raw["columns"].get(name) or self.raw["label_columns"][name]
        return entry.get("header", [name])[0]

    def set(self, row, name, text):
        """`row` as a report counts it: the header is row 1."""
        self.rows[row - 2][self.head(name)] = text

    def image(self, row):
        text = self.rows[row - 2][self.head("image")]
        stem = text.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        if self.dataset == "fairgenmed" and self.raw["files"]["kinds"] == ["jpg"]:  # it stands beside the NPZ
            stem = stem.replace("data", "slo_fundus")
        (found,) = [p for p in self.root.rglob(f"{stem}.*") if self.dataset != "chexpert" or str(p).endswith(text)]
        return found

    def modes(self, mode):
        self.raw |= dict.fromkeys(("age_errors", "category_errors", "image_errors"), mode)

    def prepare(self, out=None, **given):
        with open(self.file, "w", newline="") as file:
            writer = csv.DictWriter(file, self.header, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        manifest = self.root.parent / f"{self.dataset}.yaml"
        manifest.write_text(yaml.safe_dump(self.raw, sort_keys=False))
        out = out or self.root.parent / "out" / "data"
        datasets.prepare(manifest, out, DataConfig(size=SIZE), str(self.root), **{"salt": SALT} | given)
        return datasets.load(out)

    def refused(self):
        """Lines of the one report; nothing was written and nobody was named."""
        self.modes("report")
        with pytest.raises(DataError) as caught:
            self.prepare()
        assert not (self.root.parent / "out").exists()
        assert not [name for name in self.identifiers() if name in str(caught.value)]
        return caught.value.problems

    def identifiers(self):
        names = {p.stem for p in self.root.rglob("*") if p.is_file() and p.suffix not in (".csv", ".txt")}
        heads = [self.head(n) for n in ("image", "patient", "study") if n in self.raw["columns"]]
        names |= {part for row in self.rows for head in heads for part in row[head].split("/")[-4:]}
        return {n for n in names if any(c.isdigit() for c in n) and len(n) > 6 and not n.startswith("view")}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
