"""Example mining: what is drawn, where it cuts, and the loss of the pairs that are left."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import (
    MemoryBank,
    Mining,
    PixelContrastCrossEntropyLoss,
    PixelContrastLoss,
    draw_keys,
    infonce,
    score_thresholds,
)
from pixcontrast_ext.backends import native
from pixcontrast_ext.backends.calls import SCORE_BINS
from pixcontrast_ext.ops.mining import STRATEGIES
from tests.support.backends import BACKENDS, GPU_BACKENDS
from tests.support.checks import error
from tests.support.contrast import weight_rounding
from tests.support.inputs import BANK, BLOCKS, RANDOM, draw_rows

BIN = 1 / 256
# Anchors, keys, channels, classes; ragged on purpose.
SHAPES = [(1, 1, 1, 1), (7, 40, 8, 3), (65, 513, 33, 5), (130, 1100, 65, 19), (40, 2000, 16, 1)]


def dense(
    anchors, anchor_labels, keys, key_labels, temperature, *, negatives=None, kept=None, exclude_self=False
):
    """The loss of each anchor in fp64 with every pair written out; the thresholds' comparison in the rows' dtype."""
    others, other_labels = (keys, key_labels) if negatives is None else negatives

    def cosines(rows, labels):
        clean = [x.masked_fill((y < 0)[:, None], 0) for x, y in ((anchors, anchor_labels), (rows, labels))]
        return clean[0].double() @ clean[1].double().T

    to_keys, to_others = cosines(keys, key_labels), cosines(others, other_labels)
    labelled = (anchor_labels >= 0)[:, None]
    positives = labelled & (anchor_labels[:, None] == key_labels)
    if exclude_self:
        positives &= ~torch.eye(len(anchors), len(keys), dtype=torch.bool)
    rivals = labelled & (other_labels >= 0) & (anchor_labels[:, None] != other_labels)
    if kept is not None:
        positives &= to_keys < kept[1].double()[:, None]
        rivals &= to_others >= kept[0].double()[:, None]
    alone = ~rivals.any(dim=1)
    lse = (to_others / temperature).masked_fill(~rivals, -torch.inf)
    lse = torch.where(alone, -torch.inf, torch.where(alone[:, None], 0, lse).logsumexp(dim=1))
    pairs = torch.where(positives, F.softplus(lse[:, None] - to_keys / temperature), 0)
    return pairs.sum(dim=1) / positives.sum(dim=1).clamp(min=1), positives, rivals


def away_from_edges(rows):
    """Rows of few bits: cosines of theirs are multiples of 2^-8 plus 2^-9, so that no rounding takes one over an edge.

    One coordinate makes the odd part: 2^-9 for every pair.
    """
    rows = (rows * 16).round() / 16
    rows[:, -1] = 2.0**-4.5
    return rows


def unit_rows(*shape, order=BANK, dtype=torch.float32):
    anchors, anchor_labels, keys, key_labels = draw_rows(*shape, order=order)
    return anchors.to(dtype), anchor_labels.int(), keys.to(dtype), key_labels.int()


# What is drawn


@pytest.mark.parametrize("classes", [1, 4, 30])
@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_those_of_smallest_priority_are_drawn(classes, fraction):
    """Of all keys with a label, and of each class; among equal ones the first."""
    labels = torch.randint(-1, classes, (500,))
    keys = torch.randn(500, 3)
    priority = torch.randint(-20, 20, (500,), dtype=torch.int32)
    mining = Mining(
        "semi-hard", negatives=int(300 * fraction), positives=int(10 * fraction) or 1, fraction=fraction
    )
    drawn = draw_keys(keys, labels, mining, priority=priority)
    order = sorted((int(p), i) for i, p in enumerate(priority) if labels[i] >= 0)
    expected = sorted(i for _, i in order[:300])
    rows, row_labels = drawn.negatives
    assert rows.shape == (300, 3)
    assert torch.equal(rows[: len(expected)], keys[expected])
    assert row_labels.tolist() == labels[expected].tolist() + [-1] * (300 - len(expected))
    of_class = {c: [i for _, i in order if labels[i] == c][:10] for c in range(classes)}
    for i, label in enumerate(labels.tolist()):
        assert drawn.positive_labels[i] == (label if label >= 0 and i in of_class[label] else -1)


def test_a_draw_of_everything_copies_nothing():
    keys, labels = torch.randn(50, 4), torch.arange(50) % 3
    assert draw_keys(keys, labels, Mining("hardest", negatives=2)).negatives is None
    drawn = draw_keys(keys, labels, Mining("random", negatives=50, positives=49))
    assert drawn.negatives[0] is keys  # the positives alone are drawn from, and theirs are other labels
    assert torch.equal(drawn.positive_labels, labels.int())
    drawn = draw_keys(keys, labels, Mining("hardest"))
    assert drawn.positive_labels is labels  # by which `infonce` sees that keys are anchors


def test_draws_of_numbers_that_a_float_cannot_hold():
    """0.1 is a little more than a tenth."""
    assert Mining("semi-hard", negatives=2048, positives=3, fraction=0.1).drawn(2048) == 20480
    assert Mining("semi-hard", fraction=0.3).drawn(3) == 10
    assert Mining("semi-hard", fraction=0.3).drawn(1) == 4
    assert Mining("random").drawn(7) == 7


def test_every_key_is_drawn_alike():
    """Counts of 400 draws of 100 among 1,000 keys: chi-square with 999 degrees of freedom.

    Draws are without replacement, so the statistic is smaller by 1 - 100/1000; its false-alarm rate is below 1e-4.
    """
    counts = torch.zeros(1000)
    index = torch.arange(1000.0)[:, None]
    for _ in range(400):
        counts[
            draw_keys(index, torch.arange(1000) % 7, Mining("random", negatives=100))
            .negatives[0][:, 0]
            .long()
        ] += 1
    assert counts.sum() == 40_000
    statistic = ((counts - 40) ** 2 / 40).sum() / (1 - 0.1)
    assert 999 - 4 * math.sqrt(2 * 999) < statistic < 999 + 4 * math.sqrt(2 * 999)


def test_the_share_of_kept_pairs_is_the_fraction():
    """Of 20,480 drawn among 200,000 keys a tenth is kept of each anchor's, to a bin; of all keys it would be the same.

    The threshold of the draw errs by its sampling: the share of all keys above it has standard deviation 0.0021.
    Bound: 5 of them and the share of a bin, for 64 anchors; the false-alarm rate is below 1e-4.
    """
    keys = F.normalize(torch.randn(200_000, 16), dim=1)
    labels = torch.randint(0, 19, (200_000,))
    anchors, anchor_labels = F.normalize(torch.randn(64, 16), dim=1), torch.randint(0, 19, (64,))
    mining = Mining("semi-hard")
    drawn = draw_keys(keys, labels, mining)
    kept = score_thresholds(
        anchors, anchor_labels, keys, drawn.positive_labels, mining, negatives=drawn.negatives, backend="cpu"
    )
    cosines = anchors @ keys.T
    rival = anchor_labels[:, None] != labels
    share = ((cosines >= kept.neg_min[:, None]) & rival).sum(1) / rival.sum(1)
    next_bin = ((cosines >= kept.neg_min[:, None] + BIN) & rival).sum(1) / rival.sum(1)
    assert (share > 0.1 - 5 * 0.0021).all()
    assert (next_bin < 0.1 + 5 * 0.0021).all()


# Where it cuts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [BANK, RANDOM, BLOCKS])
@pytest.mark.parametrize(
    "mining", [Mining("semi-hard", fraction=0.1), Mining("hardest", negatives=30, positives=3)]
)
@pytest.mark.parametrize("in_batch", [False, True])
def test_thresholds_are_those_of_a_sort(backend, instruction_set, poison, shape, order, mining, in_batch):
    anchors, anchor_labels, keys, key_labels = unit_rows(*shape, order=order)
    if in_batch:
        keys, key_labels = anchors, anchor_labels
    found = score_thresholds(
        anchors, anchor_labels, keys, key_labels, mining, exclude_self=in_batch, backend=backend
    )
    _, positives, rivals = dense(anchors, anchor_labels, keys, key_labels, 1.0, exclude_self=in_batch)
    clean = [x.masked_fill((y < 0)[:, None], 0) for x, y in ((anchors, anchor_labels), (keys, key_labels))]
    cosines = clean[0].double() @ clean[1].double().T
    for i in range(len(anchors)):
        for pairs, threshold, most, sign in (
            (rivals, found.neg_min, mining.negatives, 1),
            (positives, found.pos_max, mining.positives, -1),
        ):
            near = (sign * cosines[i, pairs[i]]).sort(descending=True).values
            wanted = most if mining.strategy == "hardest" else math.ceil(round(0.1 * len(near), 6))
            cut = sign * float(threshold[i])
            if len(near) < wanted or not len(near):
                assert cut == -math.inf or not len(near)
                continue
            last = float(near[wanted - 1])  # the least hard one that has to be kept
            assert cut <= last + 1e-6
            assert cut >= last - BIN - 1e-6 or (cut == -math.inf and last <= -1 + BIN + 1e-6)


def test_bins_have_exact_edges(backend, instruction_set):
    """A cosine just below an edge, which fp32 would round onto it once 1 is added, belongs to the bin below."""
    anchors, labels = torch.eye(2)[:1], torch.zeros(1, dtype=torch.int32)
    # As planes of fp16, a row that is not finite makes NaN.
    far = 50.0 if backend in GPU_BACKENDS else math.inf
    cosines = torch.tensor([-2.0, -1.0, -1e-9, 0.0, 1e-9, 1 - 2**-24, 1.0, 1.5, math.nan, -far, far])
    keys = torch.stack([cosines, torch.zeros(11)], dim=1)
    counts, nothing = torch.ops.pixcontrast.mining_counts(
        anchors, labels, keys[:0], labels[:0], keys, torch.ones(11).int(), False, backend
    )
    assert {i: int(n) for i, n in enumerate(counts[0]) if n} == {0: 4, 255: 1, 256: 2, 511: 4}
    assert not nothing.any()


def test_a_label_below_minus_one_is_none(backend, instruction_set):
    """As -1 is; rows without a label count nothing, nor do those that a tile has beyond the last."""
    anchors, anchor_labels, keys, key_labels = unit_rows(7, 300, 8, 3, order=RANDOM)
    anchor_labels[2::3] = key_labels[5::7] = -1
    others, other_labels = keys[:200].clone(), key_labels[:200].clone()
    all_labels = anchor_labels, key_labels, other_labels
    expected = torch.ops.pixcontrast.mining_counts(
        anchors, anchor_labels, keys, key_labels, others, other_labels, False, backend
    )
    assert not any(counts[2::3].any() for counts in expected)
    odd = (
        torch.where(labels < 0, torch.tensor([-2, -(2**31), -100])[torch.arange(len(labels)) % 3], labels)
        for labels in all_labels
    )
    anchor_labels, key_labels, other_labels = (labels.int() for labels in odd)
    found = torch.ops.pixcontrast.mining_counts(
        anchors, anchor_labels, keys, key_labels, others, other_labels, False, backend
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_cosine_below_an_edge_is_counted_below_it_in_double_precision():
    anchors, labels = torch.eye(2, dtype=torch.float64)[:1], torch.zeros(1, dtype=torch.int32)
    below = 0.5 - 1e-9
    keys = torch.tensor([[below, (1 - below**2) ** 0.5], [0, 1]], dtype=torch.float64)
    kept = score_thresholds(
        anchors, labels, keys, torch.ones(2).int(), Mining("hardest", negatives=1), backend="reference"
    )
    assert kept.neg_min.item() == 0.5 - BIN


def test_negatives_that_share_the_labels_of_the_keys(backend, instruction_set):
    """One tensor of labels says nothing of the rows: the negatives may be a teacher's of the same pixels."""
    anchors, anchor_labels, keys, key_labels = unit_rows(20, 60, 8, 3)
    others = F.normalize(torch.randn(60, 8), dim=1)
    mining = Mining("hardest", negatives=3, positives=3)
    found, expected = (
        score_thresholds(
            anchors, anchor_labels, keys, key_labels, mining, negatives=(others, labels), backend=name
        )
        for name, labels in ((backend, key_labels), ("reference", key_labels.clone()))
    )
    assert all((a - b).abs().nan_to_num().max() <= BIN for a, b in zip(found, expected, strict=True))
    forward = torch.ops.pixcontrast.mining_forward
    losses = [
        forward(anchors, anchor_labels, keys, key_labels, others, labels, *expected, 0.1, False, False, name)[
            0
        ]
        for name, labels in ((backend, key_labels), ("reference", key_labels.clone()))
    ]
    assert error(losses[0], losses[1].double()) <= 1e-5


