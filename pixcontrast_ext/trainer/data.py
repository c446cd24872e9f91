"""Datasets: images with a class per pixel, their class names and colours, and the order they are trained in.

THIS IS WHERE OTHER DATA PLUG IN. A dataset yields `(image [3, H, W] uint8 RGB, label [H, W] uint8)`, a label being
a class or `IGNORE`. It is a pure function of the index: what is random happens later, on the batch, from the seed
of the step. A new dataset is a class like those in `trainer/datasets/` and an entry in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from pixcontrast_ext.trainer.config import DataConfig
from pixcontrast_ext.trainer.datasets import IGNORE, Sample
from pixcontrast_ext.trainer.datasets.camvid import CamVid
from pixcontrast_ext.trainer.datasets.cityscapes import Cityscapes
from pixcontrast_ext.trainer.datasets.coco_stuff import CocoStuff, CocoStuff10k
from pixcontrast_ext.trainer.datasets.labelled import Resize, require_split
from pixcontrast_ext.trainer.datasets.pascal_context import PascalContext
from pixcontrast_ext.trainer.datasets.synthetic import Synthetic


@dataclass(frozen=True)
class DatasetSpec:
    """What the trainer needs to know of a dataset."""

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    splits: tuple[str, ...]
    build: Callable[[DataConfig, str], Dataset[Sample]]
    """(options, split) -> dataset"""
    ids: tuple[int, ...] | None = None
    """What the dataset's own label files call each class, where that is another number."""

    def training_set(self, options: DataConfig) -> Dataset[Sample]:
        """The images to train on: of the splits one after the other, a fraction of them all.

        Raises ValueError for a split that there is not.
        """
        for split in options.train_splits:
            require_split(split, self.splits)
        if not options.train_splits:
            raise ValueError("--train-splits is empty, must be at least one")
        parts = [self.build(options, split) for split in options.train_splits]
        whole = parts[0] if len(parts) == 1 else ConcatDataset(parts)
        if options.train_fraction == 1:
            return whole
        length = len(whole)  # type: ignore[arg-type]
        kept = max(1, round(length * options.train_fraction))
        return Subset(whole, [place * length // kept for place in range(kept)])


def resize_of(config: DataConfig) -> Resize:
    """What the options say of the size of images."""
    return Resize(config.size, config.scale, config.short_side)


def _build_synthetic(config: DataConfig, split: str) -> Synthetic:
    for flag, given in (("--scale", config.scale != 1.0), ("--short-side", config.short_side is not None)):
        if given:
            raise ValueError(f"{flag} is given, but synthetic scenes are drawn at --size")
    require_split(split, Synthetic.SPLITS)
    length = config.synthetic_images[Synthetic.SPLITS.index(split)]
    return Synthetic(split, length, config.size or (96, 96), config.data_seed)


DATASETS: dict[str, DatasetSpec] = {
    "synthetic": DatasetSpec(Synthetic.CLASSES, Synthetic.COLOURS, Synthetic.SPLITS, _build_synthetic),
    "camvid": DatasetSpec(
        CamVid.CLASSES, CamVid.COLOURS, CamVid.SPLITS,
        lambda config, split: CamVid(config.root, split, resize_of(config)),
    ),
    "cityscapes": DatasetSpec(
        Cityscapes.CLASSES, Cityscapes.COLOURS, Cityscapes.SPLITS,
        lambda config, split: Cityscapes(config.root, split, resize_of(config), config.train_ids),
        Cityscapes.IDS,
    ),
    "pascal_context": DatasetSpec(
        PascalContext.CLASSES, PascalContext.COLOURS, PascalContext.SPLITS,
        lambda config, split: PascalContext(config.root, split, resize_of(config)), PascalContext.IDS,
    ),
    "pascal_context_60": DatasetSpec(
        PascalContext.CLASSES_60, PascalContext.COLOURS_60, PascalContext.SPLITS,
        lambda config, split: PascalContext(config.root, split, resize_of(config), background=True),
    ),
    "coco_stuff": DatasetSpec(
        CocoStuff.CLASSES, CocoStuff.COLOURS, CocoStuff.SPLITS,
        lambda config, split: CocoStuff(config.root, split, resize_of(config)), CocoStuff.IDS,
    ),
    "coco_stuff_10k": DatasetSpec(
        CocoStuff10k.CLASSES, CocoStuff10k.COLOURS, CocoStuff10k.SPLITS,
        lambda config, split: CocoStuff10k(config.root, split, resize_of(config)), CocoStuff10k.IDS,
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
    """Collate: images [B, 3, H, W] and labels [B, H, W].

    H and W are those of the largest; smaller ones get black and `IGNORE` at their right and bottom.
    """
    sizes = [label.shape for _, label in samples]
    height, width = (max(extents) for extents in zip(*sizes, strict=True))
    images, labels = zip(*samples, strict=True)
    margins = [(0, width - size[1], 0, height - size[0]) for size in sizes]
    return (
        torch.stack([F.pad(image, margin) for image, margin in zip(images, margins, strict=True)]),
        torch.stack(
            [F.pad(label, margin, value=IGNORE) for label, margin in zip(labels, margins, strict=True)]
        ),
    )


def stack_with_sizes(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Collate: `stack`, and height and width that each image had, [B, 2] int64."""
    return *stack(samples), torch.tensor([label.shape for _, label in samples])


def stack_by_size(samples: list[Sample]) -> list[Sample]:
    """Collate without padding: a stack for each size there is, in the order in which the sizes appear."""
    groups: dict[torch.Size, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample[1].shape, []).append(sample)
    return [stack(group) for group in groups.values()]


def to_device(batch: Sample, device: torch.device) -> Sample:
    """Images as float32 in [0, 1], labels as int64, on `device`."""
    images, labels = batch
    return images.to(device, non_blocking=True).float() / 255, labels.to(device, non_blocking=True).long()


def eval_loader(
    dataset: Dataset[Sample],
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[list[Sample]]:
    """Batches of this rank's share of a dataset: every image on exactly one rank, in order, at its own size.

    A batch is a list of stacks, one for each size in it. The workers stay for the next time it is read.
    """
    share = list(range(rank, len(dataset), world))  # type: ignore[arg-type]
    batches = [share[at : at + batch_size] for at in range(0, len(share), batch_size)]
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # what it yields is what stack_by_size makes of it
        batch_sampler=batches,
        collate_fn=stack_by_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )


__all__ = [
    "DATASETS",
    "IGNORE",
    "CamVid",
    "Cityscapes",
    "CocoStuff",
    "CocoStuff10k",
    "DatasetSpec",
    "PascalContext",
    "Sample",
    "StepBatches",
    "Synthetic",
    "dataset_spec",
    "eval_loader",
    "resize_of",
    "stack",
    "stack_by_size",
    "stack_with_sizes",
    "to_device",
]
