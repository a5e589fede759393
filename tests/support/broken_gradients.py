"""A torch port whose features are right and whose backward pass has one bug, switched on by name."""

import numpy as np
import torch
from torch.nn import functional as F

# switch -> the catalogue's id
BUGS = {
    "residual": "G1",
    "norm": "G2",
    "softmax": "G3",
    "scale": "G4",
    "gelu": "G5",
    "pooling": "G6",
    "padding_idx": "G7",
    "assigned": "G8",
}


class WithBackward(torch.autograd.Function):
    """value as it is, with a gradient of x of the port's own: rule(gradient, x, value)."""

    @staticmethod
    def forward(ctx, x, value, rule):
        ctx.save_for_backward(x, value)
        ctx.rule = rule
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.rule(gradient, *ctx.saved_tensors), None, None


def erf_derivative(gradient, x, value):
    return gradient * (0.5 * (1 + torch.erf(x / 2**0.5)) + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5)


def gradients(params, tokens, grad, bug=None, blocks=None):
    """Return (features, gradients of (features * grad).sum() by stages and by parameters).

    blocks   the blocks that have the bug; all where None
    """
    state = {name: torch.from_numpy(array).requires_grad_() for name, array in params.items()}
    ids, kept = torch.from_numpy(tokens).long(), {}
    rows = torch.arange(len(ids))

    def keep(name, x):
        kept[name] = x
        x.retain_grad()
        return x

    def has(name, i):
        return bug == name and (blocks is None or i in blocks)

    def norm(x, name, broken):
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        if broken:
            mean, variance = mean.detach(), variance.detach()
        normed = (x - mean) * torch.rsqrt(variance + 1e-5)
        return keep(name, normed * state[f"{name}.weight"] + state[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, state[f"{name}weight"], state[f"{name}bias"])

    def attention(h, name, heads, i):
        B, L, D = h.shape
        qkv = linear(h, f"{name}.in_proj_").view(B, L, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        q, k, v = (keep(f"{name}.{part}", x) for part, x in zip("qkv", qkv, strict=True))
        scores = q @ k.mT
        scale = (D // heads) ** -0.5
        scores = (
            WithBackward.apply(scores, scores.detach() * scale, lambda d, x, y: d)
            if has("scale", i)
            else scores * scale
        )
        hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
        masked = keep(f"{name}.masked", keep(f"{name}.scores", scores).masked_fill(hidden, -torch.inf))
        weights = masked.softmax(-1)
        if has("softmax", i):
            weights = WithBackward.apply(masked, weights.detach(), lambda d, x, y: d * y * (1 - y))
        context = keep(f"{name}.weights", weights) @ v
        context = keep(f"{name}.context", context.transpose(1, 2).reshape(B, L, D))
        return keep(name, linear(context, f"{name}.out_proj."))

    def mlp(h, name, i):
        h = keep(f"{name}.c_fc", linear(h, f"{name}.c_fc."))
        gate = h * torch.sigmoid(1.702 * h)
        if has("gelu", i):
            gate = WithBackward.apply(h, gate.detach(), erf_derivative)
        return keep(name, linear(keep(f"{name}.gelu", gate), f"{name}.c_proj."))

    padding = 0 if bug == "padding_idx" else None
    x = keep("token_embedding", F.embedding(ids, state["token_embedding.weight"], padding_idx=padding))
    x = keep("embedding", x + state["positional_embedding"][: ids.shape[1]])
    layers = sum(name.endswith("ln_1.weight") for name in params)
    for i in range(layers):
        name = f"transformer.resblocks.{i}"
        skip = (lambda x: x.detach()) if has("residual", i) else (lambda x: x)
        h = norm(x, f"{name}.ln_1", has("norm", i))
        x = keep(f"{name}.residual", skip(x) + attention(h, f"{name}.attn", params.heads, i))
        x = keep(name, skip(x) + mlp(norm(x, f"{name}.ln_2", has("norm", i)), f"{name}.mlp", i))
    x = norm(x, "ln_final", has("norm", layers))
    pooled = x[rows, ids.argmax(-1)]
    if bug == "pooling":
        pooled = x.mean(1) + (pooled - x.mean(1)).detach()
    features = keep("text_features", keep("pooled", pooled) @ state["text_projection"])
    features.backward(torch.from_numpy(grad))
    arrays = {name: tensor.grad.numpy() for name, tensor in (kept | state).items()}
    if bug == "assigned":
        table = np.zeros_like(params["token_embedding.weight"])
        table[tokens] = arrays["token_embedding"]
        arrays["token_embedding.weight"] = table
    return features.detach().numpy(), arrays
