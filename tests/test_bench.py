"""`make bench`: rivals in turn, on the same work; numbers by hand; the committed page is its table's."""

import importlib.util
import os
import runpy
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from compdiff import datasets, diffusion, latents, metrics, paths
from compdiff.config import DataConfig, settings
from compdiff.interfaces import NoConditioner
from compdiff.paths import RunFolder


def module(name):
    """A file of benchmarks/, by the name that the others import it by."""
    spec = importlib.util.spec_from_file_location(name, paths.ROOT / "benchmarks" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


RIVALS, PAGE, BENCH = module("rivals"), module("bench_page"), module("bench")
SMOKE = settings("smoke", "chest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return RunFolder(str(tmp_path_factory.mktemp("bench")), "smoke", "chest")


@pytest.fixture(scope="module")
def data(folder):
    datasets.prepare("chest", folder.data, DataConfig(SMOKE.data.size, 8, 4, 1))
    return datasets.load(folder.data)


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
    base, other = diffusion.load("tiny"), diffusion.load("tiny")
    for model in (base, other):  # weights that no folder holds
        model.unet.conv_out.weight.data.mul_(0.9)
    ours = BENCH.by_us(base, diffusion.Denoiser(base, NoConditioner(base.d_ctx), []), data, c)(rows)
    theirs = RIVALS.by_pipeline(other, data, c)(rows)
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


def test_too_few_test_rows_are_said_before_anything_is_timed(data, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="1 repeats and a first call of 1000 images, but only"):
        BENCH.asked(data, 1000, 1)
    rows = BENCH.asked(data, 4, 2)
    assert len(rows) == rows["id"].nunique() == 12 and set(rows["split"]) == {"test"}
    monkeypatch.setattr(BENCH, "alternate", lambda *given: pytest.fail("timed"))
    with pytest.raises(ValueError, match="but only"):
        BENCH.main(["--profile", "smoke", "--images", "1000", "--out", str(tmp_path)])


def test_plain_steps_differ_by_clipping_and_average_only_and_learn(data):
    rows = data.rows("train").head(4)
    images, taken = data.images(rows), {}
    for kind in (False, True):
        base = diffusion.load("tiny")
        ids, moments = base.tokenize(data.prompts(rows)), base.moments(images)
        before = base.unet.conv_out.weight.detach().clone()
        torch.manual_seed(0)
        RIVALS.plain_step(base, images, moments, ids, clip_and_average=kind)()
        taken[kind] = base.unet.conv_out.weight.detach() - before
        assert taken[kind].abs().max() == pytest.approx(1e-5, rel=0.2), "Adam's first step is the learning rate"
    assert torch.allclose(taken[False], taken[True], atol=1e-6), "nor does clipping change it"


def test_the_bare_unet_learns_nothing_and_leaves_no_gradient(data):
    rows, base = data.rows("train").head(2), diffusion.load("tiny")
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    passes, step = [], RIVALS.bare_unet(base, base.moments(data.images(rows)), base.tokenize(data.prompts(rows)))
    base.unet.conv_in.weight.register_hook(lambda gradient: passes.append(gradient.abs().max().item()))
    step()
    assert len(passes) == 1 and passes[0] > 0, "the pass went back to the first layer"
    assert all(torch.equal(before[name], value) for name, value in base.unet.state_dict().items())
    assert all(p.grad is None for p in base.unet.parameters())


def test_the_page_says_how_far_the_goals_could_be_reached():
    rows = [(BENCH.ENCODE, 120.0, ">= 1.5"), (BENCH.CACHED, 150.0, ">= 1.1"), (BENCH.FLOOR, 180.0, None)]
    table = pd.DataFrame(rows, columns=["baseline", "theirs", "goal"]).assign(what="training step, text")
    (line,) = PAGE.ceiling(table)
    assert f"1.50 against {BENCH.ENCODE}, 1.20 against {BENCH.CACHED}." in line
    assert PAGE.ceiling(table.head(2)) == []


def test_a_goal_is_met_at_its_ratio_and_by_an_interval_that_reaches_zero():
    for ratio, met in ((1.499, "not met"), (1.5, "met")):
        assert BENCH.judge({"ratio": ratio}, BENCH.ENCODE) == {"ratio": ratio, "goal": ">= 1.5", "met": met}
    for low, met in ((-0.1, "met"), (0.0, "met"), (1e-6, "not met"), (np.nan, "not met")):
        assert BENCH.judge({"difference_lo": low}, BENCH.NO_WORSE)["met"] == met


def test_a_row_that_cannot_be_compiled_says_why_and_the_next_one_stands(data, folder, monkeypatch):
    def no_compiler():
        raise BackendCompilerFailed(torch.compile, RuntimeError("No working C++ compiler found"), None)
        yield

    quick = {name: BENCH.TRAINING[name] for name in ("hcn, compiled", "text, frozen text encoder")}
    monkeypatch.setattr(BENCH, "TRAINING", quick)
    ours = lambda *given, **more: no_compiler() if "compile" in more else iter([0] * 4)  # noqa: E731
    monkeypatch.setattr(BENCH, "our_steps", ours)
    monkeypatch.setattr(BENCH, "plain_step", lambda *given, **more: lambda: None)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    failed, *others = BENCH.training(data, folder, [2], 1)
    assert failed["what"] == "training step, hcn, compiled"
    assert failed["note"] == "not compiled: No working C++ compiler found"
    assert [row["baseline"] for row in others] == [BENCH.ENCODE, BENCH.CACHED]
    table = pd.DataFrame([failed, *others]).assign(cpu="", cores=2, threads=2, torch="", diffusers="", trained_steps=0)
    line = next(line for line in BENCH.page(table).splitlines() if "compiled |" in line)
    assert line.count("not compiled: No working") == 1 and " nan " not in BENCH.page(table)


def test_as_a_script_it_hides_the_gpu(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(sys, "argv", ["bench.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(paths.ROOT / "benchmarks" / "bench.py"), run_name="__main__")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and "--steps" in capsys.readouterr().out


def test_the_whole_bench_at_its_smallest(tmp_path, monkeypatch):
    monkeypatch.setattr(BENCH, "PAPERS", ("ddpm", 3))
    monkeypatch.setattr(BENCH, "RADIOGRAPH", (700, 900))
    monkeypatch.setattr(BENCH, "FILE", 40)
    quick = {name: row for name, row in BENCH.TRAINING.items() if not row[1].get("compile")}  # compiling takes minutes
    monkeypatch.setattr(BENCH, "TRAINING", quick)
    written, several, read, write = [], [], latents.read, BENCH.write
    monkeypatch.setattr(latents, "read", lambda *given: several.append(read(*given)) or several[-1])

    def spy(rows, about, out):
        write(rows, about, out)
        written.append(len(pd.read_csv(out / "bench.csv")))

    monkeypatch.setattr(BENCH, "write", spy)
    words = "--profile smoke --repeats 1 --batch 2 1 --images 2 --steps 1".split()
    BENCH.main([*words, "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "bench.csv")
    assert written == list(range(1, len(table) + 1)), "every row is on disk as soon as it is made"
    assert (tmp_path / "bench.md").read_text() == BENCH.page(table)
    assert {type(split.moments) for split in several if len(split) > 40} == {latents.Rows}
    speeds = table[table["unit"] == "images/s"]
    others = {"sampling, dpm++ 4 steps": 2, "reading shards: hash, tar, PNG, row": 1}
    others |= {"reading latents of several files, in random order": 1}
    others |= {"preparing a JPG of 700 x 900 to 512 x 512: check, resize, PNG": 1}
    others |= {f"training step at batch 1, {name}": 2 for name in ("text", "hcn")}
    steps = {f"training step, {name}": 2 + 2 * (name == "text") for name in BENCH.TRAINING}
    assert speeds["what"].value_counts().to_dict() == steps | others
    assert (speeds["repeats"] == 1).all()
    assert speeds["ratio"].to_numpy() == pytest.approx((speeds["ours"] / speeds["theirs"]).to_numpy(), rel=1e-2)
    goals = dict(zip(zip(table["what"], table["baseline"], table["unit"], strict=True), table["goal"], strict=True))
    assert goals["training step, text", BENCH.ENCODE, "images/s"] == ">= 1.5"
    assert goals["training step, text", BENCH.CACHED, "images/s"] == ">= 1.1"
    assert goals["sampling, dpm++ 4 steps", "StableDiffusionPipeline, ddpm 3 steps", "images/s"] == ">= 3"
    assert goals["sampling, dpm++ 4 steps", "StableDiffusionPipeline, dpm++ 4 steps", "images/s"] == ">= 1"
    free = {"training step, text", "sampling, dpm++ 4 steps"}  # against clip + EMA, or the UNet alone; the KID at equal steps
    free |= {name for name in others if name.startswith(("preparing", "training step at"))}
    assert set(table["what"][table["goal"].isna()]) == free and set(table["met"].dropna()) <= {"met", "not met"}
    (papers, equal) = table[table["unit"] == "KID-lite0@64"].to_dict("records")
    assert papers["baseline"].endswith("ddpm 3 steps") and equal["baseline"].endswith("dpm++ 4 steps")
    assert papers["images"] == equal["images"] == 4, "the call that is not timed has drawn too"
    assert abs(equal["difference"]) < 0.01 * abs(equal["theirs"]), "the same images but for rounding"


def test_the_committed_page_is_that_of_the_committed_table():
    results = paths.ROOT / "benchmarks" / "results"
    assert (results / "bench.md").read_text() == BENCH.page(pd.read_csv(results / "bench.csv"))