def test_negatives_that_are_the_first_of_the_keys(backend, instruction_set):
    """They begin where the keys do, and are fewer; and of a batch with itself no symmetric matrix of scores."""
    anchors, anchor_labels, keys, key_labels = unit_rows(20, 60, 8, 3)
    mining = Mining("hardest", negatives=3, positives=3)
    for rows, row_labels in ((anchors, anchor_labels), (keys, key_labels)):
        for most, few in ((60, 10), (10, 60)):
            contrast = (rows, row_labels, keys[:most], key_labels[:most])
            negatives = keys[:few], key_labels[:few]
            apart = negatives[0].clone(), negatives[1].clone()
            found = infonce(*contrast, temperature=0.1, negatives=negatives, backend=backend)
            expected = infonce(*contrast, temperature=0.1, negatives=apart, backend="reference")
            assert error(found, expected.double()) <= 1e-5
            thresholds = [
                score_thresholds(*contrast, mining, negatives=each, backend=name)
                for name, each in ((backend, negatives), ("reference", apart))
            ]
            assert all((a - b).abs().nan_to_num().max() <= BIN for a, b in zip(*thresholds, strict=True))


def test_more_negatives_than_there_are_ever():
    rows, labels = F.normalize(torch.randn(30, 8), dim=1), torch.arange(30) % 3
    kept = score_thresholds(rows, labels, rows, labels, Mining("hardest", negatives=2**31 - 1))
    assert (kept.neg_min == -torch.inf).all()


