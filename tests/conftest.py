"""Settings for all tests."""

import os

import pytest
from hypothesis import settings

# The two halves of the tests share two cores. A second thread of BLAS and torch in each would only take
# the core of the other and wait there: with it, the tests take half as long again. The processes that
# tests start inherit this. It must be set before NumPy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

settings.register_profile("default", deadline=None)  # tests time nothing
# For tests/unit/test_properties.py:
settings.register_profile("deep", max_examples=100_000, deadline=None, database=None)


@pytest.fixture(scope="module")
def two_blas_threads():
    """Let BLAS use two threads in this module's tests, as it would on a user's machine."""
    from minclip.fast.blas import blas

    libraries = blas().lib_controllers
    before = [library.get_num_threads() for library in libraries]
    for library in libraries:
        library.set_num_threads(2)
    yield
    for library, threads in zip(libraries, before, strict=True):
        library.set_num_threads(threads)
