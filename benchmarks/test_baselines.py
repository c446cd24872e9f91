"""Each baseline against a plain formulation of the same computation: one that computes something else is useless."""

import math

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import Mining

from .baselines import chunked, loops
from .baselines.bare import BareProducts
from .baselines.dense import dense_infonce
from .inputs import contrast_inputs, embedding_map, scenes
from .mining import dense_mined


def test_dense_loss_is_the_double_loop() -> None:
    anchors, anchor_labels, keys, key_labels = contrast_inputs(7, 30, 5, torch.float64, num_classes=3)
    key_labels[::7] = -1
    anchor_labels[0] = 17  # has no positive
    temperature, losses = 0.3, []
    for anchor, label in zip(anchors, anchor_labels, strict=True):
        similarity = [math.exp(float(anchor @ key) / temperature) for key in keys]
        pairs = list(zip(similarity, key_labels.tolist(), strict=True))
        negatives = sum(s for s, other in pairs if other >= 0 and other != label)
        positives = [-math.log(s / (s + negatives)) for s, other in pairs if other == label]
        if positives:
            losses.append(sum(positives) / len(positives))
    dense = dense_infonce(anchors, anchor_labels, keys, key_labels, temperature=temperature)
    assert len(losses) == 6
    assert math.isclose(dense.item(), sum(losses) / len(losses), rel_tol=1e-12)


@pytest.mark.parametrize("strategy", ["random", "semi-hard", "hardest"])
def test_dense_loss_of_mined_pairs_is_that_of_all_if_it_keeps_all(strategy: str) -> None:
    anchors, anchor_labels, keys, key_labels = contrast_inputs(7, 30, 5, torch.float64, num_classes=3)
    key_labels[::7] = -1
    every = Mining(strategy, negatives=30, positives=30, fraction=1.0)
    found = dense_mined(anchors, anchor_labels, keys, key_labels, temperature=0.3, mining=every)
    expected = dense_infonce(anchors, anchor_labels, keys, key_labels, temperature=0.3)
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-5)  # it has the cosines in fp32


@pytest.mark.parametrize("strategy", ["semi-hard", "hardest"])
def test_dense_loss_of_mined_pairs_keeps_the_hardest(strategy: str) -> None:
    """Three negatives and two positives; or a fifth of each, of which the counts leave all."""
    anchors, anchor_labels, keys, key_labels = contrast_inputs(7, 60, 5, torch.float64, num_classes=3)
    losses = []
    for anchor, label in zip(anchors, anchor_labels, strict=True):
        own, others = ((keys[key_labels == label] @ anchor), (keys[key_labels != label] @ anchor))
        counts = (
            (2, 3) if strategy == "hardest" else (math.ceil(0.2 * len(own)), math.ceil(0.2 * len(others)))
        )
        negatives = (others.sort(descending=True).values[: counts[1]] / 0.3).logsumexp(0)
        losses.append(F.softplus(negatives - own.sort().values[: counts[0]] / 0.3).mean())
    few = dict(negatives=3, positives=2) if strategy == "hardest" else dict(negatives=60, positives=60)
    mining = Mining(strategy, fraction=0.2, **few)
    found = dense_mined(anchors, anchor_labels, keys, key_labels, temperature=0.3, mining=mining)
    assert math.isclose(found.item(), torch.stack(losses).mean().item(), rel_tol=1e-5)


def test_chunked_loss_survives_chunks_of_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bank's keys the first chunk may hold no negative of an anchor: its shift was inf - inf."""
    monkeypatch.setattr(chunked, "CHUNK", 7)
    inputs = contrast_inputs(9, 60, 5, torch.float32, num_classes=3)
    outcomes = []
    for function in (chunked.chunked_infonce, dense_infonce):
        leaf = inputs[0].clone().requires_grad_()
        loss = function(leaf, *inputs[1:], temperature=0.3)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected)


def test_bare_products_cover_all_keys() -> None:
    anchors, _, keys, _ = contrast_inputs(6, 50, 8, torch.float64)
    torch.testing.assert_close(BareProducts(anchors, keys, tile=16).both(), anchors @ keys.T @ keys)


def test_loops_sample_what_they_say() -> None:
    labels, predictions = scenes(2, 32, 48, num_classes=4)
    indices, chosen = loops.sample(labels, predictions, max_samples=100, max_views=10)
    assert torch.equal(labels.flatten()[indices], chosen)
    assert len(indices.unique()) == len(indices)
    pairs = (indices // (32 * 48) * 4 + chosen).bincount()
    assert set(pairs.tolist()) <= {0, min(100 // int((pairs > 0).sum()), 10)}
    embeddings = embedding_map(2, 6, 32, 48)
    row = embeddings[indices[5] // (32 * 48), :, indices[5] % (32 * 48) // 48, indices[5] % 48]
    torch.testing.assert_close(loops.gather(embeddings, indices)[5], row)
    torch.testing.assert_close(loops.index(embeddings, indices)[5], row)


def test_loops_enqueue_regions_and_pixels() -> None:
    labels, _ = scenes(2, 32, 32, num_classes=3)
    embeddings = embedding_map(2, 6, 32, 32)
    bank = loops.Bank(3, 6, slots=16, pixels_per_image=5)
    bank.enqueue(embeddings, labels)
    label = int(labels[0].min())
    own = embeddings[0][:, labels[0] == label]
    torch.testing.assert_close(bank.regions[label, 0], F.normalize(own.mean(dim=1), dim=0))
    assert ((bank.pixels[label, 0] - own.T).abs().amax(dim=1) < 1e-6).sum() == 1
    assert int(bank.pixel_fill[label]) <= 10
    assert int(bank.region_fill[label]) <= 2
