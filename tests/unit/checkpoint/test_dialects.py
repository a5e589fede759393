"""Test that every dialect gives the same parameters, and that other architectures are refused by name."""

import json

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import minclip
from minclip.checkpoint.configs import activation_in, of_hugging_face, of_open_clip
from tests.support.oracles import (
    TEXT,
    assert_same,
    openai,
    random_params,
    random_tokens,
    renamed,
    torch_encode_text,
)

SIZES = {"width": 64, "layers": 2, "embed": 48, "context": 16, "vocabulary": 100}
PARAMS = random_params(**SIZES)
TOKENS = random_tokens([3, 9, 16], context=16, vocabulary=100)
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 8, "patch_size": 4, "projection_dim": 48}


def hugging_face(kind):
    torch.manual_seed(0)
    with torch.no_grad():
        if kind is CLIPModel:
            model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=48))
        else:
            model = kind(CLIPTextConfig(**TEXT))
        for parameter in model.parameters():  # norms of 1 and biases of 0 would hide a mix-up
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def hugging_face_features(model):
    ids = torch.from_numpy(TOKENS).long()
    with torch.no_grad():
        if isinstance(model, CLIPModel):
            pooled = model.text_model(ids).pooler_output
            return model.text_projection(pooled).numpy()
        return model(ids).text_embeds.numpy()


