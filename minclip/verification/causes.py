"""Why published figures disagree: try the usual mistakes on the weights, on the texts and on the vectors.

Each cause is tested, not guessed: it is named only if, with it, a source's figures agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from minclip.params import ACTIVATIONS, Params, text_dtype
from minclip.porting import diagnose
from minclip.tokenizer import tokenize
from minclip.verification.figures import Printed, Vectors, fill
from minclip.verification.published import HALF

ROWS = slice(0, 6)  # vectors that a cause is tried on; they are shipped completely
TEMPLATES = ("{}", "a {}", "{a} {}", "a photo of a {}", "a photo of a {}.", "a photo of {a} {}.")
RELATED = 0.5  # mean cosine from which weights have a common origin: towers trained apart are near 0
BUDGET = 20.0  # seconds for the search of known bugs
CLEAR = 5  # times the allowance from which an error is clearly one, and not an allowance too small


def explain(params: Params, failed: list[tuple[Vectors | Printed, np.ndarray]], cosine: float) -> str:
    """Return a sentence about why sources failed.

    failed   pairs of a strong source and the errors of its vectors, at least one beyond its tolerance
    cosine   mean cosine between the figures and those of the weights
    """
    if sentence := some_texts(failed) or rounding(params, failed) or untrained(params):
        return sentence
    source = next((source for source, _ in failed if isinstance(source, Vectors)), failed[0][0])
    for sentence, agrees in trials(params, source):
        if agrees():
            return sentence
    if isinstance(source, Vectors) and (sentence := known_bug(params, source)):
        return sentence
    if sentence := barely(failed):
        return sentence
    if cosine >= RELATED:
        return f"the weights were fine-tuned, merged or changed: mean cosine {cosine:.4f}, no known bug fits"
    return f"the weights are different: mean cosine {cosine:.2f}"


def some_texts(failed):
    """Return a sentence if, in every failed source, most vectors agree and only some texts do not."""
    texts = []
    for source, errors in failed:
        bad = np.flatnonzero(errors > source.allowed)
        if len(bad) > 0.5 * len(errors) or errors[bad].min() < CLEAR * source.allowed:
            return ""
        labels = source.labels()
        texts += [repr(labels[i]) for i in bad]
    shown = ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")
    return (
        f"the weights are right, since most vectors agree; only {shown} do not: "
        "their prompts or token ids are others, or their token embeddings were changed"
    )


def barely(failed):
    """Return a sentence if every error is less than CLEAR times its tolerance."""
    times = max(errors.max() / source.allowed for source, errors in failed)
    if times >= CLEAR:
        return ""
    return (
        f"all errors are within {times:.1f} times the tolerance: the weights may be right and the "
        "tolerance too small, or they were rounded or trained very little"
    )


def rounding(params, failed):
    """Return a sentence if all errors are as small as float16 makes them."""
    finer = [errors for source, errors in failed if source.allowed < HALF]
    if len(finer) < len(failed) or max(errors.max() for errors in finer) > HALF:
        return ""
    if text_dtype(params) == np.float16:
        return "the weights are float16, whose rounding explains the errors: load them in float32"
    return (
        "the errors are as small as float16 rounding: the weights were stored, or the figures computed, "
        "in half precision"
    )


def trials(params: Params, source: Vectors | Printed) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yield (sentence, whether the source agrees with the change that the sentence names)."""

    def agree(changed, source=source):
        return bool((source.errors(source.compute(changed, ROWS), ROWS) <= source.allowed).all())

    def changed(**changes):
        return Params(params, **{**vars(params), **changes})

    (other,) = set(ACTIVATIONS) - {params.activation}
    yield (
        f"the activation is wrong: the figures agree with activation={other!r}, not {params.activation!r}",
        lambda: agree(changed(activation=other)),
    )
    heads = len(params["ln_final.weight"]) // 64
    if heads and params.heads != heads:
        yield (
            f"the number of heads is wrong: the figures agree with {heads} heads, not {params.heads}",
            lambda: agree(changed(heads=heads)),
        )
    if isinstance(source, Vectors):
        yield from trials_of_vectors(params, source)


def trials_of_vectors(params, source):
    """Yield the trials of another scale and of other prompts, as `trials` does."""
    theirs = source.figures[ROWS]

    def scaled():
        ours = source.compute(params, ROWS)
        factor = (ours * theirs).sum(axis=1, keepdims=True) / (ours * ours).sum(axis=1, keepdims=True)
        return bool((source.errors(factor * ours, ROWS) <= source.allowed).all())

    unit = np.allclose(np.linalg.norm(theirs, axis=1), 1, atol=5e-3)
    how = "normalized" if unit and not source.unit else "scaled"
    yield f"the directions agree, the norms do not: the published vectors are {how}", scaled
    for template in TEMPLATES:
        if len(source.templates) == 1 and template not in source.templates:
            yield (
                f"the prompt is wrong: the figures agree with {template!r}, not {source.templates[0]!r}",
                lambda template=template: with_prompts(params, source, template),
            )


def with_prompts(params, source, template):
    """Tell whether the figures agree with other prompts."""
    other = dataclasses.replace(source, templates=(template,))
    return bool((other.errors(other.compute(params, ROWS), ROWS) <= other.allowed).all())


def untrained(params):
    """Return a sentence if a layer norm holds the numbers that it is initialized with, else ""."""
    names = [
        name.removesuffix(".weight")
        for name, array in params.items()
        if "ln_" in name and name.endswith(".weight") and bool((array == 1).all())
    ]
    return f"{names[0]}.weight is all ones, as before training: it was not loaded" if names else ""


def known_bug(params, source):
    """Return a sentence if the figures agree with the model once a known bug is put into it, else ""."""
    if len(source.templates) > 1:
        return ""
    tokens = tokenize([fill(source.templates[0], word) for word in source.words[ROWS]])
    dtype = np.float16 if source.allowed >= HALF else np.float32
    figures = source.figures[ROWS].astype(dtype)
    diagnosis = diagnose(params, tokens, figures, budget=BUDGET)
    if diagnosis.verdict != "known":
        return ""
    bugs = " and ".join(f"{fault.id}, {fault.summary}" for fault in diagnosis.findings[0].faults)
    return f"the figures agree once a known porting bug is put into the model: {bugs}"
