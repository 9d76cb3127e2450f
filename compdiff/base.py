"""The tiny base model: a small Stable Diffusion trained from nothing on phantoms (`make base`), or adapted to real data.

It knows what the modalities look like and reads findings, but its cohort is disjoint from every experiment's, lacks
the held-out cells, and its prompts carry no demographics.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from compdiff import diffusion, paths, record, train
from compdiff.attributes import prompt
from compdiff.cohorts import draw_phantoms
from compdiff.config import Config, DataConfig, settings
from compdiff.datasets import Data
from compdiff.interfaces import NoConditioner, NoReweighter
from compdiff.latents import Latents
from compdiff.manifests import Manifest, load_manifest

PHANTOMS = ("chest", "fundus")  # what the tiny base is trained on
DIALS = (0.0, 0.5, 1.0)  # the interaction dial of a third of its cohort each


def vae_loss(vae, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 on pixels and on their differences (keeps edges such as ribs and vessels) + 5e-4 KL per latent value."""
    q = vae.encode(x).latent_dist
    z = q.mean + q.std * torch.randn(q.mean.shape, generator=generator).to(x.device)
    y = vae.decode(z).sample
    edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    kl = 0.5 * (q.mean.square() + q.var - 1 - q.logvar).mean()
    return F.l1_loss(y, x) + edges + 5e-4 * kl


