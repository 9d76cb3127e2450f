"""A disk without room: an error in words, nothing that looks done, and the same bytes once there is room."""

import errno
import resource
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from compdiff import datasets, record, shards
from compdiff.config import DataConfig

SMALL = DataConfig(size=32, train_n=24, val_n=8, test_per_cell=1)
REMEDY = "make room, or set RUNS= to a folder on another disk, and run again: what is finished is kept"


@pytest.fixture
def disk(tmp_path):
    """`disk(n)` mounts a file system of n bytes; called again it becomes as large as that."""
    folder, options = tmp_path / "disk", []
    folder.mkdir()

    def mount(size):
        words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode and not options:
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        options[:] = ["remount"]
        return folder

    yield mount
    if options:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the error in hand may hold a file open


@pytest.fixture
def largest():
    """`largest(n)`: no file may be larger than n bytes from now on; where mounting is not permitted this still works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_preparation_on_a_full_disk_ends_in_words_and_goes_on_when_there_is_room(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PER_SHARD", 4)
    index = datasets.prepare("chest", tmp_path / "whole", SMALL)
    whole = content(tmp_path / "whole")
    out = disk(sum(map(len, whole.values())) // 2) / "data"
    with pytest.raises(OSError, match=rf"the disk is full; {REMEDY}: '.*/\w+-\d{{6}}\.tar'") as caught:
        datasets.prepare("chest", out, SMALL)
    assert caught.value.errno == errno.ENOSPC
    assert not out.exists(), "nothing looks done"
    with pytest.raises(datasets.DataError, match="index.json: missing"):
        datasets.load(out)
    left = [p for p in out.parent.rglob("*.tar")]
    kept = {p.name: p.stat().st_mtime_ns for p in left if not p.name.startswith(".")}
    assert kept and len(left) == len(kept), "finished shards only, no half of one"
    disk(2**26)
    assert datasets.prepare("chest", out, SMALL) == index
    assert content(out) == whole
    assert {name: (out / "shards" / name).stat().st_mtime_ns for name in kept} == kept, "finished shards were kept"


def test_a_small_file_that_does_not_fit_any_more_leaves_the_old_one(disk):
    folder = disk(8 * 4096)
    record.write_text(folder / "log.csv", "old")
    with pytest.raises(OSError, match=rf"the disk is full; {REMEDY}: '.*/log\.csv'"):
        record.write_text(folder / "log.csv", "x" * 2**20)
    assert content(folder) == {"log.csv": b"old"}


def test_weights_without_room_leave_the_old_ones(tmp_path, largest):
    path = tmp_path / "weights.safetensors"

    def write(n):
        with record.atomic(path) as temporary:
            save_file({"w": torch.arange(n)}, temporary)

    write(10)
    largest(30_000)
    with pytest.raises(OSError, match=rf"no file may be so large here; {REMEDY}: '.*/weights\.safetensors'") as caught:
        write(100_000)
    assert caught.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_file(path)["w"], torch.arange(10))
    largest(None)
    write(100_000)
    assert len(load_file(path)["w"]) == 100_000


def test_other_errors_keep_their_own_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory: '/no/such/file'"), record.atomic(tmp_path / "a"):
        open("/no/such/file")
