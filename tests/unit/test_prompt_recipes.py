"""Recipes for long prompts and for weights on states, by what they do, and how to tell them apart.

Prompts with weights, such as "a (red:1.3) cat", have no one meaning: tools change the states of the weighted
positions in different ways. minclip parses no such syntax. The recipes below are what it needs to check a
tool: states, one weight per position, and a comparison.
"""

import numpy as np
import pytest

import minclip
from tests.support.oracles import random_params, relative

PARAMS = minclip.Params(random_params(layers=2, embed=24), activation="quick_gelu", heads=2)


def long_prompt(params, text, pad=49407, **options):
    """Return states [77 n, D] of a text of any length: chunks of 75 tokens, each between start and end."""
    ids = minclip.tokenize(text, context_length=len(text.encode()) + 2)[0]
    ids = ids[1 : ids.argmax()]
    chunks = [ids[i : i + 75] for i in range(0, max(1, len(ids)), 75)]
    tokens = np.full((len(chunks), 77), pad, np.int32)
    for row, chunk in zip(tokens, chunks, strict=True):
        row[: len(chunk) + 2] = [49406, *chunk, 49407]
    return np.concatenate(minclip.hidden_states(params, tokens, **options))


def test_a_short_prompt_is_one_chunk_and_a_long_one_several_that_do_not_see_each_other():
    np.testing.assert_array_equal(
        long_prompt(PARAMS, "a cat"), minclip.hidden_states(PARAMS, minclip.tokenize("a cat", pad=49407))[0]
    )
    words = ["red", "cat"] * 75
    states = long_prompt(PARAMS, " ".join(words), skip=1, norm=False)
    assert states.shape == (154, 128)
    second = minclip.tokenize(" ".join(words[75:]), pad=49407)
    expected = minclip.hidden_states(PARAMS, second, skip=1, norm=False)[0]
    assert relative(states[77:], expected) < 1e-6


# Weights w [L] on states x [L, D]. `empty` [L, D] are the states of the empty prompt, padded alike.


def multiply(x, w, empty):
    """Multiply each position by its weight."""
    return x * w[:, None]


def multiply_and_restore_the_mean(x, w, empty):
    """Multiply each position by its weight, then all by one factor that restores the mean of all numbers."""
    y = x * w[:, None]
    return y * (x.mean() / y.mean())


def interpolate_with_the_empty_prompt(x, w, empty):
    """Move each position away from the empty prompt's state there, or towards it."""
    return empty + (x - empty) * w[:, None]


def scale_around_the_mean(x, w, empty):
    """Multiply the zero-centered states: each position's difference from the mean of all positions."""
    mean = x.mean(axis=0)
    return mean + (x - mean) * w[:, None]


DIALECTS = (multiply, multiply_and_restore_the_mean, interpolate_with_the_empty_prompt, scale_around_the_mean)


def dialect_of(weighted, x, w, empty):
    """Return the dialect that turns states x into a tool's weighted states, None if it is another one."""
    errors = {dialect: relative(weighted, dialect(x, w, empty)) for dialect in DIALECTS}
    best = min(errors, key=errors.get)
    return best if errors[best] < 1e-5 else None


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("weight", [0.5, 1.3])
def test_a_tools_dialect_is_told_by_its_states(dialect, weight):
    tokens = minclip.tokenize(["a red cat", ""], pad=49407)
    x, empty = minclip.hidden_states(PARAMS, tokens)
    w = np.ones(77, np.float32)
    w[2] = weight  # "red"
    weighted = dialect(x, w, empty)
    assert dialect_of(weighted, x, w, empty) is dialect
    assert dialect_of(weighted + 0.01 * empty, x, w, empty) is None


def test_what_to_look_at_where_the_weights_are_not_known():
    """Only restoring the mean changes positions of weight 1; only multiplying keeps a state's direction."""
    x, empty = minclip.hidden_states(PARAMS, minclip.tokenize(["a red cat", ""], pad=49407))
    w = np.ones(77, np.float32)
    w[2] = 1.3

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for dialect in DIALECTS:
        y = dialect(x, w, empty)
        assert (relative(y[3:], x[3:]) > 1e-4) == (dialect is multiply_and_restore_the_mean)
        parallel = abs(1 - cosine(y[2], x[2])) < 1e-6
        assert parallel == (dialect in (multiply, multiply_and_restore_the_mean))
        moved = {
            "empty": cosine(y[2] - x[2], x[2] - empty[2]),
            "mean": cosine(y[2] - x[2], x[2] - x.mean(axis=0)),
        }
        assert (moved["empty"] > 0.99999) == (dialect is interpolate_with_the_empty_prompt)
        assert (moved["mean"] > 0.99999) == (dialect is scale_around_the_mean)
