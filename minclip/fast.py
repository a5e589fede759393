"""The text features of a whole corpus, with no work done twice.

Attention is causal: what the encoder makes of a position depends on the ids up to it and on none
after. So texts that begin alike share every activation of their common beginning, and a corpus is
a tree. Its nodes are the beginnings that occur; a node's parent is the beginning shorter by one id:

    <start> ─ a ─ photo ─ of ─┬─ a ─┬─ cat ─ <end>
                              │     └─ dog ─ <end>         13 nodes for 21 positions
                              └─ two ─ cats ─ <end>

All but attention works on each node by itself, so the nodes are simply the rows of a matrix [N, D].
For attention, sorted texts put the nodes in preorder: a node's ancestors come before it and all that
descends from it comes right after. So whatever one of TWIG nodes in a row attends to is either among
them or above the first of them: a small dense attention, and a mask that knows who descends from whom.

What is done to every node alike is moved into the parameters once (`fold`), and the last layer is
computed only where a text ends. Exact but for rounding; `minclip.encode_text` is the reference.

Axes: those of minclip.model, and  N nodes   T texts   G twigs   M = TWIG nodes of a twig   W its keys
"""

import math
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

from minclip.model import ACTIVATIONS, EPS, architecture, array_module, check_tokens, trim, widen

CHUNK = 2048  # nodes encoded at once: enough for BLAS at its best, few enough for little memory
TWIG = 16  # nodes in a row that share their keys
TWIGS = 8  # twigs attended at once
ROWS = 16  # rows of an element-wise step, few enough to stay in the cache from one line to the next

Corpus = namedtuple("Corpus", "rows lengths shared order group")
Tree = namedtuple("Tree", "ids positions ends twigs")
Twigs = namedtuple("Twigs", "nodes keys mask")
Block = namedtuple("Block", "q q_bias kv out out_bias c_fc c_fc_bias c_proj c_proj_bias")


