"""Builds the emulator: the CUDA kernels as plain C++, for tests and tools only.

    python -m tools.emulator.build [VARIANT ...]

`_C.so` is the project's module with only the kernels of csrc/cuda/; `primitives.so` has those of
csrc/emulator/primitives.cu and is called through ctypes. There are three variants: `plain`, `address`
(AddressSanitizer and UndefinedBehaviorSanitizer) and `thread` (ThreadSanitizer). Ninja compiles what has changed.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

# AddressSanitizer already detects accesses through a null pointer and past the end of an object; checking them twice
# would cost a tenth of the compile time.
SANITIZERS = {
    "plain": [],
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ],
    "thread": ["-fsanitize=thread"],
}
VARIANTS = tuple(SANITIZERS)
# Nothing is optimised where compiling takes longer than everything that is run.
OPTIMIZE = {"plain": "-O2", "address": "-O0", "thread": "-O1"}

# With contraction the variants would give different bits.
FLAGS = [
    "-std=c++20",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Icsrc",
    "-DPXC_HAVE_CUDA=1",
]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def _statements(root: Path, build_dir: str) -> list[str]:
    import pybind11

    # The real path, so that environments which share pybind11 through links also share the objects.
    of_pybind11 = os.path.realpath(pybind11.get_include())
    python = [f"-isystem{path}" for path in (of_pybind11, sysconfig.get_path("include"))]
    lines = []

    def compile_to(target: str, source: str, flags: list[str]) -> str:
        lines.append(f"build {build_dir}/{target}: compile {source}")
        lines.append(f"  flags = {shlex.join(flags)}")
        return f"{build_dir}/{target}"

    # Neither contains a kernel's memory accesses, so they serve all variants.
    emulator = compile_to("emulator.o", "csrc/emulator/emulator.cpp", ["-O3"])
    bindings = [
        compile_to(f"{Path(source).stem}.o", source, ["-O0", *python])
        for source in ("csrc/cuda/bindings.cpp", "csrc/emulator/module.cpp")
    ]
    kernels = [path.relative_to(root).as_posix() for path in sorted(root.glob("csrc/cuda/*.cu"))]
    for variant, sanitizer in SANITIZERS.items():
        flags = [OPTIMIZE[variant], *sanitizer, "-x", "c++"]
        objects = [compile_to(f"{variant}/{Path(source).stem}.o", source, flags) for source in kernels]
        primitives = compile_to(f"{variant}/primitives.o", "csrc/emulator/primitives.cu", flags)
        # The emulator comes first, so that the linker takes its copy of an inline function that both have.
        for name, parts in (("_C", [*bindings, *objects]), ("primitives", [primitives])):
            lines.append(f"build {build_dir}/{variant}/{name}.so: link {emulator} {' '.join(parts)}")
            lines.append(f"  flags = {shlex.join(sanitizer)}")
    return lines


def build(
    variant: str, source_root: Path = ROOT, build_dir: Path | None = None, targets: tuple[str, ...] = ("_C",)
) -> Path:
    """Brings `_C.so` of a variant, or other targets ("primitives"), up to date and returns their folder.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    import ninja

    if variant not in VARIANTS:
        raise ValueError(f"expected one of {', '.join(VARIANTS)}, got {variant!r}")
    build_dir = build_dir or source_root / "build" / f"emulator-{sysconfig.get_config_var('SOABI')}"
    build_dir.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(build_dir, source_root)
    lines = [
        f"builddir = {relative}",
        "rule compile",
        f"  command = {shlex.join(compiler())} {shlex.join(FLAGS)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join(compiler())} -shared $flags $in -o $out",
        *_statements(source_root, relative),
    ]
    text, file = "\n".join(lines) + "\n", build_dir / "build.ninja"
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(file)]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    command += [f"{relative}/{variant}/{target}.so" for target in targets]
    # One at a time: two runs of the tests that begin together would compile everything twice, into the same files.
    with open(build_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        done = subprocess.run(command, cwd=source_root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulator does not build ({variant}):\n{done.stdout}{done.stderr}")
    return build_dir / variant


def load(path: Path) -> ModuleType:
    """The module `_C` of a built variant."""
    spec = importlib.util.spec_from_file_location("_C", path / "_C.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    for name in sys.argv[1:] or VARIANTS:
        print(build(name, targets=("_C", "primitives")))
