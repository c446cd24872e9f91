"""Reads the machine code of the CUDA kernels out of the compiled module: registers, stack, instructions.

    python -m tools.compiled_code            print the table of registers
    python -m tools.compiled_code --update   write it to expected/registers.txt

A change to a kernel that changes its registers must also update the table, so that nobody loses occupancy unnoticed.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PASSES = ("negatives", "positives", "backward")  # the values of the kernels' enum
TABLE = Path(__file__).parent / "expected" / "registers.txt"


@dataclass
class Resources:
    registers: int
    stack: int  # bytes of local memory per thread, including spilled registers
    shared: int  # static, bytes per block


def cuobjdump() -> str | None:
    """The path of the toolkit's disassembler, or of the one in the triton package."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(path) if path and path.exists() else None


def _run(*arguments: str) -> str:
    tool = cuobjdump()
    assert tool is not None
    # cuobjdump searches PATH for nvdisasm.
    path = f"{Path(tool).parent}:/usr/bin:/bin"
    return subprocess.run(
        [tool, *arguments], env={"PATH": path}, capture_output=True, text=True, check=True
    ).stdout


def _names(text: str) -> str:
    """The text with names demangled, without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    return re.sub(r"pxc::(cuda::)?|\(anonymous namespace\)::|^void ", "", done)


def kernel_name(demangled: str) -> str:
    """Without its parameters; of tiles without the plain InfoNCE's struct, where that of mining stays."""
    named = re.sub(r"\(Pass\)(\d)", lambda found: PASSES[int(found[1])], demangled)
    name = re.sub(r"^void |\(.*$", "", named).replace("> >", ">>").strip()
    return re.sub(r"(?<=>), Infonce(Forward|Backward)Params>$", ">", name)


def resources(module: Path) -> dict[str, dict[str, Resources]]:
    """The resources by kernel and architecture ("sm_80")."""
    kernels: dict[str, dict[str, Resources]] = collections.defaultdict(dict)
    arch, name = "", ""
    for line in _names(_run("-res-usage", str(module))).splitlines():
        if found := re.match(r"\s*arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (.*):\s*$", line):
            name = kernel_name(found[1])
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            kernels[name][arch] = Resources(registers, stack + local, shared)
    return dict(kernels)


@functools.cache
def disassembly(module: Path, arch: str) -> str:
    return _names(_run("-sass", "-arch", arch, str(module)))


def instructions(module: Path, arch: str) -> dict[str, collections.Counter[str]]:
    """How often each instruction, without its modifiers, occurs in each kernel."""
    kernels: dict[str, collections.Counter[str]] = {}
    counter: collections.Counter[str] = collections.Counter()
    for line in disassembly(module, arch).splitlines():
        if found := re.match(r"\s*Function : (.*)$", line):
            counter = kernels.setdefault(kernel_name(found[1]), collections.Counter())
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)", line):
            counter[found[1]] += 1
    return kernels


def table(module: Path, compiler: str) -> str:
    kernels = resources(module)
    archs = sorted({arch for by_arch in kernels.values() for arch in by_arch}, key=lambda arch: int(arch[3:]))
    lines = [
        f"# Registers a thread, as {compiler} compiles the kernels; written by tools.compiled_code --update"
    ]
    width = max(len(name) for name in kernels)
    lines.append(f"{'kernel':<{width}}  " + "  ".join(f"{arch:>6}" for arch in archs))
    for name in sorted(kernels):
        counts = (str(kernels[name][arch].registers) if arch in kernels[name] else "-" for arch in archs)
        lines.append(f"{name:<{width}}  " + "  ".join(f"{count:>6}" for count in counts))
    return "\n".join(lines) + "\n"


def registers(text: str) -> dict[str, dict[str, str]]:
    """The registers in a table, by kernel and architecture."""
    _, header, *rows = text.splitlines()
    archs = header.split()[1:]
    cells = [row.rsplit(None, len(archs)) for row in rows]
    return {name.strip(): dict(zip(archs, counts, strict=True)) for name, *counts in cells}


if __name__ == "__main__":
    from pixcontrast_ext.backends import native

    text = table(Path(native._C.__file__), native._C.compiler.rpartition(", ")[2])
    if "--update" in sys.argv[1:]:
        TABLE.write_text(text)
    print(text, end="")
