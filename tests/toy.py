"""A throw-away package with four throw-away notebooks behind the real door."""

import signal
import sys
from pathlib import Path

import nbformat

from compdiff import request, run
from compdiff.stages import Project, Stage

MODULES = {
    "__init__": "",
    "ground": '"""Doc."""\nSCALE = 2  # a comment\n',
    "hcn": "from .ground import SCALE\n\n\ndef work(x):\n    return x * SCALE\n",
    "flat": "def work(x):\n    from toy import late\n\n    return late.add(x)\n",
    "late": "import toy.ground\n\n\ndef add(x):\n    return x + toy.ground.SCALE\n",
    "picked": "NAME = 'by name'\n",
}
SET_UP = """\
import os
from pathlib import Path
folder = Path(runs) / profile / dataset
with open(Path(runs) / "executions.txt", "a") as log:
    print("{name}", os.getpid(), file=log)
"""
PARAMETERS = """\
dataset: str = "toy"
profile: str = "smoke"
seed: int = 0
runs: str = ""
overrides: dict = {}
methods: list = []"""
WRITE = """\
target = folder / f"seed{{seed}}" / "{stage}" / "out.txt"
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(f"{{value}}\\n")
"""
SETTINGS = "from compdiff.config import settings\nc = settings(profile, **overrides)"
WRITE_DATA = "folder.mkdir(parents=True, exist_ok=True)\n(folder / 'data.txt').write_text(str(c.data.size))"
READ = "work(int((folder / 'data.txt').read_text()))"
READ_BOTH = "value = [(folder / f'seed{seed}' / n / 'out.txt').read_text() for n in ('hcn', 'flat')]"
CODE = {  # cells after the parameters and SET_UP
    "01_data": [SETTINGS, WRITE_DATA],
    "02_hcn": ["from toy.hcn import work", f"value = {READ}", WRITE.format(stage="hcn")],
    "03_flat": ["from toy.flat import work", f"value = {READ} // 1000", WRITE.format(stage="flat")],
    "04_all": ["import toy.ground", READ_BOTH, WRITE.format(stage="all")],
}
ONCE = ("dataset", "profile", "runs", "overrides")
EACH = (*ONCE, "seed", "methods")
OUT = "seed{seed}/%s/*.txt"
TABLE = (
    Stage("01_data", "dataset", (), ("data.txt",), parameters=ONCE, settings=("data",)),
    Stage("02_hcn", "seed", ("01_data",), (OUT % "hcn",), parameters=EACH, settings=("train",), trains=("hcn",)),
    Stage("03_flat", "seed", ("01_data",), (OUT % "flat",), parameters=EACH, settings=("train",), trains=("flat",)),
    Stage("04_all", "seed", ("02_hcn", "03_flat"), (OUT % "all",), parameters=EACH, loads=("picked",)),
)
ALL = [stage.name for stage in TABLE]


def write_notebook(path, cells):
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    )
    notebook.cells = [nbformat.v4.new_markdown_cell("# A title")] + [nbformat.v4.new_code_cell(c) for c in cells]
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)


def edit_notebook(project, name, before, after):
    path = project.notebooks / f"{name}.ipynb"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def edit_module(project, name, before, after):
    path = project.package / f"{name}.py"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def create(root):
    """A project as after cloning: nothing has run."""
    project = project_at(root)
    for folder in (project.notebooks, project.package, project.manifests):
        folder.mkdir()
    for name, text in MODULES.items():
        (project.package / f"{name}.py").write_text(text)
    (project.manifests / "toy.yaml").write_text("title: Toy\naccess: generated\n")
    (project.manifests / "real.yaml").write_text("title: Real set\naccess: credentialed\nsource: the hospital\n")
    for name, code in CODE.items():
        write_notebook(project.notebooks / f"{name}.ipynb", [PARAMETERS, SET_UP.format(name=name), *code])
    return project


def project_at(root):
    return Project(root, root / "notebooks", root / "toy", root / "manifests", root / "figures", TABLE)


def asked(project, *more):
    """Words for the door; one notebook at a time, in order, unless `more` says JOBS=."""
    return ["DATASETS=toy", f"RUNS={project.root / 'runs'}", "JOBS=1", *more]


def would_run(project, *more):
    """{stage: reasons} of what the door would run now."""
    planned = run.plan(project, request.parse(asked(project, *more), "smoke"))
    return {step.stage.name: why for step, why in planned if why}


def executions(project):
    log = project.root / "runs" / "executions.txt"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def run_file(project, stage, seed=0):
    return project.root / "runs" / "smoke" / "toy" / f"seed{seed}" / "notebooks" / f"{stage}.run.json"


def main(words):
    """The door on the project at words[0], for a process of its own."""
    project = project_at(Path(words[0]))
    return run.main(["smoke", *asked(project, *(w for w in words[1:] if "=" in w))], project)


if __name__ == "__main__":
    background = "background" in sys.argv[2:]  # a script's `command &` starts with Ctrl-C ignored; else: not ignored
    signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
