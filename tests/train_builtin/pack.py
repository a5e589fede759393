"""Write a trained tower and its picture table as one int8 file; `minclip.builtin` reads it back."""

import json

import numpy as np
from safetensors.numpy import save_file


def rows_as_int8(matrix):
    """(int8 rows, float16 scale per row): row ≈ scale * int8."""
    scale = (np.abs(matrix).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    if not (scale > 0).all():
        raise ValueError("a zero row cannot be scaled")
    whole = np.rint(matrix / scale.astype(np.float32)).clip(-127, 127)
    return whole.astype(np.int8), scale


def write(path, params, full_ids, coordinates, basis, emoji, names, features, scenes=()):
    """Write the file.

    params: float32 arrays by OpenAI's names, the token table among them. Of the table the rows `full_ids`
    are kept at full width; the others are `coordinates` [others, rank] @ `basis` [rank, width].
    """
    tensors = {"token_embedding.basis": basis.astype(np.float16), "token_embedding.full_ids": full_ids}
    matrices = dict(params)
    matrices["token_embedding.full"] = matrices.pop("token_embedding.weight")[full_ids]
    matrices["token_embedding.coordinates"] = coordinates
    matrices["pictures"] = features
    if scenes:
        matrices["scenes"] = np.stack([scene["features"] for scene in scenes])
    for name, array in matrices.items():
        if array.ndim == 1:
            tensors[name] = array.astype(np.float32)
        else:
            tensors[name], tensors[name + ".scale"] = rows_as_int8(array)
    metadata = {
        "emoji": json.dumps(emoji, ensure_ascii=False),
        "names": json.dumps(names, ensure_ascii=False),
        "scenes": json.dumps([scene["scene"] for scene in scenes], ensure_ascii=False),
        "about": "a small CLIP-style model trained for minclip; MODEL_CARD.md beside this file tells more",
    }
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, path, metadata)
