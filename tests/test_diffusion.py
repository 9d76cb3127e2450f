"""The base model's folder: Stable Diffusion's own layout, safetensors only, quiet; the tokenizer; latents and images."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from compdiff import base, controlnet, diffusion, record
from compdiff.attributes import SCHEMAS
from compdiff.interfaces import NoConditioner


@pytest.fixture(scope="module")
def loaded(tiny_root):
    return diffusion.load(str(tiny_root / "base"))


@pytest.fixture
def folder(tiny_root, tmp_path):
    """A copy of the tiny base to break."""
    return shutil.copytree(tiny_root / "base", tmp_path / "base")


# --- the folder ------------------------------------------------------------------------------------------------------
def test_the_saved_base_opens_as_a_stable_diffusion_pipeline(tiny_root, loaded):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_root / "base")
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 900])
    prompts = ["The heart is enlarged.", ""]
    with torch.no_grad():
        context = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        expected = pipeline.unet(z, t, context).sample
        model = diffusion.Denoiser(loaded, NoConditioner(loaded.d_ctx), [])
        found, _ = model(z, t, loaded.tokenize(prompts), torch.zeros(2, 1).long())
    assert torch.allclose(found, expected, atol=1e-5) and expected.std() > 0.01
    assert pipeline.scheduler.config.prediction_type == loaded.scheduler.config.prediction_type == "v_prediction"
    assert len(torch.unique(found[0] - found[1])) > 1


def test_half_precision_is_for_the_file_only(tiny_root, loaded, tmp_path):
    before = {n: p.clone() for n, p in loaded.unet.state_dict().items()}
    loaded.save(tmp_path / "half", half=True)
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in loaded.unet.state_dict().items())
    again = diffusion.load(str(tmp_path / "half"))
    assert all(p.dtype == torch.float32 and torch.equal(p, before[n].half().float()) for n, p in again.unet.state_dict().items())
    sizes = [(root / diffusion.WEIGHTS[-1]).stat().st_size for root in (tiny_root / "base", tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_folders_own_scheduler_is_kept(folder):
    scheduler = PNDMScheduler(prediction_type="epsilon", skip_prk_steps=True, steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    model = diffusion.load(str(folder))
    own = model.sampler("base")
    assert type(own) is PNDMScheduler and own.config.skip_prk_steps and own.config.prediction_type == "epsilon"
    model.save(folder.with_name("again"))
    assert json.loads((folder.with_name("again") / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "PNDMScheduler"
    own.set_timesteps(4)
    z = torch.randn(1, 4, 8, 8)
    assert diffusion.step_back(own, z, own.timesteps[0], z, [torch.Generator()]).shape == z.shape


@pytest.mark.parametrize("part", ["model_index.json", *diffusion.PARTS])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {part}: not a Stable Diffusion folder"):
        diffusion.load(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused_unread(folder, part, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (weights,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    weights.unlink()
    torch.save({"weight": Bomb()}, folder / part / name)
    with pytest.raises(FileNotFoundError, match=f"lacks {part}/.*safetensors: pickled weights"):
        diffusion.load(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_the_hash_of_the_unet_or_of_the_whole_folder_is_checked(folder):
    unet, whole = record.sha256_file(folder / diffusion.WEIGHTS[-1]), diffusion.fingerprint(folder)
    for right in (unet, whole):
        diffusion.load(str(folder), sha256=right)
    with pytest.raises(ValueError, match=f"have sha256 {unet}, the whole folder {whole}, expected 1234"):
        diffusion.load(str(folder), sha256="1234")
    (folder / "tokenizer" / "more.txt").write_text("")
    diffusion.load(str(folder), sha256=unet)
    with pytest.raises(ValueError, match=f"expected {whole}"):
        diffusion.load(str(folder), sha256=whole)


@pytest.mark.parametrize("profile", ["smoke", "demo", "paper"])
def test_a_hub_id_without_revision_is_refused_on_every_profile(profile, tmp_path):
    with pytest.raises(FileNotFoundError, match="name its revision too"):
        diffusion.load_for(tiny.run_folder(tmp_path), tiny.settings(profile, "chest", base="someone/some-model"))


@pytest.mark.parametrize(("name", "message"), [("", "no base model named: set BASE="), ("./nowhere", "is no folder here"),
                                               ("someone/some-model", "name its revision too")])  # fmt: skip
def test_bases_that_cannot_be_found_say_what_to_do(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        diffusion.load(name)


def test_a_hub_id_is_read_at_its_commit_and_checked(tiny_root, tmp_path):
    """From the hub's cache, in another process, with the network off."""
    commit, wrong = "0123456789" * 4, "f" * 40
    shutil.copytree(tiny_root / "base", tmp_path / "hub" / "models--some--model" / "snapshots" / commit)
    right = record.sha256_file(tiny_root / "base" / diffusion.WEIGHTS[-1])
    code = f"""
from compdiff import diffusion
here, there = diffusion.load({str(tiny_root / "base")!r}), diffusion.load("some/model", {commit!r}, {right!r})
for part in ("unet", "vae", "text_encoder"):
    a, b = (getattr(d, part).state_dict() for d in (here, there))
    assert set(a) == set(b) and all((a[n] == b[n]).all() for n in a)
assert here.tokenize(["The heart"]).tolist() == there.tokenize(["The heart"]).tolist()
for revision, sha256 in (({commit!r}, "1234"), ({wrong!r}, ""), ("main", "")):
    try:
        diffusion.load("some/model", revision, sha256)
    except (ValueError, OSError) as error:
        print(type(error).__name__, str(error).splitlines()[0][:80])
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=base.paths.ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("ValueError the UNet weights of 'some/model' have sha256") and second.startswith("OSError")
    assert third.startswith("ValueError revision 'main' of 'some/model' is no commit")


def test_a_scheduler_that_does_not_speak_of_clipping_clips_nothing(folder):
    """Latents leave [-1, 1]; diffusers' DDPM would clip them unless told otherwise."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "clip_sample"}))
    model = diffusion.load(str(folder))
    z = torch.full((1, 4, 8, 8), 3.0)
    for solver in ("ddpm", "ddim", "dpm++", "base"):
        scheduler = model.sampler(solver)
        scheduler.set_timesteps(2)
        v = model.target(z, torch.zeros_like(z), scheduler.timesteps[-1:])
        noisy = model.scheduler.add_noise(z, torch.zeros_like(z), scheduler.timesteps[-1:])
        found = diffusion.step_back(scheduler, v, scheduler.timesteps[-1], noisy, [torch.Generator().manual_seed(0)])
        assert found.mean() > 2, solver


