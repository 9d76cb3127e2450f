"""What a person may ask for: refusals before anything runs, one name for each setting, notebooks opened by hand."""

import shlex
import shutil
from dataclasses import replace

import pytest
from toy import asked, edit_module, edit_notebook, executions

from compdiff import config, launch, request, run, stages
from compdiff.stages import Project


# --- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given, said",
    [
        (["STESP=4"], "closest: STEPS"),
        (["steps=4"], "closest: STEPS"),
        (["STEPS=many"], "is not a int"),
        (["PROFILE=huge"], "unknown profile"),
        (["METHODS=hcm"], "unknown method"),
        (["STRATEGIES=9z"], "unknown strategy"),
        (["STAGES=09"], "unknown stage"),
        (["DATASETS=nowhere"], "unknown dataset"),
        (["SEEDS=a"], "SEEDS=a"),
        (["DATASETS=real"], "real needs DATA_ROOT"),
        (
            ["DATASETS=real", "DATA_ROOT=/nowhere/at/all"],
            "is not a folder. Real set: credentialed; source: the hospital",
        ),
        (["PROFILE=paper"], "BASE="),
    ],
)
def test_refused_before_anything_runs(project, capsys, given, said):
    assert run.main(["paper", *asked(project), *given], project) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert executions(project) == []


def test_plan_ends_with_what_would_be_refused(project, capsys):
    assert run.main(["plan", *asked(project), "DATASETS=real"], project) == 2
    out, err = capsys.readouterr()
    assert out.count("not finished before") == 4 and out.endswith("4 of 4 would run\n")
    assert "it would be refused:" in err and "real needs DATA_ROOT" in err
    assert run.main(["plan", *asked(project)], project) == 0, "generated data need nothing"
    assert run.main(["plan", *asked(project), "PROFILE=smoke"], project) == 0
    assert capsys.readouterr().out.endswith("0 of 4 would run\n") and executions(project) == []


@pytest.mark.parametrize(
    "dataset, file, said",
    [
        ("chest", "", "PROMPTS_FILE=mine.csv: there is no such file"),
        ("chest", "a heart,40-60,female,Asian,2", "PROMPTS_FILE for chest: mine.csv, line 2: "),
        ("nih", "a heart,40-60,Female,Asian,2", "PROMPTS_FILE for nih: mine.csv lacks the columns view"),
        ("cardiac", "a heart,40-60,Female,Asian,2", "not for cardiac"),
    ],
)
def test_a_prompts_file_is_read_before_anything_runs(tmp_path, monkeypatch, capsys, dataset, file, said):
    monkeypatch.chdir(tmp_path)
    if file:
        (tmp_path / "mine.csv").write_text(f"prompt,age,sex,race,repeats\n{file}\n")
    assert run.main(["plan", f"DATASETS={dataset}", "PROMPTS_FILE=mine.csv", f"RUNS={tmp_path}"]) == 2
    assert said in capsys.readouterr().err


def test_a_prompts_file_is_an_input_of_the_generation_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("one")
    asked_for = request.parse(["DATASETS=chest", "PROMPTS_FILE=mine.csv", f"RUNS={tmp_path}"], "smoke")
    assert f"PROMPTS_FILE={tmp_path / 'mine.csv'}" in request.command(asked_for)

    def generation(wanted):
        found = {step.stage.name: step for step in stages.steps(stages.PROJECT, wanted)}
        sent = [name for name, step in found.items() if "prompts_file" in step.parameters()]
        return found["05_generation"].inputs({}), sent

    before, sent = generation(asked_for)
    assert sent == ["05_generation"]
    (tmp_path / "mine.csv").write_text("two")
    assert {n for n, v in generation(asked_for)[0].items() if before[n] != v} == {"PROMPTS_FILE's content"}
    without, sent = generation(replace(asked_for, prompts_file=""))
    assert set(before) - set(without) == {"PROMPTS_FILE's content"} and not sent
    assert all(without[name] == before[name] for name in without), "nothing else depends on it"


@pytest.mark.parametrize(
    "given, said",
    [
        (["STAGES=10_cardiac_fairness"], "is one of chest's; name its dataset: DATASETS=cardiac"),
        (["STAGES=06_metrics", "DATASETS=cardiac"], "is one of cardiac's; name its dataset: DATASETS=chest"),
    ],
)
def test_a_stage_of_other_datasets_names_one(tmp_path, capsys, given, said):
    assert run.main(["plan", *given, f"RUNS={tmp_path}"]) == 2
    assert said in capsys.readouterr().err


