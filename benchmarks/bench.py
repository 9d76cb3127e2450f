"""Time the steps of a run against plainly written baselines, in one process (`make bench`).

Rivals run in turn (A, B, A, B, ...), so a drift of the machine's speed hits both. Of each the median call is reported,
with the slowest and the fastest one; of their ratio the lowest and the highest of all turns. Writes
benchmarks/results/bench.csv, and the same as a page, bench.md.
    python benchmarks/bench.py
    python benchmarks/bench.py --profile smoke --repeats 1 --batch 4 --images 2   # seconds; its numbers mean nothing
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional as F

from compdiff import datasets, diffusion, features, latents, methods, paths, record, sample, stats, train, weights
from compdiff.config import Config, SampleConfig, settings
from compdiff.datasheet import markdown
from compdiff.stats import Interval

RESULTS = paths.ROOT / "benchmarks" / "results"
BOTH = ("unet", "text_encoder")
TRAINING = {  # row -> method, and what differs from the profile's settings
    "text": ("text", {}),
    "hcn": ("hcn", {}),
    "text, frozen text encoder": ("text", {"trained": ("unet",)}),
    "hcn, compiled": ("hcn", {"compile": True}),
    "text, frozen text encoder, compiled": ("text", {"trained": ("unet",), "compile": True}),
}
PAPERS = ("ddpm", 75)  # solver and steps
RESAMPLES = 1000


# --- rows -------------------------------------------------------------------------------------------------------------
def alternate(a: Callable[[], object], b: Callable[[], object], repeats: int) -> np.ndarray:
    """Seconds of `a` and of `b`, [2, repeats], run in turn after one call of each that is not timed."""
    taken = np.empty((2, repeats))
    for turn in range(-1, repeats):
        for place, call in enumerate((a, b)):
            began = time.perf_counter()
            call()
            if turn >= 0:
                taken[place, turn] = time.perf_counter() - began
    return taken


def row(what: str, baseline: str, unit: str, numbers: dict[str, Interval], images: int, repeats: int) -> dict:
    """One row of the table. `numbers`: "ours", "theirs" and their "ratio" or "difference"."""
    found = {"what": what, "baseline": baseline, "unit": unit}
    for name, of in numbers.items():
        found |= {name: of.value, f"{name}_lo": of.lo, f"{name}_hi": of.hi}
    return found | {"images": images, "repeats": repeats}


def speed(what: str, baseline: str, taken: np.ndarray, images: tuple[int, int]) -> dict:
    """The row of two rivals that took `taken` [2, repeats] seconds for `images` of one call each."""
    rates = np.array(images)[:, None] / taken
    ours, theirs = np.median(rates, axis=1)
    ratio, turns = ours / theirs, rates[0] / rates[1]
    numbers = {"ours": Interval(ours, *ends(rates[0])), "theirs": Interval(theirs, *ends(rates[1]))}
    numbers |= {"ratio": Interval(ratio, *ends(turns))}
    return row(what, baseline, "images/s", numbers, images[0], taken.shape[1])


def ends(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def quality(what: str, baseline: str, real: np.ndarray, ours: np.ndarray, theirs: np.ndarray, patients: np.ndarray,
            size: int) -> dict:  # fmt: skip
    """The row of two sets of images [n, S, S] drawn from the prompts of n `real` ones: KID, bootstrapped by patient."""
    reference, a, b = (features.extract(images, size=size) for images in (real, ours, theirs))
    drawn = stats.resample_patients(patients, RESAMPLES, seed=0)
    one, other = stats.kid_bootstrap(a, reference, drawn), stats.kid_bootstrap(b, reference, drawn)
    numbers = {"ours": stats.percentile_interval(*one), "theirs": stats.percentile_interval(*other)}
    numbers |= {"difference": stats.difference(*one, *other)}
    return row(what, baseline, f"KID-{features.column('lite0', size)}", numbers, len(real), 1)


# --- training ---------------------------------------------------------------------------------------------------------
def plain_step(base: diffusion.Diffusion, images: np.ndarray, moments: torch.Tensor | None, ids: torch.Tensor,
               trained: tuple[str, ...] = BOTH) -> Callable[[], None]:  # fmt: skip
    """What a diffusers training script does: (encode,) add noise, UNet, MSE, AdamW; one call is one step."""
    base.text_encoder.requires_grad_("text_encoder" in trained)
    optimizer = torch.optim.AdamW([p for name in trained for p in getattr(base, name).parameters()], lr=1e-5)

    def step() -> None:
        q = base.moments(images) if moments is None else moments
        z = base.latents(q, torch.randn(len(ids), base.channels, *q.shape[2:]))
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(ids),))
        prediction = base.unet(base.scheduler.add_noise(z, noise, t), t, base.text_encoder(ids)[0]).sample
        F.mse_loss(prediction, base.target(z, noise, t)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_steps(data: datasets.Data, folder: Path, method: str, batch: int, **changes: object) -> Iterator[dict]:
    """The project's loop, step by step, without validation or checkpoints; a frozen text encoder has run before.

    folder: holds `latents` of the tiny base. changes: settings that differ from the demo's.
    """
    dials = dict(validate_every=1.0, checkpoint_every=1.0, steps=10_000, batch=batch, microbatch=batch)
    config = settings("demo", data.index["dataset"], method, **(dials | changes))
    base = diffusion.load("tiny")
    parts = methods.build(method, data.schema, base.d_ctx, config, seed=0)
    split = [latents.read(folder / "latents", data, base, "", s, parts.named) for s in ("train", "val")]
    if "text_encoder" not in config.train.trained:
        with torch.no_grad():
            embed = lambda ids: base.text_encoder(ids)[0]  # noqa: E731
            split = [replace(rows, text=embed(rows.text), empty=embed(rows.empty[None])[0]) for rows in split]
    place = folder / "-".join([method, *changes])
    return train.train(config, base, *split, parts.conditioner, parts.reweighter, place, parts.columns)


def training(data: datasets.Data, folder: Path, batch: int, repeats: int) -> Iterator[dict]:
    """A step of the project's loop against a diffusers-style one, which encodes every image anew or has it cached."""
    rows, base = data.rows("train").head(batch), diffusion.load("tiny")
    images, ids = data.images(rows), base.tokenize(data.prompts(rows))
    moments = base.moments(images)
    for name, (method, changes) in TRAINING.items():
        ours = our_steps(data, folder, method, batch, **changes)
        for baseline, cached in (("encode every step", None), ("cached latents", moments)):
            theirs = plain_step(diffusion.load("tiny"), images, cached, ids, changes.get("trained", BOTH))
            taken = alternate(partial(next, ours), theirs, repeats)
            yield speed(f"training step, {name}", f"diffusers-style, {baseline}", taken, (batch, batch))


