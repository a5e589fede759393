"""The recipes of `minclip probe --help`, run on ports in the real frameworks.

    pytest -m foreign tests/foreign/test_ports.py

Each framework is skipped, with the reason, where it is not installed. Each port is small and written in its
framework's usual style, from the parameters of a random model.
"""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import minclip
from minclip.porting import probe, recipes
from minclip.porting.port_files import read_port
from tests.foreign import zig_clang
from tests.support.oracles import random_params

pytestmark = pytest.mark.foreign

PARAMS = minclip.from_state_dict(
    random_params(width=64, layers=2, embed=48, context=20, vocabulary=99), activation="quick_gelu", heads=2
)


@pytest.fixture
def reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return probe.write_probe("probe.npz", PARAMS)


def judge(path):
    reference = probe.read_probe("probe.npz")
    dump = read_port(path, reference.tokens)
    compared = minclip.compare(reference, dump)
    diagnosed = minclip.diagnose(PARAMS, reference.tokens, dump["text_features"], trace=dump)
    assert compared.agrees, compared
    assert diagnosed.verdict == "agrees", diagnosed
    return compared


def weights(i, name):
    return PARAMS[f"transformer.resblocks.{i}.{name}"]


def test_the_recipes_are_short_and_printed(capsys):
    from minclip.cli import main

    for name in recipes.TITLES:
        assert len(recipes.read(name).splitlines()) <= 15, name
    assert main(["probe", "--help"]) == 0
    out = "".join(capsys.readouterr().out.split())  # a narrow terminal breaks the lines
    assert all("".join(title.split()) in out for title in recipes.TITLES.values())


def openvino_port(dynamo=True):
    pytest.importorskip("openvino")
    from tests.unit.porting.test_onnx_graph import export

    return {"path": export("model.onnx", PARAMS, dynamo=dynamo)}


