"""The same questions as widgets: built without drawing, drawn by the button, refused in words."""

import io

import ipywidgets as ipw
import numpy as np
import pytest
from PIL import Image

from compdiff import heart_studio, masks, studio, widgets
from compdiff.request import Refused


@pytest.fixture
def shown(monkeypatch):
    """The pictures that widgets show."""
    pictures = []
    monkeypatch.setattr(widgets, "display", pictures.append)
    return pictures


def by_description(box):
    return {getattr(w, "description", ""): w for w in box.children}


def test_the_button_draws_what_was_chosen(studio_root, shown, capsys):
    (run,) = studio.trained_runs(str(studio_root), base=str(studio_root / "base"))
    named = by_description(widgets.explorer(run))
    assert shown == [], "nothing is drawn before somebody asks"
    assert isinstance(named["Race"], ipw.ToggleButtons) and "Cardiomegaly" in named["Findings"].options
    named["Steps"].value, named["Images"].value, named["Findings"].value = 2, 3, ("Cardiomegaly",)
    named["Generate"].click()
    assert len(shown) == 2 * 3 and all(image.height > image.width >= 256 for image in shown)
    assert "heart_thorax_ratio" in capsys.readouterr().out
    named["Methods"].value = ()
    named["Generate"].click()
    assert "choose at least one method" in capsys.readouterr().out and len(shown) == 6


def test_a_heart_follows_the_chosen_mask(heart_root, shown, capsys):
    (run,) = heart_studio.trained_runs(str(heart_root), base=str(heart_root / "base"))
    box = widgets.heart_explorer(run)
    named, examples = by_description(box), masks.examples(32)
    assert shown == [] and (named["Steps"].value, named["Guidance"].value) == (2, 2.5), "the steps of the run, the guidance of its random set"
    assert [name for name, _ in named["Mask"].options] == [e.name for e in examples]
    named["Mask"].value, named["Images"].value, named["Seed"].value = 3, 2, 5
    assert named["Prompt"].value == heart_studio.prompt_of(examples[3].row)
    (look,) = [w for w in box.children if isinstance(w, ipw.Image)]
    with Image.open(io.BytesIO(look.value)) as picture:
        assert np.array_equal(masks.from_grey(np.asarray(picture), 32), examples[3].mask)
    named["Prompt"].value = "heart failure"
    named["Generate"].click()
    asked = run, examples[3].mask, "heart failure", examples[3].row, studio.Sampling(5, 2, 2.5, 2)
    for picture, one in zip(shown, heart_studio.generate(*asked), strict=True):
        frames = heart_studio.frames(one.image)
        drawn = np.asarray(picture)[: 4 * 32 : 4, ::4, 0]  # two frames of 32 pixels, enlarged to 256
        assert picture.width == 256 and np.array_equal(drawn, np.hstack([frames["ED"], frames["ES"]]))
    ejection = masks.measured(examples[3].mask)["ejection fraction"]
    assert f"'ejection fraction': {round(ejection, 3)}" in capsys.readouterr().out
    named["Prompt"].value = "x" * 301
    named["Generate"].click()
    assert "301 characters" in capsys.readouterr().out and len(shown) == 2


@pytest.mark.parametrize("made, dataset", [(widgets.explorer, "chest"), (widgets.heart_explorer, "cardiac")])
def test_without_a_run_it_says_what_to_do(made, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path))
    with pytest.raises(Refused, match=f"make paper DATASETS={dataset}"):
        made()
