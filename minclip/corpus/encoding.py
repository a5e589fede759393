"""The features of a corpus, or its hidden states, in bounded memory.

`encode_file` and `write_states` read a file twice. The first pass checks every line, because a line that is
too long must be reported in the first minutes: a later fix would change the input that the finished rows
belong to. In the second pass, other processes tokenize a chunk or more ahead of this process, which encodes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from minclip.arrays import as_array, float_dtype
from minclip.arrays import normalize as normalize_rows
from minclip.corpus.lines import check_lines, file_stamp, name_of, read_texts, readable_twice
from minclip.corpus.progress import reporting
from minclip.corpus.resumable_npy import ResumableNpy
from minclip.corpus.workers import in_chunks, tokenize_ahead
from minclip.fast import encode_text, hidden_states
from minclip.params import TEXT_TOWER, Floats, Tokens, architecture, check_projection, check_skip, text_dtype

EncodeChunks = Callable[[Iterator[Tokens]], Iterable[Floats]]
CHUNK = 8192  # texts encoded together
STATES_CHUNK = 256  # the same for states, which are large: 61 MB in float32 at width 768


def encode_file(
    params: Mapping[str, Any],
    source: str | os.PathLike[str] | BinaryIO,
    output: str | os.PathLike[str],
    *,
    dtype: Any = None,
    normalize: bool = False,
    truncate: bool = False,
    progress: bool = False,
    encode_chunks: EncodeChunks | None = None,
    chunk: int = CHUNK,
) -> np.ndarray:
    r"""Write the features of a text file's lines to a .npy, resuming an earlier call that was interrupted.

    params         as `encode_text` takes them
    source         path of a UTF-8 file, one text per line; an empty line is an empty text. Or an open binary
                   file. A source that cannot be read twice, such as a pipe, is first copied to the output's
                   folder
    output         path of the features [texts, E]. It appears only once it is complete. If the call is
                   interrupted, the same call resumes from output.partial and computes no finished row again
    dtype          of the features written: "float16", "float32"; by default that of params
    normalize      write rows of length 1
    truncate       truncate texts that are too long for the model
    progress       show a bar on a terminal; elsewhere, write one line a minute to standard error
    encode_chunks  a function from an iterator of tokens [n, L] to an iterator of features [n, E], in the same
                   order; `minclip.corpus.cluster.encoder` gives one. By default, this process encodes
    chunk          how many texts are encoded together, between two entries of the journal. More texts share
                   more beginnings; an interruption loses at most one chunk

    Returns the features as `numpy.load(output, mmap_mode="r")` does.
    Raises ValueError, before anything is encoded, with the line's number where a line is not UTF-8, or is too
    long and truncate is False. Raises ValueError where output.partial belongs to another input, model or
    options; OSError where a file cannot be read or written, or the disk has no room for the features.

    >>> import minclip, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     captions = pathlib.Path(folder, "captions.txt")
    ...     _ = captions.write_text("a cat\ntwo dogs\n")
    ...     encode_file(minclip.load(), captions, captions.with_suffix(".npy")).shape
    (2, 128)
    """
    check_projection(params)
    job = {
        "model": fingerprint(params),
        "dtype": float_dtype(dtype or text_dtype(params)).name,
        "shape": [params["text_projection"].shape[1]],
        "normalize": normalize,
        "truncate": truncate,
    }
    encode = functools.partial(
        encode_stream,
        params,
        normalize=normalize,
        truncate=truncate,
        encode_chunks=encode_chunks,
        chunk=chunk,
    )
    return write_rows(source, output, job, encode, context_length(params), progress)


def write_states(
    params: Mapping[str, Any],
    source: str | os.PathLike[str] | BinaryIO,
    output: str | os.PathLike[str],
    *,
    skip: int = 0,
    norm: bool = True,
    pad: int = 0,
    dtype: Any = "float16",
    truncate: bool = False,
    progress: bool = False,
    encode_chunks: EncodeChunks | None = None,
    chunk: int = STATES_CHUNK,
) -> np.ndarray:
    r"""Write the hidden states of a text file's lines to a .npy, resuming a call that was interrupted.

    params, skip, norm   as `minclip.hidden_states` takes them: which states
    pad                  the id that pads each text to the context length, as `minclip.tokenize` takes it:
                         49407 for the towers of width 768 in SD 1, SDXL and SD 3, 0 for SD 2 and bigG
    output               path of the states [texts, L, D], L being the context length
    dtype                of the states written
    The other arguments are those of `encode_file`; encode_chunks turns tokens [n, L] into states [n, L, D].

    States are large. A million texts of 77 positions at width 768 take 118 GB in float16, where their
    features take 1.5 GB. Every position of every text is computed, padding included: that is about nine
    times the work of features of captions of 13 tokens.

    Returns the states as `numpy.load(output, mmap_mode="r")` does. Raises as `encode_file` does.

    >>> import minclip, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     captions = pathlib.Path(folder, "captions.txt")
    ...     _ = captions.write_text("a cat\ntwo dogs\n")
    ...     write_states(minclip.load(), captions, captions.with_suffix(".npy"), skip=1, norm=False).shape
    (2, 77, 128)
    """
    check_skip(architecture(params)[0], skip)
    context = context_length(params)
    job = {
        "model": fingerprint(params),
        "dtype": float_dtype(dtype).name,
        "shape": [context, len(params["ln_final.weight"])],
        "states": {"skip": skip, "norm": norm, "pad": pad},
        "truncate": truncate,
    }

    def encode(texts):
        tokens = tokenize_ahead(in_chunks(texts, chunk), context, truncate, pad)
        complete = (np.pad(t, ((0, 0), (0, context - t.shape[1])), constant_values=pad) for t in tokens)
        yield from map_states(complete)

    states = functools.partial(hidden_states, params, skip=skip, norm=norm)
    map_states = encode_chunks or functools.partial(map, states)
    return write_rows(source, output, job, encode, context, progress)


def write_rows(
    source: str | os.PathLike[str] | BinaryIO,
    output: str | os.PathLike[str],
    job: Mapping[str, Any],
    encode: Callable[[Iterator[str]], Generator[Floats, None, None]],
    context: int,
    progress: bool,
) -> np.ndarray:
    """Write the rows that `encode` makes of a file's lines to a .npy, and resume where a journal says so.

    job["shape"] is the shape of one row.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(readable_twice(source, output))
        before = file_stamp(file)
        texts, digest = check_lines(file, context, job["truncate"], progress)
        job = {"input": digest, **job, "shape": [texts, *job["shape"]]}
        rows = stack.enter_context(contextlib.closing(ResumableNpy(output, job)))
        left = itertools.islice(read_texts(file), rows.done, None)
        stream = stack.enter_context(contextlib.closing(encode(left)))
        advance = stack.enter_context(reporting(progress, texts, rows.done, "texts"))
        try:
            for encoded in stream:
                if file_stamp(file) != before:
                    raise ValueError(f"{name_of(file)} changed while it was being encoded")
                rows.append(as_array(encoded.astype(job["dtype"], copy=False)))
                advance(len(encoded))
        except KeyboardInterrupt:
            done = f"stopped at {rows.done:,} of {texts:,}"
            raise KeyboardInterrupt(f"{done}; run the same command again to resume") from None
        rows.finish()
    return np.load(output, mmap_mode="r")


