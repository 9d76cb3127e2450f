"""Figures: deterministic files of bounded size that say what they show; the numbers drawn are those given."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from test_tables import COUNTS, HELD_OUT, SCHEMA, made_up

from compdiff import frames, plots, plots_downstream, plots_groups, plots_pictures, plots_results, plots_training
from compdiff.attributes import SCHEMAS

RESULTS = frames.over_seeds(made_up())


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


def figures():
    images, names = pictures()
    sigma = pd.DataFrame(
        {"name": list(COUNTS), "sigma": np.linspace(0.5, 0.3, len(COUNTS)), "train_n": list(COUNTS.values())}
    )
    dial = pd.DataFrame(
        [
            dict(dial=d, method=m, value=0.02 + 0.02 * d, lo=0.01, hi=0.06, std=np.nan, n=24)
            for d in (0, 0.5, 1)
            for m in ("flat", "hcn")
        ]
    )
    return {
        "architecture": lambda: plots_pictures.architecture(SCHEMA),
        "gallery": lambda: plots_pictures.gallery(images, names, HELD_OUT, "Phantoms and synthetic images, n = 1 per cell"),
        "quality": lambda: plots_results.quality_bars(RESULTS, SCHEMA, "phantoms"),
        "subgroup_fid": lambda: plots_groups.subgroup_fid(RESULTS, "phantoms"),
        "sigma": lambda: plots_training.sigma_history({"fairdiffusion": history(), "hcn_fairdiffusion": history()}, SCHEMA),
        "uncertainty": lambda: plots_training.uncertainty(sigma, HELD_OUT, "phantoms"),
        "downstream": lambda: plots_downstream.downstream_gaps(RESULTS, "phantoms"),
        "dial": lambda: plots_groups.interaction_dial(dial, "phantoms"),
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


def test_bars_stand_where_the_numbers_are():
    fig = plots_results.quality_bars(RESULTS, SCHEMA, "phantoms")
    ax = fig.axes[0]
    drawn = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == plots.MARKER["flat"]]
    assert drawn == [22.0]
    low, high = next(c for c in ax.collections if np.isclose(c.get_segments()[0][:, 0].mean(), 22.0)).get_segments()[0][
        :, 0
    ]
    assert (low, high) == (20.0, 24.0)


def test_missing_inputs_give_a_panel_that_says_so():
    empty = RESULTS.iloc[:0]
    for fig in (plots_training.uncertainty(None, [], "phantoms"), plots_training.sigma_history({}, SCHEMA), plots_groups.subgroup_fid(empty, "phantoms"),
                plots_downstream.downstream_gaps(empty, "phantoms"), plots_results.quality_bars(empty, SCHEMA, "phantoms")):  # fmt: skip
        assert "not available" in texts(fig)


def test_gallery_shows_every_sex_and_the_rarest_and_commonest_third_attribute():
    cells = plots_pictures.gallery_cells(SCHEMA, COUNTS, HELD_OUT)
    assert len(cells) <= 12 and {c[1] for c in cells} == {0, 1} and len({c[2] for c in cells}) == 2
    totals = [sum(n for name, n in COUNTS.items() if name.endswith(r)) for r in SCHEMA["race"].categories]
    assert {c[2] for c in cells} == {int(np.argmin(totals)), int(np.argmax(totals))}
    assert len(plots_pictures.gallery_cells(SCHEMAS["nih"], {})) <= 12


def test_colours_differ_in_lightness_or_hue_for_every_method():
    rgb = np.array([to_rgb(c) for c in plots.PALETTE])
    apart = np.linalg.norm(rgb[:, None] - rgb[None], axis=2) + np.eye(len(rgb))
    assert apart.min() > 0.2 and len(set(plots.MARKERS)) == len(plots.MARKERS)


def test_the_callers_style_is_left_alone():
    import matplotlib as mpl

    before = mpl.rcParams["font.size"]
    plots_pictures.architecture(SCHEMA)
    assert mpl.rcParams["font.size"] == before