@pytest.mark.parametrize("kind", [CLIPModel, CLIPTextModelWithProjection])
def test_hugging_face_models_give_their_own_features(kind, tmp_path):
    model = hugging_face(kind)
    expected = hugging_face_features(model)
    params = minclip.from_state_dict(model.state_dict(), activation="gelu", heads=4)
    np.testing.assert_allclose(minclip.encode_text(params, TOKENS), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = minclip.load(tmp_path)
    assert (loaded.activation, loaded.heads) == ("gelu", 4)
    assert_same(loaded, params)
    assert_same(minclip.load(tmp_path / "model.safetensors"), params)  # the config lies beside it


def test_a_text_model_without_projection_runs_up_to_pooled(tmp_path):
    model = hugging_face(CLIPTextModel)
    model.save_pretrained(tmp_path)
    params = minclip.load(tmp_path)
    stages = minclip.trace(params, TOKENS)
    assert list(stages)[-1] == "pooled"
    with torch.no_grad():
        out = model(torch.from_numpy(TOKENS).long())
    np.testing.assert_allclose(stages["pooled"], out.pooler_output.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(stages["ln_final"], out.last_hidden_state.numpy(), rtol=0, atol=1e-5)
    assert "no projection" in repr(params)
    with pytest.raises(ValueError, match="text_projection"):
        minclip.encode_text(params, TOKENS)
    minclip.save(params, tmp_path / "again.safetensors")
    assert_same(minclip.load(tmp_path / "again.safetensors"), params)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_an_openai_model_gives_its_own_features(dtype):
    torch.manual_seed(0)
    model = openai("model").CLIP(
        embed_dim=48, image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=16,
        context_length=16, vocab_size=100, transformer_width=64, transformer_heads=1, transformer_layers=2,
    )  # fmt: skip
    model = model.eval().to(getattr(torch, dtype))
    params = minclip.from_state_dict(model.state_dict(), activation="quick_gelu")
    assert {array.dtype.name for array in params.values()} == {dtype}
    assert not any(name.startswith("visual") for name in params)
    if dtype == "float32":
        with torch.no_grad():
            expected = model.encode_text(torch.from_numpy(TOKENS)).numpy()
        np.testing.assert_allclose(minclip.encode_text(params, TOKENS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("", ["visual.conv1.weight", "logit_scale", "logit_bias", "input_resolution", "attn_mask"]),
        ("module.", ["module.visual.proj", "module.logit_scale"]),
        ("text.", ["visual.trunk.weight", "logit_scale", "text.attn_mask"]),
        ("module.text.", ["module.visual.proj"]),
        (
            "cond_stage_model.model.",
            ["model.diffusion_model.out.weight", "cond_stage_model.model.logit_scale"],
        ),
    ],
)
def test_openai_names_are_found_behind_any_prefix(prefix, beside):
    state = {prefix + name: array for name, array in PARAMS.items()} | {n: np.ones(3) for n in beside}
    assert_same(minclip.from_state_dict(state, activation="gelu"), PARAMS)


@pytest.mark.parametrize("text", ["text_model.", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "cond_stage_model.transformer.", "text_encoders.clip_l."])
def test_hugging_face_names_are_found_behind_any_prefix(prefix, text):
    state = renamed(PARAMS, prefix, text)
    state[f"{prefix}{text}embeddings.position_ids"] = np.arange(16)
    if prefix.count(".") > 1:
        state |= {"first_stage_model.encoder.weight": np.ones(3)}
    assert_same(minclip.from_state_dict(state, activation="gelu", heads=4), PARAMS)


def test_a_prefix_chooses_between_two_text_towers_in_one_file(tmp_path):
    other = random_params(**SIZES, seed=1)
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    state = renamed(PARAMS, first) | {second + name: array for name, array in other.items()}
    np.savez(tmp_path / "sdxl.npz", **state)
    with pytest.raises(ValueError, match=r"2 text towers.*embedders\.0.*embedders\.1"):
        minclip.load(tmp_path / "sdxl.npz", activation="gelu")
    assert_same(minclip.load(f"{tmp_path}/sdxl.npz#{first}", activation="gelu"), PARAMS)
    assert_same(minclip.load(f"{tmp_path}/sdxl.npz#{second.rstrip('.')}", activation="gelu"), other)
    with pytest.raises(ValueError, match="2 text towers"):
        minclip.load(f"{tmp_path}/sdxl.npz#elsewhere", activation="gelu")


def test_long_clip_combines_its_two_position_tables():
    params = random_params(**(SIZES | {"context": 248}))
    learned = random_params(**(SIZES | {"context": 248}), seed=1)["positional_embedding"]
    loaded = minclip.from_state_dict(params | {"positional_embedding_res": learned}, activation="quick_gelu")
    expected = np.concatenate([params["positional_embedding"][:20], learned[20:]])
    np.testing.assert_array_equal(loaded["positional_embedding"], expected)
    tokens = random_tokens([200], context=248, vocabulary=100)
    mine = minclip.encode_text(loaded, tokens)
    np.testing.assert_allclose(mine, torch_encode_text(dict(loaded), tokens), rtol=0, atol=1e-5)


def test_bfloat16_becomes_float32():
    state = {name: torch.from_numpy(array).bfloat16() for name, array in PARAMS.items()}
    params = minclip.from_state_dict(state, activation="gelu")
    assert_same(params, {name: tensor.float().numpy() for name, tensor in state.items()})
    assert {array.dtype.name for array in params.values()} == {"float32"}


class WithArray:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class WithNumpy:
    def __init__(self, array):
        self.array = array

    def numpy(self):
        return self.array


@pytest.mark.parametrize("kind", [WithArray, WithNumpy])
def test_anything_that_converts_to_an_array_is_accepted(kind):
    state = {name: kind(array) for name, array in PARAMS.items()}
    assert_same(minclip.from_state_dict(state, activation="gelu"), PARAMS)


@pytest.mark.parametrize("name", list(PARAMS))
@pytest.mark.parametrize("dialect", ["OpenAI", "Hugging Face"])
def test_missing_extra_and_misshaped_tensors_are_named(dialect, name):
    state = PARAMS if dialect == "OpenAI" else renamed(PARAMS, text="text_model.")
    if dialect == "Hugging Face":
        state = {**state, "visual_projection.weight": np.ones((48, 32))}  # of a CLIPModel, with a projection
        name = next(iter(renamed({name: PARAMS[name]})))
    marker = name.endswith("token_embedding.weight")

    missing = {key: array for key, array in state.items() if key != name}
    with pytest.raises(ValueError, match="token_embedding" if marker else f"^{name}, .* is missing"):
        minclip.from_state_dict(missing, activation="gelu")

    wrong = {**state, name: np.concatenate([state[name], state[name]])}
    free = {
        "token_embedding.weight",
        "positional_embedding",
        "text_projection.weight",
    }  # V, L and E may be any
    if not name.endswith((*free, "position_embedding.weight")):
        with pytest.raises(ValueError, match=rf"^{name} is \[.*\], expected \["):
            minclip.from_state_dict(wrong, activation="gelu")

    if not marker:
        extra = {**state, name + "x": state[name]}
        with pytest.raises(ValueError, match=f"^{name}x is not a parameter .* nearest name is "):
            minclip.from_state_dict(extra, activation="gelu")
        with pytest.raises(ValueError, match=f"{name}, .* is missing; the nearest name is {name}x"):
            minclip.from_state_dict({**missing, name + "x": state[name]}, activation="gelu")


def test_blocks_are_counted_as_numbers_without_gaps():
    params = random_params(width=64, layers=11, embed=48, context=16, vocabulary=100)
    assert_same(minclip.from_state_dict(dict(sorted(params.items())), activation="gelu"), params)
    gap = {name.replace("resblocks.10.", "resblocks.99999999999."): array for name, array in params.items()}
    with pytest.raises(ValueError, match=r"resblocks\.10\.ln_1\.weight, \[64\], is missing"):
        minclip.from_state_dict(gap, activation="gelu")


def test_errors_ask_for_the_activation_and_for_unusual_heads():
    with pytest.raises(ValueError, match="activation="):
        minclip.from_state_dict(PARAMS)
    with pytest.raises(ValueError, match="quick_gelu, gelu, not 'relu'"):
        minclip.from_state_dict(PARAMS, activation="relu")
    odd = random_params(**(SIZES | {"width": 72}))
    with pytest.raises(ValueError, match=r"width 72 .* heads="):
        minclip.from_state_dict(odd, activation="gelu")
    assert minclip.from_state_dict(odd, activation="gelu", heads=6).heads == 6
    with pytest.raises(ValueError, match="5 heads do not divide width 72"):
        minclip.from_state_dict(odd, activation="gelu", heads=5)
    integers = {**PARAMS, "ln_final.bias": np.zeros(64, int)}
    with pytest.raises(ValueError, match=r"ln_final\.bias holds int64, not floats"):
        minclip.from_state_dict(integers, activation="gelu")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cls_emb", "CoCa"),
        ("text_projection.bias", "SigLIP"),
        ("transformer.resblocks.0.ls_1.gamma", "layer scale"),
        ("transformer.resblocks.0.attn.ln_q.weight", "inside attention"),
        ("transformer.resblocks.0.mlp.ln.weight", "inside the MLP"),
        ("transformer.resblocks.0.attn.head_scale", "scaled heads"),
    ],
)
def test_a_tensor_of_another_architecture_is_refused_by_name(name, why):
    with pytest.raises(ValueError, match=f"{name} is .*{why}"):
        minclip.from_state_dict({**PARAMS, name: np.ones(64)}, activation="gelu")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("text.transformer.embeddings.word_embeddings.weight", "BERT"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "T5"),
        ("visual.conv1.weight", "image tower alone"),
        ("some.weight", "no name ends in token_embedding.weight"),
    ],
)
def test_files_without_a_clip_text_tower_are_refused(name, why):
    with pytest.raises(ValueError, match=why):
        minclip.from_state_dict({name: np.ones((3, 3))}, activation="gelu")


