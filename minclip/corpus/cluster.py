"""Encoding on many machines with Dask: in a clone of minclip, `pip install ".[dask]"`.

    dask scheduler                                                    # on one machine
    dask worker tcp://HOST:8786 --nworkers 2 --nthreads 1             # on each machine
    dask cuda worker tcp://HOST:8786                                  # one per GPU; the package dask-cuda
    minclip encode --file captions.txt -o features.npy --dask tcp://HOST:8786

Token ids travel to the workers, and features travel back. Parameters do not travel: each worker loads them
once, by the model's name or path, and refuses to work if its file differs from the caller's. If a worker is
lost, the others repeat its chunks.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from minclip import checkpoint
from minclip.arrays import as_array
from minclip.corpus.encoding import fingerprint
from minclip.fast import encode_text, hidden_states
from minclip.params import Floats, Params, Tokens, check_projection, in_a_clone, text_dtype

LOADING = threading.Lock()


def encode_array(
    tokens: Any,
    source: str = "builtin",
    *,
    device: str = "cpu",
    dtype: Any = None,
    activation: str | None = None,
    heads: int | None = None,
) -> Any:
    """Return the features [N, E] of a dask.array of token ids [N, L], as a dask.array with the same chunks.

    tokens                  a dask.array of integers
    source, device, dtype   as `minclip.load` takes them. Each worker loads the model once; a path must lead
                            to the same file on each
    activation, heads       as `minclip.load` takes them

    The features are NumPy arrays on either device. Nothing is encoded before the result is computed. Store a
    large result chunk by chunk, with `dask.array.to_zarr` or `to_npy_stack`.
    Raises ValueError and OSError as `minclip.load` does.

    >>> import dask.array, minclip
    >>> tokens = dask.array.from_array(minclip.tokenize(["a cat", "two dogs"]), chunks=(1, -1))
    >>> encode_array(tokens).compute(scheduler="threads").shape
    (2, 128)
    """
    dtype = dtype or ("float16" if device == "cuda" else None)
    params = checkpoint.load(source, dtype=dtype, activation=activation, heads=heads)
    check_projection(params)
    P = params["text_projection"]
    tokens = tokens.rechunk({1: -1})
    return tokens.map_blocks(
        functools.partial(encode_block, **recipe(params, source, device, activation=activation, heads=heads)),
        chunks=(tokens.chunks[0], (P.shape[1],)),
        meta=np.empty((0, 0), P.dtype),
    )


@contextlib.contextmanager
def encoder(
    address: str,
    params: Mapping[str, Any],
    source: str = "builtin",
    *,
    device: str = "cpu",
    activation: str | None = None,
    heads: int | None = None,
    states: Mapping[str, Any] | None = None,
) -> Iterator[Callable[[Iterable[Tokens]], Iterator[Floats]]]:
    """Yield a function that encodes on a scheduler's workers, for `encode_file` or `write_states`.

    address   of the scheduler, such as "tcp://HOST:8786"
    params    the parameters that source holds, in the dtype that the workers are to use
    source    the model's name, or a path that is valid on every worker
    device    "cpu" or "cuda", of the workers
    activation, heads   as `minclip.load` takes them, where the file does not say
    states    {"skip": 1, "norm": False}, say: the workers compute these `minclip.hidden_states`, not features

    The function turns an iterator of tokens [n, L] into an iterator of features [n, E], in the same order. It
    submits only as many chunks ahead as the workers need to stay busy.
    Raises ValueError where Dask is not installed or where a worker has another model, OSError where the
    scheduler or all workers are lost.
    """
    Client = import_client()
    how = recipe(params, source, device, activation=activation, heads=heads)
    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=60)
        yield functools.partial(encode_chunks, client, how | {"states": states})


def encode_chunks(client, how, chunks):
    """Yield the features of chunks of tokens, computed by the client's workers, in order."""
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


def encode_block(tokens, expected, states=None, **how):
    """Return the features [n, E] or the states of tokens [n, L] as a NumPy array, by this worker's model."""
    with LOADING:  # the threads of a worker start together, and only one of them is to load
        params, found = parameters(**how)
    if found != expected:
        raise ValueError(
            f"the model {how['source']} of a worker differs from the caller's: copy the file to every worker"
        )
    if states is not None:
        return as_array(hidden_states(params, tokens, **states))
    return as_array(encode_text(params, tokens))


@functools.lru_cache(maxsize=1)
def parameters(
    source: str, device: str, dtype: str, activation: str | None, heads: int | None
) -> tuple[Params, str]:
    """Return the parameters that a worker keeps from block to block, and their fingerprint."""
    params = checkpoint.load(source, device, dtype=dtype, activation=activation, heads=heads)
    return params, fingerprint(params)


def recipe(params, source, device, **chosen):
    """Return the arguments with which a worker loads the same parameters."""
    dtype = np.dtype(text_dtype(params)).name
    return {"source": source, "device": device, "dtype": dtype, "expected": fingerprint(params), **chosen}


def import_client():
    """Return distributed.Client. Raise ValueError where Dask is not installed."""
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(f"Dask is not installed: {in_a_clone('dask')}") from None
    return Client
