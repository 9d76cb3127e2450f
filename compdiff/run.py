"""The door: `python -m compdiff.run paper NAME=value ...` (or make) runs the notebooks whose inputs changed.

Each notebook is executed to a temporary file that takes its place only on success; its `run.json`, written last, says
what it was made from, and makes the next run skip it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from compdiff import budget, config, execute, paths, record, schedule, skeleton, strategies
from compdiff.attributes import SCHEMAS
from compdiff.prompts import read_prompts
from compdiff.request import VARIABLES, Refused, Request, command, parse
from compdiff.stages import PROJECT, Project, Step, before, needed, steps

COMMANDS = {
    "paper": "run every notebook whose inputs changed (PROFILE=demo unless said)",
    "smoke": "the same at the smallest size (PROFILE=smoke)",
    "plan": "print what `paper` would run, and why",
    "clean": "remove the smoke run and caches; results stay",
    "skeleton": "write drawn images in a real dataset's layout (DATASETS=mimic KIND=dcm) into DATA_ROOT, to rehearse",
}
READABLE = "(papermill reads `name: type = value  # comment`, without a further = sign in the line)"
INSIDE = "COMPDIFF_INSIDE_RUN"  # set for the kernels that the door starts


# --- checks before anything runs ------------------------------------------------------------------------------------
def check_names(project: Project, request: Request) -> None:
    """Refused for a profile, dataset, method, recipe, strategy or stage that does not exist."""
    try:
        for dataset in request.datasets:
            project.manifest(dataset)
            for method in ("", *request.methods_of(dataset)):
                config.settings(request.profile, dataset, method, **request.overrides)
        strategies.chosen(request.strategies)
        needed(project, request.stages)
        have = {step.dataset for step in steps(project, request)}
        if idle := [d for d in request.datasets if d not in have]:
            theirs = {s.family or Request().datasets[0] for s in project.stages if s.name in request.stages}
            remedy = " or ".join(f"DATASETS={name}" for name in sorted(theirs))
            raise ValueError(
                f"none of the stages {', '.join(request.stages)} is one of {idle[0]}'s; name its dataset: {remedy}"
            )
    except ValueError as error:
        raise Refused(str(error)) from None


def check(project: Project, request: Request, todo: Sequence[Step], heading: str = "nothing was run:") -> None:
    """Refused, with all problems at once, unless everything that can be seen in advance is in place."""
    problems = []
    for dataset in request.datasets:
        manifest = project.manifest(dataset)
        external = manifest.get("split", {}).get("rule") == "external"
        if external and any(step.dataset == dataset and step.stage.after for step in todo):
            remedy = f"STAGES=01_data_prep prepares it, and EXTERNAL={dataset} beside another dataset uses it"
            problems.append(f"{dataset} is a test set, nothing can train on it: {remedy}")
        if manifest.get("access") == "generated":
            continue
        where = f"{manifest.get('title', dataset)}: {manifest.get('access', '')}; source: {manifest.get('source', '')}"
        where += f"; it will cost: {manifest['cost']}" if "cost" in manifest else ""
        if request.profile == "paper":
            asked = {m: config.settings("paper", dataset, m, **request.overrides) for m in request.methods_of(dataset)}
            where += f"; {budget.words(dataset, asked, len(request.seeds), strategies.DEMO_GENERATORS)}"
        if not request.data_root:
            problems.append(f"{dataset} needs DATA_ROOT=<folder of its files>. {where}")
        elif not Path(request.data_root).expanduser().is_dir():
            problems.append(f"{dataset}: DATA_ROOT={request.data_root} is not a folder. {where}")
        own = config.settings(request.profile, dataset, **request.overrides).base_model
        if own.base == "tiny" and not own.vae_steps and request.profile != "smoke" and not external:
            problems.append(f"{dataset}: the shipped base knows phantoms only; adapt it: VAE_STEPS=600 UNET_STEPS=600")
    for dataset in request.datasets if request.prompts_file else ():
        if project.family(dataset):
            problems.append(f"PROMPTS_FILE is for images asked for in words, not for {dataset}")
            continue
        try:
            read_prompts(Path(request.prompts_file), SCHEMAS[str(project.manifest(dataset)["schema"])])
        except ValueError as error:
            problems.append(f"PROMPTS_FILE for {dataset}: {error}")
    base = config.settings(request.profile, **request.overrides).base_model
    if not base.base:
        problems.append(
            f"PROFILE={request.profile} needs BASE=<folder or hub id of Stable Diffusion 2.1-base>: its first address "
            "closed in November 2025, so give a folder with the weights, or a mirror's id with REVISION=<commit>"
        )
    elif base.base != "tiny" and not (project.root / base.base).is_dir():
        if base.base.startswith(("/", ".", "~")) or not base.revision:
            problems.append(f"BASE={base.base} is not a folder; as a hub id it needs REVISION=<commit>")
    for step in todo:
        if not step.notebook.is_file():
            problems.append(f"{step.notebook.name} is not in {step.project.notebooks.name}/")
        elif unknown := set(step.parameters()) - set(execute.declared(step.notebook)):
            problems.append(f"{step.notebook.name} declares no parameter named {', '.join(sorted(unknown))} {READABLE}")
    if problems:
        raise Refused("\n  ".join([heading, *dict.fromkeys(problems)]))


# --- running --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder alone, by a file beside it; a second run waits and says for whom."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock, who = FileLock(folder.with_name(f".{folder.name}.lock")), folder.with_name(f".{folder.name}.working")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = "another run"
        with contextlib.suppress(FileNotFoundError):  # it may have ended this moment
            other = who.read_text()
        print(f"waiting until {other} has finished in {os.path.relpath(folder)} (Ctrl-C gives up)", flush=True)
        lock.acquire()
    try:
        who.write_text(f"process {os.getpid()} (since {datetime.datetime.now():%H:%M})")
        yield
    finally:
        who.unlink(missing_ok=True)
        lock.release()


def written(all_steps: Sequence[Step]) -> list[Path]:
    """Folders that a run needs alone, in one order for all runs: of its datasets, and of their figures for any RUNS."""
    return sorted({s.folder.root for s in all_steps} | {s.figures for s in all_steps if s.stage.to_figures})


def digests(step: Step, all_steps: Sequence[Step]) -> dict[str, str | None]:
    return {o.label: o.digest() for o in before(step, list(all_steps))}


def plan(project: Project, request: Request) -> list[tuple[Step, list[str]]]:
    """Every step with the reasons why it would run (none = up to date). A step after one that runs, runs."""
    found: list[tuple[Step, list[str]]] = []
    all_steps = list(steps(project, request))
    running: list[Step] = []
    for step in all_steps:
        if not step.notebook.is_file():
            why = ["no such notebook"]
        elif not (why := step.reasons(digests(step, all_steps))):
            why = [f"after {o.label}" for o in before(step, running)][:1]
        running += [step] if why else []
        found.append((step, why))
    return found


def perform(step: Step, upstream: Mapping[str, str | None], stopping: threading.Event, threads: int) -> float:
    """Execute one notebook and record it; returns minutes. execute.Failed leaves neither notebook nor record behind."""
    inputs = step.inputs(upstream)
    step.executed.unlink(missing_ok=True)
    sent, seeds = step.parameters(), step.seeds if step.stage.scope != "dataset" else ()
    env = {INSIDE: "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with record.run_json(step.run_file, inputs, sent, seeds) as made:
        made.threads = threads
        made.peak_mib = execute.run_notebook(step.notebook, step.executed, sent, step.project.root, env, stopping)
        if missing := step.lacks():
            step.executed.replace(kept := execute.failed_path(step.executed))
            raise execute.Failed(
                f"{step.label} ended, but did not write {', '.join(missing)} in {step.base.name}", kept
            )
        made.base = step.base
        made.outputs = [path for matches in step.output_paths().values() for path in matches]
    return record.read_run(step.run_file)["minutes"]


def run(project: Project, request: Request) -> None:
    """Carry out a request: a line when a step begins, one when it has ended; one only for what is up to date."""
    start = time.monotonic()
    planned = plan(project, request)
    all_steps = [step for step, _ in planned]
    if todo := [step for step, why in planned if why]:
        check(project, request, all_steps)
    jobs, threads = schedule.jobs(request, todo), schedule.threads(request, all_steps)
    ended: list[float | BaseException | None] = []  # minutes, or what made it fail, or None: up to date

    def work(step: Step, stopping: threading.Event) -> float | None:
        upstream = digests(step, all_steps)
        if not step.reasons(upstream):
            return None
        print(f"{'':8s}{step.label:34s} ... begun", flush=True)
        return perform(step, upstream, stopping, threads[step.label])

    def told(step: Step, end: float | BaseException | None) -> None:
        ended.append(end)
        text = "up to date" if end is None else f"{end:.1f} min" if isinstance(end, float) else "failed"
        print(f"[{len(ended):2d}/{len(all_steps)}] {step.label:34s} ... {text}", flush=True)

    if jobs > 1:
        print(f"{len(all_steps)} notebooks, up to {jobs} at a time", flush=True)
    with contextlib.ExitStack() as held:
        for folder in written(all_steps):
            held.enter_context(locked(folder))
        schedule.carry_out(all_steps, work, jobs, told)
    ran = sum(took is not None for took in ended)
    print(f"{ran} of {len(all_steps)} ran, {(time.monotonic() - start) / 60:.1f} min")
    for folder in dict.fromkeys(os.path.relpath(s.figures) for s in all_steps if s.stage.to_figures):
        print(f"tables and figures: {folder}")


def inputs(
    stage: str, dataset: str, profile: str, seed: int = 0, data_root: str = "", runs: str = "",
    overrides: Mapping[str, object] | None = None, methods: Sequence[str] = (), seeds: Sequence[int] = (),
    project: Project = PROJECT,
) -> None:  # fmt: skip
    """For a notebook's set-up cell: what `stage` reads is there, is built now (smoke), or FileNotFoundError says how.

    Only looks whether files exist, so what you made by hand in JupyterLab is kept.
    """
    if os.environ.get(INSIDE):
        return  # the run that executes this notebook has seen to it
    wanted = Request(
        profile, (dataset,), tuple(seeds) or (seed,), tuple(methods), data_root=data_root,
        runs=str(paths.runs_root(runs)), overrides=dict(overrides or {}),
    )  # fmt: skip
    every = list(steps(project, wanted))
    read = [other for step in every if step.stage.name == stage for other in before(step, every)]
    names = tuple(dict.fromkeys(step.stage.name for step in read if step.lacks()))
    if not names:
        return
    again = replace(wanted, stages=names)
    missing = f"{stage} reads what {', '.join(names)} make, which is not there yet"
    if profile != "smoke":
        raise FileNotFoundError(f"{missing}. Run: {command(again)}")
    print(f"{missing}: building it now at smoke size, about a minute", flush=True)
    run(project, again)


# --- the other commands ---------------------------------------------------------------------------------------------
def print_plan(project: Project, request: Request) -> None:
    """What would run, and why; Refused, at the end, where `paper` would be refused."""
    planned = plan(project, request)
    for step, why in planned:
        more = f" (and {len(why) - 6} more)" if len(why) > 6 else ""
        print(f"{step.label:34s} {'; '.join(why[:6]) + more if why else 'up to date'}")
    print(f"{sum(bool(why) for _, why in planned)} of {len(planned)} would run", flush=True)
    if any(why for _, why in planned):
        check(project, request, [step for step, _ in planned], "it would be refused:")


def clean(project: Project, request: Request) -> None:
    """Remove the smoke runs and caches. Refused while a smoke run is going on."""
    runs = Path(request.runs)
    for lock in runs.glob("smoke/.*.lock"):
        with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
            continue
        raise Refused(f"a run is working in {lock.with_name(lock.stem[1:])}: let it finish or end it first")
    caches = [project.root / name for name in (".pytest_cache", ".hypothesis")]
    for top in (project.package, project.notebooks, project.root / "tests", project.root / "benchmarks"):
        caches += [d for name in ("__pycache__", ".ipynb_checkpoints") for d in top.rglob(name)]
    for folder in (runs / "smoke", *caches):
        shutil.rmtree(folder, ignore_errors=True)
    left = [os.path.relpath(d) for d in sorted(runs.glob("*/*")) if d.is_dir()] + ["figures", ".venv"]
    print(f"removed {os.path.relpath(runs / 'smoke')} and caches; left alone: {', '.join(left)}")


def write_skeleton(project: Project, request: Request) -> None:
    if len(request.datasets) != 1 or not request.data_root:
        raise Refused("name one dataset and an empty folder: skeleton DATASETS=mimic DATA_ROOT=<folder>")
    try:
        manifest = str(project.manifests / f"{request.datasets[0]}.yaml")
        root = skeleton.write(manifest, Path(request.data_root), request.kind)
    except ValueError as error:
        raise Refused(str(error)) from None
    print(f"phantoms in the layout of {request.datasets[0]}, see README.txt: {root}")


def usage() -> str:
    lines = ["python -m compdiff.run COMMAND [NAME=value ...]", ""]
    lines += [f"  {name:12s} {text}" for name, text in COMMANDS.items()]
    lines += ["", *(f"  {name:12s} {text}" for name, text in VARIABLES.items())]
    dials = ", ".join(name.upper() for name in config.dials())
    every = textwrap.fill(f"and every setting of compdiff/config.py: {dials}", 110, subsequent_indent="  ")
    return "\n".join([*lines, "", every])


def main(words: Sequence[str], project: Project = PROJECT) -> int:
    """Exit code: 0 done, 1 a notebook failed, 2 refused before anything ran, 130 interrupted."""
    name, *rest = words or ["help"]
    if name in ("help", "-h", "--help"):
        print(usage())
        return 0
    try:
        if name not in COMMANDS:
            raise Refused(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
        request = parse(rest, profile="smoke" if name == "smoke" else "demo")
        if request.kind and name != "skeleton":
            raise Refused(f"KIND={request.kind} is a word of skeleton; of real images the manifest says the kind")
        check_names(project, request)
        {"plan": print_plan, "clean": clean, "skeleton": write_skeleton}.get(name, run)(project, request)
    except Refused as error:
        print(f"compdiff: {error}", file=sys.stderr)
        return 2
    except execute.Failed as error:
        further = getattr(error, "__notes__", [])
        print("\n".join([str(error), *further, f"when mended, go on with: {command(request)}"]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nended; what was finished is kept. Go on with: {command(request)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
