"""The strategies' table against the paper's, and which synthetic sets follow from it."""

import pytest

from compdiff import request, sample, stages, strategies
from compdiff.config import MAIN_METHODS
from compdiff.strategies import STRATEGIES, chosen, generators, methods_of, sets

# method section 7: id -> start, sets before fine-tuning, share of real, sets beside it
PAPER = {
    "1a": ("imagenet", (), 1, ()),
    "1b": ("imagenet", (), 1, ("train",)),
    "1c": ("imagenet", (), 1, ("train", "train2")),
    "1d": ("imagenet", (), 0, ("train",)),
    "1e": ("imagenet", (), 0, ("train", "train2")),
    "2b": ("imagenet", (), 1, ("balanced",)),
    "2c": ("imagenet", (), 0, ("balanced",)),
    "3a": ("scratch", ("train",), "fraction", ()),
    "3b": ("imagenet", ("train",), "fraction", ()),
    "4a": ("scratch", ("balanced",), "fraction", ()),
    "4b": ("imagenet", ("balanced",), "fraction", ()),
    "5a": ("imagenet", (), 1, ()),
    "5b": ("imagenet", (), 1, ()),
    "6a": ("imagenet", (), 0.5, ()),
}


def test_the_table_holds_the_papers_rows():
    assert [i for i in STRATEGIES if i[0].isdecimal() and not STRATEGIES[i].seed] == list(PAPER)
    for name, (start, before, real, beside) in PAPER.items():
        s = STRATEGIES[name]
        assert (s.start, s.pretrain, s.synthetic) == (start, before, beside), name
        assert s.real == real if real != "fraction" else 0 < s.real < 1, name
        assert s.lr * 1e-4 == pytest.approx(5e-5 if before else 1e-4), name
    assert {n for n in PAPER if "synthetic" in STRATEGIES[n].tests} == {"5a", "5b"}
    assert STRATEGIES["6a"].tests == ("real", "seen", "seen prompts")
    assert methods_of(STRATEGIES["5a"], MAIN_METHODS) == ("text",)
    assert methods_of(STRATEGIES["5b"], MAIN_METHODS) == MAIN_METHODS[1:]
    theirs = [s for s in STRATEGIES.values() if s.recipe != "downstream"]
    assert {(s.recipe, s.real, s.synthetic) for s in theirs} == {
        (r, *t) for r in ("vit", "efficientnet") for t in ((1.0, ()), (0.0, ("train",)))}  # fmt: skip


def test_the_demo_is_a_part_of_it():
    assert [s.id for s in chosen()] == ["1a", "1a-again", "1b", "1d", "2b"]
    again, once = vars(STRATEGIES["1a-again"]), vars(STRATEGIES["1a"])
    assert {k for k in once if once[k] != again[k]} == {"id", "title", "seed"}, "only chance tells them apart"
    assert [s.id for s in chosen(["all"])] == list(STRATEGIES)
    assert [s.id for s in chosen(["3b", "1a"])] == ["1a", "3b"]
    with pytest.raises(ValueError, match="unknown strategy '9z'; known: all, 1a"):
        chosen(["1a", "9z"])
    assert generators((), MAIN_METHODS) == ("text", "fairdiffusion", "hcn")
    assert generators(("1b",), MAIN_METHODS) == MAIN_METHODS


def test_sets_that_nobody_asked_for_are_not_made():
    """Without STRATEGIES notebook 05 makes exactly what it made before the table grew."""
    usual = {m: sample.set_names(m) for m in (*MAIN_METHODS, sample.UNTRAINED)}
    large = dict.fromkeys(("text", "fairdiffusion", "hcn"), ("test", "balanced", "train"))
    assert usual == dict.fromkeys(usual, ("test",)) | large
    assert sets((), "flat") == () and set(sets((), "hcn")) <= set(usual["hcn"])


def test_asked_for_strategies_bring_their_sets_for_every_method():
    for method in MAIN_METHODS:
        assert set(sample.set_names(method, ["all"])) == {"test", "train", "train2", "balanced"}
    assert sample.set_names("flat", ["1d"]) == ("test", "train") and sample.set_names("flat", ["5b"]) == ("test",)
    assert sample.set_names("hcn", ["1a"]) == ("test", "balanced", "train")  # never fewer than usual
    assert sample.set_names(sample.UNTRAINED, ["all"]) == ("test",)
    assert strategies.sets(["6a"], "hcn") == ("train",)


@pytest.mark.parametrize("asked", [(), ("all",)])
def test_notebooks_05_and_07_hear_of_the_same_strategies(asked):
    wanted = request.Request(datasets=("chest",), strategies=asked)
    sent = {step.stage.name: step.parameters()["strategies"] for step in stages.steps(stages.Project(), wanted)
            if "strategies" in step.parameters()}  # fmt: skip
    assert sent == ({"05_generation": ["all"], "07_downstream": ["all"]} if asked else {})
