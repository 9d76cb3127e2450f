"""The tiny base model: a small Stable Diffusion trained from nothing on phantoms (`make base`), or adapted to real data.

It knows what the modalities look like and reads findings, but its cohort is disjoint from every experiment's, lacks
the held-out cells, and its prompts carry no demographics.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from compdiff import diffusion, paths, record, sources, train, untrained
from compdiff.attributes import prompt
from compdiff.cohorts import draw_phantoms
from compdiff.config import Config, DataConfig, settings
from compdiff.datasets import Data
from compdiff.interfaces import NoConditioner, NoReweighter
from compdiff.latents import Latents
from compdiff.manifests import Manifest, dataset_names, load_manifest

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


def check_held_out(manifest: Manifest, config: Config) -> None:
    """ValueError when the configured base was trained on phantoms of a cell that `manifest` holds out.

    A base without recipe.json (not made by `make base`) has seen no phantoms.
    """
    name = config.base_model.base
    recipe = (paths.TINY_BASE if name == "tiny" else Path(name)) / "recipe.json"
    if manifest.layout != "phantom" or not recipe.is_file():
        return
    unseen = json.loads(recipe.read_text()).get("held_out", {}).get(manifest.modality, [])
    if seen := [n for n in map(manifest.schema.cell_name, manifest.held_out) if n not in unseen]:
        remedy = f"hold them out in data_manifests/{manifest.modality}.yaml too, then `make base`"
        raise ValueError(f"{manifest.name} holds out {', '.join(seen)}, which the base {name} was trained on; remedy: {remedy}")


def levels(values: np.ndarray) -> list[str]:
    """A parameter's values in words: "no" for zero, else the third of the other values: "low", "medium", "high"."""
    present = values[values != 0]
    cuts = np.quantile(present, [1 / 3, 2 / 3]) if len(present) else [0, 0]
    return ["no" if v == 0 else ("low", "medium", "high")[int((v > cuts).sum())] for v in values]


def captions(manifest: Manifest, rows: Sequence[dict], seed: int = 0, phrases: int = 5) -> list[str]:
    """Findings, then `phrases` of the picture's true parameters in words, drawn at random; never a demographic attribute.

    "There is a consolidation. high vertical grid, low rib contrast, ..." The base learns what words do to a picture,
    as Stable Diffusion did from captions; which of these go with age, sex or race is left for the methods to learn.
    """
    names = [k for k in rows[0] if k.startswith("true_")]
    words = {k: levels(np.array([row[k] for row in rows])) for k in names}
    rng = np.random.default_rng(seed)
    out = []
    for i, row in enumerate(rows):
        chosen = rng.choice(names, size=min(phrases, len(names)), replace=False)
        told = ", ".join(f"{words[k][i]} {k.removeprefix('true_').replace('_', ' ')}" for k in chosen)
        out.append(f"{prompt(manifest.prompts, row, (), manifest.schema)} {told}")
    return out


def corpus() -> list[str]:
    """Texts whose words become tokens: every prompt template, category and finding of every manifest."""
    texts = ["hypertrophy, heart failure with infarct, without infarct, healthy, overweight BMI, obese, normal, age in 60s"]
    for name in dataset_names():
        manifest = load_manifest(name)
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


def adapt(data: Data, config: Config, folder: Path) -> None:
    """Adapt the configured base to a dataset: VAE, then UNet, on its *training* split, prompts without demographics.

    Writes a base folder, moved into place when complete; one made from the same data, source and settings stays.
    """
    c = config.base_model
    made_of = {"data": data.index["sha256"], "source": diffusion.fingerprint_of(config)}
    run = replace(config, train=replace(config.train, steps=c.unet_steps, prompt_dropout=0.1, lora_rank=0))
    made_of |= {"vae_steps": c.vae_steps, "train": asdict(run.train)}
    marker = folder / "inputs.json"
    if marker.exists() and json.loads(marker.read_text()) == json.loads(json.dumps(made_of)):
        return
    source = diffusion.load(c.base, c.revision, c.base_sha256)
    rows, valid = data.rows("train"), data.rows("val")
    images = data.images(rows)
    if c.vae_steps:
        for _ in train_vae(source.vae, images, c.vae_steps, lr=1e-3):
            pass
        set_scaling_factor(source, images)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if c.unet_steps:
            latents = as_latents(source, images, data.prompts(rows, ()))
            held = as_latents(source, data.images(valid), data.prompts(valid, ()))
            train_unet(source, latents, held, run, Path(scratch) / "run")
        publish(source, folder, Path(scratch), made_of=made_of)


