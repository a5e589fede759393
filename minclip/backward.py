"""The gradient of CLIP's text encoder, as array operations: minclip/model.py read from its end to its start.

dx is the gradient of a scalar loss with respect to x: an array of x's shape. Three rules give every line:

    y = x @ W.T               dx = dy @ W  and  dW = dy.T @ x
    y = f(x)                  dx = dy * f'(x)
    x is read in two places   dx is the sum of both gradients, as for the residual stream

A `*_backward` function takes the gradient of a step's output and the inputs of that step, and returns the
gradient of its input. It writes those of parameters to the dict grads, or none where grads is None.
"""

from __future__ import annotations

from typing import Any

from minclip.arrays import array_module, by_rows, normal_cdf, normal_density, sigmoid
from minclip.model import softmax, transformer
from minclip.params import BLOCK, EPS, Tap, architecture, checked, heads_and_activation, input_of_block, keep
from minclip.tracing import Trace, gradient_of_features, recorder, trimmed


def backward(trace: Trace, grad_features: Any, *, tap: Tap | None = None, parameters: bool = True) -> Trace:
    """Return the gradient of (features * grad_features).sum() with respect to every parameter, by name.

    trace           from `minclip.trace`. With stages="blocks", memory falls to a third, but blocks run twice
    grad_features   [..., E], the gradient of the features (of the pooled rows, without projection). None is 0
    tap             called as tap(name, gradient) for every stage but "eot", last first. Its result goes on
    parameters      False returns the gradients of the stages instead, those that trace holds

    Gradients have the dtype of the features. A tap of the forward pass is not differentiated: where it
    changed a stage, apply the derivative of the change in this tap (zeros where it set a constant).
    Raises ValueError where trace or grad_features do not fit, and for float16, whose gradients underflow.

    >>> import minclip
    >>> trace = minclip.trace(minclip.load(), minclip.tokenize(["a cat", "two dogs"]))
    >>> backward(trace, trace["text_features"])["text_projection"].shape  # of half the features' squares
    (128, 128)
    """
    dfeatures = gradient_of_features(trace, grad_features)  # (B, E)
    gradients = Trace({}, params=trace.params, tokens=trace.tokens, tap=trace.tap)
    gradients.gradient, grads = dfeatures.copy(), gradients if parameters else None
    trace = trimmed(trace) if parameters and tap is None and trace.tap is None else trace
    tap = checked(tap or keep if parameters else recorder(gradients, tap, only=trace))
    dx = read_out_backward(dfeatures, trace, tap, grads)  # (B, L, D)
    dx = transformer_backward(dx, trace, tap, grads)  # (B, L, D)
    embed_backward(dx, trace, tap, grads)
    return gradients


def read_out_backward(dy, stages, tap, grads):
    """Put the gradient of each text's features in the row of its end of text, the only row that was read."""
    params, P = stages.params, stages.params.get("text_projection")
    if P is not None:
        dy = tap("text_features", dy)  # (B, E)
        if grads is not None:
            grads["text_projection"] = stages["pooled"].T @ dy
        dy = dy @ P.T  # (B, D)
    x = stages[input_of_block(architecture(params)[0])]  # (B, L, D)
    dx = array_module(x).zeros_like(x)  # (B, L, D)
    dx[array_module(x).arange(len(x)), stages["eot"]] = tap("pooled", dy)
    return layer_norm_backward(tap("ln_final", dx), x, params, "ln_final", grads)


def transformer_backward(dx, stages, tap, grads):
    """Go back through the blocks. A block whose stages were not kept is computed again from its input."""
    for i in reversed(range(architecture(stages.params)[0])):
        x, block, inner = stages[input_of_block(i)], f"{BLOCK}{i}", stages
        if f"{block}.ln_1" not in stages:
            inner = Trace({}, params=stages.params)
            transformer(x, stages.params, [i], recorder(inner, stages.tap))
        dx = residual_block_backward(dx, x, inner, block, tap, grads)  # (B, L, D)
    return dx


def embed_backward(dx, stages, tap, grads):
    """Sum the gradient of each position over the texts, and that of each id over its occurrences."""
    xp, params, L = array_module(dx), stages.params, dx.shape[1]
    dx = tap("embedding", dx)  # (B, L, D)
    dpositions = tap("positional_embedding", dx.sum(axis=0))  # (L, D)
    dx = tap("token_embedding", dx.copy())  # (B, L, D)
    if grads is not None:
        for name in ("positional_embedding", "token_embedding.weight"):
            grads[name] = xp.zeros(params[name].shape, dtype=dx.dtype)
        grads["positional_embedding"][:L] = dpositions
        xp.add.at(grads["token_embedding.weight"], xp.asarray(stages.tokens), dx)  # += would add an id once


