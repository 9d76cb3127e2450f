"""Weights from outside: the list of every judge and extractor (data_manifests/weights.yaml), and the only way to load.

A file is read as tensors and nothing else: safetensors, or torch.load(weights_only=True). A pickle that holds code is
refused. Files whose sha256 the list knows must match it; of the others the hash is recorded and shown as unverified.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pandas as pd
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from compdiff import paths
from compdiff.record import sha256_file

MANIFEST = paths.MANIFESTS / "weights.yaml"


class NotAvailable(RuntimeError):
    """Weights that are not on this machine, or (`why`) are and cannot be loaded. `remedy` says how to obtain them;
    callers print `note`, "not available: <why>; <remedy>"."""

    def __init__(self, what: str, remedy: str, why: str = ""):
        super().__init__(f"{what} is not available{': ' * bool(why)}{why}; remedy: {remedy}")
        self.remedy, self.why = remedy, why
        self.note = "not available: " + "; ".join(filter(None, [why, remedy]))


@dataclass(frozen=True)
class Entry:
    """One judge or extractor, as listed. What we do not know says "unknown" (or null), and nothing is guessed."""

    title: str
    judges: str  # image quality | paired similarity | findings | sex | race | age
    images: str  # any | chest: on which images its opinion means something
    trained_on: tuple[str, ...]  # data sets, of which its opinion is no outsider's; ("unknown",) = not known to us
    licence: str
    sha256: str | None  # of the published file; null = nobody of us has seen its bytes
    package: str  # installed Python package that carries the file; "" = the folder of weights
    file: str  # name in that folder, or path in that package
    architecture: str | None  # key of backbones.ARCHITECTURES; null = not built in, so no file of it is loaded
    width: int | None  # d of the features
    outputs: tuple[str, ...] | int  # names, or number, of the logits; 0 = none
    size: int  # pixels fed to it, square
    crop: int  # central part of that which is used
    normalise: str  # key of features.NORMALISE
    remedy: str  # how to obtain it, in one line


@cache
def entries() -> Mapping[str, Entry]:
    """The list, by name. ValueError: a key is missing or unknown."""
    raw = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    wanted = {f.name for f in fields(Entry)}
    for name, entry in raw.items():
        if set(entry) != wanted:
            raise ValueError(f"{MANIFEST.name}: {name}: keys {sorted(set(entry) ^ wanted)} are missing or unknown")
    as_tuple = lambda v: tuple(v) if isinstance(v, list) else v  # noqa: E731
    return {name: Entry(**{k: as_tuple(v) for k, v in entry.items()}) for name, entry in raw.items()}


def entry(name: str) -> Entry:
    if name not in entries():
        raise ValueError(f"unknown extractor {name!r}; known: {', '.join(entries())}")
    return entries()[name]


def weight_file(name: str, folder: str = "") -> Path:
    """The checked file of judge or extractor `name`, in its package or else below `folder` (paths.weights_root).

    A file of the same stem ending in .safetensors is taken first: it is the user's own copy of the published tensors.
    ValueError: unknown name, or bytes that are not the listed ones. NotAvailable: no such file, or one of a network
    whose architecture is not built in.
    """
    known, root = entry(name), paths.weights_root(folder)
    if known.package:
        spec = importlib.util.find_spec(known.package)
        if spec is None or not spec.submodule_search_locations:
            raise NotAvailable(known.title, known.remedy)
        root = Path(spec.submodule_search_locations[0])
    path = root / known.file
    found = next((p for p in (path.with_suffix(".safetensors"), path) if p.is_file()), None)
    if found is None:
        raise NotAvailable(known.title, known.remedy)
    if known.architecture is None:
        raise NotAvailable(known.title, known.remedy, f"{found.name} is there, but its architecture is not built in")
    if found != path:
        return found
    if known.sha256 and (digest := sha256_file(path)) != known.sha256:
        raise ValueError(f"{path.name}: sha256 {digest}, expected {known.sha256}; remedy: {known.remedy}")
    return path


def standing(name: str, path: Path) -> str:
    """ "verified" for the listed bytes; else "unverified, sha256 ..." of the file that was used."""
    sure = entry(name).sha256 is not None and path.suffix != ".safetensors"
    return "verified" if sure else f"unverified, sha256 {sha256_file(path)[:12]}"


def state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, without the wrappers "state_dict" (Lightning) and module. or model. before every key.

    ValueError: not a file of tensors; above all a pickle that would run code.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path.name}: refused, it holds more or less than tensors ({reason}); {CONVERT}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path.name}: refused, it is no dictionary of tensors; {CONVERT}")
    for prefix in ("module.", "model."):
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


CONVERT = "remedy: where you trust the file, save its state_dict() with safetensors under the same name"


def listing(folder: str = "") -> pd.DataFrame:
    """The list as a table: what each judges, its licence, and its state: verified, unverified, or not available (and
    why, where the file is there)."""
    rows = []
    for name, known in entries().items():
        try:
            state = standing(name, weight_file(name, folder))
        except NotAvailable as error:
            state = "not available" + f": {error.why}" * bool(error.why)
        row = {"title": known.title, "judges": known.judges, "licence": known.licence, "state": state}
        rows.append({"name": name} | row)
    return pd.DataFrame(rows).set_index("name")