def reading(data: datasets.Data, folder: Path, batch: int, repeats: int) -> Iterator[dict]:
    """How much faster than the loop trains its data come: images from shards, which encoding reads once, and the rows
    of latents that each step reads."""
    base, n, rival = diffusion.load("tiny"), len(data.rows("train")), "our training step, text"
    steps = partial(next, our_steps(data, folder, "text", batch))
    moments = latents.read(folder / "latents", data, base, "", "train", ()).moments
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).split(batch)
    epochs = {
        "shards: hash, tar, PNG, row": lambda: deque(data.stream("train"), maxlen=0),
        "latents, in random order": lambda: [moments[rows] for rows in order],
    }
    for name, epoch in epochs.items():
        yield speed(f"reading {name}", rival, alternate(epoch, steps, repeats), (n, batch))


# --- sampling ---------------------------------------------------------------------------------------------------------
def seeds(rows: pd.DataFrame) -> list[int]:
    return [sample.image_seed(0, i) for i in rows["id"]]


def by_us(data: datasets.Data, config: Config) -> Callable[[pd.DataFrame], np.ndarray]:
    """Draws the prompts of some rows with the tiny base as it is (the text method, untrained): uint8 [n, S, S]."""
    base = diffusion.load("tiny")
    parts = methods.build("text", data.schema, base.d_ctx, config, seed=0)
    model = diffusion.Denoiser(base, parts.conditioner, parts.columns)

    def draw(rows: pd.DataFrame) -> np.ndarray:
        ids, attributes = base.tokenize([*data.prompts(rows), ""]), torch.from_numpy(data.attributes(rows))
        return sample.sample(model, base, ids[:-1], ids[-1], attributes, seeds(rows), config.sample)

    return draw


def by_pipeline(data: datasets.Data, solver: str, config: SampleConfig) -> Callable[[pd.DataFrame], np.ndarray]:
    """The same by diffusers' own pipeline: the same weights, guidance and first noise."""
    pipe = StableDiffusionPipeline.from_pretrained(paths.TINY_BASE, dtype=torch.float32)
    pipe.scheduler = diffusion.load("tiny").sampler(solver)
    pipe.set_progress_bar_config(disable=True)

    def draw(rows: pd.DataFrame) -> np.ndarray:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds(rows)]
        made = pipe(data.prompts(rows), num_inference_steps=config.sample_steps, guidance_scale=config.guidance,
                    generator=noise, output_type="np").images  # fmt: skip
        return (255 * made.mean(axis=3)).round().astype(np.uint8)

    return draw


