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

What is done to every node alike is moved into the parameters once (`fold`). In the first layer, nodes
of one id at one position are still the same; in the last, only what a text's end needs is computed.
Exact but for rounding; `minclip.encode_text` is the reference.

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

from minclip.arrays import array_module, to_float32
from minclip.model import ACTIVATIONS
from minclip.params import EPS, architecture, check_tokens, trim

CHUNK = 4096  # nodes that make one tree: enough to share their beginnings, few enough for little memory
TILE = 2048  # nodes that go through an MLP together: enough for BLAS at its best
TWIG = 16  # nodes in a row that share their keys
TWIGS = 8  # twigs attended at once
CACHED = 2**17  # numbers of an element-wise step, few enough to stay in the cache from one line to the next

Corpus = namedtuple("Corpus", "rows lengths shared order group")
Tree = namedtuple("Tree", "ids positions first same ends twigs")
Twigs = namedtuple("Twigs", "nodes keys mask")
Block = namedtuple("Block", "qkv out c_fc c_proj")


def encode_text(params, tokens, *, progress=False):
    """`minclip.encode_text` for a corpus of any size: the same features, to rounding.

    params and tokens as there. Chunks of the corpus are computed side by side, on as many threads as
    BLAS may use, and BLAS keeps to one thread meanwhile. Beside params, tokens and features this takes
    one more copy of the blocks' parameters and the working memory of one chunk a thread. float16 is
    computed in float32. progress=True shows a bar.

    On the GPU it is minclip.fast_gpu that computes; how much at a time, and so what memory it takes, is
    set by fast_gpu.NODES and fast_gpu.TEXTS.

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
        from minclip.fast import gpu as fast_gpu

        features = fast_gpu.encode_corpus(params, trim(params, tokens), layers, heads, activation, progress)
        return features.reshape(*leading, P.shape[1])
    features = np.empty((len(tokens), P.shape[1]), P.dtype)  # (B, E)
    corpus = sort(trim(params, tokens))

    def encode_chunk(chunk):
        found = encode_rows(params, blocks, heads, activation, corpus, chunk)  # (T, E)
        first, last = np.searchsorted(corpus.group, (chunk.start, chunk.stop))
        features[corpus.order[first:last]] = found[corpus.group[first:last] - chunk.start]
        return last - first

    with one_blas_thread() as threads, ThreadPoolExecutor(threads) as pool:
        blocks = list(pool.map(lambda i: fold(params, i, heads, activation), range(layers)))
        with tqdm(total=len(tokens), unit=" texts", disable=not progress) as bar:
            for texts in pool.map(encode_chunk, chunks(corpus.lengths - corpus.shared, threads, CHUNK)):
                bar.update(texts)
    return features.reshape(*leading, P.shape[1])


def sort(tokens):
    """The T different rows among tokens [B, L], in an order in which like beginnings meet.

    Behind its end of text a row is -1. Row t has lengths[t] ids, the first shared[t] of them in common
    with the row before. In sorted order the B texts are tokens[order]; the i-th of these is row group[i].
    """
    xp = array_module(tokens)
    lengths = tokens.argmax(axis=-1) + 1
    rows = xp.where(xp.arange(tokens.shape[1]) < lengths[:, None], tokens.astype(np.int32), -1)
    order = xp.lexsort(rows.T[::-1])
    rows, lengths = rows[order], lengths[order]
    differ = rows != rows[xp.arange(len(rows)) - 1]
    shared = xp.where(differ.any(axis=1), differ.argmax(axis=1), lengths)
    shared[0] = 0  # before the first row there is none
    new = shared < lengths
    (kept,) = new.nonzero()
    return Corpus(rows[kept], lengths[kept], shared[kept], order, new.cumsum() - 1)


def chunks(new, threads, most):
    """Slices of the sorted rows with about `most` nodes each at most, and as many for every thread.

    new [T], on the host, is how many nodes each row adds to those of the row before.
    """
    nodes = new.cumsum()
    count = threads * math.ceil(nodes[-1] / most / threads)
    bounds = np.searchsorted(nodes, nodes[-1] * np.arange(1, count) / count)
    bounds = np.unique([0, *bounds, len(nodes)]).tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def number(rows, lengths, shared):
    """The tree of sorted rows [T, L]: each node's row and position [N], in preorder, and each row's path.

    path [T, L] holds the nodes that a row passes, one a position; behind its end, any. Where shared is
    0 another tree begins, whose nodes are counted on.
    """
    at = array_module(rows).arange(rows.shape[1])
    new = (at >= shared[:, None]) & (at < lengths[:, None])  # (T, L)
    nodes = new.cumsum(dtype=np.int32).reshape(new.shape) - 1
    # A row passes, at each position, the last node that it or a row before it has made there.
    made = new.T.cumsum(dtype=np.int32) - 1  # position by position: how many before
    return *new.nonzero(), nodes.T[new.T][made].reshape(new.T.shape).T


def grow(rows, lengths, shared):
    """The tree of sorted rows [T, L], its nodes in preorder, the last repeated until TWIG divides N.

    Among the nodes, those at `first` have all the ids at all their positions; node n is as same[n] of them.
    """
    row, position, path = number(rows, lengths, np.append(0, shared[1:]))
    row, position = (np.pad(index, (0, -len(index) % TWIG), mode="edge") for index in (row, position))  # (N,)
    ids = rows[row, position]
    _, first, same = np.unique(
        ids.astype(np.int64) * rows.shape[1] + position, return_index=True, return_inverse=True
    )
    nodes = np.arange(len(row)).reshape(-1, TWIG)  # (G, M)
    twigs = [twigs_of(nodes[a : a + TWIGS], row, position, path) for a in range(0, len(nodes), TWIGS)]
    return Tree(ids, position, first, same, path[np.arange(len(rows)), lengths - 1], twigs)


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
    """Block i's four matrices, each [out, in + 1], with all that is linear beside them multiplied in.

    A bias is the last column, which meets a 1 at the end of every row. Layer norm's weight and bias go
    into the matrix that reads it; the scale of q and the 1.702 of the gate likewise. And since nothing
    reads the residual stream but through a layer norm, what is written to it is written without its mean.
    """
    dtype = to_float32(params["text_projection"]).dtype
    block = f"transformer.resblocks.{i}."
    names = [name for name in params if name.startswith(block)]
    p = {name.removeprefix(block): params[name].astype(dtype, copy=False) for name in names}

    def after_norm(norm, weight, bias):
        weight, bias = p[weight], p[bias] + p[weight] @ p[f"{norm}.bias"]
        return np.concatenate([weight * p[f"{norm}.weight"], bias[:, None]], axis=1)

    def into_stream(layer):
        matrix = np.concatenate([p[f"{layer}.weight"], p[f"{layer}.bias"][:, None]], axis=1)
        matrix -= matrix.mean(axis=0)
        return matrix

    qkv, out = after_norm("ln_1", "attn.in_proj_weight", "attn.in_proj_bias"), into_stream("attn.out_proj")
    c_fc, c_proj = after_norm("ln_2", "mlp.c_fc.weight", "mlp.c_fc.bias"), into_stream("mlp.c_proj")
    D = len(out)
    qkv[:D] *= (D // heads) ** -0.5
    if activation == "quick_gelu":  # x * sigmoid(1.702 x) is y * (1 + tanh(y)) / 1.702 with y = 0.851 x
        c_fc *= 0.851
        c_proj[:, :-1] /= 1.702
    return Block(qkv, out, c_fc, c_proj)


def encode_rows(params, blocks, heads, activation, corpus, chunk):
    """Features [T, E] of a chunk of the corpus's rows."""
    tree = grow(corpus.rows[chunk], corpus.lengths[chunk], corpus.shared[chunk])
    features = encode_tree(params, blocks, heads, activation, tree)
    if len(features) == 1 or np.isfinite(features).all():
        return features
    # A nan among a twig's keys passes its mask, as nan - inf is nan. Apart, texts share no twig.
    middle = (chunk.start + chunk.stop) // 2
    halves = slice(chunk.start, middle), slice(middle, chunk.stop)
    return np.concatenate([encode_rows(params, blocks, heads, activation, corpus, half) for half in halves])


