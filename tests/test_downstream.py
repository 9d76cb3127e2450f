"""From the strategies' table to predictions: who trains on what, what is made once, and what happens without a set."""

import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from compdiff import classify, comparisons, config, datasets, downstream, networks, outcomes, sample, skeleton
from compdiff.classify import Head, Training
from compdiff.config import EvalConfig
from compdiff.downstream import REAL, Bench
from compdiff.paths import RunFolder
from compdiff.strategies import STRATEGIES

SETTINGS = config.settings("smoke", "fundus", balanced_per_cell=1)
QUICK = EvalConfig(downstream_epochs=1)


def pretend(folder, data, method, names):
    """Generated sets without a generator: the real images of other rows, brighter; one pixel tells whose they are."""
    for name in names:
        rows = sample.set_rows(data, name, SETTINGS).assign(prompt="", seed=0, method=method, checkpoint="x")
        images = np.minimum(data.images(data.table.sample(len(rows), replace=True, random_state=len(name))), 200) + 40
        images[:, 0, 0] = 41 + 10 * len(method) + len(name)
        for image_id, image in zip(rows["id"], images, strict=True):
            sample.save_png(folder.generated(method, name) / "images" / f"{image_id}.png", image)
        rows.to_csv(folder.generated(method, name) / "samples.csv", index=False)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder as notebooks 01 and 05 leave it after STRATEGIES=all, for two generators."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    for name in ("fundus", "chest"):
        folder = RunFolder(str(root), "smoke", name, 0)
        datasets.prepare(name, folder.data, config.DataConfig(size=32, train_n=40, val_n=16, test_per_cell=1))
    folder = RunFolder(str(root), "smoke", "fundus", 0)
    data = datasets.load(folder.data)
    for method in ("text", "hcn"):
        pretend(folder, data, method, sample.set_names(method, ["all"]))
    return root


@pytest.fixture
def bench(prepared, tmp_path):
    """A copy of it to train in."""
    shutil.copytree(prepared, tmp_path / "runs", dirs_exist_ok=True)
    folder = RunFolder(str(tmp_path / "runs"), "smoke", "fundus", 0)
    return Bench(datasets.load(folder.data), folder, ("text", "hcn"), QUICK, "smoke", 0)


@pytest.fixture
def counted(monkeypatch):
    """One entry per training: how many images, and from which model it started."""
    calls, fit = [], classify.fit

    def counting(images, targets, val_images, val_targets, heads, training, seed, init, *rest):
        calls.append((len(images), init is not None, training.lr))
        return fit(images, targets, val_images, val_targets, heads, training, seed, init, *rest)

    monkeypatch.setattr(classify, "fit", counting)
    return calls


# --- who trains on what -----------------------------------------------------------------------------------------------
def test_one_classifier_without_synthetic_images_and_one_per_generator_else():
    found = [(s.id, m) for s, m in downstream.fits(["1a", "1d", "5b"], ["text", "hcn"])]
    assert found == [("1a", REAL), ("1d", "text"), ("1d", "hcn"), ("5b", REAL)]


def test_the_demo_trains_eleven_classifiers():
    found = {downstream.folder_name(s, m, False) for s, m in downstream.fits((), ("text", "fairdiffusion", "hcn"))}
    assert len(found) == 11


def test_rows_that_train_alike_share_a_classifier():
    def name(i, started=False):
        return downstream.folder_name(STRATEGIES[i], "hcn", started)

    assert name("5a") == name("5b") == name("1a") == "1a_hcn" and name("6a") == "6a_hcn"
    assert name("3b") == "3a_hcn" and name("3b", started=True) == "3b_hcn", "without ImageNet weights 3b is 3a"
    assert len({name(i) for i in STRATEGIES}) == len(STRATEGIES) - 4  # 5a, 5b, 3b, 4b


def test_graded_labels_become_any():
    t = downstream.binary(pd.DataFrame({"y_a": [0, 1, 3], "y_b": [1, 0, 0]}), ["a", "b"])
    assert t["y_a"].tolist() == [0, 1, 1] and t["y_b"].tolist() == [1, 0, 0]


