"""Layouts of real data, on skeleton trees: what is read, refused and left out, and that nobody is named."""

import csv
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from compdiff import datasets, parts, paths, run, shards, skeleton
from compdiff.config import DataConfig
from compdiff.manifests import load_manifest
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


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    made = {}
    for dataset, kind in [*((d, "") for d in LAYOUTS), ("mimic", "dcm")]:
        made[dataset, kind] = skeleton.write(dataset, tmp_path_factory.mktemp(dataset) / "tree", kind)
    made["fairgenmed", "jpg"] = made["fairgenmed", ""]
    return made


@pytest.fixture
def copy(trees, tmp_path):
    def make(dataset, kind=""):
        shutil.copytree(trees[dataset, kind], tmp_path / dataset / "tree")
        return Tree(dataset, tmp_path / dataset / "tree", kind)

    return make


def _bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# --- what is read ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dataset, kind", [*((d, "") for d in LAYOUTS), ("mimic", "dcm"), ("fairgenmed", "jpg")])
def test_a_tree_in_the_layout_is_read(copy, dataset, kind, capfd):
    tree = copy(dataset, kind)
    data = tree.prepare()
    table, manifest = data.table, data.manifest
    reasons = [entry["reason"] for entry in data.index["excluded"]]
    assert len(table) + len(reasons) == len(tree.rows) == len(pd.read_csv(tree.file))
    assert set(table[table["held_out"] == 1]["split"]) == {"zero_shot"} == set(table["split"][table["held_out"] == 1])
    sides = table.assign(split=table["split"].replace({"zero_shot": "test"})).groupby("patient")["split"].nunique()
    assert sides.max() == 1
    wanted = {"test", "zero_shot"} if dataset == "chexpert" else {"train", "val", "test", "zero_shot"}
    assert set(table["split"]) == wanted
    assert sum(reason.endswith("missing, or none of the categories") for reason in reasons) == 1
    assert ("not a frontal view" in reasons) == (dataset in ("mimic", "chexpert"))
    assert pd.read_csv(data.folder / "rejects.csv").to_dict("records") == data.index["excluded"]
    # nobody is named: neither in bytes nor in names, nor on the screen
    everything = b"\n".join(_bytes(tree.root.parent / "out").values())
    said = "".join(capfd.readouterr()) + " ".join(str(p) for p in (tree.root.parent / "out").rglob("*"))
    assert tree.identifiers() and not [n for n in tree.identifiers() if n.encode() in everything or n in said]
    assert data.images().std(axis=(1, 2)).min() > 10 and manifest.access == "credentialed"


@pytest.mark.parametrize("dataset", ["mimic", "chexpert"])
def test_labels_are_what_the_table_says(copy, dataset):
    tree = copy(dataset)
    tree.set(2, "Fracture", "-1.0")
    tree.set(2, "Edema", "1.0")
    data = tree.prepare()
    raw = pd.read_csv(tree.file)
    frontal = raw[tree.head("frontal")] != {"mimic": "LATERAL", "chexpert": "Lateral"}[dataset]
    raw = raw[frontal & (np.arange(len(raw)) < len(raw) - 1)]  # the last one names no race
    others = [n for n in data.label_names if n != "No Finding"]
    wanted = (raw[others] == 1).astype(int)
    kept = data.table[[f"y_{n}" for n in others]].sum()
    assert (len(data.table) == len(raw)) and kept.tolist() == wanted.sum().tolist() and kept["y_Edema"] == 1
    assert kept["y_Fracture"] == 0, "-1 is uncertain, and counts as 0"
    assert data.table["y_No Finding"].sum() == (wanted.sum(axis=1) == 0).sum() > 0
    assert data.table["age_years"].sum() == raw[tree.head("age")].sum()


