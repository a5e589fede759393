"""Test that every kind of file loads to the same parameters, in the wanted dtype, and can be inspected."""

import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

import minclip
from minclip import checkpoint
from minclip.checkpoint import loading, sources
from tests.support import fake_cupy
from tests.support.archives import openai_model, save_traced
from tests.support.oracles import assert_same, random_params, random_tokens

PARAMS = random_params(width=64, layers=2, embed=48, context=16, vocabulary=100)
TOKENS = random_tokens([3, 9, 16], context=16, vocabulary=100)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return one OpenAI model as every kind of file, {name: path}, and its text tower in float32."""
    folder = tmp_path_factory.mktemp("files")
    model = openai_model()
    state = model.state_dict()
    torch.save(state, folder / "state.pt")
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "training.pt"
    )
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    save_traced(openai_model(), folder / "traced.pt")
    params = minclip.from_state_dict(state, activation="quick_gelu")
    return {path.name: path for path in folder.iterdir()}, {
        n: a.astype(np.float32) for n, a in params.items()
    }


KINDS = ["state.pt", "training.pt", "model.safetensors", "plain.npz", "packed.npz", "traced.pt"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_parameters(files, kind):
    paths, expected = files
    said = {} if kind == "traced.pt" else {"activation": "quick_gelu"}
    params = minclip.load(paths[kind], **said)
    assert {array.dtype.name for array in params.values()} == {"float32"}
    assert_same(params, expected)
    assert (params.activation, params.heads) == ("quick_gelu", 1)
    for dtype in ("float16", np.float64, np.dtype("float32")):
        cast = minclip.load(str(paths[kind]), dtype=dtype, **said)
        assert_same(cast, {name: array.astype(dtype) for name, array in expected.items()})
        assert {array.dtype for array in cast.values()} == {np.dtype(dtype)}


def test_the_features_of_an_openai_archive_equal_those_of_the_model(files):
    model = openai_model("float32")
    params = minclip.from_state_dict(model.state_dict(), activation="quick_gelu")
    with torch.no_grad():
        expected = model.encode_text(torch.from_numpy(TOKENS)).numpy()
    np.testing.assert_allclose(minclip.encode_text(params, TOKENS), expected, rtol=0, atol=1e-5)
    loaded = minclip.load(files[0]["traced.pt"])
    model.load_state_dict(openai_model().state_dict())
    with torch.no_grad():
        expected = model.float().encode_text(torch.from_numpy(TOKENS)).numpy()
    np.testing.assert_allclose(minclip.encode_text(loaded, TOKENS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "traced.pt"])
def test_a_file_without_a_config_asks_for_the_activation(files, kind):
    with pytest.raises(ValueError, match=rf"{kind}: .*activation="):
        minclip.load(files[0][kind])


def test_a_traced_model_with_the_exact_gelu_asks_for_the_activation(tmp_path):
    model = openai_model("float32")
    for block in (*model.transformer.resblocks, *model.visual.transformer.resblocks):
        block.mlp.gelu = torch.nn.GELU()
    save_traced(model, tmp_path / "traced.pt")
    with pytest.raises(ValueError, match="activation="):
        minclip.load(tmp_path / "traced.pt")
    assert minclip.load(tmp_path / "traced.pt", activation="gelu").activation == "gelu"


def test_the_name_of_an_openclip_file_may_tell_the_activation(files, tmp_path):
    path = tmp_path / "vit_b_32-quickgelu-laion400m_e32-46683a32.pt"
    path.write_bytes(files[0]["state.pt"].read_bytes())
    assert minclip.load(path).activation == "quick_gelu"
    assert minclip.load(path, activation="gelu").activation == "gelu"  # who asks for it, gets it


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_save_and_load_preserve_every_bit(tmp_path, dtype):
    params = minclip.from_state_dict(
        {n: a.astype(dtype) for n, a in PARAMS.items()}, activation="gelu", heads=4
    )
    minclip.save(params, tmp_path / "tower.safetensors")
    again = minclip.load(tmp_path / "tower.safetensors", dtype=dtype)
    assert (again.activation, again.heads) == ("gelu", 4)
    assert {name: array.tobytes() for name, array in again.items()} == {
        n: a.tobytes() for n, a in params.items()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["tower.safetensors"]
    (tmp_path / "other").touch()
    assert (tmp_path / "tower.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_plain_dict_gets_openais_activation_only_under_openais_names(tmp_path):
    minclip.save(PARAMS, tmp_path / "plain.safetensors")
    assert minclip.load(tmp_path / "plain.safetensors").activation == "quick_gelu"
    foreign = {f"text.{name}": array for name, array in PARAMS.items()}
    with pytest.raises(ValueError, match="activation"):
        minclip.save(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(OSError, match="no such folder"):
        minclip.save(PARAMS, tmp_path / "no such folder" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["plain.safetensors"]


def test_writing_to_loaded_parameters_never_reaches_the_file(files):
    before = files[0]["traced.pt"].read_bytes()
    for dtype in ("float16", "float32"):
        for array in minclip.load(files[0]["traced.pt"], dtype=dtype).values():
            array[...] = 7
    assert files[0]["traced.pt"].read_bytes() == before


def test_bfloat16_in_files_becomes_float32(tmp_path):
    state = {name: torch.from_numpy(array).bfloat16() for name, array in PARAMS.items()}
    torch.save(state, tmp_path / "bf16.pt")
    safetensors.torch.save_file(state, tmp_path / "bf16.safetensors")
    for name in ("bf16.pt", "bf16.safetensors"):
        params = minclip.load(tmp_path / name, activation="gelu")
        assert_same(params, {n: tensor.float().numpy() for n, tensor in state.items()})


def test_a_missing_file_is_an_oserror_that_lists_the_models(tmp_path):
    for source in ("ViT-B/99", tmp_path / "no.pt"):
        with pytest.raises(FileNotFoundError, match=r"builtin, RN50, .* ViT-B/32"):
            minclip.load(source)
    with pytest.raises(FileNotFoundError, match=r"neither config\.json with model\.safetensors"):
        minclip.load(tmp_path)


@pytest.mark.parametrize("given", [{"device": "tpu"}, {"dtype": "int8"}, {"dtype": "longdouble"}])
def test_other_devices_and_dtypes_are_refused(given):
    with pytest.raises(ValueError, match="must be"):
        minclip.load(**given)


def test_cuda_loads_float16_onto_the_gpu_by_default(monkeypatch):
    """The errors on a machine without a GPU are tested in test_gpu.py."""
    fake = fake_cupy.install(monkeypatch)
    for dtype, expected in ((None, "float16"), ("float32", "float32")):
        arrays = minclip.load(device="cuda", dtype=dtype).values()
        assert all(isinstance(array, fake.ndarray) and array.dtype == expected for array in arrays)


def test_inspect_prints_the_contents_of_a_file(files, tmp_path):
    text = checkpoint.inspect(files[0]["traced.pt"]).text
    for line in ("dialect OpenAI", "layers 2", "width 64", "heads 1", "context 16", "vocabulary 100"):
        assert line in " ".join(text.split())
    count = sum(array.size for array in PARAMS.values())
    for line in ("embedding 48", "activation quick_gelu", "dtype float16, float32", f"parameters {count:,}"):
        assert line in " ".join(text.split())
    assert "transformer.resblocks.{0..1}.attn.in_proj_weight float16 [192, 64]" in " ".join(text.split())
    text, loads = checkpoint.inspect(files[0]["state.pt"])
    assert text.startswith(f"{files[0]['state.pt']} does not load: no config tells the activation: pass")
    assert "load needs activation=" in text
    assert not loads
    assert checkpoint.inspect(files[0]["state.pt"], activation="gelu").loads
    broken = {name: tensor for name, tensor in openai_model().state_dict().items() if name != "ln_final.bias"}
    torch.save(broken, tmp_path / "broken.pt")
    text = checkpoint.inspect(tmp_path / "broken.pt").text
    assert "does not load: ln_final.bias, [64], is missing" in text
    assert "visual.proj" in text
    (tmp_path / "page.pt").write_text("<html>")
    assert checkpoint.inspect(tmp_path / "page.pt").text.endswith("download it again")


def test_inspect_accepts_every_name_that_load_accepts(files, monkeypatch):
    monkeypatch.setattr(sources, "download", lambda name: files[0]["traced.pt"])
    assert checkpoint.inspect("ViT-B/32").text == checkpoint.inspect(files[0]["traced.pt"]).text
    text, params = checkpoint.inspect("builtin").text, minclip.load()
    for line in ("builtin dialect OpenAI layers 6", "heads 2", "activation quick_gelu", "dtype float32"):
        assert line in " ".join(text.split())
    assert f"{sum(array.size for array in params.values()):,} in {len(params)} tensors" in text


def test_loading_never_imports_torch(files):
    program = "import sys, minclip; minclip.load(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, str(files[0]["traced.pt"])], check=True)


def test_the_image_tower_is_never_read(files, monkeypatch):
    read = []
    whole = loading.as_floats
    monkeypatch.setattr(
        loading, "as_floats", lambda value, name, *_: read.append(name) or whole(value, name, *_)
    )
    for kind in KINDS:
        minclip.load(files[0][kind], activation="quick_gelu")
    assert len(read) == len(KINDS) * len(files[1])
    assert not any("visual" in name for name in read)


def test_the_command_line_inspects(files, tmp_path, capsys):
    from minclip.cli import main

    assert main(["inspect", str(files[0]["traced.pt"])]) == 0
    assert capsys.readouterr().out == checkpoint.inspect(files[0]["traced.pt"]).text + "\n"
    (tmp_path / "page.pt").write_text("<html>")
    assert main(["inspect", str(tmp_path / "page.pt")]) == 1
    assert " ".join(capsys.readouterr().out.split()).startswith(f"{tmp_path / 'page.pt'} does not load: ")
    assert main(["inspect", str(tmp_path / "no.pt")]) == 1
    assert capsys.readouterr().err.startswith("minclip: no file, folder or model")
