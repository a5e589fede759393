"""Test files and folders as people find them: shards, pipelines, caches, bundles, suggested names."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import minclip
from minclip import checkpoint
from tests.support.oracles import assert_same, random_params, random_tokens, renamed, torch_encode_text

SIZES = {"width": 64, "layers": 2, "embed": 48, "context": 16, "vocabulary": 100}
PARAMS = random_params(**SIZES)
OTHER = random_params(**SIZES | {"width": 128, "layers": 1}, seed=1)
CONFIG = {
    "model_type": "clip_text_model",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "hidden_act": "gelu",
    "eos_token_id": 99,
}


def contiguous(state):
    return {name: np.ascontiguousarray(array) for name, array in state.items()}


def hugging_face_folder(path, file="model.safetensors", config=CONFIG, params=PARAMS):
    """Write a folder of Hugging Face, of one file of weights."""
    path.mkdir(parents=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    state = contiguous(renamed(params))
    if file.endswith(".safetensors"):
        save_file(state, path / file)
    elif file.endswith(".bin"):
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path / file)
    else:
        (path / file).write_bytes(b"\x89HDF\r\n\x1a\n")
    return path


def sharded_folder(path, kind):
    """Write a folder of two shards and their index, as transformers does for a large model."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    state = contiguous(renamed(PARAMS))
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for i, names in enumerate((list(state)[:9], list(state)[9:]), 1):
        file = f"{stem}-0000{i}-of-00002.{kind}"
        weight_map |= dict.fromkeys(names, file)
        if kind == "safetensors":
            save_file({name: state[name] for name in names}, path / file)
        else:
            torch.save({name: torch.from_numpy(state[name]) for name in names}, path / file)
    (path / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_folders_load_by_folder_index_or_any_shard(kind, tmp_path):
    folder = sharded_folder(tmp_path / "model", kind)
    index = next(folder.glob("*.index.json"))
    for source in (folder, index, *folder.glob("*-of-*")):
        params = minclip.load(source)
        assert_same(params, PARAMS)
        assert (params.activation, params.heads) == ("gelu", 4)
    assert "37 in all" in checkpoint.inspect(folder).text


def test_a_missing_shard_and_a_hostile_index_are_named(tmp_path):
    folder = sharded_folder(tmp_path / "model", "safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (tmp_path / "elsewhere.safetensors").touch()
    for bad in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), index.name, "", 3):
        index.write_text(json.dumps({"weight_map": weight_map | {"extra": bad}}))
        with pytest.raises(
            ValueError, match=r"index\.json (lists a shard that is not a file beside it|is not an index)"
        ):
            minclip.load(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the shard model-00002-of-00002\.safetensors is missing"):
        minclip.load(folder)
    index.unlink()
    with pytest.raises(ValueError, match=r"one of several shards, and model\.safetensors\.index\.json"):
        minclip.load(folder)


@pytest.mark.parametrize(
    "file",
    ["pytorch_model.bin", "pytorch_model.fp16.bin", "model.fp16.safetensors", "model.non_ema.safetensors"],
)
def test_variants_of_the_file_of_weights_load(file, tmp_path):
    assert_same(minclip.load(hugging_face_folder(tmp_path / "model", file)), PARAMS)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("tf_model.h5", r"TensorFlow's weights alone \(tf_model\.h5\)"),
        ("flax_model.msgpack", "Flax's weights alone"),
        ("model.onnx", "ONNX graph"),
        ("saved_model.pb", "SavedModel"),
        ("text_model.mlpackage", r"no weights but text_model\.mlpackage"),
    ],
)
def test_folders_of_other_formats_are_told_apart(file, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        minclip.load(hugging_face_folder(tmp_path / "model", file))


def test_a_folder_without_a_config_loads_once_the_activation_is_given(tmp_path):
    folder = hugging_face_folder(tmp_path / "model", config=None)
    with pytest.raises(ValueError, match="no config tells the activation"):
        minclip.load(folder)
    assert_same(minclip.load(folder, activation="gelu", heads=4), PARAMS)
    save_file(contiguous(PARAMS), folder / "other.safetensors")
    assert_same(minclip.load(folder, activation="gelu"), PARAMS)  # model.safetensors is the usual name
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    with pytest.raises(
        ValueError, match=r"2 files of weights: choose one.*one\.safetensors, other\.safetensors"
    ):
        minclip.load(folder)


def test_a_hub_caches_folder_leads_to_its_snapshot(tmp_path):
    cache = tmp_path / "models--openai--clip-vit-base-patch32"
    hugging_face_folder(cache / "snapshots" / "3d74acf9")
    assert_same(minclip.load(cache), PARAMS)
    hugging_face_folder(cache / "snapshots" / "aaaaaaaa", params=OTHER)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("3d74acf9")
    assert_same(minclip.load(cache), PARAMS)


def test_a_pipelines_folder_leads_to_its_text_encoder(tmp_path):
    root = tmp_path / "pipeline"
    hugging_face_folder(root / "text_encoder")
    hugging_face_folder(root / "text_encoder_3", config={"model_type": "t5"})
    (root / "model_index.json").write_text("{}")
    assert_same(minclip.load(root), PARAMS)
    config = CONFIG | {"hidden_size": 128, "num_hidden_layers": 1}
    hugging_face_folder(root / "text_encoder_2", params=OTHER, config=config)
    with pytest.raises(
        ValueError, match=r"pipeline of 2 text towers: give .*text_encoder or .*text_encoder_2"
    ):
        minclip.load(root)
    assert_same(minclip.load(root / "text_encoder_2"), OTHER)
    assert_same(minclip.load(f"{root}#text_encoder_2"), OTHER)


def test_a_sentence_transformers_folder_leads_to_its_clip_model(tmp_path):
    hugging_face_folder(tmp_path / "model" / "0_CLIPModel")
    assert_same(minclip.load(tmp_path / "model"), PARAMS)


# The prefixes of single files: Stable Diffusion 1, 2, XL and 3, Flux, ComfyUI's; (names, short name).
BUNDLES = {
    "sd1": [("cond_stage_model.transformer.", "Hugging Face", "clip_l")],
    "sd2": [("cond_stage_model.model.", "OpenAI", "clip_h")],
    "sdxl": [
        ("conditioner.embedders.0.transformer.", "Hugging Face", "clip_l"),
        ("conditioner.embedders.1.model.", "OpenAI", "clip_g"),
    ],
    "sd3": [
        ("text_encoders.clip_l.transformer.", "Hugging Face", "clip_l"),
        ("text_encoders.clip_g.transformer.", "Hugging Face", "clip_g"),
    ],
    "flux": [("text_encoders.clip_l.transformer.", "Hugging Face", "clip_l")],
    "refiner": [("conditioner.embedders.0.model.", "OpenAI", "clip_g")],
}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_towers_of_single_files_are_named_by_short_prefixes(bundle, tmp_path):
    towers = [PARAMS, OTHER]
    state = {"model.diffusion_model.out.2.weight": np.ones(3, np.float32)}
    state |= {"text_encoders.t5xxl.transformer.shared.weight": np.ones((3, 4), np.float32)}
    for params, (prefix, dialect, _) in zip(towers, BUNDLES[bundle], strict=False):
        names = params if dialect == "OpenAI" else renamed(params)
        state |= {prefix + name: array for name, array in names.items()}
    path = tmp_path / f"{bundle}.safetensors"
    save_file(contiguous(state), path)
    for params, (prefix, _, short) in zip(towers, BUNDLES[bundle], strict=False):
        for wanted in (short, prefix, prefix.rstrip(".")):
            assert_same(minclip.load(f"{path}#{wanted}", activation="gelu"), params)
    with pytest.raises(
        ValueError, match=r"#clip_z names none of its .*cond|#clip_z names none of its .*text_enc"
    ):
        minclip.load(f"{path}#clip_z", activation="gelu")


def test_stable_diffusion_checkpoints_load_by_short_name_and_without_projection(tmp_path):
    state = {f"cond_stage_model.model.{name}": torch.from_numpy(a.copy()) for name, a in PARAMS.items()}
    del state["cond_stage_model.model.text_projection"]
    torch.save({"state_dict": state}, tmp_path / "v2.ckpt")
    loaded = minclip.load(f"{tmp_path}/v2.ckpt#clip_h", activation="gelu")
    assert_same(loaded, {name: array for name, array in PARAMS.items() if name != "text_projection"})


def test_a_tower_of_23_blocks_and_a_tower_without_projection_load(tmp_path):
    """Stable Diffusion 2's text_encoder holds 23 of ViT-H/14's 24 blocks."""
    params = random_params(**SIZES | {"layers": 23})
    del params["text_projection"]
    state = renamed(params) | {"logit_scale": np.ones((), np.float32)}
    loaded = minclip.from_state_dict(state, activation="gelu")
    assert_same(loaded, params)
    states = minclip.hidden_states(loaded, random_tokens([5, 16], context=16, vocabulary=100))
    assert states.shape == (2, 16, 64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "openai/clip-vit-base-patch32",
            "did you mean ViT-B/32.*huggingface.co/openai/clip-vit-base-patch32",
        ),
        ("openai/clip-vit-large-patch14-336", "did you mean ViT-L/14@336px"),
        ("ViT-B-32", "did you mean ViT-B/32"),
        ("ViT-B-32.pt", "did you mean ViT-B/32"),
        ("vit_l_14", "did you mean ViT-L/14"),
        ("ViT-B/99", "did you mean ViT-B/"),
        ("rn50x6", "did you mean RN50x"),
        ("biultin", "did you mean builtin"),
        (
            "laion/CLIP-ViT-B-32-laion2B",
            r"put config\.json and model\.safetensors from huggingface.co/laion/CLIP",
        ),
    ],
)
def test_a_name_that_is_no_file_is_answered_with_the_nearest_name(name, expected):
    with pytest.raises(
        FileNotFoundError, match=f"no file, folder or model {name}.*{expected}.*builtin, RN50"
    ):
        minclip.load(name)


