"""A small backbone that trains on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CompactBackbone(nn.Module):
    """Residual stages at strides 4, 8 and 16 and a pooled context, summed at stride 4.

    [B, 3, H, W] -> [B, 128, ceil(H / 4), ceil(W / 4)].
    """

    channels = 128

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _conv_norm(3, 32, stride=2), nn.ReLU(), _conv_norm(32, 64, stride=2), nn.ReLU()
        )
        self.stage4 = _Residual(64)
        self.stage8 = nn.Sequential(_conv_norm(64, 128, stride=2), nn.ReLU(), _Residual(128))
        self.stage16 = nn.Sequential(
            _conv_norm(128, 160, stride=2), nn.ReLU(), _Residual(160), _Residual(160, dilation=2)
        )
        self.context = nn.Conv2d(160, 96, 1)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, 96, 1) for channels in (64, 128, 160))
        self.fuse = nn.Sequential(_conv_norm(96, self.channels), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        fine = self.stage4(self.stem((images - 0.5) / 0.25))
        middle = self.stage8(fine)
        coarse = self.stage16(middle)
        summed = self.lateral[2](coarse) + self.context(coarse.mean((2, 3), keepdim=True))
        summed = self.lateral[1](middle) + _resize(summed, middle)
        summed = self.lateral[0](fine) + _resize(summed, fine)
        fused: Tensor = self.fuse(F.relu(summed))
        return fused


class _Residual(nn.Module):
    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv_norm(channels, channels), nn.ReLU(), _conv_norm(channels, channels, dilation=dilation)
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(features + self.body(features))


def _conv_norm(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _resize(features: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(features, like.shape[-2:], mode="bilinear", align_corners=False)
