"""PASCAL-Context, the images of VOC 2010 labelled throughout, with 59 classes or 60."""

from __future__ import annotations

from pathlib import Path

from pixcontrast_ext.trainer.datasets import IGNORE
from pixcontrast_ext.trainer.datasets.colours import voc_colour
from pixcontrast_ext.trainer.datasets.labelled import (
    LabelledFiles,
    Resize,
    class_table,
    pair_list,
    require_folder,
    require_root,
    require_split,
)


class PascalContext(LabelledFiles):
    """PASCAL-Context: 4998 and 5105 images of up to 500x500, in the layout of VOC 2010.

    `{root}/ImageSets/SegmentationContext/{split}.txt` has a name per line, `{root}/JPEGImages/NAME.jpg` are the
    images, `{root}/SegmentationClassContext/NAME.png` their labels: 0 background, 1-59 a class.

    The protocol of 59 classes subtracts 1 and ignores the background, that of 60 counts it as class 0. The value
    255 is ignored in both. There is no official palette: a class has the colour of its value in VOC's map, and
    the background that of VOC's void, entry 255 of the full map, because black is void in our pictures.

    Args:
        root: the folder VOC2010, or the one it is in.
        split: "train" or "val".
        resize: what to resize images to.
        background: whether there are 60 classes.

    Raises, besides the errors of `LabelledFiles`:
        ValueError: no root, a split that there is not, or an empty list, by its name.
        FileNotFoundError: a missing folder or list, by its name.
    """

    CLASSES_60 = (
        "background", "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle",
        "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup",
        "curtain", "dog", "door", "fence", "floor", "flower", "food", "grass", "ground", "horse", "keyboard",
        "light", "motorbike", "mountain", "mouse", "person", "plate", "platform", "pottedplant", "road", "rock",
        "sheep", "shelves", "sidewalk", "sign", "sky", "snow", "sofa", "table", "track", "train", "tree", "truck",
        "tvmonitor", "wall", "water", "window", "wood",
    )  # fmt: skip
    CLASSES = CLASSES_60[1:]
    COLOURS_60 = (voc_colour(255), *(voc_colour(value) for value in range(1, 60)))
    COLOURS = COLOURS_60[1:]
    IDS = tuple(range(1, 60))
    """The value of each of the 59 classes; with the background, a class is its value."""
    SPLITS = ("train", "val")

    def __init__(
        self,
        root: Path | None,
        split: str,
        resize: Resize | None = None,
        background: bool = False,
    ) -> None:
        require_split(split, self.SPLITS)
        root = require_root("pascal_context", root)
        if (root / "VOC2010").is_dir():
            root = root / "VOC2010"
        images_folder, labels_folder = root / "JPEGImages", root / "SegmentationClassContext"
        require_folder(images_folder)
        require_folder(labels_folder)
        names = root / "ImageSets" / "SegmentationContext" / f"{split}.txt"
        pairs, problems = pair_list(names, images_folder, ".jpg", labels_folder, ".png")
        shift = 0 if background else 1
        table = class_table({0: IGNORE, **{value: value - shift for value in range(shift, 60)}, 255: IGNORE})
        super().__init__(pairs, problems, table, resize)
