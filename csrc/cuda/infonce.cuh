// Blockwise InfoNCE on tensor cores, eq. (1) to (6) of backends/reference.py. The anchors x keys matrix is
// never stored.
//
// One engine serves every pass. A block keeps a tile of rows in shared memory and walks over tiles of
// columns, which cp.async fetches one tile ahead. For each tile it computes the scores S = rows . columns^T,
// turns them into weights P, and adds P . columns to its output: one tile in shared memory serves both
// products.
//
//   pass        rows      columns           weights                    output
//   negatives   anchors   keys              exp2(score - shift)        O, and the log-sum-exp, eq. (1)
//   positives   anchors   their own class   sigma, eq. (4)             G, the loss and S, eq. (2) to (4)
//   backward    keys      anchors           ds, eq. (5)                gradient of the keys, eq. (6)
//   symmetric   anchors   anchors           ds plus its mirror         both halves of eq. (6)
//   counts      anchors   keys              none                       histograms of the scores
//
// A warp computes S for its rows and a share of the columns, and the output for the same rows and a share of
// the channels. In between, the weights pass through shared memory to the warps of the same rows, and only
// those wait for each other; the whole block meets once a tile.
//
// Rows and columns come in the order of their class where that is known. Most tiles of pass 1 then hold no
// positive of their block and take a path without masks. In pass 2, if the keys are grouped by class, a new
// tile of rows begins with every class and meets only the keys of that class. Several blocks share the walk
// of one row tile, each with a partial result of its own, and a second stage combines those in a fixed order.
// Nothing is atomic but the histograms' integers, so a repeat gives the same bits.
//
// Rows of fp32 are split into fp16 numbers and the remainders that those leave, stored one after the other
// like a row of twice the length. Three products of such planes keep fp32's accuracy; one has that of TF32.
//
// Example mining draws negatives of their own, which take the keys' place in pass 1, and gives each anchor a
// range of scores that take part. It is cut from the histograms, whose scores are the passes' to the bit.
//
// Scores are in units of log2: scale = log2(e) / temperature, applied to the fp32 sum.
//
//   tile.cuh              how rows are multiplied, cut into tiles and laid out in shared memory
//   engine.cuh            rows times columns to scores, weights times columns to output; nothing of contrast
//   infonce_numerics.cuh  units, and how weights fit into 16 bits
//   infonce_rows.cuh      where the rows of either side lie; planes of fp32 rows
//   infonce_visits.cuh    the order of the anchors, and which tiles of columns a block visits
//   infonce_forward.cuh   passes 1 and 2, and the stage that combines them
//   infonce_backward.cuh  the backward, symmetric or not
//   infonce_counts.cuh    the histograms
//   infonce_launch.h      what the launchers share
//   infonce.cu            which tile serves which rows, and the order of the launches
//   mining.cu             the same of mined pairs
#pragma once

#include "infonce_backward.cuh"
#include "infonce_forward.cuh"
