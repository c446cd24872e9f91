"""The ops on a GPU, each beside its floor measured in the same run: `python -m benchmarks.device [--json FILE]`.

InfoNCE forward with the anchors' gradient beside two bare products through torch (A x D by D x K, A x K by K x D, of
the same dtype), and beside the dense loss where that fits; sampling, enqueue and gather beside one read of the map.
Times are medians of interleaved rounds between CUDA events, with the L2 cache overwritten before each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pixcontrast_ext import MemoryBank, gather_embeddings, hard_anchor_sampling
from pixcontrast_ext.backends import available_backends

from .baselines.dense import dense_infonce
from .harness import Incorrect, contrast_inputs, relative_error, scenes

TEMPERATURE = 0.1
SHAPES = [(a, k, 256) for a in (1024, 16384) for k in (95_000, 190_000)] + [
    (100, 190_000, 256),
    (4096, 95_000, 256),
]
SLICE_BYTES, WHOLE_BYTES = (
    16 * 2**20,
    8 * 2**30,
)  # of scores between the two products: in the L2 cache, or not
DENSE_BYTES = 24 * 2**30  # of A x K floats that autograd keeps: more than this is not tried

Row = dict[str, object]


def median_us(methods: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each, in microseconds."""
    flush = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in methods}
    for call in methods.values():
        call()
    for _ in range(rounds):
        for name, call in methods.items():
            flush.zero_()
            torch.cuda._sleep(2_000_000)  # a millisecond, in which the host enqueues the whole call
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {
        name: 1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()
    }


