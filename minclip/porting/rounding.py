"""The one doctrine of tolerance: how far a correct port may be from the reference.

Rounding alone moves every stage. `measure_rounding` measures by how much, at a given precision. A port that
adds up in another order, fuses steps or rounds in other places may be ALLOWANCE times as far away. `compare`
and `diagnose` both ask this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip import model
from minclip.arrays import as_array
from minclip.params import TEXT_TOWER, Params, as_params, end_of_text
from minclip.porting.stages import axes, entries, up_to_end

PRECISIONS = ("float64", "float32", "float16", "bfloat16")  # from fine to coarse
UNIT = {"float64": 2**-53, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # one rounding
SHORT_NAMES = {"tf32": "float16", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ALLOWANCE = 5  # the largest error allowed, as a multiple of the reference's own rounding error
UNMEASURED = 64  # roundings allowed where there are no params to measure rounding with
ROWS_AT_ONCE = 8  # texts that a float64 run takes at a time, and that rounding is measured on


def allowed(rounding: float, precision: str) -> float:
    """Return the largest relative L2 error of a correct port, given the reference's own rounding error."""
    return ALLOWANCE * max(rounding, UNIT[precision])


def coarser(a: str, b: str) -> str:
    """Return the coarser of two precisions."""
    return max(a, b, key=PRECISIONS.index)


