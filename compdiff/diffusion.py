"""The latent diffusion model in Stable Diffusion's own layout: load its parts, encode, noise, target, decode.

The tiny base and SD-2.1 go through the same functions.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# Nothing but errors on stderr, where notebooks are compared: set before the import, which already speaks.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import cached_file

from compdiff import paths, record
from compdiff.config import Config, TrainConfig
from compdiff.devices import on_accelerator

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
WEIGHTS = ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors")
VAE_IMAGES, VAE_PIXELS = 64, 2**20  # that the VAE sees at once, at most: 64 images of 64 x 64, 4 of 512 x 512
PROMPTS = 10_000  # that the tokenizer sees at once


@dataclass
class Diffusion:
    """The five parts of a Stable Diffusion folder. d_ctx is the width of the UNet's cross-attention."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    own_scheduler: str = "DDPMScheduler"  # diffusers class that the folder names, for the solver "base"

    @property
    def d_ctx(self) -> int:
        return self.unet.config.cross_attention_dim

    @property
    def channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def down(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device | str) -> Diffusion:
        for part in (self.text_encoder, self.vae, self.unet):
            part.to(device)
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids [B, T], padded and cut to the encoder's length."""
        length = self.text_encoder.config.max_position_embeddings
        how = dict(padding="max_length", truncation=True, max_length=length)
        ids = [torch.empty(0, length, dtype=torch.long)]
        for start in range(0, len(prompts), PROMPTS):  # the tokenizer's own answer takes kilobytes per prompt
            encoded = self.tokenizer(list(prompts[start : start + PROMPTS]), **how)
            ids.append(torch.tensor(encoded["input_ids"], dtype=torch.long))
        return torch.cat(ids)

    @torch.no_grad()
    def moments(self, images: np.ndarray) -> Tensor:
        """Grey images uint8 [N, S, S] -> mean and log-variance of q(z|x), [N, 2C, h, w] (unscaled)."""
        out, batch = [], at_once(images.shape[1])
        with on_accelerator(self.vae) as device:
            for start in range(0, len(images), batch):
                x = to_model(images[start : start + batch], self.vae.config.in_channels).to(device)
                out.append(self.vae.encode(x).latent_dist.parameters.cpu())
        return torch.cat(out)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """z = scale * (mean + std * noise), [B, C, h, w]; the mean when `noise` is None."""
        mean, logvar = moments.chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
        return z * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Scaled latents [B, C, h, w] -> grey images uint8 [B, S, S]. FloatingPointError when one is no number."""
        out = []
        for part in latents.split(at_once(latents.shape[-1] * self.down)):
            x = self.vae.decode(part / self.vae.config.scaling_factor).sample
            if not x.isfinite().all():
                raise FloatingPointError("decoded images hold NaN or infinity: set PRECISION=no (fp16 overflows)")
            out.append(self.pictures(x))
        return np.concatenate(out)

    def pictures(self, x: Tensor) -> np.ndarray:
        """What the VAE decodes, float [B, c, S, S] -> what `decode` returns of it."""
        return to_images(x)

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet learns to predict: the noise, or v = sqrt(abar) noise - sqrt(1 - abar) z."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(z, noise, t)
        raise ValueError(f"prediction type {kind!r} is not supported (epsilon, v_prediction)")

    def sampler(self, solver: str):
        """A fresh diffusers scheduler with the base's noise schedule."""
        if solver == "dpm++":
            return DPMSolverMultistepScheduler.from_config(
                self.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, lower_order_final=True
            )
        if solver == "ddpm":
            return DDPMScheduler.from_config(self.scheduler.config)
        if solver == "base":
            return getattr(diffusers, self.own_scheduler).from_config(self.scheduler.config)
        if solver == "ddim":
            return DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)
        raise ValueError(f"unknown solver {solver!r}; known: dpm++, ddpm, ddim, base")

    def pipeline(self) -> StableDiffusionPipeline:
        """The same parts as diffusers' own pipeline, with the scheduler that the folder names."""
        return StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=self.sampler("base"), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def save(self, folder: Path, half: bool = False) -> None:
        """Write a folder that `StableDiffusionPipeline.from_pretrained` opens too (`half`: stored as float16)."""
        pipeline = (copy.deepcopy(self) if half else self).pipeline()  # the conversion works in place
        if half:
            pipeline.to(dtype=torch.float16)
        pipeline.save_pretrained(folder, safe_serialization=True)


