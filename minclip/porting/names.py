"""The names that other implementations give the stages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.params import BLOCK, check_mapping

# A block's stages in other implementations, after the block's number: OpenAI, OpenCLIP, Hugging Face, timm,
# MLX, Keras and Flax. ".input" is how `minclip.trace_torch` names a module's input.
INSIDE = {
    "": ("output", "0", "output.0"),
    "ln_1": ("layer_norm1", "norm1", "ln1", "layer_norm_1", "layernorm1", "attn.ln_q.input"),
    "attn.qkv": (
        "self_attn.qkv", "attn.in_proj", "self_attn.qkv_proj", "attn.qkv_proj", "attention.in_proj",
    ),
    "attn.q": (
        "self_attn.q_proj", "self_attn.q", "attn.q_proj", "attention.query_proj", "attention.q_proj",
        "attention.query", "self_attn.query", "query", "query_proj", "self_attn.query_proj",
    ),
    "attn.k": (
        "self_attn.k_proj", "self_attn.k", "attn.k_proj", "attention.key_proj", "attention.k_proj",
        "attention.key", "self_attn.key", "key", "key_proj", "self_attn.key_proj",
    ),
    "attn.v": (
        "self_attn.v_proj", "self_attn.v", "attn.v_proj", "attention.value_proj", "attention.v_proj",
        "attention.value", "self_attn.value", "value", "value_proj", "self_attn.value_proj",
    ),
    "attn.scores": ("self_attn.scores", "attention.scores"),
    "attn.masked": ("self_attn.masked", "attention.masked"),
    "attn.weights": ("attn.1", "self_attn.1", "self_attn.weights", "attn.probs", "attention.weights"),
    "attn.context": (
        "attn.out_proj.input", "self_attn.out_proj.input", "self_attn.context", "attention.out_proj.input",
    ),
    "attn": (
        "attn.0", "self_attn", "self_attn.0", "attn.out_proj", "self_attn.out_proj", "attn.proj", "ls_1",
        "attention", "attention.out_proj", "attention.0",
    ),
    "residual": ("ln_2.input", "layer_norm2.input", "norm2.input", "layer_norm_2.input"),
    "ln_2": ("layer_norm2", "norm2", "ln2", "layer_norm_2", "layernorm2"),
    "mlp.c_fc": ("mlp.fc1", "linear1", "dense_1", "mlp.dense_1", "fc1"),
    "mlp.gelu": (
        "mlp.activation_fn", "mlp.act", "mlp.c_proj.input", "mlp.fc2.input", "linear2.input", "dense_2.input",
        "activation", "quick_gelu", "gelu", "fc2.input",
    ),
    "mlp": ("mlp.fc2", "mlp.c_proj", "ls_2", "linear2", "dense_2", "mlp.dense_2", "fc2"),
}  # fmt: skip
OUTSIDE = {
    "token_embedding": ("embedding.token_embedding", "embeddings.token_embedding"),
    "positional_embedding": ("position_embedding", "pos_embed"),
    "embedding": ("embeddings", "transformer.input", "encoder.input", "resblocks.input", "layers.input"),
    "ln_final": (
        "final_layer_norm",
        "last_hidden_state",
        "hidden_states",
        "layer_norm",
        "ln_f",
        "final_norm",
    ),
    "eot": (),
    "pooled": ("pooler_output", "pooled_output", "text_projection.input"),
    "text_features": ("text_embeds", "text_projection", "features", "encode_text", "sentence_embedding"),
}
INSIDE_BY_WORD = {word: stage for stage in INSIDE for word in (stage, *INSIDE[stage])}
OUTSIDE_BY_WORD = {word: stage for stage in OUTSIDE for word in (stage, *OUTSIDE[stage])}
LISTS = "resblocks|layers|layer|blocks|block|h|encoder_block|encoder_layer"
IN_LIST = re.compile(rf"(?:^|\.)(?:{LISTS})[._](\d+)(?:\.(.+))?$")


def stage_of(name: str, layers: int, first_state: int = 0) -> str | None:
    """Return minclip's name for another implementation's name, or None.

    Words in front (model., text_model., module.) do not matter. hidden_states.{i} are the embedding, counted
    as `first_state`, and then each block's output, as Hugging Face counts.
    """
    name = re.sub(r"(?<=\w):\d+$", "", name.replace("/", ".").replace("__call__", "").strip("."))
    name = re.sub(r"\.{2,}", ".", name)
    if re.search(r"visual|vision", name):
        return None
    counted = re.search(r"(hidden_states|attentions)[._](\d+)$", name)
    if counted:
        i = int(counted[2])
        if counted[1] == "attentions":
            return f"{BLOCK}{i}.attn.weights"
        return block_before(i - first_state)
    inside = IN_LIST.search(name)
    if inside:
        return inside_block(int(inside[1]), inside[2] or "")
    words = name.split(".")
    tails = [".".join(words[n:]) for n in range(len(words))]
    if {"ln_final.input", "final_layer_norm.input"} & set(tails) or words[-1] in ("transformer", "encoder"):
        return f"{BLOCK}{layers - 1}"
    return next((OUTSIDE_BY_WORD[tail] for tail in tails if tail in OUTSIDE_BY_WORD), None)


def inside_block(i: int, word: str) -> str | None:
    """Return the stage of block i that a word names, or None."""
    if word in ("input", "ln_1.input", "layer_norm1.input", "layer_norm_1.input"):
        return block_before(i)
    stage = INSIDE_BY_WORD.get(word)
    return None if stage is None else f"{BLOCK}{i}.{stage}".rstrip(".")


def block_before(i: int) -> str:
    """Return the stage that block i reads: the output of the block before, or the embedding."""
    return f"{BLOCK}{i - 1}" if i > 0 else "embedding"


def stages_of(names: list[str], layers: int) -> dict[str, str | None]:
    """Return the stage that each name of a dump means, or None.

    A list of as many hidden states as there are blocks holds the blocks' outputs, without the embedding.
    """
    counts = [re.search(r"hidden_states[._](\d+)$", name) for name in names]
    states = {int(count[1]) for count in counts if count}
    without_embedding = states == set(range(layers))
    return {name: stage_of(name, layers, -1 if without_embedding else 0) for name in names}


def rename(port: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a port's dump with minclip's names for the arrays that `names` lists: {"theirs": "ours"}.

    A name may hold {i}, a number, on both sides: {"layers.{i}.fc1": "transformer.resblocks.{i}.mlp.c_fc"}.
    Raises ValueError for a name that the dump does not have.

    >>> sorted(rename({"a.0.x": 1, "a.1.x": 2, "b": 3}, {"a.{i}.x": "layers.{i}.fc1"}))
    ['b', 'layers.0.fc1', 'layers.1.fc1']
    """
    renamed = {}
    for theirs, ours in names.items():
        pattern = re.compile(re.escape(theirs).replace(r"\{i\}", r"(\d+)"))
        found = {name: match for name in port if (match := pattern.fullmatch(name))}
        if not found:
            near = difflib.get_close_matches(theirs, port, n=1)
            raise ValueError(
                f"the port has no {theirs!r}" + (f"; the nearest is {near[0]!r}" if near else "")
            )
        for name, match in found.items():
            renamed[name] = ours.replace("{i}", match[1]) if match.groups() else ours
    return {renamed.get(name, name): array for name, array in port.items()}


