"""Relevance is that of Chefer's paper, and finds the word that a similarity comes from."""

import numpy as np
import pytest
import torch

import minclip
from tests.support.oracles import random_params, random_tokens, relative

PARAMS = random_params(width=128, layers=3, embed=24, context=19, vocabulary=97, dtype=np.float64)
TOKENS = random_tokens([5, 2, 11], context=19, vocabulary=97)
TARGET = np.random.default_rng(0).standard_normal((3, 24))


def chefer(params, row, target):
    """Return the relevance of one row, unpadded, with the gradients of its weights from autograd."""
    F, state = torch.nn.functional, {name: torch.from_numpy(array) for name, array in params.items()}

    def norm(x, name):
        return F.layer_norm(x, [128], state[name + ".weight"], state[name + ".bias"])

    def linear(x, name):
        return F.linear(x, state[name + "weight"], state[name + "bias"])

    x = (state["token_embedding.weight"][row] + state["positional_embedding"][: len(row)]).requires_grad_()
    mask, weights = torch.full((len(row), len(row)), -torch.inf).triu(1), []
    for i in range(3):
        block = f"transformer.resblocks.{i}."
        qkv = linear(norm(x, block + "ln_1"), block + "attn.in_proj_")
        q, k, v = qkv.reshape(-1, 3, 2, 64).permute(1, 2, 0, 3)
        weights.append((q @ k.swapaxes(1, 2) / 8 + mask).softmax(-1))
        weights[-1].retain_grad()
        x = x + linear((weights[-1] @ v).swapaxes(0, 1).reshape(-1, 128), block + "attn.out_proj.")
        h = linear(norm(x, block + "ln_2"), block + "mlp.c_fc.")
        x = x + linear(h * torch.sigmoid(1.702 * h), block + "mlp.c_proj.")
    features = norm(x, "ln_final")[-1] @ state["text_projection"]
    torch.cosine_similarity(features, torch.from_numpy(target), dim=0).backward()
    relevance = eye = torch.eye(len(row), dtype=torch.float64)
    for weight in weights:
        relevance = relevance + (weight.grad * weight).clamp(min=0).mean(0) @ relevance
    return (relevance - eye)[-1].detach().numpy()


def test_relevance_is_that_of_chefers_rule_with_autograds_gradients():
    ours = minclip.attribute(PARAMS, TOKENS, TARGET)
    assert ours.shape == TOKENS.shape
    for row, target, relevance in zip(TOKENS, TARGET, ours, strict=True):
        end = row.argmax() + 1
        assert relative(relevance[:end], chefer(PARAMS, row[:end], target)) <= 1e-10
        assert not relevance[end:].any()


def test_one_target_serves_every_text_and_leading_axes_stay():
    one = minclip.attribute(PARAMS, TOKENS.reshape(1, 3, 19), TARGET[0])
    assert one.shape == (1, 3, 19)
    np.testing.assert_allclose(one[0, 0], minclip.attribute(PARAMS, TOKENS[0], TARGET[0]), atol=1e-12)
    np.testing.assert_array_equal(one[0], minclip.attribute(PARAMS, TOKENS, TARGET[[0, 0, 0]]))


def test_float32_stays_float32():
    params = {name: array.astype(np.float32) for name, array in PARAMS.items()}
    assert minclip.attribute(params, TOKENS, TARGET).dtype == np.float32


@pytest.mark.parametrize(
    ("text", "picture", "word"),
    [
        ("a photo of a red sports car on the beach", "racing car", "car"),
        ("two people and a cat in the kitchen", "cat", "cat"),
        ("an old castle behind the trees", "castle", "castle"),
    ],
)
def test_the_word_that_names_the_picture_matters_most(text, picture, word):
    params, (_, names, pictures) = minclip.load(), minclip.pictures()
    tokens = minclip.tokenize(text)
    relevance = minclip.attribute(params, tokens, pictures[names.index(picture)])[0]
    inner = slice(1, tokens[0].argmax())
    assert minclip.decode(tokens[:, inner][:, relevance[inner].argmax()]) == [word]
