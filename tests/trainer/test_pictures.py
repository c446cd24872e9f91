"""Pictures of a run: panels, curves, t-SNE, confusion matrix, legend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pixcontrast_ext.trainer import pictures
from pixcontrast_ext.trainer.data import IGNORE, Synthetic, dataset_spec
from pixcontrast_ext.trainer.logs import RunLog
from pixcontrast_ext.trainer.models import build_model
from pixcontrast_ext.trainer.pictures import (
    draw_confusion,
    draw_curves,
    draw_panels,
    draw_tsne,
    pixel_features,
)

CPU = torch.device("cpu")


def colours_of(path):
    """How many pixels of each colour a picture has."""
    pixels = np.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    numbers = pixels @ np.array([2**16, 2**8, 1])  # numbers sort faster than rows
    values, counts = np.unique(numbers, return_counts=True)
    return {
        (value >> 16, value >> 8 & 255, value & 255): count
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
    }


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("compact", 9, 16)


def test_panels_show_truth_in_the_class_colours(model, tmp_path):
    scenes = Synthetic("val", 6)
    spec = dataset_spec("synthetic")
    path = draw_panels({"one": model, "two": model}, scenes, spec, tmp_path / "panels.png", CPU, count=3)
    shown = colours_of(path)
    labels = torch.stack([scenes[index][1] for index in (0, 2, 5)])
    for value, colour in enumerate(spec.colours):
        if (labels == value).sum() > 100:
            assert shown.get(colour, 0) > 300, spec.classes[value]  # far more than its square in the legend
    assert model.training  # still in training mode


def test_curves_have_a_line_for_each_run(tmp_path):
    for name, height in (("off", 2.0), ("bank", 1.0)):
        log = RunLog(tmp_path / name)
        for step in range(1, 40):
            log.add("train", {"step": step, "cross_entropy": height / step**0.5})
        log.add("val", {"step": 39, "miou": 0.5})
        log.close()
    path = draw_curves({name: tmp_path / name for name in ("off", "bank")}, tmp_path / "curves.png")
    shown = colours_of(path)
    assert shown.get((31, 119, 180), 0) > 200  # C0
    assert shown.get((255, 127, 14), 0) > 200  # C1


def test_tsne_has_a_panel_for_each_cloud(model, tmp_path):
    scenes = Synthetic("val", 4)
    spec = dataset_spec("synthetic")
    clouds = {
        "features": pixel_features(model, scenes, CPU, per_class=12),
        "embeddings": pixel_features(model, scenes, CPU, per_class=12, embeddings=True),
    }
    for features, labels in clouds.values():
        assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
        assert IGNORE not in labels
        assert np.bincount(labels).max() == 12
    assert clouds["features"][0].shape[1] == 128
    assert clouds["embeddings"][0].shape[1] == 16
    assert np.array_equal(clouds["features"][1], clouds["embeddings"][1])
    path = draw_tsne(clouds, spec, tmp_path / "tsne.png")
    shown = colours_of(path)
    present = [spec.colours[value] for value in np.unique(clouds["features"][1])]
    assert all(shown.get(colour, 0) > 100 for colour in present)
    image = np.array(Image.open(path).convert("L"))
    half = image.shape[1] // 2
    assert (image[:, :half] < 250).sum() > 1000
    assert (image[:, half:] < 250).sum() > 1000


def test_confusion_matrix_is_shaded_by_share_of_the_class(tmp_path):
    """A class with all its pixels right is as dark as possible, however few they are."""
    full, half = (8, 48, 107), (107, 174, 214)  # matplotlib's "Blues" at 1 and at 1/2
    spec = dataset_spec("camvid")
    confusion = torch.zeros(11, 11, dtype=torch.int64)
    confusion[0, 0], confusion[1, 1], confusion[3, 4], confusion[3, 5] = 7_000_000, 3, 50, 50
    shown = colours_of(draw_confusion(confusion, spec.classes, tmp_path / "confusion.png"))
    near = {
        colour: sum(count for found, count in shown.items() if np.abs(np.subtract(found, colour)).max() <= 4)
        for colour in (full, half)
    }
    cell = min(near.values()) / 2
    assert cell > 500, near
    assert all(1.5 * cell < count < 4 * cell for count in near.values()), near


@pytest.mark.parametrize("name", ["pascal_context", "coco_stuff"])
def test_confusion_matrix_of_many_classes(name, tmp_path):
    classes = dataset_spec(name).classes
    path = draw_confusion(torch.eye(len(classes), dtype=torch.int64), classes, tmp_path / "confusion.png")
    width, height = Image.open(path).size
    assert width > 1000
    assert abs(width - height) < 0.25 * height
    assert colours_of(path)[8, 48, 107] > 1000


def test_features_of_an_image_are_picked_before_those_of_the_next(model, monkeypatch):
    """Keeping the maps of all images at once would take gigabytes for a large network."""
    held = []
    normalize = pictures.F.normalize

    def watch(features, dim):
        held.append(len(features))
        return normalize(features, dim=dim)

    monkeypatch.setattr(pictures.F, "normalize", watch)
    _, labels = pixel_features(model, Synthetic("val", 3), CPU, per_class=7)
    assert max(held) <= 9 * 7
    assert np.bincount(labels).max() == 7
    monkeypatch.setattr(pictures, "_MOST_PIXELS", 20)
    features, labels = pixel_features(model, Synthetic("val", 3), CPU, per_class=7)
    assert len(features) == len(labels) == 20


@pytest.mark.parametrize("width", [4.6, 9.2, 12.0])
def test_legend_stays_inside_the_picture(width):
    figure = Figure(figsize=(width, 5.4), layout="constrained")
    figure.subplots()
    pictures._class_legend(figure, dataset_spec("camvid"), void=True)
    figure.canvas.draw()
    (legend,) = figure.legends
    inside, whole = legend.get_window_extent(), figure.bbox
    assert len(legend.get_texts()) == 12
    assert inside.x0 >= 0
    assert inside.x1 <= whole.width
    assert inside.y0 >= 0
    assert inside.y1 <= whole.height


def test_legend_of_many_classes_names_those_that_are_seen():
    figure = Figure(figsize=(8, 5), layout="constrained")
    pictures._class_legend(figure, dataset_spec("coco_stuff"), void=True, seen={0, 7, IGNORE})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["person", "truck", "void"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    pictures._class_legend(figure, dataset_spec("coco_stuff"), void=False, seen=range(171))
    assert len(figure.legends[0].get_texts()) == 24
