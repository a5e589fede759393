"""Test that GGUF files load, quantized ones through the gguf package."""

import re
import sys

import numpy as np
import pytest

import minclip
from minclip import checkpoint
from tests.support.hostile import gguf_tower
from tests.support.oracles import assert_same, random_params, renamed

gguf = pytest.importorskip("gguf", reason='the gguf package writes the files: pip install ".[gguf]"')

PARAMS = random_params(width=64, layers=2, embed=64, context=16, vocabulary=128)


def write(path, state, kinds, **values):
    """Write a GGUF file; kinds maps a part of a name to the type that its matrices get."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_array("tokenizer.ggml.tokens", ["a</w>", "b</w>"])
    for name, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"clip.{name.replace('__', '.')}", value)
    stored = {}
    for name, array in state.items():
        kind = next((kind for part, kind in kinds.items() if part in name and array.ndim == 2), "F32")
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        stored[name] = gguf.quants.dequantize(data, kind).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def clip_cpp(state):
    """Return the names that clip.cpp's models/convert_hf_to_gguf.py gives to Hugging Face's."""
    words = {"text_model": "t", "encoder.layers": "blk", "embeddings.": "", "self_attn.": "attn_"}
    words |= {"layer_norm": "ln", "mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up", "embedding": "embd"}
    names = {}
    for name, array in state.items():
        new = name
        if "projection" not in name:
            new = name.replace("_proj", "")
            for word, short in words.items():
                new = new.replace(word, short)
            new = new.replace("final_ln", "post_ln")
        names[new] = array
    return names


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_gguf_files_load_as_their_own_package_reads_them(kind, tmp_path):
    path = tmp_path / "clip_l.gguf"
    stored = write(path, renamed(PARAMS), {"layers": kind, "token": kind})
    loaded = minclip.load(path, activation="quick_gelu")
    assert_same(loaded, minclip.from_state_dict(stored, activation="quick_gelu"))
    shown = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kind, kind)
    assert shown in checkpoint.inspect(path, activation="quick_gelu").text


def test_clip_cpps_names_and_metadata_are_read(tmp_path):
    path = tmp_path / "text.gguf"
    state = clip_cpp(renamed(PARAMS))
    assert "t.blk.1.attn_out.weight" in state
    write(path, state, {}, use_gelu=True, text__attention__head_count=4)
    loaded = minclip.load(path)
    assert_same(loaded, PARAMS)
    assert (loaded.activation, loaded.heads) == ("gelu", 4)
    assert "dialect      clip.cpp" in checkpoint.inspect(path).text


def test_a_quantized_file_asks_for_the_package_that_reads_it(tmp_path, monkeypatch):
    path = tmp_path / "clip_l.gguf"
    write(path, renamed(PARAMS), {"mlp": "Q8_0"})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ValueError, match=re.escape('is quantized: in a clone of minclip, pip install ".[gguf]"')
    ):
        minclip.load(path, activation="quick_gelu")
    assert "quantized" in checkpoint.inspect(path).text
    write(path, renamed(PARAMS), {})
    assert_same(minclip.load(path, activation="quick_gelu"), PARAMS)


def test_a_plain_file_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "tower.gguf").write_bytes(gguf_tower(PARAMS))
    assert_same(minclip.load(tmp_path / "tower.gguf", activation="gelu"), PARAMS)


def test_a_cut_gguf_file_is_refused(tmp_path):
    path = tmp_path / "clip_l.gguf"
    write(path, renamed(PARAMS), {"mlp": "Q8_0"})
    content = path.read_bytes()
    for keep in (4, 30, 200, 3000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match="cut"):
            minclip.load(path, activation="quick_gelu")
