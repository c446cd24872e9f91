"""How exact products of fp32 rows are to be, by torch's settings."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch


def full_float32(dtype: torch.dtype) -> bool:
    """Whether fp32 rows are to keep fp32's accuracy. Both of torch's ways to allow TF32 end in this setting."""
    setting = torch.backends.cuda.matmul
    if not hasattr(setting, "fp32_precision"):  # torch before 2.9
        return dtype == torch.float32 and not setting.allow_tf32
    return dtype == torch.float32 and setting.fp32_precision != "tf32"


@contextlib.contextmanager
def full_float32_products() -> Iterator[None]:
    """`torch.set_float32_matmul_precision("medium")` allows bf16 products on a CPU, too coarse for logits."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if setting is None:  # torch before 2.9: one setting for all devices
        full, before, put = (
            "highest",
            torch.get_float32_matmul_precision(),
            torch.set_float32_matmul_precision,
        )
    else:
        full, before = "ieee", setting.fp32_precision
        put = functools.partial(setattr, setting, "fp32_precision")
    if before in ("none", full):
        yield
        return
    # A setting that is "none" reads as the one above it: put back as that, it would no longer follow it. One that was
    # set to the same cannot be told apart, and follows it from here on.
    inherits = setting is not None and before == torch.backends.mkldnn.fp32_precision
    put(full)
    try:
        yield
    finally:
        put("none" if inherits else before)
