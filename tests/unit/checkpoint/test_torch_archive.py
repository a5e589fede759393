"""PyTorch's files are read without torch, and a hostile one runs nothing and takes no memory."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

import minclip
from minclip import checkpoint
from minclip.checkpoint.torch_archive import read_archive
from minclip.checkpoint.zip_archive import ZipArchive
from tests.support.archives import openai_model, repacked, save_traced
from tests.support.hostile import FILES, HOSTILE


@pytest.fixture(scope="module")
def model():
    return openai_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """One sound file of each kind, for the fuzz and the tests of damage."""
    folder = tmp_path_factory.mktemp("files")
    state = model.state_dict()
    torch.save(state, folder / "state.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "training.pt"
    )
    save_traced(openai_model(), folder / "traced.pt")
    params = minclip.from_state_dict(state, activation="quick_gelu")
    minclip.save(params, folder / "saved.safetensors")
    np.savez(folder / "plain.npz", **params)
    np.savez_compressed(folder / "packed.npz", **params)
    return folder


def test_every_tensor_equals_torchs(model, folder):
    for name, prefix in (("state.pt", ""), ("training.pt", "state_dict.module."), ("traced.pt", "")):
        tensors, classes, _ = read_archive(ZipArchive(folder / name))
        assert any(kind.startswith("__torch__") for kind in classes.values()) == (name == "traced.pt")
        for key, expected in model.state_dict().items():
            array = np.asarray(tensors[prefix + key])
            assert array.dtype == expected.numpy().dtype
            np.testing.assert_array_equal(array, expected.numpy())


def test_views_dtypes_and_parameters_of_torch_save(tmp_path):
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    expected = {
        "transposed": base.T,
        "column": base[:, 2],
        "steps": base[::2, 1::2],
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "bfloat16": torch.randn(5).bfloat16(),
        "long": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    for protocol in (2, 4):
        torch.save(expected, tmp_path / "mixed.pt", pickle_protocol=protocol)
        tensors, _, _ = read_archive(ZipArchive(tmp_path / "mixed.pt"))
        for name, tensor in expected.items():
            tensor = tensor.detach().float() if name == "bfloat16" else tensor.detach()
            assert tensors[name].shape == tuple(tensor.shape)
            np.testing.assert_array_equal(np.asarray(tensors[name]), tensor.numpy())


def refused(path, **given):
    """The one line with which load refuses the file; tells how much memory that took."""
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, OSError)) as caught:
            minclip.load(path, activation="quick_gelu", **given)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert "\n" not in checkpoint.inspect(path).partition("\n  ")[0]
    return str(caught.value), peak


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_pickle_is_refused_and_runs_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("evil/data.pkl", HOSTILE[name])
        archive.writestr("evil/data/0", np.zeros(4, np.float32).tobytes())
    (tmp_path / "evil.pt").write_bytes(out.getvalue())
    line, peak = refused(tmp_path / "evil.pt")
    assert os.listdir(tmp_path) == ["evil.pt"], "something ran"
    assert "data.pkl" in line or "tower" in line or name == "not a tower"
    assert peak < 2**21 + 200 * len(HOSTILE[name])


def test_a_refusal_names_what_would_have_been_called(folder, tmp_path):
    path = tmp_path / "evil.pt"
    path.write_bytes(repacked(folder / "state.pt", data_pkl=HOSTILE["os.system"]))
    assert f"{os.system.__module__}.system" in refused(path)[0]


@pytest.mark.parametrize("name", list(FILES))
def test_a_hostile_file_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = FILES[name]()
    (tmp_path / "evil.pt").write_bytes(content)
    _, peak = refused(tmp_path / "evil.pt")
    assert os.listdir(tmp_path) == ["evil.pt"], "something ran"
    assert peak < 2**21 + 20 * len(content)


def test_one_storage_for_a_thousand_layers_is_refused(tmp_path):
    """Each tensor is sound, the file is small, and its layers together would not fit in memory."""
    block = {}
    shared = torch.zeros(3 * 64 * 4 * 64)
    shapes = {name: tuple(a.shape) for name, a in openai_model().state_dict().items() if "visual" not in name}
    for name, shape in shapes.items():
        for i in range(300) if "resblocks.0." in name else (0,):
            size = int(np.prod(shape))
            if "resblocks.1." not in name:
                block[name.replace("resblocks.0.", f"resblocks.{i}.")] = shared[:size].reshape(shape)
    torch.save(block, tmp_path / "evil.pt")
    assert "lie on each other" in refused(tmp_path / "evil.pt")[0]


@pytest.mark.parametrize("name", ["state.pt", "traced.pt", "saved.safetensors", "plain.npz", "packed.npz"])
def test_a_file_cut_anywhere_is_refused(folder, name, tmp_path):
    content = (folder / name).read_bytes()
    for keep in [
        0,
        1,
        7,
        8,
        9,
        30,
        64,
        len(content) // 3,
        len(content) // 2,
        len(content) - 22,
        len(content) - 1,
    ]:
        (tmp_path / "cut").write_bytes(content[:keep])
        refused(tmp_path / "cut")
