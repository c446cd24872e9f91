"""The machine code of the Triton kernels, for devices that this machine need not have."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from pixcontrast_ext.backends.triton.infonce import tiles
from tests.support.backends import BACKENDS
from tools import compiled_code, triton_code

SHARED = {80: 166_912, 90: 232_448}  # bytes a block may use
SMALLEST_SHARED = 101_376  # on sm_86, sm_89 and sm_120, whose kernels are configured like those of sm_80
ROOT = Path(__file__).parents[1]
NEWEST = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)

if "triton" not in BACKENDS:
    pytest.skip("PIXCONTRAST_TEST_BACKENDS leaves triton out", allow_module_level=True)
if compiled_code.cuobjdump() is None:
    pytest.skip("cuobjdump is neither on PATH nor in an installed triton", allow_module_level=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the compiler makes of the kernels, in a process of its own, since Triton interprets in this one."""
    path = tmp_path_factory.mktemp("triton") / "found.json"
    command = [sys.executable, "-m", "tools.triton_code", "--json", str(path)]
    for name in ("widths", "archs"):
        wanted = os.environ.get(f"PIXCONTRAST_TEST_{name.upper()}", "").split()
        command += [f"--{name}", *wanted] if wanted else []
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def walks(kernels):
    """The kernels of InfoNCE that have loops with products."""
    return [kernel for kernel in kernels if kernel["loops"] and kernel["kernel"].startswith("infonce")]


def test_everything_that_multiplies_was_compiled(found):
    """Every kernel with products, for each architecture, width and kind of arithmetic; odd and smallest rows apart.

    Of one width fp16 and tf32 are left out, mining in fp32, and the forward without a gradient.

    The kernels are two of the shift; the negatives and the positives with and without a gradient, and the backward with
    and without the mirror, each of all pairs and mined; and the counts of either kind.
    """
    archs = os.environ.get("PIXCONTRAST_TEST_ARCHS", "").split() or SHARED
    widths = os.environ.get("PIXCONTRAST_TEST_WIDTHS", "").split() or triton_code.WIDTHS
    passes, kinds, mined_kinds = (6, 2, 1) if len(widths) == 1 else (8, 4, 4)
    whole = [kernel for kernel in walks(found["kernels"]) if not kernel["odd"]]
    assert len(whole) >= passes * (kinds + mined_kinds) * len(archs) * len(widths)
    assert {planes_of(kernel) for kernel in whole} == {1, 2}
    if len(widths) == 1:
        assert sum(planes_of(kernel) == 2 for kernel in whole) == passes * len(archs)


def channels_of(kernel):
    return int(re.search(r"channels=(\d+)", kernel["name"])[1])


def planes_of(kernel):
    return int(re.search(r"planes=(\d)", kernel["name"])[1])


