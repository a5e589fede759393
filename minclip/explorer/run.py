"""A page to explore one run of the encoder: `show` puts the arrays of a trace into run.html, as float16."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minclip import builtin, tokenizer
from minclip.arrays import as_array, normalize
from minclip.explorer.page import Page
from minclip.model import layer_norm, weight_and_bias
from minclip.params import BLOCK, Floats, architecture, as_params, check_tokens, end_of_text
from minclip.porting.stages import axes, part_of
from minclip.tracing import Trace, trace

SIDE_BY_SIDE = 2  # texts that are shown in full; of further ones only the features are
NEAREST = 5
NUMBERS = 2_600_000  # kept in one page at most: 5.2 MB of float16, 7 MB as base64
NEVER_SHOWN = "attn.masked"  # the scores again, and -inf
# Parts of a block that are left out, in this order, until the numbers fit.
DROPPED = (
    ("mlp.c_fc", "mlp.gelu"),
    ("attn.q", "attn.k", "attn.v"),
    ("attn.scores",),
    ("ln_1", "ln_2", "attn.context"),
    ("attn", "mlp", "residual"),
)


def show(params: Mapping[str, Any], tokens: Any, *, model: str = "") -> Page:
    """Return a page that shows a run of the encoder: every stage, every head, the stream, the read-out.

    params   as `encode_text` takes them; a text_projection is not needed
    tokens   integers [..., L]. The first two texts are shown in full, side by side; of all texts the page
             shows the cosines
    model    the model's name, for the title

    The read-out compares with the pictures of the built-in model, or with the texts for any other model.
    Stages that would make the page larger than about 8 MB are left out, and the page says so.
    Raises ValueError as `encode_text` does, and where there is no text.

    >>> import minclip
    >>> page = show(minclip.load(), minclip.tokenize(["a black cat", "a black dog"]))
    >>> str(page)[:15]
    '<!doctype html>'
    """
    params = as_params(params)
    tokens, _ = check_tokens(params, tokens)
    if not len(tokens):
        raise ValueError("there is no text to show: give at least one row of tokens")
    V = len(params["token_embedding.weight"])
    ids = [row[: 1 + end].tolist() for row, end in zip(tokens, end_of_text(params, tokens), strict=True)]
    traces = [trace(params, text) for text in ids]
    read = [read_out(params, stages) for stages in traces]  # of each text: (depths, L, E)
    features = np.stack([rows[-1, -1] for rows in read])  # (B, E)
    texts = [text_of(text, V) for text in ids]
    labels, candidates = candidates_for(params, texts, features)
    kept = chosen_stages(traces[:SIDE_BY_SIDE])
    data = {
        "model": describe(params, model),
        "texts": [
            {
                "text": texts[i],
                "ids": ids[i],
                "words": words_of(ids[i], V),
                "eot": len(ids[i]) - 1,
                "stages": {n: packed(n, array, part_of(n) in kept) for n, array in traces[i].items()},
                "lengths": {part: lengths(traces[i], part) for part in ("attn.v", "attn", "mlp")},
                "read_out": nearest(read[i], candidates),
            }
            for i in range(min(len(texts), SIDE_BY_SIDE))
        ],
        "left_out": sorted({part_of(name) for name in traces[0]} - kept - {NEVER_SHOWN}),
        "labels": labels,
        "all_texts": texts,
        "cosines": np.nan_to_num(features @ features.T).astype(float).round(4).tolist(),
    }
    return Page.from_template("run.html", f"How CLIP reads “{texts[0]}”", data)


def describe(params: Any, name: str) -> dict[str, Any]:
    """Return the page's facts about the model."""
    layers, heads, activation = architecture(params)
    V, D = params["token_embedding.weight"].shape
    return {
        "name": name,
        "layers": layers,
        "heads": heads,
        "activation": activation,
        "width": D,
        "vocabulary": V,
        "projection": "text_projection" in params,
    }


