"""The specification in plain PyTorch: every other backend is tested against this one.

Readable before fast. It materialises the anchors x keys matrix, yet never waits for the device: all shapes
are fixed by the arguments. Source: "Exploring Cross-Image Pixel Contrast for Semantic Segmentation" (arXiv
2101.11939), eq. (3) and section 3; the equations here are numbered on their own.

For anchor i of label y_i over keys j with label >= 0, N(i) = other class, P(i) = same class (minus key i itself with
`exclude_self`), s_ij = <a_i, k_j> / temperature and g_i = the upstream gradient:

    (1) L_i    = logsumexp_{j in N(i)} s_ij                      neg_lse, -inf if N(i) is empty
    (2) l_ip   = softplus(L_i - s_ip)           p in P(i)        = -log(e^s_ip / (e^s_ip + sum_neg e^s_ij))
    (3) loss_i = (1 / |P(i)|) sum_p l_ip                         0 if P(i) is empty
    (4) S_i    = sum_p sigma_ip,  sigma_ip = sigmoid(L_i - s_ip) pos_weight
    (5) ds_ip  = -(g_i / |P_i|) sigma_ip ;  ds_in = (g_i / |P_i|) S_i exp(s_in - L_i)
    (6) da_i   = sum_j ds_ij k_j / temperature ;  dk_j = sum_i ds_ij a_i / temperature
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext.backends.calls import (
    SCORE_BINS,
    Collect,
    Gather,
    GatherBackward,
    InfonceBackward,
    InfonceForward,
    MinedBackward,
    MinedForward,
    Sampling,
    ScoreCounts,
    Write,
)
from pixcontrast_ext.backends.errors import bad_class, bad_index


def unsupported(
    op: str, dtype: torch.dtype | None, channels: int | None = None, device: torch.device | None = None
) -> str | None:
    """Why this backend cannot serve a call, or None if it can."""
    if dtype is not None and not dtype.is_floating_point:
        return f"{dtype} is not a floating-point dtype"
    return None


# InfoNCE


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _labelled(rows: Tensor, labels: Tensor) -> Tensor:
    """Rows in the accumulator's precision; unlabelled ones become 0, so that nothing in them can spread."""
    return rows.to(_accumulator(rows.dtype)).masked_fill((labels < 0)[:, None], 0.0)


def _pairs(anchor_labels: Tensor, key_labels: Tensor, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """N(i) and P(i) as masks [A, K]."""
    labelled = (anchor_labels[:, None] >= 0) & (key_labels[None, :] >= 0)
    same = anchor_labels[:, None] == key_labels[None, :]
    negatives, positives = labelled & ~same, labelled & same
    if exclude_self:
        device = anchor_labels.device
        anchor_index = torch.arange(anchor_labels.shape[0], device=device)
        key_index = torch.arange(key_labels.shape[0], device=device)
        positives = positives & (anchor_index[:, None] != key_index[None, :])
    return negatives, positives


def _neg_lse(scores: Tensor, negatives: Tensor) -> Tensor:
    """Eq. (1)."""
    some = negatives.any(dim=1)
    masked = scores.masked_fill(~negatives, -math.inf)
    # Rows of -inf only would have a NaN gradient.
    lse = torch.where(some[:, None], masked, 0.0).logsumexp(dim=1) if scores.shape[1] else masked.sum(dim=1)
    return torch.where(some, lse, -math.inf)


def infonce_per_anchor(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A]
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K]
    temperature: float,
    exclude_self: bool,
) -> tuple[Tensor, Tensor]:
    """Eq. (1) to (3), differentiable by autograd alone: loss [A] and |P| [A]."""
    scores = _labelled(anchors, anchor_labels) @ _labelled(keys, key_labels).T / temperature
    negatives, positives = _pairs(anchor_labels, key_labels, exclude_self)
    pair_losses = F.softplus(_neg_lse(scores, negatives)[:, None] - scores)  # (2)
    count = positives.sum(dim=1)
    return torch.where(positives, pair_losses, 0.0).sum(dim=1) / count.clamp(min=1), count  # (3)


def infonce_forward(call: InfonceForward) -> None:
    """Eq. (1) to (4), and eq. (6) for the anchors with g = 1."""
    keys = _labelled(call.keys, call.key_labels)
    pairs = _pairs(call.anchor_labels, call.key_labels, call.exclude_self)
    _forward(call, _cosines(call, keys), keys, *pairs)


