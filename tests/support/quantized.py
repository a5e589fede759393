"""Ports whose weights others quantized: GGUF's blocks by the gguf package, and ONNX Runtime's own int8."""

import tempfile
from pathlib import Path

import gguf
import numpy as np
import onnxruntime
import torch
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic

from minclip.params import count_layers
from tests.support import foreign_weights

GGUF = ("Q8_0", "Q5_0", "Q4_0")
ONNX = {  # options of quantize_dynamic
    "the products": {"op_types_to_quantize": ["MatMul"]},
    "the products, per channel": {"op_types_to_quantize": ["MatMul"], "per_channel": True},
    "the products, uint8": {"op_types_to_quantize": ["MatMul"], "weight_type": QuantType.QUInt8},
    "the products, reduced range": {"op_types_to_quantize": ["MatMul"], "reduce_range": True},
    "all that it quantizes": {},
}


def with_gguf_blocks(params, kind, but=()):
    """Return params with every matrix, but for some names, as the gguf package stores and reads it."""
    quant = gguf.GGMLQuantizationType[kind]

    def stored(array):
        return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(array), quant), quant)

    matrices = {name: array for name, array in params.items() if array.ndim == 2 and name not in but}
    turned = (
        {"text_projection": stored(params["text_projection"].T).T} if "text_projection" not in but else {}
    )
    return params | {name: stored(array) for name, array in matrices.items()} | turned


def onnx_features(params, tokens, options, activation="quick_gelu"):
    """Return the features of transformers' text tower, exported to ONNX and quantized with options."""
    with tempfile.TemporaryDirectory() as folder:
        plain, int8 = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        write_onnx(params, tokens, plain, activation)
        quantize_dynamic(plain, int8, **options)
        session = onnxruntime.InferenceSession(int8)
        return session.run(None, {"ids": tokens.astype(np.int64)})[0]


def write_onnx(params, tokens, path, activation):
    """Write transformers' text tower with these weights as an ONNX graph."""
    width, embed = params["text_projection"].shape
    vocabulary = len(params["token_embedding.weight"])
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=count_layers(params), num_attention_heads=params.heads, projection_dim=embed,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, hidden_act=activation,
        max_position_embeddings=len(params["positional_embedding"]),
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config).eval()
    arrays = foreign_weights.hugging_face(params).items()
    left_out = ("visual_projection.weight", "logit_scale", "text_model.embeddings.position_ids")
    state = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays if name not in left_out}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "position_ids" not in name]

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = model

        def forward(self, ids):
            return self.tower(ids).text_embeds

    ids = torch.from_numpy(tokens).long()
    torch.onnx.export(Features(), (ids,), path, dynamo=False, opset_version=17, input_names=["ids"])
