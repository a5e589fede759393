"""What holds for every encoder, for the states and for the gradient, whatever the tower and the texts.

`pytest -n 0 --hypothesis-profile=deep tests/unit/test_properties.py` tries 100,000 examples of each of
encode_text, fast, Encoder, hidden_states and backward, which takes an hour.
"""

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minclip
from minclip import fast, tokenizer
from minclip.model import layer_norm
from minclip.params import architecture, input_of_block
from tests.support.oracles import random_params, random_tokens, token_rows

V, L, HEADS = 97, 12, 2
HEADS_AND_WIDTHS = [(1, 8), (2, 10), (2, 16), (3, 9), (3, 24)]
BARS = {"float16": 2e-2, "float32": 2e-5, "float64": 1e-12}  # rounding, amplified by the smallest towers


def by_encoder(params, tokens):
    return fast.Encoder(params)(tokens)


ENCODERS = {"encode_text": minclip.encode_text, "fast": fast.encode_text, "Encoder": by_encoder}
each_encoder = pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)


DEEP = settings.default.max_examples == 100_000  # the profile of tests/conftest.py


def examples(quick, deep):
    """Settings for so many examples in an ordinary run, and in a deep one."""
    return settings(max_examples=deep if DEEP else quick, deadline=None)


@st.composite
def towers(draw, dtypes=tuple(BARS)):
    """A small random tower, often of an awkward size, of either activation.

    The width is 8 at least: a layer norm over two numbers that nearly agree amplifies rounding without bound.
    """
    (heads, width), dtype = draw(st.sampled_from(HEADS_AND_WIDTHS)), draw(st.sampled_from(dtypes))
    params = random_params(
        width=width,
        layers=draw(st.integers(1, 2)),
        embed=draw(st.integers(1, 9)),
        context=L,
        vocabulary=V,
        seed=draw(st.integers(0, 99)),
        dtype=dtype,
    )
    for name in ("token_embedding.weight", "positional_embedding"):
        params[name] = params[name] * 20  # so that the residual stream is not all rounding
    return minclip.Params(params, activation=draw(st.sampled_from(["quick_gelu", "gelu"])), heads=heads)


words = st.lists(st.integers(0, V - 3), max_size=L - 2)  # the ids of a text, start and end left out
corpora = st.lists(words, min_size=1, max_size=8)


def rows(texts):
    return token_rows(texts, L, V)


def near(features, expected, params):
    """Every row within rounding, and nothing else about the array different."""
    assert features.dtype == expected.dtype == params["text_projection"].dtype
    assert features.shape == expected.shape
    # What is projected is normalized, so features are of the projection's size; one that happens to come out
    # far smaller, as a single number can, is still rounded like the others.
    size = np.linalg.norm(params["text_projection"].astype(np.float64))
    for row, other in zip(features.astype(np.float64), expected.astype(np.float64), strict=True):
        apart = np.linalg.norm(row - other)
        assert apart < BARS[str(features.dtype)] * max(size, np.linalg.norm(other))


@examples(40, 80_000)
@given(params=towers(), texts=corpora)
def test_every_encoder_gives_the_features_of_the_trace(params, texts):
    tokens = rows(texts)
    expected = minclip.trace(params, tokens)["text_features"]  # of every position
    for encode in ENCODERS.values():
        near(encode(params, tokens), expected, params)


@each_encoder
@examples(40, 10_000)
@given(params=towers(), texts=corpora, data=st.data())
def test_what_stands_after_the_end_of_text_changes_nothing(encode, params, texts, data):
    tokens = rows(texts)
    garbage = tokens.copy()
    for row, ids in zip(garbage, texts, strict=True):
        after = L - len(ids) - 2
        row[len(ids) + 2 :] = data.draw(st.lists(st.integers(0, V - 1), min_size=after, max_size=after))
    near(encode(params, garbage), encode(params, tokens), params)
    longest = max(map(len, texts)) + 2
    near(encode(params, tokens[:, :longest]), encode(params, tokens), params)


