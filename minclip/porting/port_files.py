"""Read a port's arrays from a file: .npz, .safetensors, .onnx, .gguf, or .json with raw floats beside it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from minclip.params import in_a_clone
from minclip.porting.onnx_graph import trace_onnx
from minclip.porting.probe import read_dump


def read_port(path: str | os.PathLike[str], tokens: Any) -> dict[str, Any]:
    """Return a port's arrays by name; an ONNX graph is run on tokens [B, L].

    A .json file lists the arrays of a file of float32 numbers with the same name and the suffix .bin:
    [{"name": "ln_final", "shape": [7, 77, 512]}, ...]. Shapes may list the axes in either order.

    Raises OSError for a file that cannot be read, ValueError for one that is none of these.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".onnx":
        return trace_onnx(path, tokens)
    if suffix == ".json":
        return read_raw(Path(path))
    return read_gguf(path) if suffix == ".gguf" else read_dump(path)


def read_raw(path: Path) -> dict[str, Any]:
    """Return the arrays that a JSON file lists, from the file of float32 numbers beside it."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        shapes = {str(entry["name"]): [int(size) for size in entry["shape"]] for entry in listed}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f'{path} must be a list of {{"name": ..., "shape": [...]}}') from None
    binary = path.with_suffix(".bin")
    sizes = [math.prod(shape) for shape in shapes.values()]
    wanted, found = 4 * sum(sizes), binary.stat().st_size
    if wanted != found or any(size < 0 for shape in shapes.values() for size in shape):
        raise ValueError(
            f"{binary} has {found} bytes, but {path.name} lists float32 arrays of {wanted} bytes"
        )
    numbers = np.fromfile(binary, dtype="<f4")
    parts = np.split(numbers, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def read_gguf(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the float tensors of a GGUF file, such as ggml writes."""
    try:
        import gguf
    except ImportError:
        raise ImportError(f"a GGUF file needs gguf: {in_a_clone('gguf')}") from None
    try:
        tensors = gguf.GGUFReader(path).tensors
        return {
            tensor.name: np.asarray(tensor.data).reshape(tuple(int(n) for n in reversed(tensor.shape)))
            for tensor in tensors
            if tensor.data.dtype.kind == "f" or tensor.name in ("tokens", "input_ids")
        }
    except OSError:
        raise
    except Exception as error:  # the reader checks little, so a broken file raises errors of any kind
        raise ValueError(f"{path} is not a GGUF file of float tensors: {error}") from None
