"""Preparation of real data: bytes that stay the same, kills, failed writes, memory, names; and what is said without the data."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from layouts import LAYOUTS, SALT, SIZE, contents
from PIL import Image

from compdiff import datasets, parts, paths, record, run, shards, skeleton
from compdiff.config import DataConfig
from compdiff.manifests import load_manifest
from compdiff.problems import DataError


# --- writing --------------------------------------------------------------------------------------------------------
def test_the_number_of_threads_changes_no_byte(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PER_SHARD", 5)
    tree = copy("mimic")
    made = [contents(tree.prepare(tmp_path / f"{n}", workers=n).folder) for n in (1, 2, 7)]
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
    assert contents(out) == contents(whole.folder) and not list(tmp_path.glob(".data.new*"))


def test_what_was_kept_is_made_again_when_an_image_changed(copy, tmp_path, monkeypatch):
    tree = copy("folder")
    monkeypatch.setattr(shards, "PER_SHARD", 4)
    monkeypatch.setattr(datasets, "_swap", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tree.prepare(tmp_path / "data")
    monkeypatch.undo()
    Image.new("L", (128, 128), 77).save(tree.image(2))
    assert (tree.prepare(tmp_path / "data").images() == 77).all(axis=(1, 2)).sum() == 1


def test_a_write_that_fails_leaves_nothing_that_looks_done(copy, tmp_path):
    tree = copy("folder")
    whole = contents(tree.prepare(tmp_path / "whole").folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # like a full disk: the next write is an OSError
    try:
        with pytest.raises(OSError, match=r"no file may be so large here; make room.*\.tar"):
            tree.prepare(tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "data").exists()
    assert contents(tree.prepare(tmp_path / "data").folder) == whole


@pytest.mark.parametrize("name", ["samples.csv", "datasheet.md", "index.json"])
def test_a_disk_that_is_full_after_the_last_shard_costs_no_shard(copy, tmp_path, monkeypatch, name):
    tree = copy("folder")
    whole = contents(tree.prepare(tmp_path / "whole").folder)
    write = record.write_text

    def full(path, text):
        if path.name == name:
            raise OSError(errno.ENOSPC, "the disk is full", str(path))
        write(path, text)

    monkeypatch.setattr(record, "write_text", full)
    with pytest.raises(OSError, match="the disk is full"):
        tree.prepare(tmp_path / "data")
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    (tmp_path / ".data.new" / ".left-by-a-kill").write_text("")
    monkeypatch.setattr(shards, "encode_png", lambda image: pytest.fail("a finished shard was made again"))
    for _ in range(2):  # the second finds an equal folder in place
        assert contents(tree.prepare(tmp_path / "data").folder) == whole
        assert not list(tmp_path.glob(".data.new*"))
        monkeypatch.undo()


def test_progress_is_shown_to_a_person_only(copy, tmp_path, monkeypatch, capfd):
    tree = copy("folder")
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    whole = tree.prepare(tmp_path / "in a pipe")
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook in JupyterLab")
    tree.prepare(tmp_path / "in a notebook")
    said = capfd.readouterr().err
    assert f" {len(whole.table)}/{len(whole.table)} " in said and "checking images: 100%" in said
    assert contents(tmp_path / "in a pipe") == contents(tmp_path / "in a notebook")


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
    assert secret.read_bytes() not in b"".join(contents(first.folder).values())
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
    start = time.process_time()
    assert run.main(["paper", "PROFILE=paper", "DATASETS=mimic", f"RUNS={tmp_path}"]) == 2
    assert time.process_time() - start < 10
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
    files = contents(tmp_path / "tree")
    assert "PHANTOM" in files["README.txt"].decode() and len([f for f in files if f.endswith(".jpg")]) == 320
    assert all(f.startswith("files/p99/p99") for f in files if f.endswith(".jpg")), "ids outside the release's range"
    assert run.main(words) == 2 and "is not empty" in capsys.readouterr().err
    assert run.main(["skeleton", "DATASETS=chest", f"DATA_ROOT={tmp_path / 'x'}"]) == 2
    assert run.main(["skeleton", "DATASETS=mimic"]) == 2
    assert contents(tmp_path / "tree") == files


def test_the_kind_of_a_skeletons_images_is_a_word(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(skeleton.write, "__defaults__", ("", 6))  # patients, instead of 240
    words = ["DATASETS=mimic", "KIND=dcm", f"DATA_ROOT={tmp_path / 'tree'}"]
    assert run.main(["skeleton", *words]) == 0
    assert {p.suffix for p in (tmp_path / "tree" / "files").rglob("*") if p.is_file()} == {".dcm"}
    assert run.main(["skeleton", "DATASETS=mimic", "KIND=npz", f"DATA_ROOT={tmp_path / 'x'}"]) == 2
    assert "kind npz: none of the manifest's -> use one of: jpg, dcm" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert run.main(["paper", *words]) == 2 and "KIND=dcm is a word of skeleton" in capsys.readouterr().err


def test_the_nih_skeleton_is_read(tmp_path):
    skeleton.write("nih", tmp_path / "tree", patients=24)
    datasets.prepare("nih", tmp_path / "data", DataConfig(size=SIZE), str(tmp_path / "tree"))
    data = datasets.load(tmp_path / "data")
    assert len(data.table) + len(data.index["excluded"]) == 32 and set(data.index["images"]) >= {"train", "val", "test"}
