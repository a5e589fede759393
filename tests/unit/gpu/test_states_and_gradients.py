"""Hidden states, gradients, attribution and corpora on CuPy arrays: on the stand-in, and on a GPU."""

import itertools

import numpy as np
import pytest

import minclip
from minclip import cli, corpus
from minclip.corpus import cluster
from tests.support import corpora
from tests.support.fake_cupy import Fake
from tests.support.oracles import relative
from tests.unit.gpu.conftest import PARAMS, TOKENS, on_gpu

GRAD = np.random.default_rng(1).standard_normal((3, 24))
BOUNDS = {"float16": 4e-3, "float32": 1e-5, "float64": 1e-12}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS)
WIDE = pytest.mark.parametrize("dtype", ["float32", "float64"])


def assert_close(cupy, ours, expected, dtype):
    assert isinstance(ours, cupy.ndarray)
    assert (ours.dtype, ours.shape) == (dtype, expected.shape)
    assert relative(ours.get(), expected) < BOUNDS[dtype]


@DTYPES
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("options", [{}, {"skip": 1, "norm": False}, {"skip": 2}])
def test_hidden_states_stay_on_the_gpu_and_never_wait(cupy, dtype, activation, options):
    host, gpu = on_gpu(PARAMS, dtype, activation)
    ours = minclip.hidden_states(gpu, TOKENS, pooled=True, **options)
    assert Fake.waits == []
    expected = minclip.hidden_states(host, TOKENS, pooled=True, **options)
    for array, other in zip(ours, expected, strict=True):
        assert_close(cupy, array, other, dtype)


@DTYPES
def test_fast_hidden_states_are_those_of_the_page_in_parts_of_any_size(cupy, dtype):
    host, gpu = on_gpu(PARAMS, dtype)
    rows = np.concatenate([TOKENS] * 3).reshape(3, 3, -1)
    for nodes in (None, 40):
        ours = minclip.fast.hidden_states(gpu, rows, skip=1, pooled=True, nodes=nodes)
        for array, other in zip(ours, minclip.hidden_states(host, rows, skip=1, pooled=True), strict=True):
            assert_close(cupy, array, other, dtype)
    assert minclip.fast.hidden_states(gpu, rows[:0]).shape == (0, 3, 19, 128)


@DTYPES
def test_a_tower_without_projection_has_states_and_no_features(cupy, dtype):
    host, gpu = on_gpu({name: a for name, a in PARAMS.items() if name != "text_projection"}, dtype)
    for compute in (minclip.hidden_states, minclip.fast.hidden_states):
        states, pooled, features = compute(gpu, TOKENS, pooled=True)
        expected = minclip.hidden_states(host, TOKENS, pooled=True)
        assert features is None
        assert_close(cupy, states, expected[0], dtype)
        assert_close(cupy, pooled, expected[1], dtype)


@WIDE
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("stages", ["all", "blocks"])
def test_gradients_stay_on_the_gpu_and_are_those_of_the_host(cupy, dtype, activation, stages):
    host, gpu = on_gpu(PARAMS, dtype, activation)
    expected = minclip.backward(minclip.trace(host, TOKENS, stages=stages), GRAD)
    trace = minclip.trace(gpu, TOKENS, stages=stages)
    Fake.waits.clear()
    grads = minclip.backward(trace, cupy.asarray(GRAD))
    assert Fake.waits == []
    assert list(grads) == list(expected)
    for name, array in expected.items():
        assert_close(cupy, grads[name], array, dtype)


@WIDE
def test_gradients_of_stages_stay_on_the_gpu_and_a_tap_may_stop_one(cupy, dtype):
    host, gpu = on_gpu(PARAMS, dtype)

    def stop(name, gradient):
        return 0 * gradient if name == "transformer.resblocks.0.mlp" else gradient

    expected = minclip.backward(minclip.trace(host, TOKENS), GRAD, tap=stop, parameters=False)
    grads = minclip.backward(minclip.trace(gpu, TOKENS), GRAD, tap=stop, parameters=False)
    assert list(grads) == list(expected)
    for name, array in expected.items():
        assert isinstance(grads[name], cupy.ndarray)
        np.testing.assert_allclose(grads[name].get(), array, atol=BOUNDS[dtype] * abs(array).max())
    assert not expected["transformer.resblocks.0.mlp"].any()


