"""Slips in the weights of one layer, as faults: another tensor, another layer's, transposed or missing.

The catalogue's faults are the same in every layer. A slip is a mistake of one line in a conversion script,
so every layer is a candidate, and every slip says its full names:

    transformer.resblocks.1.attn.k uses q of transformer.resblocks.1.attn.in_proj_weight
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minclip import model
from minclip.params import BLOCK, count_layers
from minclip.porting.faults import Fault, port_with
from minclip.porting.port import Port, split
from minclip.porting.quantization import CODES, codes_of

SOURCE = "slips planted in ports of mlx-examples, KerasHub and tinygrad; no public thread names the layer"
CHECK = "compare the conversion script's line for it; minclip.check_weights compares the port's own arrays"
LINEAR = {"attn": "attn.out_proj", "mlp.c_fc": "mlp.c_fc", "mlp": "mlp.c_proj"}  # stage -> module
NORMS = ("ln_1", "ln_2")
EPS = (1e-6, 1e-12, 1e-3, 0.0)
AFTER_BLOCKS = 10**6
MATRICES = ("attn.q", "attn.k", "attn.v", "attn", "mlp.c_fc", "mlp")


@dataclasses.dataclass(frozen=True)
class Slip(Fault):
    """A `Fault` in one layer.

    first   the first block that it changes; for ln_final and text_projection a number above any block's
    """

    first: int = AFTER_BLOCKS


def slip(id: str, first: int, summary: str, change: Callable[[Port], Any]) -> Slip:
    """Return a slip. Its id names stages without the words that all blocks share: "W1-1.attn.k-1.attn.q"."""
    return Slip(id.replace(BLOCK, ""), summary, SOURCE, CHECK, change, first=first)


# One tensor in place of another. A place is a stage, whose weight and bias may come from elsewhere.


def parameters_of(stage: str) -> tuple[str, str, slice | None]:
    """Return (weight, bias, rows) of the parameters that a stage's product or norm reads."""
    block, _, name = stage.rpartition(".attn.")
    if block and name in ("q", "k", "v"):
        j = "qkv".index(name)
        return f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias", slice(j, j + 1)
    prefix, part = (stage[: -len(end)], end) if (end := ending(stage)) else ("", stage)
    module = prefix + LINEAR.get(part, part)
    if stage == "text_features":
        return "text_projection", "", None
    return f"{module}.weight", f"{module}.bias", None


def ending(stage: str) -> str:
    """Return the name of a stage inside its block."""
    return stage.split(".", 3)[3] if stage.startswith(BLOCK) and stage.count(".") > 2 else ""


def tensor(params: Mapping[str, Any], name: str, rows: slice | None) -> Any:
    """Return a parameter, or its q, k or v rows."""
    array = params[name]
    if rows is None:
        return array
    D = len(array) // 3
    return array[rows.start * D : rows.stop * D]


def put(port: Port, name: str, rows: slice | None, array: Any) -> None:
    """Set a parameter, or its q, k or v rows, of a port; the caller's arrays stay as they are."""
    if rows is None:
        port[name] = array
        return
    D = len(port[name]) // 3
    changed = port[name].copy()
    changed[rows.start * D : rows.stop * D] = array
    port[name] = changed


def named(name: str, rows: slice | None) -> str:
    """Return a tensor's name in words: "q of transformer.resblocks.1.attn.in_proj_weight"."""
    return name if rows is None else f"{'qkv'[rows.start]} of {name}"


def uses(stage: str, weight_of: str | None, bias_of: str | None, *, transposed: bool = False) -> Slip:
    """Return the slip by which a stage uses the weight and bias of other stages; "" is none, or plain."""
    weight, bias, rows = parameters_of(stage)
    changes = []
    for of, own, which, plain in ((weight_of, weight, 0, 1.0), (bias_of, bias, 1, 0.0)):
        if of is not None and not (of == stage and not (transposed and which == 0)):
            changes.append((of, own, which, plain))

    def change(port: Port) -> None:
        found = []
        for of, own, which, plain in changes:
            if of == "":
                found.append((own, np.full_like(tensor(port, own, rows), plain)))
                continue
            *names, other = parameters_of(of)
            array = tensor(port, names[which], other)
            found.append((own, array.T if transposed and which == 0 else array))
        for own, array in found:
            put(port, own, rows, array)

    said = [how_used(of, which, transposed) for of, _, which, _ in changes]
    summary = f"{stage} uses {' and '.join(said)}"
    kind = f"W1-{stage}-{weight_of}-{bias_of}{'-transposed' * transposed}"
    return slip(kind, layer_of(stage), summary, change)


