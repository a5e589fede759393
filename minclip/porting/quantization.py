"""Weights of a lower precision, as float arrays of the same values.

Each format rounds a weight matrix [out, in] as a quantizer in common use does, and returns the numbers that
the quantized model computes with. Groups and blocks run along the last axis, which the product sums over.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from minclip.porting.rounding import round_to

BLOCK = 32  # GGUF's legacy block formats
GROUP = 64  # MLX's default group
EXACT = 1e-6  # relative L2 that float32's own rounding in a conversion may leave


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store weights.

    id         a short name, "int8-row"
    summary    the sentence's subject: "int8 weights, one scale per row"
    quantize   quantize(matrix [..., in]) returns the rounded matrix; rows must be a multiple of `multiple`
    multiple   the length that a row must be a multiple of
    """

    id: str
    summary: str
    quantize: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    multiple: int = 1

    def __call__(self, matrix: np.ndarray) -> np.ndarray:
        """Return matrix rounded to this format, in its own dtype. A row that does not fit stays as it is."""
        if matrix.shape[-1] % self.multiple:
            return matrix
        return self.quantize(np.asarray(matrix, np.float32)).astype(matrix.dtype)


def nonzero(scale):
    """Return scale with 1 in place of 0, to divide by."""
    return np.where(scale == 0, 1, scale)


def float8(x, mantissa, lowest, largest):
    """Round x to a float of 8 bits: mantissa bits, lowest exponent, largest finite value."""
    _, exponent = np.frexp(x)
    step = np.exp2(np.maximum(exponent - 1, lowest) - mantissa).astype(np.float32)
    return np.clip(np.round(x / step) * step, -largest, largest)


def e4m3(x):
    """Round x to float8_e4m3fn (Micikevicius et al., "FP8 Formats for Deep Learning", 2022)."""
    return float8(x, 3, -6, 448)


def e5m2(x):
    """Round x to float8_e5m2."""
    return float8(x, 2, -14, 57344)


def scaled(rounding, largest):
    """Return a rounding of x divided by one scale, which takes the largest |x| to the largest code."""

    def quantize(x):
        scale = nonzero(abs(x).max(initial=0) / np.float32(largest))
        return rounding(x / scale) * scale

    return quantize


def int8_tensor(x):
    """Round to 255 levels, symmetric about 0, one scale for all of x."""
    return scaled(np.round, 127)(x)


def int8_rows(x):
    """Round to 255 levels, symmetric about 0, one scale for each row."""
    scale = nonzero(abs(x).max(axis=-1, keepdims=True) / np.float32(127))
    return np.round(x / scale) * scale


def int7_tensor(x):
    """Round to 129 levels, symmetric about 0, one scale for all of x: ONNX Runtime's reduce_range."""
    return scaled(np.round, 64)(x)


def uint8_tensor(x):
    """Round to 256 levels from the lowest to the highest of x and 0, as ONNX Runtime's QUInt8 does."""
    low, high = min(x.min(initial=0), 0), max(x.max(initial=0), 0)
    scale = nonzero((high - low) / np.float32(255))
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale


def blocks(x, size):
    """Return x [..., n] as [..., n / size, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


CODES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "fp8 (e4m3)": (e4m3, 448),
    "fp8 (e5m2)": (e5m2, 57344),
    "int8": (np.round, 127),
}


# Quantizers divide in these orders. Their roundings differ in the last bit, and so a few of the codes.
DIVISIONS: tuple[Callable[[Any, Any, Any], Any], ...] = (
    lambda x, most, largest: x / (most / largest),
    lambda x, most, largest: x * (largest / most),
    lambda x, most, largest: x * (1 / most * largest),  # how torch takes largest / most
    lambda x, most, largest: x * (1 / (most / largest)),  # ggml's id
    lambda x, most, largest: x / most * largest,
)


def codes_of(matrix: Any, kind: str, *, by_row: bool = False, rounded: bool = True, division: int = 0) -> Any:
    """Return a matrix divided by its scale, or by the scale of each row, and rounded to codes of a kind.

    kind       a key of CODES. The arithmetic is that of float32, as quantizers have it
    division   an index into DIVISIONS
    """
    round_code, largest = CODES[kind]
    x = np.asarray(matrix, np.float32)
    most = nonzero(abs(x).max(axis=1 if by_row else None, keepdims=True))
    codes = DIVISIONS[division](x, most, np.float32(largest))
    return (round_code(codes) if rounded else codes).astype(matrix.dtype)


def q8_0(x):
    """Round to GGUF's Q8_0: blocks of 32, a float16 scale each, 255 levels."""
    x = blocks(x, BLOCK)
    scale = abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    ratio = x / nonzero(scale)
    codes = np.trunc(ratio + np.copysign(np.float32(0.5), ratio))  # C's roundf: halves away from zero
    return (codes * scale.astype(np.float16).astype(np.float32)).reshape(*x.shape[:-2], -1)


