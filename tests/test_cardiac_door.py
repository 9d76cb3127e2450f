"""The door and the cardiac notebooks: which stages a dataset has, and what DATASETS=cardiac means with a data folder."""

import pytest

from compdiff import config, request, run, stages
from compdiff.cardiac_manifest import FOLDER

HEART = ["09_cardiac_generation", "10_cardiac_fairness"]


def planned(*words):
    return [(s.dataset, s.stage.name) for s in stages.steps(stages.PROJECT, request.parse(words, "demo"))]


def test_hearts_have_their_own_notebooks_and_chests_have_theirs():
    assert planned("DATASETS=cardiac") == [("cardiac", name) for name in HEART]
    both = planned("DATASETS=chest cardiac")
    assert [n for d, n in both if d == "cardiac"] == HEART
    assert [n for d, n in both if d == "chest"] == [s.name for s in stages.STAGES if not s.family]
    assert planned("DATASETS=sunnybrook", "STAGES=10_cardiac_fairness") == [("sunnybrook", name) for name in HEART]


def test_every_cardiac_manifest_is_a_dataset_of_that_family():
    names = [p.stem for p in FOLDER.glob("*.yaml")]
    assert {"cardiac", "sunnybrook", "biobank", "heart_folder"} <= set(names)
    assert {stages.PROJECT.family(n) for n in names} == {"cardiac"} and stages.PROJECT.family("folder") == ""
    assert not {p.stem for p in stages.PROJECT.manifests.glob("*.yaml")} & set(names), "one name, one manifest"


def test_cardiac_with_a_data_folder_is_sunnybrook(tmp_path):
    assert request.parse(["DATASETS=cardiac"], "demo").datasets == ("cardiac",)
    asked = request.parse(["DATASETS=cardiac chest", f"DATA_ROOT={tmp_path}"], "demo")
    assert asked.datasets == ("sunnybrook", "chest")
    (first, _) = [s for s in stages.steps(stages.PROJECT, asked) if s.dataset == "sunnybrook"]
    assert first.parameters()["data_root"] and first.figures.name == "sunnybrook"


@pytest.mark.parametrize(
    "words, said",
    [
        (["DATASETS=sunnybrook"], "sunnybrook needs DATA_ROOT"),
        (["DATASETS=cardiac", "STAGES=06_metrics"], "none of the stages 06_metrics is one of cardiac's"),
        (["DATASETS=chest", "STAGES=09_cardiac_generation"], "is one of chest's"),
        (["DATASETS=hearts"], "unknown dataset 'hearts'"),
        (["DATASETS=cardiac", "SENSITIVE=sex", "WEIGHT_CLIP=much"], "is not a float"),
    ],
)
def test_refused_before_anything_runs(tmp_path, capsys, words, said):
    assert run.main(["paper", *words, f"RUNS={tmp_path}"]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.rglob("*.ipynb"))


def test_the_content_of_the_data_folder_is_an_input(tmp_path):
    (tmp_path / "metadata.csv").write_text("a\n")
    asked = request.parse(["DATASETS=sunnybrook", f"DATA_ROOT={tmp_path}"], "demo")
    first, second = stages.steps(stages.PROJECT, asked)
    before = first.inputs({})
    (tmp_path / "metadata.csv").write_text("b\n")
    after = first.inputs({})
    assert {k for k in before if before[k] != after[k]} == {"DATA_ROOT's content"}
    assert "DATA_ROOT's content" not in second.inputs({}), "it reads what the first made, and that counts"


@pytest.mark.parametrize("profile", config.PROFILES)
@pytest.mark.parametrize("dataset", config.HEARTS)
def test_cardiac_presets_are_valid(profile, dataset):
    c = config.settings(profile, dataset)
    assert c.sample.solver == "ddim" and c.heart.folds >= 3 and c.heart.repeats >= 2
    assert profile == "paper" or (c.base_model.vae_steps and c.base_model.unet_steps), "the shipped base knows no heart"


def test_paper_numbers_of_the_cardiac_study():
    c = config.settings("paper", "cardiac")
    assert (c.train.lr, c.train.batch, c.train.microbatch, c.train.precision) == (1e-5, 2, 1, "no")
    assert (c.sample.sample_steps, c.heart.copy_guidance, c.heart.random_guidance) == (20, 4, 9)
    assert (c.heart.weight_clip, c.heart.folds, c.heart.repeats, c.heart.fid_repeats) == (20, 5, 8, 4)
