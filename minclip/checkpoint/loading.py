"""Parameters in and out: one mapping from OpenAI's names to arrays, wherever they come from."""

import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import safetensors.numpy

from minclip import builtin
from minclip.arrays import as_array
from minclip.checkpoint import dialects
from minclip.checkpoint.download import available_models, download
from minclip.checkpoint.tensor_files import (
    FLOATS,
    Stored,
    map_file,
    only_when_whole,
    read_npz,
    read_safetensors,
    zip_members,
)
from minclip.checkpoint.torch_archive import read_archive
from minclip.gpu.device import to_gpu, working_cupy
from minclip.params import ACTIVATIONS, Params


def from_state_dict(state_dict, *, activation=None, heads=None):
    """`Params` from a model's state_dict, of torch tensors or any arrays, in any dialect.

    OpenAI's names, OpenCLIP's and Hugging Face's are known, with whatever prefix; README lists them.
    The image tower is left alone. Arrays keep their dtype; bfloat16 becomes float32.
    activation   "quick_gelu" or "gelu": names and shapes cannot tell it. A `Params` knows.
    heads        where it is not width // 64, as it is in OpenAI's models
    Raises ValueError for a tensor that is missing, of another shape, or not the text tower's.
    Warns where there is no text projection: then `encode_text` stops, but `trace` gets to "pooled".

    >>> import minclip
    >>> other = {f"module.{name}": array for name, array in minclip.load().items()}
    >>> from_state_dict(other, activation="quick_gelu").heads
    2
    """
    if isinstance(state_dict, Params):
        activation, heads = activation or state_dict.activation, heads or state_dict.heads
    projection = "text_projection" in state_dict if isinstance(state_dict, Params) else None
    tensors = {
        name: value if hasattr(value, "shape") else as_array(value) for name, value in state_dict.items()
    }
    tower = choose_tower(tensors, projection=projection)
    return to_params(tower, {"activation": activation, "heads": heads}, "state_dict")


def load(source="builtin", *, device="cpu", dtype=None, activation=None):
    """`Params` of a model, ready for `encode_text`.

    source       "builtin"; one of `available_models()`, downloaded once; or a path: OpenAI's .pt, a file
                 of torch.save, .safetensors, .npz, or a folder as Hugging Face or OpenCLIP fill it.
                 Of several text towers in one file, FILE#PREFIX says which
    device       "cpu" for NumPy arrays, "cuda" for CuPy arrays
    dtype        "float16", "float32" or "float64"; by default float32 on the CPU, float16 on the GPU
    activation   "quick_gelu" or "gelu", for a file that does not say and has no config beside it
    Raises OSError for a file that cannot be read, ValueError for one that is not CLIP's text tower or
    where no GPU answers, MemoryError where the GPU is too full.
    Nothing in a file is ever run. Arrays of the dtype that the file has may be maps of it.

    >>> load()["positional_embedding"].shape
    (77, 128)
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")
    dtype = np.dtype(dtype or ("float16" if device == "cuda" else "float32"))
    if dtype.name not in ("float16", "float32", "float64"):
        raise ValueError(f"dtype must be float16, float32 or float64, not {dtype}")
    if device == "cuda":
        working_cupy()  # or an error, before anything is downloaded
    params = read_source(fetched(source), activation, dtype)
    arrays = {name: np.asarray(array.astype(dtype, copy=False)) for name, array in params.items()}
    return Params(
        to_gpu(arrays) if device == "cuda" else arrays, activation=params.activation, heads=params.heads
    )


def fetched(source):
    """source, or the file of the model that it names, downloaded."""
    return download(source) if source in available_models() else source


def read_source(source, activation, dtype):
    """`Params` of the built-in model, a file or a folder."""
    try:
        tower, said = open_tower(source)
        return to_params(tower, said | ({"activation": activation} if activation else {}), source, dtype)
    except ValueError as error:
        raise ValueError(f"{source}: {one_line(error)}") from None


def one_line(error):
    """What went wrong in a line, though a damaged file's own names may be in it."""
    return " ".join(str(error).split())[:800]


def to_params(tower, said, source, dtype=None):
    """Read the tower's arrays, each turned to dtype before the next is read."""
    activation, heads, width = said.get("activation"), said.get("heads"), tower.sizes["D"]
    if activation is None:
        raise ValueError(
            "names and shapes do not tell the activation: pass activation='quick_gelu' for OpenAI's "
            "weights (Stable Diffusion 1 too), 'gelu' for most of OpenCLIP's"
        )
    if heads is None and (width % 64 or not width):
        raise ValueError(
            f"width {width} is no multiple of 64, OpenAI's head width: give heads= to minclip.from_state_dict"
        )
    heads = heads or width // 64
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"{heads!r:.80} heads do not divide width {width}")
    if not tower.projection:
        warnings.warn(
            f"{source} has no text projection, as Hugging Face's CLIPTextModel: encode_text needs one, "
            "minclip.trace works up to 'pooled'",
            stacklevel=4,
        )
    arrays = tower.arrays(lambda tensor, name: as_floats(tensor, name, dtype))
    return Params(arrays, activation=activation, heads=heads)


