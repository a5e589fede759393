"""The tap at work, what a trace holds and shows, and what a live torch model gives."""

import numpy as np
import pytest

import minclip
from tests.support.oracles import openai_model, random_params, random_tokens, relative, transformers_model

SIZES = dict(width=128, layers=3, embed=48, context=20, vocabulary=99)
PARAMS = random_params(**SIZES)
TOKENS = random_tokens([5, 20, 2, 11], context=20, vocabulary=99)


def test_a_tap_ablates_a_head():
    def ablate(name, array):
        if name == "transformer.resblocks.1.attn.weights":
            array = array.copy()
            array[:, 1] = 0
        return array

    ablated = minclip.encode_text(PARAMS, TOKENS, tap=ablate)
    # A head whose weights are 0 is a head whose columns of the output projection are.
    weight = PARAMS["transformer.resblocks.1.attn.out_proj.weight"].copy()
    weight[:, 64:] = 0
    expected = minclip.encode_text(PARAMS | {"transformer.resblocks.1.attn.out_proj.weight": weight}, TOKENS)
    assert relative(ablated, expected) < 1e-6
    assert relative(ablated, minclip.encode_text(PARAMS, TOKENS)) > 1e-2


def test_a_tap_patches_an_activation_from_another_run():
    other = random_tokens([5, 20, 2, 11], context=20, vocabulary=99, seed=1)
    theirs = minclip.trace(PARAMS, other)
    patched = minclip.encode_text(
        PARAMS, TOKENS, tap=lambda name, x: theirs[name] if name == "transformer.resblocks.2" else x
    )
    np.testing.assert_allclose(patched, theirs["text_features"], rtol=1e-5, atol=1e-6)


def test_a_trace_holds_what_the_tap_sees_in_order():
    seen = {}
    minclip.encode_text(PARAMS, TOKENS, tap=lambda name, x: seen.setdefault(name, x))
    traced = minclip.trace(PARAMS, TOKENS)
    assert isinstance(traced, dict)
    assert list(traced) == list(seen)
    for name, array in seen.items():
        np.testing.assert_array_equal(traced[name], array)
        assert traced[name].dtype == array.dtype
    assert traced["ln_final"].shape == (4, 20, 128)  # positions after the last end of text too


def test_recorded_arrays_are_nobodys_but_the_traces():
    params = {name: array.copy() for name, array in PARAMS.items()}
    tokens = TOKENS.copy()
    traced = minclip.trace(params, tokens)
    copies = {name: array.copy() for name, array in traced.items()}
    arrays = list(traced.values())
    for n, a in enumerate(arrays):
        assert not any(np.may_share_memory(a, b) for b in [*arrays[:n], *params.values(), tokens])
    for array in [*params.values(), tokens]:
        array[...] = 0
    for name in traced:
        np.testing.assert_array_equal(traced[name], copies[name])
    np.testing.assert_array_equal(traced.tokens, TOKENS)


@pytest.mark.parametrize("shape", [(20,), (2, 2, 20)])
def test_leading_axes_become_the_batch(shape):
    tokens = TOKENS[0] if len(shape) == 1 else TOKENS.reshape(shape)
    traced = minclip.trace(PARAMS, tokens)
    B = tokens.size // 20
    assert traced["embedding"].shape == (B, 20, 128)
    assert traced.tokens.shape == (B, 20)


def test_the_table_has_a_line_for_each_stage_and_fits_a_terminal():
    lines = repr(minclip.trace(PARAMS, TOKENS)).splitlines()
    assert lines[0].split() == ["stage", "shape", "dtype", "min", "max", "norm", "NaN"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith("token_embedding")
    assert "[4, 2, 20, 20]" in next(line for line in lines if "0.attn.scores" in line)
    assert not any("1.attn" in line for line in lines)  # the later blocks are folded
    assert sum("transformer.resblocks.2" in line for line in lines) == 1
    assert lines[-1] == "... and 28 more stages inside the later blocks"


def test_a_table_counts_what_is_nan():
    traced = minclip.trace(PARAMS, TOKENS)
    traced["pooled"][0, :7] = np.nan
    line = next(line for line in repr(traced).splitlines() if line.startswith("pooled"))
    assert line.split()[-1] == "7"


def test_jupyter_gets_every_stage():
    page = minclip.trace(PARAMS, TOKENS)._repr_html_()
    assert (
        page.count("<tr>") == len(minclip.trace(PARAMS, TOKENS)) + 3
    )  # a title line, one for each of 2 blocks
    assert page.count("<details>") == 2


@pytest.mark.parametrize("tower", ["transformers", "openai"])
def test_a_live_torch_model_is_traced_under_its_own_names_and_left_as_it_was(tower):
    torch_model = {"transformers": transformers_model, "openai": openai_model}[tower](PARAMS)
    dump = minclip.trace_torch(torch_model, TOKENS)
    names = {
        "transformers": (
            "text_model.encoder.layers.2.mlp.fc1",
            "text_projection",
            "text_model.pooler_output",
        ),
        "openai": ("transformer.resblocks.2.mlp.c_fc", "text_features", "transformer.input"),
    }[tower]
    for name in names:
        assert isinstance(dump[name], np.ndarray)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in torch_model.modules())


def test_a_torch_model_that_returns_all_positions_has_hidden_states_and_no_features():
    model = openai_model(PARAMS)
    model.encode_text = lambda ids: model.ln_final(model.token_embedding(ids))
    dump = minclip.trace_torch(model, TOKENS)
    assert dump["hidden_states"].shape == dump["token_embedding"].shape
    assert "text_features" not in dump


def test_hooks_are_taken_away_when_the_model_fails():
    torch_model = openai_model(PARAMS)
    with pytest.raises(IndexError):
        minclip.trace_torch(torch_model, TOKENS + 1000)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in torch_model.modules())
