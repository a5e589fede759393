"""Weights stored in parts: wrappers inside names, GmP, weight norm, and scales of float8.

Both functions take tensors by name and return tensors by name; no number is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.checkpoint.tensor_files import FLOATS, Stored

# Modules that torch.compile, FSDP, fairscale and Lightning put around others, in front of or inside names.
WRAPPERS = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
# Numbers beside a float8 weight that only a float8 matrix product needs.
UNUSED = (".scale_input", ".input_scale", ".comfy_quant")
# How a weight is stored in two parts: the names of its magnitude, of its direction, and of the weight.
PAIRS = (
    (re.compile(r"(.*\.|)r"), "{}theta", "{}weight"),  # GmP, as zer0int's CLIP-fine-tune trains
    (re.compile(r"(.*weight)_g"), "{}_v", "{}"),  # torch.nn.utils.weight_norm
    (
        re.compile(r"(.*\.|)parametrizations\.weight\.original0"),
        "{}parametrizations.weight.original1",
        "{}weight",
    ),
)
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")  # ComfyUI's name, and compressed-tensors'


def without_wrappers(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tensors with the names that they have without wrappers around their modules."""
    if not any(f"{wrapper}." in name for name in tensors for wrapper in WRAPPERS):
        return tensors
    clean = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in clean:
            raise ValueError(f"two tensors have the name {short:.80} without the wrappers of their modules")
        clean[short] = tensor
    return clean


def recomposed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors with one tensor for each weight that is stored in parts, computed when read."""
    composed = {name: tensor for name, tensor in tensors.items() if not name.endswith(UNUSED)}
    for name in tensors:
        for pattern, direction, whole in PAIRS:
            match = pattern.fullmatch(name)
            if match and direction.format(match[1]) in composed:
                g, v = composed.pop(name), composed.pop(direction.format(match[1]))
                composed[whole.format(match[1])] = computed(v, g, scaled_direction)
        for ending in SCALES:
            weight = f"{name.removesuffix(ending)}.weight"
            if name.endswith(ending) and weight in composed:
                composed[weight] = computed(composed[weight], composed.pop(name), scaled)
    return composed


def computed(weight: Any, other: Any, function: Callable[[Any, Any], Any]) -> Stored:
    """Return the tensor function(weight, other), with the shape of weight, computed when read."""
    dtype = str(weight.dtype).removeprefix("torch.")
    nbytes = getattr(weight, "nbytes", 0) + getattr(other, "nbytes", 0)

    def read() -> np.ndarray:
        array = as_array(weight)
        result = function(
            array.astype(np.float32, copy=False), as_array(other).astype(np.float32, copy=False)
        )
        return result.astype(array.dtype, copy=False)

    return Stored(weight.shape, dtype, read, nbytes, floats=getattr(weight, "floats", dtype in FLOATS))


def scaled_direction(direction: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Return magnitude * direction / |direction|, the norm taken over the axes where magnitude has size 1."""
    sizes = magnitude.shape or (1,) * direction.ndim
    if len(sizes) != direction.ndim or any(
        m not in (1, d) for m, d in zip(sizes, direction.shape, strict=True)
    ):
        raise ValueError(f"a magnitude of shape {list(sizes)} for a weight of {list(direction.shape)}")
    axes = tuple(axis for axis, size in enumerate(sizes) if size == 1)
    return direction * (magnitude / np.sqrt((direction**2).sum(axis=axes, keepdims=True)))


def scaled(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return weight times its scale: one number, or one for each row."""
    if scale.size not in (1, len(weight)):
        raise ValueError(f"a scale of shape {list(scale.shape)} for a weight of {list(weight.shape)}")
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
