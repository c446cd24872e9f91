"""What the public functions check before an op does, in their users' words."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_MOST = 2**63 - 2  # of a count, to which a kernel may add 1


def refuse_recomputation(why: str) -> None:
    """Raise RuntimeError if a backward is running, in which only activation checkpointing calls a loss."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"PixelContrastLoss is recomputed within a backward, as activation checkpointing does, and {why}: its "
            "gradient would be wrong. Keep the loss outside of the checkpointed function."
        )


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds integers, of any size; bool is none."""
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def to_int32(name: str, labels: Tensor) -> Tensor:
    """Labels as int32. What does not fit raises on the CPU, and is no class (-1) elsewhere."""
    if labels.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        return labels.int()
    labels = labels.long()
    too_large = labels > torch.iinfo(torch.int32).max
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and too_large.any():
        raise ValueError(f"{name} must fit int32, got {int(labels.max())}")
    return torch.where(too_large, -1, labels.clamp(min=-1)).int()


def check_place(name: str, tensor: Tensor, shape: tuple[int, ...] | None, device: torch.device) -> None:
    """Raise ValueError unless a tensor has this shape (None: any) and is on this device."""
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_labels(
    name: str, labels: Tensor | None, shape: tuple[int, ...] | None, device: torch.device
) -> None:
    """Raise TypeError or ValueError unless `labels` are integers of this shape (None: of any) on this device."""
    if not isinstance(labels, Tensor) or not is_integer(labels):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}")
    check_place(name, labels, shape, device)


def check_weights(name: str, weights: Tensor, shape: tuple[int, ...] | None, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `weights` are floating point, of this shape (None: of any), on this device.

    On the CPU they are also looked at: none may be negative, infinite or NaN.
    """
    if not isinstance(weights, Tensor) or not weights.dtype.is_floating_point:
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    check_place(name, weights, shape, device)
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~((weights >= 0) & (weights < torch.inf))
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            raise ValueError(f"{name}{place} is {float(weights[tuple(place)])}, expected 0 <= weight < inf")


def check_embeddings(embeddings: Tensor, name: str = "embeddings") -> None:
    """Raise TypeError or ValueError unless this is a [B, D, H, W] floating-point map with D >= 1."""
    if not isinstance(embeddings, Tensor) or not embeddings.dtype.is_floating_point:
        got = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if embeddings.dim() != 4 or embeddings.shape[1] < 1:
        raise ValueError(f"{name} must have shape [B, D, H, W] with D >= 1, got {tuple(embeddings.shape)}")
    if embeddings.shape[2] * embeddings.shape[3] >= 2**32:
        raise ValueError(f"{name} may have fewer than 2**32 pixels an image, got {tuple(embeddings.shape)}")


def check_share(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless `value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def check_at_least(minimum: int, *, at_most: int = _MOST, **values: int | None) -> None:
    """Raise TypeError or ValueError for the first value that is not an integer from `minimum` to `at_most`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if isinstance(value, int) and value > at_most:
            raise ValueError(f"{name} must be at most {at_most}, got {value}")


def check_weight(value: float) -> None:
    """Raise TypeError or ValueError unless this may be the factor of a loss."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        what = "weight, the factor of the contrast, must be a number (class_weights are those of classes)"
        raise TypeError(f"{what}, got {type(value).__name__}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"weight must be finite and not negative, got {value!r}")


def check_ignore_index(value: int) -> None:
    """Raise TypeError or ValueError unless this may be a label: an integer of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index must be an int, got {value!r}")
    if not -_MOST <= value <= _MOST:
        raise ValueError(f"ignore_index must be from {-_MOST} to {_MOST}, got {value}")


def warn_of_class_255(ignore_index: int, num_classes: int) -> None:
    """Warn if the ignored label is 255, which few have chosen, and 255 is a class."""
    if ignore_index == 255 < num_classes:
        warnings.warn(
            f"class 255 of {num_classes} is left out, since ignore_index is 255: give one that is no class, such as -1",
            stacklevel=3,
        )
