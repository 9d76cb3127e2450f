"""Time the steps of a run against plainly written baselines, in one process, and print ratios (`make bench`).

Rows alternate (A, B, A, B, ...), so a drift of the machine's speed hits both; the median of each is reported.
Writes benchmarks/results/bench.csv.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional as F

from compdiff import datasets, diffusion, latents, methods, paths, record, sample, train
from compdiff.config import settings


def alternate(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of `a` and of `b`, run in turn after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for place, call in enumerate((a, b)):
            began = time.perf_counter()
            call()
            if turn:
                times[place].append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def plain_step(base: diffusion.Diffusion, images: np.ndarray, moments: torch.Tensor | None, ids: torch.Tensor,
               trained: tuple[str, ...] = ("unet", "text_encoder")) -> Callable[[], None]:  # fmt: skip
    """What a diffusers training script does: (encode,) add noise, UNet, MSE, AdamW; one call is one step."""
    base.text_encoder.requires_grad_("text_encoder" in trained)
    optimizer = torch.optim.AdamW([p for name in trained for p in getattr(base, name).parameters()], lr=1e-5)

    def step() -> None:
        z = base.latents(base.moments(images) if moments is None else moments, torch.randn(len(ids), base.channels, 16, 16))
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(ids),))
        prediction = base.unet(base.scheduler.add_noise(z, noise, t), t, base.text_encoder(ids)[0]).sample
        F.mse_loss(prediction, base.target(z, noise, t)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_steps(data: datasets.Data, folder: Path, method: str, batch: int,
              trained: tuple[str, ...] = ("unet", "text_encoder")) -> Iterator[dict]:  # fmt: skip
    """The project's loop, step by step, without validation or checkpoints; a frozen text encoder has run before."""
    config = settings("demo", data.index["dataset"], method, validate_every=1.0, checkpoint_every=1.0, steps=10_000,
                      batch=batch, microbatch=batch, trained=trained)  # fmt: skip
    base = diffusion.load("tiny")
    parts = methods.build(method, data.schema, base.d_ctx, config, seed=0)
    split = [latents.read(folder / "latents", data, base, "", s, parts.named) for s in ("train", "val")]
    if "text_encoder" not in trained:
        with torch.no_grad():
            embed = lambda ids: base.text_encoder(ids)[0]  # noqa: E731
            split = [replace(rows, text=embed(rows.text), empty=embed(rows.empty[None])[0]) for rows in split]
    place = folder / "-".join([method, *trained])
    return train.train(config, base, *split, parts.conditioner, parts.reweighter, place, parts.columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    rows: list[dict] = []

    def row(what: str, baseline: str, ours: float, theirs: float, n: int) -> None:
        rows.append({"what": what, "baseline": baseline, "ours_images_per_s": n / ours, "baseline_images_per_s": n / theirs,
                     "ratio": theirs / ours, "repeats": args.repeats})  # fmt: skip
        print(f"{what:34s} {n / ours:8.1f} images/s   against {baseline}: {n / theirs:8.1f}   ratio {theirs / ours:.2f}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        datasets.prepare("chest", folder / "data", settings("demo").data)
        data, base = datasets.load(folder / "data"), diffusion.load("tiny")
        latents.write(folder / "latents", data, base, "")
        batch = data.rows("train").head(args.batch)
        images, ids = data.images(batch), base.tokenize(data.prompts(batch))
        moments = base.moments(images)
        both, unet = ("unet", "text_encoder"), ("unet",)
        for method, trained, more in (("text", both, ""), ("hcn", both, ""), ("text", unet, ", frozen text encoder")):
            ours = our_steps(data, folder, method, args.batch, trained)
            for name, cached in (("encode every step", None), ("cached latents", moments)):
                theirs = plain_step(diffusion.load("tiny"), images, cached, ids, trained)
                a, b = alternate(lambda: next(islice(ours, 0, 1)), theirs, args.repeats)
                row(f"training step, {method}{more}", f"diffusers-style, {name}", a, b, args.batch)

        pipe = StableDiffusionPipeline.from_pretrained(paths.TINY_BASE, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = base.sampler("ddpm")
        config = settings("demo").sample
        model = diffusion.Denoiser(base, methods.build("text", data.schema, base.d_ctx, settings("demo"), 0).conditioner)
        n, prompts = 16, data.prompts(batch.head(16))
        attributes, empty = torch.from_numpy(data.attributes(batch.head(16))), base.tokenize([""])[0]
        a, b = alternate(
            lambda: sample.sample(model, base, base.tokenize(prompts), empty, attributes, list(range(n)), config),
            lambda: pipe(prompts, num_inference_steps=75, guidance_scale=config.guidance, output_type="np"), 1,
        )  # fmt: skip
        row(f"sampling, {config.solver} {config.sample_steps} steps", "StableDiffusionPipeline, DDPM 75 steps", a, b, n)
    with record.atomic(paths.ROOT / "benchmarks" / "results" / "bench.csv") as temporary:
        pd.DataFrame(rows).assign(cores=torch.get_num_threads(), **record.versions()).to_csv(temporary, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
