"""Judges and downstream models: they learn, repeat themselves, survive saving, and refuse wrong targets."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from compdiff import classify
from compdiff.attributes import AGE, SEX, Schema

SCHEMA = Schema((AGE, SEX))
QUICK = classify.Training(size=32, epochs=8, batch=16, lr=1e-2, balanced=True)


def cohort(n, seed, share=0.5):
    """Images [n, 32, 32] whose stripes show sex, whose brightness grows with age, and whose bright square is the
    label `spot`."""
    rng = np.random.default_rng(seed)
    years = rng.uniform(2, 95, n)
    female, spot = rng.random(n) < share, rng.random(n) < 0.4
    stripes = np.sin(np.arange(32) * 1.3)
    x = 60 + years[:, None, None] + 25 * np.where(female[:, None, None], stripes[None, :, None], stripes[None, None, :])
    x[spot, 12:20, 12:20] += 70
    images = np.clip(x + rng.normal(0, 8, x.shape), 0, 255).astype(np.uint8)
    bins = np.array(AGE.categories)[np.searchsorted([18, 40, 60, 80], years, side="right")]
    table = pd.DataFrame({"id": [f"{seed}-{i}" for i in range(n)], "age": bins, "age_years": years})
    table["sex"] = np.where(female, "Female", "Male")
    table["y_spot"] = spot.astype(int)
    table["y_stage"] = np.where(spot, "late", "early")
    return images, table


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    (images, table), (val_images, val_table) = cohort(240, 0), cohort(60, 1)
    heads = classify.make_heads(table, SCHEMA, labels=["spot", "stage"], numbers=["age_years"])
    data = (images, classify.encode(table, heads), val_images, classify.encode(val_table, heads), heads)
    return classify.fit(*data, QUICK, seed=0), data


def test_a_judge_learns_every_kind_of_target(trained):
    model, _ = trained
    images, table = cohort(200, 2)
    found = model.predict(images)
    truth = classify.encode(table, model.heads)
    assert {k: v.shape for k, v in found.items()} == {
        "age": (200, 5), "sex": (200, 2), "labels": (200, 1), "stage": (200, 2), "age_years": (200,)}  # fmt: skip
    np.testing.assert_allclose(found["age"].sum(1), 1, atol=1e-5)
    assert (found["sex"].argmax(1) == truth["sex"]).mean() > 0.95
    assert (found["age"].argmax(1) == truth["age"]).mean() > 0.6  # five classes
    assert (found["stage"].argmax(1) == truth["stage"]).mean() > 0.9
    assert roc_auc_score(truth["labels"][:, 0], found["labels"][:, 0]) > 0.95
    assert np.sqrt(np.mean((found["age_years"] - truth["age_years"]) ** 2)) < 0.6 * truth["age_years"].std()


def test_the_kept_weights_are_those_of_the_best_epoch(trained):
    model, (_, _, val_images, val_targets, heads) = trained
    losses = [row["val_loss"] for row in model.history]
    assert min(losses) < 0.5 * losses[0]
    with torch.no_grad():
        logits = model.split(model.network(model.inputs(val_images)))
    targets = {k: torch.tensor(v) for k, v in val_targets.items()}
    priors = classify.log_priors(trained[1][1], heads, True)
    assert classify.loss_of(logits, targets, heads, priors).item() == pytest.approx(min(losses), rel=1e-4)


def test_the_same_seed_gives_the_same_model_and_leaves_torchs_generator_alone(trained):
    _, data = trained
    short = replace(QUICK, epochs=1)
    state = torch.get_rng_state()
    a, b, c = (classify.fit(*data, short, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [torch.cat([p.flatten() for p in m.network.parameters()]) for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_images_are_normalised_by_the_training_images_alone(trained):
    """Mean and deviation of the images it trains on (synthetic ones too, where a strategy adds them); validation images
    of another brightness do not move them, nor do images that are predicted, which are then scaled by them."""
    model, (images, targets, val_images, *rest) = trained
    assert (model.mean, model.std) == (pytest.approx(images.mean()), pytest.approx(images.std()))
    other = classify.fit(images, targets, val_images // 4 + 190, *rest, replace(QUICK, epochs=1), seed=0)
    assert (other.mean, other.std) == (model.mean, model.std)
    bright = np.full((3, 32, 32), 250, np.uint8)
    model.predict(bright)
    assert (other.mean, other.std) == (model.mean, model.std)
    np.testing.assert_allclose(model.inputs(bright).numpy(), (250 - images.mean()) / images.std(), rtol=1e-5)
    both = np.concatenate([images, bright])
    twice = {k: np.concatenate([t, t[:3]]) for k, t in targets.items()}
    mixed = classify.fit(both, twice, val_images, *rest, replace(QUICK, epochs=1), seed=0)
    assert mixed.mean == pytest.approx(both.mean()) and mixed.mean > model.mean


def test_the_paper_sees_a_centre_crop_of_224_and_the_demo_the_whole_image():
    """As Pillow does it: reduce the square to 256, then cut 224 out of the middle."""
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).resize((512, 512)))
    seen = [classify.Model(torch.nn.Identity(), {}, classify.RECIPES[name], 0.0, 1.0).inputs(image[None])[0, 0].numpy()
            for name in ("downstream_paper", "downstream")]  # fmt: skip
    cropped = Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    assert seen[0].shape == (224, 224)
    assert np.abs(seen[0] - np.asarray(cropped))[1:-1, 1:-1].max() < 1.1, "Pillow rounds twice; its edge knows what was cut"
    whole = Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)
    assert seen[1].shape == (64, 64) and np.abs(seen[1] - np.asarray(whole)).max() < 1.1
    model = classify.Model(torch.nn.Identity(), {}, replace(classify.RECIPES["downstream_paper"], size=28), 0.0, 1.0)
    ramp = np.arange(32, dtype=np.uint8)[None, :, None] * np.ones((1, 1, 32), np.uint8)
    assert model.inputs(ramp)[0, 0, :, 0].tolist() == list(range(2, 30)), "a sixteenth is cut from each side"


def test_a_saved_model_predicts_the_same(trained, tmp_path):
    model, data = trained
    model.save(tmp_path / "judge")
    loaded = classify.load(tmp_path / "judge")
    assert (loaded.heads, loaded.training, loaded.history) == (model.heads, model.training, model.history)
    for name, values in model.predict(data[2]).items():
        np.testing.assert_array_equal(loaded.predict(data[2])[name], values)
    assert sorted(p.name for p in (tmp_path / "judge").iterdir()) == ["model.json", "weights.safetensors"]


def test_training_stops_when_patience_is_spent_and_can_start_from_a_model(trained):
    model, data = trained
    stopped = classify.fit(*data, replace(QUICK, epochs=30, patience=1, lr=1e-9), seed=0)
    assert len(stopped.history) < 30
    images, targets, val_images, val_targets, heads = data
    again = classify.fit(images[:16], {k: v[:16] for k, v in targets.items()}, val_images, val_targets, heads,
                         replace(QUICK, epochs=1, lr=1e-6), seed=1, init=model)  # fmt: skip
    assert again.history[0]["val_loss"] < stopped.history[0]["val_loss"]
    with pytest.raises(ValueError, match="heads"):
        classify.fit(*data[:4], {"sex": heads["sex"]}, QUICK, seed=0, init=model)


def test_batches_cycle_through_all_images_without_replacement():
    torch.manual_seed(0)
    stream = classify.batches(10, 3)
    passes = [torch.cat([next(stream) for _ in range(3)]).tolist() for _ in range(40)]
    assert all(len(set(p)) == 9 for p in passes) and len({tuple(p) for p in passes}) == 40
    assert set().union(*passes) == set(range(10)), "whoever waits in one pass has its turn in another"


def test_an_epoch_of_fixed_length_goes_on_where_the_last_one_ended(trained, monkeypatch):
    """Half a pass per epoch and twice the epochs: the same images in the same order as whole passes."""
    data, seen = trained[1], []
    monkeypatch.setattr(classify, "augment", lambda x, training: seen.append(x[:, 0, 0, 0]) or x)
    runs = []
    for training in (replace(QUICK, epochs=1), replace(QUICK, epochs=3, epoch_steps=5)):
        seen.clear()
        classify.fit(*data, training, seed=0)
        runs.append(torch.cat(seen))
    assert len(runs[0]) == 240 and len(runs[1]) == 240
    assert torch.equal(*runs)


def test_balanced_training_finds_the_rare_class():
    (images, table), (val_images, val_table) = cohort(200, 5, share=0.04), cohort(50, 6, share=0.04)
    heads = {"sex": classify.make_heads(table, SCHEMA)["sex"]}
    data = (images, classify.encode(table, heads), val_images, classify.encode(val_table, heads), heads)
    test_images, test_table = cohort(200, 7)
    rare = (test_table["sex"] == "Female").to_numpy()
    called = {}
    for balanced in (True, False):
        model = classify.fit(*data, replace(QUICK, epochs=3, balanced=balanced), seed=0)
        called[balanced] = model.predict(test_images)["sex"][:, 1]
    # Where the truth is even, calls of a classifier trained at 4 % stay rarer than half unless the prior is taken out.
    shift = [np.median(np.log(called[b] / (1 - called[b]))) for b in (True, False)]
    assert shift[0] > shift[1] + 0.5 * np.log(0.96 / 0.04)
    assert called[True][rare].mean() > called[False][rare].mean()


def test_log_priors_and_loss_by_hand():
    heads = {
        "c": classify.Head("category", ("a", "b", "z")),
        "l": classify.Head("binary", ("p", "q")),
        "n": classify.Head("number", ("n",), 50, 10),
    }
    targets = {
        "c": np.array([0, 0, 0, 1]),
        "l": np.array([[1, 0], [0, 0], [0, 0], [0, 0]], dtype=np.float32),
        "n": np.full(4, 60, np.float32),
    }
    priors = classify.log_priors(targets, heads, True)
    np.testing.assert_allclose(priors["c"], np.log([3.5 / 4, 1.5 / 4, 0.5 / 4]), rtol=1e-6)
    np.testing.assert_allclose(priors["l"], np.log([1.5 / 3.5, 0.5 / 4.5]), rtol=1e-6)
    assert all(not p.any() for p in classify.log_priors(targets, heads, False).values())
    logits = {"c": torch.zeros(4, 3), "l": torch.zeros(4, 2), "n": torch.zeros(4, 1)}
    plain = classify.log_priors(targets, heads, False)
    expected = np.log(3) + 2 * np.log(2) + 1.0  # (60 - 50) / 10, squared
    assert classify.loss_of(
        logits, {k: torch.tensor(v) for k, v in targets.items()}, heads, plain
    ).item() == pytest.approx(expected, rel=1e-6)


def test_augmentation_shifts_by_whole_pixels_and_flips_only_when_asked():
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(40, 1, 1, 1)
    still = classify.Training(shift=0, brightness=0, noise=0)
    torch.manual_seed(0)
    torch.testing.assert_close(classify.augment(x, still), x, atol=1e-4, rtol=0)
    moved = classify.augment(x, replace(still, shift=0.25))
    torch.testing.assert_close(moved, moved.round(), atol=1e-3, rtol=0)
    assert len({float(m[0, 4, 4].round()) for m in moved}) > 5
    assert all(
        torch.allclose((m[0, :, 1:] - m[0, :, :-1]).clamp(max=0), torch.zeros(8, 7), atol=1e-3) for m in moved
    )  # none mirrored
    flipped = classify.augment(x, replace(still, flip=True))
    mirrored = [torch.allclose(m, x[0].flip(-1), atol=1e-3) for m in flipped]
    assert 5 < sum(mirrored) < 35 and all(
        torch.allclose(m, x[0], atol=1e-3) for m, f in zip(flipped, mirrored, strict=True) if not f
    )
    turned = classify.augment(x, replace(still, rotate=15))
    assert turned.shape == x.shape and not torch.allclose(turned, x, atol=0.5)


def test_wrong_targets_raise():
    _, table = cohort(10, 8)
    heads = classify.make_heads(table, SCHEMA, labels=["spot"], numbers=["age_years"])
    for column, value in (("sex", "Other"), ("sex", None), ("y_spot", 2), ("age_years", np.nan)):
        bad = table.astype({column: object})
        bad.loc[3, column] = value
        with pytest.raises(ValueError, match="unknown categories|missing or wrong"):
            classify.encode(bad, heads)
    with pytest.raises(ValueError, match="training needs"):
        classify.fit(np.zeros((1, 32, 32), np.uint8), {}, np.zeros((1, 32, 32), np.uint8), {}, heads, QUICK, seed=0)


def test_recipes_are_the_papers():
    fields = ("network", "size", "lr", "batch", "epochs", "patience", "weight_decay", "layer_decay", "drop_path")

    def recipe(name):
        return {f: getattr(classify.RECIPES[name], f) for f in fields}

    dense, vit, net = (recipe(f"{name}_paper") for name in ("downstream", "vit", "efficientnet"))
    published = dict(network="densenet121", size=224, lr=1e-4, batch=32, epochs=100, patience=20)
    assert [name for name, r in classify.RECIPES.items() if r.centre != 1] == ["downstream_paper"]
    assert dense.items() >= published.items()
    published = dict(network="vit_b", epochs=50, batch=64, layer_decay=0.55, drop_path=0.1, weight_decay=0.01)
    assert vit.items() >= published.items()
    assert vit["lr"] * 256 / vit["batch"] == pytest.approx(5e-4)  # the published rate is a base rate
    assert net.items() >= dict(network="efficientnet_lite0", size=200, epochs=10, lr=1e-3, batch=16).items()


def test_a_vit_learns_and_survives_saving_and_weights_are_a_start(tmp_path):
    (images, table), (val_images, val_table) = cohort(160, 0), cohort(40, 1)
    heads = {"sex": classify.make_heads(table, SCHEMA)["sex"]}
    data = (images, classify.encode(table, heads), val_images, classify.encode(val_table, heads), heads)
    recipe = classify.Training("small_vit", size=32, epochs=4, batch=16, lr=3e-3, layer_decay=0.75, drop_path=0.1)
    model = classify.fit(*data, recipe, seed=0)
    losses = [row["val_loss"] for row in model.history]
    assert min(losses) < 0.6 * np.log(2)
    model.save(tmp_path)
    np.testing.assert_array_equal(classify.load(tmp_path).predict(val_images)["sex"], model.predict(val_images)["sex"])
    body = {k: v for k, v in model.network.state_dict().items() if k.startswith("body")}
    started = classify.fit(*data, replace(recipe, epochs=1, lr=1e-5), seed=1, weights=body)
    both = (m.network.state_dict().values() for m in (started, model))
    apart = [(a - b).abs().max().item() for a, b in zip(*both, strict=True)]
    assert max(apart[:-2]) < 1e-3 < max(apart[-2:])  # the last layer was not among the weights
