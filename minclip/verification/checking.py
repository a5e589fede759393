"""`verify`: recognize which model a text tower is, and compare it with every published figure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.params import Params, architecture, as_params
from minclip.verification.causes import RELATED, explain
from minclip.verification.certificate import Certificate, SourceCheck
from minclip.verification.figures import Printed, Vectors
from minclip.verification.published import MODELS, SOURCES

PROBED = 8  # prompts that a model is recognized by


def verify(params: Mapping[str, Any], name: str | None = None) -> Certificate:
    """Compare the weights with every figure that others have published for the model.

    params   the weights, as `encode_text` takes them. A tower without projection is checked by its states
    name     one of OpenAI's names, or an OpenCLIP name such as "ViT-B-16/laion2b_s34b_b88k". By default,
             the model is recognized by its shapes and, of several with the same shapes, by its figures

    Returns a `Certificate`. Weights in float16 do not reach the figures that were computed in float32.
    Raises ValueError for an unknown name, or for one of a model with other shapes.

    >>> import minclip
    >>> print(verify(minclip.load()))
    unknown: no model with published figures has 6 layers, width 128 and embedding 128
    """
    params = as_params(params)
    layers, _, _ = architecture(params)
    projection = params.get("text_projection")
    sizes = layers, len(params["ln_final.weight"]), None if projection is None else projection.shape[1]
    if name is not None:
        check_name(name, sizes)
        return certify(params, name, [])
    alike = [model for model in MODELS if shapes_fit(model, sizes)]
    near = {model: resemblance(params, model) for model in alike if usable(params, model)}
    if not near:
        embedding = "no projection" if sizes[2] is None else f"embedding {sizes[2]}"
        sentence = f"no model with published figures has {layers} layers, width {sizes[1]} and {embedding}"
        return Certificate("unknown", None, sentence, [])
    best = max(near, key=near.__getitem__)
    return certify(params, best, [model for model in alike if model != best], recognized=True)


def check_name(name, sizes):
    """Raise ValueError unless name is a model with published figures and of these sizes."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the models are {', '.join(MODELS)}"
        raise ValueError(f"no model {name!r:.80}: {hint}")
    if not sources_of(name):
        others = ", ".join(model for model in MODELS if sources_of(model))
        raise ValueError(f"nobody has published figures for {name}; there are some for {others}")
    if not shapes_fit(name, sizes):
        model = MODELS[name]
        raise ValueError(
            f"the weights have {sizes[0]} layers, width {sizes[1]}, embedding {sizes[2]}, but {name} has "
            f"{model.layers}, {model.width}, {model.embedding}"
        )


def shapes_fit(name, sizes):
    """Tell whether a model has these layers, width and embedding, None being no projection."""
    model, (layers, width, embedding) = MODELS[name], sizes
    return (model.layers, model.width) == (layers, width) and embedding in (None, model.embedding)


def sources_of(name: str) -> list[Vectors | Printed]:
    return [source for source in SOURCES if source.model == name]


def usable(params, name):
    """Return the sources of a model that these weights can be compared with, the strong ones first."""
    sources = sorted(sources_of(name), key=lambda source: not source.strong)
    if "text_projection" in params:
        return sources
    return [states for source in sources if (states := source.without_features())]


