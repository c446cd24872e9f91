"""Compiles the Triton kernels for devices that this machine does not have, and examines the machine code.

It reports registers, spills, shared memory, the loops with products, and how long compiling took.

    python -m tools.triton_code            compile every shipped configuration and print the table
    python -m tools.triton_code --update   write it to expected/triton-<version>.txt

Launchers decide what is compiled. So they run as usual, but each launch goes to the compiler: every configuration that
ships is compiled, and no other.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.backends import triton as backend
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
from pixcontrast_ext.backends.triton.infonce.operands import Sides
from tools import compiled_code, machine_model
from tools.emulated import Emulated

ARCHS = (80, 90)
WIDTHS = (64, 128, 256, 512)  # every width of rows that InfoNCE is compiled for
MULTIPROCESSORS = {80: 108, 90: 132}
FLOPS = {80: 2048, 90: 4096}  # 16-bit, per cycle of a multiprocessor
MAP_WIDTHS = (64, 256)  # widths for the ops on maps
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int16: "i16",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Job:
    """One kernel as Triton would compile it at a launch."""

    module: str
    kernel: str
    arch: int
    signature: tuple[tuple[str, Any], ...]  # a type, or a record of types
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[tuple[int, ...], ...]  # positions of arguments that are multiples of 16
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        blocks = [f"{key}={value}" for key, value in self.constants if key.isupper()]
        odd = ["odd"] if self.odd else []
        return " ".join([self.kernel, self.types, *odd, *blocks, f"w{self.num_warps} s{self.num_stages}"])

    @property
    def types(self) -> str:
        """The type of the first tensor."""
        kinds = (kind[0] if isinstance(kind, tuple) else kind for _, kind in self.signature)
        first: str = next(kind for kind in kinds if "*" in kind)
        return first

    @property
    def odd(self) -> bool:
        """Whether the start or the row stride of InfoNCE's keys is not a multiple of 16 bytes."""
        walk = dict(self.constants).get("WALK")
        keys = (0, Sides._fields.index("keys"))
        return walk is not None and (walk.channels.value % 8 != 0 or keys not in self.divisible)


@dataclass(frozen=True)
class Loop:
    """A loop with products of tiles in the machine code."""

    instructions: int
    products: int  # HGMMA or HMMA
    begun: int  # groups of HGMMA: WARPGROUP.ARRIVE
    copies: int  # LDGSTS of 16 bytes per thread
    narrow: int  # LDGSTS of fewer bytes
    local: int  # loads from local memory
    ahead: bool  # a copy is issued while products are in flight
    overwritten: bool  # a register that a product in flight reads is written


@dataclass(frozen=True)
class Code:
    registers: int
    stack: int
    shared: int
    buffers: int  # fewest buffers of a tile of columns in shared memory; 0: no asynchronous copies
    replicated: bool  # several warps compute the same product
    fused: int  # products of two fp32 numbers that are added to a third before they are rounded
    loops: tuple[Loop, ...]
    seconds: float  # to compile it, including what Triton then caches for all kernels


def _written(instruction: str) -> set[int]:
    """Registers that a machine instruction writes, roughly: its first operand, as wide as its name says."""
    found = re.match(r"(?:@!?U?P\d+ )?([A-Z0-9_.]+) (?:P\d+, )?R(\d+)\b", instruction)
    if found is None or found[1].startswith(("ST", "RED", "LDGSTS", "BRA", "BAR", "DEPBAR")):
        return set()
    name, first = found[1], int(found[2])
    width = (
        4
        if ".128" in name or ".x4" in name or ".M88.4" in name
        else 2
        if ".64" in name or "WIDE" in name
        else 1
    )
    return set(range(first, first + width))


def _overwritten(body: list[str]) -> bool:
    """Whether a register that an HGMMA reads is written before the wait for it. The loop body is read twice."""
    reads: set[int] = set()
    for instruction in body + body:
        found = re.search(r"HGMMA\S* R\d+, R(\d+), gdesc", instruction)
        if "WARPGROUP.DEPBAR" in instruction:
            reads.clear()
        elif found:
            reads |= set(range(int(found[1]), int(found[1]) + 4))
        elif "HGMMA" not in instruction and _written(instruction) & reads:
            return True
    return False


