"""`minclip.fast.hidden_states`: the states of many texts, on all cores and with no work done twice.

Attention is causal, so texts that begin alike share the states of their common beginning, padding included.
The texts are a tree as in `minclip.fast.tree`, but each reaches to its last position. Equal texts are
computed once. Texts that differ share no padding: texts of 13 tokens padded to 77 share a few positions each.

Each node of the tree is a row of a matrix [N, D], and goes through the functions of `minclip.model`. Only
attention differs (`cpu.attend`). On the GPU, `minclip.hidden_states` computes some texts at a time.

Axes: those of minclip.model, and  N nodes   T different texts
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip import model
from minclip.arrays import array_module, to_float32, with_leading
from minclip.fast.blas import one_blas_thread
from minclip.fast.cpu import attend, counter
from minclip.fast.tree import chunks, slices, sort
from minclip.fast.twigs import grow
from minclip.params import (
    Floats,
    architecture,
    as_params,
    check_skip,
    check_tokens,
    end_of_text,
    heads_and_activation,
    keep,
    text_dtype,
)

NODES = 1024  # nodes of one tree: enough for BLAS at its best; texts share little, so more would gain little
GPU_POSITIONS = 16384  # positions that the GPU computes at once
COPIED = 64  # texts whose states are copied to the result at once


def hidden_states(
    params: Mapping[str, Any],
    tokens: Any,
    *,
    skip: int = 0,
    norm: bool = True,
    pooled: bool = False,
    progress: bool = False,
    nodes: int | None = None,
) -> Floats | tuple[Floats, Floats, Floats | None]:
    """Return the states of `minclip.hidden_states`, to rounding, for many texts.

    params, tokens, skip, norm, pooled   as `minclip.hidden_states` takes them
    progress                             whether to show a progress bar on standard error
    nodes                                how many positions to compute at once: 1024 per thread by default,
                                         16384 on the GPU. A position takes about 100 bytes per unit of width

    Beside the result, this takes a float32 copy of float16 parameters on the CPU, and the memory of `nodes`
    positions per thread. The result itself is large: 118 KB per text of 77 positions at width 768 in float16.
    `minclip.corpus.write_states` writes it to a file, chunk by chunk.

    Returns states [..., L, D], or (states, pooled, features), in the dtype and on the device of params.
    Raises and warns as `minclip.hidden_states` does.

    >>> import minclip
    >>> params = minclip.load()
    >>> tokens = minclip.tokenize([f"{n} red balloons" for n in range(100)], pad=49407)
    >>> hidden_states(params, tokens, skip=1, norm=False).shape
    (100, 77, 128)
    """
    layers, _, _ = architecture(params)
    check_skip(layers, skip)
    tokens, leading = check_tokens(params, tokens)  # (B, L)
    results = empty_results(params, tokens, pooled)
    on_host = isinstance(params["ln_final.weight"], np.ndarray)
    compute = compute_trees if on_host else compute_batches
    with counter(len(tokens), progress) as done:
        for texts in compute(params, tokens, skip, norm, results, nodes):
            done(texts)
    return with_leading(leading, *results)


def empty_results(params, tokens, pooled):
    """Return arrays for states [B, L, D]; with pooled also for rows [B, D] and features [B, E] or None."""
    xp, dtype = array_module(params["ln_final.weight"]), text_dtype(params)
    (B, L), D, P = tokens.shape, len(params["ln_final.weight"]), params.get("text_projection")
    states = xp.empty((B, L, D), dtype)
    if not pooled:
        return (states,)
    return states, xp.empty((B, D), dtype), None if P is None else xp.empty((B, P.shape[1]), dtype)


def compute_batches(params, tokens, skip, norm, results, nodes):
    """Fill the results by `minclip.hidden_states`, some texts at a time; yield the number of texts done."""
    pooled = len(results) > 1
    for part in slices(len(tokens), (nodes or GPU_POSITIONS) // tokens.shape[1]):
        found = model.hidden_states(params, tokens[part], skip=skip, norm=norm, pooled=pooled)
        for result, array in zip(results, found if pooled else (found,), strict=True):
            if result is not None:
                result[part] = array
        yield part.stop - part.start


def compute_trees(params, tokens, skip, norm, results, nodes):
    """Fill the results from a tree per chunk of sorted texts, on all cores; yield how many texts are done."""
    if not len(tokens):
        return
    params = to_compute_in(params)
    texts = sort(tokens, np.full(len(tokens), tokens.shape[1] - 1))

    def compute(chunk):
        first, last = np.searchsorted(texts.group, (chunk.start, chunk.stop))
        found = encode_tree(params, texts, chunk, skip, norm, pooled=len(results) > 1)
        if not np.isfinite(found[0]).all() and chunk.stop - chunk.start > 1:
            # A NaN among a twig's keys passes its mask, as NaN - inf is NaN. Apart, texts share no twig.
            middle = (chunk.start + chunk.stop) // 2
            return compute(slice(chunk.start, middle)) + compute(slice(middle, chunk.stop))
        for part in slices(last - first, COPIED):
            members = slice(first + part.start, first + part.stop)
            copy_rows(found, texts.group[members] - chunk.start, results, texts.order[members])
        return last - first

    from concurrent.futures import ThreadPoolExecutor  # here, because it takes time to import

    with one_blas_thread() as threads, ThreadPoolExecutor(threads) as pool:
        yield from pool.map(compute, chunks(texts.new_nodes, threads, nodes or NODES))


def to_compute_in(params):
    """Return params with float16 arrays in float32. The token embedding stays: few of its rows are read."""
    params = as_params(params)
    wide = {name: to_float32(array) for name, array in params.items() if name != "token_embedding.weight"}
    return params.with_arrays({**params, **wide})


def encode_tree(params, texts, chunk, skip, norm, pooled):
    """Return the states of the nodes [N, D] of a chunk's rows, the path of each row [T, L], and more.

    With pooled, also the pooled rows [T, D] and the features [T, E] or None.
    """
    rows = texts.rows[chunk]
    tree = grow(rows, texts.lengths[chunk], texts.shared[chunk])
    layers, _, _ = architecture(params)
    x = params["token_embedding.weight"][tree.ids].astype(text_dtype(params), copy=False)  # (N, D)
    x = x + params["positional_embedding"][tree.positions].astype(x.dtype, copy=False)
    for i in range(layers - skip):
        x = residual_block(x, params, i, tree.twigs)
    states = model.layer_norm(x, *model.weight_and_bias(params, "ln_final")) if norm else x
    if not pooled:
        return states, tree.path
    for i in range(layers - skip, layers):
        x = residual_block(x, params, i, tree.twigs)
    x = x[tree.path[np.arange(len(rows)), end_of_text(params, rows)]]  # (T, D)
    x = model.layer_norm(x, *model.weight_and_bias(params, "ln_final"))
    P = params.get("text_projection")
    return states, tree.path, x, None if P is None else x @ P


def residual_block(x, params, i, twigs):
    """Return `minclip.model.residual_block` of the nodes x [N, D] of a tree."""
    heads, activation = heads_and_activation(params)
    block, D = f"transformer.resblocks.{i}", x.shape[1]
    h = model.layer_norm(x, *model.weight_and_bias(params, f"{block}.ln_1"))
    qkv = model.linear(h, params[f"{block}.attn.in_proj_weight"], params[f"{block}.attn.in_proj_bias"])
    qkv[:, :D] *= (D // heads) ** -0.5
    kv = qkv[:, D:].reshape(-1, 2, D).swapaxes(0, 1)  # (2, N, D)
    context = np.empty_like(h)
    for some in twigs:
        attend(qkv[:, :D], kv, some, D // heads, context)
    x = x + model.linear(context, *model.weight_and_bias(params, f"{block}.attn.out_proj"))
    h = model.layer_norm(x, *model.weight_and_bias(params, f"{block}.ln_2"))
    return x + model.mlp(h, params, f"{block}.mlp", activation, keep)


def copy_rows(found, rows, results, texts):
    """Copy the states, pooled rows and features of some rows of a chunk to the results for some texts."""
    states, path, *others = found
    results[0][texts] = states[path[rows]]
    for result, array in zip(results[1:], others, strict=True):
        if result is not None:
            result[texts] = array[rows]
