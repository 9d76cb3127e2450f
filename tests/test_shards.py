"""Shards: deterministic bytes, readable by webdataset itself, and nothing but PNG and JSON comes in."""

import functools
import http.server
import io
import json
import pickle
import tarfile
import threading
import types

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from compdiff import parts, shards

SIZE = 8


def _samples(n=5, split="train"):
    rng = np.random.default_rng(0)
    for i in range(n):
        row = {"id": f"{split}-{i}", "split": split, "findings": "Größe, µ", "y_a": i % 2}
        yield row, rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


def _write(folder, samples, split="train"):
    """One shard and its index entry."""
    samples = list(samples)
    file = folder / "shards" / f"{split}-000000.tar"
    shards.write(file, ((row, shards.encode_png(image)) for row, image in samples))
    name, sha256 = f"shards/{file.name}", shards.record.sha256_file(file)
    return {"file": name, "split": split, "n": len(samples), "sha256": sha256}


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
    entries = [_write(tmp_path, wanted[:5]), _write(tmp_path, wanted[5:], "test")]
    assert [(e["file"], e["n"]) for e in entries] == [("shards/train-000000.tar", 5), ("shards/test-000000.tar", 2)]
    got = list(shards.read_all(tmp_path, entries, SIZE))
    assert [row for row, _ in got] == [row for row, _ in wanted]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(got, wanted, strict=True))


def test_webdataset_reads_them(tmp_path):
    entry = _write(tmp_path, _samples())
    got = list(webdataset.WebDataset(str(tmp_path / entry["file"]), shardshuffle=False))
    assert [s["__key__"] for s in got] == [f"train-{i}" for i in range(5)]
    assert set(got[0]) >= {"png", "json"} and json.loads(got[3]["json"])["y_a"] == 1
    image = np.asarray(Image.open(io.BytesIO(got[0]["png"])))
    assert np.array_equal(image, next(_samples())[1])


def test_bytes_depend_on_the_content_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    a = _write(tmp_path / "a", _samples())
    monkeypatch.setattr("time.time", lambda: 2e9)
    b = _write(tmp_path / "b 100%d", _samples())
    assert a == b
    with tarfile.open(tmp_path / "a" / a["file"]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "compdiff")}


def test_a_split_in_two_pieces_is_refused(tmp_path):
    tasks = [parts.Task(split, n, lambda n=n: ({"id": f"i{n}"}, GREY)) for n, split in enumerate(("a", "b", "a"))]
    with pytest.raises(ValueError, match="two pieces"):
        parts.write(tmp_path, tasks, SIZE, None)


def test_an_empty_tar_is_a_named_error(tmp_path):
    for n, content in enumerate((b"", b"\0" * 1024, b"\0" * 10240)):
        path = tmp_path / f"{n}.tar"
        path.write_bytes(content)
        entry = {"file": path.name, "split": "train", "n": 5, "sha256": shards.record.sha256_file(path)}
        with pytest.raises(shards.ShardError, match=rf"{n}\.tar: (holds 0 samples|truncated or not a tar)"):
            list(shards.read(tmp_path, entry, SIZE))


def test_changed_truncated_missing_escaping(tmp_path):
    entry = _write(tmp_path, _samples())
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
    entry = _write(tmp_path, _samples())
    with pytest.raises(shards.ShardError, match="holds 5 samples"):
        list(shards.read(tmp_path, {**entry, "n": 6}, SIZE))


def test_every_truncation_of_an_unknown_tar_is_a_named_error(tmp_path):
    entry = _write(tmp_path, _samples(3))
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


# --- by address ------------------------------------------------------------------------------------------------------
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *given):
        pass


@pytest.fixture
def served(tmp_path):
    """(folder with two shards, their index entries, address of the folder on a server of this machine)."""
    entries = [_write(tmp_path, _samples(5)), _write(tmp_path, _samples(2, "test"), "test")]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, entries, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """The pauses between two tries, in seconds; nobody waits for them."""
    pauses = []
    monkeypatch.setattr(shards, "time", types.SimpleNamespace(sleep=pauses.append))
    return pauses


def _equal(a, b):
    assert [row for row, _ in a] == [row for row, _ in b] and len(a)
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


def test_shards_come_over_http_and_through_fsspec(served):
    folder, entries, address = served
    local = list(shards.read_all(folder, entries, SIZE))
    memory = fsspec.filesystem("memory")
    for entry in entries:
        memory.pipe(f"/bucket/data/{entry['file']}", (folder / entry["file"]).read_bytes())
    for where in (address, f"{address}/", f"file://{folder}", "memory://bucket/data"):
        _equal(list(shards.read_all(where, entries, SIZE)), local)


def test_a_bad_shard_at_an_address_is_named_and_by_choice_skipped_and_counted(served, capsys):
    folder, entries, address = served
    (folder / entries[0]["file"]).write_bytes((folder / entries[0]["file"]).read_bytes()[:-512])
    with pytest.raises(shards.ShardError, match=r"http://127.*train-000000\.tar: its sha256 differs"):
        list(shards.read_all(address, entries, SIZE))
    (folder / entries[0]["file"]).unlink()
    with pytest.raises(shards.ShardError, match=r"train-000000\.tar: cannot be read \(HTTP Error 404"):
        list(shards.read_all(address, entries, SIZE))
    got = list(shards.read_all(address, entries, SIZE, skipped := []))
    assert [row["id"] for row, _ in got] == ["test-0", "test-1"] and len(skipped) == 1
    assert "skipped 5 images: http://127" in capsys.readouterr().err


