"""Guided sampling, and synthetic sets on disk. An image's randomness depends on (run seed, prompt id) only."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm.auto import tqdm

from compdiff import record, shards, strategies
from compdiff.attributes import AGE, AGE_THRESHOLDS
from compdiff.config import Config, SampleConfig
from compdiff.datasets import Data
from compdiff.devices import on_accelerator
from compdiff.diffusion import Denoiser, Diffusion, step_back

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precision -> type of products under autocast; weights stay
LABEL = "synthetic image, not a patient"
UNTRAINED = "untrained"  # control: the base itself, text prompts without training


def image_seed(run_seed: int, prompt_id: str) -> int:
    """63-bit seed of one image: a stable hash, the same on any machine, GPU count and batch."""
    digest = hashlib.sha256(f"{run_seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def sample(model: Denoiser, base: Diffusion, text: Tensor, empty: Tensor, attributes: Tensor, seeds: list[int],
           config: SampleConfig, **extra: Tensor) -> np.ndarray:  # fmt: skip
    """Classifier-free guidance: eps = eps(null) + g (eps(context) - eps(null)), both in one batch.

    text [B, T] ids or [B, T, d_ctx], empty [T] or [T, d_ctx], attributes [B, K] -> grey uint8 images [B, S, S]. The
    null context is the empty prompt with all-zero demographic tokens. `extra` [B, ...]: what the
    model's `predict` needs besides, the same in both branches (a condition picture). Model and decoder work in
    `model.precision`, the solver in float32.
    """
    model.eval()
    model.unet.to(memory_format=torch.channels_last)  # a tenth faster; training gains nothing by it
    with on_accelerator(model, base.vae) as device, in_precision(model.precision, device):
        return base.decode(_denoise(model, base, text, empty, attributes, seeds, config, extra, device))


def in_precision(name: str, device: torch.device) -> torch.autocast:
    """Context of the setting `precision`, which changes nothing for "no". ValueError for one that is unknown."""
    if name != "no" and name not in DTYPES:
        raise ValueError(f"unknown precision {name!r}; known: no, {', '.join(DTYPES)}")
    return torch.autocast(device.type, DTYPES.get(name), enabled=name != "no")


def _denoise(model: Denoiser, base: Diffusion, text: Tensor, empty: Tensor, attributes: Tensor, seeds: list[int],
             config: SampleConfig, extra: dict[str, Tensor], device: torch.device) -> Tensor:  # fmt: skip
    """From noise to latents [B, C, h, w]; arguments as in `sample`."""
    n, side = len(seeds), base.unet.config.sample_size
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    shape = (base.channels, side, side)
    z = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)  # [B, C, h, w]
    text, attributes = text.to(device), attributes.to(device)
    context, _ = model.context(text, attributes)  # [B, T + n, d_ctx]
    null, _ = model.context(empty.to(device).expand_as(text), attributes, keep=torch.zeros(n, device=device))
    both = torch.cat([null, context])
    extra = {name: value.to(device) for name, value in extra.items()}
    twice = {name: torch.cat([value, value]) for name, value in extra.items()}
    scheduler = base.sampler(config.solver)
    scheduler.set_timesteps(config.sample_steps)
    z = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(z, t)
        if config.guidance == 1.0:
            prediction = model.predict(scaled, t, context, **extra).float()
        else:
            unconditional, conditional = model.predict(torch.cat([scaled, scaled]), t, both, **twice).float().chunk(2)
            prediction = unconditional + config.guidance * (conditional - unconditional)
        z = step_back(scheduler, prediction, t, z, generators)
    return z


def generate(folder: Path, rows: pd.DataFrame, prompts: list[str], attributes: np.ndarray, model: Denoiser, base: Diffusion,
             config: SampleConfig, method: str, checkpoint: str, seed: int, bar: bool = False, share: tuple[int, int] = (0, 1),
             **extra: Tensor) -> pd.DataFrame:  # fmt: skip
    """One synthetic set: `folder`/images/<id>.png for every row, then samples.csv. Restarts where it stopped.

    `rows` holds id and the attribute columns; `checkpoint` is the sha256 of the weights. A folder made by other weights,
    prompts, settings or code is made anew; where only other columns of `rows` changed, samples.csv is. share (k, n): this process makes row k and every n-th after it; any number of
    processes may work at once, and the one that finds all images there writes samples.csv. ValueError when two rows share
    an id; RuntimeError while others make another set in `folder`.
    """
    folder = Path(folder)
    if not rows["id"].is_unique:
        raise ValueError(f"{folder}: two rows share the id {rows['id'][rows['id'].duplicated()].iloc[0]!r}")
    hashes = [hashlib.sha256(v.numpy().tobytes()).hexdigest() for _, v in sorted(extra.items())]
    made_of = record.sha256_json([checkpoint, method, seed, config.solver, config.sample_steps, config.guidance, model.precision,
                                  rows["id"].tolist(), prompts, np.asarray(attributes).tolist(), code(), hashes])  # fmt: skip
    table = rows.assign(prompt=prompts, seed=[image_seed(seed, i) for i in rows["id"]], method=method, checkpoint=checkpoint)
    files = [folder / "images" / f"{i}.png" for i in table["id"]]
    listing = folder / "samples.csv"
    with together(folder, made_of):
        missing = np.array([row for row in shards.share_of(range(len(files)), share) if not files[row].exists()], dtype=int)
        if len(missing):
            listing.unlink(missing_ok=True)
        text, empty = (base.tokenize(prompts), base.tokenize([""])[0]) if len(missing) else (None, None)
        batches = [missing[i : i + config.sample_batch] for i in range(0, len(missing), config.sample_batch)]
        with on_accelerator(model, base.vae):
            for part in tqdm(batches, disable=not bar):
                seeds = table["seed"].iloc[part].tolist()
                given = {name: value[part] for name, value in extra.items()}
                images = sample(model, base, text[part], empty, torch.as_tensor(attributes)[part], seeds, config, **given)
                for row, image in zip(part, images, strict=True):
                    save_png(files[row], image)
        listed = table.to_csv(index=False)  # labels and other columns may change where no image does
        if all(file.exists() for file in files) and not (listing.exists() and listing.read_text() == listed):
            record.write_text(listing, listed)
    return table


@contextlib.contextmanager
def together(folder: Path, made_of: str) -> Iterator[None]:
    """Work in `folder` beside other processes that make the same set. Whoever is alone there, at the start or the end,
    removes what another set or a killed process left. The kernel frees the lock of a killed process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker, listing, images = folder / "inputs.txt", folder / "samples.csv", folder / "images"

    def alone() -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def remove_half_written() -> None:
        for half_written in images.glob(".*.png"):
            half_written.unlink()

    with open(folder / ".lock", "a+") as handle:
        if alone():
            remove_half_written()
            if not marker.exists() or marker.read_text() != made_of:
                listing.unlink(missing_ok=True)
                for old in images.glob("*.png"):
                    old.unlink()
                record.write_text(marker, made_of)
        fcntl.flock(handle, fcntl.LOCK_SH)  # waits for one that removes
        if not marker.exists() or marker.read_text() != made_of:
            raise RuntimeError(f"{folder}: another process makes another set here; start again when it has ended")
        yield
        if alone():
            remove_half_written()


