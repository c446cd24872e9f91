"""Choosing the anchors, and reading them out of the map, beside loops over images and classes."""

from __future__ import annotations

from functools import cache, cached_property

from torch import Tensor

from pixcontrast_ext import AnchorSample, gather_embeddings, hard_anchor_sampling

from .baselines import loops
from .harness import Candidate, Case, Errors, Method, Work, differing
from .inputs import draw_priority, embedding_map, scenes
from .shapes import MAPS, Maps

SHAPE = Maps
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
DTYPES = {"cpu": ("fp32",), "cuda": ("fp32",)}
COUNTED = "labels, predictions and priority read once, which ours draws within the time; forward only"


def plan(device: str) -> dict[str, tuple[Maps, tuple[str, ...]]]:
    return {name: (shape, ("fp32",)) for name, shape in MAPS.items()}


class Inputs:
    def __init__(self, shape: Maps, device: str):
        self.shape = shape
        self.labels, self.predictions = scenes(shape.B, shape.H, shape.W, shape.C, device=device)
        self.embeddings = embedding_map(shape.B, shape.D, shape.H, shape.W, device=device)
        self.priority = draw_priority(self.labels)

    def sample(self, backend: str, priority: Tensor | None = None) -> AnchorSample:
        return hard_anchor_sampling(
            self.labels,
            self.predictions,
            num_classes=self.shape.C,
            max_samples=self.shape.A,
            priority=priority,
            backend=backend,
        )

    @cached_property
    def truth(self) -> AnchorSample:
        return self.sample("reference", self.priority)

    def pools(self, indices: Tensor) -> Tensor:
        """How many anchors come from each pool: (image, class, hard or easy)."""
        labels, predictions = self.labels.flatten()[indices], self.predictions.flatten()[indices]
        images = indices // self.labels[0].numel()
        pool = (images * self.shape.C + labels) * 2 + (labels == predictions)
        return pool.bincount(minlength=2 * self.shape.B * self.shape.C)


def ours(inputs: Inputs, backend: str, gather: bool) -> Method:
    def verify() -> Errors:
        found, truth = inputs.sample(backend, inputs.priority), inputs.truth
        return {
            f"{name}, rows that differ": (differing(getattr(found, name), getattr(truth, name)), 0)
            for name in ("indices", "labels", "count")
        }

    def call() -> object:
        sample = inputs.sample(backend)  # draws its priority
        return gather_embeddings(inputs.embeddings, sample.indices, backend=backend) if gather else sample

    return Method(call, verify=verify)


def looped(inputs: Inputs, gather: bool) -> Method:
    def sample() -> Tensor:
        return loops.sample(inputs.labels, inputs.predictions, max_samples=inputs.shape.A)[0]

    def verify() -> Errors:
        """The loops choose other pixels, but as many hard and easy ones of each image and class."""
        truth = inputs.truth.indices[: int(inputs.truth.count)]
        return {
            "anchors, pools that differ": (differing(inputs.pools(sample()), inputs.pools(truth)), 0),
        }

    def call() -> object:
        return loops.gather(inputs.embeddings, sample()) if gather else sample()

    return Method(call, verify=verify)


def case(shape: Maps, dtype: str, device: str, backends: list[str], name: str = "") -> Case:
    inputs = cache(lambda: Inputs(shape, device))

    def candidate(backend: str, gather: bool) -> Candidate:
        return Candidate(lambda: ours(inputs(), backend, gather))

    candidates: dict[str, Candidate] = {}
    for backend in backends:
        candidates[f"ours ({backend})"] = candidate(backend, False)
        candidates[f"ours ({backend}) + gather"] = candidate(backend, True)
    candidates["loops"] = Candidate(lambda: looped(inputs(), False))
    candidates["loops + gather"] = Candidate(lambda: looped(inputs(), True))
    candidates["one read of labels and predictions"] = Candidate(lambda: one_read(inputs()))
    pixels = shape.B * shape.H * shape.W
    return Case(
        "sampling",
        name or str(shape),
        shape,
        dtype,
        device,
        candidates,
        {"fwd": Work(bytes=(8 + 8 + 4) * pixels)},
        COUNTED,
        "one read of labels and predictions",
    )


def one_read(inputs: Inputs) -> Method:
    return Method(lambda: (inputs.labels.sum(), inputs.predictions.sum()))
