"""See inside: every intermediate of the encoder by name, and tokens and files to try a port with."""

import copy
import html
import sys
import warnings
import zipfile

import numpy as np

from minclip import model
from minclip.device import as_array
from minclip.tensor_files import only_when_whole, read_safetensors

BLOCK = "transformer.resblocks."
TEXT_TOWER = ("token_embedding.", "positional_embedding", BLOCK, "ln_final.", "text_projection")  # prefixes
PRECISIONS = ("float64", "float32", "float16", "bfloat16")  # from fine to coarse
ROWS_AT_ONCE = 8  # texts that a run in float64 takes at a time, and that rounding is measured on
HIDDEN = -104  # exp of it is 0 in float32: a key so far below the row's highest score is masked

# The axes of each stage; those not named here are the stream's, B L D, and the MLP's, whose F counts as D
# here. M is L again, seen as keys.
AXES = {
    "positional_embedding": "L D",
    "attn.q": "B H L K",
    "attn.k": "B H L K",
    "attn.v": "B H L K",
    "attn.scores": "B H L M",
    "attn.masked": "B H L M",
    "attn.weights": "B H L M",
    "eot": "B",
    "pooled": "B D",
    "text_features": "B E",
}


class Trace(dict):
    """Every stage of one run: a dict from stage name to array, in the order of computation.

    params      the parameters it was made with; None where it comes from a file
    tokens      the tokens it was made of, [B, L]
    roundings   {precision: what `measure_rounding` gives}, as far as it was measured or is in the file

    Prints as a table; of alike blocks the first is shown in full, of the others what they put out.
    """

    def __init__(self, stages, *, params=None, tokens=None, roundings=None):
        super().__init__(stages)
        self.params = params
        self.tokens = tokens
        self.roundings = dict(roundings or {})

    def rounding(self, precision):
        """How far rounding alone moves each stage (see `measure_rounding`); None where it is not known."""
        if precision not in self.roundings and self.params is not None:
            tokens = self.tokens[:ROWS_AT_ONCE]
            self.roundings[precision] = measure_rounding(self.params, tokens, precision)
        return self.roundings.get(precision)

    def __repr__(self):
        shown = fold(self)
        table = text_table(TITLES, [(name, *summary(self[name])) for name in shown])
        hidden = len(self) - len(shown)
        return table + (f"\n... and {hidden} more stages inside the later blocks" if hidden else "")

    def _repr_html_(self):
        """The same table for Jupyter; each later block unfolds."""
        shown = fold(self)
        parts = [html_table(TITLES, [(name, *summary(self[name])) for name in shown])]
        hidden = [name for name in self if name not in shown]
        for block in dict.fromkeys(map(block_of, hidden)):
            rows = [(name, *summary(self[name])) for name in hidden if block_of(name) == block]
            parts.append(f"<details><summary>{block}</summary>{html_table(TITLES, rows)}</details>")
        return "".join(parts)


def trace(params, tokens):
    """Run the encoder and keep every stage: a `Trace`, from stage name to array, in order.

    All L positions given are computed at every stage, those after the end of text too. Each array is
    a copy of its own, on the device and in the dtype of params, except that a float16 model's attn and
    mlp, which are rounded with the sum they go into, are float32; B is the product of the leading axes
    of tokens [..., L]. Raises ValueError where tokens or params do not fit, as `encode_text` does.

    >>> import minclip
    >>> stages = trace(minclip.load(), minclip.tokenize("a cat"))
    >>> stages["transformer.resblocks.0.attn.weights"].shape
    (1, 2, 77, 77)
    """
    stages = {}

    def record(name, array):
        stages[name] = array.copy()
        return array

    model.encode_text(params, tokens, tap=record)
    tokens = np.array(as_array(tokens))
    return Trace(stages, params=params, tokens=tokens.reshape(-1, tokens.shape[-1]))


