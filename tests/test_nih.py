"""The NIH layout: invented releases with one or several defects, and the real part where it is present."""

import csv
import json
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from compdiff import datasets, paths, sheet
from compdiff.config import DataConfig
from compdiff.manifests import load_manifest
from compdiff.problems import DataError

TINY = DataConfig(size=32, train_n=60, val_n=12, test_per_cell=1)
REAL = paths.ROOT.parent / "shared" / "data" / "nih-cxr14-64"
HEADER = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Sex", "View Position"]


def _files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def _picture(path, seed, shape=(20, 20), mode="L"):
    grey = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(grey).convert(mode).save(path)


class Tree:
    """An invented release: 12 train_val patients and 4 test patients, two images each."""

    def __init__(self, root):
        self.root, self.rows = Path(root), []
        (self.root / "images").mkdir(parents=True)
        lists = {"train_val_list.txt": [], "test_list.txt": []}
        for n in range(16):
            patient, sex = 90_770_000 + n, "MF"[n % 2]
            for k in range(2):
                image = f"{patient}_{k:03d}.png"
                held_out = n in (1, 13) and k == 0
                view = "AP" if held_out or (sex == "M" and (n + k) % 5 == 4) else "PA"
                age = 50 if held_out else 25 + 4 * n + k
                self.rows.append([image, ("No Finding", "Effusion|Mass")[k], str(k), str(patient), str(age), sex, view])
                lists["test_list.txt" if n >= 12 else "train_val_list.txt"].append(image)
                _picture(self.root / "images" / image, 2 * n + k)
        self.lists = lists
        self.header = list(HEADER)

    def write(self):
        with open(self.root / "Data_Entry_2017_v2020.csv", "w", newline="") as file:
            csv.writer(file).writerows([self.header, *self.rows])
        for name, images in self.lists.items():
            (self.root / name).write_text("\n".join(images) + "\n")
        return self

    def set(self, row, column, value):
        """`row` as a report counts it: the header is row 1."""
        self.rows[row - 2][HEADER.index(column)] = value

    def image(self, row):
        return self.root / "images" / self.rows[row - 2][0]

    def secrets(self):
        ids = {row[3] for row in self.rows if row[3]}
        return ids | {row[0] for row in self.rows if any(i in row[0] for i in ids)}


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "release")


def _prepare(tree, manifest="nih", size=16, seed=0):
    tree.write()
    out = tree.root.parent / "out" / "data"
    datasets.prepare(manifest, out, DataConfig(size=size, data_seed=seed), str(tree.root))
    return datasets.load(out)


def _refused(tree):
    """Lines of the one report; nothing was written and nobody was named."""
    with pytest.raises(DataError) as caught:
        _prepare(tree)
    assert not (tree.root.parent / "out").exists()
    assert not any(secret in str(caught.value) for secret in tree.secrets())
    assert caught.value.__cause__ is None
    return caught.value.problems


def test_nih_tree(tree):
    data = _prepare(tree)
    table = data.table
    assert data.index["images"] == {"train": 20, "val": 2, "test": 7, "zero_shot": 2}
    assert set(table[table["held_out"] == 1]["split"]) == {"zero_shot"}
    assert (
        table[table["split"] == "zero_shot"][["age", "sex", "view"]].to_numpy().tolist()
        == [["40-60", "Female", "AP"]] * 2
    )
    assert [e["reason"] for e in data.index["excluded"]] == ["other image of a patient in a held-out cell"]
    parts = {s: set(table["patient"][table["split"] == s]) for s in ("train", "val", "test", "zero_shot")}
    assert not parts["train"] & parts["val"] and not (parts["train"] | parts["val"]) & (
        parts["test"] | parts["zero_shot"]
    )
    assert len(parts["test"] & parts["zero_shot"]) == 1  # the test patient in the cell keeps the other image in test
    assert set(table["findings"]) == {"No finding.", "Effusion, Mass."}
    assert (table["y_Effusion"] == table["y_Mass"]).all() and (table["y_Effusion"] + table["y_No Finding"] == 1).all()


