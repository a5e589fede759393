"""encode_text beyond parity: shapes, dtypes, the tap, clear errors, untouched inputs."""

import ast
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import minclip
from minclip import model
from tests.support.oracles import random_params, random_tokens, relative
from tests.support.pages import too_wide, wrong_shape_comments

ROOT = Path(__file__).parents[2]
# Axes of different sizes, so that no shape comment is right by accident. L counts the trimmed positions.
AXES = dict(B=3, L=11, D=40, H=5, K=8, F=160, E=24, V=97)
PARAMS = minclip.from_state_dict(
    random_params(width=40, layers=2, embed=24, context=19, vocabulary=97), activation="quick_gelu", heads=5
)
TOKENS = random_tokens([5, 2, 11], context=19, vocabulary=97)


def test_every_shape_comment_of_model_py_is_true():
    def run():
        minclip.encode_text(PARAMS, TOKENS)
        minclip.hidden_states(PARAMS, TOKENS[:, : AXES["L"]], skip=1, pooled=True)

    wrong, missed, count = wrong_shape_comments(model, AXES, run)
    assert not wrong
    assert not missed, "a line with a shape comment was not reached"
    assert count >= 20


def test_the_page_is_short():
    assert len(inspect.getsource(model).splitlines()) <= 210


def test_the_forward_pass_is_one_screen():
    functions = (model.encode_text, model.embed, model.transformer, model.read_out)
    functions += (model.residual_block, model.attention, model.mlp)
    lines = 0
    for function in functions:
        body = ast.parse(inspect.getsource(function)).body[0].body[1:]  # after the docstring
        lines += body[-1].end_lineno - body[0].lineno + 1
    assert lines <= 60


def stage_names(layers):
    names = ["token_embedding", "positional_embedding", "embedding"]
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        parts = "ln_1 attn.q attn.k attn.v attn.scores attn.masked attn.weights attn.context attn"
        parts += " residual ln_2 mlp.c_fc mlp.gelu mlp"
        names += [f"{block}.{part}" for part in parts.split()] + [block]
    return [*names, "ln_final", "eot", "pooled", "text_features"]


def test_the_tap_sees_every_stage_in_order_with_all_positions():
    stages = {}
    minclip.encode_text(PARAMS, TOKENS, tap=lambda name, array: stages.setdefault(name, array))
    assert list(stages) == stage_names(layers=2)
    B, L, D, H, K, F, E = 3, 19, 40, 5, 8, 160, 24
    block = "transformer.resblocks.1"
    for name, shape in {
        "token_embedding": (B, L, D),
        "positional_embedding": (L, D),
        f"{block}.attn.q": (B, H, L, K),
        f"{block}.attn.scores": (B, H, L, L),
        f"{block}.attn.weights": (B, H, L, L),
        f"{block}.attn.context": (B, L, D),
        f"{block}.mlp.gelu": (B, L, F),
        block: (B, L, D),
        "ln_final": (B, L, D),
        "eot": (B,),
        "pooled": (B, D),
        "text_features": (B, E),
    }.items():
        assert stages[name].shape == shape, name


@pytest.mark.parametrize("stage", stage_names(layers=2))
def test_what_the_tap_returns_goes_on(stage):
    def tap(name, array):
        if name != stage:
            return array
        return array[::-1] if name == "eot" else array * np.linspace(0.5, 1.5, array.shape[-1], dtype="f4")

    changed = minclip.encode_text(PARAMS, TOKENS, tap=tap)
    assert np.isfinite(changed).all()
    assert relative(changed, minclip.encode_text(PARAMS, TOKENS)) > 1e-4


def test_an_unchanging_tap_changes_nothing_but_rounding():
    tapped = minclip.encode_text(PARAMS, TOKENS, tap=lambda name, array: array)
    assert relative(tapped, minclip.encode_text(PARAMS, TOKENS)) < 1e-6


def test_a_tap_that_writes_in_place_does_not_reach_the_parameters():
    before = {name: array.copy() for name, array in PARAMS.items()}

    def vandal(name, array):
        array[...] = 0
        return array

    minclip.encode_text(PARAMS, TOKENS, tap=vandal)
    for name in before:
        np.testing.assert_array_equal(PARAMS[name], before[name])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_dtype_in_is_dtype_out_except_for_unrounded_changes_and_nothing_is_wider_between(dtype, activation):
    params = minclip.Params(
        {name: array.astype(dtype) for name, array in PARAMS.items()}, activation=activation, heads=5
    )
    widest = np.dtype("float32" if dtype == "float16" else dtype)
    stages = {}
    wider = too_wide(
        model,
        widest,
        lambda: minclip.encode_text(params, TOKENS, tap=lambda n, a: stages.setdefault(n, a)),
    )
    stages.pop("eot")
    for name, array in stages.items():
        assert array.dtype == (widest if name.endswith((".attn", ".mlp")) else dtype), name
    assert wider == []


