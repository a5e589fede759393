"""Test that a refusal names the format, the reason and the next step, as the README's table says."""

import gzip
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import minclip
from minclip import checkpoint
from tests.support.oracles import random_params, renamed

PARAMS = random_params(width=64, layers=2, embed=48, context=16, vocabulary=100)
HF = renamed(PARAMS)
README = Path(__file__).parents[3] / "minclip/checkpoint/README.md"


def onnx_graph():
    """Return the head of an ONNX model: ir_version 8, producer "pytorch", version, graph."""
    return b"\x08\x08\x12\x07pytorch\x1a\x052.13.0:\x80\x01" + bytes(128)


def saved_tensors(state):
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in state.items()})


def state_file(**changes):
    out = io.BytesIO()
    torch.save({name: torch.from_numpy(np.asarray(a).copy()) for name, a in (PARAMS | changes).items()}, out)
    return out.getvalue()


def damaged():
    content = bytearray(state_file())
    content[content.index(PARAMS["ln_final.bias"].tobytes()) + 3] ^= 1
    return bytes(content)


def kohya(kind):
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    return saved_tensors({f"{stem}.{kind}": np.ones((4, 4), np.float16)})


MSGPACK = b"\x81\xaatext_model\x81\xa7encoder\x80" + bytes(50)
SAVED_MODEL = b"\x08\x01\x12\xff\x01\x0a\x0e\x12\x05serve" + bytes(100)
CORE_ML = b"\x08\x06\x12\x80\x02\x0a\x10\x0a\x05input" + bytes(100)
LAYER = "transformer.resblocks.0."
SAMPLES = {
    "ONNX": onnx_graph,
    "Keras or TensorFlow HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "TensorFlow SavedModel": lambda: SAVED_MODEL,
    "TensorFlow Lite": lambda: b"\x1c\0\0\0TFL3" + bytes(100),
    "Core ML": lambda: CORE_ML,
    "Flax": lambda: MSGPACK,
    "OpenVINO": lambda: b'<?xml version="1.0"?>\n<net name="clip" version="11">',
    "a pickle that torch did not write": lambda: pickle.dumps({"a": [1.0]}, 2),
    "a LoRA": lambda: kohya("lora_down.weight"),
    "a LoKr or LoHa adapter": lambda: kohya("lokr_w1"),
    "a textual inversion embedding": lambda: saved_tensors({"clip_l": np.ones((4, 64), np.float32)}),
    "a T5 encoder": lambda: saved_tensors(
        {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": np.ones((3, 3))}
    ),
    "a BERT-like text tower": lambda: saved_tensors({"bert.word_embeddings.weight": np.ones((3, 3))}),
    "an image tower alone": lambda: saved_tensors({"visual.conv1.weight": np.ones((3, 3))}),
    "SigLIP": lambda: saved_tensors({**HF, "text_model.head.weight": np.ones((64, 64), np.float32)}),
    "CoCa": lambda: saved_tensors(
        {f"text.{name}": a for name, a in PARAMS.items()} | {"text.cls_emb": np.ones(64)}
    ),
    "GroupViT": lambda: saved_tensors({**HF, "text_projection.0.weight": np.ones((64, 64), np.float32)}),
    "X-CLIP": lambda: saved_tensors({**HF, "prompts_generator.alpha": np.ones(64, np.float32)}),
    "a layer scale, or other blocks": lambda: state_file(**{f"{LAYER}ls_1.gamma": np.ones(64, np.float32)}),
    "int8 without scales": lambda: state_file(**{f"{LAYER}mlp.c_fc.weight": np.ones((256, 64), np.int8)}),
    "a web page": lambda: b"<!doctype html><html>Not Found</html>",
    "a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:39b8\nsize 492\n",
    "a cut download": lambda: state_file()[:5000],
    "a compressed file": lambda: gzip.compress(state_file()),
    "a damaged entry": damaged,
    "one of several shards, alone": lambda: saved_tensors(HF),
}


def table_of_refusals():
    text = README.read_text(encoding="utf-8").partition("These are refused")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {name.strip(): answer.strip() for name, answer in rows[2:]}


REFUSALS = table_of_refusals()


def test_every_row_of_the_readmes_table_of_refusals_has_a_sample():
    assert REFUSALS.keys() == SAMPLES.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_readmes_table_of_refusals_is_true(name, tmp_path):
    path = tmp_path / ("model-00001-of-00002.safetensors" if "shards" in name else "model.pt")
    path.write_bytes(SAMPLES[name]())
    with pytest.raises(ValueError, match=r".") as caught:
        minclip.load(path, activation="quick_gelu")
    assert REFUSALS[name] in str(caught.value)
    text, loads = checkpoint.inspect(path, activation="quick_gelu")
    if name != "a damaged entry":  # which only shows when it is read
        assert REFUSALS[name] in text
        assert not loads


def zip_of(**entries):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"", "the file is empty"),
        (b"\x93NUMPY\x01\0", "a single array of numpy.save"),
        (bytes(257) + b"ustar", "a tar archive"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(9), "a 7z archive"),
        (json.dumps({"hidden_size": 3}).encode(), "a JSON file: give the file of weights beside it"),
        (b"\x08\x03:\x80\x01" + bytes(128), "an ONNX graph"),
        (b"\x89PNG\r\n", "a picture"),
        (bytes(64), "first bytes are zeros"),
        (b"x", "its first bytes match no format that minclip knows"),
        (zip_of(config_dot_json="{}", model_dot_weights_dot_h5=""), "a Keras model"),
        (zip_of(folder__model_dot_safetensors="", folder__config_dot_json="{}"), "a zip archive of a folder"),
        (zip_of(a__archive_format="pt2"), "a program of torch.export"),
        (zip_of(notes_dot_txt="hello"), "holds no weights"),
        (struct.pack("<Q", 2) + b"{}", "there are no tensors at all"),
    ],
)
def test_other_files_are_named_too(content, answer, tmp_path):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=answer):
        minclip.load(tmp_path / "model.bin", activation="quick_gelu")


def test_a_real_onnx_file_is_named(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the onnx package writes the file")
    helper = onnx.helper
    node = helper.make_node("Identity", ["x"], ["y"])
    value = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = helper.make_graph([node], "text", value[:1], value[1:])
    for producer in ("pytorch", ""):
        onnx.save(helper.make_model(graph, producer_name=producer), tmp_path / "text.onnx")
        with pytest.raises(ValueError, match="it is an ONNX graph"):
            minclip.load(tmp_path / "text.onnx")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "a LoRA.*first text tower"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "a LoHa adapter.*second text tower"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "a LoRA.*a text tower"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "a LoRA.*a U-Net or an image tower"),
        (
            "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "a LoRA.*a text tower",
        ),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lokr_w1", "a LoKr adapter.*second text tower"),
    ],
)
def test_an_adapter_says_to_which_tower_it_belongs(name, answer):
    with pytest.raises(ValueError, match=answer):
        minclip.from_state_dict({name: np.ones((4, 4))}, activation="gelu")


def test_an_adapter_beside_its_tower_says_how_to_merge_it():
    state = {}
    for name, array in renamed(PARAMS, "base_model.model.").items():
        state[name.replace("q_proj.", "q_proj.base_layer.")] = array
        if name.endswith("q_proj.weight"):
            state[name.replace("weight", "lora_A.default.weight")] = np.ones((4, 64))
    with pytest.raises(
        ValueError, match=r"adapter that is not merged into its tower: call .*merge_and_unload"
    ):
        minclip.from_state_dict(state, activation="quick_gelu")
