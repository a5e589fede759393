"""The stand-in refuses what CuPy refuses, and the kernels compile: against CuPy itself, without a GPU.

`pytest -m cupy tests/unit/gpu` needs the wheels of CuPy, NVRTC and CUDA's headers:
`pip install "cupy-cuda12x[ctk]"` or `"cupy-cuda13x[ctk]"`. With a GPU, `pytest -m gpu` adds the refusals that
CuPy makes only there.
"""

import inspect
import re

import numpy as np
import pytest

from minclip.tracing import is_own
from tests.support import fake_cupy
from tests.support.fake_cupy import CUBLAS, CUDA, CUDA_DTYPES, FUNCTIONS, GEMM, METHODS, Fake, signature

NUMBERS = np.arange(6, dtype=np.float32).reshape(2, 3)


def without_gpu(cupy):
    """Return a CuPy array in the host's memory, of which CuPy makes views. It cannot compute with it."""
    memory = cupy.cuda.UnownedMemory(NUMBERS.ctypes.data, NUMBERS.nbytes, NUMBERS, device_id=0)
    return cupy.ndarray(NUMBERS.shape, NUMBERS.dtype, cupy.cuda.MemoryPointer(memory, 0))


@pytest.fixture
def real():
    return pytest.importorskip("cupy", reason="CuPy is not installed")


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.cupy)])
def either(request):
    """Return (the stand-in or CuPy, an array of it)."""
    cupy = request.getfixturevalue(request.param)
    return cupy, cupy.asarray(NUMBERS) if isinstance(cupy, Fake) else without_gpu(cupy)


@pytest.mark.parametrize(
    "refused",
    [
        lambda cupy, x: np.asarray(x),
        lambda cupy, x: x @ np.ones(3),
        lambda cupy, x: x.__setitem__(0, np.ones(3)),
        lambda cupy, x: cupy.stack((x, np.ones((2, 3)))),
        lambda cupy, x: cupy.lexsort((x[0], x[1])),
        lambda cupy, x: cupy.vecdot(x, x),
        lambda cupy, x: x.max(initial=0),
        lambda cupy, x: x.sum(where=True),
        lambda cupy, x: x.mean(axis=0, where=True),
        lambda cupy, x: x.astype("f2", device="gpu"),
        lambda cupy, x: cupy.full(3, 1.0, device="gpu"),
        lambda cupy, x: cupy.asarray(x, device="gpu"),
        lambda cupy, x: hash(x),
    ],
)
def test_both_refuse(either, refused):
    with pytest.raises((TypeError, ValueError, AttributeError)):
        refused(*either)


@pytest.mark.parametrize("name", ["fake", pytest.param("card", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "refused", [lambda cupy, x: x + np.ones(3), lambda cupy, x: cupy.exp(np.ones(3))], ids=["add", "exp"]
)
def test_both_refuse_numpys_arrays_in_arithmetic(request, name, refused):
    cupy = request.getfixturevalue(name)
    with pytest.raises(TypeError):
        refused(cupy, cupy.asarray(NUMBERS))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.T,
        lambda x: x[0],
        lambda x: x[1:, ::2],
        lambda x: x[:, None],
        lambda x: x[..., :1],
        lambda x: x.reshape(-1),
        lambda x: x.reshape(1, 2, 3).transpose(2, 0, 1),
        lambda x: x.swapaxes(-1, -2)[1:],
        lambda x: x.astype("f4", copy=False),
    ],
)
def test_a_view_has_the_layout_that_it_has_in_numpy(either, view):
    found, expected = view(either[1]), view(NUMBERS.copy())
    assert type(found) is type(either[1])
    assert (found.shape, found.strides, found.dtype) == (expected.shape, expected.strides, expected.dtype)
    assert (found.ndim, found.size, found.nbytes) == (expected.ndim, expected.size, expected.nbytes)
    assert found.flags.c_contiguous == expected.flags.c_contiguous
    assert is_own(found) == is_own(expected)
    assert len(found) == len(expected)


