"""CLIP's text encoder, as array operations on the checkpoint's own parameters.

The architecture is that of "Learning Transferable Visual Models From Natural Language
Supervision" (Radford et al., 2021, section 2.4) as openai/CLIP's clip/model.py builds it.

Axes:  B batch   L positions   D width   H heads   K = D / H head width
       F = 4 D MLP width   E embedding   V vocabulary

Parameters keep OpenAI's names and orientation: a linear layer's weight is [out, in] and is
used as x @ W.T; text_projection alone is [in, out] and is used as x @ P.

The same lines run on NumPy and on CuPy: an array's own module does the work. float16 is how
numbers are kept between stages; inside a stage they are float32 and are rounded once at its end.
What attention and MLP add to the residual stream is rounded only with the sum, and stays float32
till then. On the GPU minclip.gpu does float16's steps, in the same way, on the tensor cores.
"""

import functools
import math
import sys
import warnings

import numpy as np

EPS = 1e-5  # torch.nn.LayerNorm's default, which OpenAI keeps
FEW = 128  # rows, of one or two texts


def encode_text(params, tokens, *, tap=None):
    """Turn token ids into CLIP text features: CLIP.encode_text of openai/CLIP.

    params   mapping from OpenAI's parameter names to arrays: a `minclip.Params`, or a plain dict,
             which then means OpenAI's own choices (QuickGELU, width // 64 heads).
    tokens   integers [..., L], L at most the context length, as `minclip.tokenize` gives them.
    tap      called as tap(name, array) at every stage, in the order of computation; what it
             returns is what goes on, so it can record, replace or ablate. See `minclip.trace`.

    Returns features [..., E], not normalised, in the dtype and on the device of params.
    Without a text_projection a tap gets the stages up to "pooled", and that is returned.
    Raises ValueError where tokens or params do not fit. A row without the end-of-text id, which is
    the last of the vocabulary, warns and is pooled at its largest id, as the reference does.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize(["a cat", "two dogs"])
    >>> features = encode_text(params, tokens)
    >>> features.shape, str(features.dtype)
    ((2, 128), 'float32')
    """
    layers, heads, activation = architecture(params)
    tokens, leading = check_tokens(params, tokens)
    if tap is None:
        if "text_projection" not in params:
            raise ValueError("params has no 'text_projection': minclip.trace gives its stages up to 'pooled'")
        tap = pass_on
        tokens = trim(tokens)  # exact: a position never sees a later one
    P = params.get("text_projection")
    like = params["ln_final.weight"] if P is None else P
    xp, dtype = array_module(like), like.dtype
    tokens = xp.asarray(tokens)
    B, L = tokens.shape

    x = params["token_embedding.weight"][tokens].astype(dtype, copy=False)  # (B, L, D)
    x = tap("token_embedding", x)
    positions = params["positional_embedding"][:L].astype(dtype)  # (L, D)
    x = tap("embedding", x + tap("positional_embedding", positions))  # (B, L, D)
    # -inf above the diagonal. Padding needs no mask: it comes after the end of text.
    mask = xp.triu(xp.full((L, L), -math.inf, dtype=dtype), 1)  # (L, L)
    for i in range(layers):
        x = residual_block(x, params, f"transformer.resblocks.{i}", heads, activation, mask, tap)  # (B, L, D)
    x = tap("ln_final", layer_norm(x, *weight_and_bias(params, "ln_final")))  # (B, L, D)
    # The end-of-text id is the largest there is, so argmax finds it, and of several the first.
    eot = tap("eot", tokens.argmax(axis=-1))  # (B,)
    pooled = tap("pooled", x[xp.arange(B), eot])  # (B, D)
    if P is None:  # there is no more to trace
        return pooled.reshape(*leading, pooled.shape[-1])
    features = tap("text_features", matmul(pooled, P))  # (B, E)
    return features.reshape(*leading, features.shape[-1])


def residual_block(x, params, name, heads, activation, mask, tap):
    """Add to the stream x what attention, then what the MLP, makes of its layer norm."""
    h = tap(f"{name}.ln_1", layer_norm(x, *weight_and_bias(params, f"{name}.ln_1")))  # (B, L, D)
    x = tap(f"{name}.residual", add(x, attention(h, params, f"{name}.attn", heads, mask, tap)))  # (B, L, D)
    h = tap(f"{name}.ln_2", layer_norm(x, *weight_and_bias(params, f"{name}.ln_2")))  # (B, L, D)
    return tap(name, add(x, mlp(h, params, f"{name}.mlp", activation, tap)))


