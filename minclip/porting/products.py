"""Which of the reference's matrices, biases and norms a port used, from a dump of its products.

Each of the reference's matrices, and its transpose, is applied to the port's recorded input of a product. The
one that gives the port's recorded output is the one that the port used; the rest, the same at every position,
is its bias. A norm's weight and bias are fitted the same way. No weights of the port are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minclip.params import BLOCK, EPS, count_layers
from minclip.porting.slips import NORMS, parameters_of, tensor

INPUTS = {
    "attn.q": "ln_1",
    "attn.k": "ln_1",
    "attn.v": "ln_1",
    "attn": "attn.context",
    "mlp.c_fc": "ln_2",
    "mlp": "mlp.gelu",
}
POSITIONS = 96  # positions of the texts that a product is compared at
RIGHT = 2e-3  # relative L2 at which a product of float32 or float16 is the reference's
SCALED = 0.1  # the same where the matrix is too large: its scale may be lost beside quantization
CLEAR = 0.3  # of quantized weights: the right matrix leaves less than this, and half of what the next leaves


@dataclasses.dataclass(frozen=True)
class Use:
    """The tensors that a port used at a stage, each as the stage where the reference uses it.

    weight, bias   a stage; "" for none, or a norm's 1 and 0; None for no tensor of the reference
    transposed     whether the matrix is used transposed
    scale          the factor by which the matrix is too large
    error          relative L2 that the right tensors leave of the port's output
    """

    stage: str
    weight: str | None
    bias: str | None
    transposed: bool = False
    error: float = 0.0
    scale: float = 1.0

    @property
    def right(self) -> bool:
        """Whether the port used the tensors that belong there."""
        return self.weight == self.bias == self.stage and not self.transposed and self.scale == 1


def uses_of(params: Mapping[str, Any], stages: Mapping[str, Any], text: Any) -> Iterator[Use]:
    """Yield the tensors used at every stage whose input and output are in stages.

    stages   stage -> the port's array, in the reference's layout
    text     [B, L], True up to the end of each text
    """
    layers = count_layers(params)
    linear = [f"{BLOCK}{i}.{part}" for i in range(layers) for part in INPUTS]
    norms = [f"{BLOCK}{i}.{part}" for i in range(layers) for part in NORMS] + ["ln_final"]
    for i in range(layers):
        block = f"{BLOCK}{i}."
        inputs = {f"{block}{part}": f"{block}{source}" for part, source in INPUTS.items()}
        previous = f"{BLOCK}{i - 1}" if i else "embedding"
        for stage, source in {f"{block}ln_1": previous, f"{block}ln_2": f"{block}residual"}.items():
            if stage in stages and source in stages:
                yield norm_used(params, stage, norms, rows(stages[source], text), rows(stages[stage], text))
        for stage, source in inputs.items():
            if stage in stages and source in stages:
                x, y = rows(stages[source], text), rows(stages[stage], text)
                yield product_used(params, stage, linear, x, y)
    last = f"{BLOCK}{layers - 1}"
    if last in stages and "ln_final" in stages:
        yield norm_used(params, "ln_final", norms, rows(stages[last], text), rows(stages["ln_final"], text))


def rows(array: Any, text: Any) -> Any:
    """Return a stage's numbers [n, width] at some positions up to the end of the texts, in float64."""
    if array.ndim == 4:
        array = array.transpose(0, 2, 1, 3).reshape(array.shape[0], array.shape[2], -1)
    inside = array[text[:, : array.shape[1]]]
    return np.float64(inside[:: max(1, len(inside) // POSITIONS)])


def product_used(params: Mapping[str, Any], stage: str, places: list[str], x: Any, y: Any) -> Use:
    """Return the tensors that a product y [n, out] of x [n, in] used; the right ones first."""
    size = float(np.linalg.norm(y - y.mean(axis=0))) or 1.0
    own = product(params, stage, x, False)
    error = np.linalg.norm(y - own - (y - own).mean(axis=0)) / size
    if error <= RIGHT:
        return Use(
            stage, stage, bias_used(params, stage, places, (y - own).mean(axis=0)), False, float(error)
        )
    centered, other = own - own.mean(axis=0), y - y.mean(axis=0)
    scale = float((centered * other).sum() / ((centered**2).sum() or 1))
    limit = RIGHT if 0.5 < scale < 2 else SCALED  # rounded weights are never that much too large
    if np.linalg.norm(other - scale * centered) <= limit * size:
        bias = bias_used(params, stage, places, (y - scale * own).mean(axis=0))
        return Use(stage, stage, bias, scale=scale)
    tried = []
    for place in places:
        for transposed in (False, True):
            made = product(params, place, x, transposed)
            if made is not None and made.shape == y.shape:
                rest = y - made
                tried.append(
                    (float(np.linalg.norm(rest - rest.mean(axis=0)) / size), place, transposed, rest)
                )
    tried.sort(key=lambda trial: trial[0])
    left, place, transposed, rest = tried[0]
    clear = left < 0.5 * tried[1][0] and (left < CLEAR or (place == stage and not transposed))
    if left > RIGHT and not clear:
        return Use(stage, None, None, False, left)
    return Use(stage, place, bias_used(params, stage, places, rest.mean(axis=0)), transposed, left)


def product(params: Mapping[str, Any], place: str, x: Any, transposed: bool) -> Any:
    """Return x times the matrix of a place, or its transpose; None where that does not fit x."""
    weight, _, part = parameters_of(place)
    matrix = tensor(params, weight, part)
    matrix = matrix if transposed else matrix.T
    return x @ matrix if len(matrix) == x.shape[1] else None


def bias_used(params: Mapping[str, Any], stage: str, places: list[str], rest: Any) -> str | None:
    """Return the place of the bias that is nearest to rest, or "" for none."""
    _, own, part = parameters_of(stage)
    errors = {"": float(np.linalg.norm(rest))}
    for place in places:
        _, name, rows_of = parameters_of(place)
        bias = tensor(params, name, rows_of)
        if bias.shape == rest.shape:
            errors[place] = float(np.linalg.norm(rest - bias))
    size = float(np.linalg.norm(tensor(params, own, part)))
    nearest = min(errors, key=lambda place: errors[place])
    if errors[stage] <= 1.5 * errors[nearest] + 1e-5 * size:
        return stage
    return nearest if errors[nearest] <= 0.3 * errors[stage] else None


def norm_used(params: Mapping[str, Any], stage: str, places: list[str], x: Any, y: Any) -> Use:
    """Return the norm whose weight and bias turn x [n, D] into y [n, D]; "" for ones and zeros."""
    centered = x - x.mean(axis=-1, keepdims=True)
    x = centered / ((centered**2).mean(axis=-1, keepdims=True) + EPS) ** 0.5
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    variance = ((x - mean_x) ** 2).mean(axis=0)
    weight = ((x - mean_x) * (y - mean_y)).mean(axis=0) / np.where(variance > 0, variance, 1)
    bias = mean_y - weight * mean_x
    error = float(np.linalg.norm(y - x * weight - bias) / (np.linalg.norm(y) or 1.0))
    if error > RIGHT:  # another eps or variance: the weights cannot be told from a wrong norm
        return Use(stage, None, None, False, error)
    found = [fitted(params, stage, places, value, which) for which, value in enumerate((weight, bias))]
    return Use(stage, found[0], found[1], False, error)


def fitted(params: Mapping[str, Any], stage: str, places: list[str], value: Any, which: int) -> str | None:
    """Return the place whose norm weight (which = 0) or bias (1) is nearest to a fitted one."""
    known = {place: params[str(parameters_of(place)[which])] for place in places}
    known[""] = np.full_like(value, 1 - which)
    errors = {place: float(np.linalg.norm(value - array)) for place, array in known.items()}
    size = float(np.linalg.norm(known[stage])) or 1.0
    nearest = min(errors, key=lambda place: errors[place])
    if errors[stage] <= 2 * errors[nearest] + 1e-3 * size:
        return stage
    return nearest if errors[nearest] <= 0.2 * errors[stage] else None
