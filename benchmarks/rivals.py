"""The baselines of `make bench`, written out plainly: a diffusers-style training step, diffusers' pipeline, Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from torch.nn import functional as F

from compdiff import sample
from compdiff.config import SampleConfig
from compdiff.datasets import Data
from compdiff.diffusion import Diffusion

BOTH = ("unet", "text_encoder")


def plain_step(base: Diffusion, images: np.ndarray, moments: torch.Tensor | None, ids: torch.Tensor,
               trained: tuple[str, ...] = BOTH, clip_and_average: bool = False) -> Callable[[], None]:  # fmt: skip
    """What a diffusers training script does: (encode,) add noise, UNet, MSE, AdamW; one call is one step.

    moments: cached ones; None encodes `images` in each step. clip_and_average: with its gradient clipping and its
    average of the weights besides, which our loop always has.
    """
    base.text_encoder.requires_grad_("text_encoder" in trained)
    params = [p for name in trained for p in getattr(base, name).parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-5)
    average = EMAModel(params) if clip_and_average else None

    def step() -> None:
        q = base.moments(images) if moments is None else moments
        z = base.latents(q, torch.randn(len(ids), base.channels, *q.shape[2:]))
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(ids),))
        prediction = base.unet(base.scheduler.add_noise(z, noise, t), t, base.text_encoder(ids)[0]).sample
        F.mse_loss(prediction, base.target(z, noise, t)).backward()
        if average:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.step(params)

    return step


def bare_unet(base: Diffusion, moments: torch.Tensor, ids: torch.Tensor) -> Callable[[], None]:
    """What no training step of this UNet can do without: one call is one pass forward and backward, and nothing else."""
    z, t = base.latents(moments), torch.randint(0, 1000, (len(ids),))
    with torch.no_grad():
        context = base.text_encoder(ids)[0]

    def step() -> None:
        F.mse_loss(base.unet(z, t, context).sample, z).backward()
        base.unet.zero_grad()

    return step


def seeds(rows: pd.DataFrame) -> list[int]:
    return [sample.image_seed(0, i) for i in rows["id"]]


def by_pipeline(base: Diffusion, data: Data, config: SampleConfig) -> Callable[[pd.DataFrame], np.ndarray]:
    """Draws the prompts of some rows by diffusers' own pipeline, from the first noise that ours starts with."""
    pipe = base.pipeline()
    pipe.scheduler = base.sampler(config.solver)
    pipe.set_progress_bar_config(disable=True)

    def draw(rows: pd.DataFrame) -> np.ndarray:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds(rows)]
        made = pipe(data.prompts(rows), num_inference_steps=config.sample_steps, guidance_scale=config.guidance,
                    generator=noise, output_type="np").images  # fmt: skip
        return (255 * made.mean(axis=3)).round().astype(np.uint8)

    return draw


def plain_png(file: Path, size: int) -> bytes:
    """A JPG as a grey PNG of size x size: decode, resize, pad, encode."""
    buffer = io.BytesIO()
    with Image.open(file) as image:
        ImageOps.pad(image.convert("L"), (size, size), Image.Resampling.LANCZOS).save(buffer, format="PNG")
    return buffer.getvalue()
