"""Every intermediate of the encoder, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from minclip import model
from minclip.arrays import as_array
from minclip.params import Floats, Tap, Tokens, block_of, keep
from minclip.tables import html_table, text_table


class Trace(dict[str, Floats]):
    """Every stage of one run: a dict from stage name to array, in the order of computation.

    params      the parameters of the run; None for a trace that was read from a file
    tokens      the tokens of the run [B, L]
    tap         the tap of the run, or None
    roundings   {precision: {stage: how far rounding moves it}}, as far as measured or read from a file;
                see `minclip.porting.rounding`

    Prints as a table, which shows every stage of the first block and the output of each later one.
    """

    def __init__(
        self,
        stages: Mapping[str, Any],
        *,
        params: Mapping[str, Any] | None = None,
        tokens: Tokens | None = None,
        tap: Tap | None = None,
        roundings: Mapping[str, Any] | None = None,
    ):
        super().__init__(stages)
        self.params = params
        self.tokens = tokens
        self.tap = tap
        self.roundings = dict(roundings or {})

    def __repr__(self) -> str:
        shown = shown_stages(self)
        table = text_table(TITLES, [(name, *summary(self[name])) for name in shown])
        hidden = len(self) - len(shown)
        return table + (f"\n... and {hidden} more stages inside the later blocks" if hidden else "")

    def _repr_html_(self) -> str:
        """Return the same table for Jupyter, where each later block unfolds."""
        shown = shown_stages(self)
        parts = [html_table(TITLES, [(name, *summary(self[name])) for name in shown])]
        hidden = [name for name in self if name not in shown]
        for block in dict.fromkeys(map(block_of, hidden)):
            rows = [(name, *summary(self[name])) for name in hidden if block_of(name) == block]
            parts.append(f"<details><summary>{block}</summary>{html_table(TITLES, rows)}</details>")
        return "".join(parts)


def trace(params: Mapping[str, Any], tokens: Any, *, tap: Tap | None = None) -> Trace:
    """Run the encoder and keep every stage: a `Trace`, from stage name to array, in order.

    params, tokens   as `encode_text` takes them; without a text_projection the last stage is "pooled"
    tap              as `encode_text` takes it; the trace holds what the tap returned

    Every position of tokens [..., L] is computed at every stage, those after the end of text too. B is
    the product of the leading axes. Each array is a copy, on the device and in the dtype of params.
    In a float16 model the stages attn and mlp are float32: they are rounded with the sum they enter.
    Raises ValueError where tokens or params do not fit, as `encode_text` does.

    >>> import minclip
    >>> stages = trace(minclip.load(), minclip.tokenize("a cat"))
    >>> stages["transformer.resblocks.0.attn.weights"].shape
    (1, 2, 77, 77)
    """
    stages = {}
    inner = keep if tap is None else tap

    def record(name: str, array: Floats) -> Floats:
        array = inner(name, array)
        if array is not None:  # which encode_text refuses, by the stage's name
            stages[name] = array.copy()
        return array

    model.encode_text(params, tokens, tap=record)
    tokens = np.array(as_array(tokens))
    return Trace(stages, params=params, tokens=tokens.reshape(-1, tokens.shape[-1]), tap=tap)


def shown_stages(names: Iterable[str]) -> list[str]:
    """Return the stages that a table shows: all of the first block, and the output of each later block."""
    names = list(names)
    first = next((block_of(name) for name in names if block_of(name)), None)
    later = {block_of(name) for name in names} - {first, None}
    return names if len(later) < 2 else [n for n in names if block_of(n) not in later or n in later]


TITLES = ("stage", "shape", "dtype", "min", "max", "norm", "NaN")


def summary(array: Any) -> tuple[str, ...]:
    """Return a stage's cells: shape, dtype; min, max and norm of the finite numbers; the count of NaN."""
    array = as_array(array)
    finite = array[np.isfinite(array)].astype(np.float64)
    numbers = (finite.min(), finite.max(), np.linalg.norm(finite)) if finite.size else (np.nan,) * 3
    shape = "[" + ", ".join(map(str, array.shape)) + "]"
    return shape, str(array.dtype), *(f"{number:.3g}" for number in numbers), str(np.isnan(array).sum())