def encode_text(params, tokens, *, progress=False):
    """`minclip.encode_text` for a corpus of any size: the same features, to rounding.

    params and tokens as there. Chunks of the corpus are computed side by side, on as many threads as
    BLAS may use, and BLAS keeps to one thread meanwhile. Beside params, tokens and features this takes
    one more copy of the blocks' parameters and the working memory of one chunk a thread. float16 is
    computed in float32. progress=True shows a bar.

    On the GPU it is minclip.fast_gpu that computes, some 0.5 GB of nodes at a time (fast_gpu.NODES).

    Returns features [..., E], not normalised, in the dtype and on the device of params. Raises and
    warns as the reference.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize([f"{n} red balloons" for n in range(1000)])
    >>> encode_text(params, tokens).shape
    (1000, 128)
    """
    layers, heads, activation = architecture(params)
    tokens, leading = check_tokens(params, tokens)
    P = params.get("text_projection")
    if P is None:
        raise ValueError("params has no 'text_projection', so there are no text features")
    if len(tokens) == 0:
        return array_module(P).empty((*leading, P.shape[1]), P.dtype)
    if not isinstance(P, np.ndarray):
        from minclip import fast_gpu

        features = fast_gpu.encode_corpus(params, trim(tokens), layers, heads, activation, progress)
        return features.reshape(*leading, P.shape[1])
    features = np.empty((len(tokens), P.shape[1]), P.dtype)  # (B, E)
    corpus = sort(trim(tokens))

    def encode_rows(chunk):
        tree = grow(corpus.rows[chunk], corpus.lengths[chunk], corpus.shared[chunk])
        found = encode_tree(params, blocks, heads, activation, tree)  # (T, E)
        a, b = chunk.start, chunk.stop
        if b - a == 1 or np.isfinite(found).all():
            return found
        # A nan among a twig's keys passes its mask, as nan - inf is nan. Apart, texts share no twig.
        return np.concatenate([encode_rows(slice(a, (a + b) // 2)), encode_rows(slice((a + b) // 2, b))])

    def encode_chunk(chunk):
        first, last = np.searchsorted(corpus.group, (chunk.start, chunk.stop))
        found = encode_rows(chunk)
        features[corpus.order[first:last]] = found[corpus.group[first:last] - chunk.start]
        return last - first

    with one_blas_thread() as threads, ThreadPoolExecutor(threads) as pool:
        blocks = list(pool.map(lambda i: fold(params, i, heads, activation), range(layers)))
        with tqdm(total=len(tokens), unit=" texts", disable=not progress) as bar:
            for texts in pool.map(encode_chunk, chunks(corpus, threads, CHUNK)):
                bar.update(texts)
    return features.reshape(*leading, P.shape[1])


def sort(tokens):
    """The T different rows among tokens [B, L], in an order in which like beginnings meet.

    Behind its end of text a row is -1. Row t has lengths[t] ids, the first shared[t] of them in common
    with the row before. In sorted order the B texts are tokens[order]; the i-th of these is row group[i].
    """
    lengths = tokens.argmax(axis=-1) + 1
    rows = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens.astype(np.int32), -1)
    order = np.lexsort(rows.T[::-1])
    rows, lengths = rows[order], lengths[order]
    alike = np.logical_and.accumulate(rows[1:] == rows[:-1], axis=1).sum(axis=1)
    shared = np.append(0, np.minimum(alike, lengths[1:]))
    new = shared < lengths
    return Corpus(rows[new], lengths[new], shared[new], order, new.cumsum() - 1)


def chunks(corpus, threads, most):
    """Slices of the sorted rows with about `most` nodes each at most, and as many for every thread."""
    nodes = (corpus.lengths - corpus.shared).cumsum()
    count = threads * math.ceil(nodes[-1] / most / threads)
    bounds = np.searchsorted(nodes, nodes[-1] * np.arange(1, count) / count)
    bounds = np.unique([0, *bounds, len(nodes)]).tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def number(rows, lengths, shared):
    """The tree of sorted rows [T, L]: each node's row and position [N], in preorder, and each row's path.

    path [T, L] holds the nodes that a row passes, one a position; behind its end, any.
    """
    at = np.arange(rows.shape[1])
    shared = np.append(0, shared[1:])  # the row before the first belongs to another tree
    new = (at >= shared[:, None]) & (at < lengths[:, None])  # (T, L)
    nodes = new.cumsum().reshape(new.shape) - 1
    return *new.nonzero(), np.maximum.accumulate(np.where(new, nodes, 0))


def grow(rows, lengths, shared):
    """The tree of sorted rows [T, L], its nodes in preorder, the last repeated until TWIG divides N."""
    row, position, path = number(rows, lengths, shared)
    row, position = (np.pad(index, (0, -len(index) % TWIG), mode="edge") for index in (row, position))  # (N,)
    nodes = np.arange(len(row)).reshape(-1, TWIG)  # (G, M)
    twigs = [twigs_of(nodes[a : a + TWIGS], row, position, path) for a in range(0, len(nodes), TWIGS)]
    return Tree(rows[row, position], position, path[np.arange(len(rows)), lengths - 1], twigs)


def twigs_of(nodes, row, position, path):
    """Twigs of nodes [G, M]: their keys [G, W], and the mask that keeps a node to its own ancestors."""
    first = nodes[:, :1]
    at = np.arange(position[first].max())
    above = np.where(at < position[first], path[row[first], at], -1)  # -1 is nobody's ancestor
    keys = np.concatenate([above, nodes], axis=1)  # (G, W)
    key_position = np.concatenate([at + 0 * above, position[nodes]], axis=1)[..., None]  # (G, W, 1)
    row, position = row[nodes][:, None], position[nodes][:, None]  # (G, 1, M)
    sees = (path[row, key_position] == keys[..., None]) & (key_position <= position)  # (G, W, M)
    return Twigs(
        slice(nodes[0, 0], nodes[-1, -1] + 1), keys, np.where(sees, np.float32(0), np.float32(-math.inf))
    )


def fold(params, i, heads, activation):
    """Block i's parameters with all that is linear beside its matrices multiplied in.

    Layer norm's weight and bias go into the matrix that reads it; the scale of q and the 1.702 of the
    gate likewise. k's bias adds the same to all scores of a query, which softmax ignores; v's
    passes through attention as it is, into the bias of out_proj. And since nothing reads the residual
    stream but through a layer norm, what is written to it is written without its mean.
    """
    dtype = widen(params["text_projection"]).dtype
    block = f"transformer.resblocks.{i}."
    names = [name for name in params if name.startswith(block)]
    p = {name.removeprefix(block): params[name].astype(dtype, copy=False) for name in names}
    D = len(p["ln_1.weight"])
    qkv = p["attn.in_proj_weight"] * p["ln_1.weight"]  # (3D, D)
    qkv_bias = p["attn.in_proj_bias"] + p["attn.in_proj_weight"] @ p["ln_1.bias"]
    scale = (D // heads) ** -0.5
    out, c_fc, c_proj = p["attn.out_proj.weight"], p["mlp.c_fc.weight"], p["mlp.c_proj.weight"]
    out_bias = p["attn.out_proj.bias"] + out @ qkv_bias[2 * D :]
    c_fc_bias = p["mlp.c_fc.bias"] + c_fc @ p["ln_2.bias"]
    # x * sigmoid(1.702 x) is y * (1 + tanh(y)) / 1.702 with y = 0.851 x
    before, after = (0.851, 1 / 1.702) if activation == "quick_gelu" else (1, 1)
    return Block(
        qkv[:D] * scale, qkv_bias[:D] * scale, qkv[D:], centred(out), centred(out_bias),
        c_fc * (p["ln_2.weight"] * before), c_fc_bias * before,
        centred(c_proj * after), centred(p["mlp.c_proj.bias"]),
    )  # fmt: skip


def centred(x):
    """x without its mean over the first axis, which for a weight or bias is the axis of its outputs."""
    return x - x.mean(axis=0)


def encode_tree(params, blocks, heads, activation, tree):
    """Features [T, E] of the texts that make up the tree."""
    P = widen(params["text_projection"])
    xp, D, N = array_module(P), P.shape[0], len(tree.ids)
    x = params["token_embedding.weight"][tree.ids].astype(P.dtype)  # (N, D)
    x += params["positional_embedding"][tree.positions]
    x -= x.mean(axis=-1, keepdims=True)
    h, q, context, change = (xp.zeros((N, D), P.dtype) for _ in range(4))
    kv = xp.empty((N, 2 * D), P.dtype)
    inner = xp.empty((N, len(blocks[0].c_fc)), P.dtype)  # (N, F)
    add_and_normalise(x, change, 0, h)
    for block in blocks:
        xp.matmul(h, block.kv.T, out=kv)
        xp.matmul(h, block.q.T, out=q)
        q += block.q_bias
        for twigs in tree.twigs:
            attend(q[twigs.nodes], kv, twigs, heads, context[twigs.nodes])
        if block is blocks[-1]:  # from here on each position is by itself, and only the ends are asked for
            x, context, T = x[tree.ends], context[tree.ends], len(tree.ends)
            h, change, inner = h[:T], change[:T], inner[:T]
        xp.matmul(context, block.out.T, out=change)
        add_and_normalise(x, change, block.out_bias, h)
        xp.matmul(h, block.c_fc.T, out=inner)
        activate(inner, block.c_fc_bias, activation)
        xp.matmul(inner, block.c_proj.T, out=change)
        add_and_normalise(x, change, block.c_proj_bias, h)
    return (h * params["ln_final.weight"] + params["ln_final.bias"]).astype(P.dtype, copy=False) @ P


def attend(q, kv, twigs, heads, context):
    """Write to context [G M, D] what the nodes q [G M, D] of some twigs gather from kv [N, 2 D]."""
    xp = array_module(q)
    G, W = twigs.keys.shape
    k, v = kv[twigs.keys].reshape(G, W, 2, heads, -1).transpose(2, 0, 3, 1, 4)  # (G, H, W, K)
    q = q.reshape(G, TWIG, heads, -1).transpose(0, 2, 3, 1)  # (G, H, K, M)
    # Keys come first and queries last, so that softmax goes over long rows of heads and queries.
    scores = xp.empty((G, W, heads, TWIG), q.dtype)
    by_head = scores.transpose(0, 2, 1, 3)  # (G, H, W, M)
    xp.matmul(k, q, out=by_head)
    scores += twigs.mask[:, :, None]
    scores -= scores.max(axis=1, keepdims=True)
    xp.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    xp.matmul(by_head.swapaxes(2, 3), v, out=context.reshape(G, TWIG, heads, -1).swapaxes(1, 2))


def add_and_normalise(x, change, bias, h):
    """x += change + bias, and into h each row of x divided by its root mean square: its mean is zero."""
    xp = array_module(x)
    for a in range(0, len(x), 4 * ROWS):
        rows, more = x[a : a + 4 * ROWS], change[a : a + 4 * ROWS]
        more += bias
        rows += more
        scale = (xp.einsum("nd,nd->n", rows, rows) / x.shape[1] + EPS) ** -0.5
        xp.multiply(rows, scale[:, None], out=h[a : a + 4 * ROWS])


def activate(x, bias, activation):
    """The activation of x + bias, in place; QuickGELU as `fold` has prepared it."""
    xp = array_module(x)
    for a in range(0, len(x), ROWS):
        rows = x[a : a + ROWS]
        rows += bias
        if activation == "quick_gelu":
            gate = xp.tanh(rows)
            gate += 1
            rows *= gate
        else:
            rows[:] = ACTIVATIONS[activation](rows)


class Users:
    """How many calls are under way, and what BLAS could use before the first of them."""

    lock, count = threading.Lock(), 0
    threads = limit = None


@contextmanager
def one_blas_thread():
    """Keep BLAS to one thread while any call is inside. Gives the number of threads that it had before."""
    with Users.lock:
        if Users.count == 0:
            blas = ThreadpoolController().select(user_api="blas")
            # A BLAS that threadpoolctl does not know keeps its own threads, so we start none.
            Users.threads = max((library["num_threads"] for library in blas.info()), default=1)
            Users.limit = blas.limit(limits=1)
        Users.count += 1
    try:
        yield Users.threads
    finally:
        with Users.lock:
            Users.count -= 1
            if Users.count == 0:
                Users.limit.restore_original_limits()
