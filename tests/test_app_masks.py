"""Masks as pictures: back and forth without loss, soft edges, and uploads that are not what they say."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from compdiff import cardiac, heart, masks
from compdiff.pictures import Unreadable


@pytest.fixture(scope="module")
def examples():
    return masks.examples()


def test_examples_are_healthy_and_failing_hearts_with_their_truth(examples):
    assert len(examples) == masks.EXAMPLES
    assert [e.row["y_heart failure"] for e in examples] == [0, 1] * (masks.EXAMPLES // 2)
    for e in examples:
        drawn, base = e.truth["ejection_fraction"], 0.62
        assert (drawn < base - 0.1) == bool(e.row["y_heart failure"])
        slack = 3 * heart.EFFECTS["scatter"]["ejection_fraction"] + 0.05  # scatter, pixels
        assert masks.measured(e.mask)["ejection fraction"] == pytest.approx(drawn, abs=slack)
    assert len({e.row["id"] for e in examples}) == masks.EXAMPLES


@pytest.mark.parametrize("times", [1, 3, 4])
def test_a_mask_survives_the_way_to_a_picture_and_back(examples, times, tmp_path):
    mask = examples[1].mask
    grey = masks.to_grey(mask, times)
    assert grey.shape == (64 * times, 128 * times) and set(np.unique(grey)) == {0, 85, 170, 255}
    assert np.array_equal(grey[::times, : 64 * times : times] // 85, mask[..., 0])
    assert np.array_equal(masks.from_grey(grey, 64), mask)
    for picture in (grey, grey // 85):
        Image.fromarray(picture).save(tmp_path / "mask.png")
        assert np.array_equal(masks.read(tmp_path / "mask.png", 64), mask)
    Image.fromarray(grey).convert("RGBA").save(tmp_path / "colour.png")
    assert np.array_equal(masks.read(tmp_path / "colour.png", 64), mask)


def test_soft_edges_leave_no_rim_of_another_tissue():
    """A right ventricle (255) on background (0), blurred as by a brush, passes the greys of the other tissues."""
    y, x = np.mgrid[:256, :512]
    soft = 127.5 * (1 - np.tanh((np.hypot(x - 60, y - 128) - 40) / 0.8))
    grey = np.rint(np.where(np.hypot(x - 190, y - 128) < 30, 85, soft)).astype(np.uint8)
    assert {85, 170} <= {85 * round(v / 85) for v in np.unique(soft[:, :120].round()).tolist()}, "the rim is there"
    found = masks.from_grey(grey, 64)[..., 0]
    assert set(np.unique(found[:, :30])) == {0, 3} and set(np.unique(found[:, 36:])) == {0, 1}
    assert (found == 3).sum() == pytest.approx(np.pi * 10**2, rel=0.05)


def test_other_sizes_keep_the_area():
    grey = np.zeros((100, 200), np.uint8)
    grey[20:60, 20:60] = grey[20:60, 120:160] = 85
    mask = masks.from_grey(grey, 64)
    assert (mask[..., 0] == 1).sum() == pytest.approx(0.4**2 * 64**2, rel=0.05)
    assert np.array_equal(mask[..., 0], mask[..., 1])


def test_a_larger_model_gets_the_same_mask_in_larger_pixels(examples):
    mask = examples[0].mask
    assert np.array_equal(masks.from_grey(masks.to_grey(mask, 4), 512), mask.repeat(8, axis=0).repeat(8, axis=1))


def test_measured_is_what_the_frames_say(examples):
    ed, es = cardiac.unstack(examples[0].mask)
    told = masks.measured(examples[0].mask)
    assert told["ejection fraction"] == pytest.approx(1 - (es == 1).sum() / (ed == 1).sum())
    assert told["cavity_area at ED"] == pytest.approx((ed == 1).sum() * (2 * heart.FIELD / 64) ** 2)


# --- hostile uploads --------------------------------------------------------------------------------------------------
def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(side):
    """A PNG of a few kB that claims side x side pixels, and holds some of its rows."""
    rows = zlib.compress(b"\0" * (side + 1) * 1000, 9)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def grey_png(tmp_path, array):
    Image.fromarray(array).save(tmp_path / "of.png")
    return (tmp_path / "of.png").read_bytes()


HOSTILE = {
    "page.png": lambda t, m: b"<html><script>alert(1)</script>",
    "empty.png": lambda t, m: b"",
    "pickle.png": lambda t, m: b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "jpeg.png": lambda t, m: b"\xff\xd8\xff\xe0" + b"\0" * 100,
    "cut.png": lambda t, m: grey_png(t, m)[:150],
    "bomb.png": lambda t, m: bomb(9_000),
    "bombs.png": lambda t, m: bomb(30_000),
    "large.png": lambda t, m: grey_png(t, m) + b"\0" * masks.MAX_BYTES,
    "mask.exe": grey_png,
    "mask.npz": grey_png,
    "unknown.png": lambda t, m: grey_png(t, np.where(m == 85, 84, m).astype(np.uint8)),
    "square.png": lambda t, m: grey_png(t, m[:, : m.shape[0]]),
    "small.png": lambda t, m: grey_png(t, m[::3, ::3]),
    "wide.png": lambda t, m: grey_png(t, m.repeat(20, axis=0).repeat(20, axis=1)),
    "black.png": lambda t, m: grey_png(t, 0 * m),
    "16bit.png": lambda t, m: grey_png(t, m.astype(np.uint16) * 257),
}  # fmt: skip
WORDS = {
    "large.png": "larger than 2 MiB", "mask.exe": "no .png", "mask.npz": "no .png",
    "unknown.png": "unknown values, such as 84",
    "square.png": "side by side", "small.png": "side by side", "wide.png": "at most 2048",
    "black.png": "no left-ventricle cavity",
    "16bit.png": "not 8-bit", "bomb.png": "9000x9000 pixels",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads_are_refused_in_words(name, examples, tmp_path):
    (tmp_path / name).write_bytes(HOSTILE[name](tmp_path, masks.to_grey(examples[0].mask, 1)))
    with pytest.raises(Unreadable, match=WORDS.get(name, "not a PNG")) as refused:
        masks.read(tmp_path / name, 64)
    assert refused.value.remedy and str(tmp_path) not in str(refused.value)