def packed(name: str, array: Any, kept: bool) -> dict[str, Any]:
    """Return a stage of one text without the batch axis: its axes, shape, summary, and numbers if kept."""
    array = as_array(array)
    letters = axes(name).replace("M", "L").split()
    if letters[0] == "B":
        letters, array = letters[1:], array[0]
    if part_of(name) in ("mlp.c_fc", "mlp.gelu"):
        letters[-1] = "F"
    found: dict[str, Any] = {"axes": "".join(letters), "shape": list(array.shape)}
    if array.dtype.kind == "f":
        finite = array[np.isfinite(array)].astype(np.float64)
        numbers = (finite.min(), finite.max(), np.linalg.norm(finite)) if finite.size else (0, 0, 0)
        found |= {key: float(f"{n:.4g}") for key, n in zip(("min", "max", "norm"), numbers, strict=True)}
        if kept:
            found["data"] = packed_array(array)
    return found


def packed_array(array: Any) -> str:
    """Return the numbers as little-endian float16 in base64."""
    with np.errstate(over="ignore"):
        return base64.b64encode(np.ascontiguousarray(array, dtype="<f2").tobytes()).decode()


def lengths(stages: Trace, part: str) -> list[str]:
    """Return, for each block, the lengths of the vectors of one part: [L], or [H, L] where it has heads."""
    found = (as_array(array)[0].astype(np.float32) for name, array in stages.items() if part_of(name) == part)
    return [packed_array(np.linalg.norm(array, axis=-1)) for array in found]


def chosen_stages(traces: Sequence[Trace]) -> set[str]:
    """Return the parts whose numbers go into the page: all except as many of DROPPED as it takes to fit."""
    sizes: dict[str, int] = {}
    for stages in traces:
        for name, array in stages.items():
            sizes[part_of(name)] = sizes.get(part_of(name), 0) + array.size
    kept = set(sizes) - {NEVER_SHOWN}
    for parts in DROPPED:
        if sum(sizes[part] for part in kept) > NUMBERS:
            kept -= set(parts)
    return kept


def read_out(params: Any, stages: Trace) -> Floats:
    """Return unit features [layers + 1, L, E] of every position, if the encoder ended after each block."""
    depths = ["embedding", *(name for name in stages if name.startswith(BLOCK) and part_of(name) == "")]
    rows = [layer_norm(stages[depth][0], *weight_and_bias(params, "ln_final")) for depth in depths]
    if "text_projection" in params:
        rows = [row @ params["text_projection"] for row in rows]
    return normalize(np.stack([as_array(row).astype(np.float32) for row in rows]))


def candidates_for(params: Any, texts: list[str], features: Floats) -> tuple[list[list[str]], Floats]:
    """Return labels [mark, name] and unit features [N, E] to compare a read-out with.

    They are the pictures and scenes for the built-in model, and the texts themselves for any other.
    """
    emoji, names, pictures = builtin.pictures()
    P = params.get("text_projection")
    if P is not None and P.shape == (pictures.shape[1],) * 2:
        ours = builtin.load_builtin()["text_projection"]
        if np.allclose(as_array(P).astype(np.float32), ours, atol=1e-3):
            descriptions, scenes = builtin.scenes()
            labels = [*zip(emoji, names, strict=True), *(("", scene["sentence"]) for scene in descriptions)]
            return [list(label) for label in labels], np.concatenate([pictures, scenes])
    return [["", text] for text in texts], features


def nearest(read: Floats, candidates: Floats) -> list[list[list[list[float]]]]:
    """Return, for each depth and position, the nearest candidates: [index, cosine], nearest first."""
    cosines = np.nan_to_num(read @ candidates.T)  # (depths, L, N)
    best = np.argsort(-cosines, axis=-1)[..., :NEAREST]
    values = np.take_along_axis(cosines, best, axis=-1)
    pairs = np.stack([best, values.round(4)], axis=-1)
    return [[[[int(i), float(c)] for i, c in top] for top in depth] for depth in pairs]


def words_of(ids: Sequence[int], vocabulary: int) -> list[str]:
    """Return the piece of text that each id stands for; "#id" where the vocabulary is not OpenAI's."""
    spellings = tokenizer.spellings()
    if vocabulary != len(spellings):
        return [f"#{id}" for id in ids]
    special = {tokenizer.START: "start", tokenizer.END: "end"}
    return [special.get(spellings[id]) or tokenizer.decode([[id]])[0] for id in ids]


def text_of(ids: Sequence[int], vocabulary: int) -> str:
    """Return the text of ids up to their end, without start and end."""
    if vocabulary == len(tokenizer.spellings()):
        return tokenizer.decode([ids])[0]
    return " ".join(words_of(ids[1:-1], vocabulary))
