"""What the tests hold minclip against: OpenAI's own files, transformers, and a torch module of ours."""

import functools
import importlib.util
from pathlib import Path

import numpy as np

SIZES = {  # of the text towers of OpenAI's models
    "RN50": dict(width=512, layers=12, embed=1024),
    "ViT-B/32": dict(width=512, layers=12, embed=512),
    "ViT-L/14": dict(width=768, layers=12, embed=768),
}


@functools.cache
def openai(name):
    """clip/model.py or clip/simple_tokenizer.py of the openai-clip package, loaded by path.

    `import clip` would import torchvision, which neither file needs.
    """
    package = Path(importlib.util.find_spec("clip").origin).parent
    spec = importlib.util.spec_from_file_location(f"openai_clip_{name}", package / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The text_config of a small Hugging Face tower.
TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 256,
    "projection_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "hidden_act": "gelu",
}


def random_params(width=128, layers=2, embed=96, context=77, vocabulary=49408, seed=0, dtype=np.float32):
    """A text tower at the scale of CLIP's own initialization, with norms and biases that are not 1 and 0."""
    rng = np.random.default_rng(seed)

    def normal(*shape, std=1.0, mean=0.0):
        return (mean + std * rng.standard_normal(shape)).astype(dtype)

    D, F = width, 4 * width
    out_std = D**-0.5 * (2 * layers) ** -0.5
    params = {
        "token_embedding.weight": normal(vocabulary, D, std=0.02),
        "positional_embedding": normal(context, D, std=0.01),
        "ln_final.weight": normal(D, std=0.1, mean=1),
        "ln_final.bias": normal(D, std=0.1),
        "text_projection": normal(D, embed, std=D**-0.5),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        for norm in ("ln_1", "ln_2"):
            params[block + norm + ".weight"] = normal(D, std=0.1, mean=1)
            params[block + norm + ".bias"] = normal(D, std=0.1)
        for layer, out, into, std in (
            ("attn.in_proj_", 3 * D, D, D**-0.5),
            ("attn.out_proj.", D, D, out_std),
            ("mlp.c_fc.", F, D, (2 * D) ** -0.5),
            ("mlp.c_proj.", D, F, out_std),
        ):
            params[block + layer + "weight"] = normal(out, into, std=std)
            params[block + layer + "bias"] = normal(out, std=0.1)
    return params


def random_tokens(lengths, context=77, vocabulary=49408, seed=0, pad=0):
    """Rows of random ids between start and end, one for each length (start and end included)."""
    rng = np.random.default_rng(seed)
    tokens = np.full((len(lengths), context), pad, dtype=np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = [vocabulary - 2, *rng.integers(0, vocabulary - 2, length - 2), vocabulary - 1]
    return tokens


def token_rows(texts, context, vocabulary):
    """Rows of the ids of texts, each between start and end, padded with 0."""
    tokens = np.zeros((len(texts), context), np.int32)
    for row, ids in zip(tokens, texts, strict=True):
        row[: len(ids) + 2] = [vocabulary - 2, *ids, vocabulary - 1]
    return tokens


def relative(a, b):
    """Relative L2 distance of a from b, in float64."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_same(params, others):
    """The same names, and under each the same numbers."""
    assert sorted(params) == sorted(others)
    for name, array in others.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


def torch_encode_text(params, tokens, dtype="float32", activation="quick_gelu", heads=None, device="cpu"):
    """CLIP.encode_text through torch.nn's own MultiheadAttention, LayerNorm and Linear, in any dtype."""
    import torch

    state = torch_state(params, dtype, device)
    with torch.no_grad():
        return torch_features(state, tokens, activation, heads).cpu().numpy()


def torch_state(params, dtype="float32", device="cpu"):
    """params as torch tensors."""
    import torch

    dtype = getattr(torch, dtype)
    return {name: torch.from_numpy(np.asarray(array)).to(device, dtype) for name, array in params.items()}


def torch_features(state, tokens, activation="quick_gelu", heads=None, keep=lambda name, x: x):
    """The features of tensors by OpenAI's names, through torch.nn's own modules; autograd sees it all.

    keep   called as keep(name, tensor) for the stages that lie between modules, and gives the tensor to use
    """
    import torch
    from torch import nn
    from torch.nn import functional

    P = state["text_projection"]
    dtype, device, D = P.dtype, P.device, P.shape[0]
    ids = torch.from_numpy(np.asarray(tokens)).long().to(device)
    L = ids.shape[1]
    heads = heads or D // 64
    layers = sum(name.endswith(".ln_1.weight") for name in state)
    mask = torch.full((L, L), -torch.inf, dtype=dtype, device=device).triu(1)

    def call(kind, prefix, sizes, *inputs, **options):
        made = kind(*sizes, dtype=dtype, device="meta").eval()
        own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        return torch.func.functional_call(made, own, inputs, options)

    x = keep("token_embedding", functional.embedding(ids, state["token_embedding.weight"]))
    x = keep("embedding", x + state["positional_embedding"][:L]).permute(1, 0, 2)
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        h = call(nn.LayerNorm, block + "ln_1.", [D], x)
        options = dict(need_weights=False, attn_mask=mask)
        x = x + call(nn.MultiheadAttention, block + "attn.", [D, heads], h, h, h, **options)[0]
        x = keep(block + "residual", x)
        h = call(nn.LayerNorm, block + "ln_2.", [D], x)
        h = keep(block + "mlp.c_fc", call(nn.Linear, block + "mlp.c_fc.", [D, 4 * D], h))
        h = h * torch.sigmoid(1.702 * h) if activation == "quick_gelu" else functional.gelu(h)
        h = call(nn.Linear, block + "mlp.c_proj.", [4 * D, D], keep(block + "mlp.gelu", h))
        x = keep(block[:-1], x + h)
    x = keep("ln_final", call(nn.LayerNorm, "ln_final.", [D], x.permute(1, 0, 2)))
    return keep("pooled", x[torch.arange(len(ids)), ids.argmax(dim=-1)]) @ P


def torch_gradients(params, tokens, grad, dtype="float32", **options):
    """The gradient of (features * grad).sum() with respect to every parameter, from torch's autograd."""
    state = {name: tensor.requires_grad_() for name, tensor in torch_state(params, dtype).items()}
    features = torch_features(state, tokens, **options)
    features.backward(features.new_tensor(np.asarray(grad)))
    return {name: tensor.grad.numpy() for name, tensor in state.items()}


def transformers_gradients(params, tokens, grad, dtype="float32", **options):
    """The same through transformers, under OpenAI's names again."""
    import torch

    model = transformers_model(params, dtype, **options)
    features = model(input_ids=torch.from_numpy(np.asarray(tokens)).long()).text_embeds
    features.backward(features.new_tensor(np.asarray(grad)))
    theirs = {name.removeprefix("text_model."): p.grad.numpy() for name, p in model.named_parameters()}
    grads = {}
    for name in params:
        parts = [theirs[other] for other in renamed({name: params[name]}, text="")]
        grads[name] = parts[0].T if name == "text_projection" else np.concatenate(parts)
    return grads


def renamed(params, prefix="", text="text_model."):
    """params as Hugging Face would name them."""
    state = {}
    for name, array in params.items():
        for ours, theirs in (
            ("transformer.resblocks.", f"{text}encoder.layers."),
            ("attn.", "self_attn."),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("c_fc", "fc1"),
            ("c_proj", "fc2"),
            ("ln_final", f"{text}final_layer_norm"),
            ("token_embedding.weight", f"{text}embeddings.token_embedding.weight"),
            ("positional_embedding", f"{text}embeddings.position_embedding.weight"),
        ):
            name = name.replace(ours, theirs)
        if "in_proj" in name:
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                state[prefix + name.replace("in_proj_", f"{part}_proj.")] = rows
        elif name == "text_projection":
            state[prefix + "text_projection.weight"] = array.T
        else:
            state[prefix + name] = array
    return state


def transformers_model(params, dtype="float32", activation="quick_gelu", heads=None):
    """A transformers.CLIPTextModelWithProjection of params, a CLIPTextModel where they have no projection."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    V, D = params["token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=4 * D,
        projection_dim=params["text_projection"].shape[1] if "text_projection" in params else 1,
        num_hidden_layers=sum(name.endswith(".ln_1.weight") for name in params),
        num_attention_heads=heads or D // 64,
        max_position_embeddings=len(params["positional_embedding"]),
        hidden_act=activation,
        bos_token_id=V - 2,
        eos_token_id=V - 1,
    )
    kind = CLIPTextModelWithProjection if "text_projection" in params else CLIPTextModel
    model = kind(config).to(getattr(torch, dtype)).eval()
    prefixed = any(name.startswith("text_model.") for name in model.state_dict())
    state = renamed(params, text="text_model." if prefixed else "")
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}
    model.load_state_dict(state, strict=True)
    return model


def transformers_encode_text(params, tokens, dtype="float32", **options):
    """CLIP.encode_text through transformers."""
    import torch

    model = transformers_model(params, dtype, **options)
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(np.asarray(tokens)).long()).text_embeds.numpy()


def openai_model(params, dtype="float32"):
    """OpenAI's own CLIP of clip/model.py around params; the image tower is a small random one.

    float16 is what clip.load makes of it on a GPU: layer norms and embeddings stay float32.
    """
    import torch

    V, D = params["token_embedding.weight"].shape
    context, E = len(params["positional_embedding"]), params["text_projection"].shape[1]
    layers = sum(name.endswith(".ln_1.weight") for name in params)
    model = openai("model").CLIP(E, 32, 1, 64, 16, context, V, D, D // 64, layers)
    state = {name: torch.from_numpy(np.asarray(array)) for name, array in params.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    if dtype == "float16":
        openai("model").convert_weights(model)
    return model.eval()
