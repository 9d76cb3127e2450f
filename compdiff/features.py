"""Feature extractors: grey images -> float32 [n, d] arrays, cached by content. The judge of FID, KID and
precision/recall.

An extractor is named in every result column, because a number means nothing without it, and so is the input size where
that is not its own (`column`): "FID-lite0@96" is the Frechet distance in the pooled 1,280-d features of
EfficientNet-Lite0 (ImageNet weights) fed 96 pixels, and is not comparable to the papers' Inception-v3 FID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compdiff import shards
from compdiff.backbones import ARCHITECTURES, Lite0
from compdiff.devices import on_accelerator
from compdiff.record import atomic, sha256_file
from compdiff.weights import entry, state_dict, weight_file

MEAN = torch.tensor((0.485, 0.456, 0.406)).reshape(1, 3, 1, 1)  # of ImageNet's channels, in [0, 1]
STD = torch.tensor((0.229, 0.224, 0.225)).reshape(1, 3, 1, 1)
BLOCK = 10_000  # images whose features are kept together while a large set is worked on
# grey values [n, 3, s, s] in 0..255 -> what the network was trained on
NORMALISE: dict[str, Callable[[Tensor], Tensor]] = {
    "lite0": lambda x: (x - 127) / 128,
    "symmetric": lambda x: x / 127.5 - 1,
    "unit": lambda x: x / 255,
    "imagenet": lambda x: (x / 255 - MEAN) / STD,
    "grey_1024": lambda x: (2 * x[:, :1] / 255 - 1) * 1024,  # TorchXRayVision: one channel in [-1024, 1024]
    "bytes": lambda x: x,
}


def load(name: str, folder: str = "") -> nn.Module:
    """The network of judge or extractor `name` with its published weights, in evaluation mode; every key must match.

    Errors of `weights.weight_file` and `weights.state_dict`; ValueError names the first keys that do not fit.
    """
    known, path = entry(name), weight_file(name, folder)
    build, rename = ARCHITECTURES[known.architecture]
    network = build(known.outputs if isinstance(known.outputs, int) else len(known.outputs))
    # op_threshs: TorchXRayVision's thresholds, which do not change a rank and may stand in the file
    state = {rename(k): v for k, v in state_dict(path).items() if k != "op_threshs"}
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(f"{path.name} is not a {known.architecture}: {detail}; remedy: {known.remedy}") from None
    network.eval().requires_grad_(False)
    return network.fold() if isinstance(network, Lite0) else network


def prepare(images: np.ndarray, size: int, normalise: str = "lite0", crop: int = 0) -> Tensor:
    """uint8 grey [n, S, S] (or RGB [n, S, S, 3]) -> float [n, c, size, size], bilinear with antialias, normalised.

    crop > 0 keeps the central crop x crop pixels of that.
    """
    x = torch.tensor(images)
    x = x[:, None].expand(-1, 3, -1, -1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    x = x.float()
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    edge = (size - crop) // 2 if crop else 0
    return NORMALISE[normalise](x[..., edge : size - edge, edge : size - edge])


def extract(
    images: np.ndarray, extractor: str = "lite0", size: int = 0, batch: int = 50, folder: str = ""
) -> np.ndarray:
    """Features float32 [n, d] of uint8 grey images [n, S, S], resized to `size` pixels (0 = the extractor's own).

    ValueError: other dtype or shape, unknown extractor, or a wrong file. NotAvailable: its weights are not here.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"images must be uint8 [n, S, S], got {images.dtype} {list(images.shape)}")
    known = entry(extractor)
    model = load(extractor, folder).to(memory_format=torch.channels_last)
    crop = known.crop if known.crop < known.size and not size else 0
    out = np.empty((len(images), model.width), dtype=np.float32)
    with torch.inference_mode(), on_accelerator(model) as device:
        for i in range(0, len(images), batch):
            x = prepare(images[i : i + batch], size or known.size, known.normalise, crop).to(device)
            out[i : i + batch] = model(x.contiguous(memory_format=torch.channels_last)).cpu().numpy()
    return out


def column(extractor: str, size: int = 0) -> str:
    """An extractor's name in the results of images fed at `size` pixels (0 = its own): lite0@96, but lite0 at 224."""
    return extractor if size in (0, entry(extractor).size) else f"{extractor}@{size}"


def logits(features: np.ndarray, extractor: str = "lite0", folder: str = "") -> np.ndarray:
    """The extractor's own classifier on its (cached) features [n, d] -> logits float32 [n, outputs].

    ValueError: it has no classifier. NotAvailable: its weights are not here.
    """
    head = load(extractor, folder).head
    if head is None:
        raise ValueError(f"extractor {extractor!r} has no classifier")
    with torch.inference_mode():
        return head(torch.tensor(features)).numpy()


def softmax(z: np.ndarray) -> np.ndarray:
    """Logits [n, C] -> class probabilities [n, C], float64."""
    z = np.exp(z.astype(np.float64) - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def cached(
    file: Path, images: np.ndarray, extractor: str = "lite0", size: int = 0, batch: int = 50, folder: str = ""
) -> np.ndarray:
    """`extract`, kept in the npz `file`; read back only if made from these images with these bytes of weights and size.

    More than BLOCK images are kept in pieces until all are there, so a killed call goes on where it stopped. Errors of
    `weights.weight_file`: the file must be there, because a user's own copy may differ from the listed one.
    """
    return _cached(Path(file).with_suffix(".npz"), images, extractor, size, batch, folder, (0, 1))


def extract_share(file: Path, images: np.ndarray, share: tuple[int, int], extractor: str = "lite0", size: int = 0,
                  batch: int = 50, folder: str = "") -> None:  # fmt: skip
    """Make the pieces of share (k, n) beside `file`; after all n processes, `cached` puts them together."""
    _cached(Path(file).with_suffix(".npz"), images, extractor, size, batch, folder, share)


def _cached(file: Path, images: np.ndarray, extractor: str, size: int, batch: int, folder: str,
            share: tuple[int, int]) -> np.ndarray | None:  # fmt: skip
    weights = sha256_file(weight_file(extractor, folder))
    digest = hashlib.sha256(f"{extractor} {weights} {size} {images.dtype} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images))
    key = digest.hexdigest()
    if (features := _stored(file, key)) is not None:
        return features
    starts = range(0, max(1, len(images)), max(1, BLOCK // batch) * batch)  # a piece holds whole batches
    pieces = [file.with_name(f".{file.stem}-{key[:16]}-{start}.npz") for start in starts]
    for start, piece in shards.share_of(list(zip(starts, pieces, strict=True)), share):
        if _stored(piece, key) is None:
            _store(piece, key, extract(images[start : start + starts.step], extractor, size, batch, folder))
    if share != (0, 1):
        return None
    features = np.concatenate([_stored(piece, key) for piece in pieces])
    _store(file, key, features)
    for piece in pieces:
        piece.unlink()
    return features


def _stored(file: Path, key: str) -> np.ndarray | None:
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as stored:
        return stored["features"] if str(stored["key"]) == key else None


def _store(file: Path, key: str, features: np.ndarray) -> None:
    with atomic(file) as temporary:
        np.savez(temporary, features=features, key=np.array(key))
