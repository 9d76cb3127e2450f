"""The door on a throw-away package and throw-away notebooks: what runs again, and what a failure leaves behind."""

import ast
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import nbformat
import pytest

from compdiff import record, request, run, sources, stages
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
PARAMETERS = "dataset: str = 'toy'\nprofile: str = 'smoke'\nseed: int = 0\nruns: str = ''\noverrides: dict = {}\nmethods: list = []"
WRITE = """\
target = folder / f"seed{{seed}}" / "{stage}" / "out.txt"
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(f"{{value}}\\n")
"""
CODE = {
    "01_data": [PARAMETERS, "from compdiff.config import settings\nc = settings(profile, **overrides)", "folder.mkdir(parents=True, exist_ok=True)\n(folder / 'data.txt').write_text(str(c.data.size))"],
    "02_hcn": [PARAMETERS, "from toy.hcn import work", "value = work(int((folder / 'data.txt').read_text()))", WRITE.format(stage="hcn")],
    "03_flat": [PARAMETERS, "from toy.flat import work", "value = work(int((folder / 'data.txt').read_text())) // 1000", WRITE.format(stage="flat")],
    "04_all": [PARAMETERS, "import toy.ground", "value = [(folder / f'seed{seed}' / n / 'out.txt').read_text() for n in ('hcn', 'flat')]", WRITE.format(stage="all")],
}  # fmt: skip
SENT = ("dataset", "profile", "runs", "overrides")
TABLE = (
    Stage("01_data", "dataset", (), ("data.txt",), parameters=SENT, settings=("data",)),
    Stage("02_hcn", "seed", ("01_data",), ("seed{seed}/hcn/*.txt",), parameters=(*SENT, "seed", "methods"), settings=("train",), trains=("hcn",)),
    Stage("03_flat", "seed", ("01_data",), ("seed{seed}/flat/*.txt",), parameters=(*SENT, "seed", "methods"), settings=("train",), trains=("flat",)),
    Stage("04_all", "seed", ("02_hcn", "03_flat"), ("seed{seed}/all/out.txt",), parameters=(*SENT, "seed", "methods"), loads=("picked",)),
)  # fmt: skip
ALL = [stage.name for stage in TABLE]


def write_notebook(path, cells):
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
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


def project_at(root):
    return Project(root, root / "notebooks", root / "toy", root / "manifests", root / "figures", TABLE)


def words(project, *more):
    return ["DATASETS=toy", f"RUNS={project.root / 'runs'}", *more]


def would_run(project, *more):
    """{stage: reasons} of what the door would run now."""
    planned = run.plan(project, request.parse(words(project, *more), "smoke"))
    return {step.stage.name: why for step, why in planned if why}