def test_a_mixture_of_dtypes_computes_in_that_of_the_projection():
    """OpenAI's float16 models on the GPU keep norms and embeddings in float32."""
    mixed = {
        name: array if "ln_" in name or "embedding" in name else array.astype(np.float16)
        for name, array in random_params(vocabulary=97).items()
    }
    features = minclip.encode_text(mixed, random_tokens([5, 9], vocabulary=97))
    assert features.dtype == np.float16
    assert np.isfinite(features).all()


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape(leading):
    rows = random_tokens(np.full(int(np.prod(leading, dtype=int)), 6), context=19, vocabulary=97)
    features = minclip.encode_text(PARAMS, rows.reshape(*leading, 19))
    assert features.shape == (*leading, 24)
    if rows.size:
        flat = features.reshape(-1, 24)
        assert relative(flat, minclip.encode_text(PARAMS, rows)) < 1e-6


def test_padding_is_never_computed_and_never_matters():
    longer = np.concatenate([TOKENS[:, :11], np.full((3, 8), 50)], axis=1)
    np.testing.assert_array_equal(minclip.encode_text(PARAMS, longer), minclip.encode_text(PARAMS, TOKENS))
    assert relative(minclip.encode_text(PARAMS, TOKENS[:, :11]), minclip.encode_text(PARAMS, TOKENS)) < 1e-6


def test_one_text_alone_is_the_text_in_a_batch():
    batch = minclip.encode_text(PARAMS, TOKENS)
    for row, feature in zip(TOKENS, batch, strict=True):
        assert relative(minclip.encode_text(PARAMS, row), feature) < 1e-6


def test_nothing_is_written_into_params_or_tokens():
    params = {name: array.copy() for name, array in PARAMS.items()}
    tokens = TOKENS.copy()
    for array in [*params.values(), tokens]:
        array.flags.writeable = False
    minclip.encode_text(minclip.Params(params, activation="gelu", heads=5), tokens)


@pytest.mark.parametrize("kind", [np.int16, np.int64, np.uint8, np.uint64, list])
def test_any_integers_are_tokens(kind):
    tokens = TOKENS.tolist() if kind is list else TOKENS.astype(kind)
    np.testing.assert_array_equal(minclip.encode_text(PARAMS, tokens), minclip.encode_text(PARAMS, TOKENS))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS.astype(float), "must be integers.*not float64"),
        (TOKENS == 1, "must be integers.*not bool"),
        (np.array(96), r"L from 1 to the context length 19, not \[\]"),
        (np.zeros((2, 20), int), r"L from 1 to the context length 19, not \[2, 20\]"),
        (np.zeros((2, 0), int), r"L from 1 to the context length 19, not \[2, 0\]"),
        ([[95, 96], [95, 97]], r"id 97 at \[1, 1\] is outside the vocabulary, 0 to 96"),
        ([95, -1, 96], r"id -1 at \[1\] is outside"),
    ],
)
def test_tokens_that_cannot_be_looked_up_say_where(tokens, message):
    with pytest.raises(ValueError, match=message):
        minclip.encode_text(PARAMS, tokens)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "no 'token_embedding.weight'.*from_state_dict"),
        ({**PARAMS, "text_projection": [[1.0]]}, "float arrays, not builtins.list"),
        ({**PARAMS, "text_projection": np.ones((40, 24), int)}, "float arrays"),
        (dict(PARAMS), "0 heads do not divide width 40"),
    ],
)
def test_params_that_are_no_text_tower_say_what_to_do(params, message):
    with pytest.raises(ValueError, match=message):
        minclip.encode_text(params, TOKENS)


def test_a_row_without_end_of_text_warns_and_pools_at_its_largest_id():
    tokens = np.array([[95, 3, 60, 7], [95, 4, 96, 0], [10, 20, 95, 5]])
    with pytest.warns(
        UserWarning, match=r"2 of 3 rows, first row 0, have no end-of-text id \(96\)"
    ) as caught:
        features = minclip.encode_text(PARAMS, tokens)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert relative(features[2], minclip.encode_text(PARAMS, tokens[2, :3])) < 1e-6


