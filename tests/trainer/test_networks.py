"""The networks of the paper: what they compute, how large they are, and that they train."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pixcontrast_ext import PixelContrastLoss
from pixcontrast_ext.trainer import inference, train
from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.checkpoints import CheckpointStore
from pixcontrast_ext.trainer.config import DataConfig, ModelConfig, flatten
from pixcontrast_ext.trainer.distributed import Ranks
from pixcontrast_ext.trainer.evaluate import load_model
from pixcontrast_ext.trainer.logs import read_rows
from pixcontrast_ext.trainer.models import (
    MODELS,
    build_model,
    defer_embed_head,
    drop_embed_head,
    load_weights,
    sisters,
)
from pixcontrast_ext.trainer.networks.deeplabv3 import WideASPP
from pixcontrast_ext.trainer.networks.ocr import ObjectContext
from pixcontrast_ext.trainer.networks.weights import fetch_backbone, load_backbone

CPU = torch.device("cpu")
NETWORKS = [name for name in MODELS if name.startswith(("deeplabv3", "hrnet"))]


def size_of(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.fixture
def deeplabv3():
    return build_model("deeplabv3_resnet50_torchvision", 21, 16).eval()


@pytest.fixture
def hrnet():
    return build_model("hrnet_w18", 19, 16).eval()


# Parameters without the projection head. From torchvision's table (21 classes, with the auxiliary head); and in
# millions, from the papers and their code (19 classes): HRNetV2-W18 9.6, W48 65.8, W48 with OCR 70.3. The number for
# W18 with OCR was counted here. Those of the contrast's authors, by hand from the blocks of their code (19 classes):
#   DeepLab  pyramid 2 * 2048*512 + 3 * 9*2048*512 + 9*2560*512 + 6 norms of 2*512     = 42,211,328
#            then 9*512*512 + 2*512 + 512*19 + 19                                      =  2,370,067
#            auxiliary 9*1024*256 + 256 + 2*256 + 256*19 + 19                          =  2,364,947
#   stem     27*64 + 576*64 + 576*128 + 2*64 + 2*64 + 2*128 and 128*64 + 128*256 in the block that reads its 128
#            channels, for 147*64 + 2*64 and 64*64 + 64*256 of the 7x7 one                =    123,776
#   HRNet    9*720*720 + 720 + 2*720 + 720*19 (W18: 270 for 720)                       =  4,681,440
#   OCR      its own, and in the auxiliary classifier 9*720*720 + 720 for 720*720, and 512 biases of the 3x3 before it
@pytest.mark.parametrize(
    ("name", "classes", "backbone", "whole"),
    [
        ("deeplabv3_resnet50_torchvision", 21, 23_508_032, 42_004_074),
        ("deeplabv3_resnet101_torchvision", 21, 42_500_160, 60_996_202),
        ("hrnet_w18_v2", 19, 9_562_260, 9.6e6),
        ("hrnet_w48_v2", 19, 65_325_120, 65.8e6),
        ("hrnet_w18_v2_ocr", 19, 9_562_260, 12_080_036),
        ("hrnet_w48_v2_ocr", 19, 65_325_120, 70.3e6),
        ("deeplabv3_resnet50", 19, 23_631_808, 23_508_032 + 123_776 + 42_211_328 + 2_370_067 + 2_364_947),
        ("deeplabv3_resnet101", 19, 42_623_936, 42_500_160 + 123_776 + 42_211_328 + 2_370_067 + 2_364_947),
        ("hrnet_w18", 19, 9_562_260, 9_562_260 + 9 * 270 * 270 + 3 * 270 + 270 * 19),
        ("hrnet_w48", 19, 65_325_120, 65_325_120 + 4_681_440),
        ("hrnet_w18_ocr", 19, 9_562_260, 12_080_036 + 8 * 270 * 270 + 270 + 512),
        ("hrnet_w48_ocr", 19, 65_325_120, 74.5e6),
    ],
)
def test_parameters_are_as_many_as_published(name, classes, backbone, whole):
    with torch.device("meta"):
        model = build_model(name, classes)
    assert size_of(model.backbone) == backbone
    head = size_of(model.embed_head)
    assert head > 0
    drop_embed_head(model)
    assert size_of(model) == pytest.approx(whole, abs=0 if isinstance(whole, int) else 0.1e6)


def products_of(module, *arguments):
    """Multiplications of a forward, each with its addition."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*arguments)
    return counter.get_total_flops() // 2


