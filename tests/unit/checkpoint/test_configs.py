"""Test that configs are read as their own library reads them, and that contradictions are errors."""

import json

import numpy as np
import pytest
import torch
import transformers

import minclip
from minclip.checkpoint.configs import of_hugging_face, of_open_clip
from tests.support.oracles import TEXT, random_tokens

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 8, "patch_size": 4}
TOKENS = random_tokens([3, 9, 16], context=16, vocabulary=100)


def features(model, tokens=TOKENS):
    """Return transformers' features of a model with text_model and text_projection."""
    with torch.no_grad():
        return model.text_projection(model.text_model(torch.from_numpy(tokens).long()).pooler_output).numpy()


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # norms of 1 and biases of 0 would hide a mix-up
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def saved(model, folder, **changes):
    """Save a model of transformers, with changes to its config."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def clip_model():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=48)
    return shaken(transformers.CLIPModel(config))


def test_contradicting_blocks_are_an_error_until_the_user_chooses(tmp_path):
    """transformers' CLIPModel completes text_config_dict with defaults; its text classes do not read it."""
    partial = {name: value for name, value in TEXT.items() if name != "hidden_act"}
    saved(clip_model(), tmp_path, text_config_dict=partial)
    complete = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    alone = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path).eval()
    assert (complete.config.text_config.hidden_act, alone.config.hidden_act) == ("quick_gelu", "gelu")
    with pytest.raises(
        ValueError, match=r"contradicts itself: .*activation 'gelu'.*'quick_gelu'.*activation="
    ):
        minclip.load(tmp_path)
    for activation, model in (("quick_gelu", complete), ("gelu", alone)):
        loaded = minclip.load(tmp_path, activation=activation)
        assert (loaded.activation, loaded.heads) == (activation, 4)
        np.testing.assert_allclose(minclip.encode_text(loaded, TOKENS), features(model), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "name"), [({"num_attention_heads": 2}, "heads"), ({"eos_token_id": 7}, "eos_token_id")]
)
def test_other_contradictions_name_the_remedy(change, name):
    with pytest.raises(ValueError, match=f"contradicts itself.*{name}"):
        of_hugging_face({"text_config": TEXT, "text_config_dict": TEXT | change})


def test_blocks_that_agree_or_are_empty_are_read_as_before(tmp_path):
    for blocks in (None, {}, TEXT):
        folder = saved(clip_model(), tmp_path / str(blocks)[:4], text_config_dict=blocks)
        assert minclip.load(folder).activation == "gelu"
    # openai/clip-vit-large-patch14's config: eos 2 in one block, the default 49407 in the other, one rule.
    both = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = {"text_config": both | {"eos_token_id": 2, "hidden_act": "quick_gelu"}, "text_config_dict": both}
    assert of_hugging_face(config)[:3] == ("quick_gelu", 12, None)


def test_a_config_that_contradicts_the_tensors_says_which_and_how_to_go_on(tmp_path):
    saved(shaken(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXT))), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(
        ValueError, match=r"contradicts the tensors: it says width 128, and they have 64\. Put the"
    ):
        minclip.load(tmp_path)
    del config["hidden_size"]  # left out, so transformers' default of 512
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="it says width 512, and they have 64"):
        minclip.load(tmp_path)


def test_two_libraries_configs_that_differ_are_an_error_until_the_user_chooses(tmp_path):
    saved(clip_model(), tmp_path)
    text = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
    config = {"model_cfg": {"embed_dim": 48, "quick_gelu": True, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"config\.json beside it says gelu, and open_clip_config.json quick_gelu"
    ):
        minclip.load(tmp_path)
    assert minclip.load(tmp_path, activation="quick_gelu").activation == "quick_gelu"
    config["model_cfg"]["quick_gelu"] = False
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert minclip.load(tmp_path).activation == "gelu"


@pytest.mark.parametrize("kind", ["CLIPSeg", "OwlViT", "Owlv2"])
def test_clipseg_and_owl_vit_have_clips_text_tower(kind, tmp_path):
    text = TEXT | {"hidden_act": "quick_gelu"}
    more = {"extract_layers": [0, 1], "reduce_dim": 8} if kind == "CLIPSeg" else {}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=VISION, projection_dim=48, **more
    )
    name = "CLIPSegForImageSegmentation" if kind == "CLIPSeg" else f"{kind}Model"
    model = shaken(getattr(transformers, name)(config))
    model.save_pretrained(tmp_path)
    loaded = minclip.load(tmp_path)
    assert (loaded.activation, loaded.heads, loaded.eot) == ("quick_gelu", 4, None)
    core = model.clip if kind == "CLIPSeg" else model
    np.testing.assert_allclose(minclip.encode_text(loaded, TOKENS), features(core), atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("xclip", "changed by the video"),
        ("groupvit", "projection has several layers"),
        ("altclip", "XLM-RoBERTa"),
        ("siglip2", "pools at the last position"),
        ("never_heard_of", "not CLIP's"),
    ],
)
def test_configs_of_other_models_are_refused_with_the_true_reason(kind, reason):
    with pytest.raises(ValueError, match=f"model_type '{kind}' is not a CLIP text tower: .*{reason}"):
        of_hugging_face({"model_type": kind, "text_config": TEXT})


@pytest.mark.parametrize("eos", [2, 99, 97, 7])
def test_the_end_of_text_id_of_a_config_pools_where_transformers_pools(eos, tmp_path):
    """A tower with added tokens has ids above its end of text; 2 means the largest id, as before 4.31."""
    model = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**TEXT | {"eos_token_id": eos})
    )
    shaken(model).save_pretrained(tmp_path)
    loaded = minclip.load(tmp_path)
    assert loaded.eot == (eos if eos in (97, 7) else None)
    tokens = np.array([[98, 5, 97, 7, 99, 7, 97, 0], [98, 7, 6, 6, 97, 97, 99, 99]], np.int32)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens).long()).text_embeds.numpy()
    np.testing.assert_allclose(minclip.encode_text(loaded, tokens), expected, atol=2e-4)
    minclip.save(loaded, tmp_path / "again.safetensors")
    assert minclip.load(tmp_path / "again.safetensors").eot == loaded.eot


def test_open_clips_end_of_text_and_defaults_are_read():
    text = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
    assert of_open_clip({"text_cfg": text}).eot is None
    assert of_open_clip({"text_cfg": text | {"pool_type": "eos", "eos_id": 97}}).eot == 97
    assert of_open_clip({"text_cfg": text | {"pool_type": "eos", "eos_id": 99}}).eot is None
    config = of_open_clip({"model_cfg": {"text_cfg": {}}})
    assert config == ("gelu", 8, None, {"V": 49408, "L": 77, "D": 512, "layers": 12})
