"""The contract as plain loops in double precision: slow, and sharing no code with any backend."""

from __future__ import annotations

import math
from fractions import Fraction

from torch import Tensor


def infonce(
    anchors: Tensor,
    anchor_labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    temperature: float,
    exclude_self: bool,
) -> tuple[list[float], list[int]]:
    """Loss and number of positives of each anchor."""
    a, k = anchors.double().tolist(), keys.double().tolist()
    al, kl = anchor_labels.tolist(), key_labels.tolist()
    losses, counts = [], []
    for i in range(len(a)):
        negatives, positives = [], []
        for j in range(len(k)):
            if al[i] < 0 or kl[j] < 0:
                continue
            score = sum(x * y for x, y in zip(a[i], k[j], strict=True)) / temperature
            if al[i] != kl[j]:
                negatives.append(score)
            elif not (exclude_self and i == j):
                positives.append(score)
        # -log(e^p / (e^p + sum_n e^n))
        pair_losses = []
        for p in positives:
            top = max([p, *negatives])
            total = math.exp(p - top) + sum(math.exp(n - top) for n in negatives)
            pair_losses.append(top + math.log(total) - p)
        counts.append(len(positives))
        losses.append(sum(pair_losses) / len(positives) if positives else 0.0)
    return losses, counts


def sampling(
    labels: Tensor,
    predictions: Tensor,
    priority: Tensor,
    num_classes: int,
    max_samples: int,
    max_views: int,
    min_pixels: int,
    ignore_index: int,
    hard_fraction: float = 0.5,
) -> tuple[list[int], list[int]]:
    """Flat indices and labels of the anchors, without padding."""
    batch, pixels = labels.shape[0], labels[0].numel()
    y, p, r = (t.reshape(batch, pixels).tolist() for t in (labels, predictions, priority))
    pairs = {}
    for b in range(batch):
        for c in range(num_classes):
            mine = [i for i in range(pixels) if y[b][i] == c and c != ignore_index]
            if mine and len(mine) >= min_pixels:
                pairs[b, c] = mine
    if not pairs:
        return [], []
    n_view = max(1, min(max_samples // len(pairs), max_views))
    kept = sorted(pairs, key=lambda bc: (r[bc[0]][pairs[bc][0]], bc))[:max_samples]
    chosen: list[tuple[int, int, int, int]] = []
    for b, c in kept:
        hard = [i for i in pairs[b, c] if p[b][i] != c]
        easy = [i for i in pairs[b, c] if p[b][i] == c]
        take = min(n_view, len(pairs[b, c]))
        wanted = math.floor(Fraction(repr(hard_fraction)) * take)  # of the number as it is written
        keep_hard = min(len(hard), max(wanted, take - len(easy)))
        for kind, pool, keep in ((0, hard, keep_hard), (1, easy, take - keep_hard)):
            chosen += [(c, b, kind, i) for i in sorted(pool, key=lambda i: (r[b][i], i))[:keep]]
    chosen.sort()
    return [b * pixels + i for _, b, _, i in chosen], [c for c, *_ in chosen]


class Rings:
    """A bank as lists: per class the regions and the pixels, oldest first."""

    def __init__(
        self,
        num_classes: int,
        region_slots: int,
        pixel_slots: int,
        pixels_per_image: int,
        normalize: bool = True,
    ):
        self.slots = {"region": region_slots, "pixel": pixel_slots}
        self.pixels_per_image, self.normalize = pixels_per_image, normalize
        self.rows = {kind: [[] for _ in range(num_classes)] for kind in self.slots}

    def enqueue(self, embeddings: Tensor, labels: Tensor, priority: Tensor, ignore_index: int = 255) -> None:
        batch, channels = embeddings.shape[:2]
        for b in range(batch):
            rows = embeddings[b].double().reshape(channels, -1).T
            if self.normalize:
                rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
            y, r = labels[b].flatten().tolist(), priority[b].flatten().tolist()
            for c in range(len(self.rows["region"])):
                mine = [i for i in range(len(y)) if y[i] == c and c != ignore_index]
                if not mine:
                    continue
                self._push("region", c, rows[mine].mean(0))
                smallest = sorted(mine, key=lambda i: (r[i], i))[: self.pixels_per_image]
                for i in sorted(smallest):
                    self._push("pixel", c, rows[i])

    def _push(self, kind: str, c: int, row: Tensor) -> None:
        norm = row.norm()
        if norm > 0 and norm.isfinite():
            self.rows[kind][c].append(row / norm if self.normalize else row)

    def expected(self, kind: str, c: int) -> tuple[int, int, dict[int, Tensor]]:
        """Pointer, fill and the row of every used slot of one ring."""
        rows, slots = self.rows[kind][c], self.slots[kind]
        if slots == 0:
            return 0, 0, {}
        stored = {i % slots: rows[i] for i in range(len(rows))}
        return len(rows) % slots, min(len(rows), slots), stored


def purity(labels: Tensor, size: tuple[int, int], picked: Tensor) -> list[list[list[Fraction]]]:
    """Of labels [B, H, W], the share under each cell of a grid of this size that has its label, picked [B, h, w]."""
    (batch, height, width), (rows, columns) = labels.shape, size
    shares = []
    for b in range(batch):
        image = []
        for i in range(rows):
            below = range(i * height // rows, math.ceil(Fraction((i + 1) * height, rows)))
            row = []
            for j in range(columns):
                right = range(j * width // columns, math.ceil(Fraction((j + 1) * width, columns)))
                found = [int(labels[b, y, x]) for y in below for x in right]
                row.append(Fraction(found.count(int(picked[b, i, j])), len(found)))
            image.append(row)
        shares.append(image)
    return shares