def test_both_sides_count_in_the_same_bins():
    assert native._C.SCORE_BINS == SCORE_BINS == 2 / BIN


# The loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [BANK, RANDOM])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_and_gradients_of_the_pairs_that_are_kept(
    backend, instruction_set, poison, shape, order, strategy, dtype
):
    """Against the dense formula in fp64 with the same pairs."""
    anchors, anchor_labels, keys, key_labels = unit_rows(*shape, order=order)
    anchors, keys = away_from_edges(anchors).to(dtype), away_from_edges(keys).to(dtype)
    mining = Mining(strategy, negatives=30, positives=3, fraction=0.2)
    upstream = torch.rand(len(anchors))
    rows = [x.clone().requires_grad_() for x in (anchors, keys)]
    drawn = draw_keys(rows[1], key_labels, mining)
    arguments = rows[0], anchor_labels, rows[1], drawn.positive_labels
    kept = score_thresholds(*arguments, mining, negatives=drawn.negatives, backend=backend)
    found = infonce(
        *arguments,
        temperature=0.1,
        reduction="none",
        negatives=drawn.negatives,
        neg_min=kept.neg_min,
        pos_max=kept.pos_max,
        backend=backend,
    )
    (found * upstream).sum().backward()
    exact = [x.double().requires_grad_() for x in (anchors, keys)]
    negatives = None
    if drawn.negatives is not None and drawn.negatives[0].grad_fn is not None:
        index = (drawn.negatives[0].double()[:, None] == exact[1][None]).all(2).int().argmax(1)
        negatives = exact[1][index], drawn.negatives[1]
    elif drawn.negatives is not None:
        negatives = exact[1], drawn.negatives[1]
    expected, *_ = dense(
        exact[0], anchor_labels, exact[1], drawn.positive_labels, 0.1, negatives=negatives, kept=kept
    )
    (expected * upstream).sum().backward()
    assert error(found, expected.detach()) <= 1e-6
    for row, truth in zip(rows, exact, strict=True):
        rounded = error(truth.grad.to(dtype), truth.grad)
        assert error(row.grad, truth.grad) <= max(2e-6, weight_rounding(backend, dtype)) + 2.02 * rounded