def mlx_port():
    pytest.importorskip("mlx.core", exc_type=ImportError)
    import mlx.core as mx
    from mlx import nn

    class Attention(nn.Module):
        def __init__(self, i):
            super().__init__()
            packed = (np.split(weights(i, f"attn.in_proj_{part}"), 3) for part in ("weight", "bias"))
            for part, weight, bias in zip(("query_proj", "key_proj", "value_proj"), *packed, strict=True):
                self[part] = linear(weight, bias)
            self.out_proj = linear(weights(i, "attn.out_proj.weight"), weights(i, "attn.out_proj.bias"))

        def __call__(self, x, mask):
            B, L, D = x.shape

            def split(t):
                return t.reshape(B, L, 2, -1).transpose(0, 2, 1, 3)

            q, k, v = (split(self[part](x)) for part in ("query_proj", "key_proj", "value_proj"))
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(0, 1, 3, 2) + mask
            out = mx.softmax(scores, axis=-1) @ v
            return self.out_proj(out.transpose(0, 2, 1, 3).reshape(B, L, D))

    def linear(w, b):
        layer = nn.Linear(w.shape[1], w.shape[0])
        layer.weight, layer.bias = mx.array(w), mx.array(b)
        return layer

    def norm(name):
        layer = nn.LayerNorm(64)
        layer.weight, layer.bias = mx.array(PARAMS[f"{name}.weight"]), mx.array(PARAMS[f"{name}.bias"])
        return layer

    class Block(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.layer_norm1, self.layer_norm2 = (
                norm(f"transformer.resblocks.{i}.{n}") for n in ("ln_1", "ln_2")
            )
            self.attention = Attention(i)
            self.linear1 = linear(weights(i, "mlp.c_fc.weight"), weights(i, "mlp.c_fc.bias"))
            self.linear2 = linear(weights(i, "mlp.c_proj.weight"), weights(i, "mlp.c_proj.bias"))

        def __call__(self, x, mask):
            x = x + self.attention(self.layer_norm1(x), mask)
            h = self.linear1(self.layer_norm2(x))
            return x + self.linear2(h * mx.sigmoid(1.702 * h))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token_embedding = nn.Embedding(99, 64)
            self.token_embedding.weight = mx.array(PARAMS["token_embedding.weight"])
            self.layers = [Block(i) for i in range(2)]
            self.final_layer_norm = norm("ln_final")

        def __call__(self, ids):
            x = self.token_embedding(ids) + mx.array(PARAMS["positional_embedding"])
            mask = mx.triu(mx.full((20, 20), -1e9), 1)
            for layer in self.layers:
                x = layer(x, mask)
            x = self.final_layer_norm(x)
            return x[mx.arange(len(ids)), ids.argmax(-1)] @ mx.array(PARAMS["text_projection"])

    return {"model": Model()}


def use_zig():
    """Let tinygrad compile by zig, in place of clang."""
    compiler = Path("clang").absolute()
    compiler.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{zig_clang.__file__}" "$@"\n')
    compiler.chmod(0o755)
    os.environ["CC"] = str(compiler)


def tinygrad_port():
    pytest.importorskip("tinygrad")
    if not shutil.which(os.environ.get("CC", "clang")) and importlib.util.find_spec("ziglang"):
        use_zig()
    from tinygrad import Device, Tensor, nn

    try:
        assert Device.DEFAULT
    except RuntimeError as error:
        pytest.skip(f"tinygrad has no device ({error}): it needs clang or ziglang")

    def filled(layer, name):
        layer.weight, layer.bias = Tensor(PARAMS[f"{name}.weight"]), Tensor(PARAMS[f"{name}.bias"])
        return layer

    class Attention:
        def __init__(self, name):
            w, b = np.split(PARAMS[f"{name}.in_proj_weight"], 3), np.split(PARAMS[f"{name}.in_proj_bias"], 3)
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64) for _ in range(3))
            for layer, weight, bias in zip((self.q_proj, self.k_proj, self.v_proj), w, b, strict=True):
                layer.weight, layer.bias = Tensor(weight.copy()), Tensor(bias.copy())
            self.out_proj = filled(nn.Linear(64, 64), f"{name}.out_proj")

        def __call__(self, x, mask):
            q, k, v = (
                f(x).reshape(*x.shape[:2], 2, 32).transpose(1, 2)
                for f in (self.q_proj, self.k_proj, self.v_proj)
            )
            out = Tensor.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out_proj(out.transpose(1, 2).reshape(*x.shape))

    class Layer:
        def __init__(self, i):
            name = f"transformer.resblocks.{i}"
            self.layer_norm1, self.layer_norm2 = (
                filled(nn.LayerNorm(64), f"{name}.{n}") for n in ("ln_1", "ln_2")
            )
            self.self_attn = Attention(f"{name}.attn")
            self.fc1 = filled(nn.Linear(64, 256), f"{name}.mlp.c_fc")
            self.fc2 = filled(nn.Linear(256, 64), f"{name}.mlp.c_proj")

        def __call__(self, x, mask):
            x = x + self.self_attn(self.layer_norm1(x), mask)
            h = self.fc1(self.layer_norm2(x))
            return x + self.fc2(h * (h * 1.702).sigmoid())

    class Model:
        def __init__(self):
            self.layers = [Layer(i) for i in range(2)]
            self.final_layer_norm = filled(nn.LayerNorm(64), "ln_final")

        def __call__(self, ids):
            end = ids.numpy().argmax(-1)
            x = Tensor(PARAMS["token_embedding.weight"][ids.numpy()] + PARAMS["positional_embedding"])
            mask = Tensor.full((20, 20), float("-inf")).triu(1)
            for layer in self.layers:
                x = layer(x, mask)
            x = self.final_layer_norm(x)
            rows = Tensor(x.numpy()[np.arange(len(end)), end])
            return rows @ Tensor(PARAMS["text_projection"])

    return {"model": Model()}


def jax_port():
    for name in ("jax", "flax"):
        pytest.importorskip(name)
    import jax.numpy as jnp
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            h = nn.LayerNorm(epsilon=1e-5, name="layer_norm1")(x)

            def split(t):
                return t.reshape(*t.shape[:2], 2, 32).transpose(0, 2, 1, 3)

            q, k, v = (split(nn.Dense(64, name=f"{part}_proj")(h)) for part in "qkv")
            out = nn.softmax(q @ k.swapaxes(-1, -2) * 32**-0.5 + mask) @ v
            x = x + nn.Dense(64, name="out_proj")(out.transpose(0, 2, 1, 3).reshape(x.shape))
            h = nn.Dense(256, name="fc1")(nn.LayerNorm(epsilon=1e-5, name="layer_norm2")(x))
            return x + nn.Dense(64, name="fc2")(h * nn.sigmoid(1.702 * h))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(99, 64, name="token_embedding")(ids)
            x = x + nn.Embed(20, 64, name="position_embedding")(jnp.arange(20)[None])
            mask = jnp.triu(jnp.full((20, 20), -1e9), 1)
            for i in range(2):
                x = Block(name=f"layers_{i}")(x, mask)
            x = nn.LayerNorm(epsilon=1e-5, name="final_layer_norm")(x)
            pooled = x[jnp.arange(len(ids)), ids.argmax(-1)]
            return nn.Dense(48, use_bias=False, name="text_projection")(pooled)

    def dense(w, b):
        return {"kernel": w.T, "bias": b}

    def norm(name):
        return {"scale": PARAMS[f"{name}.weight"], "bias": PARAMS[f"{name}.bias"]}

    def block(i):
        name = f"transformer.resblocks.{i}"
        packed = zip(
            *(np.split(weights(i, f"attn.in_proj_{part}"), 3) for part in ("weight", "bias")), strict=True
        )
        found = {f"{part}_proj": dense(w, b) for part, (w, b) in zip("qkv", packed, strict=True)}
        for theirs, ours in (("out_proj", "attn.out_proj"), ("fc1", "mlp.c_fc"), ("fc2", "mlp.c_proj")):
            found[theirs] = dense(weights(i, f"{ours}.weight"), weights(i, f"{ours}.bias"))
        return found | {"layer_norm1": norm(f"{name}.ln_1"), "layer_norm2": norm(f"{name}.ln_2")}

    tree = {f"layers_{i}": block(i) for i in range(2)} | {
        "token_embedding": {"embedding": PARAMS["token_embedding.weight"]},
        "position_embedding": {"embedding": PARAMS["positional_embedding"]},
        "final_layer_norm": norm("ln_final"),
        "text_projection": {"kernel": PARAMS["text_projection"]},
    }
    return {"module": Model(), "variables": {"params": tree}}


