"""WebDataset shards: a tar of <id>.png (8-bit grey) and <id>.json (its row of samples.csv). No pickles, in or out.

Writing is deterministic: the same rows and images give the same bytes. Reading decodes PNG and JSON by hand (a general
decoder would unpickle a .pkl member) and trusts nothing: hash, member names, member types, sizes.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from compdiff import paths, record

PER_SHARD = 2_000  # images
MEMBER = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,80})\.(png|json)")
MAX_MEMBER = 64 * 2**20  # bytes


class ShardError(ValueError):
    """A shard that is missing, changed, truncated or holds something that does not belong there."""


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [S, S] -> PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder: Path, samples: Iterable[tuple[dict, np.ndarray]], per_shard: int = PER_SHARD) -> list[dict]:
    """Stream (row, image uint8 [S, S]) pairs, grouped by row["split"], into `<folder>/<split>-000000.tar` ...

    Returns the index entries [{file, split, n, sha256}], files relative to the folder's parent.
    """
    import webdataset  # here, because it imports torch, which readers of a dataset may do without

    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict] = []
    for split, group in groupby(samples, key=lambda sample: sample[0]["split"]):
        if any(entry["split"] == split for entry in entries):
            raise ValueError(f"split {split!r} comes in two pieces")
        pattern = str(folder).replace("%", "%%") + f"/{split}-%06d.tar"
        counts: list[int] = []
        options = dict(encoder=False, mtime=0, user="compdiff", group="compdiff", mode=0o644, verbose=0)
        with webdataset.ShardWriter(pattern, maxcount=per_shard, **options) as writer:
            for n, (row, image) in enumerate(group):
                if n % per_shard == 0:
                    counts.append(0)
                text = json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False)
                writer.write({"__key__": row["id"], "png": encode_png(image), "json": text.encode()})
                counts[-1] += 1
        for k, n in enumerate(counts):
            file = folder / f"{split}-{k:06d}.tar"
            entries.append(
                {"file": f"{folder.name}/{file.name}", "split": split, "n": n, "sha256": record.sha256_file(file)}
            )
    return entries


def read(folder: Path, entry: dict, size: int) -> Iterator[tuple[dict, np.ndarray]]:
    """(row, image uint8 [size, size]) pairs of one shard named by its index entry, after checking its sha256.

    ShardError names the shard and what is wrong with it.
    """
    path = paths.inside(folder, entry["file"])
    if not path.is_file():
        raise ShardError(f"{path}: missing; run 01_data_prep again")
    if record.sha256_file(path) != entry["sha256"]:
        raise ShardError(f"{path}: its sha256 differs from index.json (changed or truncated); run 01_data_prep again")
    n = 0
    for row, image in members(path, size):
        yield row, image
        n += 1
    if n != entry["n"]:
        raise ShardError(f"{path}: holds {n} samples, index.json says {entry['n']}; run 01_data_prep again")


def members(path: Path, size: int) -> Iterator[tuple[dict, np.ndarray]]:
    """(row, image) pairs of a tar of unknown hash. ShardError for anything but complete <id>.json, <id>.png pairs."""
    row: tuple[str, bytes] | None = None  # id and text of a .json whose .png has not come yet
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = MEMBER.fullmatch(member.name)
                if not match or not member.isreg() or member.size > MAX_MEMBER:
                    remedy = "only regular <id>.png and <id>.json files belong here"
                    raise ShardError(f"{path}: refused member {member.name!r}; {remedy}")
                key, kind = match.groups()
                content = tar.extractfile(member).read()
                if (kind == "json") != (row is None) or (row and row[0] != key):
                    raise ShardError(f"{path}: {member.name} is not in its place, right after its other half")
                if kind == "json":
                    row = (key, content)
                else:
                    yield _decode(path, key, row[1], content, size)
                    row = None
    except tarfile.TarError as error:
        raise ShardError(f"{path}: truncated or not a tar ({error}); run 01_data_prep again") from None
    if row:
        raise ShardError(f"{path}: ends in the middle of a sample")


def _decode(path: Path, key: str, text: bytes, png: bytes, size: int) -> tuple[dict, np.ndarray]:
    try:
        row = json.loads(text)
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.mode != "L" or image.size != (size, size):
                raise ShardError(f"{path}: {key}.png is {image.mode} {image.size}, not 8-bit grey {size}x{size}")
            pixels = np.asarray(image)
    except (OSError, SyntaxError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path}: {key} cannot be decoded ({error})") from None
    if not isinstance(row, dict) or row.get("id") != key:
        raise ShardError(f"{path}: {key}.json does not belong to {key}.png")
    return row, pixels
