"""A trained run as a folder for others: a plain diffusers pipeline, the conditioner beside it, and a model card.

`python -m compdiff.export RUN_FOLDER TARGET [BASE=<folder>] [REVISION=...]` writes it, `load_pipeline` opens it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compdiff import attributes, datasets, diffusion, methods, record
from compdiff.attributes import Attribute, Schema
from compdiff.config import METHODS, Config, HCNConfig, override, settings
from compdiff.datasheet import markdown
from compdiff.diffusion import Denoiser, Diffusion
from compdiff.interfaces import Conditioner
from compdiff.manifests import Manifest
from compdiff.paths import RunFolder

FORMAT = 1  # of conditioner/config.json
FEW = 10  # the card says "< 10" for smaller counts of people
FROM_WORDS = ("base", "revision", "base_sha256")


# --- reading ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Exported:
    """A diffusers pipeline and the conditioner that speaks to it.

    `pipe` is diffusers' own StableDiffusionPipeline: any of its schedulers, devices and options may be set on it.
        drawn = load_pipeline(folder)
        who = {"age": "60-80", "sex": "Female", "race": "Asian", "age_years": 66, "findings": "No nodule."}
        drawn.pipe(**drawn.embeds([drawn.prompt(who)], [who]), num_inference_steps=20, guidance_scale=2.0).images
    """

    pipe: object
    base: Diffusion  # the same parts
    model: Denoiser
    schema: Schema
    named: tuple[str, ...]  # attributes that the prompt tells; the others go through the conditioner
    prompts: tuple[str, ...]  # the templates that the model was trained on

    def prompt(self, person: Mapping[str, object]) -> str:
        """The prompt of the training data for attributes, `age_years` and `findings`. Errors: `attributes.prompt`."""
        return attributes.prompt(self.prompts, person, self.named, self.schema)

    @torch.no_grad()
    def embeds(self, prompts: Sequence[str], people: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """Prompts and {attribute: category} of B people -> the pipeline's prompt_embeds and negative_prompt_embeds.

        Both [B, T + n, d_ctx]: text tokens, then n demographic ones; all n are zero in the negative (empty) prompt.
        KeyError for a missing attribute, ValueError for an unknown category.
        """
        model = self.model.to(self.pipe.device).eval()
        who = torch.tensor([self.schema.encode(p) for p in people], device=self.pipe.device)
        ids = self.base.tokenize([*prompts, ""]).to(self.pipe.device)
        context, _ = model.context(ids[:-1], who)
        null, _ = model.context(ids[-1].expand_as(ids[:-1]), who, keep=torch.zeros(len(who), device=who.device))
        return {"prompt_embeds": context, "negative_prompt_embeds": null}


def load_pipeline(folder: str | Path) -> Exported:
    """Open a folder that `export` wrote. FileNotFoundError names what is missing, ValueError an unknown format."""
    folder = Path(folder)
    path = folder / "conditioner" / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} was not written by compdiff.export")
    known = json.loads(path.read_text())
    if known["format"] != FORMAT:
        raise ValueError(f"{path} has format {known['format']}, this version reads {FORMAT}")
    schema = Schema(tuple(Attribute(name, tuple(found)) for name, found in known["schema"]))
    base = diffusion.load(str(folder))
    conditioner = _conditioner(known, schema, base.d_ctx)
    conditioner.load_state_dict(load_file(folder / "conditioner" / "model.safetensors"))
    model = Denoiser(base, conditioner, [schema.names.index(n) for n in known["encoded"]]).eval().requires_grad_(False)
    return Exported(base.pipeline(), base, model, schema, tuple(known["named"]), tuple(known["prompts"]))


def _conditioner(known: Mapping, schema: Schema, d_ctx: int) -> Conditioner:
    encoded = known["encoded"]
    age = encoded.index("age") if "age" in encoded else None
    return methods.build_conditioner(
        known["conditioner"], [len(schema[n]) for n in encoded], d_ctx, HCNConfig(**known["hcn"]), age
    )


# --- writing ----------------------------------------------------------------------------------------------------------
def export(run: str | Path, target: str | Path, **base: str) -> None:
    """Write the run <runs>/<profile>/<dataset>/seed<k>/train/<method> to the new folder `target`; adapters are merged.

    `base`: settings base, revision, base_sha256; needed where the base is a folder (run.json keeps no paths), or lies
    elsewhere than in training. ValueError: `run` is no such folder, its weights have changed, or the base is another
    one. FileNotFoundError: the run is not finished, or the base is to be named. FileExistsError: `target` holds something.
    """
    run, target = Path(run).resolve(), Path(target).resolve()
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: name a new folder")
    folder, method = _place(run)
    known = record.read_run(run)
    if known is None:
        raise FileNotFoundError(f"{run} holds no finished run (run.json)")
    if not record.unchanged(run / "weights.safetensors", known["outputs"]["weights.safetensors"]):
        raise ValueError(f"{run / 'weights.safetensors'} is not what run.json describes: train again")
    config = override(settings(folder.root.parent.name, folder.root.name, method), **(known["parameters"] | base))
    try:
        model_base, sha256 = diffusion.load_for(folder, config)
    except FileNotFoundError as error:
        remedy = "Where the base is a folder, name it: BASE=<folder> (run.json keeps no paths)"
        raise FileNotFoundError(f"{error}. {remedy}") from None
    if sha256 != known["inputs"]["base"]:
        raise ValueError(f"base {config.base_model.base!r} is not the one of {run.name}: name that one with BASE=")
    data = datasets.load(folder.data)
    model, parts = methods.restore(method, run, model_base, data.schema, config)
    if config.train.lora_rank:
        model.unet.fuse_lora()
        model.unet.unload_lora()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        made = Path(scratch) / "folder"
        model_base.save(made)
        encoded = [data.schema.names[k] for k in parts.columns]
        content = {
            "format": FORMAT, "method": method, "conditioner": METHODS[method].conditioner, "d_ctx": model_base.d_ctx,
            "schema": [[a.name, a.categories] for a in data.schema.attributes], "encoded": encoded,
            "named": list(parts.named), "prompts": list(data.manifest.prompts), "hcn": asdict(config.hcn),
        }  # fmt: skip
        record.write_json(made / "conditioner" / "config.json", content)
        weights = {name: value.contiguous() for name, value in parts.conditioner.state_dict().items()}
        save_file(weights, made / "conditioner" / "model.safetensors")
        record.write_json(made / "run.json", known)
        record.write_text(made / "README.md", card(method, config, data, known, pd.read_csv(run / "log.csv"), encoded))
        made.rename(target)


def _place(run: Path) -> tuple[RunFolder, str]:
    """The run folder that a method's training folder stands in, and the method."""
    above = [p.name for p in run.parents[:4]]
    seed = above[1].removeprefix("seed") if len(above) == 4 else ""
    if run.name not in METHODS or above[0] != "train" or not seed.isdecimal():
        raise ValueError(f"{run} is not <runs>/<profile>/<dataset>/seed<k>/train/<method>")
    return RunFolder(str(run.parents[4]), above[3], above[2], int(seed)), run.name


