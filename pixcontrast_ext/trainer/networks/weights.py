"""Weights for a backbone, from a file or from timm."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixcontrast_ext.trainer.networks.backbones import TimmBackbone

_CLASSIFIER = ("fc.", "classifier.", "head.", "incre_modules.", "downsamp_modules.", "final_layer.")
"""Beginnings of names that ResNet and HRNet files have for classification, which a backbone leaves out."""


def load_backbone(model: nn.Module, path: Path) -> None:
    """Load a file of weights into `model.backbone`.

    The file is a state dict by `torch.save`, bare or under "state_dict" or "model", or a safetensors file; names may
    begin with "module." or, as in a checkpoint of this trainer, with "backbone.". What it has for classification
    is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or does not fit; the message names what is missing, too much or of another
            shape.
    """
    weights = _read(path)
    weights = {name: value for name, value in weights.items() if not name.startswith(_CLASSIFIER)}
    body = _body(model)
    if "conv3.weight" in weights and "conv1.6.weight" in body.state_dict():
        weights = {_in_deep_stem(name): value for name, value in weights.items()}
    _load(body, weights, str(path))


def fetch_backbone(model: nn.Module) -> None:
    """Load the weights that timm publishes into `model.backbone`.

    Raises ValueError for a backbone that is not from timm, OSError if the weights cannot be had.
    """
    backbone = model.backbone
    if not isinstance(backbone, TimmBackbone):
        raise ValueError("--pretrained: there are no published weights for this model's backbone")
    try:
        weights = backbone.fetch_weights()
    except Exception as error:  # whatever the network or the cache leads timm into
        raise OSError(
            f"--pretrained: the weights of {backbone.name} could not be fetched ({error}); give a file of them "
            "with --weights"
        ) from error
    _load(backbone.body, weights, f"timm's {backbone.name}")


_DEEP_STEM = {
    "conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.3", "bn2": "conv1.4", "conv3": "conv1.6", "bn3": "bn1",
}  # fmt: skip
"""What timm calls the parts of a stem of three convolutions, by the numbers that other files give them."""


def _in_deep_stem(name: str) -> str:
    part, dot, rest = name.partition(".")
    return _DEEP_STEM.get(part, part) + dot + rest


def _body(model: nn.Module) -> nn.Module:
    """The part of the backbone that others know by the same names."""
    backbone: nn.Module = model.backbone  # type: ignore[assignment]
    return backbone.body if isinstance(backbone, TimmBackbone) else backbone


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} do not exist")
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # either reader raises whatever the damage leads it into
        raise ValueError(f"weights {path} cannot be read: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {path} must hold tensors by name")
    for prefix in ("module.", "backbone.", "body."):
        inside = {
            name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
        }
        state = inside or state
    weights: dict[str, Tensor] = state
    return weights


def _load(body: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    own = body.state_dict()
    # Files from before torch 0.4.1 lack these counters, which nothing reads.
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    weights = {**counters, **weights}
    misfits = {
        "missing": own.keys() - weights.keys(),
        "unknown": weights.keys() - own.keys(),
        "of another shape": [
            f"{name} {list(weights[name].shape)}, expected {list(own[name].shape)}"
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        ],
    }
    if any(misfits.values()):
        told = "; ".join(f"{kind}: {_some(names)}" for kind, names in misfits.items() if names)
        raise ValueError(f"the weights of {source} do not fit the backbone: {told}")
    body.load_state_dict(weights)


def _some(names: Iterable[str], count: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
