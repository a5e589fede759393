"""CLIP's loss and the gradients through it and through normalize are those of torch."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import minclip
from tests.support.oracles import relative

RNG = np.random.default_rng(0)
TEXTS, IMAGES = RNG.standard_normal((2, 6, 5)) * [[[3.0]], [[0.1]]]
SCALE = np.log(1 / 0.07)


def torch_loss(texts, images, scale):
    """Return CLIP's loss and its gradients, by torch, in the dtype of texts."""
    tensors = [torch.from_numpy(np.asarray(a, texts.dtype)).requires_grad_() for a in (texts, images, scale)]
    unit = [functional.normalize(tensor, dim=-1) for tensor in tensors[:2]]
    logits = tensors[2].exp() * unit[0] @ unit[1].T
    labels = torch.arange(len(texts))
    loss = (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    return loss.item(), [tensor.grad.numpy() for tensor in tensors]


@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("scale", [0.0, SCALE, 9.0])
def test_the_contrastive_loss_and_its_three_gradients_are_torchs(dtype, bar, scale):
    texts, images = TEXTS.astype(dtype), IMAGES.astype(dtype)
    loss, gradients = minclip.contrastive_loss(texts, images, scale)
    expected, theirs = torch_loss(texts, images, scale)
    assert abs(loss - expected) <= bar * expected
    for ours, other in zip(gradients, theirs, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == other.shape
        assert relative(ours, other) <= 10 * bar


def test_logit_scale_may_be_the_array_of_a_checkpoint_of_any_shape():
    expected = minclip.contrastive_loss(TEXTS, IMAGES, SCALE)[1][2]
    for shape in ((), (1,)):
        gradient = minclip.contrastive_loss(TEXTS, IMAGES, np.full(shape, SCALE))[1][2]
        assert gradient.shape == shape
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_features_of_different_shapes_are_refused_with_both():
    with pytest.raises(ValueError, match=r"same shape \[N, E\], not \[6, 5\] and \[5, 5\]"):
        minclip.contrastive_loss(TEXTS, IMAGES[:5], SCALE)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gradient_through_normalize_is_torchs_and_zero_for_a_zero_row(dtype):
    features, grad = TEXTS.astype(dtype), IMAGES.astype(dtype)
    tensor = torch.from_numpy(features).requires_grad_()
    functional.normalize(tensor, dim=-1).backward(torch.from_numpy(grad))
    ours = minclip.normalize_backward(grad, features)
    assert ours.dtype == dtype
    assert relative(ours, tensor.grad.numpy()) <= 10 * np.finfo(dtype).eps
    assert not minclip.normalize_backward(grad, np.zeros_like(features)).any()
