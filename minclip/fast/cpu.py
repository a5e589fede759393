"""`minclip.fast` on the CPU: the tree's nodes as the rows of matrices, on all cores.

All steps but attention treat each node by itself, so the nodes are simply the rows of a matrix [N, D].
There are two ways to use the cores:

- A large corpus is cut into chunks. Each chunk is a tree of its own, for one thread.
- A few texts are one tree for all threads. Each thread takes a share of every block: some heads of attention
  and some columns of the MLP. Twice per block the threads add up their results, as in Megatron-LM
  (Shoeybi et al., 2019). All other steps are small, and each thread does them for itself.

Either way BLAS keeps to one thread, and the threads read the parameters where they are, without a copy.

Axes: those of minclip.model, and  N nodes   T texts   C known nodes   G M W as in the module `twigs`
      d = D / threads columns of attention   f = F / threads columns of the MLP
"""

from contextlib import contextmanager

import numpy as np

from minclip.arrays import to_float32
from minclip.fast.blas import has_small_kernels, one_blas_thread
from minclip.fast.team import Team
from minclip.fast.tree import chunks, slices, sort
from minclip.fast.twigs import grow
from minclip.model import ACTIVATIONS, weight_and_bias
from minclip.params import EPS, as_params, count_layers, end_of_text, heads_and_activation

NODES = 4096  # nodes of a chunk: enough to share their beginnings, few enough for little memory
TEAM_NODES = 512  # up to here the texts are one tree for all threads
TILE = 2048  # nodes that go through an MLP together: enough for BLAS at its best
CACHED = 2**17  # numbers of an element-wise step, few enough to stay in the cache from one line to the next
SMALL_ROWS = 256  # up to here, small products are faster than one, where BLAS has kernels for them
STRIP = 64  # rows of a small product
SMALL = 1200  # numbers in the result of a small product: the most that OpenBLAS gives to those kernels
SMALL_MULTIPLICATIONS = 10**6  # the most of a small product, likewise
WIDE = 256  # a narrower tower spends its time in Python, where threads wait for each other
FEW_ROWS = 7  # up to here, one product per row is faster than a product of matrices
GEMV = 2**16  # numbers of a weight that stay in the cache from one row to the next


def working_params(params):
    """Return params in the dtype to compute in: float32 for float16. Arrays of that dtype are shared.

    The token embedding keeps its dtype, because only some of its rows are needed.
    """
    params = as_params(params)
    dtype = to_float32(params["text_projection"]).dtype
    embedding = {"token_embedding.weight": params["token_embedding.weight"]}
    return params.map(lambda array: array.astype(dtype, copy=False)) | embedding


def encode_corpus(params, tokens, dtype, progress=False, nodes=None, prefixes=None):
    """Return features [B, E] of trimmed tokens [B, L].

    params     as `working_params` returns them
    dtype      of the features
    nodes      how many nodes to compute at once; the default is NODES per thread
    prefixes   Prefixes of these params, or None
    """
    features = np.empty((len(tokens), params["text_projection"].shape[1]), dtype)  # (B, E)
    if len(tokens) == 0:
        return features
    texts = sort(tokens, end_of_text(params, tokens))

    def encode_chunk(chunk, threads=1):
        found = encode_rows(params, texts, chunk, threads, prefixes)  # (T, E)
        first, last = np.searchsorted(texts.group, (chunk.start, chunk.stop))
        features[texts.order[first:last]] = found[texts.group[first:last] - chunk.start]
        return last - first

    with one_blas_thread() as threads, counter(len(tokens), progress) as done:
        if texts.new_nodes.sum() <= min(TEAM_NODES, nodes or NODES):
            done(encode_chunk(slice(0, len(texts.rows)), threads))
        else:
            parts = chunks(texts.new_nodes, threads, nodes or NODES)
            from concurrent.futures import ThreadPoolExecutor  # here, because it takes time to import

            with ThreadPoolExecutor(threads) as pool:
                for count in pool.map(encode_chunk, parts):
                    done(count)
    return features


@contextmanager
def counter(total, progress):
    """Yield a function to call with the number of texts that are done. With progress it moves a bar."""
    if not progress:
        yield lambda count: None
        return
    from tqdm import tqdm  # here, because it takes time to import

    with tqdm(total=total, unit=" texts") as bar:
        yield bar.update


