"""CamVid, road scenes in 11 classes, in the layout of the SegNet tutorial."""

from __future__ import annotations

from pathlib import Path

from pixcontrast_ext.trainer.datasets import IGNORE
from pixcontrast_ext.trainer.datasets.labelled import (
    LabelledFiles,
    Resize,
    class_table,
    files_by_stem,
    pair_files,
    require_root,
    require_split,
)


class CamVid(LabelledFiles):
    """CamVid: 367, 101 and 233 images of 480x360 in the layout of the SegNet tutorial.

    `{root}/{split}/NAME.{png,jpg,jpeg}` are the images, `{root}/{split}annot/NAME.png` their labels: 0-10 a
    class, 11 void, which becomes `IGNORE`.

    Args:
        root: the dataset's folder.
        split: "train", "val" or "test".
        resize: what to resize images to.

    Raises, besides the errors of `LabelledFiles`:
        ValueError: no root, or a split that there is not.
        FileNotFoundError: a missing or empty folder, by its name.
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

    def __init__(self, root: Path | None, split: str, resize: Resize | None = None) -> None:
        require_split(split, self.SPLITS)
        root = require_root("camvid", root)
        images_folder, labels_folder = root / split, root / f"{split}annot"
        doubled: list[str] = []
        pairs, unpaired = pair_files(
            files_by_stem(images_folder, (".png", ".jpg", ".jpeg"), doubled),
            files_by_stem(labels_folder, (".png",), doubled),
            lambda name: images_folder / f"{name}.png",
            lambda name: labels_folder / f"{name}.png",
        )
        table = class_table({**{value: value for value in range(self.VOID)}, self.VOID: IGNORE})
        super().__init__(pairs, doubled + unpaired, table, resize)
