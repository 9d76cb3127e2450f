"""Configuration: frozen dataclasses and one table of presets.

Field names are unique over all dataclasses, so one flat name is a make variable (`STEPS=500`), a papermill
parameter (`steps = 500`) and a field (`TrainConfig.steps`) at once. Fractions are of the total number of steps,
so that a short run has the shape of a long one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace


@dataclass(frozen=True)
class DataConfig:
    """01. Sizes of what is generated or read."""

    size: int = 64  # pixels, square
    train_n: int = 800  # phantoms only: training images (long-tailed)
    val_n: int = 160  # phantoms only: same distribution as training
    test_per_cell: int = 12  # phantoms only: balanced test set, held-out cells included
    interaction: float = 0.5  # phantoms only: 0 = attributes act additively, 1 = full pairwise interactions
    data_seed: int = 1  # one data set for all training seeds (0 was in view while the judges were designed)


@dataclass(frozen=True)
class BaseConfig:
    """01. The base model: a folder or hub id in Stable Diffusion's layout, and its adaptation to real data."""

    base: str = "tiny"  # "tiny" = shipped; else a folder or hub id
    revision: str = ""  # hub revision (paper scale: required for a hub id)
    base_sha256: str = ""  # of the UNet's weight file, or fingerprint of the whole folder; checked when given
    vae_steps: int = 0  # fine-tune the VAE on the training split first (real data on the tiny base)
    unet_steps: int = 0  # fine-tune the UNet on prompts without demographics


@dataclass(frozen=True)
class TrainConfig:
    """02-04. One training run; the defaults are the tiny model's."""

    steps: int = 800
    batch: int = 32  # the paper's global batch, whatever the number of processes
    microbatch: int = 32  # images in memory at once, per process
    lr: float = 1e-3
    head_lr: float = 4e-3  # learning rate of the demographic conditioner
    lr_schedule: str = "cosine"  # cosine | constant
    warmup: float = 500 / 30_000  # fraction of steps
    clip: float = 1.0  # gradient norm
    ema: bool = True
    ema_horizon: float = 0.1  # fraction of steps over which the average remembers
    trained: tuple[str, ...] = ("unet", "text_encoder")
    lora_rank: int = 0  # 0 = full fine-tuning of the UNet
    precision: str = "no"  # mixed precision of training and sampling: no | bf16 | fp16
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"  # adamw | adamw8bit (bitsandbytes)
    compile: bool = False  # torch.compile of the UNet: minutes at the start, then faster steps
    channels_last: bool = False  # memory layout of the UNet
    prompt_dropout: float = 0.1  # prompt and token dropped together, for guidance
    demographic_dropout: float = 0.0  # token alone zeroed
    input_perturbation: float = 0.0  # x N(0,1) added to the noise that corrupts the latents
    validate_every: float = 0.25  # fraction of steps
    checkpoint_every: float = 0.25  # fraction of steps


@dataclass(frozen=True)
class HCNConfig:
    """Hierarchical Conditioner Network and its losses (CompDiff, section 3 of the method)."""

    d_node: int = 256
    dropout: float = 0.1
    uncertainty: bool = True
    kl_weight: float = 0.005
    kl_ramp: float = 5_000 / 30_000  # fraction of steps over which the KL weight rises linearly
    consistency_weight: float = 0.1
    aux_weight: float = 1.0
    aux_hidden: int = 512
    age_loss: str = "ce"  # ce | soft_ce | ordinal | mse | focal


@dataclass(frozen=True)
class FairConfig:
    """Fair Bayesian perturbation (FairDiffusion)."""

    weighting: str = "normalised"  # normalised (CompDiff's port) | original
    groups: tuple[str, ...] = ()  # attributes whose categories are groups; those that a schema lacks are passed over; () = all
    time_window: int = 30  # steps per Bayesian update; the first window holds one record more
    exploitation: float = 0.95
    ucb_beta: float = 0.1
    restarts: int = 5
    raw_samples: int = 20