def test_products_are_as_many_as_published():
    """HRNetV2-W48 in its paper's table at 1024x2048, in units of 1024^3; DeepLabV3 in torchvision's, at 520x520."""
    from torchvision.models import segmentation

    with torch.device("meta"):
        hrnet = drop_embed_head(build_model("hrnet_w48_v2", 19)).eval()
        assert products_of(hrnet, torch.empty(1, 3, 1024, 2048)) / 1024**3 == pytest.approx(696.2, abs=0.05)
        images = torch.empty(1, 3, 520, 520)
        for name in ("ResNet50", "ResNet101"):
            published = getattr(segmentation, f"DeepLabV3_{name}_Weights").DEFAULT.meta["_ops"]
            model = drop_embed_head(build_model(f"deeplabv3_{name.lower()}_torchvision", 21)).eval()
            own = products_of(model, images) + products_of(model.aux_head, model.backbone.stages(images)[0])
            assert own / 1e9 == pytest.approx(published, abs=5e-4)


def test_deeplabv3_without_the_auxiliary_head_is_as_large_as_published(deeplabv3):
    own = size_of(deeplabv3) - size_of(deeplabv3.embed_head) - size_of(deeplabv3.aux_head)
    assert own == 39_638_869  # torchvision's deeplabv3_resnet50 of 21 classes, aux_loss=False