def test_fingerprint_changes_with_any_file_but_the_recipe(folder):
    before = diffusion.fingerprint(folder)
    record.write_json(folder / "recipe.json", {"sha256": before})
    assert diffusion.fingerprint(folder) == before
    (folder / "tokenizer" / "more.txt").write_text("")
    changed = diffusion.fingerprint(folder)
    (folder / "tokenizer" / "more.txt").rename(folder / "tokenizer" / "most.txt")
    assert len({before, changed, diffusion.fingerprint(folder)}) == 3


def test_the_adapted_copy_is_used_where_the_settings_ask_for_one(tiny_root, tmp_path):
    run_folder, config = tiny.run_folder(tmp_path), tiny.config(tiny_root, unet_steps=1)
    with pytest.raises(FileNotFoundError, match="run notebook 01_data_prep"):
        diffusion.load_for(run_folder, config)
    shutil.copytree(tiny_root / "base", run_folder.base)
    (run_folder.base / "tokenizer" / "more.txt").write_text("")
    assert diffusion.load_for(run_folder, config)[1] == diffusion.fingerprint(run_folder.base)
    assert diffusion.load_for(run_folder, tiny.config(tiny_root))[1] == diffusion.fingerprint(tiny_root / "base")


def test_importing_loading_and_saving_say_nothing(tiny_root, tmp_path):
    code = f"from compdiff import diffusion; from pathlib import Path\nb = diffusion.load({str(tiny_root / 'base')!r})\n"
    code += f"b.tokenize(['word ' * 100]); b.save(Path({str(tmp_path / 'new')!r}), half=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=base.paths.ROOT, check=True)
    assert done.stdout == "" and done.stderr == ""


# --- the tokenizer -----------------------------------------------------------------------------------------------------
def test_each_word_of_the_corpus_is_one_token_and_digits_stand_alone(loaded):
    words = {w for text in base.corpus() for w in "".join(c if c.isalpha() else " " for c in text.lower()).split()}
    assert len(words) > 60
    assert {w: loaded.tokenizer.tokenize(w) for w in words} == {w: [f"{w}</w>"] for w in words}
    assert loaded.tokenizer.tokenize("52 year old") == ["5</w>", "2</w>", "year</w>", "old</w>"]
    unknown = loaded.tokenizer.tokenize("zyxwv")
    assert len(unknown) > 1 and loaded.tokenizer.unk_token not in unknown


def test_prompts_are_padded_and_cut_to_the_encoders_length(loaded):
    length = loaded.text_encoder.config.max_position_embeddings
    ids = loaded.tokenize(["", "The heart is enlarged.", "heart " * 200])
    assert ids.shape == (3, length) and ids.dtype == torch.long
    begin, end = loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id
    assert (ids[:, 0] == begin).all() and ids[0, 1] == end and ids[2, -1] == end
    assert len(set(ids[1].tolist()) - {begin, end}) == 5  # the heart is enlarged .