def holds(array: Any) -> str:
    """Return the coarsest precision that holds all of an array's numbers, at most that of its dtype."""
    numbers = array[np.isfinite(array)]
    numbers = numbers[:: max(1, numbers.size // 4096)]
    if len(np.unique(numbers)) < 8:  # any precision holds a few numbers such as 0 and 1
        return str(array.dtype)
    fits = (np.array_equal(round_to(numbers, precision), numbers) for precision in PRECISIONS)
    return max((p for p, fit in zip(PRECISIONS, fits, strict=True) if fit), key=PRECISIONS.index)


def possible_precisions(features: Any, dtype: Any = None, at_least: str = "float32") -> list[str]:
    """Return the precisions that a port may have computed in, by its numbers: the finest first.

    dtype      the precision that the port computes in, where it is known
    at_least   the finest precision that comes into question

    A port that shows float32 may compute in float16, TF32 or bfloat16 inside.
    Raises ValueError for a dtype that is none of PRECISIONS, or "tf32".
    """
    if dtype is not None:
        return [named_precision(dtype)]
    finest = coarser(coarser("float32", at_least), holds(features))
    return list(PRECISIONS[PRECISIONS.index(finest) :])


def named_precision(dtype: Any) -> str:
    """Return a dtype or its name as one of PRECISIONS. TF32 rounds as float16 does, to 11 bits."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    name = name.lower().removeprefix("torch.")
    name = SHORT_NAMES.get(name, name)
    if name not in PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)} or tf32, not {dtype!r}")
    return name


def relative_l2(a: Any, b: Any, axis: int | None = -1) -> Any:
    """Return the relative L2 distance |a - b| / |b| along an axis, or of the whole arrays for axis None.

    Numbers that are finite in neither are left out. The result is inf where only one side is finite, and
    0 where the difference is 0.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    finite_a, finite_b = np.isfinite(a), np.isfinite(b)
    with np.errstate(all="ignore"):
        difference = np.linalg.norm(np.where(finite_a & finite_b, a - b, 0), axis=axis)
        error = difference / np.linalg.norm(np.where(finite_a & finite_b, b, 0), axis=axis)
    error = np.where(difference == 0, 0.0, np.where(np.isfinite(error), error, np.inf))
    error = np.where((finite_a != finite_b).any(axis=axis), np.inf, error)
    return float(error) if error.ndim == 0 else error


def rounding_of(trace: Any, precision: str) -> Any:
    """Return how far rounding alone moves each stage of a `Trace`; None where that is not known.

    A trace with params is measured once, see `measure_rounding`, and remembers the result.
    """
    if precision not in trace.roundings and trace.params is not None:
        tokens = trace.tokens[:ROWS_AT_ONCE]
        trace.roundings[precision] = measure_rounding(trace.params, tokens, precision)
    return trace.roundings.get(precision)


def measure_rounding(
    params: Mapping[str, Any], tokens: Any, precision: str
) -> dict[str, tuple[float, float]]:
    """Return how far rounding to a precision moves each stage: {stage: (inherited, own)}.

    The model is run at that precision and compared with the same model in float64. Each figure is a
    relative L2 distance over the positions up to the end of text: `inherited` with all earlier rounding,
    `own` what the one stage adds to the inputs that it was given. float16 and bfloat16 are float32
    with every parameter and every stage rounded. The figures for float64 are scaled from float32's.
    """
    if precision == "float64":
        scale = UNIT["float64"] / UNIT["float32"]
        single = measure_rounding(params, tokens, "float32")
        return {name: (inherited * scale, own * scale) for name, (inherited, own) in single.items()}
    rounded: dict[str, Any] = {}

    def keep(name: str, array: Any) -> Any:
        rounded[name] = round_to(array, precision)
        return rounded[name]

    run(at_precision(params, precision), tokens, keep)
    inherited = distances(params, tokens, rounded)
    own = distances(params, tokens, rounded, shadow=True)
    return {name: (inherited[name], own[name]) for name in rounded}


def distances(
    params: Mapping[str, Any], tokens: Any, stages: Mapping[str, Any], *, shadow: bool = False
) -> dict[str, float]:
    """Return the relative L2 distance of recorded stages from a float64 run, up to the end of each text.

    With shadow, the run goes on with each recorded stage as it stands. Each stage is then compared with
    the reference's result from the same inputs, so inherited error drops out. Where a stage was not
    recorded, the run goes on with its own.
    """
    exact = at_precision(params, "float64")
    squares = {name: np.zeros(2) for name in stages}

    def add_rows(first: int) -> None:
        rows = tokens[first : first + ROWS_AT_ONCE]
        text = up_to_end(rows, end_of_text(params, rows))

        def tap(name: str, array: Any) -> Any:
            if name not in stages:
                return array
            recorded = stages[name][first : first + len(rows)] if axes(name)[0] == "B" else stages[name]
            a, b = entries(name, array, recorded, text)
            squares[name] += (b - a) @ (b - a), a @ a
            return continue_with(name, recorded, array) if shadow else array

        run(exact, rows, tap)

    for first in range(0, len(tokens), ROWS_AT_ONCE):
        add_rows(first)
    return {name: ratio(apart**0.5, size**0.5) for name, (apart, size) in squares.items()}


def continue_with(name: str, recorded: Any, array: Any) -> Any:
    """Return a recorded stage so that the reference can go on with it in place of its own array."""
    if name == "eot":
        return np.nan_to_num(recorded).clip(0).astype(array.dtype)
    return np.asarray(recorded, dtype=array.dtype)


def ratio(difference: float, size: float) -> float:
    """Return difference / size; 0 for 0 / 0, and inf wherever a number is not finite."""
    if difference == 0:
        return 0.0
    return float(difference / size) if size and np.isfinite(difference) else float("inf")


def run(params: Mapping[str, Any], tokens: Any, tap: Any) -> Any:
    """Call `encode_text` with a tap, without warnings about rows that have no end or about overflow."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return model.encode_text(params, tokens, tap=tap)


def host_params(params: Mapping[str, Any]) -> Params:
    """Return the text tower alone, in main memory and in float32."""
    arrays = {name: as_array(array) for name, array in params.items() if name.startswith(TEXT_TOWER)}
    return as_params(params).with_arrays(
        {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}
    )


def at_precision(params: Mapping[str, Any], precision: str) -> Params:
    """Return the text tower on the host with every float array rounded to a precision.

    The embeddings are left as they are: the run rounds the rows that it looks up.
    """
    arrays = {}
    for name, array in params.items():
        if name.startswith(TEXT_TOWER):
            arrays[name] = as_array(array)
            if "embedding" not in name:
                arrays[name] = round_to(arrays[name], precision)
    return as_params(params).with_arrays(arrays)


def round_to(array: Any, precision: str) -> Any:
    """Return a float array rounded to a precision; float16 and bfloat16 as the float32 array of the values.

    Numbers too large for float16 become infinite. Other arrays than floats stay as they are.
    """
    if array.dtype.kind != "f":
        return array
    if precision == "float16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    if precision != "bfloat16":
        return array.astype(precision, copy=False)
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)  # to nearest, ties to even
