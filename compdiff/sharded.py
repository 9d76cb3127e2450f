"""Weights that FSDP spreads over the processes: put together for what is written, taken apart for what is read.

So a checkpoint is the same file however many processes wrote it, with FSDP or without. Without FSDP tensors stay as they
are.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """All of a tensor of which every process holds a part; every process has to call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of the whole `value`, spread as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def check(accelerator: Accelerator) -> None:
    """ValueError, with the remedy, for an FSDP that the training loop does not work under."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP of version 1 flattens the weights that this loop names one by one: add --fsdp_version 2")
    if plugin.cpu_ram_efficient_loading:  # transformers then leaves the weights of all other processes empty
        raise ValueError("all processes but one would load no text encoder: add --fsdp_cpu_ram_efficient_loading false")