@pytest.mark.parametrize("strategy", ["semi-hard", "hardest"])
@pytest.mark.parametrize("labels", [[0, 1, 2], [0], [-1]])
def test_in_batch_every_anchor_has_its_own_thresholds(backend, instruction_set, poison, strategy, labels):
    """Pair (i, j) may take part for i and not for j; the gradient has both halves."""
    anchors = away_from_edges(F.normalize(torch.randn(150, 16), dim=1))
    anchor_labels = torch.tensor(labels * 150)[:150].int()
    anchor_labels[::9] = -1
    mining = Mining(strategy, negatives=20, positives=5, fraction=0.2)
    rows, exact = anchors.clone().requires_grad_(), anchors.double().requires_grad_()
    kept = score_thresholds(
        rows, anchor_labels, rows, anchor_labels, mining, exclude_self=True, backend=backend
    )
    found = infonce(
        rows, anchor_labels, rows, anchor_labels,
        temperature=0.1, exclude_self=True, neg_min=kept.neg_min, pos_max=kept.pos_max, backend=backend,
    )  # fmt: skip
    each, positives, rivals = dense(
        exact, anchor_labels, exact, anchor_labels, 0.1, kept=kept, exclude_self=True
    )
    expected = each.sum() / positives.any(1).sum().clamp(min=1)
    if len(labels) > 1:
        assert (rivals != rivals.T).any()
    assert error(found, expected.detach()) <= 1e-6
    found.backward()
    expected.backward()
    assert error(rows.grad, exact.grad) <= 2e-6