def test_a_path_that_is_no_file_suggests_no_model():
    for name in ("/tmp/no/such/clip.safetensors", "models/no_such.pt", "./x/y/z"):
        with pytest.raises(FileNotFoundError) as caught:
            minclip.load(name)
        assert "did you mean" not in str(caught.value)
        assert "hub" not in str(caught.value)


def test_weights_that_are_not_finite_are_named(tmp_path):
    spoiled = {name: array.copy() for name, array in PARAMS.items()}
    spoiled["transformer.resblocks.0.mlp.c_fc.weight"][3, 3] = np.nan
    spoiled["ln_final.bias"][5] = -np.inf
    for dtype in ("float16", "float32", "float64"):
        state = {name: array.astype(dtype) for name, array in spoiled.items()}
        with pytest.warns(UserWarning, match=r"NaN or infinite .*ln_final\.bias, .*resblocks\.0\.mlp\.c_fc"):
            minclip.from_state_dict(state, activation="gelu")
    large = PARAMS | {"ln_final.weight": PARAMS["ln_final.weight"] * 1e6}
    save_file(large, tmp_path / "large.safetensors")
    with pytest.warns(UserWarning, match=r"beyond the range of float16, infinite now, in ln_final\.weight"):
        minclip.load(tmp_path / "large.safetensors", dtype="float16", activation="gelu")
    minclip.load(tmp_path / "large.safetensors", activation="gelu")  # no warning: float32 holds them


