"""Figures: deterministic files of bounded size that say what they show; the numbers drawn are those given."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.colors import to_rgb
from PIL import Image
from test_tables import COUNTS, HELD_OUT, SCHEMA, made_up

from compdiff import (
    config, frames, plots, plots_downstream, plots_groups, plots_pictures, plots_results, plots_training, rendering, stats,
)  # fmt: skip
from compdiff.attributes import SCHEMAS
from compdiff.paths import RunFolder

RESULTS = frames.over_seeds(made_up())
SEEDS = made_up((0, 1, 2))  # differences that are the same in every seed would have no interval: they vary by a hair
THREE = frames.over_seeds(SEEDS.assign(value=SEEDS["value"] + 1e-6 * SEEDS["seed"] * SEEDS["method"].factorize()[0]))
PAIRS = pd.DataFrame({"method": ["hcn", "text", "hcn_fairdiffusion"], "seed": 7, "space": "lite0@96", "distance": [0.5, 1.5, 2.0],
                      "threshold": 1.0})  # fmt: skip


def predictions(n=200):
    rng = np.random.default_rng(2)
    p = rng.random(n)
    y = (rng.random(n) < p).astype(int)
    table = pd.DataFrame({"id": np.arange(n).astype(str), "split": "test", "y_x": y, "p_x": p}).assign(patient=lambda t: t["id"])
    return {("1a", "real_train"): table, ("1b", "hcn"): table.assign(p_x=p**2)}


def history(steps=60):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"step": np.arange(steps), "gap": rng.random(steps), "update": (np.arange(steps) % 30 == 29).astype(int)}
    )
    for k, n in enumerate(SCHEMA.sizes):
        for c in range(n):
            frame[f"{SCHEMA.names[k]}={SCHEMA.attributes[k].categories[c]}"] = rng.random(steps)
    return frame


def pictures():
    rng = np.random.default_rng(1)
    names = [SCHEMA.cell_name(c) for c in plots_pictures.gallery_cells(SCHEMA, COUNTS, HELD_OUT)]
    return {
        row: {n: rng.integers(0, 255, (64, 64), dtype=np.uint8) for n in names}
        for row in ("phantom", "Text baseline", "HCN (CompDiff)")
    }, names


def pair_images():
    return np.random.default_rng(3).integers(0, 255, (2, len(PAIRS), 64, 64), dtype=np.uint8)


def figures():
    images, names = pictures()
    sigma = pd.DataFrame(
        {"name": list(COUNTS), "sigma": np.linspace(0.5, 0.3, len(COUNTS)), "train_n": list(COUNTS.values())}
    )
    dial = pd.DataFrame(
        [
            dict(dial=d, method=m, stage="quality", metric="KID", extractor="lite0@96", value=0.02 + 0.02 * d, lo=0.01,
                 hi=0.06, std=np.nan, n=24, seeds=1)
            for d in (0, 0.5, 1)
            for m in ("flat", "hcn")
        ]
    )
    return {
        "architecture": lambda: plots_pictures.architecture(SCHEMA),
        "gallery": lambda: plots_pictures.gallery(images, names, HELD_OUT, "Phantoms, n = 1 per cell"),
        "quality": lambda: plots_results.quality_bars(RESULTS, SCHEMA, "phantoms"),
        "subgroup_fid": lambda: plots_groups.subgroup_fid(RESULTS, "phantoms"),
        "sigma": lambda: plots_training.sigma_history(dict.fromkeys(("fairdiffusion", "hcn"), history()), SCHEMA, 7),
        "uncertainty": lambda: plots_training.uncertainty(sigma, HELD_OUT, "phantoms", 7),
        "downstream": lambda: plots_downstream.downstream_gaps(RESULTS, "phantoms"),
        "dial": lambda: plots_groups.interaction_dial(dial, "phantoms"),
        "forest": lambda: plots_results.forest(THREE, "phantoms"),
        "cells": lambda: plots_groups.cell_heat_map(RESULTS, SCHEMA, COUNTS, HELD_OUT, "phantoms"),
        "pareto": lambda: plots_groups.pareto(RESULTS, SCHEMA, "phantoms"),
        "reliability": lambda: plots_downstream.reliability(predictions(), "phantoms", 7),
        "memorisation": lambda: plots_pictures.nearest_training(PAIRS, *pair_images(), len(PAIRS), "phantom"),
    }  # fmt: skip


def texts(fig):
    return " ".join(t.get_text() for t in fig.findobj(lambda a: hasattr(a, "get_text")))


@pytest.mark.parametrize("name", figures())
def test_files_are_small_and_identical_twice(name, tmp_path):
    for part in ("a", "b"):
        plots.save(figures()[name](), tmp_path / part, name)
    assert (tmp_path / "a" / f"{name}.svg").read_bytes() == (tmp_path / "b" / f"{name}.svg").read_bytes()
    svg = (tmp_path / "a" / f"{name}.svg").read_text()
    assert "<dc:date>" not in svg and len(svg) <= 200_000
    png = tmp_path / "a" / f"{name}.png"
    assert png.stat().st_size <= plots.MAX_PNG and Image.open(png).width >= 300


@pytest.mark.parametrize("name", sorted(set(figures()) - {"architecture"}))
def test_figures_say_what_and_how_many(name):
    said = texts(figures()[name]())
    assert ("hantom" in said or name == "sigma") and ("n = " in said or "(n)" in said)
    assert "seed 7" in said or name not in ("sigma", "uncertainty", "reliability", "memorisation"), "whose, of several seeds"


@pytest.mark.parametrize("name", figures())
def test_titles_lie_inside_the_figure(name):
    fig = figures()[name]()
    fig.draw_without_rendering()
    for text in [*fig.texts, *(ax.title for ax in fig.axes)]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= fig.bbox.width and box.y1 <= fig.bbox.height, text.get_text()


def test_no_size_of_a_control_is_told_of_the_methods():
    """The floor has few images in some groups; figures that do not draw it do not name its n."""
    base = RESULTS.iloc[0].to_dict() | {"stage": "quality", "setting": "test", "value": 30.0, "note": "", "lo": np.nan, "hi": np.nan}
    rows = [base | {"method": m, "metric": metric, "group_kind": "sex", "group": group, "n": n}
            for m, small in (("text", 96), ("hcn", 96), ("real_train", 43)) for group in SCHEMA["sex"].categories
            for metric, n in (("FID-matched", small), ("KID", 240))]  # fmt: skip
    rows += [base | {"method": "real_train", "metric": "KID", "group_kind": "cell", "group": HELD_OUT[0], "n": 2}]
    results = pd.concat([RESULTS, pd.DataFrame(rows)], ignore_index=True)
    fig = plots_groups.subgroup_fid(results, "phantoms")
    assert fig.axes[1].get_title().startswith("FID, all at n = 96:")
    assert [ax.get_xlim()[0] for ax in fig.axes] == pytest.approx([0.7 * 12] * 3)
    assert "n = 12 images a cell" in texts(plots_groups.cell_heat_map(results, SCHEMA, COUNTS, HELD_OUT, "phantoms"))


def test_bars_stand_where_the_numbers_are():
    fig = plots_results.quality_bars(RESULTS, SCHEMA, "phantoms")
    ax = fig.axes[0]
    drawn = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == plots.MARKER["flat"]]
    assert drawn == [22.0]
    low, high = next(c for c in ax.collections if np.isclose(c.get_segments()[0][:, 0].mean(), 22.0)).get_segments()[0][
        :, 0
    ]
    assert (low, high) == (20.0, 24.0)


def test_downstream_gaps_stand_in_two_rows_with_few_ticks():
    fig = plots_downstream.downstream_gaps(RESULTS, "phantoms")
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[:2] == ["AUROC", "gap, age"] and len(titles) == 2 * (1 + len(SCHEMA.names))
    drawn = [ax for ax in fig.axes if ax.containers]
    for ax in drawn:
        low, high = ax.get_xlim()
        assert sum(low <= t <= high for t in ax.get_xticks()) <= 3
    assert len(drawn) == 2 * len(SCHEMA.names) + 1 and len({ax.get_position().y0 for ax in fig.axes}) == 2


def test_forest_colours_say_better_whichever_side_that_is():
    """made_up: text has the lowest FID and KID, so its differences lie below 0 and are better."""
    ax = plots_results.forest(THREE, "phantoms").axes[0]
    first = [t.get_text() for t in ax.get_yticklabels()].index("Text baseline − Flat encoder")
    assert ax.containers[first].lines[0].get_color() == plots_results.WORTH_COLOUR["better"]


def test_missing_inputs_give_a_panel_that_says_so():
    empty = RESULTS.iloc[:0]
    for fig in (plots_training.uncertainty(None, [], "phantoms", 0), plots_training.sigma_history({}, SCHEMA, 0),
                plots_groups.subgroup_fid(empty, "phantoms"), plots_downstream.downstream_gaps(empty, "phantoms"),
                plots_results.quality_bars(empty, SCHEMA, "phantoms"),
                plots_results.forest(empty, "phantoms"), plots_groups.pareto(empty, SCHEMA, "phantoms"),
                plots_groups.cell_heat_map(empty, SCHEMA, COUNTS, HELD_OUT, "phantoms"),
                plots_downstream.reliability({}, "phantoms", 0)):  # fmt: skip
        assert "not available" in texts(fig)
    one_dial = pd.DataFrame([dict(dial=0.5, method="hcn", value=1.0, lo=0.5, hi=1.5, n=24)])
    two_methods = pd.concat([one_dial, one_dial.assign(dial=0, method="flat")])
    for rows in (one_dial, one_dial.iloc[:0], pd.DataFrame(), two_methods):
        assert plots_groups.interaction_dial(rows, "phantoms") is None


def test_the_dial_draws_only_methods_with_two_settings():
    row = dict(dial=0.5, stage="quality", metric="KID", extractor="lite0", lo=0.5, hi=1.5, n=24, seeds=1)
    rows = [row | {"method": m, "dial": d, "value": 1.0} for m in ("text", "flat", "hcn") for d in (0.5, 1)]
    rows[1]["value"] = np.nan  # text at 1 was lost
    fig = plots_groups.interaction_dial(pd.DataFrame(rows), "phantoms")
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["Flat encoder", "HCN (CompDiff)"]


def test_classifiers_tested_on_other_images_are_not_drawn_among_those_tested_on_real_ones():
    row = RESULTS[(RESULTS["stage"] == "downstream") & (RESULTS["metric"] == "macro AUROC")].iloc[0].to_dict()
    other = pd.DataFrame([row | {"setting": s, "value": 0.99} for s in ("5a on synthetic", "6a on seen", "6a")])
    drawn = plots_downstream.downstream_gaps(pd.concat([RESULTS, other]), "phantoms")
    names = {t.get_text().split("  ")[0] for t in drawn.axes[0].get_yticklabels()}
    assert names == {"1a", "1b", "2b", "6a"}


# --- forest, cells, front, reliability --------------------------------------------------------------------------------
def test_forest_draws_the_paired_intervals():
    """made_up: each method's FID is 2 above the one before it in every seed, so all differences are nearly exact."""
    fig = plots_results.forest(THREE, "phantoms")
    ax = fig.axes[0]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    drawn = dict(zip(labels, (c.get_segments()[0][0, 0] for c in ax.collections), strict=True))
    assert drawn["Text baseline − Flat encoder"] == pytest.approx(-2, abs=1e-3)
    assert drawn["Text baseline − HCN + FairDiffusion"] == pytest.approx(-8, abs=1e-3)
    assert len(labels) == 10
    assert "not available" in texts(plots_results.forest(RESULTS, "phantoms")), "one seed, no paired row"


