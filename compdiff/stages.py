"""The stages of a run: one table, and for each step what it depends on and whether it is done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import yaml

from compdiff import config, paths, record, sources
from compdiff.request import Request

OPTIONAL = ("strategies", "prompts_file")  # parameters that stay the notebook's own unless somebody asks
PLACES = ("runs", "data_root", "prompts_file", "overrides", "figures")  # parameters that are no inputs by themselves
SHARED = ("dataset", "profile", "seed", "data_root", "runs", "overrides", "methods")


@dataclass(frozen=True)
class Stage:
    """One notebook. Patterns may name {dataset}, {seed} and {method}; a pattern ending in "/" is a folder of images."""

    name: str
    scope: str  # dataset: once | seed: for each training seed | seeds: once, over all seeds
    after: tuple[str, ...]  # stages whose outputs it reads
    outputs: tuple[str, ...]  # below the dataset's run folder; each must be there afterwards
    may_write: tuple[str, ...] = ()  # outputs that only some settings make
    parameters: tuple[str, ...] = SHARED  # what its parameters cell declares and the door sends
    settings: tuple[str, ...] = ()  # parts of config.Config that it reads
    trains: tuple[str, ...] = ()  # methods it may train; () = it takes every method of the run
    loads: tuple[str, ...] = ()  # modules that it imports by name at run time (methods.build_conditioner)
    files: tuple[str, ...] = ()  # files of the repository that it reads
    beside: tuple[str, ...] = ()  # files of other runs that it reads, below RUNS; {profile} and every {seed} filled in
    to_figures: bool = False  # writes below the figures folder instead of the run folder
    family: str = ""  # of the datasets that it is for: the folder of data_manifests/ that holds their manifests


BASE = ("compdiff/tiny_base/**/*",)
TRAINED = ("seed{seed}/train/{method}/weights.safetensors", "seed{seed}/train/{method}/log.csv")
TRAINERS = ("02_train_hcn", "03_train_baselines", "04_fairdiffusion")

STAGES: tuple[Stage, ...] = (
    Stage(
        "01_data_prep", "dataset", (),
        outputs=("data/samples.csv", "data/index.json", "data/shards/*.tar", "latents/*.safetensors"),
        may_write=("base/**/*",), parameters=("dataset", "profile", "data_root", "runs", "overrides"),
        settings=("data", "base_model", "train"), files=BASE,
    ),
    Stage(
        "02_train_hcn", "seed", ("01_data_prep",), outputs=TRAINED, settings=("train", "hcn"), files=BASE,
        trains=("hcn", "hcn_age_from_prompt", "hcn_no_aux", "hcn_no_consistency", "hcn_no_uncertainty"), loads=("hcn",),
        may_write=("seed{seed}/train/hcn/uncertainty.csv",),
    ),
    Stage(
        "03_train_baselines", "seed", ("01_data_prep",), outputs=TRAINED, settings=("train", "hcn"), files=BASE,
        trains=("text", "flat", "flat_separate"), loads=("flat",),
    ),
    Stage(
        "04_fairdiffusion", "seed", ("01_data_prep",), outputs=TRAINED, settings=("train", "hcn", "fair"), files=BASE,
        trains=("fairdiffusion", "hcn_fairdiffusion"), loads=("fairdiffusion", "hcn"),
        may_write=("seed{seed}/train/{method}/sigma.csv",),
    ),
    Stage(
        "05_generation", "seed", ("01_data_prep", *TRAINERS), settings=("sample",), files=BASE,
        parameters=(*SHARED, "strategies", "prompts_file"),  # which sets are made; what is there already stays
        loads=("hcn", "flat", "fairdiffusion"),
        outputs=("seed{seed}/generated/{method}/*/samples.csv", "seed{seed}/generated/{method}/*/images/",
                 "seed{seed}/generated/untrained/*/samples.csv", "seed{seed}/generated/untrained/*/images/"),
        may_write=("seed{seed}/generated/prompts.*",),
    ),
    Stage(
        "06_metrics", "seed", ("01_data_prep", "05_generation"), settings=("evaluate", "judges", "base_model"),
        files=(*BASE, "data_manifests/weights.yaml"), outputs=("seed{seed}/results/06_metrics.csv",),
        may_write=("seed{seed}/judge/*", "seed{seed}/results/memorisation_pairs.csv"),
    ),
    Stage(
        "07_downstream", "seed", ("01_data_prep", "05_generation"), settings=("evaluate",),
        parameters=(*SHARED, "strategies"), outputs=("seed{seed}/results/07_downstream.csv",),
        may_write=("seed{seed}/downstream/*/predictions.csv", "seed{seed}/downstream/*/*/predictions.csv"),
    ),
    Stage(
        "08_figures", "seeds", ("01_data_prep", *TRAINERS, "05_generation", "06_metrics", "07_downstream"),
        parameters=("dataset", "profile", "seeds", "runs", "methods", "figures"),
        outputs=("table1.csv", "run.json", "*.csv", "*.md", "*.tex", "*.svg", "*.png"), to_figures=True,
        files=("compdiff/*.csv",),
        beside=("dial*/{profile}/{dataset}/data/index.json",
                "dial*/{profile}/{dataset}/seed{seed}/results/06_metrics.csv"),
    ),
    Stage(
        "09_cardiac_generation", "seed", (), files=BASE, loads=("hcn",),
        settings=("data", "base_model", "train", "hcn", "sample", "evaluate", "heart"),
        parameters=("dataset", "profile", "seed", "data_root", "runs", "overrides"),
        outputs=("seed{seed}/folds.csv", "seed{seed}/train/*/*/weights.safetensors", "seed{seed}/train/*/*/log.csv",
                 "seed{seed}/generated/*/*/*/samples.csv", "seed{seed}/generated/*/*/*/images/",
                 "seed{seed}/results/09_cardiac.csv", "seed{seed}/results/09_fid.csv"),
        may_write=("seed{seed}/base/*/**/*",),
        family="cardiac",
    ),
    Stage(
        "10_cardiac_fairness", "seeds", ("09_cardiac_generation",), settings=("data", "evaluate", "heart"),
        parameters=("dataset", "profile", "seeds", "data_root", "runs", "overrides", "figures"),
        outputs=("fairness.csv", "report.md", "*.csv", "*.md", "*.tex", "*.svg", "*.png"), to_figures=True,
        family="cardiac",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Project:
    """Where the notebooks, the package and the manifests lie, and the stage table; tests use one of their own."""

    root: Path = paths.ROOT
    notebooks: Path = paths.NOTEBOOKS
    package: Path = paths.ROOT / "compdiff"
    manifests: Path = paths.MANIFESTS
    figures: Path = paths.FIGURES
    stages: tuple[Stage, ...] = STAGES

    def manifest(self, dataset: str) -> dict:
        """The dataset's manifest. ValueError for a name that has none."""
        return yaml.safe_load(self._manifest_file(dataset).read_text())

    def family(self, dataset: str) -> str:
        """Folder of manifests that holds the dataset's, "" for that of images. ValueError for an unknown name."""
        folder = self._manifest_file(dataset).parent
        return "" if folder == self.manifests else folder.name

    def _manifest_file(self, dataset: str) -> Path:
        found = {f.stem: f for pattern in ("*/*.yaml", "*.yaml") for f in sorted(self.manifests.glob(pattern))}
        found.pop("weights", None)  # weights.yaml lists judges
        if dataset not in found:
            raise ValueError(f"unknown dataset {dataset!r}; known: {', '.join(sorted(found))}")
        return found[dataset]


