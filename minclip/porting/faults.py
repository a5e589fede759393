"""The catalogue: mistakes that ports of CLIP's text encoder really make, each as a small change.

A `Port` is the reference as somebody carried it over: the parameters, the tokens, the options, and
functions put in the place of stages. It runs on `minclip.encode_text` itself, through a tap, so the
reference stays one clean page and a fault is what differs from it, in a line or a few:

    Fault("N5", "ln_final skipped", ..., lambda port: port.replace("ln_final", lambda at: at["x"]))

`at` holds the stages of the current block computed so far under their short names ("ln_1",
"attn.q", ...), and "x", what the block was given. Axes are those of minclip/model.py.

A fault's source names a project and a thread, `#n` being an issue or pull request there, or a file.
A letter of an id is a part of the encoder: A activation, M mask, P pooling, D padding and special
ids, E embedding and positions, T attention, N norms, residuals, layers, projection and output; R is
the order of the rows.
"""

import dataclasses
import math

import numpy as np

from minclip.model import softmax
from minclip.params import BLOCK, EPS, architecture
from minclip.porting.rounding import round_to, run


class Port(dict):
    """Parameters by name, as `encode_text` takes them, and all else in which a port may differ."""

    def __init__(self, params, tokens, batch=None):
        """tokens [B, L] to encode, and the batch [N, L] they are rows of, for faults that look at it."""
        super().__init__(params)
        self.layers, self.heads, self.activation = architecture(params)
        self.tokens = tokens
        self.batch = tokens if batch is None else batch
        self.norm = {}  # how its layer norm differs: keywords of layer_norm below
        self.replaced = {}  # stage -> the functions that take its place, in turn
        self.rounded = None  # to what precision each stage is kept: a function of an array
        self.at = {}

    def run(self, tap=None):
        """Features [B, E] of the changed encoder, by way of another tap if that calls this one's."""
        # In silence: faults may well overflow, or lose the end of text.
        return run(self, self.tokens, tap or self.tap)

    # What a fault may do.

    def weights(self, ending, change):
        """Pass every parameter whose name has this ending through change."""
        for name in [name for name in self if name.endswith(ending)]:
            self[name] = change(self[name])

    def replace(self, stage, function):
        """Put function(at) in the place of a stage, in every block that has it."""
        self.replaced.setdefault(stage, []).append(function)

    def mask(self, allowed, blocked=-math.inf):
        """Attend where allowed(query, key, at) is true, and add blocked to the scores elsewhere."""

        def masked(at):
            scores = at["attn.scores"]
            query, key = np.ogrid[: scores.shape[-2], : scores.shape[-1]]
            return np.where(allowed(query, key, at), scores, scores + blocked)

        self.replace("attn.masked", masked)

    def blocks(self, order):
        """Run the blocks in another order, or fewer, or some twice."""
        old = {name: self.pop(name) for name in list(self) if name.startswith(BLOCK)}
        for new, i in enumerate(order):
            for name, array in old.items():
                if name.startswith(f"{BLOCK}{i}."):
                    self[name.replace(f"{BLOCK}{i}.", f"{BLOCK}{new}.")] = array

    def layer_norm(self, name, x):
        """The port's own layer norm, ln_1 and ln_2 being the current block's."""
        full = name if name == "ln_final" else f"{self.prefix}{name}"
        return layer_norm(x, self[f"{full}.weight"], self[f"{full}.bias"], **self.norm)

    def embed(self, ids):
        """Rows of the token embedding, indices out of range wrapping as NumPy's and CuPy's do."""
        table = self["token_embedding.weight"]
        return table[ids % len(table)].astype(self["text_projection"].dtype)

    # How encode_text meets it.

    def tap(self, name, array):
        self.prefix, stage = split(name)
        at = self.at
        at[stage] = array
        if self.norm and stage in ("ln_1", "ln_2", "ln_final"):
            at[stage] = self.layer_norm(stage, at["residual" if stage == "ln_2" else "x"])
        for function in self.replaced.get(stage, ()):
            at[stage] = function(at)
        if self.rounded and at[stage].dtype.kind == "f":
            at[stage] = self.rounded(at[stage])
        if stage in ("embedding", "block"):
            at["x"] = at[stage]
        return at[stage]


def split(name):
    """A stage's full name as its block's prefix and its short name: "block" for a block's output."""
    if not name.startswith(BLOCK):
        return "", name
    i, _, stage = name.removeprefix(BLOCK).partition(".")
    return f"{BLOCK}{i}.", stage or "block"


@dataclasses.dataclass(frozen=True)
class Fault:
    """One known mistake.

    id        of the catalogue, with a suffix where one entry holds several variants
    summary   what the port does
    source    where it happened
    remedy    what to do instead
    change    change(port) makes the mistake in a fresh Port
    fits      fits(port) tells whether a port of this model and these tokens could make it at all
    needs     "padding" if positions after the end of text matter, "batch" if other rows do
    """

    id: str
    summary: str
    source: str
    remedy: str
    change: object = dataclasses.field(repr=False)
    fits: object = dataclasses.field(default=lambda port: True, repr=False)
    needs: str = ""


# Parts of faults.


def layer_norm(x, weight, bias, eps=EPS, ddof=0, centre=True, outside=False):
    """Layer norm as ports write it: other eps, unbiased, eps outside the root, or not centred."""
    centred = x - x.mean(axis=-1, keepdims=True) if centre else x
    variance = (centred * centred).sum(axis=-1, keepdims=True) / (x.shape[-1] - ddof)
    deviation = variance**0.5 + eps if outside else (variance + eps) ** 0.5
    return centred / deviation * weight + bias


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def unit(x, axis=-1):
    return x / (x * x).sum(axis=axis, keepdims=True) ** 0.5


def thirds(w, order):
    """The q, k and v parts of a packed weight or bias, in another order."""
    parts = np.split(w, 3)
    return np.concatenate([parts["qkv".index(name)] for name in order])


