"""The cardiac generators at toy size: adapted base, locked base, sets that are balanced, restartable and nobody's test."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from compdiff import augment, base, cardiac_cohorts, cardiac_models, config, diffusion, paths, sample, untrained

LABEL = "heart failure"
DIALS = dict(size=32, steps=3, lr=1e-2, validate_every=1.0, vae_steps=2, unet_steps=2, batch=4, microbatch=4, hearts=18,
             test_hearts=6, folds=3, variants=2, set_size=10, sample_steps=2, sample_batch=8, prevalence=0.4, d_node=8,
             aux_hidden=8)  # fmt: skip


class World:
    """A tiny base on the disk, phantoms, one fold, and a branch trained for three steps."""

    def __init__(self, root):
        self.root = root
        untrained.build_tiny(base.corpus(), root / "tokenizer", size=32, width=16).save(root / "source")
        self.config = config.settings("smoke", "cardiac", base=str(root / "source"), **DIALS)
        self.studies = cardiac_cohorts.studies("cardiac", "", self.config)
        self.fold = cardiac_cohorts.folds(self.studies.table, LABEL, 3, ("sex",), seed=0)[0]
        self.base = root / "base"
        cardiac_models.adapt(self.studies, self.fold.train, self.fold.val, self.config, self.base)
        self.fit(self.config, "control")

    def fit(self, c, name):
        where = self.root / "train" / name
        return cardiac_models.fit(self.studies, self.fold.train, self.fold.val, self.base, where, c, seed=0)

    def restore(self, name, c=None):
        where = self.root / "train" / name
        return cardiac_models.restore(name.split("_")[0], self.studies, self.base, where, c or self.config)

    def generate(self, method, name, folder, c=None):
        places = (self.base, self.root / "train" / method)
        return augment.generate(self.studies, self.fold, method, name, *places, folder, c or self.config, seed=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("hearts"))


def test_an_adapted_base_is_kept_for_the_same_inputs_and_made_anew_for_others(world, tmp_path):
    marker = world.base / "inputs.json"
    before = marker.stat().st_mtime_ns
    cardiac_models.adapt(world.studies, world.fold.train, world.fold.val, world.config, world.base)
    assert marker.stat().st_mtime_ns == before
    cardiac_models.adapt(world.studies, world.fold.val, world.fold.train, world.config, tmp_path / "other")
    assert marker.read_text() != (tmp_path / "other" / "inputs.json").read_text()
    loaded, _ = cardiac_models.load_base(world.base, world.config)
    assert loaded.vae.config.in_channels == 3 and loaded.unet.config.sample_size == 8


def test_a_grey_base_without_adaptation_is_refused(world):
    c = replace(world.config, base_model=replace(world.config.base_model, vae_steps=0, unet_steps=0))
    with pytest.raises(ValueError, match="VAE_STEPS"):
        cardiac_models.load_base(world.base, c)


def test_a_rehearsal_on_phantoms_is_where_patients_start(world, tmp_path):
    """A step of length zero leaves base and branch as the phantoms' ones; without a rehearsal the branch is the UNet."""
    folder = paths.RunFolder(str(tmp_path), "smoke", "cardiac", 0)
    c = replace(world.config, heart=replace(world.config.heart, rehearsal_steps=3))
    c = cardiac_models.rehearse(c, (1,), folder, seed=0)
    assert (folder.seed / "base" / "phantoms") == Path(c.base_model.base)
    phantoms = load_file(folder.train("control") / "phantoms" / "weights.safetensors")
    still = replace(c, train=replace(c.train, steps=1, lr=0.0, head_lr=0.0, ema=False))
    held = world.fold.train, world.fold.val, Path(c.base_model.base)
    cardiac_models.fit(world.studies, *held, folder.train("control") / "patients", still, seed=0)
    patients = load_file(folder.train("control") / "patients" / "weights.safetensors")
    assert patients.keys() == phantoms.keys() and all(torch.equal(v, phantoms[k]) for k, v in patients.items())
    anew = replace(still, heart=replace(c.heart, rehearsal_steps=0))
    cardiac_models.fit(world.studies, *held, folder.train("control") / "anew", anew, seed=0)
    zero = load_file(folder.train("control") / "anew" / "weights.safetensors")
    names = [k for k in zero if "controlnet_down_blocks" in k and k.endswith("weight")]
    assert names and not any(zero[k].any() for k in names) and any(phantoms[k].any() for k in names)
    assert cardiac_models.rehearse(anew, (1,), folder, seed=0) is anew
    assert cardiac_models.rehearse(c, (1,), folder, seed=0) is c, "a cell that is run twice"


