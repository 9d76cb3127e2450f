"""What the one training loop expects of a method: a conditioner and a reweighter. Also the two that do nothing.

Only what every method shares stands here, so that the loop imports no method (`methods.py` builds them by name).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Noise(Protocol):
    """One step's random numbers: drawn for the global batch, sliced to this process's B rows."""

    def normal(self, name: str, shape: Sequence[int]) -> Tensor: ...  # N(0, 1), [B, *shape]

    def uniform(self, name: str, shape: Sequence[int]) -> Tensor: ...  # U(0, 1), [B, *shape]


class DefaultNoise:
    """Noise from torch's default generator for a batch of `n`: what a conditioner uses outside the training loop."""

    def __init__(self, n: int, device: torch.device):
        self.n, self.device = n, device

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        return torch.randn(self.n, *shape, device=self.device)

    def uniform(self, name: str, shape: Sequence[int]) -> Tensor:
        return torch.rand(self.n, *shape, device=self.device)


@dataclass(frozen=True)
class Condition:
    """Output of a conditioner: tokens appended after the text tokens."""

    tokens: Tensor  # [B, n_tokens, d_ctx]


class Conditioner(nn.Module):
    """Base of all conditioners: attributes [B, K] (category indices, schema order) -> `Condition`."""

    def __init__(self, schema_sizes: Sequence[int], d_ctx: int, n_tokens: int):
        super().__init__()
        self.schema_sizes, self.d_ctx, self.n_tokens = tuple(schema_sizes), d_ctx, n_tokens

    def forward(self, attributes: Tensor, noise: Noise | None = None) -> Condition:
        raise NotImplementedError

    def penalties(self, output: Condition, attributes: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses added to the diffusion loss: name -> [B], already weighted; a loss of weight 0 is absent.

        `progress` = step / steps in [0, 1] drives annealing. Uses no parameters: all of those act in `forward`.
        """
        return {}

    def null_tokens(self, n: int) -> Tensor:
        """The unconditional branch of guidance: all-zero tokens [n, n_tokens, d_ctx] in the same places."""
        return torch.zeros(n, self.n_tokens, self.d_ctx)

    def _check(self, attributes: Tensor) -> None:
        if attributes.ndim != 2 or attributes.shape[1] != len(self.schema_sizes):
            raise ValueError(f"attributes must be [B, {len(self.schema_sizes)}], got {list(attributes.shape)}")

    def _noise(self, attributes: Tensor, noise: Noise | None) -> Noise | None:
        """The noise to use: none in evaluation; the loop's in training, or torch's default generator."""
        if not self.training:
            return None
        return noise or DefaultNoise(len(attributes), attributes.device)


class NoConditioner(Conditioner):
    """Text methods: the prompt says everything, so no token is added and nothing is penalised."""

    def __init__(self, d_ctx: int):
        super().__init__((), d_ctx, n_tokens=0)

    def forward(self, attributes: Tensor, noise: Noise | None = None) -> Condition:
        return Condition(torch.zeros(len(attributes), 0, self.d_ctx, device=attributes.device))


class Reweighter(Protocol):
    """Per-sample loss weights, and what is learnt from the losses. The step's loss is mean(w * l)."""

    sigma: Tensor  # [G] float64; the loop broadcasts it from the one process that calls `observe`

    def weights(self, attributes: Tensor, generator: torch.Generator) -> Tensor: ...  # global [B, K] -> [B]

    def observe(self, losses: Tensor, attributes: Tensor, generator: torch.Generator, step: int) -> None: ...

    @property
    def history(self) -> list[dict[str, float]]: ...  # one row per observed step

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class NoReweighter:
    """Every sample counts the same."""

    def __init__(self) -> None:
        self.sigma = torch.zeros(0, dtype=torch.float64)
        self.history: list[dict[str, float]] = []

    def weights(self, attributes: Tensor, generator: torch.Generator) -> Tensor:
        return torch.ones(len(attributes), device=attributes.device)

    def observe(self, losses: Tensor, attributes: Tensor, generator: torch.Generator, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"state of another reweighter: {sorted(state)}")