@dataclass(frozen=True)
class SampleConfig:
    """05. Generation."""

    solver: str = "dpm++"  # dpm++ | ddpm | ddim | base (the base model's own scheduler)
    sample_steps: int = 20
    guidance: float = 1.5  # 1 = none; more shows the request better, and moves away from the real images' cloud
    balanced_per_cell: int = 5
    sample_batch: int = 64


@dataclass(frozen=True)
class EvalConfig:
    """06-07. Metrics and downstream classifiers."""

    feature_size: int = 96  # pixels fed to the feature extractor
    resamples: int = 1_000  # bootstrap resamples of each interval
    judge_epochs: int = 24
    downstream_epochs: int = 10
    imagenet: str = ""  # file of DenseNet-121 weights with torchvision's keys; "" = from scratch, and the rows say so
    external: str = ""  # a further test set: a manifest whose data notebook 01 has prepared


@dataclass(frozen=True)
class JudgeConfig:
    """06. Judges and extractors from outside (data_manifests/weights.yaml)."""

    weights: str = ""  # folder of their files; "" = weights/ of the repository


@dataclass(frozen=True)
class HeartConfig:
    """09-10. Cardiac MRI (method section 5)."""

    hearts: int = 240  # phantoms only: training patients
    test_hearts: int = 240  # phantoms only: test patients, even over age, sex and BMI
    prevalence: float = 0.25  # phantoms only: share of heart failure among training patients
    disease: str = ""  # the label to predict, where a source knows several; empty: its first
    folds: int = 5  # by patient
    variants: int = 4  # shifted, turned and scaled pictures that a generator sees of each patient
    weight_clip: float = 20.0  # of the generator's row weights (the paper clips its copied set too, at 5; ours is even)
    rehearsal_steps: int = 0  # of UNet and branch on heart phantoms (0.4 as many of the VAE), before they see patients
    locked: bool = True  # the base beneath the ControlNet branch stays as it is
    token: bool = False  # HCN token beside the mask
    copy_guidance: float = 4.0
    random_guidance: float = 9.0
    negative_prompt: bool = True  # random set: away from the opposite label instead of the empty prompt
    sensitive: tuple[str, ...] = ("sex",)  # attributes by which sets are balanced and sampling is weighted
    augment_with: str = "copy"  # the set that classifiers train on: copy | random
    set_size: int = 240  # images of a synthetic set, even over sensitive groups and label
    segment_steps: int = 800
    fid_repeats: int = 4
    train_prevalence: float = 0.0  # of the disease among real images that classifiers train on; 0 = as found
    repeats: int = 8  # classifiers of the stacked input that differ in seed
    other_repeats: int = 2  # of the other inputs
    classifier_steps: int = 150  # of batch 16, whatever the training images
    classifier_clip: float = 1.0  # of the sampling weights by sensitive group


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on besides its data."""

    data: DataConfig = field(default_factory=DataConfig)
    base_model: BaseConfig = field(default_factory=BaseConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hcn: HCNConfig = field(default_factory=HCNConfig)
    fair: FairConfig = field(default_factory=FairConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    heart: HeartConfig = field(default_factory=HeartConfig)


# --- the table of presets: profile -> what differs from the defaults above (which are the demo's) -------------
PROFILES: dict[str, dict[str, object]] = {
    "smoke": dict(train_n=96, val_n=24, test_per_cell=2, steps=6, batch=16, microbatch=16, sample_steps=4,
                  balanced_per_cell=1, resamples=20, judge_epochs=1, downstream_epochs=1, feature_size=64, time_window=2,
                  hearts=24, test_hearts=24, folds=3, variants=1, set_size=8, segment_steps=20, fid_repeats=2,
                  repeats=2, other_repeats=1, classifier_steps=3),
    # A fiftieth of the paper's steps: at the paper's KL weight the posterior stays near N(0, 1), and the token that the
    # UNet is trained on (mu + sigma eps, then LayerNorm) differs in size from the one it is sampled with (mu).
    "demo": dict(kl_weight=1e-5),
    # CompDiff's released configuration. SD-2.1-base has no address of its own any more: name yours with BASE=.
    "paper": dict(size=512, base="", steps=30_000, batch=8, microbatch=8, lr=1e-5, head_lr=1e-5, precision="bf16",
                  gradient_checkpointing=True, validate_every=2_500 / 30_000, checkpoint_every=2_500 / 30_000,
                  solver="ddpm", sample_steps=75, guidance=7.5, balanced_per_cell=2_500, sample_batch=32,
                  feature_size=299, judge_epochs=20, downstream_epochs=100),
}  # fmt: skip

# Datasets on which a profile differs. Real radiographs: the shipped base has only seen phantoms, so it is adapted.
DATASET_PRESETS: dict[tuple[str, str], dict[str, object]] = {
    # 345 training images, seen 55 times; guided more strongly, so that view and sex show; the probe of sex (probes.py)
    # needs the extractor's own size.
    ("demo", "nih"): dict(vae_steps=600, unet_steps=600, steps=600, guidance=2.0, feature_size=224),
    ("smoke", "nih"): dict(vae_steps=2, unet_steps=2),
}

# Cardiac: the shipped base knows no heart and its VAE no colour, so it is adapted. Paper: batch 1, accumulated twice.
HEARTS = ("cardiac", "sunnybrook", "biobank", "heart_folder")
HEART_PRESETS: dict[str, dict[str, object]] = {
    "smoke": dict(vae_steps=2, unet_steps=2, solver="ddim", batch=8, microbatch=8),
    "demo": dict(vae_steps=600, unet_steps=1500, steps=1500, batch=16, microbatch=16, lr=1e-3, solver="ddim",
                 copy_guidance=1.5, random_guidance=2.0),
    "paper": dict(batch=2, microbatch=1, lr=1e-5, precision="no", gradient_checkpointing=False, solver="ddim",
                  sample_steps=20, variants=1, set_size=10_000, test_hearts=1_000, hearts=4_000, segment_steps=4_000,
                  classifier_steps=10_000, train_prevalence=0.25, other_repeats=8),
}  # fmt: skip
DATASET_PRESETS |= {(profile, name): preset for profile, preset in HEART_PRESETS.items() for name in HEARTS}
# Forty-five patients, and a generator for each fold: all start from one that has learnt from phantoms.
DATASET_PRESETS["demo", "sunnybrook"] = HEART_PRESETS["demo"] | dict(
    rehearsal_steps=1000, vae_steps=150, unet_steps=200, steps=300, variants=12, set_size=120, segment_steps=600,
    classifier_steps=60,
)  # fmt: skip

SEEDS: dict[str, int] = {"smoke": 0, "demo": 0, "paper": 42}  # of a run that names none; 42 is the papers'

# Training recipes at paper scale (method section 2), applied with `recipe=`.
COMPDIFF = dict(steps=30_000, lr=1e-5, head_lr=1e-5, lr_schedule="cosine", warmup=500 / 30_000, clip=1.0, ema=True,
                trained=("unet", "text_encoder"), lora_rank=0, optimizer="adamw", precision="bf16", gradient_checkpointing=True,
                validate_every=2_500 / 30_000, checkpoint_every=2_500 / 30_000, kl_weight=0.005, kl_ramp=5_000 / 30_000, time_window=30, raw_samples=32,
                groups=("race", "sex", "age"),
                solver="ddpm", sample_steps=75, guidance=7.5)  # fmt: skip
RECIPES: dict[str, dict[str, object]] = {
    "profile": {},
    "compdiff_hcn": COMPDIFF | dict(batch=8, microbatch=8),
    "compdiff_others": COMPDIFF | dict(batch=16, microbatch=8),
    "fairdiffusion": dict(steps=100_000, batch=32, microbatch=16, lr=1e-5, head_lr=1e-5, lr_schedule="constant", warmup=0.0,
                          clip=1.0, ema=True, trained=("unet",), lora_rank=0, optimizer="adamw", precision="fp16",
                          gradient_checkpointing=True, validate_every=2_500 / 100_000, checkpoint_every=2_500 / 100_000,
                          input_perturbation=0.0, weighting="original", groups=("race", "sex", "ethnicity"), time_window=30, raw_samples=20, solver="base", sample_steps=75,
                          guidance=7.5),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One row of the comparison: which objects are passed to the one training loop."""

    title: str
    conditioner: str = "none"  # none | flat | flat_separate | hcn
    fair: bool = False
    in_prompt: tuple[str, ...] = ()  # attributes the prompt names besides those that are not encoded
    overrides: tuple[tuple[str, object], ...] = ()


