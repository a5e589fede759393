"""`minclip.fast` on the CPU: the tree's nodes as the rows of matrices, one part of the corpus per thread.

All steps but attention treat each node by itself, so the nodes are simply the rows of a matrix [N, D].
Attention takes TWIG nodes in a row, a twig. In preorder, whatever a node of a twig attends to is among the
twig's own nodes or above the first of them: a small dense attention, with a mask that keeps each node to its
own ancestors.

Steps that treat all nodes alike are multiplied into the parameters once (`fold`). In the first layer, nodes
of one id at one position are still equal; in the last, only the ends of the texts are computed.

Axes: those of minclip.model, and  N nodes   T texts   G twigs   M = TWIG nodes of a twig   W its keys
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minclip.arrays import to_float32
from minclip.fast.blas import one_blas_thread
from minclip.fast.tree import chunks, number_nodes, slices, sort
from minclip.model import ACTIVATIONS
from minclip.params import EPS, architecture, end_of_text

NODES = 4096  # nodes of one tree: enough to share their beginnings, few enough for little memory
TILE = 2048  # nodes that go through an MLP together: enough for BLAS at its best
TWIG = 16  # nodes in a row that share their keys
TWIGS = 8  # twigs attended at once
CACHED = 2**17  # numbers of an element-wise step, few enough to stay in the cache from one line to the next


class Tree(NamedTuple):
    """The nodes of some texts, in preorder.

    ids, positions   of each node [N]
    first, same      the first layer computes the nodes at `first`; node n equals number same[n] of these
    path             the node that each text passes at each position [T, L]
    ends             the node at each text's end [T]
    twigs            the nodes again, as `Twigs`
    """

    ids: np.ndarray
    positions: np.ndarray
    first: np.ndarray
    same: np.ndarray
    path: np.ndarray
    ends: np.ndarray
    twigs: list


class Twigs(NamedTuple):
    """Some twigs: a slice of nodes, the keys of each twig [G, W], and the mask [G, W, M]."""

    nodes: slice
    keys: np.ndarray
    mask: np.ndarray


class Block(NamedTuple):
    """The matrices of a block, as `fold` makes them."""

    qkv: np.ndarray
    out: np.ndarray
    c_fc: np.ndarray
    c_proj: np.ndarray


def encode_corpus(params, tokens, progress, nodes=None):
    """Return features [B, E] of trimmed tokens [B, L], in the dtype of params."""
    layers, heads, activation = architecture(params)
    P = params["text_projection"]
    features = np.empty((len(tokens), P.shape[1]), P.dtype)  # (B, E)
    texts = sort(tokens, end_of_text(params, tokens))

    def encode_chunk(chunk):
        found = encode_rows(params, blocks, heads, activation, texts, chunk)  # (T, E)
        first, last = np.searchsorted(texts.group, (chunk.start, chunk.stop))
        features[texts.order[first:last]] = found[texts.group[first:last] - chunk.start]
        return last - first

    with one_blas_thread() as threads, ThreadPoolExecutor(threads) as pool:
        blocks = list(pool.map(lambda i: fold(params, i, heads, activation), range(layers)))
        with tqdm(total=len(tokens), unit=" texts", disable=not progress) as bar:
            for count in pool.map(encode_chunk, chunks(texts.new_nodes, threads, nodes or NODES)):
                bar.update(count)
    return features


def grow(rows, lengths, shared):
    """The tree of sorted rows [T, L], its nodes in preorder, the last repeated until TWIG divides N.

    Among the nodes, those at `first` have all the ids at all their positions; node n is as same[n] of them.
    """
    row, position, path = number_nodes(rows, lengths, np.append(0, shared[1:]))
    row, position = (np.pad(index, (0, -len(index) % TWIG), mode="edge") for index in (row, position))  # (N,)
    ids = rows[row, position]
    _, first, same = np.unique(
        ids.astype(np.int64) * rows.shape[1] + position, return_index=True, return_inverse=True
    )
    nodes = np.arange(len(row)).reshape(-1, TWIG)  # (G, M)
    twigs = [twigs_of(nodes[a : a + TWIGS], row, position, path) for a in range(0, len(nodes), TWIGS)]
    return Tree(ids, position, first, same, path, path[np.arange(len(rows)), lengths - 1], twigs)


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


def encode_rows(params, blocks, heads, activation, texts, chunk):
    """Features [T, E] of a chunk of the corpus's rows."""
    tree = grow(texts.rows[chunk], texts.lengths[chunk], texts.shared[chunk])
    features = encode_tree(params, blocks, heads, activation, tree)
    if len(features) == 1 or np.isfinite(features).all():
        return features
    # A nan among a twig's keys passes its mask, as nan - inf is nan. Apart, texts share no twig.
    middle = (chunk.start + chunk.stop) // 2
    halves = slice(chunk.start, middle), slice(middle, chunk.stop)
    return np.concatenate([encode_rows(params, blocks, heads, activation, texts, half) for half in halves])


def encode_tree(params, blocks, heads, activation, tree):
    """Features [T, E] of the texts that make up the tree."""
    P = to_float32(params["text_projection"])
    N, D, F = len(tree.ids), len(P), len(blocks[0].c_fc)
    x = centered(params["token_embedding.weight"][tree.ids].astype(P.dtype, copy=False))  # (N, D)
    h = np.ones((N, D + 1), P.dtype)  # the norm of x, then what its attention gathers; the last stays 1
    places = centered(params["positional_embedding"].astype(P.dtype, copy=False))  # (L, D)
    add_and_normalize(x, places[tree.positions], h[:, :D])
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


def centered(x):
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
    add_and_normalize(x, change, h[:, :D])
    np.matmul(h, block.c_fc.T, out=inner[:, :F])
    activate(inner[:, :F], activation)
    np.matmul(inner, block.c_proj.T, out=change)
    add_and_normalize(x, change, h[:, :D])


def add_and_normalize(x, change, h):
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