def test_real_images_on_the_shipped_base_need_its_adaptation(project, tmp_path, capsys):
    words = ["plan", *asked(project), "DATASETS=real", f"DATA_ROOT={tmp_path}"]
    assert run.main(words, project) == 2
    assert "real: the shipped base knows phantoms only" in (said := capsys.readouterr().err)
    remedy = [word for word in said.split() if "_STEPS=" in word]
    assert remedy == ["VAE_STEPS=600", "UNET_STEPS=600"] and run.main([*words, *remedy], project) == 0
    assert run.main([*words, "PROFILE=smoke"], project) == 0, "a rehearsal shows that the code runs, no more"
    assert run.main([*words, "BASE=some/mirror", "REVISION=1"], project) == 0, "another base"


@pytest.mark.parametrize("dataset, fits", [("nih", True), *((name, True) for name in config.HEARTS), ("mimic", False)])
def test_presets_adapt_the_shipped_base(tmp_path, dataset, fits):
    wanted = request.parse([f"DATASETS={dataset}", f"DATA_ROOT={tmp_path}"], "demo")
    if fits:
        run.check(stages.PROJECT, wanted, [])
    else:
        with pytest.raises(request.Refused, match="VAE_STEPS=600"):
            run.check(stages.PROJECT, wanted, [])


def test_a_parameter_that_a_notebook_does_not_declare_is_refused(project, capsys):
    edit_notebook(project, "04_all", "overrides: dict = {}", "override: dict = {}")
    edit_module(project, "hcn", "x * SCALE", "x * SCALE * 2")
    assert run.main(["smoke", *asked(project)], project) == 2
    assert "04_all.ipynb declares no parameter named overrides" in capsys.readouterr().err
    assert executions(project) == []


def test_make_only_variables_pass_and_values_get_their_types():
    asked = request.parse(
        ["PYTHON=python3", "VENV=", "PIP_ARGS=-q", "STEPS=500", "EMA=false", "TRAINED=unet", "RECIPE=fairdiffusion"],
        "demo",
    )
    assert asked.overrides == {"steps": 500, "ema": False, "trained": ["unet"], "recipe": "fairdiffusion"}
    make, target, *again = shlex.split(request.command(asked))
    assert (make, target) == ("make", "paper")
    assert request.parse(again, "smoke") == asked, "the command that is printed repeats the request"


def test_a_base_in_the_home_folder_is_the_one_that_notebooks_open(project, tmp_path, monkeypatch, capsys):
    """BASE="~/sd" reaches us as it is written, and nothing behind the door knows what ~ is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sd").mkdir()
    wanted = request.parse(["BASE=~/sd"], "demo")
    assert wanted.overrides["base"] == str(tmp_path / "sd") == launch.parse(["encode", "chest", "BASE=~/sd"])[1].overrides["base"]
    assert request.parse(shlex.split(request.command(wanted))[2:], "demo") == wanted
    for named in ("tiny", "some/mirror", "/weights/sd", "weights/sd"):
        assert request.parse([f"BASE={named}"], "demo").overrides["base"] == named
    assert run.main(["plan", *asked(project), "BASE=~/sd"], project) == 0
    for named in ("~/other", "~nobody/sd", "./other"):
        assert run.main(["plan", *asked(project), f"BASE={named}", "REVISION=1"], project) == 2, named
        assert "is not a folder" in capsys.readouterr().err


def test_every_setting_is_a_variable():
    """One configuration surface: each field of the dataclasses can be set by its name in capitals."""
    demo = config.settings("demo")
    for name, part in config.dials().items():
        value = getattr(getattr(demo, part), name)
        text = " ".join(value) if isinstance(value, tuple) else str(value)
        assert config.settings("demo", **request.parse([f"{name.upper()}={text}"], "demo").overrides) == demo


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
    with pytest.raises(
        FileNotFoundError,
        match=r"make paper PROFILE=demo DATASETS=toy SEEDS=3 METHODS=\"hcn flat\" STAGES=\"02_hcn 03_flat\" RUNS=",
    ):
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
        assert run.main(["clean", *asked(project)], project) == 2, "not under the feet of a run"
    assert (project.root / "runs" / "smoke").exists()
    assert run.main(["clean", *asked(project)], project) == 0
    assert (
        kept.exists()
        and not (project.root / "runs" / "smoke").exists()
        and not (project.package / "__pycache__").exists()
    )
    assert "left alone" in (said := capsys.readouterr().out) and "demo/toy" in said


def test_seeds_and_scopes():
    asked = replace(request.Request(), datasets=("chest",), seeds=(0, 1), methods=("text", "flat"))
    labels = [step.label for step in stages.steps(Project(), asked)]
    assert labels[0] == "chest  01_data_prep" and labels[-1] == "chest  08_figures"
    assert labels.count("chest seed 1  03_train_baselines") == 1
    assert not any("02_train_hcn" in label or "04" in label for label in labels), "no method of theirs was asked for"
    last = list(stages.steps(Project(), asked))[-1]
    read = {o.label for o in stages.before(last, list(stages.steps(Project(), asked)))}
    assert {"chest seed 0  06_metrics", "chest seed 1  06_metrics", "chest  01_data_prep"} <= read
