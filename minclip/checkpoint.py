"""Parameters in and out: one mapping from OpenAI's names to arrays, wherever they come from."""

import difflib
import os
import tempfile
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

ACTIVATIONS = ("quick_gelu", "gelu")


class Params(dict):
    """A text tower: a dict from OpenAI's parameter names to arrays, and what shapes cannot tell.

    activation   "quick_gelu" (OpenAI's own) or "gelu" (exact, as in most OpenCLIP models)
    heads        the number of attention heads
    """

    def __init__(self, arrays, *, activation, heads):
        super().__init__(arrays)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.activation = activation
        self.heads = heads

    def __repr__(self):
        V, D = self["token_embedding.weight"].shape
        layers = sum(name.endswith(".ln_1.weight") for name in self)
        return (
            f"Params({layers} layers, width {D}, {self.heads} heads, {self.activation}, "
            f"context {len(self['positional_embedding'])}, vocabulary {V}, "
            f"embedding {self['text_projection'].shape[1]}, {self['text_projection'].dtype})"
        )


def from_state_dict(state_dict, *, activation=None, heads=None):
    """`Params` from a model's state_dict of torch tensors or arrays, in OpenAI's names.

    Keys of the image tower and logit_scale are left out. Arrays keep their dtype.
    activation   "quick_gelu" for OpenAI's own weights; names and shapes cannot tell it
    heads        where it is not width // 64, as in OpenAI's models
    Raises ValueError for a tensor that is missing, of another shape, or not the text tower's.
    """
    if activation is None:
        raise ValueError(
            "names and shapes do not tell the activation: pass activation='quick_gelu' "
            "for OpenAI's weights, 'gelu' for most of OpenCLIP's"
        )
    ignored = ("visual.", "logit_scale", "input_resolution", "context_length", "vocab_size")
    arrays = {name: as_array(value) for name, value in state_dict.items() if not name.startswith(ignored)}
    check_shapes(arrays)
    width = len(arrays["text_projection"])
    if heads is None and width % 64:
        raise ValueError(f"width {width} is no multiple of OpenAI's head width, 64: pass heads=")
    return Params(arrays, activation=activation, heads=heads or width // 64)


def load(source="builtin", *, device="cpu", dtype=None, activation=None):
    """`Params` of a model, ready for `encode_text`.

    source       "builtin", or the path of a safetensors file in OpenAI's names
    device       "cpu" for NumPy arrays, "cuda" for CuPy arrays
    dtype        "float16", "float32" or "float64"; by default float32 on the CPU, float16 on the GPU
    activation   "quick_gelu" or "gelu", for a file that does not say
    Raises OSError for a file that cannot be read, ValueError for one that is not a text tower.
    """
    if source == "builtin":
        from minclip import builtin

        params = Params(builtin.load_builtin(), activation="quick_gelu", heads=2)
    else:
        params = read_safetensors(source, activation)
    if dtype is None:
        dtype = "float16" if device == "cuda" else "float32"
    return Params(
        {name: array.astype(dtype, copy=False) for name, array in params.items()},
        activation=params.activation,
        heads=params.heads,
    )


def read_safetensors(path, activation=None):
    """`Params` of a safetensors file in OpenAI's names, in the dtypes it holds."""
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            said = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    heads = int(said["heads"]) if "heads" in said else None
    return from_state_dict(arrays, activation=activation or said.get("activation"), heads=heads)


def save(params, path):
    """Write params to a safetensors file, with activation and heads in its metadata; `load` reads it back.

    The file appears at path only when whole.
    """
    params = params if isinstance(params, Params) else from_state_dict(params, activation="quick_gelu")
    path = Path(path)
    arrays = {name: np.ascontiguousarray(as_array(array)) for name, array in params.items()}
    said = {"format": "minclip", "activation": params.activation, "heads": str(params.heads)}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as partial:
        pass
    try:
        safetensors.numpy.save_file(arrays, partial.name, metadata=said)
        os.replace(partial.name, path)
    except BaseException:
        os.unlink(partial.name)
        raise


def check_shapes(arrays):
    """Raise ValueError unless arrays are a text tower's, each of the shape that the others imply."""
    expected = expected_shapes(arrays)
    for name in expected:
        if name not in arrays:
            near = difflib.get_close_matches(name, arrays, n=1)
            raise ValueError(f"{name} is missing" + (f"; the nearest name is {near[0]}" if near else ""))
        if arrays[name].shape != expected[name]:
            raise ValueError(f"{name} is {list(arrays[name].shape)}, expected {list(expected[name])}")
    for name in arrays:
        if name not in expected:
            near = difflib.get_close_matches(name, expected, n=1)
            raise ValueError(
                f"{name} is not a text tower's parameter" + (f"; the nearest is {near[0]}" if near else "")
            )


def expected_shapes(arrays):
    """Every parameter's name and shape, from the sizes that the outermost arrays tell."""
    try:
        V, D = arrays["token_embedding.weight"].shape
        L, E = len(arrays["positional_embedding"]), arrays["text_projection"].shape[1]
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing: these are not OpenAI's names") from None
    shapes = {
        "token_embedding.weight": (V, D),
        "positional_embedding": (L, D),
        "ln_final.weight": (D,),
        "ln_final.bias": (D,),
        "text_projection": (D, E),
    }
    numbers = [int(name.split(".")[2]) for name in arrays if name.startswith("transformer.resblocks.")]
    for i in range(max(numbers, default=-1) + 1):
        block = f"transformer.resblocks.{i}"
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (D,)
        for layer, out, into in (
            ("attn.in_proj_", 3 * D, D),
            ("attn.out_proj.", D, D),
            ("mlp.c_fc.", 4 * D, D),
            ("mlp.c_proj.", D, 4 * D),
        ):
            shapes[f"{block}.{layer}weight"], shapes[f"{block}.{layer}bias"] = (out, into), (out,)
    return shapes


def as_array(value):
    """A torch tensor, a CuPy array or anything array-like, as a NumPy array on the host."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return value.get() if hasattr(value, "get") else np.asarray(value)