def extra_mib(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def two_products(anchors: Tensor, keys: Tensor, most_bytes: int) -> Callable[[], object]:
    """The floor, in slices of keys whose scores take up to `most_bytes`."""
    parts = keys.split(max(1, most_bytes // (len(anchors) * anchors.element_size())))
    output = torch.zeros_like(anchors)

    def call() -> object:
        for part in parts:
            output.addmm_(torch.mm(anchors, part.T), part)
        return output

    return call


def check(backend: str, dtype: torch.dtype, limit: float) -> None:
    """Loss and gradient against the dense formula in fp64, before anything is timed."""
    anchors, anchor_labels, keys, key_labels = (x.cuda() for x in contrast_inputs(512, 19_000, 256, dtype))
    loss, _, _, _, grad = torch.ops.pixcontrast.infonce_forward(
        anchors, anchor_labels, keys, key_labels, TEMPERATURE, False, True, backend
    )
    leaf = anchors.double().requires_grad_()
    truth = dense_infonce(leaf, anchor_labels, keys.double(), key_labels, temperature=TEMPERATURE)
    (expected,) = torch.autograd.grad(truth, leaf)
    for name, found, exact in (
        ("loss", loss.mean(), truth.detach()),
        ("gradient", grad / len(anchors), expected),
    ):
        if not relative_error(found, exact) <= limit:
            raise Incorrect(
                f"{backend} {dtype}: {name} is off by {relative_error(found, exact):.3g}, over {limit:g}"
            )


def check_maps(
    backend: str, embeddings: Tensor, labels: Tensor, predictions: Tensor, priority: Tensor
) -> None:
    """Sampling, gather with its gradient, and enqueue against the reference, on two of the images."""
    embeddings, labels, predictions, priority = (x[:2] for x in (embeddings, labels, predictions, priority))
    outcomes = []
    for name in ("reference", backend):
        sample = hard_anchor_sampling(labels, predictions, num_classes=19, priority=priority, backend=name)
        leaf = embeddings.detach().requires_grad_()
        rows = gather_embeddings(leaf, sample.indices, backend=name)
        (grad,) = torch.autograd.grad(rows.sin().sum(), leaf)
        bank = MemoryBank(19, embeddings.shape[1], process_group=None).cuda()
        bank.enqueue(embeddings, labels, priority=priority, backend=name)
        outcomes.append((sample.indices, sample.labels, rows, grad, bank.keys, bank.key_labels))
    for found, expected in zip(outcomes[1], outcomes[0], strict=True):
        if not torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-5):
            raise Incorrect(f"{backend}: sampling, gather or enqueue differs from the reference")


def infonce_rows(backends: list[str], rounds: int) -> list[Row]:
    rows: list[Row] = []
    for dtype, precision in (
        (torch.bfloat16, "highest"),
        (torch.float32, "high"),
        (torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        name = "bf16" if dtype == torch.bfloat16 else {"high": "tf32", "highest": "fp32"}[precision]
        for backend in backends:
            check(backend, dtype, 4e-6 if name == "fp32" else 1e-3)
        for a, k, d in SHAPES:
            inputs = tuple(x.cuda() for x in contrast_inputs(a, k, d, dtype))
            anchors, anchor_labels, keys, key_labels = inputs

            def ours(backend: str, inputs: tuple[Tensor, ...] = inputs) -> Callable[[], object]:
                return lambda: torch.ops.pixcontrast.infonce_forward(
                    *inputs, TEMPERATURE, False, True, backend
                )

            methods = {backend: ours(backend) for backend in backends}
            # Whichever is faster: through a matrix in the cache, or in the largest pieces.
            methods["two products, sliced"] = two_products(anchors, keys, SLICE_BYTES)
            methods["two products, whole"] = two_products(anchors, keys, WHOLE_BYTES)
            if 8 * 4 * a * k < DENSE_BYTES:
                leaf = anchors.float().requires_grad_()

                def dense(leaf: Tensor = leaf, inputs: tuple[Tensor, ...] = inputs) -> object:
                    loss = dense_infonce(
                        leaf, inputs[1], inputs[2].float(), inputs[3], temperature=TEMPERATURE
                    )
                    return torch.autograd.grad(loss, leaf)

                methods["dense"] = dense
            times = median_us(methods, rounds)
            work = 4.0 * a * k * d
            floor = min(time for method, time in times.items() if method.startswith("two products"))
            for method, time in times.items():
                rows.append(
                    {
                        "op": "infonce fwd+grad",
                        "dtype": name,
                        "shape": f"A {a} K {k} D {d}",
                        "method": method,
                        "us": time,
                        "TFLOP/s": work / time * 1e-6,
                        "share of floor": floor / time,
                        "share of 800 TFLOP/s": work / time * 1e-6 / 800,
                        "extra MiB": extra_mib(methods[method]),
                    }
                )
    torch.set_float32_matmul_precision("highest")
    return rows


def map_rows(backends: list[str], rounds: int) -> list[Row]:
    batch, channels, height, width, classes = 8, 256, 128, 256, 19
    rows: list[Row] = []
    labels, predictions = (x.cuda() for x in scenes(batch, height, width))
    priority = torch.randint(2**31 - 1, labels.shape, dtype=torch.int32, device="cuda")
    for layout in (torch.contiguous_format, torch.channels_last):
        embeddings = torch.randn(batch, channels, height, width, device="cuda").to(memory_format=layout)
        sink = torch.empty_like(embeddings)
        methods: dict[str, Callable[[], object]] = {
            "one read of the map": lambda x=embeddings: x.sum(),  # type: ignore[misc]
            "one write of the map": lambda x=sink: x.zero_(),  # type: ignore[misc]
        }
        for backend in backends:
            bank = MemoryBank(classes, channels, process_group=None).cuda()

            def sample(backend: str = backend) -> Tensor:
                return hard_anchor_sampling(
                    labels, predictions, num_classes=classes, priority=priority, backend=backend
                ).indices

            indices = sample()
            check_maps(backend, embeddings, labels, predictions, priority)
            leaf = embeddings.detach().requires_grad_()
            gathered = gather_embeddings(leaf, indices, backend=backend)
            cotangent = torch.randn_like(gathered)
            methods[f"sampling, {backend}"] = sample
            methods[f"gather, {backend}"] = lambda x=embeddings, i=indices, b=backend: gather_embeddings(  # type: ignore[misc]
                x, i, backend=b
            )
            methods[f"gather backward, {backend}"] = lambda o=gathered, x=leaf, g=cotangent: (
                torch.autograd.grad(  # type: ignore[misc]
                    o, x, g, retain_graph=True
                )
            )
            methods[f"enqueue, {backend}"] = lambda m=bank, x=embeddings, b=backend: m.enqueue(  # type: ignore[misc]
                x, labels, priority=priority, backend=b
            )
        times = median_us(methods, rounds)
        for method, time in times.items():
            rows.append(
                {
                    "op": method,
                    "dtype": "fp32",
                    "shape": f"{batch}x{channels}x{height}x{width} {str(layout).removeprefix('torch.')}",
                    "us": time,
                    "reads of the map": time / times["one read of the map"],
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device")
        return 2
    backends = [name for name in ("cuda", "triton") if available_backends()[name] is None]
    rows = map_rows(backends, arguments.rounds) + infonce_rows(backends, arguments.rounds)
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()
            )
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows},
                file,
                indent=1,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
