"""`Fault`, one known mistake, and the small changes that the catalogue's faults are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from minclip.model import softmax
from minclip.params import BLOCK, text_dtype
from minclip.porting.port import Port
from minclip.porting.quantization import codes_of
from minclip.porting.rounding import round_to
from minclip.porting.stages import up_to_end


@dataclasses.dataclass(frozen=True)
class Fault:
    """One known mistake.

    id        its id in the catalogue, with a suffix where one entry holds several variants
    summary   a sentence that says what the port does
    source    the project and thread, or file, where it happened; `#n` is an issue or pull request
    remedy    the fix
    change    change(port) makes the mistake in a fresh `Port`; for a bug of gradients, see `gradients.Pass`
    fits      fits(port) tells whether a port of this model and these tokens can make the mistake
    needs     "padding" if positions after the end of text matter, "batch" if other rows do
    """

    id: str
    summary: str
    source: str
    remedy: str
    change: Callable[..., Any] | None = dataclasses.field(repr=False)
    fits: Callable[[Port], Any] = dataclasses.field(default=lambda port: True, repr=False)
    needs: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return id, summary, source and remedy as a dict."""
        return {name: getattr(self, name) for name in ("id", "summary", "source", "remedy")}


def port_with(
    faults: Iterable[Fault],
    params: Mapping[str, Any],
    tokens: Any,
    batch: Any = None,
    precision: str = "float32",
) -> Port:
    """Return the reference with these faults. `params` are on the host and rounded to the precision."""
    port = Port(params, tokens, batch)
    port.precision = precision if precision in ("float16", "bfloat16") else None
    for fault in faults:
        if fault.change:  # scaled or shuffled features need no other model
            fault.change(port)
    return port


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def to_unit_length(x, axis=-1):
    return x / (x * x).sum(axis=axis, keepdims=True) ** 0.5


def thirds(w, order):
    """Return the q, k and v parts of a packed weight or bias in another order."""
    parts = np.split(w, 3)
    return np.concatenate([parts["qkv".index(name)] for name in order])


def each_third(w, *changes):
    """Return a packed weight or bias with its q, k and v parts each passed through its own change."""
    return np.concatenate([change(part) for change, part in zip(changes, np.split(w, 3), strict=True)])


def same(w):
    return w


def transpose(w):
    return w.T


def zero(w):
    return 0 * w


def other_order(w):
    """Return the same memory read as [in, out]: the matrix reshaped where it should be transposed."""
    return w.reshape(w.shape[::-1]).T


def regroup(w, heads, axes):
    """Return a packed weight in the order 3, h, k, given rows in the order of axes, such as "h3k"."""
    sizes = {"3": 3, "h": heads, "k": len(w) // 3 // heads}
    stored = np.arange(len(w)).reshape([sizes[axis] for axis in axes])
    return w[stored.transpose([axes.index(axis) for axis in "3hk"]).ravel()]


def reshape_heads(x):
    """Return [B, L, D] reshaped to [B, H, L, K] without a transpose, given the heads split correctly."""
    B, H, L, K = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, H, L, K)


def over_the_batch(at):
    """Return attention of each position over the rows of the batch: [L, B, D] read as [B, L, D]."""
    q, k, v = (at[f"attn.{name}"].transpose(2, 1, 0, 3) for name in "qkv")  # (L, H, B, K)
    context = softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5) @ v
    return context.transpose(2, 0, 1, 3).reshape(at["attn.context"].shape)


def padding_masked_too(port):
    """Mask the keys after the end of text, besides those that are masked already."""
    keys = up_to_end(port.tokens, port.end)[:, None, None, :]
    port.replace("attn.masked", lambda at: np.where(keys, at["attn.masked"], -np.inf))


def low_bits(ids, dtype):
    """Return ids after a cast to a type too small for them, and back."""
    small = round_to(ids.astype(np.float32), dtype) if dtype == "bfloat16" else ids.astype(dtype)
    return small.astype(np.int64)


def pooled_at(choose):
    """Pool at choose(port)."""
    return lambda port: port.replace("eot", lambda at: choose(port))


def last_of_ends(port):
    """Return the last position that holds the id at the end of each text."""
    ends = port.tokens == np.take_along_axis(port.tokens, port.end[:, None], axis=-1)
    return port.tokens.shape[-1] - 1 - ends[:, ::-1].argmax(axis=-1)


def end_cut_off(port):
    """Return the largest id of a text that fills its row, without its last position."""
    last = port.tokens.shape[-1] - 1
    return np.where(port.end == last, port.tokens[:, :-1].argmax(axis=-1), port.end)


def positions(choose):
    """Use the positional embedding of row choose(arange(L), context), clipped to the table."""

    def change(port):
        table = port["positional_embedding"]
        rows = choose(np.arange(port.tokens.shape[-1]), len(table))
        port.replace(
            "positional_embedding", lambda at: table[rows.clip(0, len(table) - 1)].astype(text_dtype(port))
        )

    return change


def repad(pad):
    """Fill the positions after the end of text with another id."""

    def change(port):
        after = ~up_to_end(port.tokens, port.end)
        port.tokens = np.where(after, pad(port), port.tokens)

    return change


def left_padded(port):
    """Move each text to the end of its row, after the padding."""
    L = port.tokens.shape[-1]
    shift = L - 1 - port.end
    port.tokens = port.tokens[np.arange(len(port.tokens))[:, None], (np.arange(L) - shift[:, None]) % L]


