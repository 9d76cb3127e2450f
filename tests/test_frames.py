"""Seeds combined, differences between methods and verdicts, against scipy and by hand."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from test_tables import made_up

from compdiff import dials, frames, record, rendering, stats
from compdiff.frames import Item


def test_seeds_are_averaged_and_counted():
    three = frames.over_seeds(made_up((0, 1, 2)))
    row = Item("quality", "FID").of(three, "text")
    assert (row["value"], row["std"], row["seeds"]) == (21.0, 1.0, 3)  # by hand: 20, 21, 22
    own = made_up()  # trainings and patients are independent: half-widths add in squares
    own = Item("quality", "FID").of(frames.over_seeds(own), "text")
    wanted = stats.seeds_interval(np.array([20.0, 21.0, 22.0]))
    assert row["value"] - row["lo"] == pytest.approx(np.hypot(21 - wanted.lo, own["value"] - own["lo"]))
    assert row["hi"] - row["value"] == pytest.approx(np.hypot(wanted.hi - 21, own["hi"] - own["value"]))
    assert own["hi"] > own["value"] > own["lo"]
    assert rendering.shown({**row, "column": "FID", "key": "text", "n": np.nan}) == "21.0 (1.00)"


def test_the_interval_of_seeds_covers_what_other_trainings_and_other_patients_would_give():
    """Simulated: every study has three trainings, all judged on its own 100 patients, whose luck they share."""
    rng, covered, alone = np.random.default_rng(0), 0, 0
    row, rows, studies = made_up().iloc[0].to_dict() | {"lo": np.nan, "hi": np.nan}, [], 400
    for study in range(studies):
        luck, patients = rng.normal(0, 0.1), 0.1 * 1.96
        values = 0.8 + luck + rng.normal(0, 0.02, 3)
        rows += [row | {"metric": f"accuracy:{study}", "seed": s, "value": v, "lo": v - patients, "hi": v + patients}
                 for s, v in enumerate(values)]  # fmt: skip
        ends = stats.seeds_interval(values)
        alone += ends.lo <= 0.8 <= ends.hi
    found = frames.over_seeds(record.results(rows))
    found = found[found["metric"].str.startswith("accuracy:")]
    covered = found["lo"].le(0.8).to_numpy() & found["hi"].ge(0.8).to_numpy()
    assert len(found) == studies and 0.93 < covered.mean() < 0.99 and alone / studies < 0.5


def test_seeds_of_one_value_keep_the_interval_of_their_rows():
    """Three copies of the share 0 are no certainty: Jeffreys' end stays; where seeds differ, theirs comes in."""
    row = made_up().iloc[0].to_dict() | {"metric": "suspected copies", "value": 0.0, "lo": 0.0, "hi": 0.005}
    alike = frames.over_seeds(record.results([row | {"seed": s, "hi": 0.005 + s / 1000} for s in range(3)]))
    (same,) = alike[alike["metric"] == "suspected copies"].to_dict("records")
    assert (same["value"], same["lo"], same["hi"], same["std"], same["seeds"]) == (0, 0, 0.007, 0, 3)
    (differ,) = frames.over_seeds(record.results([row | {"seed": s, "value": s / 1000} for s in range(3)])).to_dict("records")
    wanted = stats.seeds_interval(np.array([0.0, 0.001, 0.002]))
    above = np.mean([0.005, 0.004, 0.003])
    assert differ["hi"] == pytest.approx(0.001 + np.hypot(wanted.hi - 0.001, above))


def test_a_distance_ranks_between_clear_ends_only():
    def results(vae, ours, untrained, half=1.0):
        row = made_up().iloc[0].to_dict() | {"stage": "quality", "metric": "FID"}
        of = {"vae": vae, "hcn": ours, "untrained": untrained}
        return frames.over_seeds(record.results([row | {"method": m, "value": v, "lo": v - half, "hi": v + half}
                                                 for m, v in of.items() if v]))  # fmt: skip

    assert frames.ranks(results(10, 20, 30), "FID", "hcn") is True
    for ends in ((19, 20, 30), (10, 20, 21), (25, 20, 30), (10, 20, 15)):
        assert frames.ranks(results(*ends), "FID", "hcn") is False
    assert frames.ranks(results(None, 20, 30), "FID", "hcn") is None
    assert frames.ranks(results(10, 20, 30), "KID", "hcn") is None


