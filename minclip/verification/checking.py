"""`verify`: recognize which model a text tower is, and compare it with every published figure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.params import Params, architecture, as_params
from minclip.verification.causes import explain
from minclip.verification.certificate import Certificate, SourceCheck
from minclip.verification.published import MODELS, SOURCES, Printed, Vectors

PROBED = slice(0, 8)  # vectors that a model is recognized by
SAME = 0.5  # mean cosine from which weights are related: towers trained apart are near 0


def verify(params: Mapping[str, Any], name: str | None = None) -> Certificate:
    """Compare the weights with every figure that others have published for the model.

    params   the weights, as `encode_text` takes them. A tower without projection is checked by its states
    name     one of OpenAI's names, or an OpenCLIP name such as "ViT-B-16/laion2b_s34b_b88k". By default,
             the model is recognized by its shapes and, of several with the same shapes, by its figures

    Returns a `Certificate`. Weights in float16 do not reach the figures that were computed in float32.
    Raises ValueError for an unknown name, or for one of a model with other shapes.

    >>> import minclip
    >>> print(verify(minclip.load()))
    unknown: no model with published figures has 4 layers, width 128 and embedding 128
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


def resemblance(params, name):
    """Return the mean cosine between some published figures of a model and those of the weights."""
    source = max(usable(params, name), key=lambda source: (source.strong, isinstance(source, Vectors)))
    return mean_cosine(source.compute(params, PROBED), source.figures[PROBED])


def mean_cosine(ours, theirs):
    """Return the mean cosine of pairs of vectors over the shipped numbers, 0 for weights that give NaN."""
    cosines = []
    for mine, published in zip(ours, theirs, strict=True):
        shipped = ~np.isnan(published)
        a, b = mine[shipped], published[shipped]
        cosines.append(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))
    return float(np.nan_to_num(np.mean(cosines)))


def certify(params: Params, name: str, others: list[str], recognized: bool = False) -> Certificate:
    """Return the certificate of weights that should be those of a model."""
    checks, failed, cosine = [], [], None
    for source in usable(params, name):
        ours = source.compute(params)
        errors = source.errors(ours)
        errors = np.where(np.isnan(errors), np.inf, errors)
        checks.append(
            SourceCheck(
                source.id,
                source.origin,
                source.strong,
                len(errors),
                int((errors <= source.allowed).sum()),
                source.measure,
                float(errors.max()),
                source.labels()[errors.argmax()],
                source.allowed,
                source.basis,
            )
        )
        if source.strong or cosine is None:
            cosine = min(mean_cosine(ours, source.figures), 1 if cosine is None else cosine)
        if source.strong and not checks[-1].agrees:
            failed.append((source, errors))
    return conclude(params, name, others, recognized, checks, failed, cosine)


def conclude(params, name, others, recognized, checks, failed, cosine):
    """Put the verdict and its cause into words."""
    publisher, counted = MODELS[name].publisher, [check for check in checks if check.strong] or checks
    agreeing, vectors = sum(check.agreeing for check in counted), sum(check.vectors for check in counted)
    count = f"{agreeing} of {vectors} vectors agree"
    notes = []
    if recognized and others and cosine >= SAME:
        notes.append(f"{', '.join(others)} have the same shapes; the figures decide")
    if not any(check.strong for check in checks):
        notes.append("only weak sources were compared: agreement says much, disagreement little")
    if not failed and (checks[0].strong or all(check.agrees for check in checks)):
        this = "this is" if recognized else "these weights are"
        return Certificate(
            "agrees", name, f"{this} {name} of {publisher}: {count}", checks, cosine, "", notes
        )
    if cosine < SAME and recognized:
        unpublished = [model for model in others if not sources_of(model)]
        if unpublished:
            notes.append(f"nobody has published figures for {', '.join(unpublished)}, of the same shapes")
        tried = ", ".join([name, *(model for model in others if model not in unpublished)])
        sentence = f"the shapes are those of {tried}, the weights of none of them: best cosine {cosine:.2f}"
        return Certificate("differs", None, sentence, checks, cosine, "the weights are others", notes)
    sentence = f"{name}'s shapes, but not its figures: {count}, mean cosine {cosine:.4f}"
    return Certificate("differs", name, sentence, checks, cosine, explain(params, failed, cosine), notes)
