"""Heart failure or not from one of the five inputs: MONAI networks in 2D and 3D, by source of the training images.

Method section 5. Every configuration is trained with the same number of steps, so that more images do not mean more
training; a repeat differs in everything that is random (first weights, order, augmentation). Where a test cohort exists,
all repeats train on the first fold, whose patients the generator was trained on; where none does, a repeat trains all
folds and its predictions are pooled out of fold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compdiff import record, sources
from compdiff.cardiac import INPUTS, NotAvailable, Studies, sampling_weights, unstack
from compdiff.cardiac_cohorts import EVERYBODY, Fold, strata
from compdiff.config import Config

SOURCES = ("real", "synthetic", "real + synthetic")
SAMPLINGS = ("as found", "weighted")  # weighted: by clipped inverse frequency of the sensitive groups
BATCH, LR, SHIFT, NOISE = 16, 3e-3, 4, 0.05
DEPTH = 32  # frames or slices that DenseNet-121 needs
DRAWN = ("stacked", "slice", "frame")  # inputs that a set of stacked frames holds
NO_SYNTHETIC = "the generator draws the mid slice at ED and ES, no other frame or slice"
EVEN = "the copied set is even over the sensitive groups already: the same classifier as synthetic, as found"
ENOUGH = 20  # validation patients, below which the threshold stays at 0.5


@dataclass(frozen=True)
class Run:
    """One classifier (or one for each fold)."""

    input: str  # a key of cardiac.INPUTS
    source: str  # one of SOURCES
    sampling: str  # one of SAMPLINGS
    repeat: int

    @property
    def folder(self) -> Path:
        """Below the downstream folder."""
        words = (self.input, self.source, self.sampling, f"repeat {self.repeat}")
        return Path(*(w.replace(" ", "_") for w in words))


def runs(studies: Studies, config: Config) -> tuple[list[Run], dict[str, str]]:
    """What is to be trained, and {"cine" or "cine, synthetic": why that is not available}."""
    c, out, absent = config.heart, [], {}
    even = c.augment_with == "copy"  # weights by sensitive group would all be equal
    for name in INPUTS:
        if name in studies.missing:
            absent[name] = studies.missing[name]
            continue
        for source in SOURCES:
            if source != "real" and name not in DRAWN:
                absent[f"{name}, {source}"] = NO_SYNTHETIC
                continue
            repeats = c.repeats if name == "stacked" else c.other_repeats
            ways = SAMPLINGS[:1] if even and source == "synthetic" else SAMPLINGS
            out += [Run(name, source, sampling, r) for sampling in ways for r in range(repeats)]
    return out, absent | ({"synthetic, weighted": EVEN} if even else {})


# --- network and training ---------------------------------------------------------------------------------------------
def build(dims: int, channels: int, full: bool) -> nn.Module:
    """DenseNet of MONAI for 2D or 3D images, one logit: DenseNet-121 (`full`), or a small one for small pictures."""
    from monai.networks.nets import DenseNet, DenseNet121  # here, because the import takes seconds

    if full:
        return DenseNet121(spatial_dims=dims, in_channels=channels, out_channels=1)
    return DenseNet(dims, channels, 1, init_features=16, growth_rate=8, block_config=(3, 3))


def prepare(images: np.ndarray, full: bool = False) -> Tensor:
    """uint8 [n, S, S], [n, S, S, 3] or [n, T, S, S] -> float [n, c, S, S] or [n, 1, T, S, S]; each image has mean 0 and
    standard deviation 1, so that no source is told by its brightness. `full` in 3D: at least DEPTH frames or slices,
    interpolated, because DenseNet-121 halves every axis five times."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float()
    x = x.movedim(-1, 1) if x.ndim == 4 and x.shape[-1] == 3 else x[:, None]
    if full and x.ndim == 5 and x.shape[2] < DEPTH:
        x = F.interpolate(x, (DEPTH, *x.shape[3:]), mode="trilinear", align_corners=False)
    axes = tuple(range(1, x.ndim))
    return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True).clamp(min=1e-3)


