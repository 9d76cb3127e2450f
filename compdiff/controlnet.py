"""ControlNet: a trained copy of the UNet's encoder reads the mask and speaks to the base through zero convolutions.

Method section 5. The copy starts from the base's weights; its outputs pass 1x1 convolutions that start at zero, so at
step 0 the model *is* the base, and learning cannot begin by destroying it. Works on any base in Stable Diffusion's
layout, with any demographic conditioner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file
from torch import Tensor, nn

from compdiff.diffusion import Denoiser, Diffusion
from compdiff.latents import Latents

EMBEDDING = (16, 32, 96, 256)  # widths of the picture's encoder, halving the side between two: as deep as the VAE
MAX_MASK = 3  # largest mask value
CAVITY_ONLY = (1,)  # for sources in which only some masks show the myocardium


class ControlDenoiser(Denoiser):
    """`Denoiser` with a control branch. Branch and conditioner always learn; the base is locked where
    TrainConfig.trained is empty.

    Prompt and tokens reach the branch as they reach the UNet: as its context [B, T + n, d_ctx].
    """

    def __init__(
        self, base: Diffusion, conditioner: nn.Module, columns: Sequence[int] | None = None, channels: int = 3
    ):
        super().__init__(base, conditioner, columns)
        depth = len(base.vae.config.block_out_channels)  # picture [B, c, 2^(depth-1) h, ...] -> latents [B, C, h, w]
        with torch.random.fork_rng(devices=[]):  # the same start in every process and after every restart
            torch.default_generator.manual_seed(0)
            self.control = ControlNetModel.from_unet(
                base.unet, conditioning_embedding_out_channels=EMBEDDING[:depth], conditioning_channels=channels
            )
        if branch := getattr(base, "branch", ""):
            kept = {k.removeprefix("control."): v for k, v in load_file(branch).items() if k.startswith("control.")}
            self.control.load_state_dict(kept)
        self.control.to(base.unet.device)

    def predict(self, noisy: Tensor, t: Tensor, context: Tensor, picture: Tensor) -> Tensor:
        """As `Denoiser.predict`, with the condition picture [B, channels, S, S] in [0, 1]."""
        down, mid = self.control(noisy, t, context, picture, return_dict=False)
        return self.unet(
            noisy, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample


def to_picture(masks: np.ndarray | Tensor, classes: Sequence[int] = (1, 2, 3)) -> Tensor:
    """Stacked masks uint8 [B, S, S, 3] -> condition float [B, 3, S, S], value / 3; other `classes` become 0.

    ValueError for a mask value above 3.
    """
    masks = torch.as_tensor(masks)
    if masks.ndim != 4 or masks.shape[-1] != 3 or int(masks.max()) > MAX_MASK:
        raise ValueError(
            f"masks must be [B, S, S, 3] with values 0-{MAX_MASK}, got {list(masks.shape)}, largest {int(masks.max())}"
        )
    keep = torch.isin(masks, torch.tensor(list(classes), dtype=masks.dtype, device=masks.device))
    return (masks * keep).movedim(-1, 1).float() / MAX_MASK


# --- pictures with three channels -------------------------------------------------------------------------------------
@dataclass
class StackedDiffusion(Diffusion):
    """A base whose decoder returns colour channels: uint8 [B, S, S, 3] instead of grey [B, S, S].

    `negative`: a prompt that stands wherever the empty one would; guidance then leads away from what it says.
    `branch`: weights.safetensors of a trained branch, from which a new one starts; "" = from the UNet, at zero.
    """

    negative: str = ""
    branch: str = ""

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        return super().tokenize([prompt or self.negative for prompt in prompts])

    def pictures(self, x: Tensor) -> np.ndarray:
        """What the VAE decodes, float [B, 3, S, S] -> stacked images uint8 [B, S, S, 3]."""
        x = x.float().clamp(-1, 1)
        return ((x + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu().numpy()


def stacked(base: Diffusion) -> StackedDiffusion:
    """The base for stacked frames [B, S, S, 3]. A grey VAE is widened: grey in three channels passes as in one.

    Its other parts are shared, not copied. The widened VAE must be fine-tuned (`base.train_vae`) before channels can
    differ.
    """
    vae = base.vae
    if vae.config.in_channels != 3:
        weights = vae.state_dict()
        weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"].expand(-1, 3, -1, -1) / 3
        for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
            weights[name] = weights[name].repeat(3, *[1] * (weights[name].ndim - 1))
        wide = type(vae).from_config({**vae.config, "in_channels": 3, "out_channels": 3})
        wide.load_state_dict(weights)
        vae = wide.to(vae.device).eval().requires_grad_(False)
    return StackedDiffusion(base.tokenizer, base.text_encoder, vae, base.unet, base.scheduler, base.own_scheduler)


# --- training data ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ControlLatents(Latents):
    """`Latents` with the condition of every row; `extra` is what the one loop hands to the denoiser besides the
    usual."""

    masks: Tensor  # uint8 [N, S, S, 3]
    classes: tuple[int, ...]  # mask values shown to the model

    def extra(self, rows: Tensor | slice) -> dict[str, Tensor]:
        return {"picture": to_picture(self.masks[rows], self.classes)}

    def take(self, rows: np.ndarray) -> ControlLatents:
        """Only these rows, in this order, with repeats (`cardiac.weighted_rows`)."""
        at = torch.as_tensor(rows)
        kept = {name: getattr(self, name)[at] for name in ("moments", "text", "attributes", "masks")}
        return replace(self, **kept)


def control_latents(
    base: Diffusion,
    images: np.ndarray,
    masks: np.ndarray,
    prompts: Sequence[str],
    attributes: np.ndarray,
    classes: Sequence[int] = (1, 2, 3),
) -> ControlLatents:
    """Stacked images and masks uint8 [N, S, S, 3], prompts and category indices [N, K] -> training data of one split.

    ValueError when numbers or sizes differ, or a mask holds an unknown value.
    """
    if images.shape != masks.shape or not len(images) == len(prompts) == len(attributes):
        sizes = f"{images.shape}, {masks.shape}, {len(prompts)} and {len(attributes)}"
        raise ValueError(f"images, masks, prompts and attributes do not fit: {sizes}")
    to_picture(masks)
    text = base.tokenize([*prompts, ""])
    return ControlLatents(
        base.moments(images), text[:-1], torch.as_tensor(attributes), text[-1], torch.as_tensor(masks), tuple(classes)
    )
