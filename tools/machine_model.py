"""The resource that binds each kernel, for every architecture in the module: `python -m tools.machine_model`.

It prints a line for each InfoNCE kernel of 256 channels (or those that are named): the cycles of a multiprocessor for
one tile by resource, the resource that binds, the time this gives at the benchmark's shape, and its share of the floor.
It prints a line for each of the other ops, which are bound by device memory. All of these are predicted lower bounds:
in the model nothing waits for anything else. With bf16 rows of 256 channels an H100 took 609 us for pass 1 in tiles of
64 x 64, 1.46 times the bound, and 544 us in tiles of 128 x 128, 1.69 times the bound (benchmarks/results/2026-11-26-*).

- tensor cores: the tile's products times the cycles of one;
- shared memory: the traffic of fragments, copies, weights, maxima, labels and spilled registers, at 128 bytes a cycle;
- issue slots: instructions, of which a multiprocessor issues four in a cycle;
- device memory: the columns, read from there once per pass.

Besides, it estimates latency: the time of one warp that runs by itself, from the usual number of cycles until a result
is ready, divided by the number of resident blocks. Where this is close to the binding resource, nothing can hide it.

Instructions are read from the machine code where the walk over the tiles is a loop with a known number of trips, as it
is for whole rows. Code that only tiles with masks or new maxima run is left out. For other rows there are only tensor
cores, shared memory and device memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools import compiled_code

ANCHORS, KEYS, CLASSES = 1024, 190_000, 19
QUARTERS = 4  # parts of a multiprocessor, each with a tensor core and a scheduler


@dataclass(frozen=True)
class Machine:
    name: str
    multiprocessors: int
    ghz: float  # under load
    mma: float  # cycles of a tensor core for m16n8k16
    peak: float  # TFLOP/s of 16-bit products, which give the floor
    bandwidth: float  # GB/s
    shared: int = 100  # KB of a multiprocessor


# From the data sheets. Two exceptions: the H100's clock and its 6 cycles for mma.sync, which is short of the peak, were
# measured, and the 8 cycles of the B200 are those its assembler plans with.
MACHINES = {
    "sm_80": Machine("A100", 108, 1.41, 8, 312, 2039, 164),
    "sm_86": Machine("RTX A6000", 84, 1.80, 16, 155, 768),
    "sm_89": Machine("L40S", 142, 2.52, 16, 362, 864),
    "sm_90": Machine("H100", 132, 1.81, 6, 989, 3350, 228),
    "sm_100": Machine("B200", 148, 1.85, 8, 2250, 8000, 228),
    "sm_120": Machine("RTX PRO 6000", 188, 2.60, 16, 503, 1792),
}

# Shared memory that an instruction of a warp moves, in units of the 128 bytes of a cycle.
WAVEFRONTS = {"LDSM": 4.0, "LDGSTS.128": 4.0, "LDS.128": 4.0, "LDS.64": 2.0, "STS.128": 4.0, "STS.64": 2.0}
# Cycles until a result can be used; 5 for other instructions.
LATENCY = {
    "HMMA": 33,
    "LDSM": 33,
    "LDS": 30,
    "MUFU": 23,
    "SHFL": 24,
    "BAR": 20,
    "LDG": 300,
    "LDL": 30,
    "S2R": 20,
}
# Registers of an instruction's result and of its operands, if any has more than one.
REGISTERS = {"HMMA": (4, 4, 2, 4), "LDSM": (4, 1), "LDS.128": (4, 1), "LDS.64": (2, 1)}
# Instructions that every tile executes, so a branch over them is not taken.
NEVER_PASSED = {"HMMA", "LDSM", "BAR", "LDGSTS", "MUFU", "STS", "SHFL"}


def visits(of_pass: str, rows: int, columns: int) -> float:
    """Number of tiles in a whole pass at the benchmark's shape."""
    if of_pass == "keys":
        return KEYS / rows * -(-ANCHORS // columns)
    if of_pass == "negatives":
        return -(-ANCHORS // rows) * KEYS / columns
    return CLASSES * -(-(ANCHORS // CLASSES) // rows) * (KEYS / CLASSES / columns)


@dataclass
class Tile:
    """Parsed from a kernel's name: Tile<Math<type, planes>, channels, whole, pieces, wide>."""

    of_pass: str
    half: bool
    planes: int
    channels: int
    whole: bool
    wide: bool
    rows: int
    columns: int
    row_warps: int
    column_warps: int

    @classmethod
    def of(cls, name: str) -> Tile | None:
        found = re.search(
            r"_(negatives|positives|keys)_kernel<Tile<Math<(\w+), (\d)>, (\d+), (true|false), (\d), (true|false)>>$",
            name,
        )
        if found is None:
            return None
        planes, channels, pieces = (int(found[i]) for i in (3, 4, 6))
        wide = found[7] == "true"
        row_bytes = 2 * planes * channels
        row_warps, column_warps = (1 if row_bytes > 1024 else 2), 4 if wide else 2
        fragments = (4 if row_bytes <= 512 else 2) if wide else 2 if row_bytes <= 512 else 1
        columns = pieces * (32 if row_bytes <= 512 else 16)
        rows = row_warps * fragments * 16
        half, whole = found[2] == "Half", found[5] == "true"
        return cls(found[1], half, planes, channels, whole, wide, rows, columns, row_warps, column_warps)

    @property
    def warps(self) -> int:
        return self.row_warps * self.column_warps

    @property
    def shared(self) -> int:
        """Bytes of a block, including those that the device takes for itself."""
        row_bytes = 2 * self.planes * self.channels
        beside = 8 * self.columns if self.of_pass == "negatives" else 16 * (2 * self.columns + self.rows)
        tiles = (self.rows + 2 * self.columns) * row_bytes + 2 * self.parts * self.rows * self.columns
        return tiles + 4 * self.column_warps * self.rows + beside + 1024

    def resident(self, machine: Machine) -> int:
        """Blocks that a multiprocessor holds."""
        return min(1 if self.wide else 2, machine.shared * 1024 // self.shared)

    @property
    def parts(self) -> int:
        """16-bit parts of a weight."""
        if self.planes == 2 or self.of_pass == "negatives":
            return self.planes
        return 1 if self.half else 2

    @property
    def score_products(self) -> int:
        """Tensor core instructions of one warp for the scores of a tile."""
        products = self.rows * self.columns * self.channels // (16 * 8 * 16) // self.warps
        return products * (3 if self.planes == 2 else 1)

    @property
    def output_products(self) -> int:
        products = self.rows * self.columns * self.channels // (16 * 8 * 16) // self.warps
        return products * (3 if self.planes == 2 else self.parts)

    @property
    def wavefronts(self) -> int:
        """Cycles of shared memory for the fragments, copies and weights of all warps."""
        rows, columns = self.rows // self.row_warps, self.columns // self.column_warps  # of a warp's scores
        row_bytes = 2 * self.planes * self.channels
        scores = (rows + columns) * row_bytes
        weights = 2 * self.parts * rows
        output = weights * self.columns + self.columns * row_bytes // self.column_warps
        return (self.warps * (scores + output + weights * columns) + self.columns * row_bytes) // 128

    @property
    def visits(self) -> float:
        return visits(self.of_pass, self.rows, self.columns)

    @property
    def floor_flops(self) -> float:
        """FLOPs of the two products, each counted once, whatever the number of planes and parts."""
        return 4 * ANCHORS * KEYS * self.channels / (CLASSES if self.of_pass == "positives" else 1)


@dataclass
class Instruction:
    address: int
    base: str
    width: str  # "64", "128" or ""
    registers: list[tuple[int, ...]]  # by operand
    target: int | None  # where it may branch to

    @property
    def kind(self) -> str:
        return f"{self.base}.{self.width}" if self.width and self.base != "LDSM" else self.base


def instructions(module: Path, arch: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The instructions of every kernel, in the order of addresses."""
    name, code = "", list[Instruction]()
    for line in compiled_code.disassembly(module, arch).splitlines():
        if found := re.match(r"\s*Function : (.*)$", line):
            if code:
                yield name, code
            name, code = compiled_code.kernel_name(found[1]), []
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)\s*(.*?) ?;", line):
            base, *modifiers = found[2].split(".")
            width = next((word for word in modifiers if word in ("64", "128")), "")
            target = re.search(r"0x([0-9a-f]+)$", found[3]) if base == "BRA" else None
            of = [
                tuple(int(number) for number in re.findall(r"\bR(\d+)\b", word))
                for word in found[3].split(",")
            ]
            code.append(
                Instruction(int(found[1], 16), base, width, of, int(target[1], 16) if target else None)
            )
    if code:
        yield name, code


def walk_of(code: list[Instruction], tile: Tile) -> list[Instruction] | None:
    """The instructions executed for a tile of columns, or None if the code does not show which they are.

    They are the body of the loop over columns. The loops of products inside it are repeated as often as the tile needs;
    other loops are left out, because only tiles with gaps enter them.
    """
    loops = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]

    def inside(loop: tuple[int, int]) -> list[Instruction]:
        return [i for i in code if loop[0] <= i.address <= loop[1]]

    def products(of: list[Instruction]) -> int:
        return sum(i.base == "HMMA" for i in of)

    wanted = tile.score_products + tile.output_products
    candidates = [loop for loop in loops if products(inside(loop))]
    if not candidates:
        return None
    most = max(products(inside(loop)) for loop in candidates)
    walk = min(
        (loop for loop in candidates if products(inside(loop)) == most), key=lambda loop: loop[1] - loop[0]
    )
    inner = sorted(loop for loop in loops if walk[0] <= loop[0] and loop[1] <= walk[1] and loop != walk)
    of_products = [loop for loop in inner if products(inside(loop))]
    straight = most - sum(products(inside(loop)) for loop in of_products)
    trips = dict.fromkeys(inner, 0)
    left = wanted - straight
    for number, loop in enumerate(of_products):  # scores come first
        share = tile.score_products if number == 0 and len(of_products) == 2 else left
        trips[loop], rest = divmod(share, products(inside(loop)))
        if rest or share <= 0:
            return None
        left -= share
    if left or len(of_products) > 2:
        return None
    executed: list[Instruction] = []
    beyond = 0  # target of a branch over code that few tiles run
    for i in inside(walk):
        if i.address < beyond:
            continue
        if i.target is not None and i.address < i.target <= walk[1]:
            passed = [other.base for other in code if i.address < other.address < i.target]
            beyond = 0 if NEVER_PASSED.intersection(passed) else i.target
        around = [loop for loop in inner if loop[0] <= i.address <= loop[1]]
        if not around:
            executed.append(i)
        elif len(around) == 1 and i.address == around[0][0]:
            executed += inside(around[0]) * trips[around[0]]
    return executed


def latency(walk: list[Instruction], mma: float) -> float:
    """Cycles until a warp that runs by itself has issued the whole walk.

    An instruction waits for the registers it reads, and a product also for the tensor core.
    """
    ready: dict[int, float] = {}
    now = tensor_core = 0.0
    for i in walk:
        widths = REGISTERS.get(i.kind, REGISTERS.get(i.base, ()))
        reads, writes = list[int](), list[int]()
        stores = i.base.startswith(("ST", "BRA", "BAR", "LDGSTS"))
        for place, operand in enumerate(i.registers):
            width = widths[place] if place < len(widths) else 1
            registers = [first + offset for first in operand for offset in range(width)]
            (writes if place == 0 and not stores else reads).extend(registers)
        now = max([now + 1, *(ready.get(register, 0.0) for register in reads)])
        if i.base == "HMMA":
            now = tensor_core = max(now, tensor_core + mma)
        if i.base == "BAR":
            now += LATENCY["BAR"]
        for register in writes:
            ready[register] = now + LATENCY.get(i.base, 5)
    return now


@dataclass
class Bound:
    kernel: str
    machine: Machine
    tile: Tile
    cycles: dict[str, float]  # per tile, by resource
    latency: float | None  # per tile, an estimate

    @property
    def binding(self) -> str:
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def microseconds(self) -> float:
        cycles = self.cycles[self.binding]
        return self.tile.visits * cycles / self.machine.multiprocessors / self.machine.ghz / 1e3

    @property
    def floor_share(self) -> float:
        return self.tile.floor_flops / self.machine.peak / 1e6 / self.microseconds

    def line(self) -> str:
        cycles = "  ".join(f"{name} {count:6,.0f}" for name, count in self.cycles.items())
        if self.latency is not None:
            cycles += f"  (latency {self.latency:6,.0f})"
        return (
            f"predicted  {self.machine.name}  {self.kernel:<75} {cycles}  bound by {self.binding}, "
            f"at least {self.microseconds:5.0f} us, {self.floor_share:.0%} of the floor"
        )


def bounds(module: Path, arch: str) -> Iterator[Bound]:
    machine = MACHINES[arch]
    for name, code in instructions(module, arch):
        tile = Tile.of(name)
        if tile is None or tile.resident(machine) == 0:
            continue
        walk = walk_of(code, tile) if tile.whole else None
        cycles = {
            "tensor cores": (tile.score_products + tile.output_products)
            * machine.mma
            * tile.warps
            / QUARTERS,
            "shared memory": float(tile.wavefronts),
        }
        if walk is not None:
            shared = sum(
                WAVEFRONTS.get(i.kind, 1.0)
                for i in walk
                if i.base.startswith(("LDS", "STS", "LDGSTS", "SHFL", "LDL", "STL"))
            )
            cycles["shared memory"] = shared * tile.warps
            cycles["issue slots"] = len(walk) * tile.warps / QUARTERS
        columns = ANCHORS if tile.of_pass == "keys" else KEYS
        bytes_of_columns = 2 * tile.planes * tile.channels * columns
        if tile.of_pass == "keys":  # rows come from there, and their gradient goes there
            bytes_of_columns = (2 * tile.planes + 4) * tile.channels * KEYS
        seconds = bytes_of_columns / machine.bandwidth / 1e9
        cycles["device memory"] = seconds * 1e9 * machine.ghz * machine.multiprocessors / tile.visits
        alone = None if walk is None else latency(walk, machine.mma) / tile.resident(machine)
        yield Bound(name, machine, tile, cycles, alone)


# At Cityscapes' size: B 8, D 256, H 128, W 256, fp32; labels, predictions and priorities for every pixel.
MAP, PIXELS, ROWS = 8 * 256 * 128 * 256, 8 * 128 * 256, 1024
MEMORY = {
    "sampling": 20 * PIXELS + 2 * 8 * PIXELS,  # plus the sorted keys, written and read
    "gather": 2 * 32 * 256 * ROWS,  # two times sectors of 32 bytes, of which 4 are used
    "gather, backward": 4 * MAP + 32 * 256 * ROWS,
    "enqueue": 4 * MAP + 12 * PIXELS + 2 * 8 * PIXELS,
}


def main(names: list[str]) -> int:
    from pixcontrast_ext.backends import native

    if native._C is None or not native._C.cuda_archs or compiled_code.cuobjdump() is None:
        print("machine_model: it needs a module with CUDA kernels, and cuobjdump")
        return 2
    print(
        f"A {ANCHORS:,}, K {KEYS:,}, {CLASSES} classes; cycles of a multiprocessor for each tile of columns"
    )
    for arch in native._C.cuda_archs.split():
        if arch not in MACHINES:
            continue
        machine = MACHINES[arch]
        for bound in bounds(Path(native._C.__file__), arch):
            if any(name in bound.kernel for name in names or [">, 256, "]):
                print(bound.line())
        for op, moved in MEMORY.items() if not names else ():
            print(
                f"predicted  {machine.name}  {op:<17} {moved / 1e6:6.1f} MB  bound by device memory, at least "
                f"{moved / machine.bandwidth / 1e3:5.1f} us"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
