"""Cached training data: the VAE's moments of every image (encoded once) and the prompts' token ids or embeddings.

Every shard of images gets a file `<shard>.safetensors` of moments, and where the text encoder is frozen one of text
embeddings per set of named attributes. A file is complete or absent, so writing shares out over processes and goes on
after a kill. Reading maps the files into memory: training data may be larger than it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from compdiff import record, shards
from compdiff.datasets import SPLITS, Data
from compdiff.devices import on_accelerator
from compdiff.diffusion import Diffusion
from compdiff.progress import interactive


class Rows:
    """Equally shaped rows in several files as one tensor [N, ...] that stays on disk: `rows[i]`, `rows[a:b]`, `rows[index]`."""

    def __init__(self, files: Sequence[Path], name: str):
        self.parts = [_tensor(file, name) for file in files]
        self.starts = torch.tensor([0, *(len(part) for part in self.parts)]).cumsum(0)  # [files + 1]
        self.shape = torch.Size((int(self.starts[-1]), *self.parts[0].shape[1:]))
        self.sha256 = record.sha256_json([_meta(file)["sha256"] for file in files])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        if isinstance(rows, int):
            return self[torch.tensor([range(len(self))[rows]])][0]
        index = torch.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"a row of {index.min()} to {index.max()} is outside 0 to {len(self) - 1}")
        out = torch.empty(len(index), *self.shape[1:], dtype=self.parts[0].dtype)
        where = torch.bucketize(index, self.starts[1:], right=True)
        for k in where.unique().tolist():
            out[where == k] = self.parts[k][index[where == k] - self.starts[k]]
        return out


@dataclass(frozen=True)
class Latents:
    """Training data of one split, row by row."""

    moments: Tensor | Rows  # [N, 2C, h, w] mean and log-variance of q(z|x)
    text: Tensor | Rows  # [N, T] token ids, or [N, T, d_ctx] embeddings when the text encoder is frozen
    attributes: Tensor  # [N, K] category indices, whole schema
    empty: Tensor  # [T] or [T, d_ctx]: the empty prompt

    def __len__(self) -> int:
        return len(self.moments)

    def extra(self, rows: Tensor | slice) -> dict[str, Tensor]:
        """What the denoiser needs of some rows besides the usual: {name of an argument of its `predict`: [n, ...]}."""
        return {}


# --- writing --------------------------------------------------------------------------------------------------------
def write(folder: Path, data: Data, base: Diffusion, base_sha256: str, share: tuple[int, int] = (0, 1), skip: bool = False) -> None:
    """Encode every shard of images to `folder`/<shard>.safetensors unless it is there for the same data and base.

    share (k, n): this process takes every n-th shard, from the k-th. skip: a shard that is missing or corrupt is named
    on stderr, and its rows are left out of training from now on; else ShardError.
    """
    stamp = {"data": data.index["sha256"], "base": base_sha256}
    for entry, rows in _bar(shards.share_of(_entries(data), share), "images", share):
        path = Path(folder) / _name(entry)
        if _current(path, stamp):
            continue
        try:
            ids, images = zip(*((row["id"], image) for row, image in shards.read(data.source, entry, data.size)), strict=True)
        except shards.ShardError as error:
            if not skip:
                raise
            print(f"skipped {entry['n']} images: {error}", file=sys.stderr)
            _save(path, {"moments": torch.zeros(0)}, stamp | {"skipped": str(error)})
            continue
        if list(ids) != rows["id"].tolist():
            raise shards.ShardError(f"{entry['file']}: its images are not in the order of samples.csv")
        _save(path, {"moments": base.moments(np.stack(images))}, stamp)


def write_text(folder: Path, data: Data, base: Diffusion, base_sha256: str, named: Sequence[str], share: tuple[int, int] = (0, 1)) -> None:
    """The frozen text encoder's embeddings of every shard's prompts, which name the attributes in `named`."""
    stamp = {"data": data.index["sha256"], "base": base_sha256}
    for entry, rows in _bar(shards.share_of(_entries(data), share), "text", share):
        path = _text_folder(folder, named) / _name(entry)
        if entry["split"] not in ("train", "val") or _current(path, stamp):
            continue
        ids = base.tokenize([*data.prompts(rows, named), ""])
        with torch.no_grad(), on_accelerator(base.text_encoder) as device:
            text = torch.cat([base.text_encoder(part.to(device))[0].cpu() for part in ids.split(256)])
        _save(path, {"text": text[:-1].contiguous(), "empty": text[-1].contiguous()}, stamp)


def _bar(entries: Sequence, what: str, share: tuple[int, int]) -> Iterable:
    """The entries, with a progress bar of shards; of several processes the first alone shows its own."""
    return tqdm(entries, desc=f"encoding {what}", unit="shard", disable=share[0] > 0 or not interactive())


def _entries(data: Data) -> list[tuple[dict, object]]:
    """(index entry, its rows of samples.csv) of every shard; the rows of a split stand in the order of its shards."""
    found = []
    for split in SPLITS:
        rows, start = data.rows(split), 0
        for entry in (entry for entry in data.index["shards"] if entry["split"] == split):
            found.append((entry, rows.iloc[start : start + entry["n"]]))
            start += entry["n"]
    return found


def _name(entry: dict) -> str:
    return f"{Path(entry['file']).stem}.safetensors"


def _text_folder(folder: Path, named: Sequence[str]) -> Path:
    return Path(folder) / "-".join(["text", *named])


def _save(path: Path, tensors: dict[str, Tensor], stamp: dict[str, str]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.numpy())
    with record.atomic(path) as temporary:
        save_file(tensors, temporary, metadata=stamp | {"sha256": digest.hexdigest()})


# --- reading --------------------------------------------------------------------------------------------------------
def _meta(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def _tensor(path: Path, name: str) -> Tensor:
    """A tensor of a file, mapped into memory: what is not used is not read."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _current(path: Path, stamp: dict[str, str]) -> bool:
    return path.exists() and stamp.items() <= _meta(path).items()


