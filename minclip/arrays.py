"""Helpers of the page: everything that it needs besides plain array operations.

This is which library an array belongs to, how float16 is computed, and functions that NumPy lacks.

NumPy and CuPy arrays go through the same code. float16 is a storage format here: `float32_inside`
converts a function's float16 arrays to float32 and rounds its result once. For float16 arrays on the GPU,
`minclip.gpu.steps` has a function of the same name, which does that on the tensor cores.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from minclip.params import Floats

LACKING = ("bfloat16", "float8")  # dtypes that NumPy lacks, as their names begin
FEW_ROWS = 128  # the tokens of one or two texts
CACHE = 128 * 1024  # bytes of an array that fits a core's cache together with a few temporaries


def array_module(x: Any) -> Any:
    """Return numpy, or cupy for an array on the GPU."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


def float32_inside(step: Callable[..., Any], *, rounded: bool = True) -> Callable[..., Any]:
    """Compute a step on float16 arrays in float32, and round its result to the dtype of its first array.

    With rounded=False the result stays float32.
    """

    @functools.wraps(step)
    def wrapper(x: Any, *others: Any) -> Any:
        if x.dtype == np.float16 and not isinstance(x, np.ndarray):
            from minclip.gpu import steps

            return getattr(steps, step.__name__)(x, *others)
        result = step(to_float32(x), *map(to_float32, others))
        return result.astype(x.dtype, copy=False) if rounded else result

    return wrapper


def by_rows(step: Callable[..., Any]) -> Callable[..., Any]:
    """Apply an elementwise step to a few rows at a time, so that its temporaries stay in the cache.

    The step takes arrays of one shape. On the GPU it is applied at once.
    """

    @functools.wraps(step)
    def wrapper(*arrays: Any) -> Any:
        x = arrays[0]
        if not isinstance(x, np.ndarray) or x.nbytes <= CACHE:
            return step(*arrays)
        flat = [array.reshape(-1, array.shape[-1]) for array in arrays]
        out = np.empty_like(flat[0])
        rows = max(1, CACHE // (x.shape[-1] * x.itemsize))
        for start in range(0, len(out), rows):
            out[start : start + rows] = step(*(array[start : start + rows] for array in flat))
        return out.reshape(x.shape)

    return wrapper


def to_float32(x: Any) -> Any:
    """Return a float16 array as float32, and any other array as it is."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def as_array(value: Any) -> Any:
    """Return a torch tensor, a CuPy array or anything array-like as a NumPy array on the host.

    NumPy lacks bfloat16 and float8: such an array becomes float32.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype)[6:].startswith(LACKING) else value).numpy()
    elif hasattr(value, "get"):
        value = value.get()
    elif hasattr(value, "numpy") and not hasattr(value, "__array__"):
        value = value.numpy()
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name.startswith(LACKING) else array  # ml_dtypes', from JAX


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """Return float16, float32 or float64 as a NumPy dtype. Raise ValueError for any other."""
    for known in ("float16", "float32", "float64"):
        if dtype is not None and str(dtype).removeprefix("torch.") == known:
            return np.dtype(known)
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in ("float16", "float32", "float64"):
        raise ValueError(f"dtype must be 'float16', 'float32' or 'float64', not {dtype!r}")
    return found


def matmul_transposed(x: Any, weight: Any) -> Any:
    """Return x @ weight.T, as one product of two matrices: BLAS computes that faster than a stack of them."""
    rows = x.reshape(-1, x.shape[-1])
    # With few rows, BLAS computes the transposed product faster.
    out = rows @ weight.T if len(rows) > FEW_ROWS else (weight @ rows.T).T
    return out.reshape(*x.shape[:-1], len(weight))


def with_leading(leading: tuple[int, ...], *arrays: Any) -> Any:
    """Return arrays [B, ...] as [*leading, ...]: one array, or a tuple where several are given.

    None stays None.
    """
    shaped = tuple(None if x is None else x.reshape(*leading, *x.shape[1:]) for x in arrays)
    return shaped if len(shaped) > 1 else shaped[0]


def normalize(features: Floats) -> Floats:
    """Divide each row of features [..., E] by its length; a zero row stays zero. Same shape and dtype.

    Raises ValueError where features is no array of floats.

    >>> normalize(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    check_floats(features)
    x = to_float32(features)
    x = x / nonzero(abs(x).max(axis=-1, keepdims=True))  # first, so that squares neither overflow nor vanish
    x = x / nonzero((x * x).sum(axis=-1, keepdims=True) ** 0.5)
    return x.astype(features.dtype, copy=False)


def check_floats(features: Any) -> None:
    """Raise ValueError where features is no array of floats."""
    if not hasattr(features, "dtype") or features.dtype.kind != "f":
        given = getattr(features, "dtype", type(features).__name__)
        raise ValueError(f"features must be an array of floats, such as encode_text returns, not {given}")


def nonzero(x: Any) -> Any:
    """Return x with 1 in place of 0, to divide by."""
    return x + (x == 0)


@by_rows
def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # exp(-x) may overflow to infinity, and 1 / infinity is the right answer
        return 1 / (1 + array_module(x).exp(-x))


@by_rows
def normal_cdf(x: Any) -> Any:
    """Return Phi(x) of the normal distribution, which NumPy lacks, to 5e-14; below 0 the error is relative.

    1 - Phi(x) = erfc(y) / 2 with y = x / sqrt(2). (1 + 2 y) exp(y^2) erfc(y) is so smooth in
    t = (y - 3) / (y + 3) that one polynomial approximates it from 0 to infinity (Shepherd and Laframboise,
    Mathematics of Computation 36, 1981). This polynomial interpolates it at 19 Chebyshev points.
    """
    xp = array_module(x)
    y = abs(x) * 0.5**0.5
    t = (y - 3) / (y + 3)
    polynomial = 0
    for coefficient in reversed(ERFC):
        polynomial = polynomial * t + coefficient
    tail = xp.exp(-y * y) * polynomial / (2 + 4 * y)
    return xp.where(x < 0, tail, 1 - tail)


def normal_density(x: Any) -> Any:
    """Return exp(-x^2 / 2) / sqrt(2 pi), the derivative of `normal_cdf`."""
    return array_module(x).exp(-0.5 * x * x) * (2 * math.pi) ** -0.5


# fmt: off
ERFC = (
    1.2530080582697296, -0.1356211061208497, -0.047562294352507764, 0.12964515847824745,
    -0.1192736634721992, 0.0683080313220015, -0.023770513904139614, 0.0025293596278562493,
    0.0018886820608398581, -0.0007796903107536676, -0.00010512258573368832, 0.0001247281353066936,
    4.8496923036467334e-06, -1.950471307214092e-05, -5.650045317455558e-07, 2.8869709884584873e-06,
    1.8268338386983095e-07, -2.798421357795291e-07, -2.983942535318685e-08,
)
# fmt: on
