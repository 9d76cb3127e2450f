"""What a training run keeps: the average of its weights, and all of its state on disk, from which a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compdiff import optim, record
from compdiff.interfaces import Reweighter
from compdiff.sharded import part_of, whole


class EMA:
    """Exponential moving average of the trained parameters, remembering `horizon` of the run's steps."""

    def __init__(self, params: dict[str, nn.Parameter], steps: int, horizon: float):
        self.params = params
        self.decay = 1 - 1 / max(1.0, horizon * steps)
        self.shadow = {n: p.detach().clone() for n, p in params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.params.values()], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model holds the averaged weights."""
        raw = {n: p.detach().clone() for n, p in self.params.items()}
        copy_into(self.params, self.shadow)
        try:
            yield
        finally:
            copy_into(self.params, raw)


@torch.no_grad()
def copy_into(params: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, p in params.items():
        p.copy_(part_of(values[name], p))


class Checkpoint:
    """All state of a run in one safetensors file, replaced atomically by the main process; any number of processes goes on from it."""

    def __init__(self, folder: Path, params, ema: EMA | None, optimizer, reweighter: Reweighter, accelerator: Accelerator):
        self.folder, self.params, self.ema, self.optimizer = Path(folder), params, ema, optimizer
        self.reweighter, self.accelerator = reweighter, accelerator
        self.log: list[dict] = []
        self.best = {"val_loss": math.inf, "step": 0}
        self.sharded = accelerator.is_fsdp2

    def restore(self) -> int:
        """Load checkpoint.safetensors if there is one; returns the number of finished steps."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return 0
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["state"])
            if meta["best"]["step"] and not (self.folder / "weights.safetensors").exists():
                return 0  # somebody removed the result: make it again
            tensors = {k: file.get_tensor(k) for k in file.keys()}
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        copy_into(self.params, part("model."))
        if self.ema is not None:
            copy_into(self.ema.shadow, part("ema."))
        optim.restore(self.optimizer, part("optimizer."))
        self.reweighter.load_state_dict(part("reweighter."))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(meta["scaler"])
        self.log, self.best = meta["log"], meta["best"]
        return meta["step"]

    def save(self, step: int) -> None:
        self.accelerator.wait_for_everyone()
        if not (self.accelerator.is_main_process or self.sharded):
            return
        tensors = {f"model.{n}": whole(p.detach()).cpu().contiguous() for n, p in self.params.items()}
        tensors |= {f"ema.{n}": whole(p).cpu().contiguous() for n, p in (self.ema.shadow if self.ema else {}).items()}
        tensors |= {f"optimizer.{n}": v for n, v in optim.tensors(self.optimizer).items()}
        if not self.accelerator.is_main_process:
            return
        tensors |= {f"reweighter.{n}": v for n, v in self.reweighter.state_dict().items()}
        meta = {"step": step, "log": self.log, "best": self.best}
        meta["scaler"] = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        with record.atomic(self.folder / "log.csv") as temporary:
            pd.DataFrame(self.log).to_csv(temporary, index=False, float_format="%.6g")
        with record.atomic(self.folder / "checkpoint.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"state": json.dumps(meta)})

    def keep_best(self, score: float, step: int) -> None:
        """Write weights.safetensors when `score` is the lowest yet (called with the averaged weights in place).

        `score` has to be the same number in every process: under FSDP all of them put the weights together.
        """
        if score < self.best["val_loss"]:
            self.best = {"val_loss": score, "step": step}
            tensors = {n: whole(p.detach()).cpu().contiguous() for n, p in self.params.items()}
            if self.accelerator.is_main_process:
                with record.atomic(self.folder / "weights.safetensors") as temporary:
                    save_file(tensors, temporary)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Hold a training folder by a lock beside it, which ends with the process; False where another one holds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def make_ready(folder: Path, inputs: Mapping[str, str]) -> bool:
    """Is the run of `inputs` (as in run.json) finished here? Else remove what other inputs made, a result that was
    changed since, and half-written files of a killed process."""
    marker, made = folder / "inputs.json", ("checkpoint.safetensors", "weights.safetensors", "log.csv")
    for stale in (path for name in made for path in folder.glob(f".{name}.*")):
        stale.unlink()
    if record.is_current(folder, inputs):
        return True
    if not marker.exists() or json.loads(marker.read_text())["inputs"] != inputs["training"]:
        for old in made:
            (folder / old).unlink(missing_ok=True)
        record.write_json(marker, {"inputs": inputs["training"]})
    weights, known = folder / "weights.safetensors", record.read_run(folder)
    if known and not record.unchanged(weights, known["outputs"][weights.name]):
        weights.unlink(missing_ok=True)  # no checkpoint stands for it any more: `restore` starts afresh
    (folder / "run.json").unlink(missing_ok=True)
    return False
