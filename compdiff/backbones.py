"""Networks of published weights: images -> pooled features [B, width]; `head` maps features to logits.

Each keeps the key layout of its published file; the functions `*_key` translate where our module names differ. The
networks are described in the papers named beside them. Inception-v3 has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compdiff.inception import InceptionV3


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
    """Normalised images [B, 3, h, w] -> pooled features [B, 1280]; `head` maps these to the 1,000 ImageNet classes."""

    width = 1280

    def __init__(self, outputs: int = 1000):
        super().__init__()
        self.stem = unit(3, 32, 3, 2)
        blocks, c = [], 32
        for repeats, kernel, stride, expansion, c_out in BLOCKS:
            for i in range(repeats):
                blocks.append(Block(c, c_out, kernel, stride if i == 0 else 1, expansion))
                c = c_out
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = unit(c, 1280)
        self.classifier = nn.Linear(1280, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_head(self.blocks(self.stem(x))).mean((2, 3))

    @property
    def head(self) -> nn.Module:
        return self.classifier

    def fold(self) -> Lite0:
        """Batch norms folded into their convolutions: a fifth of the time, features changed by rounding only."""
        for layer in [m for m in self.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], SameConv)]:
            layer[0], layer[1] = fuse_conv_bn_eval(layer[0], layer[1]), nn.Identity()
        return self


def lite0_key(key: str) -> str:
    """Key of the published state dict -> key of `Lite0`."""
    parts = key.split(".")
    if parts[0] != "_blocks":
        outer = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "conv_head.0", "_bn1": "conv_head.1",
                 "_fc": "classifier"}  # fmt: skip
        return ".".join([outer.get(parts[0], parts[0]), *parts[1:]])
    layer = {"_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "depthwise.0", "_bn1": "depthwise.1",
             "_project_conv": "project.0", "_bn2": "project.1"}  # fmt: skip
    return ".".join(["blocks", parts[1], layer.get(parts[2], parts[2]), *parts[3:]])


# --- ResNet (He et al. 2016; stride in the 3 x 3 convolution), torchvision's keys -------------------------------------
class Basic(nn.Module):
    """Two 3 x 3 convolutions."""

    growth = 1

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        self.downsample = shortcut(c_in, c, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1; four times as many channels out."""

    growth = 4

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.downsample = shortcut(c_in, 4 * c, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def shortcut(c_in: int, c_out: int, stride: int) -> nn.Module | None:
    if c_in == c_out and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class ResNet(nn.Module):
    """Images [B, 3, h, w] -> features [B, 512 * growth]; outputs = 0 leaves the classifier away."""

    def __init__(self, block: type[Basic | Bottleneck], repeats: tuple[int, ...], outputs: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        c = 64
        for i, n in enumerate(repeats):
            blocks = []
            for j in range(n):
                blocks.append(block(c, 64 * 2**i, 2 if i and not j else 1))
                c = 64 * 2**i * block.growth
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.width = c
        self.fc = nn.Linear(c, outputs) if outputs else None

    @property
    def head(self) -> nn.Module | None:
        return self.fc

    def maps(self, x: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, width, h / 32, w / 32]."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).mean((2, 3))


def resnet34(outputs: int = 1000) -> ResNet:
    return ResNet(Basic, (3, 4, 6, 3), outputs)


def resnet50(outputs: int = 1000) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), outputs)


def radimagenet_key(key: str) -> str:
    """RadImageNet numbers torchvision's children: backbone.0 = conv1, .1 = bn1, .4 to .7 = layer1 to 4."""
    parts = key.split(".")
    child = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    return ".".join([child.get(parts[1], parts[1]), *parts[2:]]) if parts[0] == "backbone" else key


def race_key(key: str) -> str:
    """The race judge wraps its classifier: fc = (Linear, log-softmax)."""
    return key.replace("fc.0.", "fc.")


class BioViL(nn.Module):
    """Image half of BioViL (Boecking et al. 2022): ResNet-50 and a projection of each position, averaged -> [B, 128].

    The encoder's ImageNet classifier is in the published file (its size says so) and unused.
    """

    width, head = 128, None

    def __init__(self, outputs: int = 0):
        super().__init__()
        self.encoder = nn.ModuleDict({"encoder": resnet50()})
        layers = [nn.Conv2d(2048, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 1)]
        self.projector = nn.ModuleDict({"model": nn.Sequential(*layers)})

    def forward(self, x: Tensor) -> Tensor:
        return self.projector["model"](self.encoder["encoder"].maps(x)).mean((2, 3))


# --- DenseNet-121 (Huang et al. 2017) with one input channel, MONAI's network -----------------------------------------
class DenseNet(nn.Module):
    """Grey images [B, 1, h, w] -> features [B, 1024]; `head` maps these to `outputs` logits."""

    width = 1024

    def __init__(self, outputs: int):
        super().__init__()
        from monai.networks.nets import DenseNet121  # here, because the import takes seconds

        self.net = DenseNet121(spatial_dims=2, in_channels=1, out_channels=outputs)

    @property
    def head(self) -> nn.Module:
        return self.net.class_layers.out

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.net.features(x)).mean((2, 3))


def densenet_key(key: str) -> str:
    """Key in torchvision's layout (TorchXRayVision has the same) -> key of `DenseNet`."""
    parts = key.split(".")
    if parts[0] == "classifier":
        return ".".join(["net", "class_layers", "out", *parts[1:]])
    if len(parts) > 2 and parts[2].startswith("denselayer"):
        parts.insert(3, "layers")
    return ".".join(["net", *parts])


def same_key(key: str) -> str:
    return key


# architecture in weights.yaml -> (network of a number of outputs, key of its file -> key of the network)
ARCHITECTURES: dict[str, tuple[Callable[[int], nn.Module], Callable[[str], str]]] = {
    "efficientnet_lite0": (Lite0, lite0_key),
    "inception_v3": (InceptionV3, same_key),
    "resnet50_radimagenet": (resnet50, radimagenet_key),
    "resnet50_biovil": (BioViL, same_key),
    "densenet121_grey": (DenseNet, densenet_key),
    "resnet34": (resnet34, same_key),
    "resnet34_wrapped": (resnet34, race_key),
}