def fill_keras_block(block, i):
    for layer, name in ((block.layer_norm_1, "ln_1"), (block.layer_norm_2, "ln_2")):
        layer.set_weights([weights(i, f"{name}.weight"), weights(i, f"{name}.bias")])
    for layer, name in ((block.dense_1, "mlp.c_fc"), (block.dense_2, "mlp.c_proj")):
        layer.set_weights([weights(i, f"{name}.weight").T, weights(i, f"{name}.bias")])
    w, b = (np.split(weights(i, f"attn.in_proj_{part}"), 3) for part in ("weight", "bias"))
    parts = [a for w, b in zip(w, b, strict=True) for a in (w.T.reshape(64, 2, 32), b.reshape(2, 32))]
    out = weights(i, "attn.out_proj.weight").T.reshape(2, 32, 64)
    block.attention.set_weights([*parts, out, weights(i, "attn.out_proj.bias")])


def keras_port():
    os.environ.setdefault("KERAS_BACKEND", "jax" if importlib.util.find_spec("jax") else "torch")
    keras = pytest.importorskip("keras")
    from keras import layers, ops

    class Block(layers.Layer):
        def build(self, shape):
            self.layer_norm_1, self.layer_norm_2 = (layers.LayerNormalization(epsilon=1e-5) for _ in range(2))
            self.attention = layers.MultiHeadAttention(2, 32)
            self.dense_1, self.dense_2 = layers.Dense(256), layers.Dense(64)
            self.attention.build(shape, shape)
            for layer, size in (
                (self.layer_norm_1, 64),
                (self.layer_norm_2, 64),
                (self.dense_1, 64),
                (self.dense_2, 256),
            ):
                layer.build((None, 20, size))

        def call(self, x):
            h = self.layer_norm_1(x)
            x = x + self.attention(h, h, use_causal_mask=True)
            h = self.dense_1(self.layer_norm_2(x))
            return x + self.dense_2(h * ops.sigmoid(1.702 * h))

    ids = keras.Input((20,), dtype="int32")
    x = layers.Embedding(99, 64, name="token_embedding")(ids) + PARAMS["positional_embedding"]
    for i in range(2):
        x = Block(name=f"encoder_block_{i}")(x)
    x = layers.LayerNormalization(epsilon=1e-5, name="layer_norm")(x)
    end = ops.one_hot(ops.argmax(ids, axis=-1), 20)
    features = layers.Dense(48, use_bias=False, name="text_projection")(ops.einsum("bl,bld->bd", end, x))
    model = keras.Model(ids, features)
    model.get_layer("token_embedding").set_weights([PARAMS["token_embedding.weight"]])
    model.get_layer("layer_norm").set_weights([PARAMS["ln_final.weight"], PARAMS["ln_final.bias"]])
    model.get_layer("text_projection").set_weights([PARAMS["text_projection"]])
    for i in range(2):
        fill_keras_block(model.get_layer(f"encoder_block_{i}"), i)
    return {"model": model}


