"""CLIP's text encoder, as array operations on the checkpoint's own parameters.

The architecture is that of "Learning Transferable Visual Models From Natural Language Supervision"
(Radford et al., 2021, section 2.4), as clip/model.py of openai/CLIP builds it.

Axes:  B batch   L positions   D width   H heads   K = D / H head width
       F = 4 D MLP width   E embedding   V vocabulary

Parameters keep OpenAI's names and orientation: the weight of a linear layer is [out, in] and is used as
x @ W.T; text_projection alone is [in, out] and is used as x @ P.

`float32_inside` marks a step that computes float16 arrays in float32 and rounds its result once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from minclip.arrays import array_module, float32_inside, matmul_transposed, normal_cdf, sigmoid, with_leading
from minclip.params import (
    EPS,
    Floats,
    Tap,
    architecture,
    check_inputs,
    check_skip,
    end_of_text,
    heads_and_activation,
    keep,
    text_dtype,
)


def encode_text(params: Mapping[str, Any], tokens: Any, *, tap: Tap | None = None) -> Floats:
    """Turn token ids into CLIP text features, as CLIP.encode_text of openai/CLIP does.

    params   mapping from OpenAI's parameter names to arrays: a `minclip.Params`, or a plain dict, which
             then means OpenAI's own choices (QuickGELU, width // 64 heads, pooling at the largest id).
    tokens   integers [..., L], L at most the context length, as `minclip.tokenize` gives them.
    tap      called as tap(name, array) at every stage, in the order of `list(minclip.trace(params, tokens))`.
             The encoder goes on with the array that it returns: a tap can record, replace or ablate.

    Returns features [..., E], not normalized, in the dtype and on the device of params. Without a
    text_projection, a tap sees the stages up to "pooled", and that is returned.
    Raises ValueError where tokens or params do not fit, or where a tap returns None. Warns about a row
    without the end-of-text id and pools it at its largest id, as the reference does.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize(["a cat", "two dogs"])
    >>> features = encode_text(params, tokens)
    >>> features.shape, str(features.dtype)
    ((2, 128), 'float32')
    """
    layers, _, _ = architecture(params)
    # Without a tap, positions after the last end of text are left out: no earlier position sees them.
    tokens, leading, tap = check_inputs(params, tokens, tap)
    x = transformer(embed(tokens, params, tap), params, range(layers), tap)  # (B, L, D)
    pooled, features = read_out(x, tokens, params, tap)  # (B, D), (B, E)
    return with_leading(leading, pooled if features is None else features)


def hidden_states(
    params: Mapping[str, Any], tokens: Any, *, skip: int = 0, norm: bool = True, pooled: bool = False
) -> Floats | tuple[Floats, Floats, Floats | None]:
    """Return the residual stream at every position, as Stable Diffusion's models read it.

    params, tokens   as `encode_text` takes them; no text_projection is needed
    skip             how many of the last blocks to leave out
    norm             whether to apply ln_final
    pooled           whether to also return the pooled row and the features of the whole tower

    Returns states [..., L, D], in the dtype and on the device of params. With pooled=True, returns
    (states, pooled, features) of one pass: pooled [..., D] is the normed stream at the end of text after
    all blocks; features [..., E] are those of `encode_text`, None without a text_projection.
    Raises ValueError as `encode_text` does, and where there are fewer than `skip` blocks.
    `minclip/README.md` says which states SD 1 to SD 3, SDXL and Flux read. The clip_skip=n of diffusers is
    skip=n for SD 1 and SD 2, and skip=n + 1 for SDXL and SD 3.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize(["a cat", "two dogs"], pad=49407)
    >>> hidden_states(params, tokens, skip=1, norm=False).shape
    (2, 77, 128)
    """
    layers, _, _ = architecture(params)
    check_skip(layers, skip)
    tokens, leading, tap = check_inputs(params, tokens, keep)
    x = transformer(embed(tokens, params, tap), params, range(layers - skip), tap)  # (B, L, D)
    states = layer_norm(x, *weight_and_bias(params, "ln_final")) if norm else x  # (B, L, D)
    if not pooled:
        return with_leading(leading, states)
    x = transformer(x, params, range(layers - skip, layers), tap)  # (B, L, D)
    return with_leading(leading, states, *read_out(x, tokens, params, tap))


def embed(tokens, params, tap):
    """Look up the tokens and add their positions."""
    xp, dtype, L = array_module(params["ln_final.weight"]), text_dtype(params), tokens.shape[1]
    x = params["token_embedding.weight"][xp.asarray(tokens)].astype(dtype, copy=False)  # (B, L, D)
    x = tap("token_embedding", x)
    positions = params["positional_embedding"][:L].astype(dtype)  # (L, D)
    return tap("embedding", x + tap("positional_embedding", positions))


def transformer(x, params, blocks, tap):
    """Pass the residual stream x through some of the blocks."""
    heads, activation = heads_and_activation(params)
    xp, L = array_module(x), x.shape[1]
    # Only the future is masked. Padding needs no mask: it comes after the end of text.
    mask = xp.triu(xp.full((L, L), -xp.inf, dtype=x.dtype), 1)  # (L, L)
    for i in blocks:
        x = residual_block(x, params, f"transformer.resblocks.{i}", heads, activation, mask, tap)  # (B, L, D)
    return x


def read_out(x, tokens, params, tap):
    """Norm the stream, take each text's row at its end, and project it if there is a projection."""
    xp, P = array_module(x), params.get("text_projection")
    x = tap("ln_final", layer_norm(x, *weight_and_bias(params, "ln_final")))  # (B, L, D)
    eot = tap("eot", end_of_text(params, xp.asarray(tokens)))  # (B,)
    pooled = tap("pooled", x[xp.arange(len(x)), eot])  # (B, D)
    return pooled, None if P is None else tap("text_features", matmul(pooled, P))


