"""The estimate by hand, and docs/scale.md beside it."""

import pytest

from compdiff import budget, config, paths, run, strategies

DEMO = strategies.DEMO_GENERATORS


def asked(**values):
    return {m: config.settings("paper", "mimic", m, **values) for m in config.MAIN_METHODS}


def test_the_estimate_by_hand():
    line = budget.training(asked(), seeds=3)
    assert line.hours == pytest.approx(5 * 3 * 30_000 * 8 / 36 / 3600)
    assert line.gigabytes == pytest.approx(15 * (865_910_724 + 340_387_840) * 20 / 1e9)
    assert budget.training(asked(trained="unet"), 1).gigabytes == pytest.approx(5 * 865_910_724 * 20 / 1e9)
    one = budget.sampling(1, asked()["hcn"])
    assert one.hours * 3600 * 36 * 2.41 == pytest.approx(75 * 2 * 2.41 / 3), "as much work a second as in training"
    assert one.gigabytes == pytest.approx(512 * 512 / 1e9)
    prepared = budget.preparation(1000, asked()["hcn"])
    assert prepared.gigabytes == pytest.approx((1000 * 512 * 512 + 1000 * 8 * 64 * 64 * 4) / 1e9)
    assert budget.sampled(60_000, config.MAIN_METHODS, DEMO, asked()["hcn"]) == 3 * (60_000 + 40 * 2_500)


def test_the_document_shows_the_estimate():
    text = (paths.ROOT / "docs" / "scale.md").read_text()
    epoch = asked(batch=256, microbatch=32, steps=39_063)
    for lines in (budget.scale(60_000, asked(), 3, DEMO), budget.scale(10_000_000, epoch, 3, DEMO, generated=300_000)):
        assert "\n".join(budget.table(lines)) in text


def test_without_the_data_the_paper_profile_says_what_the_request_costs(tmp_path, capsys):
    for words, says in ((["SEEDS=0 1 2"], "training of 5 methods, 3 seeds: about 27.8 A100-hours, 362 GB"),
                        (["METHODS=hcn"], "training of 1 method, 1 seed: about 1.9 A100-hours, 24 GB")):  # fmt: skip
        assert run.main(["paper", "PROFILE=paper", "DATASETS=mimic", f"RUNS={tmp_path}", *words]) == 2
        said = capsys.readouterr().err
        for word in ("DATA_ROOT=<folder", "PhysioNet", "0.6 TB (JPG)", says, "60,000 images: shards and latents", "docs/scale.md"):
            assert word in said, word
    assert run.main(["paper", "PROFILE=paper", "DATASETS=fairgenmed", f"RUNS={tmp_path}"]) == 2
    assert "sampling of 10,000 images, 75 steps: about 3.9 A100-hours" in capsys.readouterr().err
