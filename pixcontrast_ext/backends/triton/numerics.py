"""Numbers as tensor cores take them, and stores that round to nearest.

Triton's interpreter, which runs these kernels on a CPU, truncates where the hardware rounds to nearest-even bf16, and
knows no inline assembly. Under it the same roundings are done on the bits, so that a test sees the accuracy that a GPU
would give.
"""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))

LOG2E: tl.constexpr = tl.constexpr(1.442695040888963407)
LN2: tl.constexpr = tl.constexpr(0.693147180559945309)

# What scores are multiplied by is at least this, in fp32: -inf times 0 would be NaN.
SMALLEST_SCALE: tl.constexpr = tl.constexpr(1e-37)

# Weights and planes of fp16 are at most 2^HALF_EXPONENT: fp16 overflows at 2^16, and has few numbers below 2^-14.
HALF_EXPONENT: tl.constexpr = tl.constexpr(15)


@triton.jit
def rounded_to(value, dtype: tl.constexpr):
    """fp32 as `dtype`, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def reciprocal(value):
    """1 / value, off by one unit in the last place at most; of values that are neither subnormal nor nearly inf."""
    if INTERPRETED:
        found = 1.0 / value
    else:
        found = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    return found


@triton.jit
def product(left, right):
    """The product left * right, rounded even where something is added to it.

    Shifts and log-sum-exps are made of rounded products. Beyond 2^24 an unrounded one would be far from these.
    """
    if INTERPRETED:
        found = left * right
    else:
        found = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [left, right], dtype=tl.float32, is_pure=True, pack=1
        )
    return found


@triton.jit
def power_of_two(exponent):
    """Of an exponent from -126 to 127."""
    return ((tl.cast(exponent, tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log1p(value):
    """log(1 + value) for 0 <= value <= 1, as 2 artanh(value / (2 + value)): to fp32's accuracy, without a branch."""
    z = value * reciprocal(value + 2.0)
    square = z * z
    series = 1.0 / 11 + square * (1.0 / 13)
    series = 1.0 / 9 + square * series
    series = 1.0 / 7 + square * series
    series = 1.0 / 5 + square * series
    series = 1.0 / 3 + square * series
    return 2.0 * z + 2.0 * z * square * series
