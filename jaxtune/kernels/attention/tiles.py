"""What a program of our attention kernels takes at a time."""

from typing import NamedTuple

WARPGROUPS = 2
QUERIES = 64
"""Of a warpgroup that goes through keys: the rows of one instruction on the tensor cores."""
KEYS = 64
"""Of a warpgroup that goes through queries."""
TILE = WARPGROUPS * QUERIES

Size = tuple[int, tuple[int, int]]
"""Of a block, and how many there may be of what is read first, and of what is read in the middle."""


class Blocks(NamedTuple):
    """What is fetched at a time, as it was fastest on an H100."""

    forward: Size
    of_queries: Size
    of_keys: Size
    at_once: bool = False
    """One backward kernel instead of these two, with blocks of its own."""


def blocks(size: int, packed: bool, windowed: bool) -> Blocks:
    """For heads of this size. Of 256, shared memory holds less. All gradients at once are programs that add to the same
    memory, which has to be in a cache then: of whole rows, in which all programs go through the same queries."""
    if size > 128:
        return Blocks((64, (2, 2)), (64, (2, 1)), (64, (2, 1)))
    if packed:
        return Blocks((64, (3, 3)), (64, (2, 2)), (64, (3, 3)))
    return Blocks((128, (2, 2)), (64, (2, 2)), (64, (2, 2)), at_once=size == 128 and not windowed)