def test_another_rehearsal_makes_another_base_of_patients(world, tmp_path):
    folder, made = paths.RunFolder(str(tmp_path), "smoke", "cardiac", 0), []
    for steps in (2, 3):
        c = replace(world.config, heart=replace(world.config.heart, rehearsal_steps=steps))
        c = cardiac_models.rehearse(c, (1,), folder, seed=0)
        cardiac_models.adapt(world.studies, world.fold.train, world.fold.val, c, folder.seed / "base" / "all")
        made.append((folder.seed / "base" / "all" / "inputs.json").read_text())
        place = folder.seed / "base" / "all", folder.train("control") / "all"
        cardiac_models.fit(world.studies, world.fold.train, world.fold.val, *place, c, seed=0)
        model, base, _ = cardiac_models.restore("control", world.studies, *place, c)
    assert made[0] != made[1] and made[0] != (world.base / "inputs.json").read_text()
    branch = load_file(folder.train("control") / "phantoms" / "weights.safetensors")
    moved = dict(model.control.named_parameters())
    assert any(not torch.equal(moved[k.removeprefix("control.")], v) for k, v in branch.items() if k.startswith("control."))
    studies = cardiac_cohorts.studies("cardiac", "", world.config)
    phantoms = cardiac_models.phantom_studies(18, "rehearsal", seed=world.config.data.data_seed)
    assert not set(phantoms.table["id"]) & set(studies.table["id"]), "nobody of the experiment rehearses"


