"""The two matrix products of the loss and nothing else: the floor under any implementation of them.

Tile by tile over the keys, into buffers allocated once: a tile of S is still in cache when it is used.
"""

import time

import torch
from torch import Tensor

TILES = {"cpu": (256, 512, 1024, 2048), "cuda": (4096, 16_384, 65_536, 262_144)}


class BareProducts:
    """`forward` computes S = A·K_tileᵀ for each tile of keys, `both` also O += S·K_tile."""

    def __init__(self, anchors: Tensor, keys: Tensor, tile: int | None = None):
        self.anchors, self.keys = anchors, keys
        self.output = torch.empty_like(anchors)
        self.tile = tile or min(TILES[anchors.device.type], key=self.seconds_with)
        self.allocate(self.tile)

    def allocate(self, tile: int) -> None:
        sizes = {len(keys) for keys in self.keys.split(tile)}
        self.products = {size: self.anchors.new_empty(len(self.anchors), size) for size in sizes}
        self.tile = tile

    def seconds_with(self, tile: int) -> float:
        self.allocate(tile)
        return min(self.seconds() for _ in range(4))

    def seconds(self) -> float:
        start = time.perf_counter()
        self.both()
        if self.anchors.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def forward(self) -> None:
        for keys in self.keys.split(self.tile):
            torch.mm(self.anchors, keys.T, out=self.products[len(keys)])

    def both(self) -> Tensor:
        self.output.zero_()
        for keys in self.keys.split(self.tile):
            product = self.products[len(keys)]
            torch.mm(self.anchors, keys.T, out=product)
            self.output.addmm_(product, keys)
        return self.output