def test_a_fraction_and_quarters_are_of_whole_patients(bench):
    data = bench.data
    few = replace(data, table=data.table.assign(patient=[f"p{i // 3}" for i in range(len(data.table))]))
    train = few.rows("train")
    tenth = downstream.real_rows(few, STRATEGIES["3a"], seed=0)["train"]
    chosen = train[train["patient"].isin(tenth["patient"])]
    assert chosen["id"].tolist() == tenth["id"].tolist()
    assert tenth["patient"].nunique() == round(0.1 * train["patient"].nunique())
    parts = downstream.real_rows(data, STRATEGIES["6a"], seed=0)
    names = [set(parts[p]["id"]) for p in ("train", "val", "seen")]
    assert [len(n) for n in names] == [20, 10, 10] and set.union(*names) == set(data.rows("train")["id"])
    assert not set(parts["test"]["id"]) & set.union(*names)
    assert len(downstream.real_rows(data, STRATEGIES["1d"], 0)["train"]) == 0
    assert downstream.real_rows(data, STRATEGIES["6a"], 1)["seen"]["id"].tolist() != parts["seen"]["id"].tolist()


# --- training and predicting, once ------------------------------------------------------------------------------------
SEEN = {  # method section 7: row -> sets of a first phase, real training images after it, sets beside them
    "1a": ((), 40, ()), "1a-again": ((), 40, ()), "1b": ((), 40, ("train",)), "1c": ((), 40, ("train", "train2")),
    "1d": ((), 0, ("train",)), "1e": ((), 0, ("train", "train2")), "2b": ((), 40, ("balanced",)),
    "2c": ((), 0, ("balanced",)), "3a": (("train",), 4, ()), "3b": (("train",), 4, ()), "4a": (("balanced",), 4, ()),
    "4b": (("balanced",), 4, ()), "5a": ((), 40, ()), "5b": ((), 40, ()), "6a": ((), 20, ()),
    "vit-real": ((), 40, ()), "vit-generated": ((), 0, ("train",)), "effnet-real": ((), 40, ()),
    "effnet-generated": ((), 0, ("train",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def campaign(prepared, tmp_path_factory):
    """STRATEGIES=all, run once. phases, val: by (row, method, label), the origins of the images that each training was
    given, with its rate and whether a model was fine-tuned; shown: by id of a table of predictions; origin: of an
    image's bytes, (generator or "real", set or split, id).
    """
    root = shutil.copytree(prepared, tmp_path_factory.mktemp("campaign") / "runs")
    folder = RunFolder(str(root), "smoke", "fundus", 0)
    found = SimpleNamespace(bench=Bench(datasets.load(folder.data), folder, ("text", "hcn"), QUICK, "smoke", 0))
    data, found.phases, found.val, found.shown, found.fits, row = found.bench.data, {}, {}, {}, [], []
    real = zip(data.images(data.table), data.table["split"], data.table["id"], strict=True)
    found.origin = {image.tobytes(): ("real", split, image_id) for image, split, image_id in real}
    for method, name in [(m, n) for m in ("text", "hcn") for n in ("train", "train2", "balanced", "test")]:
        at = folder.generated(method, name)
        ids = pd.read_csv(at / "samples.csv", dtype=str)["id"].tolist()
        made = {image.tobytes(): (method, name, "") for image in sample.read_images(at, ids)}
        assert not made.keys() & found.origin.keys()
        found.origin |= made
    origins = lambda images: [found.origin[image.tobytes()] for image in images]  # noqa: E731
    train, fit_once, predict_once, fit = downstream.train, downstream.fit_once, downstream.predict_once, classify.fit

    def named(bench, strategy, method, label=""):
        row[:] = [(strategy.id, method, label)]
        return train(bench, strategy, method, label)

    def fitting(folder, images, val, heads, training, seed, init=None, *rest):
        found.phases.setdefault(row[0], []).append((origins(images[0]), training.lr, init is not None))
        found.val[row[0]] = origins(val[0])
        return fit_once(folder, images, val, heads, training, seed, init, *rest)

    def predicting(folder, model, table, images):
        out = predict_once(folder, model, table, images)
        found.shown[id(out)] = origins(images)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downstream, "train", named)
        patch.setattr(downstream, "fit_once", fitting)
        patch.setattr(downstream, "predict_once", predicting)
        patch.setattr(classify, "fit", lambda *a: found.fits.append(len(a[0])) or fit(*a))
        found.judged, found.absent = downstream.run_all(found.bench, ["all"])
    return found


def test_every_row_learns_from_its_own_images_and_from_nothing_else(campaign):
    data, cells = campaign.bench.data, len(campaign.bench.data.schema.cells())
    expected = {(row, m, label) for row, (before, _, beside) in SEEN.items()
                for m in (("text", "hcn") if before or beside else (REAL,))
                for label in (data.label_names if row[0] in "ve" else ("",))}  # fmt: skip
    assert campaign.phases.keys() == expected and list(SEEN) == list(STRATEGIES)
    for (row, method, label), phases in campaign.phases.items():
        before, real, beside = SEEN[row]
        size = {"train": 40, "train2": 40, "balanced": cells}
        last = {("real", "train"): real} if real else {}
        want = [{(method, s): size[s] for s in names} for names in ([before] if before else [])]
        want.append(last | {(method, s): size[s] for s in beside})
        assert [Counter(o[:2] for o in origins) for origins, _, _ in phases] == want, (row, method, label)
        rate = 2e-3 if row.startswith("vit") else 1e-2
        assert [(lr, tuned) for _, lr, tuned in phases] == [(rate, False), (rate / 2, True)][: len(phases)]
        val = Counter(o[:2] for o in campaign.val[row, method, label])
        assert val == ({("real", "train"): 10} if row == "6a" else {("real", "val"): 16})
    thirds = campaign.val["6a", REAL, ""]
    assert not set(thirds) & set(campaign.phases["6a", REAL, ""][0][0])


def test_every_row_is_judged_on_its_own_sets(campaign):
    data, judged = campaign.bench.data, campaign.judged
    assert not campaign.absent
    test = data.table.loc[data.table["split"].isin(["test", "zero_shot"]), "id"].tolist()
    other = {}
    for j in judged:
        origins = campaign.shown[id(j.table)]
        if " on " in j.setting:
            other[j.setting, j.method] = origins
        else:
            assert [o[2] for o in origins] == test == j.table["id"].tolist(), (j.setting, j.method)
    plain = {(j.setting, j.method, j.task) for j in judged if " on " not in j.setting}
    assert plain == campaign.phases.keys()
    sets = {key: {o[:2] for o in origins} for key, origins in other.items()}
    assert sets == {
        ("5a on synthetic", "text"): {("text", "test")}, ("5b on synthetic", "hcn"): {("hcn", "test")},
        ("6a on seen", REAL): {("real", "train")},
        ("6a on seen prompts", "text"): {("text", "train")}, ("6a on seen prompts", "hcn"): {("hcn", "train")},
    }  # fmt: skip
    parts = campaign.phases["6a", REAL, ""][0][0], campaign.val["6a", REAL, ""], other["6a on seen", REAL]
    quarters = [{o[2] for o in part} for part in parts]
    assert [len(q) for q in quarters] == [20, 10, 10] and set.union(*quarters) == set(data.rows("train")["id"])
    by = {(j.setting, j.method): j for j in judged}
    for method in ("text", "hcn"):  # generated from the prompts of the last quarter
        assert set(by["6a on seen prompts", method].table["id"]) == quarters[2]
    assert set(by["5a on synthetic", "text"].table["id"]) == set(test)


def test_every_row_says_its_network_and_gives_numbers_or_reasons(campaign):
    judged = campaign.judged
    networks_of = {j.setting.partition("-")[0]: j.start for j in judged if j.task}
    assert networks_of == {"vit": "small ViT, from scratch", "effnet": "small CNN, from scratch"}
    assert {j.start for j in judged if not j.task} == {"small CNN, from scratch"}
    for task in (j for j in judged if j.task == "vision_loss"):
        assert np.allclose(task.table[[f"p_vision_loss={c}" for c in range(4)]].sum(1), 1, atol=1e-4)
    frame = pd.DataFrame([r for j in judged for r in outcomes.rows_of(j, 5, 0)])
    assert not frame.duplicated(["stage", "method", "setting", "group_kind", "group", "metric"]).any()
    assert frame.loc[frame["value"].isna(), "note"].str.startswith("ineligible").all()
    assert {s.partition(" on ")[0] for s in frame["setting"]} == set(STRATEGIES)


def test_rows_that_train_alike_are_trained_once_and_a_second_time_nothing_is(campaign, counted):
    """5a and 5b are 1a, 3b is 3a and 4b is 4a where there are no ImageNet weights."""
    cells = len(campaign.bench.data.schema.cells())
    once = [40, 40, 20] + [40] * (2 * 4)  # 1a, 1a-again, 6a; the tasks on real images
    each = [80, 120, 40, 80, 40 + cells, cells] + [40, 4] + [cells, 4] + [40] * (2 * 4)  # 1b to 2c, 3a, 4a, tasks
    assert sorted(campaign.fits) == sorted(once + 2 * each)
    again, _ = downstream.run_all(campaign.bench, ["1a", "3b", "5a", "6a", "vit-real"])
    assert not counted
    (first,) = [j for j in campaign.judged if j.setting == "1a"]
    pd.testing.assert_frame_equal(again[0].table, first.table)


def test_every_row_is_trained_for_as_many_steps_however_much_it_sees(bench, monkeypatch):
    steps, augment = [], classify.augment
    monkeypatch.setattr(classify, "augment", lambda x, training: steps.append(len(x)) or augment(x, training))
    slow = replace(bench, methods=("hcn",), config=replace(QUICK, downstream_epochs=4))
    monkeypatch.setitem(classify.RECIPES, "downstream", Training(size=32, batch=16))
    found = {}
    for name in ("1a", "1b", "1c", "1d", "2b", "3a", "6a"):
        steps.clear()
        downstream.run_all(slow, [name])
        found[name] = list(steps)
    one_pass = 40 // 16
    assert {name: len(s) for name, s in found.items()} == dict.fromkeys(found, 4 * one_pass)
    assert found["3a"] == [16] * 4 + [4] * 4, "half of the epochs for each phase; a tenth of the patients is four"


def test_1a_again_differs_from_1a_by_its_seed_only(bench, counted, monkeypatch):
    seeds, fit = [], classify.fit
    monkeypatch.setattr(classify, "fit", lambda *a: seeds.append((a[0].tobytes(), a[5], a[6])) or fit(*a))
    (once, again), _ = downstream.run_all(bench, ["1a", "1a-again"])
    assert seeds[0][:2] == seeds[1][:2] and [s for *_, s in seeds] == [0, 1000]
    assert once.table["id"].equals(again.table["id"]) and not once.table.equals(again.table)
    tables = {(j.setting, j.method): j.table for j in (once, again)}
    rows = comparisons.against_real(tables, bench.data.label_names, 20, 0)
    assert {r["setting"] for r in rows} == {"1a-again"}


def test_other_images_train_anew_and_a_lost_predictions_file_does_not(bench, counted):
    downstream.run_all(bench, ["1d"])
    assert len(counted) == 2
    home = bench.folder.seed / "downstream" / "1d_hcn"
    kept = (home / "predictions.csv").read_text()
    (home / "predictions.csv").unlink()
    downstream.run_all(bench, ["1d"])
    assert len(counted) == 2 and (home / "predictions.csv").read_text() == kept
    first = next((bench.folder.generated("hcn", "train") / "images").iterdir())
    sample.save_png(first, np.zeros((32, 32), np.uint8))
    downstream.run_all(bench, ["1d"])
    assert len(counted) == 3


def test_a_missing_set_or_image_is_named_and_the_others_stand(bench):
    shutil.rmtree(bench.folder.generated("hcn", "train2"))
    gone = next((bench.folder.generated("text", "balanced") / "images").iterdir())
    gone.unlink()
    judged, absent = downstream.run_all(bench, ["1a", "1c", "2b"])
    assert {(j.setting, j.method) for j in judged} == {("1a", REAL), ("1c", "text"), ("2b", "hcn")}
    notes = {(a["setting"], a["method"]): a["note"] for a in absent}
    assert notes.keys() == {("1c", "hcn"), ("2b", "text")}
    assert "generated/hcn/train2/samples.csv is not there" in notes["1c", "hcn"]
    assert notes["1c", "hcn"].endswith('STRATEGIES="1c" for notebook 05_generation')
    assert notes["2b", "text"].startswith("not available: generated/text/balanced/images/an image; remedy: ")
    assert gone.stem not in notes["2b", "text"], "an image's id may be a patient's"
    row = outcomes.missing(**absent[0])
    assert np.isnan(row["value"]) and row["note"].startswith("not available")


def test_paper_scale_takes_the_papers_recipes():
    start = Bench(None, None, (), QUICK, "paper", 0).recipe(STRATEGIES["1a"])
    assert (start.network, start.epochs) == ("densenet121", 1)
    own = Bench(None, None, (), QUICK, "paper", 0).recipe(STRATEGIES["vit-real"])
    assert (own.network, own.epochs) == ("vit_b", 50)  # FairDiffusion's own number of epochs
    assert own == classify.RECIPES["vit_paper"], "its rate, batch and decays as well"
    assert Bench(None, None, (), QUICK, "paper", 0).recipe(STRATEGIES["effnet-real"]).size == 200


def test_rows_say_what_they_really_started_from(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(classify.RECIPES, "downstream", Training("densenet121", size=32, lr=1e-4))
    state = networks.build("densenet121", 1000, 32).state_dict()
    published = {k.replace(".layers.", ".").replace("class_layers.out", "classifier"): v for k, v in state.items()}
    published["features.conv0.weight"] = state["features.conv0.weight"].expand(-1, 3, -1, -1) / 3
    torch.save(published, tmp_path / "imagenet.pth")
    (without,), _ = downstream.run_all(bench, ["1a"])
    assert without.start.startswith("DenseNet-121, trained from scratch: ImageNet start not available")
    given = replace(bench, config=replace(QUICK, imagenet=str(tmp_path / "imagenet.pth")))
    (with_file,), _ = downstream.run_all(given, ["1a"])
    assert with_file.start.startswith("DenseNet-121, ImageNet start (imagenet.pth, sha256 ")
    assert not with_file.table["p_glaucoma"].equals(without.table["p_glaucoma"])
    about = [r for r in outcomes.rows_of(with_file, 5, 0) if r["metric"] == "epochs trained"]
    assert [(r["value"], r["note"], r["extractor"]) for r in about] == [(1, with_file.start, "DenseNet-121")]


def test_an_external_set_is_judged_on_its_own_groups(bench):
    with_chest = replace(bench, config=replace(QUICK, external="chest"))
    judged, absent = downstream.run_all(with_chest, ["1a"])
    assert [j.setting for j in judged] == ["1a", "1a on chest"] and not absent
    assert judged[1].data.manifest.name == "chest" and len(judged[1].table) == 40
    assert outcomes.rows_of(judged[1], 5, 0)[1]["note"].startswith("not available")  # the fundus has other labels
    nowhere = replace(bench, config=replace(QUICK, external="nih"))
    judged, absent = downstream.run_all(nowhere, ["1a"])
    assert [j.setting for j in judged] == ["1a"] and "DATASETS=nih STAGES=01_data_prep" in absent[0]["note"]


def test_an_external_set_in_chexperts_layout_is_judged(prepared, tmp_path):
    """As it is released, all of it test: the labels are those of its table, AUROC is scikit-learn's."""
    root = str(shutil.copytree(prepared, tmp_path / "runs"))
    tree = skeleton.write("chexpert", tmp_path / "tree", patients=90)
    small = config.DataConfig(size=32)
    datasets.prepare("chexpert", RunFolder(root, "smoke", "chexpert", 0).data, small, str(tree), "a salt for a test")
    folder = RunFolder(root, "smoke", "chest", 0)
    bench = Bench(datasets.load(folder.data), folder, (), replace(QUICK, external="chexpert"), "smoke", 0)
    (_, external), absent = downstream.run_all(bench, ["1a"])
    assert external.setting == "1a on chexpert" and not absent
    released = pd.read_csv(tree / "chexpert.csv", dtype=str, keep_default_na=False)
    frontal = released[released["Frontal/Lateral"] == "Frontal"].iloc[:-1]  # the last one's sex and race are unknown
    assert len(external.table) == len(frontal)
    rows, numbers = outcomes.rows_of(external, 5, 0), 0
    for label in bench.data.label_names:
        y, p = external.table[f"y_{label}"], external.table[f"p_{label}"]
        if label != "No Finding":  # which follows from the others
            assert y.sum() == frontal[label].isin(["1", "1.0"]).sum()
        (row,) = [r for r in rows if (r["group_kind"], r["metric"]) == ("overall", f"AUROC:{label}")]
        if min(y.sum(), (1 - y).sum()) >= 10:
            numbers += 1
            assert row["value"] == pytest.approx(roc_auc_score(y, p), abs=1e-6) and row["setting"] == "1a on chexpert"
        else:
            assert row["note"].startswith("ineligible")
    assert numbers >= 2


def test_fundus_tasks_are_not_made_of_other_images(bench):
    folder = RunFolder(str(bench.folder.root.parent.parent), "smoke", "chest", 0)
    judged, absent = downstream.run_all(replace(bench, data=datasets.load(folder.data), folder=folder), ["vit-real"])
    assert not judged and "fundus" in absent[0]["note"]


def test_saved_predictions_hold_every_output():
    heads = {"sex": Head("category", ("Male", "Female")), "labels": Head("binary", ("spot",))}
    heads["years"] = Head("number", ("years",), 50, 10)
    model = classify.Model(classify.build(Training(), heads).eval(), heads, Training(), 100, 30)
    images = np.random.default_rng(0).integers(0, 255, (6, 32, 32)).astype(np.uint8)
    frame = downstream.predictions(model, images, pd.DataFrame({"id": list("abcdef")}))
    found = model.predict(images)
    np.testing.assert_array_equal(frame["p_sex=Female"], found["sex"][:, 1])
    np.testing.assert_array_equal(frame["p_spot"], found["labels"][:, 0])
    np.testing.assert_array_equal(frame["p_years"], found["years"])
    assert frame["id"].tolist() == list("abcdef")
