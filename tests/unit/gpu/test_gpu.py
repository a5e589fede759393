"""The same code on the GPU: on a stand-in for CuPy anywhere, and on a GPU where there is one.

`pytest -m gpu tests/unit/gpu` runs the tests that need a GPU, those of the fixture `cupy` included.
"""

import importlib
import math
import subprocess
import sys
import types

import numpy as np
import pytest

import minclip
from minclip import cli, model
from minclip.fast import tree
from minclip.gpu import device
from minclip.porting import probe
from tests.support.fake_cupy import Fake
from tests.support.oracles import SIZES, random_params, random_tokens, relative, torch_encode_text
from tests.unit.gpu.conftest import PARAMS, TOKENS, needs_compiler, on_gpu


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_forward_pass_runs_on_cupy_arrays_and_never_waits(fake, dtype, activation):
    host, gpu = on_gpu(PARAMS, dtype, activation)
    features = minclip.encode_text(gpu, TOKENS)
    assert isinstance(features, fake.ndarray)
    assert Fake.waits == []
    np.testing.assert_array_equal(features.get(), minclip.encode_text(host, TOKENS))
    unit = minclip.normalize(features)
    np.testing.assert_array_equal(unit.get(), minclip.normalize(features.get()))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_float16_goes_through_the_kernels_with_the_same_stages(cupy, activation):
    host, gpu = on_gpu(PARAMS, "float16", activation)
    stages, expected = {}, {}
    minclip.encode_text(gpu, TOKENS, tap=lambda name, array: stages.setdefault(name, array))
    assert Fake.waits == []
    assert minclip.encode_text(gpu, TOKENS[:0]).shape == (0, 24)
    minclip.encode_text(host, TOKENS, tap=lambda name, array: expected.setdefault(name, array))
    assert list(stages) == list(expected)
    for name, array in expected.items():
        assert stages[name].dtype == array.dtype, name
        assert stages[name].shape == array.shape, name
        finite = np.isfinite(array)
        np.testing.assert_array_equal(np.isfinite(stages[name].get()), finite, err_msg=name)
        assert relative(stages[name].get()[finite], array[finite]) < 2e-3, name


@needs_compiler
def test_the_kernels_float16_is_no_further_from_the_truth_than_torchs(fake):
    host, gpu = on_gpu(PARAMS, "float16")
    tokens = random_tokens([*range(3, 19)] * 2, context=19, vocabulary=97)
    truth = torch_encode_text({n: a.astype(float) for n, a in host.items()}, tokens, "float64")
    theirs = relative(torch_encode_text(host, tokens, "float16"), truth)
    ours = relative(minclip.encode_text(gpu, tokens).get(), truth)
    assert ours <= theirs
    assert ours <= 1.05 * relative(minclip.encode_text(host, tokens), truth)
    assert relative(minclip.fast.encode_text(gpu, tokens).get(), truth) <= theirs


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 77), (2, 4, 33), (9, 512), (0, 5)])
@pytest.mark.parametrize("step", ["layer_norm", "softmax", "quick_gelu", "gelu"])
def test_each_kernel_does_what_the_model_says(cupy, step, shape):
    x = np.random.default_rng(0).normal(0, 4, shape).astype(np.float16)
    weight, bias = np.linspace(0.5, 2, shape[-1], dtype="f2"), np.linspace(-1, 1, 2 * shape[-1], dtype="f4")
    others, given = [], []
    if step == "layer_norm":
        others, given = [weight, bias[::2]], [cupy.asarray(weight), cupy.asarray(bias)[::2]]
    ours = getattr(model, step)(cupy.asarray(x), *given).get()
    rtol, atol = (2**-10, 2**-24) if isinstance(cupy, Fake) else (2**-9, 2**-23)  # a card's exp is another
    np.testing.assert_allclose(ours, getattr(model, step)(x, *others), rtol=rtol, atol=atol)


def test_products_take_any_layout(cupy):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 3, 5, 4)).astype(np.float16) for _ in range(2))
    for views in (
        lambda a, b: (a, b.swapaxes(-1, -2)),
        lambda a, b: (a.swapaxes(-1, -2), b),
        lambda a, b: (a.transpose(1, 0, 2, 3), b.transpose(1, 0, 3, 2)),
        lambda a, b: (a[0, 0], b[0, 0].T),
        lambda a, b: (a[:, :, ::2], b[:, :, 1:2].swapaxes(-1, -2)),
        lambda a, b: (a[:0], b[:0].swapaxes(-1, -2)),
    ):
        ours = model.matmul(*views(cupy.asarray(a), cupy.asarray(b))).get()
        np.testing.assert_allclose(ours, model.matmul(*views(a, b)), rtol=2**-10, atol=2**-20)


