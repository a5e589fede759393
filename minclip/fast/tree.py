"""The tree of the texts that begin alike: sort the texts, number the nodes, cut the work into slices.

Attention is causal: the activations at a position depend on the ids up to that position and on no later
one. Texts that begin alike therefore share all activations of their common beginning, and a corpus is a
tree. Its nodes are the different beginnings. The parent of a node is the beginning shorter by one id:

    <start> ─ a ─ photo ─ of ─┬─ a ─┬─ cat ─ <end>
                              │     └─ dog ─ <end>         12 nodes for 21 positions
                              └─ two ─ cats ─ <end>

Sorted texts put the nodes in preorder: the ancestors of a node come before the node, and its descendants
come right after it.

Every function takes NumPy or CuPy arrays.

Axes:  B texts   T different texts   L positions   N nodes
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from minclip.arrays import array_module


@dataclass(frozen=True)
class SortedTexts:
    """The different rows among some tokens, sorted.

    rows      ids [T, L] in sorted order, -1 after the end of text
    lengths   the number of ids of each row [T], start and end included
    shared    how many first ids each row has in common with the row before [T]
    order     the B texts in sorted order are tokens[order]
    group     the row of each text in sorted order [B]
    """

    rows: Any
    lengths: Any
    shared: Any
    order: Any
    group: Any

    @property
    def new_nodes(self):
        """The number of nodes that each row adds to those of the rows before [T]."""
        return self.lengths - self.shared


def sort(tokens, ends):
    """Return the SortedTexts of tokens [B, L], whose rows end at the positions ends [B]."""
    xp = array_module(tokens)
    lengths = ends + 1
    rows = xp.where(xp.arange(tokens.shape[1]) < lengths[:, None], tokens.astype(np.int32), -1)
    order = xp.lexsort(rows.T[::-1])
    rows, lengths = rows[order], lengths[order]
    differ = rows != rows[xp.arange(len(rows)) - 1]
    shared = xp.where(differ.any(axis=1), differ.argmax(axis=1), lengths)
    shared = xp.where(xp.arange(len(rows)) == 0, 0, shared)  # there is no row before the first
    is_new = shared < lengths
    (kept,) = is_new.nonzero()
    return SortedTexts(rows[kept], lengths[kept], shared[kept], order, is_new.cumsum() - 1)


def number_nodes(rows, lengths, shared):
    """Number the nodes of sorted rows in preorder.

    Returns (row, position, path). row and position [N] are a row that passes each node, and where. path
    [T, L] holds the node that each row passes at each position; after the row's end it may hold anything.
    A row with shared 0 starts another tree, whose nodes continue the numbering.

        rows                    lengths  shared  path
        <start> a   cat <end>      4        0    0 1 2 3      makes 0, 1, 2, 3
        <start> a   dog <end>      4        2    0 1 4 5      makes 4, 5
        <start> two <end>          3        1    0 6 7        makes 6, 7
    """
    at = array_module(rows).arange(rows.shape[1])
    is_new = (at >= shared[:, None]) & (at < lengths[:, None])  # (T, L)
    nodes = is_new.cumsum(dtype=np.int32).reshape(is_new.shape) - 1
    # At each position, a row passes the newest node there: its own, or that of the nearest row before.
    # is_new.T goes position by position, and `newest` counts its nodes in that order.
    newest = is_new.T.cumsum(dtype=np.int32) - 1
    return *is_new.nonzero(), nodes.T[is_new.T][newest].reshape(is_new.T.shape).T


def chunks(new_nodes, threads, most):
    """Cut the sorted rows into slices of similar work: about `most` nodes at most, as many for each thread.

    new_nodes [T] is on the host. A row longer than `most` has a slice of its own.
    """
    nodes = new_nodes.cumsum()
    count = threads * math.ceil(nodes[-1] / most / threads)
    bounds = np.searchsorted(nodes, nodes[-1] * np.arange(1, count) / count)
    bounds = np.unique([0, *bounds, len(nodes)]).tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def slices(length, most):
    """Cut range(length) into slices of similar length, at most `most` each, and at least one slice."""
    count = math.ceil(length / max(1, most))
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]
