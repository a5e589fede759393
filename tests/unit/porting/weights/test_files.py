"""A port's file of weights is read by its own names, whatever framework wrote it, and never run."""

import json

import numpy as np
import pytest
import safetensors.numpy

import minclip
from minclip.cli import main
from minclip.porting.weights.files import read_weights
from tests.support import foreign_weights, oracles, weight_slips


@pytest.fixture(scope="module")
def params():
    arrays = oracles.random_params(64, 2, 32, vocabulary=300, seed=4)
    return minclip.from_state_dict(arrays, activation="quick_gelu", heads=foreign_weights.HEADS)


def agree(params, path):
    check = minclip.check_weights(params, read_weights(path))
    assert check.verdict == "agrees", check
    return check


def write_hdf5(path, arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name.removesuffix(":0"), data=array, compression="gzip")


def packed_array(array):
    """Return an array as flax.serialization packs it."""
    import msgpack

    array = np.ascontiguousarray(array)
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))


def write_msgpack(path, tree):
    msgpack = pytest.importorskip("msgpack")

    def packed(node):
        return {k: packed(v) for k, v in node.items()} if isinstance(node, dict) else packed_array(node)

    path.write_bytes(msgpack.packb(packed(tree)))


def write_onnx(path, params):
    """Write a graph as torch.onnx's legacy exporter does: matrices transposed and nameless, biases named."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes, stored, number = [], [], 100
    for name, array in foreign_weights.hugging_face(params).items():
        if (array.ndim == 2 and name.endswith("proj.weight")) or (".fc" in name and array.ndim == 2):
            number += 1
            matrix, out = f"onnx::MatMul_{number}", f"product_{number}"
            bias = name.replace("weight", "bias")
            stored.append(numpy_helper.from_array(np.ascontiguousarray(array.T), matrix))
            nodes.append(helper.make_node("MatMul", [f"x{array.shape[1]}", matrix], [out]))
            nodes.append(helper.make_node("Add", [bias, out], [f"sum_{number}"]))
        elif array.dtype == np.float32:
            stored.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    inputs = [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, ["B", n]) for n in (64, 256)]
    outputs = [helper.make_tensor_value_info(f"sum_{number}", TensorProto.FLOAT, ["B", 64])]
    graph = helper.make_graph(nodes, "text", inputs, outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_safetensors_npz_and_pt_files_are_read(params, tmp_path):
    import torch

    arrays = foreign_weights.hugging_face(params)
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", **foreign_weights.keras(params))
    torch.save({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.npz", "c.pt"):
        agree(params, tmp_path / name)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_read_quantized_too(params, tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "port.gguf", "clip")
    quant = gguf.GGMLQuantizationType[kind]
    for name, array in foreign_weights.gguf(params).items():
        array = np.ascontiguousarray(array)
        if array.ndim == 2 and kind != "F32":
            writer.add_tensor(name, gguf.quants.quantize(array, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check = agree(params, tmp_path / "port.gguf")
    assert kind == "F32" or any(kind.lower() in note.lower() for note in check.notes)


def test_hdf5_and_msgpack_files_are_read(params, tmp_path):
    write_hdf5(tmp_path / "port.weights.h5", foreign_weights.keras(params))
    write_msgpack(tmp_path / "flax_model.msgpack", foreign_weights.flax(params))
    agree(params, tmp_path / "port.weights.h5")
    agree(params, tmp_path / "flax_model.msgpack")


def test_an_onnx_graph_tells_the_places_of_its_nameless_matrices(params, tmp_path):
    write_onnx(tmp_path / "right.onnx", params)
    agree(params, tmp_path / "right.onnx")
    arrays = {name: array.copy() for name, array in params.items()}
    weight_slips.q_and_k_swapped(arrays)
    write_onnx(tmp_path / "wrong.onnx", arrays)
    check = minclip.check_weights(params, read_weights(tmp_path / "wrong.onnx"))
    q = next(finding for finding in check.findings if "q_proj" in finding.array)
    assert (q.wanted, q.found) == tuple(f"{p} of transformer.resblocks.1.attn.in_proj_weight" for p in "qk")


@pytest.mark.parametrize("per_channel", [False, True])
def test_matrices_of_onnxruntimes_quantizer_are_recognized(params, tmp_path, per_channel):
    quantization = pytest.importorskip("onnxruntime.quantization")
    write_onnx(tmp_path / "float.onnx", params)
    quantization.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx", per_channel=per_channel)
    check = minclip.check_weights(params, read_weights(tmp_path / "int8.onnx"))
    assert {finding.kind for finding in check.findings} == {"missing"}  # it drops tensors without a product
    assert len(check.matches) == 24
    scale = "per row" if per_channel else "per matrix"
    assert any(f"int8 weights, one scale {scale}" in note for note in check.notes), check


def test_mlxs_packed_groups_are_read(params):
    arrays, group = {}, 64
    for name, array in foreign_weights.mlx(params).items():
        if array.ndim != 2 or array.shape[-1] % group or "position" in name:
            arrays[name] = array
            continue
        x = array.reshape(len(array), -1, group)
        low, scale = x.min(-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True) / 15
        codes = np.round((x - low) / scale).astype(np.uint32).reshape(len(array), -1, 8)
        stem = name.removesuffix("weight")
        arrays[name] = (codes << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
        arrays[stem + "scales"], arrays[stem + "biases"] = scale[..., 0], low[..., 0]
    check = minclip.check_weights(params, arrays)
    assert check.verdict == "agrees", check
    assert any("4-bit codes" in note for note in check.notes)


def test_damaged_and_hostile_files_are_one_line(tmp_path):
    msgpack, h5py = pytest.importorskip("msgpack"), pytest.importorskip("h5py")
    lie = msgpack.ExtType(1, msgpack.packb(((2**40, 2**20), "float32", b"1234")))
    (tmp_path / "lie.msgpack").write_bytes(msgpack.packb({"a": lie}))
    deep = {}
    for _ in range(300):
        deep = {"a": deep}
    (tmp_path / "deep.msgpack").write_bytes(msgpack.packb(deep))
    (tmp_path / "cut.msgpack").write_bytes(b"\x81\xa1")
    (tmp_path / "cut.h5").write_bytes(b"\x89HDF\r\n\x1a\n1234")
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("a", shape=(2**16, 2**16), dtype="f4", chunks=(2**10, 2**10))
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file.create_dataset("a", shape=(4,), dtype="f4", external=[("/etc/passwd", 0, 16)])
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=path.name) as error:
            read_weights(path)
        assert "\n" not in str(error.value)


def test_the_command_prints_findings_and_ends_with_status_1(tmp_path, capsys):
    params = minclip.load()
    arrays = {name: array.copy() for name, array in params.items()}
    weight_slips.k_from_q(arrays)
    np.savez(tmp_path / "wrong.npz", **arrays)
    minclip.save(params, tmp_path / "right.safetensors")
    assert main(["check-weights", str(tmp_path / "right.safetensors")]) == 0
    assert capsys.readouterr().out.startswith("agrees: ")
    assert main(["check-weights", str(tmp_path / "wrong.npz")]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "in_proj_weight[k] holds q of transformer.resblocks.1.attn.in_proj_weight" in printed
    assert main(["check-weights", str(tmp_path / "wrong.npz"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "wrong"
    assert told["findings"][0]["kind"] == "tensor"