def test_every_cell_stands_in_its_place_and_held_out_ones_are_framed():
    results = RESULTS.copy()
    cell = "80+ Male Hispanic"
    where = (results["group"] == cell) & (results["metric"] == "KID") & (results["method"] == "hcn")
    results.loc[where, "value"] = 0.123
    fig = plots_groups.cell_heat_map(results, SCHEMA, COUNTS, HELD_OUT, "phantoms")
    (ax,) = [a for a in fig.axes if a.get_title() == "HCN (CompDiff)"]
    i, j = np.argwhere(np.isclose(ax.images[0].get_array(), 123))[0]
    names = (ax.get_yticklabels()[i].get_text(), ax.get_xticklabels()[j].get_text())
    assert names == ("80+", "M Hispanic") and len(ax.patches) == len(HELD_OUT)
    assert {p.get_xy() for p in ax.patches} >= {(j - 0.5, i - 0.5)}


@given(arrays(float, st.tuples(st.integers(1, 12), st.just(2)), elements=st.integers(0, 4).map(float)))
def test_pareto_front_is_what_nobody_beats(points):
    best = set(plots_groups.front(points).tolist())
    beaten = {i for i, p in enumerate(points) if any((q <= p).all() and (q < p).any() for q in points)}
    assert best == set(range(len(points))) - beaten and best


