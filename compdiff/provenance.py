"""What a folder of tables and figures was made from: its run.json, with one entry for each notebook that ran before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from compdiff import paths, record, sources

TOLD = ("commit", "machine", "minutes", "peak_memory_mib")  # of a notebook that ran before
ENDINGS = (".csv", ".md", ".tex", ".svg", ".png")  # what a notebook writes into a folder of figures


def run_files(root: Path, seeds: Sequence[int]) -> list[Path]:
    """The run.json of every executed notebook below a dataset's run folder, those that serve all seeds first."""
    folders = [Path(root), *(Path(root) / f"seed{s}" for s in seeds)]
    return [file for folder in folders for file in sorted(folder.glob("notebooks/*.run.json"))]


def before(root: Path, seeds: Sequence[int], stage: str) -> dict[str, dict[str, object]]:
    """{"seed0/06_metrics": ...} of every notebook but `stage`: TOLD, its settings, and one hash over its outputs."""
    found = {}
    for file in run_files(root, seeds):
        name, run = file.name.removesuffix(".run.json"), record.read_run(file)
        if run is None or name == stage:
            continue
        settings = {n.removeprefix("setting "): v for n, v in run["inputs"].items() if n.startswith("setting ")}
        label = (file.parent.parent.relative_to(root) / name).as_posix()
        found[label] = {n: run[n] for n in TOLD} | {"settings": settings, "outputs": record.outputs_sha256(run)}
    return found


def begin(out: Path, root: Path, stage: str, parameters: Mapping[str, object], seeds: Sequence[int]) -> record.Run:
    """The record of the folder `out` that notebook `stage` fills from the run folder `root`; `finish` writes it.

    An old run.json goes now, so that none stands beside the figures of a notebook that did not come to its end.
    """
    (Path(out) / "run.json").unlink(missing_ok=True)
    inputs = {"notebook's code": sources.code_sha256(paths.NOTEBOOKS / f"{stage}.ipynb")}
    inputs |= sources.modules(paths.NOTEBOOKS / f"{stage}.ipynb", paths.ROOT / "compdiff")
    return record.Run(Path(out) / "run.json", inputs | {"runs before": before(root, seeds, stage)}, parameters, seeds)


def finish(made: record.Run) -> None:
    """Hash what stands in the folder, and write its run.json."""
    made.outputs = [f for f in sorted(made.base.iterdir()) if f.suffix in ENDINGS and not f.name.startswith(".")]
    made.finish()
