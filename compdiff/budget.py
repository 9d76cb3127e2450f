"""What a run at paper scale costs, in GPU-hours and disk: the one source of what `make paper` says and of docs/scale.md.

Nothing here was measured in this repository. Two published figures for Stable Diffusion 2.1 at 512 x 512 carry the
hours, sizes of files carry the disk; every other rate is derived from them and says how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from compdiff.config import Config

# Published: images that train the UNet per second on one A100, and the work of one, forward and backward.
A100_IMAGES_PER_S = 36.0
STEP_TFLOP = 2.41
PASSES_PER_S = 3 * A100_IMAGES_PER_S  # forward alone is a third of a step: the backward pass costs two
UNET, TEXT_ENCODER = 865_910_724, 340_387_840  # parameters
TRAINED_COPIES = 5  # float32: weights.safetensors, and in the checkpoint weights, average and two moments of AdamW
TEXT = 77 * 1024  # numbers of one prompt's embedding
PUBLISHED_IMAGES = {"mimic": 60_000}  # training images of the papers' cohorts
CELLS = 40  # of age, sex, race


@dataclass(frozen=True)
class Line:
    """One row of the estimate."""

    what: str
    hours: float  # A100
    gigabytes: float


def training(methods: Mapping[str, Config], seeds: int) -> Line:
    """Every method, every seed: images seen at the published rate; the files that are kept."""
    images = sum(c.train.steps * c.train.batch for c in methods.values()) * seeds
    values = sum(UNET * (c.train.lora_rank == 0) + TEXT_ENCODER * ("text_encoder" in c.train.trained) for c in methods.values())
    what = f"training of {len(methods)} method{'s' * (len(methods) != 1)}, {seeds} seed{'s' * (seeds != 1)}"
    return Line(what, hours(images), values * TRAINED_COPIES * 4 * seeds / 1e9)


def preparation(images: int, config: Config) -> Line:
    """Images as 8-bit pixels (PNG saves some of it) and the VAE's moments; encoding is counted like a training step."""
    side = config.data.size
    return Line(f"{images:,} images: shards and latents", hours(images), images * (side**2 + 8 * (side // 8) ** 2 * 4) / 1e9)


def embeddings(images: int) -> Line:
    """Where the text encoder is frozen: one embedding per prompt; the encoder's time is a hundredth of the UNet's."""
    return Line(f"{images:,} text embeddings, for a frozen encoder", hours(images) / 100, images * TEXT * 4 / 1e9)


def sampling(images: int, config: Config) -> Line:
    """Solver steps with two passes each (guidance) at the training's rate of work."""
    c = config.sample
    passes = images * c.sample_steps * (1 if c.guidance == 1 else 2)
    return Line(f"sampling of {images:,} images, {c.sample_steps} steps", passes / PASSES_PER_S / 3600, images * config.data.size**2 / 1e9)


def hours(images: int) -> float:
    return images / A100_IMAGES_PER_S / 3600


def sampled(images: int, methods: Sequence[str], demo: Sequence[str], config: Config) -> int:
    """Images that notebook 05 makes for one seed: of the methods in `demo` one for each training prompt, and the balanced set.

    The test sets come on top: their size is known when the data are.
    """
    return sum(method in demo for method in methods) * (images + CELLS * config.sample.balanced_per_cell)


def words(dataset: str, methods: Mapping[str, Config], seeds: int, demo: Sequence[str]) -> str:
    """One sentence for a request whose data is not there yet."""
    config = next(iter(methods.values()))
    lines = [training(methods, seeds)]
    if images := PUBLISHED_IMAGES.get(dataset):
        lines += [preparation(images, config), sampling(seeds * sampled(images, list(methods), demo, config), config)]
    else:
        lines += [sampling(10_000, config)]
    parts = [f"{line.what}: about {line.hours:,.1f} A100-hours, {line.gigabytes:,.0f} GB" for line in lines]
    return f"this request, from published rates: {'; '.join(parts)} (docs/scale.md)"


def table(lines: Iterable[Line]) -> list[str]:
    """The lines of a Markdown table."""
    head = ["| step | A100-hours | disk, GB |", "|---|---:|---:|"]
    return head + [f"| {line.what} | {line.hours:,.1f} | {line.gigabytes:,.0f} |" for line in lines]


def scale(images: int, methods: Mapping[str, Config], seeds: int, demo: Sequence[str], generated: int = 0) -> list[Line]:
    """The rows of docs/scale.md for a cohort of `images` training images; generated: images per seed, 0 = as `sampled`."""
    config = next(iter(methods.values()))
    drawn = generated or sampled(images, list(methods), demo, config)
    rows = [preparation(images, config), embeddings(images), training(methods, seeds), sampling(seeds * drawn, config)]
    return [*rows, Line("together", sum(row.hours for row in rows), sum(row.gigabytes for row in rows))]