def attention(x, params, name, heads, mask, tap):
    """Masked multi-head self-attention: each position gathers from itself and earlier ones."""
    B, L, D = x.shape
    K = D // heads
    qkv = linear(x, params[f"{name}.in_proj_weight"], params[f"{name}.in_proj_bias"])  # (B, L, 3D)
    q, k, v = qkv.reshape(B, L, 3, heads, K).transpose(2, 0, 3, 1, 4)  # (B, H, L, K)
    q, k, v = tap(f"{name}.q", q), tap(f"{name}.k", k), tap(f"{name}.v", v)  # (B, H, L, K)
    # Scaling q and not the product: in float16 the unscaled product can overflow.
    scores = tap(f"{name}.scores", matmul(q * K**-0.5, k.swapaxes(-1, -2)))  # (B, H, L, L)
    masked = tap(f"{name}.masked", scores + mask)  # (B, H, L, L)
    weights = tap(f"{name}.weights", softmax(masked))  # (B, H, L, L)
    context = matmul(weights, v)  # (B, H, L, K)
    context = tap(f"{name}.context", context.transpose(0, 2, 1, 3).reshape(B, L, D))  # (B, L, D)
    return tap(name, wide_linear(context, *weight_and_bias(params, f"{name}.out_proj")))


def mlp(x, params, name, activation, tap):
    """Each position by itself: out to F, a soft gate, back to D."""
    h = tap(f"{name}.c_fc", linear(x, *weight_and_bias(params, f"{name}.c_fc")))  # (B, L, F)
    h = tap(f"{name}.gelu", ACTIVATIONS[activation](h))  # (B, L, F)
    return tap(name, wide_linear(h, *weight_and_bias(params, f"{name}.c_proj")))


def quick_on_gpu(step):
    """The step; for float16 arrays on the GPU, minclip.gpu's step of the same name and meaning."""

    @functools.wraps(step)
    def dispatch(x, *others):
        if isinstance(x, np.ndarray) or x.dtype != np.float16:
            return step(x, *others)
        from minclip import gpu

        return getattr(gpu, step.__name__)(x, *others)

    return dispatch


@quick_on_gpu
def layer_norm(x, weight, bias):
    """Zero mean and unit (biased) variance over the last axis, then weight and bias."""
    wide = widen(x)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return (centred / (variance + EPS) ** 0.5 * weight + bias).astype(x.dtype, copy=False)


@quick_on_gpu
def linear(x, weight, bias):
    """x @ weight.T + bias in the dtype of x."""
    return wide_linear(x, weight, bias).astype(x.dtype, copy=False)


@quick_on_gpu
def wide_linear(x, weight, bias):
    """x @ weight.T + bias, of float16 in float32. One product of two matrices is quicker than a stack."""
    rows, weight = widen(x).reshape(-1, x.shape[-1]), widen(weight)
    # Of a few rows BLAS makes the same product more quickly when it is turned over.
    rows = (rows @ weight.T if len(rows) > FEW else (weight @ rows.T).T) + bias
    return rows.reshape(*x.shape[:-1], weight.shape[0])


@quick_on_gpu
def add(x, change):
    """The stream x and what is added to it, rounded once."""
    return (x + change).astype(x.dtype, copy=False)


@quick_on_gpu
def matmul(a, b):
    """a @ b in the dtype of a."""
    return (widen(a) @ widen(b)).astype(a.dtype, copy=False)


@quick_on_gpu
def softmax(x):
    """Positive and of sum 1 over the last axis. The maximum is taken off first, so exp never overflows."""
    wide = widen(x)
    e = array_module(x).exp(wide - wide.max(axis=-1, keepdims=True))
    return (e / e.sum(axis=-1, keepdims=True)).astype(x.dtype, copy=False)


@quick_on_gpu
def quick_gelu(x):
    """x * sigmoid(1.702 x): the approximation of the GELU that OpenAI trained CLIP with."""
    with np.errstate(over="ignore"):  # exp may reach inf; x / inf is the right answer, 0
        return (x / (1 + array_module(x).exp(-1.702 * widen(x)))).astype(x.dtype, copy=False)


