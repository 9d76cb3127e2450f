"""Hierarchical Conditioner Network (CompDiff; method section 3): attributes -> pairs -> one demographic token.

Any schema of K >= 2 attributes. Symbols: B batch, P = K (K - 1) / 2 pairs, d node width, d_ctx width of the UNet's
cross-attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compdiff.auxiliary import MLP, auxiliary_loss, check_age_loss
from compdiff.config import HCNConfig
from compdiff.interfaces import Condition, Conditioner, Noise
from compdiff.reference import read_reference

LOG_SIGMA_MIN, LOG_SIGMA_MAX = -5.0, 1.0


@dataclass(frozen=True)
class HCNOutput(Condition):
    """The token [B, 1, d_ctx] and every level it was made from."""

    nodes: Tensor  # e_k   [B, K, d]  level 1
    pairs: Tensor  # h_ij  [B, P, d]  level 2, (0,1) (0,2) ... (1,2) ...
    h: Tensor  #     [B, d]     level 3; the single pair when K = 2
    z: Tensor  #     [B, d]     what is projected: a sample in training, mu in evaluation
    mu: Tensor | None  #     [B, d]     None without uncertainty
    logsigma: Tensor | None  #     [B, d]
    logits: tuple[Tensor, ...]  # K x [B, C_k], read from the token; empty when aux_weight = 0


class HCN(Conditioner):
    """The hierarchy with its uncertainty heads, projection and auxiliary classifiers."""

    def __init__(
        self,
        schema_sizes: Sequence[int],  # C_k, schema order
        d_ctx: int,
        config: HCNConfig,
        age_index: int | None = None,  # which attribute config.age_loss is for
        attribute_weights: Sequence[float] | None = None,  # of the K auxiliary losses; None = equal
    ):
        super().__init__(schema_sizes, d_ctx, n_tokens=1)
        k, d, p = len(self.schema_sizes), config.d_node, config.dropout
        if k < 2:
            raise ValueError(f"HCN composes at least two attributes, got {k}")
        check_age_loss(config.age_loss, age_index, k)
        self.config, self.age_index = config, age_index
        self.attribute_weights = tuple(attribute_weights or [1.0] * k)
        if len(self.attribute_weights) != k:
            raise ValueError(f"{len(self.attribute_weights)} attribute weights for {k} attributes")

        self.pair_indices = tuple(itertools.combinations(range(k), 2))
        self.embed = nn.ModuleList(nn.Embedding(n, d) for n in self.schema_sizes)
        self.compose_pair = nn.ModuleList(MLP(2 * d, 2 * d, d, p) for _ in self.pair_indices)
        self.compose_all = MLP(len(self.pair_indices) * d, 2 * d, d, p) if k > 2 else None
        self.mu_head = nn.Linear(d, d) if config.uncertainty else None
        self.logsigma_head = nn.Linear(d, d) if config.uncertainty else None
        self.project = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d_ctx))
        read = self.schema_sizes if config.aux_weight > 0 else ()
        self.classify = nn.ModuleList(MLP(d_ctx, config.aux_hidden, n, p) for n in read)
        self._initialise()

    def _initialise(self) -> None:
        for embedding in self.embed:
            nn.init.normal_(embedding.weight, std=0.02)
        if self.config.uncertainty:
            for head, bias in ((self.mu_head, 0.0), (self.logsigma_head, -1.0)):  # exp(-1): low variance at first
                nn.init.normal_(head.weight, std=0.01)
                nn.init.constant_(head.bias, bias)

    @classmethod
    def load_reference(cls, folder: str | Path) -> HCN:
        """HCN with the weights of a checkpoint of the authors' code (config.json + weights), in evaluation mode.

        Attributes are age, sex, race, or sex, race where the checkpoint does not encode age. Errors: `read_reference`.
        """
        reference = read_reference(folder)
        model = cls(reference.schema_sizes, reference.d_ctx, reference.config, reference.age_index)
        model.load_state_dict(reference.rename(model.state_dict()))
        return model.eval()

    def forward(self, attributes: Tensor, noise: Noise | None = None) -> HCNOutput:
        """Category indices [B, K] -> token [B, 1, d_ctx] and levels. `noise` matters in training mode only."""
        self._check(attributes)
        noise = self._noise(attributes, noise)
        e = [embed(attributes[:, k]) for k, embed in enumerate(self.embed)]  # K x [B, d]
        pairs = [
            compose(torch.cat([e[i], e[j]], dim=1), noise, f"hcn.pair.{i}.{j}")
            for (i, j), compose in zip(self.pair_indices, self.compose_pair, strict=True)
        ]  # P x [B, d]
        h = self.compose_all(torch.cat(pairs, dim=1), noise, "hcn.all") if self.compose_all else pairs[0]
        z, mu, logsigma = self._sample(h, noise)
        token = self.project(z)  # [B, d_ctx]
        logits = tuple(head(token, noise, f"hcn.classify.{k}") for k, head in enumerate(self.classify))
        return HCNOutput(token[:, None], torch.stack(e, 1), torch.stack(pairs, 1), h, z, mu, logsigma, logits)

    def _sample(self, h: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """z = mu + exp(logsigma) eps in training, mu in evaluation, h without uncertainty."""
        if not self.config.uncertainty:
            return h, None, None
        mu = self.mu_head(h)
        logsigma = self.logsigma_head(h).clamp(LOG_SIGMA_MIN, LOG_SIGMA_MAX)
        if noise is None:
            return mu, mu, logsigma
        return mu + logsigma.exp() * noise.normal("hcn.z", h.shape[1:]).to(h), mu, logsigma

    def penalties(self, output: HCNOutput, attributes: Tensor, progress: float) -> dict[str, Tensor]:
        """kl, consistency and aux, each [B] and weighted (method section 3, losses)."""
        losses, config = {}, self.config
        if config.uncertainty and config.kl_weight > 0:
            losses["kl"] = self.beta(progress) * kl_divergence(output.mu.float(), output.logsigma.float())
        if config.consistency_weight > 0:
            cosine = F.cosine_similarity(output.h.float(), output.nodes.float().sum(1), dim=1)
            losses["consistency"] = config.consistency_weight * (1 - cosine)
        if config.aux_weight > 0:
            losses["aux"] = config.aux_weight * auxiliary_loss(
                output.logits, attributes, self.age_index, config.age_loss, self.attribute_weights
            )
        return losses

    def beta(self, progress: float) -> float:
        """The KL weight: linear from 0 to config.kl_weight over the first config.kl_ramp of training."""
        ramp = self.config.kl_ramp
        return self.config.kl_weight * (min(1.0, progress / ramp) if ramp > 0 else 1.0)


def kl_divergence(mu: Tensor, logsigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) summed over d: [B, d], [B, d] -> [B]."""
    return 0.5 * (mu**2 + torch.exp(2 * logsigma) - 1 - 2 * logsigma).sum(1)
