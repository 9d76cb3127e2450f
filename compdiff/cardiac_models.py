"""The generators of a cardiac experiment: a base adapted to stacked frames, and the ControlNet branch on top of it.

text: the adapted base alone, prompts with all attributes; it never sees a mask (the unconditioned model). control: the
same base, locked unless asked otherwise, steered by a branch that reads masks, with an HCN token beside them if asked
for. So the two differ in the branch and in nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from compdiff import base as bases
from compdiff import controlnet, diffusion, record, train
from compdiff.cardiac import REHEARSAL, Studies, phantom_studies, sampling_weights, weighted_rows
from compdiff.config import Config
from compdiff.controlnet import ControlDenoiser, ControlLatents, StackedDiffusion
from compdiff.diffusion import Denoiser
from compdiff.interfaces import Conditioner, NoConditioner, NoReweighter
from compdiff.latents import Latents
from compdiff.methods import build_conditioner
from compdiff.paths import RunFolder

METHODS = ("text", "control")
LEARNT = ("unet", "text_encoder")  # of the base: when it is adapted, and in a run that does not lock it
SHIFT, TURN, ZOOM = 0.06, 12.0, 0.10  # limits of `varied`: share of the side, degrees, share of the scale


def mask_classes(studies: Studies) -> tuple[int, ...]:
    """Mask values to condition on: the cavity alone where some masks lack the others, else (and of phantoms, which have
    no source and exact masks) all of 1, 2, 3."""
    if not studies.source:
        return (1, 2, 3)
    masks = studies.masks("stacked", 64)
    return (1, 2, 3) if all((masks == v).any(axis=(1, 2, 3)).all() for v in (1, 2, 3)) else controlnet.CAVITY_ONLY


def varied(images: np.ndarray, masks: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stacked images and masks uint8 [N, S, S, 3] -> `n` of each, [n N, S, S, 3]: first as they are, then shifted,
    turned and scaled at random, picture and mask alike (masks by nearest neighbour). No flips: no body is symmetric."""
    rng = np.random.default_rng(seed)
    out_images, out_masks = [images], [masks]
    for _ in range(n - 1):
        angle = np.deg2rad(TURN * (2 * rng.random(len(images)) - 1))
        scale = 1 + ZOOM * (2 * rng.random(len(images)) - 1)
        shift = 2 * SHIFT * (2 * rng.random((len(images), 2)) - 1)  # of half the side, as affine_grid counts
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        theta = np.stack([np.stack([cos, -sin, shift[:, 0]], 1), np.stack([sin, cos, shift[:, 1]], 1)], 1)
        moved = []
        for pictures, mode in ((images, "bilinear"), (masks, "nearest")):
            x = torch.from_numpy(pictures).movedim(-1, 1).float()
            grid = F.affine_grid(torch.from_numpy(theta).float(), list(x.shape), align_corners=False)
            edge = "border" if mode == "bilinear" else "zeros"
            y = F.grid_sample(x, grid, mode=mode, padding_mode=edge, align_corners=False)
            moved.append(y.round().to(torch.uint8).movedim(1, -1).numpy())
        out_images.append(moved[0])
        out_masks.append(moved[1])
    return np.concatenate(out_images), np.concatenate(out_masks)


def latents(base: StackedDiffusion, studies: Studies, rows: np.ndarray, config: Config, seed: int,
            training: bool = True, said: tuple[str, ...] | None = None,
            classes: tuple[int, ...] = ()) -> ControlLatents:  # fmt: skip
    """Training data of some patients: `heart.variants` pictures of each (`training`), prompts that name the attributes
    `said` (None: all), masks with `classes` (default: `mask_classes`), and rows drawn by the clipped inverse frequency of their prompts
    (method section 5): once for all epochs, so that of a prompt with far more than 9 weight_clip rows (none in the demo)
    most are never seen."""
    images, masks = studies.images("stacked", config.data.size, rows), studies.masks("stacked", config.data.size, rows)
    prompts, attributes = np.array(studies.prompts(said))[rows], studies.attributes()[rows]
    if training:
        n = config.heart.variants
        images, masks = varied(images, masks, n, seed)
        prompts, attributes = np.tile(prompts, n), np.tile(attributes, (n, 1))
    made = controlnet.control_latents(base, images, masks, prompts.tolist(), attributes,
                                      classes or mask_classes(studies))  # fmt: skip
    if not training:
        return made
    return made.take(weighted_rows(sampling_weights(prompts.tolist(), config.heart.weight_clip), len(made), seed))


