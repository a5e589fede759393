"""minclip.fast.Encoder gives encode_text's features, warmed or not, from any thread or process."""

import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

import minclip
from minclip import fast
from minclip.fast import Encoder, blas, cpu, team
from minclip.fast.blas import one_blas_thread
from tests.support.oracles import random_params, relative
from tests.unit.fast.test_fast import TREES, harsh_params, rows

pytestmark = pytest.mark.usefixtures("two_blas_threads")

PARAMS = random_params(width=64, layers=3, embed=24)
TEXTS = [
    "a photo of a cat",
    "a photo of a dog",
    "a photo of two cats",
    "a drawing of a cat",
    "",
    "a photo of",
    "a",
]
TOKENS = minclip.tokenize(TEXTS)


def error(encoder, params, tokens):
    return relative(encoder(tokens), minclip.encode_text(params, tokens))


@pytest.mark.parametrize("tokens", TREES.values(), ids=TREES.keys())
def test_gives_the_features_of_the_reference(tokens):
    params = harsh_params()
    assert error(Encoder(params), params, tokens) < 1e-5


@pytest.mark.parametrize("small_kernels", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_product_is_exact_for_any_rows_and_share_of_a_weight(monkeypatch, small_kernels, dtype):
    monkeypatch.setattr(cpu, "has_small_kernels", lambda: small_kernels)
    rng = np.random.default_rng(0)
    stack, wide = rng.standard_normal((3, 96, 40)).astype(dtype), rng.standard_normal((31, 300)).astype(dtype)
    for weight in (stack[:, 32:64], wide[:, 100:200], wide[:7]):
        for N in (1, 2, 7, 8, 63, 64, 65, 130, 257):
            x = rng.standard_normal((N, weight.shape[-1])).astype(dtype)
            out = np.full((*weight.shape[:-2], N + 2, weight.shape[-2]), np.nan, dtype)
            cpu.multiply(x, weight, out[..., 1:-1, :])
            assert relative(out[..., 1:-1, :], x @ weight.swapaxes(-1, -2)) < 10 * np.finfo(dtype).eps
            assert np.isnan(out[..., [0, -1], :]).all()


@pytest.mark.parametrize("architecture", ["SkylakeX", "Haswell", None])
def test_small_kernels_are_known_by_the_name_that_openblas_gives_them(monkeypatch, architecture):
    library = {"num_threads": 2} | ({"architecture": architecture} if architecture else {})
    monkeypatch.setattr(blas, "blas", lambda: SimpleNamespace(info=lambda: [library]))
    assert blas.has_small_kernels.__wrapped__() == (architecture == "SkylakeX")


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_features_of_the_reference(monkeypatch, threads):
    @contextmanager
    def some_threads():
        with one_blas_thread():
            yield threads

    monkeypatch.setattr(cpu, "one_blas_thread", some_threads)
    params, rng = harsh_params(heads=8), np.random.default_rng(0)
    for count in (1, 2, 7, 8, 9, 30, 70):
        tokens = rows(*(rng.integers(0, 9, rng.integers(0, 20)).tolist() for _ in range(count)))
        assert relative(fast.encode_text(params, tokens), minclip.encode_text(params, tokens)) < 1e-5


@pytest.mark.parametrize(
    "beginnings",
    [[], [""], ["a photo of a"], ["a photo", "a photo of a", "a drawing of"], ["two", "a photo of a cat"]],
)
def test_warm_beginnings_are_exact(beginnings):
    encoder = Encoder(PARAMS)
    for beginning in beginnings:
        encoder.warm(beginning)
    for tokens in (TOKENS, *TOKENS[:, None]):
        assert error(encoder, PARAMS, tokens) < 1e-5


def test_many_warm_beginnings_serve_many_texts():
    encoder, words = Encoder(PARAMS), "red blue green big small old new".split()
    for word in words:
        encoder.warm(f"a {word} photo of a")
        encoder.warm(f"a {word} photo of a")  # known: nothing to do
    assert encoder.prefixes.kv.shape[2] == 1 + 1 + 4 * len(words)
    texts = [
        f"a {word} photo of a {noun}" for word in (*words, "odd") for noun in ("cat", "dog and a bird", "")
    ]
    assert error(encoder, PARAMS, minclip.tokenize(texts)) < 1e-5


def test_a_warm_beginning_leaves_only_the_rest_of_a_text_to_compute(monkeypatch):
    encoder, grown, grow = Encoder(PARAMS), [], cpu.grow
    monkeypatch.setattr(cpu, "grow", lambda *args: grown.append(grow(*args)) or grown[-1])
    encoder(TOKENS[:1])
    encoder.warm("a photo of a")
    encoder(TOKENS[:1])
    assert [len(tree.ids) for tree in grown] == [6, 2]  # without the start; then "cat" and the end of text


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_every_dtype_and_activation(dtype, tolerance, activation):
    arrays = {name: array.astype(dtype) for name, array in PARAMS.items()}
    params = minclip.Params(arrays, activation=activation, heads=4)
    encoder = Encoder(params)
    encoder.warm("a photo")
    assert encoder(TOKENS).dtype == dtype
    assert error(encoder, params, TOKENS) < tolerance


def test_the_end_of_text_is_that_of_params():
    params = minclip.Params(PARAMS, activation="quick_gelu", heads=1, eot=320)  # pools at the first "a"
    assert error(Encoder(params), params, TOKENS[:3]) < 1e-5
    assert (
        relative(minclip.fast.encode_text(params, TOKENS[:3]), minclip.encode_text(params, TOKENS[:3])) < 1e-5
    )


@pytest.mark.parametrize("shape", [(77,), (1, 77), (2, 3, 77), (0, 77)], ids=str)
def test_any_leading_shape(shape):
    tokens = np.resize(TOKENS, shape)
    assert Encoder(PARAMS)(tokens).shape == (*shape[:-1], 24)


def test_shares_float32_parameters_and_keeps_one_copy_of_float16():
    assert all(array is PARAMS[name] for name, array in Encoder(PARAMS).params.items())
    half = {name: array.astype(np.float16) for name, array in PARAMS.items()}
    kept = Encoder(half).params
    assert kept["token_embedding.weight"] is half["token_embedding.weight"]
    assert sum(array.nbytes for array in kept.values()) <= 2 * sum(array.nbytes for array in half.values())


def test_threads_may_call_it_and_warm_it_at_once():
    encoder, expected = Encoder(PARAMS), minclip.encode_text(PARAMS, TOKENS)

    def call(i):
        if i % 5 == 0:
            encoder.warm(TEXTS[i % len(TEXTS)])
        return encoder(TOKENS[i % len(TOKENS)])

    with ThreadPoolExecutor(6) as pool:
        for i, features in enumerate(pool.map(call, range(60))):
            assert relative(features, expected[i % len(TOKENS)]) < 1e-5


def test_leaves_no_threads_behind():
    encoder, before = Encoder(PARAMS), threading.active_count()
    encoder(TOKENS)
    assert threading.active_count() == before


def call(encoder):
    return encoder(TOKENS)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_goes_to_other_processes(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    encoder = Encoder(PARAMS)
    encoder.warm("a photo of a")
    expected = encoder(TOKENS)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        np.testing.assert_array_equal(pool.submit(call, encoder).result(timeout=120), expected)


def test_a_pickle_keeps_what_it_was_warmed_with():
    encoder = Encoder(PARAMS)
    encoder.warm("a photo of a")
    again = pickle.loads(pickle.dumps(encoder))
    assert again.prefixes.kv.shape == encoder.prefixes.kv.shape
    np.testing.assert_array_equal(again(TOKENS), encoder(TOKENS))


def test_what_is_not_finite_spreads_no_further():
    params = minclip.Params(PARAMS, activation="quick_gelu", heads=1)
    params["token_embedding.weight"] = PARAMS["token_embedding.weight"].copy()
    params["token_embedding.weight"][TOKENS[1, 5]] = np.nan  # "dog"
    expected = np.isnan(minclip.encode_text(params, TOKENS))
    assert expected.any(axis=-1).tolist() == [text.endswith("dog") for text in TEXTS]
    np.testing.assert_array_equal(np.isnan(Encoder(params)(TOKENS)), expected)


def test_wrong_tokens_params_and_beginnings_raise():
    encoder = Encoder(PARAMS)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        encoder([[49408]])
    with pytest.raises(ValueError, match="context length"):
        encoder.warm("a cat " * 40)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Encoder(harsh_params()).warm("a cat")
    with pytest.raises(ValueError, match="text_projection"):
        Encoder({name: array for name, array in PARAMS.items() if name != "text_projection"})


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_one_thread_of_a_team_frees_the_others(failing):
    group = team.Team(3)

    def work(number):
        group.exchange(number, np.zeros(1))
        if number == failing:
            raise ValueError("this one")
        group.exchange(number, np.zeros(1))

    with pytest.raises(ValueError, match="this one"):
        group.run(work)
