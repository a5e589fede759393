"""A stand-in for CuPy where there is no GPU: NumPy's arithmetic behind CuPy's refusals.

The stand-in raises TypeError or AttributeError where CuPy does: for implicit conversion to NumPy, for NumPy
arrays among CuPy arrays, for names and keywords that CuPy lacks. It counts in `Fake.waits` everything that
makes the host wait for the GPU. It calls cuBLAS by address, as CuPy does. Its RawKernel compiles the CUDA
source itself, with g++ and cuda_on_cpu.h.

It is stricter than CuPy in two ways. CuPy's `__array_ufunc__` accepts `np.exp(cupy_array)`; the stand-in
refuses it, because minclip calls `array_module(x).exp`. And CuPy has more functions and methods than
`FUNCTIONS` and `METHODS` list: add one there, with CuPy's signature, when minclip needs it.

The signatures are those of CuPy 14.2. `pytest -m cupy tests/unit/gpu` compares them, the refusals and the
views with CuPy where it is installed, with or without a GPU.
"""

import ctypes
import functools
import inspect
import re
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import numpy as np

import minclip

FUNCTIONS = {
    "asarray": "a, dtype=None, order=None, *, copy=None, blocking=False",
    "asnumpy": "a, stream=None, order='C', out=None, *, blocking=True",
    "ascontiguousarray": "a, dtype=None",
    "arange": "start, stop=None, step=1, dtype=None",
    "empty": "shape, dtype=float, order='C'",
    "empty_like": "prototype, dtype=None, order='K', subok=None, shape=None",
    "full": "shape, fill_value, dtype=None, order='C'",
    "zeros": "shape, dtype=float, order='C'",
    "zeros_like": "a, dtype=None, order='K', subok=None, shape=None",
    "array": "obj, dtype=None, copy=True, order='K', subok=False, ndmin=0, *, blocking=False",
    "stack": "tup, axis=0, out=None, *, dtype=None, casting='same_kind'",
    "eye": "N, M=None, k=0, dtype=float, order='C'",
    "triu": "m, k=0",
    "where": "condition, x=None, y=None",
    "lexsort": "keys",
    "searchsorted": "a, v, side='left', sorter=None",
    "log": None,
    "exp": None,  # CuPy shows no signature of its ufuncs
    "add": None,
}
METHODS = {
    "astype": "dtype, order='K', casting=None, subok=None, copy=True",
    "reshape": "*shape, order='C', copy=None",
    "transpose": "*axes",
    "swapaxes": "axis1, axis2",
    "copy": "order='C'",
    "mean": "axis=None, dtype=None, out=None, keepdims=False",
    "sum": "axis=None, dtype=None, out=None, keepdims=False",
    "max": "axis=None, out=None, keepdims=False",
    "argmax": "axis=None, out=None, dtype=None, keepdims=False",
    "any": "axis=None, out=None, keepdims=False",
    "trace": "offset=0, axis1=0, axis2=1, dtype=None, out=None",
    "cumsum": "axis=None, dtype=None, out=None",
    "nonzero": "",
    "get": "stream=None, order='C', out=None, blocking=True",
    "item": "",
}
CUDA = {  # without the types that CuPy's documentation states
    "cuda.Stream": "null=False, non_blocking=False, ptds=False, priority=None",
    "cuda.Stream.record": "self, event=None",
    "cuda.Stream.wait_event": "self, event",
    "cuda.Stream.synchronize": "self",
    "cuda.Event": "block=False, disable_timing=False, interprocess=False",
    "cuda.Event.record": "self, stream=None",
    "cuda.Event.synchronize": "self",
    "cuda.get_current_stream": "device_id=-1",
    "cuda.get_elapsed_time": "start_event, end_event",
    "cuda.runtime.getDeviceCount": "",
    "cuda.runtime.getDevice": "",
    "cuda.runtime.getDeviceProperties": "device",
    "cuda.runtime.driverGetVersion": "",
    "cuda.runtime.runtimeGetVersion": "",
    "cuda.device.get_cublas_handle": "",
    "get_default_memory_pool": "",
    "RawKernel": "code, name, options=(), backend='nvrtc', translate_cucomplex=False, "
    "*, enable_cooperative_groups=False, jitify=None",
    "RawKernel.__call__": "self, grid, block, args, **kwargs",
}
GEMM = (
    "handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB, beta, C, Ctype, "
    "ldc, strideC, batchCount, computeType, algo"
)
CUBLAS = dict(CUBLAS_OP_N=0, CUBLAS_OP_T=1, CUBLAS_COMPUTE_32F=68, CUBLAS_GEMM_DEFAULT_TENSOR_OP=99)
CUDA_DTYPES = dict(CUDA_R_32F=0, CUDA_R_16F=2)
OPERATORS = (
    "add sub mul truediv pow matmul and neg radd rsub rmul rtruediv rpow iadd lt le eq ne gt ge".split()
)
HOST = Path(__file__).with_name("cuda_on_cpu.h")
LAUNCHING = threading.Lock()  # cuda_on_cpu.h keeps one warp at a time in global variables


