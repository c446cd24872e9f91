"""Datasets: images with a class per pixel, their class names and colours, and the order they are trained in.

A dataset yields `(image [3, H, W] uint8 RGB, label [H, W] uint8)`, a label being a class or `IGNORE`. It
is a pure function of the index: what is random happens later, on the batch, from the seed of the step.
A new dataset is a class like `CamVid` and a line in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixcontrast_ext.trainer.config import DataConfig

IGNORE = 255
"""Label of pixels that belong to no class."""

Sample = tuple[Tensor, Tensor]


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
        _require_split(split, self.SPLITS)
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
        return colour[:, None, None] + 14 * stripes

    def _cover(self, mask: np.ndarray, paint: np.ndarray, name: str) -> None:
        self.image = np.where(mask, paint, self.image)
        self.label[mask] = Synthetic.CLASSES.index(name)

    def _river(self) -> np.ndarray:
        rng = self.rng
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        y, x = self.y - self.height * rng.uniform(0.3, 0.7), self.x - self.width * rng.uniform(0.3, 0.7)
        along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        return abs(across - 5 * np.sin(along * 0.08 + phase)) < rng.uniform(8, 11)

    def _pond(self, apart_from: np.ndarray) -> np.ndarray:
        rng = self.rng
        for _ in range(_TRIES):
            radius, phase = rng.uniform(13, 18), rng.uniform(0, 2 * np.pi)
            y, x = self._spot(radius + 3)
            angle = np.arctan2(self.y - y, self.x - x)
            distance = np.hypot(self.y - y, self.x - x) / (1 + 0.12 * np.sin(3 * angle + phase))
            if not (apart_from & (distance < radius + 4)).any():
                return distance < radius
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


class CamVid(Dataset[Sample]):
    """CamVid with 11 classes, in the layout of the SegNet tutorial.

    `{root}/{split}/NAME.{png,jpg,jpeg}` are the images, `{root}/{split}annot/NAME.png` their labels: 0-10 a
    class, 11 void, which becomes `IGNORE`.

    Args:
        root: the dataset's folder.
        split: "train", "val" or "test".
        size: height and width to resize to.
        scale: resize by this factor instead.

    Raises, naming the file or folder:
        ValueError: no root; an image without label or the reverse; two images of one name; a label of another
            size than its image, of more than one channel, or with a value above 11.
        FileNotFoundError: a missing or empty folder.
    """

    CLASSES = (
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
        "bicyclist",
    )  # fmt: skip
    COLOURS = (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )  # fmt: skip
    SPLITS = ("train", "val", "test")
    VOID = 11

    def __init__(
        self, root: Path | None, split: str, size: tuple[int, int] | None = None, scale: float = 1.0
    ) -> None:
        _require_split(split, self.SPLITS)
        if root is None:
            raise ValueError("camvid is read from files: give its folder with --root")
        images = _files_by_stem(root / split, (".png", ".jpg", ".jpeg"))
        labels = _files_by_stem(root / f"{split}annot", (".png",))
        for stem in sorted(images.keys() ^ labels.keys()):
            if stem in images:
                raise ValueError(f"image {images[stem]} has no label {root / f'{split}annot' / stem}.png")
            raise ValueError(f"label {labels[stem]} has no image {root / split / stem}.png or .jpg")
        self.pairs = [(images[stem], labels[stem]) for stem in sorted(images)]
        self.size, self.scale = size, scale

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image_path, label_path = self.pairs[index]
        image = _open(image_path).convert("RGB")
        label = _open(label_path)
        if label.mode not in ("L", "P", "I"):
            raise ValueError(
                f"label {label_path} must have one channel of class indices, its mode is {label.mode}"
            )
        if label.size != image.size:
            sizes = ["x".join(map(str, each.size)) for each in (label, image)]
            raise ValueError(f"label {label_path} is {sizes[0]}, its image {sizes[1]}")
        width, height = image.size
        if self.size is not None:
            height, width = self.size
        elif self.scale != 1.0:
            height, width = max(1, round(height * self.scale)), max(1, round(width * self.scale))
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            label = label.resize((width, height), Image.Resampling.NEAREST)
        classes = np.array(label)
        if classes.max() > self.VOID or classes.min() < 0:
            wrong = sorted(int(value) for value in np.unique(classes) if not 0 <= value <= self.VOID)
            raise ValueError(f"label {label_path} has values {wrong[:5]} outside 0..{self.VOID}")
        classes = np.where(classes == self.VOID, IGNORE, classes).astype(np.uint8)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(classes)


@dataclass(frozen=True)
class DatasetSpec:
    """What the trainer needs to know of a dataset."""

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    splits: tuple[str, ...]
    build: Callable[[DataConfig, str], Dataset[Sample]]
    """(options, split) -> dataset"""


def _build_synthetic(config: DataConfig, split: str) -> Synthetic:
    if config.scale != 1.0:
        raise ValueError(f"--scale is {config.scale}, but synthetic scenes are drawn at --size")
    _require_split(split, Synthetic.SPLITS)
    length = config.synthetic_images[Synthetic.SPLITS.index(split)]
    return Synthetic(split, length, config.size or (96, 96), config.data_seed)


DATASETS: dict[str, DatasetSpec] = {
    "synthetic": DatasetSpec(Synthetic.CLASSES, Synthetic.COLOURS, Synthetic.SPLITS, _build_synthetic),
    "camvid": DatasetSpec(
        CamVid.CLASSES, CamVid.COLOURS, CamVid.SPLITS,
        lambda config, split: CamVid(config.root, split, config.size, config.scale),
    ),
}  # fmt: skip


def dataset_spec(name: str) -> DatasetSpec:
    """The dataset of that name. Raises ValueError that lists the known ones."""
    if name not in DATASETS:
        raise ValueError(f"--dataset is {name!r}, must be one of {', '.join(DATASETS)}")
    return DATASETS[name]


class StepBatches:
    """Batch sampler: which images each rank takes at each step, from `start` on.

    Every epoch is a permutation drawn from (seed, epoch); what does not fill a batch at its end is left out.
    The images of step s are a function of (seed, s), so to resume is to start there, and the ranks' shares
    together are the batch that one process alone would take.

    Raises ValueError if a batch cannot be split evenly over the ranks or is larger than the dataset.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        steps: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"--batch-size is {batch_size}, must be a multiple of the {world} ranks")
        if batch_size > length:
            raise ValueError(f"--batch-size is {batch_size}, but there are only {length} training images")
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.start, self.rank, self.world = start, rank, world

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.length // self.batch_size
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(self.start, self.steps):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(self.length), epoch
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield batch[self.rank :: self.world].tolist()


