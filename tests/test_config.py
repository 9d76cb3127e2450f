"""Settings: layers, types, unknown names; the presets against method section 2."""

import json
import re
from dataclasses import fields, replace

import pytest

from compdiff import config, paths, request
from compdiff.config import Config, override, settings


def test_layers_in_order(monkeypatch):
    monkeypatch.setitem(config.PROFILES, "p", dict(steps=10, batch=4, microbatch=2, lr=1.0, size=16))
    monkeypatch.setitem(config.DATASET_PRESETS, ("p", "d"), dict(batch=8, lr=2.0, size=24, vae_steps=7))
    monkeypatch.setitem(config.METHODS, "m", config.Method("M", overrides=(("lr", 3.0), ("size", 32), ("clip", 9.0))))
    monkeypatch.setitem(config.RECIPES, "r", dict(size=40, clip=8.0))
    c = settings("p", "d", "m", "r", clip=7.0)
    assert (c.train.steps, c.train.batch, c.train.lr, c.data.size, c.train.clip) == (10, 8, 3.0, 40, 7.0)
    assert c.base_model.vae_steps == 7 and settings("p", "other", "m").base_model.vae_steps == 0
    assert settings("demo") == override(Config(), **config.PROFILES["demo"])


def test_unknown_names_raise_and_say_what_is_known():
    with pytest.raises(ValueError, match="unknown setting 'stepps'; known settings: .*steps"):
        settings("smoke", stepps=3)
    for given, message in (
        (("big",), "unknown profile 'big'; known: smoke, demo, paper"),
        (("smoke", "chest", "hnc"), "unknown method 'hnc'; known: text, flat"),
        (("smoke", "chest", "hcn", "mine"), "unknown recipe 'mine'; known: profile, compdiff_hcn"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(*given)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("steps", "500", 500), ("steps", 500.0, 500), ("lr", "1e-3", 1e-3), ("lr", 1, 1.0), ("ema", "False", False), ("ema", "1", True),
     ("ema", False, False), ("trained", "unet text_encoder", ("unet", "text_encoder")), ("trained", ["unet"], ("unet",)),
     ("trained", "", ()), ("base", "there", "there"), ("solver", "ddim", "ddim")],
)  # fmt: skip
def test_values_take_the_type_of_their_field(name, value, expected):
    changed = override(Config(), **{name: value})
    found = getattr(getattr(changed, config.dials()[name]), name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(("name", "value"), [("steps", "5.5"), ("steps", 5.5), ("steps", "many"), ("ema", "maybe"), ("lr", "fast"),
                                             ("trained", 3), ("lr", None), ("lr", [1.0])])  # fmt: skip
def test_values_that_do_not_fit_raise(name, value):
    with pytest.raises(ValueError, match=f"setting {name}=.* is not a (int|bool|float|tuple)"):
        override(Config(), **{name: value})


def test_every_dial_is_unique_and_overriding_leaves_the_rest_alone():
    names = [dial.name for part in fields(Config) for dial in fields(part.default_factory)]
    assert len(names) == len(set(names)) and set(config.dials()) == set(names)
    before, changed = Config(), override(Config(), steps=7, size=16)
    assert (changed.train.steps, changed.data.size) == (7, 16) != (before.train.steps, before.data.size)
    train, data = replace(changed.train, steps=before.train.steps), replace(changed.data, size=before.data.size)
    assert replace(changed, train=train, data=data) == before


def test_the_papers_seed_is_theirs_and_every_profile_has_one():
    assert set(config.SEEDS) == set(config.PROFILES)
    assert [request.parse([], profile).seeds for profile in ("smoke", "demo", "paper")] == [(0,), (0,), (42,)]
    assert request.parse(["SEEDS=3 4"], "paper").seeds == (3, 4)


def test_a_flat_configuration_makes_the_same_one_again():
    done = settings("paper", "nih", "hcn_fairdiffusion", "fairdiffusion", base="there", compile=True)
    assert override(Config(), **config.flat(done)) == done != Config()
    assert override(Config(), **json.loads(json.dumps(config.flat(done)))) == done  # as run.json keeps it


def test_options_of_speed_are_off_unless_asked_for():
    """They change results by rounding, so neither the demo nor the papers' recipes take them."""
    for profile in config.PROFILES:
        for recipe in config.RECIPES:
            c = settings(profile, "chest", "hcn", recipe).train
            assert (c.optimizer, c.compile, c.channels_last) == ("adamw", False, False)


def test_a_name_in_two_parts_is_an_error(monkeypatch):
    monkeypatch.setattr(config, "fields", lambda cls: [*fields(Config), *fields(Config)[:1]] if cls is Config else fields(cls))
    with pytest.raises(TypeError, match="config field 'size' stands in data and data"):
        config.dials()


def test_every_preset_is_a_valid_configuration():
    for profile in config.PROFILES:
        for recipe in config.RECIPES:
            for method in config.METHODS:
                for dataset in ("chest", "fundus", "nih"):
                    done, owner = settings(profile, dataset, method, recipe), config.dials()
                    for name, value in config.RECIPES[recipe].items():  # a recipe has the last word
                        assert getattr(getattr(done, owner[name]), name) == value, (profile, dataset, method, recipe, name)
                    assert done.train.steps > 0 and done.train.batch % min(done.train.batch, done.train.microbatch) == 0


def test_an_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match="batch=64 is not divisible by microbatch=24"):
        settings("demo", batch=64, microbatch=24)
    assert settings("demo", batch=8, microbatch=24).train.batch == 8  # smaller than the microbatch: all at once


