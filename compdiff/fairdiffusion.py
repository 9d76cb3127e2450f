"""Fair Bayesian perturbation (FairDiffusion; method section 4): adaptive weights of the samples' losses.

Every category of every attribute has a sigma in [0, 1], the strength with which the weights of its samples are
perturbed. Bayesian optimisation looks for the sigmas that make the groups' losses most equal. Symbols: B global batch,
K attributes, C_k categories, G = sum C_k sigmas, in schema order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from botorch.acquisition import UpperConfidenceBound
from botorch.exceptions.errors import CandidateGenerationError, ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.errors import NotPSDError
from safetensors import safe_open
from torch import Tensor

from compdiff.attributes import Schema
from compdiff.config import FairConfig

WEIGHT_MIN = 0.1  # of the normalised weighting, before normalisation
NO_UPDATE, FITTED, FAILED = 0, 1, 2  # history column "update": did this step end a window, and did the fit succeed
GP_ERRORS = (ModelFittingError, CandidateGenerationError, NotPSDError)


class FairReweighter:
    """Weights from sigma, and sigma from the groups' losses.

    `weights` runs on every process, `observe` on one, which alone holds records and history; the training loop
    broadcasts `sigma` from it. The step's loss is mean(w * l) over the global batch for both weightings.
    """

    def __init__(self, schema_sizes: Sequence[int], config: FairConfig, columns: Sequence[int] | None = None):
        """`columns`: the attributes that form groups, by their place in the schema; None = all."""
        if config.weighting not in ("normalised", "original"):
            raise ValueError(f"unknown weighting {config.weighting!r}; known: normalised, original")
        if config.time_window < 1:
            raise ValueError(f"time_window must be at least one step, got {config.time_window}")
        self.columns = list(range(len(schema_sizes)) if columns is None else columns)
        self.schema_sizes, self.config = tuple(schema_sizes[k] for k in self.columns), config
        self.sigma = torch.ones(sum(self.schema_sizes), dtype=torch.float64)  # [G]
        self.updates = 0  # Bayesian updates tried so far
        self._window: list[Tensor] = []  # this window's records [1 + G]: -gap, sigma
        self._history: list[Tensor] = []  # all steps' records [3 + G]: step, gap, update, sigma

    def weights(self, attributes: Tensor, generator: torch.Generator) -> Tensor:
        """w_i = 1 + sum_k sigma[k, a_ik] eps_ik for the global batch [B, K] -> [B] float32.

        original: as they are. normalised (CompDiff's port): clamped at >= 0.1 and scaled to sum B.
        """
        groups = self._groups(attributes.cpu())
        w = 1 + (self.sigma.cpu()[groups] * torch.randn(groups.shape, generator=generator)).sum(1)
        if self.config.weighting == "normalised":
            w = w.clamp(min=WEIGHT_MIN)
            w = w * len(w) / w.sum()
        return w.float().to(attributes.device)

    def observe(self, losses: Tensor, attributes: Tensor, generator: torch.Generator, step: int) -> None:
        """Record the gap of unweighted losses [B] (global batch), end a full window by an update, perturb sigma.

        ValueError for losses that are not finite: no gap can be computed from them.
        """
        gap = loss_gap(losses, attributes[:, self.columns], self.schema_sizes)
        sigma, update = self.sigma.cpu(), NO_UPDATE
        used = sigma
        self._window.append(torch.cat([torch.tensor([-gap], dtype=torch.float64), sigma]))
        if len(self._window) >= self.config.time_window + (self.updates == 0):  # the first holds one record more
            sigma, update = self._update(sigma)
        u = torch.rand(len(sigma), generator=generator, dtype=torch.float64)
        rate = self.config.exploitation
        self.sigma = (rate * sigma + (1 - rate) * u).clamp(0, 1).to(self.sigma.device)
        self._history.append(torch.cat([torch.tensor([step, gap, update], dtype=torch.float64), used]))

    def _update(self, sigma: Tensor) -> tuple[Tensor, int]:
        """The window's best next sigma, or the present one where no Gaussian process could be fitted; a new window."""
        window, update = torch.stack(self._window), FITTED
        try:
            sigma = propose(window[:, 1:], window[:, 0], self.config, seed=self.updates)
        except GP_ERRORS:
            update = FAILED
        self._window = []
        self.updates += 1
        return sigma, update

    def _groups(self, attributes: Tensor) -> Tensor:
        """Category indices [B, K] -> positions in sigma, of the attributes that form groups."""
        sizes = torch.tensor(self.schema_sizes)
        return attributes[:, self.columns] + (sizes.cumsum(0) - sizes)

    @property
    def history(self) -> list[dict[str, float]]:
        """One row per observed step: step, gap, update (0 none, 1 fitted, 2 failed) and the sigmas that were in use.

        sigma_<k>_<c> belongs to category c of attribute k of those that form groups.
        """
        groups = [f"sigma_{k}_{c}" for k, n in enumerate(self.schema_sizes) for c in range(n)]
        columns = ["step", "gap", "update", *groups]
        return [dict(zip(columns, row.tolist(), strict=True)) for row in self._history]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as float64 tensors: sigma [G], window [n, 1 + G], history [steps, 3 + G];
        and updates, int64 [1]."""
        return {
            "sigma": self.sigma.cpu().clone(),
            "window": _stack(self._window, 1 + len(self.sigma)),
            "history": _stack(self._history, 3 + len(self.sigma)),
            "updates": torch.tensor([self.updates]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`. ValueError if it is of another schema."""
        if state["sigma"].shape != self.sigma.shape:
            raise ValueError(f"state has {len(state['sigma'])} sigmas, this schema has {len(self.sigma)}")
        self.sigma = state["sigma"].clone().to(self.sigma.device)
        self._window, self._history = list(state["window"].clone()), list(state["history"].clone())
        self.updates = int(state["updates"])


def _stack(rows: list[Tensor], width: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)


def loss_gap(losses: Tensor, attributes: Tensor, schema_sizes: Sequence[int]) -> float:
    """sum over attributes of (max - min) of the groups' mean losses; losses [B], attributes [B, K], global batch.

    Only groups that are present count; an attribute with one group present adds 0. ValueError if a loss is not finite.
    """
    losses, attributes = losses.detach().cpu().double(), attributes.cpu()
    if not torch.isfinite(losses).all():
        raise ValueError(f"losses are not finite: {losses.tolist()}")
    gap = 0.0
    for k, n in enumerate(schema_sizes):
        counts = torch.bincount(attributes[:, k], minlength=n)
        sums = torch.bincount(attributes[:, k], weights=losses, minlength=n)
        means = sums[counts > 0] / counts[counts > 0]
        gap += float(means.max() - means.min())
    return gap


def propose(sigma: Tensor, reward: Tensor, config: FairConfig, seed: int) -> Tensor:
    """Records sigma [n, G], reward = -gap [n] -> the sigma [G] of the highest upper confidence bound in [0, 1]^G.

    Deterministic in its arguments; the global random state is left as it was. Errors: GP_ERRORS.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)  # the CPU's only: torch.manual_seed would touch an accelerator's too
        model = SingleTaskGP(sigma, reward[:, None])
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        bounds = torch.stack([torch.zeros_like(sigma[0]), torch.ones_like(sigma[0])])
        best, _ = optimize_acqf(
            UpperConfidenceBound(model, beta=config.ucb_beta),
            bounds=bounds,
            q=1,
            num_restarts=config.restarts,
            raw_samples=config.raw_samples,
        )
    return best[0].detach().clamp(0, 1)


def columns_of(schema: Schema, config: FairConfig) -> list[int]:
    """Places of the attributes that form groups (`FairConfig.groups`). ValueError where the schema has none of them."""
    found = [k for k, name in enumerate(schema.names) if not config.groups or name in config.groups]
    if not found:
        raise ValueError(f"groups {', '.join(config.groups)}: none is an attribute here; known: {', '.join(schema.names)}")
    return found


def read_history(folder: Path, schema: Schema, config: FairConfig) -> pd.DataFrame:
    """The stored history of a training folder, one row per step: step, gap, update and one sigma per category.

    Sigma columns are named <attribute>=<category>. ValueError where the run had no reweighting or other groups.
    """
    path = Path(folder) / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        if "reweighter.history" not in file.keys():
            raise ValueError(f"{path} holds no sigma history: it was trained without FairDiffusion's weights")
        rows = file.get_tensor("reweighter.history")  # [steps, 3 + G]
    attributes = [schema.attributes[k] for k in columns_of(schema, config)]
    groups = [f"{a.name}={category}" for a in attributes for category in a.categories]
    if rows.shape[1] != 3 + len(groups):
        raise ValueError(f"{path} has {rows.shape[1] - 3} sigmas, these groups are {len(groups)}")
    history = pd.DataFrame(rows.numpy(), columns=["step", "gap", "update", *groups])
    return history.astype({"step": int, "update": int})