def open_tower(source):
    """(tower, what is said of its activation and heads) of a file or folder, of which no number is read yet.

    "builtin" is unpacked first: its file keeps the matrices in a way of its own.
    """
    if source == "builtin":
        return choose_tower(builtin.load_builtin()), {"activation": "quick_gelu", "heads": 2}
    path, _, prefix = os.fspath(source).partition("#")
    if not prefix or os.path.exists(source):
        path, prefix = os.fspath(source), None
    path = Path(path)
    if not path.exists():
        names = ", ".join(available_models())
        raise FileNotFoundError(f"no file, folder or model {source}; the models are builtin, {names}")
    weights = weights_in(path) if path.is_dir() else path
    tensors, said = read_tensors(weights)
    tower = choose_tower(tensors, prefix, said.pop("projection", None))
    needed = sum(
        tensor_bytes(tensors[tower.prefix + name]) for names in tower.sources.values() for name in names
    )
    most = weights.stat().st_size * (20 if said.pop("packed", False) else 1)
    if needed > most:
        raise ValueError(f"its tensors, {needed} bytes, lie on each other in a file of {most}")
    if tower.dialect == "Hugging Face":
        return tower, config_beside(weights, "config.json", dialects.of_hugging_face, tower) | said
    config = config_beside(weights, "open_clip_config.json", dialects.of_open_clip, tower)
    named = dialects.activation_in(weights.stem)
    return tower, ({"activation": named} if named else {}) | config | said


def choose_tower(tensors, prefix=None, projection=None):
    """The one text tower among the tensors, or the one behind the prefix."""
    prefixes = dialects.find_towers(tensors)
    if prefix is not None:
        prefixes = [found for found in prefixes if found.rstrip(".") == prefix.rstrip(".")] or prefixes
    if len(prefixes) > 1:
        names = ", ".join(dialects.shown(found) for found in prefixes[:8])
        raise ValueError(f"{len(prefixes)} text towers: say which, as FILE#PREFIX; the prefixes are {names}")
    return dialects.Tower(tensors, prefixes[0], projection=projection)


def tensor_bytes(tensor):
    return math.prod(tensor.shape) * FLOATS.get(tensor.dtype, 8)


