"""Pictures of the lessons: every number of the map of cells stands in the line and column that are named so."""

import numpy as np
import pytest

from compdiff import plots_lesson
from compdiff.attributes import ETHNICITY, SCHEMAS, SEX, VIEW, Schema
from compdiff.manifests import load_manifest

SOME = {
    "three attributes": (SCHEMAS["chest"], load_manifest("chest").held_out),
    "four": (SCHEMAS["fundus_ethnicity"], load_manifest("fairgenmed").held_out),
    "two": (Schema((SEX, VIEW)), [(1, 0)]),
    "none held out": (Schema((SEX, VIEW, ETHNICITY)), ()),
}


@pytest.mark.parametrize("case", SOME)
def test_the_map_shows_each_cells_number_at_its_names(case, monkeypatch):
    schema, held_out = SOME[case]
    monkeypatch.setattr(plots_lesson, "small", lambda figure: figure)
    values = np.arange(len(schema.cells())).reshape(schema.sizes)
    (axis,) = plots_lesson.cell_map(values, schema, held_out).axes
    columns, lines = ([tick.get_text() for tick in ticks] for ticks in (axis.get_xticklabels(), axis.get_yticklabels()))
    shown = {(lines[text.get_position()[1]], *columns[text.get_position()[0]].split("\n")): text for text in axis.texts}
    names = [tuple(schema.decode(cell).values()) for cell in schema.cells()]
    assert {name: text.get_text() for name, text in shown.items()} == {name: str(n) for n, name in enumerate(names)}
    boxes = [patch.get_xy() for patch in axis.patches]
    framed = {(lines[round(y + 0.5)], *columns[round(x + 0.5)].split("\n")) for x, y in boxes}
    assert framed == {tuple(schema.decode(cell).values()) for cell in held_out} and len(boxes) == len(held_out)


def test_an_empty_map_is_refused_in_words():
    with pytest.raises(ValueError, match="no cell holds anything"):
        plots_lesson.cell_map(np.zeros(SCHEMAS["chest"].sizes), SCHEMAS["chest"], ())


def test_a_map_is_a_picture():
    assert plots_lesson.cell_map(np.ones(SCHEMAS["fundus_ethnicity"].sizes), SCHEMAS["fundus_ethnicity"], ()).data[:4] == b"\x89PNG"
