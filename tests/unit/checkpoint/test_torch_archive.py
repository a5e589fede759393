"""PyTorch's files are read without torch, and a hostile one runs nothing and takes no memory."""

import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch

import minclip
from minclip import checkpoint
from minclip.checkpoint.torch_archive import read_archive
from minclip.checkpoint.zip_archive import ZipArchive
from tests.support.archives import openai_model, repacked, save_traced, tensor_pickle


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


class Evil:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def deep(opening, closing=b"", depth=200_000):
    return b"\x80\x02" + opening * depth + closing * depth + b"."


HOSTILE = {
    "os.system": pickle.dumps({"token_embedding.weight": Evil(os.system, "echo run > HIT")}, 2),
    "builtins.eval": pickle.dumps(Evil(eval, "open('HIT', 'w')"), 2),
    "nested": pickle.dumps({"x": [{"y": (Evil(os.mkdir, "HIT"),)}]}, 4),
    "getattr": pickle.dumps(Evil(getattr, "x", "upper"), 2),
    "torch.load": b"\x80\x02ctorch\nload\nX\x03\x00\x00\x00HIT\x85R.",
    "a torch class": b"\x80\x02c__torch__.os\nsystem\nX\x03\x00\x00\x00HIT\x85R.",
    "a call of a class": b"\x80\x02ccollections\nOrderedDict\n]X\x01\x00\x00\x00a\x85a\x85R.",
    "set a class's attribute": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
    "instance": b"(cos\nsystem\nX\x03\x00\x00\x00HITo.",
    "inst": b"(X\x03\x00\x00\x00HITios\nsystem\n.",
    "extension": b"\x80\x02\x82\x01.",
    "deep lists": deep(b"]", b"a"),
    "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "deep tuple as key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "deep dicts": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 1000 + b"K\x01" + b"s" * 1000 + b".",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "dict in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "doubling": b"\x80\x02}q\x00" + b"".join(
        b"}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cuq%c" % (i, i, i + 1) for i in range(40)
    ) + b".",
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "huge string": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.",
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x00N.",
    "too many instructions": b"\x80\x02" + b"}0" * 600_000 + b"N.",
    "many marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "empty stack": b"\x80\x02s.",
    "no mark": b"\x80\x02t.",
    "no end": b"\x80\x02}",
    "empty": b"",
    "no pickle": b"<html>",
    "negative offset": tensor_pickle(offset=-1),
    "negative stride": tensor_pickle(strides=(-1,)),
    "negative size": tensor_pickle(shape=(-2,)),
    "out of range": tensor_pickle(offset=3),
    "far out of range": tensor_pickle(offset=2**62),
    "overlapping elements": tensor_pickle(shape=(2, 2), strides=(1, 1)),
    "one number a billion times": tensor_pickle(shape=(10**9,), strides=(0,)),
    "other number of strides": tensor_pickle(shape=(2, 2)),
    "storage too long": tensor_pickle(count=5),
    "storage far too long": tensor_pickle(count=2**61),
    "negative storage": tensor_pickle(count=-1),
    "no such storage": tensor_pickle(key="7"),
    "storage elsewhere": tensor_pickle(key="../../etc/passwd"),
    "not a tower": tensor_pickle(),
}  # fmt: skip


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


def with_names(*names):
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a/data.pkl", tensor_pickle())
        archive.writestr("a/data/0", bytes(16))
        for name in names:
            archive.writestr(name, b"x")
    return out.getvalue()


def overlapping():
    """Two directory entries over the same bytes."""
    content = bytearray(with_names("a/data/1"))
    first, second = (
        content.index(b"PK\1\2", i) for i in (0, content.index(b"a/data/1", content.index(b"PK\1\2")) - 46)
    )
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    return bytes(content)


def bomb(kind):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        if kind == "npz":
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, {"descr": "<f4", "fortran_order": False, "shape": (2**22, 64)}
            )
            archive.writestr("token_embedding.weight.npy", header.getvalue() + bytes(2**30))
        else:
            archive.writestr("a/data.pkl", b"\x80\x02" + b"}0" * 2**26 + b"N.")
    return out.getvalue()


def huge_npy():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 64)}
        )
        archive.writestr("token_embedding.weight.npy", header.getvalue())
    return out.getvalue()


