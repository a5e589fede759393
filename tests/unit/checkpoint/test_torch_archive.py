"""Test that PyTorch's files are read without torch, and that hostile files run nothing."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import sys
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch

import minclip
from minclip import checkpoint
from minclip.checkpoint import pickle_machine
from minclip.checkpoint.torch_archive import read_archive, read_legacy
from minclip.checkpoint.zip_archive import ZipArchive
from tests.support.archives import openai_model, repacked, save_traced
from tests.support.hostile import FILES, HOSTILE
from tests.support.oracles import openai


@pytest.fixture(scope="module")
def model():
    return openai_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Return a folder with one sound file of each kind."""
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
    """Return the line with which load refuses a file, and the peak of the memory in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, OSError)) as caught:
            minclip.load(path, activation="quick_gelu", **given)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert "\n" not in checkpoint.inspect(path).text.partition("\n  ")[0]
    return str(caught.value), peak


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_pickle_is_refused_and_runs_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickle_machine, "MOST_INSTRUCTIONS", 100_000)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("evil/data.pkl", HOSTILE[name])
        archive.writestr("evil/data/0", np.zeros(4, np.float32).tobytes())
    (tmp_path / "evil.pt").write_bytes(out.getvalue())
    line, peak = refused(tmp_path / "evil.pt")
    assert os.listdir(tmp_path) == ["evil.pt"], "something ran"
    assert "pickle" in line or "tower" in line or name == "not a tower"
    assert peak < 2**21 + 200 * len(HOSTILE[name])


def test_a_refusal_names_the_functions_that_would_be_called(folder, tmp_path):
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
    """Each tensor is sound and the file is small, but its layers together would not fit in memory."""
    block = {}
    shared = torch.zeros(3 * 64 * 4 * 64)
    shapes = {name: tuple(a.shape) for name, a in openai_model().state_dict().items() if "visual" not in name}
    for name, shape in shapes.items():
        for i in range(300) if "resblocks.0." in name else (0,):
            size = int(np.prod(shape))
            if "resblocks.1." not in name:
                block[name.replace("resblocks.0.", f"resblocks.{i}.")] = shared[:size].reshape(shape)
    torch.save(block, tmp_path / "evil.pt")
    assert "its tensors overlap" in refused(tmp_path / "evil.pt")[0]


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


# Objects that people's scripts save beside the weights, in the order of how often they are met.
BESIDE = {
    "Lightning's callback as a key": {"callbacks": {collections.UserDict: {"monitor": "val/loss"}}},
    "a NumPy scalar": {"best_acc": np.float64(71.2)},
    "a NumPy array": {"ids": np.arange(3)},
    "argparse.Namespace": {"args": argparse.Namespace(lr=1e-4)},
    "defaultdict": {"state": collections.defaultdict(dict, a=1)},
    "torch.Size, device and dtype": {"size": torch.Size([3]), "on": torch.device("cpu"), "in": torch.float16},
    "a set and a frozenset": {"seen": {1, 2}, "done": frozenset({3})},
    "a datetime": {"when": datetime.datetime(2024, 1, 1)},
    "an optimizer": {
        "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"params": [0]}]}
    },
    "complex, bytes and None": {"z": 1j, "b": b"abc", "n": None, "big": 2**80},
    "a path": {"path": pathlib.PurePosixPath("/a/b")},
    "a sparse tensor": {"s": torch.eye(3).to_sparse()},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_foreign_objects_beside_the_weights_are_inert(beside, protocol, tmp_path, model):
    state = model.state_dict()
    torch.save({"state_dict": state, **beside}, tmp_path / "beside.pt", pickle_protocol=protocol)
    loaded = minclip.load(tmp_path / "beside.pt", activation="quick_gelu")
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, state[name].float().numpy())


def test_inspect_names_the_foreign_objects(tmp_path, model):
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace()}, tmp_path / "beside.pt")
    text = checkpoint.inspect(tmp_path / "beside.pt").text
    assert "ignored      objects of argparse.Namespace: nothing in a file is run" in text


def test_a_whole_pickled_model_loads_without_its_class(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai_clip_model", openai("model"))  # pickle asks for it, minclip not
    model = openai_model()
    torch.save(model, tmp_path / "whole.pt")
    loaded, state = minclip.load(tmp_path / "whole.pt", activation="quick_gelu"), model.state_dict()
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, state[name].float().numpy())


def halves(base):
    return base, base[5:]


PLAIN = {
    "a state_dict": lambda: openai_model().state_dict(),
    "parameters": lambda: dict(openai_model().named_parameters()),
    "views": lambda: {"T": torch.arange(12.0).reshape(3, 4).T, "slice": torch.arange(20)[3:15:4]},
    "dtypes": lambda: {
        str(dtype): torch.ones(3, 2).to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.int16, torch.uint8, torch.bool, torch.int64)
    },
    "float8": lambda: {
        "e4m3": torch.randn(7).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(7).to(torch.float8_e5m2),
    },
    "shared storages": lambda: dict(zip(["all", "half"], halves(torch.randn(10)), strict=True)),
    "nested": lambda: {"a": {"b": [torch.ones(2), {"c": torch.zeros(1)}]}, "d": (torch.ones(3),)},
    "empty and scalar": lambda: {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)},
    "an untyped storage": lambda: {"u": torch.arange(6).to(torch.uint16)},
    "a tensor with attributes": lambda: {"p": torch.nn.Parameter(torch.ones(2), requires_grad=False)},
}


HOW = ["zip", "zip, protocol 4", "before torch 1.6"]
NEWER = ("float8", "an untyped storage")  # than the old format, in which torch cannot save them


@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name in PLAIN for how in HOW if name not in NEWER or "zip" in how]
)
def test_plain_tensors_that_torch_loads_safely_load_here_too(name, how, tmp_path):
    path, make = tmp_path / "plain.pt", PLAIN[name]
    given = {"pickle_protocol": 4} if "4" in how else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(make(), path, _use_new_zipfile_serialization=how != "before torch 1.6", **given)
        if not given:  # torch's safe reader knows protocol 2 alone
            torch.load(path, weights_only=True)
    file = read_legacy(path) if how == "before torch 1.6" else read_archive(ZipArchive(path))
    expected = dict(tensors_in(torch.load(path, weights_only=False)))
    assert sorted(file.tensors) == sorted(expected)
    for key, tensor in expected.items():
        tensor = tensor.detach()
        wide = tensor.float() if tensor.dtype.is_floating_point else tensor
        array = np.asarray(file.tensors[key])
        np.testing.assert_array_equal(array.astype(wide.numpy().dtype), wide.numpy())
        assert file.tensors[key].shape == tuple(tensor.shape)


def tensors_in(node, name=""):
    if isinstance(node, torch.Tensor):
        yield name, node
    elif isinstance(node, dict | list | tuple):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from tensors_in(child, f"{name}.{key}".strip("."))
