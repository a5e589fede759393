"""Test that weights stored in parts load to the numbers that their own library computes."""

import numpy as np
import pytest
import torch
from torch import nn

import minclip
from minclip import checkpoint
from minclip.checkpoint.tensor_files import float8_values
from tests.support.oracles import assert_same, random_params, renamed

PARAMS = random_params(width=64, layers=2, embed=48, context=16, vocabulary=100)
FLOAT8 = ["float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_code_has_torchs_value(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(float8_values(dtype), codes.view(getattr(torch, dtype)).float().numpy())


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "memory"])
def test_float8_towers_load_as_torch_converts_them(dtype, suffix, tmp_path):
    from safetensors.torch import save_file

    state = {name: torch.from_numpy(a.copy()).to(getattr(torch, dtype)) for name, a in PARAMS.items()}
    path = tmp_path / f"clip_l.{suffix}"
    if suffix == "memory":
        loaded = minclip.from_state_dict(state, activation="quick_gelu")
    else:
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
        loaded = minclip.load(path, activation="quick_gelu")
        assert f"dtype        {dtype}" in checkpoint.inspect(path).text
    assert_same(loaded, {name: tensor.float().numpy() for name, tensor in state.items()})
    assert {array.dtype.name for array in loaded.values()} == {"float32"}


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("per_row", [False, True])
def test_float8_scales_are_applied(scale_name, per_row, tmp_path):
    from safetensors.torch import save_file

    state, expected = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, array in renamed(PARAMS).items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if "layers" in name and tensor.ndim == 2:
            scale = (tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()) / 448
            state[name] = (tensor / scale).to(torch.float8_e4m3fn)
            state[name.replace("weight", scale_name)] = scale.clone()
            state[name.replace("weight", "scale_input")] = torch.ones(())
            expected[name] = (state[name].float() * scale).numpy()
        else:
            state[name] = tensor.half()
            expected[name] = state[name].float().numpy()
    save_file(state, tmp_path / "scaled.safetensors")
    loaded = minclip.load(tmp_path / "scaled.safetensors", activation="quick_gelu")
    assert_same(loaded, minclip.from_state_dict(expected, activation="quick_gelu"))
    worst = max(np.abs(loaded[name] - PARAMS[name]).max() / np.abs(PARAMS[name]).max() for name in PARAMS)
    assert worst < 2**-4  # half of float8's last bit


def test_a_scale_of_an_impossible_shape_is_named():
    state = {**PARAMS, "transformer.resblocks.0.mlp.c_fc.scale_weight": np.ones((3, 5), np.float32)}
    with pytest.raises(ValueError, match=r"a scale of shape \[3, 5\] for a weight of \[256, 64\]"):
        minclip.from_state_dict(state, activation="gelu")


def test_geometric_parametrization_is_magnitude_times_direction():
    """GmP of zer0int's CLIP-fine-tune: weight = r * theta / |theta|, row by row."""
    state, expected = {}, dict(PARAMS)
    for name, array in PARAMS.items():
        if "mlp.c_" in name and name.endswith("weight"):
            theta, r = 3 * array, np.linspace(0.5, 2, len(array), dtype=np.float32)[:, None]
            state[name.replace("weight", "theta")], state[name.replace("weight", "r")] = theta, r
            theta = torch.from_numpy(theta)
            expected[name] = (torch.from_numpy(r) * nn.functional.normalize(theta, dim=1)).numpy()
        else:
            state[name] = array
    loaded = minclip.from_state_dict(state, activation="quick_gelu")
    for name in PARAMS:
        np.testing.assert_allclose(loaded[name], expected[name], rtol=3e-7)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weight_norm_gives_torchs_weight(old, dim):
    layer = nn.Linear(64, 256)
    wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    wrap(layer, dim=dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = layer(torch.eye(64)).T - layer.bias[:, None]
    prefix = "transformer.resblocks.1.mlp.c_fc."
    state = {name: array for name, array in PARAMS.items() if not name.startswith(prefix)}
    state |= {prefix + name: tensor for name, tensor in layer.state_dict().items()}
    loaded = minclip.from_state_dict(state, activation="quick_gelu")
    np.testing.assert_allclose(loaded[prefix + "weight"], expected.numpy(), atol=1e-6)


WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of one block": lambda name: name.replace("resblocks.0.", "resblocks.0._orig_mod."),
    "DDP in torch.compile": lambda name: f"_orig_mod.module.{name}",
    "OpenCLIP in both": lambda name: f"module._orig_mod.text.{name}",
    "FSDP": lambda name: (
        "_fsdp_wrapped_module." + name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module.")
    ),
    "checkpointed blocks": lambda name: name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
    "Lightning Fabric": lambda name: f"_forward_module.module.{name}",
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_in_front_and_inside_names_are_seen_through(wrapped):
    state = {wrapped(name): array for name, array in PARAMS.items()}
    assert_same(minclip.from_state_dict(state, activation="gelu"), PARAMS)


def test_two_tensors_that_differ_only_in_wrappers_are_refused():
    state = {**PARAMS, "_orig_mod.ln_final.bias": PARAMS["ln_final.bias"]}
    with pytest.raises(ValueError, match=r"two tensors have the name ln_final\.bias"):
        minclip.from_state_dict(state, activation="gelu")


@pytest.mark.parametrize("beside", ["classifier.weight", "prompt_learner.ctx", "head.weight", "visual.proj"])
def test_other_modules_beside_the_tower_are_ignored(beside):
    state = {**PARAMS, beside: np.ones((3, 3)), "logit_scale": np.ones(())}
    assert_same(minclip.from_state_dict(state, activation="gelu"), PARAMS)