def test_nih_images_are_padded_and_resized(tree):
    wide = np.full((16, 32), 200, np.uint8)
    for row, mode in enumerate(("L", "RGB", "RGBA", "LA", "P"), 6):
        Image.fromarray(wide).convert(mode).save(tree.image(row))
    images = _prepare(tree, size=32).images()
    padded = [i for i in images if not i[:8].any() and not i[24:].any() and (i[8:24] == 200).all()]
    assert len(padded) == 5
    _picture(tree.image(2), 3, (40, 40))
    expected = np.asarray(Image.open(tree.image(2)).resize((16, 16), Image.Resampling.LANCZOS))
    assert any(np.array_equal(expected, image) for image in _prepare(tree).images())


def test_nih_names_leak_nothing(tree, capfd):
    data = _prepare(tree)
    everything = b"\n".join(_files(tree.root.parent / "out").values()) + str(sorted(_files(data.folder))).encode()
    names = " ".join(str(p) for p in (tree.root.parent / "out").rglob("*"))
    captured = capfd.readouterr()
    for secret in tree.secrets():
        assert secret.encode() not in everything and secret not in names + captured.out + captured.err
    assert b"Effusion" in everything  # the search can find what is there
    pairs = data.table.groupby("patient").size()
    assert len(pairs) == 16 and pairs.max() == 2


def test_nih_names_need_the_table_and_are_stable(tree, tmp_path):
    first = _prepare(tree).table
    copy = Tree(tmp_path / "elsewhere" / "release")
    assert _prepare(copy).index["sha256"] == datasets.load(tree.root.parent / "out" / "data").index["sha256"]
    tree.set(2, "Follow-up #", "7")
    assert not set(_prepare(tree).table["id"]) & set(first["id"])


def test_nih_validation_patients_depend_on_the_seed_only(tree):
    chosen = [frozenset(_prepare(tree, seed=s).rows("val")["patient"]) for s in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1] and len(set(chosen)) > 1


def test_nih_other_official_forms(tree):
    """The 2020 table's other header, spare columns, a BOM, and twelve image folders."""
    tree.header = [*("Patient Gender" if h == "Patient Sex" else h for h in HEADER), "OriginalImage[Width", "Height]"]
    tree.rows = [[*row, "2500", "2048"] for row in tree.rows]
    for row in tree.rows:
        folder = tree.root / f"images_{int(row[2]) + 1:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (tree.root / "images" / row[0]).rename(folder / row[0])
    (tree.root / "images").rmdir()
    tree.write()
    table = tree.root / "Data_Entry_2017_v2020.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    tree.write = lambda: tree
    assert len(_prepare(tree).table) == 31