def signature(text):
    """Return the inspect.Signature of a parameter list such as "a, *, b=None"."""
    return inspect.signature(eval(f"lambda {text}: None"))


def inside(value):
    """Return the NumPy array inside a stand-in array. Raise TypeError for a NumPy array itself."""
    if isinstance(value, tuple):
        return tuple(map(inside, value))
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    return value._array if isinstance(value, ndarray) else value


def outside(value):
    """Return a result as CuPy would: even the sum over all axes is an array, with no axes."""
    if isinstance(value, tuple):
        return tuple(map(outside, value))
    return ndarray(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


class ndarray:
    def __init__(self, array):
        self._array = array

    shape = property(lambda self: self._array.shape)
    strides = property(lambda self: self._array.strides)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    dtype = property(lambda self: self._array.dtype)
    flags = property(lambda self: self._array.flags)
    nbytes = property(lambda self: self._array.nbytes)
    base = property(lambda self: None if self._array.base is None else ndarray(self._array.base))
    T = property(lambda self: ndarray(self._array.T))
    data = property(lambda self: types.SimpleNamespace(ptr=self._array.ctypes.data))
    __hash__ = None

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, *args, **kwargs):
        raise TypeError("the stand-in takes no NumPy function: call array_module(x).exp, say")

    def __len__(self):
        return len(self._array)

    def __iter__(self):
        return map(outside, self._array)

    def __abs__(self):
        return ndarray(abs(self._array))

    def __getitem__(self, at):
        for part in at if isinstance(at, tuple) else (at,):
            if isinstance(part, ndarray) and part.dtype == bool:
                Fake.waits.append("boolean mask")
        return outside(self._array[inside(at)])

    def __setitem__(self, at, value):
        self._array[inside(at)] = inside(value)


def define_operator(name):
    def operate(self, *others):
        return outside(getattr(self._array, name)(*map(inside, others)))

    setattr(ndarray, name, operate)


def define_method(name, parameters):
    allowed = signature(parameters)

    def method(self, *args, **kwargs):
        allowed.bind(*args, **kwargs)
        if name in ("get", "item", "nonzero"):  # nonzero: the host must know the size of its result
            Fake.waits.append(name)
        if name in ("get", "item"):
            return self._array.copy() if name == "get" else self._array.item()
        return outside(getattr(self._array, name)(*args, **kwargs))

    setattr(ndarray, name, method)


def define_wait(name):
    def wait(self, *args):
        Fake.waits.append(name)
        return getattr(self._array, name)(*args)

    setattr(ndarray, name, wait)


for name in OPERATORS:
    define_operator(f"__{name}__")
for name, parameters in METHODS.items():
    define_method(name, parameters)
for name in ("__float__", "__int__", "__bool__", "__repr__", "__str__", "__format__"):
    define_wait(name)


