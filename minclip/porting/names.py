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
# MLX, Keras, Flax and torchtune. ".input" is how `minclip.trace_torch` names a module's input. "_" does not
# matter.
INSIDE = {
    "": ("output", "0", "output.0"),
    "ln_1": ("layer_norm_1", "norm_1", "sa_norm", "input_layernorm", "attn_norm", "attn.ln_q.input"),
    "attn.qkv": ("qkv", "in_proj", "qkv_proj"),
    "attn.q": ("q", "q_proj", "query", "query_proj"),
    "attn.k": ("k", "k_proj", "key", "key_proj"),
    "attn.v": ("v", "v_proj", "value", "value_proj"),
    "attn.scores": ("self_attn.scores", "attention.scores"),
    "attn.masked": ("self_attn.masked", "attention.masked"),
    "attn.weights": ("attn.1", "self_attn.1", "self_attn.weights", "attn.probs", "attention.weights"),
    "attn.context": ("self_attn.context", "out_proj.input", "output_proj.input", "attn.c_proj.input"),
    "attn": (
        "self_attn", "attention", "self_attention", "attn.0", "self_attn.0", "attention.0", "out_proj",
        "output_proj", "attn.proj", "attn.c_proj", "attn.out", "attention.out", "ls_1",
    ),
    "residual": ("ln_2.input", "layer_norm_2.input", "norm_2.input", "mlp_norm.input"),
    "ln_2": ("layer_norm_2", "norm_2", "mlp_norm", "post_attention_layernorm"),
    "mlp.c_fc": ("c_fc", "fc_1", "linear_1", "dense_1", "mlp.w1"),
    "mlp.gelu": (
        "mlp.activation_fn", "mlp.act", "activation", "quick_gelu", "gelu", "c_proj.input", "fc_2.input",
        "linear_2.input", "dense_2.input", "mlp.w2.input",
    ),
    "mlp": ("c_proj", "fc_2", "linear_2", "dense_2", "mlp.w2", "ls_2"),
}  # fmt: skip
OUTSIDE = {
    "token_embedding": (),
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
LISTS = r"layers?|blocks?|resblocks?|blk|h|encoder_?(?:block|layer)s?"  # names of the list of blocks
LAYER = re.compile(rf"(?<![a-z0-9])(?:{LISTS}|\w+_layer|\w+_block)[._]?(\d+)(?=[._]|$)")  # one block
LIST = re.compile(rf"(?<![a-z0-9_])(?:{LISTS})(?=\.|$)")  # the whole list, in the name of a stack of it


def plain(name: str) -> str:
    """Return a name in lower case with its words between dots: "layers.3.self_attn.q_proj.weight"."""
    name = re.sub(r"\s*\(.*\)$", "", name)  # an ONNX initializer's own name, behind its place
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return re.sub(r"[^a-z0-9_]+", ".", name.replace(":0", "")).strip(".")


def by_word(stages: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return word -> stage, with every word squeezed."""
    return {squeezed(word): stage for stage in stages for word in (stage, *stages[stage])}


def squeezed(word: str) -> str:
    """Return a word without "_"."""
    return word.replace("_", "")


CONTAINERS = {"att": "attn", "mlp|ffn|feedforward": "mlp"}  # words of a module: how its stages' names begin
INSIDE_BY_WORD, OUTSIDE_BY_WORD = by_word(INSIDE), by_word(OUTSIDE)
# Names of the last block's output, and, in a block, of its input.
BEFORE_FINAL = {"transformer", "encoder", "lnfinal.input", "finallayernorm.input", "finalnorm.input"}
BEFORE_BLOCK = {f"{squeezed(norm)}.input" for norm in ("ln_1", *INSIDE["ln_1"])}


def stage_of(name: str, layers: int, first_state: int = 0, first_layer: int = 0) -> str | None:
    """Return minclip's name for another implementation's name, or None.

    Words in front (model., text_model., module.) do not matter. hidden_states.{i} are the embedding, counted
    as `first_state`, and then each block's output, as Hugging Face counts. The blocks count from
    `first_layer`.
    """
    name = plain(name.replace("__call__", ""))
    if re.search(r"visual|vision", name):
        return None
    counted = re.search(r"(hidden_states|attentions)[._](\d+)$", name)
    if counted:
        i = int(counted[2])
        if counted[1] == "attentions":
            return f"{BLOCK}{i}.attn.weights"
        return block_before(i - first_state)
    inside = LAYER.search(name)
    if inside:
        return inside_block(int(inside[1]) - first_layer, name[inside.end() :].strip("._"))
    ends = tails(name)
    if BEFORE_FINAL & {*ends}:
        return f"{BLOCK}{layers - 1}"
    return next((OUTSIDE_BY_WORD[end] for end in ends if end in OUTSIDE_BY_WORD), None)


def tails(name: str) -> list[str]:
    """Return the ends of a name, the longest first, squeezed: a.b.c, b.c, c."""
    words = squeezed(name).split(".")
    return [".".join(words[n:]) for n in range(len(words))]


def inside_block(i: int, word: str) -> str | None:
    """Return the stage of block i that a word names, or None. Words in front do not matter."""
    if word == "input" or BEFORE_BLOCK & {*tails(word)}:
        return block_before(i)
    whole, *ends = tails(word)
    stage = INSIDE_BY_WORD.get(whole)
    if stage is None:  # "0" and "output" alone are the block's output
        part = next((part for words, part in CONTAINERS.items() if re.search(words, whole)), "")
        found = (INSIDE_BY_WORD.get(end) for end in ends)
        stage = next((stage for stage in found if stage and stage.startswith(part)), None)
    return None if stage is None else f"{BLOCK}{i}.{stage}".rstrip(".")


def block_before(i: int) -> str:
    """Return the stage that block i reads: the output of the block before, or the embedding."""
    return f"{BLOCK}{i - 1}" if i > 0 else "embedding"


def stages_of(names: list[str], layers: int) -> dict[str, str | None]:
    """Return the stage that each name of a dump means, or None.

    A list of as many hidden states as there are blocks holds the blocks' outputs, without the embedding.
    The blocks count from 1 where their numbers go from 1 to the number of blocks.
    """
    counts = [re.search(r"hidden_states[._](\d+)$", name) for name in names]
    states = {int(count[1]) for count in counts if count}
    without_embedding = states == set(range(layers))
    numbers = {int(found[1]) for found in map(LAYER.search, map(plain, names)) if found}
    first = int(numbers == set(range(1, layers + 1)))
    return {name: stage_of(name, layers, -1 if without_embedding else 0, first) for name in names}


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


def unpack(port: Mapping[str, Any], tokens: Any = None, layers: int = 0) -> dict[str, Any]:
    """Return a port's dump as a flat dict of arrays on the host: tuples and stacks get a number each.

    Stacked hidden states may lie along the first axis or, as tokens [B, L] tell, along the second. So may a
    stage of all `layers` blocks, as a scan over the blocks gives it. States of all positions that are called
    "text_features" are called "hidden_states".
    Raises TypeError where the port is no mapping.
    """
    check_mapping(port, "the port must be a mapping from stages to arrays (minclip.diagnose takes features)")
    arrays: dict[str, Any] = {}
    for name, value in port.items():
        listed = isinstance(value, (tuple, list))
        array = value if listed or value is None else as_array(value)
        if not listed and name.endswith(("hidden_states", "attentions")) and array.ndim > 3:
            array, listed = first_axis_stacked(array, tokens), True
        if not listed and array is not None and is_scanned(name, array, tokens, layers):
            arrays |= {in_layer(name, i): part for i, part in enumerate(array)}
        elif listed:
            arrays |= {f"{name}.{i}": as_array(part) for i, part in enumerate(array) if part is not None}
        elif array is not None:
            states = name == "text_features" and "hidden_states" not in port and has_positions(array, tokens)
            arrays["hidden_states" if states else name] = array
    return arrays


def is_scanned(name: str, array: Any, tokens: Any, layers: int) -> bool:
    """Tell whether an array holds a stage of every block along its first axis, before those of tokens."""
    if tokens is None or array.ndim < 4 or array.shape[0] != layers or LAYER.search(plain(name)):
        return False
    texts, length = np.shape(tokens)
    return (array.shape[1] == texts and length in array.shape[2:]) or array.shape[1:3] == (length, texts)


def in_layer(name: str, i: int) -> str:
    """Return the name that a stage of all blocks has in block i."""
    name = plain(name)
    return LIST.sub(rf"\g<0>.{i}", name, count=1) if LIST.search(name) else f"{name}.{i}"


def first_axis_stacked(array: Any, tokens: Any) -> Any:
    """Return stacked arrays [N, B, ...], given as [B, N, ...] where the batch tells so."""
    texts = None if tokens is None else len(tokens)
    return array.swapaxes(0, 1) if array.shape[0] == texts != array.shape[1] else array


def has_positions(array: Any, tokens: Any) -> bool:
    """Tell whether an array has an axis for each of the axes B and L of tokens, and one more."""
    return tokens is not None and array.ndim == 3 and all(size in array.shape for size in np.shape(tokens))
