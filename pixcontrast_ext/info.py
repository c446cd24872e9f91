"""`python -m pixcontrast_ext.info`: what is installed and what would serve a call."""

from __future__ import annotations

import platform

import torch

import pixcontrast_ext
from pixcontrast_ext import backends
from pixcontrast_ext.backends import native


def report() -> str:
    """Versions, how the native module was built, threads, devices, and for each backend ready or why not."""
    lines = [
        ("pixcontrast_ext", pixcontrast_ext.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    if native.unavailable:
        lines.append(("native module", native.unavailable))
    else:
        c = native._C
        lines += [
            ("native module", f"built with {c.compiler}"),
            ("CUDA architectures", c.cuda_archs or "none (CPU-only build)"),
            ("CPU instruction set", f"{c.instruction_set()} (of {', '.join(c.instruction_sets())})"),
        ]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines += [("threads", str(torch.get_num_threads())), ("CUDA devices", ", ".join(devices) or "none")]
    for name, reason in backends.available_backends().items():
        lines.append((f"backend {name}", "ready" if reason is None else f"off: {reason}"))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


if __name__ == "__main__":
    print(report())