def fit(images: np.ndarray, y: np.ndarray, weights: np.ndarray, steps: int, seed: int, full: bool = False) -> nn.Module:
    """Train on images as in `prepare`, labels 0/1 [n] and row weights [n]; fixed number of steps, nothing is selected.

    Rows are drawn in proportion to `weights`; the loss counts both labels alike, whatever their share among the drawn
    rows, so that 0.5 is the threshold. ValueError when a label is absent.
    """
    if set(np.unique(y)) != {0, 1}:
        raise ValueError(f"training needs both labels, got {sorted(set(np.unique(y).tolist()))}")
    x, goal = prepare(images, full), torch.from_numpy(np.asarray(y, dtype=np.float32))
    share = torch.from_numpy(weights / weights.sum())
    positive = float(share[goal == 1].sum())
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = build(x.ndim - 2, x.shape[1], full)
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps + 1)
        net.train()
        for _ in range(steps):
            rows = torch.multinomial(share, BATCH, replacement=True, generator=generator)
            move = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
            batch = torch.roll(x[rows], move, (-2, -1))
            batch = batch + NOISE * torch.randn(batch.shape, generator=generator)
            balance = torch.where(goal[rows] == 1, 0.5 / positive, 0.5 / (1 - positive))
            loss = F.binary_cross_entropy_with_logits(net(batch)[:, 0], goal[rows], weight=balance)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def predict(net: nn.Module, images: np.ndarray, full: bool = False, batch: int = 64) -> np.ndarray:
    """P(heart failure) of images as in `prepare`, float64 [n]."""
    parts = [net(prepare(images[i : i + batch], full))[:, 0].sigmoid() for i in range(0, len(images), batch)]
    return torch.cat(parts).double().numpy() if parts else np.zeros(0)


# --- one run ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Synthetic:
    """A generator's images for one fold: rows with attributes and labels, stacked uint8 [n, S, S, 3]."""

    table: pd.DataFrame
    images: np.ndarray

    def input(self, name: str) -> np.ndarray:
        """The images as that input. NotAvailable for one that stacked frames do not hold."""
        if name not in DRAWN:
            raise NotAvailable("synthetic images", [f"input {name}: not available: {NO_SYNTHETIC}"])
        if name == "stacked":
            return self.images
        return unstack(self.images)[0 if name == "slice" else 1]


