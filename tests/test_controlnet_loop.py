"""ControlNet through the project's one loop and its sampler: `denoiser`, `Latents.extra` and `Denoiser.predict`."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from compdiff import base, cardiac, controlnet, diffusion, sample, train, untrained
from compdiff.config import Config, HCNConfig, SampleConfig, TrainConfig
from compdiff.hcn import HCN
from compdiff.interfaces import NoConditioner, NoReweighter

CONFIG = replace(
    Config(),
    train=TrainConfig(steps=4, batch=4, microbatch=2, lr=1e-2, trained=(), validate_every=0.5),
    sample=SampleConfig(sample_steps=2, sample_batch=2),
)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return controlnet.stacked(untrained.build_tiny(base.corpus(), tmp_path / "tokenizer", size=32, width=16))


@pytest.fixture
def data(model):
    """Training data of 8 phantoms."""
    studies = cardiac.phantom_studies(8, "train", seed=0)
    return controlnet.control_latents(
        model, studies.images("stacked", 32), studies.masks("stacked", 32), studies.prompts(), studies.attributes()
    )


def run(model, data, folder, conditioner=None, valid=None):
    conditioner = conditioner or NoConditioner(model.d_ctx)
    return train.run(
        CONFIG,
        model,
        "base",
        data,
        valid or data,
        conditioner,
        NoReweighter(),
        folder,
        columns=None,
        denoiser=controlnet.ControlDenoiser,
    )


def copied(model):
    return {
        n: p.detach().clone()
        for part in (model.unet, model.text_encoder, model.vae)
        for n, p in part.state_dict().items()
    }


def test_the_loop_trains_the_branch_and_the_token_and_leaves_the_base(model, data, tmp_path):
    before = copied(model)
    torch.manual_seed(0)
    conditioner = HCN((5, 2, 3), model.d_ctx, HCNConfig(d_node=8, aux_hidden=8))
    log = run(model, data, tmp_path / "run", conditioner)
    assert len(log) == 4 and np.isfinite(log["loss"]).all() and log["val_loss"].notna().sum() == 2
    assert all(torch.equal(p, before[n]) for n, p in copied(model).items()), (
        "a locked base is bit-identical after training"
    )
    with safe_open(tmp_path / "run" / "weights.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {n.split(".")[0] for n in names} == {"control", "conditioner"}
    fresh = controlnet.ControlDenoiser(model, conditioner)
    train.load_weights(fresh, diffusion.trainable(fresh, CONFIG.train), tmp_path / "run" / "weights.safetensors")
    assert any(m.weight.any() for m in fresh.control.controlnet_down_blocks)


def test_every_row_is_trained_with_its_own_picture(model, data):
    seen = []
    denoiser = controlnet.ControlDenoiser(model, NoConditioner(model.d_ctx))

    def spy(*given, picture):
        seen.append(picture)
        return denoiser(*given, picture=picture)

    rows = torch.tensor([5, 0, 3])
    noise = train.StepNoise(0, 0, 3, slice(None))
    train.step_losses(spy, denoiser, model, data, rows, noise, CONFIG.train, 0.0)
    assert torch.equal(seen[0], torch.stack([controlnet.to_picture(data.masks[r : r + 1])[0] for r in (5, 0, 3)]))


def test_rows_are_taken_with_everything_that_belongs_to_them(model, data):
    taken = data.take(np.array([3, 3, 1]))
    assert len(taken) == 3 and torch.equal(taken.moments[0], taken.moments[1])
    assert torch.equal(taken.extra(slice(2, 3))["picture"], data.extra(slice(1, 2))["picture"])
    assert torch.equal(taken.text, data.text[[3, 3, 1]]) and torch.equal(taken.attributes, data.attributes[[3, 3, 1]])


def test_other_masks_are_other_inputs(model, data):
    def wanted(given, denoiser=controlnet.ControlDenoiser):
        return train.inputs_hash(
            CONFIG, "base", given, data, NoConditioner(model.d_ctx), NoReweighter(), None, 0, denoiser
        )

    cavity = replace(data, classes=controlnet.CAVITY_ONLY)
    other = replace(data, masks=data.masks.flip(0))
    assert len({wanted(data), wanted(cavity), wanted(other), wanted(data, diffusion.Denoiser)}) == 4 and wanted(
        data
    ) == wanted(replace(data))


def test_sampling_at_step_0_is_the_bases_and_later_follows_the_picture(model, data, tmp_path):
    none = NoConditioner(model.d_ctx)
    plain, control = diffusion.Denoiser(model, none), controlnet.ControlDenoiser(model, none)
    pictures = data.extra(slice(0, 2))["picture"]
    given = (model, data.text[:2], data.empty, data.attributes[:2], [1, 2])
    for guidance in (1.0, 4.0):
        config = replace(CONFIG.sample, guidance=guidance, solver="ddim")
        images = sample.sample(control, *given, config, picture=pictures)
        assert images.shape == (2, 32, 32, 3) and np.array_equal(images, sample.sample(plain, *given, config))
    run(model, data, tmp_path / "run")
    train.load_weights(control, diffusion.trainable(control, CONFIG.train), tmp_path / "run" / "weights.safetensors")
    config = CONFIG.sample
    both = sample.sample(control, *given, config, picture=pictures)
    turned = sample.sample(control, *given, config, picture=pictures.flip(0))
    assert not np.array_equal(both, turned)
    alone = sample.sample(
        control, model, data.text[:1], data.empty, data.attributes[:1], [1], config, picture=pictures[:1]
    )
    assert np.abs(alone[0].astype(int) - both[0]).max() <= 1, "a picture does not depend on its batch"


def test_a_generated_set_is_made_anew_for_other_pictures(model, data, tmp_path):
    control = controlnet.ControlDenoiser(model, NoConditioner(model.d_ctx))
    rows = pd.DataFrame({"id": ["a", "b", "c"], "sex": "Male"})

    def make(picture):
        sample.generate(
            tmp_path / "set",
            rows,
            ["healthy"] * 3,
            np.zeros((3, 3), int),
            control,
            model,
            CONFIG.sample,
            "control",
            "w",
            0,
            picture=picture,
        )
        return (tmp_path / "set" / "inputs.txt").read_text(), (tmp_path / "set" / "images" / "a.png").stat().st_mtime_ns

    pictures = data.extra(slice(0, 3))["picture"]
    first, again, other = make(pictures), make(pictures), make(pictures.flip(0))
    assert first == again and first[0] != other[0] and first[1] != other[1]
    with Image.open(tmp_path / "set" / "images" / "c.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB" and image.info["Description"] == sample.LABEL


def test_the_widened_vae_learns_stacked_frames(model):
    images = cardiac.phantom_studies(8, "train", seed=0).images("stacked", 32)
    losses = [row["loss"] for row in base.train_vae(model.vae, images, steps=12, batch=8)]
    assert losses[-1] < losses[0] and model.decode(model.latents(model.moments(images))).shape == images.shape


def test_data_that_do_not_fit_are_refused(model):
    studies = cardiac.phantom_studies(2, "train", seed=0)
    images, masks = studies.images("stacked", 32), studies.masks("stacked", 32)
    for wrong in ((images, masks[:, :16], ["a", "b"]), (images, masks, ["a"]), (images, masks + 4, ["a", "b"])):
        with pytest.raises(ValueError):
            controlnet.control_latents(model, *wrong, np.zeros((2, 3), int))
