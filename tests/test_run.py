"""The door on a throw-away package and throw-away notebooks: what runs again, and what a failure leaves behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import toy
from filelock import FileLock
from toy import ALL, asked, edit_module, edit_notebook, executions, run_file, would_run

from compdiff import record, request, run, schedule, stages
from compdiff.config import settings

PATIENCE = 300  # seconds for what takes about ten on an idle machine


# --- what runs again ------------------------------------------------------------------------------------------------
def test_nothing_runs_twice(project, capsys):
    start = time.process_time()
    assert run.main(["smoke", *asked(project)], project) == 0
    assert time.process_time() - start < 10
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
    now = settings("smoke")
    steps, size = now.train.steps, now.data.size
    found = would_run(project, f"STEPS={steps + 1}")
    assert found["02_hcn"] == [f"setting steps: {steps} -> {steps + 1}"] and "01_data" not in found
    assert would_run(project, f"SIZE={size + 16}")["01_data"] == [f"setting size: {size} -> {size + 16}"]
    assert would_run(project, f"STEPS={steps}") == {}, "the value that applies anyway"


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
    assert run.main(["smoke", *asked(project)], project) == 0
    assert executions(project) == ["03_flat"]
    assert would_run(project) == {}


def test_a_harmed_output_is_made_again(project):
    output = project.root / "runs/smoke/toy/seed0/hcn/out.txt"
    before = output.read_text()
    output.write_text("other")
    assert would_run(project)["02_hcn"] == ["changed: seed0/hcn/out.txt"]
    output.unlink()
    assert would_run(project)["02_hcn"] == ["missing: seed0/hcn/out.txt"]
    assert run.main(["smoke", *asked(project)], project) == 0
    assert output.read_text() == before
    assert executions(project) == ["02_hcn"], "what reads it is up to date: the content is the same again"


def test_files_of_other_runs_are_inputs_of_the_figures(tmp_path):
    """Notebook 08 draws the runs of other dials: those of its own profile, dataset and seeds."""
    wanted = request.Request(profile="demo", datasets=("chest",), seeds=(0, 1), runs=str(tmp_path))

    def seen():
        step = next(s for s in stages.steps(stages.PROJECT, wanted) if s.stage.name == "08_figures")
        return {n: v for n, v in step.inputs({}).items() if n.startswith("other run")}

    assert seen() == {}
    for name in ("dial0/demo/chest/data/index.json", "dial0/demo/chest/seed1/results/06_metrics.csv",
                 "dial0/demo/chest/seed2/results/06_metrics.csv", "dial0/smoke/chest/seed1/results/06_metrics.csv",
                 "demo/chest/seed1/results/06_metrics.csv"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before = seen()
    files = ("data/index.json", "seed1/results/06_metrics.csv")
    assert set(before) == {f"other run dial0/demo/chest/{f}" for f in files}
    (tmp_path / "dial0/demo/chest/seed1/results/06_metrics.csv").write_text("2")
    after = seen()
    assert [n for n in before if before[n] != after[n]] == ["other run dial0/demo/chest/seed1/results/06_metrics.csv"]


# --- failures -------------------------------------------------------------------------------------------------------
def test_a_failing_notebook_stops_the_run_and_leaves_nothing_that_looks_done(project, capfd):
    edit_notebook(project, "03_flat", "value = work(", "\\n1 / 0\\nvalue = work(")
    assert run.main(["smoke", *asked(project)], project) == 1
    folder = project.root / "runs/smoke/toy/seed0/notebooks"
    left = sorted(p.name for p in folder.iterdir() if "03_flat" in p.name)
    assert left == ["03_flat.failed.ipynb"]
    told = capfd.readouterr().err
    assert (
        "03_flat.ipynb, cell 5 of 6 (In [5]): 1 / 0" in told
        and "ZeroDivisionError" in told
        and "03_flat.failed.ipynb" in told
    )
    assert list(would_run(project)) == ["03_flat", "04_all"]

    edit_notebook(project, "03_flat", "\\n1 / 0\\n", "")
    assert run.main(["smoke", *asked(project)], project) == 0
    assert (
        executions(project).count("03_flat") == 2
        and "01_data" not in executions(project)
        and "02_hcn" not in executions(project)
    )
    assert not (folder / "03_flat.failed.ipynb").exists()


def test_a_kernel_that_dies_is_told_from_an_error(project, capfd):
    edit_notebook(project, "02_hcn", "value = work(", "os.kill(os.getpid(), 9)\\nvalue = work(")
    assert run.main(["smoke", *asked(project)], project) == 1
    assert "02_hcn.ipynb: the kernel died, most often because memory ran out (try JOBS=1," in capfd.readouterr().err
    assert list(would_run(project)) == ["02_hcn", "04_all"]


def test_a_notebook_that_does_not_write_its_outputs_fails(project, capfd):
    edit_notebook(project, "02_hcn", "out.txt", "elsewhere.csv")
    (project.root / "runs/smoke/toy/seed0/hcn/out.txt").unlink()
    assert run.main(["smoke", *asked(project)], project) == 1
    assert "did not write seed0/hcn/*.txt" in capfd.readouterr().err
    assert not run_file(project, "02_hcn").exists()


DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # like a kernel deep in C code


@pytest.mark.parametrize(
    "how, words, cell",
    [(signal.SIGINT, [], ""), (signal.SIGINT, [], DEAF), (signal.SIGKILL, [], ""), (signal.SIGKILL, ["background"], "")],
)
def test_an_ended_run_ends_its_kernel_and_keeps_what_was_finished(project, how, words, cell):
    edit_notebook(project, "02_hcn", "value = work(", cell + "import time; time.sleep(600)\\nvalue = work(")
    door = start_door(project, *words)
    wait_for(lambda: executions(project) == ["02_hcn"])
    kernel = int((project.root / "runs/executions.txt").read_text().split()[1])
    door.send_signal(how)
    out, err = door.communicate(timeout=PATIENCE)
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


def wait_for(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# --- two at once ----------------------------------------------------------------------------------------------------
def start_door(project, *how):
    words = [sys.executable, toy.__file__, str(project.root), *how]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_runs_at_once_execute_each_stage_once(project):
    edit_module(project, "hcn", "x * SCALE", "x * SCALE * 3")
    hold = "import time, pathlib; [time.sleep(0.05) for _ in range(4000) if not pathlib.Path(runs, 'go').exists()]"
    edit_notebook(project, "02_hcn", "value = work(", f"{hold}\\nvalue = work(")
    first = start_door(project)
    wait_for(lambda: executions(project) == ["02_hcn"])
    second = start_door(project)
    assert second.stdout.readline().startswith(f"waiting until process {first.pid} ")
    (project.root / "runs/go").touch()
    outputs = [door.communicate(timeout=PATIENCE) for door in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert executions(project) == ["02_hcn", "04_all"]
    assert outputs[1][0].count("up to date") == len(ALL)


def test_who_works_may_have_ended_before_its_name_is_read(tmp_path, monkeypatch):
    other, said = FileLock(tmp_path / ".toy.lock"), []
    other.acquire()
    monkeypatch.setattr("builtins.print", lambda text, **_: (said.append(text), other.release()))
    with run.locked(tmp_path / "toy"):
        assert said[0].startswith("waiting until another run has finished in ")
        assert (tmp_path / ".toy.working").exists()
    assert not (tmp_path / ".toy.working").exists()


def test_runs_that_write_the_same_figures_wait_for_each_other(tmp_path):
    def folders(**asked):
        return set(run.written(list(stages.steps(stages.PROJECT, request.Request(**asked)))))

    demo, paper = folders(runs=str(tmp_path / "a")), folders(runs=str(tmp_path / "a"), profile="paper")
    figures = {stages.PROJECT.figures / name for name in ("chest", "fundus")}
    assert demo == figures | {tmp_path / "a/demo/chest", tmp_path / "a/demo/fundus"}
    assert demo & folders(runs=str(tmp_path / "b")) == figures == demo & paper
    assert not demo & folders(runs=str(tmp_path / "a"), profile="smoke"), "a smoke run keeps its figures to itself"
    assert not demo & folders(runs=str(tmp_path / "b"), stages=("06_metrics",)), "no figures are made"


# --- side by side ---------------------------------------------------------------------------------------------------
MEET = "import time, pathlib; pathlib.Path(runs, '{mine}').touch(); "
MEET += "[time.sleep(0.05) for _ in range(4000) if not pathlib.Path(runs, '{other}').exists()]; "
MEET += "assert pathlib.Path(runs, '{other}').exists()\\n"


def test_two_notebooks_run_at_once_when_neither_reads_the_other(project, capsys):
    """Each waits for the other to begin: one after the other they would fail."""
    for mine, other in (("02_hcn", "03_flat"), ("03_flat", "02_hcn")):
        edit_notebook(project, mine, "value = work(", MEET.format(mine=mine, other=other) + "value = work(")
    assert run.main(["smoke", *asked(project, "JOBS=2")], project) == 0
    assert sorted(executions(project)) == ["02_hcn", "03_flat"], "their outputs are the same, so 04_all need not run"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 notebooks, up to 2 at a time" and lines[-1].startswith("2 of 4 ran")
    begun = [line.split("...")[0].strip() for line in lines if line.endswith("... begun")]
    assert sorted(begun) == ["toy seed 0  02_hcn", "toy seed 0  03_flat"]
    ends = [re.fullmatch(r"\[ (\d)/4\] (toy .*?\S) +\.\.\. (up to date|\d\.\d min)", line) for line in lines]
    assert [end[1] for end in ends if end] == ["1", "2", "3", "4"], lines
    assert sorted(end[2] for end in ends if end and "min" in end[3]) == sorted(begun)


def test_a_failure_lets_the_notebook_beside_it_end_and_begins_nothing_new(project):
    failed = "pathlib.Path(runs, 'smoke/toy/seed0/notebooks/03_flat.failed.ipynb')"
    hold = f"import time, pathlib; [time.sleep(0.05) for _ in range(4000) if not {failed}.exists()]; time.sleep(1)"
    edit_notebook(project, "02_hcn", "value = work(", f"{hold}\\nvalue = 1 + work(")
    edit_notebook(project, "03_flat", "value = work(", "\\n1 / 0\\nvalue = work(")
    door = start_door(project, "JOBS=2")
    out, err = door.communicate(timeout=PATIENCE)
    assert door.returncode == 1, err
    assert "In [5]): 1 / 0" in err and "03_flat.failed.ipynb" in err
    told = [line.split("]")[-1].split() for line in out.splitlines()]
    assert "toy seed 0 03_flat ... failed".split() in told
    assert "nothing new begins; 1 notebook still at work (Ctrl-C ends them)".split() in told
    assert list(would_run(project)) == ["03_flat", "04_all"], "02_hcn is kept"
    assert "04_all" not in executions(project)


def test_ctrl_c_again_and_again_frees_nothing_while_a_notebook_works(project):
    """Both kernels are deaf, so that ending them takes long enough for many more; none may catch a thread's lock."""
    for name in ("02_hcn", "03_flat"):
        edit_notebook(project, name, "value = work(", DEAF + "import time; time.sleep(600)\\nvalue = work(")
    door = start_door(project, "JOBS=2")
    wait_for(lambda: len(executions(project)) == 2)
    time.sleep(1)  # until they are deaf, in the next cell
    door.send_signal(signal.SIGINT)
    while "ending 2 notebooks, up to 10 s" not in (line := door.stdout.readline()):
        assert line, "the door ended without a word"
    for _ in range(300):
        door.send_signal(signal.SIGINT)
        time.sleep(0.005)
    kernels = [int(line.split()[1]) for line in (project.root / "runs/executions.txt").read_text().splitlines()]
    with FileLock(project.root / "runs/smoke/.toy.lock"):
        wait_for(lambda: not any(alive(kernel) for kernel in kernels), 1)
    err = door.communicate(timeout=PATIENCE)[1]
    assert door.returncode == 130 and "Traceback" not in err and "Go on with: make paper" in err
    assert list(would_run(project)) == ["02_hcn", "03_flat", "04_all"]


