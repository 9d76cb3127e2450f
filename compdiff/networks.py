"""Networks of the classifiers: grey images [B, 1, h, w] -> logits [B, width]. Stand-ins have their own names.

A network from here is trained from scratch unless `imagenet_start` finds a file of published weights; it says which.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compdiff.backbones import Lite0
from compdiff.record import sha256_file

TITLES = {
    "small": "small CNN",
    "small_vit": "small ViT",
    "densenet121": "DenseNet-121",
    "vit_b": "ViT-B",
    "efficientnet_lite0": "EfficientNet-Lite0",
}


class Small(nn.Module):
    """Five convolutions for images of about 64 px, mean and maximum of each channel over the last map, a linear
    layer."""

    def __init__(self, width: int):
        super().__init__()
        # channels in, channels out, kernel, stride
        plan = ((1, 16, 5, 2), (16, 32, 3, 2), (32, 64, 3, 1), (64, 96, 3, 2), (96, 128, 3, 1))
        self.layers = nn.Sequential()
        for c_in, c_out, kernel, stride in plan:
            conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
            self.layers.extend([conv, nn.BatchNorm2d(c_out), nn.ReLU()])
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(256, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)  # [B, 128, h / 8, w / 8]
        return self.out(self.dropout(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training a residual branch is dropped whole, per image, with
    probability p."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) of transformers, random weights, read at its class token.

    h and w are multiples of `patch`; positions are interpolated where the image is not `size` pixels wide.
    """

    def __init__(self, width: int, size: int, patch: int, d: int, layers: int, heads: int, drop_path: float):
        from transformers import ViTConfig, ViTModel  # here, because the import takes seconds

        super().__init__()
        config = ViTConfig(
            image_size=size, patch_size=patch, num_channels=1, hidden_size=d, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * d,
        )  # fmt: skip
        self.body = ViTModel(config, add_pooling_layer=False)
        for i, layer in enumerate(self.body.layers):  # its `dropout` is what both branches pass before they are added
            layer.dropout = DropPath(drop_path * i / max(1, layers - 1))
        self.out = nn.Linear(d, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x.contiguous(), interpolate_pos_encoding=True).last_hidden_state[:, 0])

    def depth_of(self, parameter: str) -> int:
        """0 for the embeddings, i + 1 for layer i, one more for what follows."""
        if parameter.startswith("body.embeddings"):
            return 0
        layer = re.match(r"body\.layers\.(\d+)\.", parameter)
        return int(layer[1]) + 1 if layer else len(self.body.layers) + 1


class Lite0Classifier(nn.Module):
    """EfficientNet-Lite0 (`backbones.Lite0`) with a linear layer; the grey image is given three times."""

    def __init__(self, width: int):
        super().__init__()
        self.body = Lite0()
        self.body.classifier = nn.Identity()
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(1280, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.body(x.expand(-1, 3, -1, -1))))


def _densenet121(width: int) -> nn.Module:
    from monai.networks.nets import DenseNet121  # here, because the import takes seconds

    return DenseNet121(spatial_dims=2, in_channels=1, out_channels=width)


BUILDERS: dict[str, Callable[[int, int, float], nn.Module]] = {  # width, size, drop path -> network
    "small": lambda width, size, p: Small(width),
    "small_vit": lambda width, size, p: ViT(width, size, 8, 64, 4, 4, p),
    "densenet121": lambda width, size, p: _densenet121(width),
    "vit_b": lambda width, size, p: ViT(width, size, 16, 768, 12, 12, p),
    "efficientnet_lite0": lambda width, size, p: Lite0Classifier(width),
}


def build(name: str, width: int, size: int, drop_path: float = 0.0) -> nn.Module:
    """A network with random weights. `size`: pixels of its training images; `drop_path` (ViTs): at the last layer.

    ValueError for an unknown name.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(BUILDERS)}")
    return BUILDERS[name](width, size, drop_path)


def parameter_groups(network: nn.Module, lr: float, layer_decay: float) -> list[dict]:
    """Groups for an optimiser: a ViT's layer of depth k of D learns at lr * layer_decay^(D - k); others at lr."""
    if not isinstance(network, ViT):
        return [{"params": list(network.parameters()), "lr": lr}]
    last = len(network.body.layers) + 1
    groups: dict[int, list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault(network.depth_of(name), []).append(parameter)
    return [{"params": p, "lr": lr * layer_decay ** (last - k)} for k, p in sorted(groups.items())]


# --- ImageNet start ---------------------------------------------------------------------------------------------------
def imagenet_start(name: str, file: str) -> tuple[dict[str, Tensor] | None, str]:
    """(weights of all but the last layer, or None; a note that says which start it is), for network `name`.

    `file`: DenseNet-121 with torchvision's keys, .pth or .safetensors, never unpickled; "" = none. ValueError for a
    file that is not there or has another layout.
    """
    if name != "densenet121":
        return None, f"{TITLES[name]}, from scratch"
    if not file:
        return None, f"{TITLES[name]}, trained from scratch: ImageNet start not available; remedy: IMAGENET=<file>"
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"IMAGENET={path.name}: no such file")
    safe = path.suffix == ".safetensors"
    state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    return from_torchvision(state), f"{TITLES[name]}, ImageNet start ({path.name}, sha256 {sha256_file(path)[:12]})"


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's DenseNet-121 -> MONAI's with one input channel, without the last layer.

    Dense layers lie one level deeper in MONAI; older files write norm.1 for norm1. The first convolution is summed
    over its colours: what it does to a grey image given three times. ValueError unless every weight is there.
    """
    wanted = {k: v for k, v in _densenet121(1).state_dict().items() if not k.startswith("class_layers")}
    found = {}
    for key, value in state.items():
        key = re.sub(r"(denselayer\d+)\.(norm|conv)\.?([12])\.", r"\1.layers.\2\3.", key)
        found[key] = value.sum(1, keepdim=True) if key == "features.conv0.weight" else value
    counters = {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")}  # older files have none
    found = counters | {k: v for k, v in found.items() if k in wanted}
    odd = sorted(k for k, v in wanted.items() if k not in found or found[k].shape != v.shape)
    if odd:
        raise ValueError(f"not DenseNet-121 in torchvision's layout: {len(odd)} weights missing or odd, first {odd[0]}")
    return found