OPEN_CLIP = {
    "embed_dim": 48,
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2},
}


def folder_of_open_clip(path, quick_gelu=None, prefix="", **text):
    model = {**OPEN_CLIP, "text_cfg": OPEN_CLIP["text_cfg"] | text}
    if quick_gelu is not None:
        model["quick_gelu"] = quick_gelu
    path.mkdir(exist_ok=True)
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    params = minclip.from_state_dict(PARAMS, activation="gelu", heads=4)
    minclip.save(params, path / "plain.safetensors")
    from safetensors.numpy import save_file

    state = {prefix + name: np.ascontiguousarray(array) for name, array in PARAMS.items()}
    save_file(state, path / "open_clip_model.safetensors", metadata={"format": "pt"})
    return path


def test_open_clip_folders_tell_activation_and_heads(tmp_path):
    for quick, expected in ((True, "quick_gelu"), (False, "gelu"), (None, "gelu")):
        for prefix in ("", "text."):
            params = minclip.load(folder_of_open_clip(tmp_path / f"{quick}", quick, prefix))
            assert (params.activation, params.heads) == (expected, 4)
            assert_same(params, PARAMS)
            torchs = torch_encode_text(PARAMS, TOKENS, activation=expected, heads=4)
            np.testing.assert_allclose(minclip.encode_text(params, TOKENS), torchs, rtol=0, atol=1e-5)
    for name in ("ViT-B-32-quickgelu", "vit_base_patch32_clip_224.openai"):
        assert minclip.load(folder_of_open_clip(tmp_path / name)).activation == "quick_gelu"