# --- the model card ---------------------------------------------------------------------------------------------------
def card(
    method: str, config: Config, data: datasets.Data, known: Mapping, log: pd.DataFrame, encoded: Sequence[str]
) -> str:
    """Markdown from what the run and its data recorded: data, attributes, recipe, duties, use, limits. Counts only."""
    index, manifest, row = data.index, data.manifest, METHODS[method]
    best = log.loc[log["val_loss"].idxmin()]
    facts = [(name, getattr(manifest, name)) for name in ("source", "licence", "access", "citation")]
    facts += [("size", f"{index['size']} x {index['size']}, 8-bit grey"), ("held out", "; ".join(index["held_out"]))]
    counts = [("images", *index["images"].values()), ("patients", *index["patients"].values())]
    by = {a.name: "demographic token" if a.name in encoded else "prompt" for a in data.schema.attributes}
    told = [(a.name, ", ".join(a.categories), by[a.name]) for a in data.schema.attributes]
    cells = [(name, n if n == 0 or n >= FEW else f"< {FEW}") for name, n in data.cell_counts("train").items()]
    used = ["base_model", "train"] + ["hcn"] * bool(encoded) + ["fair"] * row.fair
    recipe = [(n, record.without_places(v)) for part in used for n, v in asdict(config)[part].items()]
    origin = [(name, known[name]) for name in ("commit", "started", "minutes", "seeds", "machine", "versions")]
    origin += [("weights", known["outputs"]["weights.safetensors"]["sha256"]), ("base", known["inputs"]["base"])]
    return "\n".join([
        f"# {row.title}, trained on {manifest.title}", "",
        "**Every image from this model is synthetic, not a patient.** Keep that with each image that you pass on.", "",
        f"Checkpoint: best by validation loss, {best['val_loss']:.4f} at step {best['step']:.0f} of {len(log)}.", "",
        "## Use", "", USE,
        "## Training data", "", *markdown(("", ""), facts), *markdown(("split", *index["images"]), counts),
        "## Attributes", "", *markdown(("attribute", "categories", "told by"), told),
        "### Training images per cell", "", *markdown((", ".join(data.schema.names), "images"), cells),
        "## Recipe", "", *markdown(("setting", "value"), recipe), *markdown(("provenance", ""), origin),
        "## Duties", "", *duties(config, manifest), "", LIMITS,
    ])  # fmt: skip