ALL = ("*",)  # every attribute of the schema stays in the prompt
METHODS: dict[str, Method] = {
    "text": Method("Text baseline", in_prompt=ALL),
    "flat": Method("Flat encoder", conditioner="flat"),
    "fairdiffusion": Method("FairDiffusion", fair=True, in_prompt=ALL, overrides=(("input_perturbation", 0.1),)),
    "hcn": Method("HCN (CompDiff)", conditioner="hcn"),
    "hcn_fairdiffusion": Method("HCN + FairDiffusion", conditioner="hcn", fair=True, overrides=(("input_perturbation", 0.1),)),
    # extra rows and ablations, behind the switch `ablation`
    "flat_separate": Method("Flat encoder, separate tokens", conditioner="flat_separate"),
    "hcn_age_from_prompt": Method("HCN, age from prompt", conditioner="hcn", in_prompt=("age",)),
    "hcn_no_aux": Method("HCN, no auxiliary loss", conditioner="hcn", overrides=(("aux_weight", 0.0),)),
    "hcn_no_consistency": Method("HCN, no consistency loss", conditioner="hcn", overrides=(("consistency_weight", 0.0),)),
    "hcn_no_uncertainty": Method("HCN, z = h, no KL loss", conditioner="hcn", overrides=(("uncertainty", False),)),
}
MAIN_METHODS = ("text", "flat", "fairdiffusion", "hcn", "hcn_fairdiffusion")
EXTRA_METHODS = tuple(m for m in METHODS if m not in MAIN_METHODS)