def step_back(scheduler, prediction: Tensor, t: Tensor, z: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One step of a scheduler of `Diffusion.sampler`; those that draw noise take each sample's from its generator."""
    random = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    return scheduler.step(prediction, t, z, return_dict=False, **random)[0]


def at_once(side: int) -> int:
    """Images of side x side pixels that the VAE sees at once, so that its memory grows with neither their size nor number."""
    return max(1, min(VAE_IMAGES, VAE_PIXELS // side**2))


def to_model(images: np.ndarray, channels: int) -> Tensor:
    """Grey uint8 [B, S, S] or stacked [B, S, S, channels] -> float [-1, 1] [B, channels, S, S]."""
    x = torch.from_numpy(np.asarray(images, dtype=np.float32) / 127.5 - 1.0)
    return (x.movedim(-1, 1) if x.ndim == 4 else x[:, None]).expand(-1, channels, -1, -1).contiguous()


def to_images(x: Tensor) -> np.ndarray:
    """Float [-1, 1] [B, c, S, S] -> grey uint8 [B, S, S]."""
    grey = x.float().clamp(-1, 1).mean(dim=1)  # a colour decoder's channels are clamped as diffusers does, one by one
    return ((grey + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def load(base: str, revision: str = "", sha256: str = "") -> Diffusion:
    """Load a base by folder or hub id ("tiny" = the shipped one); safetensors only, weights in float32.

    A hub id needs the commit as its `revision`: what a branch or tag names can change. FileNotFoundError names the
    missing part; ValueError when the revision is no commit, or `sha256` is neither the UNet's weight file's nor the
    `fingerprint` of the folder.
    """
    folder = paths.TINY_BASE if base == "tiny" else Path(base)
    source, where = str(folder), dict(local_files_only=True)
    if not base:
        raise FileNotFoundError(
            "no base model named: set BASE= (parameter `base`) to a folder in Stable Diffusion's layout, or to a hub id "
            "with REVISION=. SD-2.1's weights left their original address in November 2025; only mirrors remain."
        )
    if not folder.is_dir():
        if base.startswith((".", "/", "~")) or not revision:
            raise FileNotFoundError(f"base {base!r} is no folder here (for a hub id, name its revision too)")
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError(f"revision {revision!r} of {base!r} is no commit: name its 40 digits, not a branch or tag")
        source, where = base, dict(revision=revision)
    elif missing := [p for p in ("model_index.json", *PARTS) if not (folder / p).exists()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: not a Stable Diffusion folder")
    elif missing := [w for w in WEIGHTS if not (folder / w).exists()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: pickled weights (.bin) are not read")
    if sha256:
        found = [record.sha256_file(cached_file(source, WEIGHTS[-1], **where))]
        if sha256 not in found and folder.is_dir():
            found.append(fingerprint(folder))
        if sha256 not in found:
            raise ValueError(f"the UNet weights of {base!r} have sha256 {', the whole folder '.join(found)}, expected {sha256}")
    kwargs = dict(torch_dtype=torch.float32, use_safetensors=True, **where)
    return Diffusion(
        tokenizer=CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where),
        text_encoder=CLIPTextModel.from_pretrained(
            source, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True, **where
        ).eval(),
        vae=AutoencoderKL.from_pretrained(source, subfolder="vae", **kwargs).eval().requires_grad_(False),
        unet=UNet2DConditionModel.from_pretrained(source, subfolder="unet", **kwargs).eval(),
        # latents are no pixels: nothing to clip; a folder that names another scheduler need not say so
        scheduler=DDPMScheduler.from_pretrained(source, subfolder="scheduler", clip_sample=False, **where),
        own_scheduler=DDPMScheduler.load_config(source, subfolder="scheduler", **where)["_class_name"],
    )


def fingerprint(folder: Path) -> str:
    """sha256 over the files of a base folder, names and contents; not its recipe.json, which names this hash."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != "recipe.json")
    return record.sha256_json({str(p.relative_to(folder)): record.sha256_file(p) for p in files})


def load_for(run_folder: paths.RunFolder, config: Config) -> tuple[Diffusion, str]:
    """The base that a run works with, and its fingerprint: the run's adapted copy where notebook 01 made one.

    Errors: as `load`; FileNotFoundError when the settings ask for an adapted base and 01 has not written it.
    """
    c = config.base_model
    if c.vae_steps or c.unet_steps:
        if not run_folder.base.is_dir():
            raise FileNotFoundError(f"{run_folder.base} is missing: run notebook 01_data_prep")
        base, sha256 = load(str(run_folder.base)), fingerprint(run_folder.base)
    else:
        base, sha256 = load(c.base, c.revision, c.base_sha256), fingerprint_of(config)
    base.unet.register_to_config(sample_size=config.data.size // base.down)  # generated images are as large as the data's
    return base, sha256


def fingerprint_of(config: Config) -> str:
    """Fingerprint of the configured base: its files, or hub id and revision where it is no folder."""
    c = config.base_model
    folder = paths.TINY_BASE if c.base == "tiny" else Path(c.base)
    return fingerprint(folder) if folder.is_dir() else record.sha256_json([c.base, c.revision])


class Denoiser(nn.Module):
    """What is trained: UNet, text encoder and conditioner in one module, so that one wrapper (DDP) covers them."""

    def __init__(self, base: Diffusion, conditioner: nn.Module, columns: Sequence[int] | None = None, precision: str = "no"):
        super().__init__()
        self.unet, self.text_encoder, self.conditioner = base.unet, base.text_encoder, conditioner
        self.columns = columns  # which attributes the conditioner sees; None: all
        self.precision = precision  # in which images are drawn: TrainConfig.precision

    def encoded(self, attributes: Tensor) -> Tensor:
        return attributes if self.columns is None else attributes[:, list(self.columns)]

    def penalties(self, condition, attributes: Tensor, progress: float) -> dict[str, Tensor]:
        """The conditioner's weighted losses, {name: [B]}."""
        return self.conditioner.penalties(condition, self.encoded(attributes), progress)

    def context(self, ids: Tensor, attributes: Tensor, noise=None, keep: Tensor | None = None):
        """Token ids [B, T] or embeddings [B, T, d_ctx], attributes [B, K] -> context [B, T + n, d_ctx], condition.

        `keep` [B] in {0, 1} zeroes the demographic tokens of some samples (the unconditional branch of guidance).
        """
        text = ids if ids.is_floating_point() else self.text_encoder(ids)[0]  # [B, T, d_ctx]
        condition = self.conditioner(self.encoded(attributes), noise)
        tokens = condition.tokens if keep is None else condition.tokens * keep[:, None, None]
        return torch.cat([text, tokens.to(text.dtype)], dim=1), condition

    def predict(self, noisy: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Noisy latents [B, C, h, w], timesteps [B] or one, context [B, T + n, d_ctx] -> prediction [B, C, h, w]."""
        return self.unet(noisy, t, context).sample

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor, attributes: Tensor, noise=None, keep: Tensor | None = None, **extra: Tensor):
        """Noisy latents [B, C, h, w], timesteps [B] -> prediction [B, C, h, w] and the conditioner's output.

        `extra`: what `predict` of a subclass needs besides (`Latents.extra`).
        """
        context, condition = self.context(ids, attributes, noise, keep)
        return self.predict(noisy, t, context, **extra), condition


def trainable(model: Denoiser, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Freeze everything but what `config.trained` names, and the conditioner; {name: parameter} of the rest.

    With `lora_rank` > 0 the UNet is frozen and low-rank adapters on its attention projections are trained. The model
    remembers the precision.
    """
    known = {"unet", "text_encoder"}
    if odd := set(config.trained) - known:
        raise ValueError(f"trained={sorted(odd)}: only {sorted(known)} can be trained")
    model.unet.requires_grad_("unet" in config.trained and config.lora_rank == 0)
    model.text_encoder.requires_grad_("text_encoder" in config.trained)
    if "unet" in config.trained and config.lora_rank > 0:
        projections = ["to_q", "to_k", "to_v", "to_out.0"]
        with torch.random.fork_rng(devices=[]):  # the same start in every process and after every restart
            torch.default_generator.manual_seed(0)
            rank = config.lora_rank
            model.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=projections))
    model.precision = config.precision
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
