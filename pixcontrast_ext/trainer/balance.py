"""Class weights of the cross-entropy: of a file, or counted from the training labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from pixcontrast_ext.trainer.datasets import IGNORE, Sample
from pixcontrast_ext.trainer.files import write_json

_LARGEST = torch.finfo(torch.float32).max
WEIGHTS = Path(__file__).parent / "class_weights"
"""The folder of files that `--class-weights` takes by their name."""


def read_weights(path: Path, classes: Sequence[str]) -> Tensor:
    """Weights [C] float32 from a JSON file, an object with a number for each class.

    Keys that begin with an underscore are comments.

    Raises:
        FileNotFoundError: there is no such file, nor one of the package by that name.
        ValueError: it does not give each class a finite number that is not negative, or none that is above 0; names the
            file.
    """
    if not path.is_file():
        named = {file.stem: file for file in sorted(WEIGHTS.glob("*.json"))}
        if str(path) not in named:
            raise FileNotFoundError(
                f"--class-weights is {str(path)!r}: no such file, nor off, auto or one of {', '.join(named)}"
            )
        path = named[str(path)]
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} must hold an object of class names and weights, found {type(found).__name__}"
        )
    weights = {name: value for name, value in found.items() if not name.startswith("_")}
    if set(weights) != set(classes):
        missing, unknown = sorted(set(classes) - set(weights)), sorted(set(weights) - set(classes))
        raise ValueError(
            f"{path} lacks {', '.join(missing) or 'nothing'} and has {', '.join(unknown) or 'nothing'} too much"
        )
    for name, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
            raise ValueError(
                f"{path} gives {name} the weight {value!r}, must be finite in float32 and not negative"
            )
    if not any(weights.values()):
        raise ValueError(f"{path} gives every class the weight 0, must be above 0 for at least one")
    return torch.tensor([float(weights[name]) for name in classes])


def count_classes(
    dataset: Dataset[Sample], num_classes: int, workers: int = 0, rank: int = 0, world: int = 1
) -> Tensor:
    """Pixels of each class, and labelled pixels of the images that show it, [2, C] float64.

    Reads every image of the dataset, or one in `world` of them, a rank's share.
    """
    pixels, shown = torch.zeros(2, num_classes, dtype=torch.float64)
    length = len(dataset)  # type: ignore[arg-type]
    share = Subset(_Counts(dataset, num_classes), range(rank, length, world))
    loader = DataLoader(share, batch_size=None, num_workers=workers)
    hidden = None if rank == 0 else True  # None: only a terminal gets a bar
    for counts in tqdm(loader, desc="counting classes", unit="image", leave=False, disable=hidden):
        pixels += counts
        shown += torch.where(counts > 0, counts.sum(), 0)
    return torch.stack([pixels, shown])


def median_frequency(
    pixels: Tensor,  # [C]
    shown: Tensor,  # [C]
) -> Tensor:
    """Weights [C] float32 by median frequency balancing (Eigen and Fergus, arXiv 1411.4734, section 6.3.2).

    A class's frequency is its share of the labelled pixels of the images that show it; its weight is the median of all
    classes' frequencies over its own. A class that no image shows weighs 1. The counts are those of `count_classes`.
    """
    num_classes = len(pixels)
    frequency = pixels / shown
    occurs = pixels > 0
    if not occurs.any():
        return torch.ones(num_classes)
    # The mean of the two in the middle if there is an even number, as numpy has it.
    median = torch.quantile(frequency[occurs], 0.5)
    return torch.where(occurs, median / frequency, 1).float()


def save_weights(weights: Tensor, classes: Sequence[str], path: Path) -> None:
    """Write weights as `read_weights` reads them."""
    write_json(path, dict(zip(classes, weights.tolist(), strict=True)))


class _Counts(Dataset[Tensor]):
    """For each image, how many pixels [C] of each class."""

    def __init__(self, dataset: Dataset[Sample], num_classes: int) -> None:
        self.dataset, self.num_classes = dataset, num_classes

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        _, label = self.dataset[index]
        return torch.bincount(label[label != IGNORE].flatten(), minlength=self.num_classes)[
            : self.num_classes
        ].double()
