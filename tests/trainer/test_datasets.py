"""Datasets read from files: small ones in exactly the official layouts, intact and with each kind of fault."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from pixcontrast_ext.trainer.config import DataConfig
from pixcontrast_ext.trainer.data import dataset_spec
from pixcontrast_ext.trainer.datasets import IGNORE
from pixcontrast_ext.trainer.datasets.camvid import CamVid
from pixcontrast_ext.trainer.datasets.cityscapes import Cityscapes
from pixcontrast_ext.trainer.datasets.coco_stuff import CocoStuff, CocoStuff10k
from pixcontrast_ext.trainer.datasets.colours import voc_colour
from pixcontrast_ext.trainer.datasets.labelled import Resize, UnpairedFilesError
from pixcontrast_ext.trainer.datasets.pascal_context import PascalContext


def classes_of(dataset, values):
    """The class that the dataset gives each value of its first label file, which holds exactly `values`."""
    label = dataset[0][1].flatten().tolist()
    raw = np.array(Image.open(dataset.pairs[0][1])).ravel().tolist()
    assert set(raw) == set(values)
    mapped = {value: {label[at] for at, each in enumerate(raw) if each == value} for value in values}
    assert all(len(each) == 1 for each in mapped.values())
    return {value: each.pop() for value, each in mapped.items()}


def test_cityscapes_maps_the_ids_of_its_labels(cityscapes):
    dataset = Cityscapes(cityscapes, "train")
    assert [pair[0].name for pair in dataset.pairs] == [
        f"{city}_000000_{number}_leftImg8bit.png"
        for city in ("aachen", "zurich")
        for number in ("000019", "000020")
    ]
    expected = {
        7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
        20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
        27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
    }  # fmt: skip
    for value, label in classes_of(dataset, range(34)).items():
        assert label == (Cityscapes.CLASSES.index(expected[value]) if value in expected else IGNORE)
    assert Cityscapes.COLOURS[Cityscapes.CLASSES.index("road")] == (128, 64, 128)
    assert Cityscapes.COLOURS[Cityscapes.CLASSES.index("car")] == (0, 0, 142)


def test_cityscapes_reads_train_ids_where_they_are_chosen(cityscapes):
    mapped = [label for _, label in Cityscapes(cityscapes, "val")]
    with pytest.raises(FileNotFoundError, match=r"val holds no CITY/\*_gtFine_labelTrainIds\.png files"):
        Cityscapes(cityscapes, "val", train_ids=True)
    for (_, path), label in zip(Cityscapes(cityscapes, "val").pairs, mapped, strict=True):
        Image.fromarray(label.numpy()).save(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
        Image.fromarray(np.zeros((3, 3), np.uint8)).save(path)  # not to be read
    chosen = Cityscapes(cityscapes, "val", train_ids=True)
    assert all(torch.equal(label, one) for (_, label), one in zip(chosen, mapped, strict=True))
    Image.fromarray(np.full((12, 17), 19, np.uint8)).save(chosen.pairs[0][1])
    with pytest.raises(ValueError, match=r"labelTrainIds\.png has values \[19\] outside 0\.\.18, 255"):
        chosen[0]


def test_cityscapes_names_what_is_missing(cityscapes):
    with pytest.raises(ValueError, match="cityscapes is read from files: give its folder with --root"):
        Cityscapes(None, "train")
    with pytest.raises(ValueError, match="split is 'test', must be one of train, val"):
        Cityscapes(cityscapes, "test")
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere.leftImg8bit.train does not exist"):
        Cityscapes(cityscapes / "nowhere", "train")
    (cityscapes / "gtFine/train/zurich/zurich_000000_000019_gtFine_labelIds.png").unlink()
    (cityscapes / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png").unlink()
    message = (
        r"label .*aachen.*_gtFine_labelIds\.png has no image .*aachen.aachen_000000_000019_leftImg8bit\.png "
    )
    with pytest.raises(
        UnpairedFilesError, match=message + r"\(2 such problems: check-data lists them\)"
    ) as caught:
        Cityscapes(cityscapes, "train")
    assert isinstance(caught.value, ValueError)
    assert len(caught.value.readable) == 2
    assert "image " in caught.value.problems[1]
    assert "gtFine/train/zurich/zurich_000000_000019" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((12, 17), 34, np.uint8), r"labelIds\.png has values \[34\] outside 0\.\.33, 255"),
        (np.full((12, 17), 300, np.uint16), r"labelIds\.png has values \[300\] outside 0\.\.33, 255"),
        (np.full((12, 17), -1, np.int32), r"labelIds\.png has values \[-1\] outside"),
        (np.zeros((12, 18), np.uint8), r"labelIds\.png is 18x12, its image 17x12"),
        (
            np.zeros((12, 17, 3), np.uint8),
            r"labelIds\.png must have one channel of class indices, its mode is RGB",
        ),
    ],
)
def test_cityscapes_refuses_bad_labels(cityscapes, values, message):
    dataset = Cityscapes(cityscapes, "train")
    if values.min() < 0:  # no PNG holds a negative value
        with pytest.raises(ValueError, match=message):
            dataset._classes(values, dataset.pairs[1][1])
        return
    Image.fromarray(values).save(dataset.pairs[1][1])
    with pytest.raises(ValueError, match=message):
        dataset[1]


def test_pascal_context_has_59_classes_or_60(pascal_context):
    fewer, more = PascalContext(pascal_context, "val"), PascalContext(pascal_context, "val", background=True)
    assert [pair[0].stem for pair in fewer.pairs] == ["2008_000003", "2008_000002"]  # the order of the list
    assert classes_of(fewer, range(60)) == {0: IGNORE, **{value: value - 1 for value in range(1, 60)}}
    assert classes_of(more, range(60)) == {value: value for value in range(60)}
    of_value = classes_of(fewer, range(60))
    assert [of_value[value] for value in dataset_spec("pascal_context").ids] == list(range(59))
    assert PascalContext.CLASSES_60[:3] == ("background", "aeroplane", "bag")
    assert PascalContext.CLASSES_60[37] == "person"
    assert PascalContext.CLASSES_60[59] == "wood"
    assert PascalContext.CLASSES[36] == "person"
    assert PascalContext.CLASSES[58] == "wood"
    assert PascalContext.COLOURS[14] == PascalContext.COLOURS_60[15] == voc_colour(15) == (192, 128, 128)
    inner = PascalContext(pascal_context.parent, "val")  # either VOC2010 itself or its parent may be given
    assert inner.pairs == fewer.pairs


def test_pascal_context_names_what_is_missing(pascal_context):
    lists = pascal_context / "ImageSets" / "SegmentationContext"
    (lists / "train.txt").write_text("2008_000000\n2008_000007\n2008_000001\n")
    (pascal_context / "SegmentationClassContext" / "2008_000001.png").unlink()
    message = r"train\.txt has 2008_000007, but there is no .*2008_000007\.jpg and no .*2008_000007\.png"
    with pytest.raises(UnpairedFilesError, match=message) as caught:
        PascalContext(pascal_context, "train")
    assert len(caught.value.problems) == 2
    assert len(caught.value.readable) == 1
    assert caught.value.problems[1].endswith(
        "but there is no " + str(pascal_context / "SegmentationClassContext/2008_000001.png")
    )
    (lists / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val\.txt is empty, expected a name"):
        PascalContext(pascal_context, "val")
    (lists / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.txt does not exist, expected a name"):
        PascalContext(pascal_context, "val")
    with pytest.raises(FileNotFoundError, match="JPEGImages does not exist"):
        PascalContext(pascal_context / "JPEGImages", "val")


def test_pascal_context_refuses_values_past_its_classes(pascal_context):
    dataset = PascalContext(pascal_context, "train")
    Image.fromarray(np.full((8, 15), 60, np.uint8)).save(dataset.pairs[0][1])
    with pytest.raises(ValueError, match=r"2008_000000\.png has values \[60\] outside 0\.\.59, 255"):
        dataset[0]


def test_coco_stuff_leaves_the_unused_ids_out(coco_stuff):
    mapped = classes_of(CocoStuff(coco_stuff, "val"), [*range(182), 255])
    dropped = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    assert {value for value, label in mapped.items() if label == IGNORE} == dropped | {255}
    assert [label for label in mapped.values() if label != IGNORE] == list(range(171))
    # COCO's category ids, one more than the values in the files.
    for category, name in {
        1: "person", 13: "stop sign", 27: "backpack", 46: "wine glass", 73: "laptop", 90: "toothbrush",
        92: "banner", 106: "clouds", 124: "grass", 149: "road", 157: "sky-other", 169: "tree", 182: "wood",
    }.items():  # fmt: skip
        assert CocoStuff.CLASSES[mapped[category - 1]] == name
    assert CocoStuff.COLOURS[0] == voc_colour(1)


def test_coco_stuff_names_what_is_wrong(coco_stuff):
    (coco_stuff / "annotations/train2017/000000000009.png").unlink()
    with pytest.raises(
        UnpairedFilesError, match=r"image .*000000000009\.jpg has no label .*train2017.000000000009\.png"
    ):
        CocoStuff(coco_stuff, "train")
    dataset = CocoStuff(coco_stuff, "val")
    Image.fromarray(np.full((6, 61), 182, np.uint8)).save(dataset.pairs[0][1])
    with pytest.raises(ValueError, match=r"000000000139\.png has values \[182\] outside 0\.\.181, 255"):
        dataset[0]
    with pytest.raises(FileNotFoundError, match=r"coco.images.images.train2017 does not exist"):
        CocoStuff(coco_stuff / "images", "train")


def test_the_voc_colour_map():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0), 20: (0, 64, 128)}
    assert {index: voc_colour(index) for index in known} == known
    assert voc_colour(255) == (224, 224, 192)
    assert len({voc_colour(index) for index in range(256)}) == 256


def test_coco_stuff_10k_has_the_classes_of_the_164k(coco_stuff_10k):
    train, val = (CocoStuff10k(coco_stuff_10k, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    image, label = val[0]
    assert image.shape == (3, 3, 61)
    of_id = {value + 1: of_class for of_class, value in enumerate(CocoStuff.IDS)}
    expected = [of_id.get(value, IGNORE) for value in range(183)]
    assert label.flatten().tolist() == expected
    assert CocoStuff10k.CLASSES == CocoStuff.CLASSES


def test_coco_stuff_10k_names_what_is_wrong(coco_stuff_10k):
    path = coco_stuff_10k / "annotations" / "three.mat"
    savemat(path, {"T": np.zeros((3, 61))})
    with pytest.raises(ValueError, match=r"three\.mat cannot be read as a MATLAB file with a matrix S"):
        CocoStuff10k(coco_stuff_10k, "val")[0]
    savemat(path, {"S": np.zeros((3, 61))})
    with pytest.raises(ValueError, match=r"three\.mat must be a matrix of integers, found float64"):
        CocoStuff10k(coco_stuff_10k, "val")[0]
    savemat(path, {"S": np.zeros((2, 61), np.uint8)})
    with pytest.raises(ValueError, match="is 61x2, its image 61x3"):
        CocoStuff10k(coco_stuff_10k, "val")[0]
    path.unlink()
    with pytest.raises(ValueError, match=r"has three, but there is no .*three\.mat"):
        CocoStuff10k(coco_stuff_10k, "val")


def test_labels_may_keep_their_size(camvid):
    dataset = CamVid(camvid(), "val", Resize(size=(18, 24), labels=False))
    image, label = dataset[0]
    assert image.shape == (3, 18, 24)
    assert label.shape == (36, 48)
    assert torch.equal(label, CamVid(dataset.pairs[0][0].parents[1], "val")[0][1])


def test_several_splits_to_train_on(camvid):
    options = DataConfig(dataset="camvid", root=camvid(count=3), train_splits=("train", "val"))
    spec = dataset_spec("camvid")
    both = spec.training_set(options)
    assert len(both) == 6
    assert torch.equal(both[4][0], spec.build(options, "val")[1][0])
    assert len(spec.training_set(replace(options, train_splits=("train",)))) == 3
    with pytest.raises(ValueError, match="split is 'all'"):
        spec.training_set(replace(options, train_splits=("train", "all")))
    with pytest.raises(ValueError, match="--train-splits is empty"):
        spec.training_set(replace(options, train_splits=()))


@pytest.mark.parametrize(
    ("fraction", "kept"), [(1.0, 7), (0.5, 4), (1 / 3, 2), (0.125, 1), (0.99, 7), (1e-9, 1)]
)
def test_a_fraction_of_the_training_images_is_spread_over_them(camvid, fraction, kept):
    options = DataConfig(dataset="camvid", root=camvid(count=7), train_fraction=fraction)
    part, whole = dataset_spec("camvid").training_set(options), dataset_spec("camvid").build(options, "train")
    found = [next(i for i in range(7) if torch.equal(whole[i][0], image)) for image, _ in part]
    assert len(found) == kept
    assert found == sorted(set(found))
    if fraction == 0.5:
        assert found == [0, 1, 3, 5]