DEFECTS = {
    "no column": (lambda t: t.header.__setitem__(4, "Age"), "row 1, column Patient Age: 0 such columns"),
    "two columns": (lambda t: t.header.__setitem__(2, "Patient Age"), "row 1, column Patient Age: 2 such columns"),
    "short row": (lambda t: t.rows[3].pop(), "row 5: 6 fields, the header has 7"),
    "unknown sex": (lambda t: t.set(5, "Patient Sex", "X"), "row 5, column Patient Sex: unknown category"),
    "unknown view": (lambda t: t.set(5, "View Position", "LATERAL"), "row 5, column View Position: unknown category"),
    "missing view": (lambda t: t.set(5, "View Position", ""), "row 5, column View Position: missing"),
    "unknown label": (lambda t: t.set(5, "Finding Labels", "Mass|Cold"), "row 5, column Finding Labels: unknown label"),
    "missing label": (lambda t: t.set(5, "Finding Labels", ""), "row 5, column Finding Labels: missing"),
    "contradiction": (
        lambda t: t.set(5, "Finding Labels", "Mass|No Finding"),
        "row 5, column Finding Labels: No Finding beside",
    ),
    "missing age": (lambda t: t.set(5, "Patient Age", ""), "row 5, column Patient Age: missing"),
    "negative age": (lambda t: t.set(5, "Patient Age", "-1"), "row 5, column Patient Age: outside 0-120"),
    "age 414": (lambda t: t.set(5, "Patient Age", "414"), "row 5, column Patient Age: outside 0-120"),
    "age in words": (lambda t: t.set(5, "Patient Age", "058Y"), "row 5, column Patient Age: is not a whole number"),
    "age nan": (lambda t: t.set(5, "Patient Age", "nan"), "row 5, column Patient Age: is not a whole number"),
    "no patient": (lambda t: t.set(5, "Patient ID", ""), "row 5, column Patient ID: missing"),
    "no image name": (lambda t: t.set(5, "Image Index", ""), "row 5, column Image Index: missing"),
    "same image twice": (lambda t: t.rows.append(t.rows[4]), "row 34, column Image Index: same image as row 6"),
    "two sexes": (lambda t: t.set(5, "Patient Sex", "M"), "row 5, column Patient Sex: differs from row 4"),
    "in both lists": (
        lambda t: t.lists["test_list.txt"].append(t.rows[4][0]),
        "row 6, column Image Index: image is in both lists",
    ),
    "in no list": (lambda t: t.lists["test_list.txt"].pop(), "row 33, column Image Index: image is in neither list"),
    "patient in two splits": (
        lambda t: t.lists["test_list.txt"].append(t.lists["train_val_list.txt"].pop()),
        "row 25, column Patient ID: patient in two splits; see row 24",
    ),
    "unknown in list": (
        lambda t: t.lists["test_list.txt"].append("90779999_000.png"),
        "test_list.txt, line 9: names an image",
    ),
    "twice in list": (
        lambda t: t.lists["test_list.txt"].append(t.lists["test_list.txt"][0]),
        "test_list.txt, line 9: same image",
    ),
    "image missing": (lambda t: t.image(5).unlink(), "row 5, column Image Index: image missing"),
    "truncated": (
        lambda t: t.image(5).write_bytes(t.image(5).read_bytes()[:200]),
        "row 5, column Image Index: truncated",
    ),
    "empty file": (lambda t: t.image(5).write_bytes(b""), "row 5, column Image Index: truncated or not a PNG"),
    "a JPEG inside": (
        lambda t: Image.open(t.image(5)).save(t.image(5), "JPEG"),
        "row 5, column Image Index: truncated or not",
    ),
    "placeholder": (lambda t: _picture(t.image(5), 0, (1, 1)), "row 5, column Image Index: 1x1 pixels"),
    "16 bits": (lambda t: _picture(t.image(5), 0, mode="I;16"), "row 5, column Image Index: mode I;16"),
    "escaping path": (lambda t: t.set(5, "Image Index", "../../etc/passwd"), "row 5, column Image Index: path leaves"),
    "absolute path": (lambda t: t.set(5, "Image Index", "/etc/passwd"), "row 5, column Image Index: path leaves"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_nih_defect(tree, defect):
    spoil, says = DEFECTS[defect]
    spoil(tree)
    lines = _refused(tree)
    assert any(says in line for line in lines), lines
    assert all(" -> " in line for line in lines)


def test_nih_links_that_lead_out(tree):
    outside = tree.root.parent / "outside"
    outside.mkdir()
    tree.image(5).rename(outside / "secret.png")
    tree.image(5).symlink_to(outside / "secret.png")
    assert any("row 5, column Image Index: image is a link that leaves" in line for line in _refused(tree))
    (tree.root / "images").rename(outside / "images")
    (tree.root / "images").symlink_to(outside / "images")
    assert _refused(tree)[0].startswith("images/: is a link that leaves the data folder")


def test_nih_all_defects_in_one_report(tree):
    tree.set(5, "Patient Age", "414")
    tree.set(9, "Patient Sex", "X")
    tree.image(12).unlink()
    _picture(tree.image(15), 0, (1, 1))
    tree.lists["test_list.txt"].append("90779999_000.png")
    lines = _refused(tree)
    assert len(lines) == 5
    for number, part in enumerate(("row 5, column Patient Age", "row 9", "row 12", "line 9", "row 15")):
        assert part in lines[number]


def test_nih_wrong_ages_can_be_left_out_by_declaration(tree, tmp_path):
    tree.set(6, "Patient Age", "414")
    text = load_manifest("nih").text
    assert "age_errors: report" in text
    (tmp_path / "nih.yaml").write_text(text.replace("age_errors: report", "age_errors: exclude"))
    data = _prepare(tree, tmp_path / "nih.yaml")
    assert len(data.table) == 30 and "age outside 0-120 years" in [e["reason"] for e in data.index["excluded"]]
    tree.set(6, "Patient Age", "")
    with pytest.raises(DataError, match="row 6, column Patient Age: missing"):
        _prepare(tree, tmp_path / "nih.yaml")


def test_nih_file_that_changes_while_it_is_read(tree, monkeypatch):
    tree.write()
    monkeypatch.setattr(sheet, "image_problem", lambda path, slo: None)
    tree.image(6).write_bytes(b"gone")
    with pytest.raises(DataError) as caught:
        _prepare(tree)
    assert caught.value.problems == [
        "Data_Entry_2017_v2020.csv, row 6, image file: changed while it was read -> run again"
    ]
    assert [p.name for p in (tree.root.parent / "out").iterdir()] == [".data.lock"]


def test_nih_without_its_data_says_what_to_get(tmp_path):
    start = time.process_time()
    (tmp_path / "images").mkdir()
    for root, says in (
        ("", "not given"),
        ("/no/such/folder", "no such folder"),
        (str(tmp_path), "Data_Entry_2017_v2020.csv: missing"),
    ):
        with pytest.raises(DataError) as caught:
            datasets.prepare("nih", tmp_path / "out" / "data", TINY, root)
        text = str(caught.value)
        for part in (says, "NIH Clinical Center", "ChestX-ray14", "train_val_list.txt", "images_*/images", "DATA_ROOT"):
            assert part in text
    assert time.process_time() - start < 3 and not (tmp_path / "out").exists()


# --- the real part ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="skipped: no real data")
def test_real_nih_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative DATA_ROOT starts at the repository, wherever a notebook runs
    datasets.prepare("nih", tmp_path / "data", DataConfig(), os.path.relpath(REAL, paths.ROOT))
    data = datasets.load(tmp_path / "data")
    raw = pd.read_csv(REAL / "Data_Entry_2017_v2020.csv")
    raw["test"] = raw["Image Index"].isin((REAL / "test_list.txt").read_text().split())
    cell = raw["Patient Age"].between(40, 59) & (raw["Patient Sex"] == "F") & (raw["View Position"] == "AP")
    left_out = ~cell & ~raw["test"] & raw["Patient ID"].isin(raw["Patient ID"][cell])
    images = data.index["images"]
    assert images["zero_shot"] == cell.sum() == 135 and len(data.index["excluded"]) == left_out.sum()
    assert images["test"] == (raw["test"] & ~cell).sum() == 150
    assert images["train"] + images["val"] == (~raw["test"] & ~cell & ~left_out).sum() == 430
    patients = data.index["patients"]
    assert patients["val"] == round(0.12 * (patients["train"] + patients["val"]))
    used = raw[~left_out]
    assert data.table["y_Effusion"].sum() == used["Finding Labels"].str.contains("Effusion").sum()
    assert data.table["age_years"].sum() == used["Patient Age"].sum()
    real = {np.asarray(Image.open(REAL / "images" / n).convert("L")).tobytes() for n in used["Image Index"]}
    assert {image.tobytes() for image in data.images()} == real
    text = "".join((tmp_path / "data" / n).read_text() for n in ("samples.csv", "index.json"))
    assert not any(name in text for name in raw["Image Index"]) and json.loads(
        (tmp_path / "data/index.json").read_text()
    )
