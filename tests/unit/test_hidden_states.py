"""hidden_states gives the states that Stable Diffusion's models read, as transformers and diffusers do."""

import functools

import numpy as np
import pytest

import minclip
from tests.support.oracles import random_params, random_tokens, relative, transformers_model

TEXTS = ["a photo of a cat", "", "two dogs ! run", " ".join(["very"] * 60) + " long", "word " * 75]
# The towers of Stable Diffusion's models at small width: activation, heads, projection, padding.
FIRST, SECOND = "SD 1 and SDXL's first", "SDXL's second and SD 3's second"
TOWERS = {
    FIRST: ("quick_gelu", 2, None, 49407),
    "SD 2": ("gelu", 4, None, 0),
    SECOND: ("gelu", 4, 80, 0),
    "SD 3's first": ("quick_gelu", 2, 64, 49407),
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


@functools.cache
def tower(name, dtype="float32"):
    """(params, tokens) of one of the towers."""
    activation, heads, embed, pad = TOWERS[name]
    arrays = random_params(width=64, layers=3, embed=embed or 1, dtype=dtype, seed=len(name))
    if embed is None:
        del arrays["text_projection"]
    params = minclip.Params(arrays, activation=activation, heads=heads)
    return params, minclip.tokenize(TEXTS, pad=pad)


@functools.cache
def transformers_outputs(name, dtype="float32"):
    """(outputs with all hidden states, final_layer_norm) of transformers for a tower, as torch tensors."""
    import torch

    params, tokens = tower(name, dtype)
    model = transformers_model(params, dtype, activation=params.activation, heads=params.heads)
    norm = getattr(model, "text_model", model).final_layer_norm
    with torch.no_grad():
        outputs = model(torch.from_numpy(tokens).long(), output_hidden_states=True)
    return outputs, lambda x: norm(x).detach()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", TOWERS)
def test_states_and_pooled_rows_are_those_of_transformers(name, dtype):
    params, tokens = tower(name, dtype)
    theirs, norm = transformers_outputs(name, dtype)
    for skip in range(4):
        raw = minclip.hidden_states(params, tokens, skip=skip, norm=False)
        normed = minclip.hidden_states(params, tokens, skip=skip)
        assert raw.dtype == normed.dtype == dtype
        assert relative(raw, theirs.hidden_states[-1 - skip]) < TOLERANCE[dtype]
        assert relative(normed, norm(theirs.hidden_states[-1 - skip])) < TOLERANCE[dtype]
    states, pooled, features = minclip.hidden_states(params, tokens, pooled=True)
    assert relative(states, theirs.last_hidden_state) < TOLERANCE[dtype]
    if "text_projection" in params:
        assert relative(features, theirs.text_embeds) < TOLERANCE[dtype]
        assert relative(pooled @ params["text_projection"], theirs.text_embeds) < TOLERANCE[dtype]
    else:
        assert features is None
        assert relative(pooled, theirs.pooler_output) < TOLERANCE[dtype]


# The rules of diffusers' pipelines, from their documented behavior. Real pipelines of diffusers 0.42.1 gave
# the same states when these tests were written. clip_skip counts the blocks skipped beyond the usual ones.


def stable_diffusion(outputs, norm, clip_skip):
    """StableDiffusionPipeline, SD 1 and SD 2: the last state, or an earlier one with the final norm."""
    return outputs.last_hidden_state if clip_skip is None else norm(outputs.hidden_states[-(clip_skip + 1)])


def stable_diffusion_xl(outputs, norm, clip_skip):
    """StableDiffusionXLPipeline and StableDiffusion3Pipeline: the last state but one, never normed."""
    return outputs.hidden_states[-2 if clip_skip is None else -(clip_skip + 2)]


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
@pytest.mark.parametrize("name", TOWERS)
def test_clip_skip_of_diffusers_is_skip_in_sd_1_and_skip_plus_one_in_sdxl_and_sd_3(name, clip_skip):
    params, tokens = tower(name)
    theirs = transformers_outputs(name)
    n = clip_skip or 0
    ours = minclip.hidden_states(params, tokens, skip=n)
    assert relative(ours, stable_diffusion(*theirs, clip_skip)) < 1e-5
    ours = minclip.hidden_states(params, tokens, skip=n + 1, norm=False)
    assert relative(ours, stable_diffusion_xl(*theirs, clip_skip)) < 1e-5


def test_sd_2s_file_without_its_last_block_gives_the_states_of_the_complete_tower_but_one():
    """diffusers' text_encoder/ of SD 2 has 23 of the 24 blocks; a file with all 24 is read with skip=1."""
    params, tokens = tower("SD 2")
    cut = params.with_arrays({name: a for name, a in params.items() if ".resblocks.2." not in name})
    np.testing.assert_array_equal(
        minclip.hidden_states(cut, tokens), minclip.hidden_states(params, tokens, skip=1)
    )


def test_sdxls_conditioning_is_both_towers_states_side_by_side_and_the_seconds_features():
    import torch

    (first, tokens_1), (second, tokens_2) = map(tower, (FIRST, SECOND))
    (theirs_1, _), (theirs_2, _) = map(transformers_outputs, (FIRST, SECOND))
    states = minclip.hidden_states(first, tokens_1, skip=1, norm=False)
    more, _, features = minclip.hidden_states(second, tokens_2, skip=1, norm=False, pooled=True)
    prompt_embeds = torch.cat([theirs_1.hidden_states[-2], theirs_2.hidden_states[-2]], dim=-1)
    assert relative(np.concatenate([states, more], axis=-1), prompt_embeds) < 1e-5
    assert relative(features, theirs_2.text_embeds) < 1e-5


def test_flux_reads_the_normed_row_at_the_end_of_text_without_projection():
    params, tokens = tower(FIRST)
    _, pooled, features = minclip.hidden_states(params, tokens, pooled=True)
    assert relative(pooled, transformers_outputs(FIRST)[0].pooler_output) < 1e-5
    assert features is None


def test_padding_changes_no_state_up_to_the_end_of_text_and_every_state_after_it():
    params, ends = tower(FIRST)
    zeros = minclip.tokenize(TEXTS)
    a, b = (minclip.hidden_states(params, tokens) for tokens in (ends, zeros))
    end = zeros.argmax(axis=-1)
    after = np.arange(77) > end[:, None]
    assert relative(a[~after], b[~after]) < 1e-6
    assert (np.linalg.norm(a - b, axis=-1)[after] > 1e-3).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0)])
