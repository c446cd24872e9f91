"""COCO-Stuff, everyday scenes in 80 thing and 91 stuff classes: the 164k images, and the 10k of before."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pixcontrast_ext.trainer.datasets import IGNORE
from pixcontrast_ext.trainer.datasets.colours import voc_colour
from pixcontrast_ext.trainer.datasets.labelled import (
    LabelledFiles,
    Resize,
    class_table,
    files_by_stem,
    pair_files,
    pair_list,
    require_folder,
    require_root,
    require_split,
)

# In the order of their ids, which are COCO's category ids less 1.
_THINGS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
_STUFF = (
    "banner", "blanket", "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood",
    "flower", "fog", "food-other", "fruit", "furniture-other", "grass", "gravel", "ground-other", "hill", "house",
    "leaves", "light", "mat", "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper",
    "pavement", "pillow", "plant-other", "plastic", "platform", "playingfield", "railing", "railroad", "river",
    "road", "rock", "roof", "rug", "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow",
    "solid-other", "stairs", "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel",
    "tree", "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile",
    "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)  # fmt: skip
_DROPPED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_IDS = tuple(value for value in range(182) if value not in _DROPPED)


class CocoStuff(LabelledFiles):
    """COCO-Stuff 164k: 118287 and 5000 images of up to 640x640.

    `{root}/images/{split}2017/NAME.jpg` are the images, `{root}/annotations/{split}2017/NAME.png` their labels
    (the "stuffthingmaps"): ids 0-181, of which 171 are classes, and 255 unlabelled. The 11 ids of COCO that nothing
    was annotated with become `IGNORE` as well. The palette is VOC's, by id + 1: the official one paints every thing
    black.

    Args:
        root: the folder that has images and annotations.
        split: "train" or "val".
        resize: what to resize images to.

    Raises, besides the errors of `LabelledFiles`:
        ValueError: no root, or a split that there is not.
        FileNotFoundError: a missing or empty folder, by its name.
    """

    CLASSES = _THINGS + _STUFF
    COLOURS = tuple(voc_colour(value + 1) for value in _IDS)
    SPLITS = ("train", "val")
    IDS = _IDS
    """The id of each class."""

    def __init__(self, root: Path | None, split: str, resize: Resize | None = None) -> None:
        require_split(split, self.SPLITS)
        root = require_root("coco_stuff", root)
        images_folder, labels_folder = root / "images" / f"{split}2017", root / "annotations" / f"{split}2017"
        doubled: list[str] = []
        pairs, unpaired = pair_files(
            files_by_stem(images_folder, (".jpg",), doubled),
            files_by_stem(labels_folder, (".png",), doubled),
            lambda name: images_folder / f"{name}.jpg",
            lambda name: labels_folder / f"{name}.png",
        )
        classes = dict.fromkeys((*range(182), 255), IGNORE)
        classes |= {value: label for label, value in enumerate(self.IDS)}
        super().__init__(pairs, doubled + unpaired, class_table(classes), resize)


class CocoStuff10k(LabelledFiles):
    """COCO-Stuff 10k 1.1: 9000 and 1000 images, with labels as MATLAB files.

    `{root}/imageLists/{train,test}.txt` name the images, `{root}/images/NAME.jpg` are these, and
    `{root}/annotations/NAME.mat` their labels: a matrix S of 0 for unlabelled, and of COCO's category ids 1-182.
    Classes, colours and what is ignored are those of `CocoStuff`.

    Args:
        root: the folder that has imageLists, images and annotations.
        split: "train", or "val" for the images of test.txt.
        resize: what to resize images to.

    Raises, besides the errors of `LabelledFiles`:
        ValueError: no root, a split that there is not, or an empty list.
        FileNotFoundError: a missing folder or list, by its name.
    """

    CLASSES, COLOURS = CocoStuff.CLASSES, CocoStuff.COLOURS
    SPLITS = ("train", "val")
    IDS = tuple(value + 1 for value in _IDS)

    def __init__(self, root: Path | None, split: str, resize: Resize | None = None) -> None:
        require_split(split, self.SPLITS)
        root = require_root("coco_stuff_10k", root)
        images_folder, labels_folder = root / "images", root / "annotations"
        require_folder(images_folder)
        require_folder(labels_folder)
        names = root / "imageLists" / f"{'train' if split == 'train' else 'test'}.txt"
        pairs, problems = pair_list(names, images_folder, ".jpg", labels_folder, ".mat")
        classes = dict.fromkeys(range(183), IGNORE)
        classes |= {value: label for label, value in enumerate(self.IDS)}
        super().__init__(pairs, problems, class_table(classes), resize)

    def _read_label(self, path: Path) -> np.ndarray:
        from scipy.io import loadmat  # here: it takes a second, --help should not

        try:
            values = loadmat(path, variable_names=["S"])["S"]
        except Exception as error:  # loadmat raises whatever the damage leads it into
            raise ValueError(
                f"label {path} cannot be read as a MATLAB file with a matrix S: {error}"
            ) from error
        if values.ndim != 2 or values.dtype.kind not in "iu":
            raise ValueError(
                f"label {path} must be a matrix of integers, found {values.dtype} {values.shape}"
            )
        return np.asarray(values)
