"""The left ventricle's cavity found by a small U-Net, the Dice coefficient, and ejection fractions from what was found.

The judge of mask faithfulness (method section 5): trained on real images only, it looks for the cavity in generated
ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import nn
from torch.nn import functional as F

from compdiff.heart import CAVITY


def build(width: int = 16) -> nn.Module:
    """U-Net of three levels, one grey channel in, one logit out; sides of the images must be multiples of 4."""
    return UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(width, 2 * width, 4 * width),
        strides=(2, 2),
        num_res_units=1,
    )


def fit(
    images: np.ndarray,
    masks: np.ndarray,
    steps: int = 300,
    batch: int = 16,
    lr: float = 3e-3,
    width: int = 16,
    seed: int = 0,
) -> Iterator[tuple[int, float, nn.Module]]:
    """Train on grey images and masks, uint8 [N, S, S]; yields (step, loss, network) after every step.

    Loss: cross-entropy + 1 - soft Dice of the batch. Images and masks of a batch are shifted together by up to an
    eighth of the side, and brightness is scaled by 0.8 to 1.2; no flips, the body is not symmetric. ValueError when no
    mask shows a cavity.
    """
    if images.shape != masks.shape or not (masks == CAVITY).any():
        raise ValueError(
            f"images {images.shape} and masks {masks.shape} must be of one shape, and some mask must show a cavity"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = build(width)
    x, y = _input(images), torch.as_tensor(masks == CAVITY)[:, None].float()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    reach = images.shape[-1] // 8
    for step in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        shift = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        gain = 0.8 + 0.4 * torch.rand(batch, 1, 1, 1, generator=generator)
        net.train()
        logits = net(torch.roll(x[rows] * gain, shift, (2, 3)))
        loss = _loss(logits, torch.roll(y[rows], shift, (2, 3)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield step + 1, loss.item(), net


def _input(images: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.asarray(images, dtype=np.float32) / 255)[:, None]


def _loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    found = logits.sigmoid()
    soft_dice = 2 * (found * target).sum() / (found.sum() + target.sum()).clamp(min=1)
    return F.binary_cross_entropy_with_logits(logits, target) + 1 - soft_dice


@torch.no_grad()
def predict(net: nn.Module, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """Cavities in grey images uint8 [N, S, S] -> masks uint8 [N, S, S], 1 where the cavity is more likely than not."""
    net.eval()
    parts = [(net(_input(images[i : i + batch])) > 0)[:, 0] for i in range(0, len(images), batch)]
    return torch.cat(parts).to(torch.uint8).numpy()


def dice(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """2 |A and B| / (|A| + |B|) of the cavities in masks [N, ...], float64 [N]; 1 where both are empty.

    ValueError when the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"masks of different shapes: {found.shape} and {wanted.shape}")
    axes = tuple(range(1, found.ndim))
    a, b = found == CAVITY, wanted == CAVITY
    total = a.sum(axes) + b.sum(axes)
    return np.where(total == 0, 1.0, 2 * (a & b).sum(axes) / np.maximum(total, 1))


def ejection_fractions(ed: np.ndarray, es: np.ndarray) -> np.ndarray:
    """1 - A_ES / A_ED of short-axis masks [N, S, S], float64 [N]. ValueError where an ED cavity is empty: never NaN."""
    before, after = ((m == CAVITY).sum(axis=(1, 2)) for m in (ed, es))
    if (before == 0).any():
        row, n = int((before == 0).argmax()), int((before == 0).sum())
        raise ValueError(f"no ejection fraction: no cavity at ED in row {row} ({n} in all)")
    return 1 - after / before