def test_dtype_and_leading_shape_are_kept(dtype, leading):
    params = minclip.Params(random_params(layers=2, embed=24), activation="gelu", heads=2).astype(dtype)
    rows = random_tokens(np.full(int(np.prod(leading, dtype=int)), 6)).reshape(*leading, 77)[..., :9]
    states, pooled, features = minclip.hidden_states(params, rows, skip=1, pooled=True)
    assert (states.shape, pooled.shape, features.shape) == (
        (*leading, 9, 128),
        (*leading, 128),
        (*leading, 24),
    )
    assert states.dtype == pooled.dtype == features.dtype == dtype
    if rows.size:
        np.testing.assert_array_equal(features, minclip.encode_text(params, rows, tap=lambda _, array: array))


@pytest.mark.parametrize("name", TOWERS)
def test_float16_is_float32_to_rounding(name):
    params, tokens = tower(name)
    truth = minclip.hidden_states(params, tokens, pooled=True)
    halves = minclip.hidden_states(params.astype("float16"), tokens, pooled=True)
    for half, exact in zip(halves, truth, strict=True):
        assert (half is None) == (exact is None)
        assert half is None or relative(half, exact) < 2e-3


def test_the_row_of_an_end_of_text_that_params_name_is_pooled():
    """A textual inversion adds ids after 49407; OpenAI's largest id would then be the added one."""
    arrays = random_params(layers=2, vocabulary=49410)
    params = minclip.Params(arrays, activation="quick_gelu", heads=2, eot=49407)
    tokens = minclip.tokenize(["a cat", "two dogs"], pad=49407)
    tokens[:, 2] = 49409
    states, pooled, features = minclip.hidden_states(params, tokens, pooled=True)
    np.testing.assert_array_equal(pooled, states[[0, 1], [3, 3]])
    assert relative(features, minclip.encode_text(params, tokens)) < 1e-6


def test_nothing_is_written_into_params_or_tokens():
    params, tokens = tower("SD 3's first")
    params, tokens = params.map(np.copy), tokens.copy()
    for array in [*params.values(), tokens]:
        array.flags.writeable = False
    minclip.hidden_states(params, tokens, skip=3, norm=False)[...] = 0
    minclip.hidden_states(params, tokens, pooled=True)


@pytest.mark.parametrize("skip", [-1, 4])
def test_a_skip_beyond_the_blocks_is_refused(skip):
    params, tokens = tower("SD 2")
    with pytest.raises(ValueError, match=rf"skip must be from 0 to 3, the number of blocks, not {skip}"):
        minclip.hidden_states(params, tokens, skip=skip)