def scaled(stage: str, factor: float) -> Slip:
    """Return the slip by which the matrix of a stage is too large by a factor."""
    weight, _, rows = parameters_of(stage)
    summary = f"{stage} uses {named(weight, rows)} times {factor:.6g}"
    summary += ": was the scale of its codes forgotten?" if factor > 2 else ""
    return slip(
        f"W9-{stage}",
        layer_of(stage),
        summary,
        lambda port: put(port, weight, rows, np.float32(factor) * tensor(port, weight, rows)),
    )


def codes(stage: str, kind: str) -> Slip:
    """Return the slip by which a stage uses the codes of its matrix, whose scale was forgotten."""
    weight, _, rows = parameters_of(stage)
    summary = f"{stage} uses {kind} codes of {named(weight, rows)}: their scale was forgotten"
    return slip(
        f"W9-{stage}-{kind}",
        layer_of(stage),
        summary,
        lambda port: put(port, weight, rows, codes_of(tensor(port, weight, rows), kind)),
    )


def how_used(of: str, which: int, transposed: bool) -> str:
    """Return in words what a stage uses for its weight or bias."""
    if of == "":
        return ("a weight of ones", "no bias")[which]
    *names, rows = parameters_of(of)
    return named(names[which], rows) + " transposed" * (transposed and which == 0)


def layer_of(stage: str) -> int:
    """Return the number of a stage's block; outside the blocks a number larger than any block's."""
    return int(stage.split(".")[2]) if stage.startswith(BLOCK) else AFTER_BLOCKS


# The candidates.


def slips(params: Mapping[str, Any]) -> Iterator[Slip]:
    """Yield every slip of a model, the likelier first: inside a layer, then of neighbors, then of any two."""
    layers = range(count_layers(params))
    for i in layers:
        yield from inside(i)
    yield from at_the_end(params, len(layers))
    for i in layers:
        yield left_out(i)
        for j in layers:
            if abs(i - j) == 1:
                yield from from_layer(i, j)
    for i, j in itertools.combinations(layers, 2):
        yield swapped(i, j)
    for i in layers:
        for j in layers:
            if abs(i - j) > 1:
                yield from from_layer(i, j)


def inside(i: int) -> Iterator[Slip]:
    """Yield the slips within block i."""
    block = f"{BLOCK}{i}."
    q, k, v = (f"{block}attn.{part}" for part in "qkv")
    for a, b in itertools.permutations((q, k, v), 2):
        yield uses(a, b, a)
        yield uses(a, a, b)
        yield uses(a, b, b)
    for a, b in itertools.combinations((q, k, v), 2):
        yield exchanged(a, b)
    for stage in (q, k, v, f"{block}attn"):
        yield uses(stage, stage, stage, transposed=True)
    yield all_transposed(i)
    for stage in (q, k, v, f"{block}attn", f"{block}mlp.c_fc", f"{block}mlp"):
        yield uses(stage, stage, "")
    yield uses(f"{block}attn", f"{block}attn", f"{block}mlp")
    yield uses(f"{block}mlp", f"{block}mlp", f"{block}attn")
    yield exchanged_biases(f"{block}attn", f"{block}mlp")
    for stage, other in ((f"{block}ln_1", f"{block}ln_2"), (f"{block}ln_2", f"{block}ln_1")):
        for weight, bias in (
            (other, other),
            (other, stage),
            (stage, other),
            ("", ""),
            (stage, ""),
            ("", stage),
        ):
            yield uses(stage, weight, bias)
        for eps in EPS:
            yield other_eps(stage, eps)
    for part, kind in itertools.product(MATRICES, CODES):
        yield codes(f"{block}{part}", kind)


def at_the_end(params: Mapping[str, Any], layers: int) -> Iterator[Slip]:
    """Yield the slips of ln_final: another norm's weights, no weights, another eps."""
    last = f"{BLOCK}{layers - 1}.ln_2"
    for weight, bias in ((last, last), ("", ""), ("ln_final", ""), ("", "ln_final")):
        yield uses("ln_final", weight, bias)
    for eps in EPS:
        yield other_eps("ln_final", eps)


def from_layer(i: int, j: int) -> Iterator[Slip]:
    """Yield the slips by which block i has tensors of block j."""
    yield loaded_from(i, j)
    for part in (*MATRICES, *NORMS):
        stage, other = f"{BLOCK}{i}.{part}", f"{BLOCK}{j}.{part}"
        yield uses(stage, other, other)
        yield uses(stage, other, stage)
        yield uses(stage, stage, other)


def exchanged(a: str, b: str) -> Slip:
    """Return the slip by which two of q, k and v are swapped, weight and bias."""
    *names, rows_a = parameters_of(a)
    rows_b = parameters_of(b)[2]

    def change(port: Port) -> None:
        for name in names:
            first, second = tensor(port, name, rows_a), tensor(port, name, rows_b)
            put(port, name, rows_a, second)
            put(port, name, rows_b, first)

    return slip(f"W2-{a}-{b}", layer_of(a), f"{a} and {b} are swapped, weights and biases", change)


