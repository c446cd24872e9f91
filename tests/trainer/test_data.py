"""Loading data: synthetic scenes, CamVid's layouts, and the order of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pixcontrast_ext.trainer.config import DataConfig
from pixcontrast_ext.trainer.data import (
    DATASETS,
    IGNORE,
    CamVid,
    PascalContext,
    StepBatches,
    Synthetic,
    dataset_spec,
    eval_loader,
    stack,
    to_device,
)
from pixcontrast_ext.trainer.datasets.labelled import Resize


def test_synthetic_scenes_are_a_function_of_seed_split_and_index():
    image, label = Synthetic("train", 9, seed=3)[7]
    again = Synthetic("train", 20, seed=3)  # neither the length nor earlier draws matter
    _ = again[2]
    assert torch.equal(image, again[7][0])
    assert torch.equal(label, again[7][1])
    assert not torch.equal(image, Synthetic("val", 9, seed=3)[7][0])
    assert not torch.equal(image, Synthetic("train", 9, seed=4)[7][0])
    assert not torch.equal(image, again[6][0])


@pytest.mark.parametrize("size", [(96, 96), (32, 32), (65, 101), (128, 40)])
def test_synthetic_scenes_hold_classes_and_void_only(size):
    scenes = Synthetic("train", 24, size)
    labels = torch.stack([scenes[index][1] for index in range(24)])
    assert labels.shape == (24, *size)
    assert labels.dtype == scenes[0][0].dtype == torch.uint8
    assert scenes[0][0].shape == (3, *size)
    values = set(labels.unique().tolist())
    assert values <= {*range(9), IGNORE}
    assert {0, 1, IGNORE} <= values
    if size == (96, 96):
        assert values == {*range(9), IGNORE}


def test_synthetic_classes_do_not_differ_in_colour():
    """Classes that share a material (water, paint) have the same mean colour in a scene."""
    scenes = Synthetic("train", 40)
    compared = 0
    for index in range(40):
        image, label = scenes[index]
        for one, other in (("river", "pond"), ("disc", "stone"), ("plate", "frame"), ("boat", "stone")):
            masks = [label == Synthetic.CLASSES.index(name) for name in (one, other)]
            if all(mask.sum() > 60 for mask in masks):
                means = [image[:, mask].float().mean(1) for mask in masks]
                assert (means[0] - means[1]).abs().max() < 22  # stripes of +-14, and noise
                compared += 1
    assert compared > 40


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("test", 3), "split is 'test', must be one of train, val"),
        (("train", 0), "at least 1 scene, got 0"),
        (("train", 3, (31, 96)), "at least 32 by 32 pixels, got 31 by 96"),
    ],
)
def test_synthetic_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        Synthetic(*args)


def test_synthetic_ends():
    scenes = Synthetic("val", 3)
    assert len(list(scenes)) == 3
    with pytest.raises(IndexError):
        scenes[3]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_camvid_reads_both_layouts(camvid, suffix):
    dataset = CamVid(camvid(suffix), "val")
    image, label = dataset[1]
    assert len(dataset) == 4
    assert image.shape == (3, 36, 48)
    assert image.dtype == torch.uint8
    assert label[0, 0] == 0
    assert label[20, 20] == 3
    assert label[35, 0] == IGNORE
    assert set(label.unique().tolist()) == {0, 3, IGNORE}
    assert image[2, 5, 5] > 200  # blue sky
    assert image[2, 25, 25] < 130  # grey road


@pytest.mark.parametrize(
    ("resize", "size"),
    [(Resize(scale=0.5), (18, 24)), (Resize((20, 30)), (20, 30)), (Resize(short_side=18), (18, 24))],
)
def test_camvid_resizes_labels_to_the_nearest(camvid, resize, size):
    image, label = CamVid(camvid(), "train", resize)[0]
    assert image.shape == (3, *size)
    assert label.shape == size
    assert set(label.unique().tolist()) == {0, 3, IGNORE}
    middle = size[0] // 2
    assert (label[: middle - 1] == 0).all()
    assert label[middle + 1, -1] == 3


def test_camvid_names_what_is_missing(camvid):
    with pytest.raises(ValueError, match="--root"):
        CamVid(None, "train")
    root = camvid()
    with pytest.raises(FileNotFoundError, match=r"nowhere.train does not exist"):
        CamVid(root / "nowhere", "train")
    with pytest.raises(ValueError, match="split is 'dev'"):
        CamVid(root, "dev")
    (root / "trainannot" / "train2.png").unlink()
    with pytest.raises(ValueError, match=r"image .*train2\.png has no label .*trainannot.train2\.png"):
        CamVid(root, "train")
    (root / "val" / "val1.png").unlink()
    with pytest.raises(ValueError, match=r"label .*val1\.png has no image"):
        CamVid(root, "val")
    for path in (root / "test").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"test holds no \.png or \.jpg or \.jpeg files"):
        CamVid(root, "test")


def test_camvid_refuses_two_images_of_one_name(camvid):
    root = camvid()
    (root / "train" / "train0.jpg").write_bytes((root / "train" / "train0.png").read_bytes())
    with pytest.raises(ValueError, match=r"train0\.jpg and .*train0\.png have the same name"):
        CamVid(root, "train")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full((36, 48), 12, np.uint8), r"train1\.png has values \[12\] outside 0\.\.11"),
        (np.zeros((36, 48, 3), np.uint8), r"train1\.png must have one channel.*RGB"),
        (np.zeros((36, 40), np.uint8), r"train1\.png is 40x36, its image 48x36"),
    ],
)
def test_camvid_refuses_bad_labels(camvid, label, message):
    root = camvid()
    Image.fromarray(label).save(root / "trainannot" / "train1.png")
    with pytest.raises(ValueError, match=message):
        CamVid(root, "train")[1]


def test_camvid_names_an_unreadable_file(camvid):
    root = camvid()
    path = root / "train" / "train1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"train1\.png cannot be read as an image"):
        CamVid(root, "train")[1]


@pytest.mark.parametrize("values", [np.full((36, 48), 40_000, np.uint16), np.full((36, 48), 0.5, np.float32)])
def test_images_of_more_than_8_bits_are_refused(camvid, tmp_path, values):
    """Pillow would make all of the first white and of the second black."""
    root = camvid()
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    path.replace(root / "train" / "train1.png")
    with pytest.raises(
        ValueError, match=r"train1\.png has 16 or 32 bits a pixel in one channel \(mode (I;16|F)"
    ):
        CamVid(root, "train")[1]


def test_registry_describes_every_dataset(camvid, cityscapes, pascal_context, coco_stuff, coco_stuff_10k):
    roots = {
        "synthetic": None,
        "camvid": camvid(),
        "cityscapes": cityscapes,
        "pascal_context": pascal_context,
        "pascal_context_60": pascal_context,
        "coco_stuff": coco_stuff,
        "coco_stuff_10k": coco_stuff_10k,
    }
    counts = {
        "camvid": 11,
        "cityscapes": 19,
        "pascal_context": 59,
        "pascal_context_60": 60,
        "coco_stuff": 171,
        "coco_stuff_10k": 171,
    }
    assert DATASETS.keys() == roots.keys()
    for name, spec in DATASETS.items():
        assert len(spec.classes) == len(spec.colours) == counts.get(name, 9)
        assert len(set(spec.colours)) == len(set(spec.classes)) == len(spec.classes), name
        assert (0, 0, 0) not in spec.colours, f"{name}: black is void"
        for split in spec.splits:
            image, label = spec.build(DataConfig(root=roots[name]), split)[0]
            assert image.dtype == label.dtype == torch.uint8
            assert image.shape == (3, *label.shape), name
            classes = set(label.unique().tolist())
            if name not in ("synthetic", "camvid"):  # their files here do not hold every class
                assert classes == {*range(len(spec.classes))} | (
                    {IGNORE} if name != "pascal_context_60" else set()
                )
            small, _ = spec.build(DataConfig(root=roots[name], size=(32, 40)), split)[0]
            assert small.shape == (3, 32, 40)
    with pytest.raises(ValueError, match="--dataset is 'nope', must be one of synthetic, camvid, cityscapes"):
        dataset_spec("nope")
    for flag, options in (("--scale", {"scale": 0.5}), ("--short-side", {"short_side": 20})):
        with pytest.raises(ValueError, match=f"{flag} is given, but synthetic scenes are drawn at --size"):
            dataset_spec("synthetic").build(DataConfig(**options), "train")


@pytest.mark.parametrize(
    ("resize", "extents"),
    [
        (Resize(), [(30, 40), (40, 30)]),
        (Resize((9, 8)), [(9, 8), (9, 8)]),
        (Resize(scale=0.51), [(15, 20), (20, 15)]),
        (Resize(scale=0.01), [(1, 1), (1, 1)]),
        (Resize(short_side=60), [(60, 80), (80, 60)]),
    ],
)
def test_images_are_resized_to_one_size_by_a_factor_or_by_their_shorter_side(resize, extents):
    assert [resize.extent(30, 40), resize.extent(40, 30)] == extents


def test_batches_cover_each_epoch_and_resume_in_its_middle():
    whole = list(StepBatches(11, 3, steps=8, seed=1))
    assert [len(batch) for batch in whole] == [3] * 8
    for epoch in (whole[0:3], whole[3:6]):
        assert len({index for batch in epoch for index in batch}) == 9
    assert whole[0:3] != whole[3:6]
    assert whole != list(StepBatches(11, 3, steps=8, seed=2))
    for start in range(9):
        assert list(StepBatches(11, 3, steps=8, seed=1, start=start)) == whole[start:]
        assert len(StepBatches(11, 3, steps=8, seed=1, start=start)) == 8 - start


def test_ranks_share_the_batch_of_one_process():
    whole = list(StepBatches(20, 6, steps=7, seed=0))
    shares = [list(StepBatches(20, 6, steps=7, seed=0, rank=rank, world=3)) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert [len(share[step]) for share in shares] == [2, 2, 2]
        assert sorted(index for share in shares for index in share[step]) == sorted(batch)


def test_batches_refuse_what_cannot_be_shared():
    with pytest.raises(ValueError, match="--batch-size is 8, must be a multiple of the 3 ranks"):
        StepBatches(20, 8, steps=1, seed=0, world=3)
    with pytest.raises(ValueError, match="--batch-size is 8, but there are only 7 training images"):
        StepBatches(7, 8, steps=1, seed=0)


def test_evaluation_sees_every_image_once():
    scenes = Synthetic("val", 7, (32, 32))
    seen = [
        images
        for rank in range(3)
        for stacks in eval_loader(scenes, 2, rank=rank, world=3)
        for images, _ in stacks
    ]
    assert sorted(torch.cat(seen).sum((1, 2, 3)).tolist()) == sorted(int(image.sum()) for image, _ in scenes)


def test_batches_are_floats_and_class_indices():
    scenes = Synthetic("val", 2, (32, 40))
    images, labels = to_device(stack([scenes[0], scenes[1]]), torch.device("cpu"))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal((images[1] * 255).round().byte(), scenes[1][0])


def test_a_batch_of_several_sizes_is_padded_with_void():
    one, other = Synthetic("val", 2, (32, 60))[0], Synthetic("val", 2, (40, 50))[1]
    images, labels = stack([one, other])
    assert images.shape == (2, 3, 40, 60)
    assert labels.shape == (2, 40, 60)
    assert torch.equal(images[0, :, :32], one[0])
    assert torch.equal(images[1, :, :, :50], other[0])
    assert torch.equal(labels[0, :32], one[1])
    assert torch.equal(labels[1, :, :50], other[1])
    assert (images[0, :, 32:] == 0).all()
    assert (images[1, :, :, 50:] == 0).all()
    assert (labels[0, 32:] == IGNORE).all()
    assert (labels[1, :, 50:] == IGNORE).all()


def test_evaluation_does_not_pad(pascal_context):
    """Otherwise a prediction near the padding would depend on which images share a batch."""
    dataset = PascalContext(pascal_context, "val")
    (stacks,) = eval_loader(dataset, 2)
    assert [labels.shape for _, labels in stacks] == [(1, 10, 12), (1, 8, 15)]
    ((stack,),) = eval_loader(PascalContext(pascal_context, "val", Resize((9, 9))), 2)
    assert stack[1].shape == (2, 9, 9)


def test_workers_read_what_one_process_reads_and_stay():
    loader = eval_loader(Synthetic("val", 5, (32, 32)), 2, workers=2)
    assert loader.persistent_workers
    for _ in range(2):
        for stacks, alone in zip(loader, eval_loader(Synthetic("val", 5, (32, 32)), 2), strict=True):
            for one, other in zip(stacks, alone, strict=True):
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])