def train_vae(vae, images: np.ndarray, steps: int, batch: int = 16, lr: float = 2e-3, seed: int = 0) -> Iterator[dict]:
    """Train `vae` in place on grey uint8 images [N, S, S]; yields {"step", "loss"}. One-cycle learning rate."""
    generator = torch.Generator().manual_seed(seed)
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        loss = vae_loss(vae, diffusion.to_model(images[rows.numpy()], vae.config.in_channels).to(vae.device), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield {"step": step + 1, "loss": loss.item()}
    vae.eval().requires_grad_(False)


def set_scaling_factor(base: diffusion.Diffusion, images: np.ndarray) -> None:
    """Scale latents to unit standard deviation, as Stable Diffusion's 0.18215 does for its own VAE."""
    base.vae.register_to_config(scaling_factor=1.0)
    mean = base.latents(base.moments(images))
    base.vae.register_to_config(scaling_factor=float(1.0 / mean.std()))


def cohort(manifest: Manifest, n: int, size: int, seed: int = 0) -> tuple[list[dict], np.ndarray]:
    """`n` phantoms for the base: rows and images. Even over all cells but the held-out ones, ids "<dataset>-base<dial>-...".

    Ids decide what a phantom looks like, so no image of it stands in any experiment's splits.
    """
    cells = [c for c in manifest.schema.cells() if c not in manifest.held_out]
    rows, images = [], []
    for dial in DIALS:
        config = DataConfig(size=size, interaction=dial, data_seed=seed)
        chosen = [cells[i % len(cells)] for i in range(round(n / len(DIALS)))]
        for row, image in draw_phantoms(manifest, config, f"base{dial:g}", chosen):
            rows.append(row)
            images.append(image)
    return rows, np.stack(images)


def prompts_without_demographics(manifest: Manifest, rows: Sequence[dict]) -> list[str]:
    """Findings only: the template that names no attribute."""
    return [prompt(manifest.prompts, row, (), manifest.schema) for row in rows]


def corpus() -> list[str]:
    """Texts whose words become tokens: every prompt template, category and finding of every manifest."""
    texts = ["hypertrophy, heart failure with infarct, without infarct, healthy, overweight BMI, obese, normal, age in 60s"]
    for path in sorted(paths.MANIFESTS.glob("*.yaml")):
        manifest = load_manifest(path.stem)
        texts += [*manifest.prompts, *(c for a in manifest.schema.attributes for c in a.categories), manifest.describe(dict.fromkeys(manifest.labels, 0))]
        texts += [phrase for phrases in manifest.labels.values() for phrase in phrases]
    return texts


def as_latents(base: diffusion.Diffusion, images: np.ndarray, prompts: Sequence[str]) -> Latents:
    """Images and prompts without attributes, as the training loop reads them."""
    text = base.tokenize([*prompts, ""])
    return Latents(base.moments(images), text[:-1], torch.zeros(len(images), 1, dtype=torch.long), text[-1])


def train_unet(base: diffusion.Diffusion, data: Latents, valid: Latents, config: Config, folder: Path, seed: int = 0) -> None:
    """Train UNet and text encoder in place by the one training loop, without conditioner and reweighting."""
    conditioner = NoConditioner(base.d_ctx)
    train.run(config, base, "", data, valid, conditioner, NoReweighter(), folder, columns=[], seed=seed)
    model = diffusion.Denoiser(base, conditioner, [])
    train.load_weights(model, diffusion.trainable(model, config.train), folder / "weights.safetensors")


def adapt(source: diffusion.Diffusion, data: Data, config: Config, folder: Path) -> None:
    """Adapt a base to a dataset: VAE, then UNet, on its *training* split with prompts that carry no demographics.

    Writes a base folder; a folder made from the same data, source and settings stays as it is.
    """
    c = config.base_model
    rows = data.rows("train")
    images = data.images(rows)
    for _ in train_vae(source.vae, images, c.vae_steps, lr=1e-3):
        pass
    set_scaling_factor(source, images)
    valid = data.rows("val")
    latents = as_latents(source, images, data.prompts(rows, ()))
    held = as_latents(source, data.images(valid), data.prompts(valid, ()))
    run = replace(config, train=replace(config.train, steps=c.unet_steps, prompt_dropout=0.1))
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        train_unet(source, latents, held, run, Path(scratch) / "run")
        publish(source, folder, Path(scratch))


def publish(base: diffusion.Diffusion, folder: Path, scratch: Path, half: bool = False) -> None:
    """Write a base folder aside, then move it into place."""
    base.save(scratch / "base", half=half)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(scratch / "base", folder)


def main() -> None:
    """`make base`: train the shipped tiny base from nothing and write its folder, with its recipe."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=paths.TINY_BASE)
    parser.add_argument("--images", type=int, default=3000, help="phantoms per modality")
    parser.add_argument("--vae-steps", type=int, default=1400)
    parser.add_argument("--unet-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, help="a trained VAE's folder, to skip its training")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = build(args, Path(scratch))
    record.write_json(args.out / "recipe.json", recipe | {"sha256": diffusion.fingerprint(args.out)})


def build(args: argparse.Namespace, scratch: Path) -> dict:
    """Train and publish the tiny base; returns its recipe."""
    manifests = [load_manifest(name) for name in PHANTOMS]
    drawn = [cohort(m, args.images, size=64, seed=args.seed) for m in manifests]
    images = np.concatenate([i for _, i in drawn])
    prompts = [p for m, (rows, _) in zip(manifests, drawn, strict=True) for p in prompts_without_demographics(m, rows)]
    base = diffusion.build_tiny(corpus(), scratch / "tokenizer", seed=args.seed)
    if args.vae:
        base.vae = type(base.vae).from_pretrained(args.vae).eval().requires_grad_(False)
    else:
        for row in train_vae(base.vae, images, args.vae_steps, seed=args.seed):
            if row["step"] % 100 == 0:
                print(f"VAE {row['step']}/{args.vae_steps} loss {row['loss']:.4f}", flush=True)
    set_scaling_factor(base, images[:: max(1, len(images) // 256)])
    latents = as_latents(base, images, prompts)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    take = lambda rows: Latents(latents.moments[rows], latents.text[rows], latents.attributes[rows], latents.empty)  # noqa: E731
    held = min(256, len(order) // 10)  # validation
    config = settings("demo", steps=args.unet_steps, lr=1e-3, validate_every=0.1, checkpoint_every=0.1)
    train_unet(base, take(order[held:]), take(order[:held]), config, scratch / "run", args.seed)
    publish(base, args.out, scratch, half=True)
    return {
        "command": f"python -m compdiff.base --images {args.images} --vae-steps {args.vae_steps} --unet-steps {args.unet_steps}",
        "seed": args.seed, "cohorts": {m.name: args.images for m in manifests}, "interaction": list(DIALS),
        "prompt_dropout": config.train.prompt_dropout, "machine": record.machine(), "versions": record.versions(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
