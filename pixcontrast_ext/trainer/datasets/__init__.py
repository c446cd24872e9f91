"""The datasets of the registry in `trainer/data.py`, a file for each, and what those read from files share."""

from __future__ import annotations

from torch import Tensor

IGNORE = 255
"""Label of pixels that belong to no class."""

Sample = tuple[Tensor, Tensor]
"""Image [3, H, W] uint8 RGB and label [H, W] uint8, a label being a class or `IGNORE`."""
