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

from minclip.model import EPS

ROWS = 8  # rows that a block of threads takes, one warp of 32 threads to a row
SOURCE = Path(__file__).with_name("kernels.cu")


def layer_norm(x, weight, bias):
    weight, bias = (array.astype(np.float32, copy=False) for array in (weight, bias))
    return by_rows("layer_norm", x, weight, bias, np.float32(EPS))


def softmax(x):
    return by_rows("softmax", x)


def quick_gelu(x):
    return by_rows("quick_gelu", x)


def gelu(x):
    return by_rows("gelu", x)


def linear(x, weight, bias):
    """The bias is where the product starts its sum, so that the two are rounded together."""
    rows = x.reshape(-1, x.shape[-1])
    onto = cupy.empty((len(rows), len(weight)), x.dtype)
    onto[...] = bias
    return product(rows, weight.T, onto).reshape(*x.shape[:-1], len(weight))


def matmul(a, b):
    return product(a, b, None)


def product(a, b, onto):
    """a @ b, added in place to onto (None: to nothing), for stacks of matrices [..., M, K] @ [..., K, N].

    On the tensor cores: float16 in, summed in float32, float16 out. cuBLAS keeps matrices by columns, so
    what it sees is each transposed, and what it is asked for is out.T = b.T @ a.T.
    """
    from cupy_backends.cuda.libs import cublas  # late: it loads the CUDA library

    (*stack, M, K), N = a.shape, b.shape[-1]
    out = cupy.empty((*stack, M, N), np.float16) if onto is None else onto
    if not out.size:
        return out
    (a, a_turned), (b, b_turned) = as_stored(a), as_stored(b)
    turn = {False: cublas.CUBLAS_OP_N, True: cublas.CUBLAS_OP_T}
    one, start = np.float32([1]), np.float32([onto is not None])
    half = runtime.CUDA_R_16F
    cublas.gemmStridedBatchedEx(
        *(device.get_cublas_handle(), turn[b_turned], turn[a_turned], N, M, K, one.ctypes.data),
        *(b.data.ptr, half, b.shape[-1], K * N),
        *(a.data.ptr, half, a.shape[-1], M * K, start.ctypes.data),
        *(out.data.ptr, half, N, M * N, out.size // (M * N)),
        *(cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT_TENSOR_OP),
    )
    return out


def as_stored(x):
    """(array, turned): x's matrices row after row in memory, or, where that is nearer, those of x.T."""
    turned = x.strides[-1] > x.strides[-2]
    x = x.swapaxes(-1, -2) if turned else x
    return cupy.ascontiguousarray(x, dtype=np.float16), turned


def by_rows(name, x, *arguments):
    """A kernel that makes of each row of x, of the last axis, a row of the same length."""
    x = cupy.ascontiguousarray(x)
    y = cupy.empty_like(x)
    length = x.shape[-1]
    if y.size:
        rows = x.size // length
        grid = (-(-rows // ROWS),)
        kernel(name)(grid, (32, ROWS), (x, y, *arguments, np.int32(rows), np.int32(length)))
    return y


@functools.cache
def kernel(name, number="__half", wide="float", head_width=64):
    """A kernel of kernels.cu; CUDA compiles it on its first use and CuPy keeps it on disk."""
    options = (f"-DNUMBER={number}", f"-DWIDE={wide}", f"-DK={head_width}")
    return cupy.RawKernel(SOURCE.read_text(), name, options)
