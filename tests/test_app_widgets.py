"""The same questions as widgets: built without drawing, drawn by the button, refused in words."""

import ipywidgets as ipw
import pytest

from compdiff import studio, widgets
from compdiff.request import Refused


@pytest.fixture
def box(studio_root, monkeypatch):
    """The widgets of a tiny run by description, and the pictures that they show."""
    shown = []
    monkeypatch.setattr(widgets, "display", shown.append)
    (run,) = studio.trained_runs(str(studio_root), base=str(studio_root / "base"))
    made = widgets.explorer(run)
    assert shown == [], "nothing is drawn before somebody asks"
    return {getattr(w, "description", ""): w for w in made.children}, shown


def test_the_button_draws_what_was_chosen(box, capsys):
    named, shown = box
    assert isinstance(named["Race"], ipw.ToggleButtons) and "Cardiomegaly" in named["Findings"].options
    named["Steps"].value, named["Images"].value, named["Findings"].value = 2, 3, ("Cardiomegaly",)
    named["Generate"].click()
    assert len(shown) == 2 * 3 and all(image.height > image.width >= 256 for image in shown)
    assert "heart_thorax_ratio" in capsys.readouterr().out
    named["Methods"].value = ()
    named["Generate"].click()
    assert "choose at least one method" in capsys.readouterr().out and len(shown) == 6


def test_without_a_run_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path))
    with pytest.raises(Refused, match="make paper DATASETS=chest"):
        widgets.explorer()
