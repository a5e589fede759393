"""The tree as the CPU computes it: nodes as rows, and the small attentions that connect them.

Attention takes some nodes in a row at once, a twig. In preorder, whatever a node of a twig attends to is
among the twig's own nodes or above the first of them. So a twig needs a small dense attention only, with a
mask that keeps each node to its own ancestors and itself.

Axes:  T texts   L positions   N nodes   G twigs   M nodes of a twig   W keys of a twig
       C known nodes, whose keys and values were computed before (`Prefixes`)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minclip.fast.tree import number_nodes

DENSE = 64  # up to here, all nodes are one twig
TWIG = 16  # nodes of a twig in a larger tree
TWIGS = 8  # twigs attended at once
GROUP = 4  # BLAS multiplies this many rows at once; of fewer than 8 the tree takes one by one


class Twigs(NamedTuple):
    """Some twigs of the same size.

    nodes   a slice of the nodes, of G M nodes
    keys    the keys that each twig reads [G, W]: known nodes count from 0, new nodes from C
    mask    0 where a node sees a key, else -inf [G, W, M]
    """

    nodes: slice
    keys: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Tree:
    """The nodes of some texts, in preorder. The last one may be repeated.

    ids, positions   of each node [N]
    path             the nodes that each text passes [T, L], known nodes first, as keys are counted
    ends             the node at each text's end [T]
    twigs            all nodes again, as a list of Twigs
    known            the nodes of Prefixes that the texts pass [C]
    """

    ids: np.ndarray
    positions: np.ndarray
    path: np.ndarray
    ends: np.ndarray
    twigs: list
    known: np.ndarray


@dataclass(frozen=True)
class Prefixes:
    """Beginnings of texts whose keys and values are known.

    ids     the ids of each prefix [P, L], -2 after its end
    nodes   the node at each position [P, L]
    kv      keys and values of the nodes [layers, 2, nodes, D]
    """

    ids: np.ndarray
    nodes: np.ndarray
    kv: np.ndarray

    def match(self, rows):
        """Return how many first ids of each row [T, L] a prefix has too [T], and their nodes [T, L]."""
        L = min(rows.shape[1], self.ids.shape[1])
        shared = (rows[:, None, :L] == self.ids[:, :L]).cumprod(axis=2).sum(axis=2)  # (T, P)
        best = shared.argmax(axis=1)
        nodes = np.zeros(rows.shape, int)
        nodes[:, :L] = self.nodes[best, :L]
        return shared[np.arange(len(rows)), best], nodes

    def extended(self, ids, known, kv):
        """Return Prefixes with one more: its ids, its nodes that are known, and kv of its other nodes."""
        count, new = self.kv.shape[2], np.full((2, 1, self.ids.shape[1]), -2)
        new[0, 0, : len(ids)] = ids
        new[1, 0, : len(ids)] = [*known, *range(count, count + kv.shape[2])]
        ids, nodes = np.concatenate([[self.ids, self.nodes], new], axis=1)
        return Prefixes(ids, nodes, np.concatenate([self.kv, kv], axis=2))


def grow(rows, lengths, shared, prefixes=None):
    """Return the Tree of sorted rows [T, L], without the nodes that prefixes know."""
    count, nodes = prefixes.match(rows) if prefixes else (np.zeros_like(lengths), np.zeros(rows.shape, int))
    row, position, path = number_nodes(rows, lengths, np.maximum(np.append(0, shared[1:]), count))
    at = np.arange(rows.shape[1])
    is_known = at < count[:, None]  # (T, L)
    known, first = np.unique(nodes[is_known], return_index=True)  # (C,)
    C, known_positions = len(known), is_known.nonzero()[1][first]
    ends = path[np.arange(len(rows)), lengths - 1]
    path = np.where(is_known, np.searchsorted(known, nodes), path + C)  # from here on, numbered as the keys
    twig, total = layout(len(row))
    row, position = (np.pad(index, (0, total - len(index)), mode="edge") for index in (row, position))  # (N,)
    twigs = np.arange(total).reshape(-1, twig)
    twigs = [
        twigs_of(twigs[a : a + TWIGS], row, position, path, known_positions)
        for a in range(0, len(twigs), TWIGS)
    ]
    return Tree(rows[row, position], position, path, ends, twigs, known)


def layout(count):
    """Return how many nodes a twig has in a tree of `count` nodes, and to how many to repeat the last one."""
    if count <= DENSE:
        total = count if count < 2 * GROUP else -(-count // GROUP) * GROUP
        return total, total
    return TWIG, -(-count // TWIG) * TWIG


def twigs_of(nodes, row, position, path, known_positions):
    """Return the Twigs of nodes [G, M], which are new nodes counted from 0.

    The keys of a twig are all known nodes, then the new nodes above its first one, then its own. In the
    tree of the module `tree`, with twigs of four nodes and no known nodes:

        third twig    8 9 10 11                 <end> of dog, two, cats, <end> of cats
        its keys      0 1 2 3 4 7, 8 9 10 11    the path to node 8 passes 0 1 2 3 4 7
        node 10 sees  0 1 2 3 9 10              4, 7 and 8 are masked, and 11 as well
    """
    C, first = len(known_positions), nodes[:, :1]
    known = np.arange(C) + 0 * first  # (G, C)
    at = np.arange(position[first].max())
    above = path[row[first], at]
    above = np.where((at < position[first]) & (above >= C), above, -1)  # -1 is nobody's ancestor
    keys = np.concatenate([known, above, nodes + C], axis=1)  # (G, W)
    places = [known_positions + 0 * known, at + 0 * above, position[nodes]]
    key_position = np.concatenate(places, axis=1)[..., None]  # (G, W, 1)
    row, position = row[nodes][:, None], position[nodes][:, None]  # (G, 1, M)
    sees = (path[row, key_position] == keys[..., None]) & (key_position <= position)  # (G, W, M)
    mask = np.where(sees, np.float32(0), np.float32(-math.inf))
    return Twigs(slice(nodes[0, 0], nodes[-1, -1] + 1), keys, mask)
