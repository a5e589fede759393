"""The names of the encoder's stages, their axes, and which of their numbers are compared."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np

from minclip.params import block_of, end_of_text

HIDDEN = -104  # exp of it is 0 in float32: a key so far below the row's highest score is masked

PACKED = "attn.qkv"  # q, k and v in one array

# The axes of each stage. Stages not named here have the stream's axes, B L D; the MLP's F counts as D here.
# M is L again, seen as keys; P is the 3 of q, k, v packed.
AXES = {
    "positional_embedding": "L D",
    PACKED: "P B H L K",
    "attn.q": "B H L K",
    "attn.k": "B H L K",
    "attn.v": "B H L K",
    "attn.scores": "B H L M",
    "attn.masked": "B H L M",
    "attn.weights": "B H L M",
    "eot": "B",
    "pooled": "B D",
    "text_features": "B E",
}
LOOKED_UP = ("token_embedding", "positional_embedding")  # parameters as they stand: no arithmetic yet


def part_of(name: str) -> str:
    """Return a stage's name inside its block ("" for the block's output), or name itself outside blocks."""
    return name.removeprefix(block_of(name) or "").lstrip(".")


def parts(stage: str) -> list[str]:
    """Return the stages that an array of packed q, k, v is, or the stage itself."""
    return [f"{stage[:-3]}{part}" for part in "qkv"] if stage.endswith(PACKED) else [stage]


def packed_stages(names: Collection[str]) -> list[str]:
    """Return the packed q, k, v of each block whose q, k and v are among some stages."""
    packed = (f"{name[:-1]}qkv" for name in names if part_of(name) == "attn.q")
    return [name for name in packed if all(part in names for part in parts(name))]


def count_blocks(names: Collection[str]) -> int:
    """Return the number of blocks that some stages are of."""
    return len({block for name in names if (block := block_of(name))})


def is_parameter(name: str) -> bool:
    """Tell whether name is a parameter's, of OpenAI's or another dialect, and not a stage's."""
    return name.endswith((".weight", "_weight", "bias", "positional_embedding", "text_projection"))


def axes(name: str) -> str:
    """Return the axes of a stage as letters, such as "B L D". Those of a parameter are O I or O."""
    if is_parameter(name) and name not in AXES:
        return "O" if name.endswith("bias") or "ln_" in name else "O I"
    return AXES.get(part_of(name), "B L D")


def up_to_end(tokens: Any, end: Any = None) -> Any:
    """Return [B, L], True up to the end of each text. `end` [B] defaults to OpenAI's rule, the largest id."""
    end = tokens.argmax(axis=-1) if end is None else end
    return np.arange(tokens.shape[-1]) <= end[:, None]


def text_of(reference: Any) -> Any:
    """Return [B, L], True up to the end of each text of a `Trace`; None for a trace without tokens.

    The rule for the end is that of the trace's params. A trace without params still has its "eot" stage.
    """
    if reference.tokens is None:
        return None
    if reference.params is not None:
        return up_to_end(reference.tokens, end_of_text(reference.params, reference.tokens))
    return up_to_end(reference.tokens, reference.get("eot"))


def entries(name: str, reference: Any, port: Any, text: Any = None) -> tuple[Any, Any]:
    """Return the numbers of a stage that are compared, of the reference and the port, flat and in float64.

    text   [B, L], True up to the end of each text; where given, only those positions
    Where the reference's mask hides a key, a port may hide it in its own way (-1e4, the lowest finite
    number): both are left out. So are places where the reference is NaN.
    """
    a, b = (np.asarray(array, dtype=np.float64) for array in (reference, port))
    unknown = np.isnan(a)  # positions that a probe's file leaves out
    if name.endswith("attn.masked"):
        highest = np.where(np.isneginf(a), -np.inf, a).max(axis=-1, keepdims=True)
        hidden = np.isneginf(a) & (b <= highest + HIDDEN)
        a, b = np.where(hidden, 0, a), np.where(hidden, 0, b)
    if text is not None and name.endswith("attn.scores"):  # the mask hides the scores of later keys
        both = text[:, :, None] & text[:, None, :]
        a, b, unknown = (x.transpose(0, 2, 3, 1)[both] for x in (a, b, unknown))
    elif text is not None and axes(name)[:3] == "B L":
        a, b, unknown = a[text], b[text], unknown[text]
    elif text is not None and axes(name)[:3] == "B H":
        a, b, unknown = (x.swapaxes(1, 2)[text] for x in (a, b, unknown))
    return (a[~unknown], b[~unknown]) if unknown.any() else (a.ravel(), b.ravel())


# Stages that all earlier ones flow through, and stages that are matrix products.
STREAM = re.compile(r"^(text_features|pooled|ln_final|transformer\.resblocks\.\d+(\.residual)?)$")
PRODUCTS = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.context", "attn", "mlp.c_fc", "mlp")


def is_product(name: str) -> bool:
    """Tell whether a stage is the result of a matrix product, or holds such results."""
    return part_of(name) in PRODUCTS or bool(STREAM.search(name))
