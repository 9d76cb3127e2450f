"""Guided sampling and synthetic sets: independent of batches, restartable, marked as synthetic."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image

from compdiff import diffusion, methods, record, sample
from compdiff.attributes import SCHEMAS
from compdiff.config import SampleConfig

SOLVERS = ("dpm++", "ddpm", "ddim", "base")
SETTINGS = SampleConfig(sample_steps=3, sample_batch=3, guidance=2.0)
ATTRIBUTES = np.array([[0, 0, 0], [1, 1, 1], [2, 0, 2], [3, 1, 3], [4, 0, 0]])
PROMPTS = ["The heart is enlarged.", "There is a consolidation.", "No acute cardiopulmonary abnormality.", "", "normal"]


@pytest.fixture(scope="module")
def made(tiny_root):
    """An untrained HCN model whose decoder and tokens are strong enough that every pixel depends on everything."""
    base = diffusion.load(str(tiny_root / "base"))
    parts = methods.build("hcn", SCHEMAS["chest"], base.d_ctx, tiny.config(tiny_root), seed=0)
    with torch.no_grad():
        base.unet.conv_out.weight.mul_(3)
        base.vae.decoder.conv_out.weight.mul_(3)
    return diffusion.Denoiser(base, parts.conditioner, parts.columns).eval(), base


def draw(made, rows, config=SETTINGS, attributes=ATTRIBUTES):
    model, base = made
    text, empty = base.tokenize([PROMPTS[i] for i in rows]), base.tokenize([""])[0]
    seeds = [sample.image_seed(0, f"p{i}") for i in rows]
    return sample.sample(model, base, text, empty, torch.as_tensor(attributes)[rows], seeds, config)


def grey_levels(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def test_image_seeds_are_fixed_for_ever():
    # first 8 bytes of sha256("7:chest-1") >> 1, by hand in another language: printf '7:chest-1' | sha256sum
    assert sample.image_seed(7, "chest-1") == 6602553166329470
    seeds = {sample.image_seed(s, i) for s in range(20) for i in ("a", "b", "0", "00")}
    assert len(seeds) == 80 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_does_not_depend_on_batch_or_order(made, solver):
    config = replace(SETTINGS, solver=solver)
    together = draw(made, [0, 1, 2, 3, 4], config)
    assert together.shape == (5, 32, 32) and together.dtype == np.uint8 and together.std() > 5
    other = draw(made, [3, 0], config)
    assert grey_levels(other, together[[3, 0]]) <= 1
    assert grey_levels(together[0], together[1]) > 5
    assert grey_levels(draw(made, [4], config)[0], together[4]) <= 1


def test_noise_of_the_ddpm_comes_from_each_images_own_seed(made):
    model, base = made
    text, empty = base.tokenize(["normal"] * 3), base.tokenize([""])[0]
    images = sample.sample(model, base, text, empty, torch.zeros(3, 3).long(), [5, 5, 6], replace(SETTINGS, solver="ddpm"))
    assert grey_levels(images[0], images[1]) == 0 < grey_levels(images[0], images[2])
    torch.manual_seed(1)
    again = sample.sample(model, base, text, empty, torch.zeros(3, 3).long(), [5, 5, 6], replace(SETTINGS, solver="ddpm"))
    assert np.array_equal(images, again)


def ddim(made, rows, guidance, steps=3):
    """DDIM (eta 0) by hand, with one UNet pass for each branch of the guidance; v-prediction."""
    model, base = made
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    shape = (4, 8, 8)
    seeds = [sample.image_seed(0, f"p{i}") for i in rows]
    z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    with torch.no_grad():
        tokens = model.conditioner(torch.as_tensor(ATTRIBUTES)[rows]).tokens
        texts = base.text_encoder(base.tokenize([PROMPTS[i] for i in rows]))[0]
        nothing = base.text_encoder(base.tokenize([""] * len(rows)))[0]
        for t in [i * (1000 // steps) + 1 for i in reversed(range(steps))]:  # "leading" with an offset of 1
            full = base.unet(z, t, torch.cat([texts, tokens], 1)).sample
            null = base.unet(z, t, torch.cat([nothing, torch.zeros_like(tokens)], 1)).sample
            v = guidance * full + (1 - guidance) * null
            a, before = abar[t], abar[max(0, t - 1000 // steps)]  # the last step ends at abar[0] or at 1
            if t < 1000 // steps:
                before = torch.ones(()) if base.scheduler.config.get("set_alpha_to_one", True) else abar[0]
            x0, eps = a.sqrt() * z - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * z
            z = (before.sqrt() * x0 + (1 - before).sqrt() * eps).float()
    return base.decode(z)


@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
def test_guidance_mixes_the_two_predictions(made, guidance):
    config = replace(SETTINGS, solver="ddim", guidance=guidance)
    images = draw(made, [0, 3], config)
    assert grey_levels(images, ddim(made, [0, 3], guidance)) <= 1
    assert grey_levels(images, ddim(made, [0, 3], guidance + 1.0)) > 1


def test_without_guidance_prompt_and_attributes_do_not_matter(made):
    config = replace(SETTINGS, guidance=0.0)
    assert grey_levels(draw(made, [0], config), draw(made, [0], config, attributes=ATTRIBUTES[::-1].copy())) <= 1


# --- precision -------------------------------------------------------------------------------------------------------
def test_images_are_drawn_in_the_models_precision_and_the_solver_in_float32(made, monkeypatch):
    model, base = made
    plain, products, solved, step = draw(made, [0, 1, 2]), [], [], sample.step_back
    kinds = lambda v, z: solved.extend([v.dtype, z.dtype])  # noqa: E731
    monkeypatch.setattr(sample, "step_back", lambda s, v, t, z, g: kinds(v, z) or step(s, v, t, z, g))
    parts = base.unet.conv_in, base.unet.conv_out, base.vae.decoder.conv_out
    hooks = [part.register_forward_hook(lambda m, given, out: products.append(out.dtype)) for part in parts]
    try:
        assert np.array_equal(draw(made, [0, 1, 2]), plain) and set(products) == {torch.float32}
        products.clear()
        monkeypatch.setattr(model, "precision", "bf16")
        mixed = draw(made, [0, 1, 2])
    finally:
        for hook in hooks:
            hook.remove()
    assert set(products) == {torch.bfloat16} and set(solved) == {torch.float32}
    assert 0 < np.abs(mixed.astype(int) - plain).mean() < 3
    assert all(p.dtype == torch.float32 for p in model.parameters())
    monkeypatch.setattr(model, "precision", "fp8")
    with pytest.raises(ValueError, match="unknown precision 'fp8'; known: no, bf16, fp16"):
        draw(made, [0])


def test_a_restored_model_draws_in_the_precision_of_its_training(tiny_root, tmp_path):
    tiny.fit(tiny_root, "text", tmp_path, steps=1)
    for precision in ("no", "bf16"):
        config, base = tiny.config(tiny_root, precision=precision), diffusion.load(str(tiny_root / "base"))
        assert methods.restore("text", tmp_path, base, SCHEMAS["chest"], config)[0].precision == precision


# --- sets on disk ----------------------------------------------------------------------------------------------------
ROWS = pd.DataFrame({"id": [f"p{i}" for i in range(5)], "age": "18-40"})


def generate(made, folder, seed=0, checkpoint="abc", config=SETTINGS, prompts=PROMPTS, rows=ROWS):
    model, base = made
    return sample.generate(folder, rows, prompts, ATTRIBUTES[: len(rows)], model, base, config, "hcn", checkpoint, seed)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()} | {"csv": (folder / "samples.csv").read_bytes()}


@pytest.fixture
def counted(monkeypatch):
    """Number of images that each call of `sample` makes."""
    calls, original = [], sample.sample
    monkeypatch.setattr(sample, "sample", lambda *given: calls.append(len(given[5])) or original(*given))
    return calls


def test_a_set_says_what_it_is(made, tmp_path):
    table = generate(made, tmp_path)
    written = pd.read_csv(tmp_path / "samples.csv", keep_default_na=False)
    assert list(written) == ["id", "age", "prompt", "seed", "method", "checkpoint"]
    assert written["prompt"].tolist() == PROMPTS and written["seed"].tolist() == table["seed"].tolist()
    assert written["seed"].tolist() == [sample.image_seed(0, i) for i in ROWS["id"]]
    images = sample.read_images(tmp_path, ["p3", "p0"])
    assert grey_levels(images, draw(made, [3, 0])) <= 1
    for path in (tmp_path / "images").iterdir():
        with Image.open(path) as image:
            assert image.mode == "L" and "synthetic" in image.text["Description"]


def test_other_labels_change_the_list_and_no_image(made, tmp_path, counted):
    generate(made, tmp_path, rows=ROWS.assign(y_spot=0))
    before = bytes_of(tmp_path)
    generate(made, tmp_path, rows=ROWS.assign(y_spot=[0, 1, 0, 0, 1]))
    after = bytes_of(tmp_path)
    assert counted == [3, 2] and pd.read_csv(tmp_path / "samples.csv")["y_spot"].tolist() == [0, 1, 0, 0, 1]
    assert {name: value for name, value in before.items() if name != "csv"}.items() < after.items()


def test_a_finished_set_stays_and_what_is_missing_is_made_again(made, tmp_path, counted):
    generate(made, tmp_path)
    before = bytes_of(tmp_path)
    generate(made, tmp_path)
    assert counted == [3, 2]
    for name in ("p1", "p4"):
        (tmp_path / "images" / f"{name}.png").unlink()
    generate(made, tmp_path)
    assert counted == [3, 2, 2]
    (tmp_path / "samples.csv").unlink()
    generate(made, tmp_path)
    assert counted == [3, 2, 2] and bytes_of(tmp_path).keys() == before.keys()
    assert grey_levels(sample.read_images(tmp_path, ["p1", "p4"]), draw(made, [1, 4])) <= 1
    assert bytes_of(tmp_path)["csv"] == before["csv"]


@pytest.mark.parametrize("change", [dict(seed=1), dict(checkpoint="def"), dict(config=replace(SETTINGS, guidance=3.0)),
                                    dict(config=replace(SETTINGS, sample_steps=2)), dict(config=replace(SETTINGS, solver="ddim")),
                                    dict(prompts=[*PROMPTS[:4], "obese"]), dict(rows=ROWS[:4], prompts=PROMPTS[:4])])  # fmt: skip
def test_what_the_images_depend_on_makes_them_anew(made, tmp_path, counted, change):
    generate(made, tmp_path)
    generate(made, tmp_path, **change)
    assert sum(counted) == 5 + len(change.get("rows", ROWS)) == 5 + len(list((tmp_path / "images").iterdir()))


@pytest.mark.parametrize("edited", ["sample.py", "diffusion.py"])
def test_an_edit_of_what_draws_makes_them_anew(made, tmp_path, counted, monkeypatch, edited):
    generate(made, tmp_path)
    original = record.source_sha256
    monkeypatch.setattr(record, "source_sha256", lambda p: original(p) + "edited" * (p.name == edited))
    generate(made, tmp_path)
    assert sum(counted) == 10


def test_another_precision_makes_them_anew(made, tmp_path, counted, monkeypatch):
    generate(made, tmp_path)
    monkeypatch.setattr(made[0], "precision", "bf16")
    generate(made, tmp_path)
    assert sum(counted) == 10


def test_the_batch_size_does_not_make_them_anew(made, tmp_path, counted):
    generate(made, tmp_path)
    generate(made, tmp_path, config=replace(SETTINGS, sample_batch=1))
    assert sum(counted) == 5


def test_a_killed_generation_goes_on(made, tmp_path, counted):
    """What SIGKILL leaves in the middle of the third write: two images, half of one under a temporary name, no list."""
    generate(made, tmp_path)
    images = tmp_path / "images"
    (images / "p2.png").rename(images / ".p2.png.x1y2.png")
    os.truncate(images / ".p2.png.x1y2.png", 20)
    for path in (images / "p3.png", images / "p4.png", tmp_path / "samples.csv"):
        path.unlink()
    generate(made, tmp_path)
    assert sum(counted) == 5 + 3
    assert sorted(path.name for path in images.iterdir()) == [f"p{i}.png" for i in range(5)]
    assert grey_levels(sample.read_images(tmp_path, list(ROWS["id"])), draw(made, [0, 1, 2, 3, 4])) <= 1
    assert (tmp_path / "samples.csv").exists()


def test_two_rows_with_one_id_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="two rows share the id 'p0'"):
        generate(made, tmp_path, rows=ROWS.assign(id="p0"))
    assert not list(tmp_path.iterdir())


def test_unknown_solvers_raise(made):
    with pytest.raises(ValueError, match=r"unknown solver 'euler'; known: dpm\+\+, ddpm, ddim, base"):
        draw(made, [0], replace(SETTINGS, solver="euler"))


# --- several processes -----------------------------------------------------------------------------------------------
def test_shares_make_every_image_once_and_the_last_lists_them(made, tmp_path, counted):
    def part(k, n):
        model, base = made
        sample.generate(tmp_path, ROWS, PROMPTS, ATTRIBUTES, model, base, SETTINGS, "hcn", "abc", 0, share=(k, n))
        return sorted(path.name for path in (tmp_path / "images").iterdir()), (tmp_path / "samples.csv").exists()

    assert part(1, 2) == (["p1.png", "p3.png"], False)
    assert part(0, 2) == ([f"p{i}.png" for i in range(5)], True)
    assert sum(counted) == 5
    assert grey_levels(sample.read_images(tmp_path, list(ROWS["id"])), draw(made, [0, 1, 2, 3, 4])) <= 1
    with pytest.raises(ValueError, match="share 2 of 2"):
        part(2, 2)


def forked(work):
    """Run `work` in a process of its own; returns its id."""
    if child := os.fork():
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)  # never on into pytest


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_two_processes_of_which_one_is_killed_lose_and_double_nothing(made, tmp_path, monkeypatch, one_thread):
    """Both draw, the second dies in the middle of a write while the first still works; its share is made again beside it."""
    model, base = made
    rows = pd.DataFrame({"id": [f"p{i}" for i in range(8)]})
    prompts, attributes = ["normal"] * 8, np.zeros((8, 3), dtype=int)
    one_by_one, waiting, going = replace(SETTINGS, sample_batch=1), tmp_path / "waiting", tmp_path / "go"

    def work(folder, k, n):
        sample.generate(folder, rows, prompts, attributes, model, base, one_by_one, "hcn", "abc", 0, share=(k, n))

    def slow(path, image, save=sample.save_png):
        save(path, image)
        waiting.touch()
        while not going.exists():
            time.sleep(0.01)

    def killed(path, image, save=sample.save_png):
        if path.name == "p5.png":
            (path.parent / ".p5.png.half.png").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, image)

    monkeypatch.setattr(sample, "save_png", slow)
    first = forked(lambda: work(tmp_path / "set", 0, 2))
    try:
        while not waiting.exists():
            time.sleep(0.01)
        monkeypatch.setattr(sample, "save_png", killed)
        assert ended(forked(lambda: work(tmp_path / "set", 1, 2))) == -signal.SIGKILL
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="another process makes another set here"):
            generate(made, tmp_path / "set")
        again = forked(lambda: work(tmp_path / "set", 1, 2))
    finally:
        going.touch()
    assert ended(first) == ended(again) == 0
    assert sorted(path.name for path in (tmp_path / "set" / "images").iterdir()) == [f"p{i}.png" for i in range(8)]
    work(tmp_path / "alone", 0, 1)
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "alone")
