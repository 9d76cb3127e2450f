"""The drawn datasheet shows the counts of the table."""

import numpy as np
import pytest
import tiny

from compdiff import datasets, plots, plots_data


@pytest.fixture(scope="module")
def data(tiny_root):
    return datasets.load(tiny.run_folder(tiny_root).data)


def test_the_picture_holds_the_counts_and_shares(data, tmp_path):
    fig = plots_data.datasheet(data)
    cells, ages, findings = fig.axes
    heights = [bar.get_height() for bar in cells.patches]
    assert sum(heights) == len(data.rows("train")) and heights == sorted(data.cell_counts("train"), reverse=True)
    assert len(cells.lines[0].get_xdata()) == len(data.index["held_out"])
    assert [text.get_text() for text in ages.get_legend().get_texts()] == ["train", "val", "test"]
    train, label = data.rows("train"), data.label_names[0]
    assert np.isclose(findings.lines[0].get_xdata()[0], (train[f"y_{label}"] == 1).mean())
    assert len(findings.get_yticks()) == len(data.label_names)
    plots.save(fig, tmp_path, "datasheet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["datasheet.png", "datasheet.svg"]


def test_a_test_set_from_outside_shows_its_test_images(copy):
    data = copy("chexpert").prepare()
    cells, ages, _ = plots_data.datasheet(data).axes
    assert sum(bar.get_height() for bar in cells.patches) == len(data.rows("test")) and cells.get_ylabel() == "test images"
    assert [text.get_text() for text in ages.get_legend().get_texts()] == ["test", "zero_shot"]