def executions(project):
    log = project.root / "runs" / "executions.txt"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose four stages have run once, through the door."""
    root = tmp_path_factory.mktemp("finished")
    project = project_at(root)
    for folder in (project.notebooks, project.package, project.manifests):
        folder.mkdir()
    for name, text in MODULES.items():
        (project.package / f"{name}.py").write_text(text)
    (project.manifests / "toy.yaml").write_text("title: Toy\naccess: generated\n")
    (project.manifests / "real.yaml").write_text("title: Real set\naccess: credentialed\nsource: the hospital\n")
    for name, (parameters, *code) in CODE.items():
        write_notebook(project.notebooks / f"{name}.ipynb", [parameters, SET_UP.format(name=name), *code])
    assert run.main(["smoke", *words(project)], project) == 0
    assert executions(project) == ALL
    return project


@pytest.fixture
def project(finished, tmp_path):
    shutil.copytree(finished.root, tmp_path / "copy", symlinks=True)
    copy = project_at(tmp_path / "copy")
    (copy.root / "runs" / "executions.txt").unlink()
    return copy


# --- what runs again ------------------------------------------------------------------------------------------------
def test_nothing_runs_twice(project, capsys):
    start = time.monotonic()
    assert run.main(["smoke", *words(project)], project) == 0
    assert time.monotonic() - start < 10
    assert executions(project) == []
    assert capsys.readouterr().out.count("up to date") == len(ALL)


@pytest.mark.parametrize(
    "module, stale",
    [
        ("hcn", ["02_hcn", "04_all"]),  # relative import
        ("late", ["03_flat", "04_all"]),  # imported by a function of an imported module
        ("ground", ["02_hcn", "03_flat", "04_all"]),
        ("picked", ["04_all"]),  # imported by name at run time
        ("__init__", ["02_hcn", "03_flat", "04_all"]),
    ],
)
def test_an_edited_module_reaches_its_importers_and_their_descendants_only(project, module, stale):
    with open(project.package / f"{module}.py", "a") as file:
        file.write("\nNEW = 1\n")
    found = would_run(project)
    assert list(found) == stale
    assert f"changed: toy/{module}.py" in found[stale[0]]


def test_comments_docstrings_prose_and_outputs_change_nothing(project):
    edit_module(project, "ground", "# a comment", "# another")
    edit_module(project, "ground", '"""Doc."""', '"""Better documented."""\n')
    edit_module(project, "hcn", "    return x", "    # why\n\n    return x")
    edit_notebook(project, "02_hcn", "# A title", "# A better title")
    edit_notebook(project, "02_hcn", "value = work(", "# from the toy package\\nvalue = work(")
    notebook = nbformat.read(project.notebooks / "03_flat.ipynb", 4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    nbformat.write(notebook, project.notebooks / "03_flat.ipynb")
    assert would_run(project) == {}


def test_an_edited_code_cell_is_named(project):
    edit_notebook(project, "03_flat", "// 1000", "// 1001")
    assert would_run(project) == {"03_flat": ["changed: notebook's code"], "04_all": ["after toy seed 0  03_flat"]}


def test_a_setting_reaches_only_the_stages_that_read_it(project):
    found = would_run(project, "STEPS=7")
    assert found["02_hcn"] == ["setting steps: 6 -> 7"] and "01_data" not in found
    assert would_run(project, "SIZE=48")["01_data"] == ["setting size: 32 -> 48"]
    assert would_run(project, "STEPS=6") == {}, "the value that applies anyway"


def test_the_manifest_counts_but_not_its_comments(project):
    with open(project.manifests / "toy.yaml", "a") as file:
        file.write("# a comment\n")
    assert would_run(project) == {}
    with open(project.manifests / "toy.yaml", "a") as file:
        file.write("bins: 3\n")
    assert would_run(project)["01_data"] == ["changed: manifest toy.yaml"]


def test_equal_outputs_stop_the_chain(project):
    edit_module(project, "late", "return x +", "return 1 + x +")  # divided by 1000 the result stays 0
    assert list(would_run(project)) == ["03_flat", "04_all"]
    assert run.main(["smoke", *words(project)], project) == 0
    assert executions(project) == ["03_flat"]
    assert would_run(project) == {}


def run_file(project, stage, seed=0):
    return project.root / "runs" / "smoke" / "toy" / f"seed{seed}" / "notebooks" / f"{stage}.run.json"


def test_a_harmed_output_is_made_again(project):
    output = project.root / "runs/smoke/toy/seed0/hcn/out.txt"
    before = output.read_text()
    output.write_text("other")
    assert would_run(project)["02_hcn"] == ["changed: seed0/hcn/out.txt"]
    output.unlink()
    assert would_run(project)["02_hcn"] == ["missing: seed0/hcn/out.txt"]
    assert run.main(["smoke", *words(project)], project) == 0
    assert output.read_text() == before
    assert executions(project) == ["02_hcn"], "what reads it is up to date: the content is the same again"


# --- failures -------------------------------------------------------------------------------------------------------
def test_a_failing_notebook_stops_the_run_and_leaves_nothing_that_looks_done(project, capfd):
    edit_notebook(project, "03_flat", "value = work(", "\\n1 / 0\\nvalue = work(")
    assert run.main(["smoke", *words(project)], project) == 1
    folder = project.root / "runs/smoke/toy/seed0/notebooks"
    left = sorted(p.name for p in folder.iterdir() if "03_flat" in p.name)
    assert left == ["03_flat.failed.ipynb"]
    told = capfd.readouterr().err
    assert "03_flat.ipynb, cell 5 of 6 (In [5]): 1 / 0" in told and "ZeroDivisionError" in told and "03_flat.failed.ipynb" in told
    assert list(would_run(project)) == ["03_flat", "04_all"]

    edit_notebook(project, "03_flat", "\\n1 / 0\\n", "")
    assert run.main(["smoke", *words(project)], project) == 0
    assert executions(project).count("03_flat") == 2 and "01_data" not in executions(project) and "02_hcn" not in executions(project)
    assert not (folder / "03_flat.failed.ipynb").exists()


def test_a_notebook_that_does_not_write_its_outputs_fails(project, capfd):
    edit_notebook(project, "02_hcn", "out.txt", "elsewhere.csv")
    (project.root / "runs/smoke/toy/seed0/hcn/out.txt").unlink()
    assert run.main(["smoke", *words(project)], project) == 1
    assert "did not write seed0/hcn/*.txt" in capfd.readouterr().err
    assert not run_file(project, "02_hcn").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_run_ends_its_kernel_and_keeps_what_was_finished(project, how):
    edit_notebook(project, "02_hcn", "value = work(", "import time; time.sleep(600)\\nvalue = work(")
    door = start_door(project)
    wait_for(lambda: executions(project) == ["02_hcn"])
    kernel = int((project.root / "runs/executions.txt").read_text().split()[1])
    door.send_signal(how)
    out, err = door.communicate(timeout=120)
    assert door.returncode == (130 if how == signal.SIGINT else -how)
    assert how == signal.SIGKILL or "Go on with: make paper PROFILE=smoke DATASETS=toy" in err
    wait_for(lambda: not alive(kernel))
    assert list(would_run(project)) == ["02_hcn", "04_all"]
    assert not (project.root / "runs/smoke/toy/seed0/notebooks/02_hcn.ipynb").exists()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return open(f"/proc/{pid}/stat").read().split()[2] != "Z" if os.path.exists(f"/proc/{pid}/stat") else True


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# --- two at once ----------------------------------------------------------------------------------------------------
def start_door(project):
    here = str(os.path.dirname(__file__))
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_run as t, pathlib; p = t.project_at(pathlib.Path(sys.argv[2])); sys.exit(t.run.main(['smoke', *t.words(p)], p))"
    return subprocess.Popen([sys.executable, "-c", code, here, str(project.root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_runs_at_once_execute_each_stage_once(project):
    edit_module(project, "hcn", "x * SCALE", "x * SCALE * 3")
    first = start_door(project)
    wait_for(lambda: (project.root / "runs/smoke/toy/.working").exists())
    second = start_door(project)
    outputs = [door.communicate(timeout=240) for door in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert executions(project) == ["02_hcn", "04_all"]
    assert "waiting until process" in outputs[1][0] and outputs[1][0].count("up to date") == len(ALL)


# --- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given, said",
    [
        (["STESP=4"], "closest: STEPS"),
        (["steps=4"], "closest: STEPS"),
        (["STEPS=many"], "is not a int"),
        (["PROFILE=huge"], "unknown profile"),
        (["METHODS=hcm"], "unknown method"),
        (["STAGES=09"], "unknown stage"),
        (["DATASETS=nowhere"], "unknown dataset"),
        (["SEEDS=a"], "SEEDS=a"),
        (["DATASETS=real"], "real needs DATA_ROOT"),
        (["DATASETS=real", "DATA_ROOT=/nowhere/at/all"], "is not a folder. Real set: credentialed; source: the hospital"),
        (["PROFILE=paper"], "BASE="),
    ],
)
def test_refused_before_anything_runs(project, capsys, given, said):
    assert run.main(["paper", *words(project), *given], project) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert executions(project) == []


def test_a_parameter_that_a_notebook_does_not_declare_is_refused(project, capsys):
    edit_notebook(project, "04_all", "overrides: dict = {}", "override: dict = {}")
    edit_module(project, "hcn", "x * SCALE", "x * SCALE * 2")
    assert run.main(["smoke", *words(project)], project) == 2
    assert "04_all.ipynb declares no parameter named overrides" in capsys.readouterr().err
    assert executions(project) == []


def test_make_only_variables_pass_and_values_get_their_types():
    asked = request.parse(["PYTHON=python3", "VENV=", "PIP_ARGS=-q", "STEPS=500", "EMA=false", "TRAINED=unet", "RECIPE=fairdiffusion"], "demo")
    assert asked.overrides == {"steps": 500, "ema": False, "trained": ["unet"], "recipe": "fairdiffusion"}
    make, target, *again = shlex.split(request.command(asked))
    assert (make, target) == ("make", "paper")
    assert request.parse(again, "smoke") == asked, "the command that is printed repeats the request"


def test_every_setting_is_a_variable():
    """One configuration surface: each field of the dataclasses can be set by its name in capitals."""
    from compdiff import config

    for name, part in config.dials().items():
        value = getattr(getattr(config.Config(), part), name)
        text = " ".join(value) if isinstance(value, tuple) else str(value)
        assert config.settings("demo", **request.parse([f"{name.upper()}={text}"], "demo").overrides) == config.Config()


def test_ablation_adds_rows_to_the_chest_phantom_only():
    asked = request.parse(["ABLATION=1"], "demo")
    assert "hcn_no_aux" in asked.methods_of("chest") and "hcn_no_aux" not in asked.methods_of("fundus")


# --- notebooks opened by hand ---------------------------------------------------------------------------------------
def test_a_notebook_opened_first_builds_its_smoke_inputs(project, capsys):
    shutil.rmtree(project.root / "runs" / "smoke")
    runs = str(project.root / "runs")
    run.inputs("02_hcn", "toy", "smoke", runs=runs, methods=["hcn"], project=project)
    assert executions(project) == ["01_data"]
    run.inputs("02_hcn", "toy", "smoke", runs=runs, methods=["hcn"], project=project)
    assert executions(project) == ["01_data"], "there already"
    with pytest.raises(FileNotFoundError, match=r"make paper PROFILE=demo DATASETS=toy SEEDS=3 METHODS=\"hcn flat\" STAGES=\"02_hcn 03_flat\" RUNS="):
        run.inputs("04_all", "toy", "demo", seed=3, runs=runs, methods=["hcn", "flat"], project=project)


def test_inputs_do_nothing_inside_a_run(project, monkeypatch):
    shutil.rmtree(project.root / "runs" / "smoke")
    monkeypatch.setenv(run.INSIDE, "1")
    run.inputs("02_hcn", "toy", "smoke", runs=str(project.root / "runs"), project=project)
    assert executions(project) == []


def test_clean_removes_the_smoke_run_and_keeps_results(project, capsys):
    kept = project.root / "runs" / "demo" / "toy" / "seed0" / "results.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("1")
    (project.package / "__pycache__").mkdir(exist_ok=True)
    with run.locked(project.root / "runs/smoke/toy"):
        assert run.main(["clean", *words(project)], project) == 2, "not under the feet of a run"
    assert (project.root / "runs" / "smoke").exists()
    assert run.main(["clean", *words(project)], project) == 0
    assert kept.exists() and not (project.root / "runs" / "smoke").exists() and not (project.package / "__pycache__").exists()
    assert "left alone" in (said := capsys.readouterr().out) and "demo/toy" in said


# --- provenance -----------------------------------------------------------------------------------------------------
def test_run_json_tells_how_a_stage_was_made(finished):
    known = json.loads(run_file(finished, "02_hcn").read_text())
    assert known["seeds"] == [0] and known["parameters"]["methods"] == ["hcn"]
    assert known["inputs"]["setting steps"] == 6 and len(known["inputs"]["toy/hcn.py"]) == 64
    assert known["versions"]["papermill"] and known["machine"]["cores"] == os.cpu_count()
    assert 20 < known["peak_memory_mib"] < 4000 and known["minutes"] > 0
    output = finished.root / "runs/smoke/toy/seed0/hcn/out.txt"
    listed = known["outputs"]["seed0/hcn/out.txt"]["sha256"]
    assert listed == subprocess.run(["sha256sum", str(output)], capture_output=True, text=True).stdout.split()[0]


def test_run_json_holds_no_place_and_no_person(finished):
    text = run_file(finished, "02_hcn").read_text()
    for private in (str(finished.root), os.path.expanduser("~") + "/", os.uname().nodename):
        assert private not in text


def test_a_failed_block_leaves_no_run_json(tmp_path):
    with record.run_json(tmp_path, {"a": 1}) as made:
        (tmp_path / "x.txt").write_text("x")
        made.outputs.append(tmp_path / "x.txt")
    assert record.is_current(tmp_path, {"a": 1}) and not record.is_current(tmp_path, {"a": 2})
    with pytest.raises(ZeroDivisionError), record.run_json(tmp_path, {"a": 1}):
        1 / 0
    assert not record.is_current(tmp_path, {"a": 1}) and not (tmp_path / "run.json").exists()


def test_an_output_is_compared_by_content_and_not_by_time(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("same")
    known = record.fingerprint(file)
    os.utime(file, ns=(1, 1))
    assert record.unchanged(file, known)
    file.write_text("else")
    assert not record.unchanged(file, known)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"123")
    known = record.fingerprint(tmp_path / "images")
    (tmp_path / "images" / "1.png").write_bytes(b"12")
    assert not record.unchanged(tmp_path / "images", known)


# --- imports ----------------------------------------------------------------------------------------------------------
def test_all_forms_of_import_are_found():
    code = textwrap.dedent("""
        import pkg.a, json
        from pkg import b as other
        from pkg.sub.c import thing
        from . import d
        from .e import x
        from ..f import y
        def later():
            import pkg.g
            from importlib import import_module
            import_module("pkg.h")
        from elsewhere import pkg
    """)
    found = sources.imported(ast.parse(code), "pkg", "pkg.sub")
    assert {"pkg.a", "pkg.b", "pkg.sub.c", "pkg.sub.d", "pkg.sub.e", "pkg.f", "pkg.g", "pkg.h"} <= found
    assert not any(name.startswith(("json", "elsewhere", "importlib")) for name in found)


def test_lines_of_ipython_do_not_hide_imports(tmp_path):
    write_notebook(tmp_path / "n.ipynb", ["x = 1", "%matplotlib inline\nif x:\n    !ls\nimport toy.ground", "%%bash\nls $HOME"])
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "ground.py").write_text("A = 1")
    assert list(sources.modules(tmp_path / "n.ipynb", tmp_path / "toy")) == ["toy/ground.py"]


def test_seeds_and_scopes():
    asked = replace(request.Request(), datasets=("chest",), seeds=(0, 1), methods=("text", "flat"))
    labels = [step.label for step in stages.steps(Project(), asked)]
    assert labels[0] == "chest  01_data_prep" and labels[-1] == "chest  08_figures"
    assert labels.count("chest seed 1  03_train_baselines") == 1
    assert not any("02_train_hcn" in label or "04" in label for label in labels), "no method of theirs was asked for"
    last = list(stages.steps(Project(), asked))[-1]
    read = {o.label for o in stages.before(last, list(stages.steps(Project(), asked)))}
    assert {"chest seed 0  06_metrics", "chest seed 1  06_metrics", "chest  01_data_prep"} <= read
