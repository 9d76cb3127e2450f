"""Classifiers of images: judges of generated images (06) and downstream models (07), from ONE training function.

A network has one head per target: `category` (cross-entropy), `binary` (a set of 0/1 labels) or `number` (squared
error in standard deviations). The scaling of the input and of numbers is estimated on the training images only and
kept with the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compdiff import networks
from compdiff.attributes import Schema
from compdiff.devices import on_accelerator
from compdiff.record import atomic, write_json


@dataclass(frozen=True)
class Head:
    """What one head predicts: kind = category | binary | number; names of its classes or labels; scale of a number."""

    kind: str
    names: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def width(self) -> int:
        return 1 if self.kind == "number" else len(self.names)


@dataclass(frozen=True)
class Training:
    """A recipe. Brightness and noise are standard deviations, in units of the training images'; shift, rotate:
    maxima."""

    network: str = "small"  # a key of networks.BUILDERS
    size: int = 64  # pixels; larger images are reduced to it
    centre: float = 1.0  # share of the image's side that is used, in its middle
    epochs: int = 24
    batch: int = 32
    epoch_steps: int = 0  # optimiser steps of an epoch; 0 = one pass through the training images
    lr: float = 1e-2
    weight_decay: float = 0.01
    patience: int = 20  # epochs without a better validation loss
    balanced: bool = False  # rare classes count as much as common ones, see `log_priors`
    shift: float = 0.06  # of the image's width
    rotate: float = 0.0  # degrees
    flip: bool = False  # only where no label knows left from right
    brightness: float = 0.05
    noise: float = 0.1
    layer_decay: float = 1.0  # ViTs: learning rate of a layer over that of the next
    drop_path: float = 0.0  # ViTs


RECIPES: dict[str, Training] = {
    "judge": Training(balanced=True),
    "downstream": Training(),
    # Method section 6: DenseNet-121, flip and 15 degrees, lr 1e-4, batch 32, at most 100 epochs, patience 20. Of the
    # 224 px centre crop it does not say of how many pixels: 256, as for the ImageNet weights of the start. Real and
    # generated images are padded squares alike, and both lose the same margin.
    "downstream_paper": Training(
        "densenet121", size=224, centre=224 / 256, epochs=100, lr=1e-4, shift=0, rotate=15, flip=True, brightness=0,
        noise=0,
    ),
    # FairDiffusion's own classifiers (method section 7). ViT-B's rate is a base rate: lr = 5e-4 x batch / 256.
    "vit": Training("small_vit", lr=2e-3, layer_decay=0.75, drop_path=0.1),
    "vit_paper": Training(
        "vit_b", size=224, epochs=50, batch=64, lr=5e-4 * 64 / 256, patience=50, shift=0, flip=True, brightness=0,
        noise=0, layer_decay=0.55, drop_path=0.1,
    ),
    "efficientnet": Training(),
    "efficientnet_paper": Training(
        "efficientnet_lite0", size=200, epochs=10, batch=16, lr=1e-3, patience=10, shift=0, flip=True, brightness=0,
        noise=0,
    ),
}  # fmt: skip


LINKS: dict[str, Callable[[Tensor, Head], Tensor]] = {  # logits [n, width] -> prediction
    "category": lambda z, head: z.softmax(1),
    "binary": lambda z, head: z.sigmoid(),
    "number": lambda z, head: z[:, 0] * head.std + head.mean,
}


Targets = Mapping[str, np.ndarray]  # per head: category indices [n], 0/1 float32 [n, labels] or numbers float32 [n]


# --- targets ----------------------------------------------------------------------------------------------------------
def make_heads(
    table: pd.DataFrame, schema: Schema | None, labels: Sequence[str] = (), numbers: Sequence[str] = ()
) -> dict[str, Head]:
    """Heads for a training table: one per attribute, one for all 0/1 columns `y_<label>`, one per label with other
    values.

    `numbers` are columns to regress (age_years), scaled by the mean and standard deviation of this table.
    """
    heads = {a.name: Head("category", a.categories) for a in schema.attributes} if schema else {}
    binary = tuple(name for name in labels if set(table[f"y_{name}"]) <= {0, 1})
    if binary:
        heads["labels"] = Head("binary", binary)
    heads |= {
        name: Head("category", tuple(sorted(map(str, set(table[f"y_{name}"])))))
        for name in labels
        if name not in binary
    }
    heads |= {c: Head("number", (c,), float(table[c].mean()), max(float(table[c].std(ddof=0)), 1e-6)) for c in numbers}
    return heads


def encode(table: pd.DataFrame, heads: Mapping[str, Head]) -> dict[str, np.ndarray]:
    """Targets of a table: category indices [n], 0/1 float32 [n, labels], numbers float32 [n]. Unknown or missing
    values raise."""
    out = {}
    for name, head in heads.items():
        if head.kind == "category":
            column = table[name if name in table else f"y_{name}"].astype(str)
            unknown = set(column) - set(head.names)
            if unknown:
                raise ValueError(f"{name}: unknown categories {sorted(unknown)}; expected {list(head.names)}")
            out[name] = column.map(head.names.index).to_numpy(np.int64)
        else:
            columns = [f"y_{label}" for label in head.names] if head.kind == "binary" else list(head.names)
            values = table[columns].to_numpy(np.float32)
            if not np.isfinite(values).all() or (head.kind == "binary" and not np.isin(values, (0, 1)).all()):
                raise ValueError(f"{name}: missing or wrong values in {columns}")
            out[name] = values if head.kind == "binary" else values[:, 0]
    return out


# --- model ------------------------------------------------------------------------------------------------------------
@dataclass
class Model:
    """A trained network with all it needs to read images. `history`: one row per epoch."""

    network: nn.Module
    heads: dict[str, Head]
    training: Training
    mean: float
    std: float
    history: list[dict] = field(default_factory=list)

    def inputs(self, images: np.ndarray) -> Tensor:
        """uint8 [n, S, S] -> normalised float [n, 1, s, s] of the centre, c = S * training.centre pixels; s = min(c,
        training.size)."""
        side = round(images.shape[-1] * self.training.centre)
        edge = (images.shape[-1] - side) // 2
        x = torch.tensor(images[:, None, edge : edge + side, edge : edge + side]).float()
        if x.shape[-1] > self.training.size:
            x = F.interpolate(x, (self.training.size,) * 2, mode="bilinear", antialias=True, align_corners=False)
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def split(self, logits: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.heads, logits.split([h.width for h in self.heads.values()], dim=1), strict=True))

    def predict(self, images: np.ndarray, batch: int = 128) -> dict[str, np.ndarray]:
        """uint8 [n, S, S] -> per head: class probabilities [n, classes], label probabilities [n, labels] or numbers
        [n]."""
        self.network.eval()
        with torch.inference_mode(), on_accelerator(self.network) as device:
            parts = [
                self.network(self.inputs(images[i : i + batch]).to(device)).cpu() for i in range(0, len(images), batch)
            ]
        width = sum(h.width for h in self.heads.values())
        logits = self.split(torch.cat(parts) if parts else torch.zeros(0, width))
        return {name: LINKS[head.kind](logits[name], head).numpy() for name, head in self.heads.items()}

    def save(self, folder: Path) -> None:
        """weights.safetensors and model.json, each written atomically."""
        with atomic(Path(folder) / "weights.safetensors") as temporary:
            save_file({k: v.contiguous() for k, v in self.network.state_dict().items()}, temporary)
        heads = {k: asdict(h) for k, h in self.heads.items()}
        order = list(self.heads)  # JSON keys are sorted on writing; the heads' order is the order of the logits
        content = {"heads": heads, "order": order, "training": asdict(self.training), "history": self.history}
        write_json(Path(folder) / "model.json", content | {"mean": self.mean, "std": self.std})


def build(training: Training, heads: Mapping[str, Head]) -> nn.Module:
    """The recipe's network, random weights, with the outputs that the heads need."""
    width = sum(h.width for h in heads.values())
    return networks.build(training.network, width, training.size, training.drop_path)