def object_npy():
    out = io.BytesIO()
    np.savez(out, **{"token_embedding.weight": np.array([Evil(os.system, "echo > HIT")], object)})
    return out.getvalue()


FILES = {
    "absolute name": lambda: with_names("/etc/passwd"),
    "parent name": lambda: with_names("a/../../x"),
    "Windows name": lambda: with_names("C:\\x"),
    "backslashes": lambda: with_names("a\\..\\..\\x"),
    "twice the same": lambda: with_names("a/data/0"),
    "two pickles": lambda: with_names("b/data.pkl"),
    "overlapping entries": overlapping,
    "pickle bomb": lambda: bomb("pt"),
    "npz bomb": lambda: bomb("npz"),
    "npz with a huge header": huge_npy,
    "npz with objects": object_npy,
    "empty": lambda: b"",
    "web page": lambda: b"<!DOCTYPE html><html><body>404</body></html>" * 9,
    "LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "bare pickle": lambda: pickle.dumps(Evil(os.system, "echo > HIT"), 2),
    "end of a zip only": lambda: b"PK\5\6" + bytes(18),
    "zeros": lambda: bytes(1000),
    "safetensors, huge header": lambda: struct.pack("<Q", 2**60) + b"{}",
    "safetensors, header of 99 MB": lambda: struct.pack("<Q", 99_000_000) + b"{}",
    "safetensors, deep header": lambda: struct.pack("<Q", 20_000) + b'{"a":' * 4000,
    "safetensors, overlapping": lambda: safe_header(
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    ),
    "safetensors, outside": lambda: safe_header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[96,104]}}'),
    "safetensors, overflowing": lambda: safe_header(
        '{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,12]}}'
    ),
}


def safe_header(text):
    return struct.pack("<Q", len(text)) + text.encode() + bytes(12)


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


def fuzz(folder, path, rounds, seed):
    """Load mutated files; what is not refused with ValueError or OSError must be a sound tower."""
    rng = np.random.default_rng(seed)
    contents = [file.read_bytes() for file in sorted(folder.iterdir())]
    outcomes = {"refused": 0, "loaded": 0}  # refused in one line, that is
    for _ in range(rounds):
        content = bytearray(contents[rng.integers(len(contents))])
        mutate(content, rng)
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a projection that a mutation renamed
                params = minclip.load(path, activation="quick_gelu")
        except (ValueError, OSError) as error:
            outcomes["refused"] += "\n" not in str(error)
        else:
            assert {array.dtype.name for array in params.values()} == {"float32"}
            outcomes["loaded"] += 1
        try:
            checkpoint.inspect(path)
        except OSError:
            pass
    assert sum(outcomes.values()) == rounds
    return outcomes


def mutate(content, rng):
    """Flip, overwrite, cut out or double bytes: in the data, or where the structure is."""
    ends = np.array([len(content), 4000, 400])
    for _ in range(rng.integers(1, 6)):
        size = len(content)
        reach = min(int(rng.choice(ends)), size)
        at = int(rng.integers(reach)) if rng.random() < 0.5 else size - 1 - int(rng.integers(reach))
        kind = rng.integers(6)
        if kind < 3:
            structure = [content.find(sign, at) for sign in (b"data.pkl", b"PK\1\2", b"ctorch", b"{")]
            near = max(structure[rng.integers(4)], 0) + int(rng.integers(-8, 64)) if kind == 2 else at
            content[near % size] = int(rng.integers(256))
        elif kind == 3:
            content[at : at + 4] = struct.pack("<I", int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1])))
        elif kind == 4:
            del content[at : at + int(rng.integers(1, 40))]
        else:
            content[at:at] = content[at : at + int(rng.integers(1, 40))]
        if not content:
            return


def test_mutated_files_are_refused_or_sound(folder, tmp_path):
    outcomes = fuzz(folder, tmp_path / "mutated", rounds=600, seed=1)
    assert outcomes["refused"] > 100
    assert outcomes["loaded"] > 20  # a flipped number is no harm; without these, nothing was tried


@pytest.mark.deep
def test_20_000_mutated_files_are_refused_or_sound(folder, tmp_path):
    outcomes = fuzz(folder, tmp_path / "mutated", rounds=20_000, seed=2)
    print(outcomes)
    assert outcomes["refused"] > 4000
    assert outcomes["loaded"] > 1000
