"""Gradients are those of torch's autograd and of finite differences, for every parameter and every stage."""

import importlib
import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minclip
from minclip.tracing import trimmed
from tests.support.oracles import (
    openai_model,
    random_params,
    random_tokens,
    relative,
    token_rows,
    torch_gradients,
    transformers_gradients,
)
from tests.support.pages import too_wide, wrong_shape_comments

page = importlib.import_module("minclip.backward")  # minclip.backward is the function
ORACLES = {"torch": torch_gradients, "transformers": transformers_gradients}
# Axes of different sizes, so that no shape comment is right by accident. L counts the trimmed positions.
AXES = dict(B=3, L=11, D=40, H=5, K=8, F=160, E=24, V=97)
SIZE = dict(width=40, layers=2, embed=24, context=19, vocabulary=97)
HEADS = 5
TOKENS = random_tokens([5, 2, 11], context=19, vocabulary=97)
GRAD = np.random.default_rng(1).standard_normal((3, 24))
EXACT = {"quick_gelu": 1e-12, "gelu": 1e-9}  # the exact GELU's tail is known to 5e-14 of 1


def tower(dtype="float64", activation="quick_gelu", **changes):
    return minclip.Params(
        random_params(**SIZE | changes, dtype=np.dtype(dtype)), activation=activation, heads=HEADS
    )


PARAMS = tower()
STAGES = [name for name in minclip.trace(PARAMS, TOKENS) if name != "eot"]


def worst(grads, others):
    """Return (the largest relative error of a parameter, its name); both hold the same names and shapes."""
    assert grads.keys() == others.keys()
    assert all(grads[name].shape == others[name].shape for name in grads)
    return max((relative(grads[name], others[name]), name) for name in grads)


def assert_equal(gradients, others):
    assert list(gradients) == list(others)
    for name, array in others.items():
        np.testing.assert_array_equal(gradients[name], array, err_msg=name)


def loss(params, tokens, tap=None):
    return float((minclip.encode_text(params, tokens, tap=tap) * GRAD).sum())


# The page


def test_every_shape_comment_of_backward_py_is_true():
    def run():
        minclip.backward(minclip.trace(PARAMS, TOKENS), GRAD)

    wrong, missed, count = wrong_shape_comments(page, AXES, run)
    assert not wrong
    assert not missed, "a line with a shape comment was not reached"
    assert count >= 20


def test_the_page_has_at_most_160_lines():
    assert len(inspect.getsource(page).splitlines()) <= 160


def test_every_step_of_model_py_has_its_backward():
    steps = {
        name
        for name, step in vars(minclip.model).items()
        if inspect.isfunction(step) and step.__module__ == "minclip.model" and "params" not in name
    }
    # A sum passes its gradient on; a product of matrices and a linear layer have one rule.
    of_their_own = steps - {"encode_text", "hidden_states", "add", "matmul", "unrounded_linear"}
    missing = {name for name in of_their_own if not hasattr(page, f"{name}_backward")}
    assert missing == {"weight_and_bias"}


# Parity


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("stages", ["all", "blocks"])
def test_float64_gradients_are_those_of_autograd(oracle, activation, stages):
    params = tower(activation=activation)
    theirs = ORACLES[oracle](params, TOKENS, GRAD, "float64", activation=activation, heads=HEADS)
    grads = minclip.backward(minclip.trace(params, TOKENS, stages=stages), GRAD)
    assert worst(grads, theirs)[0] <= EXACT[activation]


