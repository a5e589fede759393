"""A small tower, and the two libraries that the tests of the GPU run on.

The fixture `cupy` is the stand-in for CuPy with its kernels, and CuPy itself where there is a GPU.
"""

import shutil

import pytest

import minclip
from minclip.gpu import device
from tests.support import fake_cupy
from tests.support.fake_cupy import Fake
from tests.support.oracles import random_params, random_tokens

PARAMS = random_params(width=128, layers=2, embed=24, context=19, vocabulary=97)
TOKENS = random_tokens([5, 2, 11], context=19, vocabulary=97)
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, to run CUDA on the host")


@pytest.fixture
def fake(monkeypatch):
    return fake_cupy.install(monkeypatch)


@pytest.fixture
def card():
    cupy = pytest.importorskip("cupy", reason="needs an NVIDIA GPU: CuPy is not installed")
    if not cupy.is_available():
        pytest.skip("needs an NVIDIA GPU: CuPy finds none here")
    Fake.waits.clear()
    return cupy


@pytest.fixture(
    params=[pytest.param("fake", marks=needs_compiler), pytest.param("card", marks=pytest.mark.gpu)]
)
def cupy(request):
    return request.getfixturevalue(request.param)


def on_gpu(params, dtype, activation="quick_gelu", heads=2):
    """Return the same tower twice: on the host and on the GPU."""
    arrays = {name: array.astype(dtype) for name, array in params.items()}
    return (
        minclip.Params(arrays, activation=activation, heads=heads),
        minclip.Params(device.to_gpu(arrays), activation=activation, heads=heads),
    )