@pytest.mark.parametrize("with_draw", [False, True])
def test_all_pairs_are_plain_infonce(backend, instruction_set, with_draw):
    """A fraction of 1 of everything; on the CPU the sums have one order, so to the bit."""
    inputs = unit_rows(65, 700, 33, 5)
    mining = Mining("semi-hard", negatives=10**6, positives=10**6, fraction=1.0)
    drawn = draw_keys(inputs[2], inputs[3], mining)
    assert drawn.negatives is None
    kept = score_thresholds(*inputs, mining, backend=backend)
    negatives = inputs[2:] if with_draw else None
    results = []
    for settings in ({}, dict(negatives=negatives, neg_min=kept.neg_min, pos_max=kept.pos_max)):
        rows = inputs[0].clone().requires_grad_()
        loss = infonce(rows, *inputs[1:], temperature=0.1, backend=backend, **settings)
        loss.backward()
        results.append((loss.detach(), rows.grad))
    for plain, mined in zip(*results, strict=True):
        assert torch.equal(plain, mined) if backend == "cpu" else error(mined, plain.double()) <= 1e-6


def test_rows_without_a_label_may_hold_anything(backend, instruction_set):
    anchors, anchor_labels, keys, key_labels = unit_rows(40, 300, 17, 4)
    mining = Mining("semi-hard", negatives=20, positives=3, fraction=0.2)
    priority = torch.randint(2**31 - 1, (300,), dtype=torch.int32)

    def run():
        rows = [x.clone().requires_grad_() for x in (anchors, keys)]
        drawn = draw_keys(rows[1], key_labels, mining, priority=priority)
        settings = dict(negatives=drawn.negatives, backend=backend)
        kept = score_thresholds(rows[0], anchor_labels, rows[1], drawn.positive_labels, mining, **settings)
        bounds = dict(neg_min=kept.neg_min, pos_max=kept.pos_max)
        loss = infonce(
            rows[0], anchor_labels, rows[1], drawn.positive_labels, temperature=0.1, **settings, **bounds
        )
        loss.backward()
        return loss.detach(), *(x.grad for x in rows)

    before = run()
    anchors[anchor_labels < 0] = math.nan
    keys[key_labels < 0] = math.nan
    for a, b in zip(before, run(), strict=True):
        assert torch.equal(a, b)
    anchors[int((anchor_labels >= 0).nonzero()[0])] = math.nan
    assert run()[0].isnan()


