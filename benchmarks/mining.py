"""The contrastive loss of mined pairs, draw and ranking included, beside that of all pairs.

Each strategy is verified against the dense formula with the same pairs masked; what one would write in PyTorch ranks
whole rows of the matrix by `topk`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext import DrawnKeys, Mining, Thresholds, draw_keys, infonce, score_thresholds
from pixcontrast_ext.ops.mining import STRATEGIES

from .baselines.dense import BUFFERS
from .harness import ELEMENTS, Candidate, Case, Errors, Method, Work, relative_error
from .infonce import OURS, TEMPERATURE, Inputs, loss_method
from .shapes import ROWS, Rows

SHAPE = Rows
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
DTYPES = {"cpu": ("fp32", "bf16", "fp16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}
COUNTED = "2·A·K·D operations of one product of all pairs in fwd, and of two in fwd+bwd"
SHAPES = ("quick", "cityscapes", "in-batch")
VERIFIED = 64  # anchors
ON_THE_EDGE = 5e-7  # of a threshold, where fp32 may say either


def plan(device: str) -> dict[str, tuple[Rows, tuple[str, ...]]]:
    return {name: (ROWS[name], ("fp32", "bf16")) for name in SHAPES}


def mined(rows: Inputs, leaf: Tensor, mining: Mining, backend: str) -> tuple[Tensor, DrawnKeys, Thresholds]:
    """The loss of each anchor, and which pairs it is of."""
    keys = leaf if rows.in_batch else rows.keys
    drawn = draw_keys(keys, rows.key_labels, mining)
    sides = leaf, rows.anchor_labels, keys, drawn.positive_labels
    kept = score_thresholds(
        *sides, mining, negatives=drawn.negatives, exclude_self=rows.in_batch, backend=backend
    )
    loss = infonce(
        *sides,
        temperature=TEMPERATURE,
        reduction="none",
        exclude_self=rows.in_batch,
        negatives=drawn.negatives,
        neg_min=kept.neg_min,
        pos_max=kept.pos_max,
        backend=backend,
    )
    return loss, drawn, kept


def loss_of_pairs(
    anchors: Tensor,  # some, in fp64
    some: Tensor,  # which
    rows: Inputs,
    drawn: DrawnKeys,
    kept: Thresholds,
) -> tuple[Tensor, Tensor]:
    """Their dense loss, of the pairs that were kept, and for which of them no cosine lies on a threshold."""
    labels = rows.anchor_labels[some]
    others, other_labels = drawn.negatives or (rows.keys, rows.key_labels)
    to_keys, to_others = (anchors @ each.detach().double().T for each in (rows.keys, others))
    positives = labels[:, None] == drawn.positive_labels
    negatives = (labels[:, None] != other_labels) & (other_labels >= 0)
    if rows.in_batch:
        positives &= some[:, None] != torch.arange(len(rows.keys), device=some.device)
    above, below = to_others - kept.neg_min[some, None], kept.pos_max[some, None] - to_keys
    off = [x.abs().masked_fill(~of, torch.inf).amin(1) for x, of in ((above, negatives), (below, positives))]
    negatives &= above >= 0
    positives &= below > 0
    neg_lse = (to_others / TEMPERATURE).masked_fill(~negatives, -torch.inf).logsumexp(1, keepdim=True)
    pairs = torch.where(positives, F.softplus(neg_lse - to_keys / TEMPERATURE), 0)
    return pairs.sum(1) / positives.sum(1).clamp(min=1), torch.minimum(*off) > ON_THE_EDGE


def ours(rows: Inputs, mining: Mining, backend: str, limits: tuple[float, float]) -> Method:
    leaf = rows.anchors.detach().clone().requires_grad_()

    def verify() -> Errors:
        loss, drawn, kept = mined(rows, leaf, mining, backend)
        some = torch.arange(0, len(leaf), -(-len(leaf) // VERIFIED), device=leaf.device)
        exact = leaf.detach()[some].double().requires_grad_()
        truth, clear = loss_of_pairs(exact, some, rows, drawn, kept)
        assert clear.sum() > len(some) / 2, "most anchors have a pair on a threshold"
        errors = {"loss": (relative_error(loss.detach()[some][clear], truth.detach()[clear]), limits[0])}
        if not rows.in_batch:  # there an anchor's gradient has a part from the others
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            (true_gradient,) = torch.autograd.grad(truth.sum(), exact)
            errors["gradient"] = (relative_error(gradient[some][clear], true_gradient[clear]), limits[1])
        return errors

    return Method(lambda: mined(rows, leaf, mining, backend)[0].mean(), [leaf], verify=verify)


def dense_mined(
    anchors: Tensor,
    anchor_labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    *,
    temperature: float,
    mining: Mining,
    exclude_self: bool = False,
) -> Tensor:
    """As one writes it: the whole matrix, `topk` of its rows, and of the hardest a random part by a mask."""
    cosines = (anchors @ keys.T).float()
    same = anchor_labels[:, None] == key_labels
    positives, negatives = same & (key_labels >= 0), ~same & (key_labels >= 0)
    if exclude_self:
        positives &= ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)

    def hardest(scores: Tensor, pairs: Tensor, count: int) -> Tensor:
        if mining.strategy != "random":
            scores = scores.detach().masked_fill(~pairs, -torch.inf)
            if mining.strategy == "hardest":
                wanted = pairs.sum(1).clamp(max=count)
            else:
                wanted = (pairs.sum(1) * mining.fraction).ceil().long()
            ranked = scores.topk(int(wanted.max().clamp(min=1)), dim=1).values
            pairs = pairs & (scores >= ranked.gather(1, (wanted - 1).clamp(min=0)[:, None]))
        if mining.strategy != "hardest":
            share = count / pairs.sum(1, keepdim=True).clamp(min=1)
            pairs = pairs & (torch.rand(pairs.shape, device=pairs.device) < share)
        return pairs

    negatives = hardest(cosines, negatives, mining.negatives)
    positives = hardest(-cosines, positives, mining.positives)
    logits = cosines / temperature
    neg_lse = logits.masked_fill(~negatives, -torch.inf).logsumexp(1, keepdim=True)
    losses = (F.softplus(neg_lse - logits) * positives).sum(1) / positives.sum(1).clamp(min=1)
    return losses.sum() / positives.any(1).sum().clamp(min=1)


def case(shape: Rows, dtype: str, device: str, backends: list[str], name: str = "") -> Case:
    @cache
    def inputs() -> Inputs:
        return Inputs(shape, ELEMENTS[dtype], device)

    matrix = 4 * shape.A * (shape.K or shape.A)
    # Of a loss of few pairs an error of one is more than of one of all.
    limits = OURS[dtype][0] * 4, OURS[dtype][1]
    candidates: dict[str, Candidate] = {}
    for backend in backends:
        needs = BUFFERS * matrix if backend == "reference" else 0
        for strategy in STRATEGIES:
            build: Callable[[], Method] = partial(
                lambda *arguments: ours(inputs(), *arguments), Mining(strategy), backend, limits
            )
            candidates[f"ours ({backend}), {strategy}"] = Candidate(build, needs)
    everything = f"ours ({backends[0]}), all keys"
    candidates[everything] = Candidate(
        lambda: loss_method(partial(infonce, backend=backends[0]), inputs(), OURS[dtype]), 0, "without mining"
    )
    for strategy in STRATEGIES:
        candidates[f"dense, {strategy}"] = Candidate(
            partial(
                lambda mining: loss_method_unverified(partial(dense_mined, mining=mining), inputs()),
                Mining(strategy),
            ),
            2 * BUFFERS * matrix,
            "draws and ranks of its own",
        )
    product = 2.0 * shape.A * (shape.K or shape.A) * shape.D
    work = {"fwd": Work(flop=product), "fwd+bwd": Work(flop=2 * product)}
    return Case("mining", name or str(shape), shape, dtype, device, candidates, work, COUNTED, everything)


def loss_method_unverified(function: Callable[..., Tensor], rows: Inputs) -> Method:
    """Of a loss whose pairs are drawn at random within it."""
    return Method(partial(rows.whole.loss, function), [rows.whole.leaf])