@quick_on_gpu
def gelu(x):
    """x * Phi(x), Phi the normal distribution: the exact (erf) GELU of most OpenCLIP models."""
    wide = widen(x)
    size = abs(wide)
    return ((wide + size) / 2 - size * normal_tail(size)).astype(x.dtype, copy=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def normal_tail(x):
    """1 - Phi(x) for x >= 0, to 5e-14, since NumPy has no erf.

    1 - Phi(x) = erfc(y) / 2 with y = x / sqrt(2). (1 + 2 y) exp(y^2) erfc(y) is so smooth in
    t = (y - 3) / (y + 3) that a polynomial follows it from 0 to infinity (Shepherd and Laframboise,
    Mathematics of Computation 36, 1981). Ours interpolates it at 19 Chebyshev points.
    """
    y = x * 0.5**0.5
    t = (y - 3) / (y + 3)
    p = 0
    for coefficient in reversed(TAIL):
        p = p * t + coefficient
    return 0.5 * array_module(x).exp(-y * y) * p / (1 + 2 * y)


# fmt: off
TAIL = (
    1.2530080582697296, -0.1356211061208497, -0.047562294352507764, 0.12964515847824745,
    -0.1192736634721992, 0.0683080313220015, -0.023770513904139614, 0.0025293596278562493,
    0.0018886820608398581, -0.0007796903107536676, -0.00010512258573368832, 0.0001247281353066936,
    4.8496923036467334e-06, -1.950471307214092e-05, -5.650045317455558e-07, 2.8869709884584873e-06,
    1.8268338386983095e-07, -2.798421357795291e-07, -2.983942535318685e-08,
)
# fmt: on


def normalize(features):
    """Divide each row of features [..., E] by its length; a zero row stays zero. Same shape and dtype.

    >>> normalize(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    if not hasattr(features, "dtype") or features.dtype.kind != "f":
        raise ValueError("features must be a floating-point array, such as encode_text returns")
    wide = widen(features)
    # Dividing by the largest entry first keeps the squares from overflowing or vanishing.
    largest = abs(wide).max(axis=-1, keepdims=True)
    wide = wide / (largest + (largest == 0))
    length = (wide * wide).sum(axis=-1, keepdims=True) ** 0.5
    return (wide / (length + (length == 0))).astype(features.dtype, copy=False)


def architecture(params):
    """(layers, heads, activation), from names and shapes, from a Params, or by OpenAI's habit."""
    for name in ("token_embedding.weight", "positional_embedding", "ln_final.weight"):
        if name not in params:
            raise ValueError(f"params has no {name!r}: give another dialect to minclip.from_state_dict first")
    for array in (params["ln_final.weight"], params.get("text_projection", params["ln_final.weight"])):
        if hasattr(array, "astype") and array.dtype.kind == "f":
            continue
        kind = f"{type(array).__module__}.{type(array).__name__}"
        raise ValueError(f"params must hold float arrays, not {kind}: minclip.from_state_dict converts")
    blocks = [name for name in params if name.startswith("transformer.resblocks.")]
    layers = sum(name.endswith(".ln_1.weight") for name in blocks)
    width = params["ln_final.weight"].shape[0]
    heads = getattr(params, "heads", None) or width // 64
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide width {width}: give heads= to minclip.from_state_dict")
    return layers, heads, getattr(params, "activation", "quick_gelu")


def check_tokens(params, tokens):
    """tokens as a NumPy array [B, L] of ids that can be looked up, and the leading shape they came in.

    On the host, for either device: for an id out of range CuPy reads some other row, and says nothing.
    """
    tokens = tokens.get() if hasattr(tokens, "get") else np.asarray(tokens)
    V, context = params["token_embedding.weight"].shape[0], params["positional_embedding"].shape[0]
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers, such as minclip.tokenize returns, not {tokens.dtype}")
    if tokens.ndim == 0 or not 1 <= tokens.shape[-1] <= context:
        shape = list(tokens.shape)
        raise ValueError(f"tokens must be [..., L], L from 1 to the context length {context}, not {shape}")
    largest = tokens.max(axis=-1, initial=0)
    if tokens.min(initial=0) < 0 or largest.max(initial=0) >= V:
        at = tuple(map(int, np.argwhere((tokens < 0) | (tokens >= V))[0]))
        raise ValueError(f"token id {tokens[at]} at {list(at)} is outside the vocabulary, 0 to {V - 1}")
    leading = tokens.shape[:-1]
    tokens = tokens.reshape(math.prod(leading), tokens.shape[-1])
    unended = (largest != V - 1).ravel()
    if unended.any():
        warnings.warn(
            f"{unended.sum()} of {len(tokens)} rows, first row {unended.argmax()}, have no end-of-text id "
            f"({V - 1}): each is pooled at its largest id",
            stacklevel=3,
        )
    return tokens, leading


def trim(tokens):
    """tokens [B, L] on the host without the columns after the last row's end of text."""
    return tokens[:, : 1 + tokens.argmax(axis=-1).max(initial=0)]


def weight_and_bias(params, name):
    return params[f"{name}.weight"], params[f"{name}.bias"]


def widen(x):
    """float16 as float32; any other dtype as it is."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def array_module(x):
    """numpy, or cupy for an array on the GPU."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


def pass_on(name, array):
    """The tap that leaves everything as it is."""
    return array