def _ahead(body: list[str]) -> bool:
    """Whether a copy is between the last product of a loop and the wait for it, perhaps in the next iteration."""
    last = max(i for i, instruction in enumerate(body) if re.search(r"\bHG?MMA\b", instruction))
    for instruction in body[last:] + body:
        if "LDGSTS" in instruction and ".128" in instruction:
            return True
        if "WARPGROUP.DEPBAR" in instruction:
            return False
    return False


def _count(text: str, body: list[str]) -> int:
    return sum(text in instruction for instruction in body)


def loops_of(sass: str) -> tuple[Loop, ...]:
    """The innermost loops with products."""
    places: dict[int, int] = {}
    program: list[str] = []
    for address, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", sass):
        places[int(address, 16)] = len(program)
        program.append(instruction)
    spans = []
    for end, instruction in enumerate(program):
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)$", instruction)
        if target and places.get(int(target[1], 16), end + 1) < end:
            spans.append((places[int(target[1], 16)], end + 1))
    loops = []
    for start, end in spans:
        body = program[start:end]
        inner = any(start <= a and b <= end and (a, b) != (start, end) for a, b in spans)
        products = sum(re.search(r"\bHG?MMA\b", instruction) is not None for instruction in body)
        if inner or products == 0:
            continue
        wide = sum("LDGSTS" in x and ".128" in x for x in body)
        loops.append(
            Loop(
                len(body),
                products,
                _count("WARPGROUP.ARRIVE", body),
                wide,
                _count("LDGSTS", body) - wide,
                _count("LDL", body),
                _ahead(body),
                _overwritten(body),
            )
        )
    return tuple(loops)


def replicated(ttgir: str) -> bool:
    """Whether the warps of a product cover more than its tile, so that some repeat the others' work."""
    layouts = {
        name: (int(rows), int(columns))
        for name, rows, columns in re.findall(
            r"(#\w+) = #ttg.nvidia_mma<.*?warpsPerCTA = \[(\d+), (\d+)\]", ttgir
        )
    }
    products = re.findall(r"(?:tt\.dot|warp_group_dot) .*?-> tensor<(\d+)x(\d+)xf32, (#\w+)>", ttgir)
    return any(
        16 * layouts[name][0] > int(rows) or 8 * layouts[name][1] > int(columns)
        for rows, columns, name in products
        if name in layouts
    )


