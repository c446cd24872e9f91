"""The CPU kernels, and the GPU kernels in the emulator, under AddressSanitizer and UndefinedBehaviorSanitizer.

test_emulator.py runs the emulated kernels under them without torch. Here torch calls the kernels, with all the
arguments of test_ops.py and on ragged problems.
"""

from __future__ import annotations

import pytest

from tests.support import sanitized
from tests.support.backends import BACKENDS, ON_DEVICE
from tools.emulator import build, sanitize

SANITIZED = [name for name in ("cpu", "cuda") if name in BACKENDS]
# The tests of single ops whose sizes are not a multiple of anything.
RAGGED = "rules_say or rows_and_gradient or layouts_and_dtypes or beyond_the_end"
FILES = [f"tests/test_{name}.py" for name in ("sampling", "gather", "enqueue")]


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    if ON_DEVICE:
        pytest.skip("the kernels run on a device")
    if reason := sanitize.missing("address"):
        pytest.skip(reason)
    sanitized.build()
    if "cuda" in SANITIZED:
        build.build("address")


@pytest.mark.parametrize("backend", SANITIZED)
def test_an_overrun_is_reported(backend):
    done = sanitize.run("address", "tests.support.sanitized", "overrun", backend)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "gather" in done.stderr


def check(backend: str, *arguments: str, share: int = 1) -> None:
    options = dict(
        PIXCONTRAST_TEST_BACKENDS=backend,
        PIXCONTRAST_TEST_EMULATOR="address",
        PIXCONTRAST_TEST_SHARE=str(share),
    )
    done = sanitize.run(
        "address", "tests.support.sanitized", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **options
    )
    output = done.stdout[-3000:] + done.stderr[-6000:]
    assert done.returncode == 0, output
    assert " passed" in done.stdout, output


@pytest.mark.parametrize("backend", SANITIZED)
def test_any_arguments(backend):
    """One in eight of the calls that can reach a kernel."""
    wanted = "(test_ops or opcheck) and not strangers"
    if backend == "cuda":
        wanted += " and not instruction_set"
    check(backend, "tests/test_ops.py", "tests/test_compile.py", "-k", wanted, share=8)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cpu out")
def test_ragged_problems():
    """For the CPU only: test_emulator.py replays such problems for the emulated kernels."""
    check("cpu", *FILES, "-k", f"not reference and ({RAGGED})")