def test_openais_own_class_has_the_same_gradients():
    import torch

    params = random_params(width=128, layers=2, vocabulary=600)
    tokens = random_tokens([2, 9, 30, 77], vocabulary=600)
    grad = np.random.default_rng(0).standard_normal((4, 96)).astype(np.float32)
    model = openai_model(params)
    model.encode_text(torch.from_numpy(tokens).long()).backward(torch.from_numpy(grad))
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if name in params}
    assert worst(minclip.backward(minclip.trace(params, tokens), grad), theirs)[0] <= 1e-5


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_float32_gradients_are_as_close_to_the_truth_as_autograds(oracle, activation):
    params = minclip.Params(
        random_params(width=128, layers=6, vocabulary=999), activation=activation, heads=2
    )
    tokens = random_tokens([2, 5, 12, 33, 77] * 2, vocabulary=999)
    grad = np.random.default_rng(0).standard_normal((10, 96)).astype(np.float32)
    truth = torch_gradients(params, tokens, grad, "float64", activation=activation, heads=2)
    theirs = ORACLES[oracle](params, tokens, grad, activation=activation, heads=2)
    ours = minclip.backward(minclip.trace(params, tokens), grad)
    assert all(array.dtype == np.float32 for array in ours.values())
    ratios = [relative(ours[name], truth[name]) / relative(theirs[name], truth[name]) for name in truth]
    assert np.median(ratios) <= 1.5


V, L = 97, 12
words = st.lists(st.integers(0, V - 3), max_size=L - 2)


@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(words, min_size=1, max_size=6),
    heads=st.sampled_from([1, 2, 3]),
    head_width=st.sampled_from([2, 5, 8]),
    layers=st.integers(1, 3),
    activation=st.sampled_from(["quick_gelu", "gelu"]),
    padding=st.sampled_from(["zeros", "end of text", "anything"]),
    stages=st.sampled_from(["all", "blocks"]),
    tapped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_small_tower_any_texts_any_padding(
    texts, heads, head_width, layers, activation, padding, stages, tapped, seed
):
    rng = np.random.default_rng(seed)
    params = random_params(
        width=heads * head_width,
        layers=layers,
        embed=int(rng.integers(1, 9)),
        context=L,
        vocabulary=V,
        seed=seed,
        dtype=np.float64,
    )
    for name in ("token_embedding.weight", "positional_embedding"):
        params[name] = params[name] * 20  # so that no layer norm divides by almost nothing
    params = minclip.Params(params, activation=activation, heads=heads)
    tokens = token_rows(texts, L, V)
    after = np.arange(L) > tokens.argmax(axis=1)[:, None]
    if padding != "zeros":
        fill = V - 1 if padding == "end of text" else rng.integers(0, V, tokens.shape)
        tokens = np.where(after, fill, tokens)
    grad = rng.standard_normal((len(texts), params["text_projection"].shape[1]))
    seen = {}
    tap = (lambda name, array: seen.setdefault(name, array)) if tapped else None
    grads = minclip.backward(minclip.trace(params, tokens, stages=stages), grad, tap=tap)
    theirs = torch_gradients(params, tokens, grad, "float64", activation=activation, heads=heads)
    for name, array in theirs.items():
        bar = EXACT[activation] * max(1, np.linalg.norm(array))
        assert np.linalg.norm(grads[name] - array) <= bar, name
    if tapped:
        assert not seen["token_embedding"][after].any()


# Finite differences


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_finite_differences_of_every_parameter(activation):
    params, rng, step = tower(activation=activation), np.random.default_rng(2), 1e-5
    grads = minclip.backward(minclip.trace(params, TOKENS), GRAD)
    for name, array in params.items():
        along = rng.standard_normal(array.shape)
        ends = [loss(params | {name: array + sign * step * along}, TOKENS) for sign in (1, -1)]
        expected, slope = (ends[0] - ends[1]) / (2 * step), (grads[name] * along).sum()
        assert abs(slope - expected) <= 1e-6 * np.linalg.norm(grads[name]) * np.linalg.norm(along), name


@pytest.mark.parametrize("stage", STAGES)
def test_finite_differences_of_every_stage(stage):
    gradient = minclip.backward(minclip.trace(PARAMS, TOKENS), GRAD, parameters=False)[stage]
    along, step = np.random.default_rng(3).standard_normal(gradient.shape), 1e-5

    def moved(by):
        return loss(PARAMS, TOKENS, lambda name, x: x + by * along if name == stage else x)

    expected, slope = (moved(step) - moved(-step)) / (2 * step), (gradient * along).sum()
    assert abs(slope - expected) <= 1e-6 * np.linalg.norm(gradient) * np.linalg.norm(along)