def signed_blocks(bits):
    """Return GGUF's Q4_0 or Q5_0: blocks of 32, and a float16 scale that takes the largest |x| to -half."""
    half = 2 ** (bits - 1)

    def quantize(x):
        x = blocks(x, BLOCK)
        largest = np.take_along_axis(x, abs(x).argmax(axis=-1)[..., None], axis=-1)
        scale = largest / np.float32(-half)
        codes = np.trunc(x / nonzero(scale) + np.float32(half + 0.5)).clip(0, 2 * half - 1) - half
        return (codes * scale.astype(np.float16).astype(np.float32)).reshape(*x.shape[:-2], -1)

    return quantize


def affine_groups(bits, group=GROUP):
    """Return MLX's affine quantization: groups of 64, scale and offset, so that the edge and 0 are exact.

    Follows affine_quantize in mlx/ops.cpp of ml-explore/mlx.
    """
    levels = 2**bits - 1

    def quantize(x):
        x = blocks(x, group)
        low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        from_low = abs(low) > abs(high)
        scale = np.maximum((high - low) / np.float32(levels), np.float32(1e-7))
        scale = np.where(from_low, scale, -scale)
        edge = np.where(from_low, low, high)
        codes = np.round(edge / scale)
        scale = np.where(codes == 0, scale, edge / nonzero(codes))
        offset = np.where(codes == 0, 0, edge)
        x = np.clip(np.round((x - offset) / scale), 0, levels) * scale + offset
        return x.reshape(*x.shape[:-2], -1)

    return quantize


FORMATS = (
    Format("fp8-e4m3", "fp8 (e4m3) weights", e4m3),
    Format("fp8-e4m3-scaled", "fp8 (e4m3) weights, one scale per matrix", scaled(e4m3, 448)),
    Format("fp8-e5m2", "fp8 (e5m2) weights", e5m2),
    Format("fp8-e5m2-scaled", "fp8 (e5m2) weights, one scale per matrix", scaled(e5m2, 57344)),
    Format("int8-row", "int8 weights, one scale per row", int8_rows),
    Format("int8-tensor", "int8 weights, one scale per matrix", int8_tensor),
    Format("int7-tensor", "7-bit weights (reduce_range), one scale per matrix", int7_tensor),
    Format("uint8-tensor", "uint8 weights, one scale and zero point per matrix", uint8_tensor),
    Format("q8_0", "q8_0 weights (GGUF: int8 in blocks of 32)", q8_0, BLOCK),
    Format("mlx-8", "8-bit weights in groups of 64 (MLX)", affine_groups(8), GROUP),
    Format("q5_0", "q5_0 weights (GGUF: 5 bits in blocks of 32)", signed_blocks(5), BLOCK),
    Format("mlx-4", "4-bit weights in groups of 64 (MLX)", affine_groups(4), GROUP),
    Format("q4_0", "q4_0 weights (GGUF: 4 bits in blocks of 32)", signed_blocks(4), BLOCK),
)


def format_of(values: np.ndarray, reference: np.ndarray, formats: Iterable[Format]) -> Format | None:
    """Return the first of formats that turns the matrix reference [out, in] into values, or None.

    Either the format leaves values alone, as it does with its own numbers, or it takes reference to about
    values: the scales of a real file are often float16. Its error must be as large as that of values.
    """
    values, reference = np.asarray(values, np.float32), np.asarray(reference, np.float32)
    size, error = np.linalg.norm(values), np.linalg.norm(values - reference)
    for kind in formats:
        if values.shape[-1] % kind.multiple:
            continue
        rounded = kind(reference)
        if np.linalg.norm(rounded - reference) < 0.7 * error:
            continue
        near = np.linalg.norm(values - rounded) <= 0.2 * error
        if near or np.linalg.norm(kind(values) - values) <= 1e-6 * size:
            return kind
    return None


def float_rounding(values: np.ndarray, reference: np.ndarray) -> str | None:
    """Return the float format that turns reference into values: "" for none needed, None where none does."""
    exact = values[:1].astype(np.float64)  # one row rules most formats out
    if np.linalg.norm(exact - reference[:1]) <= EXACT * np.linalg.norm(reference[:1]):
        if np.linalg.norm(values - reference) <= EXACT * np.linalg.norm(reference):
            return ""
    for name, rounded in FLOATS.items():
        if np.array_equal(exact, rounded(reference[:1])) and np.array_equal(values, rounded(reference)):
            return name
    return None


def cut_to_bfloat16(x):
    """Return the float32 array x without the lower 16 bits of each number."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


FLOATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float16": lambda x: round_to(x, "float16").astype(np.float32),
    "bfloat16": lambda x: round_to(x, "bfloat16"),
    "bfloat16, cut off": cut_to_bfloat16,
}
