"""Limit BLAS to one thread while our own threads multiply.

The limit counts for the whole process, so calls that overlap share it: the first call sets it, the last one
restores it. Since version 3.8 threadpoolctl lets only one thread of the process change the limit of an
OpenBLAS. A thread of ours therefore holds the limit from the first call to the last.
"""

import functools
import os
import threading
from contextlib import contextmanager

SMALL_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")  # as OpenBLAS names its sets of kernels


class BlasLimit:
    """The limit, if it is set.

    users     how many calls need it
    threads   how many threads a call may start: those of BLAS before, or 1 where BLAS keeps its own
    release   tells the holder to restore the limit
    """

    lock = threading.Lock()
    users = 0
    threads = 1
    release = holder = None


@contextmanager
def one_blas_thread():
    """Limit BLAS to one thread meanwhile. Yields how many threads of our own to use in place of BLAS's."""
    with BlasLimit.lock:
        if BlasLimit.users == 0:
            ready, BlasLimit.release = threading.Event(), threading.Event()
            BlasLimit.holder = threading.Thread(target=hold, args=(ready, BlasLimit.release), daemon=True)
            BlasLimit.holder.start()
            ready.wait()
        BlasLimit.users += 1
        threads = BlasLimit.threads
    try:
        yield threads
    finally:
        with BlasLimit.lock:
            BlasLimit.users -= 1
            if BlasLimit.users == 0:
                BlasLimit.release.set()
                BlasLimit.holder.join()


def hold(ready, release):
    """Hold the limit until `release` is set."""
    try:
        before = most_threads()
        with blas().limit(limits=1):
            # A BLAS that threadpoolctl does not know, or whose limit another thread holds, keeps its threads.
            BlasLimit.threads = before if most_threads() == 1 else 1
            ready.set()
            release.wait()
    finally:
        ready.set()


def most_threads():
    return max((library["num_threads"] for library in blas().info()), default=1)


@functools.cache
def has_small_kernels():
    """Tell whether BLAS has kernels for small products, which read both matrices where they are.

    OpenBLAS has them for float32 and float64 on x86 processors with AVX-512.
    """
    return any(library.get("architecture") in SMALL_KERNELS for library in blas().info())


@functools.cache
def blas():
    """Return threadpoolctl's controller of the BLAS libraries that are loaded now. NumPy's always is."""
    from threadpoolctl import ThreadpoolController  # here, because it takes time to import

    return ThreadpoolController().select(user_api="blas")


def forget():
    """Forget the calls of the parent process, whose threads do not exist in a fork."""
    BlasLimit.lock, BlasLimit.users = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