def tile_of(kernel):
    named = dict(shift="negatives", negatives="negatives", positives="positives", keys="backward")
    of_width = tiles.TILES[kernel["arch"] // 10, planes_of(kernel)][channels_of(kernel)]
    return getattr(of_width, next(tile for name, tile in named.items() if name in kernel["kernel"]))


# Most loads from local memory in a walk of two planes, by architecture, kernel, and widest rows. They are for outputs
# that do not fit registers; on an H100 the alternative, to multiply the scores again, takes longer.
SPILLED = {
    80: dict(negatives={128: 0, 512: 10}, keys={128: 0, 256: 2 if NEWEST else 8, 512: 12}),
    90: dict(
        negatives={128: 0, 256: 30, 512: 170}, keys={128: 0, 256: 60, 512: 200}, positives={128: 0, 256: 140}
    ),
}
# What mined walks may load besides, by planes: they keep two numbers more of each row, and the two-sided backward four.
SPILLED_MINED = {1: 6, 2: 25 if NEWEST else 50}
# A count of two planes has nothing copied ahead on sm_80, where shared memory has no room, and so holds whole rows.
SPILLED_COUNTS = {80: {512: 50}, 90: {}}


def test_walks_spill_where_it_was_chosen(found):
    """Code around a walk may spill, since it runs once."""
    for kernel in walks(found["kernels"]):
        name = re.search("negatives|keys|positives|shift", kernel["kernel"])[0]
        planes = planes_of(kernel)
        chosen = SPILLED[kernel["arch"]].get(name, {}) if planes == 2 else {}
        most = next((most for width, most in chosen.items() if channels_of(kernel) <= width), 0)
        most += SPILLED_MINED[planes] if "MINED=True" in kernel["name"] else 0
        if "counts" in kernel["kernel"]:
            most = SPILLED_COUNTS[kernel["arch"]].get(channels_of(kernel), 0) if planes == 2 else 0
        assert kernel["odd"] or all(loop["local"] <= most for loop in kernel["loops"]), kernel
    for kernel in found["kernels"]:
        assert kernel["stack"] == 0 or kernel["loops"] or kernel["stack"] <= 16, kernel


def test_shared_memory_fits(found):
    for kernel in found["kernels"]:
        assert kernel["shared"] <= SHARED[kernel["arch"]], kernel
        if kernel["arch"] == 80:
            assert kernel["shared"] <= SMALLEST_SHARED, kernel


def test_a_multiprocessor_holds_as_many_programs_as_the_tiles_say(found):
    """65,536 registers, which warps take in units of 256; each block takes 1 KB of shared memory besides its own.

    Not of those that count, which wait for memory however many there are.
    """
    for kernel in walks(found["kernels"]):
        if kernel["odd"] or "counts" in kernel["kernel"]:
            continue
        tile = tile_of(kernel)
        threads = 32 * int(re.search(r" w(\d+) ", kernel["name"])[1])
        assert -(-kernel["registers"] // 8) * 8 * threads * tile.resident <= 65_536, kernel
        room = {80: 167_936, 90: 233_472}[kernel["arch"]]
        assert (kernel["shared"] + 1024) * tile.resident <= room, kernel


def test_tensor_cores_work_while_tiles_are_copied(found):
    """Products run in groups while the next tile of columns is being copied, and no two warps do the same work.

    The exception is a tile of two planes with a single stage: nothing is copied ahead of it.
    """
    for kernel in walks(found["kernels"]):
        if kernel["odd"]:
            continue  # rows of odd width or start are copied a few bytes at a time
        hopper = kernel["arch"] == 90
        stages = tile_of(kernel).num_stages
        assert stages >= 3 or "planes=2" in kernel["name"]  # two planes leave no room for more
        if "counts" in kernel["kernel"]:
            stages = max(1, stages - 1)
        # On Hopper products are still in flight when the next ones begin, so they hold one more buffer.
        assert kernel["buffers"] >= (stages - (not hopper) if stages > 1 else 0), kernel
        assert not kernel["replicated"], kernel
        for loop in kernel["loops"]:
            if hopper:
                # One by one, both would be equal. A chunk of 64 channels, or 32 columns, has only two to four products.
                least = 3 if "channels=64" in kernel["name"] and "planes=2" in kernel["name"] else 4
                assert 0 < least * loop["begun"] <= loop["products"], kernel
            # Walks of scores only, and of two planes, wait at once; with three buffers two copies are in flight.
            waits = any(x in kernel["name"] for x in ("planes=2", "WITH_GRAD=False", "shift", "counts"))
            assert loop["ahead"] or waits, kernel
            # Labels and the like. Triton 3.6 copies a column's labels once for each thread that uses them.
            kinds = (6 if NEWEST else 5) + 2 * ("MINED=True" in kernel["name"])
            narrow = kinds if NEWEST else kinds * tile_of(kernel).columns // 4
            assert loop["narrow"] <= narrow, kernel


def test_no_product_in_flight_loses_its_input(found):
    """Assemblers before CUDA 13.3 are known to overwrite registers that a wgmma still reads."""
    for kernel in walks(found["kernels"]):
        assert not any(loop["overwritten"] for loop in kernel["loops"]), kernel


def test_sums_of_regions_are_of_rounded_pixels(tmp_path):
    """Opposite pixels add up to 0. Of one or two channels the squares are not fused either, so nothing is."""
    script = """
from tools import triton_code
for job in triton_code.smallest_jobs(90, whole=False):
    if job.kernel == "collect_regions_kernel":
        print(triton_code.compile_job(job).fused)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["0"] * 4, done.stderr[-3000:]


def test_registers_are_those_of_the_table(found):
    path = triton_code.table_path()
    if not path.exists():
        pytest.skip(f"there is no {path.name}")
    (header, *recorded), (ours, *lines) = (text.splitlines() for text in (path.read_text(), found["table"]))
    if header.split("--update")[1] != ours.split("--update")[1]:
        pytest.skip(f"the table is that of{header.split('--update')[1]}")
    new, gone = set(lines) - set(recorded), set(recorded) - set(lines)
    assert not new, "registers have changed; see what it means, then write the table anew"
    assert not gone, "these are no longer compiled"
