"""The steps that need GPUs, one command each, on one process or on all that `accelerate launch` starts (docs/scale.md).

    accelerate launch --multi_gpu --num_processes 8 -m compdiff.launch train mimic hcn PROFILE=paper BASE=<folder>

Each reads what the notebook before it left, takes the notebook's own settings, and goes on where a killed one stopped.
The notebook that would do the same then finds its result finished. (Without a GPU the same words start processes on
gloo: `accelerate launch --cpu` would start one only, unless there is MPI.)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from accelerate import Accelerator

from compdiff import config, datasets, diffusion, evaluate, features, latents, methods, record, sample, train
from compdiff.diffusion import Denoiser
from compdiff.interfaces import NoConditioner
from compdiff.paths import RunFolder
from compdiff.progress import interactive


@dataclass(frozen=True)
class Job:
    """What the words of a command ask for."""

    dataset: str
    method: str = ""
    profile: str = "demo"
    seed: str = ""  # "" = the profile's own, as for make paper
    runs: str = ""
    skip: str = "0"  # encode: 1 = leave out the rows of shards that are missing or corrupt
    strategies: str = ""  # generate: the sets of these downstream strategies too
    extractor: str = "lite0"  # features
    overrides: Mapping[str, str] = field(default_factory=dict)  # settings, and RECIPE

    @property
    def number(self) -> int:
        """The training seed."""
        return int(self.seed or config.SEEDS[self.profile])

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.runs, self.profile, self.dataset, self.number)

    def settings(self, method: str = "") -> config.Config:
        return config.settings(self.profile, self.dataset, "" if method == sample.UNTRAINED else method, **self.overrides)


def share(accelerator: Accelerator) -> tuple[int, int]:
    return accelerator.process_index, accelerator.num_processes


def encode(job: Job, accelerator: Accelerator) -> str:
    """the latents of notebook 01; SKIP=1: without the rows of shards that are missing or corrupt"""
    base, sha256 = diffusion.load_for(job.folder, job.settings())
    data = datasets.load(job.folder.data)
    latents.write(job.folder.latents, data, base, sha256, share(accelerator), job.skip == "1")
    return f"latents of {len(data.index['shards'])} shards"


def fit(job: Job, accelerator: Accelerator) -> str:
    """METHOD of notebooks 02 to 04"""
    log = methods.fit(job.method, job.folder, job.settings(job.method), job.number, accelerator)
    best = log.loc[log["val_loss"].idxmin()]
    return f"{len(log)} steps, best validation loss {best['val_loss']:.4f} at step {best['step']:.0f}"


def generate(job: Job, accelerator: Accelerator) -> str:
    """the synthetic sets of METHOD (or untrained) of notebook 05; STRATEGIES= adds those that notebook 07 asks for"""
    folder, c, method = job.folder, job.settings(job.method), job.method
    data = datasets.load(folder.data)
    base, checkpoint = diffusion.load_for(folder, c)
    if method == sample.UNTRAINED:
        model, named = Denoiser(base, NoConditioner(base.d_ctx), [], c.train.precision), data.schema.names
    else:
        model, parts = methods.restore(method, folder.train(method), base, data.schema, c)
        named, checkpoint = parts.named, record.sha256_file(folder.train(method) / "weights.safetensors")
    bar, made = accelerator.is_main_process and interactive(), {}
    for name in sample.set_names(method, job.strategies.split()):
        rows = sample.set_rows(data, name, job.settings())
        made[name] = sample.generate(
            folder.generated(method, name), rows, data.prompts(rows, named), data.attributes(rows), model, base,
            job.settings().sample, method, checkpoint, job.number, bar, share(accelerator),
        )  # fmt: skip
    listed = {n: "" if (folder.generated(method, n) / "samples.csv").exists() else " (others still draw)" for n in made}
    return ", ".join(f"{len(table)} images of {name}{listed[name]}" for name, table in made.items())


def extract(job: Job, accelerator: Accelerator) -> str:
    """the features of notebook 06: METHOD's test set, real_test or real_train; EXTRACTOR=, lite0 unless said"""
    folder, c = job.folder, job.settings()
    real = {"real_test": ("test", "zero_shot"), "real_train": ("train",)}
    if job.method in real:
        data = datasets.load(folder.data)
        images = data.images(data.table[data.table["split"].isin(real[job.method])])
        del data  # which keeps a copy of its own
    else:
        made = folder.generated(job.method, "test")
        images = sample.read_images(made, evaluate.read_rows(made)["id"].tolist())
    file = folder.seed / "features" / job.extractor / job.method
    how = dict(extractor=job.extractor, size=c.evaluate.feature_size if job.extractor == "lite0" else 0, folder=c.judges.weights)
    features.extract_share(file, images, share(accelerator), **how)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        features.cached(file, images, **how)
    return f"{job.extractor} features of {len(images)} images"


COMMANDS = {"encode": encode, "train": fit, "generate": generate, "features": extract}
WORDS = ("profile", "seed", "runs", "skip", "strategies", "extractor")  # fields of Job


def usage() -> str:
    lines = ["[accelerate launch ...] -m compdiff.launch COMMAND DATASET [METHOD] [NAME=value ...]", ""]
    lines += [f"  {name:9s} {function.__doc__}" for name, function in COMMANDS.items()]
    return "\n".join([*lines, "", "NAME: PROFILE, SEED, RUNS, RECIPE, what a command names, or a setting of compdiff/config.py"])


def parse(words: Sequence[str]) -> tuple[str, Job]:
    """Words -> (command, job). SystemExit with the usage when they are none; ValueError names an unknown setting."""
    names = [word for word in words if "=" not in word]
    if len(names) not in (2, 3) or names[0] not in COMMANDS or (len(names) == 2) != (names[0] == "encode"):
        raise SystemExit(usage())
    given = {name.lower(): value for name, value in (word.split("=", 1) for word in words if "=" in word)}
    said = {name: given.pop(name) for name in WORDS if name in given}
    given |= {"base": os.path.expanduser(given["base"])} if "base" in given else {}
    job = Job(*names[1:], **said, overrides=given)
    job.settings()
    return names[0], job


def main(words: Sequence[str]) -> None:
    command, job = parse(words)
    accelerator = train.new_accelerator(job.settings().train)
    done = COMMANDS[command](job, accelerator)
    accelerator.print(f"{command} {job.dataset} {job.method}: {done}; {accelerator.num_processes} process(es)")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
