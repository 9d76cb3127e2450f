"""The heart's part: finished ControlNets are found, and an image follows its mask's picture, prompt and seed."""

import numpy as np
import pytest
import tiny
import torch

from compdiff import base as bases
from compdiff import controlnet, heart_studio, masks, record, untrained
from compdiff.config import SampleConfig
from compdiff.interfaces import NoConditioner
from compdiff.request import Refused
from compdiff.studio import Sampling

USUAL = SampleConfig(solver="ddim", sample_steps=20, guidance=4.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An untrained ControlNet on a base for stacked frames of 32 pixels, in which every condition shows."""
    grey = untrained.build_tiny(bases.corpus(), tmp_path_factory.mktemp("tokenizer"), size=32, width=16)
    base = controlnet.stacked(grey)
    model = controlnet.ControlDenoiser(base, NoConditioner(base.d_ctx), []).eval()
    with torch.no_grad():
        torch.manual_seed(0)
        for module in model.control.modules():  # branch and mask encoder end in convolutions that start at zero
            if isinstance(module, torch.nn.Conv2d) and not module.weight.any():
                torch.nn.init.normal_(module.weight, std=0.3)
        for name, weight in base.unet.named_parameters():  # an untrained UNet hardly listens to its prompt
            weight.mul_(10 if name.endswith("attn2.to_out.0.weight") else 3 if name == "conv_out.weight" else 1)
        base.vae.decoder.conv_out.weight.mul_(3)
    return model, base


@pytest.fixture(scope="module")
def examples():
    return masks.examples(32)


def draw(made, mask, prompt="Male, heart failure", classes=(1, 2, 3), **how):
    sampling = Sampling(steps=2, guidance=8.0, **({"n": 1} | how))
    return list(heart_studio.draw(*made, mask, prompt, np.zeros(3, np.int64), classes, sampling, USUAL, "abc"))


def test_an_image_follows_mask_prompt_and_seed(made, examples):
    one = draw(made, examples[0].mask)[0].image
    assert one.shape == (32, 32, 3) and one.dtype == np.uint8 and one.std() > 1
    assert np.array_equal(one, draw(made, examples[0].mask)[0].image)
    assert not np.array_equal(one, draw(made, examples[1].mask)[0].image)
    assert not np.array_equal(one, draw(made, examples[0].mask, "healthy")[0].image)
    assert not np.array_equal(one, draw(made, examples[0].mask, seed=1)[0].image)
    cavity = np.where(examples[0].mask == 1, 1, 0).astype(np.uint8)
    same = draw(made, examples[0].mask, classes=(1,))[0].image
    assert np.array_equal(same, draw(made, cavity, classes=(1,))[0].image), "the model sees the cavity alone"


def test_the_number_of_images_changes_none_of_them(made, examples):
    five = draw(made, examples[0].mask, n=5)
    assert [d.number for d in five] == [0, 1, 2, 3, 4] and five[0].prompt == "Male, heart failure"
    two = draw(made, examples[0].mask, n=2)
    assert all(np.abs(a.image.astype(int) - b.image).max() <= 1 for a, b in zip(two, five, strict=False))


def test_frames_are_the_channels(made, examples):
    image = draw(made, examples[0].mask)[0].image
    frames = heart_studio.frames(image)
    assert list(frames) == ["stacked", "ED", "ES"] and np.array_equal(frames["ES"], image[..., 1])
    assert np.array_equal(frames["ED"], np.rint(image[..., [0, 2]].mean(axis=-1)))


def test_a_long_prompt_is_refused(made, examples):
    with pytest.raises(Refused, match="301 characters"):
        draw(made, examples[0].mask, "x" * 301)


def test_prompts_name_all_attributes(examples):
    row = examples[1].row
    prompt = heart_studio.prompt_of(row)
    assert row["sex"] in prompt and f"{row['age_years'] // 10 * 10}s" in prompt and f"{row['bmi']} BMI" in prompt
    assert prompt.endswith("heart failure")


def test_only_finished_controlnets_are_found(tmp_path):
    places = (
        "demo/cardiac/seed0/train/control/all",
        "smoke/cardiac/seed1/train/control/fold2",
        "demo/cardiac/seed0/train/text/all",
    )
    rehearsal = "demo/cardiac/seed0/train/control/phantoms"
    for place in (*places, rehearsal, "demo/cardiac/seed2/train/control/all"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "weights.safetensors").touch()
    for place in (*places, rehearsal, "other/cardiac/seed0/train/control/all", "demo/cardiac/seed3/train/control/all"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "run.json").write_text("{}")
    names = [run.name for run in heart_studio.trained_runs(str(tmp_path))]
    assert names == ["cardiac, profile demo, training seed 0", "cardiac, profile smoke, training seed 1, fold2"]
    assert heart_studio.trained_runs(str(tmp_path / "none")) == []


# --- a trained one ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=[False, True], ids=["prompt", "token"])
def trained(request, tmp_path_factory):
    """A ControlNet of two steps where notebook 09 leaves it, with and without the token."""
    root = tmp_path_factory.mktemp("hearts")
    untrained.build_tiny(bases.corpus(), root / "tokenizer", size=32, width=16).save(root / "base")
    tiny.with_heart(root, request.param)
    return heart_studio.HeartRun(str(root), "smoke", "cardiac", 0, "all", str(root / "base"))


def test_a_trained_controlnet_is_found_and_draws(trained, examples):
    assert heart_studio.trained_runs(trained.runs, trained.base) == [trained]
    assert heart_studio.settings(trained).data.size == 32
    drawn = list(
        heart_studio.generate(
            trained, examples[0].mask, "healthy", examples[0].row, Sampling(steps=2, n=2, guidance=15)
        )
    )
    weights = trained.folder.train("control") / "all" / "weights.safetensors"
    assert [d.image.shape for d in drawn] == [(32, 32, 3)] * 2 and drawn[0].checkpoint == record.sha256_file(weights)
    other = list(
        heart_studio.generate(
            trained, examples[0].mask, "healthy", examples[1].row, Sampling(steps=2, n=1, guidance=15)
        )
    )
    same = np.array_equal(drawn[0].image, other[0].image)
    assert same != heart_studio.settings(trained).heart.token, (
        "another patient's attributes count where there is a token"
    )


def test_the_page_starts_where_the_copied_set_was_drawn(trained, tmp_path):
    usual = heart_studio.usual(trained)
    assert (usual.steps, usual.guidance) == (tiny.HEART["sample_steps"], tiny.HEART["random_guidance"])
    for profile, guidance in (("demo", 2.0), ("paper", 9.0)):  # no record: the profile's own
        assert heart_studio.usual(heart_studio.HeartRun(str(tmp_path), profile, "cardiac", 0, "all")).guidance == guidance