# --- the base ---------------------------------------------------------------------------------------------------------
def adapt(studies: Studies, rows: np.ndarray, valid: np.ndarray, config: Config, folder: Path, seed: int = 0) -> None:
    """Adapt the configured base to stacked frames of the patients `rows`: VAE, then UNet and text encoder, prompts with
    all attributes. Writes a base folder, moved into place when complete; one made of the same stays, a killed one goes
    on from the UNet's last checkpoint. Nothing to do without steps (a base in colour, such as SD-2.1, at paper scale)."""
    c = config.base_model
    if not c.vae_steps + c.unet_steps:
        return
    source = controlnet.stacked(diffusion.load(c.base, c.revision, c.base_sha256))
    images = studies.images("stacked", config.data.size, rows)
    masks = studies.masks("stacked", config.data.size, rows)
    run = replace(config, train=replace(config.train, steps=c.unet_steps, trained=LEARNT, lora_rank=0))
    validating = studies.images("stacked", config.data.size, valid)
    made_of = {
        "pictures": hashlib.sha256(images.tobytes() + masks.tobytes() + validating.tobytes()).hexdigest(),
        "prompts": np.array(studies.prompts())[rows].tolist(),
        "source": diffusion.fingerprint_of(config), "vae_steps": c.vae_steps, "train": asdict(run.train),
        "variants": config.heart.variants, "weight_clip": config.heart.weight_clip, "seed": seed,
    }  # fmt: skip
    marker = folder / "inputs.json"
    if marker.exists() and json.loads(marker.read_text()) == json.loads(json.dumps(made_of)):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    if c.vae_steps:
        seen, _ = varied(images, masks, config.heart.variants, seed)
        for _ in bases.train_vae(source.vae, seen, c.vae_steps, lr=1e-3, seed=seed):
            pass
        bases.set_scaling_factor(source, images)
    making = folder.with_name(f".{folder.name}")
    if c.unet_steps:
        data = [latents(source, studies, part, config, seed, t) for part, t in ((rows, True), (valid, False))]
        bases.train_unet(source, *(plain(part) for part in data), run, making / "run", seed)
    bases.publish(source, folder, making, made_of=made_of)
    shutil.rmtree(making)


def rehearsed(config: Config, folder: RunFolder) -> Config:
    """The settings for patients after a rehearsal: they start from the base of the phantoms. Unchanged without one."""
    if not config.heart.rehearsal_steps:
        return config
    base = str(folder.seed / "base" / REHEARSAL)
    return replace(config, base_model=replace(config.base_model, base=base, revision="", base_sha256=""))


def rehearse(config: Config, classes: tuple[int, ...], folder: RunFolder, seed: int) -> Config:
    """Base and branch learn from heart phantoms of a cohort of their own, `config.heart.rehearsal_steps` each, and the
    settings for patients (`rehearsed`) are returned. No patient is in it, so it serves all folds.

    classes: the mask values that the branch will be shown. The base stays locked beneath the branch, because patients
    start from both. Writes base/phantoms and train/control/phantoms.
    """
    steps, c, d, after = config.heart.rehearsal_steps, config.heart, config.data, rehearsed(config, folder)
    if after == config:  # without such steps, or rehearsed before
        return config
    drawn = phantom_studies(c.hearts, "rehearsal", seed=d.data_seed, prevalence=c.prevalence, interaction=d.interaction)
    rows, place = np.arange(c.hearts), folder.train("control") / REHEARSAL
    held = rows % 6 == 0
    vae_steps = round(0.4 * steps) if config.base_model.vae_steps else 0  # a base in colour keeps its VAE
    own = replace(config, base_model=replace(config.base_model, vae_steps=vae_steps, unet_steps=steps),
                  train=replace(config.train, steps=steps),
                  heart=replace(c, variants=4, rehearsal_steps=0, locked=True))  # fmt: skip
    base = folder.seed / "base" / REHEARSAL
    adapt(drawn, rows[~held], rows[held], own, base, seed)
    fit(drawn, rows[~held], rows[held], base, place, own, seed, classes)
    return after


