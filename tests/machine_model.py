"""What binds pass 1 of InfoNCE, read from its machine code: `python tests/machine_model.py`.

For each architecture in the module, a line for every kernel whose walk is one loop of straight code, as it is for most
whole rows: cycles that a tile of keys takes of a multiprocessor's tensor cores, of its shared memory and of its issue
slots, which of the three binds, and what time that makes at the benchmark's shape if nothing else ever waits. All of it
is predicted, and a bound: no latency, no barrier and no idle multiprocessor is in it. With bf16 rows of 256 channels an
H100 took 609 us (benchmarks/results/2026-11-26-first-gpus), 1.43 times the bound.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import compiled_code

ANCHORS, KEYS = 1024, 190_000
QUARTERS = 4  # of a multiprocessor, each with a tensor core and a scheduler


@dataclass(frozen=True)
class Machine:
    name: str
    multiprocessors: int
    ghz: float  # under load
    mma: float  # cycles of a tensor core for m16n8k16
    peak: float  # TFLOP/s of 16-bit products, of which the floor is made


# Of their white papers; but the H100's clock, and its 6 cycles for mma.sync, which is short of the peak, were measured.
MACHINES = {"sm_80": Machine("A100", 108, 1.41, 8, 312), "sm_90": Machine("H100", 132, 1.81, 6, 989)}

# Bytes of shared memory that an instruction of a warp moves, in units of the 128 of a cycle.
WAVEFRONTS = {"LDSM": 4.0, "LDGSTS.128": 4.0, "LDS.128": 4.0, "LDS.64": 2.0, "STS.128": 4.0, "STS.64": 2.0}


@dataclass
class Tile:
    """Of a kernel's name: Tile<Math<type, planes>, channels, whole, pieces, wide>."""

    planes: int
    channels: int
    rows: int
    keys: int
    warps: int

    @classmethod
    def of(cls, name: str) -> Tile | None:
        found = re.search(r"Tile<Math<\w+, (\d)>, (\d+), true, (\d), (true|false)>", name)
        if found is None:
            return None
        planes, channels, pieces = (int(found[i]) for i in (1, 2, 3))
        wide = found[4] == "true"
        long = 2 * planes * channels > 512
        rows = 32 if long and not wide else 128 if wide and not long else 64
        return cls(planes, channels, rows, pieces * (16 if long else 32), 8 if wide else 4)

    @property
    def products(self) -> int:
        """Instructions of the tensor cores that one tile of keys takes."""
        return 2 * (3 if self.planes == 2 else 1) * self.rows * self.keys * self.channels // (16 * 8 * 16)


Instruction = tuple[
    int, str, int | None
]  # its address, its name with what of the modifiers matters, where it may branch to


def instructions(module: Path, arch: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Of every kernel, in the order of addresses."""
    name, code = "", []
    for line in compiled_code.disassembly(module, arch).splitlines():
        if found := re.match(r"\s*Function : (.*)$", line):
            if code:
                yield name, code
            name, code = compiled_code.kernel_name(found[1]), []
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)\s*(.*?) ?;", line):
            base, *modifiers = found[2].split(".")
            width = next((word for word in modifiers if word in ("64", "128")), "")
            target = re.search(r"0x([0-9a-f]+)$", found[3]) if base == "BRA" else None
            kind = f"{base}.{width}" if width and base != "LDSM" else base
            code.append((int(found[1], 16), kind, int(target[1], 16) if target else None))
    if code:
        yield name, code


def walk_of(code: list[Instruction]) -> list[str] | None:
    """The loop over the tiles, without the loops inside of it, which only tiles with gaps enter; None if the tensor
    cores have loops of their own in it."""
    loops = [(target, at) for at, _, target in code if target is not None and target < at]

    def inside(loop: tuple[int, int]) -> list[tuple[int, str]]:
        return [(at, kind) for at, kind, _ in code if loop[0] <= at <= loop[1]]

    def products(loop: tuple[int, int]) -> int:
        return sum(kind == "HMMA" for _, kind in inside(loop))

    if not loops or not (most := max(map(products, loops))):
        return None
    walk = min((loop for loop in loops if products(loop) == most), key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in loops if walk[0] <= loop[0] and loop[1] <= walk[1] and loop != walk]
    if any(products(loop) for loop in inner):
        return None
    return [kind for at, kind in inside(walk) if not any(first <= at <= last for first, last in inner)]


@dataclass
class Bound:
    kernel: str
    machine: Machine
    tile: Tile
    cycles: dict[str, float]  # of a tile of keys, by resource

    @property
    def binding(self) -> str:
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def microseconds(self) -> float:
        tiles = -(-ANCHORS // self.tile.rows) * (KEYS / self.tile.keys)
        return tiles * self.cycles[self.binding] / self.machine.multiprocessors / self.machine.ghz / 1e3

    @property
    def floor_share(self) -> float:
        """Of the two products at the peak, each counted once, whatever the planes."""
        return 4 * ANCHORS * KEYS * self.tile.channels / self.machine.peak / 1e6 / self.microseconds

    def line(self) -> str:
        cycles = "  ".join(f"{name} {count:6,.0f}" for name, count in self.cycles.items())
        return (
            f"predicted  {self.machine.name}  {self.kernel:<75} {cycles}  bound by {self.binding}, "
            f"at least {self.microseconds:5.0f} us, {self.floor_share:.0%} of the floor"
        )


def bounds(module: Path, arch: str) -> Iterator[Bound]:
    machine = MACHINES[arch]
    for name, code in instructions(module, arch):
        tile = Tile.of(name)
        if tile is None or "negatives" not in name or (walk := walk_of(code)) is None:
            continue
        assert walk.count("HMMA") * tile.warps == tile.products, name
        shared = sum(
            WAVEFRONTS.get(kind, 1.0) for kind in walk if kind.startswith(("LDS", "STS", "LDGSTS", "SHFL"))
        )
        cycles = {
            "tensor cores": walk.count("HMMA") * machine.mma * tile.warps / QUARTERS,
            "shared memory": shared * tile.warps,
            "issue slots": len(walk) * tile.warps / QUARTERS,
        }
        yield Bound(name, machine, tile, cycles)


def main() -> int:
    from pixcontrast_ext.backends import native

    if native._C is None or not native._C.cuda_archs or compiled_code.cuobjdump() is None:
        print("machine_model: it needs a module with CUDA kernels, and cuobjdump")
        return 2
    print(f"pass 1 at A {ANCHORS:,}, K {KEYS:,}; cycles of a multiprocessor for each tile of keys")
    for arch in native._C.cuda_archs.split():
        if arch in MACHINES:
            for bound in bounds(Path(native._C.__file__), arch):
                print(bound.line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
