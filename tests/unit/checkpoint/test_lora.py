"""Test that a merged LoRA gives the features of the library that trained it."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import minclip
from tests.support.oracles import (
    assert_same,
    random_params,
    random_tokens,
    renamed,
    torch_encode_text,
    transformers_model,
)

SIZES = {"width": 64, "layers": 2, "embed": 48, "context": 16, "vocabulary": 100}
PARAMS = minclip.from_state_dict(random_params(**SIZES), activation="quick_gelu")
TOKENS = random_tokens([3, 9, 16], context=16, vocabulary=100)
TARGETS = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (64, 64), "self_attn.out_proj": (64, 64)}
TARGETS |= {"mlp.fc1": (256, 64), "mlp.fc2": (64, 256)}
RANK, ALPHA = 4, 2.0


def matrices(width=64, seed=0):
    """Return {(block, module): (down, up)} of a random LoRA."""
    rng = np.random.default_rng(seed)
    found = {}
    for block in range(2):
        for module, (out, into) in TARGETS.items():
            out, into = out * width // 64, into * width // 64
            down, up = rng.standard_normal((RANK, into)), rng.standard_normal((out, RANK))
            found[block, module] = (down.astype(np.float32), up.astype(np.float32))
    return found


def in_dialect(dialect, products, tower="lora_te1_"):
    """Return the tensors as a tool names them."""
    state = {}
    for (block, module), (down, up) in products.items():
        if dialect == "kohya":
            stem = f"{tower}text_model_encoder_layers_{block}_{module.replace('.', '_')}."
            names = ("lora_down.weight", "lora_up.weight", "alpha")
        elif dialect == "diffusers":
            stem = f"text_encoder.text_model.encoder.layers.{block}.{module}."
            names = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "alpha")
        else:
            stem = f"base_model.model.text_model.encoder.layers.{block}.{module}."
            names = ("lora_A.weight", "lora_B.weight", None)
        state |= {stem + names[0]: down, stem + names[1]: up}
        if names[2]:
            state[stem + names[2]] = np.array(ALPHA, np.float32)
    return state


def merged(products, scale):
    """Return the parameters with W + scale * alpha / r * up @ down, computed in float64."""
    state = {name: np.float64(array) for name, array in renamed(PARAMS).items()}
    for (block, module), (down, up) in products.items():
        name = f"text_model.encoder.layers.{block}.{module}.weight"
        state[name] = state[name] + scale * ALPHA / RANK * (np.float64(up) @ np.float64(down))
    return minclip.from_state_dict(state, activation="quick_gelu")


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "PEFT"])
@pytest.mark.parametrize("scale", [1.0, 0.5, -1, 0])
def test_a_lora_adds_its_scaled_product(dialect, scale, tmp_path):
    products = matrices()
    save_file(in_dialect(dialect, products), tmp_path / "adapter_model.safetensors")
    if dialect == "PEFT":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": RANK}))
    before = {name: array.copy() for name, array in PARAMS.items()}
    loaded = minclip.apply_lora(PARAMS, tmp_path / "adapter_model.safetensors", scale)
    expected = merged(products, scale)
    for name, array in expected.items():
        np.testing.assert_allclose(loaded[name], array, atol=2e-6)
        assert loaded[name].dtype == np.float32
    assert (loaded.activation, loaded.heads) == (PARAMS.activation, PARAMS.heads)
    assert_same(PARAMS, before)
    features = torch_encode_text({n: a.astype(np.float32) for n, a in expected.items()}, TOKENS)
    np.testing.assert_allclose(minclip.encode_text(loaded, TOKENS), features, atol=1e-4)
    assert_same(minclip.apply_lora(PARAMS, tmp_path, scale), loaded)  # the folder


def test_of_two_towers_the_one_that_fits_is_merged_and_the_unet_ignored(tmp_path):
    state = in_dialect("kohya", matrices()) | in_dialect("kohya", matrices(128, seed=1), "lora_te2_")
    state["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"] = np.ones((RANK, 8), np.float32)
    save_file(state, tmp_path / "lora.safetensors")
    loaded = minclip.apply_lora(PARAMS.astype("float16"), tmp_path / "lora.safetensors")
    assert {array.dtype.name for array in loaded.values()} == {"float16"}
    for name, array in merged(matrices(), 1).items():
        np.testing.assert_allclose(loaded[name], array, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_pefts_own_adapter_gives_pefts_features(options, tmp_path):
    peft = pytest.importorskip("peft", reason="the peft package writes the adapter")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=6, target_modules=["q_proj", "fc2"], init_lora_weights=False, **options
    )
    model = peft.get_peft_model(transformers_model(PARAMS), config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(TOKENS).long()).text_embeds.numpy()
    loaded = minclip.apply_lora(PARAMS, tmp_path)
    np.testing.assert_allclose(minclip.encode_text(loaded, TOKENS), expected, atol=1e-4)


def changed(**changes):
    """Return kohya's tensors with one tensor added or changed."""
    return in_dialect("kohya", matrices()) | changes


STEM = "lora_te1_text_model_encoder_layers_0_mlp_fc1."
REFUSED = {
    "another width": (lambda: in_dialect("kohya", matrices(128)), "fit the tower's layers and width"),
    "a DoRA": (lambda: changed(**{f"{STEM}dora_scale": np.ones(3, np.float32)}), "not of a plain LoRA"),
    "a LoKr": (lambda: {f"{STEM}lokr_w1": np.ones((2, 2), np.float32)}, "not of a plain LoRA"),
    "a matrix alone": (lambda: {f"{STEM}lora_up.weight": np.ones((256, 4), np.float32)}, "fit the tower"),
    "a U-Net's": (lambda: {"lora_unet_x.lora_down.weight": np.ones((2, 2), np.float32)}, "no LoRA of CLIP's"),
    "PEFT's without its config": (lambda: in_dialect("PEFT", matrices()), r"adapter_config\.json, in which"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_another_adapter_is_refused_with_the_reason(make, reason, tmp_path):
    save_file(make(), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=rf"lora\.safetensors: .*{reason}"):
        minclip.apply_lora(PARAMS, tmp_path / "lora.safetensors")


def test_a_config_of_another_variant_is_refused(tmp_path):
    save_file(in_dialect("PEFT", matrices()), tmp_path / "adapter_model.safetensors")
    for config, reason in (({"use_dora": True, "lora_alpha": 2}, "DoRA"), ({}, "has no lora_alpha")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=reason):
            minclip.apply_lora(PARAMS, tmp_path)