@pytest.mark.parametrize("stage", STAGES)
def test_the_tap_adds_the_gradient_of_a_loss_on_any_stage(stage):
    trace = minclip.trace(PARAMS, TOKENS)
    own = np.random.default_rng(4).standard_normal(trace[stage].shape)
    own[np.isneginf(trace[stage])] = 0
    grads = minclip.backward(trace, None, tap=lambda name, g: g + own if name == stage else g)

    def own_loss(params):
        array = minclip.trace(params, TOKENS)[stage]
        return (np.where(np.isneginf(array), 0, array) * own).sum()

    rng, step = np.random.default_rng(5), 1e-6
    along = {name: rng.standard_normal(array.shape) for name, array in PARAMS.items()}
    ends = [own_loss(PARAMS | {k: a + sign * step * along[k] for k, a in PARAMS.items()}) for sign in (1, -1)]
    slope = sum((grads[name] * along[name]).sum() for name in PARAMS)
    size = sum(np.linalg.norm(grads[name]) * np.linalg.norm(along[name]) for name in PARAMS)
    assert abs(slope - (ends[0] - ends[1]) / (2 * step)) <= 1e-6 * size


# The tap and the stages


def test_the_tap_sees_every_stage_but_the_position_in_reverse_order_and_in_its_shape():
    trace, seen = minclip.trace(PARAMS, TOKENS), {}
    minclip.backward(trace, GRAD, tap=lambda name, gradient: seen.setdefault(name, gradient))
    assert list(seen) == STAGES[::-1]
    for name, gradient in seen.items():
        assert gradient.shape == trace[name].shape, name


@pytest.mark.parametrize("stages", ["all", "blocks"])
def test_without_parameters_the_gradients_of_the_kept_stages_are_returned(stages):
    trace, seen = minclip.trace(PARAMS, TOKENS, stages=stages), {}
    minclip.backward(trace, GRAD, tap=lambda name, gradient: seen.setdefault(name, gradient))
    gradients = minclip.backward(trace, GRAD, parameters=False)
    assert list(gradients) == [name for name in STAGES[::-1] if name in trace]
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, seen[name])
    assert "ln_final" in repr(gradients)


def test_the_pass_goes_on_with_the_array_that_the_tap_returns():
    trace = minclip.trace(PARAMS, TOKENS)
    full = minclip.backward(trace, GRAD)

    def stop(name, gradient):
        return gradient * 0 if name == "transformer.resblocks.0" else gradient

    grads = minclip.backward(trace, GRAD, tap=stop)
    for name, gradient in grads.items():
        below = name.startswith(("transformer.resblocks.0.", "token_", "positional_"))
        assert below == (not gradient.any()), name
        assert below or relative(gradient, full[name]) < 1e-12


def test_a_tap_that_writes_in_place_stops_one_branch_only():
    block = "transformer.resblocks.1.mlp"

    def stop(name, gradient):
        if name == block:
            gradient[...] = 0
        return gradient

    trace = minclip.trace(PARAMS, TOKENS)
    expected = minclip.backward(trace, GRAD, tap=lambda n, g: g * 0 if n == block else g)
    assert_equal(minclip.backward(trace, GRAD, tap=stop), expected)


def test_a_tap_that_returns_nothing_is_told_so_with_the_stage():
    trace = minclip.trace(PARAMS, TOKENS)
    for parameters in (True, False):
        with pytest.raises(ValueError, match="returned None at 'text_features'"):
            minclip.backward(trace, GRAD, tap=lambda name, gradient: None, parameters=parameters)