def read(folder: Path, data: Data, base: Diffusion, base_sha256: str, split: str, named: Sequence[str],
         frozen_text: bool = False) -> Latents:  # fmt: skip
    """Latents of one split, with prompts that name the attributes in `named` (text embedded if `frozen_text`).

    Rows of a shard that was skipped in writing are left out, and counted on stderr. FileNotFoundError where they were
    not written, ValueError where they belong to other data or another base.
    """
    stamp = {"data": data.index["sha256"], "base": base_sha256}
    files, kept = [], []
    for entry, rows in ((entry, rows) for entry, rows in _entries(data) if entry["split"] == split):
        _check(path := Path(folder) / _name(entry), stamp)
        if why := _meta(path).get("skipped"):
            print(f"{split}: {len(rows)} images are left out (remove {path.name} to try again): {why}", file=sys.stderr)
            continue
        files.append(path)
        kept.append(rows)
    if not files:
        raise FileNotFoundError(f"{folder}: no latents of {split}: run notebook 01_data_prep")
    rows = data.table.loc[np.concatenate([part.index for part in kept])]
    attributes = torch.from_numpy(data.attributes(rows))
    moments = _rows(files, "moments")
    if not frozen_text:
        text = base.tokenize([*data.prompts(rows, named), ""])
        return Latents(moments, text[:-1], attributes, text[-1])
    texts = [_text_folder(folder, named) / path.name for path in files]
    for path in texts:
        _check(path, stamp)
    return Latents(moments, _rows(texts, "text"), attributes, _tensor(texts[0], "empty"))


def _rows(files: Sequence[Path], name: str) -> Tensor | Rows:
    return Rows(files, name) if len(files) > 1 else _tensor(files[0], name)


def _check(path: Path, stamp: dict[str, str]) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run notebook 01_data_prep (embeddings: latents.write_text)")
    if not _current(path, stamp):
        raise ValueError(f"{path} was made from other data or another base: run notebook 01_data_prep again")
