"""Published figures, and the same figures as the weights at hand give them.

A source is `Vectors`, from published.npz, or `Printed`, the digits in somebody's page or notebook.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, ClassVar

import numpy as np

from minclip.arrays import as_array, normalize
from minclip.fast import encode_text as encode_many
from minclip.model import encode_text, hidden_states
from minclip.tokenizer import tokenize

FEW = 32  # up to this many texts, the reference `encode_text` computes the vectors


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Published feature vectors of a model, one per word of a list.

    id          name of the numbers in published.npz
    origin      repository, path, commit and license
    allowed     largest relative L2 error of one vector that is accepted
    basis       why that much is allowed
    strong      whether a disagreement counts against the weights
    templates   the prompts of a word; several are averaged, as unit vectors
    unit        whether the published vectors have norm 1
    """

    id: str
    model: str
    origin: str
    allowed: float
    basis: str
    strong: bool = True
    measure: ClassVar[str] = "relative L2"
    templates: tuple[str, ...] = ("{}",)
    unit: bool = False

    @property
    def words(self) -> list[str]:
        return word_lists()[self.id]

    def without_features(self) -> None:
        """Return None: a tower without projection has no vectors."""

    @property
    def figures(self) -> np.ndarray:
        """Return the published numbers [words, E], NaN for the ones that are not shipped."""
        return numbers(self.id)

    def labels(self) -> list[str]:
        """Return one prompt per vector, to name it by."""
        return [fill(self.templates[0], word) for word in self.words]

    def compute(self, params: Mapping[str, Any], rows: slice = slice(None)) -> np.ndarray:
        """Return the features [words, E] that params give, float64 on the host."""
        words = self.words[rows]
        prompts = [fill(template, word) for word in words for template in self.templates]
        encode = encode_text if len(prompts) <= FEW else encode_many
        features = as_array(encode(params, tokenize(prompts))).astype(np.float64)
        if len(self.templates) > 1:
            features = normalize(features).reshape(len(words), len(self.templates), -1).mean(axis=1)
        return normalize(features) if self.unit else features

    def errors(self, ours: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """Return the relative L2 error of each vector; of a part of its numbers, scaled to all of them."""
        theirs, norms = self.figures[rows], norms_of(self.id)[rows]
        shipped = ~np.isnan(theirs)
        squares = np.where(shipped, (ours - np.nan_to_num(theirs)) ** 2, 0)  # NaN of ours stays NaN
        return np.sqrt(squares.sum(axis=1) / shipped.mean(axis=1)) / norms


@dataclasses.dataclass(frozen=True)
class Printed:
    """Numbers that somebody printed of one text. Each row is (array, position, first column, values).

    The array is "states" [L, D] (after ln_final), "pooled" [D] or "features" [E]. A negative position or
    column counts from the end.
    """

    id: str
    model: str
    origin: str
    allowed: float
    basis: str
    text: str
    rows: tuple[tuple[str, int, int, tuple[float, ...]], ...]
    strong: bool = True
    pad: int = 0
    measure: ClassVar[str] = "absolute"

    @property
    def figures(self) -> list[np.ndarray]:
        return [np.array(values) for *_, values in self.rows]

    def labels(self) -> list[str]:
        return [f"{self.text!r}, {name}{f'[{at}]' if name == 'states' else ''}" for name, at, *_ in self.rows]

    def without_features(self) -> Printed | None:
        """Return the rows that a tower without projection gives, None if there are none."""
        rows = tuple(row for row in self.rows if row[0] != "features")
        return dataclasses.replace(self, rows=rows) if rows else None

    def compute(self, params: Mapping[str, Any], rows: slice = slice(None)) -> list[np.ndarray]:
        """Return the numbers that params give, one array per row, float64 on the host."""
        tokens = tokenize(self.text, pad=self.pad)
        arrays = dict(
            zip(("states", "pooled", "features"), hidden_states(params, tokens, pooled=True), strict=True)
        )
        found = []
        for name, position, first, values in self.rows[rows]:
            array = as_array(arrays[name])[0]
            row = array[position] if name == "states" else array
            found.append(row[np.arange(first, first + len(values))].astype(np.float64))
        return found

    def errors(self, ours: list[np.ndarray], rows: slice = slice(None)) -> np.ndarray:
        """Return the largest absolute error of each row's printed numbers."""
        return np.array([np.abs(a - b).max() for a, b in zip(ours, self.figures[rows], strict=True)])


def fill(template: str, word: str) -> str:
    """Return the prompt of a word. {a} is its article."""
    return template.format(word, a="an" if word[0] in "aeiou" else "a")


@functools.cache
def archive() -> dict[str, np.ndarray]:
    with resources.files("minclip.verification").joinpath("published.npz").open("rb") as file:
        return dict(np.load(file))


@functools.cache
def word_lists() -> dict[str, list[str]]:
    return json.loads(archive()["words"].tobytes())


def numbers(name: str) -> np.ndarray:
    """Return a source's numbers [n, E] in float64. `stripes` says which of them are shipped."""
    complete, striped = archive()[f"{name}.complete"], archive()[f"{name}.striped"]
    E = complete.shape[1]
    figures = np.full((len(complete) + len(striped), E), np.nan)
    figures[: len(complete)] = complete
    if len(striped):
        figures[stripes(len(complete), len(figures), E, E // striped.shape[1])] = striped.ravel()
    return figures


def norms_of(name: str) -> np.ndarray:
    """Return the norms of a source's complete vectors [n]."""
    return archive()[f"{name}.norms"].astype(np.float64)


def stripes(first: int, n: int, E: int, step: int) -> np.ndarray:
    """Return which numbers [n, E] of the vectors from `first` on are shipped: every step-th, in turn.

    Every vector is checked on E / step numbers, and every column by one vector in `step`. A fault in the
    weights moves all numbers of a vector or all vectors of a column, so either way it is seen.
    """
    row, column = np.ogrid[:n, :E]
    return (row >= first) & (column % step == row % step)