@pytest.mark.parametrize("size", [(64, 64), (33, 90), (1, 1)])
@pytest.mark.parametrize(
    "name", ["deeplabv3_resnet50", "deeplabv3_resnet50_torchvision", "hrnet_w18", "hrnet_w18_ocr"]
)
def test_outputs_share_one_grid_for_any_size(name, size):
    stride = 8 if name.startswith("deeplabv3") else 4
    model = build_model(name, 7, 24)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        outputs = model.eval()(images)
        features = model.backbone(images)
        model.train()
        if min(size) > 1:
            assert set(model(images)) == (
                {"seg", "embed"} if name == "hrnet_w18" else {"seg", "embed", "aux"}
            )
    grid = tuple(-(-length // stride) for length in size)
    if name == "deeplabv3_resnet50":  # the pooling of the deep stem rounds up
        grid = tuple(-(-length // 2) // 4 + 1 for length in size)
    assert set(outputs) == {"seg", "embed"}
    assert outputs["seg"].shape == (2, 7, *grid)
    assert outputs["embed"].shape == (2, 24, *grid)
    assert features.shape == (2, model.backbone.channels, *grid)  # pictures and embeddings are made of these
    assert all(output.isfinite().all() for output in outputs.values())


def test_widths_of_the_features():
    with torch.device("meta"):
        assert build_model("hrnet_w48", 19).backbone.channels == 720
        assert build_model("hrnet_w18", 19).backbone.channels == 270
        for name in NETWORKS:
            model = build_model(name, 19)
            assert model.embed_head.project[0].in_channels == model.backbone.channels
        assert build_model("deeplabv3_resnet101", 19).backbone.channels == 2048


def test_deeplabv3_computes_what_torchvisions_does(deeplabv3):
    from torchvision.models.segmentation import deeplabv3_resnet50

    theirs = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True).eval()
    theirs.backbone.load_state_dict(deeplabv3.backbone.body.state_dict())
    theirs.classifier.load_state_dict(deeplabv3.seg_head.state_dict())
    theirs.aux_classifier.load_state_dict(deeplabv3.aux_head.state_dict())
    images = torch.rand(1, 3, 65, 90)
    normal = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        expected = theirs(normal)
        seg = deeplabv3(images)["seg"]
        aux = deeplabv3.aux_head(deeplabv3.backbone.stages(images)[0])
    for ours, name in ((seg, "out"), (aux, "aux")):
        ours = F.interpolate(ours, (65, 90), mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours, expected[name], rtol=1e-4, atol=1e-5)


def test_hrnet_joins_its_branches_and_pads_with_the_mean_colour(hrnet):
    backbone = hrnet.backbone
    images = torch.rand(1, 3, 50, 70)
    mean = torch.tensor([0.485, 0.456, 0.406])[None, :, None, None]
    padded = mean.expand(1, 3, 64, 96).clone()
    padded[..., :50, :70] = images
    with torch.no_grad():
        branches = backbone.body((padded - mean) / torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        features = backbone(images)
    assert [branch.shape[1] for branch in branches] == [18, 36, 72, 144]
    first = 0
    for branch in branches:
        upsampled = F.interpolate(branch, (16, 24), mode="bilinear")[..., :13, :18]
        torch.testing.assert_close(features[:, first : first + branch.shape[1]], upsampled)
        first += branch.shape[1]


def test_the_authors_pyramid_is_their_blocks_one_by_one():
    """Branches of a 1x1 and of 3x3 convolutions at the rates 12, 24, 36, and the mean, joined by a 3x3 one."""
    pyramid = WideASPP(6).eval()
    for norm in pyramid.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    features = torch.randn(2, 6, 40, 45)

    def block(of, x, **options):
        return F.relu(of[1](F.conv2d(x, of[0].weight, **options)))

    with torch.no_grad():
        parts = [block(pyramid.branches[0], features)]
        for branch, rate in zip(pyramid.branches[1:], (12, 24, 36), strict=True):
            parts.append(block(branch, features, padding=rate, dilation=rate))
        pooled = block(pyramid.pooled, F.adaptive_avg_pool2d(features, 1))
        parts.append(F.interpolate(pooled, (40, 45), mode="bilinear", align_corners=True))
        expected = block(pyramid.fuse, torch.cat(parts, 1), padding=1)
        torch.testing.assert_close(pyramid(features), expected, rtol=1e-4, atol=1e-5)


def test_the_authors_heads():
    model = build_model("deeplabv3_resnet50", 7, 16)
    assert [type(each).__name__ for each in model.seg_head] == ["WideASPP", "Conv2d", "BatchNorm2d", "Conv2d"]
    convs = [each for each in model.seg_head.modules() if isinstance(each, nn.Conv2d)]
    for conv in (*convs, *(each for each in model.embed_head.modules() if isinstance(each, nn.Conv2d))):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)  # kaiming_normal_
        assert conv.bias is None or not conv.bias.any()
    assert not any(isinstance(each, nn.Dropout) for each in model.modules())
    head = build_model("hrnet_w18", 7, 16).seg_head
    assert [type(each).__name__ for each in head] == ["Sequential", "Dropout2d", "Conv2d"]
    assert (head[0][0].kernel_size, head[1].p, head[2].bias) == ((3, 3), 0.1, None)


def test_aligned_corners_reach_everything_that_upsamples():
    model = build_model("hrnet_w18", 7, 16)
    aligned = build_model("hrnet_w18", 7, 16, align_corners=True)
    aligned.load_state_dict(model.state_dict())
    for each, expected in ((model, False), (aligned, True)):
        ups = [module for module in each.modules() if isinstance(module, nn.Upsample)]
        assert len(ups) > 10
        assert {(module.mode, module.align_corners) for module in ups} == {("bilinear", expected)}
        assert each.backbone.align_corners == each.align_corners == expected
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        one, other = (each.eval()(images)["seg"] for each in (model, aligned))
        assert not torch.allclose(one, other, atol=1e-3)
        probabilities = F.interpolate(other, (64, 64), mode="bilinear", align_corners=True)
        assert torch.equal(inference.predict(aligned, images, (64, 64)), probabilities.argmax(1))


def test_object_context_is_the_papers_formulas():
    """The formulas of arXiv 1909.11065, section 3.2, pixel by pixel and region by region."""
    context = ObjectContext(width=6, key_width=4).eval()
    for norm in context.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    pixels, regions = torch.randn(2, 6, 3, 5), torch.randn(2, 7, 3, 5)
    with torch.no_grad():
        result = context(pixels, regions)
        for image in range(2):
            rows, scores = pixels[image].flatten(1).T, regions[image].flatten(1)
            represented = []
            for k in range(7):
                membership = scores[k].exp() / scores[k].exp().sum()
                represented.append(sum(membership[i] * rows[i] for i in range(15)))
            for i in range(15):
                at = rows[i][None, :, None, None]
                key = context.pixel_key(at).flatten()
                weights = torch.stack(
                    [(key @ context.region_key(f[None, :, None, None]).flatten()) / 2 for f in represented]
                ).exp()
                values = [context.region_value(f[None, :, None, None]) for f in represented]
                gathered = sum(w * value for w, value in zip(weights / weights.sum(), values, strict=True))
                expected = context.fuse(torch.cat([context.context(gathered), at], 1)).flatten()
                torch.testing.assert_close(result[image].flatten(1).T[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["compact", "deeplabv3_resnet50", "hrnet_w18_ocr"])
def test_all_but_the_head_starts_the_same_whatever_the_head(name):
    starts = []
    for embed_dim, head in ((16, "convmlp"), (24, "convmlp"), (16, "linear")):
        torch.manual_seed(0)
        starts.append(drop_embed_head(build_model(name, 5, embed_dim, head)).state_dict())
    assert all(torch.equal(start[key], starts[0][key]) for start in starts for key in start)


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "hrnet_w18", "hrnet_w18_ocr"])
def test_contrast_leaves_no_trace(name):
    model = build_model(name, 5, 16).eval()
    images = torch.rand(1, 3, 45, 33)
    bare = drop_embed_head(build_model(name, 5, 16)).eval()
    load_weights(bare, model.state_dict())
    assert not any("embed" in key or "bank" in key for key in bare.state_dict())
    with torch.no_grad():
        outputs = bare(images)
        assert set(outputs) == {"seg"}
        assert torch.equal(outputs["seg"], model(images)["seg"])


def test_a_checkpoint_of_other_heads_is_told_what_it_may_be(tiny, tmp_path):
    state = {
        "step": 1,
        "model": build_model("hrnet_w18_v2", 9, 16).state_dict(),
        "config": flatten(tiny(contrast="off", net=ModelConfig(model="hrnet_w18", embed_dim=16))),
    }
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(
        ValueError, match=r"(?s)old\.pt: .* do not fit .*; .* there is also hrnet_w18_v2: was it"
    ):
        load_model(tmp_path / "old.pt", CPU)
    assert sisters("deeplabv3_resnet50") == ["deeplabv3_resnet50", "deeplabv3_resnet50_torchvision"]
    assert sisters("hrnet_w48_v2_ocr") == ["hrnet_w48_ocr", "hrnet_w48_v2_ocr"]
    assert sisters("compact") == ["compact"]


# Weights


def randomised(module):
    return {
        name: torch.rand_like(value) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_classifier_go_into_the_backbone(deeplabv3, tmp_path, suffix):
    from safetensors.torch import save_file
    from torchvision.models import resnet50

    theirs, path = randomised(resnet50(weights=None)), tmp_path / f"resnet50{suffix}"
    assert "fc.weight" in theirs
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in theirs.items()}}, path)
    else:
        save_file(theirs, path)
    load_backbone(deeplabv3, path)
    loaded = deeplabv3.backbone.body.state_dict()
    assert all(torch.equal(loaded[name], theirs[name]) for name in loaded)