def resemblance(params: Params, name: str) -> float:
    """Return the cosine between some published figures of a model and those of the weights."""
    sources = usable(params, name)
    sources = [source for source in sources if source.strong] or sources
    vectors = [source for source in sources if isinstance(source, Vectors)][:1]
    found = []
    for source in vectors or sources:
        rows = slice(0, max(1, PROBED // len(source.templates))) if vectors else slice(None)
        found.append((source, source.compute(params, rows), source.figures[rows]))
    return cosine_of(found)


def cosine_of(found: list[tuple[Vectors | Printed, Any, Any]]) -> float:
    """Return the lowest mean cosine of the sources that have vectors, else that of all printed numbers.

    found   (source, the figures of the weights, the published figures) each. A few printed numbers have a
            cosine that says little
    """
    means = [mean_cosine(ours, theirs) for source, ours, theirs in found if isinstance(source, Vectors)]
    if means:
        return min(means)
    ours = np.concatenate([row for _, rows, _ in found for row in rows])
    theirs = np.concatenate([row for _, _, rows in found for row in rows])
    return mean_cosine([ours], [theirs])


def mean_cosine(ours: Any, theirs: Any) -> float:
    """Return the mean cosine of pairs of vectors over the shipped numbers, 0 for weights that give NaN."""
    cosines = []
    for mine, published in zip(ours, theirs, strict=True):
        shipped = ~np.isnan(published)
        a, b = mine[shipped], published[shipped]
        cosines.append(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))
    return float(np.nan_to_num(np.mean(cosines)))


def compare_sources(params: Params, name: str) -> tuple[list[SourceCheck], list[Any], list[Any]]:
    """Return the checks of a model's sources, the figures (as `cosine_of` takes them), the failed sources."""
    checks, found, failed = [], [], []
    for source in usable(params, name):
        ours = source.compute(params)
        errors = np.nan_to_num(source.errors(ours), nan=np.inf, posinf=np.inf)
        checks.append(check_source(source, errors))
        found.append((source, ours, source.figures))
        if source.strong and not checks[-1].agrees:
            failed.append((source, errors))
    return checks, found, failed


def certify(params: Params, name: str, others: list[str], recognized: bool = False) -> Certificate:
    """Return the certificate of weights that should be those of a model.

    others       models of the same shapes
    recognized   whether the model was found by its figures, not named
    """
    checks, found, failed = compare_sources(params, name)
    strong = any(check.strong for check in checks)
    cosine = cosine_of([each for each in found if each[0].strong or not strong])
    counted = [check for check in checks if check.strong or not strong]
    count = f"{sum(c.agreeing for c in counted)} of {sum(c.vectors for c in counted)} vectors agree"
    notes = []
    if not strong:
        notes.append("only weak sources were compared: agreement says much, disagreement little")
    if recognized and cosine < RELATED:
        return none_of_them(name, others, checks, cosine, notes)
    if recognized and others:
        notes.append(f"{', '.join(others)} have the same shapes; the figures decide")
    if failed:
        sentence = f"{name}'s shapes, but not its figures: {count}, mean cosine {cosine:.4f}"
        return Certificate("differs", name, sentence, checks, cosine, explain(params, failed, cosine), notes)
    if all(check.agrees for check in counted):
        sentence = (
            f"{'this is' if recognized else 'these weights are'} {name} of {MODELS[name].publisher}: {count}"
        )
        return Certificate("agrees", name, sentence, checks, cosine, "", notes)
    sentence = f"{name} has only weak sources, and {count}, mean cosine {cosine:.4f}"
    return Certificate("unknown", name, sentence, checks, cosine, "", notes)


def check_source(source: Vectors | Printed, errors: np.ndarray) -> SourceCheck:
    """Return the facts about a source, given the errors of its vectors."""
    return SourceCheck(
        id=source.id,
        origin=source.origin,
        strong=source.strong,
        vectors=len(errors),
        agreeing=int((errors <= source.allowed).sum()),
        measure=source.measure,
        largest=float(errors.max()),
        worst=source.labels()[errors.argmax()],
        allowed=source.allowed,
        basis=source.basis,
    )


def none_of_them(name, others, checks, cosine, notes):
    """Return the certificate of weights that are those of no model of their shapes."""
    unpublished = [model for model in others if not sources_of(model)]
    if unpublished:
        notes.append(f"nobody has published figures for {', '.join(unpublished)}, of the same shapes")
    tried = ", ".join([name, *(model for model in others if model not in unpublished)])
    sentence = f"the shapes are those of {tried}, the weights of none of them: best cosine {cosine:.2f}"
    return Certificate("differs", None, sentence, checks, cosine, "the weights are different", notes)
