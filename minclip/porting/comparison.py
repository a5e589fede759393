"""Side by side with another implementation: which stage is the first to leave the reference."""

import html
import math
from collections import namedtuple

import numpy as np

from minclip.arrays import as_array
from minclip.params import BLOCK, block_of, keep
from minclip.porting.alignment import align, crop, rename, unpack
from minclip.porting.probe import as_trace, read_dump, read_probe
from minclip.porting.rounding import PRECISIONS, distances, ratio, round_to, rounding_of, run
from minclip.porting.stages import axes, entries, part_of, up_to_end
from minclip.tables import html_table, text_table
from minclip.tracing import Trace

# How much further than rounding moves the reference a port may be away, since it adds up in another
# order, fuses, and rounds in other places.
MARGIN = 5
UNMEASURED = 64  # roundings allowed to a stage where there are no params to measure them with
LOOKED_UP = ("token_embedding", "positional_embedding")
UNIT = {"float64": 2**-53, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # one rounding

Stage = namedtuple(
    "Stage",
    "name layout precision max_abs relative_l2 cosine norm_ratio nan error tolerance new new_tolerance state",
    defaults=[None] * 11,
)
Stage.__doc__ = """One stage side by side.

name, layout         what the port calls it, and how its axes lie there
precision            "float32": that of the port's numbers, which the tolerance is for
max_abs, relative_l2, cosine, norm_ratio    of port to reference, over every position; nan: share of NaN
error, tolerance     relative L2 distance up to the end of each text, and what of it is allowed
new, new_tolerance   the same for the error that this stage adds; None where it was not shadowed
state                "agrees"; "padding", where only positions after the end of text differ; "diverges",
                     where it differs by an error of its own; "inherits", where it differs after an
                     earlier stage did and is not known to add to it; "shape", where the port's array
                     has no layout of this stage
"""


def compare(reference, port, *, rtol=None):
    """Hold a port's stages against the reference's: a `Comparison`.

    reference  a `Trace`, from `minclip.trace` or from a probe's file
    port       mapping from name to array: as many stages as the port has, of a run on the same tokens.
               Names may be ours, OpenAI's, OpenCLIP's or Hugging Face's (`alignment.rename` is for
               others); arrays NumPy's, CuPy's or torch's; the layout of each is recognised.
    rtol       the relative L2 distance allowed at every stage, in place of the measured tolerance

    The tolerance of a stage is MARGIN times what rounding moves it when the reference itself is run at
    the port's dtype and held against float64. That dtype is the coarsest that the numbers of this stage
    and of those before it betray: float32 arrays that hold only float16 numbers count as float16.

    Where the reference carries its params, each stage is also *shadowed*: held against what the
    reference, in float64, makes of the port's own earlier stages. What it inherited drops out, and
    `new` is the error that this stage adds itself, together with those just before it that the port
    does not show.

    Positions after the end of a text never reach its features: a stage where only they differ is
    said, and does not count as diverging.

    Raises ValueError where nothing of the port can be matched, or where it was run on other tokens.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize("a cat")
    >>> port = dict(minclip.trace(params, tokens))
    >>> port["ln_final"] = port["transformer.resblocks.3"]  # the last norm forgotten
    >>> compare(minclip.trace(params, tokens), port).first
    'ln_final'
    """
    reference = reference if isinstance(reference, Trace) else as_trace(reference)
    arrays = unpack(port)
    check_tokens(reference, arrays)
    matches, misfits, unknown = align(reference, arrays)
    if not matches and not misfits:
        raise ValueError(f"no stage is called {listed(unknown)}: minclip.alignment.rename gives our names")
    pairs, tokens = crop_alike(reference, matches)
    text = None if tokens is None else up_to_end(tokens)
    added = {}
    if reference.params is not None:
        theirs = {name: port for name, (_, port) in pairs.items()}
        added = distances(reference.params, tokens, theirs, shadow=True)
    stages, precision = {}, PRECISIONS[0]
    for name in (name for name in reference if name in pairs or name in misfits):
        if name in misfits:
            stages[name] = Stage(*misfits[name])
            continue
        here = precision_of(name, *pairs[name])
        if name not in LOOKED_UP:  # looking parameters up says nothing of the arithmetic that follows
            here = precision = coarser(precision, here)
        allowed, allowed_new = tolerance(reference, name, here, rtol)
        told = matches[name].name, matches[name].layout, here
        numbers = measure(name, *pairs[name], text)
        stages[name] = Stage(*told, *numbers, allowed, added.get(name), allowed_new)
    return Comparison(judge(stages), reference, pairs, matches, unknown, text, rtol)


@np.errstate(all="ignore")
def measure(name, reference, port, text):
    """max abs, relative L2, cosine, norm ratio, share of NaN; and relative L2 up to the end of each text.

    The first four are of numbers that are finite in both, except that relative L2 is inf where one
    side alone is finite.
    """
    a, b = entries(name, reference, port)
    nan = float(np.isnan(b).mean()) if b.size else 0.0
    relative_l2 = ratio(np.linalg.norm(b - a), np.linalg.norm(a))
    error = relative_l2
    if text is not None:
        up_to_end, port_up_to_end = entries(name, reference, port, text)
        error = ratio(np.linalg.norm(port_up_to_end - up_to_end), np.linalg.norm(up_to_end))
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    sizes = np.linalg.norm(a), np.linalg.norm(b)
    cosine = float(a @ b / (sizes[0] * sizes[1])) if all(sizes) else math.nan
    return float(abs(b - a).max(initial=0)), relative_l2, cosine, ratio(sizes[1], sizes[0]), nan, error


def tolerance(reference, name, precision, rtol):
    """The relative L2 distances allowed at a stage: with all that came before, and by itself."""
    if name == "eot":
        return 0.0, 0.0
    if rtol is not None:
        return rtol, rtol
    measured = rounding_of(reference, precision)
    if measured is None or name not in measured:
        return UNMEASURED * UNIT[precision], UNMEASURED * UNIT[precision]
    return tuple(MARGIN * max(moved, UNIT[precision]) for moved in measured[name])


def precision_of(name, reference, port):
    """The precision that a stage's numbers betray: the coarser of what could hold either side's."""
    if reference.dtype.kind != "f" or part_of(name) == "attn.weights":  # of weights many are 0 and 1
        return PRECISIONS[0]
    ours, theirs = holds(reference), holds(port)
    if name in LOOKED_UP and ours == theirs != "float64":  # the parameters are so coarse; nobody rounded
        return "float32"
    return coarser(ours, theirs)


def holds(array):
    """The coarsest precision that holds all of an array's numbers, at most its dtype's."""
    numbers = array[np.isfinite(array)]
    numbers = numbers[:: max(1, numbers.size // 4096)]
    if len(np.unique(numbers)) < 8:  # a few numbers, 0 say, fit anywhere
        return str(array.dtype)
    with np.errstate(over="ignore"):
        fits = (np.array_equal(round_to(numbers, precision), numbers) for precision in PRECISIONS)
        return max((p for p, fit in zip(PRECISIONS, fits, strict=True) if fit), key=PRECISIONS.index)


def coarser(a, b):
    return max(a, b, key=PRECISIONS.index)


def judge(stages):
    """The stages with their states, in order."""
    judged, diverged = {}, False
    for name, stage in stages.items():
        if stage.error is None:
            state = "shape"
        elif stage.relative_l2 <= stage.tolerance:
            state = "agrees"
        elif stage.error <= stage.tolerance:
            state = "padding"
        elif diverged and (stage.new is None or stage.new <= stage.new_tolerance):
            state = "inherits"
        else:
            state = "diverges"
        diverged = diverged or state in ("diverges", "shape")
        judged[name] = stage._replace(state=state)
    return judged


def check_tokens(reference, arrays):
    """Take the port's tokens out of its arrays; ValueError unless they are the reference's, up to the end."""
    given = [arrays.pop(name) for name in ("tokens", "input_ids") if name in arrays]
    if not given or reference.tokens is None:
        return
    ours, theirs = reference.tokens, given[0]
    if ours.shape != theirs.shape:
        raise ValueError(f"the port's tokens are {list(theirs.shape)}, the reference's {list(ours.shape)}")
    other = (ours != theirs) & up_to_end(ours)
    if other.any():
        row, position = map(int, np.argwhere(other)[0])
        found, expected = theirs[row, position], ours[row, position]
        raise ValueError(f"the port was run on other tokens: {found} at [{row}, {position}], not {expected}")


def crop_alike(reference, matches):
    """({stage: (ours, the port's)}, tokens), all of them only as long as the port's shortest."""
    lengths = [
        match.array.shape[axes(name).split().index("L")]
        for name, match in matches.items()
        if "L" in axes(name)
    ]
    kept = min(lengths, default=None)
    pairs = {
        name: (crop(axes(name), as_array(reference[name]), kept), crop(axes(name), match.array, kept))
        for name, match in matches.items()
    }
    return pairs, None if reference.tokens is None else reference.tokens[:, :kept]


class Comparison:
    """A port beside the reference, stage by stage.

    stages    {stage: `Stage`}, in the order of computation: those that the port shows
    first     the name of the first stage that diverges, or None
    new       the names of all stages that diverge by an error of their own, as far as shadowing tells
    missing   the names of the stages that the port does not show
    verdict   one sentence
    notes     more sentences: where in the arrays, how they were read, what was left out

    Prints as a table whose first line is the verdict; in Jupyter it is a picture, layers x stages.
    """

    def __init__(self, stages, reference, pairs, matches, unknown, text, rtol):
        self.stages = stages
        self.order = list(reference)
        self.missing = [name for name in reference if name not in stages]
        self.new = [name for name, stage in stages.items() if stage.state in ("diverges", "shape")]
        self.first = self.new[0] if self.new else None
        self.verdict = verdict(stages, self.first, len(reference), rtol)
        self.notes = [
            *(notes_on_first(self, reference, pairs, text) if self.first else ()),
            *notes_on_reading(self, reference, matches, unknown, text, rtol),
        ]

    def __repr__(self):
        shown = self.shown()
        rows = [(f"{MARKS[self.stages[name].state]} {name}", *cells(self.stages[name])) for name in shown]
        hidden = len(self.stages) - len(shown)
        more = [f"... and {hidden} more stages of other blocks, in .stages"] if hidden else []
        return "\n".join([self.verdict, *self.notes, "", text_table(TITLES, rows), *more, LEGEND])

    def _repr_html_(self):
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        rows = [(f"{MARKS[self.stages[n].state]} {n}", *cells(self.stages[n])) for n in self.stages]
        table = html_table(TITLES, rows)
        return (
            f"<div><b>{html.escape(self.verdict)}</b></div>{notes}{picture(self)}"
            f"<details><summary>numbers</summary>{table}</details>"
        )

    def shown(self):
        """The stages of the table: all of the block that diverges first, and of each other its output."""
        full = block_of(self.first or "") or block_of(next(filter(block_of, self.stages), ""))
        blocks = {block_of(name) for name in self.stages} - {None, full}
        if len(blocks) < 2:
            return list(self.stages)
        lasts = {block_of(name): name for name in self.stages}.values()
        return [n for n in self.stages if block_of(n) not in blocks or n in lasts or n in self.new]


MARKS = {"agrees": "=", "padding": "~", "inherits": ">", "diverges": "!", "shape": "?"}
LEGEND = "= agrees   ~ only after the end of text   ! own error   > inherited error   ? another shape"
TITLES = ("  stage", "max abs", "rel L2", "allowed", "new", "cosine", "norms", "NaN")


def cells(stage):
    """A stage's numbers as the table shows them."""
    if stage.state == "shape":
        return ("-",) * 7
    numbers = (stage.max_abs, stage.relative_l2, stage.tolerance)
    new = "-" if stage.new is None else f"{stage.new:.1e}"
    share = f"{math.ceil(100 * stage.nan)}%" if stage.nan else "0"
    return *(f"{n:.1e}" for n in numbers), new, f"{stage.cosine:.6f}", f"{stage.norm_ratio:.5g}", share


def verdict(stages, first, count, rtol):
    """The first line: what it comes to."""
    precision = max((stage.precision or PRECISIONS[0] for stage in stages.values()), key=PRECISIONS.index)
    within = f"rtol {rtol:g}" if rtol is not None else f"the rounding of {precision}"
    if first is None:
        return f"agrees: {len(stages)} of {count} stages were compared, all are within {within}"
    if stages[first].state == "shape":
        return f"diverges first at {first}, which has another shape"
    error, allowed = stages[first].error, stages[first].tolerance
    times = f", {error / allowed:.2g} times what is allowed" if allowed else ""
    return f"diverges first at {first}: relative error {error:.2g}{times}"


def notes_on_first(comparison, reference, pairs, text):
    """What is to be seen of the first divergence: where in the array, of what kind, what else is new."""
    first, stage = comparison.first, comparison.stages[comparison.first]
    before = comparison.order[: comparison.order.index(first)]
    hidden = []
    while before and before[-1] in comparison.missing:
        hidden.insert(0, before.pop())
    if hidden:
        yield f"the port does not show {listed(hidden)}, just before: the fault is there or in {first}"
    if stage.state == "shape":
        yield f"the port's {stage.name} is {stage.layout}, no layout of {list(reference[first].shape)}"
        return
    yield from whereabouts(first, *pairs[first], text, stage.tolerance)
    if stage.cosine > 0.99999 and abs(stage.norm_ratio - 1) > 1e-3:
        yield f"it is {stage.norm_ratio:.5g} times the reference's: right but for its scale"
    if stage.new is not None and stage.new <= stage.new_tolerance:
        yield "no stage up to there adds more than rounding: it adds up over the stages"
    if len(comparison.new) > 1:
        yield f"errors of their own are also in {listed(comparison.new[1:])}"
    if only_coarser(comparison, reference):
        yield "no error is larger than float16 rounding: does the port compute in float16 or TF32?"


def whereabouts(name, reference, port, text, allowed):
    """Which texts and which positions differ, where not all of them do."""
    letters = axes(name).split()
    a, b = np.float64(reference), np.float64(port)
    if "M" in letters:  # a key that is masked differs from nothing
        a, b = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(a), b, 0)
    for axis, word in (("B", "text"), ("L", "position")):
        if axis not in letters:
            continue
        others = tuple(n for n, letter in enumerate(letters) if letter != axis)
        square = np.where(np.isnan(b), np.inf, b - a) ** 2
        if text is not None and letters[0] == "B" and "L" in letters:
            shape = [size if letter in "BL" else 1 for letter, size in zip(letters, a.shape, strict=True)]
            square = np.where(text.reshape(shape), square, 0)
        sizes = (a**2).sum(axis=others)
        wrong = np.flatnonzero(square.sum(axis=others) > allowed**2 * sizes)
        held = text.any(axis=0).sum() if axis == "L" and text is not None else len(sizes)
        if 0 < len(wrong) < held:
            yield f"in {word} {listed([str(i) for i in wrong], most=8)} of 0 to {len(sizes) - 1} only"


def only_coarser(comparison, reference):
    """Whether a port that counts as finer than float16 is within float16's rounding everywhere."""
    stages = comparison.stages
    if any(stage.error is None for stage in stages.values()):
        return False
    if coarser(list(stages.values())[-1].precision, "float32") != "float32":
        return False
    return all(
        stage.error <= tolerance(reference, name, "float16", None)[0] for name, stage in stages.items()
    )


def notes_on_reading(comparison, reference, matches, unknown, text, rtol):
    """How the port's arrays were read, and what was not compared."""
    stages = comparison.stages
    if text is not None and text.shape[1] < reference.tokens.shape[1]:
        L = reference.tokens.shape[1]
        yield f"the port has the first {text.shape[1]} of {L} positions, and only those are compared"
    padding = [name for name, stage in stages.items() if stage.state == "padding"]
    if padding:
        yield f"only positions after the end of text, which reach no feature, differ in {listed(padding, 2)}"
    layouts = {}
    for name, match in matches.items():
        if match.layout not in (axes(name), f"P {axes(name)}"):
            layouts.setdefault((match.layout, axes(name)), []).append(name)
    for (layout, ours), names in layouts.items():
        rivals = {rival for name in names for rival in matches[name].rivals}
        fits = f"; the same shape as {listed(sorted(rivals))}, but it is this that fits" if rivals else ""
        yield f"read {layout} as {ours}: {listed(names, 2)}{fits}"
    for name, stage in stages.items():
        if stage.state == "shape" and name != comparison.first:
            yield f"not compared: {stage.name} is {stage.layout}, no layout of {list(reference[name].shape)}"
    if unknown:
        yield f"{len(unknown)} of the port's arrays are no stage of ours: {listed(unknown)}"
    if comparison.missing:
        yield f"{len(comparison.missing)} of {len(reference)} stages are not shown by the port"
    if rtol is None and reference.params is None and not reference.roundings:
        yield f"the reference has no params to measure a tolerance with: {UNMEASURED} roundings are allowed"


def listed(names, most=4):
    """Names as words: the first few, and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


# In Okabe and Ito's colours, which the colour-blind tell apart, and each a shape of its own besides.
SHAPES = {
    "agrees": ("agrees", '<circle r="4" fill="#009E73"/>'),
    "padding": (
        "only after the end of text",
        '<circle r="5" fill="none" stroke="#56B4E9" stroke-width="2.5"/>',
    ),
    "diverges": (
        "own error",
        '<rect x="-9" y="-9" width="18" height="18" rx="2" fill="#D55E00"/>'
        '<path d="M-5-5 5 5M5-5-5 5" stroke="white" stroke-width="2.5"/>',
    ),
    "inherits": (
        "inherited error",
        '<path d="M0-8 8 0 0 8-8 0z" fill="none" stroke="#E69F00" stroke-width="2"/>',
    ),
    "shape": (
        "another shape",
        '<rect x="-9" y="-9" width="18" height="18" rx="2" fill="none" stroke="#D55E00" stroke-width="2"/>'
        '<text text-anchor="middle" y="5" fill="#D55E00">?</text>',
    ),
    "missing": ("not in the port", '<path d="M-4 0H4" stroke="currentColor" opacity=".4"/>'),
}
FRAME = '<path d="M-12-12H12V12H-12z" fill="none" stroke="currentColor" stroke-width="2"/>'
CELL = 26  # pixels from stage to stage


def picture(comparison):
    """An SVG of layers x stages, which reads on a light and on a dark page, and without its colours."""
    names = comparison.order
    blocks = list(dict.fromkeys(filter(None, map(block_of, names))))
    inside = list(dict.fromkeys(part_of(name) for name in names if block_of(name)))
    end = names.index(blocks[-1]) if blocks else -1
    left, top = 70, 126
    bottom = top + CELL * len(blocks)
    parts = strip(comparison, [name for name in names[: max(end, 0)] if not block_of(name)], 20)
    for x, part in enumerate(inside):
        at = left + CELL * x
        parts.append(
            f'<text transform="translate({at + 4} {top - 18}) rotate(-50)">{part or "output"}</text>'
        )
        parts += (
            mark(comparison, f"{block}.{part}".rstrip("."), at, top + CELL * y)
            for y, block in enumerate(blocks)
        )
    for y, block in enumerate(blocks):
        label = f"block {block.removeprefix(BLOCK)}"
        parts.append(f'<text x="{left - 18}" y="{top + CELL * y + 4}" text-anchor="end">{label}</text>')
    parts += strip(comparison, names[end + 1 :], bottom + 14)
    parts += legend(comparison, bottom + 38)
    size = f'width="{max(left + CELL * len(inside) + 50, 670)}" height="{bottom + 110}"'
    style = 'font-family="sans-serif" font-size="12" fill="currentColor"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>'


def strip(comparison, names, y):
    """The stages outside the blocks, side by side, each with its name."""
    marks = (mark(comparison, name, 20 + 170 * n, y) for n, name in enumerate(names))
    words = (f'<text x="{36 + 170 * n}" y="{y + 4}">{name}</text>' for n, name in enumerate(names))
    return [*marks, *words]


def legend(comparison, y):
    """What the shapes in the picture mean, under a line."""
    states = {stage.state for stage in comparison.stages.values()}
    states |= {"missing"} if comparison.missing else set()
    yield f'<path d="M8 {y}H658" stroke="currentColor" opacity=".3"/>'
    for n, (word, shape) in enumerate(SHAPES[state] for state in SHAPES if state in states):
        at = f"{20 + 195 * (n % 3)} {y + 24 + CELL * (n // 3)}"
        yield f'<g transform="translate({at})">{shape}<text x="16" y="4" opacity=".75">{word}</text></g>'


def mark(comparison, name, x, y):
    """One stage's shape, with its numbers to be read under the mouse; the first divergence is framed."""
    stage = comparison.stages.get(name)
    word, shape = SHAPES[stage.state if stage else "missing"]
    title = f"{name}: {word}" + (
        f", relative L2 {stage.error:.2g}" if stage and stage.error is not None else ""
    )
    if name == comparison.first:
        shape += FRAME
    return f'<g transform="translate({x} {y})"><title>{title}</title>{shape}</g>'


def compare_files(probe, port, *, names=None, params=None, rtol=None):
    """`compare` two files: what `minclip probe` wrote, and a port's .npz or .safetensors.

    names    {"theirs": "ours"}, for names that no dialect knows
    params   the probe's own model, to tell new error from inherited
    Raises OSError or ValueError where a file cannot be read or params are another model's.
    """
    reference = read_probe(probe)
    reference.params = params
    if params is not None:
        features = as_array(run(params, reference.tokens, keep))
        if (
            features.shape != reference["text_features"].shape
            or measure("text_features", reference["text_features"], features, None)[1] > 1e-2
        ):
            raise ValueError(f"{probe} was written with another model than the one given")
    return compare(reference, rename(read_dump(port), names or {}), rtol=rtol)
