"""hidden_states reads the towers of Stable Diffusion's and Flux's files as `minclip.load` gives them."""

import json

import numpy as np
import pytest
import safetensors.numpy

import minclip
from tests.support.oracles import random_params, random_tokens, renamed

SIZES = dict(width=64, context=16, vocabulary=100)
TOKENS = random_tokens([5, 16], context=16, vocabulary=100)


def without_projection(params):
    return {name: array for name, array in params.items() if name != "text_projection"}


CLIP_L = random_params(**SIZES, layers=2, embed=64, seed=1)
BARE_L = without_projection(CLIP_L)  # of SD 1, SDXL and Flux
CLIP_G = random_params(**SIZES, layers=3, embed=48, seed=2)
OPEN_H = random_params(**SIZES, layers=3, embed=48, seed=3)


def under(prefix, arrays):
    return {prefix + name: np.ascontiguousarray(array) for name, array in arrays.items()}


def hugging_face(arrays, prefix=""):
    """The arrays under Hugging Face's names, with the ids of the positions that old files hold."""
    ids = {"text_model.embeddings.position_ids": np.arange(16)[None]}
    return under(prefix, {**renamed(arrays), **ids})


BUNDLES = {  # what else is in the file: one tensor of the image model stands for it
    "sd1": hugging_face(BARE_L, "cond_stage_model.transformer."),
    "sd2": under("cond_stage_model.model.", {**OPEN_H, "logit_scale": np.ones(())}),
    "sdxl": hugging_face(BARE_L, "conditioner.embedders.0.transformer.")
    | under("conditioner.embedders.1.model.", {**CLIP_G, "logit_scale": np.ones(())}),
    "sd3": hugging_face(CLIP_L, "text_encoders.clip_l.transformer.")
    | hugging_face(CLIP_G, "text_encoders.clip_g.transformer."),
    "flux": hugging_face(BARE_L, "text_encoders.clip_l.transformer."),
}


@pytest.mark.parametrize(
    ("name", "short", "activation", "tower", "skip", "norm"),
    [
        ("sd1", "", "quick_gelu", BARE_L, 0, True),
        ("sd1", "#clip_l", "quick_gelu", BARE_L, 1, True),
        ("sd2", "", "gelu", OPEN_H, 1, True),
        ("sdxl", "#clip_l", "quick_gelu", BARE_L, 1, False),
        ("sdxl", "#clip_g", "gelu", CLIP_G, 1, False),
        ("sd3", "#clip_l", "quick_gelu", CLIP_L, 1, False),
        ("sd3", "#clip_g", "gelu", CLIP_G, 1, False),
        ("flux", "#clip_l", "quick_gelu", BARE_L, 0, True),
    ],
)
def test_single_files_give_each_towers_states(tmp_path, name, short, activation, tower, skip, norm):
    path = tmp_path / f"{name}.safetensors"
    unet = {"model.diffusion_model.input_blocks.0.0.weight": np.ones((4, 4), np.float32)}
    safetensors.numpy.save_file({**BUNDLES[name], **unet}, path)
    loaded = minclip.load(f"{path}{short}", activation=activation)
    expected = minclip.Params(tower, activation=activation, heads=1)
    ours, truth = (
        minclip.hidden_states(p, TOKENS, skip=skip, norm=norm, pooled=True) for p in (loaded, expected)
    )
    for a, b in zip(ours, truth, strict=True):
        np.testing.assert_array_equal(a, b)


def write_text_encoder(folder, arrays, **config):
    """Write a text_encoder/ folder of a diffusers pipeline."""
    folder.mkdir(parents=True)
    kind = "CLIPTextModelWithProjection" if "text_projection" in arrays else "CLIPTextModel"
    layers = sum(name.endswith("ln_1.weight") for name in arrays)
    sizes = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 1, "vocab_size": 100}
    more = {"model_type": "clip_text_model", "max_position_embeddings": 16, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps({"architectures": [kind], **sizes, **more, **config}))
    state = {name: np.ascontiguousarray(array) for name, array in renamed(arrays).items()}
    safetensors.numpy.save_file(state, folder / "model.safetensors")


def test_the_two_folders_of_an_sdxl_pipeline_need_no_further_word(tmp_path):
    write_text_encoder(tmp_path / "text_encoder", BARE_L, hidden_act="quick_gelu", intermediate_size=256)
    write_text_encoder(
        tmp_path / "text_encoder_2", CLIP_G, hidden_act="gelu", projection_dim=48, intermediate_size=256
    )
    first, second = minclip.load(tmp_path / "text_encoder"), minclip.load(tmp_path / "text_encoder_2")
    assert (first.activation, second.activation) == ("quick_gelu", "gelu")
    states, pooled, features = minclip.hidden_states(first, TOKENS, skip=1, norm=False, pooled=True)
    assert (states.shape, pooled.shape, features) == ((2, 16, 64), (2, 64), None)
    more, _, features = minclip.hidden_states(second, TOKENS, skip=1, norm=False, pooled=True)
    truth = minclip.Params(CLIP_G, activation="gelu", heads=1)
    np.testing.assert_array_equal(more, minclip.hidden_states(truth, TOKENS, skip=1, norm=False))
    assert features.shape == (2, 48)


def test_sd_2s_folder_of_one_block_less_is_read_with_skip_0(tmp_path):
    shorter = {name: a for name, a in without_projection(OPEN_H).items() if ".resblocks.2." not in name}
    write_text_encoder(tmp_path / "text_encoder", shorter, hidden_act="gelu", intermediate_size=256)
    complete = minclip.Params(OPEN_H, activation="gelu", heads=1)
    np.testing.assert_array_equal(
        minclip.hidden_states(minclip.load(tmp_path / "text_encoder"), TOKENS),
        minclip.hidden_states(complete, TOKENS, skip=1),
    )
