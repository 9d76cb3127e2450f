"""Trained runs on this machine, and images from one of them: what the page (`app`) and the widgets have in common.

Every choice is checked here, whatever a page let through: what cannot be done is `request.Refused`, in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from compdiff import config, datasets, diffusion, methods, phantoms, record, sample, stages
from compdiff.attributes import age_bin
from compdiff.datasets import Data
from compdiff.diffusion import Denoiser, Diffusion
from compdiff.paths import RunFolder, runs_root
from compdiff.request import Refused

MAX_IMAGES, MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 8, 100, 15.0, 2**31 - 1
AT_ONCE = 4  # images between two signs of life
NORMAL = "No Finding"  # the label that the others decide
NOTHING_TRAINED = (
    "No trained model of {} here. `make paper DATASETS={}` trains the demo, `make smoke` a quick one of chest."
)


@dataclass(frozen=True)
class TrainedRun:
    """The finished trainings of one dataset, profile and training seed."""

    runs: str
    profile: str
    dataset: str
    seed: int
    methods: tuple[str, ...]  # keys of config.METHODS
    base: str = ""  # folder of the base, where it is not the one that the settings name

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.runs, self.profile, self.dataset, self.seed)

    @property
    def name(self) -> str:
        return f"{self.dataset}, profile {self.profile}, training seed {self.seed}"


@dataclass(frozen=True)
class Sampling:
    """How to draw, within limits. Refused outside of them."""

    seed: int = 0
    steps: int = 20
    guidance: float = 2.0
    n: int = 4  # images of each method

    def __post_init__(self) -> None:
        limits = {"seed": (0, MAX_SEED), "steps": (1, MAX_STEPS), "guidance": (0, MAX_GUIDANCE), "n": (1, MAX_IMAGES)}
        for name, (low, high) in limits.items():
            value, whole = getattr(self, name), name != "guidance"
            if not isinstance(value, int | float) or not low <= value <= high or (whole and value != int(value)):
                title, kind = "number of images" if name == "n" else name, "whole number" if whole else "number"
                raise Refused(f"{title} {value} is not a {kind} from {low} to {high:g}")


@dataclass(frozen=True)
class Drawn:
    """One generated image and what it was made of."""

    method: str
    number: int  # of the images of this method
    image: np.ndarray  # uint8 [S, S]
    prompt: str
    checkpoint: str  # sha256 of the weights


def trained_runs(runs: str = "", base: str = "") -> list[TrainedRun]:
    """Runs with at least one finished training of config.METHODS, the longest profile first."""
    root, found = runs_root(runs), []
    for folder in sorted(root.glob("*/*/seed*/train")):
        profile, dataset, seed, _ = folder.relative_to(root).parts
        done = tuple(
            m for m in config.METHODS if record.read_run(folder / m) and (folder / m / "weights.safetensors").exists()
        )
        if done and profile in config.PROFILES and seed.removeprefix("seed").isdecimal():
            found.append(TrainedRun(str(root), profile, dataset, int(seed.removeprefix("seed")), done, base))
    order = list(config.PROFILES)  # from the shortest to the longest
    return sorted(found, key=lambda run: (-order.index(run.profile), run.dataset, run.seed))


# --- what is asked for -----------------------------------------------------------------------------------------------
def findings(data: Data) -> dict[str, tuple[str, int]]:
    """{text: (label, value)}: everything that can be found, in the order of the manifest."""
    return {
        phrase if phrases[0] else label: (label, value)  # "mild myopia", but "Cardiomegaly"
        for label, phrases in data.manifest.labels.items()
        for value, phrase in enumerate(phrases)
        if value and label != NORMAL
    }


def request_row(data: Data, age_years: float, who: Mapping[str, str], found: Sequence[str]) -> pd.DataFrame:
    """One row with the columns that prompts, tokens and `truth` need. `who`: the attributes other than age; `found`:
    keys of `findings`. Refused for an unknown one, for two values of one label and for an age outside 0-120."""
    labels = dict.fromkeys(data.manifest.labels, 0)
    for text in found:
        if text not in (known := findings(data)):
            raise Refused(f"unknown finding {text!r}; known: {', '.join(known)}")
        label, value = known[text]
        if labels[label]:
            raise Refused(f"{text}: {label} has one value, and two were chosen")
        labels[label] = value
    if NORMAL in labels:
        labels[NORMAL] = int(not any(labels.values()))
    try:
        row = {
            **who,
            "age": age_bin(age_years),
            "age_years": int(age_years),
            "findings": data.manifest.describe(labels),
        }
        data.schema.encode(row)
    except KeyError as error:
        raise Refused(f"{error.args[0]} is missing") from None
    except ValueError as error:
        raise Refused(str(error)) from None
    return pd.DataFrame([row | {f"y_{label}": value for label, value in labels.items()}])


def truth(data: Data, row: pd.DataFrame) -> dict[str, float]:
    """The parameters of a phantom as asked for, without individual scatter; {} where the data are no phantoms."""
    if data.manifest.layout != "phantom":
        return {}
    (who,) = row.to_dict("records")
    modality = data.manifest.modality
    values = {label: phantoms.LABELS[modality][label][who[f"y_{label}"]] for label in data.manifest.labels}
    index = dict(zip(data.schema.names, data.schema.encode(who), strict=True))
    no_scatter = np.zeros(len(phantoms.EFFECTS[modality]["base"]))
    interaction = data.index["settings"]["interaction"]
    return phantoms.parameters(modality, index, who["age_years"], values, no_scatter, interaction)


# --- a trained model --------------------------------------------------------------------------------------------------
def load_data(run: TrainedRun) -> Data:
    """The prepared data of a run: its vocabulary and manifest."""
    return datasets.load(run.folder.data)


def settings(run: TrainedRun, method: str) -> config.Config:
    """The settings that the run was trained with, as its notebook's record tells. Refused: unknown ones."""
    (stage,) = [s for s in stages.STAGES if method in s.trains]
    known = record.read_run(run.folder.executed / f"{stage.name}.run.json") or {"parameters": {}}
    overrides = known["parameters"].get("overrides", {}) | ({"base": run.base} if run.base else {})
    try:
        return config.settings(run.profile, run.dataset, method, **overrides)
    except ValueError as error:
        raise Refused(f"{run.name}: {error}") from None