def test_a_seed_without_a_number_is_not_counted():
    two = made_up((0, 1))
    gone = (two["seed"] == 1) & (two["method"] == "text") & (two["metric"] == "KID") & (two["group_kind"] == "overall")
    two.loc[gone, ["value", "lo", "hi"]] = np.nan
    row = Item("quality", "KID").of(frames.over_seeds(two), "text")
    assert (row["seeds"], row["value"], row["lo"], row["hi"]) == pytest.approx((1, 0.02, 0.018, 0.022))
    assert np.isnan(row["std"])


def test_a_note_that_differs_between_seeds_names_the_seed_it_is_of():
    frame = made_up((0, 1, 2))
    fid = (frame["metric"] == "FID") & (frame["group_kind"] == "overall")
    frame.loc[fid, "note"] = [f"s = 0.{9 - s}" for s in frame.loc[fid, "seed"]]  # the first seed's is the largest
    kid = (frame["metric"] == "KID") & (frame["group_kind"] == "overall") & (frame["seed"] == 1)
    frame.loc[kid, "note"] = "ineligible: few"
    precision = (frame["metric"] == "precision") & (frame["seed"] == 2)
    frame.loc[precision, "note"] = "late"
    frame.loc[frame["metric"] == "recall", "note"] = "the same"
    results = frames.over_seeds(frame)
    for metric, note in (("FID", "s = 0.9 (seed 0)"), ("KID", "ineligible: few (seed 1)"), ("precision", "late (seed 2)"),
                         ("recall", "the same"), ("MS-SSIM-3 paired", "")):  # fmt: skip
        assert set(Item("quality", metric).rows(results)["note"]) == {note}
    age = results[results["metric"] == "disease AUROC"]
    assert set(age["note"]) == {"mean of No Finding, Pneumothorax"}


def test_several_seeds_give_differences_an_interval_of_paired_values():
    """Against scipy's one-sample t-interval of the seeds' differences; methods that move together differ clearly."""
    frame = made_up((0, 1, 2))
    where = (frame["metric"] == "FID") & (frame["group_kind"] == "overall")
    frame.loc[where & (frame["seed"] == 1) & (frame["method"] == "hcn"), "value"] += 0.5
    results = frames.over_seeds(frame)
    by_seed = frame[where].pivot(index="seed", columns="method", values="value")
    ends = ttest_1samp(by_seed["text"] - by_seed["hcn"], 0).confidence_interval()
    found = frames.verdict(results, Item("quality", "FID"), "text", "hcn")
    assert (found.paired["lo"], found.paired["hi"]) == pytest.approx((ends.low, ends.high)) and found.word == "below"
    back = frames.difference(results, Item("quality", "FID"), "hcn", "text")
    assert (back["value"], back["lo"], back["hi"]) == pytest.approx(
        (-found.paired["value"], -found.paired["hi"], -found.paired["lo"])
    )
    assert not frames.over_seeds(made_up())["stage"].eq("difference").any(), "one seed adds none"


def test_p_values_of_seeds_are_twice_their_mean():
    row = made_up().iloc[0].to_dict() | {"stage": "difference", "lo": np.nan, "hi": np.nan}
    row |= {"metric": "p (bootstrap, Holm) KID minus flat"}
    three = record.results([row | {"seed": s, "value": v} for s, v in enumerate((0.01, 0.02, 0.06))])
    (combined,) = frames.over_seeds(three).to_dict("records")
    assert combined["value"] == pytest.approx(0.06) and np.isnan(combined["lo"]) and combined["seeds"] == 3
    assert frames.over_seeds(three.assign(value=0.9))["value"].item() == 1


def test_a_number_given_twice_is_an_error():
    frame = made_up()
    with pytest.raises(ValueError, match="twice"):
        frames.over_seeds(pd.concat([frame, frame.iloc[:1]]))


