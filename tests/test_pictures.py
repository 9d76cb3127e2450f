"""Image files of unknown origin: DICOM against pydicom's own windowing and closed forms, NPZ without pickles."""

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import apply_voi_lut

from compdiff import pictures, skeleton

RAMP = np.linspace(0, 4095, 64 * 64).round().astype(np.uint16).reshape(64, 64)


def _dicom(tmp_path, photometric="MONOCHROME2", values=RAMP, **tags):
    path = tmp_path / "x.dcm"
    skeleton.save_dicom(values, path, photometric, **tags)
    return path


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 1500, "WindowWidth": 800},
        {"WindowCenter": [1500, 10], "WindowWidth": [800, 2]},
        {"WindowCenter": 1500, "WindowWidth": 800, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 1500, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 500.5, "WindowWidth": 1},
        {"WindowCenter": -100, "WindowWidth": 900, "RescaleSlope": 1, "RescaleIntercept": -1000},
    ],
)
def test_windows_are_those_of_the_standard(tmp_path, tags):
    path = _dicom(tmp_path, **tags)
    data = pydicom.dcmread(path)
    offset = float(data.get("RescaleIntercept", 0))
    wanted = apply_voi_lut(RAMP + offset, data) - offset  # in [0, 4095], the range of 12 bits
    found = np.asarray(pictures.read_grey(path)).astype(float)
    assert found.std() > 0
    assert np.abs(found - wanted * 255 / 4095).max() <= 0.51


def test_monochrome1_is_inverted_and_bits_are_those_in_use(tmp_path):
    whole = {"WindowCenter": 2048, "WindowWidth": 4096}
    bright = np.asarray(pictures.read_grey(_dicom(tmp_path, **whole)))
    dark = np.asarray(pictures.read_grey(_dicom(tmp_path, "MONOCHROME1", **whole)))
    assert bright[0, 0] == 0 and bright[-1, -1] == 255, "12 bits of 16"
    assert np.abs(bright.astype(int) - dark).max() <= 1, "the file holds the negative"
    data = pydicom.dcmread(tmp_path / "x.dcm")
    data.PhotometricInterpretation = "MONOCHROME2"
    data.save_as(tmp_path / "x.dcm")
    assert np.abs(255 - bright.astype(int) - np.asarray(pictures.read_grey(tmp_path / "x.dcm"))).max() <= 1


def test_without_a_window_the_values_are_scaled_and_a_table_counts_first(tmp_path):
    path = _dicom(tmp_path, values=RAMP // 4 + 100)
    data = pydicom.dcmread(path)
    del data.WindowCenter, data.WindowWidth
    data.save_as(path)
    found = np.asarray(pictures.read_grey(path))
    assert found.min() == 0 and found.max() == 255
    table = pydicom.Dataset()
    values = list(range(255, -1, -1)) * 16
    table.LUTDescriptor = [4096, 0, 8]
    table.add_new("LUTData", "US", values)
    data.VOILUTSequence = [table]
    data.save_as(path)
    stored = np.asarray(RAMP // 4 + 100).astype(int)
    assert np.array_equal(np.asarray(pictures.read_grey(path)), np.asarray(values)[stored])


@pytest.mark.parametrize(
    "tags, says",
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "is not one grey image"),
        ({"NumberOfFrames": 3}, "is not one grey image"),
        ({"Rows": 2, "Columns": 2}, "2x2 pixels"),
        ({"Rows": 65535, "Columns": 65535}, "65535x65535 pixels"),
        ({"Rows": 640}, "truncated or not a DICOM"),
        ({"WindowWidth": 0}, "a window of no width"),
        ({"WindowCenter": None}, "empty or damaged"),
        ({"VOILUTSequence": []}, "empty or damaged"),
        ({"VOILUTSequence": [pydicom.Dataset()]}, "empty or damaged"),
        ({"PixelData": None}, "no pixels that can be decoded|truncated or not"),
    ],
)
def test_hostile_dicom(tmp_path, tags, says):
    data = pydicom.dcmread(_dicom(tmp_path))
    for name, value in tags.items():
        if name == "PixelData":
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(tmp_path / "x.dcm")
    with pytest.raises(pictures.Unreadable, match=says):
        pictures.read_grey(tmp_path / "x.dcm")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".npz", ".dcm", ".gif", ""])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\0" * 200 + b"DICM"])
def test_rubbish_is_unreadable_whatever_its_name(tmp_path, suffix, content):
    (tmp_path / f"x{suffix}").write_bytes(content)
    problem, remedy = pictures.image_problem(tmp_path / f"x{suffix}")
    assert problem and remedy


def test_npz_pictures(tmp_path):
    path, grey = tmp_path / "x.npz", np.arange(400, dtype=np.uint8).reshape(20, 20)
    np.savez(path, slo_fundus=np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(np.asarray(pictures.read_grey(path)), grey)
    np.savez(path, slo_fundus=np.linspace(-3.0, 5.0, 400).reshape(20, 20))
    scaled = np.asarray(pictures.read_grey(path)).ravel()
    assert np.array_equal(scaled, np.round(np.linspace(0, 255, 400)).astype(np.uint8))
    for wrong in (np.full((20, 20), np.nan), np.zeros((20, 20)), np.array(["a"] * 400).reshape(20, 20), np.zeros(400)):
        np.savez(path, slo_fundus=wrong)
        with pytest.raises(pictures.Unreadable):
            pictures.read_grey(path)
    np.savez(path, other=grey)
    with pytest.raises(pictures.Unreadable, match="has no array slo_fundus"):
        pictures.read_grey(path)


def test_a_turned_jpg(tmp_path):
    values = np.tile(np.linspace(40, 200, 64).astype(np.uint8), (32, 1))  # bright on the right
    Image.fromarray(values).save(tmp_path / "x.jpg", quality=100)
    found = np.asarray(pictures.read_grey(tmp_path / "x.jpg", slo=True))
    assert found.shape == (64, 32) and (found.min(), found.max()) == (0, 255)
    assert found[-4:].mean() > 240 and found[:4].mean() < 15, "by -90 degrees, clockwise: right becomes bottom"
