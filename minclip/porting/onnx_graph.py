"""Record an ONNX graph under onnxruntime: every float tensor between its tokens and its outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minclip.params import in_a_clone

FIRST = 24  # tensors that the first run reads
READ = 1 << 27  # bytes that each later run reads, about, which bounds the memory that a run takes
INSTALL = f"an ONNX graph needs onnx and onnxruntime: {in_a_clone('onnx')}"
TOKENS = ("input_ids", "text", "tokens", "ids", "token_ids", "x")
FEATURES = ("text_features", "text_embeds", "sentence_embedding", "embeddings", "output", "features")
COPIES = ("Identity", "Cast", "Dropout")


def trace_onnx(path: str | os.PathLike[str], tokens: Any) -> dict[str, Any]:
    """Run an ONNX graph on tokens [B, L] and return every float tensor that depends on them, name to array.

    path    a graph from either of torch's exporters or another tool, optimized or not, in float32 or
            float16, with its weights inside or in files beside it

    The names are the graph's own, in its order. Its features are also there as "text_features". The graph is
    run unchanged, a few tensors at a time. The input for the tokens is found by name and type; an
    attention mask, position ids and an image are filled in if the graph has such inputs.

    Raises ImportError without onnx and onnxruntime, OSError where the file cannot be read, and ValueError
    where it is not a graph or does not take these tokens.

    >>> import tempfile
    >>> from onnx import TensorProto, helper, numpy_helper, save
    >>> table = numpy_helper.from_array(np.ones((9, 4), np.float32), "table")
    >>> node = helper.make_node("Gather", ["table", "input_ids"], ["embedding"])
    >>> ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "L"])
    >>> output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, None)
    >>> graph = helper.make_graph([node], "lookup", [ids], [output], [table])
    >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/lookup.onnx")
    ...     trace_onnx(f"{folder}/lookup.onnx", [[1, 2]])["embedding"].shape
    (1, 2, 4)
    """
    try:
        import onnx
    except ImportError:
        raise ImportError(INSTALL) from None
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf raises its own kinds of error
        raise ValueError(f"{path} is not an ONNX graph: {error}") from None
    tokens = np.asarray(tokens)
    names = tensors_of(model.graph)
    outputs = [output.name for output in model.graph.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    graph = model.SerializeToString()
    del model  # which may hold the weights once more
    session = open_session(graph, Path(path))
    del graph
    floats = {
        o.name
        for o in session.get_outputs()
        if o.type in ("tensor(float)", "tensor(float16)", "tensor(double)")
    }
    wanted = [name for name in names if name in floats]
    return with_features(read_in_groups(session, wanted, tokens), outputs)


def read_in_groups(session: Any, names: list[str], tokens: Any) -> dict[str, Any]:
    """Return tensors by name, of as few runs as a bounded size of each allows."""
    dump: dict[str, Any] = {}
    count = FIRST
    while group := names[len(dump) : len(dump) + count]:
        dump |= dict(zip(group, run_rows(session, group, tokens), strict=True))
        count = max(1, READ * len(dump) // max(1, sum(array.nbytes for array in dump.values())))
    return dump


def tensors_of(graph: Any) -> list[str]:
    """Return the tensors that depend on the graph's inputs, in the order of computation."""
    weights = {initializer.name for initializer in graph.initializer}
    reached = {value.name for value in graph.input} - weights
    names = []
    for node in graph.node:
        if reached & set(node.input):
            reached |= set(node.output)
            if node.op_type not in COPIES:
                names += [name for name in node.output if name]
    ends = [output.name for output in graph.output]
    return [*names, *(name for name in ends if name not in names and name in reached)]


def open_session(model: bytes, path: Path) -> Any:
    """Return an onnxruntime session of a graph as it stands, whose weights may lie beside path."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(INSTALL) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # which keeps the memory of the largest run
    folder = str(path.absolute().parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds of error
        raise ValueError(f"{path}: onnxruntime cannot open the graph: {one_line(error)}") from None


def run_rows(session: Any, names: list[str], tokens: Any) -> list[Any]:
    """Return tensors of a run on tokens; of a graph with a fixed batch of 1, of one run for each text."""
    batch = tokens_input(session).shape[0]
    if not isinstance(batch, int) or batch == len(tokens):
        return run(session, names, tokens)
    if batch != 1:
        raise ValueError(
            f"the graph takes {batch} texts at a time, not {len(tokens)}: export a dynamic batch"
        )
    rows = [run(session, names, row[None]) for row in tokens]
    return [join(parts) for parts in zip(*rows, strict=True)]


def run(session: Any, names: list[str], tokens: Any) -> list[Any]:
    """Return tensors of one run on tokens."""
    feed = dict(inputs_for(session, tokens))
    try:
        return list(session.run(names, feed))
    except Exception as error:  # onnxruntime raises its own kinds of error
        raise ValueError(
            f"the graph does not run on tokens {list(tokens.shape)}: {one_line(error)}"
        ) from None


def join(parts: tuple[Any, ...]) -> Any:
    """Return the tensors of several texts as one, along the batch; one of them where they are all equal."""
    if all(np.array_equal(part, parts[0], equal_nan=True) for part in parts[1:]):
        return parts[0]
    axis = parts[0].shape.index(1) if 1 in parts[0].shape else 0
    return np.concatenate(parts, axis=axis)


def tokens_input(session: Any) -> Any:
    """Return the input that takes the tokens: by its name, or the only one of integers."""
    integers = [value for value in session.get_inputs() if "int" in value.type]
    named = [value for value in integers if value.name.split(".")[-1] in TOKENS]
    if len(named) == 1 or len(integers) == 1:
        return (named or integers)[0]
    names = ", ".join(value.name for value in session.get_inputs())
    raise ValueError(f"the graph has no clear input for tokens among {names}: name it input_ids")


def inputs_for(session: Any, tokens: Any) -> Iterator[tuple[str, Any]]:
    """Return the graph's inputs for tokens."""
    types = {
        "int64": np.int64,
        "int32": np.int32,
        "float": np.float32,
        "float16": np.float16,
        "bool": np.bool_,
    }
    ids = tokens_input(session)
    for value in session.get_inputs():
        dtype = types.get(value.type.removeprefix("tensor(").removesuffix(")"))
        if dtype is None:
            raise ValueError(
                f"the graph's input {value.name} is of type {value.type}, which cannot be filled in"
            )
        if value.name == ids.name:
            yield value.name, tokens.astype(dtype)
        elif "mask" in value.name:
            yield value.name, np.ones(tokens.shape, dtype)
        elif "position" in value.name:
            yield value.name, np.broadcast_to(np.arange(tokens.shape[1], dtype=dtype), tokens.shape).copy()
        elif len(value.shape) == 4:  # the image of a complete CLIP, which the texts do not depend on
            image = [
                size if isinstance(size, int) else default
                for size, default in zip(value.shape, (1, 3, 224, 224), strict=True)
            ]
            yield value.name, np.zeros(image, dtype)
        else:
            raise ValueError(
                f"the graph wants an input {value.name} {value.shape}, which cannot be filled in"
            )


def with_features(dump: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
    """Return the dump with its features as "text_features", where an output can be them."""
    flat = [name for name in outputs if name in dump and dump[name].ndim == 2]
    named = [name for name in FEATURES if name in flat]
    if named or len(flat) == 1:
        dump["text_features"] = dump[(named or flat)[0]]
    return dump


def one_line(error: Exception) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split())[:300]
