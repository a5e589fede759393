"""Every intermediate of the encoder, by name."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from minclip import model
from minclip.arrays import array_module, as_array
from minclip.params import Floats, Tap, Tokens, block_of, keep, nearest_key, trim
from minclip.tables import html_table, text_table


class Trace(dict[str, Floats]):
    """Every stage of one run: a dict from stage name to array, in the order of computation.

    `minclip.backward` returns one that holds gradients, from parameter or stage name to array.

    params      the parameters of the run; None for a trace that was read from a file
    tokens      the tokens of the run [B, L]
    tap         the tap of the run, or None
    gradient    the gradient of the features [B, E] that a trace of gradients started from; else None
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
        gradient: Floats | None = None,
        roundings: Mapping[str, Any] | None = None,
    ):
        super().__init__(stages)
        self.params = params
        self.tokens = tokens
        self.tap = tap
        self.gradient = gradient
        self.roundings = dict(roundings or {})

    def __missing__(self, name: str) -> Any:
        raise KeyError(nearest_key(name, self, "stage"))

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


def trace(
    params: Mapping[str, Any],
    tokens: Any,
    *,
    tap: Tap | None = None,
    stages: Literal["all", "blocks"] = "all",
) -> Trace:
    """Run the encoder and keep every stage: a `Trace`, from stage name to array, in order.

    params, tokens   as `encode_text` takes them; without a text_projection the last stage is "pooled"
    tap              as `encode_text` takes it; the trace holds the arrays that the tap returned
    stages           "blocks" keeps only the output of each block, which takes a fraction of the
                     memory. `minclip.backward` then computes each block a second time

    Every position of tokens [..., L] is computed at every stage, those after the end of text too. B is
    the product of the leading axes. Each array is a copy, on the device and in the dtype of params.
    In a float16 model the stages attn and mlp are float32: they are rounded with the sum they enter.
    Raises ValueError where tokens or params do not fit, as `encode_text` does.

    >>> import minclip
    >>> stages = trace(minclip.load(), minclip.tokenize("a cat"))
    >>> stages["transformer.resblocks.0.attn.weights"].shape
    (1, 2, 77, 77)
    """
    if stages not in ("all", "blocks"):
        raise ValueError(f"stages must be 'all' or 'blocks', not {stages!r}")
    kept = {}
    inner = keep if tap is None else tap

    def record(name: str, array: Floats) -> Floats:
        array = inner(name, array)
        if array is not None and (stages == "all" or block_of(name) in (None, name)):
            # encode_text refuses None, by the stage's name. Without a tap the trace alone holds the array.
            kept[name] = array if tap is None and is_own(array) else array.copy()
        return array

    model.encode_text(params, tokens, tap=record)
    tokens = np.array(as_array(tokens))
    return Trace(kept, params=params, tokens=tokens.reshape(-1, tokens.shape[-1]), tap=tap)


def is_own(array: Any) -> bool:
    """Tell whether array is not a view of a larger array."""
    return array.base is None or array.base.size == array.size


def recorder(stages: dict[str, Floats], tap: Tap | None, only: Container[str] | None = None) -> Tap:
    """Return a tap that calls another tap, and puts the arrays which that returns into stages."""
    inner = keep if tap is None else tap

    def record(name: str, array: Floats) -> Floats:
        array = inner(name, array)
        if only is None or name in only:
            stages[name] = array
        return array

    return record


def trimmed(trace: Trace) -> Trace:
    """Return the trace without the positions after the last end of text, whose gradients are 0.

    The arrays are views.
    """
    if trace.params is None or trace.tokens is None:
        return trace
    tokens = trim(trace.params, trace.tokens)
    L = tokens.shape[1]

    def cut(name: str, array: Floats) -> Floats:
        if name.endswith((".scores", ".masked", ".weights")):
            return array[:, :, :L, :L]
        if name.endswith((".q", ".k", ".v")):
            return array[:, :, :L]
        return array[:, :L] if array.ndim == 3 else array

    stages = {name: cut(name, array) for name, array in trace.items()}
    return Trace(stages, params=trace.params, tokens=tokens, tap=trace.tap)


def gradient_of_features(trace: Trace, gradient: Any) -> Floats:
    """Return the gradient of the features as a new array [B, E] of their dtype; None means zeros.

    Without a text projection the features are the pooled rows [B, D].
    Raises ValueError where the trace is not of `trace`, is in float16, or has features of another shape.
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"the trace must be one that minclip.trace returned, not {type(trace).__name__}")
    if trace.params is None or trace.tokens is None:
        raise ValueError("the trace has no params or tokens: give one that minclip.trace returned")
    features = trace["text_features" if "text_projection" in trace.params else "pooled"]
    xp = array_module(features)
    if features.dtype == np.float16:
        raise ValueError("gradients underflow in float16: trace params.astype('float32') instead")
    if gradient is None:
        return xp.zeros_like(features)
    gradient = xp.array(gradient, dtype=features.dtype)
    if gradient.shape[-1:] != features.shape[1:] or gradient.size != features.size:
        raise ValueError(
            f"the gradient has shape {list(gradient.shape)}, the features have {list(features.shape)}"
        )
    return gradient.reshape(features.shape)


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