PROJECT = Project()


@dataclass(frozen=True)
class Step:
    """One stage for one dataset (and seed): its parameters, inputs, outputs and state."""

    project: Project
    request: Request
    stage: Stage
    dataset: str
    seeds: tuple[int, ...]

    @property
    def label(self) -> str:
        seed = f" seed {self.seeds[0]}" if self.stage.scope == "seed" else ""
        return f"{self.dataset}{seed}  {self.stage.name}"

    @cached_property
    def folder(self) -> paths.RunFolder:
        return paths.RunFolder(self.request.runs, self.request.profile, self.dataset, self.seeds[0])

    @property
    def notebook(self) -> Path:
        return self.project.notebooks / f"{self.stage.name}.ipynb"

    @property
    def executed(self) -> Path:
        folder = self.folder.executed if self.stage.scope == "seed" else self.folder.root / "notebooks"
        return folder / self.notebook.name

    @property
    def run_file(self) -> Path:
        return self.executed.with_suffix(".run.json")

    @property
    def figures(self) -> Path:
        """Tables and pictures: the repository's `figures/<dataset>`, but a smoke run's stay in its run folder."""
        smoke = self.request.profile == "smoke"
        return self.folder.root / "figures" if smoke else self.project.figures / self.dataset

    @property
    def base(self) -> Path:
        return self.figures if self.stage.to_figures else self.folder.root

    @property
    def methods(self) -> tuple[str, ...]:
        wanted = self.request.methods_of(self.dataset)
        return tuple(m for m in wanted if m in self.stage.trains) if self.stage.trains else wanted

    def data_root(self) -> str:
        """DATA_ROOT relative to the repository, "" for generated data (which no folder of real data can change)."""
        if not self.request.data_root or self.project.manifest(self.dataset).get("access") == "generated":
            return ""
        given = Path(self.request.data_root).expanduser()
        return str(given) if given.is_absolute() else os.path.relpath(given.resolve(), self.project.root)

    def parameters(self) -> dict[str, object]:
        """What the notebook is sent: exactly the names in Stage.parameters (those of OPTIONAL only when asked for)."""
        r = self.request
        known = {
            "dataset": self.dataset, "profile": r.profile, "seed": self.seeds[0], "seeds": list(self.seeds),
            "runs": r.runs, "data_root": self.data_root(), "overrides": dict(r.overrides),
            "methods": list(self.methods), "strategies": list(r.strategies), "prompts_file": r.prompts_file,
            "figures": os.path.relpath(self.figures, self.project.root),
        }  # fmt: skip
        return {name: known[name] for name in self.stage.parameters if name not in OPTIONAL or known[name]}

    def resolved(self) -> dict[str, object]:
        """{"steps": 300, "steps (hcn)": 500, ...}: the settings that apply, after presets and overrides."""
        flat: dict[str, object] = {}
        for method in ("", *(self.methods if self.stage.trains else ())):
            full = asdict(config.settings(self.request.profile, self.dataset, method, **self.request.overrides))
            for name, value in ((n, v) for part in self.stage.settings for n, v in full[part].items()):
                if not method or flat[name] != value:
                    flat[f"{name} ({method})" if method else name] = value
        return flat

    def inputs(self, upstream: Mapping[str, str | None]) -> dict[str, object]:
        """Everything that decides the result, flat, by the name that `plan` prints. `upstream`: digests by label."""
        p, sent = self.project, self.parameters()
        found = {f"parameter {n}": v for n, v in sent.items() if n not in PLACES}
        found |= {f"setting {n}": v for n, v in self.resolved().items()}
        found["notebook's code"] = sources.code_sha256(self.notebook)
        found |= sources.modules(self.notebook, p.package, self.stage.loads)
        found |= {f"outputs of {label}": digest for label, digest in upstream.items()}
        found[f"manifest {self.dataset}.yaml"] = record.sha256_json(p.manifest(self.dataset))
        files = sorted({f for pattern in self.stage.files for f in p.root.glob(pattern) if f.is_file()})
        found |= {f"file {f.relative_to(p.root).as_posix()}": record.sha256_file(f) for f in files}
        found |= {f"other run {name}": record.sha256_file(f) for name, f in self.beside().items()}
        if sent.get("data_root") and not self.stage.after:
            found["DATA_ROOT's content"] = folder_summary(p.root / str(sent["data_root"]))
        if "prompts_file" in sent:
            found["PROMPTS_FILE's content"] = record.sha256_file(Path(str(sent["prompts_file"])))
        if (base := found.get("setting base")) and (p.root / Path(str(base)).expanduser()).is_dir():
            found["base model's files"] = files_summary(p.root / Path(str(base)).expanduser())
        if "setting weights" in found:
            found["files of judges"] = files_summary(paths.weights_root(str(found["setting weights"])))
        return record.without_places(found)

    def beside(self) -> dict[str, Path]:
        """Files of other runs that the stage reads, by their path below RUNS."""
        runs, about = paths.runs_root(self.request.runs), {"profile": self.request.profile, "dataset": self.dataset}
        names = (p.format(seed=seed, **about) for p in self.stage.beside for seed in self.seeds)
        return {f.relative_to(runs).as_posix(): f for name in names for f in sorted(runs.glob(name)) if f.is_file()}

    def output_paths(self, optional: bool = True) -> dict[str, list[Path]]:
        """{pattern, filled in: what matches it below `base`}."""
        filled = {}
        for pattern in (*self.stage.outputs, *(self.stage.may_write if optional else ())):
            for method in self.methods if "{method}" in pattern else ("",):
                name = pattern.format(seed=self.seeds[0], method=method, dataset=self.dataset)
                matches = sorted(self.base.glob(name))
                filled[name] = [m for m in matches if m.is_dir() == name.endswith("/")]
        return filled

    def lacks(self) -> list[str]:
        """Required outputs of which there is no file."""
        return [name for name, matches in self.output_paths(optional=False).items() if not matches]

    def digest(self) -> str | None:
        """Hash over the recorded outputs, None where there is no record."""
        known = record.read_run(self.run_file)
        return known and record.outputs_sha256(known)

    def reasons(self, upstream: Mapping[str, str | None]) -> list[str]:
        """Why the stage must run; empty = up to date."""
        known = record.read_run(self.run_file)
        if known is None:
            return ["not finished before"]
        now, then = self.inputs(upstream), known["inputs"]
        differing = [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
        changed = [describe(name, then.get(name), now.get(name)) for name in differing]
        gone = [n for n, entry in known["outputs"].items() if not record.unchanged(self.base / n, entry)]
        gone += [] if self.executed.exists() else [self.executed.name]
        return changed + [f"{'changed' if (self.base / n).exists() else 'missing'}: {n}" for n in gone]


def describe(name: str, then: object, now: object) -> str:
    """One changed input in words; hashes are not worth printing."""
    if name.startswith(("setting ", "parameter ")):
        return f"{name}: {then} -> {now}"
    return f"{'new' if then is None else 'gone' if now is None else 'changed'}: {name}"


def folder_summary(folder: Path) -> str:
    """Hash of a data folder's own files (tables: content) and of how many entries each of its folders holds."""
    if not folder.is_dir():
        return "absent"
    entries = {e.name: len(os.listdir(e)) if e.is_dir() else record.sha256_file(e) for e in sorted(folder.iterdir())}
    return record.sha256_json(entries)


def files_summary(folder: Path) -> str:
    """Hash of names, sizes and times of all files below a folder that is too large to read each time."""
    stats = ((f.relative_to(folder).as_posix(), f.stat()) for f in sorted(folder.rglob("*")) if f.is_file())
    return record.sha256_json([(name, s.st_size, s.st_mtime_ns) for name, s in stats])


def steps(project: Project, request: Request) -> Iterator[Step]:
    """Every step of a request in order: dataset by dataset, stage by stage within a seed."""
    wanted = needed(project, request.stages)
    for dataset in request.datasets:
        family = project.family(dataset)
        each = [("seed", (seed,)) for seed in request.seeds]
        for scope, seeds in (("dataset", request.seeds), *each, ("seeds", request.seeds)):
            for stage in project.stages:
                step = Step(project, request, stage, dataset, seeds)
                fits = stage.family == family and (step.methods or not stage.trains)
                if stage.scope == scope and stage.name in wanted and fits:
                    yield step


def needed(project: Project, names: tuple[str, ...]) -> set[str]:
    """The named stages and all that they need; every stage for (). ValueError for an unknown name."""
    table = {stage.name: stage for stage in project.stages}
    if unknown := [n for n in names if n not in table]:
        raise ValueError(f"unknown stage {unknown[0]!r}; known: {', '.join(table)}")
    wanted, waiting = set(), list(names or table)
    while waiting:
        wanted.add(name := waiting.pop())
        waiting += table[name].after
    return wanted


def before(step: Step, others: list[Step]) -> list[Step]:
    """The steps among `others` whose outputs `step` reads: same dataset, and same seed unless one spans all seeds."""
    return [
        o for o in others
        if o.stage.name in step.stage.after and o.dataset == step.dataset
        and (o.stage.scope == "dataset" or set(o.seeds) & set(step.seeds))
    ]  # fmt: skip
