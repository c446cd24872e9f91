"""Puts faults into the CUDA kernels, one at a time, and shows which check of the tests finds each.

    python -m tools.emulator.mutants [NAME ...]

Every fault is one that people make. The kernels are changed in a copy and built for the emulator, and the recorded
calls are replayed: first to look for different bits, then under AddressSanitizer, then under ThreadSanitizer, each
under all schedules. Exits with 1 if a fault survives.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tools.emulator import build, sanitize


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in csrc/cuda
    text: str  # occurs there once
    replacement: str

    def apply(self, source: str) -> str:
        if source.count(self.text) != 1:
            raise ValueError(
                f"{self.name}: {self.file} has its text {source.count(self.text)} times, not once"
            )
        return source.replace(self.text, self.replacement)


MUTANTS = [
    # infonce: barriers and copies
    Mutant(
        "tile read before its copies are visible",
        "engine.cuh",
        "sync_block();  // all copies are visible to all, and nobody reads the other stage any more",
        "",
    ),
    Mutant(
        "largest number of a block read before its warps have written theirs",
        "warp.cuh",
        "sync_block();  // those of all warps are there",
        "",
    ),
    Mutant(
        "a row's splits not all combined",
        "infonce_forward.cuh",
        "all.sum += shuffle_xor(all.sum, lanes);",
        "",
    ),
    Mutant("wait for all groups but one", "engine.cuh", "cp_async_wait<0>();", "cp_async_wait<1>();"),
    Mutant(
        "shares of a team read before they are written",
        "infonce_forward.cuh",
        "sync_block();  // the shares are there",
        "",
    ),
    Mutant(
        "shares of the next channels over those that are read",
        "infonce_forward.cuh",
        "sync_block();  // nobody reads these shares any more",
        "",
    ),
    Mutant(
        "weights read before they are written",
        "engine.cuh",
        "sync_row_warps();  // the weights of all columns are there",
        "",
    ),
    Mutant(
        "maxima read before they are written",
        "infonce_forward.cuh",
        "engine.sync_row_warps();  // the maxima of all column warps are there",
        "",
    ),
    Mutant(
        "sums overwritten while they are read",
        "engine.cuh",
        "sync_block();  // before the next sum overwrites them",
        "",
    ),
    Mutant(
        "beginnings of classes read before they are written",
        "infonce_visits.cuh",
        "sync_block();  // the last beginnings of all warps are there",
        "",
    ),
    Mutant(
        "spans of labels read before they are written",
        "infonce_visits.cuh",
        "sync_block();  // the spans of all warps are there",
        "",
    ),
    Mutant(
        "counts of tiles read before they are written",
        "infonce_visits.cuh",
        "sync_block();  // the tiles of all warps are there",
        "",
    ),
    Mutant(
        "tile of a class read before it is written",
        "infonce_visits.cuh",
        "sync_block();  // the first anchor of the tile is there",
        "",
    ),
    Mutant(
        "more classes than blocks",
        "infonce_forward.cuh",
        "item.number = *kept_number + int(gridDim.x);",
        "item.number = *kept_number + int(p.num_anchors * p.splits);",
    ),
    # infonce: planes, and the splits of pass 2
    Mutant(
        "rows without a label have a part in the scale",
        "infonce_rows.cuh",
        "if (labels[row] < 0) continue;",
        "",
    ),
    Mutant(
        "rows of any length times the usual power of two",
        "infonce_rows.cuh",
        "if (exponent == kUsualExponent) return;",
        "return;",
    ),
    Mutant("small products left out", "engine.cuh", "product(others[f][n], 1, 0);", ""),
    Mutant(
        "a part of the positives that nobody wrote",
        "infonce_forward.cuh",
        "positive_factors[split] = split < positive_splits && p.pos_count_parts[part] > 0 ? 1.f : -1.f;",
        "positive_factors[split] = 1.f;",
    ),
    Mutant(
        "every split of pass 2 walks the first",
        "infonce_forward.cuh",
        "own, item.split, item.splits, engine.lane",
        "own, 0, item.splits, engine.lane",
    ),
    Mutant(
        "a tile of two classes",
        "infonce_visits.cuh",
        "if (begins_class(i)) start = i;\n    return",
        "return",
    ),
    Mutant(
        "one part of the negatives too many",
        "infonce_forward.cuh",
        "for (int64_t split = lane; split < p.splits; split += kLanes) {\n    all.shift",
        "for (int64_t split = lane; split <= p.splits; split += kLanes) {\n    all.shift",
    ),
    Mutant(
        "group barrier of too many threads",
        "engine.cuh",
        "sync_group(2, Tile::kColWarps * kWarp);",
        "sync_group(2, 2 * Tile::kColWarps * kWarp);",
    ),
    Mutant(
        "return before a barrier",
        "sort.cuh",
        "  sort_tile(keys, size);\n",
        "  if (first + threadIdx.x >= count) return;\n  sort_tile(keys, size);\n",
    ),
    Mutant(
        "shuffle under a condition",
        "infonce_visits.cuh",
        "range.low = min(range.low, shuffle_xor(range.low, lanes));",
        "if (range.high >= 0) range.low = min(range.low, shuffle_xor(range.low, lanes));",
    ),
    # mining
    Mutant(
        "negatives below the threshold take part",
        "infonce_forward.cuh",
        "if (score < bound) score = -INFINITY;",
        "",
    ),
    Mutant(
        "negatives at the threshold take no part",
        "infonce_forward.cuh",
        "if (score < bound) score = -INFINITY;",
        "if (score <= bound) score = -INFINITY;",
    ),
    Mutant(
        "threshold of the sorted place",
        "infonce_forward.cuh",
        "p.neg_min[anchors.order[engine.first_row + threadIdx.x]]",
        "p.neg_min[engine.first_row + threadIdx.x]",
    ),
    Mutant(
        "positives at the threshold take part",
        "infonce_forward.cuh",
        "positive = positive && !(score >= bound);",
        "positive = positive && !(score > bound);",
    ),
    Mutant(
        "threshold in cosines where scores are sums of planes",
        "infonce_rows.cuh",
        "cosine / *p.anchor_unscale / unscale_of_keys(p);",
        "cosine;",
    ),
    Mutant(
        "negatives' sum in the units of the keys",
        "infonce_rows.cuh",
        "if (p.negatives.data == nullptr) return unscale_of_keys(p);",
        "return unscale_of_keys(p);",
    ),
    Mutant(
        "negatives with the keys' scale",
        "mining.cu",
        "  p.score_scale = p.negative_scale;\n",
        "",
    ),
    Mutant(
        "negatives with the ranges of the keys' labels",
        "mining.cu",
        "  p.label_ranges = p.negative_ranges;\n",
        "",
    ),
    Mutant(
        "bounds of an anchor for its mirror",
        "infonce_backward.cuh",
        "if constexpr (kBounded) return takes(rows[row], score, positive);",
        "if constexpr (kBounded) return takes(columns[row], score, positive);",
    ),
    Mutant(
        "bounds read before they are copied",
        "infonce_backward.cuh",
        "cp_async_4(&to->pos_max, &from->pos_max, inside ? 4 : 0);",
        "",
    ),
    Mutant(
        "counts of a word's first bin run into the second",
        "infonce_counts.cuh",
        "int(one << place % 2 * 16)",
        "int(one << place % 2 * 8)",
    ),
    Mutant(
        "rows without a label are counted",
        "infonce_counts.cuh",
        "(max(label, -1) ^ row_label) > 0",
        "label >= 0 && label != row_label",
    ),
    Mutant(
        "counts of another anchor",
        "infonce_counts.cuh",
        "int64_t(anchors.order[engine.first_row + row]) * kScoreBins",
        "int64_t(engine.first_row + row) * kScoreBins",
    ),
    Mutant(
        "a bin rounded to the nearest edge",
        "infonce_counts.cuh",
        "int(floorf(fminf(",
        "int(rintf(fminf(",
    ),
    Mutant(
        "the last lane's label stands for its piece",
        "infonce_visits.cuh",
        "least < 0 ? ~low : low",
        "label < 0 ? ~low : low",
    ),
    # infonce: bounds, masks and places
    Mutant(
        "label read behind the last",
        "engine.cuh",
        "return place < side.count ? side.labels[place] : -1;",
        "return place <= side.count ? side.labels[place] : -1;",
    ),
    Mutant(
        "label looked at behind the last",
        "infonce_visits.cuh",
        "const int label = first + i < side.count ?",
        "const int label = first + i <= side.count ?",
    ),
    Mutant(
        "one tile too many",
        "infonce_visits.cuh",
        "piece < num_ranges_ ?",
        "piece <= num_ranges_ ?",
    ),
    Mutant(
        "one split too many",
        "infonce_backward.cuh",
        "for (int64_t split = 0; split < p.splits; ++split) sum += p.grad_parts",
        "for (int64_t split = 0; split <= p.splits; ++split) sum += p.grad_parts",
    ),
    Mutant(
        "all splits write one part",
        "infonce_backward.cuh",
        "p.grad_parts + int64_t(blockIdx.y) * keys.count * p.row_channels;",
        "p.grad_parts + int64_t(0) * keys.count * p.row_channels;",
    ),
    Mutant(
        "channels behind the last are not zero",
        "engine.cuh",
        "cp_async_16(to, inside ? from + chunk * 16 : side.rows, inside ? 16 : 0);",
        "cp_async_16(to, inside ? from + chunk * 16 : side.rows, 16);",
    ),
    Mutant(
        "rows without a label are loaded",
        "engine.cuh",
        "const bool wanted = !check_labels || label_at(side, first + row) >= 0;",
        "const bool wanted = first + row < side.count;",
    ),
    Mutant(
        "keys without a label are negatives",
        "infonce_forward.cuh",
        "if (label < 0 || label == row_label)",
        "if (label == row_label)",
    ),
    Mutant(
        "self excluded by the sorted place",
        "infonce_forward.cuh",
        "excluded = p.keys.data == nullptr ? row : p.order[row];",
        "excluded = row;",
    ),
    Mutant(
        "fragment's second half a row below",
        "engine.cuh",
        "* 16 + half * 8 + group;",
        "* 16 + half + 2 * group;",
    ),
    Mutant(
        "wide tile reads the first stage only",
        "engine.cuh",
        "const unsigned char* own_columns = column_tile(stage) + col_warp",
        "const unsigned char* own_columns = column_tile(0) + col_warp",
    ),
    Mutant("columns not transposed", "engine.cuh", "ldmatrix_x4_trans(b,", "ldmatrix_x4(b,"),
    Mutant(
        "weights read where they would lie unswizzled",
        "engine.cuh",
        "const int offset = weight_offset(row_warp * Tile::kFragments * 16 + lane % 16, lane / 16);",
        "const int offset = (row_warp * Tile::kFragments * 16 + lane % 16) * kWeightStride + lane / 16 * 16;",
    ),
    Mutant(
        "half of the sums not written",
        "engine.cuh",
        "if (quad == 0) sums[col_warp",
        "if (quad == 0 && half == 0) sums[col_warp",
    ),
    Mutant(
        "one row too many written",
        "engine.cuh",
        "if (row >= rows.count) return;",
        "if (row > rows.count) return;",
    ),
    # sorting, pools and sampling
    Mutant("keys sorted before they are there", "sort.cuh", "sync_block();  // all keys are there", ""),
    Mutant("equals of tiles before stand behind", "sort.cuh", "(key + (tile < own))", "(key + (tile > own))"),
    Mutant(
        "block's step of the sort ordered by warp",
        "sort.cuh",
        "if (max(stride, next) > kWarp) {",
        "if (max(stride, next) > 2 * kWarp) {",
    ),
    Mutant(
        "bits set before they are cleared", "pools.cuh", "sync_warp();  // before others set bits in it", ""
    ),
    Mutant("bits read before they are set", "pools.cuh", "sync_warp();  // all bits are set", ""),
    Mutant(
        "scan over sums still being read",
        "pools.cuh",
        "sync_block();  // the sums of an earlier call have been read",
        "",
    ),
    Mutant("count in a histogram not yet empty", "pools.cuh", "sync_block();  // the histogram is empty", ""),
    Mutant(
        "first padding row left out",
        "sampling.cuh",
        "for (int64_t row = rows + thread;",
        "for (int64_t row = rows + 1 + thread;",
    ),
    Mutant(
        "half of the anchors hard, whatever was asked",
        "sampling.cuh",
        "take * p.hard_share >> 24",
        "take / 2",
    ),
    # gather
    Mutant("index used unchecked", "gather.cuh", "if (!is_pixel(p, index)) {", "if (false) {"),
    Mutant("rows of no pixel written", "gather.cuh", "if (pixel < 0 || (first", "if ((first"),
    Mutant(
        "index in 32 bits",
        "pixels.cuh",
        "if (m.batch * m.height * m.width <= INT64_C(0xffffffff)) {",
        "if (true) {",
    ),
    Mutant(
        "every row that names a pixel writes it",
        "gather.cuh",
        "if (pixel < 0 || (first > 0 && p.sorted_pixels[first - 1] == pixel)) return;",
        "if (pixel < 0) return;",
    ),
    Mutant(
        "the sum ends before the last row of a pixel",
        "gather.cuh",
        "while (last < p.num_rows && p",
        "while (last + 1 < p.num_rows && p",
    ),
    # enqueue
    Mutant("stage read before it is there", "enqueue.cuh", "cp_async_wait<1>();", "cp_async_wait<2>();"),
    Mutant(
        "stage read before all have seen it",
        "enqueue.cuh",
        "sync_block();  // this stage is there, and the first time, all sums are zero",
        "",
    ),
    Mutant(
        "stage overwritten while it is read",
        "enqueue.cuh",
        "sync_block();  // nobody reads this stage any more",
        "",
    ),
    Mutant("pixels weighed before they have weights", "enqueue.cuh", "sync_block();  // and all weights", ""),
    Mutant("norms of squares not yet there", "enqueue.cuh", "sync_block();  // all squares are there", ""),
    Mutant("rows of pixels not yet there", "enqueue.cuh", "sync_block();  // sums and pixels are there", ""),
    Mutant(
        "candidates copied before they are placed",
        "enqueue.cuh",
        "sync_block();  // the warps copy other threads' candidates",
        "",
    ),
    Mutant("a candidate too few stays", "enqueue.cuh", "order >= written - slots", "order > written - slots"),
]


def verdict(done: subprocess.CompletedProcess[str]) -> str:
    """What stopped a replay, in one line."""
    for text in (done.stdout, done.stderr):
        for pattern in (
            r"^(FAILED|DIFFERS): call \d+, \w+\(.*?\), schedule (\w+):? ?(.*)$",
            r"^.*ERROR: (AddressSanitizer): ([^\n]*?) on ",
            r"^.*(runtime error): (.*)$",
            r"^WARNING: (ThreadSanitizer): (data race)",
        ):
            found = re.search(pattern, text, re.M)
            if found:
                return " ".join(found.groups())[:120]
    return f"exit status {done.returncode}"


def caught_by(root: Path, recording: Path) -> str | None:
    """The check that fails for the kernels in `root`, or None."""
    for variant in build.VARIANTS:
        folder = build.build(variant, root, root / "build")
        try:
            done = sanitize.run(variant, "tools.emulator.replay", folder, recording)
        except TimeoutError:
            return f"{variant}: does not end"
        if done.returncode:
            return f"{variant}: {verdict(done)}"
    return None


def main() -> int:
    from tools.emulator import record

    parser = argparse.ArgumentParser(
        description="Put faults into the CUDA kernels and show which check finds each."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants; all of them unless told")
    names = parser.parse_args().names
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise SystemExit(f"no mutant is called {', '.join(unknown)}")
    for variant in build.VARIANTS:
        reason = sanitize.missing(variant)
        if reason:
            raise SystemExit(reason)
        build.build(variant)
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        root, recording = Path(temporary), Path(temporary) / "calls.npz"
        record.record(recording, build.load(build.build("plain")).cuda)
        shutil.copytree(build.ROOT / "csrc", root / "csrc")
        if (reason := caught_by(root, recording)) is not None:
            raise SystemExit(f"the kernels fail as they are: {reason}")
        for mutant in MUTANTS:
            if names and mutant.name not in names:
                continue
            start, file = time.monotonic(), root / "csrc" / "cuda" / mutant.file
            original = file.read_text()
            file.write_text(mutant.apply(original))
            reason = caught_by(root, recording)
            file.write_text(original)
            survivors += reason is None
            seconds = time.monotonic() - start
            print(f"{mutant.name:45} {reason or 'SURVIVES'}  ({seconds:.0f} s)", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
