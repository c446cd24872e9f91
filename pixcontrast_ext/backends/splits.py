"""How many blocks of a GPU share a walk over columns."""

from __future__ import annotations

import functools

# Columns that a block adds up at most. A tensor core cuts its sum off, so that a gradient falls short by as much as
# 1.3e-9 of itself for each column of the walk; the sum over the blocks is rounded to nearest. And a histogram's bin
# counts them in 16 bits.
LONGEST_WALK = 2**16 - 1
MOST_SPLITS = 1024


def fewest(column_tiles: int, columns_of_tile: int) -> int:
    """How many blocks share a walk at least, for none to have more than LONGEST_WALK columns."""
    return max(1, -(-column_tiles // (LONGEST_WALK // columns_of_tile)))


@functools.lru_cache(maxsize=4096)
def choose(row_tiles: int, column_tiles: int, slots: int, columns_of_tile: int) -> int:
    """How many blocks share the walk of a row tile over the columns.

    The fewest that fill the device evenly and leave none of them more than LONGEST_WALK columns. `slots` blocks run at
    a time, and a wave of blocks takes as long as its longest walk.
    """
    least = fewest(column_tiles, columns_of_tile)
    most = max(least, min(column_tiles, 2 * slots // max(row_tiles, 1), MOST_SPLITS))

    def cost(count: int) -> int:
        return -(-row_tiles * count // slots) * -(-column_tiles // count)

    shortest = min(cost(count) for count in range(least, most + 1))
    return next(count for count in range(least, most + 1) if cost(count) <= 1.05 * shortest)
