"""What a person asks for: `NAME=value` words, the same for make, for `python -m compdiff.run` and for notebooks."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compdiff import config, paths

VARIABLES = {
    "PROFILE": "smoke | demo | paper",
    "DATASETS": 'names of manifests, "chest fundus"; smoke: chest',
    "DATA_ROOT": "folder of a real dataset; DATASETS=cardiac becomes sunnybrook with it",
    "SEEDS": 'training seeds, "0 1 2"',
    "RUNS": "folder for everything heavy, runs/",
    "METHODS": "which methods, the five main ones",
    "ABLATION": "1 = extra rows and ablations (chest phantom)",
    "STRATEGIES": "downstream strategies",
    "PROMPTS_FILE": "CSV of your own prompts, drawn by every method: prompt, one column per attribute, repeats",
    "STAGES": "only these notebooks and what they need",
    "JOBS": "notebooks at a time, each on its share of the cores: as many as cores and memory allow, at paper size 1",
    "KIND": "skeleton: the kind of its images, one that the manifest lists (mimic: jpg, dcm)",
    "RECIPE": " | ".join(config.RECIPES),
}
REAL = {"cardiac": "sunnybrook"}  # phantoms -> the open data of their kind, where a data folder is given
FOR_MAKE = ("PYTHON", "PIP_ARGS", "VENV")


class Refused(Exception):
    """The request cannot be carried out; nothing has run."""


@dataclass(frozen=True)
class Request:
    """What a person asked for, after reading `NAME=value`."""

    profile: str = "demo"
    datasets: tuple[str, ...] = ("chest", "fundus")
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = ()  # () = the five main ones
    ablation: bool = False  # adds the extra rows and ablations, on the chest phantom only
    strategies: tuple[str, ...] = ()  # () = the notebook's own
    stages: tuple[str, ...] = ()  # () = all; else these and what they need
    data_root: str = ""
    prompts_file: str = ""  # absolute
    runs: str = ""
    kind: str = ""  # of a skeleton's images
    jobs: int = 0  # notebooks at a time, 0 = as many as cores and free memory allow (at paper size 1)
    overrides: Mapping[str, object] = field(default_factory=dict)

    def methods_of(self, dataset: str) -> tuple[str, ...]:
        if self.methods:
            return self.methods
        return config.MAIN_METHODS + (config.EXTRA_METHODS if self.ablation and dataset == "chest" else ())


def parse(words: Sequence[str], profile: str) -> Request:
    """`NAME=value` words -> Request. Refused for an unknown name, with the closest known ones."""
    dials = {name.upper(): name for name in config.dials()}
    known = [*VARIABLES, *dials, *FOR_MAKE]
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            close = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.5) or list(VARIABLES)
            raise Refused(f"unknown variable {name!r}; closest: {', '.join(close)} (python -m compdiff.run lists all)")
        given[name] = value.strip()
    overrides = {dials[n]: v for n, v in given.items() if n in dials}
    overrides |= {"base": os.path.expanduser(overrides["base"])} if "base" in overrides else {}  # no shell does it in quotes
    overrides |= {"recipe": given["RECIPE"]} if "RECIPE" in given else {}
    ablation = given.get("ABLATION", "0")
    if ablation not in ("0", "1"):
        raise Refused(f"ABLATION={ablation} is neither 0 nor 1")
    if not all(s.isdecimal() for s in given.get("SEEDS", "0").split()):
        raise Refused(f"SEEDS={given['SEEDS']} holds something that is not a whole number >= 0")
    if not given.get("JOBS", "0").isdecimal():
        raise Refused(f"JOBS={given['JOBS']} is not a whole number >= 0")
    default = Request()
    profile = given.get("PROFILE") or profile
    datasets = ("chest",) if profile == "smoke" else default.datasets
    asked = given.get("DATASETS", "").split()
    asked = [REAL.get(name, name) for name in asked] if given.get("DATA_ROOT") else asked
    return Request(
        profile=profile,
        datasets=tuple(dict.fromkeys(asked)) or datasets,
        seeds=tuple(dict.fromkeys(int(s) for s in given.get("SEEDS", "").split())) or (config.SEEDS.get(profile, 0),),
        methods=tuple(given.get("METHODS", "").split()), ablation=ablation == "1",
        strategies=tuple(given.get("STRATEGIES", "").split()), stages=tuple(given.get("STAGES", "").split()),
        data_root=given.get("DATA_ROOT", ""), prompts_file=_file(given.get("PROMPTS_FILE", "")), runs=str(paths.runs_root(given.get("RUNS", ""))),
        jobs=int(given.get("JOBS") or 0), kind=given.get("KIND", ""),
        overrides=typed(overrides),
    )  # fmt: skip


def _file(name: str) -> str:
    """The absolute path of a file that must be there, "" for none."""
    if name and not Path(name).expanduser().is_file():
        raise Refused(f"PROMPTS_FILE={name}: there is no such file")
    return str(Path(name).expanduser().resolve()) if name else ""


def typed(overrides: Mapping[str, str]) -> dict[str, object]:
    """Texts -> values of the settings' types, as notebooks get them. Refused when a text does not fit."""
    try:
        done = config.override(config.Config(), **{n: v for n, v in overrides.items() if n != "recipe"})
    except ValueError as error:
        raise Refused(str(error)) from None
    owner = config.dials()
    values = {n: getattr(getattr(done, owner[n]), n) if n in owner else v for n, v in overrides.items()}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


def command(request: Request) -> str:
    """The make command that repeats a request."""
    words = {
        "PROFILE": request.profile, "DATASETS": request.datasets, "SEEDS": request.seeds,
        "DATA_ROOT": request.data_root, "METHODS": request.methods,
        "ABLATION": "1" if request.ablation else "", "STAGES": request.stages,
        "STRATEGIES": request.strategies, "PROMPTS_FILE": request.prompts_file, "JOBS": request.jobs or "", "RUNS": request.runs if Path(request.runs) != paths.runs_root() else "",
    }  # fmt: skip
    words |= {name.upper(): value for name, value in request.overrides.items()}
    texts = {n: " ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for n, v in words.items()}
    return " ".join(["make paper", *(f'{n}="{v}"' if " " in v else f"{n}={v}" for n, v in texts.items() if v)])
