"""The colour map of PASCAL VOC, for datasets that come without colours of their own."""

from __future__ import annotations


def voc_colour(index: int) -> tuple[int, int, int]:
    """Colour of entry 0..255. Red, green and blue take the index's bits in turn, from the highest bit of each down.

    Source: the colour map of the VOC development kit, in which 0 is black and no two entries are alike.
    """
    red, green, blue = (
        sum((index >> (3 * place + channel) & 1) << (7 - place) for place in range(3)) for channel in range(3)
    )
    return red, green, blue