def test_dicom_and_jpg_show_the_same_picture(copy, tmp_path):
    jpg, dcm = copy("mimic").prepare(tmp_path / "jpg"), None
    shutil.rmtree(tmp_path / "mimic")
    dcm = copy("mimic", "dcm").prepare(tmp_path / "dcm")
    assert jpg.table.equals(dcm.table), "the same names under the same salt"
    assert np.abs(jpg.images().astype(int) - dcm.images()).mean(axis=(1, 2)).max() < 2, "MONOCHROME1 is inverted"


def test_fairgenmed_jpg_is_turned_upright_and_scaled(copy, tmp_path):
    npz = copy("fairgenmed").prepare(tmp_path / "npz")
    shutil.rmtree(tmp_path / "fairgenmed")
    jpg = copy("fairgenmed", "jpg").prepare(tmp_path / "jpg")
    assert npz.table["id"].tolist() == jpg.table["id"].tolist()
    narrow = round(SIZE * 512 / 664)
    left = (SIZE - narrow) // 2
    for wanted, found in zip(npz.images(), jpg.images(), strict=True):
        middle = np.asarray(Image.fromarray(found[:, left : left + narrow]).resize((SIZE, SIZE)))
        inner = slice(SIZE // 5, -SIZE // 5)  # without the dark frame, which looks the same whichever way it is turned
        turned = [np.rot90(middle, k)[inner, inner].ravel() for k in range(4)]
        likeness = [np.corrcoef(wanted[inner, inner].ravel(), picture)[0, 1] for picture in turned]
        assert likeness[0] > 0.85 > 0.7 > max(likeness[1:])
        assert not found[:, : left - 3].any() and found.max() > 200


def test_fairgenmed_codes_are_mapped_by_name_and_both_spellings_are_found(copy):
    tree = copy("fairgenmed")
    for old, new in (("Training", "train"), ("Validation", "val"), ("Test", "test")):
        (tree.root / old).rename(tree.root / new)
    for row in range(2, len(tree.rows) + 1):  # the code of each row's category, in FairGenMed's own order
        text = tree.rows[row - 2]["race"]
        code = {"Asian": "0", "Black": "1", "White": "2", "Black or African American": "1", "White or Caucasian": "2"}
        tree.set(row, "race", code.get(text, text))
    raw = pd.DataFrame(tree.rows[:-1])
    table = tree.prepare().table
    wanted = raw["race"].map({"0": "Asian", "1": "Black", "2": "White"}).value_counts().to_dict()
    assert table["race"].value_counts().to_dict() == wanted and table["language"].eq("English").all()


def test_non_hispanic_is_not_hispanic(copy):
    tree = copy("chexpert")
    for row in tree.rows:
        row["ETHNICITY"] = "Non-Hispanic/Non-Latino" if row["ETHNICITY"] != "Other" else "Other"
        row["PRIMARY_RACE"] = "White, non-Hispanic" if row["ETHNICITY"] != "Other" else "Other"
    assert set(tree.prepare().table["race"]) == {"White"}
    for row in tree.rows[:2]:  # one patient
        row["ETHNICITY"] = "hispanic/latino "
    assert "Hispanic" in set(tree.prepare().table["race"]), "of any race"


def test_mimic_sentences_become_prompts_and_may_not_name_anybody(copy):
    tree = copy("mimic")
    tree.set(2, "findings", " Large  left\npneumothorax. ")
    assert "Large left pneumothorax." in set(tree.prepare().table["findings"])
    shutil.rmtree(tree.root.parent / "out")
    tree.set(2, "findings", f"Patient {tree.rows[0]['subject_id']} has no finding.")
    assert any("row 2, column final_sentence: repeats an identifier" in line for line in tree.refused())


# --- what is refused ------------------------------------------------------------------------------------------------
def _rename(tree, name):
    tree.header[tree.header.index(tree.head(name))] = "something else"


def _escape(tree):
    text = tree.rows[0][tree.head("image")]
    tree.set(2, "image", f"../tree/{text}")


def _truncate(tree):
    tree.image(2).write_bytes(tree.image(2).read_bytes()[:900])


def _placeholder(tree):
    path = tree.image(2)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            content = dict(arrays) | {"slo_fundus": np.zeros((1, 1, 3), np.uint8)}
        np.savez(path, **content)
    else:
        Image.new("L", (1, 1)).save(path)


def _two_sexes(tree):
    if tree.dataset == "fairgenmed":  # one row per subject: the id stands twice
        tree.rows.insert(1, tree.rows[0] | {tree.head("sex"): "M" if tree.rows[0][tree.head("sex")] == "F" else "F"})
    else:
        texts = {"Male": "Female", "M": "F", "Female": "Male", "F": "M"}
        tree.set(3, "sex", texts[tree.rows[0][tree.head("sex")]])


DEFECTS = {
    "wrong column": (lambda t: _rename(t, "age"), "row 1, column"),
    "age -3": (lambda t: t.set(2, "age", "-3"), "outside 0-120 years"),
    "age 217": (lambda t: t.set(2, "age", "217"), "outside 0-120 years"),
    "unknown race": (lambda t: t.set(2, "race", "Martian"), "unknown category"),
    "Non-Hispanic as race": (lambda t: t.set(2, "race", "Non-Hispanic"), "unknown category"),
    "OTHER": (lambda t: t.set(2, "race", "OTHER"), "missing, or none of the categories"),
    "no race": (lambda t: t.set(2, "race", ""), "missing"),
    "one id, two sexes": (_two_sexes, "row"),
    "path with ..": (_escape, "path leaves the data folder"),
    "truncated": (_truncate, "truncated or not"),
    "1x1": (_placeholder, "1x1 pixels: a placeholder"),
    "missing image": (lambda t: t.image(2).unlink(), "image missing"),
}
LET_GO = {
    "age -3": "age outside 0-120 years", "age 217": "age outside 0-120 years", "truncated": "image truncated",
    "OTHER": "race missing, or none of the categories", "no race": "race missing, or none of the categories",
    "1x1": "image 1x1 pixels: a placeholder", "missing image": "image missing",
}  # fmt: skip


@pytest.mark.parametrize("dataset", LAYOUTS)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_refused_or_left_out(copy, dataset, defect):
    tree = copy(dataset)
    if dataset == "chexpert":  # its race counts where the ethnicity does not decide
        tree.rows[0]["ETHNICITY"] = "Non-Hispanic/Non-Latino"
    spoil, says = DEFECTS[defect]
    if defect in LET_GO:
        tree.modes("exclude")
        whole = tree.prepare(tree.root.parent / "whole")
    spoil(tree)
    if defect in LET_GO:
        data = tree.prepare(tree.root.parent / "less")
        new = pd.Series([e["reason"] for e in data.index["excluded"]]).value_counts()
        old = pd.Series([e["reason"] for e in whole.index["excluded"]]).value_counts()
        found = (new.sub(old, fill_value=0)).loc[lambda s: s > 0]
        assert len(found) == 1 and found.index[0].startswith(LET_GO[defect]) and found.iloc[0] == 1
        assert len(data.table) == len(whole.table) - 1
    lines = tree.refused()
    wanted = {"one id, two sexes": "row 3"}.get(defect, "row")
    assert any(says in line and wanted in line and " -> " in line for line in lines), lines


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_link_that_leads_out_is_refused(copy, dataset):
    tree = copy(dataset)
    path, outside = tree.image(2), tree.root.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    tree.raw["image_errors"] = "exclude"  # not even then
    with pytest.raises(DataError, match="link that leaves the data folder"):
        tree.prepare()


def test_an_npz_is_never_unpickled(copy):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    tree = copy("fairgenmed")
    for number, name in enumerate(("slo_fundus", "race"), 2):
        with np.load(tree.image(number)) as arrays:
            content = dict(arrays) | {name: np.array([Boom()], dtype=object)}
        np.savez(tree.image(number), **content)
    lines = tree.refused()
    assert any("row 2" in line and "array slo_fundus holds objects" in line for line in lines), lines
    assert any("row 3" in line and "array race holds objects" in line for line in lines), lines


def test_an_npz_that_contradicts_the_table_is_refused(copy):
    tree = copy("fairgenmed")
    with np.load(tree.image(2)) as arrays:
        content = dict(arrays)
    np.savez(tree.image(2), **content | {"race": (int(content["race"]) + 1) % 3})
    assert any("row 2, column race: contradicts race in the NPZ" in line for line in tree.refused())


def test_mimic_patients_and_paths_must_agree(copy):
    tree = copy("mimic")
    tree.set(3, "split", "test")  # the second image of the first patient
    tree.set(5, "image", f"files/p99/p99000000/s99000099/{tree.rows[3]['image']}.jpg")
    lines = tree.refused()
    assert any("row 3, column subject_id: patient in two splits; see row 2" in line for line in lines)
    assert any("row 5, column image: path is not that of its patient and study" in line for line in lines)


def test_mimic_takes_paths_for_ids_and_one_kind_of_image(copy):
    tree = copy("mimic")
    wanted = tree.prepare().table
    for n, row in enumerate(tree.rows, 2):
        row["image"] = f"2.1.0/{tree.image(n).relative_to(tree.root)}"
    found = tree.prepare().table
    assert len(found) == len(wanted) and sorted(found["age_years"]) == sorted(wanted["age_years"])
    path = tree.image(2)
    path.unlink()
    skeleton.save_dicom(np.full((32, 32), 99, np.uint16), path.with_suffix(".dcm"), "MONOCHROME2")
    shutil.rmtree(tree.root.parent / "out")
    assert any("JPG and DICOM are mixed" in line for line in tree.refused())


def test_an_unlisted_error_is_an_error_even_where_rows_are_let_go(copy):
    tree = copy("mimic")
    tree.modes("exclude")
    tree.set(2, "race", "Martian")
    with pytest.raises(DataError, match="row 2, column ethnicity: unknown category"):
        tree.prepare()


def test_all_defects_come_in_one_report(copy):
    tree = copy("folder")
    tree.set(2, "age", "217")
    tree.set(4, "race", "Martian")
    tree.image(6).unlink()
    Image.new("L", (1, 1)).save(tree.image(7))
    found = [next(n for n in (2, 4, 6, 7, 0) if f"row {n}," in line or n == 0) for line in tree.refused()]
    assert found[:2] == [2, 4] and set(found) >= {6, 7}


# --- writing --------------------------------------------------------------------------------------------------------
def test_the_number_of_threads_changes_no_byte(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PER_SHARD", 5)
    tree = copy("mimic")
    made = [_bytes(tree.prepare(tmp_path / f"{n}", workers=n).folder) for n in (1, 2, 7)]
    assert made[0] == made[1] == made[2] and sum(name.endswith(".tar") for name in made[0]) > 4


CHILD = """
import os, sys
from compdiff import datasets, shards
from compdiff.config import DataConfig
shards.PER_SHARD = 4
encode, made, last = shards.encode_png, [], int(sys.argv[4])
def count(image):
    made.append(1)
    return encode(image) if len(made) < last else os.kill(os.getpid(), 9)
shards.encode_png = count
datasets.prepare(sys.argv[1], sys.argv[2], DataConfig(size=64), sys.argv[3], workers=1, salt=%r)
print(len(made))
""" % SALT


def test_killed_preparation_goes_on_where_it_was(copy, tmp_path, monkeypatch):
    tree = copy("folder")
    monkeypatch.setattr(shards, "PER_SHARD", 4)
    whole = tree.prepare(tmp_path / "whole")
    manifest, out = tree.root.parent / "folder.yaml", tmp_path / "data"

    def child(last):
        words = [sys.executable, "-c", CHILD, str(manifest), str(out), str(tree.root), str(last)]
        return subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(paths.ROOT)})

    assert child(10).returncode == -9 and not out.exists()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob(".data.new/shards/[!.]*.tar")}
    assert len(kept) == 2, "two tars of four images each were finished"
    spoilt = sorted(kept)[0]
    spoilt.write_bytes(spoilt.read_bytes()[:-1])  # one of them was damaged meanwhile: kept by content, not by name
    again = child(10**6)
    assert again.returncode == 0, again.stderr
    assert int(again.stdout) == len(whole.table) - 4
    assert _bytes(out) == _bytes(whole.folder) and not list(tmp_path.glob(".data.new*"))


