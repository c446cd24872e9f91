"""What the criterion does in a training step: sample, gather, contrast with the bank, backward to the map, enqueue.

The alternative is the loops with the dense loss. It gathers all anchors at once, which spares it a dense gradient of
the map per image and class.
"""

from __future__ import annotations

from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext import MemoryBank, PixelContrastLoss, hard_anchor_sampling

from .baselines import loops
from .baselines.dense import BUFFERS, dense_infonce
from .harness import Candidate, Case, Errors, Method, Work, relative_error
from .inputs import contrast_inputs, embedding_map, scenes
from .shapes import STEPS, Images, Maps

SHAPE = Maps
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
DTYPES = {"cpu": ("fp32",), "cuda": ("fp32", "tf32")}
COUNTED = "the two products of the loss, 4·A·K·D operations; all else comes on top"
TEMPERATURE = 0.1
SEED = 7  # of the anchors that are verified
TRUTH_PAIRS = 10_000_000  # that are stored at a time, in fp64


def plan(device: str) -> dict[str, tuple[Maps, tuple[str, ...]]]:
    return {name: (shape, ("fp32",)) for name, shape in STEPS.items()}


def full_bank(shape: Maps | Images, device: str) -> MemoryBank:
    """A bank of shape.K keys, half of them regions, every slot filled with a unit vector near its class's centre."""
    slots = shape.K // (2 * shape.C)
    bank = MemoryBank(shape.C, shape.D, region_slots=slots, pixel_slots=slots, process_group=None).to(device)
    _, _, keys, _ = contrast_inputs(1, bank.key_labels.numel(), shape.D, torch.float32, shape.C, device)
    bank.keys.copy_(keys.view_as(bank.keys))
    bank.key_labels.copy_(torch.arange(shape.C, device=device)[:, None].expand_as(bank.key_labels))
    bank.region_fill.fill_(slots)
    bank.pixel_fill.fill_(slots)
    return bank


def looped_bank(bank: MemoryBank) -> loops.Bank:
    """The same rows in the loops' bank."""
    num_classes, both, dim = bank.keys.shape
    copy = loops.Bank(num_classes, dim, both // 2, device=bank.keys.device.type)
    copy.regions.copy_(bank.keys[:, : both // 2])
    copy.pixels.copy_(bank.keys[:, both // 2 :])
    for name in ("region_ptr", "region_fill", "pixel_ptr", "pixel_fill"):
        getattr(copy, name).copy_(getattr(bank, name))
    return copy


def looped_loss(
    bank: loops.Bank, embeddings: Tensor, labels: Tensor, predictions: Tensor, max_samples: int
) -> Tensor:
    """The contrast term by loops and the dense loss; it does not enqueue."""
    indices, anchor_labels = loops.sample(labels, predictions, max_samples=max_samples)
    anchors = loops.gather(embeddings, indices)
    keys, key_labels = bank.flat()
    return dense_infonce(anchors, anchor_labels, keys, key_labels, temperature=TEMPERATURE)


class Inputs:
    def __init__(self, shape: Maps, dtype: str, device: str):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.labels, self.predictions = scenes(shape.B, shape.H, shape.W, shape.C, device=device)
        self.embeddings = embedding_map(shape.B, shape.D, shape.H, shape.W, device=device).requires_grad_()

    def ours(self, backend: str) -> Method:
        criterion = PixelContrastLoss(
            self.shape.C,
            temperature=TEMPERATURE,
            max_samples=self.shape.A,
            bank=full_bank(self.shape, self.device),
            backend=backend,
        )

        def step() -> tuple[Tensor, Tensor]:
            loss = criterion(self.embeddings, self.labels, self.predictions)
            (gradient,) = torch.autograd.grad(loss, self.embeddings)
            return loss.detach(), gradient

        def verify() -> Errors:
            torch.manual_seed(SEED)
            return self.compare(step())

        return Method(both=step, verify=verify)

    def looped(self) -> Method:
        bank = looped_bank(full_bank(self.shape, self.device))

        def step() -> tuple[Tensor, Tensor]:
            loss = looped_loss(bank, self.embeddings, self.labels, self.predictions, self.shape.A)
            (gradient,) = torch.autograd.grad(loss, self.embeddings)
            bank.enqueue(self.embeddings.detach(), self.labels)
            return loss.detach(), gradient

        return Method(both=step, verify=lambda: self.compare_sample(step()))

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss in fp64, the pixels that SEED makes anchors [A'], and their gradients [A', D]."""
        torch.manual_seed(SEED)
        sample = hard_anchor_sampling(
            self.labels,
            self.predictions,
            num_classes=self.shape.C,
            max_samples=self.shape.A,
            backend="reference",
        )
        count = int(sample.count)
        indices, labels = sample.indices[:count], sample.labels[:count]
        pixels = self.embeddings.detach().permute(0, 2, 3, 1).flatten(0, 2)[indices].double()
        keys, key_labels = full_bank(self.shape, self.device).flat()
        keys, loss = keys.double(), torch.zeros((), dtype=torch.float64, device=self.device)
        gradient: list[Tensor] = []
        at_a_time = max(1, TRUTH_PAIRS // len(keys))
        for rows, own in zip(pixels.split(at_a_time), labels.split(at_a_time), strict=True):
            leaf = rows.clone().requires_grad_()
            anchors = F.normalize(leaf, dim=1)
            share = dense_infonce(anchors, own, keys, key_labels, temperature=TEMPERATURE, reduction="none")
            share = share.sum() / count
            gradient += torch.autograd.grad(share, leaf)
            loss += share.detach()
        return loss, indices, torch.cat(gradient)

    def compare(self, outcome: tuple[Tensor, Tensor]) -> Errors:
        """The anchors that SEED leads to, pixel by pixel."""
        loss, indices, gradient = self.truth
        everywhere = outcome[1].permute(0, 2, 3, 1).flatten(0, 2)
        limit = 1e-5 if self.dtype == "fp32" else 1e-3
        return {
            "loss": (relative_error(outcome[0], loss), limit),
            "gradient of the anchors": (relative_error(everywhere[indices], gradient), limit),
            "gradient elsewhere": (abs((everywhere.norm() / gradient.norm()).item() - 1), limit),
        }

    def compare_sample(self, outcome: tuple[Tensor, Tensor]) -> Errors:
        """The loops draw anchors of their own, so they agree as two samples of one quantity do."""
        loss, _, gradient = self.truth
        return {
            "loss": (relative_error(outcome[0], loss), 0.02),
            "norm of the gradient": (abs((outcome[1].norm() / gradient.norm()).item() - 1), 0.1),
        }


def case(shape: Maps, dtype: str, device: str, backends: list[str], name: str = "") -> Case:
    inputs = cache(lambda: Inputs(shape, dtype, device))
    matrices = BUFFERS * 4 * shape.A * shape.K

    def candidate(backend: str) -> Candidate:
        return Candidate(lambda: inputs().ours(backend), matrices if backend == "reference" else 0)

    candidates = {f"ours ({backend})": candidate(backend) for backend in backends}
    candidates["loops + dense"] = Candidate(lambda: inputs().looped(), matrices)
    return Case(
        "training_step",
        name or str(shape),
        shape,
        dtype,
        device,
        candidates,
        {"fwd+bwd": Work(flop=4.0 * shape.A * shape.K * shape.D)},
        COUNTED,
    )
