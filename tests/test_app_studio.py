"""The studio: finds finished runs, draws what was asked for, refuses the rest in words."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from compdiff import datasets, phantoms, sample, stamp, studio
from compdiff.config import DataConfig
from compdiff.request import Refused

WHO = {"sex": "Female", "race": "Asian"}


@pytest.fixture
def run(studio_root):
    (run,) = studio.trained_runs(str(studio_root), base=str(studio_root / "base"))
    return run


def draw(run, chosen=("text", "hcn"), found=("Cardiomegaly",), years=47, **how):
    row = studio.request_row(studio.load_data(run), years, WHO, found)
    return list(studio.generate(run, chosen, row, studio.Sampling(steps=2, **how)))


def test_only_finished_trainings_are_found(run, tmp_path):
    assert (run.profile, run.dataset, run.seed, run.methods) == ("smoke", "chest", 0, ("text", "hcn"))
    assert studio.trained_runs(str(tmp_path)) == []
    for odd in ("other/chest/seed0", "demo/chest/seedling", "demo/chest/seed3"):
        (tmp_path / odd / "train" / "hcn").mkdir(parents=True)
        for name in ("weights.safetensors", "run.json"):
            (tmp_path / odd / "train" / "hcn" / name).write_text('{"a": 1}')
    assert [r.name for r in studio.trained_runs(str(tmp_path))] == ["chest, profile demo, training seed 3"]


def test_the_same_request_gives_the_models_own_images(run):
    drawn = draw(run, n=5, seed=7)
    assert [(d.method, d.number) for d in drawn] == [(m, k) for m in ("text", "hcn") for k in range(5)]
    assert {d.prompt for d in drawn[:5]} == {"47 year old Asian female. The heart is enlarged."}
    assert {d.prompt for d in drawn[5:]} == {"The heart is enlarged."}, "the token carries the rest"
    data = studio.load_data(run)
    model, base, _ = studio.restore(run, "hcn", data)
    row = studio.request_row(data, 47, WHO, ["Cardiomegaly"])
    c = replace(studio.settings(run, "hcn").sample, sample_steps=2, guidance=2.0)
    alone = sample.sample(model, base, base.tokenize(["The heart is enlarged."]), base.tokenize([""])[0],
                          torch.from_numpy(data.attributes(row)), [sample.image_seed(7, "studio-3")], c)[0]  # fmt: skip
    assert np.abs(alone.astype(int) - drawn[8].image.astype(int)).max() <= 1
    assert not np.array_equal(draw(run, ["hcn"], n=1, seed=8)[0].image, drawn[5].image)


def test_the_attributes_reach_the_token(run):
    one, other = (draw(run, ["hcn"], n=1, years=years, guidance=8.0)[0] for years in (20, 85))
    assert one.prompt == other.prompt and not np.array_equal(one.image, other.image)


def test_truth_is_the_phantoms_mean(run):
    data = studio.load_data(run)
    asked = studio.truth(data, studio.request_row(data, 47, WHO, ["Cardiomegaly", "Pneumothorax"]))
    labels = {"Cardiomegaly": 1, "Pneumothorax": 1, "Pleural Effusion": 0, "Consolidation": 0}
    drawn = [
        phantoms.draw("chest", f"s{k}", {"age": "40-60", **WHO}, seed=0, size=32, interaction=0.5, labels=labels)
        for k in range(400)
    ]
    near = [d for d in drawn if d.age_years == 47]
    assert len(near) > 5
    scatter = phantoms.EFFECTS["chest"]["scatter"]
    for name, value in asked.items():
        mean = np.mean([d.truth[name] for d in near])
        assert abs(value - mean) <= 4 * scatter.get(name, 0) / len(near) ** 0.5 + 1e-9, name


def test_no_finding_follows_from_the_others(run):
    data = studio.load_data(run)
    row = studio.request_row(data, 30, WHO, []).iloc[0]
    assert (
        row["y_No Finding"] == 1
        and row["findings"] == "No acute cardiopulmonary abnormality."
        and row["age"] == "18-40"
    )
    assert studio.request_row(data, 30, WHO, ["Consolidation"]).iloc[0]["y_No Finding"] == 0
    assert "No Finding" not in studio.findings(data) and "Pneumothorax" in studio.findings(data)


@pytest.mark.parametrize("how, words", [
    (dict(n=0), "number of images 0"), (dict(n=9), "from 1 to 8"), (dict(n=1.5), "whole number"),
    (dict(n=None), "number of images"),
    (dict(steps=101), "steps 101"), (dict(steps=0), "steps 0"), (dict(guidance=float("nan")), "guidance nan"),
    (dict(guidance=16), "to 15"), (dict(seed=-1), "seed -1"), (dict(seed=2**31), "seed"), (dict(steps="20"), "steps"),
])  # fmt: skip
def test_settings_outside_the_limits_are_refused(how, words):
    with pytest.raises(Refused, match=words):
        studio.Sampling(**how)


def test_requests_that_make_no_sense_are_refused(run):
    data = studio.load_data(run)
    for years, who, found, words in (
        (130, WHO, [], "age 130"), (40, {"sex": "Female"}, [], "race is missing"),
        (40, WHO | {"sex": "x"}, [], "unknown category"),
        (40, WHO, ["Flu"], "unknown finding 'Flu'"), (float("nan"), WHO, [], "age"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=words):
            studio.request_row(data, years, who, found)
    for chosen, words in (([], "at least one"), (["flat"], "not trained")):
        with pytest.raises(Refused, match=words):
            draw(run, chosen)


def test_two_values_of_one_label_are_refused(tmp_path):
    datasets.prepare("fundus", tmp_path / "data", DataConfig(32, 4, 2, 1))
    data = datasets.load(tmp_path / "data")
    who = {"sex": "Male", "race": "Black"}
    found = ["glaucoma", "mild myopia"]
    assert set(found) < set(studio.findings(data))
    row = studio.request_row(data, 70, who, found).iloc[0]
    assert row["findings"] == "glaucoma, normal vision, normal cup-disc ratio, mild myopia"
    with pytest.raises(Refused, match="refraction has one value"):
        studio.request_row(data, 70, who, ["mild myopia", "hyperopia"])


def test_another_base_and_other_settings_are_named(run, studio_root, tmp_path):
    with pytest.raises(Refused, match="BASE="):
        draw(replace(run, base="tiny"), ["text"])
    with pytest.raises(Refused, match="BASE="):
        draw(replace(run, base=str(tmp_path / "gone")), ["text"])
    record = tiny.run_folder(studio_root).executed / "02_train_hcn.run.json"
    text = record.read_text()
    record.write_text(text.replace('"d_node": 16', '"d_node": 24'))
    try:
        with pytest.raises(Refused, match="do not fit"):
            draw(run, ["hcn"])
        record.write_text(text.replace('"d_node"', '"d_nod"'))
        with pytest.raises(Refused, match="unknown setting 'd_nod'"):
            draw(run, ["hcn"])
    finally:
        record.write_text(text)


# --- the mark ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(32, 32), (64, 128, 3), (300, 500)])
def test_the_mark_is_in_margin_and_metadata(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = stamp.save(tmp_path / "one.png", image, ["HCN, seed 3"], {"Prompt": "Männlich, 47", "Seed": 3})
    with Image.open(path) as shown:
        shown.load()
        assert shown.text["Description"] == "synthetic, not a patient"
        assert shown.text["Prompt"] == "Männlich, 47" and shown.text["Seed"] == "3"
        pixels = np.asarray(shown)
    times = pixels.shape[1] // shape[1]
    assert pixels.shape[1] >= 256 and pixels.shape[1] % shape[1] == 0
    inside, margin = np.split(pixels, [times * shape[0]])
    same = inside[::times, ::times] == (image if image.ndim == 3 else image[..., None])
    assert same.all(), "the image itself is left as it is"
    plain = np.asarray(stamp.stamped(image, ["", ""]))[times * shape[0] :]
    first, second = margin[: stamp.LINE], margin[stamp.LINE + 2 :]
    assert first.std() > 10 and second.std() > 10, "two lines of letters"
    assert np.array_equal(plain[: stamp.LINE], first), "the mark stands first, whatever follows"