# Method section 2, the table of recipes.
COMPDIFF = dict(steps=30_000, lr=1e-5, lr_schedule="cosine", clip=1.0, precision="bf16", gradient_checkpointing=True, ema=True,
                trained=("unet", "text_encoder"), solver="ddpm", sample_steps=75, guidance=7.5, time_window=30, kl_weight=0.005,
                lora_rank=0, optimizer="adamw", ema_horizon=0.1, raw_samples=32)  # fmt: skip
FAIRDIFFUSION = dict(steps=100_000, batch=32, microbatch=16, lr=1e-5, lr_schedule="constant", clip=1.0, precision="fp16",
                     gradient_checkpointing=True, ema=True, trained=("unet",), solver="base", sample_steps=75, guidance=7.5,
                     input_perturbation=0.0, weighting="original", time_window=30, lora_rank=0, optimizer="adamw",
                     ema_horizon=0.1, raw_samples=20)  # fmt: skip


@pytest.mark.parametrize("profile", config.PROFILES)
@pytest.mark.parametrize(
    ("recipe", "method", "published"),
    [("compdiff_hcn", "hcn", COMPDIFF | dict(batch=8, input_perturbation=0.0)),
     ("compdiff_others", "text", COMPDIFF | dict(batch=16, input_perturbation=0.0)),
     ("compdiff_others", "fairdiffusion", COMPDIFF | dict(batch=16, input_perturbation=0.1)),
     ("fairdiffusion", "fairdiffusion", FAIRDIFFUSION)],
)  # fmt: skip
def test_recipes_are_the_published_ones_on_every_profile(profile, recipe, method, published):
    c = settings(profile, "chest", method, recipe)
    found = {name: getattr(getattr(c, config.dials()[name]), name) for name in published}
    assert found == published
    assert c.train.warmup * c.train.steps == pytest.approx(0 if recipe == "fairdiffusion" else 500)
    assert c.train.validate_every * c.train.steps == c.train.checkpoint_every * c.train.steps == pytest.approx(2_500)
    assert c.hcn.kl_ramp * 30_000 == pytest.approx(5_000)


def test_method_numbers_of_the_papers():
    hcn = Config().hcn
    assert (hcn.d_node, hcn.dropout, hcn.kl_weight, hcn.consistency_weight, hcn.aux_weight, hcn.aux_hidden) == (256, 0.1, 0.005, 0.1, 1.0, 512)
    fair = Config().fair
    assert (fair.time_window, fair.exploitation, fair.ucb_beta, fair.restarts, fair.raw_samples) == (30, 0.95, 0.1, 5, 20)
    assert config.MAIN_METHODS == ("text", "flat", "fairdiffusion", "hcn", "hcn_fairdiffusion")
    assert {m for m in config.METHODS if config.METHODS[m].fair} == {"fairdiffusion", "hcn_fairdiffusion"}


def test_readme_says_how_the_demo_differs_from_the_paper():
    said = re.search(r"(\d+) steps at (\d+) pixels, and a KL weight of (\S+) where CompDiff has ([\d.]+)\.",
                     (paths.ROOT / "README.md").read_text())  # fmt: skip
    demo, paper = settings("demo"), settings("paper", recipe="compdiff_hcn")
    assert [float(x) for x in said.groups()] == [demo.train.steps, demo.data.size, demo.hcn.kl_weight, paper.hcn.kl_weight]


def test_the_ablation_without_uncertainty_differs_in_nothing_else():
    whole, without = (settings("demo", "chest", m) for m in ("hcn", "hcn_no_uncertainty"))
    assert without == config.override(whole, uncertainty=False) != whole


def test_hearts_at_paper_scale_have_the_papers_numbers():
    heart = settings("paper", "biobank").heart
    assert (heart.train_prevalence, heart.repeats, heart.other_repeats, heart.folds) == (0.25, 8, 8, 5)
    assert (heart.copy_guidance, heart.random_guidance, heart.weight_clip) == (4.0, 9.0, 20.0)
