"""Run the reference with faults, with as little work as possible.

A fault of pooling or projection acts after the blocks: it needs no second pass through them. A text that is
shorter than its row is cut to its length, unless a fault lets later positions reach the features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from minclip.params import BLOCK, Params, trim
from minclip.porting.catalogue import CATALOGUE, NORMALIZED
from minclip.porting.faults import Fault, port_with
from minclip.porting.port import Port, split
from minclip.porting.rounding import at_precision
from minclip.porting.target import Target
from minclip.tracing import trace


class Runs:
    """Features of a target's texts with faults in the reference."""

    def __init__(self, target: Target, catalogue: Sequence[Fault] = CATALOGUE):
        self.params, self.tokens, self.batch = target.params, target.tokens, target.batch
        self.target, self.all_faults = target, catalogue
        self.params_at: dict[str, Params] = {"float32": self.params}
        self.without_blocks = self.params.with_arrays(
            {name: array for name, array in self.params.items() if not name.startswith(BLOCK)}
        )
        self.streams: dict[tuple[str, tuple[int, ...]], tuple[Any, Any]] = {}

    @functools.cached_property
    def clean(self) -> Port:
        """The reference without a fault."""
        return Port(self.params, self.tokens, self.batch)

    @functools.cached_property
    def catalogue(self) -> list[Fault]:
        """The faults that a port of this model and these texts can have."""
        target = self.target
        return [
            fault
            for fault in self.all_faults
            if fault.fits(self.clean)
            and (target.complete or fault.needs != "batch")
            and not (target.unit and fault is NORMALIZED)  # the target's transform applies it
        ]

    @functools.cached_property
    def place(self) -> dict[str, int]:
        """The place of each stage in the order of computation."""
        stages = trace(self.params, trim(self.params, self.tokens[:1]))
        return {name: i for i, name in enumerate(stages)}

    @functools.cached_property
    def first_stage(self) -> dict[str, int]:
        """The place of the first stage that each fault can change, by its id."""
        return {fault.id: first_place(fault, self.clean, self.place) for fault in self.catalogue}

    def at_precision(self, precision: str) -> Params:
        """Return the reference's parameters rounded to a precision, from memory if rounded before."""
        if precision not in self.params_at:
            self.params_at[precision] = at_precision(self.params, precision)
        return self.params_at[precision]

    def port(self, faults: Sequence[Fault], tokens: Any, precision: str = "float32") -> Port:
        """Return the reference with faults, at a precision, to run on tokens."""
        return port_with(faults, self.at_precision(precision), tokens, self.batch, precision)

    def acts_after_blocks(self, fault: Fault) -> bool:
        """Tell whether a fault changes nothing before the final norm."""
        return self.first_stage.get(fault.id, len(self.place)) >= self.place["ln_final"]

    def texts(self, faults: Sequence[Fault], rows: Any) -> tuple[Any, Any]:
        """Return the tokens to run so that faults show in some rows, and where these rows then are."""
        needs = {fault.needs for fault in faults}
        if "batch" in needs:
            return self.tokens, rows
        tokens = self.tokens[rows]
        return tokens if "padding" in needs else trim(self.params, tokens), slice(None)

    def run(self, faults: Sequence[Fault], rows: Any = None, precision: str = "float32") -> Any:
        """Return features [rows, E] of some rows, or of all, with faults."""
        tokens, rows = self.texts(faults, np.arange(len(self.tokens)) if rows is None else rows)
        return self.port(faults, tokens, precision).run()[rows]

    def quick(self, faults: Sequence[Fault], rows: Any) -> Any:
        """Return features of some rows with faults in float32, reusing earlier runs of the blocks."""
        early = [fault for fault in faults if not self.acts_after_blocks(fault)]
        if len(early) > 1:
            return self.run(faults, rows)
        tokens, rows = self.texts(faults, rows)
        x, features = self.stream(early, tokens)
        if len(faults) > len(early):
            features = self.finish(faults, tokens, x)
        return features[rows]

    def stream(self, early: Sequence[Fault], tokens: Any) -> tuple[Any, Any]:
        """Return (the last block's output, features) of tokens with at most one fault, from memory if run."""
        key = (names(early), tokens.shape)  # the texts tried, complete or cut to their length, or all texts
        if key not in self.streams:
            port = self.port(early, tokens)
            features = port.run()
            self.streams[key] = port.at["x"], features
        return self.streams[key]

    def finish(self, faults: Sequence[Fault], tokens: Any, x: Any) -> Any:
        """Return features of tokens from the last block's output x, with faults."""
        port = port_with(faults, self.without_blocks, tokens, self.batch)
        port.replaced["embedding"] = [lambda at: x]
        return port.run()


def first_place(fault: Fault, clean: Port, place: dict[str, int]) -> int:
    """Return the place of the first stage that a fault can change."""
    port = port_with([fault], clean, clean.tokens, clean.batch)
    changed = [read_by(name) for name in {*port, *clean} if port.get(name) is not clean.get(name)]
    for name in port.replaced:
        changed.append(name if name in place else f"{BLOCK}0.{name}".removesuffix(".block"))
    changed += ["token_embedding"] * (port.tokens is not clean.tokens)
    changed += [f"{BLOCK}0.ln_1"] * bool(port.norm)
    changed += [f"{BLOCK}0.attn.q"] * (port.heads != clean.heads)
    changed += [f"{BLOCK}0.mlp.gelu"] * (port.activation != clean.activation)
    last = place["ln_final"] - 1  # the place of a block that the reference does not have
    return min(place.get(name, last) for name in changed)


READ_BY = {
    "attn.in_proj_weight": "attn.q",
    "attn.in_proj_bias": "attn.q",
    "attn.out_proj": "attn",
    "mlp.c_proj": "mlp",
    "text_projection": "text_features",
}


def read_by(parameter: str) -> str:
    """Return the first stage that reads a parameter."""
    prefix, name = split(parameter)
    stage = name.removesuffix(".weight").removesuffix(".bias")
    return prefix + READ_BY.get(stage, stage)


def names(faults: Sequence[Fault]) -> str:
    """Return the ids of faults, joined by +."""
    return " + ".join(fault.id for fault in faults)
