"""Segmentation models. THIS IS WHERE OTHER MODELS PLUG IN: write a builder and register it.

    @register("mine")
    def build_mine(num_classes, embed_dim, head):
        return SegmentationModel(MyBackbone(), num_classes, embed_dim, head)

A builder may return any module that keeps the contract of `SegmentationModel.forward` and has `backbone`, which maps
images to one feature map and which `forward` calls, and `embed_head`. In training it may return "aux" as well, logits
of an auxiliary head: the trainer adds their cross-entropy. `--project used` takes a `ProjectingModel`, or what has
`defers_head` like one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from pixcontrast_ext.trainer.networks.compact import CompactBackbone
from pixcontrast_ext.trainer.networks.segmentation import SegmentationModel

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


def build_model(
    name: str,
    num_classes: int,
    embed_dim: int = 256,
    head: str = "convmlp",
    *,
    align_corners: bool = False,
) -> nn.Module:
    """A model by its name in the registry, which upsamples with aligned corners if told.

    Raises ValueError that lists the known ones.
    """
    if name not in MODELS:
        raise ValueError(f"--model is {name!r}, must be one of {', '.join(MODELS)}")
    model = MODELS[name](num_classes, embed_dim, head)
    model.align_corners = align_corners  # type: ignore[assignment]  # of its logits, for whoever upsamples them
    for module in model.modules():
        if hasattr(module, "align_corners") and getattr(module, "mode", "bilinear") == "bilinear":
            module.align_corners = align_corners  # type: ignore[assignment]
    return model


def sisters(name: str) -> list[str]:
    """The registered networks that differ from `name` in whose heads they have, itself among them."""
    plain = name.replace("_v2", "").removesuffix("_torchvision")
    return [each for each in MODELS if each.replace("_v2", "").removesuffix("_torchvision") == plain]


def drop_embed_head(model: nn.Module) -> nn.Module:
    """Take the projection head off: inference, and training without contrast, pay nothing for it."""
    model.embed_head = None  # type: ignore[assignment]
    return model


def defer_embed_head(model: nn.Module) -> nn.Module:
    """Have the model return, in training, what its projection head reads, for the loss to call the head.

    Raises ValueError for a model that cannot.
    """
    if not hasattr(model, "defers_head"):
        raise ValueError(f"--project is 'used', but {type(model).__name__} has no `defers_head`")
    model.defers_head = True  # type: ignore[assignment]
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
    """1.7 M parameters without projection head, output stride 4, any input size: trains on a CPU."""
    return SegmentationModel(CompactBackbone(), num_classes, embed_dim, head)


def _deeplabv3(backbone: str, wide: bool, num_classes: int, embed_dim: int, head: str) -> nn.Module:
    """DeepLabV3 on a ResNet at stride 8. Needs the extra `models`."""
    from pixcontrast_ext.trainer.networks.backbones import ResNetBackbone
    from pixcontrast_ext.trainer.networks.deeplabv3 import DeepLabV3

    return DeepLabV3(ResNetBackbone(backbone, deep_stem=wide), num_classes, embed_dim, head, wide=wide)


def _hrnet(backbone: str, wide: bool, num_classes: int, embed_dim: int, head: str) -> nn.Module:
    """HRNetV2 at stride 4. Needs the extra `models`."""
    from pixcontrast_ext.trainer.networks.backbones import HRNetBackbone, v2_classifier, wide_classifier

    features = HRNetBackbone(backbone)
    classifier = wide_classifier if wide else v2_classifier
    return SegmentationModel(
        features, num_classes, embed_dim, head, classifier(features.channels, num_classes)
    )


def _hrnet_ocr(backbone: str, wide: bool, num_classes: int, embed_dim: int, head: str) -> nn.Module:
    """HRNetV2 with object-contextual representations at stride 4. Needs the extra `models`."""
    from pixcontrast_ext.trainer.networks.backbones import HRNetBackbone
    from pixcontrast_ext.trainer.networks.ocr import OCRModel

    return OCRModel(HRNetBackbone(backbone), num_classes, embed_dim, head, wide=wide)


# As the authors of the contrast built them, and under a second name as their own papers or torchvision have them.
for _name in ("resnet50", "resnet101"):
    register(f"deeplabv3_{_name}")(partial(_deeplabv3, _name, True))
    register(f"deeplabv3_{_name}_torchvision")(partial(_deeplabv3, _name, False))
for _name in ("hrnet_w18", "hrnet_w48"):
    for _suffix, _build in (("", _hrnet), ("_ocr", _hrnet_ocr)):
        register(f"{_name}{_suffix}")(partial(_build, _name, True))
        register(f"{_name}_v2{_suffix}")(partial(_build, _name, False))

__all__ = [
    "MODELS",
    "SegmentationModel",
    "build_model",
    "defer_embed_head",
    "drop_embed_head",
    "load_weights",
    "register",
    "sisters",
]