def test_the_stand_in_refuses_numpys_functions_which_cupy_takes(fake):
    with pytest.raises(TypeError, match="array_module"):
        np.exp(fake.asarray([1.0, 2, 3]))


def test_the_stand_in_counts_what_makes_the_host_wait(fake):
    x = fake.asarray([1.0, 2, 3])
    assert float(x.sum()) == 6
    assert bool(x[0] < 2)
    x[x > 1]
    repr(x)
    x.get()
    assert Fake.waits == ["__float__", "__bool__", "boolean mask", "__repr__", "get"]


def parameters(function):
    """Return the parameters of one of CuPy's functions, as it or its documentation states them."""
    try:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
    except ValueError:  # compiled: the first line of the documentation is the signature, with C's types
        said = function.__doc__.split("\n")[0].partition("(")[2].rpartition(")")[0]
        typed = re.sub(r"\b(Py_ssize_t|intptr_t|size_t|long long|int|str|tuple|bool) (?=\w)", "", said)
        return [(p.name, p.kind, p.default) for p in signature(typed).parameters.values()]


@pytest.mark.cupy
@pytest.mark.parametrize("name", [*FUNCTIONS, *CUDA])
def test_a_function_has_cupys_own_signature(real, name):
    function = real
    for part in name.split("."):
        function = getattr(function, part)
    said = (FUNCTIONS | CUDA)[name]
    if said is None:
        assert isinstance(function, real.ufunc)
    elif name == "RawKernel.__call__":
        assert function.__doc__.startswith(f"RawKernel.__call__({said})")
    else:
        expected = signature(said).parameters.values()
        assert parameters(function) == [(p.name, p.kind, p.default) for p in expected]


@pytest.mark.cupy
@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_cupys_own_signature(real, name):
    said = getattr(real.ndarray, name).__doc__.split("\n")[0]
    said = said.partition("(self")[2].rpartition(")")[0].removeprefix(", ").replace("Py_ssize_t ", "")
    assert said == METHODS[name]


@pytest.mark.cupy
def test_ndarray_has_every_operator_and_attribute_of_the_stand_in(real):
    own = [name for name in vars(fake_cupy.ndarray) if name not in ("_array", "__dict__", "__weakref__")]
    assert [name for name in own if not hasattr(real.ndarray, name)] == []
    assert callable(real.add.at)


@pytest.mark.cupy
def test_cublas_takes_the_arguments_and_constants_of_the_stand_in(real):
    from cupy_backends.cuda.libs import cublas

    assert [name for name, _, _ in parameters(cublas.gemmStridedBatchedEx)] == GEMM.split(", ")
    assert {name: getattr(cublas, name) for name in CUBLAS} == CUBLAS
    assert {name: getattr(real.cuda.runtime, name) for name in CUDA_DTYPES} == CUDA_DTYPES


KINDS = [("e", 4, 64), ("e", 1, 64), ("e", 4, 24), ("e", 4, 80), ("e", 4, 128)]
KINDS += [("f", 4, 64), ("f", 1, 8), ("d", 4, 64), ("d", 1, 16)]


@pytest.mark.cupy
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_cuda_compiles_the_kernels_to_machine_code_that_keeps_to_its_registers(real, kind, architecture):
    """With the options of `steps`, and CuPy's own for CUDA's headers. sm_75 is the oldest of CUDA 13."""
    from cupy._core.core import assemble_cupy_compiler_options

    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
    from minclip.gpu import steps

    kernel = steps.kernel("attend", *kind)
    options = assemble_cupy_compiler_options(kernel.options)
    program = nvrtc.createProgram(kernel.code, "kernels.cu", (), ())
    try:
        options += (f"--gpu-architecture={architecture}", "--ptxas-options=-v")
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    log = nvrtc.getProgramLog(program)
    names = re.findall(r"__global__ void (\w+)\(", kernel.code)
    assert sorted(names) == sorted(re.findall(r"Compiling entry function '(\w+)'", log))
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(names)
    assert nvrtc.getCUBIN(program)