def test_weights_of_a_deep_stem_go_by_timms_names_and_by_numbers(tmp_path):
    import timm

    theirs = randomised(timm.create_model("resnet50s"))
    numbered = {
        "conv1.0": "conv1",
        "conv1.1": "bn1",
        "conv1.3": "conv2",
        "conv1.4": "bn2",
        "conv1.6": "conv3",
        "bn1": "bn3",
    }
    renamed = {}
    for name, value in theirs.items():
        part = next((part for part in numbered if name.startswith(f"{part}.")), None)
        renamed[name if part is None else numbered[part] + name.removeprefix(part)] = value
    assert renamed["bn3.weight"] is theirs["bn1.weight"]
    for kind, weights in (("timm", theirs), ("numbered", renamed)):
        fetched = build_model("deeplabv3_resnet50", 5, 16)
        torch.save(weights, tmp_path / f"{kind}.pth")
        load_backbone(fetched, tmp_path / f"{kind}.pth")
        loaded = fetched.backbone.body.state_dict()
        assert all(torch.equal(loaded[name], theirs[name]) for name in loaded), kind


def test_weights_of_hrnet_and_of_ones_own_checkpoint(hrnet, tmp_path):
    import timm

    theirs = randomised(timm.create_model("hrnet_w18"))
    old = {name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "hrnet.pth")
    load_backbone(hrnet, tmp_path / "hrnet.pth")
    loaded = hrnet.backbone.body.state_dict()
    assert all(torch.equal(loaded[name], theirs[name]) for name in loaded)

    torch.save({"step": 3, "model": hrnet.state_dict(), "config": {}}, tmp_path / "own.pt")
    other = build_model("hrnet_w18_ocr", 5)
    load_backbone(other, tmp_path / "own.pt")
    assert all(torch.equal(value, loaded[name]) for name, value in other.backbone.body.state_dict().items())


