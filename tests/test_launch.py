"""The commands of `compdiff.launch`: the notebooks' own results, from the notebooks' own settings."""

import shutil

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from compdiff import config, datasets, diffusion, features, latents, launch, methods, request, sample, train
from compdiff.paths import RunFolder


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory):
    """A copy of the tiny run folder in which `text` is trained."""
    root = tmp_path_factory.mktemp("launch") / "root"
    shutil.copytree(tiny_root, root)
    launch.main(["train", "chest", "text", *words(root)])
    return root


def words(root, **more):
    given = tiny.DIALS | dict(BASE=root / "base", RUNS=root, PROFILE="smoke", STEPS=2, FEATURE_SIZE=32) | more
    return [f"{name.upper()}={value}" for name, value in given.items()]


def test_encode_writes_the_latents_of_notebook_01(root, capsys):
    folder = tiny.run_folder(root)
    base, sha256 = diffusion.load_for(folder, tiny.config(root))
    known = latents.read(folder.latents, datasets.load(folder.data), base, sha256, "train", ()).moments.clone()
    folder.latents.rename(folder.latents.with_name("kept"))
    try:
        launch.main(["encode", "chest", *words(root)])
        assert "encode chest : latents of 3 shards; 1 process(es)" in capsys.readouterr().out
        made = latents.read(folder.latents, datasets.load(folder.data), base, sha256, "train", ())
        assert len(made) == 24 and torch.allclose(made.moments, known, atol=1e-4)
    finally:  # bits depend on the number of threads, and what is trained on other bits is trained again
        shutil.rmtree(folder.latents)
        folder.latents.with_name("kept").rename(folder.latents)


def test_training_is_what_the_notebook_finds(root, monkeypatch):
    monkeypatch.setattr(train, "step_losses", lambda *given: pytest.fail("trained again"))
    c = tiny.config(root, "text", steps=2, feature_size=32)
    assert len(methods.fit("text", tiny.run_folder(root), c, 0)) == 2


@pytest.mark.parametrize("method", ["text", "untrained"])
def test_sets_and_features_are_what_the_notebooks_find(root, method, monkeypatch, capsys):
    folder = tiny.run_folder(root)
    launch.main(["generate", "chest", method, *words(root)])
    table = pd.read_csv(folder.generated(method, "test") / "samples.csv")
    assert f"{len(table)} images of test" in capsys.readouterr().out
    images = sample.read_images(folder.generated(method, "test"), table["id"].tolist())
    monkeypatch.setattr(sample, "sample", lambda *given: pytest.fail("drawn again"))
    launch.main(["generate", "chest", method, *words(root)])
    launch.main(["features", "chest", method, *words(root)])
    whole = features.extract(images, "lite0", 32)
    monkeypatch.setattr(features, "extract", lambda *given: pytest.fail("extracted again"))
    np.testing.assert_array_equal(features.cached(folder.seed / "features" / "lite0" / method, images, "lite0", 32), whole)


def test_features_of_real_images_are_those_of_their_rows(root, capsys):
    folder = tiny.run_folder(root)
    launch.main(["features", "chest", "real_test", *words(root)])
    data = datasets.load(folder.data)
    images = data.images(data.rows("test"))
    assert f"lite0 features of {len(images)} images" in capsys.readouterr().out
    with np.load(folder.seed / "features" / "lite0" / "real_test.npz", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["features"], features.extract(images, "lite0", 32))


@pytest.mark.parametrize("wrong", ["", "train chest", "encode chest text", "sing chest text", "train chest text now"])
def test_other_words_get_the_usage(wrong):
    with pytest.raises(SystemExit, match="compdiff.launch COMMAND DATASET"):
        launch.main(wrong.split())


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match="unknown setting 'stepz'"):
        launch.main(["train", "chest", "text", "STEPZ=2"])


@pytest.mark.parametrize("profile", config.PROFILES)
def test_without_a_seed_the_folder_is_the_one_that_make_looks_in(profile):
    asked = request.parse([], profile)
    _, job = launch.parse(["train", "mimic", "hcn", f"PROFILE={profile}"])
    (seed,) = asked.seeds
    assert job.number == seed and job.folder.train("hcn") == RunFolder(asked.runs, profile, "mimic", seed).train("hcn")
    other = launch.parse(["train", "mimic", "hcn", f"PROFILE={profile}", "SEED=7"])[1]
    assert (other.number,) == request.parse(["SEEDS=7"], profile).seeds and other.folder.seed.name == "seed7"


def test_a_seed_is_handed_to_the_training(monkeypatch):
    given = []
    monkeypatch.setattr(methods, "fit", lambda *words: given.append(words) or pd.DataFrame({"step": [1], "val_loss": [0.5]}))
    launch.fit(launch.Job("mimic", "hcn", "paper"), None)
    (_, folder, _, seed, _), = given  # fmt: skip
    assert folder.seed.name == "seed42" and seed == 42