def publish(base: diffusion.Diffusion, folder: Path, scratch: Path, half: bool = False, made_of: dict | None = None) -> None:
    """Write a base folder aside, with what it was `made_of` in inputs.json, then move it into place."""
    base.save(scratch / "base", half=half)
    if made_of is not None:
        record.write_json(scratch / "base" / "inputs.json", made_of)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(scratch / "base", folder)


def main() -> None:
    """`make base`: train the shipped tiny base from nothing; killed, it goes on where it stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=paths.TINY_BASE)
    parser.add_argument("--images", type=int, default=3000, help="phantoms per modality")
    parser.add_argument("--vae-steps", type=int, default=900)
    parser.add_argument("--unet-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dials = dict(images=args.images, vae_steps=args.vae_steps, unet_steps=args.unet_steps, seed=args.seed)
    code = sources.closure({"compdiff.base"}, paths.ROOT / "compdiff")
    work = paths.runs_root() / "base" / record.sha256_json([dials, code])[:12]
    work.mkdir(parents=True, exist_ok=True)
    recipe = build(work, args.out, **dials)
    record.write_json(args.out / "recipe.json", recipe | {"sha256": diffusion.fingerprint(args.out)})


def build(work: Path, out: Path, images: int, vae_steps: int, unet_steps: int, seed: int) -> dict:
    """Train the tiny base in the folder `work` and publish it to `out`; returns its recipe."""
    manifests = [load_manifest(name) for name in PHANTOMS]
    drawn = [cohort(m, images, size=64, seed=seed) for m in manifests]
    pictures = np.concatenate([i for _, i in drawn])
    told = [text for m, (rows, _) in zip(manifests, drawn, strict=True) for text in captions(m, rows, seed)]
    base = untrained.build_tiny([*corpus(), *told], work / "tokenizer", seed=seed)
    trained_vae(base, pictures, vae_steps, seed, work / "vae")
    set_scaling_factor(base, pictures[:: max(1, len(pictures) // 256)])
    latents = as_latents(base, pictures, told)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    take = lambda rows: Latents(latents.moments[rows], latents.text[rows], latents.attributes[rows], latents.empty)  # noqa: E731
    held = min(256, len(order) // 10)  # validation
    config = settings("demo", steps=unet_steps, batch=64, microbatch=64, lr=1e-3, validate_every=0.1, checkpoint_every=0.1)
    train_unet(base, take(order[held:]), take(order[:held]), config, work / "unet", seed)
    publish(base, out, work, half=True)
    return {
        "command": f"python -m compdiff.base --images {images} --vae-steps {vae_steps} --unet-steps {unet_steps}",
        "seed": seed, "cohorts": {m.name: len(rows) for m, (rows, _) in zip(manifests, drawn, strict=True)},
        "held_out": {m.name: [m.schema.cell_name(c) for c in m.held_out] for m in manifests},
        "interaction": list(DIALS), "prompt_dropout": config.train.prompt_dropout, "machine": record.machine(),
        "versions": record.versions(),
    }  # fmt: skip


def trained_vae(base: diffusion.Diffusion, images: np.ndarray, steps: int, seed: int, folder: Path) -> None:
    """Train the VAE of `base`, or load it from `folder` where an earlier run finished it."""
    weights = folder / "vae.safetensors"
    if not weights.exists():
        for row in train_vae(base.vae, images, steps, seed=seed):
            if row["step"] % 100 == 0:
                print(f"VAE {row['step']}/{steps} loss {row['loss']:.4f}", flush=True)
        with record.atomic(weights) as temporary:
            save_file(base.vae.state_dict(), temporary)
    base.vae.load_state_dict(load_file(weights))
    base.vae.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
