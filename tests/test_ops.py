"""`torch.ops.pixcontrast.*` called with any arguments: an error or a right result, on every backend.

An error is a ValueError, a TypeError or a RuntimeError. Anything else fails the test, above all a result for sizes that
do not fit. A tensor that is too small owns no more memory than its size, so that AddressSanitizer sees a read past its
end (test_sanitizers.py).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pixcontrast_ext import MemoryBank, PixelContrastLoss
from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.ops.class_counts import count_classes, count_per_image
from tests.support.backends import GPU_BACKENDS
from tests.support.op_cases import SIZES, cases

Arguments = dict[str, Any]

ERRORS = (ValueError, TypeError, RuntimeError)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
EXTREMES = [-(2**63), -1, 0, 1, 2**31, 2**62, 2**63 - 1]
valid_cases = functools.cache(cases)


def schema_of(op: str) -> list[Any]:
    return getattr(torch.ops.pixcontrast, op).default._schema.arguments


def arguments_of(kind: str) -> list[tuple[str, str]]:
    """(op, argument) for every argument of a type."""
    return [(op, a.name) for op in SIZES for a in schema_of(op) if str(a.real_type) == kind]


def written(op: str) -> list[str]:
    return [a.name for a in schema_of(op) if a.alias_info is not None and a.alias_info.is_write]


def valid(op: str, backend: str) -> Arguments:
    """Arguments by name, with fresh copies of those the op writes."""
    values = (v.clone() if isinstance(v, Tensor) else v for v in valid_cases("reference")[op])
    return dict(zip([a.name for a in schema_of(op)], values, strict=True)) | {"backend": backend}


def run(op: str, arguments: Arguments) -> list[Tensor]:
    """The op's results: the tensors that it returns and those that it writes into."""
    outputs = getattr(torch.ops.pixcontrast, op)(*arguments.values())
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [*(t for t in outputs if t is not None), *(arguments[name] for name in written(op))]


def assert_refused(op: str, arguments: Arguments, *wanted: str) -> None:
    """The op's error contains the `wanted` texts, and the op has written nothing."""
    before = {name: arguments[name].clone() for name in written(op) if isinstance(arguments[name], Tensor)}
    with pytest.raises(ERRORS) as caught:
        run(op, arguments)
    assert all(text in str(caught.value) for text in wanted), caught.value
    for name, value in before.items():
        if value.layout is torch.strided and value.device.type == "cpu" and not value.is_nested:
            assert torch.equal(arguments[name], value), f"{name} was written"


def outcome(op: str, arguments: Arguments) -> list[Tensor] | Exception:
    try:
        return run(op, {k: v.clone() if k in written(op) else v for k, v in arguments.items()})
    except ERRORS as error:
        return error


def assert_error_or_right(op: str, arguments: Arguments) -> bool:
    """Whether there is a result, which must then be that of the reference."""
    found = outcome(op, arguments)
    if isinstance(found, Exception):
        return False
    expected = outcome(op, arguments | {"backend": "reference"})
    if isinstance(expected, Exception):  # on the CPU it checks labels and indices
        assert arguments["backend"] in GPU_BACKENDS, expected
        assert "expected 0 <=" in str(expected), expected
        return True
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, equal_nan=True)
    return True