def _cosines(call: InfonceForward | InfonceBackward | ScoreCounts, keys: Tensor) -> Tensor:
    return _labelled(call.anchors, call.anchor_labels) @ keys.T


def _forward(
    call: InfonceForward,
    cosines: Tensor,  # [A, K]
    keys: Tensor,  # [K, D]
    negatives: Tensor,  # [A, K] bool
    positives: Tensor,  # [A, K] bool
) -> None:
    scores = cosines / call.temperature
    neg_lse = _neg_lse(scores, negatives)
    count = positives.sum(dim=1)
    pair_losses = torch.where(positives, F.softplus(neg_lse[:, None] - scores), 0.0)
    call.neg_lse.copy_(neg_lse)
    call.pos_count.copy_(count)
    call.loss.copy_(pair_losses.sum(dim=1) / count.clamp(min=1))
    call.pos_weight.copy_(torch.where(positives, torch.sigmoid(neg_lse[:, None] - scores), 0.0).sum(dim=1))
    if call.anchor_grad is not None:
        grad_scale = scores.new_ones(()) / count.clamp(min=1)
        ds = _score_grad(scores, negatives, positives, neg_lse, call.pos_weight, grad_scale)
        call.anchor_grad.copy_(ds @ keys / call.temperature)


def _score_grad(
    scores: Tensor,
    negatives: Tensor,
    positives: Tensor,
    neg_lse: Tensor,
    pos_weight: Tensor,
    grad_scale: Tensor,
) -> Tensor:
    """Eq. (5): ds [A, K]; `grad_scale` is g / |P|."""
    sigma = torch.where(positives, torch.sigmoid(neg_lse[:, None] - scores), 0.0)
    share = torch.where(negatives, torch.exp(scores - neg_lse[:, None]), 0.0)  # of its logsumexp
    push, pull = grad_scale * pos_weight, grad_scale
    return push[:, None] * share - pull[:, None] * sigma


def infonce_backward(call: InfonceBackward) -> None:
    """Eq. (6) for the keys; for anchors that are the keys, both halves of it."""
    keys, key_labels = call.others or (call.anchors, call.anchor_labels)
    pairs = _pairs(call.anchor_labels, key_labels, call.exclude_self)
    _backward(call, _cosines(call, _labelled(keys, key_labels)), *pairs)


def _backward(call: InfonceBackward, cosines: Tensor, negatives: Tensor, positives: Tensor) -> None:
    scores = cosines / call.temperature
    ds = _score_grad(scores, negatives, positives, call.neg_lse, call.pos_weight, call.grad_scale)
    if call.others is None:
        ds = ds + ds.T
    call.grad.copy_(ds.T @ _labelled(call.anchors, call.anchor_labels) / call.temperature)


# Mining