def probe_tokens(context_length=77, vocabulary=49408):
    """Tokens that tell a wrong port from a right one: int32 [7, context_length].

    Many bugs show only where texts are padded with the end-of-text id, hold id 0, or are longer than
    41 tokens; a single short text, which many ports are checked with, sees few. The rows:

        0  one ordinary id, padded with 0, as clip.tokenize pads
        1  the ids at the edges of the vocabulary, padded with 0
        2  padded with the end-of-text id, as Hugging Face pads
        3  id 0 ("!") inside and at the end of the text, padded with 0
        4  id 0 at its start, padded with the end-of-text id
        5  more than 41 tokens, but not full
        6  full: the end of text is the last position

    Seven rows: a mask that only fits one row, or as many rows as there are heads, shows then.
    Raises ValueError for a context or a vocabulary too small to hold them.
    """
    C, V = context_length, vocabulary
    if C < 8 or V < 16:
        raise ValueError(f"probe tokens need a context of 8 and a vocabulary of 16 at least, not {C} and {V}")
    start, end = V - 2, V - 1
    # Ordinary ids by a fixed rule, spread over the vocabulary: the same in any language and release.
    ids = [1 + 7919 * (n + 1) % (V - 3) for n in range(C)]
    texts = (
        (ids[:1], 0),
        ([1, V - 3, 2, V - 4], 0),
        (ids[1:4], end),
        ([ids[4], 0, ids[5], 0, 0], 0),
        ([0, ids[6], 0, ids[7]], end),
        (ids[C // 3 : C - 4], 0),
        (ids[: C - 2][::-1], 0),
    )
    tokens = np.empty((len(texts), C), dtype=np.int32)
    for row, (text, padding) in zip(tokens, texts, strict=True):
        row[:] = padding
        row[: len(text) + 2] = [start, *text, end]
    return tokens


def write_probe(path, params):
    """Write what a port needs to be compared, to an .npz at path; returns its `Trace`.

    tokens                 int32 [7, L], see `probe_tokens`: run the port on these
    each stage by name     what the reference computed from them
    rounding.{precision}   [stages, 2], how far rounding alone moves each stage, in their order
                           (see `measure_rounding`), for float32, float16 and bfloat16

    The file appears at path only when whole.
    """
    V, context = len(params["token_embedding.weight"]), len(params["positional_embedding"])
    traced = trace(params, probe_tokens(context, V))
    arrays = {"tokens": traced.tokens} | {name: as_array(array) for name, array in traced.items()}
    for precision in PRECISIONS[1:]:
        arrays[f"rounding.{precision}"] = np.array(list(traced.rounding(precision).values()))
    with only_when_whole(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
    return traced


def read_probe(path):
    """The `Trace` that `write_probe` wrote. Raises OSError or ValueError where it cannot be read."""
    dump = read_dump(path)
    if "tokens" not in dump or "text_features" not in dump:
        raise ValueError(f"{path} is no probe: it has no tokens or no stages; `minclip probe` writes one")
    return as_trace(dump)


def as_trace(dump):
    """A `Trace` of any mapping of stages, such as what `write_probe` wrote."""
    stages = {name: array for name, array in dump.items() if name != "tokens" and name[:9] != "rounding."}
    roundings = {
        precision: dict(zip(stages, map(tuple, dump[f"rounding.{precision}"]), strict=True))
        for precision in PRECISIONS
        if f"rounding.{precision}" in dump
    }
    return Trace(stages, tokens=dump.get("tokens"), roundings=roundings)


def read_dump(path):
    """A port's arrays by name, from an .npz or a .safetensors file (bfloat16 becomes float32).

    Raises OSError for a file that cannot be read, ValueError for one that is neither.
    """
    try:
        if str(path).endswith(".safetensors"):
            return {name: np.asarray(tensor) for name, tensor in read_safetensors(path)[0].items()}
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz or .safetensors file of plain arrays: {error}") from None


def trace_torch(torch_model, tokens):
    """Run a live torch model on tokens [B, L] and keep what its modules put out: a dict of arrays.

    For OpenAI's CLIP, OpenCLIP's, Hugging Face's CLIPModel, CLIPTextModelWithProjection and
    CLIPTextModel, or any module that is called as module(tokens). The names are the model's own module
    names, which `minclip.compare` knows. A tensor that was made between modules and goes into one is
    kept under that module's name and ".input": the residual stream is. What a fused attention never
    shows is not there: q, k, v of nn.MultiheadAttention, scores, and weights where it returns none.

    The hooks are taken away again, and minclip itself never imports torch.

    >>> from torch.nn import Embedding, Linear, Sequential
    >>> stages = trace_torch(Sequential(Embedding(9, 4), Linear(4, 3)), np.array([[1, 2]]))
    >>> stages["0"].shape, stages["1"].shape
    ((1, 2, 4), (1, 2, 3))
    """
    torch = sys.modules["torch"]  # or there were no torch model
    dump, seen = {}, {}

    def keep(name, value):
        if isinstance(value, dict):  # what Hugging Face's models return
            for key, part in value.items():
                keep(f"{name}.{key}".lstrip("."), part)
        elif isinstance(value, (tuple, list)):
            for number, part in enumerate(value):
                keep(f"{name}.{number}", part)
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
            version = 0 if value.is_inference() else value._version  # counts what is written in place
            if (id(value), version) not in seen:
                seen[id(value), version] = value  # kept alive, or another tensor could get its id
                dump[name] = as_array(value).copy()

    def hooks_of(name, module):
        before = module.register_forward_pre_hook(
            lambda _, inputs: keep(f"{name}.input", inputs[0]) if inputs else None
        )
        return before, module.register_forward_hook(lambda _, inputs, output: keep(name, output))

    ids = torch.as_tensor(as_array(tokens)).long().to(next(torch_model.parameters()).device)
    hooks = [hook for name, module in torch_model.named_modules() if name for hook in hooks_of(name, module)]
    try:
        with torch.no_grad():
            if hasattr(torch_model, "encode_text"):
                output = torch_model.encode_text(ids)
            elif hasattr(torch_model, "get_text_features"):
                output = torch_model.get_text_features(input_ids=ids)
            else:
                output = torch_model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(output, dict):
        keep("", output)
    else:  # of a tuple the first; under this name also where a module has put it out already
        dump["text_features"] = as_array(output[0] if isinstance(output, tuple) else output).copy()
    return dump


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


def entries(name, reference, port, text=None):
    """The numbers of a stage that are to be compared, of both sides, flat and in float64.

    text   [B, L], True up to the end of each text; where given, only those positions
    Where the reference's mask hides a key, a port that hides it as well in its own way (-1e4, the
    lowest finite number) is no different: both are left out.
    """
    a, b = (np.asarray(array, dtype=np.float64) for array in (reference, port))
    if name.endswith("attn.masked"):
        highest = np.where(np.isneginf(a), -np.inf, a).max(axis=-1, keepdims=True)
        hidden = np.isneginf(a) & (b <= highest + HIDDEN)
        a, b = np.where(hidden, 0, a), np.where(hidden, 0, b)
    if text is not None and name.endswith("attn.scores"):  # of scores the mask hides those of later keys
        both = text[:, :, None] & text[:, None, :]
        a, b = a.transpose(0, 2, 3, 1)[both], b.transpose(0, 2, 3, 1)[both]
    elif text is not None and axes(name)[:3] == "B L":
        a, b = a[text], b[text]
    elif text is not None and axes(name)[:3] == "B H":
        a, b = a.swapaxes(1, 2)[text], b.swapaxes(1, 2)[text]
    return a.ravel(), b.ravel()


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


def up_to_end(tokens):
    """[B, L], True up to the end of each text."""
    return np.arange(tokens.shape[-1]) <= tokens.argmax(axis=-1)[:, None]


def part_of(name):
    """A stage's name inside its block ("" for the block's output), or itself outside the blocks."""
    return name.removeprefix(block_of(name) or "").lstrip(".")


def block_of(name):
    """The block a stage lies in, "transformer.resblocks.3", or None outside the blocks."""
    return ".".join(name.split(".")[:3]) if name.startswith(BLOCK) else None


def axes(name):
    """The axes of a stage as letters, "B L D"."""
    return AXES.get(part_of(name), "B L D")


def fold(names):
    """The stages a table shows: all of the first block, and what each later block puts out."""
    names = list(names)
    first = next((block_of(name) for name in names if block_of(name)), None)
    later = {block_of(name) for name in names} - {first, None}
    return names if len(later) < 2 else [n for n in names if block_of(n) not in later or n in later]


TITLES = ("stage", "shape", "dtype", "min", "max", "norm", "NaN")


def summary(array):
    """A stage's line of the table: shape, dtype, min, max, norm (each of finite numbers), count of NaN."""
    array = as_array(array)
    finite = array[np.isfinite(array)].astype(np.float64)
    numbers = (finite.min(), finite.max(), np.linalg.norm(finite)) if finite.size else (np.nan,) * 3
    shape = "[" + ", ".join(map(str, array.shape)) + "]"
    return shape, str(array.dtype), *(f"{number:.3g}" for number in numbers), str(np.isnan(array).sum())


def text_table(titles, rows):
    """Lines of aligned columns, the first to the left and the others to the right."""
    rows = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join((f"{first:<{widths[0]}}", *numbers)))
    return "\n".join(lines)


def html_table(titles, rows):
    """The same for Jupyter."""

    def line(cells, tag):
        style = 'style="text-align:left"', 'style="text-align:right"'
        inside = (f"<{tag} {style[n > 0]}>{html.escape(cell)}</{tag}>" for n, cell in enumerate(cells))
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(line(cells, "td") for cells in rows)
    return f"<table><thead>{line(titles, 'th')}</thead><tbody>{body}</tbody></table>"
