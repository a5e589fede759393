"""Pack the reference's stages into a small file, and restore them.

Most numbers of a trace follow from others: scores from q and k, the stream from what each block adds, norms
from the stream. Only what needs the large matrices is stored, and only at positions that matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minclip.model import ACTIVATIONS, softmax
from minclip.params import BLOCK, as_params, count_layers
from minclip.porting.port import layer_norm
from minclip.porting.stages import axes, text_of

PADDED_ROWS = (2, 3)  # rows whose positions after the end of text are kept: padded with its id, and with 0
PADDING = 16  # how many of these positions are kept, where all stages are
STORED = ("attn.q", "attn.k", "attn.v", "attn", "mlp.c_fc", "mlp")
NORMS = ("ln_1", "ln_2")


def known_positions(trace: Any, padding: int) -> Any:
    """Return [B, L], True where stages are kept: up to each text's end, and `padding` more in two rows."""
    known = np.array(text_of(trace))
    for row in [row for row in PADDED_ROWS if row < len(known)]:
        end = int(known[row].sum())
        known[row, end : end + padding] = True
    return known


def pack(trace: Any, stages: str) -> dict[str, Any]:
    """Return the arrays of a probe's file: of all stages, or of "blocks", the outputs of the blocks."""
    params = as_params(trace.params)
    known = known_positions(trace, PADDING if stages == "all" else trace.tokens.shape[1])
    arrays = {
        "tokens": trace.tokens,
        "known": known,
        "activation": np.array(params.activation),
        "heads": np.array(params.heads),
    }
    for name in kept(trace, stages):
        arrays[name] = packed(name, trace[name], known)
    if stages == "all":
        norms = (f"{BLOCK}{i}.{norm}" for i in range(count_layers(params)) for norm in NORMS)
        for norm in (*norms, "ln_final"):
            for part in ("weight", "bias"):
                arrays[f"{norm}.{part}"] = params[f"{norm}.{part}"]
    return arrays


def kept(trace: Any, stages: str) -> list[str]:
    """Return the stages whose arrays are stored."""
    outside = [name for name in trace if not name.startswith(BLOCK)]
    blocks = range(count_layers(trace.params))
    if stages == "blocks":
        inside = [f"{BLOCK}{i}" for i in blocks]
    else:
        inside = [f"{BLOCK}{i}.{part}" for i in blocks for part in STORED]
        outside = [name for name in outside if name not in ("embedding", "ln_final")]
    return [name for name in trace if name in {*outside, *inside}]


def packed(name: str, array: Any, known: Any) -> Any:
    """Return a stage at the known positions: [n, D] for [B, L, D] or [B, H, L, K]; others as they are."""
    if axes(name) == "B H L K":
        array = array.transpose(0, 2, 1, 3).reshape(*known.shape, -1)
    return array[known] if axes(name) in ("B L D", "B H L K") else array


def restore(dump: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stages of a probe's file in their order; NaN where a position was not kept."""
    known = dump["known"]

    def spread(array: Any) -> Any:
        full = np.full((*known.shape, array.shape[-1]), np.nan, dtype=array.dtype)
        full[known] = array
        return full

    if f"{BLOCK}0.attn.q" in dump:
        return dict(restore_all(dump, spread))
    outside = ("known", "activation", "heads", "tokens", "texts")
    names = [name for name in dump if name not in outside and not name.startswith("rounding.")]
    return {name: spread(dump[name]) if axes(name) == "B L D" else dump[name] for name in names}


def restore_all(dump: Mapping[str, Any], spread: Any) -> Iterator[tuple[str, Any]]:
    """Yield (stage, array) in the order of computation, from what the file holds."""
    yield "token_embedding", (tokens := spread(dump["token_embedding"]))
    yield "positional_embedding", dump["positional_embedding"]
    yield "embedding", (x := tokens + dump["positional_embedding"])
    for i in range(sum(name.endswith(".attn.q") for name in dump)):
        for name, array in restore_block(dump, spread, f"{BLOCK}{i}", x):
            yield name, array
            x = array
    yield "ln_final", layer_norm(x, dump["ln_final.weight"], dump["ln_final.bias"])
    for name in ("eot", "pooled", "text_features"):
        if name in dump:
            yield name, dump[name]


def restore_block(dump: Mapping[str, Any], spread: Any, block: str, x: Any) -> Iterator[tuple[str, Any]]:
    """Yield the stages of a block, given its input. The last of them is its output."""

    def norm(name: str, x: Any) -> Any:
        return layer_norm(x, dump[f"{block}.{name}.weight"], dump[f"{block}.{name}.bias"])

    yield f"{block}.ln_1", norm("ln_1", x)
    yield from restore_attention(dump, spread, f"{block}.attn")
    yield f"{block}.attn", (attn := spread(dump[f"{block}.attn"]))
    yield f"{block}.residual", (x := x + attn)
    yield f"{block}.ln_2", norm("ln_2", x)
    yield f"{block}.mlp.c_fc", (h := spread(dump[f"{block}.mlp.c_fc"]))
    yield f"{block}.mlp.gelu", ACTIVATIONS[str(dump["activation"])](h)
    yield f"{block}.mlp", (mlp := spread(dump[f"{block}.mlp"]))
    yield block, x + mlp


def restore_attention(dump: Mapping[str, Any], spread: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the stages of a block's attention."""
    B, L = dump["known"].shape
    q, k, v = (
        spread(dump[f"{name}.{part}"]).reshape(B, L, int(dump["heads"]), -1).transpose(0, 2, 1, 3)
        for part in "qkv"
    )
    yield from zip((f"{name}.{part}" for part in "qkv"), (q, k, v), strict=True)
    scores = q * q.dtype.type(q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
    yield f"{name}.scores", scores
    query, key = np.ogrid[:L, :L]
    masked = np.where(key > query, scores.dtype.type(-np.inf), scores)
    yield f"{name}.masked", masked
    yield f"{name}.weights", (weights := softmax(masked))
    context = weights @ np.nan_to_num(v)  # a position that is not known has the weight 0, or an unknown row
    yield f"{name}.context", context.transpose(0, 2, 1, 3).reshape(B, L, -1)
