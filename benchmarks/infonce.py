"""The contrastive loss with the gradient of its anchors, beside whatever else computes it or something of its size.

The keys are a bank's, so only the anchors have a gradient; in-batch the anchors are the keys, and have it from both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from pixcontrast_ext import infonce

from .baselines import packages
from .baselines.attention import MaskedAttention, flash_attention, plain_attention
from .baselines.bare import BareProducts
from .baselines.chunked import chunked_infonce
from .baselines.dense import BUFFERS, COMPILED_BUFFERS, dense_infonce
from .harness import ELEMENTS, Candidate, Case, Errors, Method, Unavailable, Work, relative_error
from .inputs import contrast_inputs
from .shapes import ROWS, Rows, sweeps

SHAPE = Rows
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
DTYPES = {"cpu": ("fp32", "bf16", "fp16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}
COUNTED = "2·A·K·D operations of one product in fwd, and of two in fwd+bwd"
TEMPERATURE = 0.1
PAIRS = 20_000_000  # anchors x keys that are verified, of all keys: every n-th anchor where there are more
TRUTH_PAIRS = 10_000_000  # that are stored at a time, in fp64

# Of the loss and of the gradient, against fp64 on the same rounded rows. A gradient that is stored in bf16 is off by
# 2^-9 of itself, and logits that were rounded to bf16 by 2^-9 of 1 / temperature: the baselines' errors are theirs.
OURS = {"fp32": (1e-6, 2e-6), "tf32": (1e-4, 1e-3), "bf16": (1e-5, 4e-3), "fp16": (1e-5, 1e-3)}
PLAIN = {"fp32": (1e-5, 1e-4), "tf32": (1e-3, 1e-2), "bf16": (5e-2, 0.2), "fp16": (1e-2, 5e-2)}


def compiled_infonce() -> Callable[..., Tensor]:
    """For the shape at hand, as one gets who trains at one shape; what was compiled for others is forgotten."""
    torch._dynamo.reset()
    return torch.compile(dense_infonce, dynamic=False)


def plan(device: str) -> dict[str, tuple[Rows, tuple[str, ...]]]:
    of_paper, of_sweep = (
        (("fp32", "bf16"), ("fp32",)) if device == "cpu" else (("bf16", "tf32", "fp32"), ("bf16",))
    )
    return {name: (shape, of_paper) for name, shape in ROWS.items()} | {
        name: (shape, of_sweep) for name, shape in sweeps(device).items()
    }


class Inputs:
    """The rows of a shape, and the truth about a part of them in fp64."""

    def __init__(self, shape: Rows, dtype: torch.dtype, device: str):
        self.in_batch = shape.K == 0
        self.anchors, self.anchor_labels, self.keys, self.key_labels = contrast_inputs(
            shape.A, shape.K, shape.D, dtype, shape.C, device
        )
        if self.in_batch:
            self.keys, self.key_labels = self.anchors, self.anchor_labels
        # Every n-th anchor, so that the classes stay; of a batch the part is a batch of its own.
        self.step = step = -(-shape.A * max(shape.K, shape.A) // PAIRS)
        if self.in_batch:
            self.part = Rowset(self.anchors[::step], self.anchor_labels[::step], None, None)
        else:
            self.part = Rowset(self.anchors[::step], self.anchor_labels[::step], self.keys, self.key_labels)
        self.whole = Rowset(
            self.anchors,
            self.anchor_labels,
            None if self.in_batch else self.keys,
            None if self.in_batch else self.key_labels,
        )

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the part."""
        part = self.part.double()
        if self.in_batch:
            return part.train(dense_infonce)
        loss, gradient = torch.zeros((), dtype=torch.float64, device=self.anchors.device), []
        anchors_at_a_time = max(1, TRUTH_PAIRS // len(self.keys))
        for rows, labels in zip(
            part.leaf.detach().split(anchors_at_a_time), part.labels.split(anchors_at_a_time), strict=True
        ):
            few = Rowset(rows, labels, part.keys, part.key_labels)
            sums = few.train(lambda *rows, **options: dense_infonce(*rows, **options, reduction="none").sum())
            loss += sums[0]
            gradient.append(sums[1])
        return loss / part.count, torch.cat(gradient) / part.count


class Rowset:
    """Anchors and keys as a loss takes them; without keys, the anchors are the keys."""

    def __init__(self, anchors: Tensor, labels: Tensor, keys: Tensor | None, key_labels: Tensor | None):
        self.leaf = anchors.detach().clone().requires_grad_()
        self.labels, self.keys, self.key_labels = labels.contiguous(), keys, key_labels

    @property
    def count(self) -> int:
        """Anchors that have a positive."""
        assert self.key_labels is not None  # in-batch, nothing is divided by it
        return int(torch.isin(self.labels, self.key_labels).sum())

    def double(self) -> Rowset:
        return Rowset(
            self.leaf.double(),
            self.labels,
            None if self.keys is None else self.keys.double(),
            self.key_labels,
        )

    def loss(self, function: Callable[..., Tensor]) -> Tensor:
        if self.keys is None:
            return function(
                self.leaf, self.labels, self.leaf, self.labels, temperature=TEMPERATURE, exclude_self=True
            )
        return function(self.leaf, self.labels, self.keys, self.key_labels, temperature=TEMPERATURE)

    def train(self, function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        loss = self.loss(function)
        (gradient,) = torch.autograd.grad(loss, self.leaf)
        return loss.detach(), gradient


def loss_method(function: Callable[..., Tensor], inputs: Inputs, limits: tuple[float, float]) -> Method:
    def verify() -> Errors:
        with torch.no_grad():
            # Whatever is compiled is compiled for this call as well, before anything is timed.
            inputs.part.loss(function)
        loss, gradient = inputs.part.train(function)
        truth, true_gradient = inputs.truth
        errors = {
            "loss": (relative_error(loss, truth), limits[0]),
            "gradient": (relative_error(gradient, true_gradient), limits[1]),
        }
        if inputs.step > 1 and not inputs.in_batch:
            # All anchors at once are worked on in other pieces than a part of them.
            _, gradient = inputs.whole.train(function)
            rows = gradient[:: inputs.step].double() * inputs.whole.count / inputs.part.count
            errors["gradient of all"] = (relative_error(rows, true_gradient), limits[1])
        return errors

    return Method(partial(inputs.whole.loss, function), [inputs.whole.leaf], verify=verify)


def bare_method(inputs: Inputs) -> Method:
    bare = BareProducts(inputs.anchors, inputs.keys)
    return Method(bare.forward, both=bare.both)


def attention_method(attention: Callable[..., Tensor], inputs: Inputs, masked: bool, limit: float) -> Method:
    def verify() -> Errors:
        rows = slice(None, None, -(-len(inputs.anchors) * len(inputs.keys) // PAIRS))
        found = attention()[rows]
        mask = inputs.anchor_labels[rows, None] != inputs.key_labels if masked else None
        truth = plain_attention(
            inputs.anchors[rows].double(), inputs.keys.double(), mask, temperature=TEMPERATURE
        )
        return {"output": (relative_error(found, truth), limit)}

    return Method(both=torch.no_grad()(attention), verify=verify)


def cross_entropy_method(
    function: Callable[..., Tensor], inputs: Inputs, limits: tuple[float, float]
) -> Method:
    """One positive a row: anchor i and key i."""
    targets = torch.arange(len(inputs.anchors), device=inputs.anchors.device) % len(inputs.keys)
    leaf = inputs.anchors.detach().clone().requires_grad_()
    keys = inputs.keys.detach()

    def verify() -> Errors:
        truth, true_gradient = torch.zeros((), dtype=torch.float64, device=leaf.device), list[Tensor]()
        at_a_time = max(1, TRUTH_PAIRS // len(keys))
        for rows, own in zip(leaf.detach().split(at_a_time), targets.split(at_a_time), strict=True):
            exact = rows.double().requires_grad_()
            mean = packages.cross_entropy(exact, keys.double(), own, temperature=TEMPERATURE)
            share = mean * (len(rows) / len(leaf))
            true_gradient += torch.autograd.grad(share, exact)
            truth += share.detach()
        loss = function(leaf, keys, targets, temperature=TEMPERATURE)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return {
            "loss": (relative_error(loss, truth), limits[0]),
            "gradient": (relative_error(gradient, torch.cat(true_gradient)), limits[1]),
        }

    return Method(partial(function, leaf, keys, targets, temperature=TEMPERATURE), [leaf], verify=verify)


def importing(package: str, build: Callable[[], Method]) -> Callable[[], Method]:
    def checked() -> Method:
        try:
            return build()
        except ImportError as error:
            raise Unavailable(f"{package} is not installed ({error})") from None

    return checked


def case(shape: Rows, dtype: str, device: str, backends: list[str], name: str = "") -> Case:
    @cache
    def inputs(element: str = dtype) -> Inputs:
        return Inputs(shape, ELEMENTS[element], device)

    def loss(
        function: Callable[..., Tensor], limits: dict[str, tuple[float, float]], element: str = dtype
    ) -> Callable[[], Method]:
        return lambda: loss_method(function, inputs(element), limits[element])

    in_batch = shape.K == 0
    num_keys = shape.K or shape.A
    matrix = 4 * shape.A * num_keys
    candidates = {
        f"ours ({backend})": Candidate(
            loss(partial(infonce, backend=backend), OURS), BUFFERS * matrix if backend == "reference" else 0
        )
        for backend in backends
    }
    candidates["dense"] = Candidate(loss(dense_infonce, PLAIN), BUFFERS * matrix)
    candidates["dense, torch.compile"] = Candidate(
        lambda: loss_method(compiled_infonce(), inputs(), PLAIN[dtype]), COMPILED_BUFFERS * matrix
    )
    if not in_batch:
        candidates["chunked loop"] = Candidate(loss(chunked_infonce, PLAIN))
        if shape.K % shape.C == 0 and dtype != "bf16":
            candidates["pytorch-metric-learning"] = Candidate(
                importing("pytorch-metric-learning", loss(packages.metric_learning_infonce, PLAIN)),
                packages.metric_learning_bytes(shape.A, shape.K, shape.C),
            )
    flash = "flash attention, values = keys"
    candidates[flash] = Candidate(
        lambda: attention_method(
            partial(flash_attention, inputs().anchors, inputs().keys, temperature=TEMPERATURE),
            inputs(),
            False,
            PLAIN[dtype][1],
        ),
        note="no labels, no loss: its forward does both products and the softmax",
    )
    if device == "cuda":
        candidates |= on_cuda(shape, dtype, inputs)
    floor = "two bare products"
    candidates[floor] = Candidate(lambda: bare_method(inputs()), note="fwd is one of them")
    if device == "cpu" and dtype == "bf16":  # what one would otherwise use there
        candidates["dense, fp32"] = Candidate(loss(dense_infonce, PLAIN, "fp32"), BUFFERS * matrix)
        candidates["two bare products, fp32"] = Candidate(lambda: bare_method(inputs("fp32")))

    product = 2.0 * shape.A * num_keys * shape.D
    return Case(
        "infonce",
        name or str(shape),
        shape,
        dtype,
        device,
        candidates,
        {"fwd": Work(flop=product), "fwd+bwd": Work(flop=2 * product)},
        COUNTED,
        floor,
    )


def on_cuda(shape: Rows, dtype: str, inputs: Callable[[], Inputs]) -> dict[str, Candidate]:
    """The methods that run on a GPU only: FlexAttention over the negatives, and losses of one positive a row."""
    matrix = 4 * shape.A * (shape.K or shape.A)

    def masked() -> Method:
        rows = inputs()
        attention = MaskedAttention(rows.anchors, rows.anchor_labels, rows.keys, rows.key_labels)
        return attention_method(partial(attention, temperature=TEMPERATURE), rows, True, PLAIN[dtype][1])

    # Inf-CL cannot multiply more precisely.
    limits = PLAIN["tf32" if ELEMENTS[dtype] == torch.float32 else dtype]

    def one_positive(package: str, function: Callable[..., Tensor]) -> Candidate:
        return Candidate(
            importing(package, lambda: cross_entropy_method(function, inputs(), limits)),
            4 * matrix if package == "liger-kernel" else 0,
            "another loss of the same shape: one positive a row",
        )

    candidates = {
        "FlexAttention, values = keys": Candidate(masked, matrix, "the pass over the negatives alone"),
        "Inf-CL": one_positive("inf-cl", packages.inf_cl_cross_entropy),
        "Liger cross-entropy": one_positive("liger-kernel", packages.liger_cross_entropy),
    }
    if shape.K in (0, shape.A):
        candidates["memeff LiT"] = one_positive("memeff", packages.memeff_cross_entropy)
    return candidates