def test_size_matched_panels_leave_out_what_was_compared_at_another_size():
    base = RESULTS.iloc[0].to_dict() | {"stage": "quality", "setting": "test", "extractor": "lite0@96", "note": "", "group": ""}
    rows = [base | {"method": m, "metric": metric, "group_kind": kind, "value": value, "n": n}
            for m, n in (("text", 96), ("hcn", 96), ("real_train", 43), ("copy", 96))
            for metric, kind, value in (("FID-matched", "overall", 30.0), ("ES-FID-matched", "sex", 31.0))]  # fmt: skip
    points, x, _ = plots_groups.equity_points(pd.concat([RESULTS, pd.DataFrame(rows)]), "sex")
    assert sorted(points["key"]) == ["copy", "hcn", "text"] and x == "FID-matched-lite0@96"


def test_equity_is_the_distance_of_the_groups():
    """made_up: ES-FID = FID + 3; no size-matched rows, so the raw ones are drawn."""
    points, x, y = plots_groups.equity_points(RESULTS, "sex")
    assert set(points.set_index("key")["y"].round(9)) == {3.0} and (x, y) == ("FID-lite0@96", "ES-FID − FID")
    assert points.set_index("key").loc["hcn", "x"] == 26.0


def test_reliability_bins_hold_everybody_and_calibrated_ones_lie_on_the_diagonal():
    rng = np.random.default_rng(0)
    p = rng.random(5000)
    y = (rng.random(5000) < p).astype(int)
    bins = plots_downstream.reliability_bins(y, p)
    assert bins["n"].sum() == 5000 and len(bins) == plots_downstream.MAX_BINS and (bins["n"] == 500).all()
    assert np.average(bins["value"], weights=bins["n"]) == pytest.approx(y.mean())
    assert (np.abs(bins["value"] - bins["p"]) < 0.07).all()  # 3 standard errors of 500 draws
    assert ((bins["lo"] <= bins["value"]) & (bins["value"] <= bins["hi"])).all()
    pairs = plots_downstream.reliability_bins(y, p, np.argsort(np.argsort(p)) // 2)  # neighbours are one patient's
    pd.testing.assert_frame_equal(pairs[["p", "value", "n"]], bins[["p", "value", "n"]])
    half = [stats.jeffreys(share * 250, 250) for share in bins["value"]]
    np.testing.assert_allclose(pairs[["lo", "hi"]], [(r.lo, r.hi) for r in half])
    everyone = plots_downstream.reliability_bins(y, p, rng.permutation(5000).astype(str))
    pd.testing.assert_frame_equal(everyone, bins, check_exact=True)
    exact = [stats.jeffreys(round(share * 500), 500) for share in bins["value"]]
    assert bins[["lo", "hi"]].to_numpy().tolist() == [[r.lo, r.hi] for r in exact]
    assert len(plots_downstream.reliability_bins(y[:30], p[:30])) == 1, "too few images for two bins"
    assert len(plots_downstream.reliability_bins(y, np.full(5000, 0.3))) == 1


def test_the_error_beside_a_curve_is_that_of_the_predictions_drawn():
    """By hand: ten bins of equal width; notebook 07 gives the same number for the seed that is drawn."""
    for key, table in predictions().items():
        at = np.minimum((10 * table["p_x"]).astype(int), 9)
        expected = sum(abs((part["y_x"] - part["p_x"]).sum()) for _, part in table.groupby(at)) / len(table)
        fig = plots_downstream.reliability({key: table}, "phantoms", 0)
        assert f"ECE {rendering.number(expected)}" in texts(fig)


def test_predictions_are_read_by_classifier_and_only_on_test_images(tmp_path):
    table = predictions()["1a", "real_train"]
    held = [("1a", "real_train", 0.8), ("1b", "hcn_fairdiffusion", 0.7), ("2b", "text", np.nan)]
    results = pd.DataFrame([(*row, "downstream") for row in held], columns=["setting", "method", "value", "stage"])
    names = ("1a_real_train", "1b_hcn_fairdiffusion", "1d_text_glaucoma", "1b_flat", "2b_text")  # the last two: of old runs
    for name in names:
        (tmp_path / name).mkdir()
        table.assign(split=["val"] * 50 + ["test"] * 150).to_csv(tmp_path / name / "predictions.csv", index=False)
    found = plots_downstream.predictions(tmp_path, results)
    assert set(found) == {("1a", "real_train"), ("1b", "hcn_fairdiffusion")}, "neither a single task's classifier nor one without a number"
    assert {len(t) for t in found.values()} == {150} and plots_downstream.labels_of(found["1a", "real_train"]) == ["x"]
    assert plots_downstream.predictions(tmp_path / "nowhere", results) == {}


def test_gallery_shows_every_sex_and_the_rarest_and_commonest_third_attribute():
    cells = plots_pictures.gallery_cells(SCHEMA, COUNTS, HELD_OUT)
    assert len(cells) <= 12 and {c[1] for c in cells} == {0, 1} and len({c[2] for c in cells}) == 2
    totals = [sum(n for name, n in COUNTS.items() if name.endswith(r)) for r in SCHEMA["race"].categories]
    assert {c[2] for c in cells} == {int(np.argmin(totals)), int(np.argmax(totals))}
    assert len(plots_pictures.gallery_cells(SCHEMAS["nih"], {})) <= 12
    drawn = {SCHEMA.cell_name(c) for c in cells[1:]}
    assert plots_pictures.gallery_cells(SCHEMA, COUNTS, HELD_OUT, drawn=drawn) == cells[1:], "no column without an image"


def test_closest_pairs_of_all_seeds_and_the_suspected_ones_in_red(tmp_path):
    folders = {seed: RunFolder(str(tmp_path), "demo", "chest", seed) for seed in (0, 1)}
    assert plots_pictures.closest_pairs(folders, ["hcn"]) == {}
    for seed, folder in folders.items():
        table = pd.DataFrame({"method": ["hcn", "hcn", "copy", "hcn"], "space": ["pixels", "pixels", "pixels", "lite0"],
                              "generated": ["a", "gone", "a", "a"], "training": "007", "distance": [2.0 - seed, 0.1, 0.0, 3.0],
                              "threshold": 1.5})  # fmt: skip
        for name in ("results", "generated/hcn/test/images"):
            (folder.seed / name).mkdir(parents=True)
        table.to_csv(folder.results / "memorisation_pairs.csv", index=False)
        (folder.generated("hcn", "test") / "images" / "a.png").touch()
    found = plots_pictures.closest_pairs(folders, ["hcn"])
    assert found["pixels"]["seed"].tolist() == [1, 0] and len(found["lite0"]) == 2, "no control, no image that is gone"
    assert set(found["pixels"]["training"]) == {"007"} and all(f.exists() for f in found["pixels"]["file"])
    fig = plots_pictures.nearest_training(PAIRS, *pair_images(), 30, "phantom")
    assert [to_rgb(ax.title.get_color()) == to_rgb(plots_pictures.RED) for ax in fig.axes[:3]] == [True, False, False]
    assert "a suspected copy" in texts(fig) and "blur" not in texts(fig)
    by_pixels = plots_pictures.nearest_training(PAIRS.assign(space="pixels"), *pair_images(), 30, "phantom")
    assert "red: below 1, a copy or mere blur" in texts(by_pixels), "a blurred image is near everything in pixels"
    with pytest.raises(ValueError, match="drawn when they are phantoms"):
        plots_pictures.nearest_training(PAIRS, *pair_images(), 30, "radiograph")


def test_colours_differ_in_lightness_or_hue_for_every_method():
    rgb = np.array([to_rgb(c) for c in plots.PALETTE])
    apart = np.linalg.norm(rgb[:, None] - rgb[None], axis=2) + np.eye(len(rgb))
    assert apart.min() > 0.2 and len(set(plots.MARKERS)) == len(plots.MARKERS)


def test_every_method_has_a_look_of_its_own():
    """Also where there are more methods than colours."""
    looks = {m: (plots.COLOUR[m], plots.MARKER[m]) for m in config.METHODS}
    assert len(set(looks.values())) == len(config.METHODS) > len(plots.PALETTE)
    assert len({plots.COLOUR[m] for m in config.MAIN_METHODS}) == len(config.MAIN_METHODS)


def test_the_callers_style_is_left_alone():
    import matplotlib as mpl

    before = mpl.rcParams["font.size"]
    plots_pictures.architecture(SCHEMA)
    assert mpl.rcParams["font.size"] == before