class Fake(types.ModuleType):
    """The module cupy. `Fake.waits` lists everything that made the host wait."""

    waits = []  # noqa: RUF012
    ndarray = ndarray

    def __init__(self):
        super().__init__("cupy")
        self.cuda = types.ModuleType("cupy.cuda")
        self.cuda.runtime = types.SimpleNamespace(
            **CUDA_DTYPES,
            getDeviceCount=lambda: 1,
            getDevice=lambda: 0,
            getDeviceProperties=lambda device: {"name": b"a stand-in"},
            driverGetVersion=lambda: 0,
            runtimeGetVersion=lambda: 0,
        )
        self.cuda.device = types.SimpleNamespace(get_cublas_handle=lambda: 0)
        self.cuda.memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
        self.cuda.Stream, self.cuda.Event = Stream, Event
        self.cuda.get_current_stream = lambda device_id=-1: Stream()
        self.cuda.get_elapsed_time = lambda start_event, end_event: 1e3 * (end_event.time - start_event.time)
        self.get_default_memory_pool = lambda: types.SimpleNamespace(total_bytes=lambda: 0)
        self.RawKernel = RawKernel
        self.inf = np.inf
        self.__version__ = "of nothing"

    def __getattr__(self, name):
        if name not in FUNCTIONS:
            raise AttributeError(f"module 'cupy' has no attribute {name!r}, or the stand-in does not know it")
        allowed = FUNCTIONS[name] and signature(FUNCTIONS[name])

        def function(*args, **kwargs):
            if allowed:
                allowed.bind(*args, **kwargs)
            if name in ("asarray", "array"):  # they alone take NumPy arrays, and they copy them
                source = args[0]
                if isinstance(source, ndarray) and name == "asarray" and not kwargs:
                    return source
                return ndarray(np.array(inside(source) if isinstance(source, ndarray) else source, **kwargs))
            if name == "asnumpy":
                return args[0].get()
            if name == "lexsort" and not isinstance(args[0], ndarray):
                raise TypeError("lexsort takes one array of keys [k, N]")
            kwargs = {key: inside(value) for key, value in kwargs.items()}
            return outside(getattr(np, name)(*map(inside, args), **kwargs))

        if name == "add":
            function.at = lambda *args: np.add.at(*map(inside, args))
        return function


class OutOfMemoryError(MemoryError):
    pass


class Stream:
    """A stream. The stand-in runs everything at once."""

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def record(self, event=None):
        return (event or Event()).record(self)

    def wait_event(self, event):
        assert isinstance(event, Event)

    def synchronize(self):
        Fake.waits.append("synchronize")


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        pass

    def record(self, stream=None):
        self.time = time.perf_counter()
        return self

    def synchronize(self):
        Fake.waits.append("synchronize")


def matrices(address, ld, stride, batch, transposed, rows, columns, dtype=np.float16):
    """Return the matrices [batch, rows, columns] that cuBLAS reads at an address: column by column.

    Columns are ld numbers apart. A transposed matrix is stored row by row.
    """
    shape, distances = (batch, rows, columns), (stride, ld, 1) if transposed else (stride, 1, ld)
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, distances, strict=True))
    size = np.dtype(dtype).itemsize
    memory = np.frombuffer((ctypes.c_char * (size * reach)).from_address(address), dtype)
    step = [size * s for s in distances]
    return np.lib.stride_tricks.as_strided(memory, shape, step)


def gemm(*args):
    """cublasGemmStridedBatchedEx for float16: summed in float32, rounded once to float16 or not at all."""
    g = types.SimpleNamespace(**signature(GEMM).bind(*args).arguments)
    assert (g.Atype, g.Btype, g.computeType, g.algo) == (2, 2, 68, 99)
    alpha, beta = (ctypes.c_float.from_address(at).value for at in (g.alpha, g.beta))
    a = matrices(g.A, g.lda, g.strideA, g.batchCount, g.transa, g.m, g.k).astype(np.float32)
    b = matrices(g.B, g.ldb, g.strideB, g.batchCount, g.transb, g.k, g.n).astype(np.float32)
    stored = {0: np.float32, 2: np.float16}[g.Ctype]
    c = matrices(g.C, g.ldc, g.strideC, g.batchCount, 0, g.m, g.n, stored)
    c[...] = alpha * (a @ b) + (beta * c.astype(np.float32) if beta else 0)