@each_encoder
@examples(40, 4_000)
@given(params=towers(), texts=corpora, order=st.randoms(use_true_random=False))
def test_a_text_has_its_features_in_any_company_and_any_order(encode, params, texts, order):
    tokens = rows(texts)
    features = encode(params, tokens)
    near(np.stack([encode(params, row) for row in tokens]), features, params)
    shuffled = list(range(len(texts)))
    order.shuffle(shuffled)
    near(encode(params, tokens[shuffled]), features[shuffled], params)


@each_encoder
@examples(30, 6_000)
@given(params=towers(), texts=corpora, kind=st.sampled_from([np.uint8, np.int16, np.int32, np.int64, list]))
def test_leading_axes_and_integer_types_change_nothing_and_nothing_is_written(encode, params, texts, kind):
    tokens = rows(texts)
    features = encode(params, tokens)
    given_tokens = np.stack([tokens, tokens[::-1]])[:, None]
    given_tokens = given_tokens.tolist() if kind is list else given_tokens.astype(kind)
    for array in params.values():
        array.flags.writeable = False
    if kind is not list:
        given_tokens.flags.writeable = False
    shaped = encode(params, given_tokens)
    assert shaped.shape == (2, 1, *features.shape)
    near(shaped[0, 0], features, params)
    near(shaped[1, 0], features[::-1], params)


@examples(40, 4_000)
@given(params=towers(), texts=corpora, data=st.data())
def test_every_stage_is_blind_to_what_comes_later(params, texts, data):
    """The prefix property, stage by stage: change the ids from a position on, and nothing before it moves."""
    tokens = rows(texts)
    at = data.draw(st.integers(1, L - 1))
    changed = tokens.copy()
    changed[:, at:] = (changed[:, at:] + data.draw(st.integers(1, V - 1))) % V
    before, after = (stages_of(params, ids) for ids in (tokens, changed))
    for name, stage in before.items():
        if name.endswith((".q", ".k", ".v")):
            seen = np.s_[:, :, :at]
        elif name.endswith((".scores", ".masked", ".weights")):
            seen = np.s_[:, :, :at, :at]
        elif name in ("positional_embedding", "eot", "pooled", "text_features"):
            continue  # one of no ids, three of the chosen position alone
        else:
            seen = np.s_[:, :at]
        np.testing.assert_array_equal(stage[seen], after[name][seen], err_msg=name)


def stages_of(params, tokens):
    stages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the change may take away an end of text
        minclip.encode_text(params, tokens, tap=lambda name, array: stages.setdefault(name, array))
    return stages


@examples(40, 80_000)
@given(
    params=towers(),
    texts=corpora,
    skip=st.integers(0, 3),
    norm=st.booleans(),
    nodes=st.sampled_from([None, 1, 30]),
)
def test_hidden_states_are_the_stages_of_encode_text_and_those_of_fast(params, texts, skip, norm, nodes):
    tokens = rows(texts)
    stages = minclip.trace(params, tokens)
    skip = min(skip, architecture(params)[0])
    stream = stages[input_of_block(architecture(params)[0] - skip)]
    states, pooled, features = minclip.hidden_states(params, tokens, skip=skip, norm=norm, pooled=True)
    expected = layer_norm(stream, params["ln_final.weight"], params["ln_final.bias"]) if norm else stream
    np.testing.assert_array_equal(states, expected)
    np.testing.assert_array_equal(pooled, stages["pooled"])
    np.testing.assert_array_equal(features, stages["text_features"])
    options = dict(skip=skip, norm=norm)
    np.testing.assert_array_equal(minclip.hidden_states(params, tokens, **options), states)
    near(fast.hidden_states(params, tokens, nodes=nodes, **options), states, params)
    for array, other in zip(
        fast.hidden_states(params, tokens, nodes=nodes, pooled=True, **options),
        (states, pooled, features),
        strict=True,
    ):
        near(array, other, params)


