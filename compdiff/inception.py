"""Inception-v3 (Szegedy et al. 2016) in the key layout of torchvision's ImageNet weights.

Those weights are what the papers' code loads for "FID". They are not the TensorFlow weights of the first FID paper, so
the two FIDs cannot be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = int | tuple[int, int]


class Conv(nn.Module):
    """Convolution, batch norm (epsilon 1e-3), ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: Shape, stride: int = 1, padding: Shape = 0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def row(c_in: int, c_out: int, n: int = 7) -> Conv:
    """Kernel 1 x n, size kept."""
    return Conv(c_in, c_out, (1, n), padding=(0, n // 2))


def column(c_in: int, c_out: int, n: int = 7) -> Conv:
    """Kernel n x 1, size kept."""
    return Conv(c_in, c_out, (n, 1), padding=(n // 2, 0))


def smooth(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


class MixedA(nn.Module):
    """35 x 35 maps; 224 + `pooled` channels out."""

    def __init__(self, c: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(c, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(c, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(c, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(smooth(x))], 1)


class MixedB(nn.Module):
    """35 x 35 -> 17 x 17; 480 + c channels out."""

    def __init__(self, c: int):
        super().__init__()
        self.branch3x3 = Conv(c, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class MixedC(nn.Module):
    """17 x 17 maps, factorised 7 x 7 kernels of width `mid`; 768 channels out."""

    def __init__(self, c: int, mid: int):
        super().__init__()
        self.branch1x1 = Conv(c, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Conv(c, mid, 1), row(mid, mid), column(mid, 192)
        self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3 = Conv(c, mid, 1), column(mid, mid), row(mid, mid)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = column(mid, mid), row(mid, 192)
        self.branch_pool = Conv(c, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(smooth(x))], 1)


class MixedD(nn.Module):
    """17 x 17 -> 8 x 8; 512 + c channels out."""

    def __init__(self, c: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(c, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(c, 192, 1), row(192, 192)
        self.branch7x7x3_3, self.branch7x7x3_4 = column(192, 192), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class MixedE(nn.Module):
    """8 x 8 maps, 1 x 3 beside 3 x 1 kernels; 2,048 channels out."""

    def __init__(self, c: int):
        super().__init__()
        self.branch1x1 = Conv(c, 320, 1)
        self.branch3x3_1 = Conv(c, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = row(384, 384, 3), column(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = row(384, 384, 3), column(384, 384, 3)
        self.branch_pool = Conv(c, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pairs = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        pairs += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *pairs, self.branch_pool(smooth(x))], 1)


class Auxiliary(nn.Module):
    """The training-time classifier on the 17 x 17 maps: its weights are in the file, no feature passes through it."""

    def __init__(self, c: int, classes: int):
        super().__init__()
        self.conv0, self.conv1 = Conv(c, 128, 1), Conv(128, 768, 5)
        self.fc = nn.Linear(768, classes)


class InceptionV3(nn.Module):
    """Images [B, 3, 299, 299] in [-1, 1] -> pooled features [B, 2048]; `head` maps these to class logits."""

    width = 2048

    def __init__(self, outputs: int = 1000):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, stride=2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32), MixedA(256, 64), MixedA(288, 64)
        self.Mixed_6a, self.Mixed_6b = MixedB(288), MixedC(768, 128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = MixedC(768, 160), MixedC(768, 160), MixedC(768, 192)
        self.AuxLogits = Auxiliary(768, outputs)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = MixedD(768), MixedE(1280), MixedE(2048)
        self.fc = nn.Linear(2048, outputs)

    @property
    def head(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)  # [B, 192, 35, 35]
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # [B, 768, 17, 17]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