def encode_tree(params, blocks, heads, activation, tree):
    """Features [T, E] of the texts that make up the tree."""
    P = to_float32(params["text_projection"])
    N, D, F = len(tree.ids), len(P), len(blocks[0].c_fc)
    x = centred(params["token_embedding.weight"][tree.ids].astype(P.dtype, copy=False))  # (N, D)
    h = np.ones((N, D + 1), P.dtype)  # the norm of x, then what its attention gathers; the last stays 1
    places = centred(params["positional_embedding"].astype(P.dtype, copy=False))  # (L, D)
    add_and_normalise(x, places[tree.positions], h[:, :D])
    qkv = np.empty((N, 3 * D), P.dtype)
    change, inner = np.empty((min(N, TILE), D), P.dtype), np.ones((min(N, TILE), F + 1), P.dtype)
    for block in blocks:
        if block is blocks[0]:
            # Another mode, "raise", would go through a copy.
            np.take(h[tree.first] @ block.qkv.T, tree.same, axis=0, out=qkv, mode="clip")
        elif block is blocks[-1]:  # what other nodes than the ends gather is not asked for: any q will do
            np.matmul(h, block.qkv[D:].T, out=qkv[:, D:])
            qkv[tree.ends, :D] = h[tree.ends] @ block.qkv[:D].T
        else:
            np.matmul(h, block.qkv.T, out=qkv)
        for twigs in tree.twigs:
            attend(qkv[:, :D], qkv[:, D:], twigs, heads, h[:, :D])
        if block is blocks[-1]:  # from here on each position is by itself
            x, h = x[tree.ends], h[tree.ends]
        for tile in slices(len(x), TILE):
            after_attention(x[tile], h[tile], block, activation, change, inner)
    return (h[:, :D] * params["ln_final.weight"] + params["ln_final.bias"]).astype(P.dtype, copy=False) @ P