def test_weights_of_any_backbone(tmp_path):
    theirs = randomised(build_model("compact", 3).backbone)
    torch.save(theirs, tmp_path / "compact.pth")
    model = build_model("compact", 5)
    load_backbone(model, tmp_path / "compact.pth")
    assert all(torch.equal(value, theirs[name]) for name, value in model.backbone.state_dict().items())


def test_weights_that_do_not_fit_are_named(hrnet, tmp_path):
    path, before = tmp_path / "mine.pth", hrnet.backbone.body.state_dict()
    state = {name: value.clone() for name, value in before.items()}
    del state["conv2.weight"], state["layer1.0.bn1.bias"]
    state["conv1.weight"] = torch.zeros(32, 3, 3, 3)
    state["stem.weight"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(
        ValueError,
        match=r"mine\.pth do not fit the backbone: missing: conv2\.weight, layer1\.0\.bn1\.bias; "
        r"unknown: stem\.weight; of another shape: conv1\.weight \[32, 3, 3, 3\], expected \[64, 3, 3, 3\]",
    ):
        load_backbone(hrnet, path)
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"missing: bn1\.bias, .* and \d+ more"):
        load_backbone(hrnet, path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"mine\.pth must hold tensors by name"):
        load_backbone(hrnet, path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"mine\.pth cannot be read"):
        load_backbone(hrnet, path)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth do not exist"):
        load_backbone(hrnet, tmp_path / "absent.pth")


def test_pretrained_weights_come_from_timm(hrnet, monkeypatch):
    import timm

    real, asked = timm.create_model, []

    def create(name, *, pretrained, **options):
        asked.append((name, pretrained))
        body = real(name, pretrained=False, **options)
        nn.init.constant_(body.conv1.weight, 0.5)
        return body

    monkeypatch.setattr(timm, "create_model", create)
    fetch_backbone(hrnet)
    assert asked == [("hrnet_w18", True)]
    assert (hrnet.backbone.body.conv1.weight == 0.5).all()

    def fail(*args, **options):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        OSError, match=r"weights of hrnet_w18 could not be fetched \(no route to host\); .*--weights"
    ):
        fetch_backbone(hrnet)
    with pytest.raises(ValueError, match="--pretrained: there are no published weights"):
        fetch_backbone(build_model("compact", 3))


def test_a_run_starts_from_its_weights_and_resumes_without_them(tiny, tmp_path, monkeypatch):
    path = tmp_path / "compact.pth"
    torch.save(randomised(build_model("compact", 3).backbone), path)
    seen = []
    monkeypatch.setattr(train, "load_backbone", lambda model, file: seen.append(file))
    monkeypatch.setattr(train, "fetch_backbone", None)  # a file takes precedence over timm's weights
    config = tiny(contrast="off", steps=2, net=ModelConfig(embed_dim=16, weights=path, pretrained=True))
    train.train(config)
    train.train(replace(config, steps=4), resume=True)
    assert seen == [path]


