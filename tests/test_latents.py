"""Cached latents: one file per shard, larger than memory, shared out over processes, the same numbers as one tensor."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file

from compdiff import datasets, diffusion, latents, parts, shards, train
from compdiff.config import DataConfig

PER_SHARD = 5


@pytest.fixture(scope="module")
def cut(tiny_root, tmp_path_factory):
    """The tiny data in shards of five images: (data, base, its sha256)."""
    folder, values = tmp_path_factory.mktemp("cut") / "data", tiny.config(tiny_root).data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.shards, "per_shard", lambda size: PER_SHARD)
        datasets.prepare("chest", folder, DataConfig(values.size, values.train_n, values.val_n, values.test_per_cell))
    base, sha256 = diffusion.load_for(tiny.run_folder(tiny_root), tiny.config(tiny_root))
    return datasets.load(folder), base, sha256


def read(folder, cut, split="train", **how):
    data, base, sha256 = cut
    return latents.read(folder, data, base, sha256, split, ("age",), **how)


def test_rows_of_many_files_are_those_of_one_tensor(cut, tmp_path):
    data, base, sha256 = cut
    latents.write(tmp_path, data, base, sha256)
    found, rows = read(tmp_path, cut), data.rows("train")
    whole = torch.cat([base.moments(data.images(rows.iloc[i : i + PER_SHARD])) for i in range(0, len(rows), PER_SHARD)])
    assert isinstance(found.moments, latents.Rows) and len(found) == len(rows) == 24
    assert found.moments.shape == whole.shape and torch.equal(found.attributes, torch.from_numpy(data.attributes(rows)))
    for index in (slice(None), slice(3, 17), slice(20, 99), slice(0, 0), torch.tensor([23, 0, 7, 7, 4, 5]), torch.tensor([2])):
        assert torch.equal(found.moments[index], whole[index])
    assert torch.equal(found.moments[6], whole[6]) and torch.equal(found.moments[-1], whole[-1])
    for outside in (torch.tensor([24]), torch.tensor([-1]), 24):
        with pytest.raises(IndexError):
            found.moments[outside]
    assert found.text.dtype == torch.long


def test_training_from_disk_ends_in_the_bits_of_training_from_memory(cut, tiny_root, tmp_path):
    data, base, sha256 = cut
    latents.write(tmp_path, data, base, sha256)
    arguments, own = tiny.inputs(tiny_root, "flat", tiny.config(tiny_root, "flat", steps=3))
    disk = [latents.read(tmp_path, data, base, sha256, split, own.named) for split in ("train", "val")]
    memory = [latents.Latents(part.moments[:], part.text, part.attributes, part.empty) for part in disk]
    for name, (rows, valid) in (("disk", disk), ("memory", memory)):
        (c, model, sha, _, _, conditioner, reweighter), own = tiny.inputs(tiny_root, "flat", tiny.config(tiny_root, "flat", steps=3))
        train.run(c, model, sha, rows, valid, conditioner, reweighter, tmp_path / name, own.columns)
    a, b = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("disk", "memory"))
    assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


def test_frozen_text_is_embedded_once_and_read_from_disk(cut, tmp_path, monkeypatch):
    data, base, sha256 = cut
    latents.write(tmp_path, data, base, sha256)
    with pytest.raises(FileNotFoundError, match="write_text"):
        read(tmp_path, cut, frozen_text=True)
    latents.write_text(tmp_path, data, base, sha256, ("age",))
    found, ids = read(tmp_path, cut, frozen_text=True), read(tmp_path, cut)
    with torch.no_grad():
        expected, empty = base.text_encoder(ids.text[:])[0], base.text_encoder(ids.empty[None])[0][0]
    assert torch.allclose(found.text[:], expected, atol=1e-5) and torch.allclose(found.empty, empty, atol=1e-5)
    monkeypatch.setattr(latents, "_save", lambda *given: pytest.fail("embedded again"))
    latents.write_text(tmp_path, data, base, sha256, ("age",))


def test_shares_write_every_file_once_and_a_killed_one_goes_on(cut, tmp_path, monkeypatch):
    data, base, sha256 = cut
    written, save = [], latents._save
    monkeypatch.setattr(latents, "_save", lambda path, *rest: written.append(path.name) or save(path, *rest))
    latents.write(tmp_path, data, base, sha256, (1, 2))
    with pytest.raises(FileNotFoundError, match="train-000000.safetensors is missing"):
        read(tmp_path, cut)
    latents.write(tmp_path, data, base, sha256, (0, 2))
    assert sorted(written) == sorted(path.name for path in tmp_path.iterdir()) and len(written) == len(data.index["shards"])
    (tmp_path / "train-000002.safetensors").unlink()
    written.clear()
    latents.write(tmp_path, data, base, sha256)
    assert written == ["train-000002.safetensors"]
    with pytest.raises(ValueError, match="another base"):
        latents.read(tmp_path, data, base, "other", "train", ())


def test_the_first_process_shows_a_person_how_far_encoding_is(cut, tmp_path, monkeypatch, capfd):
    data, base, sha256 = cut
    n = len(data.index["shards"])
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    latents.write(tmp_path / "pipe", data, base, sha256)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook in JupyterLab")
    latents.write(tmp_path / "pipe", data, base, sha256)
    assert f" {n}/{n} " in capfd.readouterr().err
    latents.write(tmp_path / "pipe", data, base, sha256, (1, 2))
    assert capfd.readouterr().err == ""


def test_a_bad_shard_stops_or_is_skipped_named_and_counted(cut, tmp_path, capsys):
    data, base, sha256 = cut
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", data.folder, copy], check=True)
    data = datasets.load(copy)
    (copy / "shards" / "train-000001.tar").write_bytes(b"")
    with pytest.raises(shards.ShardError, match="train-000001.tar: its sha256 differs"):
        latents.write(tmp_path / "l", data, base, sha256)
    latents.write(tmp_path / "l", data, base, sha256, skip=True)
    assert "skipped 5 images" in capsys.readouterr().err
    found = latents.read(tmp_path / "l", data, base, sha256, "train", ())
    assert "train: 5 images are left out (remove train-000001.safetensors to try again)" in capsys.readouterr().err
    rows = data.rows("train")
    left = [i for i in range(24) if not 5 <= i < 10]
    assert len(found) == len(found.text) == 19
    assert torch.equal(found.attributes, torch.from_numpy(data.attributes(rows))[left])
    assert found.text.tolist() == base.tokenize(data.prompts(rows.iloc[left], ())).tolist()


def test_images_may_lie_at_an_address(cut, tmp_path):
    data, base, sha256 = cut
    here, far = tmp_path / "data", tmp_path / "bucket"
    here.mkdir()
    subprocess.run(["cp", "-r", data.folder, far], check=True)
    for name in ("index.json", "samples.csv", "manifest.yaml"):
        (here / name).write_bytes((data.folder / name).read_bytes())
    (here / "shards.url").write_text(f"file://{far}\n")
    assert (datasets.load(here).images() == data.images()).all()
    latents.write(tmp_path / "a", datasets.load(here), base, sha256)
    latents.write(tmp_path / "b", data, base, sha256)
    a, b = ([(path.name, latents._meta(path)) for path in sorted((tmp_path / name).iterdir())] for name in "ab")
    assert a == b and all(len(meta["sha256"]) == 64 for _, meta in a)


MEASURE = """
import json, resource, sys
import torch
from pathlib import Path
from compdiff import latents
files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = latents.Rows(files, "moments")
total = sum(float(rows[torch.randint(0, len(rows), (8,))].sum()) for _ in range(20))
print(json.dumps([len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def test_reading_rows_of_large_files_keeps_them_on_disk(tmp_path):
    for k in range(2):
        latents._save(tmp_path / f"train-{k:06d}.safetensors", {"moments": torch.zeros(400, 8, 64, 64)}, {})
    size = sum(path.stat().st_size for path in tmp_path.iterdir()) / 1024  # KiB
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], env=alone, check=True, capture_output=True, text=True)
    n, grown = json.loads(done.stdout)
    assert n == 800 and size > 100_000 and grown < 0.6 * size, f"{grown} of {size} KiB are in memory"