def centred(x):
    """Each row without its mean."""
    return x - x.mean(axis=-1, keepdims=True)


def attend(q, kv, twigs, heads, context):
    """Write to context [N, D] what the nodes of some twigs, with q [N, D], gather from kv [N, 2 D]."""
    G, W = twigs.keys.shape
    k, v = kv[twigs.keys].reshape(G, W, 2, heads, -1).transpose(2, 0, 3, 1, 4)  # (G, H, W, K)
    q = q[twigs.nodes].reshape(G, TWIG, heads, -1).transpose(0, 2, 3, 1)  # (G, H, K, M)
    # Keys come first and queries last, so that softmax goes over long rows of heads and queries.
    scores = np.empty((G, W, heads, TWIG), q.dtype)
    by_head = scores.transpose(0, 2, 1, 3)  # (G, H, W, M)
    np.matmul(k, q, out=by_head)
    scores += twigs.mask[:, :, None]
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    context = context[twigs.nodes].reshape(G, TWIG, heads, -1).swapaxes(1, 2)  # (G, H, M, K)
    np.matmul(by_head.swapaxes(2, 3), v, out=context)


def after_attention(x, h, block, activation, change, inner):
    """The rest of a block, in place: from what some nodes gathered, h, to the stream x and its norm, h.

    Through change [TILE, D] and inner [TILE, F + 1], whose last column is 1, and stays it.
    """
    D, F, change, inner = x.shape[1], len(block.c_fc), change[: len(x)], inner[: len(x)]
    np.matmul(h, block.out.T, out=change)
    add_and_normalise(x, change, h[:, :D])
    np.matmul(h, block.c_fc.T, out=inner[:, :F])
    activate(inner[:, :F], activation)
    np.matmul(inner, block.c_proj.T, out=change)
    add_and_normalise(x, change, h[:, :D])


def add_and_normalise(x, change, h):
    """x += change, and into h each row of x divided by its root mean square: its mean is zero."""
    for strip in slices(len(x), CACHED // x.shape[1]):
        rows = x[strip]
        rows += change[strip]
        scale = (np.einsum("nd,nd->n", rows, rows) / x.shape[1] + EPS) ** -0.5
        np.multiply(rows, scale[:, None], out=h[strip])


def activate(x, activation):
    """The activation of x, in place; QuickGELU as `fold` has prepared it."""
    strips = slices(len(x), CACHED // x.shape[1])
    buffer = np.empty_like(x[strips[-1]])  # the last strip is the longest
    for strip in strips:
        rows = x[strip]
        if activation == "quick_gelu":
            gate = np.tanh(rows, out=buffer[: len(rows)])
            gate += 1
            rows *= gate
        else:
            rows[:] = ACTIVATIONS[activation](rows)


def slices(length, most):
    """Slices of 0 to length, alike in size, of at most `most` each (and at least one)."""
    count = math.ceil(length / max(1, most))
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


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