# Sizes


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor cut off or repeated along a dimension, in memory of its own."""
    index = torch.arange(size) % max(tensor.shape[dim], 1)
    return tensor.index_select(dim, index)


def misshapen(op: str, name: str, tensor: Tensor) -> list[Tensor]:
    """The tensor in every shape that does not fit the others, and in every wrong rank."""
    shared = "".join(sizes for other, sizes in SIZES[op].items() if other != name)
    tensors = [tensor.unsqueeze(0), tensor.unsqueeze(-1), tensor.flatten()[0].clone(), tensor.flatten()]
    tensors += [tensor.select(dim, 0).clone() for dim in range(tensor.dim())]
    for dim, letter in enumerate(SIZES[op][name]):
        if letter in shared:
            size = tensor.shape[dim]
            tensors += [resized(tensor, dim, n) for n in (size - 1, size + 1, 0, 3 * size)]
    return [t for t in tensors if t.shape != tensor.shape]


@pytest.mark.parametrize(("op", "name"), arguments_of("Tensor"))
def test_a_shape_that_does_not_fit_is_refused(backend, op, name):
    """The fake refuses it as well, and so does the meta device."""
    arguments = valid(op, backend)
    assert misshapen(op, name, arguments[name])
    for tensor in misshapen(op, name, arguments[name]):
        changed = arguments | {name: tensor}
        assert_refused(op, changed, f"pixcontrast::{op}: ", " must have shape [", ", got [")
        with FakeTensorMode() as mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in changed.items()}
            with pytest.raises(ValueError, match="must have shape"):
                run(op, fakes)
        metas = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in changed.items()}
        with pytest.raises(ValueError, match="must have shape"):
            run(op, metas)


def test_the_message_names_op_argument_and_shapes():
    changed = valid("gather_backward", "reference") | {"grad_rows": torch.zeros(4, 3)}
    message = r"^pixcontrast::gather_backward: grad_rows must have shape \[A, D\] = \[4, 4\], got \[4, 3\]$"
    with pytest.raises(ValueError, match=message):
        run("gather_backward", changed)


def with_size(op: str, arguments: Arguments, letter: str, size: int) -> Arguments:
    """The arguments with one size changed wherever it occurs."""
    changed = dict(arguments)
    for name, sizes in SIZES[op].items():
        if letter in sizes:
            changed[name] = resized(arguments[name], sizes.index(letter), size)
    return changed


LETTERS = [(op, letter) for op in SIZES for letter in sorted(set("".join(SIZES[op].values())))]


@pytest.mark.parametrize(("op", "letter"), LETTERS)
def test_any_size_of_all_tensors(backend, op, letter):
    arguments = valid(op, backend)
    served = [assert_error_or_right(op, with_size(op, arguments, letter, size)) for size in (0, 1, 2, 13)]
    assert sum(served) >= 2


@pytest.mark.parametrize(
    ("op", "letter"),
    [(op, letter) for op, letter in LETTERS if op.startswith(("infonce", "enqueue_collect"))],
)
def test_ragged_sizes_on_every_instruction_set(instruction_set, op, letter):
    arguments = valid(op, "cpu")
    for size in (3, 17, 33, 67):
        assert assert_error_or_right(op, with_size(op, arguments, letter, size))


# Dtypes, layouts and other kinds of tensors


@pytest.mark.parametrize(("op", "name"), arguments_of("Tensor"))
def test_any_dtype(backend, op, name):
    arguments = valid(op, backend)
    for dtype in DTYPES:
        assert_error_or_right(op, arguments | {name: arguments[name].to(dtype)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", SIZES)
def test_any_dtype_of_all_rows(backend, op, dtype):
    arguments = valid(op, backend)
    of_dtype = {
        k: v.to(dtype) for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    assert_error_or_right(op, arguments | of_dtype)


def offset(tensor: Tensor) -> Tensor:
    """A copy between numbers that nobody may use or change."""
    junk = torch.full((3,), 77).to(tensor.dtype)
    return torch.cat([junk, tensor.flatten(), junk])[3:-3].view(tensor.shape)


def strided(tensor: Tensor) -> Tensor:
    """A copy in every other element of memory, with the dimensions in reverse order."""
    flipped = tensor.permute(*reversed(range(tensor.dim())))
    wide = torch.stack([flipped, torch.full_like(flipped, 77)], dim=-1)
    return wide[..., 0].permute(*reversed(range(tensor.dim())))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": offset,
    "strided": strided,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "negative": lambda t: torch._neg_view(-t),
    "expanded": lambda t: t[:1].clone().expand(t.shape),  # not the values of the case, and so the next
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


@functools.cache
def results_of_the_case(op: str, backend: str) -> list[Tensor]:
    return run(op, valid(op, backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "name"), arguments_of("Tensor"))
def test_any_layout(backend, op, name, layout):
    """The same bits as for a plain tensor, except for sums over a map; only written tensors may be refused."""
    arguments = valid(op, backend)
    tensor = arguments[name]
    if layout == "channels_last" and tensor.dim() != 4:
        return
    arguments[name] = LAYOUTS[layout](tensor)
    if torch.equal(arguments[name], tensor):
        expected = results_of_the_case(op, backend)
    else:
        expected = run(
            op,
            valid(op, backend) | {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(arguments[name])},
        )
    try:
        found = run(op, arguments)
    except ERRORS:
        if name not in written(op):
            raise
        return
    tolerance = 1e-6 if name == "embeddings" else 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


STRANGERS: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "None": lambda t: None,
    "a list": lambda t: t.tolist(),
    "a str": lambda t: "tensor",
    "a number": lambda t: 1,
    "an array": lambda t: t.numpy(),
}


@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*quantize", "ignore:.*Sparse")
@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize(("op", "name"), arguments_of("Tensor"))
def test_strangers_are_refused(backend, op, name, kind):
    arguments = valid(op, backend)
    assert_refused(op, arguments | {name: STRANGERS[kind](arguments[name])})


# Numbers


LEAST = {
    "num_classes": 1,
    "max_samples": 1,
    "max_views": 1,
    "min_pixels": 0,
    "hard_share": 0,
    "pixels_per_image": 0,
    "region_slots": 0,
    "ignore_index": -(2**63),
}


@pytest.mark.parametrize(("op", "name"), arguments_of("int") + arguments_of("SymInt"))
def test_any_integer(backend, op, name):
    arguments = valid(op, backend)
    for value in EXTREMES:
        if value < LEAST[name]:
            assert_refused(
                op, arguments | {name: value}, f"{op}: {name} must be at least {LEAST[name]}, got {value}"
            )
        else:
            assert_error_or_right(op, arguments | {name: value})
    for value in (-(2**63) - 1, 2**63, None, "1", 1.5, [1]):
        assert_refused(op, arguments | {name: value})


def test_a_ring_ends_where_the_keys_do(backend):
    arguments = valid("enqueue_write", backend)
    assert assert_error_or_right("enqueue_write", arguments | {"region_slots": 7})
    assert_refused("enqueue_write", arguments | {"region_slots": 8}, "region_slots must be at most 7, got 8")


@pytest.mark.parametrize(("op", "name"), arguments_of("float"))
def test_any_temperature(backend, op, name):
    arguments = valid(op, backend)
    for value in (0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, "1", None):
        assert_refused(op, arguments | {name: value})
    run(op, arguments | {name: 1e-300})
    run(op, arguments | {name: 1e300})


@pytest.mark.parametrize(("op", "name"), arguments_of("ScalarType"))
def test_any_dtype_of_the_rows_wanted(backend, op, name):
    arguments = valid(op, backend)
    for dtype in (*DTYPES, None, "float32"):
        result = assert_error_or_right(op, arguments | {name: dtype})
        assert result == (dtype in DTYPES[:4] and (dtype != torch.float64 or backend == "reference"))


@pytest.mark.parametrize("size", [(2**16, 2**16), (2, 2**31), (2**59, 1)])
@pytest.mark.parametrize("op", ["hard_anchor_sampling", "enqueue_collect"])
def test_too_many_pixels_are_refused_before_they_are_copied(backend, op, size):
    """2^32 pixels and more, in the memory of one."""
    arguments = valid(op, backend)
    for name in SIZES[op]:
        tensor = arguments[name]
        arguments[name] = tensor[..., :1, :1].expand(*tensor.shape[:-2], *size)
    assert_refused(op, arguments, "H * W must be at most 4294967295")


@pytest.mark.parametrize("op", ["hard_anchor_sampling", "enqueue_collect"])
def test_too_many_pairs_are_refused_before_they_are_counted(backend, op):
    """Their number would not fit 64 bits. There is no pixel, so the tensors are empty."""
    arguments = valid(op, backend) | {"num_classes": 2**31 - 1}
    for name in SIZES[op]:
        shape = [2**40, *arguments[name].shape[1:-1], 0]
        arguments[name] = arguments[name].new_empty(0).as_strided(shape, [0] * len(shape))
    assert_refused(op, arguments, "B * num_classes must be at most")


# Backends


@pytest.mark.parametrize("op", SIZES)
def test_backends_that_do_not_exist(op):
    for name in ("", "gpu", "CPU", "native", "splits", "triton.launch", ".cpu", "cpu ", "../cpu"):
        assert_refused(op, valid(op, name), f"names the backend {name!r}, expected one of")
    for name in (None, 1, ["cpu"]):
        assert_refused(op, valid(op, name))


@pytest.mark.parametrize("op", SIZES)
def test_backends_of_another_device(monkeypatch, op):
    monkeypatch.setattr(devices, "gpu", devices.Gpu())
    for name in ("cuda", "triton"):
        assert_refused(
            op, valid(op, name), f"backend '{name}' cannot serve {op}", "it takes tensors on cuda, got cpu"
        )


@pytest.mark.parametrize("op", [op for op in SIZES if op.startswith("infonce")])
def test_rows_too_wide_for_a_backend(gpu_backend, op):
    arguments = valid(op, gpu_backend)
    for name, sizes in SIZES[op].items():
        if "D" in sizes:
            arguments[name] = torch.zeros(arguments[name].shape[0], 513)
    assert_refused(op, arguments, "up to 512 channels, got 513")


# Memory


@pytest.mark.parametrize("name", written("enqueue_write"))
def test_what_is_written_shares_no_memory(backend, name):
    arguments = valid("enqueue_write", backend)
    for other in SIZES["enqueue_write"]:
        if other == name:
            continue
        one, two = arguments[name], arguments[other]
        size = max(one.nbytes, two.nbytes)
        for start in (0, (one.nbytes - 1) // 8 * 8):  # the same place; the end of one, the start of the other
            memory = torch.zeros(2 * size, dtype=torch.uint8)
            views = {
                key: memory[at : at + t.nbytes].view(t.dtype).view(t.shape)
                for key, t, at in ((name, one, 0), (other, two, start))
            }
            assert_refused("enqueue_write", arguments | views, "share no memory with")


def test_neighbours_in_memory_are_apart(backend):
    """A bank may lie in one piece of memory, like flattened parameters."""
    expected, arguments = (valid("enqueue_write", backend) for _ in range(2))
    memory, at = torch.zeros(4096, dtype=torch.uint8), 0
    for name in (*written("enqueue_write"), "rows", "row_labels"):
        tensor = arguments[name]
        arguments[name] = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        at += -(-tensor.nbytes // 8) * 8
    for a, b in zip(run("enqueue_write", arguments), run("enqueue_write", expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [-(2**63), -1, 5, 6, 2**31, 2**63 - 1])
@pytest.mark.parametrize("name", ["region_ptr", "region_fill", "pixel_ptr", "pixel_fill"])
def test_garbage_in_a_ring_writes_nothing_outside(backend, name, value):
    """The CPU backend refuses it; the others fold it into the ring, as the reference does."""
    arguments = valid("enqueue_write", backend)
    arguments[name][1] = value
    for key in written("enqueue_write"):
        arguments[key] = offset(arguments[key])
    whole = {
        key: torch.tensor([]).to(arguments[key].dtype).set_(arguments[key].untyped_storage())
        for key in written("enqueue_write")
    }
    refused = value < 0 or value > (2 if name.startswith("region") else 5) - name.endswith("ptr")
    if backend == "cpu" and refused:
        assert_refused("enqueue_write", arguments, f"of class 1 is {value}, outside of its ring")
    else:
        expected = outcome("enqueue_write", arguments | {"backend": "reference"})
        for a, b in zip(run("enqueue_write", arguments), expected, strict=True):
            assert torch.equal(a, b)
    for key, memory in whole.items():
        assert (memory[:3] == 77).all(), key
        assert (memory[-3:] == 77).all(), key


CONTENTS = {
    "row_labels": ["enqueue_write"],
    "key_labels": ["enqueue_write", "infonce_forward", "infonce_backward_keys"],
    "anchor_labels": ["infonce_forward", "infonce_backward_keys", "infonce_backward_symmetric"],
    "labels": ["hard_anchor_sampling", "enqueue_collect"],
    "predictions": ["hard_anchor_sampling"],
    "priority": ["hard_anchor_sampling", "enqueue_collect"],
    "indices": ["gather", "gather_backward"],
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for name, ops in CONTENTS.items() for op in ops])
def test_any_content(backend, op, name):
    """Each value everywhere, and all values together. GPU kernels skip labels and indices that name nothing."""
    arguments = valid(op, backend)
    numbers = torch.iinfo(arguments[name].dtype)
    values = [-1, 60, 255, 2**31 - 1, numbers.min, numbers.max]
    mixed = arguments[name].clone()
    mixed.view(-1)[: len(values)] = torch.tensor(values)[: mixed.numel()]
    for tensor in (mixed, *(torch.full_like(mixed, value) for value in set(values))):
        assert_error_or_right(op, arguments | {name: tensor})


@pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")
@pytest.mark.parametrize(("op", "name"), arguments_of("Tensor"))
def test_any_number(backend, op, name):
    """NaN, infinities, and huge and tiny numbers may spread in any way, but every call ends."""
    arguments = valid(op, backend)
    if arguments[name].is_floating_point():
        for value in (math.nan, math.inf, -math.inf, 3e38, 1e-45):
            run(op, arguments | {name: torch.full_like(arguments[name], value)})


def test_every_op_is_in_the_battery():
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("pixcontrast::")}
    assert names == set(SIZES) | {"draw_priority", "enqueue_write_all_ranks", "watch_classes"}
    for op, tensors in SIZES.items():
        assert list(tensors) == [name for of, name in arguments_of("Tensor") if of == op]


# Ops that speak to the host


def test_numbers_of_nothing_and_of_something_else_are_refused():
    ops = torch.ops.pixcontrast
    bank, loss = MemoryBank(3, 4), PixelContrastLoss(3, generator=torch.Generator())
    labels, state = torch.zeros(1, 2, 2).long(), list(bank.buffers())
    rows, row_labels = torch.zeros(1, 3, 11, 4), torch.zeros(1, 3, 11, dtype=torch.int32)
    for number in (-1, 2**62, loss._stream.number, bank._exchange.number):
        with pytest.raises(ValueError, match="is the number of no ClassWatch"):
            ops.watch_classes(labels, torch.zeros(2, dtype=torch.int32), number, "")
    for number in (-1, 2**62, loss._watch.number):
        with pytest.raises(ValueError, match="is the number of no PriorityStream"):
            ops.draw_priority(torch.zeros(3, dtype=torch.int32), number)
        with pytest.raises(ValueError, match="is the number of no Exchange"):
            ops.enqueue_write_all_ranks(rows, row_labels, *state, 5000, number, "cpu")


def test_what_a_watch_counts_may_be_anything():
    watch = PixelContrastLoss(3)._watch
    for labels, anchor_labels in itertools.product(
        (torch.tensor([[[-(2**63), 2**63 - 1, 3, 255]]]), torch.zeros(0, 2, 2).long()),
        (torch.tensor([2**31 - 1, -(2**31), 3], dtype=torch.int32), torch.zeros(2, 0).long()),
    ):
        found = torch.ops.pixcontrast.watch_classes(labels, anchor_labels, watch.number, "")
        assert torch.equal(found, anchor_labels)
    assert (watch.counts == 0).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [-1, 3, 255])
def test_pixels_of_a_class_are_counted_whatever_the_type_of_labels(dtype, ignore_index):
    """In 8 bits, 256 classes would be none, and -1 the label 255."""
    most = min(torch.iinfo(dtype).max, 255)
    labels = torch.tensor([[[0, 3, 3, most]], [[most, most, 1, 1]]]).to(dtype)
    counted = count_per_image(labels, 256, ignore_index).tolist()
    for (row,), found in zip(labels.tolist(), counted, strict=True):
        assert found == [0 if c == ignore_index else row.count(c) for c in range(256)]
    assert count_classes(labels, 256).sum() == 8


def test_the_write_of_all_ranks_checks_as_the_write_does():
    bank = MemoryBank(3, 4)
    state = list(bank.buffers())
    row_labels = torch.zeros(1, 3, 11, dtype=torch.int32)
    for rows in (torch.zeros(1, 3, 11, 5), torch.zeros(1, 2, 11, 4), torch.zeros(3, 4), torch.zeros(())):
        with pytest.raises(ValueError, match=r"enqueue_write: .* must have shape"):
            torch.ops.pixcontrast.enqueue_write_all_ranks(
                rows, row_labels, *state, 5000, bank._exchange.number, "cpu"
            )
