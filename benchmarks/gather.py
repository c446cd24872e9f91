"""Reading the anchors out of the map, beside indexing a copy of the map laid out as [B·H·W, D]."""

from collections.abc import Callable

import torch
from torch import Tensor

from pixcontrast_ext import gather_embeddings, hard_anchor_sampling

from .baselines import loops
from .harness import Method, Section, Settings, draw_priority, embedding_map, relative_error, scenes

BATCH, DIM, HEIGHT, WIDTH, NUM_CLASSES = 8, 256, 64, 128, 19


def run(settings: Settings) -> Section:
    labels, predictions = scenes(BATCH, HEIGHT, WIDTH, NUM_CLASSES)
    embeddings = embedding_map(BATCH, DIM, HEIGHT, WIDTH).requires_grad_()
    indices = hard_anchor_sampling(
        labels, predictions, num_classes=NUM_CLASSES, priority=draw_priority(labels), backend="reference"
    ).indices
    cotangent = torch.randn(len(indices), DIM, generator=torch.Generator().manual_seed(4))
    section = Section(f"gather: {len(indices)} rows of {BATCH}×{DIM}×{HEIGHT}×{WIDTH} fp32", unit="GB/s")

    def reference(embeddings: Tensor, indices: Tensor) -> Tensor:
        return gather_embeddings(embeddings, indices, backend="reference")

    def forward(gather: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: gather(embeddings, indices))

    def forward_backward(gather: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            rows = gather(embeddings, indices)
            return [rows.detach(), *torch.autograd.grad(rows, embeddings, cotangent)]

        return call

    truth = forward_backward(reference)()
    for name, gather in {"ours": gather_embeddings, "copy": loops.gather}.items():
        rows, gradient = forward_backward(gather)()
        section.check(f"{name}: rows", relative_error(rows, truth[0]), 1e-6)
        section.check(f"{name}: gradient of the map", relative_error(gradient, truth[1]), 1e-5)

    read = 2 * truth[0].nbytes
    written = embeddings.nbytes
    section.facts.append(
        f"work: rows read and written = {read / 1e6:.1f} MB; the backward writes the map's dense gradient = "
        f"{written / 1e6:.1f} MB"
    )
    methods = []
    for name, gather in {"ours": gather_embeddings, "copy": loops.gather}.items():
        methods.append(Method(f"{name} fwd", forward(gather), read))
        methods.append(Method(f"{name} fwd+bwd", forward_backward(gather), 2 * read + written))
    methods.append(Method("zeros of the map's size", lambda: torch.zeros_like(embeddings), written))
    section.time(methods, settings.rounds)
    section.ratio("gather fwd: copy / ours", "copy fwd", "ours fwd")
    section.ratio("gather fwd+bwd: copy / ours", "copy fwd+bwd", "ours fwd+bwd")
    section.ratio("gather fwd+bwd: ours / zeros of the map's size", "ours fwd+bwd", "zeros of the map's size")
    return section
