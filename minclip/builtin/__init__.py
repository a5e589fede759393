"""The built-in model: a small CLIP-style text tower and picture table trained for minclip; see MODEL_CARD.md.

The file keeps every matrix as int8 rows with a scale each. The token table is in two parts: the rows of
the tokens that training saw often, and for the others coordinates in a basis that they share.
"""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

MODEL = Path(__file__).with_name("model.safetensors")
PICTURES = "pictures"
TOKENS = "token_embedding."


def load_builtin():
    """The text tower as a dict of float32 arrays under the names of OpenAI's state_dict."""
    with safe_open(MODEL, framework="np") as file:
        names = [n for n in file.keys() if not n.endswith(".scale") and not n.startswith((TOKENS, PICTURES))]
        params = {name: _read(file, name) for name in names}
        params[TOKENS + "weight"] = _token_table(file)
    return params


def pictures():
    """(emoji, names, features): N emoji and their names, and unit float32 rows [N, E].

    >>> emoji, names, features = pictures()
    >>> emoji[names.index("cat face")], features.shape
    ('🐱', (1744, 128))
    """
    with safe_open(MODEL, framework="np") as file:
        metadata = file.metadata()
        features = _read(file, PICTURES)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return json.loads(metadata["emoji"]), json.loads(metadata["names"]), features


def common_ids():
    """The ids with a row of their own in the token table, as a frozenset: those that training saw often."""
    with safe_open(MODEL, framework="np") as file:
        return frozenset(file.get_tensor(TOKENS + "full_ids").tolist())


def _read(file, name):
    """One tensor in float32: int8 rows times their scales, or as it is stored."""
    array = file.get_tensor(name).astype(np.float32)
    return array * file.get_tensor(name + ".scale").astype(np.float32) if array.ndim == 2 else array


def _token_table(file):
    """All V rows [V, D]: the full ones where they belong, coordinates @ basis everywhere else."""
    ids = file.get_tensor(TOKENS + "full_ids")
    full, coordinates = _read(file, TOKENS + "full"), _read(file, TOKENS + "coordinates")
    table = np.empty((len(full) + len(coordinates), full.shape[1]), np.float32)
    rest = np.ones(len(table), bool)
    rest[ids] = False
    table[rest] = coordinates @ file.get_tensor(TOKENS + "basis").astype(np.float32)
    table[ids] = full
    return table
