"""The probe: tokens that tell a wrong port from a right one, and the reference's stages on them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.checkpoint.tensor_files import only_when_complete, read_safetensors
from minclip.params import Tokens, as_params, check_int, check_mapping
from minclip.porting import probe_file
from minclip.porting.rounding import PRECISIONS, rounding_of
from minclip.porting.tokens.probe import TEXTS
from minclip.tracing import Trace, trace


def probe_tokens(context_length: int = 77, vocabulary: int = 49408) -> Tokens:
    """Return tokens that tell a wrong port from a right one: int32 [7, context_length].

    Many bugs show only where texts are padded with the end-of-text id, hold id 0, or are longer than
    41 tokens. A single short text, which is all that many ports are checked with, shows few. The rows:

        0  one ordinary id, padded with 0, as clip.tokenize pads
        1  the ids at the edges of the vocabulary, padded with 0
        2  padded with the end-of-text id, as Hugging Face pads
        3  id 0 ("!") inside and at the end of the text, padded with 0
        4  id 0 at its start, padded with the end-of-text id
        5  more than 41 tokens, but not full
        6  full: the end of text is the last position

    Seven rows expose a mask that only fits one row, or as many rows as there are heads.
    Raises ValueError for a context or a vocabulary too small to hold them.

    >>> probe_tokens().shape
    (7, 77)
    """
    check_int("context_length", context_length)
    check_int("vocabulary", vocabulary)
    C, V = context_length, vocabulary
    if C < 8 or V < 16:
        raise ValueError(f"probe tokens need a context of 8 and a vocabulary of 16 at least, not {C} and {V}")
    start, end = V - 2, V - 1
    # Ordinary ids by a fixed rule, spread over the vocabulary: the same in any language and release.
    ids = [1 + 7919 * (n + 1) % (V - 3) for n in range(C)]
    texts = (
        (ids[:1], 0),
        ([1, V - 3, 2, V - 4], 0),
        (ids[1:4], end),
        ([ids[4], 0, ids[5], 0, 0], 0),
        ([0, ids[6], 0, ids[7]], end),
        (ids[C // 3 : C - 4], 0),
        (ids[: C - 2][::-1], 0),
    )
    tokens = np.empty((len(texts), C), dtype=np.int32)
    for row, (text, padding) in zip(tokens, texts, strict=True):
        row[:] = padding
        row[: len(text) + 2] = [start, *text, end]
    return tokens


def tokens_for(params: Mapping[str, Any]) -> Tokens:
    """Return the probe's tokens for a model's context length and vocabulary."""
    return probe_tokens(len(params["positional_embedding"]), len(params["token_embedding.weight"]))


def write_probe(path: str | os.PathLike[str], params: Mapping[str, Any], *, stages: str = "all") -> Trace:
    """Write the tokens and stages that a port is compared with to an .npz at path; return their `Trace`.

    stages   "all", or "blocks" for a smaller file with the stages outside the blocks and the blocks' outputs

    tokens                 int32 [7, L], see `probe_tokens`: run the port on these
    texts                  the texts to run a tokenizer on, see `probe_texts`
    text_features          the reference's features, and other stages as `probe_file` packs them
    rounding.{precision}   [stages, 2], how far rounding alone moves each stage, in their order
                           (see `measure_rounding`), for float32, float16 and bfloat16

    The file appears at path only once it is complete. `read_probe` restores all stages, at the positions up
    to the end of each text and some after it.
    Raises ValueError for other stages.
    """
    if stages not in ("all", "blocks"):
        raise ValueError(f"stages must be 'all' or 'blocks', not {stages!r}")
    traced = trace(params, tokens_for(params))
    arrays = {"texts": np.array(TEXTS)} | probe_file.pack(host_trace(traced), stages)
    names = list(probe_file.restore(arrays))
    for precision in PRECISIONS[1:]:
        measured = rounding_of(traced, precision)
        arrays[f"rounding.{precision}"] = np.array([measured[name] for name in names])
    with only_when_complete(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
    return Trace({name: traced[name] for name in names}, params=params, tokens=traced.tokens)


def host_trace(traced: Trace) -> Trace:
    """Return a trace with its arrays and parameters in main memory."""
    params = as_params(traced.params).map(as_array) if traced.params is not None else None
    return Trace(
        {name: as_array(array) for name, array in traced.items()}, params=params, tokens=traced.tokens
    )


def read_probe(path: str | os.PathLike[str]) -> Trace:
    """Return the `Trace` that `write_probe` wrote. Raises OSError or ValueError where it cannot be read."""
    dump = read_dump(path)
    if "tokens" not in dump or not {"text_features", "pooled", "known"} & set(dump):
        raise ValueError(f"{path} is not a probe: it has no tokens or no stages; `minclip probe` writes one")
    try:
        return as_trace(dump)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a complete probe: {error!r}; `minclip probe` writes one") from None


def as_trace(dump: Mapping[str, Any]) -> Trace:
    """Return a `Trace` of any mapping of stages, such as the arrays that `write_probe` wrote."""
    check_mapping(dump, "the reference must be a mapping from stages to arrays, as minclip.trace returns")
    if "token_embedding.weight" in dump:
        raise ValueError("the reference holds parameters, not stages: minclip.check_weights compares weights")
    other = ("tokens", "texts", "ids")
    stages = {name: array for name, array in dump.items() if name not in other and name[:9] != "rounding."}
    if "known" in dump:
        with np.errstate(all="ignore"):
            stages = probe_file.restore(stages)
    roundings = {
        precision: dict(zip(stages, map(tuple, dump[f"rounding.{precision}"]), strict=True))
        for precision in PRECISIONS
        if f"rounding.{precision}" in dump
    }
    return Trace(stages, tokens=dump.get("tokens"), roundings=roundings)


def read_dump(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a port's arrays by name, from an .npz or a .safetensors file (bfloat16 becomes float32).

    Raises OSError for a file that cannot be read, ValueError for one that is neither.
    """
    try:
        if str(path).endswith(".safetensors"):
            return {name: np.asarray(tensor) for name, tensor in read_safetensors(path)[0].items()}
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic == b"\x93NUMPY":
            raise ValueError("it is one array without a name, so write it with numpy.savez")
        if not magic.startswith(b"PK"):
            raise ValueError("its first bytes are those of another format" if magic else "the file is empty")
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz or .safetensors file of plain arrays: {error}") from None