def keras_hub_port():
    """KerasHub's own CLIP text encoder, with a head; its final norm has eps 1e-6, where others have 1e-5."""
    os.environ.setdefault("KERAS_BACKEND", "jax" if importlib.util.find_spec("jax") else "torch")
    keras_hub = pytest.importorskip("keras_hub", exc_type=ImportError)
    import keras
    from keras import layers, ops

    encoder = keras_hub.models.CLIPTextEncoder(
        vocabulary_size=99, embedding_dim=64, hidden_dim=64, num_layers=2, num_heads=2, intermediate_dim=256,
        max_sequence_length=20,
    )  # fmt: skip
    ids = keras.Input((20,), dtype="int32")
    end = ops.one_hot(ops.argmax(ids, axis=-1), 20)
    pooled = ops.einsum("bl,bld->bd", end, encoder({"token_ids": ids}))
    model = keras.Model(ids, layers.Dense(48, use_bias=False, name="text_projection")(pooled))
    model.get_layer("text_projection").set_weights([PARAMS["text_projection"]])
    encoder.embedding.set_weights([PARAMS["token_embedding.weight"], PARAMS["positional_embedding"]])
    encoder.layer_norm.set_weights([PARAMS["ln_final.weight"], PARAMS["ln_final.bias"]])
    for i, block in enumerate(encoder.encoder_layers):
        fill_keras_block(block, i)
    return {"model": model}


def open_clip_port():
    """open_clip's text tower, loaded by file, since `import open_clip` needs torchvision."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip_torch is not installed")
    import torch

    vision = {
        name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc")
    }
    vision["torchvision.ops.misc"].FrozenBatchNorm2d = torch.nn.BatchNorm2d
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    with mock.patch.dict(sys.modules, {**vision, "open_clip": package}):
        towers = importlib.import_module("open_clip.transformer")
    model = towers.TextTransformer(20, 99, 64, 2, 2, output_dim=48, act_layer=towers.QuickGELU).eval()
    state = {name: torch.from_numpy(np.array(array)) for name, array in PARAMS.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if name != "attn_mask"]
    return {"model": model}


def follow_open_clip(model):
    dump = minclip.trace_torch(model, probe.read_probe("probe.npz").tokens)
    np.savez("port.npz", **dump)


PORTS = {  # how a port is made, its recipe, and how many of its stages must be recognized
    "flax": (jax_port, "jax", 15),
    "keras": (keras_port, "keras", 8),
    "mlx": (mlx_port, "mlx", 15),
    "tinygrad": (tinygrad_port, "tinygrad", 15),
    "openvino": (openvino_port, "openvino", 30),
    "openvino of the legacy exporter": (lambda: openvino_port(dynamo=False), "openvino", 30),
    "open_clip": (open_clip_port, None, 20),
}


def dump_of(make, recipe):
    """Run a port on the tokens of probe.npz, and return its dump. Skips where its framework is missing."""
    if recipe is None:
        follow_open_clip(**make())
    else:
        exec(compile(recipes.read(recipe), recipe, "exec"), make())
    return read_port("port.npz", probe.read_probe("probe.npz").tokens)


@pytest.mark.parametrize("name", PORTS)
def test_a_port_in_a_real_framework_agrees_through_its_recipe(name, reference):
    make, recipe, least = PORTS[name]
    dump_of(make, recipe)
    assert len(judge("port.npz").stages) >= least


def test_keras_hubs_own_encoder_agrees_but_for_the_eps_of_its_last_norm(reference):
    dump = dump_of(keras_hub_port, "keras")
    compared = minclip.compare(probe.read_probe("probe.npz"), dump)
    assert compared.first in ("ln_final", None), compared
    assert "N1-final-1e-6" in str(
        minclip.diagnose(PARAMS, reference.tokens, dump["text_features"], trace=dump)
    )


def c_call(name, array):
    shape = ", ".join(map(str, reversed(array.shape)))
    return (
        f"{{ long shape[] = {{{shape}}}; float *x = malloc({array.size} * 4);"
        f'FILE *f = fopen("{name}.raw", "rb");'
        f'if (fread(x, 4, {array.size}, f)) save("{name}", x, {array.ndim}, shape); }}'
    )


def test_plain_c(reference, tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    stages = {name: reference[name] for name in ("embedding", "ln_final", "text_features")}
    for name, array in stages.items():
        np.ascontiguousarray(array, "<f4").tofile(f"{name}.raw")
    calls = "".join(map(c_call, stages, stages.values()))
    code = (
        f"#include <stdio.h>\n#include <stdlib.h>\n{recipes.read('ggml')}\nint main() {{ {calls} finish(); }}"
    )
    (tmp_path / "port.c").write_text(code)
    subprocess.run([compiler, "port.c", "-o", "port"], check=True)
    subprocess.run([tmp_path / "port"], check=True)
    assert len(json.loads((tmp_path / "port.json").read_text())) == 3
    assert set(judge("port.json").stages) == set(stages)
