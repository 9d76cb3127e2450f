"""WebDataset shards: a tar of <id>.png (8-bit grey) and <id>.json (its row of samples.csv). No pickles, in or out.

Writing is deterministic: the same rows and images give the same bytes. Reading, from a folder or an address, decodes PNG
and JSON by hand (a general decoder would unpickle a .pkl member) and trusts nothing: hash, member names, types, sizes.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import re
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import SplitResult, urlsplit

import fsspec
import numpy as np
from PIL import Image

from compdiff import paths, record

PER_SHARD = 2_000  # images
MAX_SHARD = 256 * 2**20  # bytes
ROW_BYTES = 4096  # of a sample besides its pixels: the row, headers, padding
MEMBER = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,80})\.(png|json)")
MAX_MEMBER = 64 * 2**20  # bytes
PAUSES = (1, 4)  # seconds before a shard at an address is asked for again
LASTING = (FileNotFoundError, IsADirectoryError, PermissionError, ImportError, ValueError)  # so is the next try
REFUSED = set(range(400, 500)) - {408, 425, 429}  # status codes of HTTP: our request is at fault, not the moment


class ShardError(ValueError):
    """A shard that is missing, changed, truncated or holds something that does not belong there."""


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [S, S] -> PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def per_shard(size: int) -> int:
    """Images in one shard: at most PER_SHARD, and at most about MAX_SHARD bytes even where PNG saves nothing."""
    return max(1, min(PER_SHARD, MAX_SHARD // (size * size + ROW_BYTES)))


def write(file: Path, samples: Iterable[tuple[dict, bytes]]) -> None:
    """(row, PNG file) pairs -> one tar. `file` stands only when it is complete."""
    import webdataset  # here, because it imports torch, which readers of a dataset may do without

    options = dict(encoder=False, mtime=0, user="compdiff", group="compdiff", mode=0o644)
    with record.atomic(file) as temporary, webdataset.TarWriter(str(temporary), **options) as writer:
        for row, png in samples:
            text = json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False)
            writer.write({"__key__": row["id"], "png": png, "json": text.encode()})


def is_address(where: str | Path) -> bool:
    return isinstance(where, str) and "://" in where


def opened(where: str | Path, name: str) -> tuple[str, BinaryIO]:
    """(what to call it, open file) of the shard `name` in a folder or below an address.

    http and https go by Python itself; any other scheme (s3, gs, az, file, memory) by fsspec, which asks the environment
    for credentials. An address is fetched whole (about MAX_SHARD at most), so that its hash comes before its content;
    where the network fails, thrice.
    ShardError names a shard that cannot be had, without credentials.
    """
    if not is_address(where):
        path = paths.inside(where, name)
        if not path.is_file():
            raise ShardError(f"{path}: missing; run 01_data_prep again")
        return str(path), open(path, "rb")
    if ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise ValueError(f"path {name!r} leaves its root")
    parts = urlsplit(f"{where.rstrip('/')}/{name}")
    host = parts.netloc.rpartition("@")[2]
    shown = f"{parts.scheme}://{host}{parts.path}"
    url, web = parts.geturl(), parts.scheme in ("http", "https")
    # Broad for fsspec: its drivers pass on what their clients raise, and those (botocore's NoCredentialsError, errors
    # of Google's and Azure's) have no base in common but Exception.
    failures = (OSError, http.client.HTTPException, ImportError, ValueError) if web else (Exception,)
    try:
        return shown, _fetched(url, web, failures)
    except failures as error:
        problem = _without_secrets(error, parts)
        if isinstance(error, ImportError | ValueError) and not isinstance(error, OSError):
            remedy = f"install fsspec's driver for {parts.scheme}://"  # or it is no scheme at all
            raise ShardError(f"{shown}: {problem}; remedy: {remedy}") from None
        raise ShardError(f"{shown}: cannot be read ({problem})") from None


def _fetched(url: str, web: bool, failures: tuple[type[Exception], ...]) -> BinaryIO:
    """The content of an address. What may pass is tried again after a pause; what will not (404, no driver) is not."""
    for pause in PAUSES:
        try:
            return _fetched_once(url, web)
        except failures as error:
            if isinstance(error, LASTING) or getattr(error, "code", None) in REFUSED:
                raise
            time.sleep(pause)
    return _fetched_once(url, web)


def _fetched_once(url: str, web: bool) -> BinaryIO:
    with urllib.request.urlopen(url, timeout=60) if web else fsspec.open(url, "rb") as file:
        return io.BytesIO(file.read())


def _without_secrets(error: Exception, parts: SplitResult) -> str:
    """An error's words without the user and password of the address; its name where it has no words."""
    text, user = str(error) or type(error).__name__, parts.netloc.rpartition("@")[0]
    text = text.replace(f"{user}@", "") if user else text
    return text.replace(parts.password, "***") if parts.password else text


def share_of(items: Sequence, share: tuple[int, int]) -> Sequence:
    """Every n-th of `items` from the k-th on, for share (k, n): the shares k = 0 ... n - 1 hold each item once.

    So webdataset splits shards by node. ValueError for any other k.
    """
    k, n = share
    if not 0 <= k < n:
        raise ValueError(f"share {k} of {n}: there are only the shares 0 to {n - 1}")
    return items[k::n]


def read(where: str | Path, entry: dict, size: int) -> Iterator[tuple[dict, np.ndarray]]:
    """(row, image uint8 [size, size]) pairs of one shard named by its index entry, after checking its sha256.

    where: the prepared folder, or the address below which its files lie. ShardError names the shard and what is wrong.
    """
    name, file = opened(where, entry["file"])
    with file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise ShardError(f"{name}: its sha256 differs from index.json (changed or truncated); run 01_data_prep again")
        file.seek(0)
        n = 0
        for row, image in members(name, size, file):
            yield row, image
            n += 1
    if n != entry["n"]:
        raise ShardError(f"{name}: holds {n} samples, index.json says {entry['n']}; run 01_data_prep again")


def read_all(
    where: str | Path, entries: Iterable[dict], size: int, skipped: list[str] | None = None
) -> Iterator[tuple[dict, np.ndarray]]:
    """(row, image) pairs of all shards. A bad shard raises ShardError.

    skipped: a list; where it is given, a bad shard is left out whole, and its message goes there and to stderr.
    """
    for entry in entries:
        try:
            yield from read(where, entry, size)
        except ShardError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            print(f"skipped {entry['n']} images: {error}", file=sys.stderr)


def read_at(
    where: str | Path, entries: Iterable[dict], size: int, wanted: np.ndarray
) -> Iterator[tuple[dict, np.ndarray]]:
    """(row, image) pairs at the ascending positions `wanted` of all shards' samples; opens only the shards with one."""
    stop = 0
    for entry in entries:
        start, stop = stop, stop + entry["n"]
        low, high = np.searchsorted(wanted, (start, stop))
        if low < high:
            asked = set((wanted[low:high] - start).tolist())
            yield from (pair for n, pair in enumerate(read(where, entry, size)) if n in asked)


def members(path: str | Path, size: int, file: BinaryIO | None = None) -> Iterator[tuple[dict, np.ndarray]]:
    """(row, image) pairs of a tar of unknown hash. ShardError for anything but complete <id>.json, <id>.png pairs.

    file: its content, where it is open already; `path` only names it then.
    """
    row: tuple[str, bytes] | None = None  # id and text of a .json whose .png has not come yet
    try:
        with tarfile.open(None if file else path, "r:", file) as tar:
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


def _decode(path: str | Path, key: str, text: bytes, png: bytes, size: int) -> tuple[dict, np.ndarray]:
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
