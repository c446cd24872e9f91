"""What the contrast says of itself: cosines, chance and floor, fill and turnover, and gradients side by side."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import pixcontrast_ext as pc
from tests.support.losses import bank_of, batch

CLASSES = 4


def filled(**settings):
    normalize = settings.get("normalize", True)
    bank = bank_of(CLASSES, region_slots=6, pixel_slots=8, pixels_per_image=3, normalize=normalize)
    loss = pc.PixelContrastLoss(CLASSES, bank=bank, min_pixels=1, max_samples=40, **settings)
    for _ in range(2):
        embeddings, labels, logits = batch(classes=CLASSES)
        loss(embeddings, labels, logits)
    return loss


def in_loops(anchors, labels, keys, key_labels, temperature, exclude_self):
    """Of each anchor that has both: its mean cosine to positives and to negatives, and the number of negatives."""
    found = []
    for index, (anchor, label) in enumerate(zip(anchors, labels.tolist(), strict=True)):
        others = [
            (F.cosine_similarity(anchor, key, dim=0).item(), of == label)
            for place, (key, of) in enumerate(zip(keys, key_labels.tolist(), strict=True))
            if of >= 0 and not (exclude_self and place == index)
        ]
        positives = [cosine for cosine, own in others if own]
        negatives = [cosine for cosine, own in others if not own]
        if label >= 0 and positives and negatives:
            found.append((sum(positives) / len(positives), sum(negatives) / len(negatives), len(negatives)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("with_bank", [True, "unnormalised", False])
@pytest.mark.parametrize("base_temperature", [None, 0.07])
def test_cosines_and_levels_are_those_of_loops(with_bank, base_temperature):
    torch.manual_seed(0)
    settings = dict(temperature=0.2, base_temperature=base_temperature, normalize=with_bank != "unnormalised")
    in_batch = pc.PixelContrastLoss(CLASSES, min_pixels=1, max_samples=40, **settings)
    loss = filled(**settings) if with_bank else in_batch
    embeddings, labels, logits = batch(classes=CLASSES)
    torch.manual_seed(1)
    found = loss.diagnostics(embeddings, labels, logits)
    torch.manual_seed(1)  # the same draw
    sample = pc.hard_anchor_sampling(
        labels, logits.argmax(1), num_classes=CLASSES, max_samples=40, max_views=100, min_pixels=1
    )
    rows = embeddings.detach().movedim(1, 3).reshape(-1, embeddings.shape[1])[sample.indices]
    keys, key_labels = loss.bank.flat() if with_bank else (rows, sample.labels)
    expected = in_loops(rows, sample.labels, keys, key_labels, 0.2, not with_bank)
    positive, negative = expected[:, 0].mean(), expected[:, 1].mean()
    scale = 1.0 if base_temperature is None else 0.2 / 0.07
    count = expected[:, 2]

    def level(difference):
        return scale * torch.log(1 + count * math.exp(difference / 0.2)).mean()

    close = dict(rel=1e-4, abs=1e-5)
    assert found["contrasted"] == len(expected)
    assert found["anchors"] == (sample.labels >= 0).sum()
    assert found["positive_cosine"].item() == pytest.approx(positive.item(), **close)
    assert found["negative_cosine"].item() == pytest.approx(negative.item(), **close)
    assert found["chance"].item() == pytest.approx(level(0).item(), **close)
    assert found["expected"].item() == pytest.approx(level((negative - positive).item()).item(), **close)
    assert found["floor"].item() == pytest.approx(level(-1 / (CLASSES - 1) - 1).item(), **close)
    torch.manual_seed(1)
    loss.eval()
    assert found["contrast"].item() == pytest.approx(loss(embeddings, labels, logits).item(), rel=1e-5)
    hard = (logits.argmax(1) != labels).flatten()[sample.indices][sample.labels >= 0]
    assert found["hard_share"].item() == pytest.approx(hard.double().mean().item())
    assert found["anchors_of"].tolist() == [(sample.labels == label).sum().item() for label in range(CLASSES)]
    assert found["positives_of"].tolist() == [(key_labels == label).sum().item() for label in range(CLASSES)]


def test_classes_that_are_points_and_far_apart_are_at_the_floor_and_equal_ones_at_chance():
    labels = torch.arange(CLASSES).repeat_interleave(16).view(1, 8, 8)
    simplex = torch.eye(CLASSES) - 1 / CLASSES  # cosines of -1 / (C - 1)
    loss = pc.PixelContrastLoss(CLASSES, min_pixels=1, max_samples=64)
    apart = loss.diagnostics(simplex[labels].movedim(3, 1), labels, labels)
    assert apart["contrast"].item() == pytest.approx(apart["floor"].item(), abs=1e-4)
    assert apart["contrast"].item() == pytest.approx(apart["expected"].item(), abs=1e-4)
    equal = loss.diagnostics(torch.ones(1, 3, 8, 8), labels, labels)
    assert equal["contrast"].item() == pytest.approx(equal["chance"].item(), rel=1e-5)
    assert equal["positive_cosine"].item() == pytest.approx(1)
    assert equal["hard_share"] == 0


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize("with_head", [True, False])
def test_nothing_changes_and_the_next_step_draws_the_same(own_generator, with_head):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3) if own_generator else None
    head = pc.ProjectionHead(12, 12) if with_head else None
    loss = filled(generator=generator, head=head, warmup_steps=5)
    other = copy.deepcopy(loss)
    embeddings, labels, logits = batch(classes=CLASSES)
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    before = torch.get_rng_state()
    found = loss.diagnostics(embeddings, labels, logits)
    assert torch.equal(torch.get_rng_state(), before)
    assert found["contrast"] > 0  # within the warm-up, too
    for name, value in loss.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(not value.requires_grad for value in found.values())
    torch.manual_seed(7)
    loss(embeddings, labels, logits)
    torch.manual_seed(7)
    other(embeddings, labels, logits)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_fill_and_turnover_of_the_bank():
    bank = bank_of(CLASSES, region_slots=6, pixel_slots=0, pixels_per_image=3)
    loss = pc.PixelContrastLoss(CLASSES, bank=bank, min_pixels=1)
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    labels[0, 0, :2] = 1
    labels[1, 3] = 255
    embeddings = torch.randn(2, 12, 4, 4)
    found = loss.diagnostics(embeddings, labels, labels)
    assert found["region_turnover_of"].tolist() == pytest.approx([2 / 6, 1 / 6, 0, 0])
    assert found["region_fill_of"].tolist() == [0, 0, 0, 0]
    assert found["pixel_fill_of"].isnan().all()
    assert found["contrast"] == 0
    assert found["contrasted"] == 0
    assert found["chance"].isnan()
    bank.enqueue(embeddings, labels)
    found = loss.diagnostics(embeddings, labels, labels)
    assert found["region_fill_of"].tolist() == pytest.approx([2 / 6, 1 / 6, 0, 0])


def test_pixels_that_this_batch_adds():
    loss = pc.PixelContrastLoss(
        CLASSES, bank=bank_of(CLASSES, region_slots=0, pixel_slots=8, pixels_per_image=3)
    )
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    labels[0, 0, :2] = 1
    found = loss.diagnostics(torch.randn(2, 12, 4, 4), labels, labels)
    assert found["pixel_turnover_of"].tolist() == pytest.approx([6 / 8, 2 / 8, 0, 0])


def test_an_ignored_class_replaces_nothing():
    bank = bank_of(CLASSES, region_slots=4, pixel_slots=8, pixels_per_image=3, ignore_index=0)
    loss = pc.PixelContrastLoss(CLASSES, bank=bank, ignore_index=0)
    labels = torch.arange(4).repeat(4).view(1, 4, 4)
    found = loss.diagnostics(torch.randn(1, 12, 4, 4), labels, labels)
    assert found["region_turnover_of"].tolist() == pytest.approx([0, 1 / 4, 1 / 4, 1 / 4])
    assert found["pixel_turnover_of"].tolist() == pytest.approx([0, 3 / 8, 3 / 8, 3 / 8])


def test_random_anchors_do_not_know_what_is_hard():
    embeddings, labels, _ = batch(classes=CLASSES)
    loss = pc.PixelContrastLoss(CLASSES, min_pixels=1, anchors="random")
    assert loss.diagnostics(embeddings, labels)["hard_share"].isnan()


def test_hard_pixels_may_be_given():
    embeddings, labels, _ = batch(classes=CLASSES)
    loss = pc.PixelContrastLoss(CLASSES, min_pixels=1)
    found = loss.diagnostics(embeddings, labels, hard=torch.ones_like(labels, dtype=torch.bool))
    assert found["hard_share"] == 1


@pytest.mark.parametrize("mining", [None, dict(strategy="semi-hard", negatives=5, positives=5)])
def test_no_pixel_with_a_label(mining):
    loss = pc.PixelContrastLoss(CLASSES, min_pixels=1, mining=mining)
    found = loss.diagnostics(
        torch.randn(1, 12, 4, 4), torch.full((1, 4, 4), 255), torch.zeros(1, 4, 4).long()
    )
    assert found["anchors"] == found["contrasted"] == 0
    assert found["positive_cosine"].isnan()
    assert found["contrast"] == 0


@pytest.mark.parametrize("strategy", ["random", "semi-hard", "hardest"])
@pytest.mark.parametrize("with_bank", [True, False])
def test_mining_is_at_chance_where_all_cosines_are_equal(strategy, with_bank):
    """It then keeps all that it has drawn, on average: bins of cosines are taken whole."""
    labels = torch.randint(0, CLASSES, (2, 24, 24))
    bank = dict(embed_dim=3, region_slots=0, pixel_slots=100, pixels_per_image=100) if with_bank else None
    loss = pc.PixelContrastLoss(
        CLASSES,
        min_pixels=1,
        max_samples=400,
        max_views=200,
        bank=bank,
        mining=dict(strategy=strategy, negatives=32, positives=32),
    )
    if with_bank:
        loss.bank.enqueue(torch.ones(2, 3, 24, 24), labels)
    found = loss.diagnostics(torch.ones(2, 3, 24, 24), labels, labels)
    assert found["contrast"].item() == pytest.approx(found["chance"].item(), rel=0.05)


def test_bad_input_is_an_error_as_in_a_step():
    loss = pc.PixelContrastLoss(CLASSES)
    with pytest.raises(ValueError, match="labels"):
        loss.diagnostics(torch.randn(1, 3, 4, 4), torch.zeros(2, 4, 4).long(), torch.zeros(1, 4, 4).long())


def test_gradients_side_by_side():
    torch.manual_seed(0)
    features = torch.randn(2, 6, 5, 5, requires_grad=True)
    labels = torch.randint(CLASSES, (2, 5, 5))
    classifier, head = torch.nn.Conv2d(6, CLASSES, 1), pc.ProjectionHead(6, 8, "linear")
    logits = classifier(features)
    entropy = F.cross_entropy(logits, labels)
    contrast = pc.PixelContrastLoss(CLASSES, min_pixels=1)(head(features), labels, logits)
    ratio, cosine = pc.compare_gradients(contrast, entropy, features)
    (of_contrast,) = torch.autograd.grad(contrast, features, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy, features, retain_graph=True)
    assert ratio.item() == pytest.approx((of_contrast.norm() / of_entropy.norm()).item())
    both = F.cosine_similarity(of_contrast.flatten(), of_entropy.flatten(), dim=0)
    assert cosine.item() == pytest.approx(both.item(), abs=1e-6)
    assert classifier.weight.grad is None
    (entropy + contrast).backward()  # the graph is still there
    twice, same = pc.compare_gradients(2 * features.sum(), features.sum(), features)
    assert (twice.item(), same.item()) == pytest.approx((2, 1))
    with pytest.raises(RuntimeError):
        pc.compare_gradients(torch.zeros(()), entropy, features)


def test_the_criterion_has_those_of_its_contrast():
    torch.manual_seed(0)
    criterion = pc.PixelContrastCrossEntropyLoss(CLASSES, min_pixels=1, weight=0.3)
    embeddings, labels, logits = batch(classes=CLASSES)
    torch.manual_seed(1)
    found = criterion.diagnostics(logits, embeddings, labels)
    torch.manual_seed(1)
    _, parts = criterion(logits, embeddings, labels, return_parts=True)
    assert found["contrast"].item() == pytest.approx(parts["contrast"].item())