def _kept(call: MinedForward | MinedBackward, cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs may be negatives and which positives, by each anchor's range. A NaN may be either."""
    return ~(cosines < call.neg_min[:, None]), ~(cosines >= call.pos_max[:, None])


def score_counts(call: ScoreCounts) -> None:
    """Bins have exact edges: a cosine is in bin b or above exactly if it is at least the lower edge of b."""

    def count(keys: Tensor, key_labels: Tensor, which: int, counts: Tensor) -> None:
        exclude_self = call.exclude_self and which == 1
        pairs = _pairs(call.anchor_labels, key_labels, exclude_self)[which]
        half = SCORE_BINS // 2
        place = (_cosines(call, _labelled(keys, key_labels)) * half).floor() + half
        bins = place.nan_to_num(nan=0).clamp(0, SCORE_BINS - 1).long()
        counts.zero_().scatter_add_(1, bins, pairs.int())

    count(call.negatives, call.negative_labels, 0, call.neg_counts)
    count(call.keys, call.key_labels, 1, call.pos_counts)


def mined_forward(call: MinedForward) -> None:
    """Eq. (1) to (4) with N(i) and P(i) as mining leaves them, and eq. (6) for the anchors with g = 1."""
    rows = _labelled(call.keys, call.key_labels), _labelled(call.negatives, call.negative_labels)
    cosines = [_cosines(call, each) for each in rows]
    negatives = _pairs(call.anchor_labels, call.negative_labels, False)[0] & _kept(call, cosines[1])[0]
    positives = _pairs(call.anchor_labels, call.key_labels, call.exclude_self)[1] & _kept(call, cosines[0])[1]
    # As if both were one set of keys, of which the first are no negatives and the others no positives.
    _forward(
        call,
        torch.cat(cosines, dim=1),
        torch.cat(rows),
        torch.cat([torch.zeros_like(positives), negatives], dim=1),
        torch.cat([positives, torch.zeros_like(negatives)], dim=1),
    )


def mined_backward(call: MinedBackward) -> None:
    """Eq. (6) as in `infonce_backward`, for the pairs that mining keeps."""
    keys, key_labels = call.others or (call.anchors, call.anchor_labels)
    cosines = _cosines(call, _labelled(keys, key_labels))
    pairs = _pairs(call.anchor_labels, key_labels, call.exclude_self)
    negatives, positives = (pair & kept for pair, kept in zip(pairs, _kept(call, cosines), strict=True))
    _backward(call, cosines, negatives, positives)


# pools of pixels: what sampling and enqueue share


def _classes(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The class of each pixel, -1 if it is ignored. An impossible label raises on the CPU, is ignored elsewhere."""
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    if labels.device.type == "cpu":
        wrong = ~valid & (labels != ignore_index)
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            raise bad_class("labels", place, int(labels[tuple(place)]), num_classes, ignore_index)
    return torch.where(valid, labels, -1)


def _count(pools: Tensor, num_pools: int) -> Tensor:
    """Pixels in each pool; pool -1 counts nowhere."""
    counts = torch.zeros(num_pools + 1, dtype=torch.int64, device=pools.device)
    return counts.scatter_add_(0, torch.where(pools < 0, num_pools, pools), torch.ones_like(pools))[
        :num_pools
    ]


def _smallest(pools: Tensor, priority: Tensor, keep: Tensor) -> Tensor:
    """Mask of the `keep[pool]` pixels of smallest (priority, pixel) in each pool; all flat over the pixels."""
    num_pools = keep.shape[0]
    by_priority = torch.sort(priority, stable=True).indices
    in_pools = torch.where(pools < 0, num_pools, pools)
    order = by_priority[torch.sort(in_pools[by_priority], stable=True).indices]  # by (pool, priority, pixel)
    first = torch.cumsum(_count(pools, num_pools), 0) - _count(pools, num_pools)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    some_pool = pools.clamp(min=0)
    return (pools >= 0) & (position - first[some_pool] < keep[some_pool])


# sampling


def hard_anchor_sampling(call: Sampling) -> None:
    """Up to `max_samples` pixels, in six rules.

    1. A pixel counts if it has a class. Pixels of class c in image b are hard if predicted as another class.
    2. The pair (b, c) is eligible if it has at least `min_pixels` pixels.
    3. Of T eligible pairs each gives up to n_view = max(1, min(max_samples // T, max_views)) pixels. If T is
       more than `max_samples`, those stay whose first pixel in raster order has the smallest priority.
    4. A share `hard_share` of them, rounded down, is hard; if one kind runs short, the other makes up the difference.
    5. Of each kind those with the smallest (priority, pixel).
    6. Rows are ordered by class, image, hard before easy, pixel.
    """
    call.indices.zero_()
    call.anchor_labels.fill_(-1)
    call.count.zero_()
    labels, num_classes, priority = call.labels, call.num_classes, call.priority.flatten()
    batch, pixels = labels.shape[0], labels.shape[1] * labels.shape[2]
    if batch * pixels == 0:
        return
    device = labels.device
    classes = _classes(labels, num_classes, call.ignore_index).flatten()
    pixel = torch.arange(batch * pixels, device=device)
    image = pixel // pixels
    easy = (call.predictions.flatten() == classes).long()
    pairs = torch.where(classes < 0, -1, image * num_classes + classes)
    num_pairs = batch * num_classes

    n = _count(pairs, num_pairs)
    n_easy = _count(torch.where(easy > 0, pairs, -1), num_pairs)
    n_hard = n - n_easy
    eligible = (n >= call.min_pixels) & (n > 0)

    total = eligible.sum()
    n_view = (call.max_samples // total.clamp(min=1)).clamp(max=call.max_views).clamp(min=1)
    first = torch.full((num_pairs + 1,), batch * pixels, device=device)
    first = first.scatter_reduce(0, torch.where(pairs < 0, num_pairs, pairs), pixel, "amin")[:num_pairs]
    # Stable, so pairs of equal priority stay in order; pairs that are not eligible go last.
    lowest = torch.where(eligible, priority[first.clamp(max=batch * pixels - 1)].long(), 2**31)
    rank = torch.empty_like(n).scatter_(
        0, torch.sort(lowest, stable=True).indices, torch.arange(num_pairs, device=device)
    )
    take = torch.where(eligible & (rank < call.max_samples), torch.minimum(n_view, n), 0)
    keep_hard = torch.minimum(n_hard, torch.maximum(take * call.hard_share >> 24, take - n_easy))
    keep_easy = take - keep_hard

    by_class = torch.stack([keep_hard, keep_easy], 1).view(batch, num_classes, 2).transpose(0, 1)
    keep = by_class.reshape(-1)  # pools in the order of rule 6
    pools = torch.where(classes < 0, -1, (classes * batch + image) * 2 + easy)
    chosen = _smallest(pools, priority, keep)
    place = torch.where(chosen, pools * (batch * pixels) + pixel, torch.iinfo(torch.int64).max)
    order = torch.sort(place).indices[: call.max_samples]
    filled = chosen[order]
    call.indices[: order.shape[0]] = torch.where(filled, order, 0)
    call.anchor_labels[: order.shape[0]] = torch.where(filled, classes[order], -1).int()
    call.count.copy_(chosen.sum())


# gather


def _inverse_norm(rows: Tensor) -> Tensor:
    """1 / |row| [N]; 0 where the norm is 0 or overflows."""
    squares = rows.square().sum(dim=-1)
    return torch.where(squares == 0, 0.0, squares.rsqrt())


def _is_pixel(embeddings: Tensor, indices: Tensor) -> Tensor:
    """Which indices are inside of a [B, D, H, W] map. One outside raises on the CPU, names nothing elsewhere."""
    batch, _, height, width = embeddings.shape
    inside = (indices >= 0) & (indices < batch * height * width)
    if embeddings.device.type == "cpu" and not inside.all():
        row = int((~inside).nonzero()[0])
        raise bad_index(embeddings, row, int(indices[row]))
    return inside


def _pixels(embeddings: Tensor, indices: Tensor) -> Tensor:
    """Chosen pixels of a [B, D, H, W] map as rows [A, D] of the accumulator's dtype."""
    height, width = embeddings.shape[2:]
    inside = _is_pixel(embeddings, indices)
    indices = torch.where(inside, indices, 0)
    image, pixel = indices // (height * width), indices % (height * width)
    rows = embeddings[image, :, pixel // width, pixel % width].to(_accumulator(embeddings.dtype))
    return torch.where(inside[:, None], rows, 0.0)


def gather(call: Gather) -> None:
    chosen = _pixels(call.embeddings, call.indices)
    call.inv_norm.copy_(_inverse_norm(chosen) if call.normalize else torch.ones_like(call.inv_norm))
    call.rows.copy_(chosen * call.inv_norm[:, None])


def gather_backward(call: GatherBackward) -> None:
    """The normalisation's gradient: d(x / |x|) = (g - <g, x/|x|> x/|x|) / |x|.

    A row whose gradient is zero contributes exactly zero, even if its pixel is NaN.
    """
    embeddings, indices, inv_norm = call.embeddings, call.indices, call.inv_norm
    grad = call.grad_rows.to(inv_norm.dtype)
    if call.normalize:
        unit = _pixels(embeddings, indices) * inv_norm[:, None]
        along = (grad * unit).sum(dim=1, keepdim=True)
        projected = inv_norm[:, None] * (grad - along * unit)
        grad = torch.where((grad == 0).all(dim=1, keepdim=True), 0.0, projected)
    inside = _is_pixel(embeddings, indices)
    grad, indices = torch.where(inside[:, None], grad, 0.0), torch.where(inside, indices, 0)
    batch, channels, height, width = embeddings.shape
    dense = grad.new_zeros(batch * height * width, channels)
    if dense.device.type == "cpu":
        dense.index_add_(0, indices, grad)  # in row order
    else:
        dense.index_put_((indices,), grad, accumulate=True)  # sorts, where index_add_ is atomic
    call.grad_embeddings.copy_(dense.view(batch, height, width, channels).permute(0, 3, 1, 2))


# enqueue


def enqueue_collect(call: Collect) -> None:
    call.rows.zero_()
    call.row_labels.fill_(-1)
    embeddings, labels = call.embeddings, call.labels
    num_classes, per_image = call.num_classes, call.pixels_per_image
    batch, channels, height, width = embeddings.shape
    num_pairs, pixels = batch * num_classes, height * width
    if num_pairs == 0 or pixels == 0:
        return
    dtype = _accumulator(embeddings.dtype)
    flat = embeddings.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
    unit = flat * _inverse_norm(flat)[:, None] if call.normalize else flat
    classes = _classes(labels, num_classes, call.ignore_index).flatten()
    pixel = torch.arange(batch * pixels, device=labels.device)
    pairs = torch.where(classes < 0, -1, pixel // pixels * num_classes + classes)
    n = _count(pairs, num_pairs)

    def class_sum(c: int) -> Tensor:
        of_class = torch.where((classes == c)[:, None], unit, 0.0).view(batch, pixels, channels)
        return of_class.sum(dim=1, dtype=torch.float64)

    # One class at a time: a copy of the map for each of 171 would be 46 GB at the paper's size.
    region = torch.stack([class_sum(c) for c in range(num_classes)], 1).view(num_pairs, channels)
    region = region * _inverse_norm(region)[:, None] if call.normalize else region / n.clamp(min=1)[:, None]

    chosen = _smallest(pairs, call.priority.flatten(), n.clamp(max=per_image))
    most = min(batch * pixels, num_pairs * per_image)
    order = torch.sort(
        torch.where(chosen, pairs * (batch * pixels) + pixel, torch.iinfo(torch.int64).max)
    ).indices[:most]
    taken = n.clamp(max=per_image)
    slot = (
        torch.arange(most, device=labels.device) - (torch.cumsum(taken, 0) - taken)[pairs[order].clamp(min=0)]
    )
    width_of_pair = 1 + per_image
    nowhere = num_pairs * width_of_pair
    target = torch.where(chosen[order], pairs[order] * width_of_pair + 1 + slot, nowhere)

    candidates = call.rows.new_zeros(nowhere + 1, channels)
    candidates[torch.arange(num_pairs, device=labels.device) * width_of_pair] = region.to(call.rows.dtype)
    candidates[target] = unit[order].to(call.rows.dtype)
    used = torch.zeros(nowhere + 1, dtype=torch.bool, device=labels.device)
    used[torch.arange(num_pairs, device=labels.device) * width_of_pair] = n > 0
    used[target] = True

    candidates, used = candidates[:nowhere], used[:nowhere]
    squares = candidates.to(dtype).square().sum(dim=1)
    good = used & (squares > 0) & squares.isfinite()
    label = (
        torch.arange(num_classes, device=labels.device, dtype=torch.int32)
        .repeat_interleave(width_of_pair)
        .repeat(batch)
    )
    call.rows.copy_(torch.where(good[:, None], candidates, 0).view_as(call.rows))
    call.row_labels.copy_(torch.where(good, label, -1).view_as(call.row_labels))


def enqueue_write(call: Write) -> None:
    """Append the candidates to the rings, in image order; if there are more than slots, only the last are kept."""
    regions = call.region_slots
    _write_ring(
        call.rows[:, :, :1],
        call.row_labels[:, :, :1],
        call.keys[:, :regions],
        call.key_labels[:, :regions],
        call.region_ptr,
        call.region_fill,
    )
    _write_ring(
        call.rows[:, :, 1:],
        call.row_labels[:, :, 1:],
        call.keys[:, regions:],
        call.key_labels[:, regions:],
        call.pixel_ptr,
        call.pixel_fill,
    )


def _write_ring(
    rows: Tensor,  # [N, C, n, D]
    row_labels: Tensor,  # [N, C, n]
    keys: Tensor,  # [C, slots, D], a view
    key_labels: Tensor,  # [C, slots], a view
    ptr: Tensor,
    fill: Tensor,
) -> None:
    num_classes, slots = keys.shape[:2]
    if slots == 0 or num_classes == 0:
        return
    label = torch.arange(num_classes, device=keys.device)[:, None]
    candidates = rows.transpose(0, 1).flatten(1, 2)  # [C, N * n, D]
    good = row_labels.transpose(0, 1).flatten(1) == label
    order = torch.cumsum(good, 1) - 1
    written = good.sum(dim=1)
    stays = good & (order >= (written - slots)[:, None])
    start = ptr % slots  # inside of the ring, whatever stood there
    target = torch.where(stays, (start[:, None] + order) % slots, slots)
    source = torch.full((num_classes, slots + 1), -1, dtype=torch.int64, device=keys.device)
    source.scatter_(1, target, torch.arange(candidates.shape[1], device=keys.device).expand_as(target))
    source = source[:, :slots]
    new = source >= 0
    if candidates.shape[1]:
        keys.copy_(torch.where(new[:, :, None], candidates[label, source.clamp(min=0)], keys))
    key_labels.copy_(torch.where(new, label.to(key_labels.dtype), key_labels))
    ptr.copy_((start + written) % slots)
    fill.copy_((fill + written).clamp(max=slots))