def test_what_was_kept_is_made_again_when_an_image_changed(copy, tmp_path, monkeypatch):
    tree = copy("folder")
    monkeypatch.setattr(shards, "PER_SHARD", 4)
    monkeypatch.setattr(datasets, "_swap", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(parts, "clear_notes", lambda *given: None)
    with pytest.raises(KeyboardInterrupt):
        tree.prepare(tmp_path / "data")
    monkeypatch.undo()
    Image.new("L", (128, 128), 77).save(tree.image(2))
    assert (tree.prepare(tmp_path / "data").images() == 77).all(axis=(1, 2)).sum() == 1


def test_a_write_that_fails_leaves_nothing_that_looks_done(copy, tmp_path):
    tree = copy("folder")
    whole = _bytes(tree.prepare(tmp_path / "whole").folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # like a full disk: the next write is an OSError
    try:
        with pytest.raises(OSError):
            tree.prepare(tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "data").exists()
    assert _bytes(tree.prepare(tmp_path / "data").folder) == whole


def test_images_are_not_all_held_at_once(tmp_path):
    lock, state = threading.Lock(), {"made": 0, "most": 0, "taken": 0}

    def make(n):
        with lock:
            state["made"] += 1
            state["most"] = max(state["most"], state["made"] - state["taken"])
        return {"id": f"i{n}", "split": "train"}, np.zeros((8, 8), np.uint8)

    tasks = [parts.Task("train", n, lambda n=n: make(n)) for n in range(60)]
    for n, (row, _) in enumerate(parts._in_order(tasks, workers=3)):
        time.sleep(0.001)
        with lock:
            state["taken"] += 1
        assert row["id"] == f"i{n}"
    assert state["made"] == 60 and state["most"] <= 2 * 3 + 1


def test_shards_stay_below_their_limit():
    for size in (64, 200, 512, 1024):
        noise = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
        one = len(shards.encode_png(noise)) + shards.ROW_BYTES
        assert shards.per_shard(size) * one <= 1.02 * shards.MAX_SHARD
    assert shards.per_shard(64) == shards.PER_SHARD and shards.per_shard(512) > 900


def test_a_bad_shard_is_named_and_by_choice_skipped(copy, monkeypatch, capsys):
    monkeypatch.setattr(shards, "PER_SHARD", 4)
    data = copy("folder").prepare()
    first, second, *_ = [data.folder / e["file"] for e in data.index["shards"] if e["split"] == "train"]
    n = len(data.rows("train"))
    first.write_bytes(first.read_bytes()[:-600])
    second.unlink()
    with pytest.raises(shards.ShardError, match=first.name):
        list(data.stream("train"))
    skipped = []
    assert len(list(data.stream("train", skipped))) == n - 8
    assert [Path(m.split(":")[0]).name for m in skipped] == [first.name, second.name]
    assert capsys.readouterr().err.count("skipped 4 images") == 2


# --- names ----------------------------------------------------------------------------------------------------------
def test_the_salt_lies_beside_the_folder_and_is_private(copy, tmp_path):
    tree = copy("mimic")
    first = tree.prepare(tmp_path / "a" / "data", salt="")
    secret = tmp_path / "a" / ".data.salt"
    assert secret.stat().st_mode & 0o777 == 0o600 and len(secret.read_text()) == 64
    assert secret.read_bytes() not in b"".join(_bytes(first.folder).values())
    again = tree.prepare(tmp_path / "a" / "data", salt="")
    other = tree.prepare(tmp_path / "b" / "data", salt="")
    same = tree.prepare(tmp_path / "c" / "data", salt=secret.read_text())
    assert first.index["sha256"] == again.index["sha256"] == same.index["sha256"]
    for name in ("id", "patient"):
        assert not set(first.table[name]) & set(other.table[name])
    with pytest.raises(DataError, match="salt: shorter"):
        tree.prepare(tmp_path / "d" / "data", salt="pepper")


def test_datasheet_counts(copy):
    data = copy("mimic").prepare()
    text = (data.folder / "datasheet.md").read_text()
    train = data.rows("train")
    n = int(train["y_Cardiomegaly"].sum())
    assert f"| train | {len(train)} | {train['patient'].nunique()} |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| Cardiomegaly |")]
    assert f"| {n} ({n / len(train):.1%}) |" in line
    cell, count = data.cell_counts("train").idxmax(), data.cell_counts("train").max()
    assert any(line.startswith(f"| {cell} | {count} |") for line in text.splitlines())
    assert "| not a frontal view | 1 |" in text and "PhysioNet" in text


