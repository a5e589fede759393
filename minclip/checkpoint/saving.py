"""`save`: a text tower as a safetensors file that `load` reads back bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from minclip.arrays import as_array
from minclip.checkpoint.loading import from_state_dict
from minclip.checkpoint.tensor_files import only_when_complete
from minclip.params import Params, check_mapping

OTHER_FORMATS = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".npz", ".npy", ".gguf", ".onnx", ".h5"}
OTHER_FORMATS |= {".msgpack", ".tflite", ".mlmodel", ".pb", ".zip", ".json"}


def save(params: Mapping[str, object], path: str | os.PathLike[str]) -> None:
    """Write params to a safetensors file, with activation, heads and end-of-text id in its metadata.

    params   a `Params`, or a dict under OpenAI's names, which then has OpenAI's activation too
    path     the file, which appears only once it is complete

    Raises ValueError where path ends in another format's suffix, OSError where it cannot be written.

    >>> import minclip, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(minclip.load(), pathlib.Path(folder, "model.safetensors"))
    ...     minclip.load(pathlib.Path(folder, "model.safetensors")).activation
    'quick_gelu'
    """
    check_mapping(params, "give minclip.save(params, path): params must be a mapping from names to arrays")
    suffix = Path(path).suffix.lower()
    if suffix in OTHER_FORMATS:
        raise ValueError(
            f"minclip.save writes safetensors, and {path} ends in {suffix}: let it end in .safetensors"
        )
    if not isinstance(params, Params):
        params = from_state_dict(params, activation="quick_gelu" if "ln_final.weight" in params else None)
    arrays = {name: np.ascontiguousarray(as_array(array)) for name, array in params.items()}
    metadata = {"format": "minclip", "activation": params.activation, "heads": str(params.heads)}
    if params.eot is not None:
        metadata["eot"] = str(params.eot)
    if "text_projection" not in params:
        metadata["projection"] = "none"
    with only_when_complete(path) as partial:
        safetensors.numpy.save_file(arrays, partial, metadata=metadata)
