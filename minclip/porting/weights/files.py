"""Read every array of a port's file of weights, by the port's own names.

Besides the files that `minclip.load` reads: ONNX initializers, Keras and other HDF5 files, and Flax msgpack
files. Each of these needs a package, which is an extra of minclip. No code in a file is ever run.
"""

import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minclip import builtin
from minclip.checkpoint.sources import fetched, find_weights, read_contents, split_prefix
from minclip.checkpoint.tensor_files import FLOATS, Stored, numbers
from minclip.params import in_a_clone
from minclip.porting.weights.scales import dequantized

MOST_UNPACKED = 20  # an HDF5 file may unpack to at most so many times its size
HDF5 = b"\x89HDF\r\n\x1a\n"
DEEPEST = 64  # groups in groups of a msgpack tree
NAMELESS = re.compile(r"(onnx::|val_|const|_?\d+$|/)")  # names that an exporter made up


def read_weights(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the arrays of a file or folder by name: arrays, or `Stored` ones that are read when asked for.

    path   what `minclip.load` takes, or a file that only this function reads
    Raises OSError for a file that cannot be read, ValueError for one that holds no arrays that can be read.
    """
    if path == "builtin":
        return builtin.load_builtin()
    path = fetched(path)
    file = Path(path)
    folder = file.is_dir()
    if not folder and file.exists():
        with open(file, "rb") as opened:
            head = opened.read(64)
        reader = reader_of(file, head)
        if reader:
            try:
                return reader(file)
            except ImportError as error:
                hint = f"{in_a_clone('weights')} ({error.name} is missing)"
                raise ValueError(f"{path}: to read this file, {hint}") from None
            except ValueError as error:
                raise ValueError(f"{path}: {str(error).splitlines()[0]:.300}") from None
    try:
        found, _ = find_weights(*split_prefix(path))
        return read_contents(found).tensors
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def reader_of(path: Path, head: bytes) -> Callable[[Path], Mapping[str, Any]] | None:
    """Return the reader of a kind of file that `minclip.load` does not read, or None."""
    if head.startswith(HDF5):
        return read_hdf5
    if path.suffix == ".keras" and head.startswith(b"PK\3\4"):
        return read_keras
    if path.suffix == ".onnx":
        return read_onnx
    return read_msgpack if path.suffix == ".msgpack" else None


def read_hdf5(path: Path) -> dict[str, Any]:
    """Return the datasets of an HDF5 file (.h5, .weights.h5) by their paths in it."""
    import h5py

    room = os.path.getsize(path) * MOST_UNPACKED + 2**20
    arrays: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiu":
            return
        if item.external:
            raise ValueError(f"the dataset {name!r:.80} lies in another file")
        arrays[name] = Stored(item.shape, str(item.dtype), lambda: dataset(path, name), item.nbytes)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)  # links to other files are not followed
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"a damaged HDF5 file: {error}") from None
    if sum(array.nbytes for array in arrays.values()) > room:
        raise ValueError(f"its datasets unpack to more than {MOST_UNPACKED} times the file")
    return arrays


def dataset(path: Path, name: str) -> np.ndarray:
    """Return the numbers of a dataset."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return np.asarray(file[name][()])
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"the dataset {name!r:.80} cannot be read: {error}") from None


def read_keras(path: Path) -> dict[str, Any]:
    """Return the datasets of a .keras file, a zip archive with model.weights.h5 in it."""
    import io

    import h5py

    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo("model.weights.h5")
            if entry.file_size > MOST_UNPACKED * os.path.getsize(path):
                raise ValueError(f"model.weights.h5 unpacks to more than {MOST_UNPACKED} times the file")
            data = archive.read(entry)
        arrays: dict[str, Any] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu" and not item.external:
                arrays[name] = np.asarray(item[()])

        with h5py.File(io.BytesIO(data), "r") as file:
            file.visititems(visit)
        return arrays
    except (zipfile.BadZipFile, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"not a Keras file with model.weights.h5: {error}") from None


