"""`minclip.fast` on the GPU: the same tree, its nodes the rows of matrices.

What is added between two products is added by the kernel that reads it next, so that memory is passed over
as seldom as can be: attention adds q's and v's biases, one kernel each the MLP's first bias and its gate, and
a bias, the stream and its norm.

The host sorts and numbers the nodes of the next chunk and sends them on a stream of their own, while the
GPU computes the last ones; it is waited for only when it is CHUNKS behind. Features stay on the GPU.
"""

from collections import deque, namedtuple

import cupy
import numpy as np
from tqdm import tqdm

from minclip import fast, gpu
from minclip.model import EPS, layer_norm, matmul

NODES = 32768  # nodes computed at once. In float16 one takes about 30 bytes a unit of width: 0.5 GB at 512
CHUNKS = 2  # chunks that may wait for the GPU
NUMBERS = {"e": ("__half", "float", "f4"), "f": ("float", "float", "f4"), "d": ("double", "double", "f8")}

Tree = namedtuple("Tree", "ids positions row path ends order group")


def encode_corpus(params, tokens, layers, heads, activation, progress):
    """Features [B, E] of tokens [B, L] on the host, trimmed; in the dtype of params, on the GPU."""
    P = params["text_projection"]
    K = len(P) // heads
    if K % 8:
        raise ValueError(
            f"minclip.fast on the GPU takes head widths that 8 divides, not {K}: use minclip.encode_text"
        )
    wide = NUMBERS[P.dtype.char][2]
    vectors = {name: array.astype(wide, copy=False) for name, array in params.items() if array.ndim == 1}
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
            found = encode_tree(params, vectors, layers, heads, activation, tree)  # (T, E)
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


def encode_tree(params, vectors, layers, heads, activation, tree):
    """Features [T, E] of the texts that make up the tree; vectors are biases and the weights of norms."""
    P = params["text_projection"]

    def product(x, name):
        return matmul(x, params[name].T)

    x = params["token_embedding.weight"][tree.ids].astype(P.dtype, copy=False)  # (N, D)
    x = x + params["positional_embedding"][tree.positions].astype(P.dtype, copy=False)
    norms = [f"transformer.resblocks.{i}.ln_1" for i in range(layers)] + ["ln_final"]
    h = layer_norm(x, vectors[f"{norms[0]}.weight"], vectors[f"{norms[0]}.bias"])
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        qkv = product(h, f"{block}.attn.in_proj_weight")
        context = attend(qkv, vectors[f"{block}.attn.in_proj_bias"], tree, heads)
        if i == layers - 1:  # from here on each position is by itself, and only the ends are asked for
            x, context = x[tree.ends], context[tree.ends]
        change = product(context, f"{block}.attn.out_proj.weight")
        h = add_and_normalise(x, change, vectors, f"{block}.attn.out_proj", f"{block}.ln_2")
        inner = product(h, f"{block}.mlp.c_fc.weight")
        by_rows(f"add_and_{activation}", inner, vectors[f"{block}.mlp.c_fc.bias"])
        change = product(inner, f"{block}.mlp.c_proj.weight")
        h = add_and_normalise(x, change, vectors, f"{block}.mlp.c_proj", norms[i + 1])
    return matmul(h, P)


def attend(qkv, bias, tree, heads):
    """What each node gathers [N, D] from its ancestors and itself; qkv [N, 3 D] is still without its bias."""
    N, D = len(qkv), qkv.shape[1] // 3
    context = cupy.empty((N, D), qkv.dtype)
    sizes = (np.int32(size) for size in (N, heads, tree.path.shape[1]))
    arrays = (qkv, bias, context, tree.path, tree.row, tree.positions)
    launch("attend", N * heads, qkv.dtype, (*arrays, *sizes), D // heads)
    return context


def add_and_normalise(x, change, vectors, layer, norm):
    """x += change and the layer's bias, in place; gives the layer norm of x."""
    h = cupy.empty_like(x)
    norm = vectors[f"{norm}.weight"], vectors[f"{norm}.bias"]
    by_rows("add_and_normalise", x, change, h, vectors[f"{layer}.bias"], *norm, norm[0].dtype.type(EPS))
    return h


def by_rows(name, x, *others):
    """Run a kernel on x [N, ...], in place, a warp to a row."""
    rows, length = x.shape
    launch(name, rows, x.dtype, (x, *others, np.int32(rows), np.int32(length)))


def launch(name, warps, dtype, arguments, head_width=64):
    number, wide, _ = NUMBERS[dtype.char]
    gpu.kernel(name, number, wide, head_width)((-(-warps // gpu.ROWS),), (32, gpu.ROWS), arguments)
