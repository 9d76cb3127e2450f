"""A trained ControlNet of hearts, and images from it for a mask and a prompt: the heart's part of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from compdiff import cardiac, config, record, sample
from compdiff.config import SampleConfig
from compdiff.controlnet import ControlDenoiser, StackedDiffusion, to_picture
from compdiff.paths import RunFolder, runs_root
from compdiff.request import Refused
from compdiff.studio import Drawn, Sampling, chunks, noise_seeds

METHOD = "control"
MAX_PROMPT = 300  # characters
NOTHING_TRAINED = "No trained heart model here. `make paper DATASETS=cardiac` trains the demo's."


@dataclass(frozen=True)
class HeartRun:
    """One finished ControlNet: of all training patients, or of a fold's where every patient is tested in turn."""

    runs: str
    profile: str
    dataset: str
    seed: int
    generator: str
    base: str = ""  # folder of the base, where it is not the one that the settings name
    data_root: str = ""  # folder of the real data that it was trained on; phantoms need none

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.runs, self.profile, self.dataset, self.seed)

    @property
    def name(self) -> str:
        part = "" if self.generator == "all" else f", {self.generator}"
        return f"{self.dataset}, profile {self.profile}, training seed {self.seed}{part}"


def trained_runs(runs: str = "", base: str = "", data_root: str = "") -> list[HeartRun]:
    """The finished ControlNets of notebook 09, the longest profile first."""
    root, found = runs_root(runs), []
    for file in sorted(root.glob(f"*/*/seed*/train/{METHOD}/*/run.json")):
        profile, dataset, seed, _, _, generator, _ = file.relative_to(root).parts
        seed = seed.removeprefix("seed")
        whole = generator != cardiac.REHEARSAL and seed.isdecimal()  # a rehearsal has seen no patient
        if profile in config.PROFILES and whole and file.with_name("weights.safetensors").exists():
            found.append(HeartRun(str(root), profile, dataset, int(seed), generator, base, data_root))
    order = list(config.PROFILES)  # from the shortest to the longest
    return sorted(found, key=lambda run: (-order.index(run.profile), run.dataset, run.seed, run.generator))


def prompt_of(row: Mapping[str, object]) -> str:
    """The prompt of a phantom patient, naming all attributes."""
    return cardiac.prompt(row, cardiac.PHANTOM_SCHEMA.names, cardiac.PHANTOM_SCHEMA)


def frames(stacked: np.ndarray) -> dict[str, np.ndarray]:
    """A generated image uint8 [S, S, 3] as it is, and its two frames [S, S]."""
    ed, es = cardiac.unstack(stacked)
    return {"stacked": stacked, "ED": ed, "ES": es}


def draw(
    model: ControlDenoiser, base: StackedDiffusion, mask: np.ndarray, prompt: str, attributes: np.ndarray,
    classes: tuple[int, ...], sampling: Sampling, usual: SampleConfig, checkpoint: str,
) -> Iterator[Drawn]:  # fmt: skip
    """`sampling.n` stacked images of one mask uint8 [S, S, 3] and prompt. `attributes`: category indices [K] for the
    token; `classes`: the mask values that the model was shown. Refused: prompt too long."""
    if len(prompt) > MAX_PROMPT:
        raise Refused(f"the prompt has {len(prompt)} characters, at most {MAX_PROMPT}")
    text, empty = base.tokenize([prompt]), base.tokenize([""])[0]
    who, picture = torch.from_numpy(attributes)[None], to_picture(mask[None], classes)
    c = replace(usual, sample_steps=int(sampling.steps), guidance=float(sampling.guidance))
    for part in chunks(int(sampling.n)):
        n = len(part)
        given = text.expand(n, -1), empty, who.expand(n, -1), noise_seeds(sampling, part), c
        images = sample.sample(model, base, *given, picture=picture.expand(n, -1, -1, -1))
        yield from (Drawn(METHOD, k, image, prompt, checkpoint) for k, image in zip(part, images, strict=True))


def settings(run: HeartRun) -> config.Config:
    """The settings that the run was trained with, as notebook 09's record tells. Refused: unknown ones."""
    known = record.read_run(run.folder.executed / "09_cardiac_generation.run.json") or {"parameters": {}}
    overrides = known["parameters"].get("overrides", {}) | ({"base": run.base} if run.base else {})
    try:
        return config.settings(run.profile, run.dataset, **overrides)
    except ValueError as error:
        raise Refused(f"{run.name}: {error}") from None


def usual(run: HeartRun) -> Sampling:
    """One image, with the steps of the run and the guidance of its random set (method section 5: of that and of the
    app). Refused: see `settings`."""
    c = settings(run)
    return Sampling(steps=c.sample.sample_steps, guidance=c.heart.random_guidance, n=1)


def generate(
    run: HeartRun, mask: np.ndarray, prompt: str, row: Mapping[str, object], sampling: Sampling
) -> Iterator[Drawn]:
    """`draw` from a trained run. `row`: attributes for the token, where the model has one. Refused: no data, no fit."""
    from compdiff import cardiac_cohorts, cardiac_models  # here: a page without a heart does not need them

    c = cardiac_models.rehearsed(settings(run), run.folder)
    if not run.data_root and not cardiac_cohorts.generated(run.dataset):
        raise Refused(f"{run.name} learnt from real data, whose columns say what it knows: make app DATA_ROOT=<folder>")
    studies = cardiac_cohorts.studies(run.dataset, run.data_root, c)
    places = run.folder.seed / "base" / run.generator, run.folder.train(METHOD) / run.generator
    try:
        model, base, checkpoint = cardiac_models.restore(METHOD, studies, *places, c)
    except (FileNotFoundError, ValueError, RuntimeError):  # files, names or shapes differ
        raise Refused(f"the weights of {run.name} do not fit its settings: train it again") from None
    token = cardiac_models.named(METHOD, c) is not None
    try:
        attributes = studies.schema.encode(row) if token else (0,) * len(studies.schema)
    except KeyError as error:
        raise Refused(f"{run.name} asks for {error.args[0]}, which a phantom does not have") from None
    classes = cardiac_models.mask_classes(studies)
    yield from draw(model, base, mask, prompt, np.array(attributes), classes, sampling, c.sample, checkpoint)
