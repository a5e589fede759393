"""float16 on the GPU: the steps of `minclip.model` as CuPy would not do them by itself.

CuPy copies stacked float16 products to float32, off the tensor cores, and passes over memory once for
every arithmetic sign. Here each step is one product on the tensor cores or one kernel of kernels.cu;
inside it numbers are float32, and they are rounded once, at its end. Names and meaning are those of
`minclip.model`, which hands its float16 CuPy arrays here; those of float32 and float64 it keeps.
"""

import functools
from pathlib import Path

import cupy
import numpy as np
from cupy.cuda import device, runtime
from cupy_backends.cuda.libs import cublas

from minclip.params import EPS

ROWS = 8  # rows that a block of threads takes, one warp of 32 threads to a row
PACK = 4  # numbers that a thread takes at once, where a row's length and the arrays' places allow it
NUMBERS = {"e": ("__half", "float"), "f": ("float", "float"), "d": ("double", "double")}  # NUMBER, WIDE
CUDA_TYPES = {"e": runtime.CUDA_R_16F, "f": runtime.CUDA_R_32F}
FACTORS = np.float32([0, 1])  # which cuBLAS wants by their addresses
ZERO, ONE = FACTORS.ctypes.data, FACTORS.ctypes.data + FACTORS.itemsize
SOURCE = Path(__file__).with_name("kernels.cu")


def layer_norm(x, weight, bias):
    weight, bias = (cupy.ascontiguousarray(array, dtype=np.float32) for array in (weight, bias))
    return to_new("layer_norm", x, weight, bias, np.float32(EPS))


def softmax(x):
    return to_new("softmax", x)


def quick_gelu(x):
    return to_new("quick_gelu", x)


def gelu(x):
    return to_new("gelu", x)


def linear(x, weight, bias, dtype=np.float16):
    """The bias is where the product starts its sum, so that the two are rounded together."""
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
    """a @ b written to out, or added to it, for stacks of float16 matrices [..., M, K] @ [..., K, N].

    On the tensor cores: summed in float32 (of a long sum that cuBLAS splits, it may round the parts, as it
    does for torch) and rounded once, where out is float16. cuBLAS keeps matrices by columns, so what it sees
    is each transposed, and what it is asked for is out.T = b.T @ a.T.
    """
    if not out.size:
        return out
    M, K, N = *a.shape[-2:], b.shape[-1]
    (a, a_turned), (b, b_turned) = as_stored(a), as_stored(b)
    turn = cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T
    half, number = CUDA_TYPES["e"], CUDA_TYPES[out.dtype.char]
    cublas.gemmStridedBatchedEx(
        *(device.get_cublas_handle(), turn[b_turned], turn[a_turned], N, M, K, ONE),
        *(b.data.ptr, half, b.shape[-1], K * N),
        *(a.data.ptr, half, a.shape[-1], M * K, ONE if add else ZERO),
        *(out.data.ptr, number, N, M * N, out.size // (M * N)),
        *(cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT_TENSOR_OP),
    )
    return out


def as_stored(x):
    """(array, turned): x's matrices row after row in memory, or, where that is nearer, those of x.T."""
    turned = x.strides[-1] > x.strides[-2]
    x = x.swapaxes(-1, -2) if turned else x
    return cupy.ascontiguousarray(x, dtype=np.float16), turned


def to_new(name, x, *others):
    """What a kernel makes of the rows of x."""
    x = cupy.ascontiguousarray(x)
    y = cupy.empty_like(x)
    by_rows(name, x, y, *others)
    return y


def by_rows(name, x, y, *others):
    """Run a kernel on the rows of x, of the last axis, a warp to each; all arrays are C-contiguous."""
    if not x.size:
        return
    length = x.shape[-1]
    rows = x.size // length
    arrays = (array for array in (x, y, *others) if isinstance(array, cupy.ndarray))
    aligned = length % PACK == 0 and all(array.data.ptr % 16 == 0 for array in arrays)
    made = kernel(name, x.dtype.char, PACK if aligned else 1)
    launch(made, rows, x, y, *others, np.int32(rows), np.int32(length))


def launch(kernel, warps, *arguments):
    kernel((-(-warps // ROWS),), (32, ROWS), arguments)


@functools.cache
def kernel(name, number, pack=1, head_width=64):
    """A kernel of kernels.cu; CUDA compiles it on its first use and CuPy keeps it on disk."""
    number, wide = NUMBERS[number]
    options = (f"-DNUMBER={number}", f"-DWIDE={wide}", f"-DPACK={pack}", f"-DK={head_width}")
    if number == "__half":  # its rounding is far coarser than the errors of a quick exp or division
        options += ("--use_fast_math",)
    return cupy.RawKernel(SOURCE.read_text(), name, options)
