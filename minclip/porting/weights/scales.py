"""Integer and 8-bit weights beside their scales, as the floats that they stand for."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.checkpoint.tensor_files import Stored

SCALES = "{0}_scale {0}.scale {0}_scales {0}.scales {1}.weight_scale {1}.scale_weight {1}.scales {1}.scale"
ZEROS = "{0}_zero_point {0}.zero_point {1}.zero_point {1}.zero_points {1}.weight_zero_point {1}.zeros"


def dequantized(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return arrays with codes and scales put together, and name -> format for those that were codes.

    Known are MLX's groups (weight, scales, biases) and codes of integers or 8-bit floats beside a scale, and
    perhaps a zero point, for the whole array, a row or a column. An array is read only when asked for.
    """
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    used: set[str | None] = set()
    for name, array in arrays.items():
        dtype = str(array.dtype)
        stem = name.removesuffix("weight").rstrip("./_") if name.endswith("weight") else name
        scale = beside(arrays, SCALES, name, stem)
        if dtype == "uint32" and scale and f"{stem}.biases" in arrays:
            values[name], labels[name] = mlx_groups(array, arrays[scale], arrays[f"{stem}.biases"])
            used |= {scale, f"{stem}.biases"}
        elif scale and scale != name and is_code(dtype) and suits(array.shape, arrays[scale].shape):
            zero = beside(arrays, ZEROS, name, stem)
            values[name] = codes(
                array, arrays[scale], arrays[zero] if zero else None, columns=name.endswith("_quantized")
            )
            labels[name] = f"{dtype} with scales"
            used |= {scale, zero}
        else:
            values[name] = array
            if re.match(r"I?Q\d|TQ|MXFP|NVFP", dtype):  # a quantized tensor of GGUF, which reads as floats
                labels[name] = f"{dtype} (GGUF)"
    return {name: array for name, array in values.items() if name not in used}, labels


def is_code(dtype: str) -> bool:
    """Tell whether a dtype holds codes that need a scale."""
    return dtype in ("int8", "uint8") or re.match(r"float8|F8_", dtype) is not None


def beside(arrays: Mapping[str, Any], patterns: str, name: str, stem: str) -> str | None:
    """Return the name of an array beside another, by the patterns that quantizers use."""
    base = name.removesuffix("_quantized")
    return next((n for n in patterns.format(base, stem).split() if n in arrays and n != name), None)


def suits(shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Tell whether a scale is one number, or one for each row or column of a matrix."""
    numbers = [n for n in scale if n != 1]
    return not numbers or (len(numbers) == 1 and len(shape) > 1 and numbers[0] in (shape[0], shape[-1]))


def codes(array: Any, scale: Any, zero: Any, *, columns: bool) -> Stored:
    """Return (code - zero) * scale. columns tells along which axis the scales of a square matrix lie."""

    def along(numbers: Any) -> np.ndarray:
        flat = np.asarray(as_array(numbers)).astype(np.float32).reshape(-1)
        if len(flat) == 1:
            return flat
        rows = len(flat) == array.shape[0] and not (columns and len(flat) == array.shape[-1])
        return flat.reshape([-1] + [1] * (len(array.shape) - 1)) if rows else flat

    def read() -> np.ndarray:
        numbers = np.asarray(as_array(array)).astype(np.float32)
        return (numbers - along(zero if zero is not None else np.zeros(1))) * along(scale)

    return Stored(array.shape, "float32", read, 4 * math.prod(array.shape))


def mlx_groups(array: Any, scales: Any, biases: Any) -> tuple[Stored, str]:
    """Return MLX's affine groups as floats: codes of a few bits, packed from the lowest bit of each uint32.

    The group's size is MLX's default 64, or 32 where 64 gives no whole number of bits.
    """
    words, groups = array.shape[-1], scales.shape[-1]
    group = next((n for n in (64, 32, 128) if (words * 32) % (groups * n) == 0), 0)
    bits = words * 32 // (groups * group) if group else 0
    if bits not in (2, 4, 8):
        raise ValueError(f"packed weights of {words} words and {groups} groups are no MLX quantization")

    def read() -> np.ndarray:
        packed = np.asarray(as_array(array))
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        values = (packed[..., None] >> shifts) & np.uint32(2**bits - 1)
        values = values.reshape(*packed.shape[:-1], groups, group).astype(np.float32)
        scale, bias = (np.asarray(as_array(a)).astype(np.float32)[..., None] for a in (scales, biases))
        return (values * scale + bias).reshape(*packed.shape[:-1], groups * group)

    shape = (*array.shape[:-1], groups * group)
    label = f"{bits}-bit codes in groups of {group}"
    return Stored(shape, "float32", read, 4 * math.prod(shape)), label