def dials() -> dict[str, str]:
    """{flat field name: name of the `Config` part that holds it}; a name that stands in two parts is an error."""
    owner: dict[str, str] = {}
    for part in fields(Config):
        for dial in fields(part.default_factory):
            if dial.name in owner:
                raise TypeError(f"config field {dial.name!r} stands in {owner[dial.name]} and {part.name}")
            owner[dial.name] = part.name
    return owner


def flat(config: Config) -> dict[str, object]:
    """{field: value} over all parts: `override(Config(), **flat(c)) == c`."""
    return {name: value for part in asdict(config).values() for name, value in part.items()}


def override(config: Config, **values: object) -> Config:
    """`config` with flat fields replaced. Strings are converted to the field's type; unknown names raise."""
    owner = dials()
    parts: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        if name not in owner:
            raise ValueError(f"unknown setting {name!r}; known settings: {', '.join(sorted(owner))}")
        current = getattr(getattr(config, owner[name]), name)
        parts.setdefault(owner[name], {})[name] = _as_type_of(current, value, name)
    return replace(config, **{part: replace(getattr(config, part), **new) for part, new in parts.items()})


def _as_type_of(current: object, value: object, name: str) -> object:
    try:
        if isinstance(current, tuple):
            return tuple(value.split()) if isinstance(value, str) else tuple(value)
        if isinstance(current, bool) and isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(current, int) and isinstance(value, float) and not value.is_integer():
            raise ValueError("a fraction would be cut off")
        return type(current)(value)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"setting {name}={value!r} is not a {type(current).__name__}") from None


def settings(profile: str, dataset: str = "", method: str = "", recipe: str = "profile", **values: object) -> Config:
    """The configuration of one run: profile, then dataset, method and recipe presets, then explicit values."""
    for what, name, table in (("profile", profile, PROFILES), ("recipe", recipe, RECIPES)):
        if name not in table:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    if method and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    layers = [PROFILES[profile], DATASET_PRESETS.get((profile, dataset), {})]
    layers += [dict(METHODS[method].overrides)] if method else []
    layers += [RECIPES[recipe]]
    config = Config()
    for layer in [*layers, values]:
        config = override(config, **layer)
    if config.train.batch % min(config.train.batch, config.train.microbatch):
        raise ValueError(f"batch={config.train.batch} is not divisible by microbatch={config.train.microbatch}")
    return config
