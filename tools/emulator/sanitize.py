"""Runs a module of this repository under a variant's sanitizer; Python itself is not compiled for one."""

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
    # No leak detection: Python does not free everything, and what it calls from C has no frame in a report.
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
    """The reason why a variant cannot run here, or None."""
    runtime = _RUNTIMES.get(variant)
    if runtime is None or _library(runtime):
        return None
    return f"the compiler has no {runtime}"


@functools.cache
def _prefix() -> list[str]:
    """ThreadSanitizer expects memory at known addresses, and some kernels randomise addresses more than it allows."""
    fixed = ["setarch", "-R"]
    works = shutil.which("setarch") and subprocess.run([*fixed, "true"], capture_output=True).returncode == 0
    return fixed if works else []


def run(variant: str, module: str, *arguments: object, **options: str) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments ...`; `options` are environment variables."""
    environment = {**os.environ, **_OPTIONS, "PYTHONPATH": str(ROOT), **options}
    if variant in _RUNTIMES:
        # The C++ library too: the sanitizer intercepts its exceptions and looks it up at the start.
        environment["LD_PRELOAD"] = f"{_library(_RUNTIMES[variant])} {_library('libstdc++.so.6')}"
    return processes.run([*_prefix(), sys.executable, "-m", module, *arguments], env=environment)
