"""A `Port`: the reference encoder with something changed.

A port runs on `minclip.encode_text` itself, through a tap, so the reference stays one page and a fault is a
line or two that says how the port differs:

    port.replace("ln_final", lambda at: at["x"])

`at` holds the stages of the current block computed so far under their short names ("ln_1", "attn.q", ...),
and "x", the block's input. Axes are those of minclip/model.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from minclip.params import BLOCK, EPS, Params, as_params, block_of, count_layers, end_of_text, text_dtype
from minclip.porting.rounding import round_to, run
from minclip.porting.stages import part_of


class Port(Params):
    """Parameters by name, as `encode_text` takes them, and everything else that a port may change.

    tokens      integers [B, L] to encode
    batch       the batch [N, L] whose rows they are, for faults that depend on other rows
    norm        keyword arguments of `layer_norm` below: how the port's layer norm differs
    replaced    stage -> the functions that replace it, in turn
    precision   the precision that every stage is rounded to, or None
    """

    def __init__(self, params: Mapping[str, Any], tokens: Any, batch: Any = None):
        params = as_params(params)
        super().__init__(params, activation=params.activation, heads=params.heads, eot=params.eot)
        self.tokens = tokens
        self.batch = tokens if batch is None else batch
        self.norm: dict[str, Any] = {}
        self.replaced: dict[str, list[Callable[[Any], Any]]] = {}
        self.precision: str | None = None
        self.at: dict[str, Any] = {}
        self.prefix = ""

    def run(self, tap: Any = None) -> Any:
        """Return features [B, E] of the changed encoder, once. Another tap must call this port's own."""
        try:
            return run(self, self.tokens, tap or self.tap)
        finally:
            self.replaced = {}  # its functions hold this port, which would outlive its use with its arrays

    @property
    def layers(self) -> int:
        """The number of residual blocks."""
        return count_layers(self)

    @property
    def end(self) -> Any:
        """The position of each text's end [B], by the reference's rule."""
        return end_of_text(self, self.tokens)

    @property
    def batch_end(self) -> Any:
        """The position of the end of each text of the batch [N], by the reference's rule."""
        return end_of_text(self, self.batch)

    # The changes that faults are made of.

    def weights(self, ending: str, change: Callable[[Any], Any]) -> None:
        """Pass every parameter whose name has this ending through change."""
        for name in [name for name in self if name.endswith(ending)]:
            self[name] = change(self[name])

    def replace(self, stage: str, function: Callable[[Any], Any]) -> None:
        """Replace a stage by function(at), in every block that has it."""
        self.replaced.setdefault(stage, []).append(function)

    def mask(self, allowed: Callable[[Any, Any, Any], Any], blocked: float = -math.inf) -> None:
        """Attend where allowed(query, key, at) is true, and add blocked to the scores elsewhere."""

        def masked(at: Any) -> Any:
            scores = at["attn.scores"]
            query, key = np.ogrid[: scores.shape[-2], : scores.shape[-1]]
            return np.where(allowed(query, key, at), scores, scores + blocked)

        self.replace("attn.masked", masked)

    def blocks(self, order: Iterable[int]) -> None:
        """Run the blocks in another order, or fewer, or some twice."""
        old = {name: self.pop(name) for name in list(self) if name.startswith(BLOCK)}
        for new, i in enumerate(order):
            for name, array in old.items():
                if name.startswith(f"{BLOCK}{i}."):
                    self[name.replace(f"{BLOCK}{i}.", f"{BLOCK}{new}.")] = array

    def layer_norm(self, name: str, x: Any, **changes: Any) -> Any:
        """Return the port's own layer norm of x; ln_1 and ln_2 are the current block's."""
        full = name if name == "ln_final" else f"{self.prefix}{name}"
        return layer_norm(x, self[f"{full}.weight"], self[f"{full}.bias"], **{**self.norm, **changes})

    def embed(self, ids: Any) -> Any:
        """Return rows of the token embedding. Indices out of range wrap, as NumPy's and CuPy's do."""
        table = self["token_embedding.weight"]
        return table[ids % len(table)].astype(text_dtype(self))

    # How encode_text runs a port.

    def tap(self, name: str, array: Any) -> Any:
        """Return the port's own array for a stage."""
        self.prefix, stage = split(name)
        at = self.at
        at[stage] = array
        if self.norm and stage in ("ln_1", "ln_2", "ln_final"):
            at[stage] = self.layer_norm(stage, at["residual" if stage == "ln_2" else "x"])
        for function in self.replaced.get(stage, ()):
            at[stage] = function(at)
        if self.precision:
            at[stage] = round_to(at[stage], self.precision)
        if stage in ("embedding", "block"):
            at["x"] = at[stage]
        return at[stage]


def layer_norm(
    x: Any,
    weight: Any,
    bias: Any,
    eps: float = EPS,
    ddof: int = 0,
    center: bool = True,
    outside: bool = False,
) -> Any:
    """Return layer norm as ports write it: other eps, unbiased, eps outside the root, or not centered."""
    centered = x - x.mean(axis=-1, keepdims=True) if center else x
    variance = (centered * centered).sum(axis=-1, keepdims=True) / (x.shape[-1] - ddof)
    deviation = variance**0.5 + eps if outside else (variance + eps) ** 0.5
    return centered / deviation * weight + bias


@functools.lru_cache(1024)
def split(name: str) -> tuple[str, str]:
    """Return a stage's or parameter's block prefix and its short name, "block" for a block's output."""
    block = block_of(name)
    return (f"{block}.", part_of(name) or "block") if block else ("", name)