@pytest.mark.parametrize("empty", ["anchors", "keys", "negatives", "negatives of its own class", "positives"])
def test_nothing_to_contrast(backend, instruction_set, empty):
    """An anchor without positives has loss 0, and so have its positives without negatives."""
    sizes = {"anchors": 5, "keys": 6, "negatives": 7} | {empty: 0}
    rows = {name: torch.randn(sizes[name], 4).requires_grad_() for name in ("anchors", "keys", "negatives")}
    labels = {name: torch.zeros(len(x), dtype=torch.int32) for name, x in rows.items()}
    if empty == "positives":
        labels["keys"] += 1
    if empty != "negatives of its own class":
        labels["negatives"] += 1
    loss = infonce(
        rows["anchors"], labels["anchors"], rows["keys"], labels["keys"],
        temperature=0.1, negatives=(rows["negatives"], labels["negatives"]), backend=backend,
    )  # fmt: skip
    loss.backward()
    assert loss == 0
    assert all(not x.grad.any() for x in rows.values())


def test_repeats_give_the_same_bits(backend):
    inputs = unit_rows(70, 1100, 65, 19)
    mining = Mining("semi-hard", negatives=50, positives=9)
    results = []
    for _ in range(2):
        rows = inputs[0].clone().requires_grad_()
        drawn = draw_keys(*inputs[2:], mining, generator=torch.Generator().manual_seed(3))
        arguments = rows, inputs[1], inputs[2], drawn.positive_labels
        kept = score_thresholds(*arguments, mining, negatives=drawn.negatives, backend=backend)
        loss = infonce(
            *arguments, temperature=0.1, negatives=drawn.negatives, backend=backend, **kept._asdict()
        )
        loss.backward()
        results.append((loss.detach(), rows.grad, *kept))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# In the losses


def maps(seed=0, classes=4):
    of = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (2, 12, 12), generator=of)
    return (
        torch.randn(2, 16, 12, 12, generator=of).requires_grad_(),
        labels,
        torch.where(torch.rand(labels.shape, generator=of) < 0.4, 0, labels),
    )


