"""Rehearsals: notebook 01, through the door, over drawn trees in the layouts of real data; and what CheXpert is for."""

import shlex
import shutil

import numpy as np
import pytest
from layouts import LAYOUTS, Tree
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

from compdiff import datasets, downstream, outcomes, run, skeleton
from compdiff.config import DataConfig, EvalConfig
from compdiff.downstream import Bench
from compdiff.paths import RunFolder

PATIENTS = {"chexpert": 150}  # enough of both kinds to judge a classifier by; 24 of the others
OTHERS = [name for name in LAYOUTS if name != "chexpert"]


def of(runs, dataset):
    return RunFolder(str(runs), "smoke", dataset, 0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Chest phantoms, for a classifier that is also to be judged on CheXpert, which is not prepared yet."""
    chest = of(tmp_path_factory.mktemp("runs"), "chest")
    datasets.prepare("chest", chest.data, DataConfig(size=64, train_n=64, val_n=24, test_per_cell=1))
    return Bench(datasets.load(chest.data), chest, (), EvalConfig(downstream_epochs=1, external="chexpert"), "smoke", 0)


@pytest.fixture(scope="module")
def rehearsed(bench, tmp_path_factory):
    """(RUNS, {dataset: its tree}) after notebook 01 has run on each: CheXpert by the words of the remedy, the others, which
    lie in one folder, two at a time."""
    trees = {name: skeleton.write(name, tmp_path_factory.mktemp(name) / "tree", patients=PATIENTS.get(name, 24)) for name in LAYOUTS}
    with pytest.raises(FileNotFoundError) as caught:
        bench.external  # noqa: B018  a property
    runs, together = bench.folder.root.parent.parent, tmp_path_factory.mktemp("together")
    for name in OTHERS:
        shutil.copytree(trees[name], together, dirs_exist_ok=True)
    words = shlex.split(str(caught.value).partition("remedy: make ")[2].replace("<folder>", str(trees["chexpert"])))
    assert run.main([*words, f"RUNS={runs}"]) == 0
    words = ["smoke", f"DATASETS={' '.join(OTHERS)}", "STAGES=01_data_prep", f"DATA_ROOT={together}", "JOBS=2"]
    assert run.main([*words, f"RUNS={runs}"]) == 0
    return runs, trees


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_notebook_01_prepares_and_encodes_every_image_and_names_nobody(rehearsed, dataset):
    runs, trees = rehearsed
    folder, tree = of(runs, dataset), Tree(dataset, trees[dataset])
    data = datasets.load(folder.data)
    found = dict.fromkeys(data.index["images"], 0)
    for path in folder.latents.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            found[path.name.split("-")[0]] += file.get_slice("moments").get_shape()[0]
    assert found == data.index["images"] and sum(found.values()) > 20
    assert ("train" in found) == (dataset != "chexpert")
    executed = (folder.root / "notebooks" / "01_data_prep.ipynb").read_text()
    assert tree.identifiers() and not [name for name in tree.identifiers() if name in executed]


def test_classifiers_are_judged_on_chexpert(rehearsed, bench):
    judged, absent = downstream.run_all(bench, ["1a"])
    assert not absent and [j.setting for j in judged] == ["1a", "1a on chexpert"]
    table = judged[1].table
    outside = datasets.load(of(rehearsed[0], "chexpert").data)
    assert sorted(table["id"]) == sorted(outside.table["id"]) and set(table["split"]) == {"test", "zero_shot"}
    rows = outcomes.rows_of(judged[1], 10, 0)
    both = set(bench.data.label_names) & set(outside.label_names)
    whole = {r["metric"]: r for r in rows if r["group_kind"] == "overall"}
    assert {m.split(":")[1] for m in whole if m.startswith("AUROC:")} == both and len(both) > 2
    values = {label: whole[f"AUROC:{label}"]["value"] for label in both}
    wanted = {label: roc_auc_score(table[f"y_{label}"], table[f"p_{label}"]) for label in both}
    assert values == pytest.approx(wanted) and np.isfinite(list(values.values())).all()


def test_nothing_trains_on_a_test_set(trees, tmp_path, capsys):
    words = ["DATASETS=chexpert", f"DATA_ROOT={trees['chexpert', '']}", f"RUNS={tmp_path}"]
    assert run.main(["smoke", *words]) == 2
    assert "chexpert is a test set, nothing can train on it: STAGES=01_data_prep prepares it" in capsys.readouterr().err
    assert run.main(["plan", "PROFILE=demo", "STAGES=01_data_prep", *words]) == 0, "its base need not be adapted"
