"""Where heavy arithmetic runs: on this process's GPU if there is one. Training places its model by accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn


def accelerator() -> torch.device:
    """The GPU of this process (LOCAL_RANK, as its launcher numbers them); the CPU without one, and under
    `accelerate launch --cpu`.
    """
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


@contextmanager
def on_accelerator(*modules: nn.Module) -> Iterator[torch.device]:
    """Within it the modules are on the accelerator, afterwards back where they were: a lesson's cells, which hold their
    tensors on the CPU, go on working. Nested, only the outermost one moves anything.
    """
    there = accelerator()
    homes = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(there)
        yield there
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)
