"""Runs a module of this repository under the sanitizer of a variant; Python itself is not compiled for any."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys

from tools import processes
from tools.emulator.build import ROOT, compiler

_RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}

_OPTIONS = {
    # Python does not free all, and leaves what it calls from C without a frame.
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
    "OPENBLAS_NUM_THREADS": "1",
}


def _library(name: str) -> str | None:
    found = subprocess.run(
        [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    return found if os.path.isabs(found) else None


@functools.cache
def missing(variant: str) -> str | None:
    """Why a variant cannot be run here, or None."""
    runtime = _RUNTIMES.get(variant)
    if runtime is None or _library(runtime):
        return None
    return f"the compiler has no {runtime}"


@functools.cache
def _prefix() -> list[str]:
    """ThreadSanitizer wants memory where it expects it; some kernels spread addresses wider than it knows."""
    fixed = ["setarch", "-R"]
    works = shutil.which("setarch") and subprocess.run([*fixed, "true"], capture_output=True).returncode == 0
    return fixed if works else []


def run(variant: str, module: str, *arguments: object, **options: str) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments ...`; `options` are environment variables."""
    environment = {**os.environ, **_OPTIONS, "PYTHONPATH": str(ROOT), **options}
    if variant in _RUNTIMES:
        # The C++ library as well: its exceptions are caught by the sanitizer, which looks for it at the start.
        environment["LD_PRELOAD"] = f"{_library(_RUNTIMES[variant])} {_library('libstdc++.so.6')}"
    return processes.run([*_prefix(), sys.executable, "-m", module, *arguments], env=environment)
