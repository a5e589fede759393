"""Encoding on many machines, with Dask: `pip install ".[dask]"` in a clone of minclip.

    dask scheduler                                                    # on one machine
    dask worker tcp://HOST:8786 --nworkers 2 --nthreads 1             # on each machine
    dask cuda worker tcp://HOST:8786                                  # one a GPU, of the package dask-cuda
    minclip encode --file captions.txt -o features.npy --dask tcp://HOST:8786

Token ids travel to the workers and features back; parameters do not: each worker loads them once, by
the model's name or path, and refuses if its file is not ours. What a lost worker had is done again by
the others.
"""

import collections
import contextlib
import functools
import threading

import numpy as np

from minclip import checkpoint
from minclip.arrays import as_array
from minclip.corpus.files import fingerprint
from minclip.fast import encode_text

LOADING = threading.Lock()


def encode_array(tokens, source="builtin", *, device="cpu", dtype=None):
    """The features [N, E] of a dask.array of token ids [N, L], as a dask.array with the same chunks of rows.

    source, device, dtype are those of `minclip.load`; each worker loads them once. A path must lead to the
    same file on each. Features are NumPy arrays on either device. Nothing is encoded until the
    result is computed; store it by chunks, with `dask.array.to_zarr` or `to_npy_stack`.
    """
    params = checkpoint.load(source, dtype=dtype or ("float16" if device == "cuda" else None))
    P = params["text_projection"]
    tokens = tokens.rechunk({1: -1})
    return tokens.map_blocks(
        functools.partial(encode_block, **recipe(params, source, device)),
        chunks=(tokens.chunks[0], (P.shape[1],)),
        meta=np.empty((0, 0), P.dtype),
    )


@contextlib.contextmanager
def encoder(address, params, source="builtin", *, device="cpu"):
    """A function that encodes on the workers of the scheduler at address, for `minclip.corpus.encode_file`.

    It turns an iterator of tokens [n, L] into one of features [n, E], in the same order, and keeps no more
    of them under way than the workers need to stay busy. params are what source holds, in the dtype that
    the workers are to use on device.
    """
    Client = import_client()
    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=60)
        yield functools.partial(encode_chunks, client, recipe(params, source, device))


def encode_chunks(client, how, chunks):
    from distributed import CancelledError, KilledWorker

    under_way = collections.deque()
    try:
        for tokens in chunks:
            under_way.append(client.submit(encode_block, tokens, **how, pure=False))
            while len(under_way) > 2 * max(1, sum(client.nthreads().values())):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except (CancelledError, KilledWorker) as error:
        raise OSError(f"the workers or their scheduler were lost: {error}") from None


def encode_block(tokens, source, device, dtype, expected):
    """Features [n, E] of tokens [n, L] as a NumPy array, by this worker's own parameters."""
    with LOADING:  # a worker's threads start together, and one of them is to load
        params, found = parameters(source, device, dtype)
    if found != expected:
        raise ValueError(f"the model {source} of a worker is not the one of who asked it: copy it to all")
    return as_array(encode_text(params, tokens))


@functools.lru_cache(maxsize=1)
def parameters(source, device, dtype):
    """The parameters a worker keeps from block to block, and their fingerprint."""
    params = checkpoint.load(source, device=device, dtype=dtype)
    return params, fingerprint(params)


def recipe(params, source, device):
    """What a worker needs to know to have the same parameters."""
    dtype = params["text_projection"].dtype.name
    return {"source": source, "device": device, "dtype": dtype, "expected": fingerprint(params)}


def import_client():
    try:
        from distributed import Client
    except ImportError:
        raise ValueError('Dask is not installed: in a clone of minclip, pip install ".[dask]"') from None
    return Client