def code() -> list[str]:
    """What draws an image besides the weights: an edit of it, beyond comments, makes every set again."""
    return [record.source_sha256(Path(__file__).with_name(name)) for name in ("sample.py", "diffusion.py")]


def save_png(path: Path, image: np.ndarray) -> None:
    """Grey uint8 [S, S] -> PNG whose metadata says that it is synthetic."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", LABEL)
    with record.atomic(path, durable=False) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=info)


def read_images(folder: Path, ids: list[str]) -> np.ndarray:
    """Images of a synthetic set in the order of `ids`, uint8 [n, S, S]. FileNotFoundError names what is missing."""
    return np.stack([np.asarray(Image.open(Path(folder) / "images" / f"{i}.png").convert("L")) for i in ids])


# --- which prompts a set is made of ------------------------------------------------------------------------------
def set_names(method: str, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The synthetic sets of a method: test; balanced and train for the demo's generators; and whatever the downstream
    strategies `wanted` (keys of strategies.STRATEGIES, or "all") need of any method besides.
    """
    usual = ("test", "balanced", "train") if method in strategies.DEMO_GENERATORS else ("test",)
    more = strategies.sets(wanted, method) if wanted and method != UNTRAINED else ()
    return tuple(dict.fromkeys((*usual, *more)))


def set_rows(data: Data, name: str, config: Config) -> pd.DataFrame:
    """The rows of set `name`: id, patient, split, held_out, cell, age_years, attributes, findings, y_*.

    test: every test and zero-shot row; train: every training row (ids of the real rows); train2: the same prompts
    once more, ids with "-2" (an image's noise follows from its id); balanced: `config.sample.balanced_per_cell` rows
    of every cell. The same rows for all methods and training seeds.
    """
    keep = [c for c in data.table.columns if not c.startswith("true_")]  # those describe the real image
    if name == "balanced":
        return _balanced(data, config.sample.balanced_per_cell, config.data.data_seed)[keep]
    splits = {"test": ("test", "zero_shot"), "train": ("train",), "train2": ("train",)}
    if name not in splits:
        raise ValueError(f"unknown set {name!r}; known: {', '.join(splits)}, balanced")
    rows = data.table.loc[data.table["split"].isin(splits[name]), keep].reset_index(drop=True)
    return rows.assign(id=rows["id"] + "-2") if name == "train2" else rows


def _balanced(data: Data, per_cell: int, seed: int) -> pd.DataFrame:
    """`per_cell` rows of every cell; findings and labels of a training row of any cell, age of one in the same bin."""
    train = data.rows("train")
    rows = []
    for index, cell in enumerate(data.schema.cells()):
        rng = np.random.default_rng([seed, index])
        who = data.schema.decode(cell)
        donors = train.iloc[rng.integers(len(train), size=per_cell)].to_dict("records")
        ages = _ages(train, who.get("age"), per_cell, rng)
        for n, (donor, age) in enumerate(zip(donors, ages, strict=True)):
            name, held = f"balanced-{index}-{n}", int(cell in data.manifest.held_out)
            own = {"id": name, "patient": name, "split": "balanced", "held_out": held, "cell": index, "age_years": age}
            rows.append({**donor, **who, **own})
    return pd.DataFrame(rows)


def _ages(train: pd.DataFrame, category: str | None, n: int, rng: np.random.Generator) -> list[int]:
    """n ages in years from the training rows of an age bin (of all rows without one); its middle if it is empty."""
    pool = train["age_years"] if category is None else train.loc[train["age"] == category, "age_years"]
    if len(pool):
        return rng.choice(pool.to_numpy(), size=n).tolist()
    edges = (0, *AGE_THRESHOLDS, 90)
    k = AGE.index(category)
    return [(edges[k] + edges[k + 1]) // 2] * n
