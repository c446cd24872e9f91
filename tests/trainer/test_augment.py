"""Augmentation: images and labels move together, and a seed always gives the same result."""

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
    assert moved.shape == images.shape
    assert moved_labels.shape == labels.shape
    assert not torch.equal(moved_labels, labels)
    assert set(moved_labels.unique().tolist()) <= {0, 1, 2, 3, 4, IGNORE}
    inside = moved[:, 1] > 0.999  # the green channel tells what came from the image
    expected = torch.where(moved_labels == IGNORE, 5, moved_labels)
    agree = ((moved[:, 0] * 255 - 10) / 20 - expected).abs() < 0.5
    assert agree[inside].float().mean() > 0.9  # the rest lies on edges, where images blend and labels do not
    outside = moved[:, 1] == 0
    assert 0.02 < outside.float().mean() < 0.6
    assert (moved_labels[outside] == IGNORE).float().mean() > 0.99


def test_crop_sets_the_size_and_pads_with_void():
    images, labels = painted()
    torch.manual_seed(0)
    still = DataConfig(crop=(40, 120), zoom=(1, 1), rotate=0, jitter=0)
    moved, moved_labels = Augment(still)(images, labels)
    assert moved.shape == (6, 3, 40, 120)
    assert moved_labels.shape == (6, 40, 120)
    assert (moved_labels == IGNORE).float().mean() >= 0.2  # 24 of 120 columns cannot come from 96


def test_augmentation_is_a_function_of_the_seed():
    images, labels = painted()
    augment = Augment(DataConfig(crop=(48, 48)))
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(augment(images, labels))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    assert results[0][0].min() >= 0
    assert results[0][0].max() <= 1


def test_void_stays_void():
    images, _ = painted()
    labels = torch.full((6, 72, 96), IGNORE)
    assert (Augment(DataConfig())(images, labels)[1] == IGNORE).all()


def numbered(height, width):
    """An image whose labels number its pixels by row and by column, fewer than 255 of each."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    return torch.rand(64, 3, height, width), rows.expand(64, -1, -1), columns.expand(64, -1, -1)


def test_a_crop_lies_in_the_zoomed_image_and_can_lie_anywhere_in_it():
    images, rows, columns = numbered(40, 60)
    augment = Augment(DataConfig(crop=(32, 32), zoom=(1, 2), rotate=0, jitter=0))
    for labels, length in ((rows, 40), (columns, 60)):
        torch.manual_seed(3)
        shown = augment(images, labels)[1]
        assert (shown != IGNORE).all()
        assert shown.min() <= 1  # over the 64 crops
        assert shown.max() >= length - 2


def test_an_image_smaller_than_the_crop_is_shown_whole():
    images, rows, columns = numbered(40, 60)
    augment = Augment(DataConfig(crop=(50, 70), zoom=(0.5, 1), rotate=0, jitter=0))
    for labels, length in ((rows, 40), (columns, 60)):
        torch.manual_seed(3)
        shown = augment(images, labels)[1]
        seen = shown.masked_fill(shown == IGNORE, 0).flatten(1)
        assert (seen.amax(1) >= length - 3).all()
        first = shown.masked_fill(shown == IGNORE, length).flatten(1)
        assert (first.amin(1) <= 2).all()


def test_half_of_the_images_are_mirrored_about_themselves():
    images, _, columns = numbered(20, 30)
    still = Augment(DataConfig(zoom=(1, 1), rotate=0, jitter=0))
    torch.manual_seed(0)
    shown = still(images, columns)[1]
    mirrored = (shown == columns.flip(2)).flatten(1).all(1)
    straight = (shown == columns).flatten(1).all(1)
    assert (mirrored ^ straight).all()
    assert 16 < mirrored.sum() < 48


def test_a_rotation_is_about_the_centre_and_by_the_angles_drawn():
    labels = torch.full((64, 41, 41), IGNORE)
    labels[:, 20, 4:37], labels[:, 20, 20] = 1, 2
    torch.manual_seed(0)
    turned = Augment(DataConfig(zoom=(1, 1), rotate=30, jitter=0))(torch.rand(64, 3, 41, 41), labels)[1]
    assert (turned[:, 20, 20] == 2).all()
    slopes = []
    for each in turned:
        y, x = torch.nonzero(each == 1).float().T
        slopes.append(torch.rad2deg(torch.atan(((y - 20) * (x - 20)).sum() / ((x - 20) ** 2).sum())))
    angles = torch.stack(slopes)
    assert angles.min() > -31
    assert angles.max() < 31
    assert angles.min() < -20
    assert angles.max() > 20


def test_what_an_image_becomes_does_not_depend_on_its_neighbours():
    images, labels = painted()
    small, small_labels = images[:, :, :36, :48], labels[:, :36, :48]
    padded, padded_labels = torch.zeros_like(images), torch.full_like(labels, IGNORE)
    padded[:, :, :36, :48], padded_labels[:, :36, :48] = small, small_labels
    augment = Augment(DataConfig(crop=(30, 40), zoom=(0.4, 0.9), rotate=10))
    torch.manual_seed(2)
    alone = augment(small, small_labels)
    torch.manual_seed(2)
    beside = augment(padded, padded_labels, torch.tensor([[36, 48]] * 6))
    assert torch.equal(alone[1], beside[1])
    assert (alone[1] == IGNORE).float().mean() > 0.1
    torch.testing.assert_close(alone[0], beside[0], atol=2e-3, rtol=0)