def unpack(port: Mapping[str, Any], tokens: Any = None) -> dict[str, Any]:
    """Return a port's dump as a flat dict of arrays on the host: tuples and stacks get a number each.

    Stacked hidden states may lie along the first axis or, as tokens [B, L] tell, along the second. States of
    all positions that are called "text_features" are called "hidden_states".
    Raises TypeError where the port is no mapping.
    """
    check_mapping(port, "the port must be a mapping from stages to arrays (minclip.diagnose takes features)")
    arrays: dict[str, Any] = {}
    for name, value in port.items():
        listed = isinstance(value, (tuple, list))
        array = value if listed or value is None else as_array(value)
        if not listed and name.endswith(("hidden_states", "attentions")) and array.ndim > 3:
            array, listed = first_axis_stacked(array, tokens), True
        if listed:
            arrays |= {f"{name}.{i}": as_array(part) for i, part in enumerate(array) if part is not None}
        elif array is not None:
            states = name == "text_features" and "hidden_states" not in port and has_positions(array, tokens)
            arrays["hidden_states" if states else name] = array
    return arrays


def first_axis_stacked(array: Any, tokens: Any) -> Any:
    """Return stacked arrays [N, B, ...], given as [B, N, ...] where the batch tells so."""
    texts = None if tokens is None else len(tokens)
    return array.swapaxes(0, 1) if array.shape[0] == texts != array.shape[1] else array


def has_positions(array: Any, tokens: Any) -> bool:
    """Tell whether an array has an axis for each of the axes B and L of tokens, and one more."""
    return tokens is not None and array.ndim == 3 and all(size in array.shape for size in np.shape(tokens))