def load(folder: Path) -> Model:
    """A model saved by `Model.save`."""
    content = json.loads((Path(folder) / "model.json").read_text())
    heads = {k: Head(**{**content["heads"][k], "names": tuple(content["heads"][k]["names"])}) for k in content["order"]}
    training = Training(**content["training"])
    network = build(training, heads)
    network.load_state_dict(load_file(Path(folder) / "weights.safetensors"))
    network = network.eval().to(memory_format=torch.channels_last)  # as in `fit`, so that predictions are bit-identical
    return Model(network, heads, training, content["mean"], content["std"], content["history"])


# --- training ---------------------------------------------------------------------------------------------------------
def augment(x: Tensor, training: Training) -> Tensor:
    """Random whole-pixel shift, rotation, flip, gain, offset and noise, one draw per image; [B, 1, s, s] -> the
    same."""
    b, s = len(x), x.shape[-1]
    angle = (torch.rand(b) * 2 - 1) * math.radians(training.rotate)
    sign = torch.where(torch.rand(b) < 0.5, -1.0, 1.0) if training.flip else torch.ones(b)
    move = ((torch.rand(b, 2) * 2 - 1) * training.shift * s).round() * 2 / s
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [torch.stack([cos * sign, -sin, move[:, 0]], 1), torch.stack([sin * sign, cos, move[:, 1]], 1)], 1
    )
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )
    gain, offset = (training.brightness * torch.randn(b, 1, 1, 1) for _ in range(2))
    return x * (1 + gain) + offset + training.noise * torch.randn(x.shape)


