"""Stable Diffusion 2.1's exact layout: counts and shapes at full size, the whole path at a tenth of the width."""

import argparse
import json
import re
import runpy
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.flop_counter import FlopCounterMode

from compdiff import base, datasets, diffusion, export, latents, methods, paths, sample, untrained
from compdiff.attributes import SCHEMAS
from compdiff.config import DataConfig, TrainConfig, settings
from compdiff.controlnet import ControlDenoiser

BENCH = SimpleNamespace(**runpy.run_path(str(paths.ROOT / "benchmarks" / "bench_gpu.py")))
WHO = torch.tensor([[0, 1, 2], [4, 0, 3]])


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def full():
    """The true configuration on the meta device: shapes, no numbers."""
    return BENCH.build(BENCH.layout(narrow=False), "meta")


def with_hcn(parts, cls=diffusion.Denoiser):
    made = methods.build("hcn", SCHEMAS["chest"], parts.d_ctx, settings("paper"), 0)
    with torch.device("meta"):
        return cls(parts, made.conditioner.to("meta"), made.columns).eval()


# --- full size --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["base", "v21"])
def test_parameter_counts_are_those_of_the_released_weights(version):
    parts = BENCH.build(BENCH.layout(narrow=False, version=version), "meta")
    assert [size(m) for m in (parts.unet, parts.text_encoder, parts.vae)] == [865_910_724, 340_387_840, 83_653_863]
    assert (parts.d_ctx, parts.channels, parts.unet.config.sample_size) == (1024, 4, 96 if version == "v21" else 64)
    assert parts.scheduler.config.prediction_type == ("v_prediction" if version == "v21" else "epsilon")
    assert type(parts.sampler("base")).__name__ == ("DDIMScheduler" if version == "v21" else "PNDMScheduler")


def test_every_shape_on_the_path_and_the_cost_of_a_step(full):
    model, meta = with_hcn(full), torch.device("meta")
    q = full.vae.encode(torch.empty(2, 3, 512, 512, device=meta)).latent_dist.parameters
    z = full.latents(q, torch.empty(2, 4, 64, 64, device=meta))
    assert q.shape == (2, 8, 64, 64) and z.shape == (2, 4, 64, 64)
    ids = torch.zeros(2, 77, dtype=torch.long, device=meta)
    context, condition = model.context(ids, WHO.to(meta))
    assert condition.tokens.shape == (2, 1, 1024) and context.shape == (2, 78, 1024)
    counter = FlopCounterMode(display=False)
    with counter:
        assert model.predict(z, torch.zeros(2, device=meta), context).shape == (2, 4, 64, 64)
    forward = counter.get_total_flops() / 2 / 1e12
    assert 3 * forward == pytest.approx(BENCH.TFLOP, rel=0.02)  # backward costs twice the forward
    assert full.vae.decode(z / full.vae.config.scaling_factor).sample.shape == (2, 3, 512, 512)


def test_adapters_sit_on_every_attention_projection(full):
    model = with_hcn(full)
    with torch.device("meta"):
        params = diffusion.trainable(model, TrainConfig(trained=("unet",), lora_rank=4))
    adapters = {n: p for n, p in params.items() if not n.startswith("conditioner.")}
    assert len(adapters) == 16 * 2 * 4 * 2 and all(
        "lora_" in n for n in adapters
    )  # blocks, attentions, projections, A and B
    expected = sum(
        k * 4 * (14 * c + 2 * 1024) for c, k in ((320, 5), (640, 5), (1280, 6))
    )  # r (14 c + 2 d_ctx) a block
    assert sum(p.numel() for p in adapters.values()) == expected == 829_952


def test_a_control_branch_fits(full):
    model, meta = with_hcn(full, ControlDenoiser), torch.device("meta")
    context = torch.empty(2, 78, 1024, device=meta)
    z, t = torch.empty(2, 4, 64, 64, device=meta), torch.zeros(2, device=meta)
    down, mid = model.control(z, t, context, torch.empty(2, 3, 512, 512, device=meta), return_dict=False)
    assert len(down) == 12 and mid.shape == (2, 1280, 8, 8)
    assert model.predict(z, t, context, torch.empty(2, 3, 512, 512, device=meta)).shape == z.shape


# --- a tenth of the width ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["base", "v21"])
def folder(request, tmp_path_factory):
    """A base folder as the released ones are: their file names, key names, scheduler and padding token."""
    root = tmp_path_factory.mktemp(request.param)
    tokenizer = untrained.word_tokenizer(base.corpus(), root / "tokenizer", 77)
    parts = BENCH.layout(narrow=True, version=request.param)
    parts["text_encoder"] |= {"vocab_size": len(tokenizer)}
    BENCH.build(parts, "cpu", tokenizer).save(root / "base")
    written = json.loads((root / "base" / "tokenizer" / "tokenizer_config.json").read_text())
    (root / "base" / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(written | {"pad_token": "!"}))
    (root / "base" / "scheduler" / "scheduler_config.json").write_text(json.dumps(parts["scheduler"]))
    return root / "base"


