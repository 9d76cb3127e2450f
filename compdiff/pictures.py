"""Image files of unknown origin: what is wrong with one, and one as a grey square. PNG, JPEG, NPZ and DICOM."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GREY = ("L", "RGBA", "RGB", "LA", "P")  # 8 bits per channel; the official release has some RGBA
MIN_SIDE, MAX_PIXELS = 16, 64 * 2**20
MAX_MEMBER = 256 * 2**20  # bytes of one array in an NPZ
UNREADABLE = (  # from Pillow, zipfile, numpy
    OSError, SyntaxError, ValueError, EOFError, KeyError, OverflowError, MemoryError, NotImplementedError, struct.error,
    zlib.error, zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip


class Unreadable(Exception):
    """An image file that cannot be used: `.problem` and `.remedy`."""

    def __init__(self, problem: str, remedy: str = "get the image again"):
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def image_problem(path: Path, slo: bool = False) -> tuple[str, str] | None:
    """What is wrong with one file and what to do, or None."""
    try:
        read_grey(path, slo=slo)
        if path.suffix == ".png":
            with Image.open(path, formats=["PNG"]) as image:
                image.verify()  # the checksums of what follows the pixels
    except Unreadable as error:
        return error.problem, error.remedy
    except UNREADABLE:
        return "truncated or not a PNG", "get the image again"
    return None


def load_square(path: Path, size: int, slo: bool = False) -> np.ndarray:
    """Image file -> uint8 [size, size]: grey, padded with black to a square, Lanczos-resampled. Unreadable if it is."""
    grey = read_grey(path, size, slo)
    side = max(grey.size)
    if grey.size != (side, side):
        square = Image.new("L", (side, side))
        square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
        grey = square
    return np.asarray(grey if side == size else grey.resize((size, size), Image.Resampling.LANCZOS))


def read_grey(path: Path, size: int = 0, slo: bool = False) -> Image.Image:
    """Image file -> 8-bit grey; the suffix says what it must hold.

    size: the JPEG decoder may shrink to twice this size already (0: not). slo: FairGenMed's JPG, turned by -90 degrees
    and scaled to its own minimum and maximum, as FairDiffusion does.
    """
    path = Path(path)
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".npz": "NPZ", ".dcm": "DICOM"}.get(path.suffix.lower())
    if kind is None:
        raise Unreadable(f"no image of a known kind ({path.suffix[:8] or 'no suffix'})", "use .png, .jpg, .npz or .dcm")
    try:
        if kind == "NPZ":
            grey = Image.fromarray(_grey_array(read_member(path, "slo_fundus")))
        elif kind == "DICOM":
            grey = Image.fromarray(_dicom(path))
        else:
            grey = _raster(path, kind, size)
    except UNREADABLE:
        raise Unreadable(f"truncated or not a {kind}") from None
    if min(grey.size) < MIN_SIDE:
        raise _wrong_size(*grey.size)
    if slo:
        grey = Image.fromarray(_stretch(np.asarray(grey.rotate(-90, expand=True)).astype(np.float64)))
    return grey


def _wrong_size(width: int, height: int) -> Unreadable:
    return Unreadable(f"{width}x{height} pixels: a placeholder or not a radiograph")


def _raster(path: Path, kind: str, size: int) -> Image.Image:
    with Image.open(path, formats=[kind]) as image:
        if image.mode not in GREY:
            raise Unreadable(f"mode {image.mode} is not 8-bit grey or colour", f"convert it to 8-bit {kind}")
        if min(image.size) < MIN_SIDE or image.width * image.height > MAX_PIXELS:
            raise _wrong_size(*image.size)
        if size and kind == "JPEG":
            image.draft("L", (2 * size, 2 * size))  # by powers of 2 within the decoder: several times as fast
        return image.convert("L")


def _stretch(values: np.ndarray) -> np.ndarray:
    """Minimum -> 0, maximum -> 255. Unreadable where all are equal or one is no number."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite([low, high]).all() and low < high):
        raise Unreadable("all pixels are equal, or not finite")
    return np.round((values - low) * (255 / (high - low))).astype(np.uint8)


