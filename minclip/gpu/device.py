"""Arrays onto the GPU, or one line that says what is missing."""

REMEDY = 'in a clone of minclip, pip install ".[cuda13]" (NVIDIA driver 580 or newer) or ".[cuda12]"'
NO_DEVICE = 100  # cudaErrorNoDevice


def to_gpu(arrays):
    """NumPy arrays by name as CuPy arrays by name, on the current GPU, in the same dtypes.

    Raises ValueError where CuPy, a driver or a GPU is missing, MemoryError where the GPU is too full.
    """
    cupy = working_cupy()
    try:
        return {name: cupy.asarray(array) for name, array in arrays.items()}
    except cupy.cuda.memory.OutOfMemoryError as error:
        size = sum(array.nbytes for array in arrays.values()) / 2**20
        message = f'device="cuda": the GPU has no room for parameters of {size:.0f} MiB ({error})'
        raise MemoryError(f'{message}; free some, load with dtype="float16" or on the CPU') from None


def working_cupy():
    """The module cupy, imported, once it has found a GPU."""
    try:
        import cupy
    except ImportError as error:
        raise ValueError(f'device="cuda" needs CuPy, which cannot be imported ({error}): {REMEDY}') from None
    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:  # CUDARuntimeError, whose status is CUDA's own number
        if getattr(error, "status", None) != NO_DEVICE:
            raise ValueError(
                f'device="cuda" needs an NVIDIA driver that fits CuPy ({error}): update it or {REMEDY}'
            ) from None
        found = 0
    if not found:
        raise ValueError('device="cuda": no NVIDIA GPU is visible here; use device="cpu"')
    return cupy