def read_msgpack(path: Path) -> dict[str, Any]:
    """Return the leaves of a Flax msgpack file by their paths, as flax.serialization writes them.

    An array is the extension type 1, a packed (shape, dtype, bytes); one above 1 GB is cut into chunks.
    """
    import msgpack

    def array(code: int, data: bytes) -> Any:
        if code not in (1, 3):
            return None
        shape, dtype, raw = msgpack.unpackb(data, strict_map_key=False)
        return array_of(tuple(shape), bytes(dtype).decode() if isinstance(dtype, bytes) else str(dtype), raw)

    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=array, strict_map_key=False)
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"not a Flax msgpack file: {type(error).__name__} {error!s:.120}") from None
    if not isinstance(tree, dict):
        raise ValueError("not a Flax msgpack file: its root is not a mapping")
    arrays: dict[str, Any] = {}
    gather(tree, "", arrays, 0)
    return arrays


def gather(tree: dict[Any, Any], prefix: str, arrays: dict[str, Any], depth: int) -> None:
    """Add the arrays of a tree, chunks put together."""
    if depth > DEEPEST:
        raise ValueError(f"groups are nested more than {DEEPEST} deep")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value.get("__msgpack_chunked_array__"):
            chunks = [value["chunks"][str(i)] for i in range(len(value["chunks"]))]
            shape = [value["shape"][str(i)] for i in range(len(value["shape"]))]
            arrays[name] = np.concatenate(chunks).reshape(shape)
        elif isinstance(value, dict):
            gather(value, f"{name}/", arrays, depth + 1)
        elif isinstance(value, np.ndarray):
            arrays[name] = value


def array_of(shape: tuple[int, ...], dtype: str, raw: bytes) -> np.ndarray:
    """Return packed bytes as an array; bfloat16 becomes float32."""
    size = FLOATS.get(dtype) or np.dtype(dtype).itemsize
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * size != len(raw):
        raise ValueError("an array does not match its shape")
    return numbers(raw, dtype, 0, math.prod(shape)).reshape(shape)


def read_onnx(path: Path) -> dict[str, Any]:
    """Return the initializers of an ONNX graph by name, and those without a name by the node that uses them.

    Exporters fold transposed matrices into initializers such as "onnx::MatMul_301". Such a matrix gets the
    path of its node, or of the bias that is added to its product, which tells its place in the model.
    """
    import onnx
    from onnx import numpy_helper

    try:
        model = onnx.load(os.fspath(path))
    except Exception as error:  # protobuf's and onnx's own errors have no common base
        raise ValueError(f"not an ONNX graph: {type(error).__name__} {error!s:.200}") from None
    names = places_of_initializers(model.graph)
    arrays: dict[str, Any] = {}
    for tensor in model.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if dtype.kind not in "fiuV":
            continue
        size = math.prod(tensor.dims) * dtype.itemsize
        read = lambda tensor=tensor: numpy_helper.to_array(tensor)  # noqa: E731
        arrays[tensor.name] = Stored(tuple(tensor.dims), dtype.name, read, size)
    values, _ = dequantized(arrays)  # by the names that tell which scale belongs to which codes
    return {names.get(name, name): array for name, array in values.items()}


def places_of_initializers(graph: Any) -> dict[str, str]:
    """Return name -> "place (name)" for the initializers whose names an exporter made up."""
    stored = {tensor.name for tensor in graph.initializer}
    users = {name: node for node in graph.node for name in node.input}
    places = {}
    for node in graph.node:
        for name in node.input:
            if name not in stored or not NAMELESS.match(name):
                continue
            place = bias_beside(node, users, stored)
            scope = node.name.strip("/").rpartition("/")[0] if "/" in node.name else ""
            place = place.removesuffix(".bias") if place else scope
            if place:
                places[name] = f"{place}.{node.op_type} ({name})"
    return places


def bias_beside(node: Any, users: Mapping[str, Any], stored: set[str]) -> str | None:
    """Return the name of the bias that is added to a node's product, or None."""
    following = users.get(node.output[0]) if node.output else None
    if following is None or following.op_type != "Add":
        return None
    return next((n for n in following.input if n in stored and not NAMELESS.match(n)), None)