def test_the_end_of_text_rule_is_saved_loaded_and_kept(tmp_path):
    params = minclip.Params(PARAMS, activation="gelu", heads=1, eot=7)
    minclip.save(params, tmp_path / "tower.safetensors")
    loaded = minclip.load(tmp_path / "tower.safetensors")
    assert (loaded.eot, loaded.activation, loaded.heads) == (7, "gelu", 1)
    assert minclip.from_state_dict(loaded).eot == 7
    assert "end of text  id 7" in checkpoint.inspect(tmp_path / "tower.safetensors").text


@pytest.mark.parametrize("suffix", ["pt", "npz", "bin", "ckpt", "gguf", "ONNX", "h5"])
def test_save_refuses_the_suffix_of_another_format(suffix, tmp_path):
    with pytest.raises(
        ValueError, match=rf"writes safetensors.*\.{suffix.lower()}: let it end in \.safetensors"
    ):
        minclip.save(minclip.load(), tmp_path / f"model.{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_activation_and_heads_go_with_every_command_that_reads_a_model(tmp_path, capsys):
    from minclip.cli import main

    full = random_params(width=64, layers=1, embed=48)
    path = tmp_path / "tower.safetensors"
    save_file(full, path)
    commands = [["encode", "a cat"], ["probe", "-o", str(tmp_path / "probe.npz")]]
    for command in commands:
        assert main([*command, "--model", str(path)]) == 1
        assert "--activation" in capsys.readouterr().err
        assert main([*command, "--model", str(path), "--activation", "gelu", "--heads", "2"]) == 0
    assert main(["encode", "a cat", "--model", str(path), "--activation", "gelu", "--heads", "2",
                 "-o", str(tmp_path / "features.npy")]) == 0  # fmt: skip
    expected = torch_encode_text(full, minclip.tokenize("a cat"), activation="gelu", heads=2)
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), expected, atol=1e-5)
    capsys.readouterr()
    assert main(["inspect", str(path), "--activation", "gelu", "--heads", "2"]) == 0
    assert "activation   gelu" in capsys.readouterr().out


def test_inspect_collapses_alike_blocks_only(tmp_path):
    state = random_params(**SIZES | {"layers": 5})
    for i in (0, 1, 2, 4):
        name = f"transformer.resblocks.{i}.ln_1.bias"
        state[name] = state[name].astype(np.float16)
    save_file(state, tmp_path / "tower.safetensors")
    text = " ".join(checkpoint.inspect(tmp_path / "tower.safetensors").text.split())
    assert "transformer.resblocks.{0..4}.ln_1.weight float32 [64]" in text
    assert "transformer.resblocks.{0..2,4}.ln_1.bias float16 [64]" in text
    assert "transformer.resblocks.3.ln_1.bias float32 [64]" in text
