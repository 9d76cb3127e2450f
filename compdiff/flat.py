"""Flat demographic encoder (method section 2, item 2): attribute embeddings -> token(s), without a hierarchy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compdiff.auxiliary import MLP, auxiliary_loss, check_age_loss
from compdiff.config import HCNConfig
from compdiff.interfaces import Condition, Conditioner, Noise


@dataclass(frozen=True)
class FlatOutput(Condition):
    """Tokens [B, 1 or K, d_ctx] and the auxiliary logits."""

    logits: tuple[Tensor, ...]  # K x [B, C_k]; empty when aux_weight = 0


class FlatEncoder(Conditioner):
    """`single`: concatenated embeddings -> one token. `separate`: one Linear per attribute -> K tokens.

    Auxiliary classifiers read the token (`separate`: classifier k reads token k): `deep` as HCN's, or `shallow`, one
    Linear. Of `config` the HCN-only losses are unused. So HCN differs from this in more than the hierarchy: a sampled z
    and its KL loss, the consistency loss, LayerNorms, activation and initialisation. `hcn_no_uncertainty` and
    `hcn_no_consistency` (config.METHODS) take single ones of these away.
    """

    def __init__(
        self,
        schema_sizes: Sequence[int],  # C_k, schema order
        d_ctx: int,
        config: HCNConfig,
        age_index: int | None = None,  # which attribute config.age_loss is for
        mode: str = "single",
        classifier: str = "deep",
    ):
        k, d = len(schema_sizes), config.d_node
        if mode not in ("single", "separate"):
            raise ValueError(f"unknown mode {mode!r}; known: single, separate")
        if classifier not in ("deep", "shallow"):
            raise ValueError(f"unknown classifier {classifier!r}; known: deep, shallow")
        super().__init__(schema_sizes, d_ctx, n_tokens=1 if mode == "single" else k)
        check_age_loss(config.age_loss, age_index, k)
        self.config, self.age_index, self.mode, self.classifier = config, age_index, mode, classifier

        self.embed = nn.ModuleList(nn.Embedding(n, d) for n in self.schema_sizes)
        if mode == "single":
            fuse = nn.Sequential(nn.Linear(k * d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, d_ctx))
            self.project = nn.ModuleList([fuse])
        else:
            self.project = nn.ModuleList(nn.Linear(d, d_ctx) for _ in range(k))
        read = self.schema_sizes if config.aux_weight > 0 else ()
        if classifier == "deep":
            self.classify = nn.ModuleList(MLP(d_ctx, config.aux_hidden, n, config.dropout) for n in read)
        else:
            self.classify = nn.ModuleList(nn.Linear(d_ctx, n) for n in read)
        self.apply(_initialise)

    def forward(self, attributes: Tensor, noise: Noise | None = None) -> FlatOutput:
        """Category indices [B, K] -> tokens [B, n_tokens, d_ctx]. `noise` (dropout) matters in training mode only."""
        self._check(attributes)
        noise = self._noise(attributes, noise)
        e = [embed(attributes[:, k]) for k, embed in enumerate(self.embed)]  # K x [B, d]
        inputs = [torch.cat(e, dim=1)] if self.mode == "single" else e
        tokens = [project(x) for project, x in zip(self.project, inputs, strict=True)]  # n_tokens x [B, d_ctx]
        logits = tuple(self._read(k, tokens[k % self.n_tokens], noise) for k in range(len(self.classify)))
        return FlatOutput(torch.stack(tokens, 1), logits)

    def _read(self, k: int, token: Tensor, noise: Noise | None) -> Tensor:
        if self.classifier == "deep":
            return self.classify[k](token, noise, f"flat.classify.{k}")
        return self.classify[k](token)

    def penalties(self, output: FlatOutput, attributes: Tensor, progress: float) -> dict[str, Tensor]:
        """aux [B]: the mean of the K classification losses, weighted."""
        if self.config.aux_weight == 0:
            return {}
        equal = [1.0] * len(self.schema_sizes)
        loss = auxiliary_loss(output.logits, attributes, self.age_index, self.config.age_loss, equal)
        return {"aux": self.config.aux_weight * loss}


def _initialise(module: nn.Module) -> None:
    """All embeddings and Linears N(0, 0.02), biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
