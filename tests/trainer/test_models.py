"""Models: sizes, gradients, and a network that a user adds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pixcontrast_ext.trainer import models
from pixcontrast_ext.trainer.models import (
    SegmentationModel,
    build_model,
    drop_embed_head,
    load_weights,
    register,
)


@pytest.mark.parametrize("head", ["convmlp", "linear"])
def test_compact_has_1_to_2_million_parameters(head):
    model = build_model("compact", 11, 256, head)
    assert 1_000_000 < sum(weight.numel() for weight in model.parameters()) < 2_000_000


@pytest.mark.parametrize("size", [(64, 64), (37, 51), (33, 90), (1, 1), (5, 130)])
def test_output_stride_is_4_for_any_size(size):
    model = build_model("compact", 7, 24).eval()
    with torch.no_grad():
        outputs = model(torch.rand(2, 3, *size))
    height, width = -(-size[0] // 4), -(-size[1] // 4)
    assert set(outputs) == {"seg", "embed"}
    assert outputs["seg"].shape == (2, 7, height, width)
    assert outputs["embed"].shape == (2, 24, height, width)
    assert all(output.isfinite().all() for output in outputs.values())


def test_every_parameter_gets_a_gradient():
    model = build_model("compact", 5, 16)
    outputs = model(torch.rand(2, 3, 40, 40))
    (outputs["seg"].square().mean() + outputs["embed"].square().mean()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_without_the_head_the_prediction_is_the_same():
    torch.manual_seed(0)
    model = build_model("compact", 5, 16).eval()
    images = torch.rand(1, 3, 45, 33)
    with torch.no_grad():
        whole = model(images)
        weights = model.state_dict()
        bare = drop_embed_head(build_model("compact", 5, 16)).eval()
        load_weights(bare, weights)
        outputs = bare(images)
    assert set(outputs) == {"seg"}
    assert torch.equal(outputs["seg"], whole["seg"])
    assert not any(name.startswith("embed_head") for name in bare.state_dict())


def test_weights_that_do_not_fit_are_named():
    weights = build_model("compact", 5, 16).state_dict()
    with pytest.raises(ValueError, match=r"(?s)do not fit the model.*seg_head\.1\.weight"):
        load_weights(build_model("compact", 6, 16), weights)
    del weights["backbone.fuse.0.0.weight"]
    with pytest.raises(ValueError, match=r"(?s)Missing key.*backbone\.fuse"):
        load_weights(drop_embed_head(build_model("compact", 5, 16)), weights)


def test_a_model_of_ones_own_plugs_in(monkeypatch):
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))

    class Backbone(nn.Conv2d):
        channels = 6

    @register("mine")
    def build(num_classes, embed_dim, head):
        return SegmentationModel(Backbone(3, 6, 3, 2, 1), num_classes, embed_dim, head)

    outputs = build_model("mine", 4, 8)(torch.rand(1, 3, 10, 10))
    assert outputs["seg"].shape == (1, 4, 5, 5)
    assert outputs["embed"].shape == (1, 8, 5, 5)
    with pytest.raises(ValueError, match="already a model 'mine'"):
        register("mine")(build)


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="--model is 'nope', must be one of compact"):
        build_model("nope", 3)