WEIGHTS = (
    ("open_clip_config.json", "open_clip_model.safetensors"),
    ("open_clip_config.json", "open_clip_pytorch_model.safetensors"),
    ("open_clip_config.json", "open_clip_pytorch_model.bin"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.fp16.safetensors"),
    ("config.json", "pytorch_model.bin"),
)


def weights_in(folder):
    """The file of weights in a folder of OpenCLIP or Hugging Face, beside its config."""
    for config, weights in WEIGHTS:
        if (folder / config).is_file() and (folder / weights).is_file():
            return folder / weights
    raise FileNotFoundError(
        f"{folder} holds neither config.json with model.safetensors (Hugging Face) "
        "nor open_clip_config.json with open_clip_model.safetensors (OpenCLIP)"
    )


def config_beside(weights, name, understand, tower):
    """{"activation", "heads"} of the config beside a file of weights, {} where there is none."""
    path = weights.parent / name
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        more = (weights.parent.name,) if name == "open_clip_config.json" else ()
        activation, heads, sizes = understand(config, *more)
    except (TypeError, AttributeError, KeyError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} beside it is no model's config: {error}") from None
    for letter, size in sizes.items():
        if tower.sizes[letter] != size:
            raise ValueError(
                f"{name} beside it is another model's: {letter} {size!r:.80}, not {tower.sizes[letter]}"
            )
    return {"activation": activation, "heads": heads}


def read_tensors(path):
    """(tensors by name, what the file itself says of them), by what the file is and not by its name."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\3\4"):
        if not any(name.endswith("data.pkl") for name in zip_members(path, map_file(path))):
            return read_npz(path), {"packed": True}
        tensors, classes = read_archive(path)
        return tensors, openai_activation(classes)
    if head[8:9] == b"{":
        tensors, metadata = read_safetensors(path)
        return tensors, own_words(metadata) if metadata.get("format") == "minclip" else {}
    raise ValueError(f"neither a zip archive (PyTorch, .npz) nor safetensors: {what_it_is(head)}")


def openai_activation(classes):
    """{"activation": "quick_gelu"} for a TorchScript archive of OpenAI's, unless it has torch's GELU."""
    blocks = [kind for name, kind in classes.items() if "resblocks" in name and "visual." not in name]
    exact = any("torch.nn.modules.activation." in kind and kind.endswith(".GELU") for kind in blocks)
    return {"activation": "quick_gelu"} if blocks and not exact else {}


def own_words(metadata):
    """What `save` wrote beside the tensors."""
    heads = metadata.get("heads", "")
    if not heads.isdecimal() or metadata.get("activation") not in ACTIVATIONS:
        raise ValueError("saved by minclip, but its activation or heads are damaged")
    return {
        "activation": metadata["activation"],
        "heads": int(heads),
        "projection": metadata.get("projection") != "none",
    }


def what_it_is(head):
    """A guess at what a file is that begins so, and what to do."""
    if not head:
        return "the file is empty"
    if head.lstrip().startswith(b"<"):
        return "it is a web page, perhaps an error message: download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull`"
    if head.startswith(b"\x80"):
        return "a bare pickle, as before torch 1.6, is never run: save it again with a newer torch"
    return "it may be damaged or of another kind"


def save(params, path):
    """Write params to a safetensors file, with activation and heads in its metadata; `load` reads it back.

    A plain dict means OpenAI's own names and choices. The file appears at path only when whole.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(load(), pathlib.Path(folder, "model.safetensors"))
    ...     load(pathlib.Path(folder, "model.safetensors")).activation
    'quick_gelu'
    """
    if not isinstance(params, Params):
        params = from_state_dict(params, activation="quick_gelu" if "ln_final.weight" in params else None)
    arrays = {name: np.ascontiguousarray(as_array(array)) for name, array in params.items()}
    said = {"format": "minclip", "activation": params.activation, "heads": str(params.heads)}
    if "text_projection" not in params:
        said["projection"] = "none"
    with only_when_whole(path) as partial:
        safetensors.numpy.save_file(arrays, partial, metadata=said)


def inspect(source):
    """What a model, file or folder holds, as text: dialect, sizes, activation, dtype, parameters, tensors.

    source is what `load` takes. Of a file that does not load it says why, and lists what tensors there
    are. Raises OSError where there is nothing to read, ValueError where a download is not OpenAI's file.
    """
    path = fetched(source)
    lines, tensors = [], {}
    try:
        tensors, about = describe(path)
        lines += about
    except ValueError as error:
        lines.append(f"{path} does not load: {one_line(error)}")
        try:
            before, _, _ = os.fspath(path).partition("#")
            file = path if os.path.exists(path) else before
            tensors, _ = read_tensors(weights_in(Path(file)) if os.path.isdir(file) else file)
        except ValueError:
            return lines[0]
    width = max((len(dialects.shown(name)) for name in tensors), default=0)
    for name, tensor in tensors.items():
        lines.append(f"  {dialects.shown(name):{width}}  {tensor.dtype!s:8}  {list(tensor.shape)}")
    return "\n".join(lines)


def describe(path):
    """(the tower's tensors, lines about them)."""
    tower, said = open_tower(path)
    tensors = {name: tower.tensors[name] for names in tower.sources.values() for name in tower.full(names)}
    sizes = tower.sizes
    heads = said.get("heads") or (sizes["D"] // 64 if sizes["D"] % 64 == 0 else "not said: heads=")
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return tensors, [
        str(path),
        f"dialect      {tower.dialect}"
        + (f", prefix {dialects.shown(tower.prefix)}" if tower.prefix else ""),
        f"layers       {sizes['layers']}",
        f"width        {sizes['D']}",
        f"heads        {heads}",
        f"context      {sizes['L']}",
        f"vocabulary   {sizes['V']}",
        f"embedding    {sizes['E'] if tower.projection else 'no text projection: trace works up to pooled'}",
        f"activation   {said.get('activation') or 'not said: load needs activation='}",
        f"dtype        {', '.join(dtypes)}",
        f"parameters   {count:,} in {len(tensors)} tensors, of {len(tower.tensors)} in all",
    ]


def as_floats(value, name, dtype=None):
    """A parameter as a NumPy array on the host, in its own dtype or in the one given."""
    if isinstance(value, Stored) and value.dtype not in FLOATS:
        raise ValueError(f"{name} holds {value.dtype}, not floats")
    array = as_array(value)
    if array.dtype.kind != "f":
        raise ValueError(f"{name} holds {array.dtype}, not floats")
    return array if dtype is None else array.astype(dtype, copy=False)
