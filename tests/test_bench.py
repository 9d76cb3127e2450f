"""`make bench`: rivals in turn, on the same work; numbers by hand; the committed page is its table's."""

import importlib.util
import time

import numpy as np
import pandas as pd
import pytest

from compdiff import datasets, metrics, paths
from compdiff.config import DataConfig, settings

SPEC = importlib.util.spec_from_file_location("bench", paths.ROOT / "benchmarks" / "bench.py")
BENCH = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(BENCH)
SMOKE = settings("smoke", "chest")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "data"
    datasets.prepare("chest", folder, DataConfig(SMOKE.data.size, 8, 4, 1))
    return datasets.load(folder)


def test_rivals_run_in_turn_and_the_first_call_is_not_timed(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def rival(name, seconds):
        took = iter(seconds)

        def call():
            calls.append(name)
            clock[0] += next(took)

        return call

    taken = BENCH.alternate(rival("a", [100, 1, 2, 3]), rival("b", [100, 4, 8, 6]), 3)
    assert "".join(calls) == "abababab" and taken.tolist() == [[1, 2, 3], [4, 8, 6]]
    row = BENCH.speed("x", "y", taken, (12, 24))
    assert [row[k] for k in ("ours_lo", "ours", "ours_hi")] == [4, 6, 12]
    assert [row[k] for k in ("theirs_lo", "theirs", "theirs_hi")] == [3, 4, 6]
    assert [row[k] for k in ("ratio_lo", "ratio", "ratio_hi")] == pytest.approx([1, 1.5, 2])  # turns: 12/6, 6/3, 4/4
    assert (row["images"], row["repeats"]) == (12, 3)


def test_both_samplers_draw_the_same_images_at_the_same_solver_and_steps(data):
    rows, c = data.rows("test").head(3), SMOKE.sample
    ours, theirs = BENCH.by_us(data, SMOKE)(rows), BENCH.by_pipeline(data, c.solver, c)(rows)
    assert ours.shape == theirs.shape == (3, 64, 64) and ours.std() > 10
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_quality_is_the_kid_and_its_paired_difference(data):
    rows = data.rows("test").head(12)
    real, patients = data.images(rows), rows["patient"].to_numpy()
    other = data.images(data.rows("test").iloc[12:24])
    noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
    row = BENCH.quality("x", "y", real, noise, other, patients, 64)
    features = [BENCH.features.extract(images, size=64) for images in (noise, other, real)]
    k = [metrics.kernel(a, b) for a in features for b in features]  # noise, other, real x the same
    for name, own, cross in (("ours", k[0], k[2]), ("theirs", k[4], k[5])):
        apart = ~np.eye(12, dtype=bool)  # the pair of one prompt is left out too: image and request belong together
        assert row[name] == pytest.approx(own[apart].mean() + k[8][apart].mean() - 2 * cross[apart].mean(), rel=1e-4)
    assert row["difference"] == pytest.approx(row["ours"] - row["theirs"]) and row["difference_lo"] > 0
    assert row["unit"] == "KID-lite0@64" and row["images"] == 12
    same = BENCH.quality("x", "y", real, other, other, patients, 64)
    assert same["difference"] == same["difference_lo"] == same["difference_hi"] == 0


def test_too_few_test_rows_are_said(data):
    with pytest.raises(ValueError, match="1 repeats and a first call of 1000 images, but only"):
        next(BENCH.sampling(data, SMOKE, 1000, 1))


def test_the_whole_bench_at_its_smallest(tmp_path, monkeypatch):
    monkeypatch.setattr(BENCH, "PAPERS", ("ddpm", 3))
    quick = {name: row for name, row in BENCH.TRAINING.items() if not row[1].get("compile")}  # compiling takes minutes
    monkeypatch.setattr(BENCH, "TRAINING", quick)
    BENCH.main("--profile smoke --repeats 1 --batch 4 --images 2".split() + ["--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "bench.csv")
    assert (tmp_path / "bench.md").read_text() == BENCH.page(table)
    speeds = table[table["unit"] == "images/s"]
    others = {"sampling, dpm++ 4 steps": 2, "reading shards: hash, tar, PNG, row": 1}
    others |= {"reading latents, in random order": 1}
    assert speeds["what"].value_counts().to_dict() == {f"training step, {name}": 2 for name in BENCH.TRAINING} | others
    assert (speeds["repeats"] == 1).all()
    assert speeds["ratio"].to_numpy() == pytest.approx((speeds["ours"] / speeds["theirs"]).to_numpy(), rel=1e-2)
    (papers, equal) = table[table["unit"] == "KID-lite0@64"].to_dict("records")
    assert papers["baseline"].endswith("ddpm 3 steps") and equal["baseline"].endswith("dpm++ 4 steps")
    assert papers["images"] == equal["images"] == 4, "the call that is not timed has drawn too"
    assert abs(equal["difference"]) < 0.01 * abs(equal["theirs"]), "the same images but for rounding"


def test_the_committed_page_is_that_of_the_committed_table():
    results = paths.ROOT / "benchmarks" / "results"
    assert (results / "bench.md").read_text() == BENCH.page(pd.read_csv(results / "bench.csv"))
