"""CLIP's training loss, with the gradients that `minclip.backward` starts from."""

from __future__ import annotations

from numbers import Real
from typing import Any

from minclip.arrays import array_module, check_floats, nonzero, normalize
from minclip.params import Floats

LARGEST_SCALE = 11  # float16 holds exp(11). Training begins with log(1 / 0.07) and stops at log(100)


def contrastive_loss(
    text_features: Floats, image_features: Floats, logit_scale: Any
) -> tuple[Any, tuple[Floats, Floats, Any]]:
    """Return the loss that CLIP was trained with, and its gradients with respect to the three arguments.

    text_features    [N, E], not normalized, of N texts
    image_features   [N, E], not normalized: row n belongs to text n
    logit_scale      the logarithm of the factor of the cosines: the model's array, or a number. A factor of
                     100, as in OpenAI's models, is math.log(100)

    The loss is the symmetric cross-entropy of figure 3 of "Learning Transferable Visual Models From Natural
    Language Supervision" (Radford et al., 2021). Arrays have the dtype and the device of the features.
    Raises ValueError where the features are no arrays of floats, are none, or have different shapes, and
    where a number for logit_scale is so large that it must be the factor itself.

    >>> import minclip
    >>> params, (_, names, pictures) = minclip.load(), minclip.pictures()
    >>> trace = minclip.trace(params, minclip.tokenize(names[:3]))
    >>> loss, (grad_features, _, _) = contrastive_loss(trace["text_features"], pictures[:3], 3.0)
    >>> grads = minclip.backward(trace, grad_features)
    """
    check_loss(text_features, image_features, logit_scale)
    xp, N = array_module(text_features), len(text_features)
    scale = xp.exp(xp.asarray(logit_scale, dtype=text_features.dtype))
    texts, images = normalize(text_features), normalize(image_features)
    logits = scale * (texts @ images.T)
    by_image, by_text = log_softmax(logits), log_softmax(logits.T).T
    loss = -(by_image + by_text).trace() / (2 * N)
    dlogits = (xp.exp(by_image) + xp.exp(by_text)) / (2 * N) - xp.eye(N, dtype=logits.dtype) / N
    dtexts = normalize_backward(scale * (dlogits @ images), text_features)
    dimages = normalize_backward(scale * (dlogits.T @ texts), image_features)
    return loss, (dtexts, dimages, (dlogits * logits).sum().reshape(scale.shape))


def check_loss(texts: Any, images: Any, logit_scale: Any) -> None:
    """Raise ValueError or TypeError where the arguments of `contrastive_loss` do not fit."""
    check_floats(texts)
    check_floats(images)
    if texts.ndim != 2 or texts.shape != images.shape or not len(texts):
        shapes = f"{list(texts.shape)} and {list(images.shape)}"
        raise ValueError(f"texts and images must have features of the same shape [N, E], not {shapes}")
    if not isinstance(logit_scale, Real) and not hasattr(logit_scale, "dtype"):
        raise TypeError(f"logit_scale must be a number or an array, not {type(logit_scale).__name__}")
    if isinstance(logit_scale, Real) and float(logit_scale) > LARGEST_SCALE:
        raise ValueError(f"logit_scale is a logarithm: give math.log({logit_scale}), not {logit_scale}")


def normalize_backward(grad: Floats, features: Floats) -> Floats:
    """Return the gradient of features [..., E], given the gradient of normalize(features).

    It has no component along the features, whose length `minclip.normalize` removes. A zero row gets zeros.

    >>> import numpy as np
    >>> normalize_backward(np.array([[1.0, 1.0]]), np.array([[0.0, 2.0]])).tolist()
    [[0.5, 0.0]]
    """
    unit = normalize(features)
    length = (features * unit).sum(axis=-1, keepdims=True)
    across = grad - (grad * unit).sum(axis=-1, keepdims=True) * unit
    return across * (length > 0) / nonzero(length)


def log_softmax(x):
    """Return the logarithm of softmax(x) over the last axis."""
    x = x - x.max(axis=-1, keepdims=True)
    xp = array_module(x)
    return x - xp.log(xp.exp(x).sum(axis=-1, keepdims=True))
