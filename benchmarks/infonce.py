"""The contrastive loss beside the dense PyTorch loss (what it replaces) and two bare products (its floor).

The keys are a bank's, so only the anchors have a gradient. A peak of memory is measured in a process of its
own: `python -m benchmarks.infonce METHOD DTYPE K` prints what fwd+bwd takes beyond its outputs, in bytes.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pixcontrast_ext import infonce

from .baselines.bare import BareProducts
from .baselines.dense import dense_infonce
from .harness import Method, Section, Settings, contrast_inputs, in_subprocess, peak_growth, relative_error

NUM_ANCHORS, DIM, TEMPERATURE = 1024, 256, 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_LIMIT = {"fp32": 1e-6, "bf16": 1e-3}
GRADIENT_LIMIT = {"fp32": 2e-6, "bf16": 4e-3}  # a gradient stored in bf16 is off by 2⁻⁹ of itself

Loss = Callable[..., Tensor]


def forward(loss: Loss, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return loss(*inputs, temperature=TEMPERATURE)

    return call


def forward_backward(loss: Loss, inputs: tuple[Tensor, ...]) -> Callable[[], list[Tensor]]:
    """Returns [loss, gradient of the anchors]."""
    anchors, *others = inputs
    anchors = anchors.detach().requires_grad_()

    def call() -> list[Tensor]:
        value = loss(anchors, *others, temperature=TEMPERATURE)
        (gradient,) = torch.autograd.grad(value, anchors)
        return [value.detach(), gradient]

    return call


def check(section: Section, inputs: tuple[Tensor, ...], dtype: str) -> None:
    """Loss and gradient of ours and of the dense baseline against the dense formula in fp64."""
    anchors, anchor_labels, keys, key_labels = inputs
    # Every n-th anchor, so that the fp64 matrices fit in memory whatever the number of keys.
    step = max(1, len(anchors) * len(keys) // 20_000_000)
    inputs = (anchors[::step].contiguous(), anchor_labels[::step].contiguous(), keys, key_labels)
    in_fp64 = (inputs[0].double(), inputs[1], keys.double(), key_labels)
    loss, gradient = forward_backward(dense_infonce, in_fp64)()
    implementations = {"ours": infonce}
    if (
        dtype == "fp32"
    ):  # in bf16 the dense loss rounds its logits: its error is the reader's to see, not a bug
        implementations["dense"] = dense_infonce
    for name, implementation in implementations.items():
        result = forward_backward(implementation, inputs)()
        section.check(f"{name} {dtype}: loss", relative_error(result[0], loss), LOSS_LIMIT[dtype])
        section.check(f"{name} {dtype}: gradient", relative_error(result[1], gradient), GRADIENT_LIMIT[dtype])


def extra_mib(method: str, dtype: str, num_keys: int) -> float:
    return int(in_subprocess("benchmarks.infonce", method, dtype, num_keys)) / 2**20


def run(settings: Settings) -> Section:
    num_keys = settings.num_keys
    product = 2 * NUM_ANCHORS * num_keys * DIM
    section = Section(f"infonce: A {NUM_ANCHORS}, K {num_keys}, D {DIM}", unit="GFLOP/s")
    section.facts.append(
        f"work: one product is 2·A·K·D = {product / 1e9:.1f} GFLOP; counted are one (fwd) or two (fwd+bwd), "
        "whatever a method really does"
    )
    section.facts.append("keys have no gradient; memory is the peak of fwd+bwd beyond loss and gradient")

    methods = []
    for dtype in DTYPES:
        inputs = contrast_inputs(NUM_ANCHORS, num_keys, DIM, DTYPES[dtype])
        check(section, inputs, dtype)
        bare = BareProducts(inputs[0], inputs[2])
        section.facts.append(f"bare {dtype}: the fastest tile is of {bare.tile} keys")
        for name, loss in {"ours": infonce, "dense": dense_infonce}.items():
            methods.append(Method(f"{name} {dtype} fwd", forward(loss, inputs), product))
            methods.append(Method(f"{name} {dtype} fwd+bwd", forward_backward(loss, inputs), 2 * product))
        methods.append(Method(f"bare {dtype} fwd", bare.forward, product))
        methods.append(Method(f"bare {dtype} fwd+bwd", bare.both, 2 * product))
    section.time(methods, settings.rounds)

    for dtype in DTYPES:
        for part in ("fwd", "fwd+bwd"):
            ours, title = f"ours {dtype} {part}", f"infonce {dtype} {part}"
            section.ratio(f"{title}: dense fp32 / ours", f"dense fp32 {part}", ours)
            section.ratio(f"{title}: ours / bare fp32", ours, f"bare fp32 {part}")
        for keys in (19000, 190000):
            section.ratios[f"infonce {dtype} extra MiB, K {keys}"] = extra_mib("ours", dtype, keys)
    # The dense loss at 190,000 keys would need some 8 GB: the smaller bank tells enough.
    section.ratios["dense fp32 extra MiB, K 19000"] = extra_mib("dense", "fp32", 19000)
    return section


def main() -> None:
    method, dtype, num_keys = sys.argv[1:]
    loss = {"ours": infonce, "dense": dense_infonce}[method]
    # A first call on few keys loads code and starts threads; neither is the op's memory.
    forward_backward(loss, contrast_inputs(NUM_ANCHORS, 1900, DIM, DTYPES[dtype]))()
    call = forward_backward(loss, contrast_inputs(NUM_ANCHORS, int(num_keys), DIM, DTYPES[dtype]))
    print(peak_growth(call))


if __name__ == "__main__":
    main()