def residual_block_backward(dx, x, stages, name, tap, grads):
    """Add to the gradient of the stream that of the MLP's input, then that of attention's input."""
    params, residual = stages.params, stages[f"{name}.residual"]
    dx = tap(name, dx)  # (B, L, D)
    dh = tap(f"{name}.ln_2", mlp_backward(dx.copy(), stages, f"{name}.mlp", tap, grads))  # (B, L, D)
    dx = tap(f"{name}.residual", dx + layer_norm_backward(dh, residual, params, f"{name}.ln_2", grads))
    dh = tap(f"{name}.ln_1", attention_backward(dx.copy(), stages, f"{name}.attn", tap, grads))  # (B, L, D)
    return dx + layer_norm_backward(dh, x, params, f"{name}.ln_1", grads)


def attention_backward(dy, stages, name, tap, grads):
    """Give a gradient to both factors of weights @ v, and through the softmax to both factors of q @ k.T."""
    q, k, v = (stages[f"{name}.{part}"] for part in "qkv")  # (B, H, L, K)
    masked, weights, context = (stages[f"{name}.{part}"] for part in ("masked", "weights", "context"))
    (B, H, L, K), xp, params = q.shape, array_module(q), stages.params
    dcontext = linear_backward(tap(name, dy), context, params, f"{name}.out_proj.", grads)  # (B, L, D)
    dcontext = tap(f"{name}.context", dcontext).reshape(B, L, H, K).transpose(0, 2, 1, 3)  # (B, H, L, K)
    dweights = tap(f"{name}.weights", dcontext @ v.swapaxes(-1, -2))  # (B, H, L, L)
    dmasked = tap(f"{name}.masked", softmax_backward(dweights, masked))  # (B, H, L, L)
    dscores = tap(f"{name}.scores", dmasked.copy())  # (B, H, L, L)
    dv = tap(f"{name}.v", weights.swapaxes(-1, -2) @ dcontext)  # (B, H, L, K)
    dk = tap(f"{name}.k", dscores.swapaxes(-1, -2) @ (q * K**-0.5))  # (B, H, L, K)
    dq = tap(f"{name}.q", dscores @ k * K**-0.5)  # (B, H, L, K)
    dqkv = xp.stack((dq, dk, dv)).transpose(1, 3, 0, 2, 4).reshape(B, L, 3 * H * K)  # (B, L, 3D)
    return linear_backward(dqkv, stages[f"{name[:-4]}ln_1"], params, f"{name}.in_proj_", grads)


def mlp_backward(dy, stages, name, tap, grads):
    """Each position by itself: back from D to F, through the gate, back to D."""
    params, (_, activation) = stages.params, heads_and_activation(stages.params)
    gate_backward = by_rows(gelu_backward if activation == "gelu" else quick_gelu_backward)
    dh = linear_backward(tap(name, dy), stages[f"{name}.gelu"], params, f"{name}.c_proj.", grads)  # (B, L, F)
    dh = tap(f"{name}.c_fc", gate_backward(tap(f"{name}.gelu", dh), stages[f"{name}.c_fc"]))  # (B, L, F)
    return linear_backward(dh, stages[f"{name[:-3]}ln_2"], params, f"{name}.c_fc.", grads)


def linear_backward(dy, x, params, name, grads):
    """Of x @ weight.T + bias. Each row of x adds to the gradients of weight and bias."""
    rows = dy.reshape(-1, dy.shape[-1])
    if grads is not None:
        grads[f"{name}weight"] = rows.T @ x.reshape(-1, x.shape[-1])
        grads[f"{name}bias"] = rows.sum(axis=0)
    return (rows @ params[f"{name}weight"]).reshape(x.shape)


def layer_norm_backward(dy, x, params, name, grads):
    """Subtract the parts of the gradient along a shift and a scaling of x, which change nothing."""
    centered = x - x.mean(axis=-1, keepdims=True)
    deviation = ((centered * centered).mean(axis=-1, keepdims=True) + EPS) ** 0.5
    normed = centered / deviation
    if grads is not None:
        grads[f"{name}.weight"], grads[f"{name}.bias"] = (dy * normed).sum(axis=(0, 1)), dy.sum(axis=(0, 1))
    dn = dy * params[f"{name}.weight"]
    along_scaling = normed * (dn * normed).mean(axis=-1, keepdims=True)
    return (dn - dn.mean(axis=-1, keepdims=True) - along_scaling) / deviation


def softmax_backward(dy, x):
    """Subtract from dy its mean under the weights, which sum to 1. A masked key has weight 0 and gets 0."""
    y = softmax(x)
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


def quick_gelu_backward(dy, x):
    """(x s)' = s + 1.702 x s (1 - s), where s = sigmoid(1.702 x) and s' = 1.702 s (1 - s)."""
    s = sigmoid(1.702 * x)
    return dy * s * (1 + 1.702 * x * (1 - s))


def gelu_backward(dy, x):
    """(x Phi(x))' = Phi(x) + x Phi'(x), where Phi' is the normal density."""
    return dy * (normal_cdf(x) + x * normal_density(x))