def at_prevalence(y: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Positions of the largest part of 0/1 labels [n] with this share of ones; everybody for 0. The same seed, the same
    part. ValueError unless 0 <= share < 1."""
    if not 0 <= share < 1:
        raise ValueError(f"a prevalence must be at least 0 (as found) and below 1, got {share}")
    ones, zeros = (np.random.default_rng(seed).permutation(np.flatnonzero(y == value)) for value in (1, 0))
    if share and len(ones) > share * len(y):
        ones = ones[: round(share / (1 - share) * len(zeros))]
    elif share:
        zeros = zeros[: round((1 - share) / share * len(ones))]
    return np.sort(np.r_[ones, zeros])


def training_images(
    studies: Studies, real: np.ndarray, fold: Fold, synthetic: Mapping[str, Synthetic], run: Run, prevalence: float = 0
) -> tuple[np.ndarray, pd.DataFrame]:
    """Images and rows that a run trains on in a fold; `real`: the input of all patients, in the table's order.

    ValueError for synthetic images made from the mask of a patient who validates or tests.
    """
    label = f"y_{studies.labels[0]}"
    columns, images, tables = [*studies.schema.names, label], [], []
    if run.source != "synthetic":
        rows = fold.train[at_prevalence(studies.table[label].to_numpy()[fold.train], prevalence, seed=0)]
        images.append(real[rows])
        tables.append(studies.table.iloc[rows][columns])
    if run.source != "real":
        made = synthetic[fold.generator]
        held = set(made.table["donor"]) & {*fold.val, *fold.test}
        if held:
            raise ValueError(f"{len(held)} patients who validate or test lent their masks to the synthetic images")
        images.append(made.input(run.input))
        tables.append(made.table[columns])
    return np.concatenate(images), pd.concat(tables, ignore_index=True)


def digest(images: np.ndarray, table: pd.DataFrame) -> str:
    """Hash of pictures and of what is known about them."""
    return hashlib.sha256(np.ascontiguousarray(images).tobytes() + table.to_csv().encode()).hexdigest()


def taken(found: Sequence[Fold]) -> list[Fold]:
    """The folds that a run trains on: all, or where a test cohort exists the first one, because the one generator has
    learnt from patients who validate in the others."""
    return list(found[:1] if found[0].generator == EVERYBODY else found)


def carry_out(run: Run, studies: Studies, found: Sequence[Fold], synthetic: Mapping[str, Synthetic], images: np.ndarray,
              folder: Path, config: Config, seed: int) -> pd.DataFrame:  # fmt: skip
    """Train and predict, or read what is there for the same inputs; columns fold, part (val, test), row, y, p.

    images: the input of all patients, in the table's order.
    """
    label, full = studies.labels[0], config.data.size >= 256
    mine = taken(found)
    used = {"data": digest(images, studies.table)}
    if run.source != "real":
        used |= {f"synthetic {g}": digest(s.images, s.table) for g, s in synthetic.items()}
    steps, clip, by = config.heart.classifier_steps, config.heart.classifier_clip, list(config.heart.sensitive)
    share = config.heart.train_prevalence
    code = sources.closure({__name__}, Path(__file__).parent)
    inputs = asdict(run) | used | {"steps": steps, "clip": clip, "by": by, "share": share, "seed": seed, "code": code}
    inputs |= {"folds": record.sha256_json([[f.train.tolist(), f.val.tolist(), f.test.tolist()] for f in mine])}
    target = folder / run.folder
    if record.is_current(target, inputs):
        return pd.read_csv(target / "predictions.csv")
    with record.run_json(target, inputs, seeds=[seed]) as made:
        rows = []
        for fold in mine:
            x, table = training_images(studies, images, fold, synthetic, run, share)
            groups = strata(table, by)
            weights = sampling_weights(groups, clip) if run.sampling == "weighted" else np.ones(len(table))
            own_seed = 1000 * seed + 100 * run.repeat + fold.number
            net = fit(x, table[f"y_{label}"].to_numpy(), weights, steps, own_seed, full)
            for part in ("val", "test"):
                who = getattr(fold, part)
                truth = studies.table[f"y_{label}"].to_numpy()[who]
                rows.append(pd.DataFrame({"fold": fold.number, "part": part, "row": who, "y": truth,
                                          "p": predict(net, images[who], full)}))  # fmt: skip
        out = pd.concat(rows, ignore_index=True)
        record.write_text(target / "predictions.csv", out.to_csv(index=False, float_format="%.8g"))
        made.outputs = [target / "predictions.csv"]
    return pd.read_csv(target / "predictions.csv")


def pooled(repeats: Sequence[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Test predictions of repeats -> row numbers [n], labels [n] and probabilities [R, n], patients in one order.

    ValueError when repeats were tested on different patients, or one of them on a patient twice.
    """
    parts = [r[r["part"] == "test"].sort_values("row") for r in repeats]
    rows = parts[0]["row"].to_numpy()
    if any(not np.array_equal(p["row"], rows) for p in parts) or len(set(rows)) < len(rows):
        raise ValueError("repeats must be tested on the same patients, each once")
    return rows, parts[0]["y"].to_numpy(), np.stack([p["p"].to_numpy() for p in parts])


def threshold(val: pd.DataFrame) -> float:
    """Where the balanced accuracy of validation rows (y, p) is largest: the middle one of the best places between two
    probabilities. 0.5 for fewer than ENOUGH patients, one label, or one probability for all. Balanced accuracy has
    no prevalence, so the paper's share of 0.1 in validation (method section 5) would change nothing but n."""
    y, p = val["y"].to_numpy(), val["p"].to_numpy()
    levels = np.unique(p)
    if len(val) < ENOUGH or len(np.unique(y)) < 2 or len(levels) < 2:
        return 0.5
    between = (levels[1:] + levels[:-1]) / 2
    called = p >= between[:, None]  # [places, n]
    gain = called[:, y == 1].mean(axis=1) - called[:, y == 0].mean(axis=1)
    best = np.flatnonzero(gain == gain.max())
    return float(between[best[len(best) // 2]])


def cuts(repeats: Sequence[pd.DataFrame]) -> np.ndarray:
    """Threshold of every test patient's network, from that network's validation patients, [R, n] as in `pooled`."""
    out = []
    for made in repeats:
        of = {fold: threshold(part) for fold, part in made[made["part"] == "val"].groupby("fold")}
        out.append(made[made["part"] == "test"].sort_values("row")["fold"].map(of).to_numpy(float))
    return np.stack(out)
