"""A page to explore a comparison: traffic lights, and of each stage its error, histogram and worst rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from minclip.explorer.page import Page
from minclip.params import block_of
from minclip.porting.comparison import Comparison, Stage
from minclip.porting.stages import axes, part_of

BINS = np.arange(-10, 2.5, 0.5)  # powers of 10 of an error, relative to the stage's root mean square
WORST = 8  # rows listed of each stage


def compare_page(comparison: Comparison) -> Page:
    """Return a page of a comparison: statistics of every stage, no arrays, so at most a few hundred kB.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize("a cat")
    >>> trace = minclip.trace(params, tokens)
    >>> str(compare_page(minclip.compare(trace, dict(trace))))[:15]
    '<!doctype html>'
    """
    names = comparison.order
    data = {
        "verdict": comparison.verdict,
        "notes": comparison.notes,
        "first": comparison.first,
        "order": names,
        "blocks": list(dict.fromkeys(block for name in names if (block := block_of(name)))),
        "parts": list(dict.fromkeys(part_of(name) for name in names if block_of(name))),
        "stages": {name: facts(comparison, name, stage) for name, stage in comparison.stages.items()},
    }
    return Page.from_template("comparison.html", "A port beside the reference", data)


def facts(comparison: Comparison, name: str, stage: Stage) -> dict[str, Any]:
    """Return the numbers of a stage that the page shows."""
    found = {key: value for key, value in stage.to_dict().items() if value is not None}
    found = {key: printable(value) for key, value in found.items()}
    if name in comparison.pairs:
        a, b = (np.asarray(array, dtype=np.float64) for array in comparison.pairs[name])
        found |= {"histogram": histogram(a, b), "worst": worst_rows(name, a, b, comparison.text)}
    return found


def printable(value: Any) -> Any:
    """Return a number that JSON has: a float of six digits, or "inf" and "nan" as text."""
    if not isinstance(value, float):
        return value if isinstance(value, str | int) else str(value)
    return float(f"{value:.6g}") if np.isfinite(value) else str(value)


def histogram(a: Any, b: Any) -> dict[str, Any]:
    """Return how many numbers of b differ from a by each power of 10 of a's root mean square."""
    both = np.isfinite(a) & np.isfinite(b)
    size = np.sqrt(np.mean(a[both] ** 2)) if both.any() else 0
    apart = abs(b[both] - a[both]) / (size or 1)
    different = apart[apart > 0]
    powers = np.clip(np.log10(different), BINS[0], BINS[-1] - 1e-9)
    counts = np.histogram(powers, BINS)[0]
    return {"counts": counts.tolist(), "equal": int(len(apart) - len(different)), "other": int((~both).sum())}


def worst_rows(name: str, a: Any, b: Any, text: Any) -> list[list[Any]]:
    """Return the rows with the largest relative error: [text, position, error], None for a missing axis.

    Positions after the end of a text are left out.
    """
    letters = axes(name).split()
    kept = [letter for letter in ("B", "L") if letter in letters]
    others = tuple(i for i, letter in enumerate(letters) if letter not in kept)
    finite = np.isfinite(a) & np.isfinite(b)
    difference = np.where(
        finite,
        b - np.where(finite, a, 0),
        np.where(np.isnan(a) | (np.isfinite(a) == np.isfinite(b)), 0, np.inf),
    )
    size = np.sqrt((np.where(np.isfinite(a), a, 0) ** 2).sum(axis=others))
    with np.errstate(all="ignore"):
        error = np.sqrt((difference**2).sum(axis=others)) / size
    error = np.where(np.isnan(error), 0, error)  # 0 / 0
    if kept == ["B", "L"] and text is not None:
        error = np.where(text, error, 0)
    places = np.argsort(-error, axis=None, kind="stable")[:WORST]
    found = []
    for place in places:
        at = dict(zip(kept, map(int, np.unravel_index(place, error.shape)), strict=True))
        found.append([at.get("B"), at.get("L"), printable(float(error.ravel()[place]))])
    return [row for row in found if row[2]]
