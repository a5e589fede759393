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
    """Return the relevance of one row, unpadded, with the gradients by autograd of weights set by the tap."""
    weights = {
        name: torch.from_numpy(array).requires_grad_()
        for name, array in minclip.trace(params, row).items()
        if name.endswith("attn.weights")
    }
    state = {name: torch.from_numpy(array) for name, array in params.items()}
    x = state["token_embedding.weight"][row] + state["positional_embedding"][: len(row)]
    norm = lambda x, name: torch.nn.functional.layer_norm(  # noqa: E731
        x, [128], state[name + ".weight"], state[name + ".bias"]
    )
    for i in range(3):
        b = f"transformer.resblocks.{i}."
        h = norm(x, b + "ln_1")
        v = (h @ state[b + "attn.in_proj_weight"].T + state[b + "attn.in_proj_bias"])[:, 256:]
        c = (weights[b + "attn.weights"][0] @ v.reshape(-1, 2, 64).swapaxes(0, 1)).swapaxes(0, 1)
        x = x + c.reshape(-1, 128) @ state[b + "attn.out_proj.weight"].T + state[b + "attn.out_proj.bias"]
        h = norm(x, b + "ln_2") @ state[b + "mlp.c_fc.weight"].T + state[b + "mlp.c_fc.bias"]
        x = (
            x
            + (h * torch.sigmoid(1.702 * h)) @ state[b + "mlp.c_proj.weight"].T
            + state[b + "mlp.c_proj.bias"]
        )
    features = norm(x, "ln_final")[-1] @ state["text_projection"]
    torch.cosine_similarity(features, torch.from_numpy(target), dim=0).backward()
    relevance = torch.eye(len(row), dtype=torch.float64)
    for weight in weights.values():
        relevance = relevance + (weight.grad * weight).clamp(min=0).mean(1)[0] @ relevance
    return (relevance[-1] - torch.eye(len(row))[-1]).detach().numpy()


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
