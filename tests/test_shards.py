"""Shards: deterministic bytes, readable by webdataset itself, and nothing but PNG and JSON comes in."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from compdiff import shards

SIZE = 8


def _samples(n=5, split="train"):
    rng = np.random.default_rng(0)
    for i in range(n):
        row = {"id": f"{split}-{i}", "split": split, "findings": "Größe, µ", "y_a": i % 2}
        yield row, rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


def _png(image, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode or "L").save(buffer, "PNG")
    return buffer.getvalue()


def _tar(path, files):
    """[(name, bytes or link target)] -> a tar written with Python's own tarfile."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_what_goes_in_comes_out(tmp_path):
    wanted = [*_samples(5), *_samples(2, "test")]
    entries = shards.write(tmp_path / "shards", wanted, per_shard=2)
    assert [(e["file"], e["n"]) for e in entries] == [
        ("shards/train-000000.tar", 2),
        ("shards/train-000001.tar", 2),
        ("shards/train-000002.tar", 1),
        ("shards/test-000000.tar", 2),
    ]
    got = [sample for entry in entries for sample in shards.read(tmp_path, entry, SIZE)]
    assert [row for row, _ in got] == [row for row, _ in wanted]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(got, wanted, strict=True))


def test_webdataset_reads_them(tmp_path):
    entry = shards.write(tmp_path / "shards", _samples())[0]
    got = list(webdataset.WebDataset(str(tmp_path / entry["file"]), shardshuffle=False))
    assert [s["__key__"] for s in got] == [f"train-{i}" for i in range(5)]
    assert set(got[0]) >= {"png", "json"} and json.loads(got[3]["json"])["y_a"] == 1
    image = np.asarray(Image.open(io.BytesIO(got[0]["png"])))
    assert np.array_equal(image, next(_samples())[1])


def test_bytes_depend_on_the_content_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    a = shards.write(tmp_path / "a" / "shards", _samples())
    monkeypatch.setattr("time.time", lambda: 2e9)
    b = shards.write(tmp_path / "b 100%d" / "shards", _samples())
    assert a == b
    with tarfile.open(tmp_path / "a" / a[0]["file"]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "compdiff")}


def test_a_split_in_two_pieces_is_refused(tmp_path):
    samples = [*_samples(1), *_samples(1, "test"), *_samples(1)]
    with pytest.raises(ValueError, match="two pieces"):
        shards.write(tmp_path / "shards", samples)


def test_changed_truncated_missing_escaping(tmp_path):
    entry = shards.write(tmp_path / "shards", _samples())[0]
    path = tmp_path / entry["file"]
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[700] ^= 1
    for content in (bytes(changed), whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(shards.ShardError, match=r"train-000000\.tar.*sha256"):
            list(shards.read(tmp_path, entry, SIZE))
    path.unlink()
    with pytest.raises(shards.ShardError, match="missing"):
        list(shards.read(tmp_path, entry, SIZE))
    with pytest.raises(ValueError, match="leaves its root"):
        list(shards.read(tmp_path / "shards", {**entry, "file": "../../x.tar"}, SIZE))


def test_count_must_agree_with_the_index(tmp_path):
    entry = shards.write(tmp_path / "shards", _samples())[0]
    with pytest.raises(shards.ShardError, match="holds 5 samples"):
        list(shards.read(tmp_path, {**entry, "n": 6}, SIZE))


def test_every_truncation_of_an_unknown_tar_is_a_named_error(tmp_path):
    entry = shards.write(tmp_path / "shards", _samples(3))[0]
    path = tmp_path / entry["file"]
    whole = path.read_bytes()
    for cut in range(1, 8 * 512, 300):
        path.write_bytes(whole[:cut])
        with pytest.raises(shards.ShardError):
            list(shards.read(tmp_path, {**entry, "sha256": shards.record.sha256_file(path)}, SIZE))


class _Boom:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


GREY = np.zeros((SIZE, SIZE), np.uint8)
ROW = json.dumps({"id": "a"}).encode()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([("a.pkl", pickle.dumps(_Boom()))], "refused member 'a.pkl'"),
        ([("a.json", ROW), ("a.pyd", pickle.dumps(_Boom()))], "refused member 'a.pyd'"),
        ([("../a.json", ROW)], "refused member '../a.json'"),
        ([("/etc/a.json", ROW)], "refused member"),
        ([("b/a.json", ROW)], "refused member"),
        ([("a.json", "/etc/passwd")], "refused member 'a.json'"),
        ([("a.json", ROW)], "ends in the middle"),
        ([("a.json", ROW), ("a.json", ROW)], "not in its place"),
        ([("a.png", _png(GREY)), ("a.json", ROW)], "not in its place"),
        ([("b.json", ROW), ("a.png", _png(GREY))], "not in its place"),
        ([("a.json", json.dumps({"id": "b"}).encode()), ("a.png", _png(GREY))], "does not belong"),
        ([("a.json", ROW), ("a.png", _png(GREY, "RGB"))], "RGB"),
        ([("a.json", ROW), ("a.png", _png(GREY[:4, :4]))], "not 8-bit grey 8x8"),
        ([("a.json", ROW), ("a.png", _png(GREY)[:40])], "cannot be decoded"),
        ([("a.json", ROW), ("a.png", b"GIF89a")], "cannot be decoded"),
        ([("a.json", b"{"), ("a.png", _png(GREY))], "cannot be decoded"),
        ([("a.json", b"\xff\xfe"), ("a.png", _png(GREY))], "cannot be decoded"),
        ([("a.json", b"[1]"), ("a.png", _png(GREY))], "does not belong"),
    ],
)
def test_hostile_members(tmp_path, files, says):
    path = _tar(tmp_path / "x.tar", files)
    with pytest.raises(shards.ShardError, match=says):
        list(shards.members(path, SIZE))


def test_the_hostile_tars_fail_for_their_defect(tmp_path):
    path = _tar(tmp_path / "x.tar", [("a.json", ROW), ("a.png", _png(GREY))])
    assert [row for row, _ in shards.members(path, SIZE)] == [{"id": "a"}]
