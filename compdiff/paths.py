"""Where things are. Every path of the project starts here, so notebooks run from any folder."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
MANIFESTS = ROOT / "data_manifests"
FIGURES = ROOT / "figures"
TINY_BASE = Path(__file__).resolve().parent / "tiny_base"


def runs_root(runs: str = "") -> Path:
    """Folder for everything heavy: the parameter `runs`, else $RUNS, else `runs/` beside the notebooks."""
    return Path(runs or os.environ.get("RUNS", "") or ROOT / "runs").expanduser().resolve()


def weights_root(weights: str = "") -> Path:
    """Folder of the judges' and extractors' files: the setting `weights`, else `weights/` beside the notebooks."""
    return (ROOT / Path(weights or "weights").expanduser()).resolve()


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, after symlinks, or ValueError if that leaves `root`. For paths that come from a file."""
    root = Path(root).resolve()
    path = (root / relative).resolve()
    if Path(relative).is_absolute() or not path.is_relative_to(root):
        raise ValueError(f"path {relative!r} leaves its root folder {root}")
    return path


class RunFolder:
    """Layout of one dataset's results: `<runs>/<profile>/<dataset>/`, and per seed `seed<k>/` below it."""

    def __init__(self, runs: str, profile: str, dataset: str, seed: int = 0):
        self.root = runs_root(runs) / profile / dataset
        self.data = self.root / "data"  # 01: samples.csv, shards/, index.json
        self.base = self.root / "base"  # 01: the base model's folder, when it is adapted to this dataset
        self.latents = self.root / "latents"  # 01: cached moments and token ids
        self.seed = self.root / f"seed{seed}"
        self.results = self.seed / "results"  # 02-07: tidy CSV files, one per stage
        self.executed = self.seed / "notebooks"

    def train(self, method: str) -> Path:
        """02-04: checkpoints and log of one method."""
        return self.seed / "train" / method

    def generated(self, method: str, name: str) -> Path:
        """05: one synthetic set (PNG files and samples.csv)."""
        return self.seed / "generated" / method / name