@examples(40, 20_000)
@given(params=towers(), texts=corpora, data=st.data())
def test_hidden_states_see_nothing_that_comes_later(params, texts, data):
    tokens = rows(texts)
    at = data.draw(st.integers(1, L - 1))
    states = minclip.hidden_states(params, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cut may take away an end of text
        near(minclip.hidden_states(params, tokens[:, :at]), states[:, :at], params)
    shaped = minclip.hidden_states(params, np.stack([tokens, tokens[::-1]])[:, None])
    near(shaped[0, 0], states, params)
    near(shaped[1, 0], states[::-1], params)


def gradient(params, tokens, by_features):
    return minclip.backward(minclip.trace(params, tokens), by_features)


@examples(40, 80_000)
@given(params=towers(["float64"]), texts=corpora, seed=st.integers(0, 2**32 - 1))
def test_the_gradient_is_the_slope_in_any_direction(params, texts, seed):
    rng, tokens = np.random.default_rng(seed), rows(texts)
    by_features = rng.standard_normal((len(texts), params["text_projection"].shape[1]))
    along = {name: rng.standard_normal(array.shape) for name, array in params.items()}
    grads = gradient(params, tokens, by_features)

    def slope(step):
        """The finite difference over -step to step."""
        ends = [
            {name: array + sign * step * along[name] for name, array in params.items()} for sign in (1, -1)
        ]
        features = [minclip.encode_text(params.with_arrays(arrays), tokens) for arrays in ends]
        return ((features[0] - features[1]) * by_features).sum() / (2 * step)

    coarse, fine = slope(2e-5), slope(1e-5)
    size = sum(np.linalg.norm(grads[name]) * np.linalg.norm(along[name]) for name in grads)
    # Both steps have errors that grow with the step's square, so they differ by three times the finer one's.
    assert (
        abs(sum((grads[name] * along[name]).sum() for name in grads) - fine)
        <= abs(coarse - fine) + 1e-6 * size
    )


@examples(40, 20_000)
@given(params=towers(["float32", "float64"]), texts=corpora, seed=st.integers(0, 2**32 - 1))
def test_the_gradient_of_a_batch_is_the_sum_over_its_texts(params, texts, seed):
    tokens, E = rows(texts), params["text_projection"].shape[1]
    by_features = (
        np.random.default_rng(seed).standard_normal((len(texts), E)).astype(params["ln_final.weight"].dtype)
    )
    whole = gradient(params, tokens, by_features)
    parts = [gradient(params, tokens[i], by_features[i]) for i in range(len(texts))]
    bar = BARS[str(by_features.dtype)]
    for name, array in whole.items():
        size = sum(np.linalg.norm(part[name]) for part in parts)
        assert np.linalg.norm(array - sum(part[name] for part in parts)) <= bar * size, name
    # Features are linear in the projection, so the product of it and its gradient is the loss.
    loss = (minclip.encode_text(params, tokens) * by_features).sum()
    product = (params["text_projection"] * whole["text_projection"]).sum()
    assert abs(loss - product) <= bar * np.linalg.norm(params["text_projection"]) * np.linalg.norm(
        by_features
    )


TOWER = minclip.Params(
    random_params(width=16, layers=2, embed=6, context=L, vocabulary=V), activation="quick_gelu", heads=HEADS
)
TEXTS = [[5, 6, 7], [3], [5, 6, 3], [5, 6, 7, 3, 3, 3, 3, 3], [], [5], [5, 6, 7, 8, 9, 10], [8] * (L - 2)]
ENCODER = fast.Encoder(TOWER)  # one for all threads
DAMAGES = {  # parameter: the place of one number in it, whom it reaches, and which features
    "token_embedding.weight": ((3, 1), lambda text: 3 in text, slice(None)),
    "positional_embedding": ((5, 2), lambda text: len(text) + 1 >= 5, slice(None)),
    "text_projection": ((4, 2), lambda text: True, 2),
    "transformer.resblocks.1.mlp.c_proj.bias": ((3,), lambda text: True, slice(None)),
}


@each_encoder
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_number_that_is_none_reaches_the_texts_that_use_it_and_no_others(encode, name, value):
    """Alone and in a batch. There encode_text computes, as OpenAI does, every position up to the longest
    text's end, so what is none at one of those reaches the shorter texts too: 0 times nan is nan."""
    place, reached, columns = DAMAGES[name]
    params = minclip.Params(TOWER, activation="quick_gelu", heads=HEADS)
    params[name] = params[name].copy()
    params[name][place] = value
    expected = np.zeros((len(TEXTS), 6), bool)
    for row, text in zip(expected, TEXTS, strict=True):
        row[columns] = reached(text)
    alone = np.concatenate([encode(params, rows([text])) for text in TEXTS])
    np.testing.assert_array_equal(~np.isfinite(alone), expected)
    batch = encode(params, rows(TEXTS))
    if name == "positional_embedding" and encode is minclip.encode_text:
        expected[:] = True
    np.testing.assert_array_equal(~np.isfinite(batch), expected)
    sound = np.isfinite(batch)
    np.testing.assert_allclose(batch[sound], encode(TOWER, rows(TEXTS))[sound], rtol=1e-3, atol=1e-5)


TREES = {
    "all equal": [[5, 6, 7]],
    "a chain": [[1] * n for n in range(L - 1)],
    "one id different at each depth": [[1] * n + [2] + [1] * (L - 3 - n) for n in range(L - 2)],
    "nothing shared": [[n] * (1 + n % (L - 2)) for n in range(V - 2)],
    "a comb": [[1] * n + [2] for n in range(L - 2)] + [[1] * n for n in range(L - 1)],
}


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 10_000])
@pytest.mark.parametrize("tree", TREES)
def test_fast_is_the_reference_on_any_tree_of_beginnings(tree, count):
    different = rows(TREES[tree])
    tokens = np.resize(different, (count, L))
    expected = np.resize(minclip.encode_text(TOWER, different), (count, 6))
    near(fast.encode_text(TOWER, tokens), expected, TOWER)


