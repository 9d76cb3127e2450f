"""Downstream strategies (method section 7) as one table: from what a classifier starts, on what it trains, on what it
is tested. No torch here: notebook 05 asks this table which synthetic sets are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DEMO = ("1a", "1a-again", "1b", "1d", "2b")  # what runs when nobody asks for more, for three generators:
DEMO_GENERATORS = ("text", "fairdiffusion", "hcn")
ALL = "all"
BASELINE = "text"
FRACTION = 0.1  # of the real patients, for fine-tuning
HALF = 0.5  # 5e-5 in the paper, where training from the start takes 1e-4


@dataclass(frozen=True)
class Strategy:
    """One row. Sets of generated images: train, train2 (a first and a second image per training prompt), balanced.

    start: imagenet | scratch (which one a network really had is a row of the results). pretrain: sets of a first
    phase. real: fraction of the real training patients in the last phase, synthetic: its sets, lr: its learning rate
    over the recipe's. tests: real (the test split) | synthetic (images of its prompts) | seen (real images that
    the generator trained on and the classifier did not) | seen prompts (images generated from the prompts of `seen`).
    seed: added to the run's seed of a classifier (its start, order of images and augmentation).
    of: each generator | the baseline | all others. recipe: a key of classify.RECIPES; where it is not "downstream",
    each label is a task of its own, graded ones as classes (FairDiffusion's classifiers).
    """

    id: str
    title: str
    start: str = "imagenet"
    pretrain: tuple[str, ...] = ()
    real: float = 1.0
    synthetic: tuple[str, ...] = ()
    lr: float = 1.0
    tests: tuple[str, ...] = ("real",)
    of: str = "each"
    seed: int = 0
    recipe: str = "downstream"

    @property
    def trains_on(self) -> tuple[str, ...]:
        """Generated sets that the classifier learns from; () = one classifier serves all generators."""
        return (*self.pretrain, *self.synthetic)

    @property
    def sets(self) -> tuple[str, ...]:
        """All generated sets that it reads."""
        return (*self.trains_on, *(name for test, name in TEST_SETS.items() if test in self.tests))


TEST_SETS = {"synthetic": "test", "seen prompts": "train"}  # test on generated images -> the set it is taken from
QUARTERS = ("real", "seen", "seen prompts")  # with these tests the real training patients are split in four

STRATEGIES: dict[str, Strategy] = {
    s.id: s
    for s in (
        Strategy("1a", "real"),
        # What chance alone does: no paper's row. 1000, so that it is not 1a of another seed of the same campaign.
        Strategy("1a-again", "real, once more with another seed", seed=1000),
        Strategy("1b", "real + 1x synthetic", synthetic=("train",)),
        Strategy("1c", "real + 2x synthetic", synthetic=("train", "train2")),
        Strategy("1d", "1x synthetic only", real=0.0, synthetic=("train",)),
        Strategy("1e", "2x synthetic only", real=0.0, synthetic=("train", "train2")),
        Strategy("2b", "real + balanced synthetic", synthetic=("balanced",)),
        Strategy("2c", "balanced synthetic only", real=0.0, synthetic=("balanced",)),
        Strategy("3a", "1x synthetic, then a fraction of real", "scratch", ("train",), FRACTION, lr=HALF),
        Strategy("3b", "1x synthetic, then a fraction of real", "imagenet", ("train",), FRACTION, lr=HALF),
        Strategy("4a", "balanced synthetic, then a fraction of real", "scratch", ("balanced",), FRACTION, lr=HALF),
        Strategy("4b", "balanced synthetic, then a fraction of real", "imagenet", ("balanced",), FRACTION, lr=HALF),
        Strategy("5a", "real, tested on the baseline's images", tests=("real", "synthetic"), of="baseline"),
        Strategy("5b", "real, tested on the other generators' images", tests=("real", "synthetic"), of="others"),
        Strategy("6a", "two quarters of real, a third to validate, a fourth to test", real=0.5, tests=QUARTERS),
        Strategy("vit-real", "FairDiffusion's ViT: real", "scratch", recipe="vit"),
        Strategy("vit-generated", "FairDiffusion's ViT: generated only", "scratch", (), 0.0, ("train",), recipe="vit"),
        Strategy("effnet-real", "FairDiffusion's EfficientNet: real", "scratch", recipe="efficientnet"),
        Strategy("effnet-generated", "FairDiffusion's EfficientNet: generated only", "scratch", (), 0.0, ("train",),
                 recipe="efficientnet"),
    )
}  # fmt: skip


def chosen(names: Sequence[str] = ()) -> tuple[Strategy, ...]:
    """The named rows in the table's order; () = the demo's, ("all",) = every one. ValueError for an unknown name."""
    if unknown := [n for n in names if n not in STRATEGIES and n != ALL]:
        raise ValueError(f"unknown strategy {unknown[0]!r}; known: {ALL}, {', '.join(STRATEGIES)}")
    wanted = set(STRATEGIES) if ALL in names else set(names or DEMO)
    return tuple(s for s in STRATEGIES.values() if s.id in wanted)


def generators(names: Sequence[str], methods: Sequence[str]) -> tuple[str, ...]:
    """The methods whose images train or test classifiers: the demo's three, or all once strategies are asked for."""
    return tuple(m for m in methods if names or m in DEMO_GENERATORS)


def sets(names: Sequence[str], method: str) -> tuple[str, ...]:
    """The generated sets that the chosen strategies read of `method`, in the order of the table."""
    if not generators(names, [method]):
        return ()
    return tuple(dict.fromkeys(name for s in chosen(names) for name in s.sets))


def methods_of(strategy: Strategy, methods: Sequence[str]) -> tuple[str, ...]:
    """The generators among `methods` that a row is about."""
    kinds = {"each": lambda m: True, "baseline": lambda m: m == BASELINE, "others": lambda m: m != BASELINE}
    return tuple(m for m in methods if kinds[strategy.of](m))
