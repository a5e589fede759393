"""`apply_lora`: a LoRA merged into the weights of the text tower that it was trained with.

A LoRA (arXiv 2106.09685) adds to a weight W [out, in] the product of two narrow matrices, up [out, r] and
down [r, in], times alpha / r. kohya's scripts, PEFT and diffusers write the same numbers under other names.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minclip.arrays import array_module
from minclip.checkpoint.dialects import shown
from minclip.checkpoint.loading import as_floats
from minclip.checkpoint.sources import Source, read_contents
from minclip.params import BLOCK, Params, as_params

NAME = re.compile(
    r"(?P<tower>.*?)text_model[._]encoder[._]layers[._](?P<block>\d+)[._]"
    r"(?P<module>self_attn[._](?:q|k|v|out)_proj|mlp[._]fc[12])\.(?P<part>.+)"
)
PARTS = {"alpha": "alpha"}
for _side, _words in {
    "down": ("lora_down", "lora_A", "lora_A.default", "lora.down", "lora_linear_layer.down"),
    "up": ("lora_up", "lora_B", "lora_B.default", "lora.up", "lora_linear_layer.up"),
}.items():
    PARTS |= {f"{word}.weight": _side for word in _words}
# Hugging Face's module: OpenAI's parameter, and which third of its rows.
MODULES: dict[str, tuple[str, int | None]] = {
    f"self_attn.{letter}_proj": ("attn.in_proj_weight", i) for i, letter in enumerate("qkv")
}
MODULES |= {"self_attn.out_proj": ("attn.out_proj.weight", None)}
MODULES |= {"mlp.fc1": ("mlp.c_fc.weight", None), "mlp.fc2": ("mlp.c_proj.weight", None)}


class Pair(NamedTuple):
    """A LoRA's product for one weight.

    tower   the prefix of its names, such as "lora_te1_"
    name    OpenAI's name of the weight
    third   0, 1 or 2 for the rows of query, key or value; None for all rows
    parts   "up" and "down", and "alpha" where the file has it
    """

    tower: str
    name: str
    third: int | None
    parts: dict[str, np.ndarray]


def apply_lora(params: Mapping[str, Any], path: Source, scale: float = 1.0) -> Params:
    """Return params with a LoRA merged into them; params itself is not changed.

    params   a text tower, such as `load` returns
    path     a LoRA of kohya's scripts, PEFT or diffusers: a file, or PEFT's folder. Of two text towers in one
             file, the one whose sizes fit is used; a U-Net's part is ignored
    scale    the strength; 0 changes nothing

    The sums are computed in float32 and rounded once to the dtype of params.
    Raises ValueError where the file is not a LoRA of a CLIP text tower, or does not fit params.

    >>> import minclip
    >>> params = minclip.load()
    >>> apply_lora(params, "no-such-lora.safetensors")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no LoRA no-such-lora.safetensors
    """
    params, file = as_params(params), lora_file(path)
    try:
        pairs = fitting_pairs(read_pairs(file), params)
        changed: dict[str, Any] = {}
        for pair in pairs:
            weight = changed.get(pair.name, params[pair.name])
            changed[pair.name] = merged(weight, pair, scale * strength(pair, file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return params | changed


def lora_file(path: Source) -> Path:
    """Return the file of a LoRA, which in PEFT's folder is adapter_model.safetensors or .bin."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be that of a LoRA, not {type(path).__name__}")
    file = Path(path)
    for name in ("adapter_model.safetensors", "adapter_model.bin") if file.is_dir() else ():
        if (file / name).is_file():
            return file / name
    if not file.is_file():
        raise FileNotFoundError(f"no LoRA {os.fspath(path)}")
    return file


def read_pairs(file: Path) -> dict[str, list[Pair]]:
    """Return the pairs of a file by the prefix of their tower, such as "lora_te1_" or "text_encoder."."""
    towers: dict[str, dict[tuple[str, int | None], dict[str, np.ndarray]]] = {}
    for name, tensor in read_contents(file).tensors.items():
        match = NAME.fullmatch(name)
        if match is None or match["part"] not in PARTS:
            if "text_model" in name or name.startswith("lora_te"):
                raise ValueError(f"{shown(name)} is not of a plain LoRA of CLIP's text tower")
            continue  # the U-Net's part
        ours, third = MODULES[match["module"].replace("attn_", "attn.").replace("mlp_", "mlp.")]
        key = (f"{BLOCK}{match['block']}.{ours}", third)
        pair = towers.setdefault(match["tower"], {}).setdefault(key, {})
        pair[PARTS[match["part"]]] = as_floats(tensor, shown(name)).astype(np.float32)
    return {
        tower: [Pair(tower, *key, parts) for key, parts in pairs.items()] for tower, pairs in towers.items()
    }


def fitting_pairs(towers: dict[str, list[Pair]], params: Params) -> list[Pair]:
    """Return the pairs of the one tower that fits params."""
    if not towers:
        raise ValueError("no LoRA of CLIP's text tower is in it")
    fitting = {tower: pairs for tower, pairs in towers.items() if all(fits(pair, params) for pair in pairs)}
    if len(fitting) != 1:
        names = ", ".join(shown(tower) for tower in towers)
        raise ValueError(f"{len(fitting)} of its LoRAs ({names}) fit the tower's layers and width, not one")
    return next(iter(fitting.values()))


def fits(pair: Pair, params: Params) -> bool:
    """Tell whether both matrices are there, with the sizes of the weight that they change."""
    if pair.name not in params or not {"up", "down"} <= pair.parts.keys():
        return False
    rows, columns = params[pair.name].shape
    up, down = pair.parts["up"].shape, pair.parts["down"].shape
    wanted = rows if pair.third is None else rows // 3
    return len(up) == len(down) == 2 and (up[0], down[1]) == (wanted, columns) and up[1] == down[0]


def strength(pair: Pair, file: Path) -> float:
    """Return alpha / r. kohya and diffusers write alpha as a tensor, and leave it out where it is r.

    PEFT writes lora_alpha into adapter_config.json, with use_rslora for alpha / sqrt(r).
    """
    rank = len(pair.parts["down"])
    if "alpha" in pair.parts:
        return float(pair.parts["alpha"].reshape(())) / rank
    path = file.with_name("adapter_config.json")
    if not path.is_file() and pair.tower.startswith("base_model."):
        raise ValueError("adapter_config.json, in which PEFT writes lora_alpha, is not beside it")
    if not path.is_file():
        return 1.0
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        plain = not (config.get("use_dora") or config.get("alpha_pattern") or config.get("fan_in_fan_out"))
        alpha = float(config["lora_alpha"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("adapter_config.json beside it has no lora_alpha") from None
    if not plain:
        raise ValueError("adapter_config.json beside it is of DoRA or of another variant of LoRA")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def merged(weight: Any, pair: Pair, scale: float) -> Any:
    """Return weight + scale * up @ down, in the dtype and on the device of weight."""
    xp = array_module(weight)
    change = np.float32(scale) * (pair.parts["up"] @ pair.parts["down"])
    whole = np.zeros(weight.shape, np.float32)
    first = 0 if pair.third is None else pair.third * len(change)
    whole[first : first + len(change)] = change
    return (weight + xp.asarray(whole)).astype(weight.dtype, copy=False)
