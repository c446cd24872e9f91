"""Filling the memory bank, beside loops over images and classes and beside one plain read of the map."""

from __future__ import annotations

from functools import cache, cached_property

import torch

from pixcontrast_ext import MemoryBank

from .baselines import loops
from .harness import ELEMENTS, Candidate, Case, Errors, Method, Work, differing, relative_error
from .inputs import draw_priority, embedding_map, scenes
from .shapes import MAPS, Maps

SHAPE = Maps
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
DTYPES = {"cpu": ("fp32", "bf16", "fp16"), "cuda": ("fp32", "bf16", "fp16")}
COUNTED = (
    "map, labels and priority read once; what is written is small. Ours draws its priority within the "
    "time, and normalises the embeddings, which the loops are given normalised"
)
SLOTS = 1000  # of each kind and class


def plan(device: str) -> dict[str, tuple[Maps, tuple[str, ...]]]:
    two = {"quick": ("fp32", "bf16"), "cityscapes": ("fp32", "bf16")}
    return {name: (shape, two.get(name, ("fp32",))) for name, shape in MAPS.items()}


class Inputs:
    def __init__(self, shape: Maps, dtype: str, device: str):
        self.shape, self.device = shape, device
        self.labels, _ = scenes(shape.B, shape.H, shape.W, shape.C, device=device)
        self.embeddings = embedding_map(shape.B, shape.D, shape.H, shape.W, ELEMENTS[dtype], device)
        self.priority = draw_priority(self.labels)

    def bank(self) -> MemoryBank:
        bank = MemoryBank(
            self.shape.C, self.shape.D, region_slots=SLOTS, pixel_slots=SLOTS, process_group=None
        )
        return bank.to(self.device)

    @cached_property
    def truth(self) -> MemoryBank:
        bank = self.bank()
        bank.enqueue(self.embeddings, self.labels, priority=self.priority, backend="reference")
        return bank


def ours(inputs: Inputs, backend: str) -> Method:
    bank = inputs.bank()

    def verify() -> Errors:
        bank.enqueue(inputs.embeddings, inputs.labels, priority=inputs.priority, backend=backend)
        truth = inputs.truth
        errors: Errors = {"keys": (relative_error(bank.keys, truth.keys), 1e-6)}
        for name in ("key_labels", "region_ptr", "region_fill", "pixel_ptr", "pixel_fill"):
            errors[f"{name} that differ"] = (differing(getattr(bank, name), getattr(truth, name)), 0)
        return errors

    return Method(lambda: bank.enqueue(inputs.embeddings, inputs.labels, backend=backend), verify=verify)


def looped(inputs: Inputs) -> Method:
    bank = loops.Bank(inputs.shape.C, inputs.shape.D, SLOTS, device=inputs.device)

    def verify() -> Errors:
        """The loops draw other pixels, but no chance is involved in the regions."""
        bank.enqueue(inputs.embeddings, inputs.labels)
        truth = inputs.truth
        limit = 1e-5 if inputs.embeddings.dtype == torch.float32 else 1e-2  # they sum in the map's dtype
        return {
            "regions": (relative_error(bank.regions, truth.keys[:, :SLOTS]), limit),
            "pixel_ptr that differ": (differing(bank.pixel_ptr, truth.pixel_ptr), 0),
        }

    return Method(lambda: bank.enqueue(inputs.embeddings, inputs.labels), verify=verify)


def case(shape: Maps, dtype: str, device: str, backends: list[str], name: str = "") -> Case:
    inputs = cache(lambda: Inputs(shape, dtype, device))

    def candidate(backend: str) -> Candidate:
        return Candidate(lambda: ours(inputs(), backend))

    candidates = {f"ours ({backend})": candidate(backend) for backend in backends}
    candidates["loops"] = Candidate(lambda: looped(inputs()))
    floor = "one read of the map"
    candidates[floor] = Candidate(lambda: Method(lambda: torch.sum(inputs().embeddings, (2, 3))))
    pixels = shape.B * shape.H * shape.W
    return Case(
        "enqueue",
        name or str(shape),
        shape,
        dtype,
        device,
        candidates,
        {"fwd": Work(bytes=pixels * (shape.D * ELEMENTS[dtype].itemsize + 8 + 4))},
        COUNTED,
        floor,
    )
