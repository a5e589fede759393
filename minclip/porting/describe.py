"""Sentences about features that no known bug explains, and texts that tell two bugs apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.porting.faults import port_with
from minclip.porting.rounding import ALLOWANCE, relative_l2
from minclip.porting.runs import names
from minclip.porting.search import Search
from minclip.porting.target import Target
from minclip.porting.verdict import Finding


def describe(target: Target, tolerance: float) -> list[str]:
    """Return sentences on how the port's features differ from the reference's by more than tolerance."""
    port, reference = target.features, target.reference
    broken = ~np.isfinite(port).all(axis=-1)
    if broken.any():
        return [describe_broken(port, broken)]
    if not target.has_width_of(reference):
        return [f"The features have {port.shape[-1]} columns, the model's {reference.shape[-1]}."]
    if len(port) > 1 and relative_l2(port, port[:1]).max() < 1e-5:
        return [
            "All rows are equal: the pooled position does not depend on the text, or the ids do not reach "
            "the lookup."
        ]
    if not target.aligned:
        return []
    reference = target.transform(reference)
    wrong = relative_l2(port, reference) > tolerance
    notes = describe_geometry(port, reference, tolerance)
    return notes if wrong.all() or not wrong.any() else [*notes, describe_rows(target, wrong)]


def describe_broken(port: Any, broken: Any) -> str:
    """Return a sentence on where the features are not finite."""
    kind = "NaN" if np.isnan(port).any() else "infinite"
    rows = np.flatnonzero(broken)
    if broken.all():
        where = "in every row"
    elif broken[rows[0] :].all():
        where = f"from row {rows[0]} on"
    else:
        where = f"in {len(rows)} of {len(port)} rows, first in row {rows[0]}"
    return f"There is {kind} {where}: a row masked entirely, a division by zero, or float16 that overflows."


def describe_geometry(port: Any, reference: Any, tolerance: float) -> list[str]:
    """Return sentences on whether all rows differ in the same simple way."""
    notes = []
    factors = (port * reference).sum(-1) / (reference * reference).sum(-1)
    if relative_l2(port, factors[:, None] * reference).max() <= tolerance:
        notes.append(
            f"After normalizing, the rows are equal: only their lengths differ, by factors of "
            f"{factors.min():.4g} to {factors.max():.4g}."
        )
    shift = port - reference
    if len(port) > 1 and relative_l2(shift, shift.mean(axis=0, keepdims=True)).max() <= 10 * tolerance:
        notes.append("Every row is the reference's plus the same vector: a bias, or a mean, after pooling.")
    if relative_l2(np.sort(port), np.sort(reference)).max() <= tolerance:
        notes.append("Every row holds the reference's numbers in another order: the columns are rearranged.")
    return notes + describe_products(port, reference, tolerance)


def describe_products(port: Any, reference: Any, tolerance: float) -> list[str]:
    """Return a sentence on whether the texts' inner products or cosines agree."""
    if len(port) < 3 or relative_l2(port, reference).min() < 0.3:  # too near to be rotated
        return []
    if relative_l2(port @ port.T, reference @ reference.T, axis=None) <= 10 * tolerance:
        return [
            "All inner products between texts agree: these are the reference's features in other axes "
            "(rotated, reordered or with signs flipped); cosine similarities are right."
        ]
    if relative_l2(cosines(port), cosines(reference), axis=None) <= 10 * tolerance:
        return ["All cosines between texts agree: these are the reference's features scaled and rotated."]
    return []


def cosines(x: Any) -> Any:
    """Return the cosines between all rows."""
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ x.T


def describe_rows(target: Target, wrong: Any) -> str:
    """Return a sentence on which rows differ, in terms of a property of their tokens if one fits."""
    rows = np.arange(len(wrong))
    for words, expected in row_properties(target):
        if (expected == wrong).all():
            return f"{words[0].upper()}{words[1:]}."
    return f"{wrong.sum()} of {len(wrong)} rows differ: {', '.join(map(str, rows[wrong][:8]))}."


def row_properties(target: Target) -> list[tuple[str, Any]]:
    """Return properties of the texts that may decide which rows differ: (words, which rows have it)."""
    tokens, length = target.tokens, target.length
    L, rows = tokens.shape[1], np.arange(len(tokens))
    last = np.where(length < L, tokens[:, -1], -1)
    end = tokens[rows, length - 1]
    holds_zero = ((tokens == 0) & (np.arange(L) < length[:, None])).any(axis=-1)
    properties = [
        ("texts with padding differ, those that fill the row agree", length < L),
        ("texts that fill the row differ, those with padding agree", length == L),
        ("texts padded with the end of text differ, the others agree", last == end),
        ("texts padded with 0 differ, the others agree", last == 0),
        ("texts that hold id 0 before their end differ, the others agree", holds_zero),
        ("the first row agrees, the others differ", rows > 0),
    ]
    for limit in np.unique(length)[1:]:
        properties.append((f"texts of {limit} tokens or more differ, shorter ones agree", length >= limit))
        properties.append((f"texts of fewer than {limit} tokens differ, longer ones agree", length < limit))
    for row in rows[1:]:
        properties.append((f"rows from {row} on differ, those before agree", rows >= row))
        properties.append((f"rows before {row} differ, those from there on agree", rows < row))
    return properties


def tell_apart(search: Search, first: Finding, other: Finding) -> str:
    """Return a sentence on which probe text gives different features for two findings."""
    target = search.target
    precision = target.precisions[0]
    visible = 10 * ALLOWANCE * search.rounding(precision)
    for label, tokens in telling_texts(target.params):
        a, b = (port_with(finding.faults, target.params, tokens).run() for finding in (first, other))
        if relative_l2(a, b).max() > visible:
            return f"{label} would tell it from {names(first.faults)}"
    dump = "a dump of the port's stages"
    better = dump if precision == "float32" else f"the port in float32, or {dump},"
    return f"no probe text tells it from {names(first.faults)}: {better} would"


def telling_texts(params: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return tokens [2, L] on which known bugs differ, each with a description."""
    V, L = len(params["token_embedding.weight"]), len(params["positional_embedding"])
    end = V - 1 if getattr(params, "eot", None) is None else params.eot  # type: ignore[attr-defined]

    def pair(
        length: int, other: int, pad: int = 0, starts: tuple[int, int] = (V - 2, V - 2), **ids: int
    ) -> Any:
        rows = np.full((2, L), pad)
        for row, n, start in zip(rows, (length, other), starts, strict=True):
            row[:n] = 3 + np.arange(n) * 31 % (V - 5)
            row[0], row[2], row[n - 1] = start, ids.get("holds", 3), end
        return rows

    short, long = min(7, L), min(50, L - 1)
    fills = pair(L, L)
    fills[1, 2] = 4
    return [
        ("a text padded with 0", pair(short, short + 1)),
        ("a text padded with the end-of-text id", pair(short, short + 1, end)),
        ('a text that holds id 0, "!", between words', pair(short, short + 1, holds=0)),
        ('a text that holds id 2, "#", between words', pair(short, short + 1, holds=2)),
        (f"a text of {long} tokens", pair(long, long - 1)),
        ("a text that fills the row", fills),
        ("a long text after a short one", pair(short, long)),
        ("a row without the start of text", pair(short, short + 1, starts=(5, 6))),
    ]