@pytest.mark.parametrize("stages", ["all", "blocks"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_is_that_at_the_stages_as_a_forward_tap_left_them(stage, stages):
    def bend(name, array):
        return array * 1.25 if name == stage else array

    trace = minclip.trace(PARAMS, TOKENS, tap=bend, stages=stages)
    # The tap's own derivative is the caller's to apply.
    grads = minclip.backward(trace, GRAD, tap=bend)
    rng, step = np.random.default_rng(6), 1e-6
    along = {name: rng.standard_normal(array.shape) for name, array in PARAMS.items()}
    ends = [
        loss(PARAMS | {k: a + sign * step * along[k] for k, a in PARAMS.items()}, TOKENS, bend)
        for sign in (1, -1)
    ]
    slope = sum((grads[name] * along[name]).sum() for name in PARAMS)
    size = sum(np.linalg.norm(grads[name]) * np.linalg.norm(along[name]) for name in PARAMS)
    assert abs(slope - (ends[0] - ends[1]) / (2 * step)) <= 1e-6 * size


# What is kept, and what is left out


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_block_computed_again_gives_the_same_bits(activation):
    params = tower("float32", activation)
    kept, again = (minclip.trace(params, TOKENS, stages=stages) for stages in ("all", "blocks"))
    tap = lambda name, gradient: gradient  # noqa: E731 - without a tap only the kept stages are trimmed views
    assert_equal(minclip.backward(again, GRAD, tap=tap), minclip.backward(kept, GRAD, tap=tap))
    assert len(again) < len(kept) / 3


def test_gradients_after_the_end_of_text_are_exactly_zero():
    gradients = minclip.backward(minclip.trace(PARAMS, TOKENS), GRAD, parameters=False)
    after = np.arange(19) > TOKENS.argmax(axis=1)[:, None]  # (B, L)
    for name, gradient in gradients.items():
        if name == "positional_embedding":
            assert not gradient[11:].any()
        elif gradient.ndim == 3:
            assert not gradient[after].any(), name
        elif (
            gradient.ndim == 4
        ):  # of attn.weights only the queries: a weight above the diagonal would be read
            assert not gradient.swapaxes(1, 2)[after].any(), name
            if name.endswith((".masked", ".scores")):
                assert not gradient.transpose(0, 3, 1, 2)[after].any(), name
                assert not np.triu(gradient, 1).any(), name


def test_positions_after_the_last_end_of_text_are_left_out_and_change_nothing():
    trace = minclip.trace(PARAMS, TOKENS)
    whole = minclip.backward(trace, GRAD, tap=lambda name, gradient: gradient)
    grads = minclip.backward(trace, GRAD)
    assert worst(grads, whole)[0] < 1e-14
    assert not grads["positional_embedding"][11:].any()
    assert trimmed(trace)["transformer.resblocks.0.attn.masked"].shape == (3, 5, 11, 11)
    assert worst(minclip.backward(minclip.trace(PARAMS, TOKENS[:, :11]), GRAD), whole)[0] < 1e-14


def test_an_id_that_occurs_several_times_gets_the_sum():
    tokens = np.array([[95, 7, 7, 7, 96], [95, 0, 7, 0, 96]])
    trace = minclip.trace(PARAMS, tokens)
    stages = minclip.backward(trace, GRAD[:2], parameters=False)
    table = minclip.backward(trace, GRAD[:2])["token_embedding.weight"]
    np.testing.assert_allclose(table[7], stages["token_embedding"][tokens == 7].sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(table[0], stages["token_embedding"][tokens == 0].sum(axis=0), rtol=1e-12)
    assert not np.delete(table, [0, 7, 95, 96], axis=0).any()


def test_a_tower_without_projection_starts_at_the_pooled_rows():
    bare = minclip.Params(
        {k: a for k, a in PARAMS.items() if k != "text_projection"}, activation="quick_gelu", heads=5
    )
    grads = minclip.backward(minclip.trace(bare, TOKENS), GRAD @ PARAMS["text_projection"].T)
    full = minclip.backward(minclip.trace(PARAMS, TOKENS), GRAD)
    assert grads.keys() == bare.keys()
    for name, gradient in grads.items():
        np.testing.assert_array_equal(gradient, full[name])


def test_the_end_of_text_of_params_is_honored():
    named = PARAMS.copy()
    named.eot = 50
    tokens = np.array([[95, 60, 50, 7, 96], [95, 50, 96, 50, 3]])
    place = {"eot": np.array([2, 1])}
    tapped = minclip.trace(PARAMS, tokens, tap=lambda name, array: place.get(name, array))
    assert_equal(
        minclip.backward(minclip.trace(named, tokens), GRAD[:2], tap=lambda n, g: g),
        minclip.backward(tapped, GRAD[:2]),
    )


@pytest.mark.parametrize("parameters", [True, False])
def test_the_gradients_know_the_run_that_they_belong_to(parameters):
    tap = lambda name, array: array  # noqa: E731 - a tap of the forward pass
    trace = minclip.trace(PARAMS, TOKENS, tap=tap)
    gradients = minclip.backward(trace, GRAD, parameters=parameters)
    assert gradients.params is PARAMS
    assert gradients.tap is tap
    np.testing.assert_array_equal(gradients.tokens, TOKENS)
    np.testing.assert_array_equal(gradients.gradient, GRAD)


# Inputs


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_gradients_have_the_dtype_of_the_features_and_nothing_is_wider_between(dtype, activation):
    params, found, grad = tower(dtype, activation), [], GRAD.astype(dtype)
    wider = too_wide(
        page,
        dtype,
        lambda: found.append(minclip.backward(minclip.trace(params, TOKENS, stages="blocks"), grad)),
    )
    assert wider == []
    assert {array.dtype for array in found[0].values()} == {np.dtype(dtype)}
    gradients = minclip.backward(minclip.trace(params, TOKENS), GRAD, parameters=False)
    assert {array.dtype for array in gradients.values()} == {np.dtype(dtype)}


def test_nothing_is_written_into_params_trace_or_gradient():
    params, grad = tower("float32"), GRAD.astype(np.float32)
    trace = minclip.trace(params, TOKENS)
    for array in [*params.values(), *trace.values(), trace.tokens, grad]:
        array.flags.writeable = False

    def vandal(name, gradient):
        gradient[...] = 0
        return gradient

    minclip.backward(trace, grad)
    minclip.backward(trace, grad, tap=vandal)
    minclip.backward(minclip.trace(params, TOKENS, stages="blocks"), grad, tap=vandal, parameters=False)


def test_any_leading_shape_and_any_array_like_gradient():
    tokens = TOKENS[[0, 1, 2, 0]].reshape(2, 2, 19)
    trace = minclip.trace(PARAMS, tokens)
    grads = minclip.backward(trace, GRAD[[0, 1, 2, 0]].reshape(2, 2, 24))
    assert_equal(minclip.backward(trace, GRAD[[0, 1, 2, 0]].tolist()), grads)
    empty = minclip.backward(minclip.trace(PARAMS, TOKENS[:0]), GRAD[:0])
    assert empty.keys() == grads.keys()
    assert not any(array.any() for array in empty.values())


def test_keys_of_the_image_tower_have_no_gradient():
    params = random_params(width=64, layers=1, vocabulary=97, context=19)
    more = params | {"logit_scale": np.float32(4.6), "visual.proj": np.ones((3, 3), np.float32)}
    tokens = TOKENS[:, :11]
    grads = minclip.backward(minclip.trace(more, tokens), np.ones((3, 96)))
    assert grads.keys() == params.keys()


@pytest.mark.parametrize("shape", [(3, 23), (2, 24), (24,), (3, 1, 23), ()])
def test_a_gradient_of_another_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"the gradient has shape \[.*\], the features have \[3, 24\]"):
        minclip.backward(minclip.trace(PARAMS, TOKENS), np.ones(shape))


def test_float16_is_refused_with_the_reason():
    trace = minclip.trace(tower("float16"), TOKENS)
    with pytest.raises(ValueError, match=r"underflow in float16: trace params.astype\('float32'\) instead"):
        minclip.backward(trace, GRAD)


def test_a_dump_is_refused():
    with pytest.raises(ValueError, match="no params or tokens: give one"):
        minclip.backward(minclip.tracing.Trace(minclip.trace(PARAMS, TOKENS)), GRAD)


def test_trace_refuses_an_unknown_choice_of_stages():
    with pytest.raises(ValueError, match="stages must be 'all' or 'blocks', not 'block'"):
        minclip.trace(PARAMS, TOKENS, stages="block")