def restore(run: TrainedRun, method: str, data: Data) -> tuple[Denoiser, Diffusion, methods.Parts]:
    """A trained model. Refused when it was trained on another base than the one found, or with other settings."""
    if method not in run.methods:
        raise Refused(f"{method} is not trained in {run.name}; trained: {', '.join(run.methods)}")
    c = settings(run, method)
    try:
        base, sha256 = diffusion.load_for(run.folder, c)
    except FileNotFoundError as error:
        raise Refused(f"{error}. Name the base of this run: make app BASE=<folder>") from None
    if sha256 != record.read_run(run.folder.train(method))["inputs"]["base"]:
        raise Refused(f"{run.name} was trained on another base model: name that one, make app BASE=<folder>")
    try:
        model, parts = methods.restore(method, run.folder.train(method), base, data.schema, c)
    except (ValueError, RuntimeError):  # names or shapes differ
        raise Refused(f"the weights of {method} in {run.name} do not fit its settings: train it again") from None
    return model, base, parts


def generate(run: TrainedRun, chosen: Sequence[str], row: pd.DataFrame, sampling: Sampling) -> Iterator[Drawn]:
    """`sampling.n` images of one request from every method in `chosen`. Image k has the same noise in all of them."""
    if not chosen:
        raise Refused("choose at least one method")
    data = load_data(run)
    attributes = torch.from_numpy(data.attributes(row))  # [1, K]
    for method in chosen:
        model, base, parts = restore(run, method, data)
        checkpoint = record.sha256_file(run.folder.train(method) / "weights.safetensors")
        (prompt,) = data.prompts(row, parts.named)
        text, empty = base.tokenize([prompt]), base.tokenize([""])[0]
        c = replace(settings(run, method).sample, sample_steps=int(sampling.steps), guidance=float(sampling.guidance))
        for part in chunks(int(sampling.n)):
            n, seeds = len(part), noise_seeds(sampling, part)
            images = sample.sample(model, base, text.expand(n, -1), empty, attributes.expand(n, -1), seeds, c)
            yield from (Drawn(method, k, image, prompt, checkpoint) for k, image in zip(part, images, strict=True))


def noise_seeds(sampling: Sampling, part: Sequence[int]) -> list[int]:
    """Seeds of the images number `part`: they do not depend on the method."""
    return [sample.image_seed(int(sampling.seed), f"studio-{k}") for k in part]


def chunks(n: int) -> list[range]:
    """Numbers 0 ... n - 1 in groups of AT_ONCE."""
    return [range(start, min(start + AT_ONCE, n)) for start in range(0, n, AT_ONCE)]
