"""`minclip.fast` on the GPU: the tree's nodes as the rows of matrices.

Each step reads and writes memory as rarely as possible. A product adds the output of attention or MLP to
the stream directly. Biases are added by the kernel that reads next: attention adds those of q and v, the
activation adds the MLP's first. The biases of the stream itself are never written to it: every norm adds the
sum of all biases up to its place (`norms_of`).

The GPU also sorts the tokens and numbers the nodes, on a stream of its own, while it computes the texts
before. The host waits only for the sizes of that result, and where it is more than WAITING chunks ahead.

The main loop is `encode_corpus`. It plants the trees (`plant`) and encodes each one (`encode_tree`).
"""

import functools
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import cupy
import numpy as np
from tqdm import tqdm

from minclip.fast.tree import chunks, number_nodes, slices, sort
from minclip.gpu import steps
from minclip.params import EPS, architecture, end_of_text

NODES = 16384  # nodes computed at once; in float16 a node takes about 20 bytes per unit of width
TEXTS = 2**17  # texts sorted at once; a text takes about 32 bytes per position
WAITING = 2  # chunks that may wait for the GPU


@dataclass(frozen=True)
class Tree:
    """A tree on the GPU, and the texts that it holds.

    ids, positions, row   of each node [N]
    path                  the nodes that each row passes [T, L], counted from first_node on
    first_node            the number of this tree's first node
    ends                  the node at each row's end of text [T]
    order, group          which texts these are, and the row of each [B]
    """

    ids: Any
    positions: Any
    row: Any
    path: Any
    first_node: int
    ends: Any
    order: Any
    group: Any


class Norm(NamedTuple):
    """A layer norm, and the biases that are missing from the stream before it."""

    added: Any
    weight: Any
    bias: Any


def encode_corpus(params, tokens, progress, nodes=None, texts=None):
    """Return features [B, E] on the GPU of trimmed tokens [B, L] on the host, in the dtype of params."""
    P = params["text_projection"]
    layers, heads, _ = architecture(params)
    K = len(P) // heads
    if K % 8:
        raise ValueError(
            f"minclip.fast on the GPU needs a head width divisible by 8, not {K}: use minclip.encode_text"
        )
    compute_dtype = np.promote_types(P.dtype, np.float32)
    # Always copies, because kernels need aligned arrays.
    vectors = {name: array.astype(compute_dtype) for name, array in params.items() if array.ndim == 1}
    norms = norms_of(vectors, layers)
    features = cupy.empty((len(tokens), P.shape[1]), P.dtype)  # (B, E)
    computing = cupy.cuda.get_current_stream()
    with tqdm(total=len(tokens), unit=" texts", disable=not progress) as bar:
        queue = Queue(computing, bar)
        try:
            for part in slices(len(tokens), texts or TEXTS):
                for tree in planted(params, tokens[part], computing, nodes or NODES):
                    found = encode_tree(params, vectors, norms, tree)  # (T, E)
                    features[part][tree.order] = found[tree.group]
                    queue.append(tree)
            queue.finish(0)
        finally:
            computing.synchronize()  # if the call breaks off, too: no kernel may still read its trees
    return features


class Queue:
    """The trees that the GPU has not finished yet. A tree's memory must stay until then."""

    def __init__(self, stream, bar):
        self.stream = stream
        self.bar = bar
        self.trees = deque()

    def append(self, tree):
        """Add a tree, whose kernels are launched, and wait until at most WAITING trees are unfinished."""
        self.trees.append((tree, self.stream.record()))
        self.finish(WAITING)

    def finish(self, waiting):
        """Wait until at most `waiting` trees are unfinished."""
        while len(self.trees) > waiting:
            tree, done = self.trees.popleft()
            done.synchronize()
            self.bar.update(len(tree.order))


@functools.cache
def stream_of(device):
    """Return the stream that sorts tokens. All calls share it, because CuPy pools memory by stream."""
    return cupy.cuda.Stream(non_blocking=True)


def norms_of(vectors, layers):
    """Return the layer norms in order, each with the sum of the stream's biases up to its place."""
    missing, norms = 0 * vectors["ln_final.bias"], []

    def norm(name):
        norms.append(Norm(missing, vectors[f"{name}.weight"], vectors[f"{name}.bias"]))

    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        norm(f"{block}.ln_1")
        missing = missing + vectors[f"{block}.attn.out_proj.bias"]
        norm(f"{block}.ln_2")
        missing = missing + vectors[f"{block}.mlp.c_proj.bias"]
    norm("ln_final")
    return norms