def each_third(w, *changes):
    """The q, k and v parts of a packed weight or bias, each through its own change."""
    return np.concatenate([change(part) for change, part in zip(changes, np.split(w, 3), strict=True)])


def same(w):
    return w


def transpose(w):
    return w.T


def zero(w):
    return 0 * w


def other_order(w):
    """The same memory read as [in, out]: what is left of a matrix that is reshaped, not transposed."""
    return w.reshape(w.shape[::-1]).T


def regroup(w, heads, axes):
    """Rows of a packed weight, stored as axes (a permutation of "3hk") say, brought to the order 3, h, k."""
    sizes = {"3": 3, "h": heads, "k": len(w) // 3 // heads}
    stored = np.arange(len(w)).reshape([sizes[axis] for axis in axes])
    return w[stored.transpose([axes.index(axis) for axis in "3hk"]).ravel()]


def straight(x):
    """[B, L, D] cut into [B, H, L, K] with no transpose, from the properly cut heads."""
    B, H, L, K = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, H, L, K)


def over_the_batch(at):
    """Each position attends over the rows of the batch: [L, B, D] and [B, L, D] taken for each other."""
    q, k, v = (at[f"attn.{name}"].transpose(2, 1, 0, 3) for name in "qkv")  # (L, H, B, K)
    context = softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5) @ v
    return context.transpose(2, 0, 1, 3).reshape(at["attn.context"].shape)


def low_bits(ids, dtype):
    """ids after a cast to a type too small for them, and back."""
    small = round_to(ids.astype(np.float32), dtype) if dtype == "bfloat16" else ids.astype(dtype)
    return small.astype(np.int64)


def pooled_at(choose):
    """Pool at choose(tokens)."""
    return lambda port: port.replace("eot", lambda at: choose(port.tokens))


def positions(choose):
    """Use the positional embedding of row choose(arange(L), context), kept within the table."""

    def change(port):
        table = port["positional_embedding"]
        rows = choose(np.arange(port.tokens.shape[-1]), len(table))
        port.replace(
            "positional_embedding", lambda at: table[rows.clip(0, len(table) - 1)].astype(x_dtype(port))
        )

    return change


def x_dtype(port):
    return port["text_projection"].dtype


def repad(pad):
    """The positions after the end of text filled with another id."""

    def change(port):
        after = np.arange(port.tokens.shape[-1]) > port.tokens.argmax(axis=-1)[:, None]
        port.tokens = np.where(after, pad(port), port.tokens)

    return change


def left_padded(port):
    """Each text moved to the end of its row, the padding before it."""
    L = port.tokens.shape[-1]
    shift = L - 1 - port.tokens.argmax(axis=-1)
    port.tokens = port.tokens[np.arange(len(port.tokens))[:, None], (np.arange(L) - shift[:, None]) % L]


def end_moved_last(port):
    tokens, end = port.tokens.copy(), port.tokens.argmax(axis=-1)
    pad = tokens[:, -1].copy()
    tokens[np.arange(len(tokens)), end] = np.where(end == tokens.shape[1] - 1, tokens.max(axis=-1), pad)
    tokens[:, -1] = port.tokens.max(axis=-1)
    port.tokens = tokens


def set_tokens(choose):
    def change(port):
        port.tokens = choose(port.tokens)

    return change


def swap_specials(tokens):
    end = tokens.max()
    return np.where(tokens == end, end - 1, np.where(tokens == end - 1, end, tokens))


def sinusoids(port):
    """The positions of "Attention Is All You Need" in place of the learnt ones."""
    L, D = port.tokens.shape[-1], port["positional_embedding"].shape[-1]
    angle = np.arange(L)[:, None] / 10000 ** (np.arange(0, D, 2) / D)
    table = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(L, -1)[:, :D]
    port.replace("positional_embedding", lambda at: table.astype(x_dtype(port)))


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
    """mlp.c_proj.bias and attn.out_proj.bias have one shape, and so can be taken for each other."""
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
    """Channels cut as [K, H] where the checkpoint means [H, K], and put back likewise."""
    order = np.arange(len(port["ln_final.weight"])).reshape(-1, port.heads).T.ravel()
    port.weights("attn.in_proj_weight", lambda w: each_third(w, *[lambda part: part[order]] * 3))
    port.weights("attn.in_proj_bias", lambda b: each_third(b, *[lambda part: part[order]] * 3))
    port.weights("attn.out_proj.weight", lambda w: w[:, order])


