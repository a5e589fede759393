"""`load` and `from_state_dict`: the parameters of a text tower, from any source and in any dialect."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array, float_dtype
from minclip.checkpoint import dialects
from minclip.checkpoint.recompose import recomposed, without_wrappers
from minclip.checkpoint.sources import Source, fetched, open_tower
from minclip.checkpoint.tensor_files import Stored, all_finite
from minclip.gpu.device import to_gpu, working_cupy
from minclip.params import Params, check_mapping

Float = np.float16 | np.float32 | np.float64
READERS = min(4, os.cpu_count() or 1)  # threads: NumPy and zlib release Python's lock


def from_state_dict(
    state_dict: Mapping[str, object], *, activation: str | None = None, heads: int | None = None
) -> Params:
    """Return `Params` of a model's state_dict, of torch tensors or any arrays, in any dialect.

    activation   "quick_gelu" or "gelu": names and shapes cannot tell it. The default is that of a `Params`
    heads        the number of attention heads, where it is not width // 64 as in OpenAI's models

    The names of OpenAI, OpenCLIP and Hugging Face are known, behind any prefix. The image tower is ignored.
    Arrays keep their dtype; bfloat16 and float8 become float32. A `Params` keeps its end-of-text id.

    Raises ValueError for a tensor that is missing, has another shape, or belongs to another architecture.
    Warns about weights that are NaN or infinite.

    >>> import minclip
    >>> other = {f"module.{name}": array for name, array in minclip.load().items()}
    >>> from_state_dict(other, activation="quick_gelu").heads
    2
    """
    check_mapping(state_dict, "state_dict must be a mapping from names to tensors (minclip.load reads files)")
    config: dict[str, Any] = {"activation": activation, "heads": heads}
    projection = None
    if isinstance(state_dict, Params):
        known = {"activation": state_dict.activation, "heads": state_dict.heads, "eot": state_dict.eot}
        config = known | {name: value for name, value in config.items() if value is not None}
        projection = "text_projection" in state_dict
    tensors = {
        name: value if hasattr(value, "shape") else as_array(value) for name, value in state_dict.items()
    }
    tensors = recomposed(without_wrappers(tensors))
    prefix = dialects.choose_prefix(dialects.find_towers(tensors), None)
    tower = dialects.Tower(tensors, prefix, projection=projection)
    params, notes = to_params(tower, config)
    for note in notes:
        warnings.warn(f"state_dict {note}", stacklevel=2)
    return params


def load(
    source: Source = "builtin",
    device: str = "cpu",
    *,
    dtype: str | type[Float] | np.dtype[Float] | None = None,
    activation: str | None = None,
    heads: int | None = None,
    text_only: bool | None = None,
) -> Params:
    """Return the `Params` of a model, ready for `encode_text`.

    source       "builtin", minclip's own small model, which is not CLIP and knows little beside emoji; one of
                 `available_models()`, which is downloaded once; or a path: OpenAI's .pt, a file of
                 torch.save, .safetensors, .npz, GGUF, or a folder of Hugging Face or OpenCLIP.
                 FILE#PREFIX says which of several text towers in one file. "hf:OWNER/NAME" downloads the text
                 tower of a model of the Hugging Face hub
    device       "cpu" for NumPy arrays, "cuda" for CuPy arrays
    dtype        "float16", "float32" or "float64"; the default is float32 on the CPU and float16 on the GPU
    activation   "quick_gelu" or "gelu", for a file that does not say and has no config beside it
    heads        the number of attention heads, where neither the config nor width // 64 is right
    text_only    whether to download the text tower of one of `available_models()` alone, half the bytes or
                 less, without a sha256 of the complete file. None means the environment variable
                 MINCLIP_TEXT_ONLY

    Nothing in a file is ever run. Where the file has the wanted dtype, arrays may be mapped from it.

    Raises OSError for a file that cannot be read, ValueError for one that is not CLIP's text tower or where
    there is no GPU, MemoryError where the GPU is too full. Warns about weights that are NaN or infinite.

    >>> load()["positional_embedding"].shape
    (77, 128)
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")
    wanted = float_dtype(dtype or ("float16" if device == "cuda" else "float32"))
    if device == "cuda":
        working_cupy()  # an error comes before a download
    path = fetched(source, text_only)
    try:
        tower, config, _ = open_tower(path, activation, heads)
        params, notes = to_params(tower, config, wanted)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    for note in notes:
        warnings.warn(f"{path} {note}", stacklevel=2)
    return params.with_arrays(to_gpu(params)) if device == "cuda" else params


