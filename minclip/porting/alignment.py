"""Read another implementation's arrays as our stages: whatever they are called and however they lie."""

import difflib
import math
import re
from collections import namedtuple

import numpy as np
from einops import rearrange

from minclip.arrays import as_array
from minclip.params import BLOCK
from minclip.porting.stages import axes

# What a block's stages are called elsewhere, after the block's number: by OpenAI's and OpenCLIP's
# modules, Hugging Face's, timm's. ".input" is what `minclip.trace_torch` calls a module's input.
INSIDE = {
    "": ("output", "0", "output.0"),
    "ln_1": ("layer_norm1", "norm1", "ln1"),
    "attn.qkv": ("self_attn.qkv", "attn.in_proj", "self_attn.qkv_proj", "attn.qkv_proj"),
    "attn.q": ("self_attn.q_proj", "self_attn.q", "attn.q_proj"),
    "attn.k": ("self_attn.k_proj", "self_attn.k", "attn.k_proj"),
    "attn.v": ("self_attn.v_proj", "self_attn.v", "attn.v_proj"),
    "attn.scores": ("self_attn.scores",),
    "attn.masked": ("self_attn.masked",),
    "attn.weights": ("attn.1", "self_attn.1", "self_attn.weights", "attn.probs"),
    "attn.context": ("attn.out_proj.input", "self_attn.out_proj.input", "self_attn.context"),
    "attn": (
        "attn.0",
        "self_attn",
        "self_attn.0",
        "attn.out_proj",
        "self_attn.out_proj",
        "attn.proj",
        "ls_1",
    ),
    "residual": ("ln_2.input", "layer_norm2.input", "norm2.input"),
    "ln_2": ("layer_norm2", "norm2", "ln2"),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.gelu": ("mlp.activation_fn", "mlp.act", "mlp.c_proj.input", "mlp.fc2.input"),
    "mlp": ("mlp.fc2", "mlp.c_proj", "ls_2"),
}
OUTSIDE = {
    "token_embedding": (),
    "positional_embedding": ("position_embedding",),
    "embedding": ("embeddings", "transformer.input", "encoder.input", "resblocks.input", "layers.input"),
    "ln_final": ("final_layer_norm", "last_hidden_state"),
    "eot": (),
    "pooled": ("pooler_output", "pooled_output", "text_projection.input"),
    "text_features": ("text_embeds", "text_projection", "features", "encode_text"),
}
INSIDE_BY_WORD = {word: stage for stage in INSIDE for word in (stage, *INSIDE[stage])}
OUTSIDE_BY_WORD = {word: stage for stage in OUTSIDE for word in (stage, *OUTSIDE[stage])}

# How a stage may lie in memory: letters are axes, brackets merge them. P is the 3 of q, k, v packed.
LAYOUTS = {
    "B L D": ("B L D", "L B D", "(B L) D", "(L B) D", "B D L"),
    "B H L K": (
        *("B H L K", "B L (H K)", "L B (H K)", "(B H) L K", "B L H K", "L B H K", "H B L K"),
        *("(B L) (H K)", "(L B) (H K)"),
    ),
    "B H L M": ("B H L M", "(B H) L M", "H B L M"),
    "P B H L K": (
        *("B L (P H K)", "L B (P H K)", "P B H L K", "P B L (H K)", "P L B (H K)", "B L P H K"),
        *("B L P (H K)", "B L (H P K)", "B L H P K", "(B L) (P H K)", "(L B) (P H K)"),
    ),
}

# A port's array as one of our stages: the array in our layout, the port's name for it and layout of
# it, and the other layouts that have the same shape.
Match = namedtuple("Match", "array name layout rivals")


def align(reference, port):
    """Read a port's arrays as stages: ({stage: Match}, {stage: (name, shape)}, [names of no stage]).

    The second holds arrays whose name is a stage's and whose shape is none of its layouts.
    """
    matches, misfits, unknown = {}, {}, []
    layers = len({name.split(".")[2] for name in reference if name.startswith(BLOCK)})
    named = {name: stage_of(name, layers) for name in port}
    for name in sorted(port, key=lambda name: name != named[name]):  # our own names go before others' words
        stage, array = named[name], port[name]
        parts = [f"{stage[:-3]}{part}" for part in "qkv"] if stage and stage.endswith("attn.qkv") else [stage]
        if parts[0] not in reference:
            unknown.append(name)
        elif parts[0] not in matches:
            found = fit([as_array(reference[part]) for part in parts], array, axes(parts[0]))
            for part, arranged in zip(parts, found.array if found else (), strict=bool(found)):
                matches[part] = found._replace(array=arranged, name=name)
                misfits.pop(part, None)
            if not found:
                misfits[parts[0]] = name, list(array.shape)
    return matches, misfits, unknown