def residual_block(x, params, name, heads, activation, mask, tap):
    """Add to the residual stream the attention of its layer norm, then the MLP of its layer norm."""
    h = tap(f"{name}.ln_1", layer_norm(x, *weight_and_bias(params, f"{name}.ln_1")))  # (B, L, D)
    x = tap(f"{name}.residual", add(x, attention(h, params, f"{name}.attn", heads, mask, tap)))  # (B, L, D)
    h = tap(f"{name}.ln_2", layer_norm(x, *weight_and_bias(params, f"{name}.ln_2")))  # (B, L, D)
    return tap(name, add(x, mlp(h, params, f"{name}.mlp", activation, tap)))


def attention(x, params, name, heads, mask, tap):
    """Let each position gather from itself and earlier ones, by masked multi-head self-attention."""
    B, L, D = x.shape
    K = D // heads
    qkv = linear(x, params[f"{name}.in_proj_weight"], params[f"{name}.in_proj_bias"])  # (B, L, 3D)
    q, k, v = qkv.reshape(B, L, 3, heads, K).transpose(2, 0, 3, 1, 4)  # (B, H, L, K)
    q, k, v = tap(f"{name}.q", q), tap(f"{name}.k", k), tap(f"{name}.v", v)  # (B, H, L, K)
    # q is scaled, not the product, which could overflow float16.
    scores = tap(f"{name}.scores", matmul(q * K**-0.5, k.swapaxes(-1, -2)))  # (B, H, L, L)
    masked = tap(f"{name}.masked", scores + mask)  # (B, H, L, L)
    weights = tap(f"{name}.weights", softmax(masked))  # (B, H, L, L)
    context = matmul(weights, v)  # (B, H, L, K)
    context = tap(f"{name}.context", context.transpose(0, 2, 1, 3).reshape(B, L, D))  # (B, L, D)
    return tap(name, unrounded_linear(context, *weight_and_bias(params, f"{name}.out_proj")))


def mlp(x, params, name, activation, tap):
    """Transform each position by itself: out to F, a soft gate, back to D."""
    h = tap(f"{name}.c_fc", linear(x, *weight_and_bias(params, f"{name}.c_fc")))  # (B, L, F)
    h = tap(f"{name}.gelu", ACTIVATIONS[activation](h))  # (B, L, F)
    return tap(name, unrounded_linear(h, *weight_and_bias(params, f"{name}.c_proj")))


@float32_inside
def layer_norm(x, weight, bias):
    """Shift and scale x to mean 0 and (biased) variance 1 over the last axis, then apply weight and bias."""
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = (centered * centered).mean(axis=-1, keepdims=True)
    return centered / (variance + EPS) ** 0.5 * weight + bias


@functools.partial(float32_inside, rounded=False)
def unrounded_linear(x, weight, bias):
    """Return x @ weight.T + bias. With float16 arrays it stays float32: `add` rounds it with the sum."""
    return matmul_transposed(x, weight) + bias


@float32_inside
def linear(x, weight, bias):
    """Return x @ weight.T + bias."""
    return unrounded_linear(x, weight, bias)


@float32_inside
def add(x, change):
    return x + change


@float32_inside
def matmul(a, b):
    return a @ b


@float32_inside
def softmax(x):
    """Make x positive and of sum 1 over the last axis. Subtracting the maximum keeps exp from overflowing."""
    e = array_module(x).exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@float32_inside
def quick_gelu(x):
    """Return x * sigmoid(1.702 x), the approximation of the GELU that OpenAI trained CLIP with."""
    return x * sigmoid(1.702 * x)


@float32_inside
def gelu(x):
    """Return x * Phi(x), the exact GELU (with erf, not tanh) of most OpenCLIP models."""
    return x * normal_cdf(x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def weight_and_bias(params, name):
    return params[f"{name}.weight"], params[f"{name}.bias"]