def one_line(error: ValueError) -> str:
    """Return an error's message as one line, though the names of a damaged file may be in it."""
    line = " ".join(str(error).split())[:800]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def to_params(
    tower: dialects.Tower, config: Mapping[str, Any], dtype: np.dtype[Any] | None = None
) -> tuple[Params, list[str]]:
    """Read the tower's arrays, each converted to dtype. Return them and the warnings that they deserve."""
    heads, activation = check_loads(tower, config)
    spoiled: dict[str, bool] = {}  # a parameter's name: whether its source was finite

    def read(name: str) -> tuple[str, np.ndarray]:
        def convert(tensor: Any, source: str) -> np.ndarray:
            array = as_floats(tensor, source)
            if not (getattr(tensor, "finite", None) or all_finite(array)):
                spoiled[name] = False
            if dtype is None or array.dtype == dtype:
                return array
            with np.errstate(over="ignore"):
                converted = array.astype(dtype)
            if dtype.itemsize < array.itemsize and name not in spoiled and not all_finite(converted):
                spoiled[name] = True
            return converted

        return name, tower.array(name, convert)

    from concurrent.futures import ThreadPoolExecutor  # here, because it takes time to import

    with ThreadPoolExecutor(READERS) as pool:
        arrays = dict(pool.map(read, tower.sources))
    params = Params(arrays, activation=activation, heads=heads, eot=config.get("eot"))
    return params, notes_on(spoiled, dtype)


def check_loads(tower: dialects.Tower, config: Mapping[str, Any]) -> tuple[int, str]:
    """Return the heads and the activation of a tower. Raises ValueError where it does not load.

    No number is read.
    """
    heads = checked_heads(config.get("heads"), tower.sizes["D"])
    activation = config.get("activation")
    if activation is None:
        raise ValueError(
            "no config tells the activation: pass activation= (--activation), 'quick_gelu' for "
            "OpenAI's weights (Stable Diffusion 1, clip_l), 'gelu' for most of OpenCLIP's (clip_g)"
        )
    for name in tower.tensor_names():
        check_stored_floats(tower.tensors[name], name)
    return heads, activation


def checked_heads(heads: Any, width: int) -> int:
    """Return the number of heads, OpenAI's where none is given. Raises ValueError for an impossible one."""
    if heads is None and (width % 64 or not width):
        raise ValueError(
            f"width {width} is no multiple of 64, OpenAI's head width: pass heads= (--heads) too, "
            "to minclip.load or minclip.from_state_dict"
        )
    heads = width // 64 if heads is None else heads
    heads = int(heads) if isinstance(heads, np.integer) else heads
    if type(heads) is not int:
        raise ValueError(f"heads must be an int, not {heads!r:.80}")
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide width {width}")
    return heads


def notes_on(spoiled: Mapping[str, bool], dtype: np.dtype[Any] | None) -> list[str]:
    """Return the warnings about weights that are not finite."""
    notes = []
    overflowed = [name for name, was_finite in spoiled.items() if was_finite]
    if overflowed:
        notes.append(f"has weights beyond the range of {dtype}, infinite now, in {listed(overflowed)}")
    damaged = [name for name, was_finite in spoiled.items() if not was_finite]
    if damaged:
        notes.append(f"has NaN or infinite weights in {listed(damaged)}: features will be NaN")
    return notes


def listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more


def check_stored_floats(tensor: Any, name: str) -> None:
    """Raise ValueError where a tensor of a file holds no floats, as its dtype says."""
    if isinstance(tensor, Stored) and not tensor.floats:
        raise ValueError(f"{name} holds {tensor.dtype}, not floats")


def as_floats(tensor: Any, name: str) -> np.ndarray:
    """Return a parameter as a NumPy array on the host. Raises ValueError where it holds no floats."""
    check_stored_floats(tensor, name)
    array = as_array(tensor)
    if array.dtype.kind != "f":
        raise ValueError(f"{name} holds {array.dtype}, not floats")
    return array