# --- NPZ ----------------------------------------------------------------------------------------------------------
def read_member(path: Path, name: str) -> np.ndarray:
    """One array of an NPZ, never unpickled: an object array is Unreadable, and so is one that is absent."""
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise Unreadable(f"has no array {name}")
        if archive.getinfo(f"{name}.npy").file_size > MAX_MEMBER:
            raise Unreadable(f"array {name} is too large")
    with np.load(path, allow_pickle=False) as arrays:
        try:
            return arrays[name]
        except ValueError:
            raise Unreadable(f"array {name} holds objects, or is damaged: never unpickled") from None


def _grey_array(array: np.ndarray) -> np.ndarray:
    """[h, w] or [h, w, 3] numbers -> uint8 [h, w]; what is not uint8 is scaled to its minimum and maximum."""
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not np.issubdtype(array.dtype, np.number):
        raise Unreadable(f"slo_fundus is {array.dtype} {list(array.shape)}, not numbers [h, w, 3]")
    if min(array.shape[:2]) < MIN_SIDE:
        raise _wrong_size(array.shape[1], array.shape[0])
    if array.dtype == np.uint8:
        return np.asarray(Image.fromarray(array).convert("L"))
    return _stretch(array.reshape(*array.shape[:2], -1).mean(axis=2).astype(np.float64))


# --- DICOM --------------------------------------------------------------------------------------------------------
def _dicom(path: Path) -> np.ndarray:
    """One radiograph -> uint8 [h, w]: modality LUT, VOI LUT or window (else minimum to maximum), MONOCHROME1 inverted.

    DICOM PS3.3 C.11.1 and C.11.2; only pixel data and what it needs are used, no identifier is read.
    """
    import pydicom  # here: only one layout needs it
    from pydicom import config, pixels

    config.settings.reading_validation_mode = config.IGNORE  # its warnings would print what they find, identifiers too
    try:
        data = pydicom.dcmread(path)
        shape, photometric = (int(data.Rows), int(data.Columns)), data.PhotometricInterpretation
        if min(shape) < MIN_SIDE or shape[0] * shape[1] > MAX_PIXELS:
            raise _wrong_size(shape[1], shape[0])
        if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(data.get("NumberOfFrames") or 1) != 1:
            raise Unreadable("is not one grey image (MONOCHROME1 or MONOCHROME2)", "use a frontal radiograph")
        values = pixels.apply_modality_lut(data.pixel_array, data).astype(np.float64)
    except (pydicom.errors.InvalidDicomError, AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError):
        raise Unreadable("has no pixels that can be decoded", "use the uncompressed file, or get it again") from None
    try:
        grey = _displayed(values, data)
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
        raise Unreadable("has a window or a VOI LUT that is empty or damaged") from None
    return np.round(255 * np.clip(1 - grey if photometric == "MONOCHROME1" else grey, 0, 1)).astype(np.uint8)


def _displayed(values: np.ndarray, data: object) -> np.ndarray:
    """Values after the modality LUT -> [0, 1], as the file asks. Errors that a damaged header brings go through."""
    from pydicom import pixels

    if "VOILUTSequence" in data:
        top = 2.0 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1
        return pixels.apply_voi(values.astype(np.int64), data).astype(np.float64) / top
    if data.get("WindowWidth") not in (None, ""):
        return _window(values, data)
    return _stretch(values) / 255


def _window(values: np.ndarray, data: object) -> np.ndarray:
    """The first window of the file -> [0, 1]: PS3.3 C.11.2.1.2 (LINEAR), C.11.2.1.3 (SIGMOID, LINEAR_EXACT)."""
    centre, width = (float(np.atleast_1d(data[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    form = data.get("VOILUTFunction") or "LINEAR"
    if not np.isfinite([centre, width]).all() or width <= 0 or (form == "LINEAR" and width < 1):
        raise Unreadable("has a window of no width")
    if form == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if form == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    grey = np.clip((values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1)
    return np.where(values <= centre - 0.5 - (width - 1) / 2, 0, grey)  # matters for a window of width 1