def scale_scores(factor):
    """Scores times factor(K, H, D)."""

    def change(port):
        D = len(port["ln_final.weight"])
        port.replace("attn.scores", lambda at: at["attn.scores"] * factor(D // port.heads, port.heads, D))

    return change


def option(**changes):
    return lambda port: vars(port).update(changes)


def norm(**changes):
    return lambda port: port.norm.update(changes)


def weights(ending, change):
    return lambda port: port.weights(ending, change)


def replace(stage, function):
    return lambda port: port.replace(stage, function)


def all_of(*changes):
    def change(port):
        for each in changes:
            each(port)

    return change


# Which ports could make a mistake.


def quick(port):
    return port.activation == "quick_gelu"


def square(port):
    D, E = port["text_projection"].shape
    return D == E


def deeper_than(layers):
    return lambda port: port.layers > layers


def other_heads(count, but=()):
    """count(H) is another number of heads that divides the width, and none of those in but."""

    def fits(port):
        n, H = count(port.heads), port.heads
        others = {H, *(other(H) for other in but)}
        return n >= 1 and n not in others and len(port["ln_final.weight"]) % n == 0

    return fits


def full_vocabulary(port):
    """The ids of the end and the start are too large for 16-bit types, as in every released CLIP."""
    return len(port["token_embedding.weight"]) > 2**15


def double(H):
    return 2 * H


def half(H):
    return H // 2 if H % 2 == 0 else 0


def with_heads(count):
    def change(port):
        port.heads = count(port.heads)

    return change


NONE_KNOWN = "no public thread known"
CAUSAL = "add -inf to the scores above the diagonal, before the softmax; CLIP's text encoder is causal"
POOL = "pool at the end of text: the first position of the largest id, tokens.argmax(-1)"
PADDING = "pad with 0 after the end of text, as clip.tokenize does; a causal encoder then ignores it"
SPECIALS = "give the row <|startoftext|> (49406), the text, <|endoftext|> (49407), then padding"
POSITIONS = "add positional_embedding[t] to the token at position t, counting from 0"
HEAD_SPLIT = "reshape [B, L, D] to [B, L, H, K], then transpose to [B, H, L, K]; back in the opposite order"
QKV = "split in_proj_weight [3D, D] along its rows: q, then k, then v; inside each, head after head"
LINEAR = "a Linear weight is [out, in]: use x @ W.T, or transpose once while loading"
SCALE = "multiply q by K ** -0.5, K being the width of one head"
BIASES = "every Linear and LayerNorm of CLIP's text encoder has a bias: load and add all of them"
NORMS = "(x - mean) / sqrt(biased variance + 1e-5) * weight + bias, over the width"
PRE_NORM = "x = x + attn(ln_1(x)), then x = x + mlp(ln_2(x))"
PROJECTION = "text_projection is a bare parameter [width, embedding], used as x @ P, not as a Linear"
IN_ORDER = "run each block once, in the order of the number in its name, every one with its own weights"
QUICK = "use x * sigmoid(1.702 * x) for OpenAI's weights (erf GELU only where the config says so)"
END_OF_TEXT = "normalise at the very end only where cosine is wanted: encode_text returns x @ P as it is"

# An entry: id and summary; source and remedy; the change, which ports it fits, what it needs.
# fmt: off
CATALOGUE = (
    # Activation
    Fault("A1", "erf GELU where the model wants QuickGELU",
          "open_clip#771, #915; mindone#225; ailia-models#1810; sugar-crepe#7; clip.cpp#13", QUICK,
          option(activation="gelu"), quick),
    Fault("A2", "QuickGELU where the model wants erf GELU",
          "MetaCLIP#13; open_clip README on its -quickgelu configs",
          "use 0.5 * x * (1 + erf(x / sqrt(2))), as the checkpoint's config says",
          option(activation="quick_gelu"), lambda port: not quick(port)),
    Fault("A3", "tanh GELU",
          "tinygrad#16162; candle's Stable Diffusion clip.rs; ggml_gelu in clip.cpp",
          "use the activation of the checkpoint's config; the tanh form is neither erf GELU nor QuickGELU",
          replace("mlp.gelu", lambda at: gelu_tanh(at["mlp.c_fc"]))),
    Fault("A4", "QuickGELU with the constant 1.773",
          "mlx#744", "the constant is 1.702",
          replace("mlp.gelu", lambda at: at["mlp.c_fc"] * sigmoid(1.773 * at["mlp.c_fc"])), quick),
    Fault("A4-1.7", "QuickGELU with the constant 1.7",
          NONE_KNOWN, "the constant is 1.702",
          replace("mlp.gelu", lambda at: at["mlp.c_fc"] * sigmoid(1.7 * at["mlp.c_fc"])), quick),
    Fault("A5-silu", "SiLU: the 1.702 inside the sigmoid is missing",
          "rten#1421; ppl.kernel#41", "multiply x by 1.702 inside the sigmoid",
          replace("mlp.gelu", lambda at: at["mlp.c_fc"] * sigmoid(at["mlp.c_fc"]))),
    Fault("A5-relu", "ReLU in the MLP",
          "torch.nn.TransformerEncoderLayer's default", QUICK,
          replace("mlp.gelu", lambda at: at["mlp.c_fc"] * (at["mlp.c_fc"] > 0))),
    Fault("A5-none", "no activation in the MLP",
          NONE_KNOWN, QUICK,
          replace("mlp.gelu", lambda at: at["mlp.c_fc"])),
    # Mask
    Fault("M1", "no causal mask",
          "sglang#14364; AiDotNet#1299; candle's openclip/text_model.rs", CAUSAL,
          replace("attn.masked", lambda at: at["attn.scores"]), needs="padding"),
    Fault("M1-padding-only",
          "padding is masked but the future is not, as in BERT; or texts run one by one, unmasked",
          "the habit of encoder models; see CLIP#183", CAUSAL,
          lambda port: port.mask(lambda i, j, at: j <= port.tokens.argmax(axis=-1)[:, None, None, None])),
    Fault("M1-cropped", "no causal mask, and the batch cropped to its longest text",
          "candle's mobileclip example pads to the longest", CAUSAL,
          lambda port: port.mask(lambda i, j, at: j <= port.batch.argmax(axis=-1).max()),
          needs="padding"),
    Fault("M2", "the mask is transposed: positions see the future and not the past",
          NONE_KNOWN, CAUSAL,
          lambda port: port.mask(lambda i, j, at: j >= i), needs="padding"),
    Fault("M3", "the diagonal is masked too, with -inf: NaN from the first row on",
          NONE_KNOWN, "mask strictly above the diagonal: triu(1), not triu(0)",
          lambda port: port.mask(lambda i, j, at: j < i)),
    Fault("M3-finite", "the diagonal is masked too, with a large finite number",
          NONE_KNOWN, "mask strictly above the diagonal: triu(1), not triu(0)",
          lambda port: port.mask(lambda i, j, at: j < i, -1e4), needs="padding"),
    Fault("M3-late", "the mask starts one diagonal too late: each position sees its successor",
          NONE_KNOWN, "mask strictly above the diagonal: triu(1), not triu(2)",
          lambda port: port.mask(lambda i, j, at: j <= i + 1), needs="padding"),
    Fault("M4-minus-one", "a 0-or-1 mask is added: masked scores end 1 below the others, not at -inf",
          "bool against additive masks: keras-cv#2331; open_clip transformer.py:212", CAUSAL,
          lambda port: port.mask(lambda i, j, at: j <= i, -1), needs="padding"),
    Fault("M4-plus-one", "a True-is-masked mask is added: masked scores gain 1 where -inf was meant",
          "bool against additive masks: keras-cv#2331; open_clip transformer.py:212", CAUSAL,
          lambda port: port.mask(lambda i, j, at: j <= i, 1), needs="padding"),
    Fault("M4-zero", "scores are multiplied by the mask: masked scores are 0, not -inf",
          "keras-cv#2331", CAUSAL,
          replace("attn.masked", lambda at: np.tril(at["attn.scores"])), needs="padding"),
    Fault("M4-after",
          "the mask multiplies the weights after the softmax, so that they no longer sum to 1",
          "keras-cv#2331 on where the mask belongs", CAUSAL,
          replace("attn.weights", lambda at: np.tril(softmax(at["attn.scores"]))), needs="padding"),
    Fault("M4-inverted",
          "the mask's polarity is inverted, with -inf: the last position sees nothing, all NaN",
          "keras-cv#2331 on polarity", CAUSAL,
          lambda port: port.mask(lambda i, j, at: j > i), needs="padding"),
    Fault("M4-inverted-finite", "the mask's polarity is inverted: only the future is seen",
          "keras-cv#2331 on polarity", CAUSAL,
          lambda port: port.mask(lambda i, j, at: j > i, -1e4), needs="padding"),
    Fault(
        "M8",
        'id 0 is masked as padding, but 0 is also "!" inside a text',
        "follows from CLIP4Clip#97",
        "no padding mask is needed: the causal mask hides what comes after the end of text",
        lambda port: port.mask(lambda i, j, at: (j <= i) & (port.tokens != 0)[:, None, None, :]),
        lambda port: (
            port.batch * (np.arange(port.batch.shape[-1]) < port.batch.argmax(-1)[:, None]) == 0
        ).any(),
    ),
    # Pooling
    Fault("P1", "pooled at the first position: every text gets the same features",
          "open_clip#1151, #1154; Chinese-CLIP#92", POOL,
          pooled_at(lambda t: 0 * t.argmax(-1))),
    Fault("P2", "pooled at the last position of the row",
          "clip.cpp:1154", POOL,
          pooled_at(lambda t: 0 * t.argmax(-1) - 1), needs="padding"),
    Fault("P3", "pooled at the last position of the largest id, not the first",
          "Hugging Face and diffusers pad with 49407", POOL,
          pooled_at(lambda t: t.shape[-1] - 1 - t[:, ::-1].argmax(-1)), needs="padding"),
    Fault("P4", "pooled at the first id 2, the legacy eos_token_id, or at position 0 where there is none",
          "transformers#24773, #24777, #39821; diffusers#10754", POOL,
          pooled_at(lambda t: (t == 2).argmax(-1))),
    Fault("P7", "ids cast to float16 or bfloat16 before argmax: start and end round to one number",
          "ailia-models#1389; diffusers#2008", "keep ids in int32 or int64",
          pooled_at(lambda t: low_bits(t, "float16").argmax(-1)), full_vocabulary),
    Fault(
        "P8",
        "ids cast to int16: start and end turn negative, wrong rows are read and pooled",
        "instant-clip keeps ids in 16 bits",
        "keep ids in int32 or int64",
        lambda port: (
            pooled_at(lambda t: low_bits(t, np.int16).argmax(-1))(port),
            port.replace("token_embedding", lambda at: port.embed(low_bits(port.tokens, np.int16))),
        ),
        full_vocabulary,
        "padding",
    ),
    Fault("P8-pool", "ids cast to int16 before argmax: pooled at the largest ordinary id",
          "instant-clip keeps ids in 16 bits", "keep ids in int32 or int64",
          pooled_at(lambda t: low_bits(t, np.int16).argmax(-1)), full_vocabulary, "padding"),
    Fault("P9", "every row is pooled at the first row's end of text",
          "tinygrad clip.py:334; tinygrad#6292",
          "index rows and positions together: x[arange(B), tokens.argmax(-1)]",
          lambda port: port.replace("eot", lambda at: 0 * at["eot"] + port.batch[0].argmax()),
          needs="padding"),
    Fault("P10", "the end of text stands last, after the padding",
          "keras-hub#2018", PADDING,
          end_moved_last, needs="padding"),
    Fault(
        "P11",
        "texts that fill the row have lost their end of text, cut off with the overflow",
        "open_clip#130, #132; SLIP#18; ImageBind#82",
        "truncate to 76 ids, then put the end of text last",
        pooled_at(lambda t: np.where(t.argmax(-1) == t.shape[1] - 1, t[:, :-1].argmax(-1), t.argmax(-1))),
    ),
    Fault("P12-nonzero",
          'pooled at the last place of (ids != 0).sum(), which miscounts "!" and end padding',
          NONE_KNOWN, POOL,
          pooled_at(lambda t: (t != 0).sum(-1) - 1), needs="padding"),
    Fault("P12-before", "pooled one position before the end of text",
          NONE_KNOWN, POOL,
          pooled_at(lambda t: t.argmax(-1) - 1)),
    Fault("P12-after", "pooled one position after the end of text",
          NONE_KNOWN, POOL,
          pooled_at(lambda t: (t.argmax(-1) + 1).clip(max=t.shape[-1] - 1)), needs="padding"),
    Fault("P13", "mean over all positions, padding too",
          "asked for in CLIP#217", POOL,
          replace("pooled", lambda at: at["ln_final"].mean(axis=1)), needs="padding"),
    Fault(
        "P13-text",
        "mean over the positions up to the end of text",
        "sentence-transformers' habit",
        POOL,
        replace(
            "pooled",
            lambda at: np.stack(
                [x[: n + 1].mean(axis=0) for x, n in zip(at["ln_final"], at["eot"], strict=True)]
            ),
        ),
    ),
    Fault("P13-max", "maximum over all positions, padding too",
          NONE_KNOWN, POOL,
          replace("pooled", lambda at: at["ln_final"].max(axis=1)), needs="padding"),
    # Padding and special ids
    Fault("D1-end", "padded with the end of text (harmless by itself, but not with this)",
          "Hugging Face's tokenizer; diffusers#2201; ComfyUI#9849", PADDING,
          repad(lambda port: len(port["token_embedding.weight"]) - 1), needs="padding"),
    Fault("D1-zero", "padded with 0 (harmless by itself, but not with this)",
          "clip.tokenize; diffusers#4153", "pad as the model was trained",
          repad(lambda port: 0), needs="padding"),
    Fault("D2-start", "the start of text is id 0, as in the config's old bos_token_id",
          "configuration_clip.py; transformers#24773", SPECIALS,
          set_tokens(lambda t: np.concatenate([0 * t[:, :1], t[:, 1:]], axis=1))),
    Fault("D5-no-start", "no start of text: every token stands one position early",
          "classifier-free-guidance-pytorch#13", SPECIALS,
          set_tokens(lambda t: np.concatenate([t[:, 1:], 0 * t[:, :1]], axis=1))),
    Fault("D5-two-starts", "two starts of text: every token stands one position late",
          "a tokenizer that adds what its caller added already", SPECIALS,
          set_tokens(lambda t: np.concatenate([t[:, :1], t[:, :-1]], axis=1)), needs="padding"),
    Fault("D6-no-end", "no end of text: the largest id is then the start, and it is pooled",
          "classifier-free-guidance-pytorch#13; open_clip#1151", SPECIALS,
          set_tokens(lambda t: np.where(t == t.max(), 0, t))),
    Fault("D7-swapped", "start and end of text swapped", NONE_KNOWN, SPECIALS, set_tokens(swap_specials)),
    Fault("D8-left", "padding before the text",
          'padding_side="left", usual for generating models', PADDING,
          left_padded, needs="padding"),
    Fault("D9-shifted", "every id one too small, as from a vocabulary counted from 1",
          NONE_KNOWN,
          "build the vocabulary as OpenAI's simple_tokenizer does: <|endoftext|> must be 49407",
          set_tokens(lambda t: (t - 1).clip(0)), needs="padding"),
    # Embedding and positions
    Fault("E1", "no positional embedding",
          NONE_KNOWN, POSITIONS,
          replace("positional_embedding", lambda at: zero(at["positional_embedding"]))),
    Fault("E2", "positions counted from 1",
          "the offset of OPT and RoBERTa", POSITIONS,
          positions(lambda t, n: t + 1)),
    Fault("E2-two", "positions counted from 2",
          "the offset of OPT and RoBERTa", POSITIONS,
          positions(lambda t, n: t + 2)),
    Fault("E2-late", "positions one behind, the first one used twice",
          NONE_KNOWN, POSITIONS,
          positions(lambda t, n: t - 1)),
    Fault("E2-first", "the first position's embedding for all",
          "a position counter that never moves", POSITIONS,
          positions(lambda t, n: 0 * t)),
    Fault("E2-reversed", "positions counted from the end of the table",
          NONE_KNOWN, POSITIONS,
          positions(lambda t, n: n - 1 - t)),
    Fault("E3", "position 41 reads row 40: position_ids rounded in float16 or by merging",
          "stable-diffusion-webui#6728", "keep position_ids in int64: arange(77)",
          positions(lambda t, n: t - (t == 41)), lambda port: port.batch.argmax(-1).max() >= 41),
    Fault(
        "E5",
        "ids rounded to float16 before the lookup, out of range wrapping to row 0",
        "diffusers#2008",
        "keep ids in int32 or int64",
        lambda port: port.replace(
            "token_embedding", lambda at: port.embed(low_bits(port.tokens, np.float16))
        ),
        lambda port: len(port["token_embedding.weight"]) > 2048,
        "padding",
    ),
    Fault(
        "E5-clamped",
        "ids rounded to float16 before the lookup, out of range clamped to the last row",
        "diffusers#2008; JAX clamps",
        "keep ids in int32 or int64",
        lambda port: port.replace(
            "token_embedding",
            lambda at: port.embed(
                low_bits(port.tokens, np.float16).clip(max=len(port["token_embedding.weight"]) - 1)
            ),
        ),
        full_vocabulary,
        "padding",
    ),
    Fault(
        "E5-bfloat16",
        "ids rounded to bfloat16 before the lookup",
        "diffusers#2008",
        "keep ids in int32 or int64",
        lambda port: port.replace(
            "token_embedding", lambda at: port.embed(low_bits(port.tokens, "bfloat16"))
        ),
        lambda port: len(port["token_embedding.weight"]) > 256,
        "padding",
    ),
    Fault("E6-twice", "positional embedding added twice",
          NONE_KNOWN, POSITIONS,
          replace("positional_embedding", lambda at: 2 * at["positional_embedding"])),
    Fault(
        "E7-scaled",
        "token embedding multiplied by the root of the width",
        "the original Transformer's habit",
        "CLIP adds the embedding as it is",
        replace("token_embedding", lambda at: at["token_embedding"] * at["token_embedding"].shape[-1] ** 0.5),
    ),
    Fault("E8-sinusoids", "sinusoidal positions in place of the learnt ones",
          "the original Transformer's habit", POSITIONS,
          sinusoids),
    # Attention
    *(
        Fault(
            f"T1-{order}",
            f"the packed projection is read as {', '.join(order)}, not q, k, v",
            "litert-torch#30 has the class of bug",
            QKV,
            all_of(
                weights("attn.in_proj_weight", lambda w, order=order: thirds(w, order)),
                weights("attn.in_proj_bias", lambda b, order=order: thirds(b, order)),
            ),
        )
        for order in ("kqv", "vkq", "qvk", "kvq", "vqk")
    ),
    *(
        Fault(
            f"T1-{axes}",
            f"the packed projection is cut as {meaning}",
            "the fused layouts of GPT-NeoX and others",
            QKV,
            lambda port, axes=axes: (
                port.weights("attn.in_proj_weight", lambda w: regroup(w, port.heads, axes)),
                port.weights("attn.in_proj_bias", lambda b: regroup(b, port.heads, axes)),
            ),
            lambda port, axes=axes: axes[0] == "3" or port.heads > 1,
        )
        for axes, meaning in (
            ("h3k", "[H, 3, K]: q, k, v interleaved head by head"),
            ("hk3", "[H, K, 3]: q, k, v interleaved channel by channel"),
        )
    ),
    Fault("T2-split", "heads split by reshape alone, [B, L, D] to [B, H, L, K], and joined properly",
          "NATTEN#145 has the class of bug", HEAD_SPLIT,
          all_of(*(replace(f"attn.{n}", lambda at, n=n: straight(at[f"attn.{n}"])) for n in "qkv")),
          lambda port: port.heads > 1, "padding"),
    Fault(
        "T2-join",
        "heads joined by reshape alone, [B, H, L, K] to [B, L, D]",
        "NATTEN#145 has the class of bug",
        HEAD_SPLIT,
        replace(
            "attn.context", lambda at: (at["attn.weights"] @ at["attn.v"]).reshape(at["attn.context"].shape)
        ),
        lambda port: port.heads > 1,
        "padding",
    ),
    Fault(
        "T2-both",
        "heads split and joined by reshape alone",
        "NATTEN#145 has the class of bug",
        HEAD_SPLIT,
        all_of(
            *(replace(f"attn.{n}", lambda at, n=n: straight(at[f"attn.{n}"])) for n in "qkv"),
            replace(
                "attn.context",
                lambda at: (at["attn.weights"] @ at["attn.v"]).reshape(at["attn.context"].shape),
            ),
        ),
        lambda port: port.heads > 1,
        "padding",
    ),
    Fault("T2-major", "channels cut as [K, H] where the checkpoint means [H, K], split and joined alike",
          "the head permutations of llama.cpp#4010", HEAD_SPLIT,
          head_major, lambda port: port.heads > 1),
    Fault("T3-double", "twice as many heads",
          "width // 64 is wrong for ViTamin-XL", "take the heads from the config",
          with_heads(double), other_heads(double)),
    Fault("T3-half", "half as many heads",
          "width // 64 is wrong for ViTamin-XL", "take the heads from the config",
          with_heads(half), other_heads(half)),
    Fault("T3-one", "a single head",
          NONE_KNOWN, "take the heads from the config; OpenAI's models have width // 64",
          with_heads(lambda H: 1), other_heads(lambda H: 1, [half])),
    Fault("T3-8", "8 heads",
          "8 is ViT-B/32's number", "take the heads from the config, or width // 64",
          with_heads(lambda H: 8), other_heads(lambda H: 8, [half, double])),
    Fault("T3-12", "12 heads",
          "12 is ViT-L/14's number", "take the heads from the config, or width // 64",
          with_heads(lambda H: 12), other_heads(lambda H: 12, [half, double])),
    Fault("T4", "scores scaled by 1 / sqrt(number of heads)",
          "tt-metal#56789", SCALE,
          scale_scores(lambda K, H, D: (K / H) ** 0.5)),
    Fault("T5-no-scale", "scores not scaled", NONE_KNOWN, SCALE, scale_scores(lambda K, H, D: K**0.5)),
    Fault("T5-twice", "scores scaled twice, by 1 / K",
          "a scale before a fused attention that scales too", SCALE,
          scale_scores(lambda K, H, D: K**-0.5)),
    Fault("T5-width", "scores scaled by 1 / sqrt(width), not 1 / sqrt(head width)",
          NONE_KNOWN, SCALE,
          scale_scores(lambda K, H, D: (K / D) ** 0.5), lambda port: port.heads > 1),
    Fault("T5-multiplied", "scores multiplied by sqrt(K), not divided",
          NONE_KNOWN, SCALE,
          scale_scores(lambda K, H, D: K)),
    Fault(
        "T5-bias",
        "the scale is folded into q's weight but not into its bias",
        NONE_KNOWN,
        SCALE,
        lambda port: port.weights(
            "attn.in_proj_bias",
            lambda b: each_third(b, lambda q: q * (len(q) // port.heads) ** 0.5, same, same),
        ),
    ),
    Fault("T6-qkv", "the weights of q, k and v are not transposed",
          "square matrices fit either way", LINEAR,
          weights("attn.in_proj_weight", lambda w: each_third(w, transpose, transpose, transpose))),
    Fault("T6-out", "the weight of the output projection is not transposed",
          "square matrices fit either way", LINEAR,
          weights("attn.out_proj.weight", transpose)),
    Fault(
        "T6-square",
        "no square weight is transposed: q, k, v and the output projection",
        "square matrices fit either way",
        LINEAR,
        all_of(
            weights("attn.in_proj_weight", lambda w: each_third(w, transpose, transpose, transpose)),
            weights("attn.out_proj.weight", transpose),
        ),
    ),
    Fault("T6-in-order", "the packed projection is reshaped to [D, 3D], not transposed",
          "the [in, out] layout of GPT-2: transformers#311; AutoGPTQ#139", LINEAR,
          weights("attn.in_proj_weight", other_order)),
    Fault("T6-mlp-order", "the MLP's weights are reshaped to [in, out], not transposed",
          "the [in, out] layout of GPT-2: transformers#311; nntile#370", LINEAR,
          all_of(weights("mlp.c_fc.weight", other_order), weights("mlp.c_proj.weight", other_order))),
    Fault(
        "T6-all-order",
        "every weight of the blocks is reshaped to [in, out], not transposed",
        "the [in, out] layout of GPT-2: transformers#311; AutoGPTQ#139",
        LINEAR,
        all_of(
            *(
                weights(name, other_order)
                for name in (
                    "attn.in_proj_weight",
                    "attn.out_proj.weight",
                    "mlp.c_fc.weight",
                    "mlp.c_proj.weight",
                )
            )
        ),
    ),
    Fault("T7-qkv", "the bias of q, k and v is dropped",
          "mlx's Stable Diffusion clip.py:37 adds it by hand", BIASES,
          weights("attn.in_proj_bias", zero)),
    Fault("T7-q", "q's bias is dropped",
          "mlx's Stable Diffusion clip.py:37 adds it by hand", BIASES,
          weights("attn.in_proj_bias", lambda b: each_third(b, zero, same, same))),
    Fault("T7-v", "v's bias is dropped",
          "mlx's Stable Diffusion clip.py:37 adds it by hand", BIASES,
          weights("attn.in_proj_bias", lambda b: each_third(b, same, same, zero))),
    Fault("T7-out", "the bias of the output projection is dropped",
          NONE_KNOWN, BIASES,
          weights("attn.out_proj.bias", zero)),
    Fault("T7-attention", "attention has no biases at all",
          "bias=False by habit", BIASES,
          all_of(weights("attn.in_proj_bias", zero), weights("attn.out_proj.bias", zero))),
    Fault("T7-fc", "the bias of the MLP's first layer is dropped",
          NONE_KNOWN, BIASES,
          weights("mlp.c_fc.bias", zero)),
    Fault("T7-proj", "the bias of the MLP's second layer is dropped",
          NONE_KNOWN, BIASES,
          weights("mlp.c_proj.bias", zero)),
    Fault("T7-mlp", "the MLP has no biases",
          "bias=False by habit", BIASES,
          all_of(weights("mlp.c_fc.bias", zero), weights("mlp.c_proj.bias", zero))),
    Fault("T7-norms", "the layer norms have no biases",
          "LayerNorm(bias=False), as in nanoGPT", BIASES,
          all_of(*(weights(f"{name}.bias", zero) for name in ("ln_1", "ln_2", "ln_final")))),
    Fault("T7-all", "no biases at all", "bias=False by habit", BIASES, weights("bias", zero)),
    Fault("T7-swapped", "the biases of the output projection and of the MLP's second layer are swapped",
          "they have one shape", BIASES,
          swapped_biases),
    Fault("T8", "softmax over the queries, not the keys",
          NONE_KNOWN, "softmax over the last axis, the keys",
          replace("attn.weights", lambda at: softmax(at["attn.masked"].swapaxes(-1, -2)).swapaxes(-1, -2)),
          needs="padding"),
    Fault(
        "T8-heads",
        "softmax over the heads",
        "softmax(dim=1)",
        "softmax over the last axis, the keys",
        replace(
            "attn.weights",
            lambda at: (
                np.nan_to_num(softmax(at["attn.scores"].swapaxes(-1, 1)).swapaxes(-1, 1))
                * np.tri(at["attn.scores"].shape[-1], dtype=at["attn.scores"].dtype)
            ),
        ),
        lambda port: port.heads > 1,
    ),
    Fault("T9", "attention over the batch: [L, B, D] and [B, L, D] taken for each other",
          "open_clip#910, #937, #1037; MaskAdapter#5",
          "pass batch_first=True, or permute to [L, B, D] and back",
          replace("attn.context", over_the_batch), lambda port: len(port.batch) > 1, "batch"),
    Fault("T12", "the output projection of attention is missing",
          NONE_KNOWN, "multiply the joined heads by out_proj before adding them to the stream",
          replace("attn", lambda at: at["attn.context"])),
    Fault("T14", "softmax in powers of 2 without the factor log2(e)",
          "kernels with exp2: GStar-Assignment-1#6", "multiply the scores by log2(e) before exp2",
          scale_scores(lambda K, H, D: math.log(2))),
    # Norms, residuals, layers
    Fault("N1", "layer norm with eps 1e-6", "mindone#225, #219", NORMS, norm(eps=1e-6)),
    Fault("N1-1e-12", "layer norm with eps 1e-12, or none", "BERT's eps", NORMS, norm(eps=1e-12)),
    Fault("N1-1e-7", "layer norm with eps 1e-7", "mindone#225", NORMS, norm(eps=1e-7)),
    Fault("N1-1e-3", "layer norm with eps 1e-3", "Keras's default", NORMS, norm(eps=1e-3)),
    Fault("N1-outside", "layer norm with eps added to the deviation, not to the variance",
          "BERT-pytorch#30; annotated-transformer#119", NORMS,
          norm(outside=True)),
    Fault("N2", "layer norm with the unbiased variance (ddof=1)",
          "lbann#2024; annotated-transformer#119", NORMS,
          norm(ddof=1)),
    Fault("N2-std", "layer norm as (x - mean) / (x.std() + eps): unbiased, eps outside",
          "annotated-transformer#119; BERT-pytorch#30", NORMS,
          norm(ddof=1, outside=True)),
    Fault("N2-rms", "RMS norm: the mean is not taken off",
          "the norm of Llama and T5", NORMS,
          norm(centre=False)),
    Fault("N2-plus-one", "layer norms multiply by 1 + weight",
          "Gemma's convention: Liger-Kernel#74", NORMS,
          all_of(*(weights(f"{name}.weight", lambda w: 1 + w) for name in ("ln_1", "ln_2", "ln_final")))),
    Fault("N2-plain", "no layer norm has a weight or bias",
          "elementwise_affine=False, or weights left at their start", NORMS,
          lambda port: [plain_norm(port, name) for name in ("ln_1", "ln_2", "ln_final")]),
    Fault("N2-plain-final", "ln_final has its starting weight 1 and bias 0",
          "a key missed by load_state_dict(strict=False)",
          "check that every tensor of the checkpoint is used once",
          lambda port: plain_norm(port, "ln_final")),
    Fault("N4-post", "norms after the residual sums",
          "the original Transformer; torch's norm_first=False", PRE_NORM,
          post_norm),
    Fault(
        "N4-stream",
        "the residual is taken from the normed stream: ln(x) + attn(ln(x))",
        "faster-trajectory-transformer#3; SHI-Labs Compact-Transformers#25",
        PRE_NORM,
        all_of(
            replace("residual", lambda at: at["ln_1"] + at["attn"]),
            replace("block", lambda at: at["ln_2"] + at["mlp"]),
        ),
    ),
    Fault("N4-swapped", "ln_1 and ln_2 swapped", "their shapes are the same", PRE_NORM, swapped_norms),
    Fault("N4-parallel", "attention and MLP side by side, both from the block's input",
          "GPT-J's form", PRE_NORM,
          lambda port: port.replace("ln_2", lambda at: port.layer_norm("ln_2", at["x"]))),
    Fault("N4-parallel-shared", "attention and MLP side by side, both from ln_1",
          "GPT-J's form", PRE_NORM,
          replace("ln_2", lambda at: at["ln_1"])),
    Fault("N4-no-ln_1", "ln_1 skipped", NONE_KNOWN, PRE_NORM, replace("ln_1", lambda at: at["x"])),
    Fault("N4-no-ln_2", "ln_2 skipped", NONE_KNOWN, PRE_NORM, replace("ln_2", lambda at: at["residual"])),
    Fault("N4-no-attention-residual", "attention replaces the stream where it should be added",
          NONE_KNOWN, PRE_NORM,
          replace("residual", lambda at: at["attn"])),
    Fault("N4-no-mlp-residual", "the MLP replaces the stream where it should be added",
          NONE_KNOWN, PRE_NORM,
          replace("block", lambda at: at["mlp"])),
    Fault("N5", "ln_final skipped",
          "hidden_states[-1] of Hugging Face is not normed; sdkit#56; diffusers#1721",
          "apply ln_final to the last block's output",
          replace("ln_final", lambda at: at["x"])),
    Fault("N5-twice", "ln_final applied twice",
          "last_hidden_state of Hugging Face is normed already", "apply ln_final once",
          lambda port: port.replace("ln_final", lambda at: port.layer_norm("ln_final", at["ln_final"]))),
    Fault("N6-after-projection", "ln_final after the projection",
          "mistaken for the harmless norm after pooling", "apply ln_final before text_projection",
          norm_after_projection, square),
    Fault("N7", "the last block is skipped (penultimate layer, clip skip)",
          "diffusers#1863, #1721; candle's v2_1 config", IN_ORDER,
          lambda port: port.blocks(range(port.layers - 1))),
    Fault("N7-first", "the first block is skipped",
          "hidden_states[0] is the embedding: off by one", IN_ORDER,
          lambda port: port.blocks(range(1, port.layers)), deeper_than(1)),
    Fault("N7-last-twice", "the last block runs twice",
          NONE_KNOWN, IN_ORDER,
          lambda port: port.blocks([*range(port.layers), port.layers - 1])),
    Fault("N12", "blocks in lexicographic order: 0, 1, 10, 11, 2",
          "optimum-intel#984; sorted(state_dict)", IN_ORDER,
          lambda port: port.blocks(sorted(range(port.layers), key=str)), deeper_than(10)),
    Fault("N12-reversed", "blocks in reverse order",
          NONE_KNOWN, IN_ORDER,
          lambda port: port.blocks(range(port.layers)[::-1]), deeper_than(1)),
    Fault("N15-first", "every block has the first block's weights",
          "[block] * layers; a weight shared by mistake", IN_ORDER,
          lambda port: port.blocks([0] * port.layers), deeper_than(1)),
    Fault("N15-last", "every block has the last block's weights",
          "a closure that binds its loop variable late", IN_ORDER,
          lambda port: port.blocks([port.layers - 1] * port.layers), deeper_than(1)),
    # Projection and output
    Fault("N8", "text_projection transposed, as if it were a Linear weight",
          "mindone#399; generative-models#111; stable-diffusion.cpp#397; ComfyUI#5260", PROJECTION,
          weights("text_projection", transpose), square),
    Fault("N8-order", "text_projection reshaped, not transposed",
          NONE_KNOWN, PROJECTION,
          weights("text_projection", other_order), lambda port: not square(port)),
    Fault(
        "N8-twice",
        "text_projection applied twice",
        "GLIGEN#92 has its cousin, transposing twice",
        PROJECTION,
        lambda port: port.replace("text_features", lambda at: at["text_features"] @ port["text_projection"]),
        square,
    ),
    Fault("N8-missing", "no text_projection: these are the pooled states (Hugging Face's pooler_output)",
          "transformers#18962, #25254; flux#64; refiners#189; stable-diffusion.cpp#397", PROJECTION,
          replace("text_features", lambda at: at["pooled"])),
    Fault("N10", "normalised to length 1",
          "open_clip#68; CLIP_benchmark#90; nanoclip returns them so", END_OF_TEXT,
          replace("text_features", lambda at: unit(at["text_features"]))),
    Fault("N10-before", "normalised before the projection",
          NONE_KNOWN, END_OF_TEXT,
          replace("pooled", lambda at: unit(at["pooled"]))),
    Fault("N10-axis", "normalised over the batch, not over the embedding",
          "SoundCLR#4; lerobot#38", "normalise over the last axis",
          replace("text_features", lambda at: unit(at["text_features"], 0)),
          lambda port: len(port.batch) > 1, "batch"),
    Fault("N16-broadcast", "every row is the first row's",
          "tinygrad#6292 has the class of bug", "check how one row is broadcast over the batch",
          replace("text_features", lambda at: at["text_features"][:1] + 0 * at["text_features"]),
          lambda port: len(port.batch) > 1, "batch"),
)
# fmt: on

# Faults that diagnosis.py finds by fitting the port's own features, so that they come with any other.
SCALED = Fault(
    "N11",
    "every feature is multiplied by {factor}",
    "M3D#52 and open_clip#541, on the logit scale",
    "return x @ P as it is; logit_scale.exp() is for logits",
    None,
)
SHUFFLED = Fault(
    "R1",
    "the rows come in another order than the texts",
    "dsmil-wsi#19; diffusers#14430",
    "keep texts and features in one order (a sampler that shuffles, a set, sorting by length)",
    None,
)
NORMALISED = next(fault for fault in CATALOGUE if fault.id == "N10")