def test_a_killed_adaptation_goes_on_to_the_same_base(world, tmp_path, monkeypatch):
    """Killed before it is moved into place: not one step of the UNet is taken again, and the base is the same."""
    again = world.studies, world.fold.train, world.fold.val, world.config, tmp_path / "base"
    steps, train = [], cardiac_models.train.train

    def killed(*_, **__):
        raise KeyboardInterrupt

    def counted(*parts, **named):
        for row in train(*parts, **named):
            steps.append(row["step"])
            yield row

    monkeypatch.setattr(cardiac_models.train, "train", counted)
    with monkeypatch.context() as patched:
        patched.setattr(base, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            cardiac_models.adapt(*again)
    assert steps == [1, 2] and (tmp_path / ".base").exists() and not (tmp_path / "base").exists()
    cardiac_models.adapt(*again)
    assert steps == [1, 2] and not (tmp_path / ".base").exists()
    assert diffusion.fingerprint(tmp_path / "base") == diffusion.fingerprint(world.base)


def same_base(world, made):
    fresh, _ = cardiac_models.load_base(world.base, world.config)
    return all(torch.equal(a, b) for a, b in zip(fresh.unet.parameters(), made.unet.parameters(), strict=True))


def test_the_base_is_locked_unless_asked_otherwise(world):
    control, made, _ = world.restore("control")
    assert same_base(world, made)
    assert any(z.weight.any() for z in control.control.controlnet_down_blocks), "the branch has learnt"
    free = replace(world.config, heart=replace(world.config.heart, locked=False))
    world.fit(free, "control_free")
    assert not same_base(world, world.restore("control_free", free)[1])
    text, made, sha256 = world.restore("text")
    assert same_base(world, made) and not hasattr(text, "control"), "the unconditioned model is that base"
    with pytest.raises(ValueError, match="unknown method"):
        world.restore("diffusion")


def test_the_token_goes_with_the_mask_and_takes_the_words_place(world):
    c = replace(world.config, heart=replace(world.config.heart, token=True))
    assert cardiac_models.named("control", c) == () and cardiac_models.named("text", c) is None
    log = world.fit(c, "control_token")
    assert np.isfinite(log["loss"]).all() and "kl" in "".join(log.columns).lower()
    model, _, _ = world.restore("control_token", c)
    assert model.conditioner.n_tokens == 1


def test_variants_move_picture_and_mask_together(world):
    images, masks = (read("stacked", 32, [0, 1, 2]) for read in (world.studies.images, world.studies.masks))
    seen, marked = cardiac_models.varied(images, masks, 3, seed=0)
    assert np.array_equal(seen[:3], images) and np.array_equal(marked[:3], masks) and len(seen) == 9
    painted = (masks == 1).astype(np.uint8) * 200  # a picture that is its mask
    moved, where = cardiac_models.varied(painted, masks, 3, seed=0)
    inside, outside = moved[3:][where[3:] == 1].mean(), moved[3:][where[3:] != 1].mean()
    assert inside > 170 and outside < 10 and not np.array_equal(where[3:6], masks) and set(np.unique(where)) <= {0, 1, 2, 3}


# --- sets -------------------------------------------------------------------------------------------------------------
def test_copied_rows_are_training_patients_even_over_sensitive_groups_and_label(world):
    rows = augment.set_rows(world.studies, world.fold, "copy", world.config, seed=0)
    assert len(rows) == 10 and rows["id"].is_unique and set(rows["donor"]) <= set(world.fold.train)
    table = world.studies.table
    for row in rows.to_dict("records"):
        assert all(row[k] == table[k].iloc[row["donor"]] for k in ("age", "sex", "bmi", "age_years", f"y_{LABEL}"))
    counts = rows.groupby(["sex", f"y_{LABEL}"]).size()
    assert counts.max() - counts.min() <= 1


def test_copied_rows_are_even_over_several_sensitive_attributes_at_once(world):
    c = replace(world.config, heart=replace(world.config.heart, sensitive=("sex", "age"), set_size=50))
    counts = augment.set_rows(world.studies, world.fold, "copy", c, seed=0).groupby(["sex", "age", f"y_{LABEL}"]).size()
    there = world.studies.table.iloc[world.fold.train].groupby(["sex", "age", f"y_{LABEL}"]).size()
    assert set(counts.index) == set(there.index) and len(there) > 4, "groups that occur among the patients"
    assert counts.max() - counts.min() <= 1 < there.max() - there.min() and counts.sum() == 50


def test_random_rows_keep_the_label_of_their_mask_and_draw_the_person(world):
    c = replace(world.config, heart=replace(world.config.heart, set_size=400))
    rows = augment.set_rows(world.studies, world.fold, "random", c, seed=0)
    table = world.studies.table
    assert set(rows["donor"]) <= set(world.fold.train)
    assert (rows[f"y_{LABEL}"].to_numpy() == table[f"y_{LABEL}"].to_numpy()[rows["donor"]]).all()
    assert rows[f"y_{LABEL}"].mean() == 0.5 and 0.4 < (rows["sex"] == "Female").mean() < 0.6
    for row in rows.head(40).to_dict("records"):
        low, _, high = row["age"].removesuffix("+").partition("-")
        assert int(low) <= row["age_years"] <= int(high or 120)
    again = augment.set_rows(world.studies, world.fold, "random", c, seed=0)
    assert rows.equals(again) and not rows.equals(augment.set_rows(world.studies, world.fold, "random", c, seed=1))


def test_unknown_sets_and_a_missing_label_are_refused(world):
    with pytest.raises(ValueError, match="unknown set"):
        augment.set_rows(world.studies, world.fold, "all", world.config, 0)
    truth = world.studies.table[f"y_{LABEL}"].to_numpy()
    well = replace(world.fold, train=world.fold.train[truth[world.fold.train] == 0])
    with pytest.raises(ValueError, match="no mask for the other"):
        augment.set_rows(world.studies, well, "random", world.config, 0)


def test_a_set_is_written_read_and_goes_on_where_it_stopped(world, tmp_path):
    table = world.generate("control", "copy", tmp_path / "set")
    read, images = augment.read(tmp_path / "set", LABEL)
    assert images.shape == (10, 32, 32, 3) and read["id"].tolist() == table["id"].tolist()
    assert augment.requested(world.studies, read, 32).shape == images.shape
    files = sorted((tmp_path / "set").glob("*/images/*.png"))
    with Image.open(files[0]) as image:
        assert image.info["Description"] == sample.LABEL and image.mode == "RGB"
    stamps = {f: f.stat().st_mtime_ns for f in files}
    before = np.asarray(Image.open(files[3])).astype(int)
    files[3].unlink()
    world.generate("control", "copy", tmp_path / "set")
    again = np.asarray(Image.open(files[3])).astype(int)
    assert np.abs(again - before).max() <= 1, "drawn alone, not in a batch: equal up to rounding"
    assert [f for f in files if f.stat().st_mtime_ns != stamps[f]] == [files[3]]
    c = replace(world.config, heart=replace(world.config.heart, copy_guidance=3.0))
    world.generate("control", "copy", tmp_path / "set", c)
    assert all(f.stat().st_mtime_ns != stamps[f] for f in files), "other settings, other images"


def test_the_negative_prompt_is_the_opposite_and_changes_the_images(world, tmp_path):
    assert augment.opposite(world.studies, 1) == "healthy" and augment.opposite(world.studies, 0) == LABEL
    plain = replace(world.config, heart=replace(world.config.heart, negative_prompt=False))
    world.generate("control", "random", tmp_path / "away")
    world.generate("control", "random", tmp_path / "plain", plain)
    (one, a), (two, b) = (augment.read(tmp_path / name, LABEL) for name in ("away", "plain"))
    assert one["id"].tolist() == two["id"].tolist() and not np.array_equal(a, b)
    made, _ = cardiac_models.load_base(world.base, world.config)
    empty = made.tokenize([""])
    made.negative = LABEL
    assert torch.equal(made.tokenize([""]), made.tokenize([LABEL])) and not torch.equal(made.tokenize([""]), empty)


def test_the_test_set_is_one_image_for_each_test_patient_and_text_needs_no_mask(world, tmp_path):
    table = world.generate("text", "test", tmp_path / "test")
    assert sorted(table["donor"]) == sorted(world.fold.test) and not set(table["donor"]) & set(world.fold.train)
    with pytest.raises(FileNotFoundError, match="notebook 09"):
        augment.read(tmp_path / "nothing", LABEL)
