"""Cityscapes, street scenes in 19 classes, in the layout of its fine annotations."""

from __future__ import annotations

from pathlib import Path

from pixcontrast_ext.trainer.datasets import IGNORE
from pixcontrast_ext.trainer.datasets.labelled import (
    LabelledFiles,
    Resize,
    class_table,
    pair_files,
    require_folder,
    require_root,
    require_split,
)


class Cityscapes(LabelledFiles):
    """Cityscapes: 2975 and 500 images of 2048x1024 with fine annotations.

    `{root}/leftImg8bit/{split}/CITY/NAME_leftImg8bit.png` are the images,
    `{root}/gtFine/{split}/CITY/NAME_gtFine_labelIds.png` their labels: ids 0-33, of which 19 are classes (the
    "trainIds" of cityscapesScripts) and the others become `IGNORE`. The test split has no public labels.

    Args:
        root: the folder that has leftImg8bit and gtFine.
        split: "train" or "val".
        resize: what to resize images to.
        train_ids: read NAME_gtFine_labelTrainIds.png, which cityscapesScripts makes: 0-18 a class, 255 `IGNORE`.

    Raises, besides the errors of `LabelledFiles`:
        ValueError: no root, or a split that there is not.
        FileNotFoundError: a missing folder, or one without such files, by its name.
    """

    CLASSES = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    )  # fmt: skip
    COLOURS = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
        (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip
    SPLITS = ("train", "val")
    IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    """The id of each class; ids 0-33 that are not among them, and 255 (id -1 in a byte), are ignored."""

    def __init__(
        self,
        root: Path | None,
        split: str,
        resize: Resize | None = None,
        train_ids: bool = False,
    ) -> None:
        require_split(split, self.SPLITS)
        root = require_root("cityscapes", root)
        images_folder, labels_folder = root / "leftImg8bit" / split, root / "gtFine" / split
        image_end, label_end = "_leftImg8bit.png", f"_gtFine_label{'TrainIds' if train_ids else 'Ids'}.png"
        pairs, problems = pair_files(
            _files_by_city(images_folder, image_end),
            _files_by_city(labels_folder, label_end),
            lambda name: images_folder / f"{name}{image_end}",
            lambda name: labels_folder / f"{name}{label_end}",
        )
        if train_ids:
            classes = {label: label for label in range(len(self.IDS))}
        else:
            classes = dict.fromkeys(range(34), IGNORE)
            classes |= {value: label for label, value in enumerate(self.IDS)}
        super().__init__(pairs, problems, class_table({**classes, 255: IGNORE}), resize)


def _files_by_city(folder: Path, end: str) -> dict[str, Path]:
    """Files by "city/name", without the end of their names, which all have."""
    require_folder(folder)
    paths = sorted(folder.glob(f"*/*{end}"))
    if not paths:
        raise FileNotFoundError(f"folder {folder} holds no CITY/*{end} files")
    return {f"{path.parent.name}/{path.name.removesuffix(end)}": path for path in paths}