def test_openais_mixture_of_float16_and_float32_runs(cupy):
    mixed = {n: a if "ln_" in n or "embedding" in n else a.astype("f2") for n, a in PARAMS.items()}
    features = minclip.encode_text(device.to_gpu(mixed), TOKENS)
    assert features.dtype == np.float16
    assert relative(features.get(), minclip.encode_text(PARAMS, TOKENS)) < 5e-3


@pytest.mark.parametrize(("dtype", "K"), [("f2", 64), ("f2", 24), ("f4", 8), ("f8", 16)])
def test_attention_over_a_tree_is_attention_over_each_path(cupy, dtype, K):
    fast_gpu = importlib.import_module("minclip.fast.gpu")
    rng, heads, earlier = np.random.default_rng(0), 3, 7  # nodes of trees before this one
    lengths, shared = np.array([70, 40, 3]), np.array([0, 36, 1])
    row, position, path = tree.number_nodes(np.zeros((3, 70)), lengths, shared)
    N = len(row)
    qkv = rng.normal(size=(N, 3 * heads * K)).astype(dtype)
    bias = rng.normal(size=3 * heads * K).astype("f8" if dtype == "f8" else "f4")
    index = [cupy.asarray(array.astype("i4", order="C")) for array in (position, row, path + earlier)]
    nodes = fast_gpu.Tree(None, *index, earlier, None, None, None)
    context = fast_gpu.attend(cupy.asarray(qkv), cupy.asarray(bias), nodes, heads).get()
    q, k, v = (qkv + bias.astype(float)).reshape(N, 3, heads, K).transpose(1, 2, 0, 3)
    for n in range(N):
        seen = path[row[n], : position[n] + 1]
        weights = model.softmax(np.einsum("hk,hnk->hn", q[:, n], k[:, seen]) * K**-0.5)
        expected = np.einsum("hn,hnk->hk", weights, v[:, seen]).ravel()
        assert relative(context[n], expected) < {"f2": 4e-4, "f4": 1e-6, "f8": 1e-14}[dtype]


@pytest.mark.parametrize("texts", [4, 7])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 3e-3), ("float32", 1e-6), ("float64", 1e-13)])
def test_fast_gives_the_same_features_on_cupy_arrays_chunk_by_chunk(cupy, dtype, bound, activation, texts):
    host, gpu = on_gpu(PARAMS, dtype, activation)
    tokens = random_tokens([5, 2, 7, 6, 6, 3], context=19, vocabulary=97)
    tokens[3:5, :4] = tokens[2, :4]
    tokens = np.concatenate([tokens, tokens[:1]]).reshape(7, 1, 19)
    features = minclip.fast.encode_text(gpu, tokens, nodes=12, texts=texts)
    assert isinstance(features, cupy.ndarray)
    assert features.dtype == dtype
    if isinstance(cupy, Fake):
        # For the sizes of what sorting and numbering find, of all chunks at once; and for chunks, by events.
        sizes = ["nonzero", "get", "nonzero", "boolean mask", "get", "get"]
        assert [wait for wait in Fake.waits if wait != "synchronize"] == math.ceil(7 / texts) * sizes
    assert relative(features.get(), minclip.encode_text(host, tokens)) < bound
    assert minclip.fast.encode_text(gpu, tokens[:0]).shape == (0, 1, 24)


def test_the_built_in_model_loads_onto_the_gpu_in_float16(cupy):
    params = minclip.load(device="cuda")
    assert all(isinstance(a, cupy.ndarray) and a.dtype == np.float16 for a in params.values())
    tokens = minclip.tokenize("a cat", context_length=len(params["positional_embedding"]))
    expected = minclip.encode_text(minclip.load(), tokens)
    assert relative(minclip.encode_text(params, tokens).get(), expected) < 5e-3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_trace_and_what_is_made_of_it_follow_the_arrays(cupy, dtype, tmp_path):
    host, gpu = on_gpu(PARAMS, dtype)
    traced, expected = minclip.trace(gpu, TOKENS), minclip.trace(host, TOKENS)
    assert all(isinstance(array, cupy.ndarray) for array in traced.values())
    assert "text_features" in repr(traced)
    assert "text_features" in traced._repr_html_()
    for one, other in ((traced, expected), (expected, traced)):
        assert minclip.compare(one, other).first is None
    features = traced["text_features"]
    for stages in (None, dict(traced)):
        assert minclip.diagnose(gpu, TOKENS, features, trace=stages).verdict == "agrees"
    probe.write_probe(tmp_path / "probe.npz", gpu)
    assert list(probe.read_probe(tmp_path / "probe.npz")) == list(traced)


