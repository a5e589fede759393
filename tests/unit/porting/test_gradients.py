"""A port's gradients: a right port agrees in any dialect, and each known bug of a backward pass is named."""

import numpy as np
import pytest
import torch

import minclip
from minclip.porting import gradients as room
from tests.support.broken_gradients import BUGS, gradients
from tests.support.oracles import openai_model, random_params, relative, transformers_model

V, L = 97, 19
PARAMS = minclip.Params(
    random_params(width=128, layers=3, embed=24, context=L, vocabulary=V), activation="quick_gelu", heads=2
)
TOKENS = minclip.porting.probe_tokens(L, V)
GRAD = np.random.default_rng(0).standard_normal((len(TOKENS), 24)).astype(np.float32)
BY_NAME = {fault.id: fault for fault in room.GRADIENT_FAULTS}


@pytest.fixture(scope="module")
def reference():
    return minclip.backward(minclip.trace(PARAMS, TOKENS), GRAD)


@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("make", [openai_model, transformers_model])
def test_a_live_model_agrees_in_stages_and_parameters(make, parameters):
    model = make(PARAMS)
    reference = minclip.backward(minclip.trace(PARAMS, TOKENS), GRAD, parameters=parameters)
    comparison = minclip.compare(reference, minclip.trace_torch(model, TOKENS, grad=GRAD))
    assert comparison.first is None
    assert comparison.verdict.startswith("agrees")
    assert "gradients were compared" in comparison.verdict
    assert set(PARAMS) <= set(comparison.stages)
    assert {"text_features", "transformer.resblocks.1", "transformer.resblocks.2.mlp.c_fc"} <= set(
        comparison.stages
    )
    assert all(p.grad is None for p in model.parameters())


def test_the_recorded_gradients_are_autograds():
    model = openai_model(PARAMS)
    dump = minclip.trace_torch(model, TOKENS, grad=GRAD)
    features = model.encode_text(torch.from_numpy(TOKENS).long())
    features.backward(torch.from_numpy(GRAD))
    np.testing.assert_array_equal(dump["text_features"], GRAD)
    for name, p in model.named_parameters():
        if name in PARAMS:
            assert relative(dump[name], p.grad.numpy()) < 1e-6, name
    assert not any("visual" in name for name in dump)


def test_features_of_the_broken_port_are_right_with_every_bug():
    expected = minclip.encode_text(PARAMS, TOKENS)
    for bug in (None, *BUGS):
        assert relative(gradients(PARAMS, TOKENS, GRAD, bug)[0], expected) < 1e-5, bug


def test_the_port_without_a_bug_agrees_at_every_gradient(reference):
    comparison = minclip.compare(reference, gradients(PARAMS, TOKENS, GRAD)[1])
    assert comparison.first is None
    assert len(comparison.stages) == len(comparison.order)
    assert comparison.faults == []


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_is_found_and_named(reference, bug):
    comparison = minclip.compare(reference, gradients(PARAMS, TOKENS, GRAD, bug)[1])
    assert [fault.id for fault in comparison.faults] == [BUGS[bug]]
    fault = BY_NAME[BUGS[bug]]
    assert comparison.verdict.startswith("diverges first at the gradient of ")
    text = str(comparison)
    assert f"{fault.id} explains every difference: {fault.summary}. Remedy: {fault.remedy}" in text
    assert comparison.to_dict()["faults"][0]["id"] == fault.id


@pytest.mark.parametrize("bug", ["residual", "norm", "softmax", "scale", "gelu"])
def test_a_bug_in_one_block_is_named_and_its_place_found(reference, bug):
    comparison = minclip.compare(reference, gradients(PARAMS, TOKENS, GRAD, bug, blocks=[1])[1])
    assert [fault.id for fault in comparison.faults] == [BUGS[bug]]
    # The gradient of a block's input has the name of the previous block's output.
    assert all(
        name.startswith(("transformer.resblocks.1.", "transformer.resblocks.0")) for name in comparison.new
    )


@pytest.mark.parametrize("bug", ["padding_idx", "assigned"])
def test_a_bug_of_the_token_table_shows_in_no_stage(reference, bug):
    comparison = minclip.compare(reference, gradients(PARAMS, TOKENS, GRAD, bug)[1])
    assert comparison.new == ["token_embedding.weight"]


@pytest.mark.parametrize("bug", BUGS)
def test_parameters_alone_are_enough_to_name_a_bug(reference, bug):
    port = {name: array for name, array in gradients(PARAMS, TOKENS, GRAD, bug)[1].items() if name in PARAMS}
    comparison = minclip.compare(reference, port)
    assert BUGS[bug] in [fault.id for fault in comparison.faults]


def test_an_unknown_difference_is_reported_and_not_named(reference):
    port = gradients(PARAMS, TOKENS, GRAD)[1]
    port["transformer.resblocks.1.attn.v"] = port["transformer.resblocks.1.attn.v"] * 1.001
    comparison = minclip.compare(reference, port)
    assert comparison.first == "transformer.resblocks.1.attn.v"
    assert comparison.faults == []


def test_gradients_of_another_shape_and_missing_ones_are_said(reference):
    port = {"ln_final.bias": np.ones(3, np.float32), "ln_final": np.ones((7, 5), np.float32)}
    comparison = minclip.compare(reference, port)
    assert comparison.first == "ln_final"
    assert "is not a stage of the encoder: ln_final.bias" in str(comparison)
    assert comparison.faults == []


def test_float64_and_float16_ports_have_tolerances_of_their_own():
    wide = PARAMS.astype("float64")
    reference = minclip.backward(minclip.trace(wide, TOKENS), GRAD)
    port = gradients(wide, TOKENS, GRAD.astype(np.float64))[1]
    comparison = minclip.compare(reference, port)
    assert comparison.first is None
    assert comparison.stages["embedding"].tolerance < 1e-13
    port["embedding"] = port["embedding"].astype(np.float32)
    assert minclip.compare(reference, port).first is None
    half = {name: array.astype(np.float16) for name, array in gradients(PARAMS, TOKENS, GRAD)[1].items()}
    comparison = minclip.compare(minclip.backward(minclip.trace(PARAMS, TOKENS), GRAD), half)
    assert comparison.first is None
    assert comparison.stages["embedding"].precision == "float16"


def test_a_tap_of_the_forward_pass_is_remembered():
    def bend(name, array):
        return array * 1.5 if name == "transformer.resblocks.1" else array

    trace = minclip.trace(PARAMS, TOKENS, tap=bend)
    port = minclip.backward(trace, GRAD) | minclip.backward(trace, GRAD, parameters=False)
    assert minclip.compare(minclip.backward(trace, GRAD), port).first is None
