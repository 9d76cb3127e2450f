"""How weights move and how fast: the optimizer, its state as plain tensors, memory layout and compilation."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from compdiff.config import TrainConfig
from compdiff.sharded import part_of, whole

WEIGHT_DECAY = 1e-2


def build(params: Mapping[str, nn.Parameter], config: TrainConfig) -> Optimizer:
    """AdamW over {name: parameter}: the conditioner's learn at `head_lr`, all others at `lr` (group key "base_lr").

    `config.optimizer`: adamw, or adamw8bit (bitsandbytes; its moments take a quarter of the memory). ValueError for
    another name; ModuleNotFoundError, with the remedy, where bitsandbytes is not installed.
    """
    heads = [p for n, p in params.items() if n.startswith("conditioner.")]
    rest = [p for n, p in params.items() if not n.startswith("conditioner.")]
    groups = [{"params": rest, "base_lr": config.lr}] + (
        [{"params": heads, "base_lr": config.head_lr}] if heads else []
    )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=WEIGHT_DECAY, fused=True)
    if config.optimizer != "adamw8bit":
        raise ValueError(f"unknown optimizer {config.optimizer!r}; known: adamw, adamw8bit")
    try:
        library = importlib.import_module("bitsandbytes")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "optimizer=adamw8bit needs `pip install bitsandbytes`; optimizer=adamw does not"
        ) from None
    return library.optim.AdamW8bit(groups, lr=config.lr, weight_decay=WEIGHT_DECAY)


def tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """{"<parameter number>.<name>": tensor on the CPU}: all that the optimizer remembers, each in memory of its own."""
    found = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            inner = (
                value if isinstance(value, dict) else {name: value}
            )  # bitsandbytes keeps its quantised part in a dict
            found |= {
                f"{index}.{n}": whole(torch.as_tensor(v).detach()).to("cpu", copy=True).contiguous()
                for n, v in inner.items()
            }
    return found


def restore(optimizer: Optimizer, stored: Mapping[str, Tensor]) -> None:
    """Give a fresh optimizer the state that `tensors` took from another one of the same kind."""
    state = optimizer.state_dict()
    state["state"] = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in stored.items():
        index, name = key.split(".", 1)
        number = value.dtype == torch.int64  # bitsandbytes counts steps in a Python number, torch in a float tensor
        if value.shape == params[int(index)].shape:  # not the count of steps
            value = part_of(value, params[int(index)])
        state["state"].setdefault(int(index), {})[name] = int(value) if number else value
    optimizer.load_state_dict(state)


def clip(accelerator: Accelerator, params: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients to the norm `limit` where theirs is larger; returns the norm before.

    One process on a CPU does not multiply by the factor 1, as torch does so that nobody waits for a GPU: the same bits.
    """
    if accelerator.num_processes > 1 or accelerator.device.type != "cpu":
        return accelerator.clip_grad_norm_(params, limit)
    accelerator.unscale_gradients()
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if not norm + 1e-6 <= limit:  # torch's factor is limit / (norm + 1e-6), at most 1; a norm that is no number goes on
        nn.utils.clip_grads_with_norm_(params, limit, norm)
    return norm


def quicken(unet: nn.Module, config: TrainConfig) -> None:
    """Memory layout and compilation of the UNet for training; changes results by rounding only. Names stay."""
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.compile:
        unet.compile()
