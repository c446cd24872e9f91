"""The machine code of the CUDA kernels, which an emulator cannot show."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.backends import native
from tests.support.backends import GPU_BACKENDS, ON_DEVICE
from tools import compiled_code, machine_model

SMALLEST_SHARED = 101376  # bytes a block may use on sm_86, sm_89 and sm_120

if native._C is None or not native._C.cuda_archs:
    pytest.skip("the module was built without CUDA kernels", allow_module_level=True)
if compiled_code.cuobjdump() is None:
    pytest.skip("cuobjdump is neither on PATH nor in an installed triton", allow_module_level=True)

MODULE = Path(native._C.__file__)
ARCHS = [name for name in native._C.cuda_archs.split() if name.startswith("sm_")]


@pytest.fixture(scope="module")
def resources():
    return compiled_code.resources(MODULE)


def test_every_kernel_is_compiled_for_every_architecture(resources):
    assert len(resources) > 30
    for name, by_arch in resources.items():
        assert sorted(by_arch) == sorted(ARCHS), name


def test_nothing_spills_and_nothing_lies_in_local_memory(resources):
    """Local memory holds nothing but a few values that are read once per tile.

    They belong to wide tiles of the negatives, and to fp32 rows of more than 256 channels, whose sums take 128
    registers. Wide tiles do not fit on some devices.
    """
    for name, by_arch in resources.items():
        for arch, used in by_arch.items():
            if "true, 4, true>" in name and arch in ("sm_86", "sm_89", "sm_120"):
                continue
            wide = (
                "negatives" in name and name.endswith("256, true, 4, true>>") and "Math<Half, 2>" not in name
            )
            most = 48 if wide else 24 if "Math<Half, 2>, 512" in name else 8 if "positives" in name else 0
            assert used.stack <= most, f"{name} uses {used.stack} bytes of local memory a thread on {arch}"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tile_kernels_use_tensor_cores_and_asynchronous_copies(arch):
    if arch not in ARCHS:
        pytest.skip(f"the module has no code for {arch}: make test ARCHS= compiles all")
    kernels = compiled_code.instructions(MODULE, arch)
    tiles = {name: count for name, count in kernels.items() if "Tile<" in name}
    counts = {name for name in tiles if "counts" in name}
    mined = {name for name in tiles if "Mined" in name}
    # For any rows: 3 passes, 3 kinds of arithmetic, 2 widths. For the usual row lengths: the forward's 2 passes.
    assert len(tiles) - len(counts) - len(mined) == 3 * 3 * 2 + 2 * (7 + 5) + 2 * 4
    # Of 256 channels alone, and a larger tile of the negatives.
    assert len(mined) == 3 * 3 * 2 + 2 * 3 + 3
    # Of negatives and positives; in shared memory, and in no more than that where it may not have room.
    assert len(counts) == 2 * (3 * 2 + 3 + 3)
    for name, count in tiles.items():
        assert count["HMMA"] >= (32 if name not in counts else 2), name
        assert count["LDGSTS"] > 0, name
        assert count["LDSM"] > 0, name
        atomics = {op for op in count if op.startswith(("ATOM", "RED"))}
        allowed = {"RED", "REDG"} if name in counts else set()  # to global memory, by either name
        if name.endswith("true>") and name in counts:
            allowed.add("ATOMS")
        assert atomics <= allowed, name


@pytest.mark.skipif("cuda" not in GPU_BACKENDS or ON_DEVICE, reason="it asks the emulated kernels")
@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize("channels", [8, 64, 200, 256, 264, 512])
def test_tiles_fit_the_smallest_device(monkeypatch, dtype, channels):
    monkeypatch.setenv("PXC_EMULATOR_SHARED", "100")
    kernels = devices.gpu.kernels
    for full_float32 in (False, True):
        how = 0, dtype, full_float32, channels
        for tile in (
            kernels.infonce_negatives_tile(*how, 1024, 190_000),
            kernels.infonce_positives_tile(*how),
            kernels.infonce_backward_tile(*how),
            kernels.mined_negatives_tile(*how),
            kernels.mined_positives_tile(*how),
            kernels.mined_backward_tile(*how),
            kernels.score_counts_tile(*how),
        ):
            assert 0 < tile.shared <= SMALLEST_SHARED


@pytest.mark.skipif("sm_90" not in ARCHS, reason="the module has no code for sm_90")
def test_the_model_of_the_machine_bounds_what_was_measured():
    """On an H100, bf16 rows of 256 channels took 609 us, and its counters showed 734,000 shared memory cycles."""
    bounds = {bound.kernel: bound for bound in machine_model.bounds(MODULE, "sm_90")}
    assert len(bounds) == 3 * 3 * 2 + 2 * (7 + 5) + 2 * 4
    for bound in bounds.values():
        assert bound.line().startswith("predicted")
        assert f"bound by {bound.binding}," in bound.line()
        assert bound.cycles[bound.binding] == max(bound.cycles.values())
        if bound.tile.whole and bound.tile.channels == 256:
            # Read from the code: the tile's products, its fragments, copies and weights, and little more.
            assert bound.latency is not None, bound.kernel
            assert bound.cycles["issue slots"] > 0, bound.kernel
            assert 1 < bound.cycles["shared memory"] / bound.tile.wavefronts < 1.25, bound.kernel
    bound = bounds["infonce_fwd_negatives_kernel<Tile<Math<BFloat16, 1>, 256, true, 2, false>>"]
    assert bound.binding == "shared memory"
    assert 0.5 * 609 < bound.microseconds < 609
    tiles = 16 * 190_000 / 64 / 132
    assert bound.cycles["shared memory"] * tiles == pytest.approx(734_000, rel=0.1)


def test_registers_are_those_of_the_table():
    compiler = native._C.compiler.rpartition(", ")[2]
    recorded = compiled_code.TABLE.read_text()
    if f"as {compiler} compiles" not in recorded:
        pytest.skip(f"the table is of another compiler: {recorded.splitlines()[0]}; this is {compiler}")
    found, table = (
        compiled_code.registers(text) for text in (compiled_code.table(MODULE, compiler), recorded)
    )
    assert found == {name: {arch: by_arch[arch] for arch in ARCHS} for name, by_arch in table.items()}, (
        "registers have changed; see what it means, then build for all architectures and run\n"
        "python -m tools.compiled_code --update"
    )