def duties(config: Config, manifest: Manifest) -> list[str]:
    """What the licences of base and data ask of whoever passes the weights on, one line each."""
    base = record.without_places(config.base_model.base)
    said = [
        f"- Base `{base}`: its licence passes on to these weights. For Stable Diffusion 2.1 that is CreativeML Open "
        "RAIL++-M: hand its use restrictions on with every copy; they forbid, among others, medical advice and "
        "discrimination by protected attributes."
    ]
    if base == "tiny":
        said = ["- Base `tiny`: trained by the CompDiff companion on what it drew itself, MIT."]
    said += [f"- Data: {manifest.licence}. Cite: {manifest.citation}"]
    if manifest.access != "generated":
        said += ["- Weights can contain training images: treat them as the data until its holder says otherwise."]
    if manifest.access == "credentialed":
        said += ["- Credentialed: no copy outside the data use agreement, no upload, no attempt to identify anyone."]
    return said


USE = """```python
from compdiff.export import load_pipeline

drawn = load_pipeline("<this folder>")
who = {...}  # a category of each attribute below, and what the prompt names: age_years, findings
image = drawn.pipe(**drawn.embeds([drawn.prompt(who)], [who]), num_inference_steps=20, guidance_scale=2.0).images[0]
```
The folder opens in `StableDiffusionPipeline.from_pretrained` too, then without the demographic token.
"""

LIMITS = """## Intended use
Research and teaching about fair image generation: data augmentation experiments, audits of generators and classifiers.

## Not for
- Diagnosis, treatment, triage or any other decision about a person; nothing here has been validated for that.
- Inferring a person's race, sex or age; presenting an image as a real patient's.

## Limits
- The categories are those of the source's records: coarse, and not everybody's own words for themselves.
- Quality differs between groups; cells with few or no training images are extrapolated. Measure per group before use.
- A generator can repeat training images. Check for copies (the project's metrics notebook does) before sharing images.
"""


def main(words: Sequence[str]) -> None:
    """Usage: python -m compdiff.export RUN_FOLDER TARGET [BASE=... REVISION=... BASE_SHA256=...]

    RUN_FOLDER: <runs>/<profile>/<dataset>/seed<k>/train/<method>. BASE: its base model, where that is a folder.
    """
    if len(words) < 2 or not all("=" in word for word in words[2:]):
        raise SystemExit(main.__doc__)
    given = {name.lower(): value for name, value in (word.split("=", 1) for word in words[2:])}
    if set(given) - set(FROM_WORDS):
        raise SystemExit(main.__doc__)
    given |= {"base": os.path.expanduser(given["base"])} if "base" in given else {}
    export(words[0], words[1], **given)
    print(f"{words[1]}: diffusers pipeline, conditioner and README.md")


if __name__ == "__main__":
    main(sys.argv[1:])