def make_loss(strategy, with_bank, backend=None, seed=5):
    bank = MemoryBank(4, 16, region_slots=30, pixel_slots=30) if with_bank else None
    mining = strategy and Mining(strategy, negatives=20, positives=5, fraction=0.25)
    return PixelContrastLoss(
        4, max_samples=64, min_pixels=1, bank=bank, mining=mining, backend=backend,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


@pytest.mark.parametrize("with_bank", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_mines(quick_backend, strategy, with_bank):
    """It trains, differs from all pairs, repeats with its generator, and backends agree."""
    losses = {}
    for kind, name in ((strategy, quick_backend), (strategy, "reference"), (None, quick_backend)):
        loss = make_loss(kind, with_bank, name)
        for step in range(4):
            embeddings, labels, predictions = maps(step)
            value = loss(embeddings, labels, predictions)
            value.backward()
        assert value > 0
        assert embeddings.grad.isfinite().all()
        losses[kind, name] = value.detach()
    assert abs(losses[strategy, quick_backend] - losses[strategy, "reference"]) <= 1e-4
    assert losses[strategy, quick_backend] != losses[None, quick_backend]


def test_the_criterion_passes_it_on():
    mining = Mining("random")
    assert PixelContrastCrossEntropyLoss(4, mining=mining).contrast.mining is mining


@pytest.mark.skipif("cpu" not in BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cpu out")
@pytest.mark.parametrize("with_bank", [False, True])
@pytest.mark.parametrize("strategy", ["random", "semi-hard"])
def test_one_graph(strategy, with_bank):
    torch._dynamo.reset()
    eager, traced = (make_loss(strategy, with_bank, "cpu") for _ in range(2))
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for step in range(2):
        values = []
        for each in (eager, compiled):
            embeddings, *labels = maps(step)
            value = each(embeddings, *labels)
            value.backward()
            values.append((value.detach(), embeddings.grad))
        for a, b in zip(*values, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(strategy="hard"), ValueError, "strategy must be one of random, semi-hard, hardest, got 'hard'"),
        (dict(fraction=0), ValueError, r"fraction must be in \(0, 1\], got 0"),
        (dict(fraction=1.5), ValueError, r"fraction must be in \(0, 1\], got 1.5"),
        (dict(fraction=math.nan), ValueError, r"fraction must be in \(0, 1\], got nan"),
        (dict(fraction="a"), TypeError, "fraction must be a number, got 'a'"),
        (dict(negatives=0), ValueError, "negatives must be at least 1, got 0"),
        (dict(positives=2.5), TypeError, "positives must be an int, got 2.5"),
        (dict(positives=2**31), ValueError, "positives must be at most 2147483647, got 2147483648"),
    ],
)
def test_what_is_no_mining(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Mining(**arguments)


def test_what_the_loss_refuses():
    with pytest.raises(TypeError, match=r"mining must be a Mining, or in a loss .*, got 7"):
        PixelContrastLoss(4, mining=7)
    assert PixelContrastLoss(4, mining="semi-hard").mining == Mining("semi-hard")
    with pytest.raises(ValueError, match="strategy"):
        PixelContrastLoss(4, mining="semi-soft")
    with pytest.raises(ValueError, match="mining='hardest' ranks by cosine, got normalize=False"):
        PixelContrastLoss(4, mining=Mining("hardest"), normalize=False)
    PixelContrastLoss(4, mining=Mining("random"), normalize=False)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (dict(neg_min=torch.zeros(3)), ValueError, r"neg_min must have shape \(2,\), got \(3,\)"),
        (
            dict(pos_max=torch.zeros(2).double()),
            TypeError,
            "pos_max must be a float32 tensor, got torch.float64",
        ),
        (dict(pos_max=0.5), TypeError, "pos_max must be a float32 tensor, got float"),
        (dict(negatives=torch.eye(2)), TypeError, r"negatives must be \(rows, labels\), got Tensor"),
        (
            dict(negatives=(torch.eye(3), torch.zeros(3).int())),
            ValueError,
            r"anchors and negatives\[0\] must have the same width, got \(2, 2\) and \(3, 3\)",
        ),
        (
            dict(negatives=(torch.eye(2), torch.zeros(3).int())),
            ValueError,
            r"negatives\[1\] must have shape \(2,\), got \(3,\)",
        ),
        (
            dict(negatives=(torch.eye(2).half(), torch.zeros(2).int())),
            TypeError,
            r"anchors and negatives\[0\] must have one dtype, got torch.float32 and torch.float16",
        ),
    ],
)
def test_what_infonce_refuses(settings, kind, message):
    rows, labels = torch.eye(2), torch.tensor([0, 1])
    with pytest.raises(kind, match=message):
        infonce(rows, labels, rows, labels, temperature=0.1, **settings)
