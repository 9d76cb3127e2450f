"""The base's recipe: its cohort is disjoint, lacks the held-out cells and says nothing about demographics."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from compdiff import base, diffusion, paths, train
from compdiff.cohorts import phantom_cohort
from compdiff.config import DataConfig, settings
from compdiff.manifests import dataset_names, load_manifest

N, SIZE = 120, 32  # per modality; the recipe's cohort is the same stream, longer and larger


def hashes(images):
    return {hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in images}


@pytest.fixture(scope="module", params=base.PHANTOMS)
def drawn(request):
    """Manifest, and the rows and images of the base's cohort with the shipped seed."""
    manifest = load_manifest(request.param)
    return manifest, *base.cohort(manifest, N, size=SIZE, seed=0)


def test_the_cohort_is_disjoint_from_every_experiment(drawn):
    manifest, rows, images = drawn
    assert len(rows) == len(images) == len(hashes(images)) == N
    ids, patients = {row["id"] for row in rows}, {row["patient"] for row in rows}
    assert len(ids) == N
    for interaction in base.DIALS:
        config = DataConfig(size=SIZE, train_n=60, val_n=30, test_per_cell=1, interaction=interaction)
        samples = list(phantom_cohort(manifest, config).samples)
        assert {row["split"] for row, _ in samples} == {"train", "val", "test"}
        assert not ids & {row["id"] for row, _ in samples} and not patients & {row["patient"] for row, _ in samples}
        assert not hashes(images) & hashes(image for _, image in samples)
    # ids are "<dataset>-<split>-<number>-0", so no experiment of any length or seed shares one
    assert all(re.fullmatch(rf"{manifest.name}-base(0|0\.5|1)-\d{{6}}-0", i) for i in ids)


def test_the_cohort_lacks_the_held_out_cells_and_has_all_others(drawn):
    manifest, rows, _ = drawn
    cells = manifest.schema.cells()
    seen = {cells[row["cell"]] for row in rows}
    assert manifest.held_out and not seen & set(manifest.held_out)
    assert seen == set(cells) - set(manifest.held_out)
    assert all(manifest.schema.encode(row) == cells[row["cell"]] for row in rows)


def test_the_prompts_carry_no_demographics(drawn):
    manifest, rows, _ = drawn
    prompts = base.captions(manifest, rows)
    assert len(prompts) == N and len(set(prompts)) > 3
    assert all(row["findings"] in text for row, text in zip(rows, prompts, strict=True))
    schemas = (load_manifest(name).schema for name in dataset_names())
    secret = {c.lower() for schema in schemas for a in schema.attributes for c in (*a.categories, a.name)}
    secret |= {"man", "woman", "boy", "girl", "year", "years", "old", "young", "patient", "he", "she", "his", "her"}
    for text in set(prompts):
        assert not secret & set(re.findall(r"[a-z]+", text.lower())), text
        assert not re.search(r"\d", text), text


def test_about_a_tenth_of_the_prompts_is_dropped():
    c = settings("demo").train  # what base.build starts from
    assert c.prompt_dropout == 0.1
    steps = [train.StepNoise(0, step, c.batch, slice(None)).uniform("prompt_dropout") for step in range(100)]
    assert abs((torch.cat(steps) < c.prompt_dropout).float().mean() - 0.1) < 0.015


def test_the_shipped_folder_is_what_its_recipe_says():
    written = json.loads((paths.TINY_BASE / "recipe.json").read_text())
    assert written["sha256"] == diffusion.fingerprint(paths.TINY_BASE)
    assert written["prompt_dropout"] == 0.1 and set(written["cohorts"]) == set(base.PHANTOMS)
    assert sum(path.stat().st_size for path in paths.TINY_BASE.rglob("*") if path.is_file()) <= 16 * 2**20


def test_a_cell_that_the_base_has_seen_cannot_be_held_out(tmp_path):
    demo, shipped = settings("demo"), json.loads((paths.TINY_BASE / "recipe.json").read_text())["held_out"]
    for name in base.PHANTOMS:
        manifest = load_manifest(name)
        assert shipped[name] == [manifest.schema.cell_name(c) for c in manifest.held_out]
        base.check_held_out(manifest, demo)
        seen = replace(manifest, held_out=(*manifest.held_out, manifest.schema.cells()[0]))
        with pytest.raises(ValueError, match=r"holds out 0-18 Male White, which the base tiny .* `make base`"):
            base.check_held_out(seen, demo)
        base.check_held_out(seen, settings("demo", base=str(tmp_path)))  # another base, no phantoms in it
    base.check_held_out(load_manifest("nih"), demo)


# --- training its parts --------------------------------------------------------------------------------------------
@pytest.fixture
def model(tiny_root):
    return diffusion.load(str(tiny_root / "base"))


def test_the_vae_learns_and_is_left_frozen(model, drawn):
    images = drawn[2][:32]
    losses = [row["loss"] for row in base.train_vae(model.vae, images, steps=12, batch=8)]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.8 * losses[0]
    assert not any(p.requires_grad for p in model.vae.parameters()) and not model.vae.training


def test_latents_get_unit_deviation(model, drawn):
    base.set_scaling_factor(model, drawn[2])
    assert model.latents(model.moments(drawn[2])).std().item() == pytest.approx(1.0, abs=1e-3)


def test_the_unet_is_trained_by_the_one_loop(model, drawn, tmp_path):
    manifest, rows, images = drawn
    prompts = base.captions(manifest, rows)
    data = base.as_latents(model, images[:16], prompts[:16])
    before = {n: p.clone() for n, p in model.unet.state_dict().items()}
    base.train_unet(model, data, data, settings("smoke", steps=2, batch=4, microbatch=4), tmp_path / "run")
    assert any(not torch.equal(p, before[n]) for n, p in model.unet.state_dict().items())
    base.publish(model, tmp_path / "out", tmp_path)
    again = diffusion.load(str(tmp_path / "out"))
    assert all(torch.equal(p, again.unet.state_dict()[n]) for n, p in model.unet.state_dict().items())
    assert again.vae.config.scaling_factor == model.vae.config.scaling_factor
