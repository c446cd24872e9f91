"""Reading a dataset through: how many images and pixels of each class it has, and what is wrong with its files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pixcontrast_ext.trainer.config import DataConfig
from pixcontrast_ext.trainer.data import IGNORE, Sample, dataset_spec
from pixcontrast_ext.trainer.datasets.labelled import UnpairedFilesError


@dataclass(frozen=True)
class Census:
    """What a split holds."""

    images: int
    """Images that could be read, with their labels."""
    pixels: dict[str, int]
    """Pixels of each class."""
    ignored: int
    """Pixels of no class."""
    problems: list[str]
    """A line for each file or pair of files that is not as it should be."""


def take_census(config: DataConfig, split: str) -> Census:
    """Read every image and label of a split, past those that cannot be read, with a progress bar.

    Raises ValueError for a dataset or a split that there is not.
    """
    spec = dataset_spec(config.dataset)
    if split not in spec.splits:
        raise ValueError(f"--split is {split!r}, must be one of {', '.join(spec.splits)}")
    try:
        dataset, problems = spec.build(config, split), []
    except UnpairedFilesError as error:
        dataset, problems = error.readable, list(error.problems)
    except (ValueError, OSError) as error:
        return Census(0, dict.fromkeys(spec.classes, 0), 0, [str(error)])
    images, pixels = 0, torch.zeros(256, dtype=torch.int64)
    loader = DataLoader(_Counts(dataset), batch_size=None, num_workers=config.workers)
    # None: only a terminal gets a bar.
    for counts, problem in tqdm(loader, desc=f"{config.dataset} {split}", unit="image", disable=None):
        if problem:
            problems.append(problem)
        else:
            images += 1
            pixels += counts
    of_class = dict(zip(spec.classes, pixels.tolist(), strict=False))
    return Census(images, of_class, int(pixels[IGNORE]), problems)


def describe(census: Census) -> str:
    """A census as a table, its problems below."""
    total = max(1, sum(census.pixels.values()) + census.ignored)
    rows = [*census.pixels.items(), ("ignored", census.ignored)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{census.images} images"]
    lines += [f"  {name:{width}}  {count:>14,}  {count / total:7.2%}" for name, count in rows]
    lines += [f"{len(census.problems)} problems"]
    lines += [f"  {problem}" for problem in census.problems]
    return "\n".join(lines)


class _Counts(Dataset[tuple[Tensor, str]]):
    """For each image, how many pixels [256] have each label, and "" or what is wrong with it."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            _, label = self.dataset[index]
        except (ValueError, OSError) as error:
            return torch.empty(0), str(error)
        return torch.bincount(label.flatten(), minlength=256), ""