def test_names_of_older_files_load_to_the_same_model(folder, tmp_path):
    """SD-2.1's files say `text_model.` and, in the VAE's attention, query, key, value and proj_attn."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    copy = shutil.copytree(folder, tmp_path / "old")
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{n.removeprefix('text_model.')}": v for n, v in load_file(path).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, copy / "text_encoder" / path.name, metadata={"format": "pt"})
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {re.sub("|".join(map(re.escape, old)), lambda m: old[m[0]], n): v for n, v in load_file(path).items()}
    assert sum(".proj_attn." in n for n in weights) == 4  # weight and bias, in encoder and decoder
    save_file(weights, copy / "vae" / path.name, metadata={"format": "pt"})
    one, other = diffusion.load(str(folder)), diffusion.load(str(copy))
    for part in ("text_encoder", "vae", "unet"):
        before, after = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert set(before) == set(after) and all(torch.equal(before[n], after[n]) for n in before), part


def test_prompts_are_padded_with_the_folders_token(folder):
    parts = diffusion.load(str(folder))
    ids = parts.tokenize(["The heart is enlarged."])[0]
    end = ids.tolist().index(parts.tokenizer.eos_token_id)
    assert len(ids) == 77 and 5 < end < 20
    assert (
        set(ids[end + 1 :].tolist()) == {parts.tokenizer.convert_tokens_to_ids("!")} != {parts.tokenizer.eos_token_id}
    )


@pytest.mark.parametrize("lora", [0, 2])
def test_the_whole_path_images_training_export_images(folder, tmp_path, lora):
    dials = dict(
        size=64,
        train_n=8,
        val_n=4,
        test_per_cell=1,
        steps=2,
        batch=4,
        microbatch=2,
        lr=1e-3,
        precision="no",
        lora_rank=lora,
        trained="unet" if lora else "unet text_encoder",
        sample_steps=2,
        d_node=16,
        aux_hidden=16,
    )
    config = settings("smoke", "chest", "hcn", "compdiff_hcn", base=str(folder), **dials)
    place = paths.RunFolder(str(tmp_path / "runs"), "smoke", "chest")
    datasets.prepare("chest", place.data, DataConfig(64, 8, 4, 1))
    parts, sha256 = diffusion.load_for(place, config)
    data = datasets.load(place.data)
    latents.write(place.latents, data, parts, sha256)
    assert latents.read(place.latents, data, parts, sha256, "train", ()).moments.shape == (8, 8, 8, 8)
    methods.fit("hcn", place, config, seed=42)
    log = pd.read_csv(place.train("hcn") / "log.csv")
    assert len(log) == 2 and np.isfinite(log["loss"]).all() and {"kl", "aux", "consistency"} <= set(log)
    export.export(place.train("hcn"), tmp_path / "model", base=str(folder))
    drawn = export.load_pipeline(tmp_path / "model")
    assert not any("lora" in n for n in drawn.pipe.unet.state_dict())

    trained, _ = diffusion.load_for(place, config)
    model, made = methods.restore("hcn", place.train("hcn"), trained, data.schema, config)
    rows = data.rows("val").head(2)
    prompts, who = data.prompts(rows, made.named), rows[list(data.schema.names)].to_dict("records")
    ids = parts.tokenize([*prompts, ""])
    attributes = torch.from_numpy(data.attributes(rows))
    ours = sample.sample(model, trained, ids[:-1], ids[-1], attributes, [1, 2], config.sample)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    z = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
    drawn.pipe.scheduler = parts.sampler(config.sample.solver)
    drawn.pipe.set_progress_bar_config(disable=True)
    theirs = drawn.pipe(**drawn.embeds(prompts, who), latents=z, generator=generators, num_inference_steps=2,
                        guidance_scale=config.sample.guidance, output_type="np").images  # fmt: skip
    assert ours.shape == (2, 64, 64) and ours.std() > 1
    assert np.abs(theirs.mean(axis=3) * 255 - ours).max() < 2


# --- the benchmark ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("only", "whose"), [
    ("training, lora", ["ours, cached latents and text", "plain, encode every step", "plain, cached latents"]),
    ("sampling, dpm++", ["ours", "diffusers' pipeline"])])  # fmt: skip
def test_the_gpu_benchmark_measures_every_case(tmp_path, only, whose):
    BENCH.main(["--narrow", "--device", "cpu", "--batches", "2", "--steps", "1", "--warm", "1", "--images", "1",
                "--out", str(tmp_path / "gpu.csv"), "--only", only])  # fmt: skip
    table = pd.read_csv(tmp_path / "gpu.csv")
    assert table["whose"].tolist() == whose
    assert (table["images_per_s"] > 0).all() and {"device", "command", "torch", "flop_utilisation"} <= set(table)


def test_without_a_gpu_full_size_is_refused(capsys):
    with pytest.raises(SystemExit):
        BENCH.main(["--device", "cpu"])
    assert "no GPU here" in capsys.readouterr().err


def test_utilisation_is_over_the_cards_own_peak_or_not_told():
    assert [BENCH.peak_of(card) for card in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "none")] == [989, 312, 0]
    make = lambda folder, device: lambda: sum(range(100_000))  # noqa: E731
    args = argparse.Namespace(device="cpu", steps=1, warm=0, narrow=False, peak=312.0)
    found = BENCH.measured("training, full", 6, make, args)
    assert found["flop_utilisation"] == pytest.approx(found["images_per_s"] * 2.41 / 312)
    args.peak = 0.0
    assert BENCH.measured("training, full", 6, make, args)["flop_utilisation"] is None


def test_a_case_that_cannot_be_compiled_does_not_end_the_others():
    def broken():
        raise BackendCompilerFailed(torch.compile, RuntimeError("No working C++ compiler found"), None)

    args = argparse.Namespace(device="cpu", steps=1, warm=0, narrow=True, peak=0.0)
    found = BENCH.measured("training, full, compiled", 6, lambda folder, device: broken, args)
    assert found == {"note": "not compiled: No working C++ compiler found"}
