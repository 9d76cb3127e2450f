"""Held-out against seen cells: the words fall where the intervals lie."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from test_tables import made_up

from compdiff import frames, unseen


def accuracy(held, seen, half=0.02, chance=0.3):
    """Results with the mean accuracy of hcn in held-out and seen cells, and of the shuffled control in seen ones."""
    row = made_up().iloc[0].to_dict() | {"stage": "alignment", "metric": "accuracy", "group_kind": "held_out", "n": 60}
    cells = (("hcn", "held_out", held), ("hcn", "seen", seen), ("shuffled", "seen", chance))
    return frames.over_seeds(pd.DataFrame([row | {"method": m, "group": g, "value": v, "lo": v - half, "hi": v + half}
                                           for m, g, v in cells]))  # fmt: skip


CASES = {(0.5, 0.87, 0.02): "falls short", (0.88, 0.87, 0.02): "composes", (0.8, 0.87, 0.2): "within noise",
         (0.3, 0.31, 0.02): "cannot be said"}  # fmt: skip


@pytest.mark.parametrize("numbers, word", CASES.items())
def test_words_follow_the_intervals(numbers, word):
    results = accuracy(*numbers)
    assert unseen.composes(results, "hcn")[0] == word
    assert any(f"HCN (CompDiff): **{word}**" in line for line in unseen.composition_lines(results))


def test_several_trainings_are_compared_training_by_training():
    """Against scipy's one-sample interval: a fall that each training shows is a fall, though the levels vary more; the
    patients of both kinds of cells, who are others, come on top."""
    row = made_up().iloc[0].to_dict() | {"stage": "alignment", "metric": "accuracy", "group_kind": "held_out", "method": "hcn"}
    seen, fall = np.array([0.6, 0.7, 0.8]), np.array([0.10, 0.11, 0.105])
    rows = [row | {"seed": s, "group": g, "value": v, "lo": v - 0.03, "hi": v + 0.04, "n": n}
            for s in range(3) for g, v, n in (("seen", seen[s], 90), ("held_out", seen[s] - fall[s], 60))]  # fmt: skip
    results = frames.over_seeds(pd.DataFrame(rows))
    (found,) = results[results["stage"] == "unseen"].to_dict("records")
    ends = ttest_1samp(-fall, 0).confidence_interval()
    down, up = (np.hypot(e, 0.05) for e in (found["value"] - ends.low, ends.high - found["value"]))  # 3, 4, 5
    assert (found["lo"], found["hi"], found["n"]) == pytest.approx((found["value"] - down, found["value"] + up, 60))
    assert unseen.composes(results, "hcn")[0] == "falls short"
    few = [r | {"lo": r["value"] - 0.2, "hi": r["value"] + 0.2} for r in rows]  # few patients: no seed says it
    alone = frames.over_seeds(pd.DataFrame([r for r in few if r["seed"] == 0]))
    assert not alone["stage"].eq("unseen").any() and unseen.composes(alone, "hcn")[0] == "within noise"
    assert unseen.composes(frames.over_seeds(pd.DataFrame(few)), "hcn")[0] == "within noise", "nor do three"


def test_a_mean_over_what_the_judge_cannot_read_says_nothing():
    results = accuracy(0.88, 0.87)
    row = results.iloc[0].to_dict() | {"metric": "accuracy:sex", "group_kind": "overall", "group": ""}
    for real, word in ((0.5, "composes"), (0.31, "cannot be said")):
        extra = [row | {"method": m, "value": v, "lo": v - 0.02, "hi": v + 0.02} for m, v in (("real_test", real), ("shuffled", 0.3))]
        told, why = unseen.composes(pd.concat([results, pd.DataFrame(extra)], ignore_index=True), "hcn")
        assert told == word and ("cannot read sex" in why) == (word != "composes")


def test_interval_of_a_difference_is_that_of_independent_normal_numbers():
    x, y = ({"value": v, "lo": v - 1.96 * s, "hi": v + 1.96 * s} for v, s in ((1.0, 0.3), (3.0, 0.4)))
    found = unseen.apart_by(x, y)
    assert (found["value"], found["lo"], found["hi"]) == pytest.approx((-2, -2 - 1.96 * 0.5, -2 + 1.96 * 0.5))


def test_without_held_out_cells_the_section_says_so():
    assert any("not available" in line for line in unseen.composition_lines(frames.over_seeds(made_up()).iloc[:0]))


def test_uncertainty_compares_held_out_with_rare_cells():
    table = pd.DataFrame({"name": list("abcdefghijkl"), "train_n": [0, 0, 0, 0, 5, 6, 7, 10, 90, 91, 92, 93]})
    table["sigma"] = -table["train_n"] / 100 + np.r_[np.full(4, 3.0), np.ones(8)]
    text = "\n".join(unseen.uncertainty_lines(table, list("abcd"), 3))
    assert "(n = 4); seen cells of at most 10 training images: 0.93 (n = 4). Held out is **above** rare" in text
    assert "training images: -1.00" in text and "n = 12 cells" in text and "(seed 3)" in text
    assert "not available" in "\n".join(unseen.uncertainty_lines(None, [], 0))
