"""Blockwise InfoNCE in Triton, eq. (1) to (6) of backends/reference.py; the anchors x keys matrix is never stored.

In every pass a program has a tile of rows and walks over tiles of columns. Scores S = rows . columns^T become weights
P, and P . columns is added to the output, so that a column tile is loaded once for both products.

    pass        rows      columns           weights                    output
    negatives   anchors   keys              exp2(score - shift)        O, and the log-sum-exp, eq. (1)
    positives   anchors   their own class   sigma, eq. (4)             G, the loss and S, eq. (2) to (4)
    backward    keys      anchors           ds, eq. (5)                gradient of the keys, eq. (6)
    symmetric   anchors   anchors           ds plus its mirror         both halves of eq. (6)

Several programs share a walk; each leaves a partial result, and a second stage adds those in a fixed order. Nothing is
atomic. Scores are in units of log2: scale = log2(e) / temperature, applied to the fp32 sum.

    tiles.py      how a pass cuts the matrix, by device, width and dtype
    operands.py   rows in chunks of channels, and their products
    prepare.py    both sides as operands, anchors in order, and what is to be known of labels
    plan.py       which tiles are visited
    forward.py    negatives, positives, and what becomes of them
    backward.py   the gradient of the keys
"""

from pixcontrast_ext.backends.triton.infonce.backward import infonce_backward
from pixcontrast_ext.backends.triton.infonce.forward import infonce_forward

__all__ = ["infonce_backward", "infonce_forward"]
