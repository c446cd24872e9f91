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
    """Rows in the accumulator's precision; those without a label become 0, so that nothing in them can
    spread.
    """
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


def infonce_forward(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int32
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int32
    temperature: float,
    exclude_self: bool,
    loss: Tensor,  # [A], out
    neg_lse: Tensor,  # [A], out
    pos_weight: Tensor,  # [A], out
    pos_count: Tensor,  # [A] int32, out
    anchor_grad: Tensor | None,  # [A, D], out: eq. (6) for g = 1
) -> None:
    a, k = _labelled(anchors, anchor_labels), _labelled(keys, key_labels)
    scores = a @ k.T / temperature
    negatives, positives = _pairs(anchor_labels, key_labels, exclude_self)
    lse = _neg_lse(scores, negatives)
    count = positives.sum(dim=1)
    neg_lse.copy_(lse)
    pos_count.copy_(count)
    loss.copy_(torch.where(positives, F.softplus(lse[:, None] - scores), 0.0).sum(dim=1) / count.clamp(min=1))
    pos_weight.copy_(torch.where(positives, torch.sigmoid(lse[:, None] - scores), 0.0).sum(dim=1))
    if anchor_grad is not None:
        ds = _score_grad(
            scores, negatives, positives, lse, pos_weight, scores.new_ones(()) / count.clamp(min=1)
        )
        anchor_grad.copy_(ds @ k / temperature)


def _score_grad(
    scores: Tensor,
    negatives: Tensor,
    positives: Tensor,
    neg_lse: Tensor,
    pos_weight: Tensor,
    grad_scale: Tensor,
) -> Tensor:
    """Eq. (5): ds [A, K]; `grad_scale` is g / |P|."""
    pull = torch.where(positives, torch.sigmoid(neg_lse[:, None] - scores), 0.0)
    push = torch.where(negatives, torch.exp(scores - neg_lse[:, None]), 0.0)
    return grad_scale[:, None] * (pos_weight[:, None] * push - pull)


def infonce_backward_keys(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int32
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int32
    neg_lse: Tensor,  # [A]
    pos_weight: Tensor,  # [A]
    grad_scale: Tensor,  # [A], g / |P|
    temperature: float,
    exclude_self: bool,
    key_grad: Tensor,  # [K, D], out: eq. (6)
) -> None:
    a, k = _labelled(anchors, anchor_labels), _labelled(keys, key_labels)
    scores = a @ k.T / temperature
    negatives, positives = _pairs(anchor_labels, key_labels, exclude_self)
    ds = _score_grad(scores, negatives, positives, neg_lse, pos_weight, grad_scale)
    key_grad.copy_(ds.T @ a / temperature)


def infonce_backward_symmetric(
    anchors: Tensor,  # [A, D], the keys as well
    anchor_labels: Tensor,  # [A] int32
    neg_lse: Tensor,  # [A]
    pos_weight: Tensor,  # [A]
    grad_scale: Tensor,  # [A], g / |P|
    temperature: float,
    exclude_self: bool,
    anchor_grad: Tensor,  # [A, D], out: both halves of eq. (6)
) -> None:
    a = _labelled(anchors, anchor_labels)
    scores = a @ a.T / temperature
    negatives, positives = _pairs(anchor_labels, anchor_labels, exclude_self)
    ds = _score_grad(scores, negatives, positives, neg_lse, pos_weight, grad_scale)
    anchor_grad.copy_((ds + ds.T) @ a / temperature)


# pools of pixels: what sampling and enqueue share


