"""`minclip.fast` on the GPU: the same tree, its nodes the rows of matrices for minclip.model's own steps.

The host sorts and numbers the nodes of the next chunk and sends them on a stream of their own, while the
GPU computes the last ones; it is waited for only when it is CHUNKS behind. Features stay on the GPU.
"""

from collections import deque, namedtuple

import cupy
import numpy as np
from tqdm import tqdm

from minclip import fast, gpu
from minclip.model import layer_norm, linear, matmul, mlp, pass_on, weight_and_bias

NODES = 32768  # nodes computed at once. In float16 one takes about 30 bytes a unit of width: 0.5 GB at 512
CHUNKS = 2  # chunks that may wait for the GPU
NUMBERS = {"e": ("__half", "float"), "f": ("float", "float"), "d": ("double", "double")}

Tree = namedtuple("Tree", "ids positions row path ends order group")


def encode_corpus(params, tokens, layers, heads, activation, progress):
    """Features [B, E] of tokens [B, L] on the host, trimmed; in the dtype of params, on the GPU."""
    P = params["text_projection"]
    K = len(P) // heads
    if K % 8:
        raise ValueError(
            f"minclip.fast on the GPU takes head widths that 8 divides, not {K}: use minclip.encode_text"
        )
    corpus = fast.sort(tokens)
    features = cupy.empty((len(tokens), P.shape[1]), P.dtype)  # (B, E)
    sending, computing = cupy.cuda.Stream(non_blocking=True), cupy.cuda.get_current_stream()
    under_way = deque()

    def finish():
        tree, done = under_way.popleft()  # the tree's memory is free to be used again only now
        done.synchronize()
        bar.update(len(tree.order))

    with tqdm(total=len(tokens), unit=" texts", disable=not progress) as bar:
        for chunk in fast.chunks(corpus, 1, NODES):
            with sending:
                tree = Tree(*map(cupy.asarray, number(corpus, chunk)))
            computing.wait_event(sending.record())
            found = encode_tree(params, layers, heads, activation, tree)  # (T, E)
            features[tree.order] = found[tree.group]
            under_way.append((tree, computing.record()))
            if len(under_way) > CHUNKS:
                finish()
        while under_way:
            finish()
    return features


def number(corpus, chunk):
    """The tree of a chunk of the sorted rows, on the host."""
    rows, lengths = corpus.rows[chunk], corpus.lengths[chunk]
    row, position, path = fast.number(rows, lengths, corpus.shared[chunk])
    first, last = np.searchsorted(corpus.group, (chunk.start, chunk.stop))
    tree = Tree(
        ids=rows[row, position],
        positions=position,
        row=row,
        path=path,
        ends=path[np.arange(len(rows)), lengths - 1],
        order=corpus.order[first:last],
        group=corpus.group[first:last] - chunk.start,
    )
    return (np.ascontiguousarray(array, dtype=np.int32) for array in tree)


def encode_tree(params, layers, heads, activation, tree):
    """Features [T, E] of the texts that make up the tree."""
    P = params["text_projection"]
    x = params["token_embedding.weight"][tree.ids].astype(P.dtype, copy=False)  # (N, D)
    x = x + params["positional_embedding"][tree.positions].astype(P.dtype, copy=False)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        h = layer_norm(x, *weight_and_bias(params, f"{block}.ln_1"))
        qkv = linear(h, params[f"{block}.attn.in_proj_weight"], params[f"{block}.attn.in_proj_bias"])
        context = attend(qkv, tree, heads)
        if i == layers - 1:  # from here on each position is by itself, and only the ends are asked for
            x, context = x[tree.ends], context[tree.ends]
        x = x + linear(context, *weight_and_bias(params, f"{block}.attn.out_proj"))
        h = layer_norm(x, *weight_and_bias(params, f"{block}.ln_2"))
        x = x + mlp(h, params, f"{block}.mlp", activation, pass_on)
    return matmul(layer_norm(x, *weight_and_bias(params, "ln_final")), P)


def attend(qkv, tree, heads):
    """What each node gathers [N, D] from its ancestors and itself."""
    N, D = len(qkv), qkv.shape[1] // 3
    qkv = cupy.ascontiguousarray(qkv)
    context = cupy.empty((N, D), qkv.dtype)
    kernel = gpu.kernel("attend", *NUMBERS[qkv.dtype.char], D // heads)
    sizes = (np.int32(size) for size in (N, heads, tree.path.shape[1]))
    grid = (-(-N * heads // gpu.ROWS),)
    kernel(grid, (32, gpu.ROWS), (qkv, context, tree.path, tree.row, tree.positions, *sizes))
    return context