def job_of(arch: int, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Job:
    """The job of a launch, specialised as Triton does: on dtypes, integers equal to 1, and multiples of 16."""
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in options.items() if k in names}
    assert set(values) == set(names), f"{kernel.__name__}: {set(names) ^ set(values)}"
    signature, constants, divisible = {}, {}, []

    def type_of(value: Any, path: tuple[int, ...], specialized: bool) -> Any:
        if isinstance(value, tuple):  # a record
            return type(value)(*(type_of(v, (*path, i), specialized) for i, v in enumerate(value)))
        if isinstance(value, torch.Tensor):
            if value.data_ptr() % 16 == 0:
                divisible.append(path)
            return "*" + _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and specialized:
            divisible.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or (type(value) is int and value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = type_of(value, (place,), specialized)
    return Job(
        kernel.fn.__module__,
        kernel.fn.__name__,
        arch,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        options.get("num_warps", 4),
        options.get("num_stages", 3),
    )


@contextlib.contextmanager
def recording(arch: int) -> Iterator[dict[Job, None]]:
    """Within it, launches are recorded instead of made, and devices are of `arch`."""
    jobs: dict[Job, None] = {}

    class Described(Emulated):
        def capability(self, device: torch.device) -> tuple[int, int]:
            return divmod(arch, 10)

        def multiprocessors(self, device: torch.device) -> int:
            return MULTIPROCESSORS[arch]

        def launch(self, device: torch.device, start: Any, arguments: Any) -> None:
            kernel, _, options = start.args
            jobs[job_of(arch, kernel, arguments, options)] = None

    with mock.patch.object(devices, "gpu", Described()):
        yield jobs


def launch_infonce(
    dtype: torch.dtype,
    channels: int,
    a: int = 1024,
    k: int = 95_008,
    m: int = 20_480,
    begin: int = 0,
    whole: bool = True,
    mined: bool = True,
) -> None:
    """Launches the passes over rows that begin `begin` elements after an aligned address, and those of mining.

    The forward is launched with and without a gradient, or only with it: that is the longer code of the two.
    """
    anchors, keys, drawn = (
        torch.empty(n * channels + begin, dtype=dtype)[begin:].view(n, channels) for n in (a, k, m)
    )
    anchor_labels, key_labels, drawn_labels = (torch.zeros(n, dtype=torch.int32) for n in (a, k, m))
    loss, neg_lse, weight = torch.ones(3, a)
    count, grad = torch.empty(a, dtype=torch.int32), torch.empty(a, channels)
    rows = anchors, anchor_labels, keys, key_labels
    negatives = drawn, drawn_labels
    counts = torch.empty(2, a, SCORE_BINS, dtype=torch.int32)
    if mined:
        backend.score_counts(ScoreCounts(*rows, *negatives, False, *counts))
    for with_grad in (False, True) if whole else (True,):
        outputs = loss, neg_lse, weight, count, grad
        settings = 0.1, with_grad, with_grad
        backend.infonce_forward(InfonceForward(*rows, *settings, *outputs))
        if mined:
            backend.mined_forward(MinedForward(*rows, *settings, *outputs, *negatives, loss, loss))
    of_keys = InfonceBackward(*rows, neg_lse, weight, loss, 0.1, False, torch.empty(k, channels))
    kept_of_keys = MinedBackward(
        *rows, neg_lse, weight, loss, 0.1, False, torch.empty(k, channels), loss, loss
    )
    in_batch: Any = dict(keys=None, key_labels=None, exclude_self=True, grad=grad)
    for each in (of_keys, dataclasses.replace(of_keys, **in_batch)):
        backend.infonce_backward(each)
    for kept in (kept_of_keys, dataclasses.replace(kept_of_keys, **in_batch)) if mined else ():
        backend.mined_backward(kept)


def launch_maps(
    dtype: torch.dtype,
    layout: torch.memory_format,
    channels: int,
    batch: int = 2,
    height: int = 128,
    width: int = 256,
    classes: int = 19,
    samples: int = 1024,
    per_image: int = 10,
    slots: int = 40,
) -> None:
    embeddings = torch.empty(batch, channels, height, width, dtype=dtype).to(memory_format=layout)
    labels = torch.zeros(batch, height, width, dtype=torch.int64)
    priority = torch.zeros(batch, height, width, dtype=torch.int32)
    indices, anchor_labels = torch.zeros(samples, dtype=torch.int64), torch.zeros(samples, dtype=torch.int32)
    outputs = indices, anchor_labels, anchor_labels[0]
    backend.hard_anchor_sampling(
        Sampling(labels, labels, priority, classes, samples, 100, 101, 255, 2**23, *outputs)
    )
    rows, inv_norm = torch.empty(samples, channels, dtype=dtype), torch.empty(samples)
    candidates = torch.empty(batch, classes, 1 + per_image, channels, dtype=dtype)
    candidate_labels = torch.empty(batch, classes, 1 + per_image, dtype=torch.int32)
    for normalize in (True, False):
        backend.gather(Gather(embeddings, indices, normalize, dtype, rows, inv_norm))
        grad = torch.empty_like(embeddings)
        backend.gather_backward(GatherBackward(rows, embeddings, indices, inv_norm, normalize, grad))
        pools = labels, priority, classes, per_image, 255
        backend.enqueue_collect(Collect(embeddings, *pools, normalize, dtype, candidates, candidate_labels))
    keys = torch.empty(classes, 2 * slots, channels, dtype=dtype)
    key_labels = torch.empty(classes, 2 * slots, dtype=torch.int32)
    region_ptr, region_fill, pixel_ptr, pixel_fill = (
        torch.zeros(classes, dtype=torch.int64) for _ in range(4)
    )
    collected = candidates, candidate_labels, keys, key_labels
    backend.enqueue_write(Write(*collected, region_ptr, region_fill, pixel_ptr, pixel_fill, slots))


def smallest_jobs(arch: int, whole: bool) -> list[Job]:
    """Everything at the smallest sizes, or all but mining and planes: Triton makes constants of what is 1."""
    with recording(arch) as jobs:
        launch_infonce(torch.float32 if whole else torch.bfloat16, 1, a=1, k=1, m=1, whole=whole, mined=whole)
        launch_maps(
            torch.float32, torch.contiguous_format, 1, 1, 1, 1, classes=1, samples=1, per_image=1, slots=1
        )
        launch_maps(
            torch.float32, torch.contiguous_format, 2, 1, 1, 1, classes=1, samples=1, per_image=0, slots=1
        )
    return list(jobs)


def all_jobs(arch: int, widths: tuple[int, ...]) -> list[Job]:
    """Every configuration that ships for a device, for rows of these widths.

    Of one width they are bf16, mined and not, fp32 in two planes, all with a gradient, and maps of either layout in
    one dtype.
    """
    whole = len(widths) > 1
    # fp16 has the tiles of bf16 and fewer products.
    halves = (torch.bfloat16, torch.float16) if whole else (torch.bfloat16,)
    precisions = ("ieee", "tf32") if whole else ("ieee",)
    with recording(arch) as jobs:
        if whole:
            launch_infonce(torch.bfloat16, 65)
            launch_infonce(torch.bfloat16, 256, begin=1)
        for channels in widths:
            for dtype in halves:
                launch_infonce(dtype, channels, whole=whole)
            for precision in precisions:
                before = torch.backends.cuda.matmul.fp32_precision
                torch.backends.cuda.matmul.fp32_precision = precision
                try:
                    launch_infonce(torch.float32, channels, whole=whole, mined=whole)
                finally:
                    torch.backends.cuda.matmul.fp32_precision = before
            for layout in (torch.contiguous_format, torch.channels_last) if channels in MAP_WIDTHS else ():
                for dtype in (torch.float32, torch.bfloat16):
                    if whole or (dtype == torch.bfloat16) == (layout == torch.channels_last):
                        launch_maps(dtype, layout, channels)
    return list(jobs)


def compile_job(job: Job) -> Code:
    kernel = getattr(sys.modules[job.module], job.kernel)
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature=dict(job.signature),
        constexprs={(names.index(name),): value for name, value in job.constants},
        attrs={place: [["tt.divisibility", 16]] for place in job.divisible},
    )
    options = dict(num_warps=job.num_warps, num_stages=job.num_stages, enable_fp_fusion=True)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    seconds = time.perf_counter() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (used,) = compiled_code.resources(Path(file.name)).values()
        sass = compiled_code.disassembly(Path(file.name), f"sm_{job.arch}{'a' if job.arch == 90 else ''}")
    (resources,) = used.values()
    buffers = [
        int(count)
        for count, rows, chunk in re.findall(
            r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x(\d+)x(\d+)xb?f16", compiled.asm["ttgir"]
        )
    ]
    return Code(
        resources.registers,
        resources.stack,
        compiled.metadata.shared,
        min(buffers, default=0),
        replicated(compiled.asm["ttgir"]),
        compiled.asm["ptx"].count("fma.rn.f32"),
        loops_of(sass),
        seconds,
    )