def _classes(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The class of each pixel, -1 if it is ignored. An impossible label raises on the CPU, is ignored
    elsewhere.
    """
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    if labels.device.type == "cpu":
        wrong = ~valid & (labels != ignore_index)
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"labels{list(place)} is {int(labels[place])}, "
                f"expected 0 <= label < num_classes={num_classes} or ignore_index={ignore_index}"
            )
    return torch.where(valid, labels, -1)


def _count(pools: Tensor, num_pools: int) -> Tensor:
    """Pixels in each pool; pool -1 counts nowhere."""
    counts = torch.zeros(num_pools + 1, dtype=torch.int64, device=pools.device)
    return counts.scatter_add_(0, torch.where(pools < 0, num_pools, pools), torch.ones_like(pools))[
        :num_pools
    ]


def _smallest(pools: Tensor, priority: Tensor, keep: Tensor) -> Tensor:
    """Mask of the `keep[pool]` pixels of smallest (priority, pixel) in each pool; all three flat over the
    pixels.
    """
    num_pools = keep.shape[0]
    by_priority = torch.sort(priority, stable=True).indices
    in_pools = torch.where(pools < 0, num_pools, pools)
    order = by_priority[torch.sort(in_pools[by_priority], stable=True).indices]  # by (pool, priority, pixel)
    first = torch.cumsum(_count(pools, num_pools), 0) - _count(pools, num_pools)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    some_pool = pools.clamp(min=0)
    return (pools >= 0) & (position - first[some_pool] < keep[some_pool])


# sampling


def hard_anchor_sampling(
    labels: Tensor,  # [B, H, W] int64
    predictions: Tensor,  # [B, H, W] int64
    priority: Tensor,  # [B, H, W] int32
    num_classes: int,
    max_samples: int,
    max_views: int,
    min_pixels: int,
    ignore_index: int,
    indices: Tensor,  # [max_samples] int64, out
    anchor_labels: Tensor,  # [max_samples] int32, out
    count: Tensor,  # [] int32, out
) -> None:
    """Up to `max_samples` pixels, in six rules.

    1. A pixel counts if it has a class. Pixels of class c in image b are hard if predicted as another class.
    2. The pair (b, c) is eligible if it has at least `min_pixels` pixels.
    3. Of T eligible pairs each gives up to n_view = max(1, min(max_samples // T, max_views)) pixels. If T is
       more than `max_samples`, those stay whose first pixel in raster order has the smallest priority.
    4. Half of them hard, as far as there are; what one kind lacks the other gives.
    5. Of each kind those with the smallest (priority, pixel).
    6. Rows are ordered by class, image, hard before easy, pixel.
    """
    indices.zero_()
    anchor_labels.fill_(-1)
    count.zero_()
    batch, pixels = labels.shape[0], labels.shape[1] * labels.shape[2]
    if batch * pixels == 0:
        return
    device = labels.device
    classes = _classes(labels, num_classes, ignore_index).flatten()
    pixel = torch.arange(batch * pixels, device=device)
    image = pixel // pixels
    easy = (predictions.flatten() == classes).long()
    pairs = torch.where(classes < 0, -1, image * num_classes + classes)
    num_pairs = batch * num_classes

    n = _count(pairs, num_pairs)
    n_easy = _count(torch.where(easy > 0, pairs, -1), num_pairs)
    n_hard = n - n_easy
    eligible = (n >= min_pixels) & (n > 0)

    total = eligible.sum()
    n_view = (max_samples // total.clamp(min=1)).clamp(max=max_views).clamp(min=1)
    first = torch.full((num_pairs + 1,), batch * pixels, device=device)
    first = first.scatter_reduce(0, torch.where(pairs < 0, num_pairs, pairs), pixel, "amin")[:num_pairs]
    # Stable, so pairs of equal priority stay in order; pairs that are not eligible go last.
    lowest = torch.where(eligible, priority.flatten()[first.clamp(max=batch * pixels - 1)].long(), 2**31)
    rank = torch.empty_like(n).scatter_(
        0, torch.sort(lowest, stable=True).indices, torch.arange(num_pairs, device=device)
    )
    take = torch.where(eligible & (rank < max_samples), torch.minimum(n_view, n), 0)
    keep_hard = torch.minimum(n_hard, torch.maximum(take // 2, take - n_easy))
    keep_easy = take - keep_hard

    by_class = torch.stack([keep_hard, keep_easy], 1).view(batch, num_classes, 2).transpose(0, 1)
    keep = by_class.reshape(-1)  # pools in the order of rule 6
    pools = torch.where(classes < 0, -1, (classes * batch + image) * 2 + easy)
    chosen = _smallest(pools, priority.flatten(), keep)
    place = torch.where(chosen, pools * (batch * pixels) + pixel, torch.iinfo(torch.int64).max)
    order = torch.sort(place).indices[:max_samples]
    filled = chosen[order]
    indices[: order.shape[0]] = torch.where(filled, order, 0)
    anchor_labels[: order.shape[0]] = torch.where(filled, classes[order], -1).int()
    count.copy_(chosen.sum())


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
        raise ValueError(
            f"indices[{row}] is {int(indices[row])}, expected 0 <= index < B*H*W={batch * height * width}"
        )
    return inside


def _pixels(embeddings: Tensor, indices: Tensor) -> Tensor:
    """Chosen pixels of a [B, D, H, W] map as rows [A, D] of the accumulator's dtype."""
    height, width = embeddings.shape[2:]
    inside = _is_pixel(embeddings, indices)
    indices = torch.where(inside, indices, 0)
    image, pixel = indices // (height * width), indices % (height * width)
    rows = embeddings[image, :, pixel // width, pixel % width].to(_accumulator(embeddings.dtype))
    return torch.where(inside[:, None], rows, 0.0)


def gather(
    embeddings: Tensor,  # [B, D, H, W]
    indices: Tensor,  # [A] int64
    normalize: bool,
    rows: Tensor,  # [A, D], out
    inv_norm: Tensor,  # [A], out
) -> None:
    chosen = _pixels(embeddings, indices)
    inv_norm.copy_(_inverse_norm(chosen) if normalize else torch.ones_like(inv_norm))
    rows.copy_(chosen * inv_norm[:, None])


def gather_backward(
    grad_rows: Tensor,  # [A, D]
    embeddings: Tensor,  # [B, D, H, W]
    indices: Tensor,  # [A] int64
    inv_norm: Tensor,  # [A]
    normalize: bool,
    grad_embeddings: Tensor,  # [B, D, H, W], out
) -> None:
    """d(x / |x|) = (g - <g, x/|x|> x/|x|) / |x|; a row without gradient leaves none, whatever stands in
    it.
    """
    grad = grad_rows.to(inv_norm.dtype)
    if normalize:
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
    grad_embeddings.copy_(dense.view(batch, height, width, channels).permute(0, 3, 1, 2))


# enqueue


def enqueue_collect(
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    priority: Tensor,  # [B, H, W] int32
    num_classes: int,
    pixels_per_image: int,
    ignore_index: int,
    normalize: bool,
    rows: Tensor,  # [B, C, 1 + k, D], out
    row_labels: Tensor,  # [B, C, 1 + k] int32, out
) -> None:
    """Candidates of each (image, class): its region, then its pixels of smallest (priority, pixel) in pixel
    order.

    A row whose norm is 0 or not finite is no candidate: label -1, all zeros.
    """
    rows.zero_()
    row_labels.fill_(-1)
    batch, channels, height, width = embeddings.shape
    num_pairs, pixels = batch * num_classes, height * width
    if num_pairs == 0 or pixels == 0:
        return
    dtype = _accumulator(embeddings.dtype)
    flat = embeddings.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
    unit = flat * _inverse_norm(flat)[:, None] if normalize else flat
    classes = _classes(labels, num_classes, ignore_index).flatten()
    pixel = torch.arange(batch * pixels, device=labels.device)
    pairs = torch.where(classes < 0, -1, pixel // pixels * num_classes + classes)
    n = _count(pairs, num_pairs)

    def class_sum(c: int) -> Tensor:
        of_class = torch.where((classes == c)[:, None], unit, 0.0).view(batch, pixels, channels)
        return of_class.sum(dim=1, dtype=torch.float64)

    # One class at a time: a copy of the map for each of 171 would be 46 GB at the paper's size.
    region = torch.stack([class_sum(c) for c in range(num_classes)], 1).view(num_pairs, channels)
    region = region * _inverse_norm(region)[:, None] if normalize else region / n.clamp(min=1)[:, None]

    chosen = _smallest(pairs, priority.flatten(), n.clamp(max=pixels_per_image))
    most = min(batch * pixels, num_pairs * pixels_per_image)
    order = torch.sort(
        torch.where(chosen, pairs * (batch * pixels) + pixel, torch.iinfo(torch.int64).max)
    ).indices[:most]
    taken = n.clamp(max=pixels_per_image)
    slot = (
        torch.arange(most, device=labels.device) - (torch.cumsum(taken, 0) - taken)[pairs[order].clamp(min=0)]
    )
    width_of_pair = 1 + pixels_per_image
    nowhere = num_pairs * width_of_pair
    target = torch.where(chosen[order], pairs[order] * width_of_pair + 1 + slot, nowhere)

    candidates = rows.new_zeros(nowhere + 1, channels)
    candidates[torch.arange(num_pairs, device=labels.device) * width_of_pair] = region.to(rows.dtype)
    candidates[target] = unit[order].to(rows.dtype)
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
    rows.copy_(torch.where(good[:, None], candidates, 0).view_as(rows))
    row_labels.copy_(torch.where(good, label, -1).view_as(row_labels))


def enqueue_write(
    rows: Tensor,  # [N, C, 1 + k, D], dtype of the keys
    row_labels: Tensor,  # [N, C, 1 + k] int32
    keys: Tensor,  # [C, R + P, D], in and out
    key_labels: Tensor,  # [C, R + P] int32, in and out
    region_ptr: Tensor,  # [C] int64, in and out, and so the next three
    region_fill: Tensor,
    pixel_ptr: Tensor,
    pixel_fill: Tensor,
    region_slots: int,
) -> None:
    """Append the candidates to the rings, in image order; of more than a ring holds the last ones stay."""
    pixel_slots = keys.shape[1] - region_slots
    _write_ring(
        rows[:, :, :1],
        row_labels[:, :, :1],
        keys[:, :region_slots],
        key_labels[:, :region_slots],
        region_ptr,
        region_fill,
        region_slots,
    )
    _write_ring(
        rows[:, :, 1:],
        row_labels[:, :, 1:],
        keys[:, region_slots:],
        key_labels[:, region_slots:],
        pixel_ptr,
        pixel_fill,
        pixel_slots,
    )


def _write_ring(
    rows: Tensor,  # [N, C, n, D]
    row_labels: Tensor,  # [N, C, n]
    keys: Tensor,  # [C, slots, D], a view
    key_labels: Tensor,  # [C, slots], a view
    ptr: Tensor,
    fill: Tensor,
    slots: int,
) -> None:
    num_classes = keys.shape[0]
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