def end_moved_last(port):
    tokens, rows, end = port.tokens.copy(), np.arange(len(port.tokens)), port.end
    tokens[rows, end], tokens[:, -1] = port.tokens[:, -1], port.tokens[rows, end]
    port.tokens = tokens


def set_tokens(choose):
    def change(port):
        port.tokens = choose(port.tokens)

    return change


def end_id(port):
    return port.tokens.max() if port.eot is None else port.eot


def without_end(port):
    port.tokens = np.where(port.tokens == end_id(port), 0, port.tokens)


def swap_specials(port):
    tokens, end = port.tokens, end_id(port)
    port.tokens = np.where(tokens == end, end - 1, np.where(tokens == end - 1, end, tokens))


def sinusoids(port):
    """Replace the learned positions by those of "Attention Is All You Need"."""
    L, D = port.tokens.shape[-1], port["positional_embedding"].shape[-1]
    angle = np.arange(L)[:, None] / 10000 ** (np.arange(0, D, 2) / D)
    table = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(L, -1)[:, :D]
    port.replace("positional_embedding", lambda at: table.astype(text_dtype(port)))


def post_norm(port):
    port.replace("ln_1", lambda at: at["x"])
    port.replace("residual", lambda at: port.layer_norm("ln_1", at["residual"]))
    port.replace("ln_2", lambda at: at["residual"])
    port.replace("block", lambda at: port.layer_norm("ln_2", at["block"]))


def swapped_norms(port):
    swap = {"ln_1.": "ln_2.", "ln_2.": "ln_1."}
    for name, array in list(port.items()):
        for a, b in swap.items():
            if name.startswith(BLOCK) and a in name:
                port[name.replace(a, b)] = array


def swapped_biases(port):
    """Swap mlp.c_proj.bias and attn.out_proj.bias, which have the same shape."""
    old = dict(port)
    for name in old:
        if name.endswith("attn.out_proj.bias"):
            other = name.replace("attn.out_proj", "mlp.c_proj")
            port[name], port[other] = old[other], old[name]


def norm_after_projection(port):
    port.replace("ln_final", lambda at: at["x"])
    port.replace("text_features", lambda at: port.layer_norm("ln_final", at["text_features"]))


def plain_norm(port, ending):
    port.weights(f"{ending}.weight", lambda w: 0 * w + 1)
    port.weights(f"{ending}.bias", zero)


def head_major(port):
    """Split and join the channels as [K, H] where the checkpoint has [H, K]."""
    order = np.arange(len(port["ln_final.weight"])).reshape(-1, port.heads).T.ravel()
    port.weights("attn.in_proj_weight", lambda w: each_third(w, *[lambda part: part[order]] * 3))
    port.weights("attn.in_proj_bias", lambda b: each_third(b, *[lambda part: part[order]] * 3))
    port.weights("attn.out_proj.weight", lambda w: w[:, order])


def scale_scores(factor):
    """Multiply the scores by factor(K, H, D)."""

    def change(port):
        D = len(port["ln_final.weight"])
        port.replace("attn.scores", lambda at: at["attn.scores"] * factor(D // port.heads, port.heads, D))

    return change


def option(**changes):
    return lambda port: vars(port).update(changes)


def norm(**changes):
    return lambda port: port.norm.update(changes)


def norm_with(name, **changes):
    """Change one of the layer norms."""
    before = {"ln_1": "x", "ln_2": "residual", "ln_final": "x"}[name]
    return lambda port: port.replace(name, lambda at: port.layer_norm(name, at[before], **changes))


def weights(ending, change):
    return lambda port: port.weights(ending, change)


def replace(stage, function):
    return lambda port: port.replace(stage, function)


def all_of(*changes):
    def change(port):
        for each in changes:
            each(port)

    return change


# Which ports can make a mistake.


def quick(port):
    return port.activation == "quick_gelu"


def square(port):
    D, E = port["text_projection"].shape
    return D == E


def several_heads(port):
    return port.heads > 1


def deeper_than(layers):
    return lambda port: port.layers > layers


def replace_lookup(dtype):
    """Look up ids that were cast to a type too small for them; the position of the end stays right."""
    return lambda port: port.replace("token_embedding", lambda at: port.embed(low_bits(port.tokens, dtype)))


def codes_for_weights(port, kind, *, packed=False, projection=False, **how):
    """Replace every matrix of the blocks by its codes, without their scales.

    packed       whether there is one scale for q, k and v together
    projection   whether text_projection holds codes as well
    how          the other options of `codes_of`
    """

    def codes(w):
        return codes_of(w, kind, **how)

    def of_parts(w):
        return codes(w) if packed else each_third(w, codes, codes, codes)

    port.weights("attn.in_proj_weight", of_parts)
    for module in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
        port.weights(f"{module}.weight", codes)
    if projection:
        port.weights("text_projection", lambda w: codes(w.T).T)


def cosines(features):
    """Return the cosine similarities [B, B] of features [B, E]."""
    unit = to_unit_length(features)
    return unit @ unit.T


def other_heads(count, but=()):
    """Tell whether count(H) is another number of heads that divides the width, and none of those in but."""

    def fits(port):
        n, H = count(port.heads), port.heads
        others = {H, *(other(H) for other in but)}
        return n >= 1 and n not in others and len(port["ln_final.weight"]) % n == 0

    return fits


def full_vocabulary(port):
    """Tell whether the ids of start and end overflow 16-bit types, as in every released CLIP."""
    return len(port["token_embedding.weight"]) > 2**15


def double(H):
    return 2 * H


def half(H):
    return H // 2 if H % 2 == 0 else 0


def with_heads(count):
    def change(port):
        port.heads = count(port.heads)

    return change