def exchanged_biases(a: str, b: str) -> Slip:
    """Return the slip by which the biases of two stages are swapped."""
    names = parameters_of(a)[1], parameters_of(b)[1]

    def change(port: Port) -> None:
        port[names[0]], port[names[1]] = port[names[1]], port[names[0]]

    return slip(f"W2-{names[0]}-{names[1]}", layer_of(a), f"{names[0]} and {names[1]} are swapped", change)


def all_transposed(i: int) -> Slip:
    """Return the slip by which every square matrix of a block is used transposed."""
    block = f"{BLOCK}{i}."

    def change(port: Port) -> None:
        parts = np.split(port[f"{block}attn.in_proj_weight"], 3)
        port[f"{block}attn.in_proj_weight"] = np.concatenate([part.T for part in parts])
        port[f"{block}attn.out_proj.weight"] = port[f"{block}attn.out_proj.weight"].T

    return slip(f"W3-{i}", i, f"{block}attn uses its q, k, v and out_proj weights transposed", change)


def loaded_from(i: int, j: int) -> Slip:
    """Return the slip by which block i has all weights of block j."""

    def change(port: Port) -> None:
        for name in [name for name in port if name.startswith(f"{BLOCK}{j}.")]:
            port[name.replace(f"{BLOCK}{j}.", f"{BLOCK}{i}.", 1)] = port[name]

    return slip(f"W4-{i}-{j}", i, f"{BLOCK}{i} uses all weights of {BLOCK}{j}", change)


def swapped(i: int, j: int) -> Slip:
    """Return the slip by which blocks i and j are swapped."""

    def change(port: Port) -> None:
        order = list(range(port.layers))
        order[i], order[j] = j, i
        port.blocks(order)

    return slip(f"W5-{i}-{j}", i, f"{BLOCK}{i} and {BLOCK}{j} are swapped", change)


def left_out(i: int) -> Slip:
    """Return the slip by which block i is left out."""
    return slip(
        f"W6-{i}",
        i,
        f"{BLOCK}{i} is left out",
        lambda port: port.blocks([n for n in range(port.layers) if n != i]),
    )


def other_eps(stage: str, eps: float) -> Slip:
    """Return the slip by which one layer norm has another eps."""
    prefix, part = (f"{BLOCK}{layer_of(stage)}.", ending(stage)) if ending(stage) else ("", stage)

    def change(port: Port) -> None:
        def norm(at: Any) -> Any:
            if port.prefix != prefix:
                return at[part]
            port.norm, usual = {**port.norm, "eps": eps}, port.norm
            try:
                return port.layer_norm(part, at["residual" if part == "ln_2" else "x"])
            finally:
                port.norm = usual

        port.replace(part, norm)

    return slip(f"W7-{stage}-{eps:g}", layer_of(stage), f"{stage} has eps {eps:g}, not 1e-5", change)


# Trying them.


class SlipRuns:
    """Runs of the reference with one slip more than a chain of faults, from the block that it changes on.

    streams         the input of every block [n, L, D], and the last block's output
    port_features   the features of the chain alone
    """

    def __init__(self, params: Mapping[str, Any], tokens: Any, batch: Any, chain: Sequence[Fault] = ()):
        self.params, self.tokens, self.batch, self.chain = params, tokens, batch, tuple(chain)
        self.streams: list[Any] = []
        port = port_with(self.chain, params, tokens, batch)

        def tap(name: str, array: Any) -> Any:
            array = port.tap(name, array)
            if name == "embedding" or split(name)[1] == "block":
                self.streams.append(array)
            return array

        self.port_features = port.run(tap)

    def features(self, slip: Slip) -> Any:
        """Return features [n, E] with a slip."""
        port, first = self.begin(slip)
        with np.errstate(all="ignore"):
            x = model.transformer(self.streams[first], port, range(first, port.layers), port.tap)
            return model.read_out(x, port.tokens, port, port.tap)[1]

    def stage(self, slip: Slip, name: str) -> Any:
        """Return a stage of the block that a slip changes first, or after the blocks; None for another."""
        port, first = self.begin(slip)
        kept: list[Any] = []

        def tap(stage: str, array: Any) -> Any:
            array = port.tap(stage, array)
            if stage == name:
                kept.append(array)
            return array

        x = self.streams[first]
        with np.errstate(all="ignore"):
            if first < port.layers:
                x = model.transformer(x, port, range(first, first + 1), tap)
            if not name.startswith(BLOCK):
                model.read_out(x, port.tokens, port, tap)
        return kept[0] if kept else None

    def begin(self, slip: Slip) -> tuple[Port, int]:
        """Return a port with a slip, about to run, and the first block that it has to run."""
        first = min(slip.first, len(self.streams) - 1)
        port = port_with([*self.chain, slip], self.params, self.tokens, self.batch)
        port.at["x"] = self.streams[first]
        return port, first
