"""How far rounding alone moves each stage, which is what a correct port may differ by."""

import copy
import warnings

import numpy as np

from minclip import model
from minclip.arrays import as_array
from minclip.params import TEXT_TOWER
from minclip.porting.stages import axes, entries, up_to_end

PRECISIONS = ("float64", "float32", "float16", "bfloat16")  # from fine to coarse
ROWS_AT_ONCE = 8  # texts that a run in float64 takes at a time, and that rounding is measured on


def rounding_of(trace, precision):
    """Return how far rounding alone moves each stage of a `Trace`; None where that is not known.

    A trace with params is measured once, see `measure_rounding`, and remembers.
    """
    if precision not in trace.roundings and trace.params is not None:
        tokens = trace.tokens[:ROWS_AT_ONCE]
        trace.roundings[precision] = measure_rounding(trace.params, tokens, precision)
    return trace.roundings.get(precision)


def measure_rounding(params, tokens, precision):
    """How far rounding to a precision moves each stage: {stage: (inherited, own)}.

    The model is run at that precision and held against the same model in float64. Each figure is a
    relative L2 distance over the positions up to the end of text: `inherited` with all that came
    before, `own` what the one stage adds to the inputs it was given. bfloat16, which NumPy does not
    have, is float32 with every parameter and every stage rounded to it; what float64 does to itself is
    taken from what float32 does.
    """
    if precision == "float64":
        scale = float(np.finfo(np.float64).eps / np.finfo(np.float32).eps)
        single = measure_rounding(params, tokens, "float32")
        return {name: (inherited * scale, own * scale) for name, (inherited, own) in single.items()}
    rounded = {}

    def keep(name, array):
        rounded[name] = round_to(array, precision)
        return rounded[name]

    run(at_precision(params, precision), tokens, keep)
    inherited = distances(params, tokens, rounded)
    own = distances(params, tokens, rounded, shadow=True)
    return {name: (inherited[name], own[name]) for name in rounded}


def distances(params, tokens, stages, *, shadow=False):
    """Relative L2 distance of recorded stages from a float64 run, up to the end of each text.

    With shadow, the run goes on with each recorded stage as it stands, so that a stage is held
    against what the reference makes of the very inputs it had, and inherited error drops out. Where a
    stage was not recorded the run goes on with its own, made of what was.
    """
    exact = at_precision(params, "float64")
    squares = {name: np.zeros(2) for name in stages}

    def hold(first):
        rows = tokens[first : first + ROWS_AT_ONCE]
        text = up_to_end(rows)

        def tap(name, array):
            if name not in stages:
                return array
            recorded = stages[name][first : first + len(rows)] if axes(name)[0] == "B" else stages[name]
            a, b = entries(name, array, recorded, text)
            squares[name] += (b - a) @ (b - a), a @ a
            return like(name, recorded, array) if shadow else array

        run(exact, rows, tap)

    for first in range(0, len(tokens), ROWS_AT_ONCE):
        hold(first)
    return {name: ratio(apart**0.5, size**0.5) for name, (apart, size) in squares.items()}


def like(name, recorded, array):
    """A recorded stage so that the reference can go on with it in place of its own array."""
    if name == "eot":
        return np.nan_to_num(recorded).clip(0).astype(array.dtype)
    return np.asarray(recorded, dtype=array.dtype)


def ratio(difference, size):
    """difference / size; 0 for 0 / 0, and inf wherever a number is not finite."""
    if difference == 0:
        return 0.0
    return float(difference / size) if size and np.isfinite(difference) else np.inf


def run(params, tokens, tap):
    """`encode_text` under a tap, without a word about rows that have no end or about overflow."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return model.encode_text(params, tokens, tap=tap)


def at_precision(params, precision):
    """params with the text tower on the host, every float array of it rounded to precision."""
    rounded = copy.copy(params) if isinstance(params, dict) else dict(params)
    for name, array in params.items():
        if name.startswith(TEXT_TOWER):
            rounded[name] = round_to(as_array(array), precision)
    return rounded


def round_to(array, precision):
    """A float array at a precision; bfloat16 as the float32 array of the same values."""
    if array.dtype.kind != "f":
        return array
    if precision != "bfloat16":
        return array.astype(precision)
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)  # to nearest, ties to even
