"""minclip.fast.hidden_states gives hidden_states' states for many texts, whatever they share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minclip
from tests.support.oracles import random_params, relative, token_rows
from tests.unit.fast.test_fast import PARAMS, L, V, harsh_params

pytestmark = pytest.mark.usefixtures("two_blas_threads")

LONG = minclip.Params(random_params(layers=2, embed=24), activation="gelu", heads=2)


def assert_close(params, tokens, tolerance=1e-5, **options):
    """The reference and minclip.fast give the same states, pooled rows and features."""
    for pooled in (False, True):
        ours = minclip.fast.hidden_states(params, tokens, pooled=pooled, **options)
        options.pop("nodes", None)
        truth = minclip.hidden_states(params, tokens, pooled=pooled, **options)
        for a, b in zip(ours if pooled else [ours], truth if pooled else [truth], strict=True):
            assert (a is None) == (b is None)
            if b is not None and b.size:
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert relative(a, b) < tolerance


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=40),
    pad=st.sampled_from([0, V - 1]),
    skip=st.integers(0, 3),
    norm=st.booleans(),
    nodes=st.sampled_from([None, 1, 60]),
)
def test_texts_that_begin_alike_keep_their_own_states(texts, pad, skip, norm, nodes):
    tokens = token_rows(texts, L, V)
    tokens = np.where(np.arange(L) > tokens.argmax(axis=-1)[:, None], pad, tokens)
    assert_close(PARAMS, tokens, skip=skip, norm=norm, nodes=nodes)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_every_dtype_is_kept(dtype, activation):
    params = harsh_params(activation=activation, dtype=dtype)
    tolerance = {"float16": 2e-2, "float32": 1e-5, "float64": 1e-13}[dtype]
    assert_close(params, token_rows([[1, 2], [1, 2, 3], []], L, V), tolerance, skip=1, norm=False)


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_any_leading_shape_and_any_number_of_positions(leading):
    tokens = np.broadcast_to(token_rows([[5, 6]], L, V)[0, :9], (*leading, 9))
    assert_close(PARAMS, tokens)


def test_a_tower_without_projection_has_states_and_pooled_rows():
    bare = PARAMS.with_arrays({name: a for name, a in PARAMS.items() if name != "text_projection"})
    assert_close(bare, token_rows([[1], [2, 3]], L, V))


def test_equal_texts_are_computed_once(monkeypatch):
    from minclip.fast import states

    nodes, block = [], states.residual_block
    monkeypatch.setattr(
        states, "residual_block", lambda x, *others: nodes.append(len(x)) or block(x, *others)
    )
    minclip.fast.hidden_states(LONG, np.repeat(minclip.tokenize(["a cat"]), 500, axis=0))
    assert sum(nodes) == 2 * 80  # 77 positions, filled up to twigs of 16, in two blocks


def test_one_nan_does_not_reach_other_texts():
    params = PARAMS.copy()
    params["token_embedding.weight"] = params["token_embedding.weight"].copy()
    params["token_embedding.weight"][7] = np.nan
    tokens = token_rows([[1, 2], [1, 7], [1, 3]], L, V)
    ours, truth = minclip.fast.hidden_states(params, tokens), minclip.hidden_states(params, tokens)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(truth))
    assert relative(ours[[0, 2]], truth[[0, 2]]) < 1e-5


def test_a_skip_beyond_the_blocks_is_refused():
    with pytest.raises(ValueError, match="skip must be from 0 to 3"):
        minclip.fast.hidden_states(PARAMS, token_rows([[1]], L, V), skip=4)
