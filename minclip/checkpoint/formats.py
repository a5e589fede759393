"""Formats that minclip does not read: recognize a file by its first bytes, and name the next step."""

from __future__ import annotations

import os
import re

ELSE = "use the model's .safetensors or .pt file, or export its arrays with numpy.savez"
UNPACK = "unpack it first, and give the file or folder inside"
HEAD = 4096  # bytes to look at

MAGIC = (  # (offset, bytes, the format and the next step)
    (0, b"<!DOCTYPE", "it is a web page, perhaps an error message: download it again"),
    (0, b"version https://git-lfs", "it is a Git LFS pointer: run `git lfs pull`"),
    (0, b"\x89HDF\r\n\x1a\n", f"it is an HDF5 file, as Keras and TensorFlow write it: {ELSE}"),
    (4, b"TFL3", f"it is a TensorFlow Lite model, whose weights belong to a graph: {ELSE}"),
    (4, b"ET1", f"it is an ExecuTorch program: {ELSE}"),
    (0, b"\x93NUMPY", "it is a single array of numpy.save: save all of them by name with numpy.savez"),
    (0, b"\x1f\x8b", f"it is compressed by gzip: {UNPACK}"),
    (0, b"BZh", f"it is compressed by bzip2: {UNPACK}"),
    (0, b"\xfd7zXZ\0", f"it is compressed by xz: {UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"it is compressed by zstd: {UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"it is a 7z archive: {UNPACK}"),
    (0, b"Rar!", f"it is a RAR archive: {UNPACK}"),
    (257, b"ustar", f"it is a tar archive: {UNPACK}"),
    (0, b"ftrt", f"it is a TensorRT engine, built for one GPU: {ELSE}"),
    (0, b"\x7fELF", "it is a program, not a file of weights"),
    (0, b"\x89PNG", "it is a picture, not a file of weights"),
    (0, b"\xff\xd8\xff", "it is a picture, not a file of weights"),
    (0, b"7767517\n", f"it is an ncnn graph: {ELSE}"),
    (0, b"ggml", f"it is a GGML file from before GGUF: convert it to GGUF, or {ELSE}"),
    (0, b"lmgg", f"it is a GGML file from before GGUF: convert it to GGUF, or {ELSE}"),
)


def what_it_is(head: bytes) -> str:
    """Return the format that a file's first bytes show, and the next step."""
    if not head:
        return "the file is empty"
    for offset, magic, answer in MAGIC:
        if head[offset:].startswith(magic):
            return answer
    text = head.lstrip()
    if text.startswith(b"<?xml") and b"<net" in head:
        return f"it is an OpenVINO graph: {ELSE}"
    if text.startswith(b"<"):
        return "it is a web page, perhaps an error message: download it again"
    if text.startswith((b"{", b"[")):
        return "it is a JSON file: give the file of weights beside it, or their folder"
    if re.match(rb"[\x81-\x8f\xde\xdf].{0,4}?[\xa1-\xbf\xd9]", head, re.DOTALL):
        return f"it is a msgpack file, as Flax writes it: {ELSE}"
    graph = protobuf(head)
    if graph:
        return f"it is {graph}: {ELSE}"
    if not any(head):
        return "its first bytes are zeros: the download or copy is damaged, fetch it again"
    return "its first bytes match no format that minclip knows: it is damaged, or it is not a model"


def protobuf(head: bytes) -> str | None:
    """Return which model a protobuf message is that starts with a version number, or None.

    ONNX, Core ML and TensorFlow have no magic bytes. All start with field 1, a small number. In ONNX field 2
    is the producer's name, and field 7 the graph; in the others field 2 is a message.
    """
    if len(head) < 4 or head[0] != 0x08 or head[1] > 0x20:
        return None
    if head[2] == 0x3A:
        return "an ONNX graph"
    if head[2] != 0x12:
        return None
    name = head[4 : 4 + head[3]]
    if re.fullmatch(rb"[ -~]*", name):
        return "an ONNX graph"
    if b"serve" in head or b"tensorflow" in head.lower():
        return "a TensorFlow SavedModel"
    return "a Core ML model"


def what_archive_it_is(names: list[str]) -> str:
    """Return the kind of a zip archive that is neither PyTorch's nor .npz, by the names in it."""
    inside = {name.rsplit("/", 1)[-1] for name in names}
    if "model.weights.h5" in inside:
        return f"it is a Keras model: {ELSE}"
    if "Manifest.json" in inside:
        return f"it is a Core ML package: {ELSE}"
    if any(name.endswith((".safetensors", ".bin", ".pt", ".ckpt")) for name in inside):
        return f"it is a zip archive of a folder: {UNPACK}"
    if any("archive_format" in name or name.endswith("model.json") for name in inside):
        return f"it is a program of torch.export: {ELSE}"
    return "it is a zip archive without data.pkl (PyTorch) or .npy entries (.npz), so it holds no weights"


FOLDER_SIGNS = (  # (a name in a folder, the format and the next step)
    ("adapter_config.json", "a PEFT adapter, without the tower it belongs to: see minclip.apply_lora"),
    ("tf_model.h5", f"TensorFlow's weights alone (tf_model.h5): {ELSE}"),
    ("flax_model.msgpack", f"Flax's weights alone (flax_model.msgpack): {ELSE}"),
    ("saved_model.pb", f"a TensorFlow SavedModel: {ELSE}"),
    ("Manifest.json", f"a Core ML package: {ELSE}"),
    ("openvino_model.xml", f"an OpenVINO graph: {ELSE}"),
    ("model.onnx", f"an ONNX graph: {ELSE}"),
    ("onnx", f"ONNX graphs alone: {ELSE}"),
)


def what_folder_it_is(names: list[str]) -> str | None:
    """Return the format of a folder by the names in it, and the next step; None where no name tells."""
    for sign, answer in FOLDER_SIGNS:
        if sign in names:
            return answer
    for name in names:
        if os.path.splitext(name)[1] in (".onnx", ".mlpackage", ".mlmodel", ".tflite", ".h5"):
            return f"no weights but {name}: {ELSE}"
    return None
