"""An exported run: the same images from plain diffusers, adapters merged, a card of counts, what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from compdiff import datasets, diffusion, export, methods, sample
from compdiff.config import flat, override

LORA = dict(lora_rank=2, trained=("unet",), lr=1e-2)


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory):
    """A copy of the tiny root with two trained runs and their exports."""
    copy = shutil.copytree(tiny_root, tmp_path_factory.mktemp("export") / "root")
    for method, dials in (("hcn", {}), ("text", LORA)):
        methods.fit(method, tiny.run_folder(copy), tiny.config(copy, method, steps=4, **dials), seed=0)
        export.main([str(tiny.run_folder(copy).train(method)), str(copy / method), f"BASE={copy / 'base'}"])
    return copy


@pytest.fixture(scope="module")
def trained(root):
    """{method: (model, base, parts, data)} as the project samples from them."""
    found = {}
    for method, dials in (("hcn", {}), ("text", LORA)):
        config = tiny.config(root, method, **dials)
        base, _ = diffusion.load_for(tiny.run_folder(root), config)
        data = datasets.load(tiny.run_folder(root).data)
        found[method] = (
            *methods.restore(method, tiny.run_folder(root).train(method), base, data.schema, config),
            base,
            data,
        )
    return found


@pytest.mark.parametrize("method", ["hcn", "text"])
@pytest.mark.parametrize(("solver", "scheduler"), [("ddpm", DDPMScheduler), ("dpm++", DPMSolverMultistepScheduler)])
def test_the_loaded_pipeline_draws_our_samplers_images(root, trained, method, solver, scheduler):
    model, parts, base, data = trained[method]
    rows = data.rows("val").head(3)
    prompts, config = (
        data.prompts(rows, parts.named),
        tiny.config(root, solver=solver, sample_steps=5, guidance=3.0).sample,
    )
    ids, attributes = base.tokenize([*prompts, ""]), torch.from_numpy(data.attributes(rows))
    ours = sample.sample(model, base, ids[:-1], ids[-1], attributes, [5, 6, 7], config)

    drawn = export.load_pipeline(root / method)
    drawn.pipe.scheduler = scheduler.from_config(drawn.pipe.scheduler.config)  # plain diffusers from here on
    drawn.pipe.set_progress_bar_config(disable=True)
    who = rows[[*data.schema.names, "age_years", "findings"]].to_dict("records")
    assert [drawn.prompt(w) for w in who] == prompts
    generators = [torch.Generator().manual_seed(s) for s in (5, 6, 7)]
    side = base.unet.config.sample_size
    z = torch.stack([torch.randn(4, side, side, generator=g) for g in generators])
    given = drawn.embeds(prompts, who)
    theirs = drawn.pipe(
        **given, latents=z, generator=generators, num_inference_steps=5, guidance_scale=3.0, output_type="np"
    ).images
    assert np.abs(theirs.mean(axis=3) * 255 - ours).max() <= 1.5 and ours.std() > 5

    other = drawn.embeds(prompts, [w | {"sex": {"Male": "Female", "Female": "Male"}[w["sex"]]} for w in who])
    differ = (other["prompt_embeds"] - given["prompt_embeds"]).abs().amax(dim=(0, 2))
    assert (differ[-1] > 0) == (method == "hcn") and not differ[:-1].any(), (
        "only the demographic token depends on the person"
    )


def test_the_folder_opens_as_a_plain_pipeline_with_adapters_merged(root, trained):
    pipe = StableDiffusionPipeline.from_pretrained(root / "text")
    model, _, base, _ = trained["text"]
    assert set(pipe.unet.state_dict()) == set(diffusion.load(str(root / "base")).unet.state_dict())
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 48, base.d_ctx)
    with torch.no_grad():
        merged, adapted = pipe.unet(z, 7, context).sample, model.unet(z, 7, context).sample
        model.unet.disable_adapters()
        without = model.unet(z, 7, context).sample
        model.unet.enable_adapters()
    assert torch.allclose(merged, adapted, atol=1e-4) and not torch.allclose(merged, without, atol=1e-2)


def test_people_that_the_model_does_not_know_are_refused(root):
    drawn = export.load_pipeline(root / "hcn")
    with pytest.raises(ValueError, match="race: unknown category 'Martian'"):
        drawn.embeds(["x"], [{"age": "0-18", "sex": "Male", "race": "Martian"}])
    with pytest.raises(KeyError, match="race"):
        drawn.embeds(["x"], [{"age": "0-18", "sex": "Male"}])


# --- the card ---------------------------------------------------------------------------------------------------------
def test_the_card_tells_data_attributes_recipe_and_duties(root, trained):
    text, data = (root / "hcn" / "README.md").read_text(), trained["hcn"][-1]
    assert "synthetic, not a patient" in text and "MIT" in text and data.manifest.source in text
    config = flat(tiny.config(root, "hcn", steps=4)) | {"base": "base"}
    for name in ("steps", "batch", "lr", "trained", "optimizer", "d_node", "kl_weight", "base"):
        assert f"| {name} | {config[name]} |" in text or f"| {name} | {list(config[name])} |" in text, name
    for attribute in data.schema.attributes:
        assert f"| {attribute.name} | {', '.join(attribute.categories)} | demographic token |" in text
    assert "ucb_beta" not in text and "| age |" in (root / "text" / "README.md").read_text()
    assert json.loads((root / "hcn" / "run.json").read_text())["outputs"]["weights.safetensors"]["sha256"] in text


def test_the_card_holds_no_id_no_small_count_and_no_folder(root, trained):
    text, data = (root / "hcn" / "README.md").read_text(), trained["hcn"][-1]
    assert not [i for i in (*data.table["id"], *data.table["patient"]) if re.search(rf"\b{re.escape(i)}\b", text)]
    assert str(root) not in text
    shown = dict(re.findall(r"^\| (\S+ (?:Male|Female) \w+) \| (.+) \|$", text, re.M))
    counts = data.cell_counts("train")
    assert len(shown) == len(counts) and (counts < 10).any()
    assert all(shown[name] == (str(n) if n == 0 or n >= 10 else "< 10") for name, n in counts.items())


@pytest.mark.parametrize(
    ("access", "said"), [("credentialed", "no attempt to identify"), ("open", "treat them as the data until")]
)
def test_duties_follow_access_and_base(root, access, said):
    manifest = datasets.load(tiny.run_folder(root).data).manifest
    real = manifest.__class__(**{**manifest.__dict__, "access": access, "licence": "Licence of the holder"})
    text = "\n".join(export.duties(tiny.config(root), real))
    assert said in text and "Licence of the holder" in text and "Open RAIL++-M" in text
    assert (
        "RAIL" not in "\n".join(export.duties(override(tiny.config(root), base="tiny"), manifest))
        and str(root) not in text
    )


# --- refusals ---------------------------------------------------------------------------------------------------------
def refused(run, target, error, message, **base):
    with pytest.raises(error, match=message):
        export.export(run, target, **base)
    assert not target.exists() and not list(target.parent.glob(f".{target.name}*")), "nothing is left behind"


def test_what_does_not_fit_is_refused_and_leaves_nothing(root, tmp_path):
    base, run = {"base": str(root / "base")}, tiny.run_folder(root).train("hcn")
    refused(tmp_path, tmp_path / "a", ValueError, "is not <runs>/<profile>/<dataset>/seed<k>/train/<method>", **base)
    refused(run.with_name("flat"), tmp_path / "b", FileNotFoundError, "holds no finished run", **base)
    named = "is no folder here.*Where the base is a folder, name it: BASE=<folder>"
    refused(run, tmp_path / "e", FileNotFoundError, named)  # the base lies outside of the repository: run.json has its last name
    other = shutil.copytree(root / "base", tmp_path / "base")
    (other / "tokenizer" / "more.txt").write_text("")
    refused(run, tmp_path / "c", ValueError, "is not the one of hcn: name that one with BASE=", base=str(other))
    copy = shutil.copytree(root / "smoke", tmp_path / "smoke") / "chest" / "seed0" / "train" / "hcn"
    with open(copy / "weights.safetensors", "ab") as file:
        file.write(b" ")
    refused(copy, tmp_path / "d", ValueError, "is not what run.json describes", **base)
    with pytest.raises(FileExistsError, match="is not empty"):
        export.export(run, root, **base)


def test_folders_of_others_are_refused(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="was not written by compdiff.export"):
        export.load_pipeline(root / "base")
    copy = shutil.copytree(root / "hcn", tmp_path / "copy")
    file = copy / "conditioner" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 7}))
    with pytest.raises(ValueError, match="has format 7"):
        export.load_pipeline(copy)
    assert load_file(copy / "conditioner" / "model.safetensors")


@pytest.mark.parametrize("words", [[], ["run"], ["run", "target", "STEPS=3"], ["run", "target", "base"]])
def test_the_command_line_says_how_it_is_used(words):
    with pytest.raises(SystemExit, match="Usage: "):
        export.main(words)
