"""Segmentation models. THIS IS WHERE OTHER MODELS PLUG IN: write a builder and register it.

    @register("mine")
    def build_mine(num_classes, embed_dim, head):
        return SegmentationModel(MyBackbone(), num_classes, embed_dim, head)

A builder may return any module that keeps the contract of `SegmentationModel.forward` and has `backbone` and
`embed_head`; `SegmentationModel` does both for a backbone that maps images to one feature map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from pixcontrast_ext.head import ProjectionHead

Builder = Callable[[int, int, str], nn.Module]
"""(num_classes, embed_dim, head) -> model"""

MODELS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make a builder known to `--model NAME`. Raises ValueError if the name is taken."""

    def add(builder: Builder) -> Builder:
        if name in MODELS:
            raise ValueError(f"there is already a model {name!r}")
        MODELS[name] = builder
        return builder

    return add


def build_model(name: str, num_classes: int, embed_dim: int = 256, head: str = "convmlp") -> nn.Module:
    """A model by its name in the registry. Raises ValueError that lists the known ones."""
    if name not in MODELS:
        raise ValueError(f"--model is {name!r}, must be one of {', '.join(MODELS)}")
    return MODELS[name](num_classes, embed_dim, head)


class SegmentationModel(nn.Module):
    """A backbone with a classifier and a projection head on the same feature map.

    Args:
        backbone: module with an attribute `channels`, from images [B, 3, H, W], RGB in [0, 1], to features
            [B, channels, h, w]. It normalises its input itself.
        num_classes, embed_dim, head: of the classifier and of the `ProjectionHead`.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, embed_dim: int, head: str) -> None:
        super().__init__()
        channels: int = backbone.channels  # type: ignore[assignment]
        self.backbone = backbone
        self.seg_head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))
        self.embed_head: nn.Module | None = ProjectionHead(channels, embed_dim, head)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`{"seg": logits [B, C, h, w], "embed": embeddings [B, D, h, w]}`, not upsampled, not normalised.

        Without a head (`drop_embed_head`) there is no "embed".
        """
        features = self.backbone(images)
        outputs = {"seg": self.seg_head(features)}
        if self.embed_head is not None:
            outputs["embed"] = self.embed_head(features)
        return outputs


def drop_embed_head(model: nn.Module) -> nn.Module:
    """Take the projection head off: inference, and training without contrast, pay nothing for it."""
    model.embed_head = None  # type: ignore[assignment]
    return model


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights, leaving out those of a projection head that `model` no longer has.

    Raises ValueError that names what does not fit.
    """
    if model.embed_head is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("embed_head.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights do not fit the model: {error}") from error


@register("compact")
def build_compact(num_classes: int, embed_dim: int, head: str) -> nn.Module:
    """1.8 M parameters, output stride 4, any input size: trains on a CPU."""
    return SegmentationModel(CompactBackbone(), num_classes, embed_dim, head)


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
        return self.fuse(F.relu(summed))


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
