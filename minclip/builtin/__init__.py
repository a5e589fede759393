"""The built-in model: a small CLIP-style text tower and picture table trained for minclip; see MODEL_CARD.md.

The file keeps every matrix as int8 rows with a scale each. The token table is in two parts: the rows of
the tokens that training saw often, and for the others coordinates in a basis that they share.
"""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

MODEL = Path(__file__).with_name("model.safetensors")
PICTURES, SCENES = "pictures", "scenes"
TOKENS = "token_embedding."


def load_builtin():
    """Return the text tower as a dict of float32 arrays under the names of OpenAI's state_dict."""
    with safe_open(MODEL, framework="np") as file:
        apart = (TOKENS, PICTURES, SCENES)
        names = [n for n in file.keys() if not n.endswith(".scale") and not n.startswith(apart)]
        params = {name: _read(file, name) for name in names}
        params[TOKENS + "weight"] = _token_table(file)
    return params


def pictures():
    """Return (emoji, names, features) of N pictures: features [N, E] are float32 rows of length 1.

    >>> emoji, names, features = pictures()
    >>> emoji[names.index("cat face")], features.shape
    ('🐱', (1744, 128))
    """
    metadata, features = _table(PICTURES)
    return json.loads(metadata["emoji"]), json.loads(metadata["names"]), features


def common_ids():
    """Return the ids that training saw often, as a frozenset: they have a row of their own in the file."""
    with safe_open(MODEL, framework="np") as file:
        return frozenset(file.get_tensor(TOKENS + "full_ids").tolist())


def scenes():
    """Return (descriptions, features) of N scenes of emoji and shapes: features [N, E], rows of length 1.

    A description is a dict: "picture" (the scene in emoji), "sentence", "relation", "first" and "second".
    A scene's features come from a small network over the pictures' features, not from pixels.

    >>> descriptions, features = scenes()
    >>> descriptions[0].keys() == {"picture", "sentence", "relation", "first", "second"}
    True
    """
    metadata, features = _table(SCENES)
    return json.loads(metadata["scenes"]), features


def _table(name):
    """Return the file's metadata, and one of its tables as unit rows."""
    with safe_open(MODEL, framework="np") as file:
        metadata, rows = file.metadata(), _read(file, name)
    return metadata, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _read(file, name):
    """Return one tensor in float32: int8 rows times their scales, or as it is stored."""
    array = file.get_tensor(name).astype(np.float32)
    return array * file.get_tensor(name + ".scale").astype(np.float32) if array.ndim == 2 else array


def _token_table(file):
    """Return all V rows [V, D]: the full ones where they belong, coordinates @ basis everywhere else."""
    ids = file.get_tensor(TOKENS + "full_ids")
    full, coordinates = _read(file, TOKENS + "full"), _read(file, TOKENS + "coordinates")
    table = np.empty((len(full) + len(coordinates), full.shape[1]), np.float32)
    rest = np.ones(len(table), bool)
    rest[ids] = False
    table[rest] = coordinates @ file.get_tensor(TOKENS + "basis").astype(np.float32)
    table[ids] = full
    return table