def test_the_first_of_several_ends_is_the_end_and_a_zero_inside_a_text_is_text():
    texts = [[95, 5, 96], [95, 0, 0, 7, 96], [95, 1, 2, 3, 4, 5, 6, 96]]
    batch = np.array([[95, 5, 96, 7, 96, 96, 0, 0], [95, 0, 0, 7, 96, 0, 0, 0], texts[2]])
    alone = np.stack([minclip.encode_text(PARAMS, text) for text in texts])
    assert relative(minclip.encode_text(PARAMS, batch), alone) < 1e-6
    assert relative(minclip.encode_text(PARAMS, batch, tap=lambda name, array: array), alone) < 1e-6


def test_an_end_of_text_id_of_the_models_own_is_the_end_where_it_first_stands():
    own = minclip.Params(PARAMS, activation="quick_gelu", heads=5, eot=9)
    tokens = [[1, 90, 3, 9, 95, 9]]
    normed = minclip.trace(own, tokens)["ln_final"]
    features = minclip.encode_text(own, tokens)
    assert relative(features, normed[:, 3] @ own["text_projection"]) < 1e-6


def test_quick_gelu_and_gelu_are_right_to_the_ends_of_their_dtype():
    for dtype in (np.float16, np.float32, np.float64):
        x = np.array([-1e4, -100, -1, 0, 1, 100, 1e4], dtype=dtype)
        for function, at_one in ((model.quick_gelu, 0.8457957659), (model.gelu, 0.8413447461)):
            y = function(x)
            assert y.dtype == dtype
            np.testing.assert_allclose(y[[0, 1, 3, 5, 6]], [0, 0, 0, 100, 1e4], atol=1e-30)
            assert abs(float(y[4]) - at_one) < 2 * np.finfo(dtype).eps + 1e-10


@pytest.mark.deep
def test_every_fault_of_the_catalogue_put_into_encode_text_fails_these_tests():
    subprocess.run([sys.executable, "-m", "tests.mutation_check"], cwd=ROOT, check=True)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("gate", [model.quick_gelu, model.gelu])
def test_a_large_array_gives_the_same_bits_as_each_of_its_rows(gate, dtype):
    """Steps in minclip/arrays.py compute a few rows at a time."""
    x = (4 * np.random.default_rng(0).standard_normal((3, 211, 301))).astype(dtype)
    expected = np.stack([gate(row) for row in x.reshape(-1, 301)]).reshape(x.shape)
    np.testing.assert_array_equal(gate(x), expected)
    np.testing.assert_array_equal(gate(x.swapaxes(0, 1)), expected.swapaxes(0, 1))
    assert gate(x[:0]).shape == (0, 211, 301)


STEPS = {name: [(5, 64)] for name in ("softmax", "quick_gelu", "gelu")} | {
    "layer_norm": [(5, 64), (64,), (64,)],
    "linear": [(5, 64), (9, 64), (9,)],
    "add": [(5, 64), (5, 64)],
    "matmul": [
        (5, 4096),
        (4096, 99),
    ],  # large, as NumPy's own product of float16 is right to float32's rounding
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_float16_arrays_is_that_of_float32_rounded_once(step):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float16) for shape in STEPS[step]]
    exact = getattr(model, step)(*(array.astype(np.float32) for array in arrays))
    np.testing.assert_array_equal(getattr(model, step)(*arrays), exact.astype(np.float16), strict=True)


def test_gelu_is_exact():
    import math

    x = np.linspace(-9, 9, 20001)
    exact = np.array([0.5 * value * math.erfc(-value / math.sqrt(2)) for value in x])
    assert abs(model.gelu(x) - exact).max() < 1e-13


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_normalize_gives_unit_rows_and_leaves_zero_rows(dtype):
    scale = float(np.finfo(dtype).max) / 8
    features = np.array([[[3, 4], [0, 0]], [[scale, scale], [1e-7, 0]]], dtype=dtype)
    before = features.copy()
    unit = minclip.normalize(features)
    assert unit.dtype == dtype
    np.testing.assert_array_equal(features, before)
    lengths = np.linalg.norm(unit.astype(float), axis=-1)
    np.testing.assert_allclose(lengths, [[1, 0], [1, 1]], rtol=2 * np.finfo(dtype).eps)


def test_normalize_asks_for_floats():
    with pytest.raises(ValueError, match="array of floats"):
        minclip.normalize([[1, 2]])
