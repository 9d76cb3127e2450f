"""Guided sampling, and synthetic sets on disk. An image's randomness depends on (run seed, prompt id) only."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm.auto import tqdm

from compdiff import record
from compdiff.config import SampleConfig
from compdiff.diffusion import Denoiser, Diffusion

LABEL = "synthetic image, not a patient"


def image_seed(run_seed: int, prompt_id: str) -> int:
    """63-bit seed of one image: a stable hash, the same on any machine, GPU count and batch."""
    digest = hashlib.sha256(f"{run_seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def sample(model: Denoiser, base: Diffusion, text: Tensor, empty: Tensor, attributes: Tensor, seeds: list[int],
           config: SampleConfig) -> np.ndarray:  # fmt: skip
    """Classifier-free guidance: eps = eps(null) + g (eps(context) - eps(null)), both in one batch.

    text [B, T] ids or [B, T, d_ctx], empty [T] or [T, d_ctx], attributes [B, K] -> grey uint8 images [B, S, S]. The
    null context is the empty prompt with all-zero demographic tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    n, side = len(seeds), base.unet.config.sample_size
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    shape = (base.channels, side, side)
    z = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)  # [B, C, h, w]
    text, attributes = text.to(device), attributes.to(device)
    context, _ = model.context(text, attributes)  # [B, T + n, d_ctx]
    null, _ = model.context(empty.to(device).expand_as(text), attributes, keep=torch.zeros(n, device=device))
    both = torch.cat([null, context])
    scheduler = base.sampler(config.solver)
    scheduler.set_timesteps(config.sample_steps)
    z = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(z, t)
        if config.guidance == 1.0:
            prediction = model.unet(scaled, t, context).sample
        else:
            unconditional, conditional = model.unet(torch.cat([scaled, scaled]), t, both).sample.chunk(2)
            prediction = unconditional + config.guidance * (conditional - unconditional)
        z = scheduler.step(prediction, t, z, generator=generators, return_dict=False)[0]
    return base.decode(z)


def generate(folder: Path, rows: pd.DataFrame, prompts: list[str], attributes: np.ndarray, model: Denoiser, base: Diffusion,
             config: SampleConfig, method: str, checkpoint: str, seed: int, bar: bool = False) -> pd.DataFrame:  # fmt: skip
    """One synthetic set: `folder`/images/<id>.png for every row, then samples.csv. Restarts where it stopped.

    `rows` holds id and the attribute columns; `checkpoint` is the sha256 of the weights. A folder made by other weights,
    prompts or settings is made anew.
    """
    folder = Path(folder)
    made_of = record.sha256_json([checkpoint, method, seed, config.solver, config.sample_steps, config.guidance,
                                  rows["id"].tolist(), prompts, np.asarray(attributes).tolist()])  # fmt: skip
    table = rows.assign(prompt=prompts, seed=[image_seed(seed, i) for i in rows["id"]], method=method, checkpoint=checkpoint)
    listing, marker = folder / "samples.csv", folder / "inputs.txt"
    if not marker.exists() or marker.read_text() != made_of:
        listing.unlink(missing_ok=True)
        for old in (folder / "images").glob("*.png"):
            old.unlink()
        record.write_text(marker, made_of)
    if not listing.exists():
        missing = np.flatnonzero([not (folder / "images" / f"{i}.png").exists() for i in table["id"]])
        text, empty = base.tokenize(prompts), base.tokenize([""])[0]
        for part in tqdm(np.split(missing, range(config.sample_batch, len(missing), config.sample_batch)), disable=not bar):
            seeds = table["seed"].iloc[part].tolist()
            images = sample(model, base, text[part], empty, torch.as_tensor(attributes)[part], seeds, config)
            for row, image in zip(part, images, strict=True):
                save_png(folder / "images" / f"{table['id'].iloc[row]}.png", image)
        with record.atomic(listing) as temporary:
            table.to_csv(temporary, index=False)
    return table


def save_png(path: Path, image: np.ndarray) -> None:
    """Grey uint8 [S, S] -> PNG whose metadata says that it is synthetic."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", LABEL)
    with record.atomic(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=info)


def read_images(folder: Path, ids: list[str]) -> np.ndarray:
    """Images of a synthetic set in the order of `ids`, uint8 [n, S, S]. FileNotFoundError names what is missing."""
    return np.stack([np.asarray(Image.open(Path(folder) / "images" / f"{i}.png").convert("L")) for i in ids])
