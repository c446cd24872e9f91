"""Generated scenes: a dataset that needs no files, for the demo and the tests."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from pixcontrast_ext.trainer.datasets import IGNORE, Sample
from pixcontrast_ext.trainer.datasets.labelled import require_split


class Synthetic(Dataset[Sample]):
    """Scenes drawn from a seed, whose classes a local view confuses.

    Water is a `river` if it crosses the image and a `pond` if it is closed. Objects share their paint, so
    that `disc` and `ring`, `plate` and `frame` look the same at their outer edge, and a small disc is a
    `boat` on water and a `stone` on land. Colours of land, water and objects change from scene to scene, all
    is noisy, and half of the scenes have a patch of noise without a label.

    Args:
        split: "train" or "val"; their scenes come from different random streams.
        length: how many scenes there are.
        size: height and width to draw at; 32 or more each.
        seed: scene `index` is a function of (seed, split, index, size).
    """

    CLASSES = ("land", "river", "pond", "disc", "ring", "plate", "frame", "stone", "boat")
    COLOURS = (
        (140, 170, 110), (35, 80, 170), (90, 190, 240), (220, 50, 50), (250, 160, 60),
        (130, 60, 160), (220, 140, 220), (90, 90, 90), (250, 230, 90),
    )  # fmt: skip
    SPLITS = ("train", "val")

    def __init__(self, split: str, length: int, size: tuple[int, int] = (96, 96), seed: int = 0) -> None:
        require_split(split, self.SPLITS)
        if length < 1:
            raise ValueError(f"a synthetic dataset needs at least 1 scene, got {length}")
        if min(size) < 32:
            raise ValueError(f"synthetic scenes need at least 32 by 32 pixels, got {size[0]} by {size[1]}")
        self.length, self.size, self.seed = length, size, seed
        self.stream = self.SPLITS.index(split)
        self.drawn: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        if index not in self.drawn:
            rng = np.random.default_rng((self.seed, self.stream, index))
            image, label = _Scene(rng, *self.size).finish()
            self.drawn[index] = torch.from_numpy(image), torch.from_numpy(label)
        return self.drawn[index]


_TRIES = 12
"""Places tried for an object before it is left out."""


class _Scene:
    """One synthetic scene while it is being painted. Lengths are in units of 1/96 of the shorter side."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng = rng
        self.unit = min(height, width) / 96
        self.y, self.x = np.mgrid[:height, :width].astype(np.float32) / np.float32(self.unit)
        self.height, self.width = height / self.unit, width / self.unit
        self.label = np.zeros((height, width), np.uint8)
        self.taken = np.zeros((height, width), bool)
        self.image = self._paint(rng.uniform((70, 100, 50), (150, 180, 110)))

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Image [3, H, W] and label [H, W], both uint8."""
        rng = self.rng
        water = self._paint(rng.uniform((40, 70, 120), (110, 140, 200)))
        river = self._river()
        self._cover(river, water, "river")
        self._cover(self._pond(apart_from=river), water, "pond")

        paint = self._paint(rng.uniform(40, 230, 3))
        on_water = self.label > 0
        for _ in range(2):
            self._place("boat", paint, radius=rng.uniform(4, 5.5), within=on_water)
        self.taken |= on_water
        for name in rng.permutation(["disc", "ring", "plate", "frame", "stone"] * 2):
            radius = rng.uniform(4, 5.5) if name == "stone" else rng.uniform(10, 14)
            self._place(str(name), paint, radius, within=~on_water)

        if rng.random() < 0.5:
            top, left = rng.uniform(0, 0.8, 2) * (self.height, self.width)
            patch = (abs(self.y - top - 6) < 6) & (abs(self.x - left - 8) < 8)
            self.image = np.where(patch, rng.uniform(0, 255, self.image.shape), self.image)
            self.label[patch] = IGNORE
        noisy = self.image + rng.normal(0, 14, self.image.shape)
        return np.clip(noisy, 0, 255).astype(np.uint8), self.label

    def _paint(self, colour: np.ndarray) -> np.ndarray:
        """A colour with slow stripes of random direction, [3, H, W]."""
        angle, phase = self.rng.uniform(0, 2 * np.pi, 2)
        stripes = np.sin((np.cos(angle) * self.x + np.sin(angle) * self.y) * 0.5 + phase)
        striped: np.ndarray = colour[:, None, None] + 14 * stripes
        return striped

    def _cover(self, mask: np.ndarray, paint: np.ndarray, name: str) -> None:
        self.image = np.where(mask, paint, self.image)
        self.label[mask] = Synthetic.CLASSES.index(name)

    def _river(self) -> np.ndarray:
        rng = self.rng
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        y, x = self.y - self.height * rng.uniform(0.3, 0.7), self.x - self.width * rng.uniform(0.3, 0.7)
        along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        band: np.ndarray = abs(across - 5 * np.sin(along * 0.08 + phase)) < rng.uniform(8, 11)
        return band

    def _pond(self, apart_from: np.ndarray) -> np.ndarray:
        rng = self.rng
        for _ in range(_TRIES):
            radius, phase = rng.uniform(13, 18), rng.uniform(0, 2 * np.pi)
            y, x = self._spot(radius + 3)
            angle = np.arctan2(self.y - y, self.x - x)
            distance = np.hypot(self.y - y, self.x - x) / (1 + 0.12 * np.sin(3 * angle + phase))
            if not (apart_from & (distance < radius + 4)).any():
                blob: np.ndarray = distance < radius
                return blob
        return np.zeros_like(apart_from)

    def _place(self, name: str, paint: np.ndarray, radius: float, within: np.ndarray) -> None:
        """Paint one object where it and a margin lie `within` and on nothing taken; maybe nowhere."""
        turn = self.rng.uniform(0, np.pi / 2)
        for _ in range(_TRIES):
            y, x = self._spot(radius)
            dy, dx = self.y - y, self.x - x
            distance = np.hypot(dy, dx)
            blocked = (self.taken | ~within) & (distance < radius + 1.5)
            if blocked.any():
                continue
            if name in ("plate", "frame"):
                u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
                distance = np.maximum(abs(u), abs(v)) * np.sqrt(2, dtype=np.float32)
            hole = 0.55 * radius if name in ("ring", "frame") else 0
            self._cover((distance < radius) & (distance >= hole), paint, name)
            self.taken |= distance < radius + 1.5
            return

    def _spot(self, margin: float) -> tuple[float, float]:
        margin = min(margin, self.height / 2, self.width / 2)
        return self.rng.uniform(margin, self.height - margin), self.rng.uniform(margin, self.width - margin)
