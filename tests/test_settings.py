"""Losses whose parts are given as settings, as a config of dicts gives them."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from pixcontrast_ext import (
    MemoryBank,
    Mining,
    PixelContrastCrossEntropyLoss,
    PixelContrastLoss,
    ProjectionHead,
)

pytestmark = pytest.mark.whole

LOSSES = [PixelContrastLoss, PixelContrastCrossEntropyLoss]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_bank_from_its_settings(loss):
    settings = OrderedDict(embed_dim=6, region_slots=7, pixel_slots=9, pixels_per_image=2, dtype="bfloat16")
    given = dict(settings)
    criterion = loss(5, ignore_index=3, normalize=False, bank=settings)
    bank = criterion.bank
    assert isinstance(bank, MemoryBank)
    assert (bank.num_classes, bank.embed_dim, bank.ignore_index, bank.normalize) == (5, 6, 3, False)
    assert (bank.region_slots, bank.pixel_slots, bank.pixels_per_image) == (7, 9, 2)
    assert bank.keys.dtype == torch.bfloat16
    assert settings == given
    assert {key for key in criterion.state_dict() if key.endswith("bank.keys")}


def test_a_bank_from_its_width_alone_has_the_bank_s_defaults():
    bank, expected = PixelContrastLoss(5, bank=dict(embed_dim=6)).bank, MemoryBank(5, 6)
    assert bank.extra_repr() == expected.extra_repr()


@pytest.mark.parametrize("loss", LOSSES)
def test_mining_and_head_from_their_settings(loss):
    criterion = loss(
        3, mining=dict(strategy="random", negatives=5), head=dict(in_channels=4, embed_dim=6, kind="linear")
    )
    contrast = getattr(criterion, "contrast", criterion)
    assert contrast.mining == Mining("random", negatives=5)
    assert isinstance(contrast.head, ProjectionHead)
    assert {tuple(weight.shape) for weight in criterion.parameters()} == {(6, 4, 1, 1), (6,)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            dict(bank=dict(embed_dims=6)),
            ValueError,
            "bank: 'embed_dims' is no setting of MemoryBank, which has embed",
        ),
        (dict(bank={}), ValueError, "bank: MemoryBank needs embed_dim, got nothing"),
        (dict(bank=dict(region_slots=6)), ValueError, "bank: MemoryBank needs embed_dim, got region_slots"),
        (
            dict(bank=dict(embed_dim=6, num_classes=4)),
            ValueError,
            "bank: num_classes is that of the loss, 4: leave",
        ),
        (
            dict(bank=dict(embed_dim=6, normalize=False)),
            ValueError,
            "bank: normalize is that of the loss, True",
        ),
        (dict(bank=dict(embed_dim=6, dtype="half-ish")), ValueError, "dtype must be the name of one"),
        (dict(bank=dict(embed_dim=0)), ValueError, "embed_dim must be at least 1, got 0"),
        (
            dict(mining=dict(fractoin=0.1)),
            ValueError,
            "mining: 'fractoin' is no setting of Mining, which has strategy",
        ),
        (dict(head=dict(embed_dim=6)), ValueError, "head: ProjectionHead needs in_channels, got embed_dim"),
    ],
)
def test_bad_settings(loss, settings, error, message):
    with pytest.raises(error, match=message):
        loss(4, **settings)