def encode_rows(params, texts, chunk, threads, prefixes):
    """Return features [T, E] of a chunk of the sorted texts."""
    tree = grow(texts.rows[chunk], texts.lengths[chunk], texts.shared[chunk], prefixes)
    features = encode_tree(params, tree, threads, prefixes)
    if len(features) == 1 or np.isfinite(features).all():
        return features
    # A NaN among a twig's keys passes the mask, because NaN - inf is NaN. Alone, a text shares no twig.
    middle = (chunk.start + chunk.stop) // 2
    halves = slice(chunk.start, middle), slice(middle, chunk.stop)
    return np.concatenate([encode_rows(params, texts, half, threads, prefixes) for half in halves])


def encode_tree(params, tree, threads=1, prefixes=None, record=None):
    """Return features [T, E] of a tree's texts, computed by some threads together.

    record, an array [layers, 2, N, D], is filled with the keys and values of the nodes.
    """
    heads, _ = heads_and_activation(params)
    if params["ln_final.weight"].size < WIDE:
        threads = 1
    team = Team(min(threads, heads))
    return team.run(lambda number: Share(params, tree, team, number).encode(prefixes, record))


class Share:
    """The work of one thread of a team on a tree, and its buffers.

    columns   its columns of attention, those of its heads
    hidden    its columns of the MLP
    x, h      the residual stream and its layer norm [N, D]; in the last block those of the ends [T, D]
    """

    def __init__(self, params, tree, team, number):
        self.params, self.tree, self.team, self.number = params, tree, team, number
        self.layers = count_layers(params)
        heads, self.activation = heads_and_activation(params)
        D, F = len(params["text_projection"]), len(params["transformer.resblocks.0.mlp.c_fc.bias"])
        self.K = D // heads
        heads_before, hidden_before = (
            [n * of // team.size for n in (number, number + 1)] for of in (heads, F)
        )
        self.columns = slice(*(self.K * n for n in heads_before))
        self.hidden = slice(*hidden_before)
        self.x = embed(params, tree)
        self.h = np.empty_like(self.x)
        N, dtype = len(self.x), self.x.dtype
        d, f = (s.stop - s.start for s in (self.columns, self.hidden))
        self.qkv = np.empty((3, N, d), dtype)
        self.context = np.empty((N, d), dtype)
        self.inner = np.empty((min(N, TILE), f), dtype)
        self.changes = np.empty((2, min(N, TILE), D), dtype)  # two, as Team.exchange requires

    def encode(self, prefixes=None, record=None):
        """Return features [T, E]. Every thread of the team returns the same."""
        self.add_and_normalize(slice(None), [], 0, "transformer.resblocks.0.ln_1")
        for layer in range(self.layers):
            name = f"transformer.resblocks.{layer}"
            self.project(f"{name}.attn.in_proj")
            kv = self.qkv[1:]  # (2, N, d)
            if record is not None:
                record[layer][:, :, self.columns] = kv
            if len(self.tree.known):
                known = prefixes.kv[layer][:, self.tree.known, self.columns]
                kv = np.concatenate([known, kv], axis=1)  # (2, C + N, d)
            for twigs in self.tree.twigs:
                attend(self.qkv[0], kv, twigs, self.K, self.context)
            if layer == self.layers - 1:  # from here on no node reads another, and only the ends are needed
                self.x, self.h, self.context = (a[self.tree.ends] for a in (self.x, self.h, self.context))
            next_norm = f"transformer.resblocks.{layer + 1}.ln_1" if layer < self.layers - 1 else "ln_final"
            for rows in slices(len(self.x), TILE):
                self.finish_block(rows, name, next_norm)
        return self.h @ self.params["text_projection"]

    def project(self, name):
        """Compute q, k and v from h. q is scaled."""
        D, N = self.h.shape[1], len(self.h)
        weight = self.params[f"{name}_weight"].reshape(3, D, D)[:, self.columns]  # (3, d, D)
        bias = self.params[f"{name}_bias"].reshape(3, 1, D)[:, :, self.columns]  # (3, 1, d)
        multiply(self.h, weight, self.qkv)
        for rows in slices(N, CACHED // D):
            self.qkv[:, rows] += bias
            self.qkv[0, rows] *= self.K**-0.5

    def finish_block(self, rows, name, next_norm):
        """Do all steps of a block after attention, for some rows: update x and h."""
        (out, out_bias), (c_fc, c_fc_bias), (c_proj, c_proj_bias) = (
            weight_and_bias(self.params, f"{name}.{layer}")
            for layer in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        )
        by_attention, by_mlp = self.changes[:, : rows.stop - rows.start]
        inner = self.inner[: rows.stop - rows.start]
        multiply(self.context[rows], out[:, self.columns], by_attention)
        changes = self.team.exchange(self.number, by_attention)
        self.add_and_normalize(rows, changes, out_bias, f"{name}.ln_2")
        multiply(self.h[rows], c_fc[self.hidden], inner)
        activate(inner, c_fc_bias[self.hidden], self.activation)
        multiply(inner, c_proj[:, self.hidden], by_mlp)
        self.add_and_normalize(rows, self.team.exchange(self.number, by_mlp), c_proj_bias, next_norm)

    def add_and_normalize(self, rows, changes, bias, norm):
        """Add changes and bias to rows of x, and write their layer norm to h."""
        x, h, (weight, shift) = self.x[rows], self.h[rows], weight_and_bias(self.params, norm)
        D = x.shape[1]
        for strip in slices(len(x), CACHED // D):
            row, normed = x[strip], h[strip]
            for change in changes:
                row += change[strip]
            row += bias
            np.subtract(row, row.sum(axis=1, keepdims=True) / D, out=normed)
            normed *= ((np.einsum("nd,nd->n", normed, normed) / D + EPS) ** -0.5)[:, None]
            normed *= weight
            normed += shift


def embed(params, tree):
    """Return the sum of token and position embedding of each node [N, D]."""
    positions = params["positional_embedding"]
    return (
        params["token_embedding.weight"][tree.ids].astype(positions.dtype, copy=False)
        + positions[tree.positions]
    )


def multiply(x, weight, out):
    """Write x @ weight.T to out, for x [N, in], weight [..., out, in] and out [..., N, out].

    For a product of matrices BLAS first copies the weight to a layout of its own, which takes longer than to
    multiply a few rows. Kernels for small products do not copy, so some rows are multiplied by a few columns
    at a time. Where BLAS has no such kernels, a product with a vector does not copy either: few rows are
    multiplied one by one, by a block of the weight that stays in the cache meanwhile.
    """
    N, m = x.shape
    if N <= SMALL_ROWS and has_small_kernels():
        for rows in slices(N, STRIP):
            cells = min(SMALL, SMALL_MULTIPLICATIONS // m)
            blocks, parts = by_columns(weight, out[..., rows, :], cells // (rows.stop - rows.start))
            np.matmul(x[rows], blocks.swapaxes(-1, -2), out=parts)
    elif N <= FEW_ROWS:
        blocks, parts = by_columns(weight, out, GEMV // m)
        np.matmul(blocks[..., None, :, :], x[:, :, None], out=parts[..., None])
    else:
        np.matmul(x, weight.swapaxes(-1, -2), out=out)


def by_columns(weight, out, most):
    """Return weight [..., out, in] and out [..., N, out] as blocks of at most `most` columns of out.

    They are views [..., count, columns, in] and [..., count, N, columns].
    """
    *stack, n, m = weight.shape
    count = next(count for count in range(-(-n // max(1, most)), n + 1) if n % count == 0)
    blocks = weight.reshape(*stack, count, n // count, m)
    return blocks, out.reshape(*out.shape[:-1], count, n // count).swapaxes(-3, -2)


def attend(q, kv, twigs, K, context):
    """Write to context [N, d] what the nodes of some twigs gather, with q [N, d] and kv [2, C + N, d]."""
    G, W = twigs.keys.shape
    k, v = kv[:, twigs.keys].reshape(2, G, W, -1, K).swapaxes(2, 3)  # (G, H, W, K)
    H = k.shape[1]
    q = q[twigs.nodes].reshape(G, -1, H, K).transpose(0, 2, 3, 1)  # (G, H, K, M)
    # Keys come first and queries last, so that softmax runs over long rows of heads and queries.
    scores = np.empty((G, W, H, q.shape[-1]), q.dtype)
    by_head = scores.swapaxes(1, 2)  # (G, H, W, M)
    np.matmul(k, q, out=by_head)
    scores += twigs.mask[:, :, None]
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    context = context[twigs.nodes].reshape(G, -1, H, K).swapaxes(1, 2)  # (G, H, M, K)
    np.matmul(by_head.swapaxes(2, 3), v, out=context)


def activate(x, bias, activation):
    """Add bias to x and apply the activation, in place."""
    strips = slices(len(x), CACHED // x.shape[1])
    buffer = np.empty_like(x[strips[-1]])  # the last strip is the longest
    for strip in strips:
        row = x[strip]
        row += bias
        if activation == "quick_gelu":  # x sigmoid(1.702 x) is x / 2 (1 + tanh(0.851 x)), and tanh is fast
            gate = np.multiply(row, 0.851, out=buffer[: len(row)])
            np.tanh(gate, out=gate)
            gate += 1
            row *= gate
            row *= 0.5
        else:
            row[:] = ACTIVATIONS[activation](row)
