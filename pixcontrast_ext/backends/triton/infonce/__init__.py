"""Blockwise InfoNCE in Triton, eq. (1) to (6) of backends/reference.py; the anchors x keys matrix is never stored.

In every pass a program has a tile of rows and walks over tiles of columns. Scores S = rows . columns^T become weights
P, and P . columns is added to the output, so that a column tile is loaded once for both products.

    pass        rows      columns           weights                    output
    negatives   anchors   keys              exp2(score - shift)        O, and the log-sum-exp, eq. (1)
    positives   anchors   their own class   sigma, eq. (4)             G, the loss and S, eq. (2) to (4)
    backward    keys      anchors           ds, eq. (5)                gradient of the keys, eq. (6)
    symmetric   anchors   anchors           ds plus its mirror         both halves of eq. (6)
    counts      anchors   keys, negatives                              histograms of cosines

With example mining (MINED) the negatives have keys of their own, and a pair takes part if its cosine is within its
anchor's range. Compared is the sum of products before its scale; where passes cut a row into other chunks, the last bit
of that may differ between them.

Several programs share a walk; each leaves a partial result, and a second stage adds those in a fixed order. Nothing is
atomic but the counts, which are integers. Scores are in units of log2: scale = log2(e) / temperature, applied to the
fp32 sum.

    tiles.py      how a pass cuts the matrix, by device, width and dtype
    operands.py   rows in chunks of channels, and their products
    prepare.py    both sides as operands, anchors in order, and what is to be known of labels
    plan.py       which tiles are visited
    forward.py    negatives, positives, and what becomes of them
    backward.py   the gradient of the keys
    mining.py     the counts
"""

from pixcontrast_ext.backends.triton.infonce.backward import infonce_backward
from pixcontrast_ext.backends.triton.infonce.forward import infonce_forward
from pixcontrast_ext.backends.triton.infonce.mining import score_counts

# A call says itself whether it is mined.
mined_forward, mined_backward = infonce_forward, infonce_backward

__all__ = ["infonce_backward", "infonce_forward", "mined_backward", "mined_forward", "score_counts"]
