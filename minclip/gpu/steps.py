"""float16 on the GPU: the steps of `minclip.model`, each as one product or one kernel.

CuPy by itself converts stacked float16 products to float32, which leaves the tensor cores, and it reads and
writes memory once per arithmetic operator. Here a step is one product on the tensor cores or one kernel of
kernels.cu. Both compute in float32 and round once.

The functions from `layer_norm` to `matmul` have the names and the meaning of those in `minclip.model`.
`minclip.arrays.float32_inside` calls them for float16 CuPy arrays.
"""

import functools
from pathlib import Path

import cupy
import numpy as np
from cupy.cuda import device, runtime
from cupy_backends.cuda.libs import cublas

from minclip.params import EPS

WARPS = 8  # warps in a thread block
PACK = 4  # numbers that a thread reads at once, where the row's length and the arrays' alignment allow it
CUDA_DTYPES = {
    "e": ("__half", "float"),
    "f": ("float", "float"),
    "d": ("double", "double"),
}  # stored, computed
CUBLAS_DTYPES = {"e": runtime.CUDA_R_16F, "f": runtime.CUDA_R_32F}
FACTORS = np.array([0, 1], np.float32)  # cuBLAS reads its factors from memory
ZERO, ONE = FACTORS.ctypes.data, FACTORS.ctypes.data + FACTORS.itemsize
SOURCE = Path(__file__).with_name("kernels.cu")


def layer_norm(x, weight, bias):
    weight, bias = (cupy.ascontiguousarray(array, dtype=np.float32) for array in (weight, bias))
    return map_rows("layer_norm", x, weight, bias, np.float32(EPS))


def softmax(x):
    return map_rows("softmax", x)


def quick_gelu(x):
    return map_rows("quick_gelu", x)


def gelu(x):
    return map_rows("gelu", x)


def linear(x, weight, bias, dtype=np.float16):
    """Return x @ weight.T + bias. The product starts its sum at the bias, so the result is rounded once."""
    rows = x.reshape(-1, x.shape[-1])
    out = cupy.empty((len(rows), len(weight)), dtype)
    out[...] = bias
    return product(rows, weight.T, out, add=True).reshape(*x.shape[:-1], len(weight))


def unrounded_linear(x, weight, bias):
    return linear(x, weight, bias, np.float32)


def add(x, change):
    return cupy.add(x, change, out=cupy.empty_like(x))


def matmul(a, b):
    return product(a, b, cupy.empty((*a.shape[:-1], b.shape[-1]), np.float16))


def product(a, b, out, add=False):
    """Write a @ b to out, or add it to out, for stacks of float16 matrices [..., M, K] @ [..., K, N].

    The tensor cores sum in float32 and round once, where out is float16. cuBLAS may split a long sum and
    round its terms, as it does for torch. cuBLAS stores matrices by columns, so it sees every matrix
    transposed, and it computes out.T = b.T @ a.T.
    """
    if not out.size:
        return out
    (M, K), N = a.shape[-2:], b.shape[-1]
    (a, a_transposed), (b, b_transposed) = as_stored(a), as_stored(b)
    operation = cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T
    half = CUBLAS_DTYPES["e"]
    cublas.gemmStridedBatchedEx(
        *(device.get_cublas_handle(), operation[b_transposed], operation[a_transposed], N, M, K, ONE),
        *(b.data.ptr, half, b.shape[-1], K * N),
        *(a.data.ptr, half, a.shape[-1], M * K, ONE if add else ZERO),
        *(out.data.ptr, CUBLAS_DTYPES[out.dtype.char], N, M * N, out.size // (M * N)),
        *(cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT_TENSOR_OP),
    )
    return out


def as_stored(x):
    """Return (array, transposed): x or its transpose, whichever is stored row by row, contiguous."""
    transposed = x.strides[-1] > x.strides[-2]
    x = x.swapaxes(-1, -2) if transposed else x
    return cupy.ascontiguousarray(x, dtype=np.float16), transposed


def map_rows(name, x, *others):
    """Return the array that a kernel computes from the rows of x. Same shape and dtype."""
    x = cupy.ascontiguousarray(x)
    y = cupy.empty_like(x)
    launch_on_rows(name, x, y, *others)
    return y


def launch_on_rows(name, x, y, *others):
    """Run a kernel that reads the rows of x (last axis) and writes those of y, one warp per row.

    All arrays must be C-contiguous. y may be x.
    """
    if not x.size:
        return
    length = x.shape[-1]
    rows = x.size // length
    arrays = (array for array in (x, y, *others) if isinstance(array, cupy.ndarray))
    aligned = length % PACK == 0 and all(array.data.ptr % 16 == 0 for array in arrays)
    compiled = kernel(name, x.dtype.char, PACK if aligned else 1)
    launch(compiled, rows, x, y, *others, np.int32(rows), np.int32(length))


def launch(kernel, warps, *arguments):
    """Run a kernel on at least `warps` warps."""
    kernel((-(-warps // WARPS),), (32, WARPS), arguments)


@functools.cache
def kernel(name, dtype, pack=1, head_width=64):
    """Return a kernel of kernels.cu. CUDA compiles it on first use, and CuPy keeps it on disk."""
    stored, computed = CUDA_DTYPES[dtype]
    options = (f"-Dstorage_t={stored}", f"-Dcompute_t={computed}", f"-DPACK={pack}", f"-DK={head_width}")
    if stored == "__half":  # rounding to float16 is far coarser than the errors of a fast exp or division
        options += ("--use_fast_math",)
    return cupy.RawKernel(SOURCE.read_text(encoding="utf-8"), name, options)