def test_a_bug_in_a_port_on_the_gpu_is_named(cupy):
    host, gpu = on_gpu(PARAMS, "float32")
    wrong = minclip.Params(dict(host), activation="gelu", heads=host.heads)
    diagnosed = minclip.diagnose(gpu, TOKENS, cupy.asarray(minclip.encode_text(wrong, TOKENS)))
    assert [[fault.id for fault in finding.faults] for finding in diagnosed.findings] == [["A1"]]


def test_what_is_not_finite_spreads_no_further_on_the_gpu(cupy):
    broken = dict(PARAMS)
    broken["token_embedding.weight"] = PARAMS["token_embedding.weight"].copy()
    broken["token_embedding.weight"][TOKENS[0, 2]] = np.nan
    host, gpu = on_gpu(broken, "float32")
    expected = np.isnan(minclip.encode_text(host, TOKENS))
    assert expected.any(axis=-1).tolist() == [True, False, False]
    np.testing.assert_array_equal(np.isnan(minclip.fast.encode_text(gpu, TOKENS).get()), expected)


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
def test_the_command_line_encodes_on_the_gpu(cupy, tmp_path, capsys, dtype):
    texts, flags = ["a cat", "two dogs"], ["--device", "cuda"]
    (tmp_path / "captions.txt").write_text("\n".join(texts))
    assert cli.main(["encode", *texts, *flags]) == 0
    assert "nearest of the built-in model's" in capsys.readouterr().out
    expected = minclip.encode_text(minclip.load(), minclip.tokenize(texts))
    flags += ["--dtype", dtype] if dtype else []
    for given in (texts, ["--file", str(tmp_path / "captions.txt")]):
        out = tmp_path / "features.npy"
        assert cli.main(["encode", *given, "-o", str(out), *flags]) == 0
        features = np.load(out)
        out.unlink()
        assert features.dtype == (dtype or "float16")
        assert str(features.dtype) in capsys.readouterr().out
        assert relative(features, expected) < (1e-5 if dtype == "float32" else 5e-3)


def test_the_command_line_says_in_one_line_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert cli.main(["encode", "a cat", "--device", "cuda"]) == 1
    said = capsys.readouterr().err
    assert "needs CuPy" in said
    assert said.count("\n") == 1


def broken_cupy(status, message):
    class CUDARuntimeError(RuntimeError):
        pass

    def fail():
        error = CUDARuntimeError(message)
        error.status = status
        raise error

    runtime = types.SimpleNamespace(getDeviceCount=fail)
    return types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        (None, r"needs CuPy.*\.\[cuda13\].*\.\[cuda12\]"),
        (broken_cupy(35, "cudaErrorInsufficientDriver: too old"), r"needs an NVIDIA driver.*cuda13.*cuda12"),
        (broken_cupy(100, "cudaErrorNoDevice"), "no NVIDIA GPU is visible"),
    ],
)
def test_without_a_gpu_one_line_says_what_is_missing(monkeypatch, cupy, message):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(ValueError, match=message) as error:
        device.to_gpu(PARAMS)
    assert "\n" not in str(error.value)


def test_a_full_gpu_says_how_much_was_asked(fake, monkeypatch):
    def full(array):
        raise fake.cuda.memory.OutOfMemoryError("Out of memory allocating 512 bytes")

    monkeypatch.setattr(fake, "asarray", full, raising=False)
    with pytest.raises(MemoryError, match=r"no room for parameters of \d+ MiB \(Out of memory"):
        device.to_gpu(PARAMS)


def test_importing_minclip_never_imports_cupy():
    code = "import minclip, sys; minclip.encode_text; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["ViT-B/32", "ViT-L/14"])
def test_float32_on_the_card_agrees_with_the_cpu(card, size):
    params, tokens = random_params(**SIZES[size]), random_tokens([2, 9, 20, 77])
    host, gpu = on_gpu(params, "float32", heads=params["text_projection"].shape[0] // 64)
    assert relative(minclip.encode_text(gpu, tokens).get(), minclip.encode_text(host, tokens)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["ViT-B/32", "ViT-L/14"])
def test_float16_on_the_card_is_no_further_from_truth_than_torch(card, size):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch is built without CUDA")
    params, tokens = random_params(**SIZES[size], dtype=np.float16), random_tokens([2, 9, 20, 77] * 8)
    _, gpu = on_gpu(params, "float16", heads=params["text_projection"].shape[0] // 64)
    truth = torch_encode_text({n: a.astype(float) for n, a in params.items()}, tokens, "float64")
    theirs = relative(torch_encode_text(params, tokens, "float16", device="cuda"), truth)
    assert relative(minclip.encode_text(gpu, tokens).get(), truth) <= theirs
    assert relative(minclip.fast.encode_text(gpu, tokens).get(), truth) <= theirs