def test_gradients_on_the_gpu_are_compared_with_those_of_a_port(cupy):
    host, gpu = on_gpu(PARAMS, "float32")
    ours, others = (
        minclip.backward(minclip.trace(params, TOKENS), GRAD, parameters=False) for params in (gpu, host)
    )
    assert minclip.compare(ours, others).first is None
    assert minclip.compare(others, ours).first is None
    others["transformer.resblocks.0.mlp.c_fc"] *= 2
    assert minclip.compare(ours, others).first == "transformer.resblocks.0.mlp.c_fc"


def test_float16_gradients_are_refused_on_the_gpu_too(cupy):
    _, gpu = on_gpu(PARAMS, "float16")
    with pytest.raises(ValueError, match="gradients underflow in float16"):
        minclip.backward(minclip.trace(gpu, TOKENS), GRAD)


@DTYPES
def test_the_contrastive_loss_and_its_gradients_stay_on_the_gpu(cupy, dtype):
    texts, images = np.random.default_rng(2).standard_normal((2, 3, 24)).astype(dtype)
    expected = minclip.contrastive_loss(texts, images, 2.0)
    loss, gradients = minclip.contrastive_loss(cupy.asarray(texts), cupy.asarray(images), 2.0)
    for array, other in zip((loss, *gradients), (expected[0], *expected[1]), strict=True):
        assert_close(cupy, array, other, dtype)


@WIDE
def test_relevance_stays_on_the_gpu(cupy, dtype):
    host, gpu = on_gpu(PARAMS, dtype)
    relevance = minclip.attribute(gpu, TOKENS, cupy.asarray(GRAD[0]))
    assert_close(cupy, relevance, minclip.attribute(host, TOKENS, GRAD[0]), dtype)


def test_an_encoder_refuses_parameters_on_the_gpu_and_names_what_takes_them(cupy):
    with pytest.raises(ValueError, match=r"on a GPU call minclip\.fast\.encode_text"):
        minclip.fast.Encoder(on_gpu(PARAMS, "float16")[1])


def test_a_corpus_resumes_on_the_gpu(cupy, tmp_path, monkeypatch):
    captions, output = tmp_path / "captions.txt", tmp_path / "features.npy"
    captions.write_text("\n".join(corpora.TEXTS))
    corpora.stop_after(minclip.load(device="cuda"), captions, output, 4)
    left = corpora.count_encoded(monkeypatch)
    assert cli.main(["encode", "--file", str(captions), "-o", str(output), "--device", "cuda"]) == 0
    assert sum(left) == len(corpora.TEXTS) - 4 * 8
    assert relative(np.load(output), corpora.expected(minclip.load(), corpora.TEXTS)) < 5e-3


def test_the_states_of_a_corpus_resume_on_the_gpu(cupy, tmp_path):
    captions, output, texts = tmp_path / "captions.txt", tmp_path / "states.npy", corpora.TEXTS[1:7]
    captions.write_text("\n".join(texts))
    params = minclip.load(device="cuda")

    def stopping(chunks):
        for tokens in itertools.islice(chunks, 2):
            yield minclip.fast.hidden_states(params, tokens, skip=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.write_states(params, captions, output, skip=1, chunk=2, encode_chunks=stopping)
    assert corpora.finished(output) == 4
    command = ["encode", "--file", str(captions), "-o", str(output), "--states", "--skip", "1"]
    assert cli.main([*command, "--device", "cuda"]) == 0
    expected = minclip.hidden_states(minclip.load(), minclip.tokenize(texts), skip=1)
    assert relative(np.load(output), expected) < 5e-3


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_dask_array_is_encoded_on_the_gpu_and_comes_back_to_the_host(cupy, dtype):
    array = pytest.importorskip("dask.array")
    tokens = minclip.tokenize(corpora.TEXTS)
    cluster.parameters.cache_clear()
    blocks = array.from_array(tokens, chunks=(20, 77))
    features = cluster.encode_array(blocks, device="cuda", dtype=dtype)
    result = features.compute(scheduler="threads")
    cluster.parameters.cache_clear()  # it holds arrays of the stand-in
    assert isinstance(result, np.ndarray)
    assert features.dtype == result.dtype == (dtype or "float16")
    assert relative(result, minclip.encode_text(minclip.load(), tokens)) < (1e-5 if dtype else 5e-3)