def real_steps(**asked):
    wanted = request.Request(**asked)
    return wanted, list(stages.steps(stages.PROJECT, wanted))


def test_further_failures_are_named():
    _, every = real_steps(datasets=("chest",))
    meet, begun, told = threading.Barrier(3), [], []

    def work(step, _):
        begun.append(step.stage.name)
        if step.stage.name != "01_data_prep":
            meet.wait(PATIENCE)
            if step.stage.name != "04_fairdiffusion":
                raise ValueError(step.stage.name)
        return "done"

    with pytest.raises(ValueError) as caught:
        schedule.carry_out(every, work, 3, lambda step, end: told.append((step.stage.name, str(end))))
    names = {"02_train_hcn", "03_train_baselines"}
    assert {str(caught.value)} | {note.removeprefix("failed too: ") for note in caught.value.__notes__} == names
    assert sorted(begun) == ["01_data_prep", "02_train_hcn", "03_train_baselines", "04_fairdiffusion"]
    assert dict(told) == {name: name if name in names else "done" for name in begun}


def test_threads_follow_from_the_request_alone(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def threads(**asked):
        found = schedule.threads(*real_steps(datasets=("chest",), **asked))
        return {label.split()[-1][:2]: n for label, n in found.items()}

    alone = dict.fromkeys(("01", "05", "08"), 0)
    assert threads() == alone | {"02": 2, "03": 2, "04": 2, "06": 4, "07": 4}, "three trainings share eight cores"
    assert threads(seeds=(0, 1)) == {"01": 0, "02": 1, "03": 1, "04": 1, "05": 4, "06": 2, "07": 2, "08": 0}
    assert threads(jobs=2) == alone | dict.fromkeys(("02", "03", "04", "06", "07"), 4)
    assert set(threads(jobs=1).values()) == set(threads(profile="paper").values()) == {0}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert set(threads().values()) == {0}, "as the environment says"


def test_a_training_that_goes_on_has_the_threads_that_it_began_with(project, monkeypatch, capsys):
    """The one beside it is done already: one notebook at a time, on the share that it had."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    edit_notebook(project, "02_hcn", "value = work(", "assert os.environ['OMP_NUM_THREADS'] == '3'\\nvalue = work(")
    assert run.main(["smoke", *asked(project, "JOBS=2")], project) == 0
    assert record.read_run(run_file(project, "02_hcn"))["machine"]["threads"] == 3
    assert executions(project) == ["02_hcn"] and "at a time" not in (said := capsys.readouterr().out)
    assert said.count("... begun") == 1, "what is up to date does not begin"


def test_as_many_at_a_time_as_there_are_cores_memory_and_work(monkeypatch):
    free = SimpleNamespace(available=100 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    asked, every = real_steps(datasets=("chest", "fundus"), seeds=(0, 1))
    assert schedule.jobs(asked, every) == 8
    assert schedule.jobs(asked, [s for s in every if s.stage.name == "05_generation"]) == 4
    assert schedule.jobs(asked, []) == 1, "nothing to do"
    for gib, jobs in ((4, 2), (0.5, 1)):
        free.available = int(gib * 2**30)
        assert schedule.jobs(asked, every) == jobs
    assert schedule.jobs(real_steps(jobs=5)[0], every) == 5, "as asked, whatever the memory"
    free.available = 100 * 2**30
    assert schedule.jobs(real_steps(profile="paper")[0], every) == 1


@pytest.mark.parametrize("jobs", [1, 2, 5, 50])
def test_no_step_begins_before_what_it_reads_has_ended(jobs):
    """The real stage table, with work that only notes when it begins and ends."""
    every = list(stages.steps(stages.PROJECT, request.Request(datasets=("chest", "cardiac", "fundus"), seeds=(0, 1))))
    begun, ended, most = [], [], []

    def work(step, _):
        begun.append(step.label)
        assert {o.label for o in stages.before(step, every)} <= set(ended), step.label
        most.append(len(begun) - len(ended))
        time.sleep(0.01)
        ended.append(step.label)

    schedule.carry_out(every, work, jobs, lambda step, _: None)
    assert sorted(ended) == sorted(step.label for step in every)
    assert max(most) <= jobs and (jobs == 1 or max(most) > 1)
    if jobs == 1:
        order = [label.split()[-1][:2] for label in begun]
        assert order.index("05") > max(i for i, stage in enumerate(order) if stage in ("02", "03", "04"))
    assert schedule.widest(every) == 2 * 2 * 3 + 1, "three trainings for two seeds of two datasets, and the report on hearts"