# The extra "models"


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_without_the_extra_the_message_says_what_to_install(tmp_path, monkeypatch, capsys, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r"pip install 'pixcontrast-ext\[models\]'"):
        build_model("hrnet_w18", 3)
    assert main(["train", "--model", "deeplabv3_resnet50", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(
        "error: the networks on ResNet and HRNet need timm and torchvision"
    )


def test_a_torchvision_of_another_torch_is_told(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("pixcontrast_ext.trainer.networks.backbones.import_module", fail)
    with pytest.raises(ImportError, match=r"not the build that goes with torch .*nms does not exist"):
        build_model("hrnet_w18", 3)


# Training


@pytest.mark.parametrize(("name", "size"), [("hrnet_w48", (128, 64)), ("deeplabv3_resnet50", (90, 120))])
def test_the_large_ones_train_on_the_cpu(tiny, name, size):
    config = tiny(
        steps=2,
        batch_size=2,
        diagnose_every=2,
        data=DataConfig(size=size, synthetic_images=(4, 1)),
        net=ModelConfig(model=name, embed_dim=32),
    )
    run = train._Run(config, Ranks(0, 1, CPU), resume=False)
    run.model.train()
    # Two steps, because residual blocks start as the identity and pass on no gradient in the first.
    rows = [run._step(step, batch, measure=True) for step, batch in enumerate(run.loader)]
    run.log.close()
    assert len(rows) == 2
    assert all(0 < row["loss"] < 50 for row in rows)
    assert all(("auxiliary" in row) == (name == "deeplabv3_resnet50") for row in rows)
    for weight_name, weight in run.model.named_parameters():
        assert weight.grad is not None, weight_name
        assert weight.grad.isfinite().all(), weight_name
        assert weight.grad.abs().sum() > 0, weight_name
    assert (run.criterion.contrast.bank.key_labels >= 0).any()
    (diagnosed,) = read_rows(config.out / "diagnostics.csv")
    assert diagnosed["gradient_ratio"] > 0


@pytest.mark.parametrize("name", ["compact", "deeplabv3_resnet50", "hrnet_w18", "hrnet_w18_ocr"])
def test_a_deferred_head_reads_the_same_features(name):
    """In training, by the loss; otherwise the model calls it as ever. What is saved has the same names."""
    model = build_model(name, 5, 16)
    images, names = torch.rand(2, 3, 64, 48), set(model.state_dict())
    found = []
    for defer in (False, True):
        if defer:
            defer_embed_head(model)
        torch.manual_seed(1)  # for dropout
        found.append(model.train()(images))
    whole, deferred = found
    assert deferred.keys() - whole.keys() == {"features"}
    assert whole.keys() - deferred.keys() == {"embed"}
    assert deferred["features"].shape[1] == model.backbone.channels
    torch.testing.assert_close(model.embed_head(deferred["features"]), whole["embed"])
    for output in whole.keys() & deferred.keys():
        torch.testing.assert_close(deferred[output], whole[output])
    labels = torch.arange(64).expand(48, 64).T.expand(2, 64, 48) % 5
    loss = PixelContrastLoss(5, min_pixels=1, head=lambda rows: model.embed_head(rows))
    loss(deferred["features"], labels, deferred["seg"]).backward()
    for part in (model.backbone, model.embed_head):
        assert any(weight.grad is not None and weight.grad.any() for weight in part.parameters())
    assert set(model.eval()(images)) == {"seg", "embed"}
    assert set(model.state_dict()) == names


def test_deeplabv3_on_one_image_is_told(deeplabv3):
    deeplabv3.train()
    with pytest.raises(ValueError, match="at least two images at a time, got 1: raise --batch-size"):
        deeplabv3(torch.rand(1, 3, 64, 64))
    shared = train.share_norms(deeplabv3, Ranks(0, 2, torch.device("cuda", 0)))
    # This is torch's own error, because there is one rank here.
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        shared.train()(torch.rand(1, 3, 64, 64))


def test_a_run_with_an_auxiliary_head(tiny):
    config = tiny(
        steps=2,
        batch_size=2,
        checkpoint_every=2,
        log_every=1,
        data=DataConfig(size=(64, 64), synthetic_images=(4, 2)),
        net=ModelConfig(model="hrnet_w18_ocr", embed_dim=16),
    )
    config = replace(config, loss=replace(config.loss, warmup_steps=0, aux_weight=0.25))
    train.train(config)
    for row in read_rows(config.out / "train.csv"):
        parts = row["cross_entropy"] + config.loss.weight * row["contrast"] + 0.25 * row["auxiliary"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert row["auxiliary"] > 0
    saved = CheckpointStore(config.out / "checkpoints").load_latest()[1]
    assert saved["optimizer"]["state"].keys() == set(
        range(len(list(build_model("hrnet_w18_ocr", 9, 16).parameters())))
    )
    model, _, _ = load_model(config.out, CPU)
    assert set(model(torch.rand(1, 3, 40, 40))) == {"seg"}
    assert model.embed_head is None


def test_ranks_on_cuda_share_their_norms(hrnet):
    def norms(model):
        return {
            type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }

    names = set(hrnet.state_dict())
    for ranks in (Ranks(0, 2, CPU), Ranks(0, 1, torch.device("cuda", 0))):
        assert norms(train.share_norms(hrnet, ranks)) == {nn.BatchNorm2d}
    for name in ("hrnet_w18_ocr", "deeplabv3_resnet50"):
        shared = train.share_norms(build_model(name, 5), Ranks(1, 2, torch.device("cuda", 1)))
        assert norms(shared) == {nn.SyncBatchNorm}
    assert set(train.share_norms(hrnet, Ranks(1, 2, torch.device("cuda", 1))).state_dict()) == names
