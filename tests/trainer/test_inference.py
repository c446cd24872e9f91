"""Windows, scales and flips, compared with the same computation pixel by pixel."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixcontrast_ext.trainer.config import InferenceConfig
from pixcontrast_ext.trainer.inference import class_probabilities, predict, window_starts


class Pixelwise(nn.Module):
    """Sees one pixel at a time, so windows, scales and flips make no difference."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, images):
        return {"seg": 4 * self.conv(images)}


class Strided(nn.Module):
    """Sees neighbouring pixels and their position in its input, at stride 4."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 5, 5, stride=4, padding=2)

    def forward(self, images):
        logits = 4 * self.conv(images)
        return {"seg": logits + torch.linspace(0, 2, logits.shape[3])}


def upsampled_softmax(model, images, size):
    logits = F.interpolate(model(images)["seg"], size, mode="bilinear", align_corners=False)
    return logits.softmax(1)


@pytest.mark.parametrize("window", [1, 4, 7, 10])
@pytest.mark.parametrize("stride", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 4, 9, 10, 23])
def test_windows_cover_and_stay_inside(length, window, stride):
    if stride > window:
        pytest.skip("the options refuse a stride beyond the window")
    starts = window_starts(length, window, stride)
    covered = {place for start in starts for place in range(start, start + min(window, length))}
    assert covered == set(range(length))
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert all(later - start <= stride for start, later in itertools.pairwise(starts))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        InferenceConfig(flip=True),
        InferenceConfig(window=(7, 9)),
        InferenceConfig(window=(50, 6), stride=(1, 6), flip=True),
        InferenceConfig(window=(1, 1)),
    ],
)
def test_a_model_of_single_pixels_says_the_same_however_it_is_asked(options):
    model, images = Pixelwise(), torch.rand(2, 3, 13, 22)
    expected = model(images)["seg"].softmax(1)
    found = class_probabilities(model, images, (13, 22), options)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(predict(model, images, (13, 22), options), expected.argmax(1))


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 28), (33, 50)])
def test_flip_is_the_mean_with_the_mirrored_prediction_of_the_mirror_image(size):
    model, images = Strided(), torch.rand(2, 3, 40, 28)
    straight = upsampled_softmax(model, images, size)
    mirrored = upsampled_softmax(model, images.flip(3), size).flip(3)
    found = class_probabilities(model, images, size, InferenceConfig(flip=True))
    torch.testing.assert_close(found, (straight + mirrored) / 2)


@torch.no_grad()
def test_scales_are_averaged_at_the_size_asked_for():
    model, images, size = Strided(), torch.rand(1, 3, 40, 28), (20, 14)
    resized = [
        F.interpolate(images, extent, mode="bilinear", align_corners=False, antialias=True)
        for extent in ((20, 14), (60, 42))
    ]
    views = [images, *resized]
    expected = sum(upsampled_softmax(model, view, size) for view in views) / 3
    found = class_probabilities(model, images, size, InferenceConfig(scales=(1, 0.5, 1.5)))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, upsampled_softmax(model, images, size), atol=1e-2)


@torch.no_grad()
def test_logits_may_be_averaged_in_place_of_probabilities():
    model, images = Strided(), torch.rand(1, 3, 24, 32)
    options = InferenceConfig(scales=(1.0, 0.5), flip=True, average="logits")
    half = F.interpolate(images, (12, 16), mode="bilinear", align_corners=False, antialias=True)
    total = 0
    with torch.no_grad():
        for view in (images, half):
            for mirrored in (False, True):
                logits = model(view.flip(3) if mirrored else view)["seg"]
                logits = F.interpolate(logits, (24, 32), mode="bilinear", align_corners=False)
                total = total + (logits.flip(3) if mirrored else logits)
        found = class_probabilities(model, images, (24, 32), options)
        of_probabilities = class_probabilities(
            model, images, (24, 32), InferenceConfig((24, 32), None, (1.0, 0.5), True)
        )
    assert torch.allclose(found, (total / 4).softmax(1), atol=1e-6)
    assert not torch.allclose(found, of_probabilities, atol=1e-2)
    windows = InferenceConfig(window=(24, 32), average="logits")  # one window, the whole image
    with torch.no_grad():
        assert torch.allclose(
            class_probabilities(model, images, (24, 32), windows),
            class_probabilities(model, images, (24, 32), InferenceConfig(average="logits")),
            atol=1e-6,
        )


def test_where_windows_overlap_their_mean_counts():
    model, images = Strided(), torch.rand(1, 3, 17, 30)
    total, seen = torch.zeros(1, 5, 17, 30), torch.zeros(17, 30)
    for top in (0, 8, 9):
        for left in (0, 8, 16, 18):
            view = images[:, :, top : top + 8, left : left + 12]
            total[:, :, top : top + 8, left : left + 12] += upsampled_softmax(model, view, (8, 12))
            seen[top : top + 8, left : left + 12] += 1
    assert seen.unique().tolist() == [1, 2, 3, 4, 6]
    found = class_probabilities(model, images, (17, 30), InferenceConfig(window=(8, 12), stride=(8, 8)))
    torch.testing.assert_close(found, total / seen)


@torch.no_grad()
def test_the_stride_is_two_thirds_of_the_window_unless_given():
    model, images = Strided(), torch.rand(1, 3, 31, 40)
    found = class_probabilities(model, images, (31, 40), InferenceConfig(window=(12, 16)))
    same = class_probabilities(model, images, (31, 40), InferenceConfig(window=(12, 16), stride=(8, 10)))
    assert torch.equal(found, same)


@torch.no_grad()
def test_a_window_larger_than_the_image_is_the_image():
    model, images = Strided(), torch.rand(1, 3, 20, 24)
    found = class_probabilities(model, images, (20, 24), InferenceConfig(window=(512, 1024)))
    torch.testing.assert_close(found, upsampled_softmax(model, images, (20, 24)))


@torch.no_grad()
def test_without_options_the_prediction_is_that_of_the_image_at_once():
    model, images = Strided(), torch.rand(3, 3, 20, 24)
    expected = upsampled_softmax(model, images, (40, 30)).argmax(1)
    assert (predict(model, images, (40, 30)) == expected).float().mean() > 0.999
    assert torch.equal(predict(model, images, (40, 30)), predict(model, images, (40, 30), InferenceConfig()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0, 4)}, r"--window is \(0, 4\), must be at least 1 by 1"),
        ({"window": (4, 4), "stride": (0, 1)}, r"--stride is \(0, 1\), must be at least 1 by 1"),
        ({"stride": (2, 2)}, r"--stride is \(2, 2\), must be left out where there is no --window"),
        ({"window": (4, 4), "stride": (4, 5)}, r"--stride is \(4, 5\), must be at most the window, \(4, 4\)"),
        ({"scales": ()}, r"--scales is \(\), must be at least one number"),
        ({"scales": (1.0, 0.0)}, r"--scales is \(1.0, 0.0\), must be finite and above 0"),
        ({"scales": (float("nan"),)}, r"--scales is \(nan,\), must be finite and above 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        InferenceConfig(**options).validate()