def states(function, tokens):
    return np.concatenate([array.ravel() for array in function(TOWER, tokens, skip=1, pooled=True)])


def gradients(tokens):
    grads = gradient(TOWER, tokens, minclip.encode_text(TOWER, tokens))
    return np.concatenate([array.ravel() for array in grads.values()])


def loaded():
    return np.concatenate([array[:99].ravel() for array in minclip.load().values()])


def jobs():
    """Calls of every function that users call from several threads, small ones and large ones."""
    texts = [f"{word} photo of {n} cats &amp; a naïve dog" for n in range(6) for word in ("a", "Another")]
    jobs, tokens = (
        [(minclip.tokenize, texts), (loaded,)],
        random_tokens([2, 5, 9, 3], context=L, vocabulary=V),
    )
    for some in (np.resize(tokens, (n, L)) for n in (1, 3, 40)):
        jobs += [(encode, TOWER, some) for encode in ENCODERS.values()] + [(ENCODER, some), (gradients, some)]
        jobs += [(states, minclip.hidden_states, some), (states, fast.hidden_states, some)]
    return jobs


def call(job):
    function, *args = job
    return function(*args)


@pytest.mark.usefixtures("two_blas_threads")
def test_eight_threads_at_once_give_the_bits_of_one():
    alone = [call(job) for job in jobs()]
    for cached in ("remembered_ids", "ranks", "spellings", "vocabulary", "byte_characters"):
        getattr(tokenizer, cached).cache_clear()  # so that the threads meet while they are filled
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(call, jobs() * 16))
    for a, b in zip(alone * 16, together, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_processes_however_started_give_the_bits_of_one(method):
    """fast has run before, so a fork meets what its threads left; Python 3.12 warns of them."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    alone = [call(job) for job in jobs()]
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for a, b in zip(alone, pool.map(call, jobs(), timeout=120), strict=True):
            np.testing.assert_array_equal(a, b)