def stack(samples: list[Sample]) -> Sample:
    """Collate: images [B, 3, H, W] and labels [B, H, W]. Raises ValueError if they differ in size."""
    sizes = {tuple(label.shape) for _, label in samples}
    if len(sizes) > 1:
        raise ValueError(f"images of one batch differ in size: {sorted(sizes)}; give --size")
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)


def to_device(batch: Sample, device: torch.device) -> Sample:
    """Images as float32 in [0, 1], labels as int64, on `device`."""
    images, labels = batch
    return images.to(device, non_blocking=True).float() / 255, labels.to(device, non_blocking=True).long()


def eval_loader(
    dataset: Dataset[Sample], batch_size: int, *, rank: int = 0, world: int = 1
) -> DataLoader[Sample]:
    """Loader over this rank's share of a dataset: every image on exactly one rank, in order."""
    share = list(range(rank, len(dataset), world))  # type: ignore[arg-type]
    batches = [share[at : at + batch_size] for at in range(0, len(share), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=stack)


def _require_split(split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise ValueError(f"split is {split!r}, must be one of {', '.join(splits)}")


def _files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes:
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path} have the same name")
            found[path.stem] = path
    if not found:
        raise FileNotFoundError(f"folder {folder} holds no {' or '.join(suffixes)} files")
    return found


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return image
