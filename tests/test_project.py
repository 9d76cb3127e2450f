"""The project as a whole: layers, packages, make targets, and nothing in git that belongs to one machine."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from compdiff import config, execute, methods, paths, sources, stages

# Imports point to the same row or to one above it (tests/test_project.py is where a new module is declared).
LAYERS = {
    "ground": {"paths", "config", "attributes", "record", "sources", "devices", "budget", "sharded", "progress"},
    "data": {
        "raster", "painters", "phantoms", "estimate", "problems", "pictures", "columns", "manifests", "sheet", "nih",
        "parts", "adapters", "cohorts", "prompts", "shards", "datasheet", "datasets", "skeleton", "heart", "cardiac",
        "cardiac_manifest", "cardiac_views", "cardiac_files", "cardiac_cohorts",
    },
    "model": {
        "interfaces", "auxiliary", "diffusion", "optim", "reference", "hcn", "flat", "fairdiffusion", "latents", "controlnet",
    },
    "run": {"checkpoint", "train", "methods", "untrained", "base", "strategies", "sample", "export", "cardiac_models", "augment"},
    "judge": {
        "features", "weights", "backbones", "inception", "judges", "memorisation", "stats", "clouds", "significance", "scores", "metrics",
        "fairness", "networks", "classify", "downstream", "evaluate", "controls", "alignment", "paired", "outcomes", "comparisons",
        "thumbnails", "galleries", "frames", "dials", "published", "tables", "rendering", "unseen", "probes", "probe_report", "gates", "report",
        "provenance", "readme", "plots", "plots_data", "plots_lesson", "plots_pictures", "plots_training", "plots_results",
        "plots_groups", "plots_downstream", "segment", "faithful", "heart_classify", "heart_fairness", "heart_report", "plots_heart",
    },
    "door": {"request", "stages", "schedule", "execute", "run", "launch", "studio", "stamp", "masks", "heart_studio", "widgets", "app"},
}  # fmt: skip
# The only modules that import diffusers and transformers.
OPENED = {"diffusion", "untrained", "base", "controlnet"}
DOORS = {"diffusers": OPENED, "transformers": OPENED | {"networks"}}
FOLDERS = {"notebooks", "compdiff", "data_manifests", "figures", "tests", "docs", "benchmarks", ".ci"}
FILES = {"README.md", "Makefile", "pyproject.toml", "requirements.txt", "requirements-app.txt", "environment.yml", "LICENSE", "CITATION.cff"}
PACKAGE_OF = {
    "sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "mpl_toolkits": "matplotlib",
    "websocket": "websocket-client", "IPython": "ipython", "xdist": "pytest-xdist",
}  # fmt: skip
MODULES = sorted((paths.ROOT / "compdiff").glob("*.py"))
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))


def git(*words):
    return subprocess.run(["git", "-C", str(paths.ROOT), *words], capture_output=True, text=True, check=True).stdout


def tracked():
    """Files that git has or would take."""
    return [
        paths.ROOT / f
        for f in git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
        if (paths.ROOT / f).is_file()
    ]


def imports(path):
    """Package modules of ours that a file names, at any depth of the code."""
    found = sources.imported(ast.parse(path.read_text()), "compdiff", "compdiff")
    return {
        name.split(".")[1]
        for name in found
        if "." in name and (paths.ROOT / "compdiff" / f"{name.split('.')[1]}.py").exists()
    }


# --- layers -----------------------------------------------------------------------------------------------------------
def test_every_module_has_a_layer():
    assert {p.stem for p in MODULES} - {"__init__"} <= set().union(*LAYERS.values())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    level = {name: i for i, row in enumerate(LAYERS.values()) for name in row}
    wrong = {n for n in imports(path) if level[n] > level.get(path.stem, -1)}
    assert not wrong, f"{path.name} imports {wrong} from a later layer"


def test_imports_form_no_circle():
    graph = {p.stem: imports(p) for p in MODULES}
    while ends := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in ends:
            del graph[name]
    assert not graph, f"circular imports among {sorted(graph)}"


def third_party(path):
    """First names of the packages that a Python file or a notebook imports, without ours and the standard library."""
    texts = sources.code_cells(path) if path.suffix == ".ipynb" else [path.read_text()]
    names = set()
    for node in (
        n
        for text in texts
        for n in ast.walk(ast.parse(sources.without_magics(text) if path.suffix == ".ipynb" else text))
    ):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    own = {"compdiff"} | {p.stem for folder in ("tests", "benchmarks") for p in (paths.ROOT / folder).glob("*.py")}
    return names - own - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [*MODULES, *NOTEBOOKS], ids=lambda p: p.stem)
def test_diffusers_stays_behind_one_door(path):
    assert not {p for p in third_party(path) & set(DOORS) if path.stem not in DOORS[p]}


# --- stages and notebooks -----------------------------------------------------------------------------------------
def test_stage_table_covers_methods_and_modules():
    trained = [m for stage in stages.STAGES for m in stage.trains]
    assert sorted(trained) == sorted(config.METHODS), "each method is trained by exactly one stage"
    for stage in stages.STAGES:
        used = [config.METHODS[m] for m in stage.trains]
        by_name = {methods.CONDITIONERS[m.conditioner][0] for m in used if m.conditioner != "none"}
        by_name |= {methods.REWEIGHTER[0]} if any(m.fair for m in used) else set()
        assert {f"compdiff.{name}" for name in stage.loads} == by_name or not stage.trains, stage.name
    names = [stage.name for stage in stages.STAGES]
    assert all(names.index(before) < names.index(stage.name) for stage in stages.STAGES for before in stage.after)


def test_every_stage_has_its_notebook():
    assert {stage.name for stage in stages.STAGES} <= {p.stem for p in NOTEBOOKS}


def test_hcn_is_no_input_of_the_baselines():
    """An edit of hcn.py leaves data preparation and the baselines alone."""
    table = {stage.name: stage for stage in stages.STAGES}
    for name, uses in (
        ("01_data_prep", False),
        ("02_train_hcn", True),
        ("03_train_baselines", False),
        ("04_fairdiffusion", True),
    ):
        found = sources.modules(paths.NOTEBOOKS / f"{name}.ipynb", paths.ROOT / "compdiff", table[name].loads)
        assert ("compdiff/hcn.py" in found) == uses, name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_declares_what_the_door_sends(path):
    stage = {s.name: s for s in stages.STAGES}[path.stem]
    assert set(stage.parameters) <= set(execute.declared(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_keeps_small_outputs_and_golden_cells(path):
    assert path.stat().st_size <= 300_000
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    golden = [
        c for c in cells if "NBVAL_CHECK_OUTPUT" in c.source or "nbval-check-output" in c.metadata.get("tags", [])
    ]
    assert golden and all(c.outputs and c.execution_count for c in golden), (
        "a golden cell without output checks nothing"
    )
    assert not any(o.output_type == "error" for c in cells for o in c.outputs)


# --- packages -------------------------------------------------------------------------------------------------------
def pinned(lines):
    """{package: version} of requirement lines; anything but an exact pin is an error."""
    found = {}
    for line in (text.split("#")[0].strip() for text in lines):
        if line:
            requirement = Requirement(line)
            (only,) = requirement.specifier
            assert only.operator == "==", f"{line} is not an exact version"
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} stands twice"
            found[name] = only.version
    return found


def requirements(name="requirements.txt"):
    return pinned((paths.ROOT / name).read_text().splitlines())


def test_environment_and_project_file_agree_with_the_requirements():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    lines = []
    for entry in pip:
        included = re.fullmatch(r"-r (\S+)", entry)
        lines += (paths.ROOT / included[1]).read_text().splitlines() if included else [entry] if entry != "-e ." else []
    assert pinned(lines) == requirements()
    python = [d.split("=")[1] for d in conda if d.startswith("python=")]
    assert project["project"]["requires-python"] == f">={python[0]}"
    others = {d.split("=")[0] for d in conda} - {"python", "pip"}
    assert not others & set(requirements()), "a package comes from conda or from pip, not from both"
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}


def test_every_import_is_a_pinned_package():
    files = [f for f in tracked() if f.suffix in (".py", ".ipynb")]
    used = {canonicalize_name(PACKAGE_OF.get(n, n)) for f in files for n in third_party(f)}
    known = set(requirements()) | set(requirements("requirements-app.txt"))
    assert used and used <= known, f"not in requirements.txt: {sorted(used - known)}"


def test_the_apps_packages_are_pinned_whole_and_none_twice():
    """They are installed with --no-deps, so what they need must stand in one of the two files."""
    own, others = requirements("requirements-app.txt"), requirements()
    assert not set(own) & set(others)
    lacking = set()
    for name in own:
        try:
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue  # not installed here
        lacking |= {canonicalize_name(r.name) for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert lacking <= set(own) | set(others)


def test_what_is_installed_is_what_is_pinned():
    odd = {n: metadata.version(n) for n in ("torch", "diffusers", "transformers", "numpy", "papermill", "pytest")}
    assert {n: v.split("+")[0] for n, v in odd.items()} == {n: requirements()[n] for n in odd}


# --- the repository ---------------------------------------------------------------------------------------------------
def test_top_level_stays_small():
    assert {f.relative_to(paths.ROOT).parts[0] for f in tracked()} <= FOLDERS | FILES | {".gitignore"}


def test_nothing_in_git_names_a_machine_or_a_registry_host():
    places = r"/(?:home|Users|root)/\w|/(?:work|farm|tmp|opt)/(?:main|shared|build|wheels|pypi)"
    hosts = r"pypi\.org|pythonhosted|download\.pytorch|artifactory|-index-url\s+http"
    pattern = re.compile(f"{places}|{hosts}")
    texts = [
        f
        for f in tracked()
        if f.suffix in {".py", ".ipynb", ".md", ".txt", ".toml", ".yml", ".yaml", ".cff", ".csv", ".json", ""}
    ]
    assert len(texts) > 10
    found = [f"{f.name}: {m[0]}" for f in texts if f.name != "test_project.py" for m in pattern.finditer(f.read_text())]
    assert not found, found


def test_no_large_file_in_git():
    large = {f.relative_to(paths.ROOT).as_posix(): f.stat().st_size for f in tracked() if f.stat().st_size > 2**20}
    assert all(name.startswith("compdiff/tiny_base/") for name in large) and sum(large.values()) <= 16 * 2**20, large


def clean_environment():
    return {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}


def make(*words):
    return subprocess.run(
        ["make", *words], cwd=paths.ROOT, env=clean_environment(), capture_output=True, text=True, check=True
    ).stdout


def test_help_lists_every_target():
    text = (paths.ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    shown = re.findall(r"^  make (\w+)  +\S", make(), re.M)
    assert sorted(shown) == sorted(targets.split()) and len(shown) >= 9


@pytest.mark.parametrize("target", ["paper", "smoke", "plan"])
def test_make_hands_its_variables_on(target):
    shown = make("-n", target, "VENV=", "STEPS=500", "DATASETS=chest fundus", "PIP_ARGS=-q")
    (line,) = [line for line in shown.splitlines() if "compdiff.run" in line]
    words = shlex.split(line)
    assert words[words.index("compdiff.run") + 1] == target
    assert {"STEPS=500", "DATASETS=chest fundus"} <= set(words)
    assert "venv" not in shown.lower().replace("venv=", "") and "pip install" not in shown, "VENV= installs nothing"


def test_setup_runs_once_for_parallel_targets():
    shown = make("-n", "-j4", "paper", "smoke", "VENV=no-such-folder", "PYTHON=python3")
    assert shown.count("-r requirements.txt") >= 1
    assert len([line for line in shown.splitlines() if "pip install" in line and "-r requirements.txt" in line]) == 1


def test_citation_names_the_three_papers():
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())
    titles = [r["title"].split(":")[0] for r in citation["references"]]
    assert titles[:2] == ["CompDiff", "FairDiffusion"] and "Cardiac MRI" in titles[2]
    assert all(r["authors"] and r["year"] for r in citation["references"])
    assert citation["license"] == "MIT" and (paths.ROOT / "LICENSE").read_text().startswith("MIT License")
