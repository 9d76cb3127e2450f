"""`make bench`, the evaluation library's part: our numbers are the loop's, and the page says which goals are met."""

import importlib.util
import xml.etree.ElementTree as ET

import pandas as pd
import pytest

from compdiff import paths, record

RESULTS = paths.ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def bench():
    """The script as a module; what it asks of numpy's threads stays in here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            patch.setenv(name, "1")
        spec = importlib.util.spec_from_file_location("bench_metrics", paths.ROOT / "benchmarks" / "bench_metrics.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_a_small_run_agrees_with_the_loop_and_names_its_machine(bench, tmp_path):
    bench.main(["--rows", "200", "--resamples", "20", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "metrics.csv")
    aurocs, fids = table.to_dict("records")
    assert aurocs["what"] == "20 patient-bootstraps of AUROC, 14 labels, 30 groups"
    assert fids["what"] == "FID overall and in 40 groups, 1280 features"
    assert aurocs["largest_difference"] < 1e-6
    assert aurocs["ratio"] == pytest.approx(aurocs["baseline_seconds"] / aurocs["seconds"], rel=1e-2)
    text = (tmp_path / "metrics.md").read_text()
    assert text == bench.page(table) and record.machine()["cpu"] in text
    assert text.count("not measured") == len(bench.GOALS), "200 images and 20 resamples are not what the goals are about"
    assert ET.parse(tmp_path / "metrics.svg").getroot().tag.endswith("svg")


def test_a_goal_is_met_or_not(bench):
    def verdicts(seconds, ratio, fid):
        whats = ["1000 patient-bootstraps of AUROC, 14 labels, 30 groups", "FID overall and in 40 groups, 1280 features"]
        table = pd.DataFrame({"what": whats * 2, "rows": [1000, 1000, 5000, 5000],
                              "seconds": [999, 999, seconds, fid], "ratio": [1, None, ratio, None]})  # fmt: skip
        return [bench.judged(table, *asked) for _, *asked in bench.GOALS]

    assert verdicts(15, 30, 60) == [("15 s", "met"), ("30 times", "met"), ("60 s", "met")]
    assert verdicts(15.1, 480.5, 60) == [("15.1 s", "not met"), ("480 times", "met"), ("60 s", "met")]
    assert [v for _, v in verdicts(1, 29, 61)] == ["met", "not met", "not met"]


def test_the_committed_page_is_that_of_the_committed_table(bench):
    text = (RESULTS / "metrics.md").read_text()
    assert text == bench.page(pd.read_csv(RESULTS / "metrics.csv"))
    assert text.count("| met |") == len(bench.GOALS)
