"""Time the steps of a run against plainly written baselines (rivals.py), in one process, on the CPU (`make bench`).

Rivals run in turn (A, B, A, B, ...), so a drift of the machine's speed hits both. Of each the median call is reported,
with the slowest and the fastest one; of their ratio the lowest and the highest of all turns. Writes
benchmarks/results/bench.csv, and the same as a page, bench.md, row by row: about a quarter of an hour on two cores.
    python benchmarks/bench.py
    python benchmarks/bench.py --profile smoke --repeats 1 --batch 4 --images 2 --steps 2   # its numbers mean nothing
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch comes: the baselines know no device but the CPU

import argparse
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from PIL import Image
from bench_page import RESAMPLES, cell, compared, judgement, page
from rivals import BOTH, bare_unet, by_pipeline, plain_png, plain_step, seeds
from torch._dynamo.exc import BackendCompilerFailed

from compdiff import clouds, datasets, diffusion, features, latents, methods, paths, pictures, record, sample, shards
from compdiff import stats, train, weights
from compdiff.config import Config, SampleConfig, TrainConfig, settings
from compdiff.paths import RunFolder
from compdiff.stats import Interval

RESULTS = paths.ROOT / "benchmarks" / "results"
TRAINING = {  # row -> method, and what differs from the profile's settings; where nothing does, also at other batches
    "text": ("text", {}),
    "hcn": ("hcn", {}),
    "text, frozen text encoder": ("text", {"trained": ("unet",)}),
    "hcn, compiled": ("hcn", {"compile": True}),
    "hcn, compiled, channels_last": ("hcn", {"compile": True, "channels_last": True}),
    "text, frozen text encoder, compiled": ("text", {"trained": ("unet",), "compile": True}),
}
ENCODE, CACHED = "diffusers-style, encode every step", "diffusers-style, cached latents"
CLIP_EMA = f"{CACHED}, + clip + EMA"
FLOOR = "the UNet alone, forward and backward"
GOALS = {  # what a row is judged by -> the least ratio
    ENCODE: 1.5, CACHED: 1.1, "reading": 10.0, "sampling, the papers' solver": 3.0, "sampling, equal steps": 1.0,
}  # fmt: skip
NO_WORSE = "its lower end <= 0"  # the goal of the difference in KID
PAPERS = ("ddpm", 75)  # solver and steps
FILE = 100  # images in one shard, so that the demo's have several
RADIOGRAPH, PREPARED = (2500, 3056), 512  # pixels of a JPG as MIMIC-CXR-JPG has them, and of what becomes of it


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


def judge(found: dict, goal: str) -> dict:
    """A row with its goal of GOALS, or NO_WORSE, and whether it is met."""
    met = found["difference_lo"] <= 0 if goal == NO_WORSE else found["ratio"] >= GOALS[goal]
    return found | {"goal": f">= {GOALS[goal]:g}" if goal in GOALS else goal, "met": "met" if met else "not met"}


def ends(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def quality(what: str, baseline: str, real: np.ndarray, ours: np.ndarray, theirs: np.ndarray, patients: np.ndarray,
            size: int) -> dict:  # fmt: skip
    """The row of two sets of images [n, S, S] drawn from the prompts of n `real` ones: KID, bootstrapped by patient."""
    reference, a, b = (features.extract(images, size=size) for images in (real, ours, theirs))
    drawn = stats.resample_patients(patients, RESAMPLES, seed=0)
    one, other = clouds.kid_bootstrap(a, reference, drawn), clouds.kid_bootstrap(b, reference, drawn)
    numbers = {"ours": stats.percentile_interval(*one), "theirs": stats.percentile_interval(*other)}
    numbers |= {"difference": stats.difference(*one, *other)}
    return row(what, baseline, f"KID-{features.column('lite0', size)}", numbers, len(real), 1)


# --- training ---------------------------------------------------------------------------------------------------------
def our_steps(data: datasets.Data, folder: RunFolder, method: str, batch: int, **changes: object) -> Iterator[dict]:
    """The project's loop, step by step, without validation or checkpoints; a frozen text encoder has run before.

    folder: holds `latents` of the tiny base. changes: settings that differ from the demo's.
    """
    dials = dict(validate_every=1.0, checkpoint_every=1.0, steps=10_000, batch=batch, microbatch=batch)
    config = settings("demo", data.index["dataset"], method, **(dials | changes))
    base, sha256 = diffusion.load_for(folder, config)
    parts = methods.build(method, data.schema, base.d_ctx, config, seed=0)
    split = [latents.read(folder.latents, data, base, sha256, s, parts.named) for s in ("train", "val")]
    if "text_encoder" not in config.train.trained:
        with torch.no_grad():
            embed = lambda ids: base.text_encoder(ids)[0]  # noqa: E731
            split = [replace(rows, text=embed(rows.text), empty=embed(rows.empty[None])[0]) for rows in split]
    place = folder.root / "timed" / "-".join([method, str(batch), *changes])
    return train.train(config, base, *split, parts.conditioner, parts.reweighter, place, parts.columns)


def training(data: datasets.Data, folder: RunFolder, batches: list[int], repeats: int) -> Iterator[dict]:
    """A step of the project's loop against a diffusers-style one, which encodes every image anew or has it cached.

    Only rows at the first of `batches` are judged. A row that needs a compiler which is not there says so.
    """
    for batch in batches:
        first = batch == batches[0]
        rows, base = data.rows("train").head(batch), diffusion.load("tiny")
        images, ids = data.images(rows), base.tokenize(data.prompts(rows))
        moments = base.moments(images)
        for name, (method, changes) in TRAINING.items():
            if changes and not first:
                continue
            what = f"training step, {name}" if first else f"training step at batch {batch}, {name}"
            if changes.get("compile"):
                torch.compiler.reset()  # what was compiled for another row makes this one neither faster nor slower
            ours = our_steps(data, folder, method, batch, **changes)
            for baseline in (ENCODE, CACHED, CLIP_EMA, FLOOR) if name == "text" and first else (ENCODE, CACHED):
                given = dict(trained=changes.get("trained", BOTH), clip_and_average=baseline == CLIP_EMA)
                cached = None if baseline == ENCODE else moments
                fresh = diffusion.load("tiny")
                floor = baseline == FLOOR
                theirs = bare_unet(fresh, moments, ids) if floor else plain_step(fresh, images, cached, ids, **given)
                try:
                    taken = alternate(partial(next, ours), theirs, repeats)
                except BackendCompilerFailed as error:
                    note = f"not compiled: {str(error.inner_exception).splitlines()[0]}"
                    yield row(what, "either", "images/s", {}, batch, 0) | {"note": note}
                    break
                found = speed(what, baseline, taken, (batch, batch))
                yield judge(found, baseline) if first and baseline in GOALS else found


# --- reading and preparing --------------------------------------------------------------------------------------------
def reading(data: datasets.Data, folder: RunFolder, batch: int, repeats: int) -> Iterator[dict]:
    """How much faster than the loop trains its data come: images from shards, which encoding reads once, and the rows
    of latents that each step reads."""
    base, sha256 = diffusion.load_for(folder, Config())
    n, rival = len(data.rows("train")), f"our training step, text, batch {batch}"
    steps = partial(next, our_steps(data, folder, "text", batch))
    moments = latents.read(folder.latents, data, base, sha256, "train", ()).moments
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).split(batch)
    epochs = {
        "shards: hash, tar, PNG, row": lambda: deque(data.stream("train"), maxlen=0),
        "latents of several files, in random order": lambda: [moments[rows] for rows in order],
    }
    for name, epoch in epochs.items():
        found = speed(f"reading {name}", rival, alternate(epoch, steps, repeats), (n, batch))
        yield judge(found, "reading")


def preparing(data: datasets.Data, folder: RunFolder, repeats: int, n: int = 4) -> Iterator[dict]:
    """What the preparation of real data does with a radiograph, in one thread: check it, make it small, write a PNG.

    The radiograph is a phantom scaled up, with noise that makes it about as large a file as a real one.
    """
    width, height = RADIOGRAPH
    image = Image.fromarray(data.images(data.rows("test").head(1))[0]).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(image) + np.random.default_rng(0).normal(0, 2, (height, width))  # 1.5 MB
    file = folder.root / "radiograph.jpg"
    Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(file, quality=95)

    def ours() -> None:
        for _ in range(n):
            assert pictures.image_problem(file) is None
            shards.encode_png(pictures.load_square(file, PREPARED))

    def theirs() -> None:
        for _ in range(n):
            plain_png(file, PREPARED)

    what = f"preparing a JPG of {width} x {height} to {PREPARED} x {PREPARED}: check, resize, PNG"
    yield speed(what, "plain Pillow, no check", alternate(ours, theirs, repeats), (n, n))


# --- sampling ---------------------------------------------------------------------------------------------------------
def trained(data: datasets.Data, folder: RunFolder, config: Config) -> tuple[diffusion.Diffusion, diffusion.Denoiser]:
    """The tiny model that the text method has trained: the base with its weights, and the model."""
    base, _ = diffusion.load_for(folder, config)
    return base, methods.restore("text", folder.train("text"), base, data.schema, config)[0]


def by_us(base: diffusion.Diffusion, model: diffusion.Denoiser, data: datasets.Data,
          config: SampleConfig) -> Callable[[pd.DataFrame], np.ndarray]:  # fmt: skip
    """Draws the prompts of some rows: uint8 [n, S, S]."""

    def draw(rows: pd.DataFrame) -> np.ndarray:
        ids, attributes = base.tokenize([*data.prompts(rows), ""]), torch.from_numpy(data.attributes(rows))
        return sample.sample(model, base, ids[:-1], ids[-1], attributes, seeds(rows), config)

    return draw


def asked(data: datasets.Data, images: int, repeats: int) -> pd.DataFrame:
    """The test rows whose prompts all calls draw, `images` each. ValueError when the test split has too few."""
    test, n = data.rows("test"), images * (repeats + 1)
    if n > len(test):
        raise ValueError(f"{repeats} repeats and a first call of {images} images, but only {len(test)} test rows")
    return test.iloc[np.random.default_rng(0).permutation(len(test))[:n]]


def sampling(data: datasets.Data, folder: RunFolder, config: Config, rows: pd.DataFrame,
             repeats: int) -> Iterator[dict]:  # fmt: skip
    """Ours against the pipeline at the papers' solver and at ours; then the KID of all that both have drawn.

    A call draws the prompts of its part of `rows`, each call another. Both have the weights of one training.
    """
    methods.fit("text", folder, config, seed=0)
    real, patients, size = data.images(rows), rows["patient"].to_numpy(), config.evaluate.feature_size
    c, images = config.sample, len(rows) // (repeats + 1)
    for goal, (solver, steps) in (("the papers' solver", PAPERS), ("equal steps", (c.solver, c.sample_steps))):
        sets: tuple[list, list] = ([], [])
        other = by_pipeline(trained(data, folder, config)[0], data, replace(c, solver=solver, sample_steps=steps))
        rivals = (by_us(*trained(data, folder, config), data, c), other)  # two models: a sampler may change its layout
        calls = [partial(next, _parts(draw, rows, images, kept)) for draw, kept in zip(rivals, sets, strict=True)]
        names = f"sampling, {c.solver} {c.sample_steps} steps", f"StableDiffusionPipeline, {solver} {steps} steps"
        found = speed(*names, alternate(*calls, repeats), (images, images))
        yield judge(found, f"sampling, {goal}")
        found = quality(*names, real, *(np.concatenate(kept) for kept in sets), patients, size)
        yield judge(found, NO_WORSE) if goal == "the papers' solver" else found


def _parts(draw: Callable[[pd.DataFrame], np.ndarray], rows: pd.DataFrame, images: int, kept: list) -> Iterator[None]:
    """Draw `rows` part by part into `kept`, one part each time the iterator is asked."""
    for start in range(0, len(rows), images):
        kept.append(draw(rows.iloc[start : start + images]))
        yield


# --- all of it --------------------------------------------------------------------------------------------------------
def write(rows: list[dict], about: dict, out: Path) -> None:
    with record.atomic(out / "bench.csv") as temporary:
        pd.DataFrame(rows).assign(**about).to_csv(temporary, index=False, float_format="%.4g")
    record.write_text(out / "bench.md", page(pd.read_csv(out / "bench.csv")))


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[TrainConfig().batch, 64],
                        help="of a training step; the first is judged")  # fmt: skip
    parser.add_argument("--images", type=int, default=40, help="drawn in one call; all calls make the sets")
    parser.add_argument("--steps", type=int, default=TrainConfig().steps, help="that train the model which draws them")
    parser.add_argument("--profile", default="demo", help="whose data and sampler")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    weights.weight_file("lite0")  # NotAvailable now, not after minutes
    machine = {"cpu": record.machine()["cpu"], "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    about = {"trained_steps": args.steps} | machine | record.versions()
    config, rows = settings(args.profile, "chest", "text", steps=args.steps), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(scratch, args.profile, "chest")
        with mock.patch.object(shards, "PER_SHARD", FILE):
            datasets.prepare("chest", folder.data, config.data)
        data = datasets.load(folder.data)
        drawn = asked(data, args.images, args.repeats)
        latents.write(folder.latents, data, *diffusion.load_for(folder, config))
        sections = (
            preparing(data, folder, args.repeats), reading(data, folder, args.batch[0], args.repeats),
            training(data, folder, args.batch, args.repeats), sampling(data, folder, config, drawn, args.repeats),
        )  # fmt: skip
        for found in (r for section in sections for r in section):
            rows.append(found)
            write(rows, about, args.out)
            r = pd.Series(found)
            rivals = f"{cell(r, 'ours')} {r['unit']}; {r['baseline']}: {cell(r, 'theirs')}"
            print(f"{r['what']}: {rivals}; {compared(r)} {judgement(r)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
