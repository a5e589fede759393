"""`minclip.fast` on the GPU: the same tree, its nodes the rows of matrices.

Memory is passed over as seldom as can be. A product adds what attention or MLP makes to the stream by
itself, and biases are added by the kernel that reads next: attention adds q's and v's, the gate the MLP's
first. The biases of what goes to the stream are never in it: the norms that read it add up to then.

Tokens are sorted and their nodes numbered on the GPU too, TEXTS texts at a time and on a stream of their
own, while it computes those before. The host waits only for the sizes that this finds, and when it is more
than CHUNKS chunks ahead. Features stay on the GPU.
"""

import functools
from collections import deque, namedtuple

import cupy
import numpy as np
from tqdm import tqdm

from minclip.fast import cpu as fast
from minclip.gpu import steps as gpu
from minclip.model import matmul
from minclip.params import EPS

NODES = 16384  # nodes computed at once. In float16 one takes about 20 bytes a unit of width: 170 MB at 512
TEXTS = 2**17  # texts sorted at once, which takes about 32 bytes a position: 90 MB for texts of 22 tokens
CHUNKS = 2  # chunks that may wait for the GPU

Tree = namedtuple("Tree", "ids positions row path first_node ends order group")
Norm = namedtuple("Norm", "added weight bias")


def encode_corpus(params, tokens, layers, heads, activation, progress):
    """Features [B, E] of tokens [B, L] on the host, trimmed; in the dtype of params, on the GPU."""
    P = params["text_projection"]
    K = len(P) // heads
    if K % 8:
        raise ValueError(
            f"minclip.fast on the GPU takes head widths that 8 divides, not {K}: use minclip.encode_text"
        )
    wide = np.promote_types(P.dtype, np.float32)
    # Copies in any case, so that they begin where kernels can read several numbers at once.
    vectors = {name: array.astype(wide) for name, array in params.items() if array.ndim == 1}
    norms = norms_of(vectors, layers)
    features = cupy.empty((len(tokens), P.shape[1]), P.dtype)  # (B, E)
    sending, computing = stream_of(cupy.cuda.runtime.getDevice()), cupy.cuda.get_current_stream()
    under_way = deque()

    def finish():
        tree, done = under_way.popleft()  # the tree's memory is free to be used again only now
        done.synchronize()
        bar.update(len(tree.order))

    with tqdm(total=len(tokens), unit=" texts", disable=not progress) as bar:
        try:
            for part in fast.slices(len(tokens), TEXTS):
                with sending:
                    trees = plant(tokens[part])
                computing.wait_event(sending.record())
                for tree in trees:
                    found = encode_tree(params, vectors, norms, heads, activation, tree)  # (T, E)
                    features[part][tree.order] = found[tree.group]
                    under_way.append((tree, computing.record()))
                    if len(under_way) > CHUNKS:
                        finish()
            while under_way:
                finish()
        finally:
            computing.synchronize()  # also of a call that is broken off, no kernel may still read its trees
    return features


@functools.cache
def stream_of(device):
    """The stream on which a GPU gets its tokens; one for all calls, since CuPy keeps memory by stream."""
    return cupy.cuda.Stream(non_blocking=True)


def norms_of(vectors, layers):
    """The layer norms in order, each with the sum of all biases that the stream should have got before it."""
    added, norms = 0 * vectors["ln_final.bias"], []

    def norm(name):
        norms.append(Norm(added, vectors[f"{name}.weight"], vectors[f"{name}.bias"]))

    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        norm(f"{block}.ln_1")
        added = added + vectors[f"{block}.attn.out_proj.bias"]
        norm(f"{block}.ln_2")
        added = added + vectors[f"{block}.mlp.c_proj.bias"]
    norm("ln_final")
    return norms


def plant(tokens):
    """The trees of some texts, of about NODES nodes each; nodes are counted through them all."""
    corpus = fast.sort(cupy.asarray(tokens))
    chunks = fast.chunks((corpus.lengths - corpus.shared).get(), 1, NODES)
    starts = cupy.asarray([chunk.start for chunk in chunks])
    corpus.shared[starts] = 0
    found = fast.number(corpus.rows, corpus.lengths, corpus.shared)
    row, position, path = (cupy.ascontiguousarray(array, dtype=np.int32) for array in found)
    ids = corpus.rows[row, position]  # (N,)
    ends = path[cupy.arange(len(path)), corpus.lengths - 1]  # (T,)
    first_node = [*cupy.searchsorted(row, starts).get().tolist(), len(row)]
    first_text = [*cupy.searchsorted(corpus.group, starts).get().tolist(), len(tokens)]
    trees = []
    for i, chunk in enumerate(chunks):
        nodes, texts = (slice(first[i], first[i + 1]) for first in (first_node, first_text))
        trees.append(
            Tree(
                *(ids[nodes], position[nodes], row[nodes], path, nodes.start, ends[chunk] - nodes.start),
                *(corpus.order[texts], corpus.group[texts] - chunk.start),
            )
        )
    return trees


def encode_tree(params, vectors, norms, heads, activation, tree):
    """Features [T, E] of the texts that make up the tree; vectors are biases, wide as those of norms are."""
    P = params["text_projection"]
    layers = len(norms) // 2
    x = params["token_embedding.weight"][tree.ids].astype(P.dtype, copy=False)  # (N, D)
    x = x + params["positional_embedding"][tree.positions].astype(P.dtype, copy=False)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        qkv = matmul(normalise(x, norms[2 * i]), params[f"{block}.attn.in_proj_weight"].T)
        context = attend(qkv, vectors[f"{block}.attn.in_proj_bias"], tree, heads)
        if i == layers - 1:  # from here on each position is by itself, and only the ends are asked for
            x, context = x[tree.ends], context[tree.ends]
        add_product(context, params[f"{block}.attn.out_proj.weight"].T, x)
        inner = matmul(normalise(x, norms[2 * i + 1]), params[f"{block}.mlp.c_fc.weight"].T)
        gpu.by_rows(f"add_and_{activation}", inner, inner, vectors[f"{block}.mlp.c_fc.bias"])
        add_product(inner, params[f"{block}.mlp.c_proj.weight"].T, x)
    return matmul(normalise(x, norms[-1]), P)


def normalise(x, norm):
    """The layer norm of x and of the biases that it should have got."""
    return gpu.to_new("add_and_normalise", x, *norm, norm.weight.dtype.type(EPS))


def add_product(a, b, x):
    """x += a @ b, rounded once."""
    if x.dtype == np.float16:
        gpu.product(a, b, x, add=True)
    else:
        x += a @ b


def attend(qkv, bias, tree, heads):
    """What each node gathers [N, D] from its ancestors and itself; qkv [N, 3 D] is still without its bias."""
    N, D = len(qkv), qkv.shape[1] // 3
    context = cupy.empty((N, D), qkv.dtype)
    sizes = (np.int32(size) for size in (tree.first_node, N, heads, tree.path.shape[1]))
    arrays = (qkv, bias, context, tree.path, tree.row, tree.positions)
    kernel = gpu.kernel("attend", qkv.dtype.char, gpu.PACK, D // heads)
    gpu.launch(kernel, -(-N * heads // 4), *arrays, *sizes)  # a warp to four heads
    return context
