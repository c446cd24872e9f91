"""What an op takes: shapes, dtypes and ranges of its arguments, declared once and checked at every call.

Anybody can call `torch.ops.pixcontrast.*`, and kernels get raw pointers. So all that a kernel counts on is checked
here, in the op and in its fake alike, as far as it is known without a look at the data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SUMS = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in FLOATING}

Limits = tuple[int, int | str | None]


class Demand(NamedTuple):
    """What decides whether a backend can serve a call."""

    device: torch.device
    dtype: torch.dtype | None  # of what is floating point; fp64 if any of it is, which few backends know
    channels: int | None  # the size D


class _Tensor(NamedTuple):
    position: int
    name: str
    sizes: tuple[str, ...]
    dtype: torch.dtype | str  # a str is a name, or "sum(name)"
    written: bool
    strided: bool  # handed on with the strides that it has


class Signature:
    """The arguments of an op.

    Args:
        schema: as torch takes it. A tensor that it marks as written has to be contiguous and to share no memory with
            another, a float to be positive and finite, a ScalarType floating point.
        tensors: shape and dtype of each, like "[B, H, W] int64". Sizes of one name are equal; the tensor that comes
            first says what they are. "T" is a floating-point dtype, the same wherever it stands, and "sum(T)" the one
            that sums of it are kept in. Kernels get all of them contiguous but for those that end in "strided".
        limits: least and greatest value of an integer, a size, or a product of them ("B * num_classes"). The
            greatest may be the name of a size; None is no limit.
    """

    def __init__(self, schema: str, tensors: dict[str, str], limits: dict[str, Limits]) -> None:
        self.op = schema[: schema.index("(")]
        arguments = re.findall(r"(\w+)(\(\w!\))? (\w+)(?=[,)])", schema[: schema.index("->")])
        self.names = [name for _, _, name in arguments][:-1]  # without the backend's
        positions = {name: i for i, (_, _, name) in enumerate(arguments)}

        def of_kind(wanted: str) -> list[tuple[str, int]]:
            return [(name, positions[name]) for kind, _, name in arguments if kind == wanted]

        assert set(tensors) == {name for name, _ in of_kind("Tensor")}, f"{self.op}: a tensor is not declared"
        self._tensors = []
        for name, text in tensors.items():
            sizes, kind = text.removeprefix("[").split("] ")
            dtype, *strided = kind.split(" ")
            written = arguments[positions[name]][1] != ""
            dtype_or_name = getattr(torch, dtype, dtype)
            names = tuple(sizes.split(", "))
            self._tensors.append(
                _Tensor(positions[name], name, names, dtype_or_name, written, strided == ["strided"])
            )
        self.contiguous = [tensor.name for tensor in self._tensors if not tensor.strided]
        self.writes = any(tensor.written for tensor in self._tensors)
        self._integers = of_kind("int") + of_kind("SymInt")
        self._floats, self._dtypes = of_kind("float"), of_kind("ScalarType")
        self._limits = [(text, text.split(" * "), *bounds) for text, bounds in limits.items()]

    def check(self, args: Sequence[Any]) -> Demand:
        """Raise TypeError or ValueError, with what was expected and what came, unless the arguments are right.

        Sizes may be symbolic: they are compared, and nothing else.
        """
        device: Any = None
        numbers: dict[str, int] = {}
        for name, position in self._integers:
            numbers[name] = args[position]
        dtypes: dict[str, torch.dtype] = {}
        for position, name, sizes, dtype, written, _ in self._tensors:
            tensor = args[position]
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_nested:
                found = "nothing" if tensor is None else "a sparse or nested one"
                self._refuse(name, "be a dense tensor", found, TypeError)
            if isinstance(dtype, str) and dtype.isalpha() and tensor.dtype in FLOATING:
                dtype = dtypes.setdefault(dtype, tensor.dtype)
            if tensor.dtype is not dtype:
                self._check_dtype(name, dtype, tensor.dtype, dtypes)
            if device is None:
                device = tensor.device
            if tensor.device != device:
                self._refuse(name, f"be on {device}", tensor.device)
            shape = tensor.shape
            if len(shape) != len(sizes):
                self._refuse_shape(name, args)
            for size_name, size in zip(sizes, shape, strict=True):
                if numbers.setdefault(size_name, size) != size:
                    self._refuse_shape(name, args)
            if written and not tensor.is_contiguous():
                self._refuse(name, "be contiguous", f"strides {tensor.stride()}")
        for name, position in self._dtypes:
            self._check_dtype(name, name, args[position], dtypes)
        for name, position in self._floats:
            if not 0 < args[position] < math.inf:
                self._refuse(name, "be positive and finite", args[position])
        for text, factors, least, most in self._limits:
            number = 1
            for factor in factors:
                number *= numbers[factor]
            if number < least:
                self._refuse(text, f"be at least {least}", number)
            if isinstance(most, str):
                most = numbers[most]
            if most is not None and number > most:
                self._refuse(text, f"be at most {most}", number)
        some_dtype = next(iter(dtypes.values()), None)
        widest = torch.float64 if torch.float64 in dtypes.values() else some_dtype
        return Demand(device, widest, numbers.get("D"))

    def _check_dtype(
        self, name: str, expected: torch.dtype | str, dtype: torch.dtype, dtypes: dict[str, torch.dtype]
    ) -> None:
        """`dtypes` are those that names stand for so far; a new name stands for `dtype` from now on."""
        if isinstance(expected, str):
            if dtype not in FLOATING:
                self._refuse(name, "be fp32, fp16, bf16 or fp64", dtype, TypeError)
            if expected.startswith("sum("):
                expected = _SUMS[dtypes[expected[4:-1]]]
            else:
                expected = dtypes.setdefault(expected, dtype)
        if dtype != expected:
            self._refuse(name, f"be {expected}", dtype, TypeError)

    def check_memory(self, args: Sequence[Any]) -> None:
        """Raise ValueError if a tensor that the op writes shares memory with another. A fake has none to share."""
        end, last = 0, self._tensors[0]
        for start, stop, i in sorted(self._spans(args)):
            tensor = self._tensors[i]
            if start < end and (tensor.written or last.written):
                self._refuse(tensor.name, f"share no memory with {last.name}", "two views of it")
            if stop > end:
                end, last = stop, tensor

    def _spans(self, args: Sequence[Any]) -> list[tuple[int, int, int]]:
        """Where the memory of each tensor begins and ends, and which tensor it is; of those that have some."""
        spans = []
        for i, declared in enumerate(self._tensors):
            tensor: Tensor = args[declared.position]
            size = tensor.nbytes
            if size == 0:
                continue
            if not tensor.is_contiguous():
                steps = [(n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)]
                size = (sum(steps) + 1) * tensor.element_size()
            start = tensor.data_ptr()
            spans.append((start, start + size, i))
        return spans

    def _refuse_shape(self, name: str, args: Sequence[Any]) -> NoReturn:
        known: dict[str, int] = {}
        for tensor in self._tensors:
            shape = args[tensor.position].shape
            if tensor.name == name:
                break
            known.update(zip(tensor.sizes, shape, strict=True))
        expected = f"have shape [{', '.join(tensor.sizes)}]"
        if known.keys() & set(tensor.sizes):
            expected += f" = [{', '.join(str(known.get(size, size)) for size in tensor.sizes)}]"
        self._refuse(name, expected, list(shape))

    def _refuse(
        self, name: str, expected: str, found: object, error: type[Exception] = ValueError
    ) -> NoReturn:
        raise error(f"pixcontrast::{self.op}: {name} must {expected}, got {found}")
