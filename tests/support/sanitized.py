"""Runs tests with the CPU kernels and the emulator compiled for AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.support.sanitized pytest ARGUMENT ...
    python -m tests.support.sanitized overrun cpu|cuda

in a process that tools/emulator/sanitize.py starts. Torch is not compiled for the sanitizers, but its tensors lie in
memory that AddressSanitizer allocates, so it reports a kernel's access past the end of a tensor.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from tools.emulator.build import ROOT, SANITIZERS

BUILD = f"build/address-{sysconfig.get_config_var('SOABI')}"


def build() -> Path:
    """Brings the sanitized module up to date.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    # Compiling takes longer than the tests, so nothing is optimised, and reports need only line numbers.
    flags = shlex.join(["-O0", "-g1", *SANITIZERS["address"]])
    environment = {
        "PIXCONTRAST_CUDA": "0",
        "PIXCONTRAST_DEBUG": "1",
        "PIXCONTRAST_BUILD_DIR": BUILD,
        "CXXFLAGS": flags,
        "LDFLAGS": flags,
    }
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", f"{BUILD}/lib"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the sanitized module does not build:\n{done.stdout}{done.stderr}")
    return ROOT / BUILD / "_C.so"


def load() -> None:
    """Puts the sanitized module where the package looks for its own."""
    import torch  # noqa: F401  first, as in the package

    name = "pixcontrast_ext._C"
    spec = importlib.util.spec_from_file_location(name, ROOT / BUILD / "_C.so")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def overrun(backend: str) -> None:
    """Makes an access that must be reported: a kernel is told of one more index than there is."""
    import torch

    from pixcontrast_ext.backends import cuda, native
    from pixcontrast_ext.backends import device as devices
    from pixcontrast_ext.backends.calls import Gather
    from tools.emulated import Emulated
    from tools.emulator.build import build, load

    indices = torch.zeros(4, dtype=torch.int64)
    call = Gather(torch.zeros(1, 3, 2, 2), indices, True, torch.float32, torch.zeros(5, 3), torch.zeros(5))
    if backend == "cpu":
        native.launch("gather", call, num_rows=5, wide=torch.zeros(5, 3), threads=1)
    else:
        devices.gpu = Emulated(load(build("address")).cuda)
        cuda.launch("gather", call, num_rows=5)


if __name__ == "__main__":
    load()
    what, *arguments = sys.argv[1:]
    if what == "overrun":
        overrun(*arguments)
    else:
        import pytest

        sys.exit(pytest.main(arguments))