def sampling(data: datasets.Data, config: Config, images: int, repeats: int) -> Iterator[dict]:
    """Ours against the pipeline at the papers' solver and at ours; then the KID of all that both have drawn.

    A call draws the prompts of `images` test rows, each call others. ValueError when the test split has too few.
    """
    test, n, c = data.rows("test"), images * (repeats + 1), config.sample
    if n > len(test):
        raise ValueError(f"{repeats} repeats and a first call of {images} images, but only {len(test)} test rows")
    rows = test.iloc[np.random.default_rng(0).permutation(len(test))[:n]]
    real, patients, size = data.images(rows), rows["patient"].to_numpy(), config.evaluate.feature_size
    for solver, steps in (PAPERS, (c.solver, c.sample_steps)):
        sets: tuple[list, list] = ([], [])
        rivals = (by_us(data, config), by_pipeline(data, solver, replace(c, sample_steps=steps)))
        calls = [partial(next, _parts(draw, rows, images, kept)) for draw, kept in zip(rivals, sets, strict=True)]
        names = f"sampling, {c.solver} {c.sample_steps} steps", f"StableDiffusionPipeline, {solver} {steps} steps"
        yield speed(*names, alternate(*calls, repeats), (images, images))
        yield quality(*names, real, *(np.concatenate(kept) for kept in sets), patients, size)


def _parts(draw: Callable[[pd.DataFrame], np.ndarray], rows: pd.DataFrame, images: int, kept: list) -> Iterator[None]:
    """Draw `rows` part by part into `kept`, one part each time the iterator is asked."""
    for start in range(0, len(rows), images):
        kept.append(draw(rows.iloc[start : start + images]))
        yield


# --- the table --------------------------------------------------------------------------------------------------------
def page(table: pd.DataFrame) -> str:
    """The table as Markdown, with what its numbers mean."""
    first = table.iloc[0]
    told = []
    for _, r in table.iterrows():
        numbers = cell(r, "ours"), cell(r, "theirs"), compared(r)
        told.append((r["what"], r["baseline"], r["unit"], *numbers, r["images"], r["repeats"]))
    return "\n".join([
        "# Speed of the steps of a run, beside plain baselines", "",
        f"Written by `make bench` from `bench.csv`: {first['cpu']}, {first['cores']} threads, torch {first['torch']}, "
        f"diffusers {first['diffusers']}; the shipped tiny base, 64 x 64 pixels, chest phantoms.", "",
        "The two of a row ran in turn, in one process. images/s: the median call [the slowest, the fastest], and their "
        "ratio [over all turns]. KID: the base as it is, asked for test prompts, against the real images of these "
        f"prompts [95 % by {RESAMPLES:,} patient bootstraps], and the difference; lower is better. It judges samplers "
        "of one model, not the model. Without brackets: not recorded.", "",
        *markdown(("what", "against", "unit", "ours", "theirs", "ratio or difference", "images", "repeats"), told),
    ])  # fmt: skip


def compared(r: pd.Series) -> str:
    return cell(r, "ratio") if pd.notna(r.get("ratio")) else cell(r, "difference")


def cell(r: pd.Series, name: str) -> str:
    text = ["-" if pd.isna(v) else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}"
            for v in (r.get(f"{name}{end}") for end in ("", "_lo", "_hi"))]  # fmt: skip
    return text[0] if text[1] == "-" else f"{text[0]} [{text[1]}, {text[2]}]"


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="of a training step")
    parser.add_argument("--images", type=int, default=40, help="drawn in one call; all calls make the sets")
    parser.add_argument("--profile", default="demo", help="whose data and sampler")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    weights.weight_file("lite0")  # NotAvailable now, not after minutes
    about = {"cpu": record.machine()["cpu"], "cores": torch.get_num_threads(), **record.versions()}
    config, rows = settings(args.profile, "chest"), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        datasets.prepare("chest", folder / "data", config.data)
        data = datasets.load(folder / "data")
        latents.write(folder / "latents", data, diffusion.load("tiny"), "")
        sections = (
            training(data, folder, args.batch, args.repeats), reading(data, folder, args.batch, args.repeats),
            sampling(data, config, args.images, args.repeats),
        )  # fmt: skip
        for found in (r for section in sections for r in section):
            rows.append(found)
            r = pd.Series(found)
            rivals = f"{cell(r, 'ours')} {r['unit']}; {r['baseline']}: {cell(r, 'theirs')}"
            print(f"{r['what']}: {rivals}; {compared(r)}", flush=True)
    table = pd.DataFrame(rows).assign(**about)
    with record.atomic(args.out / "bench.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")
    record.write_text(args.out / "bench.md", page(pd.read_csv(args.out / "bench.csv")))


if __name__ == "__main__":
    main(sys.argv[1:])
