"""Synthetic sets, prompts files, galleries and the stored sigma history: what notebooks 03 to 05 stand on."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from compdiff import config, datasets, galleries, manifests, sample
from compdiff.attributes import age_bin
from compdiff.fairdiffusion import FairReweighter, read_history
from compdiff.prompts import read_prompts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "data"
    datasets.prepare("chest", folder, config.DataConfig(size=32, train_n=30, val_n=4, test_per_cell=1))
    return datasets.load(folder)


@pytest.fixture(scope="module")
def settings():
    return config.settings("smoke", "chest", balanced_per_cell=3)


def test_balanced_set_asks_for_every_cell_alike(data, settings):
    rows = sample.set_rows(data, "balanced", settings)
    assert np.bincount(data.cells(rows)).tolist() == [3] * 40
    assert (data.cells(rows) == rows["cell"]).all() and rows["id"].is_unique
    assert rows["held_out"].sum() == 3 * 5  # the chest experiment holds out five cells
    pd.testing.assert_frame_equal(rows, sample.set_rows(data, "balanced", settings))


def test_balanced_findings_fit_their_labels_and_ages_their_bins(data, settings):
    rows = sample.set_rows(data, "balanced", settings)
    for row in rows.to_dict("records"):
        assert row["findings"] == data.manifest.describe({n: row[f"y_{n}"] for n in data.label_names})
        assert age_bin(row["age_years"]) == row["age"]
    assert rows["findings"].nunique() > 1


def test_sets_of_real_rows_keep_ids_and_drop_the_image_s_own_parameters(data, settings):
    train = sample.set_rows(data, "train", settings)
    assert train["id"].tolist() == data.rows("train")["id"].tolist()
    assert not [c for c in train if c.startswith("true_")]
    assert set(sample.set_rows(data, "test", settings)["split"]) == {"test"}
    with pytest.raises(ValueError, match="unknown set"):
        sample.set_rows(data, "val", settings)


def test_prompts_file(data, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("prompt,age,sex,race,repeats\na heart,40-60,Female,Asian,2\nlungs,80+,Male,White,1\n")
    rows, prompts = read_prompts(file, data.schema)
    assert prompts == ["a heart", "a heart", "lungs"] and rows["id"].tolist() == ["prompt1-0", "prompt1-1", "prompt2-0"]
    assert data.attributes(rows).tolist() == [[2, 1, 2], [2, 1, 2], [4, 0, 0]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a,40-60,female,Asian,1", "line 2.*'female'"),
        ("a,40-60,Female,Asian,0", "line 2.*'0'"),
        ("a,,Male,White,1", "line 2.*age"),
    ],
)
def test_prompts_file_names_the_line_that_is_wrong(data, tmp_path, line, said):
    file = tmp_path / "mine.csv"
    file.write_text("prompt,age,sex,race,repeats\n" + line + "\n")
    with pytest.raises(ValueError, match=said):
        read_prompts(file, data.schema)


def test_history_is_read_back_from_a_checkpoint(data, tmp_path):
    reweighter = FairReweighter(data.schema.sizes, config.FairConfig(time_window=50))
    attributes = torch.from_numpy(data.attributes(data.rows("train")))
    for step in range(3):
        reweighter.observe(torch.rand(len(attributes)), attributes, torch.Generator().manual_seed(step), step)
    state = {f"reweighter.{n}": v for n, v in reweighter.state_dict().items()}
    save_file(state, tmp_path / "checkpoint.safetensors", metadata={"state": json.dumps({})})
    history = read_history(tmp_path, data.schema, config.FairConfig())
    assert history["gap"].tolist() == [row["gap"] for row in reweighter.history]
    assert history["race=Asian"].tolist() == [row["sigma_2_2"] for row in reweighter.history]
    save_file({"model.x": torch.zeros(1)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="no sigma history"):
        read_history(tmp_path, data.schema, config.FairConfig())


def test_spread_covers_cells_once_and_shows_a_held_out_one():
    rows = pd.DataFrame({"cell": np.repeat(np.arange(40), 2)})
    for n in (1, 4, 5, 6, 40, 99):
        cells = galleries.spread(rows, n)["cell"].tolist()
        assert len(set(cells)) == len(cells) == min(n, 40)
        for held in (0, 17, 39):
            marked = rows.assign(held_out=rows["cell"] == held)
            with_held = galleries.spread(marked, n)["cell"].tolist()
            assert held in with_held and len(set(with_held)) == len(cells) and len(set(with_held) - set(cells)) <= 1


@pytest.mark.parametrize("name", ["chest", "fundus"])
def test_three_spread_rows_differ_in_every_attribute(name):
    manifest = manifests.load_manifest(name)
    cells = manifest.schema.cells()
    held = [c in manifest.held_out for c in cells]
    chosen = galleries.spread(pd.DataFrame({"cell": range(len(cells)), "held_out": held}), 3)["cell"]
    assert (np.ptp([cells[i] for i in chosen], axis=0) > 0).all()
