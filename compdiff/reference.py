"""Checkpoints of the authors' HCN: which of their names is which of ours (method section 3, reference checkpoint).

A folder holds `config.json` and a state dict, `model.safetensors` or `pytorch_model.bin` (read weights-only). Their
network is fixed to age, sex, race, or to sex, race with `encode_age` false.
"""

from __future__ import annotations

import itertools
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from compdiff.config import HCNConfig

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that exists is read
SIZE_KEYS = {"age": "num_age_bins", "sex": "num_sex", "race": "num_race"}
CONFIG_KEYS = {*SIZE_KEYS.values(), "d_node", "d_ctx", "dropout", "use_uncertainty", "use_aux_loss", "aux_hidden_dim",
               "encode_age"}  # fmt: skip
MLP_LAYERS = {"norm": "0", "hidden": "1", "out": "4"}  # ours -> position in their Sequential


@dataclass(frozen=True)
class Reference:
    """What a reference folder says: arguments for the network, and its weights under the authors' names."""

    weights_file: Path
    names: tuple[str, ...]  # encoded attributes, in order
    schema_sizes: tuple[int, ...]
    d_ctx: int
    config: HCNConfig
    weights: dict[str, Tensor]

    @property
    def age_index(self) -> int | None:
        return self.names.index("age") if "age" in self.names else None

    def rename(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights under our names. `ours` is the state dict to fill: it says which names and shapes must be there.

        ValueError naming file and (their) key for each key that is missing, unexpected or of another shape.
        """
        theirs = {their_key(key, self.names): key for key in ours}
        problems = [f"missing {key}" for key in theirs if key not in self.weights]
        problems += [f"unexpected {key}" for key in self.weights if key not in theirs]
        for key in theirs.keys() & self.weights.keys():
            found, wanted = list(self.weights[key].shape), list(ours[theirs[key]].shape)
            if found != wanted:
                problems.append(f"{key} has shape {found}, expected {wanted}")
        if problems:
            raise ValueError(f"{self.weights_file}: " + "; ".join(sorted(problems)))
        return {key: self.weights[their] for their, key in theirs.items()}


def their_key(key: str, names: tuple[str, ...]) -> str:
    """Our parameter name -> the authors': compose_pair.1.hidden.weight -> compose_age_race.net.1.weight."""
    part, *rest = key.split(".")
    pairs = list(itertools.combinations(names, 2))
    if part == "embed":
        return f"emb_{names[int(rest[0])]}.{rest[1]}"
    if part == "compose_pair":
        return f"compose_{'_'.join(pairs[int(rest[0])])}.net.{MLP_LAYERS[rest[1]]}.{rest[2]}"
    if part == "compose_all":
        return f"compose_all.net.{MLP_LAYERS[rest[0]]}.{rest[1]}"
    if part == "classify":
        return f"{names[int(rest[0])]}_classifier.{MLP_LAYERS[rest[1]]}.{rest[2]}"
    return ".".join([{"project": "proj_ctx"}.get(part, part), *rest])


def read_reference(folder: str | Path) -> Reference:
    """Read config.json and the weights of a reference checkpoint; nothing in them is executed.

    FileNotFoundError when a file is absent; ValueError naming the file for settings that are missing or not HCN's, and
    for a weights file that is damaged or holds more than tensors.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    try:
        config = dict(json.loads(config_file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_file}: not a JSON object ({error})") from error
    missing, unknown = CONFIG_KEYS - config.keys(), config.keys() - CONFIG_KEYS
    if missing or unknown:
        raise ValueError(f"{config_file}: missing settings {sorted(missing)}, unknown settings {sorted(unknown)}")
    names = ("age", "sex", "race") if config["encode_age"] else ("sex", "race")
    hcn = HCNConfig(
        d_node=config["d_node"],
        dropout=config["dropout"],
        uncertainty=config["use_uncertainty"],
        aux_weight=HCNConfig.aux_weight if config["use_aux_loss"] else 0.0,
        aux_hidden=config["aux_hidden_dim"],
    )
    sizes = tuple(config[SIZE_KEYS[name]] for name in names)
    weights_file = _weights_file(folder)
    return Reference(weights_file, names, sizes, config["d_ctx"], hcn, _read_weights(weights_file))


def _weights_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: no weights file; expected one of {', '.join(WEIGHT_FILES)}")


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if not zipfile.is_zipfile(file):  # torch.save's format; a damaged file has lost the directory at its end
            raise ValueError(f"{file}: damaged, or not written by torch.save")
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file}: not a plain state dict of tensors ({error})") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{file}: not a plain state dict of tensors")
    return dict(weights)
