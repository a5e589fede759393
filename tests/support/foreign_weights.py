"""The text tower's weights as other frameworks name and lay them out, from OpenAI's names.

Each function takes OpenAI's arrays and gives a dict of the port's. Names and layouts follow:
openai          clip/model.py of openai/CLIP
hugging_face    CLIPModel of transformers, PyTorch
flax            FlaxCLIPModel of transformers 4.49: kernels [in, out]
keras          CLIPTextEncoder of KerasHub: q, k and v are [in, heads, head width]
onnx_legacy     torch.onnx's legacy exporter: matrices without a name, [in, out]
gguf            convert_image_encoder_to_gguf.py of clip.cpp, with its ffn_down for the first layer of the MLP
mlx             clip of ml-explore/mlx-examples
core_ml         ml-ane-transformers: matrices as convolutions [out, in, 1, 1]
megatron        packed as [heads, 3, head width, in], as Megatron and GPT-NeoX have it
stacked         all layers of a kind in one array, as scanned JAX models have it
"""

import numpy as np

from minclip.params import BLOCK, count_layers

HEADS = 2


def parts(p, i):
    """Return block i as short name -> array, q, k and v apart."""
    block = f"{BLOCK}{i}."
    found = {name.removeprefix(block): array for name, array in p.items() if name.startswith(block)}
    for kind in ("weight", "bias"):
        for letter, part in zip("qkv", np.split(found.pop(f"attn.in_proj_{kind}"), 3), strict=True):
            found[f"{letter}.{kind}"] = part
    return found


def outside(p):
    return {name: array for name, array in p.items() if not name.startswith(BLOCK)}


def openai(p):
    return dict(p)


WORDS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def renamed(p, words, block, join="."):
    """Return the arrays of the blocks under other words: block.format(i), word, kind."""
    arrays = {}
    for i in range(count_layers(p)):
        for name, array in parts(p, i).items():
            word, _, kind = name.rpartition(".")
            arrays[join.join((block.format(i), words[word], kind))] = array
    return arrays


def hugging_face(p):
    top = "text_model."
    return {
        f"{top}embeddings.token_embedding.weight": p["token_embedding.weight"],
        f"{top}embeddings.position_embedding.weight": p["positional_embedding"],
        f"{top}embeddings.position_ids": np.arange(len(p["positional_embedding"]))[None],
        **renamed(p, WORDS, top + "encoder.layers.{}"),
        f"{top}final_layer_norm.weight": p["ln_final.weight"],
        f"{top}final_layer_norm.bias": p["ln_final.bias"],
        "text_projection.weight": p["text_projection"].T,
        "logit_scale": np.float32(4.6),
        "visual_projection.weight": np.random.default_rng(9).standard_normal((128, 128)).astype(np.float32),
    }


def flax(p):
    tree = {}
    for name, array in hugging_face(p).items():
        if name.endswith("position_ids") or "visual" in name:
            continue
        *path, last = name.split(".")
        if last == "weight":
            norm = "norm" in path[-1]
            last = "embedding" if "embedding" in path[-1] else "scale" if norm else "kernel"
            array = array.T if last == "kernel" else array
        node = tree
        for word in path:
            node = node.setdefault(word, {})
        node[last] = array
    return tree


def keras(p):
    words = {
        "ln_1": "layer_norm_1",
        "ln_2": "layer_norm_2",
        "q": "attention/query",
        "k": "attention/key",
        "v": "attention/value",
        "attn.out_proj": "attention/attention_output",
        "mlp.c_fc": "dense_1",
        "mlp.c_proj": "dense_2",
    }
    arrays = {}
    for i in range(count_layers(p)):
        layer = f"clip_text_encoder/clip_encoder_block{f'_{i}' if i else ''}"
        for name, array in parts(p, i).items():
            word, _, kind = name.rpartition(".")
            D = p["ln_final.weight"].size
            if word in "qkv":
                array = array.T.reshape(D, HEADS, -1) if kind == "weight" else array.reshape(HEADS, -1)
            elif kind == "weight" and "ln" not in word:
                array = array.T.reshape(HEADS, -1, D) if word == "attn.out_proj" else array.T
            last = {
                "weight": "gamma" if "ln" in word else "kernel",
                "bias": "beta" if "ln" in word else "bias",
            }
            arrays[f"{layer}/{words[word]}/{last[kind]}:0"] = array
    return arrays | {
        "clip_text_encoder/token_and_position_embedding/token_embedding/embeddings:0": p[
            "token_embedding.weight"
        ],
        "clip_text_encoder/token_and_position_embedding/position_embedding/embeddings:0": p[
            "positional_embedding"
        ],
        "clip_text_encoder/layer_norm/gamma:0": p["ln_final.weight"],
        "clip_text_encoder/layer_norm/beta:0": p["ln_final.bias"],
        "clip_text_encoder/text_projection/kernel:0": p["text_projection"],
    }


def onnx_legacy(p):
    arrays, number = {}, 1000
    for name, array in hugging_face(p).items():
        matrix = array.ndim == 2 and "embedding" not in name and "position_ids" not in name
        if matrix and "projection" not in name:
            arrays[f"onnx::MatMul_{number}"] = array.T
            number += 13
        else:
            arrays[name] = array
    return arrays


def gguf(p):
    words = {
        "ln_1": "ln1",
        "ln_2": "ln2",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "attn.out_proj": "attn_out",
        "mlp.c_fc": "ffn_down",
        "mlp.c_proj": "ffn_up",
    }
    return {
        "t.token_embd.weight": p["token_embedding.weight"],
        "t.position_embd.weight": p["positional_embedding"],
        **renamed(p, words, "t.blk.{}"),
        "t.post_ln.weight": p["ln_final.weight"],
        "t.post_ln.bias": p["ln_final.bias"],
        "text_projection.weight": p["text_projection"].T,
    }


def mlx(p):
    words = WORDS | {
        letter: f"attention.{w}_proj" for letter, w in zip("qkv", ("query", "key", "value"), strict=True)
    }
    words |= {"attn.out_proj": "attention.out_proj", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    arrays = hugging_face(p)
    kept = {name: array for name, array in arrays.items() if ".layers." not in name}
    return kept | renamed(p, words, "text_model.encoder.layers.{}")


def core_ml(p):
    return {
        name: array[:, :, None, None] if array.ndim == 2 and "embedding" not in name else array
        for name, array in hugging_face(p).items()
    }


def megatron(p):
    arrays = {}
    for i in range(count_layers(p)):
        block = parts(p, i)
        for kind in ("weight", "bias"):
            heads = [block.pop(f"{letter}.{kind}") for letter in "qkv"]
            heads = [part.reshape(HEADS, -1, *part.shape[1:]) for part in heads]
            packed = np.stack(heads, axis=1)
            arrays[f"decoder.layers.{i}.self_attention.linear_qkv.{kind}"] = packed.reshape(
                -1, *packed.shape[3:]
            )
        for name, array in block.items():
            arrays[f"decoder.layers.{i}.{name.replace('ln_1', 'norm_a').replace('ln_2', 'norm_b')}"] = array
    return arrays | {f"embedder.{name}": array for name, array in outside(p).items()}


def stacked(p):
    layers = [parts(p, i) for i in range(count_layers(p))]
    arrays = {}
    for name in layers[0]:
        arrays[f"encoder/{name.replace('.', '/')}"] = np.stack([layer[name].T for layer in layers])
    return arrays | {f"top/{name.replace('.', '/')}": array for name, array in outside(p).items()}


DIALECTS = (openai, hugging_face, flax, keras, onnx_legacy, gguf, mlx, core_ml, megatron, stacked)
