"""Copy arrays to the GPU, or name the missing library in one line."""

from collections.abc import Mapping
from typing import Any

from minclip.params import in_a_clone

REMEDY = in_a_clone("cuda13") + ' (NVIDIA driver 580 or newer) or ".[cuda12]"'
NO_DEVICE = 100  # cudaErrorNoDevice


def to_gpu(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Copy NumPy arrays to the current GPU: a dict from the same names to CuPy arrays of the same dtypes.

    Raises ValueError where CuPy, a driver or a GPU is missing, MemoryError where the GPU is too full.
    """
    cupy = working_cupy()
    try:
        return {name: cupy.asarray(array) for name, array in arrays.items()}
    except cupy.cuda.memory.OutOfMemoryError as error:
        size = sum(array.nbytes for array in arrays.values()) / 2**20
        message = f'device="cuda": the GPU has no room for parameters of {size:.0f} MiB ({error})'
        remedy = 'free GPU memory, or load with dtype="float16", or load on the CPU'
        raise MemoryError(f"{message}; {remedy}") from None


def working_cupy() -> Any:
    """Import CuPy, check that it finds a GPU, and return the module.

    Raises ValueError where CuPy, a driver or a GPU is missing.
    """
    try:
        import cupy
    except ImportError as error:
        raise ValueError(f'device="cuda" needs CuPy, which cannot be imported ({error}): {REMEDY}') from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:  # CUDARuntimeError; its status is CUDA's own error number
        if getattr(error, "status", None) != NO_DEVICE:
            raise ValueError(
                f'device="cuda" needs an NVIDIA driver that fits CuPy ({error}): update it or {REMEDY}'
            ) from None
        count = 0
    if not count:
        raise ValueError('device="cuda": no NVIDIA GPU is visible here; use device="cpu"')
    return cupy
