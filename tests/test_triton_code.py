"""What the compiler makes of the Triton kernels on devices that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import compiled_code
from conftest import BACKENDS

SHARED = {80: 166_912, 90: 232_448}  # bytes a block may use
SMALLEST_SHARED = 101_376  # on sm_86, sm_89 and sm_120, which run what is compiled like sm_80
ROOT = Path(__file__).parents[1]

if "triton" not in BACKENDS:
    pytest.skip("PIXCONTRAST_TEST_BACKENDS leaves triton out", allow_module_level=True)
if compiled_code.cuobjdump() is None:
    pytest.skip("cuobjdump is neither on PATH nor in an installed triton", allow_module_level=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """In a process of its own: in this one Triton interprets."""
    path = tmp_path_factory.mktemp("triton") / "found.json"
    command = [sys.executable, "tests/triton_code.py", "--json", str(path)]
    for name in ("widths", "archs"):
        wanted = os.environ.get(f"PIXCONTRAST_TEST_{name.upper()}", "").split()
        command += [f"--{name}", *wanted] if wanted else []
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def walks(kernels):
    """The kernels that multiply: those with products in a loop."""
    return [
        k
        for k in kernels
        if k["kernel"].endswith(("negatives_kernel", "positives_kernel", "bwd_keys_kernel"))
    ]


def test_nothing_spills(found):
    """Triton 3.6 keeps a value or two of collect_regions in local memory, at far fewer registers than there are."""
    archs = os.environ.get("PIXCONTRAST_TEST_ARCHS", "").split() or SHARED
    # 3 passes, 4 kinds of arithmetic, for each architecture and width
    assert len(walks(found["kernels"])) >= 12 * len(archs)
    oldest = triton.__version__.startswith("3.6.")
    spills = [k for k in found["kernels"] if k["stack"]]
    assert [
        k for k in spills if not (oldest and k["kernel"] == "collect_regions_kernel" and k["stack"] <= 16)
    ] == []


def test_shared_memory_fits(found):
    for kernel in found["kernels"]:
        assert kernel["shared"] <= SHARED[kernel["arch"]], kernel
        if kernel["arch"] == 80:
            assert kernel["shared"] <= SMALLEST_SHARED, kernel


def test_tensor_cores_are_used(found):
    for kernel in walks(found["kernels"]):
        assert kernel["wgmma"] + kernel["mma"] > 0, kernel
        if kernel["arch"] == 90 and " bf16 " in kernel["name"] and "BLOCK_D=512" not in kernel["name"]:
            assert kernel["wgmma"] > 0 and kernel["mma"] == 0, kernel
        assert kernel["cp_async"] > 0, kernel


def test_tf32_is_rounded(found):
    """Keys are, in the passes over them; rows and anchors are rounded beforehand."""
    of_keys = [k for k in found["kernels"] if "PRECISION=tf32" in k["name"] and "fwd" in k["kernel"]]
    assert of_keys
    for kernel in of_keys:
        assert kernel["cvt_rna"] > 0, kernel


def test_registers_are_those_of_the_table(found):
    version = ".".join(triton.__version__.split(".")[:2])
    path = ROOT / "tests" / f"triton-{version}.txt"
    if not path.exists():
        pytest.skip(f"there is no table for triton {version}")
    recorded = set(path.read_text().splitlines()[1:])
    new = [line for line in found["table"].splitlines()[1:] if line not in recorded]
    assert not new, "registers have changed; see what it means, then run tests/triton_code.py --update"
