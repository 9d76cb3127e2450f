"""From names to objects: the conditioner and the reweighter of a method (config.METHODS).

A method's modules are imported only when it is built, so a stage that trains one method depends on that method's
sources and on no other's (`Stage.loads` in the stage table names them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator

from compdiff import datasets, latents, train
from compdiff.attributes import Schema
from compdiff.config import ALL, METHODS, Config, FairConfig, HCNConfig
from compdiff.diffusion import Denoiser, Diffusion, load_for, trainable
from compdiff.interfaces import Conditioner, NoConditioner, NoReweighter, Reweighter
from compdiff.paths import RunFolder

# Method.conditioner -> (module, class, further arguments)
CONDITIONERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "flat": ("compdiff.flat", "FlatEncoder", {"mode": "single"}),
    "flat_separate": ("compdiff.flat", "FlatEncoder", {"mode": "separate"}),
    "hcn": ("compdiff.hcn", "HCN", {}),
}
REWEIGHTER = ("compdiff.fairdiffusion", "FairReweighter")


def build_conditioner(
    name: str, sizes: Sequence[int], d_ctx: int, config: HCNConfig, age_index: int | None = None
) -> Conditioner:
    """`Method.conditioner` -> object. `sizes`: C_k of the *encoded* attributes; `age_index`: age among them."""
    if name == "none":
        return NoConditioner(d_ctx)
    if name not in CONDITIONERS:
        raise ValueError(f"unknown conditioner {name!r}; known: none, {', '.join(CONDITIONERS)}")
    module, cls, arguments = CONDITIONERS[name]
    return getattr(import_module(module), cls)(sizes, d_ctx, config, age_index, **arguments)


def build_reweighter(fair: bool, schema: Schema, config: FairConfig) -> Reweighter:
    """`Method.fair` -> object. Groups are those of `config`, encoded or not."""
    if not fair:
        return NoReweighter()
    module = import_module(REWEIGHTER[0])
    return getattr(module, REWEIGHTER[1])(schema.sizes, config, module.columns_of(schema, config))


@dataclass(frozen=True)
class Parts:
    """What one method hands to the training loop."""

    conditioner: Conditioner
    reweighter: Reweighter
    columns: list[int]  # attributes that the conditioner encodes
    named: tuple[str, ...]  # attributes that the prompt names: the others


def build(method: str, schema: Schema, d_ctx: int, config: Config, seed: int) -> Parts:
    """The objects of `method`, initialised from `seed`. An attribute is either encoded or named in the prompt."""
    row = METHODS[method]
    named = tuple(n for n in schema.names if row.conditioner == "none" or n in row.in_prompt or row.in_prompt == ALL)
    encoded = [n for n in schema.names if n not in named]
    columns = [schema.names.index(n) for n in encoded]
    age_index = encoded.index("age") if "age" in encoded else None
    torch.manual_seed(seed)
    sizes = [schema.sizes[k] for k in columns]
    conditioner = build_conditioner(row.conditioner, sizes, d_ctx, config.hcn, age_index)
    return Parts(conditioner, build_reweighter(row.fair, schema, config.fair), columns, named)


def restore(method: str, folder: Path, base: Diffusion, schema: Schema, config: Config) -> tuple[Denoiser, Parts]:
    """The trained model of `folder`/weights.safetensors, in evaluation mode. Changes `base` in place."""
    parts = build(method, schema, base.d_ctx, config, seed=0)
    model = Denoiser(base, parts.conditioner, parts.columns)
    train.load_weights(model, trainable(model, config.train), Path(folder) / "weights.safetensors")
    return model, parts


def fit(method: str, folder: RunFolder, config: Config, seed: int, accelerator: Accelerator | None = None) -> pd.DataFrame:
    """Train `method` on what notebook 01 prepared in `folder`, by the one loop; returns the log."""
    accelerator = accelerator or train.new_accelerator(config.train)
    base, base_sha256 = load_for(folder, config)
    data = datasets.load(folder.data)
    parts = build(method, data.schema, base.d_ctx, config, seed)
    if frozen := "text_encoder" not in config.train.trained:
        share = accelerator.process_index, accelerator.num_processes
        latents.write_text(folder.latents, data, base.to(accelerator.device), base_sha256, parts.named, share)
        accelerator.wait_for_everyone()
    rows, valid = (latents.read(folder.latents, data, base, base_sha256, s, parts.named, frozen) for s in ("train", "val"))
    return train.run(config, base, base_sha256, rows, valid, parts.conditioner, parts.reweighter, folder.train(method),
                     parts.columns, seed, accelerator)  # fmt: skip
