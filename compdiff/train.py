"""One training loop for every method: the conditioner and the reweighter are objects passed in.

All randomness of a step is drawn for the *global* batch from generators seeded by (seed, step, name) and sliced by
process, so neither the number of processes nor a restart changes the experiment.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from compdiff import optim, record, sharded, sources
from compdiff.checkpoint import EMA, Checkpoint, alone, copy_into, make_ready
from compdiff.config import Config, TrainConfig, flat
from compdiff.diffusion import Denoiser, Diffusion, trainable
from compdiff.interfaces import Conditioner, Reweighter
from compdiff.latents import Latents, Rows
from compdiff.progress import interactive

TIMEOUT = timedelta(minutes=10)  # a process that has not answered for so long is given up
SHARDING = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class StepNoise:
    """Random numbers of one step, drawn once for the global batch and sliced to `rows`: the same on any world size.

    What is drawn is kept, and slices share its memory: do not change it in place.
    """

    def __init__(self, seed: int, step: int, batch: int, rows: slice, device: torch.device | str = "cpu"):
        self.key, self.batch, self.rows, self.device = f"{seed}/{step}", batch, rows, device
        self.drawn: dict[tuple, Tensor] = {}  # (kind, name, shape) -> [batch, *shape]

    def part(self, rows: slice, device: torch.device | str) -> StepNoise:
        """The same numbers for other `rows`: one microbatch's."""
        part = copy.copy(self)  # shares `drawn`
        part.rows, part.device = rows, device
        return part

    def generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.key}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def normal(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """N(0,1), [rows, *shape]."""
        return self._sliced(torch.randn, name, shape)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """U(0,1), [rows, *shape]."""
        return self._sliced(torch.rand, name, shape)

    def _sliced(self, draw: Callable[..., Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        key = draw.__name__, name, tuple(shape)
        if key not in self.drawn:
            self.drawn[key] = draw(self.batch, *shape, generator=self.generator(name))
        return self.drawn[key][self.rows].to(self.device)


def batch_rows(n: int, batch: int, step: int, seed: int) -> Tensor:
    """Row numbers of the global batch of `step`: epochs of seeded permutations, every sample once per epoch."""
    place = range(step * batch, (step + 1) * batch)
    return torch.stack([_order(n, p // n, seed)[p % n] for p in place])


@functools.lru_cache(maxsize=2)  # the epochs that one batch touches; at 10 million images drawing one takes long
def _order(n: int, epoch: int, seed: int) -> Tensor:
    """The permutation [n] of one epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Factor on the learning rate: linear warm-up, then a half cosine to zero (or constant)."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    if config.lr_schedule == "constant":
        return 1.0
    if config.lr_schedule != "cosine":
        raise ValueError(f"unknown lr_schedule {config.lr_schedule!r}; known: cosine, constant")
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def new_accelerator(config: TrainConfig) -> Accelerator:
    """On the GPU where there is one; one process, or those that `accelerate launch` started, with DDP or FSDP (version 2).

    ValueError for other modes that shard the weights over processes.
    """
    patience = InitProcessGroupKwargs(timeout=TIMEOUT)
    accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    if accelerator.distributed_type in SHARDING:
        raise ValueError(
            f"{accelerator.distributed_type.value} shards the weights over processes in a way of its own: launch with --multi_gpu "
            "(every GPU holds the model: 24 GB for SD-2.1 with its average) or with --use_fsdp --fsdp_version 2; if memory is short, "
            "lower MICROBATCH, set GRADIENT_CHECKPOINTING=1 or LORA_RANK=16"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        sharded.check(accelerator)
    return accelerator


def train(config: Config, base: Diffusion, data: Latents, valid: Latents, conditioner: Conditioner, reweighter: Reweighter, folder: Path,
          columns: list[int] | None = None, seed: int = 0, accelerator: Accelerator | None = None,
          denoiser: Callable[..., Denoiser] = Denoiser) -> Iterator[dict]:  # fmt: skip
    """Train one method; yields one dict per step (loss, penalties, grad_norm, lr; val_loss where validated).

    `conditioner` and `reweighter` are as in `interfaces`; the conditioner sees the attribute `columns` (default: all). `denoiser` is the
    class of the model, which `data.extra` feeds. Writes to `folder`: checkpoint.safetensors (all state; a run
    that finds it goes on from there), weights.safetensors (the best by validation loss), log.csv.
    ValueError when the global batch does not split over processes and microbatches; FloatingPointError when a loss is
    not finite.
    """
    c = config.train
    accelerator = accelerator or new_accelerator(c)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    share = c.batch // world
    micro = min(c.microbatch, share)
    if share * world != c.batch or share % micro:
        raise ValueError(f"batch={c.batch} must be a multiple of {world} processes x microbatch={micro}")

    model = denoiser(base.to(device), conditioner, columns).to(device)
    params = trainable(model, c)  # {name: parameter}
    optim.quicken(model.unet, c)
    optimizer = optim.build(params, c)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}  # under FSDP they are others now
    ema = EMA(params, c.steps, c.ema_horizon) if c.ema else None
    run = Checkpoint(folder, params, ema, optimizer, reweighter, accelerator)
    validate_every = max(1, round(c.validate_every * c.steps))
    checkpoint_every = max(1, round(c.checkpoint_every * c.steps))

    wrapped.train()
    for step in range(run.restore(), c.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate(step, c)
        rows = batch_rows(len(data), c.batch, step, seed)  # [batch]: the global batch, known to every process
        whole = StepNoise(seed, step, c.batch, slice(None))
        weights = reweighter.weights(data.attributes[rows], whole.generator("weights")).float()  # [batch]

        if not model.training:  # walking through all modules takes a while: only after validation
            wrapped.train()
        terms = []
        for start in range(rank * share, (rank + 1) * share, micro):
            part = slice(start, start + micro)
            last = start + micro == (rank + 1) * share
            noise = whole.part(part, device)
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                losses, penalties = step_losses(wrapped, model, base, data, rows[part], noise, c, step / c.steps)
                total = weights[part].to(device) * losses + sum(penalties.values())
                accelerator.backward(total.sum() / share)
            terms.append(torch.stack([losses, *penalties.values()], dim=1).detach())  # [micro, 1 + P]
        grad_norm = optim.clip(accelerator, list(params.values()), c.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(step)

        gathered = accelerator.gather(torch.cat(terms)).cpu()  # [batch, 1 + P], in the order of `rows`
        means = dict(zip(["loss", *penalties], gathered.mean(dim=0).tolist(), strict=True))
        if odd := [f"{name} is {value}" for name, value in means.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"{', '.join(odd)} at step {step + 1}: lower lr, or use precision=no")
        if accelerator.is_main_process:  # one process decides
            reweighter.observe(gathered[:, 0], data.attributes[rows], whole.generator("sigma"), step + 1)
        reweighter.sigma = broadcast(reweighter.sigma.to(device)).cpu()
        row = {"step": step + 1, **means, "grad_norm": float(sharded.whole(grad_norm)), "lr": c.lr * learning_rate(step, c)}
        if (step + 1) % validate_every == 0 or step + 1 == c.steps:
            with ema.applied() if ema is not None else contextlib.nullcontext():
                score = validation_loss(model, base, valid, device)
                row["val_loss"] = score if world == 1 else broadcast(torch.tensor([score], dtype=torch.float64, device=device)).item()
                if not math.isfinite(row["val_loss"]):
                    raise FloatingPointError(f"val_loss is {row['val_loss']} at step {step + 1}: lower lr")
                run.keep_best(row["val_loss"], step + 1)
            if isinstance(model, FSDPModule):
                model.reshard()  # or the next step would go on from the average
        run.log.append(row)
        if (step + 1) % checkpoint_every == 0 or step + 1 == c.steps:
            run.save(step + 1)
        yield row | {"images_per_s": c.batch / (time.perf_counter() - began)}


def step_losses(wrapped, model: Denoiser, base: Diffusion, data: Latents, rows: Tensor, noise: StepNoise, c: TrainConfig,
                progress: float) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Per-sample diffusion losses [b] and the conditioner's weighted penalties {name: [b]} of one microbatch."""
    device = noise.device
    shape = (base.channels, *data.moments.shape[2:])
    attributes = data.attributes[rows].to(device)
    z = base.latents(data.moments[rows].to(device), noise.normal("posterior", shape))  # [b, C, h, w]
    eps = noise.normal("noise", shape)
    t = (noise.uniform("time") * base.scheduler.config.num_train_timesteps).long()  # [b]
    corrupting = eps + c.input_perturbation * noise.normal("perturb", shape) if c.input_perturbation else eps
    noisy = base.scheduler.add_noise(z, corrupting, t)
    drop = noise.uniform("prompt_dropout") < c.prompt_dropout  # prompt and token together
    keep = (~drop & (noise.uniform("demographic_dropout") >= c.demographic_dropout)).float()
    text = data.text[rows].to(device)
    text = torch.where(drop.view(-1, *[1] * (text.ndim - 1)), data.empty.to(device), text)
    extra = {name: value.to(device) for name, value in data.extra(rows).items()}
    prediction, condition = wrapped(noisy, t, text, attributes, noise, keep, **extra)
    losses = (prediction.float() - base.target(z, eps, t).float()).square().mean(dim=(1, 2, 3))  # [b]
    return losses, model.penalties(condition, attributes, progress)


@torch.no_grad()
def validation_loss(model: Denoiser, base: Diffusion, valid: Latents, device, limit: int = 256, seed: int = 7) -> float:
    """Mean denoising loss on up to `limit` validation rows at fixed noise and evenly spread timesteps."""
    n = min(limit, len(valid))
    model.eval()
    noise = StepNoise(seed, 0, n, slice(None), device)
    shape = (base.channels, *valid.moments.shape[2:])
    z, eps = base.latents(valid.moments[:n].to(device)), noise.normal("noise", shape)
    t = ((torch.arange(n, device=device) + 0.5) / n * base.scheduler.config.num_train_timesteps).long()
    total = 0.0
    for s in (slice(i, i + 64) for i in range(0, n, 64)):
        noisy = base.scheduler.add_noise(z[s], eps[s], t[s])
        extra = {name: value.to(device) for name, value in valid.extra(slice(s.start, min(s.stop, n))).items()}
        prediction, _ = model(noisy, t[s], valid.text[:n][s].to(device), valid.attributes[:n][s].to(device), **extra)
        total += (prediction - base.target(z[s], eps[s], t[s])).square().mean(dim=(1, 2, 3)).sum().item()
    return total / n


def load_weights(model: Denoiser, params: dict[str, nn.Parameter], path: Path) -> None:
    """Copy weights.safetensors into the trained parameters. ValueError when the names differ."""
    values = load_file(path)
    if set(values) != set(params):
        odd = sorted(set(values) ^ set(params))
        raise ValueError(f"{path} does not fit this method: {len(odd)} names differ, the first is {odd[0]!r}")
    copy_into(params, values)
    model.eval()


def inputs_hash(config: Config, base_sha256: str, data: Latents, valid: Latents, conditioner: Conditioner, reweighter: Reweighter,
                columns, seed: int, denoiser: Callable[..., Denoiser] = Denoiser) -> str:  # fmt: skip
    """Hash of all that decides the trained weights: settings, base, data, and the sources of the objects used."""
    digest = hashlib.sha256()
    latents = [tensor for part in (data, valid) for tensor in (part.moments, part.text, part.attributes, part.empty)]
    extra = [tensor for part in (data, valid) for tensor in part.extra(slice(None)).values()]
    for tensor in (*latents, *extra, *conditioner.state_dict().values()):
        on_disk = isinstance(tensor, Rows)  # their hash was taken when they were written
        digest.update(tensor.sha256.encode() if on_disk else tensor.detach().cpu().contiguous().numpy().tobytes())
    objects = [type(conditioner), type(reweighter)]
    code = sources.closure({o.__module__ for o in objects}, Path(__file__).parent)
    names = {"train.py", "checkpoint.py", "diffusion.py", "optim.py", "sharded.py", f"{denoiser.__module__.rpartition('.')[2]}.py"}
    code |= {name: record.source_sha256(Path(__file__).with_name(name)) for name in names}
    code.pop("compdiff/config.py", None)  # its values count, in `settings`
    settings = {"train": asdict(config.train), "hcn": asdict(config.hcn), "fair": asdict(config.fair)}
    rest = {"seed": seed, "columns": columns, "objects": [o.__name__ for o in (*objects, denoiser)]}
    return record.sha256_json([settings, rest, base_sha256, digest.hexdigest(), code])


def run(config: Config, base: Diffusion, base_sha256: str, data: Latents, valid: Latents, conditioner: Conditioner, reweighter: Reweighter,
        folder: Path, columns: list[int] | None = None, seed: int = 0, accelerator: Accelerator | None = None,
        denoiser: Callable[..., Denoiser] = Denoiser) -> pd.DataFrame:  # fmt: skip
    """`train` to the end, unless `folder` already holds the result of the same inputs; writes run.json, returns the log.

    A folder with a half-finished run of the same inputs is continued; one of other inputs is started afresh; a finished
    one needs no checkpoint. RuntimeError while another command trains in `folder`.
    ConnectionError in the processes that are left when another one has ended or does not answer.
    """
    folder, accelerator = Path(folder), accelerator or new_accelerator(config.train)
    wanted = inputs_hash(config, base_sha256, data, valid, conditioner, reweighter, columns, seed, denoiser)
    inputs, main = {"training": wanted, "base": base_sha256}, accelerator.is_main_process
    made_by = record.Run(folder / "run.json", inputs, flat(config), [seed])
    with alone(folder) if main else contextlib.nullcontext(True) as ours:
        finished = main and ours and make_ready(folder, inputs)
        ours, finished = broadcast(torch.tensor([ours, finished], dtype=torch.int, device=accelerator.device)).tolist()
        if not ours:  # the main process has looked for all
            raise RuntimeError(f"another command trains in {folder}: let it finish or end it, then start this one again")
        if not finished:
            steps = train(config, base, data, valid, conditioner, reweighter, folder, columns, seed, accelerator, denoiser)
            _carry_out(steps, config.train.steps, folder.name, accelerator)
            accelerator.wait_for_everyone()  # the main process has written the log
            if main:
                made_by.outputs = [folder / "weights.safetensors", folder / "log.csv"]
                made_by.finish()
    return pd.read_csv(folder / "log.csv")


def _carry_out(rows: Iterator[dict], steps: int, name: str, accelerator: Accelerator) -> None:
    """All steps of `train`, with a progress bar. ConnectionError: see `run`."""
    bar = tqdm(total=steps, disable=not (interactive() and accelerator.is_main_process), unit="step", desc=name)
    done = 0
    try:
        for row in rows:
            bar.update(row["step"] - done)
            done = row["step"]
            bar.set_postfix(loss=f"{row['loss']:.3f}", images_per_s=f"{row['images_per_s']:.0f}")
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):  # gloo's own errors have no class
            raise
        rank, world = accelerator.process_index, accelerator.num_processes
        raise ConnectionError(
            f"process {rank} of {world}: another process has ended or does not answer, after step {done} of {steps}. "
            "Start the same command again: it goes on from the last checkpoint"
        ) from error
    bar.close()