# --- verdicts ---------------------------------------------------------------------------------------------------------
def pair(a, b, difference=None):
    """Results of two methods: a and b are (value, lo, hi) of KID, `difference` that of text minus hcn."""
    base = {"dataset": "chest", "seed": 0, "setting": "test", "group_kind": "overall", "group": "", "note": "",
            "extractor": "lite0"}  # fmt: skip
    numbers = [("quality", "text", "KID", a), ("quality", "hcn", "KID", b)]
    numbers += [("difference", "text", "KID minus hcn", difference)] if difference else []
    rows = [base | dict(stage=s, method=m, metric=k, value=v[0], lo=v[1], hi=v[2]) for s, m, k, v in numbers]
    return frames.over_seeds(record.results(rows))


NONE = (np.nan, np.nan)


@pytest.mark.parametrize(
    "a, b, difference, word",
    [
        ((3, 2, 4), (5, 4, 6), None, "within noise"),  # the intervals touch
        ((3, 2, 3.9), (5, 4, 6), None, "below"),
        ((3, 2, 4), (5, 4, 6), (-2, -3, -1), "below"),  # its own interval decides
        ((3, 2, 3.9), (5, 4, 6), (-2, -5, 1), "within noise"),
        ((3, 2, 3.9), (5, 4, 6), (-2, *NONE), "below"),  # a difference without interval decides nothing
        ((3, *NONE), (5, 4, 6), None, "cannot be said"),
        ((np.nan, *NONE), (5, 4, 6), None, "cannot be said"),
    ],
)
def test_verdicts(a, b, difference, word):
    results, item = pair(a, b, difference), Item("quality", "KID")
    assert frames.verdict(results, item, "text", "hcn").word == word
    other = {"below": "above"}.get(word, word)
    assert frames.verdict(results, item, "hcn", "text").word == other, "the other way round"


def test_equal_points_are_not_apart():
    assert frames.verdict(pair((3, 3, 3), (3, 3, 3)), Item("quality", "KID"), "text", "hcn").word == "within noise"


def test_two_extractors_are_two_numbers():
    frame = made_up()
    other = frame[frame["metric"] == "FID"].assign(extractor="inception", value=7.0, lo=6.0, hi=8.0)
    results = frames.over_seeds(pd.concat([frame, other]))
    assert Item("quality", "FID").of(results, "text")["value"] == 20.0
    assert Item("quality", "FID", extractor="inception").of(results, "text")["value"] == 7.0
    assert Item("quality", "FID", extractor="inception").label(results) == "FID-inception"


def dial_run(root, name, dial, seeds=(0,)):
    """A run folder as notebooks 01 and 06 leave it: phantoms of one `interaction`."""
    folder = root / name / "demo" / "chest"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "index.json").write_text(json.dumps({"settings": {} if dial is None else {"interaction": dial}}))
    frame = made_up(seeds)
    for seed in seeds:
        record.save_results(frame[frame["seed"] == seed], folder / f"seed{seed}" / "results" / "06_metrics.csv")
    return folder


def test_runs_of_other_dials_are_read_for_the_seeds_that_all_share(tmp_path):
    here, zero, one = (dial_run(tmp_path, *run) for run in (
        ("here", 0.5, (0, 1)), ("dial0", 0.0, (0, 1, 2)), ("dial1", 1.0, (0,))))  # fmt: skip
    real, later = dial_run(tmp_path, "real", None, (0, 1)), dial_run(tmp_path, "later", 0.8, (5,))
    found = dials.read_dials([here, zero, real, later], [0, 1])
    assert list(found) == [0.5, 0.0], "without the run that has no dial, and the one that has no seed of this run"
    row = Item("quality", "FID").of(found[0.0], "text")
    assert (row["value"], row["seeds"]) == (20.5, 2), "20 and 21; seed 2 says 22"
    found = dials.read_dials([here, zero, one], [0, 1])
    rows = [Item("quality", "FID").of(found[dial], "text") for dial in (0.0, 0.5, 1.0)]
    assert [(row["value"], row["seeds"]) for row in rows] == [(20.0, 1)] * 3, "seed 0 is the only one of all three"
    assert dials.read_dials([dial_run(tmp_path, "other", 0.2, (1,)), one], [0, 1]) == {}


def test_the_same_dial_twice_is_refused(tmp_path):
    folders = [dial_run(tmp_path, "here", 0.5), dial_run(tmp_path, "dialhalf", 0.5)]
    with pytest.raises(ValueError, match="here/demo/chest and dialhalf/demo/chest both have interaction = 0.5; remedy"):
        dials.read_dials(folders, [0])
