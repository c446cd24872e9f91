"""Masks and overlays of a folder of images."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from pixcontrast_ext.trainer.config import DataConfig, InferenceConfig
from pixcontrast_ext.trainer.data import DatasetSpec, resize_of
from pixcontrast_ext.trainer.datasets.labelled import as_rgb, read_image, require_folder
from pixcontrast_ext.trainer.files import read_json, replacing, write_json
from pixcontrast_ext.trainer.inference import evaluating, predict
from pixcontrast_ext.trainer.pictures import colour_table

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_FOLDERS = ("masks", "overlays")


@dataclass(frozen=True)
class Predicted:
    """What came of a folder."""

    images: int
    """How many were predicted."""
    problems: list[str]
    """A line for each that could not be read."""


def predict_folder(
    model: nn.Module,
    spec: DatasetSpec,
    data: DataConfig,
    images: Path,
    out: Path,
    device: torch.device,
    *,
    options: InferenceConfig | None = None,
    amp: str = "off",
    ids: bool = False,
) -> Predicted:
    """Predict every image of a folder and of those in it, past those that cannot be read, with a progress bar.

    Writes `out`/masks/NAME.png, the class of every pixel as a palette image of the image's size;
    `out`/overlays/NAME.png, the image with the classes' colours over it; and `out`/classes.json, name and
    colour of each class.

    Args:
        model: in eval mode or not, returns logits "seg" for images [1, 3, H, W] in [0, 1] on `device`.
        spec: of the dataset that it was trained on, for classes and colours.
        data: options of that dataset: images are brought to the size that they had in training.
        images: the folder.
        options: how an image is predicted; at once, as it is, unless given.
        amp: mixed precision of the model, as in `TrainConfig`.
        ids: masks hold the dataset's own ids of the classes, as its test server wants them, without a palette.

    Raises:
        FileNotFoundError: the folder is missing or holds no images.
        FileExistsError: `out` has masks or overlays that no prediction left, such as the labels of a data set.
        ValueError: two images have one name but for folder and suffix; `ids` of a dataset that has none.
    """
    if ids and spec.ids is None:
        raise ValueError("--ids is given, but the classes of this dataset have no other numbers")
    paths = image_files(images, besides=out)
    for place in (out / name for name in (*_FOLDERS, "classes.json")):
        if (place.is_file() or (place.is_dir() and any(place.iterdir()))) and not _is_of_predictions(out):
            raise FileExistsError(f"{place} is there already, and was not predicted: choose another --out")
    for folder in _FOLDERS:
        (out / folder).mkdir(parents=True, exist_ok=True)
    palette, table = colour_table(spec), np.array(spec.ids, np.uint8) if ids else None
    classes = [
        {
            "value": value if table is None else int(table[value]),
            "name": name,
            "colour": list(spec.colours[value]),
        }
        for value, name in enumerate(spec.classes)
    ]
    write_json(out / "classes.json", classes)
    problems = []
    with evaluating(model):
        # None: only a terminal gets a bar.
        for name, path in tqdm(paths.items(), desc="predicting", unit="image", disable=None):
            try:
                image = as_rgb(_upright(read_image(path)), path)
            except ValueError as error:
                problems.append(str(error))
                continue
            labels = predict(
                model, _network_input(image, data, device), (image.height, image.width), options, amp
            )
            values = labels[0].to(torch.uint8).cpu().numpy()
            mask = Image.fromarray(
                values if table is None else table[values], mode="P" if table is None else "L"
            )
            if table is None:
                mask.putpalette(palette.tobytes())
            overlay = Image.blend(image, Image.fromarray(palette[values]), 0.5)
            for folder, picture in zip(_FOLDERS, (mask, overlay), strict=True):
                with replacing(out / folder / f"{name}.png") as file:
                    picture.save(file, format="PNG")
    return Predicted(len(paths) - len(problems), problems)


def _is_of_predictions(out: Path) -> bool:
    """Whether a folder has the classes.json of an earlier prediction; data sets have files of that name too."""
    try:
        told = read_json(out / "classes.json")
    except (OSError, ValueError):
        return False
    return (
        isinstance(told, list)
        and bool(told)
        and all(isinstance(each, dict) and set(each) == {"value", "name", "colour"} for each in told)
    )


def image_files(folder: Path, besides: Path | None = None) -> dict[str, Path]:
    """The images of a folder and of those in it, by their name without suffix, but for what was predicted to `besides`.

    Raises:
        FileNotFoundError: the folder is missing or holds no images.
        ValueError: two images have one name but for folder and suffix.
    """
    require_folder(folder)
    found: dict[str, Path] = {}
    own = set() if besides is None else {(besides / name).resolve() for name in _FOLDERS}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.parent.resolve() not in own:
            if path.stem in found:
                raise ValueError(
                    f"{found[path.stem]} and {path} have the same name: their masks would be one file"
                )
            found[path.stem] = path
    if not found:
        raise FileNotFoundError(f"folder {folder} holds no {' or '.join(SUFFIXES)} files")
    return found


def _upright(image: Image.Image) -> Image.Image:
    """The image as its camera says that it stands; as it is stored where that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, struct.error):  # what Pillow raises for a damaged block
        return image


def _network_input(image: Image.Image, data: DataConfig, device: torch.device) -> Tensor:
    """An image as [1, 3, H, W] in [0, 1], at the size that the dataset gave it in training."""
    height, width = resize_of(data).extent(image.height, image.width)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device).float() / 255