def compile_all(jobs: list[Job], workers: int = 2) -> dict[Job, Code]:
    """Compiles in separate processes and with an empty cache, so that nothing stale is read."""
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            with concurrent.futures.ProcessPoolExecutor(workers) as pool:
                return dict(zip(jobs, pool.map(compile_job, jobs), strict=True))
        finally:
            os.environ.pop("TRITON_CACHE_DIR") if before is None else os.environ.update(
                TRITON_CACHE_DIR=before
            )


def table(codes: dict[Job, Code], what: str) -> str:
    lines = [
        f"# What triton {triton.__version__} makes of the kernels; written by tools.triton_code --update {what}"
    ]
    lines += sorted(
        f"sm_{job.arch} {job.name}: {code.registers} registers, {code.shared} bytes"
        for job, code in codes.items()
    )
    return "\n".join(dict.fromkeys(lines)) + "\n"


def costs(codes: dict[Job, Code]) -> str:
    """Compile time, which a first call waits for: seconds of one core, by architecture and kernel."""
    seconds: dict[tuple[int, str], list[float]] = {}
    for job, code in codes.items():
        seconds.setdefault((job.arch, job.kernel), []).append(code.seconds)
    lines = [
        f"sm_{arch} {kernel}: {sum(found) / len(found):.1f} s to compile, {max(found):.1f} s at most"
        for (arch, kernel), found in sorted(seconds.items())
    ]
    return "\n".join(lines) + "\n"


