"""How the passes cut the anchors x keys matrix, and how rows of a dtype are multiplied."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.backends import precision
from pixcontrast_ext.backends.triton.numerics import LOG2E, SMALLEST_SCALE


class Tile(NamedTuple):
    """What one program of a pass multiplies at a time."""

    rows: int  # of 16 a warp
    columns: int
    chunk: int  # channels of an operand; a row is whole chunks
    # Chunks that a program adds up; 0: all. Others are for programs beside it, which know the same scores.
    out: int = 0
    resident: int = 1  # programs that a multiprocessor holds at a time
    num_stages: int = 3


class Tiles(NamedTuple):
    negatives: Tile
    positives: Tile  # rows of one class; its columns and chunks divide those of the negatives
    backward: Tile


# By (major number of the compute capability, planes of an operand): tiles for rows of up to so many channels. Those of
# (8, ...) fit the 99 KB of shared memory that the smallest device after an A100 has, and were chosen by their machine
# code, which tools/triton_code.py reads. Those of (9, ...) were chosen by their times on an H100, as far as these stand
# in benchmarks/results/2026-11-26-h100-triton-3.9: where outputs do not fit registers, to spill some costs less than
# programs beside each other, which multiply the scores again; of two planes, more columns are worth more than a buffer
# that is filled meanwhile; and several small programs on a multiprocessor more than a large one.
TILES: dict[tuple[int, int], dict[int, Tiles]] = {
    (9, 1): {
        64: Tiles(Tile(128, 128, 64), Tile(64, 64, 64, resident=2), Tile(128, 64, 64)),
        128: Tiles(Tile(128, 64, 128), Tile(64, 32, 128, resident=2), Tile(64, 64, 128, resident=2)),
        256: Tiles(Tile(128, 64, 256), Tile(64, 32, 256, resident=2), Tile(64, 32, 256, resident=2)),
        512: Tiles(Tile(128, 32, 256, 1), Tile(64, 32, 256, 1), Tile(128, 32, 256, 1)),
    },
    (9, 2): {
        64: Tiles(Tile(64, 64, 64, resident=3), Tile(64, 32, 64, resident=2), Tile(128, 32, 64)),
        128: Tiles(
            Tile(64, 64, 128, resident=2, num_stages=2),
            Tile(64, 64, 128),
            Tile(64, 64, 128, resident=2, num_stages=2),
        ),
        256: Tiles(
            Tile(128, 64, 128, num_stages=1), Tile(64, 64, 64, num_stages=2), Tile(128, 64, 128, num_stages=1)
        ),
        512: Tiles(
            Tile(64, 32, 128, num_stages=1),
            Tile(64, 32, 128, 1, num_stages=1),
            Tile(64, 32, 128, num_stages=1),
        ),
    },
    (8, 1): {
        64: Tiles(Tile(64, 64, 64, resident=2), Tile(64, 32, 64, resident=2), Tile(64, 64, 64, resident=2)),
        128: Tiles(Tile(64, 64, 128), Tile(64, 32, 128), Tile(64, 32, 128)),
        256: Tiles(Tile(64, 32, 256, resident=2), Tile(64, 32, 128, 1, 2), Tile(64, 32, 256, resident=2)),
        512: Tiles(Tile(64, 16, 256, 1), Tile(32, 16, 128, 1), Tile(32, 16, 128, 2)),
    },
    (8, 2): {
        64: Tiles(Tile(64, 32, 64, resident=2), Tile(64, 32, 64, resident=2), Tile(64, 32, 64, resident=2)),
        128: Tiles(Tile(64, 16, 128, resident=2), Tile(64, 16, 64, 1, 2), Tile(32, 32, 128, resident=2)),
        256: Tiles(Tile(32, 16, 128, resident=2), Tile(32, 16, 128, 1, 2), Tile(32, 16, 128, resident=2)),
        512: Tiles(Tile(32, 16, 128, 2, 1, 2), Tile(32, 16, 128, 1, 1, 2), Tile(32, 16, 128, 2, 1, 2)),
    },
}
PADDING = 128  # prepared rows are a multiple of it, so that no tile of theirs needs a mask


class Arithmetic(NamedTuple):
    """How rows of a dtype are multiplied: 16-bit ones as they are, fp32 ones as planes of fp16."""

    planes: int  # 0: as they are
    negative_parts: int  # in how many 16-bit numbers a weight of the negatives is multiplied
    weight_parts: int  # and one of the other passes
    half: bool  # weights are fp16, which overflows at 2^16 and has few numbers below 2^-14


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    if dtype == torch.bfloat16:
        return Arithmetic(0, 1, 2, False)
    if dtype == torch.float16:
        return Arithmetic(0, 1, 1, True)
    planes = 2 if precision.full_float32(dtype) else 1
    return Arithmetic(planes, planes, planes, True)


class Constants:
    """Base of frozen dataclasses whose fields a kernel takes as constants.

    Every launch asks for the hash, so it is that of a name made once.
    """

    def __post_init__(self) -> None:
        fields = dict(vars(self))
        name = " ".join(f"{name}={value}" for name, value in fields.items())
        vars(self).update({name: tl.constexpr(value) for name, value in fields.items()}, _name=name)

    def __repr__(self) -> str:
        return str(vars(self)["_name"])

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True, eq=False, repr=False)
class Walk(Constants):
    """What a kernel knows of its pass."""

    rows: Any
    columns: Any
    channels: Any  # of a row as the caller has it
    chunk: Any
    chunks: Any
    out: Any
    planes: Any  # of an operand, at least 1
    parts: Any  # of a weight
    in_planes: Any
    half: Any
    hoist: Any  # loop invariants out of the walk; addresses for wgmma would fill the registers


class Pass(NamedTuple):
    """A pass over rows of so many channels, and how it is launched."""

    walk: Walk
    rows: int
    columns: int
    beside: int  # programs for a tile of rows, each with other channels of the output
    slots: int  # tiles of rows that the device works on at a time
    options: dict[str, int]


@functools.lru_cache(maxsize=1024)
def _passes(major: int, multiprocessors: int, how: Arithmetic, channels: int) -> tuple[Pass, Pass, Pass]:
    planes = max(how.planes, 1)
    tiles = next(found for most, found in TILES[major, planes].items() if channels <= most)

    def pass_of(tile: Tile, parts: int, prepared_for: Tile) -> Pass:
        chunks = -(-channels // prepared_for.chunk) * prepared_for.chunk // tile.chunk
        out = tile.out or chunks
        sizes = tile.rows, tile.columns, channels, tile.chunk, chunks, out, planes, parts
        walk = Walk(*sizes, in_planes=how.planes > 0, half=how.half, hoist=major == 8)
        options = dict(num_warps=tile.rows // 16, num_stages=tile.num_stages)
        beside = -(-chunks // out)
        slots = max(1, multiprocessors * tile.resident // beside)
        return Pass(walk, tile.rows, tile.columns, beside, slots, options)

    return (
        pass_of(tiles.negatives, how.negative_parts, tiles.negatives),
        pass_of(tiles.positives, how.weight_parts, tiles.negatives),
        pass_of(tiles.backward, how.weight_parts, tiles.backward),
    )


def passes(rows: Tensor) -> tuple[Pass, Pass, Pass]:
    """Of the negatives, of the positives and of the backward, for rows like these."""
    major = (
        9 if devices.gpu.capability(rows.device)[0] == 9 else 8
    )  # what fits an A100 runs on those after Hopper
    return _passes(major, devices.gpu.multiprocessors(rows.device), arithmetic(rows.dtype), rows.shape[1])


def scale_of(temperature: float) -> float:
    """log2(e) / temperature, above 0 in fp32 too."""
    scale: float = max(LOG2E.value / temperature, SMALLEST_SCALE.value)
    return scale