def _cut(handler):
    """Promise a whole file, send a part, hang up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "10240")
    handler.end_headers()
    handler.wfile.write(b"part")


def _says(code):
    return lambda handler: handler.send_error(code)


@pytest.mark.parametrize(("fail", "times", "says"), [
    (_says(503), 1, ""), (_says(429), 2, ""), (_cut, 2, ""), (_says(500), 3, "HTTP Error 500"),
    (_cut, 3, "IncompleteRead"),
    (_says(404), 1, "HTTP Error 404"), (_says(403), 1, "HTTP Error 403")])  # fmt: skip
def test_a_hiccup_of_the_network_is_tried_again_unlike_a_missing_shard(served, monkeypatch, slept, fail, times, says):
    folder, entries, address = served
    asked, get = [], Quiet.do_GET

    def stumble(handler):
        asked.append(handler.path)
        return fail(handler) if len(asked) <= times else get(handler)

    monkeypatch.setattr(Quiet, "do_GET", stumble, raising=False)
    got = list(shards.read_all(address, entries[:1], SIZE, skipped := []))
    if says:
        assert not got and len(skipped) == 1 and says in skipped[0]
    else:
        _equal(got, list(shards.read_all(folder, entries[:1], SIZE)))
    assert len(asked) == (times if says else times + 1) and slept == [1, 4][: len(asked) - 1]


@pytest.mark.parametrize(("where", "says"), [
    ("nosuch://bucket", "remedy: install fsspec's driver for nosuch://"),
    ("memory://user:secret@nothing", "memory://nothing/shards/train-000000.tar: cannot be read"),
    ("http://127.0.0.1:9", "cannot be read")])  # fmt: skip
def test_an_address_that_leads_nowhere_is_a_named_error_without_credentials(tmp_path, where, says):
    entry = _write(tmp_path, _samples())
    with pytest.raises(shards.ShardError, match=says) as caught:
        list(shards.read(where, entry, SIZE))
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="leaves its root"):
        list(shards.read(where, {**entry, "file": "../x.tar"}, SIZE))


def test_what_a_driver_raises_names_the_shard_and_can_be_skipped(served, capsys, slept):
    class NoCredentials(Exception):
        """Like botocore's: no OSError, no ValueError."""

    class Cloud(fsspec.AbstractFileSystem):
        def _open(self, path, *given, **more):
            raise NoCredentials("no credentials for reader:secret@bucket, tried secret")

    _, entries, _ = served
    fsspec.register_implementation("cloud", Cloud, clobber=True)
    where = "cloud://reader:secret@bucket/data"
    with pytest.raises(shards.ShardError, match=r"^cloud://bucket/data/shards/train-0.*: cannot be read") as caught:
        list(shards.read_all(where, entries, SIZE))
    assert slept == [1, 4], "whatever it raises may pass"
    assert list(shards.read_all(where, entries, SIZE, skipped := [])) == [] and len(skipped) == 2
    assert not [word for word in ("secret", "reader") if word in str(caught.value) + capsys.readouterr().err]


def test_shares_are_those_of_webdataset(monkeypatch):
    items = [{"url": f"{k}.tar"} for k in range(11)]
    for n in (1, 2, 4):
        shares = [shards.share_of(items, (k, n)) for k in range(n)]
        assert sorted(item["url"] for share in shares for item in share) == sorted(item["url"] for item in items)
        for k in range(n):
            monkeypatch.setattr(webdataset.utils, "pytorch_worker_info", lambda group=None, k=k, n=n: (k, n, 0, 1))
            assert list(webdataset.split_by_node(iter(items))) == shares[k]
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="share"):
            shards.share_of(items, share)


def test_webdataset_shares_our_tars_out_over_nodes_and_workers(tmp_path, monkeypatch):
    entries = [_write(tmp_path, _samples(3, f"part{k}"), f"part{k}") for k in range(7)]
    ids = sorted(f"part{k}-{n}" for k in range(7) for n in range(3))
    monkeypatch.setenv("WORLD_SIZE", "2")

    def read(node, **splitters):
        """Ids that one of the two nodes gets from its two loading processes."""
        monkeypatch.setenv("RANK", str(node))
        urls = [str(tmp_path / entry["file"]) for entry in entries]
        samples = webdataset.WebDataset(urls, shardshuffle=False, **splitters)
        return [sample["__key__"] for sample in DataLoader(samples, batch_size=None, num_workers=2)]

    both = {"nodesplitter": webdataset.split_by_node, "workersplitter": webdataset.split_by_worker}
    found = [read(node, **both) for node in range(2)]
    assert sorted(found[0] + found[1]) == ids
    for node in range(2):
        mine = {entry["split"] for entry in shards.share_of(entries, (node, 2))}
        assert {key.split("-")[0] for key in found[node]} == mine, "the node's shards are those that our own steps take"
    assert sorted(read(0, **both | {"workersplitter": None})) == sorted(2 * found[0]), "else both workers read all of them"
