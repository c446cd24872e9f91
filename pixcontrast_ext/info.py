"""`python -m pixcontrast_ext.info`: what is installed and what would serve a call."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import pixcontrast_ext
from pixcontrast_ext import backends
from pixcontrast_ext.backends import native, triton


def triton_version() -> str:
    """With that of the assembler which it calls for Hopper."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    try:
        return f"{version}, with ptxas {triton.assembler(90)}"
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"{version}, without an assembler: {error}"


def report() -> str:
    """Versions, how the native module was built, threads, devices, and the backends.

    Of each backend whether it is ready, or why not, and which of them would serve a call.
    """
    lines = [
        ("pixcontrast_ext", pixcontrast_ext.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton_version()),
    ]
    if native.unavailable:
        lines.append(("native module", native.unavailable))
    else:
        c = native._C
        lines += [
            ("native module", native.wrong_instruction_set or f"built with {c.compiler}"),
            ("CUDA architectures", c.cuda_archs or "none (CPU-only build)"),
            ("CPU instruction set", f"{c.instruction_set()} (of {', '.join(c.instruction_sets())})"),
        ]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines += [("threads", str(torch.get_num_threads())), ("CUDA devices", ", ".join(devices) or "none")]
    for name, reason in backends.available_backends().items():
        lines.append((f"backend {name}", "ready" if reason is None else f"off: {reason}"))
    lines.append(("CPU tensors go to", backends.choice("cpu")))
    lines.append(
        ("CUDA tensors go to", backends.choice("cuda") if devices else "nowhere: torch finds no CUDA device")
    )
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


if __name__ == "__main__":
    print(report())
