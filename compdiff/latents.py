"""Cached training data: the VAE's moments of every image (encoded once) and the prompts' token ids or embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compdiff import record
from compdiff.datasets import SPLITS, Data
from compdiff.devices import on_accelerator
from compdiff.diffusion import Diffusion


@dataclass(frozen=True)
class Latents:
    """Training data of one split, row by row."""

    moments: Tensor  # [N, 2C, h, w] mean and log-variance of q(z|x)
    text: Tensor  # [N, T] token ids, or [N, T, d_ctx] embeddings when the text encoder is frozen
    attributes: Tensor  # [N, K] category indices, whole schema
    empty: Tensor  # [T] or [T, d_ctx]: the empty prompt

    def __len__(self) -> int:
        return len(self.moments)

    def extra(self, rows: Tensor | slice) -> dict[str, Tensor]:
        """What the denoiser needs of some rows besides the usual: {name of an argument of its `predict`: [n, ...]}."""
        return {}


def write(folder: Path, data: Data, base: Diffusion, base_sha256: str) -> None:
    """Encode every split to `folder`/<split>.safetensors unless it is there for the same data and base."""
    stamp = {"data": data.index["sha256"], "base": base_sha256}
    for split in SPLITS:
        rows = data.rows(split)
        path = Path(folder) / f"{split}.safetensors"
        if len(rows) == 0 or (path.exists() and _stamp(path) == stamp):
            continue
        moments = base.moments(data.images(rows))
        with record.atomic(path) as temporary:
            save_file({"moments": moments.contiguous()}, temporary, metadata=stamp)


def _stamp(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def read(folder: Path, data: Data, base: Diffusion, base_sha256: str, split: str, named: Sequence[str],
         frozen_text: bool = False) -> Latents:  # fmt: skip
    """Latents of one split, with prompts that name the attributes in `named` (text embedded if `frozen_text`).

    FileNotFoundError where they were not written, ValueError where they belong to other data or another base.
    """
    path = Path(folder) / f"{split}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run notebook 01_data_prep")
    if _stamp(path) != {"data": data.index["sha256"], "base": base_sha256}:
        raise ValueError(f"{path} was made from other data or another base: run notebook 01_data_prep again")
    with safe_open(path, framework="pt") as file:
        moments = file.get_tensor("moments")
    rows = data.rows(split)
    text = base.tokenize([*data.prompts(rows, named), ""])
    if frozen_text:
        with torch.no_grad(), on_accelerator(base.text_encoder) as device:
            text = torch.cat([base.text_encoder(part.to(device))[0].cpu() for part in text.split(256)])
    return Latents(moments, text[:-1], torch.from_numpy(data.attributes(rows)), text[-1])
