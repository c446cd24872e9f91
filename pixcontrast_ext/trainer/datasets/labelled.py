"""What datasets of image files with a label file each share: how files are paired, read, resized and mapped.

A dataset of that kind says which files belong together and what the values in its label files mean. Whatever is
wrong with a file is an error that names the file and what was expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from pixcontrast_ext.trainer.datasets import Sample

Pair = tuple[Path, Path]
"""An image file and its label file."""

_OUTSIDE = -1


@dataclass(frozen=True)
class Resize:
    """What images are resized to: one size, or their own times a factor, or with a shorter side of some length."""

    size: tuple[int, int] | None = None
    """Height and width."""
    scale: float = 1.0
    short_side: int | None = None
    labels: bool = True
    """Whether labels are resized with their images; otherwise they keep their size, for scores."""

    def extent(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image gets."""
        if self.size is not None:
            return self.size
        scale = self.scale if self.short_side is None else self.short_side / min(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


class UnpairedFilesError(ValueError):
    """Files of a dataset that do not belong together. The message tells the first problem and how many there are.

    Attributes:
        problems: a line for each.
        readable: the dataset of those files that do.
    """

    def __init__(self, problems: list[str], readable: LabelledFiles) -> None:
        more = f" ({len(problems)} such problems: check-data lists them)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems, self.readable = problems, readable


class LabelledFiles(Dataset[Sample]):
    """Pairs of an image file and a label file with one channel.

    Args:
        pairs: the files, in the order of the dataset.
        problems: what was found wrong while they were paired.
        table: class of each value that a label file may hold, from `class_table`.
        resize: what to resize images to, and labels to the nearest pixel.

    Raises:
        UnpairedFilesError: there are problems.
        ValueError: from `dataset[index]`, naming the file: one that cannot be read; a label of another size than
            its image, of more than one channel, or with a value outside the table.
    """

    def __init__(
        self,
        pairs: list[Pair],
        problems: list[str],
        table: np.ndarray,
        resize: Resize | None = None,
    ) -> None:
        self.pairs, self.table, self.resize = pairs, table, resize or Resize()
        if problems:
            raise UnpairedFilesError(problems, self)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image_path, label_path = self.pairs[index]
        image = as_rgb(read_image(image_path), image_path)
        values = self._read_label(label_path)
        if values.shape != (image.height, image.width):
            sizes = f"{values.shape[1]}x{values.shape[0]}", f"{image.width}x{image.height}"
            raise ValueError(f"label {label_path} is {sizes[0]}, its image {sizes[1]}")
        classes = self._classes(values, label_path)
        height, width = self.resize.extent(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            if self.resize.labels:
                resized = Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST)
                classes = np.array(resized)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(classes)

    def _read_label(self, path: Path) -> np.ndarray:
        """The values of a label file, [H, W]. Raises ValueError that names one that cannot be read."""
        label = read_image(path)
        if label.mode not in ("L", "P", "I", "I;16"):
            raise ValueError(f"label {path} must have one channel of class indices, its mode is {label.mode}")
        return np.array(label)

    def _classes(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Values of a label file [H, W] as classes [H, W] uint8."""
        inside = (values >= 0) & (values < len(self.table))
        classes = np.where(inside, self.table[np.where(inside, values, 0)], _OUTSIDE)
        if (classes == _OUTSIDE).any():
            wrong = np.unique(values[classes == _OUTSIDE]).tolist()
            raise ValueError(f"label {path} has values {wrong[:5]} outside {_known(self.table)}")
        return classes.astype(np.uint8)


def class_table(classes: Mapping[int, int]) -> np.ndarray:
    """Table [256] int16 of the class of each value; values that are not given are outside of it."""
    table = np.full(256, _OUTSIDE, np.int16)
    for value, label in classes.items():
        table[value] = label
    return table


def pair_files(
    images: dict[str, Path],
    labels: dict[str, Path],
    image_of: Callable[[str], Path],
    label_of: Callable[[str], Path],
) -> tuple[list[Pair], list[str]]:
    """Pairs of the names that both have, in order, and a problem for each that one of them has.

    `image_of` and `label_of` tell where the file of a name was expected.
    """
    problems = []
    for name in sorted(images.keys() ^ labels.keys()):
        if name in images:
            problems.append(f"image {images[name]} has no label {label_of(name)}")
        else:
            problems.append(f"label {labels[name]} has no image {image_of(name)}")
    return [(images[name], labels[name]) for name in sorted(images.keys() & labels.keys())], problems


def pair_list(
    names: Path, images: Path, image_suffix: str, labels: Path, label_suffix: str
) -> tuple[list[Pair], list[str]]:
    """Pairs of the files that a list names, in its order, and a problem for each name that lacks one.

    Raises FileNotFoundError or ValueError, naming the list, if it is missing or empty.
    """
    pairs, problems = [], []
    for name in _names(names):
        pair = images / f"{name}{image_suffix}", labels / f"{name}{label_suffix}"
        missing = [str(path) for path in pair if not path.is_file()]
        if missing:
            problems.append(f"list {names} has {name}, but there is no {' and no '.join(missing)}")
        else:
            pairs.append(pair)
    return pairs, problems


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"list {path} does not exist, expected a name of an image per line")
    names = path.read_text().split()
    if not names:
        raise ValueError(f"list {path} is empty, expected a name of an image per line")
    return names


def files_by_stem(folder: Path, suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Path]:
    """Files of a folder by their name without suffix. Two of one name are added to `problems`.

    Raises FileNotFoundError, naming the folder, if it is missing or holds none.
    """
    require_folder(folder)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes:
            if path.stem in found:
                problems.append(f"{found[path.stem]} and {path} have the same name")
            found[path.stem] = path
    if not found:
        raise FileNotFoundError(f"folder {folder} holds no {' or '.join(suffixes)} files")
    return found


def read_image(path: Path) -> Image.Image:
    """An image file, decoded. Raises ValueError that names one that cannot be read."""
    try:
        image = Image.open(path)
        image.load()
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # as Pillow's readers do
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return image


def as_rgb(image: Image.Image, path: Path) -> Image.Image:
    """An image in the colours that the networks take. Raises ValueError for a single channel of more than 8 bits."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{path} has 16 or 32 bits a pixel in one channel (mode {image.mode}), and images have 8: convert it"
        )
    return image.convert("RGB")


def require_folder(folder: Path) -> None:
    """Raises FileNotFoundError if there is no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")


def require_root(dataset: str, root: Path | None) -> Path:
    """The folder of a dataset. Raises ValueError if none was given."""
    if root is None:
        raise ValueError(f"{dataset} is read from files: give its folder with --root")
    return root


def require_split(split: str, splits: tuple[str, ...]) -> None:
    """Raises ValueError if there is no such split."""
    if split not in splits:
        raise ValueError(f"split is {split!r}, must be one of {', '.join(splits)}")


def _known(table: np.ndarray) -> str:
    """The values a table has, as in "0..33, 255"."""
    values = np.flatnonzero(table != _OUTSIDE)
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