def test_some_open_clip_names_tell_the_activation():
    for name in (
        "ViT-B-32-quickgelu",
        "vit_b_32-quickgelu-laion400m_e32-46683a32",
        "vit_base.openai",
        "B32_openai",
    ):
        assert activation_in(name) == "quick_gelu"
    for name in (
        "ViT-B-32",
        "openai-finetuned",
        "vit_b_16-laion400m_e32-55e67d44",
        "quickgelux",
        "notopenai",
    ):
        assert activation_in(name) is None


@pytest.mark.parametrize(
    "text",
    [
        {"no_causal_mask": True},
        {"pool_type": "last"},
        {"pool_type": "eos", "eos_id": 2},
        {"embed_cls": True},
        {"proj_type": "none"},
        {"proj_bias": True},
        {"norm_kwargs": {"eps": 1e-6}},
        {"act_kwargs": {"approximate": "tanh"}},
        {"mlp_ratio": 3.7362},
        {"ls_init_value": 1e-5},
        {"qk_norm": True},
        {"scale_fc": True},
        {"hf_model_name": "xlm-roberta-base"},
        {"something_new": 1},
    ],
)
def test_open_clip_configs_of_other_architectures_are_refused_by_name(text, tmp_path):
    with pytest.raises(ValueError, match=next(iter(text))):
        minclip.load(folder_of_open_clip(tmp_path / "model", **text), activation="gelu")


def test_harmless_open_clip_settings_are_accepted():
    harmless = {
        "pool_type": "eos",
        "eos_id": 99,
        "final_ln_after_pool": True,
        "tokenizer_kwargs": {"clean": "lower"},
    }
    harmless |= {"no_causal_mask": False, "output_tokens": True, "norm_kwargs": {"eps": 1e-5}}
    config = {"text_cfg": OPEN_CLIP["text_cfg"] | harmless}
    assert of_open_clip(config)[:2] == ("gelu", 4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "siglip_text_model"}, "model_type 'siglip_text_model'"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_pytorch_tanh'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"),
        ({"eos_token_id": [7, 99]}, r"eos_token_id \[7, 99\]"),
    ],
)
def test_hugging_face_configs_of_other_architectures_are_refused_by_name(change, why):
    with pytest.raises(ValueError, match=why):
        of_hugging_face(TEXT | change)
    with pytest.raises(ValueError, match=why):
        of_hugging_face({"model_type": "clip", "text_config": TEXT | change})


def test_old_and_new_hugging_face_configs_are_read():
    assert of_hugging_face(TEXT | {"eos_token_id": 2})[:2] == ("gelu", 4)  # written before 4.31
    assert of_hugging_face({"text_config": {}, "text_config_dict": TEXT})[:2] == ("gelu", 4)
    assert of_hugging_face({"text_config": TEXT, "text_config_dict": None})[:2] == ("gelu", 4)
    assert of_hugging_face({})[:2] == ("quick_gelu", 8)  # the class's defaults


def test_the_config_of_another_model_is_refused(tmp_path):
    hugging_face(CLIPTextModelWithProjection).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({**config, "hidden_size": 128}, [], {"text_config": 3, "vocab_size": "x"}, "{"):
        (tmp_path / "config.json").write_text(wrong if wrong == "{" else json.dumps(wrong))
        with pytest.raises(ValueError, match=r"config\.json"):
            minclip.load(tmp_path)


def test_a_text_tower_with_a_head_is_refused_as_siglip():
    state = renamed(PARAMS) | {"text_model.head.weight": np.ones((64, 64)), "logit_scale": np.ones(())}
    with pytest.raises(ValueError, match=r"text_model\.head\.weight is SigLIP"):
        minclip.from_state_dict(state, activation="gelu")