def plain(data: ControlLatents) -> Latents:
    """The same rows without masks, for a model that reads none."""
    return Latents(data.moments, data.text, data.attributes, data.empty)


def load_base(folder: Path, config: Config) -> tuple[StackedDiffusion, str]:
    """The adapted base (the configured one where no steps of adaptation are asked for), and its fingerprint.

    ValueError when its VAE is grey and no step would teach it to tell ED from ES.
    """
    c = config.base_model
    adapted = bool(c.vae_steps + c.unet_steps)
    source = diffusion.load(str(folder)) if adapted else diffusion.load(c.base, c.revision, c.base_sha256)
    if source.vae.config.in_channels != 3 and not c.vae_steps:
        raise ValueError("the base's VAE is grey, stacked frames need three channels: set VAE_STEPS (600 are usual)")
    base = controlnet.stacked(source)
    down = 2 ** (len(base.vae.config.block_out_channels) - 1)
    base.unet.register_to_config(sample_size=config.data.size // down)
    return base, diffusion.fingerprint(folder) if adapted else diffusion.fingerprint_of(config)


# --- the models -------------------------------------------------------------------------------------------------------
def conditioner(studies: Studies, d_ctx: int, config: Config, seed: int) -> Conditioner:
    """The HCN over all attributes where the setting `token` asks for it, else none."""
    if not config.heart.token:
        return NoConditioner(d_ctx)
    torch.manual_seed(seed)
    age = studies.schema.names.index("age") if "age" in studies.schema.names else None
    return build_conditioner("hcn", list(studies.schema.sizes), d_ctx, config.hcn, age)


def named(method: str, config: Config) -> tuple[str, ...] | None:
    """Attributes that the prompt names: none where the token carries them, else all (None)."""
    return () if method == "control" and config.heart.token else None


def _settings(config: Config) -> Config:
    return replace(config, train=replace(config.train, trained=() if config.heart.locked else LEARNT))


def fit(studies: Studies, rows: np.ndarray, valid: np.ndarray, base_folder: Path, folder: Path, config: Config,
        seed: int, classes: tuple[int, ...] = ()) -> pd.DataFrame:  # fmt: skip
    """Train the branch on masks and pictures of the patients `rows`, by the one loop; its log. classes: mask values
    that it is shown (default: `mask_classes`). After a rehearsal it starts from the branch of the phantoms."""
    base, sha256 = load_base(base_folder, config)
    if config.heart.rehearsal_steps:
        base.branch = str(folder.with_name(REHEARSAL) / "weights.safetensors")
        sha256 = record.sha256_json([sha256, record.sha256_file(Path(base.branch))])
    said = named("control", config)
    data = [latents(base, studies, part, config, seed, t, said, classes) for part, t in ((rows, True), (valid, False))]
    heads = conditioner(studies, base.d_ctx, config, seed)
    return train.run(_settings(config), base, sha256, *data, heads, NoReweighter(), folder, None, seed,
                     denoiser=ControlDenoiser)  # fmt: skip


def restore(method: str, studies: Studies, base_folder: Path, folder: Path, config: Config
            ) -> tuple[Denoiser, StackedDiffusion, str]:  # fmt: skip
    """A model in evaluation mode, its base, and the sha256 of its weights. folder: of the branch; `text` reads none.

    ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    base, sha256 = load_base(base_folder, config)
    if method == "text":
        return Denoiser(base, NoConditioner(base.d_ctx)).eval(), base, sha256
    model = ControlDenoiser(base, conditioner(studies, base.d_ctx, config, 0))
    weights = folder / "weights.safetensors"
    train.load_weights(model, diffusion.trainable(model, _settings(config).train), weights)
    return model, base, record.sha256_file(weights)