def stage_of(name, layers):
    """Our name for what another implementation calls name, or None: see INSIDE and OUTSIDE.

    Words in front (model., text_model., module.) do not matter, and hidden_states.{i} are the
    embedding and then each block's output, as Hugging Face counts.
    """
    name = name.replace("/", ".").strip(".")
    if re.search(r"visual|vision", name):
        return None
    counted = re.search(r"(hidden_states|attentions)[._](\d+)$", name)
    if counted:
        i = int(counted[2])
        if counted[1] == "attentions":
            return f"{BLOCK}{i}.attn.weights"
        return f"{BLOCK}{i - 1}" if i else "embedding"
    inside = re.search(r"(?:^|\.)(?:resblocks|layers|layer|blocks|block|h)\.(\d+)(?:\.(.+))?$", name)
    if inside:
        i, word = int(inside[1]), inside[2] or ""
        if word in ("input", "ln_1.input", "layer_norm1.input"):
            return f"{BLOCK}{i - 1}" if i else "embedding"
        stage = INSIDE_BY_WORD.get(word)
        return None if stage is None else f"{BLOCK}{i}.{stage}".rstrip(".")
    words = name.split(".")
    tails = [".".join(words[n:]) for n in range(len(words))]
    if {"ln_final.input", "final_layer_norm.input"} & set(tails) or words[-1] in ("transformer", "encoder"):
        return f"{BLOCK}{layers - 1}"
    return next((OUTSIDE_BY_WORD[tail] for tail in tails if tail in OUTSIDE_BY_WORD), None)


def fit(reference, array, letters):
    """A port's array in the reference's layout, as a `Match` without a name, or None if none fits.

    reference   the stage's array, or those of q, k and v, in a list
    letters     the axes of each. The result holds as many arrays; L may have come out shorter, for a
                port that leaves the last positions out.
    Of several layouts of the same shape, it is the one whose numbers are nearest to the reference's.
    """
    sizes = dict(zip(letters.split(), reference[0].shape, strict=True)) | {"P": 3}
    goal = f"P {letters}" if len(reference) == 3 else letters
    expected = np.stack(reference) if len(reference) == 3 else reference[0]
    for length in range(sizes.get("L", 1), 0, -1):
        sizes |= {"L": length, "M": length} if "L" in sizes else {}
        layouts = [layout for layout in layouts_of(goal) if has_layout(array.shape, layout, sizes)]
        if layouts:
            cropped = crop(goal, expected, length)
            read = {layout: arrange(array, layout, goal, sizes) for layout in layouts}
            best = min(layouts, key=lambda layout: apart(cropped, read[layout]))
            rivals = [other for other in layouts if not same(read[other], read[best])]
            arranged = list(read[best]) if len(reference) == 3 else [read[best]]
            return Match(arranged, None, best, rivals)
    return None


def layouts_of(letters):
    """The layouts a stage of these axes may come in; the others than LAYOUTS' only in their own."""
    return LAYOUTS.get(letters, (letters,))


def has_layout(shape, layout, sizes):
    """Whether shape is that of layout, axes of size 1 left out or put in anywhere."""
    merged = [math.prod(sizes[axis] for axis in group) for group in groups(layout)]
    return [n for n in shape if n != 1] == [n for n in merged if n != 1]


def arrange(array, layout, goal, sizes):
    """Return an array of a layout with its axes split and in the goal's order."""
    merged = [math.prod(sizes[axis] for axis in group) for group in groups(layout)]
    flat = {axis: sizes[axis] for group in groups(layout) for axis in group}
    return rearrange(array.reshape(merged), f"{layout} -> {goal}", **flat)


def groups(layout):
    """[["B"], ["H", "K"]] of "B (H K)"."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", layout)]


def crop(letters, array, length):
    """array with no more than length positions, as queries and as keys."""
    return array[tuple(slice(length if axis in "LM" else None) for axis in letters.split())]


def apart(a, b):
    """Euclidean distance over the numbers that are finite in both."""
    both = np.isfinite(a) & np.isfinite(b)
    return np.linalg.norm(a[both].astype(np.float64) - b[both].astype(np.float64))


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def rename(port, names):
    """A port's dump with the arrays that names lists called as we call them: {"theirs": "ours"}.

    Raises ValueError for a name that the dump does not have.
    """
    for theirs in names:
        if theirs not in port:
            near = difflib.get_close_matches(theirs, port, n=1)
            raise ValueError(
                f"the port has no {theirs!r}" + (f"; the nearest is {near[0]!r}" if near else "")
            )
    return {names.get(name, name): array for name, array in port.items()}


def unpack(port):
    """A port's dump as a flat dict of arrays on the host: tuples and stacks get a number each."""
    if not hasattr(port, "items"):
        raise ValueError(f"a port is a mapping from stage name to array, not {type(port).__name__}")
    arrays = {}
    for name, value in port.items():
        stacked = name.endswith(("hidden_states", "attentions")) and not isinstance(value, (tuple, list))
        if isinstance(value, (tuple, list)) or (stacked and as_array(value).ndim > 3):
            arrays |= {f"{name}.{i}": as_array(part) for i, part in enumerate(value) if part is not None}
        elif value is not None:
            arrays[name] = as_array(value)
    return arrays
