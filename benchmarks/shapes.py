"""The shapes that are timed: those of the paper's data sets, and sweeps of one size at a time.

A shape is written as its sizes, `A1024-K190000-D256-C19`; the names below stand for the usual ones.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

SizesT = TypeVar("SizesT", bound="Sizes")


@dataclass(frozen=True)
class Sizes:
    """Sizes under the letters of the contract, read from and written as `A1024-K190000-D256-C19`."""

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return "-".join(f"{letter}{size}" for letter, size in values.items() if size)

    @classmethod
    def parse(cls: type[SizesT], text: str) -> SizesT:
        """Raises ValueError if `text` is not made of this class's letters."""
        found = {}
        for part in text.split("-"):
            match = re.fullmatch(r"([A-Z])(\d+)", part)
            if not match or match[1] not in {field.name for field in fields(cls)}:
                raise ValueError(f"{part!r} of shape {text!r} is no size of {cls.__name__}, such as {cls()}")
            found[match[1]] = int(match[2])
        return cls(**found)


@dataclass(frozen=True)
class Rows(Sizes):
    """A anchors [A, D] and K keys [K, D] of C classes. Without keys: in-batch contrast, anchors with anchors."""

    A: int = 1024
    K: int = 0
    D: int = 256
    C: int = 19


@dataclass(frozen=True)
class Maps(Sizes):
    """Embedding maps [B, D, H, W] of C classes, for A anchors, with a bank of K keys where there is one."""

    B: int = 8
    D: int = 256
    H: int = 128
    W: int = 256
    C: int = 19
    A: int = 1024
    K: int = 0


@dataclass(frozen=True)
class Images(Sizes):
    """Batches of B images of H x W pixels and C classes, for A anchors of width D, with a bank of K keys.

    N is the width of the HRNet that they train; without it, it is the device's own network.
    """

    B: int = 8
    H: int = 512
    W: int = 1024
    C: int = 19
    A: int = 1024
    D: int = 256
    K: int = 190_000
    N: int = 0


# The authors' bank of Cityscapes holds 10,000 rows a class, half of that in their smaller setting; their setting with
# memory takes about one anchor per image and class. The other banks hold 2,000 rows a class.
ROWS = {
    "quick": Rows(K=19_000),
    "cityscapes": Rows(K=190_000),
    "cityscapes-95k": Rows(K=95_000),
    "cityscapes-one-view": Rows(A=100, K=190_000),
    "pascal-context": Rows(K=118_000, C=59),
    "coco-stuff": Rows(K=342_000, C=171),
    "camvid": Rows(K=22_000, C=11),
    "in-batch": Rows(),
    "in-batch-4096": Rows(A=4096),
    "small": Rows(A=64, K=950),
}
MAPS = {
    "quick": Maps(H=64, W=128),
    "cityscapes": Maps(),
    "pascal-context": Maps(C=59),
    "coco-stuff": Maps(C=171),
    "camvid": Maps(C=11),
}
BANKS = {name: ROWS[name].K for name in MAPS}
STEPS = {name: replace(sizes, K=BANKS[name]) for name, sizes in MAPS.items()}
# The HRNets have the crop of the authors' setting for CamVid, and as many images as two cores step through in seconds.
IMAGES = {
    "camvid-half": Images(H=180, W=240, C=11, K=ROWS["camvid"].K),
    "camvid-half-512": Images(H=180, W=240, C=11, A=512, K=ROWS["camvid"].K),
    "hrnet-w18": Images(B=2, H=360, W=480, C=11, A=512, K=ROWS["camvid"].K, N=18),
    "hrnet-w48": Images(B=2, H=360, W=480, C=11, A=512, K=ROWS["camvid"].K, N=48),
    "cityscapes": Images(),
}


def sweeps(device: str) -> dict[str, Rows]:
    """One size varied at a time around a shape that fills the device; named `sweep-A-256` and so on."""
    centre = Rows(K=19_000) if device == "cpu" else Rows(K=95_000)
    varied = {
        "A": (256, 1024, 4096, 16_384),
        "K": (10_000, 30_000, 100_000, 300_000, 1_000_000),
        "D": (64, 128, 256, 512),
    }
    return {
        f"sweep-{letter}-{size}": replace(centre, **{letter: size})
        for letter, sizes in varied.items()
        for size in sizes
    }


def select(known: Mapping[str, SizesT], kind: type[SizesT], pattern: str) -> dict[str, SizesT]:
    """The shapes that a pattern names (`city*`), or the one of this kind that it spells out (`A1024-K500`)."""
    if names := fnmatch.filter(known, pattern):
        return {name: known[name] for name in names}
    try:
        sizes = kind.parse(pattern)
    except ValueError:
        return {}
    return {str(sizes): sizes}
