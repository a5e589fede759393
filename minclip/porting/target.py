"""The `Target` of a search: a port's features, the reference's, and how the two are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.params import Params, check_tokens, end_of_text, trim
from minclip.porting.port import Port
from minclip.porting.rounding import host_params, possible_precisions, relative_l2

ROWS = 32  # texts that are compared, at most
CLEAN = 0.01  # of the largest error of a text: a text with less shows little of the bug


class Target:
    """A port's features beside the reference's.

    params        the reference, on the host; with the identity as projection where it has none
    batch         the tokens [N, L] that the port was given
    tokens        the rows of batch that are compared [n, L], ROWS at most
    rows          indices into tokens of the texts that candidates are tried on
    features      the port's features [n, E] for tokens, in float64
    reference     the reference's features for tokens
    precisions    the precisions that the port may have computed in, the finest first
    aligned       whether there is a row of features for every text
    unit          whether every row of the port's features has length 1
    """

    def __init__(self, params: Mapping[str, Any], tokens: Any, features: Any, dtype: Any = None):
        self.params = with_projection(host_params(params))
        self.batch = check_tokens(self.params, tokens)[0]
        self.reference = self.encode_all()
        features = check_features(upright(as_array(features), self.reference), len(self.batch))
        self.precisions = possible_precisions(features, dtype)
        self.features = features.astype(np.float64)
        self.aligned = len(features) == len(self.batch)
        self.unit = has_unit_length(self.features)
        self.tokens, self.rows = self.batch, np.arange(len(self.batch))
        if self.aligned:
            self.select_rows()
        else:
            self.features = self.features[:ROWS]

    def encode_all(self) -> Any:
        """Return the reference's features [N, E] of every text in float64, computed some texts at a time."""
        parts = [self.batch[i : i + ROWS] for i in range(0, len(self.batch), ROWS)]
        runs = [Port(self.params, trim(self.params, part)).run() for part in parts]
        return np.concatenate(runs).astype(np.float64)

    def select_rows(self) -> None:
        """Choose the texts to compare, most of them the worst ones, and the text to try candidates on."""
        off = np.ones(len(self.batch))
        if self.has_width_of(self.reference):
            off = relative_l2(self.features, self.transform(self.reference))
        worst = np.argsort(-off, kind="stable")
        chosen = np.sort(np.concatenate([worst[: ROWS * 3 // 4], worst[ROWS * 3 // 4 :][-ROWS // 4 :]]))
        self.tokens, self.features = self.batch[chosen], self.features[chosen]
        self.reference = self.reference[chosen]
        self.rows = np.array([self.cheapest_row(off[chosen])])

    def cheapest_row(self, off: Any) -> int:
        """Return the text to try candidates on: short, and with a visible error."""
        # A short text is quick to encode, but a text of one or two ids shows few bugs.
        length = self.length
        largest = off[np.isfinite(off)].max(initial=0)
        wrong = off[off > CLEAN * largest]  # the other rows show rounding, at most
        visible = off >= 0.3 * np.median(wrong) if len(wrong) else off >= 0
        cost = np.where(length < 5, length + 1000, length) + 2000 * ~visible + 4000 * ~np.isfinite(off)
        return int(cost.argmin())

    @property
    def length(self) -> Any:
        """The number of tokens of each text [n], from its start to its end."""
        return end_of_text(self.params, self.tokens) + 1

    @property
    def complete(self) -> bool:
        """Whether every text of the batch is compared."""
        return len(self.tokens) == len(self.batch)

    @property
    def error(self) -> float:
        """The relative L2 error of the port against the reference, its rows in the texts' order."""
        reference = self.reference
        if not self.aligned:
            reference = reference[nearest_rows(self.features, reference)]
        return overall_error(self.features, reference)

    def has_width_of(self, features: Any) -> bool:
        """Tell whether features [..., E] have as many columns as the port's."""
        return bool(features.shape[-1] == self.features.shape[-1])

    def transform(self, features: Any) -> Any:
        """Return features in float64, and normalized if the port's features are."""
        features = np.asarray(features, dtype=np.float64)
        with np.errstate(all="ignore"):
            return features / np.linalg.norm(features, axis=-1, keepdims=True) if self.unit else features


def upright(features: Any, reference: Any) -> Any:
    """Return features [N, E] given as [E, N], with their axes swapped or their shape listed in reverse."""
    if features.ndim != 2 or features.shape != reference.shape[::-1] or features.dtype.kind != "f":
        return features
    ways = [features.T, features.reshape(reference.shape)]
    if features.shape == reference.shape:
        ways.insert(0, features)
    return min(ways, key=lambda way: float(relative_l2(way, reference, axis=None)))


def with_projection(params: Params) -> Params:
    """Return params, with the identity as projection where they have none: features are pooled rows."""
    if "text_projection" in params:
        return params
    width = len(params["ln_final.weight"])
    return params.with_arrays({**params, "text_projection": np.eye(width, dtype=np.float32)})


def check_features(features: Any, texts: int) -> Any:
    """Return features [n, E]. Raises ValueError unless they are floats, of no more rows than texts."""
    features = as_array(features)
    if features.dtype.kind != "f":
        raise ValueError(f"features must be floats, as a port's encode_text returns, not {features.dtype}")
    features = features.reshape(-1, features.shape[-1])
    if not 1 <= len(features) <= texts:
        raise ValueError(f"rows of features: {len(features)}, texts: {texts}; give their tokens")
    return features


def overall_error(a: Any, b: Any) -> float:
    """Return the relative L2 error of all of a from b; inf where their shapes differ."""
    return float(relative_l2(a, b, axis=None)) if a.shape == b.shape else float("inf")


def nearest_rows(port: Any, reference: Any) -> Any:
    """Return, for each row of the port, the index of the nearest row of the reference."""
    return np.array([relative_l2(row, reference).argmin() for row in port])


def fitted_factor(port: Any, reference: Any) -> float:
    """Return the factor that brings the reference nearest to the port."""
    with np.errstate(all="ignore"):
        return float((port * reference).sum() / (reference * reference).sum())


def has_unit_length(features: Any) -> bool:
    """Tell whether every row has length 1, as after normalizing."""
    return bool((abs(np.linalg.norm(features, axis=-1) - 1) < 2e-3).all())