def planted(params, tokens, computing, nodes):
    """Return the trees of tokens, made on the sorting stream; the computing stream waits for them."""
    sorting = stream_of(cupy.cuda.runtime.getDevice())
    with sorting:
        trees = plant(params, tokens, nodes)
    computing.wait_event(sorting.record())
    return trees


def plant(params, tokens, most):
    """Return the trees of tokens [B, L], of about `most` nodes each. Their nodes are numbered in one go."""
    tokens = cupy.asarray(tokens)
    texts = sort(tokens, end_of_text(params, tokens))
    parts = chunks(texts.new_nodes.get(), 1, most)
    starts = cupy.asarray([chunk.start for chunk in parts])
    shared = texts.shared.copy()
    shared[starts] = 0  # each chunk starts a tree
    numbered = number_nodes(texts.rows, texts.lengths, shared)
    row, position, path = (cupy.ascontiguousarray(array, dtype=np.int32) for array in numbered)
    ids = texts.rows[row, position]  # (N,)
    ends = path[cupy.arange(len(path)), texts.lengths - 1]  # (T,)
    first_node = [*cupy.searchsorted(row, starts).get().tolist(), len(row)]
    first_text = [*cupy.searchsorted(texts.group, starts).get().tolist(), len(tokens)]
    trees = []
    for i, chunk in enumerate(parts):
        nodes, members = (slice(first[i], first[i + 1]) for first in (first_node, first_text))
        trees.append(
            Tree(
                *(ids[nodes], position[nodes], row[nodes], path, nodes.start, ends[chunk] - nodes.start),
                *(texts.order[members], texts.group[members] - chunk.start),
            )
        )
    return trees


def encode_tree(params, vectors, norms, tree):
    """Return features [T, E] of a tree's texts. vectors are the biases, in the dtype of the arithmetic."""
    P = params["text_projection"]
    layers, heads, activation = architecture(params)
    x = params["token_embedding.weight"][tree.ids].astype(P.dtype, copy=False)  # (N, D)
    x = x + params["positional_embedding"][tree.positions].astype(P.dtype, copy=False)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        qkv = product(normalize(x, norms[2 * i]), params[f"{block}.attn.in_proj_weight"].T)
        context = attend(qkv, vectors[f"{block}.attn.in_proj_bias"], tree, heads)
        if i == layers - 1:  # no node reads another one from here on, and only the ends are returned
            x, context = x[tree.ends], context[tree.ends]
        add_product(context, params[f"{block}.attn.out_proj.weight"].T, x)
        inner = product(normalize(x, norms[2 * i + 1]), params[f"{block}.mlp.c_fc.weight"].T)
        steps.launch_on_rows(f"add_and_{activation}", inner, inner, vectors[f"{block}.mlp.c_fc.bias"])
        add_product(inner, params[f"{block}.mlp.c_proj.weight"].T, x)
    return product(normalize(x, norms[-1]), P)


def normalize(x, norm):
    """Return the layer norm of x plus the biases that are missing from it."""
    return steps.map_rows("add_and_normalize", x, *norm, norm.weight.dtype.type(EPS))


def product(a, b):
    """Return a @ b. float16 arrays are multiplied on the tensor cores."""
    return steps.matmul(a, b) if a.dtype == np.float16 else a @ b


def add_product(a, b, x):
    """Add a @ b to x, rounded once."""
    if x.dtype == np.float16:
        steps.product(a, b, x, add=True)
    else:
        x += a @ b


def attend(qkv, bias, tree, heads):
    """Return the context [N, D] of each node, from qkv [N, 3 D] without its bias, and that bias."""
    N, D = len(qkv), qkv.shape[1] // 3
    context = cupy.empty((N, D), qkv.dtype)
    sizes = (np.int32(size) for size in (tree.first_node, N, heads, tree.path.shape[1]))
    arrays = (qkv, bias, context, tree.path, tree.row, tree.positions)
    kernel = steps.kernel("attend", qkv.dtype.char, steps.PACK, D // heads)
    steps.launch(kernel, -(-N * heads // 4), *arrays, *sizes)  # a warp takes four heads
    return context