def test_many_prompts_are_tokenized_in_pieces_to_the_same_ids(loaded, monkeypatch):
    prompts = ["", "The heart is enlarged.", "heart " * 200, "52 year old", "There is a fracture.", ""]
    whole, length = loaded.tokenize(prompts), loaded.text_encoder.config.max_position_embeddings
    asked, tokenizer = [], loaded.tokenizer
    monkeypatch.setattr(loaded, "tokenizer", lambda texts, **how: asked.append(len(texts)) or tokenizer(texts, **how))
    for piece, sizes in ((1, [1] * 6), (4, [4, 2]), (3, [3, 3]), (6, [6])):
        monkeypatch.setattr(diffusion, "PROMPTS", piece)
        assert torch.equal(loaded.tokenize(tuple(prompts)), whole) and asked == sizes
        asked.clear()
    assert loaded.tokenize([]).shape == (0, length)


@pytest.mark.parametrize("name", ["chest", "fundus", "nih"])  # what the tiny base is used for
def test_the_longest_prompt_fits(loaded, name):
    manifest = base.load_manifest(name)
    longest = manifest.describe({label: len(phrases) - 1 for label, phrases in manifest.labels.items()})
    row = {a.name: max(a.categories, key=len) for a in manifest.schema.attributes} | {"age_years": 100, "findings": longest}
    text = base.prompt(manifest.prompts, row, manifest.schema.names, manifest.schema)
    used = len(loaded.tokenizer(text)["input_ids"])
    assert used <= loaded.text_encoder.config.max_position_embeddings, f"{used} tokens: {text}"


# --- images and latents ----------------------------------------------------------------------------------------------
def test_images_go_to_the_model_and_back():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    x = diffusion.to_model(images, 3)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert np.array_equal(diffusion.to_images(x), images)
    assert np.array_equal(diffusion.to_images(torch.tensor([[[[-7.0, 7.0]]]])), [[[0, 255]]])


def test_moments_are_cached_not_one_sample(loaded):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    moments = loaded.moments(images)
    with torch.no_grad():
        q = loaded.vae.encode(diffusion.to_model(images, 1)).latent_dist
    noise, scale = torch.randn(3, 4, 8, 8), loaded.vae.config.scaling_factor
    assert torch.allclose(loaded.latents(moments), scale * q.mean, atol=1e-5)
    assert torch.allclose(loaded.latents(moments, noise), scale * (q.mean + q.std * noise), atol=1e-5)
    decoded = loaded.decode(loaded.latents(moments))
    assert np.array_equal(decoded, diffusion.to_images(loaded.vae.decode(q.mean).sample.detach()))


@pytest.mark.parametrize("form", [lambda base: base, controlnet.stacked], ids=["grey", "stacked"])
def test_the_vae_works_in_slices_that_change_nothing(loaded, monkeypatch, form):
    model, seen = form(loaded), []
    shape = (5, 32, 32) if model.vae.config.in_channels == 1 else (5, 32, 32, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    moments = model.moments(images)
    decoded = model.decode(model.latents(moments))
    assert decoded.shape == shape
    for name in ("encode", "decode"):
        whole = getattr(model.vae, name)
        monkeypatch.setattr(model.vae, name, lambda x, whole=whole: seen.append(len(x)) or whole(x))
    monkeypatch.setattr(diffusion, "VAE_PIXELS", 2 * 32 * 32 + 1)
    assert torch.allclose(model.moments(images), moments, atol=1e-5)
    assert np.abs(model.decode(model.latents(moments)).astype(int) - decoded).max() <= 1
    assert seen == [2, 2, 1] * 2
    monkeypatch.setattr(diffusion, "VAE_PIXELS", 7)
    model.moments(images[:2])
    assert seen[6:] == [1, 1], "one image at a time, however large"


def test_a_slice_is_64_small_images_and_four_of_the_papers():
    assert [diffusion.at_once(side) for side in (32, 64, 128, 256, 512, 768, 2048)] == [64, 64, 64, 16, 4, 1, 1]


def test_images_that_are_no_numbers_are_not_drawn(loaded):
    z = torch.zeros(2, 4, 8, 8)
    z[1, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="hold NaN or infinity: set PRECISION=no"):
        loaded.decode(z)


def test_zeroed_tokens_and_context_shape(loaded):
    parts = tiny.methods.build("hcn", SCHEMAS["chest"], loaded.d_ctx, tiny.settings("smoke", d_node=8), 0)
    model = diffusion.Denoiser(loaded, parts.conditioner, parts.columns).eval()
    ids, attributes = loaded.tokenize(["normal", "obese"]), torch.tensor([[0, 1, 2], [4, 0, 3]])
    context, _ = model.context(ids, attributes, keep=torch.tensor([1.0, 0.0]))
    assert context.shape == (2, ids.shape[1] + 1, loaded.d_ctx)
    assert context[0, -1].abs().sum() > 0 and context[1, -1].abs().sum() == 0
    assert torch.allclose(context[:, :-1], loaded.text_encoder(ids)[0])
