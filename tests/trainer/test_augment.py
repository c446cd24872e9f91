from __future__ import annotations

import torch

from pixcontrast_ext.trainer.augment import Augment
from pixcontrast_ext.trainer.config import DataConfig
from pixcontrast_ext.trainer.data import IGNORE


def painted(seed: int = 0, classes: int = 5):
    """Images whose red channel is their label: 10 + 20 x class, 110 for void, constant over blocks of 12."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes + 1, (6, 6, 8), generator=generator)
    labels = labels.repeat_interleave(12, 1).repeat_interleave(12, 2)
    images = torch.stack([(10 + 20 * labels) / 255, torch.ones(labels.shape), torch.ones(labels.shape)], 1)
    return images, torch.where(labels == classes, IGNORE, labels)


def test_labels_move_with_their_images():
    images, labels = painted()
    torch.manual_seed(1)
    config = DataConfig(zoom=(0.6, 1.6), rotate=20, jitter=0)
    moved, moved_labels = Augment(config)(images, labels)
    assert moved.shape == images.shape and moved_labels.shape == labels.shape
    assert not torch.equal(moved_labels, labels)
    assert set(moved_labels.unique().tolist()) <= {0, 1, 2, 3, 4, IGNORE}
    inside = moved[:, 1] > 0.999  # the green channel tells what came from the image
    expected = torch.where(moved_labels == IGNORE, 5, moved_labels)
    agree = ((moved[:, 0] * 255 - 10) / 20 - expected).abs() < 0.5
    assert agree[inside].float().mean() > 0.9  # the rest lies on edges, which images blend and labels do not
    outside = moved[:, 1] == 0
    assert 0.02 < outside.float().mean() < 0.6
    assert (moved_labels[outside] == IGNORE).float().mean() > 0.99


def test_crop_sets_the_size_and_pads_with_void():
    images, labels = painted()
    torch.manual_seed(0)
    still = DataConfig(crop=(40, 120), zoom=(1, 1), rotate=0, jitter=0)
    moved, moved_labels = Augment(still)(images, labels)
    assert moved.shape == (6, 3, 40, 120) and moved_labels.shape == (6, 40, 120)
    assert (moved_labels == IGNORE).float().mean() >= 0.2  # 24 of 120 columns cannot come from 96


def test_augmentation_is_a_function_of_the_seed():
    images, labels = painted()
    augment = Augment(DataConfig(crop=(48, 48)))
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(augment(images, labels))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    assert results[0][0].min() >= 0 and results[0][0].max() <= 1


def test_void_stays_void():
    images, _ = painted()
    labels = torch.full((6, 72, 96), IGNORE)
    assert (Augment(DataConfig())(images, labels)[1] == IGNORE).all()
