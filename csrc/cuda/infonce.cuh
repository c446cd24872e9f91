// Blockwise InfoNCE on tensor cores, eq. (1) to (6) of backends/reference.py. The anchors x keys matrix is
// never stored.
//
// One engine serves every pass. A block keeps a tile of rows in shared memory and walks over tiles of
// columns, which cp.async brings one tile ahead. Of each it computes the scores S = rows . columns^T, turns
// them into weights P, and adds P . columns to its output: one tile in shared memory serves both products.
//
//   pass        rows      columns           weights                    output
//   negatives   anchors   keys              exp2(score - shift)        O, and the log-sum-exp, eq. (1)
//   positives   anchors   their own class   sigma, eq. (4)             G, the loss and S, eq. (2) to (4)
//   backward    keys      anchors           ds, eq. (5)                gradient of the keys, eq. (6)
//   symmetric   anchors   anchors           ds plus its mirror         both halves of eq. (6)
//
// A warp computes S for its rows and a share of the columns, and the output for the same rows and a share of
// the channels. In between, the weights pass through shared memory to the warps of the same rows, and only
// those wait for each other; the whole block meets once a tile.
//
// Rows and columns come in the order of their class where that is known. Most tiles of pass 1 then hold no
// positive of their block and take a path without masks; in pass 2 a tile of rows begins anew with every
// class, and meets the keys of that class alone, if the keys are grouped. Several blocks share the walk of
// one row tile, each with a partial result of its own, and a second stage combines those in a fixed order:
// nothing is atomic, and a repeat gives the same bits.
//
// Rows of fp32 are split into fp16 numbers and what those leave of them, which are laid behind one another
// like rows of twice the length; three products of such planes keep fp32's accuracy, and one has that of
// TF32.
//
// Scores are in units of log2: scale = log2(e) / temperature, applied to the fp32 sum.
#pragma once

#include "infonce_backward.cuh"
#include "infonce_forward.cuh"