def encode_stream(
    params: Mapping[str, Any],
    texts: Iterable[str],
    *,
    normalize: bool = False,
    truncate: bool = False,
    encode_chunks: EncodeChunks | None = None,
    chunk: int = CHUNK,
) -> Generator[Floats, None, None]:
    """Yield the features of any iterable of str as arrays [n, E], in order.

    For a corpus that is no file, or for features that are not to be written to one file. Memory is bounded:
    texts are taken when they are needed, a few chunks ahead. Arrays are in the dtype and on the device of
    params; the other arguments are those of `encode_file`. A text that is too long for the model raises
    ValueError when its chunk is reached, unless truncate is True.

    >>> import minclip
    >>> texts = (f"{n} cats" for n in range(5000))
    >>> sum(len(features) for features in encode_stream(minclip.load(), texts))
    5000
    """
    if isinstance(texts, str | bytes):
        raise TypeError("texts must be an iterable of str, not one text: give a list")
    tokens = tokenize_ahead(in_chunks(texts, chunk), context_length(params), truncate)
    encode = encode_chunks or functools.partial(map, functools.partial(encode_text, params))
    for features in encode(tokens):
        yield normalize_rows(features) if normalize else features


def context_length(params: Mapping[str, Any]) -> int:
    """Return how many tokens a text may have."""
    return len(params["positional_embedding"])


def fingerprint(params: Mapping[str, Any]) -> str:
    """Return a SHA-256 of everything in params that features depend on.

    This is the architecture, the end-of-text id where there is one, and every array of the text tower.
    """
    import hashlib  # here, because it takes time to import

    eot = getattr(params, "eot", None)
    digest = hashlib.sha256(repr(architecture(params) + (() if eot is None else (eot,))).encode())
    for name in sorted(name for name in params if name.startswith(TEXT_TOWER)):
        array = np.ascontiguousarray(as_array(params[name]))
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
