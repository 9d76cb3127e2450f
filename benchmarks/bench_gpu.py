"""Training and sampling speed at Stable Diffusion 2.1's size, 512 x 512, bf16, on one GPU; random weights (sd21.yaml).

Ours is the project's loop with HCN on cached latents and text. Plain is a diffusers-style step: AdamW, clipping, no
EMA, the frozen text encoder in each step, the VAE too where it says "encode". Model FLOP utilisation counts 2.41 TFLOP
per image, which only full fine-tuning does, over the card's peak (PEAKS, or --peak). Writes benchmarks/results/gpu.csv row by row.
    python benchmarks/bench_gpu.py
    python benchmarks/bench_gpu.py --narrow --batches 2 --steps 1 --out FILE   # a tenth of the width, on a CPU
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from compdiff import diffusion, methods, paths, record, sample, train
from compdiff.attributes import SCHEMAS
from compdiff.config import Config, settings
from compdiff.latents import Latents

PEAKS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}  # word of a card's name -> TFLOP/s, dense bf16 (SXM)
TFLOP = 2.41  # forward and backward of the UNet for one 512 x 512 image, 77 + 1 tokens
SCHEMA = SCHEMAS["chest"]
Maker = Callable[[Path, str], Callable[[], object]]  # scratch folder, device -> the call that is timed
VARIANTS = {  # setting -> what differs from the recipe
    "full": {},
    "full, channels_last": dict(channels_last=True),
    "full, channels_last, compiled": dict(channels_last=True, compile=True),
    "full, gradient checkpointing": dict(gradient_checkpointing=True),
    "lora": dict(lora_rank=4),
}


def layout(narrow: bool, version: str = "base") -> dict[str, dict]:
    """The parts' configurations of SD-2.1 ("base" or "v21"), at full width or a tenth."""
    known = yaml.safe_load((paths.ROOT / "benchmarks" / "sd21.yaml").read_text())
    found = {name: known[name] for name in ("unet", "text_encoder", "vae", "scheduler")}
    for more in ([known["v21"]] if version == "v21" else []) + ([known["narrow"]] if narrow else []):
        found |= {name: found[name] | changes for name, changes in more.items()}
    return found


def build(parts: dict[str, dict], device: torch.device | str, tokenizer=None) -> diffusion.Diffusion:
    """A base of that layout on `device` ("meta": shapes only) with random weights; by default without a tokenizer."""
    torch.manual_seed(0)
    with torch.device(device):
        return diffusion.Diffusion(
            tokenizer, CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])).eval(),
            AutoencoderKL.from_config(parts["vae"]).eval().requires_grad_(False),
            UNet2DConditionModel.from_config(parts["unet"]).eval(),
            DDPMScheduler.from_config(parts["scheduler"]), parts["scheduler"]["_class_name"],
        )  # fmt: skip


def random_rows(base: diffusion.Diffusion, n: int) -> Latents:
    """Cached latents, text embeddings and attributes of `n` images that nobody drew."""
    side, length = base.unet.config.sample_size, base.text_encoder.config.max_position_embeddings
    text = torch.randn(n + 1, length, base.d_ctx)
    who = torch.stack([torch.randint(size, (n,)) for size in SCHEMA.sizes], dim=1)
    return Latents(torch.randn(n, 2 * base.channels, side, side), text[:-1], who, text[-1])


def our_step(parts: dict, config: Config, folder: Path, device: str) -> Callable[[], object]:
    """One call is one step of the project's loop, HCN included; nothing is encoded."""
    base = build(parts, device)
    made = methods.build("hcn", SCHEMA, base.d_ctx, config, seed=0)
    rows = random_rows(base, 2 * config.train.batch)
    steps = train.train(config, base, rows, rows, made.conditioner, made.reweighter, folder, made.columns)
    return lambda: next(steps)