def batches(n: int, batch: int) -> Iterator[Tensor]:
    """Rows of batch after batch, for ever: pass after pass through n images, each in a new random order and without
    replacement; what does not fill a last batch waits for another pass. A pass does not end where an epoch does."""
    while True:
        yield from torch.randperm(n)[: n // batch * batch].split(batch)


def log_priors(targets: Targets, heads: Mapping[str, Head], balanced: bool) -> dict[str, Tensor]:
    """What the loss adds to the logits (Menon et al. 2021): log class shares, log odds of labels, nothing for numbers.

    Every share is kept above half an image, so that a class without training images stays finite.
    """
    out = {}
    for name, head in heads.items():
        shares = np.zeros(head.width)
        if balanced and head.kind == "category":
            shares = np.log((np.bincount(targets[name], minlength=head.width) + 0.5) / len(targets[name]))
        elif balanced and head.kind == "binary":
            positive = targets[name].sum(0)
            shares = np.log((positive + 0.5) / (len(targets[name]) - positive + 0.5))
        out[name] = torch.tensor(shares, dtype=torch.float32)
    return out


def loss_of(
    logits: Mapping[str, Tensor], targets: Mapping[str, Tensor], heads: Mapping[str, Head], priors: Mapping[str, Tensor]
) -> Tensor:
    """Sum over heads of the mean loss per image (labels of a binary head are summed)."""
    total = torch.zeros(())
    for name, head in heads.items():
        z, t = logits[name] + priors[name].to(logits[name].device), targets[name]
        if head.kind == "category":
            total = total + F.cross_entropy(z, t)
        elif head.kind == "binary":
            total = total + F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1).mean()
        else:
            total = total + F.mse_loss(z[:, 0], (t - head.mean) / head.std)
    return total


def fit(images: np.ndarray, targets: Targets, val_images: np.ndarray, val_targets: Targets, heads: Mapping[str, Head],
        training: Training, seed: int, init: Model | None = None,
        weights: Mapping[str, Tensor] | None = None) -> Model:  # fmt: skip
    """Train on uint8 images [n, S, S]; the weights kept are those of the epoch with the lowest validation loss.

    The same seed gives the same model. Warm-up over a fifth of the steps, then cosine to zero; AdamW; stops early
    after `training.patience` epochs without progress. `init` starts from another model's weights (pre-training),
    `weights` from a part of them (`networks.imagenet_start`). ValueError when there is nothing to learn or heads
    disagree.
    """
    heads = dict(heads)
    if len(images) < 2 or not len(val_images) or not heads:
        raise ValueError(
            f"training needs images and heads, got {len(images)}, {len(val_images)} for validation, {list(heads)}"
        )
    if init is not None and list(init.heads) != list(heads):
        raise ValueError(f"the model to start from has heads {list(init.heads)}, not {list(heads)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(training, heads)
        network.load_state_dict(network.state_dict() | dict(weights or {}))
        if init is not None:
            network.load_state_dict(init.network.state_dict())
        network = network.to(memory_format=torch.channels_last)
        model = Model(network, heads, training, mean=float(images.mean()), std=max(float(images.std()), 1.0))
        with on_accelerator(network) as device:
            return _train(model, images, targets, val_images, val_targets, device)


def _train(
    model: Model, images: np.ndarray, targets: Mapping, val_images: np.ndarray, val_targets: Mapping,
    device: torch.device,
) -> Model:
    """The loop of `fit`; random numbers come from torch's default generator."""
    training, network = model.training, model.network
    goal, val_goal = ({k: torch.tensor(t[k], device=device) for k in model.heads} for t in (targets, val_targets))
    priors = log_priors(targets, model.heads, training.balanced)
    batch = min(training.batch, len(images))
    per_epoch = training.epoch_steps or len(images) // batch
    stream = batches(len(images), batch)
    steps = training.epochs * per_epoch
    warm = max(1, steps // 5)
    groups = networks.parameter_groups(network, training.lr, training.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay)
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / max(1, steps - warm))),
    )
    best, best_epoch, kept = math.inf, 0, {}
    for epoch in range(training.epochs):
        network.train()
        losses = []
        for rows in islice(stream, per_epoch):
            x = augment(model.inputs(images[rows.numpy()]), training).to(device)
            loss = loss_of(model.split(network(x)), {k: t[rows] for k, t in goal.items()}, model.heads, priors)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pace.step()
            losses.append(loss.item())
        network.eval()
        with torch.no_grad():
            logits = torch.cat(
                [network(model.inputs(val_images[i : i + 128]).to(device)) for i in range(0, len(val_images), 128)]
            )
            val_loss = loss_of(model.split(logits), val_goal, model.heads, priors).item()
        model.history.append({"epoch": epoch, "loss": float(np.mean(losses)), "val_loss": val_loss})
        if val_loss < best or not kept:
            best, best_epoch, kept = val_loss, epoch, {k: v.clone() for k, v in network.state_dict().items()}
        if epoch - best_epoch >= training.patience:
            break
    network.load_state_dict(kept)
    return model