class RawKernel:
    """A kernel of CUDA source that runs on the host, one warp after another."""

    def __init__(self, code, name, options=()):
        heading = re.search(rf"__global__ void {name}\((.*?)\)", code, re.DOTALL)[1]
        self.kinds = [parameter.split()[:-1] for parameter in heading.split(",")]
        self.run = getattr(compiled(code, tuple(options)), f"launch_{name}")

    def __call__(self, grid, block, args):
        assert block[0] == 32, "the stand-in launches complete warps only"
        assert len(args) == len(self.kinds)
        values = []
        for kind, value in zip(self.kinds, args, strict=True):
            is_pointer = kind[-1].endswith("*")
            assert is_pointer == isinstance(value, ndarray), f"{kind} is given {value!r}"
            if is_pointer:
                assert value.flags.c_contiguous
                expected = {"int*": "i4", "compute_t*": None, "storage_t*": None}[kind[-1]]
                assert expected is None or value.dtype == expected
            values.append(ctypes.c_void_p(value.data.ptr) if is_pointer else as_c(kind[-1], value))
        pointers = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
        with LAUNCHING:
            self.run(grid[0], block[1], (ctypes.c_void_p * len(args))(*pointers))


def as_c(kind, value):
    """Return a number as C passes it. CuPy keeps a NumPy scalar's type, so it must be the kernel's."""
    assert value.dtype in {"int": ("i4",), "compute_t": ("f4", "f8")}[kind]
    return {"i4": ctypes.c_int, "f4": ctypes.c_float, "f8": ctypes.c_double}[value.dtype.str[1:]](value)


@functools.cache
def compiled(code, options):
    """Compile a CUDA source to a library with a function launch_NAME for each kernel."""
    source = code.replace("#include <cuda_fp16.h>", f'#include "{HOST}"')
    for name, parameters in re.findall(r"__global__ void (\w+)\((.*?)\)", code, re.DOTALL):
        kinds = [" ".join(parameter.split()[:-1]) for parameter in parameters.split(",")]
        passed = ", ".join(f"*({kind}*)p[{i}]" for i, kind in enumerate(kinds))
        source += f'extern "C" void launch_{name}(int grid, int warps, void** p) '
        source += f"{{ launch(grid, warps, [=] {{ {name}({passed}); }}); }}\n"
    options = [option for option in options if option.startswith("-D")]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "kernels.so")
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-x", "c++", *options, "-o", library, "-"]
        subprocess.run(command, input=source.encode(), check=True)
        return ctypes.CDLL(str(library))


def install(monkeypatch):
    """Replace CuPy by a stand-in until the test ends, and return the stand-in."""
    fake = Fake()
    cublas = types.ModuleType("cublas")
    cublas.__dict__.update(CUBLAS, gemmStridedBatchedEx=gemm)
    libs = types.SimpleNamespace(cublas=cublas)
    for name, module in {
        "cupy": fake,
        "cupy.cuda": fake.cuda,
        "cupy_backends": types.ModuleType("cupy_backends"),
        "cupy_backends.cuda": types.ModuleType("cuda"),
        "cupy_backends.cuda.libs": libs,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    # Modules that imported this stand-in must go when it goes. To set them first makes monkeypatch undo both.
    for package, name in ((minclip.gpu, "steps"), (minclip.fast, "gpu")):
        monkeypatch.setitem(sys.modules, f"{package.__name__}.{name}", None)
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}")
        monkeypatch.setattr(package, name, None, raising=False)
        monkeypatch.delattr(package, name)
    Fake.waits.clear()
    return fake
