"""The names of the encoder's stages, their axes, and which of their numbers count."""

import numpy as np

from minclip.params import block_of

HIDDEN = -104  # exp of it is 0 in float32: a key so far below the row's highest score is masked

# The axes of each stage; those not named here are the stream's, B L D, and the MLP's, whose F counts as D
# here. M is L again, seen as keys.
AXES = {
    "positional_embedding": "L D",
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


def part_of(name):
    """A stage's name inside its block ("" for the block's output), or itself outside the blocks."""
    return name.removeprefix(block_of(name) or "").lstrip(".")


def axes(name):
    """The axes of a stage as letters, "B L D"."""
    return AXES.get(part_of(name), "B L D")


def up_to_end(tokens):
    """[B, L], True up to the end of each text."""
    return np.arange(tokens.shape[-1]) <= tokens.argmax(axis=-1)[:, None]


def entries(name, reference, port, text=None):
    """The numbers of a stage that are to be compared, of both sides, flat and in float64.

    text   [B, L], True up to the end of each text; where given, only those positions
    Where the reference's mask hides a key, a port that hides it as well in its own way (-1e4, the
    lowest finite number) is no different: both are left out.
    """
    a, b = (np.asarray(array, dtype=np.float64) for array in (reference, port))
    if name.endswith("attn.masked"):
        highest = np.where(np.isneginf(a), -np.inf, a).max(axis=-1, keepdims=True)
        hidden = np.isneginf(a) & (b <= highest + HIDDEN)
        a, b = np.where(hidden, 0, a), np.where(hidden, 0, b)
    if text is not None and name.endswith("attn.scores"):  # of scores the mask hides those of later keys
        both = text[:, :, None] & text[:, None, :]
        a, b = a.transpose(0, 2, 3, 1)[both], b.transpose(0, 2, 3, 1)[both]
    elif text is not None and axes(name)[:3] == "B L":
        a, b = a[text], b[text]
    elif text is not None and axes(name)[:3] == "B H":
        a, b = a.swapaxes(1, 2)[text], b.swapaxes(1, 2)[text]
    return a.ravel(), b.ravel()
