"""Numbers as tensor cores take them, and stores that round to nearest.

Triton's interpreter, which runs these kernels on a CPU, truncates where the hardware rounds to nearest-even bf16, knows
no TF32 and no inline assembly. Under it the same roundings are done on the bits, so that a test sees the accuracy
that a GPU would give.
"""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))

LOG2E: tl.constexpr = tl.constexpr(1.442695040888963407)
LN2: tl.constexpr = tl.constexpr(0.693147180559945309)


@triton.jit
def rounded_to(value, dtype: tl.constexpr):
    """fp32 as `dtype`, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def rounded_to_tf32(value):
    """fp32 with the 10 explicit bits of mantissa that TF32 keeps, to nearest; the hardware would truncate."""
    if INTERPRETED:
        bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        rounded = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    else:
        bits = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1
        )
        rounded = bits.to(tl.float32, bitcast=True)
    return rounded


@triton.jit
def as_operand(rows, PRECISION: tl.constexpr):
    """Rows as they enter a product, and what "tf32x3" needs besides: the rest that rounding to TF32 leaves.

    16-bit rows are taken as they are ("half"), fp32 ones as TF32 ("tf32") or as a sum of two such ("tf32x3").
    """
    if INTERPRETED:
        rows = rows.to(tl.float32)  # exact, and so are the products; the interpreter's own bf16 is not
    rest = rows
    if PRECISION != "half":
        whole = rounded_to_tf32(rows)
        if PRECISION == "tf32x3":
            rest = rounded_to_tf32(rows - whole)
        rows = whole
    return rows, rest


@triton.jit
def multiply(left, left_rest, right, right_rest, total, PRECISION: tl.constexpr):
    """total + left . right, of operands."""
    if PRECISION == "tf32x3":  # the small terms first; the product of the rests is below fp32's accuracy
        total = tl.dot(left_rest, right, total, input_precision="tf32")
        total = tl.dot(left, right_rest, total, input_precision="tf32")
    return tl.dot(left, right, total, input_precision="tf32")


@triton.jit
def add_weighted(
    total, weights, columns, columns_rest, dtype: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr
):
    """total + weights . columns, of fp32 weights.

    A weight of 16 bits is off by up to 2e-3, and all alike where the weights are; two parts of it are not.
    """
    rounded = rounded_to(weights, dtype)
    left, left_rest = as_operand(rounded, PRECISION)
    total = multiply(left, left_rest, columns, columns_rest, total, PRECISION)
    if PARTS == 2:
        rest, _ = as_operand(rounded_to(weights - rounded.to(tl.float32), dtype), PRECISION)
        total = tl.dot(rest, columns, total)
    return total


@triton.jit
def log1p(value):
    """log(1 + value) for 0 <= value <= 1, to fp32's accuracy also where 1 + value rounds to 1."""
    series = value * (1.0 - value * (0.5 - value * (0.3333333333 - value * 0.25)))
    return tl.where(value < 0.01, series, tl.log(1.0 + value))