# --- without the data -----------------------------------------------------------------------------------------------
def test_paper_without_the_data_says_what_it_needs_and_costs(tmp_path, capsys):
    start = time.perf_counter()
    assert run.main(["paper", "PROFILE=paper", "DATASETS=mimic", f"RUNS={tmp_path}"]) == 2
    assert time.perf_counter() - start < 10
    said = capsys.readouterr().err
    for word in ("DATA_ROOT", "PhysioNet", "credentialed", "0.6 TB", "A100-hours", "BASE=<folder"):
        assert word in said
    assert "http" not in said and not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_folder_without_the_data_says_what_it_should_hold(tmp_path, dataset):
    (tmp_path / "empty").mkdir()
    manifest = load_manifest(dataset)
    for root, says in (("", "not given"), ("/no/such/folder", "no such folder"), (str(tmp_path / "empty"), "missing")):
        with pytest.raises(DataError) as caught:
            datasets.prepare(dataset, tmp_path / "out", DataConfig(size=SIZE), root, salt=SALT)
        text = str(caught.value)
        for part in (says, manifest.source, manifest.cost, manifest.files["table"][0], "DATA_ROOT"):
            assert part in text


# --- the skeleton ---------------------------------------------------------------------------------------------------
def test_the_door_writes_a_skeleton_and_nothing_over_it(tmp_path, capsys):
    words = ["skeleton", "DATASETS=mimic", f"DATA_ROOT={tmp_path / 'tree'}"]
    assert run.main(words) == 0
    files = _bytes(tmp_path / "tree")
    assert "PHANTOM" in files["README.txt"].decode() and len([f for f in files if f.endswith(".jpg")]) == 32
    assert all(f.startswith("files/p99/p99") for f in files if f.endswith(".jpg")), "ids outside the release's range"
    assert run.main(words) == 2 and "is not empty" in capsys.readouterr().err
    assert run.main(["skeleton", "DATASETS=chest", f"DATA_ROOT={tmp_path / 'x'}"]) == 2
    assert run.main(["skeleton", "DATASETS=mimic"]) == 2
    assert _bytes(tmp_path / "tree") == files


def test_the_nih_skeleton_is_read(tmp_path):
    skeleton.write("nih", tmp_path / "tree")
    datasets.prepare("nih", tmp_path / "data", DataConfig(size=SIZE), str(tmp_path / "tree"))
    data = datasets.load(tmp_path / "data")
    assert len(data.table) + len(data.index["excluded"]) == 32 and set(data.index["images"]) >= {"train", "val", "test"}