def plain_step(parts: dict, config: Config, encode: bool, folder: Path, device: str) -> Callable[[], object]:
    """One call is one step of a diffusers-style script, mixed precision as there: frozen parts in bf16, autocast."""
    base, n = build(parts, device), config.train.batch
    device = base.unet.device
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    base.vae.to(kind), base.text_encoder.to(kind).requires_grad_(False)
    base.unet.train().requires_grad_(config.train.lora_rank == 0)
    if config.train.lora_rank:
        rank, where = config.train.lora_rank, ["to_q", "to_k", "to_v", "to_out.0"]
        base.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=where))
    learning = [p for p in base.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5)
    side = base.unet.config.sample_size
    pixels = torch.randn(n, 3, 8 * side, 8 * side, device=device, dtype=kind)
    moments = torch.randn(n, 2 * base.channels, side, side, device=device)
    words = base.text_encoder.config
    ids = torch.randint(words.vocab_size, (n, words.max_position_embeddings), device=device)

    def step() -> None:
        with torch.no_grad():
            found = base.vae.encode(pixels).latent_dist.parameters.float() if encode else moments
            text = base.text_encoder(ids)[0]
        z = base.latents(found, torch.randn_like(moments[:, : base.channels]))
        noise, t = torch.randn_like(z), torch.randint(1000, (n,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            prediction = base.unet(base.scheduler.add_noise(z, noise, t), t, text).sample
        F.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(call: Callable[[], object], device: torch.device, steps: int, warm: int) -> float:
    """Median of `steps` calls after `warm` ones, device work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(warm + steps):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm:])


def sampling(
    parts: dict, solver: str, count: int, n: int, ours: bool, folder: Path, device: str
) -> Callable[[], object]:
    """One call draws `n` images, ours or by diffusers' pipeline: same solver, steps, guidance and precision."""
    base, precision = build(parts, device), "bf16" if device == "cuda" else "no"
    config, rows = settings("paper", solver=solver, sample_steps=count).sample, random_rows(base, n)
    model = diffusion.Denoiser(base, methods.build("text", SCHEMA, base.d_ctx, Config(), 0).conditioner, [], precision)
    pipe = base.pipeline()
    pipe.scheduler = base.sampler(solver)
    pipe.set_progress_bar_config(disable=True)
    embeds = {
        "prompt_embeds": rows.text.to(device),
        "negative_prompt_embeds": rows.empty.expand_as(rows.text).to(device),
    }

    def draw() -> None:
        if ours:
            sample.sample(model, base, rows.text, rows.empty, rows.attributes, list(range(n)), config)
            return
        with sample.in_precision(precision, torch.device(device)):
            pipe(**embeds, num_inference_steps=count, guidance_scale=config.guidance, output_type="np")

    return draw


def settings_of(args: argparse.Namespace, batch: int, **changes: object) -> Config:
    """The paper profile, UNet only, one microbatch; 10,000 steps are announced, so that the loop only trains."""
    dials = dict(trained="unet", batch=batch, microbatch=batch, steps=10_000, validate_every=1.0, checkpoint_every=1.0,
                 gradient_checkpointing=False, precision="bf16" if args.device == "cuda" else "no")  # fmt: skip
    return settings("paper", "", "hcn", **(dials | changes))


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, int, Maker]]:
    """(what, whose, batch, maker of the call that is timed), so that only one model is in memory at a time."""
    parts = layout(args.narrow)
    for batch in args.batches:
        for name, changes in VARIANTS.items():
            if batch == max(args.batches) or "," not in name:  # the variants at the largest batch only
                config = settings_of(args, batch, **changes)
                yield f"training, {name}", "ours, cached latents and text", batch, partial(our_step, parts, config)
        for name in ("full", "lora"):
            config = settings_of(args, batch, **VARIANTS[name])
            yield f"training, {name}", "plain, encode every step", batch, partial(plain_step, parts, config, True)
            yield f"training, {name}", "plain, cached latents", batch, partial(plain_step, parts, config, False)
    for solver, count in (("ddpm", 75), ("dpm++", 20)):
        for whose, ours in (("ours", True), ("diffusers' pipeline", False)):
            maker = partial(sampling, parts, solver, count, args.images, ours)
            yield f"sampling, {solver} {count} steps", whose, args.images, maker


def measured(what: str, batch: int, make: Maker, args: argparse.Namespace) -> dict:
    """Images per second, utilisation (empty where nobody knows the peak) and peak memory of one case, or the note that
    it ran out of memory or was not compiled."""
    device = torch.device(args.device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps, warm = (args.steps, args.warm) if what.startswith("training") else (1, 1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            speed = batch / seconds(make(Path(folder), args.device), device, steps, warm)
    except torch.cuda.OutOfMemoryError:
        return {"note": "out of memory"}
    except BackendCompilerFailed as error:
        return {"note": f"not compiled: {str(error.inner_exception).splitlines()[0]}"}
    counted = what.startswith("training, full") and not args.narrow
    return {
        "images_per_s": speed,
        "flop_utilisation": speed * TFLOP / args.peak if counted and args.peak else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def peak_of(card: str) -> float:
    """TFLOP/s of a card by its name, 0 where PEAKS does not know it."""
    return next((peak for word, peak in PEAKS.items() if word in card), 0.0)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=8, help="timed steps; sampling is timed once")
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--images", type=int, default=16, help="images drawn at once")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s, dense bf16; default: the card's in PEAKS")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    parser.add_argument("--out", type=Path, default=paths.ROOT / "benchmarks" / "results" / "gpu.csv")
    args = parser.parse_args(words)
    if args.device != "cuda" and not args.narrow:
        parser.error("no GPU here: --narrow tries the benchmark without one, its numbers mean nothing")
    args.peak = args.peak or peak_of(record.accelerator())
    about = {"device": record.accelerator(), "peak_tflops": args.peak or None, "command": " ".join(["bench_gpu.py", *words]), **record.versions()}
    rows = []
    for what, whose, batch, make in cases(args):
        if args.only in what:
            rows.append({"what": what, "whose": whose, "batch": batch, **measured(what, batch, make, args)})
            print(rows[-1], flush=True)
            with record.atomic(args.out) as temporary:
                pd.DataFrame(rows).assign(**about).to_csv(temporary, index=False, float_format="%.4g")


if __name__ == "__main__":
    main(sys.argv[1:])