def predicted(codes: dict[Job, Code]) -> str:
    """Lower and upper estimates of the walks' times at the benchmark's shape.

    The lower estimate assumes that the tensor cores and issue slots of a multiprocessor are busy at the same time, the
    upper one that they take turns. Code that branches skip counts as issued, and nothing waits: on an H100 the
    negatives of 256 channels took 1.1 times (bf16) and 1.4 times ("highest") the upper estimate.
    """
    lines = []
    for job, code in codes.items():
        constants = dict(job.constants)
        of_pass = re.search("negatives|positives|keys", job.kernel)
        wanted = constants.get("WITH_GRAD", not constants.get("SYMMETRIC", True))
        if of_pass is None or not wanted or not code.loops:
            continue
        walk = {
            field.name: getattr(constants["WALK"], field.name).value
            for field in dataclasses.fields(constants["WALK"])
        }
        machine = machine_model.MACHINES[f"sm_{job.arch}"]
        products = walk["chunks"] * (3 if walk["planes"] == 2 else 1)
        products += walk["out"] * (3 if walk["planes"] == 2 else walk["parts"])
        tensor_cores = 2 * walk["rows"] * walk["columns"] * walk["chunk"] * products / FLOPS[job.arch]
        issued = min(loop.instructions for loop in code.loops) * job.num_warps / machine_model.QUARTERS
        tile = dict(rows=walk["rows"], columns=walk["columns"])
        visits = machine_model.visits(of_pass[0], **tile) * -(-walk["chunks"] // walk["out"])
        scale = visits / machine.multiprocessors / machine.ghz / 1e3
        lines.append(
            f"predicted  {machine.name}  {of_pass[0]:<9} {job.types:<5} {walk['channels']} channels, {walk['planes']} "
            f"planes, {tile['rows']} x {tile['columns']}: {tensor_cores:5.0f} cycles of tensor cores, {issued:5.0f} of "
            f"issue slots, {code.buffers} buffers; {max(tensor_cores, issued) * scale:5.0f} to "
            f"{(tensor_cores + issued) * scale:5.0f} us"
        )
    return "\n".join(lines) + "\n"


def table_path() -> Path:
    return Path(__file__).parent / "expected" / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.txt"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS))
    parser.add_argument("--archs", type=int, nargs="*", default=list(ARCHS))
    parser.add_argument("--json", type=Path, help="write what was found there")
    arguments = parser.parse_args()
    jobs = [job for arch in arguments.archs for job in all_jobs(arch, tuple(arguments.widths))]
    smallest = smallest_jobs(arguments.archs[-1], whole=len(arguments.widths) > 1)
    jobs = list(dict.fromkeys(jobs + smallest))
    codes = compile_all(jobs)
    selection = (("--widths", arguments.widths), ("--archs", arguments.archs))
    text = table(codes, " ".join(f"{name} {' '.join(map(str, chosen))}" for name, chosen in selection))
    if arguments.update:
        table_path().write_text(text)
    if arguments.json:
        found = [
            dict(arch=job.arch, name=job.name, kernel=job.kernel, odd=job.odd, **dataclasses.asdict(code))
            for job, code in codes.items()
        ]
        arguments.json.write_text(json.dumps(dict(table=text, kernels=found)))
    else:
        print(text, costs(codes), predicted(codes), sep="\n", end="")


if __name__ == "__main__":
    main()
