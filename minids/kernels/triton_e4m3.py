"""One E4M3 number: its tile's scale and its rounding, for kernels in Triton and in Gluon."""

import triton
import triton.language as tl


@triton.jit
def scale_of(largest, least, UE8M0: tl.constexpr):
    """Return the factor that restores a tile's numbers. `/` would not be exact here."""
    scale = tl.div_rn(tl.maximum(largest, least, propagate_nan=tl.PropagateNan.ALL), 448.0)
    if UE8M0:  # the next power of two: one in the exponent, unless the mantissa is 0
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def to_e4m3(x, scale, SHORT: tl.constexpr):
    """Return x / scale as the nearest E4M3 numbers, ties to even. NaN stays NaN, and so does a tile
    with an infinite number in it.

    The quotient is the exact one, rounded to FP32 as division does it: from a correctly rounded
    reciprocal, one per scale, and two corrections by what is left (Markstein, IBM Journal of
    Research and Development 34, 1990). That takes half the instructions of a division, which would
    take longer than reading the numbers. Rounding aside, no quotient exceeds 448.
    SHORT: x had 16 bits. Then one correction gives the same E4M3 numbers: `test_fp8_kernels` goes
    through all quotients that are near enough to the middle of two.
    """
    inverse = tl.div_rn(1.0, scale)
    quotient = x * tl.broadcast_to(inverse, x.shape)
    for _ in tl.static_range(1 if SHORT else 2):
        left = tl.fma(quotient, tl.broadcast_to(scale, x.shape), x * -1.0)
        quotient = tl.fma(left, tl.broadcast_to(inverse * -1.0, x.shape), quotient)  # -0 stays
    return quotient.to(tl.float8e4nv)
