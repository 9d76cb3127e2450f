"""Auxiliary supervision: classifiers that read the demographic attributes back from the token (CompDiff, method 3).

Shared by the flat encoder and HCN: the MLP both use, and the losses for unordered and ordered (age) attributes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compdiff.interfaces import Noise

SOFT_SIGMA = 0.75  # bins; width of the Gaussian of the soft age labels
FOCAL_GAMMA = 2.0
CDF_WEIGHT = 0.5  # of the squared distance between cumulative distributions


def dropout(x: Tensor, p: float, noise: Noise | None, name: str) -> Tensor:
    """Inverted dropout of x [B, d] from the step's own noise; `noise` None (evaluation) or p = 0 changes nothing."""
    if noise is None or p == 0:
        return x
    keep = noise.uniform(name, x.shape[1:]).to(x.device) >= p
    return x * keep / (1 - p)


class MLP(nn.Module):
    """LayerNorm - Linear(d_in, d_hidden) - SiLU - Dropout(p) - Linear(d_hidden, d_out): [B, d_in] -> [B, d_out]."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int, p: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_in)
        self.hidden = nn.Linear(d_in, d_hidden)
        self.out = nn.Linear(d_hidden, d_out)
        self.p = p

    def forward(self, x: Tensor, noise: Noise | None, name: str) -> Tensor:
        """`name` identifies the dropout draw within the step."""
        return self.out(dropout(F.silu(self.hidden(self.norm(x))), self.p, noise, name))


# --- losses per sample: logits [B, C], target [B] -> [B] -------------------------------------------------------
def _ce(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def _soft_labels(logits: Tensor, target: Tensor) -> Tensor:
    """Gaussian of SOFT_SIGMA bins around the true bin, normalised: [B, C]."""
    bins = torch.arange(logits.shape[1], device=logits.device)
    return torch.softmax(-0.5 * ((bins - target[:, None]) / SOFT_SIGMA) ** 2, dim=1)


def _soft_ce(logits: Tensor, target: Tensor) -> Tensor:
    return -(_soft_labels(logits, target) * logits.log_softmax(1)).sum(1)


def _ordinal(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy + CDF_WEIGHT x squared distance of predicted and true cumulative distributions."""
    bins = torch.arange(logits.shape[1], device=logits.device)
    true_cdf = (bins >= target[:, None]).to(logits.dtype)
    return _ce(logits, target) + CDF_WEIGHT * ((logits.softmax(1).cumsum(1) - true_cdf) ** 2).sum(1)


def _mse(logits: Tensor, target: Tensor) -> Tensor:
    """Squared error of the expected bin."""
    bins = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
    return (logits.softmax(1) @ bins - target) ** 2


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    """Soft-label cross-entropy, each class damped by (1 - p)^gamma."""
    damping = (1 - logits.softmax(1)) ** FOCAL_GAMMA
    return -(damping * _soft_labels(logits, target) * logits.log_softmax(1)).sum(1)


AGE_LOSSES = {"ce": _ce, "soft_ce": _soft_ce, "ordinal": _ordinal, "mse": _mse, "focal": _focal}


def check_age_loss(age_loss: str, age_index: int | None, k: int) -> None:
    """ValueError for an unknown loss, or an age index outside the schema."""
    if age_loss not in AGE_LOSSES:
        raise ValueError(f"unknown age_loss {age_loss!r}; known: {', '.join(AGE_LOSSES)}")
    if age_index is not None and not 0 <= age_index < k:
        raise ValueError(f"age_index {age_index} is outside the schema's {k} attributes")


def auxiliary_loss(
    logits: Sequence[Tensor],  # K x [B, C_k]
    attributes: Tensor,  # [B, K]
    age_index: int | None,
    age_loss: str,
    attribute_weights: Sequence[float],  # K
) -> Tensor:
    """Weighted mean over the K attributes of each sample's classification loss: [B].

    `age_loss` applies to attribute `age_index` only; without an age (None) all are cross-entropies.
    """
    total = 0.0
    for k, (scores, weight) in enumerate(zip(logits, attribute_weights, strict=True)):
        loss = AGE_LOSSES[age_loss] if k == age_index else _ce
        total = total + weight * loss(scores.float(), attributes[:, k])
    return total / sum(attribute_weights)
