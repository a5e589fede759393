"""minclip.fast gives encode_text's features for any corpus, in little memory, and leaves no traces."""

import gc
import pathlib
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import minclip
from minclip import fast
from minclip.fast import cpu, tree, twigs
from minclip.params import end_of_text
from tests.support.oracles import token_rows

pytestmark = pytest.mark.usefixtures("two_blas_threads")

ROOT = pathlib.Path(__file__).parents[3]
V, L = 97, 24


def harsh_params(heads=None, activation="quick_gelu", dtype=np.float32, layers=3, D=128, F=192, E=40, seed=0):
    """A small text tower whose every weight, bias and mean matters."""
    rng = np.random.default_rng(seed)

    def normal(scale, *shape, mean=0):
        return (mean + scale * rng.standard_normal(shape)).astype(dtype)

    params = {
        "token_embedding.weight": normal(1, V, D, mean=0.3),
        "positional_embedding": normal(0.5, L, D),
        "ln_final.weight": normal(0.2, D, mean=1),
        "ln_final.bias": normal(0.2, D),
        "text_projection": normal(D**-0.5, D, E),
    }
    for i in range(layers):
        block = {
            "ln_1.weight": normal(0.2, D, mean=1),
            "ln_1.bias": normal(0.3, D),
            "attn.in_proj_weight": normal(2 * D**-0.5, 3 * D, D),
            "attn.in_proj_bias": normal(0.5, 3 * D),
            "attn.out_proj.weight": normal(D**-0.5, D, D),
            "attn.out_proj.bias": normal(0.3, D, mean=0.2),
            "ln_2.weight": normal(0.2, D, mean=1),
            "ln_2.bias": normal(0.3, D),
            "mlp.c_fc.weight": normal(D**-0.5, F, D),
            "mlp.c_fc.bias": normal(0.3, F),
            "mlp.c_proj.weight": normal(F**-0.5, D, F),
            "mlp.c_proj.bias": normal(0.3, D, mean=0.2),
        }
        params.update({f"transformer.resblocks.{i}.{name}": value for name, value in block.items()})
    return minclip.Params(params, activation=activation, heads=heads or D // 64)


PARAMS = harsh_params()


def rows(*texts):
    return token_rows(texts, L, V)


def error(params, tokens, **options):
    """The largest relative distance between a row of fast's features and the reference's."""
    expected, found = minclip.encode_text(params, tokens), fast.encode_text(params, tokens, **options)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return (np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max(initial=0)


def many(count, seed=0, length=20, ids=4):
    """count texts over few ids, so that beginnings are shared to every depth."""
    rng = np.random.default_rng(seed)
    return rows(*(rng.integers(0, ids, rng.integers(0, length)).tolist() for _ in range(count)))


TREES = {
    "one text": rows([5, 6, 7]),
    "all equal": rows(*[[5, 6, 7]] * 50),
    "nothing but start and end": rows([]),
    "nothing shared but the start": rows(*[[i] * (i % 20) for i in range(40)]),
    "each text begins the next": rows(*[list(range(n)) for n in range(L - 2)]),
    "one id different at each depth": rows(*[[1] * n + [2] + [1] * (19 - n) for n in range(20)]),
    "as long as the context": rows(*[[7] * 21 + [n] for n in range(20)]),
    "end of text first": np.full((3, 1), V - 1),
    "several ends of text": rows([3, V - 1, 4, V - 1], [3, V - 1, 5], [3]),
    "the padding is a token of other texts": rows([0], [0, 0], [], [0, 0, 0, 1]),
    "thousands": many(4000),
}


@pytest.mark.parametrize("tokens", TREES.values(), ids=TREES.keys())
def test_gives_the_features_of_the_reference(tokens):
    assert error(PARAMS, tokens) < 1e-5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=L - 2), min_size=1, max_size=60))
def test_gives_the_features_of_the_reference_for_any_texts(texts):
    assert error(PARAMS, rows(*texts)) < 1e-5


def test_every_boundary_of_chunks_and_twigs_is_exact(monkeypatch):
    tokens = many(60, seed=1)
    for nodes in (1, 2, 17, 64):
        assert error(PARAMS, tokens, nodes=nodes) < 1e-5
    for twig in (1, 3, 64):
        monkeypatch.setattr(twigs, "TWIG", twig)
        monkeypatch.setattr(twigs, "DENSE", twig - 1)
        assert error(PARAMS, tokens) < 1e-5


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float16, 5e-3), (np.float32, 1e-5), (np.float64, 1e-12)], ids=str
)
def test_every_dtype_head_count_and_activation(dtype, tolerance, heads, activation):
    assert error(harsh_params(heads, activation, dtype), many(200)) < tolerance


def test_float16_is_no_further_from_float64_than_the_reference():
    params, tokens = harsh_params(dtype=np.float16), many(200)
    truth = minclip.encode_text({name: value.astype(np.float64) for name, value in params.items()}, tokens)
    ours, reference = fast.encode_text(params, tokens), minclip.encode_text(params, tokens)
    assert np.linalg.norm(ours - truth) <= np.linalg.norm(reference - truth)


def test_a_plain_dict_of_mixed_dtypes_gives_the_dtype_of_its_projection():
    mixed = {
        name: value.astype([np.float64, np.float32][i % 2]) for i, (name, value) in enumerate(PARAMS.items())
    }
    assert error(mixed, many(50)) < 1e-5
    mixed["text_projection"] = mixed["text_projection"].astype(np.float16)
    assert error(mixed, many(50)) < 5e-3


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 5, 24), (0, 24), (3, 0, 24)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint64])
def test_any_leading_shape_and_integer_type(shape, dtype):
    tokens = np.resize(many(30), shape).astype(dtype)
    assert error(PARAMS, tokens) < 1e-5


def test_a_row_without_end_of_text_warns_and_agrees():
    tokens = np.array([[4, 9, 2, 0], [4, 9, 12, 0], [4, 9, 0, 0], [0, 0, 0, 0]])
    with pytest.warns(UserWarning, match="4 of 4 rows") as seen:
        fast.encode_text(PARAMS, tokens)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error(PARAMS, tokens) < 1e-5


def test_wrong_tokens_and_params_raise_as_the_reference_does():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fast.encode_text(PARAMS, [[V]])
    with pytest.raises(ValueError, match="integers"):
        fast.encode_text(PARAMS, [[1.0]])
    with pytest.raises(ValueError, match="text_projection"):
        fast.encode_text({n: v for n, v in PARAMS.items() if n != "text_projection"}, rows([1]))


def test_scores_that_overflow_exp_do_no_harm():
    params = harsh_params(dtype=np.float64)
    name = "transformer.resblocks.1.attn.in_proj_weight"
    params[name] = params[name] * 30  # scores of thousands, where any rounding is much amplified
    assert error(params, many(100)) < 1e-9


def test_nothing_given_is_written_to():
    params, tokens = harsh_params(), many(100)
    for array in (*params.values(), tokens):
        array.flags.writeable = False
    fast.encode_text(params, tokens)


def test_each_node_is_computed_once():
    tokens = np.concatenate([TREES["each text begins the next"], TREES["all equal"], many(300)])
    texts = tree.sort(tokens, end_of_text(PARAMS, tokens))
    beginnings = {tuple(row[:n]) for row in tokens for n in range(1, row.argmax() + 2)}
    grown = twigs.grow(texts.rows, texts.lengths, texts.shared)
    assert len(grown.ids) == -(-len(beginnings) // twigs.TWIG) * twigs.TWIG
    assert len(texts.rows) == len({tuple(row[: row.argmax() + 1]) for row in tokens})


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_calls_side_by_side_give_equal_bits_and_leave_blas_as_it_was():
    corpora = [many(count, seed=count) for count in (1, 30, 500, 1500)] * 3
    before = blas_threads()
    assert set(before) == {2}
    alone = [fast.encode_text(PARAMS, tokens) for tokens in corpora]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda tokens: fast.encode_text(PARAMS, tokens), corpora))
    assert blas_threads() == before
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_limit_that_another_thread_holds_stays_and_does_no_harm():
    with threadpool_limits(1, user_api="blas"):  # which threadpoolctl 3.8 keeps for this thread
        assert error(PARAMS, many(300)) < 1e-5
        assert set(blas_threads()) == {1}


def test_an_error_in_a_thread_comes_out_and_leaves_blas_as_it_was(monkeypatch):
    def fail(*args):
        raise RuntimeError("in a thread")

    before = blas_threads()
    monkeypatch.setattr(cpu, "grow", fail)
    with pytest.raises(RuntimeError, match="in a thread"):
        fast.encode_text(PARAMS, many(10))
    assert blas_threads() == before


def test_progress_is_shown_when_asked_for_and_only_then(capsys):
    fast.encode_text(PARAMS, many(10))
    assert capsys.readouterr().err == ""
    fast.encode_text(PARAMS, many(10), progress=True)
    assert "10/10" in capsys.readouterr().err


def test_float16_parameters_are_widened_for_the_call_only(monkeypatch):
    widened, working_params = [], cpu.working_params

    def watch(params):
        working = working_params(params)
        widened.extend(weakref.ref(array) for array in working.values() if array.dtype == np.float32)
        return working

    monkeypatch.setattr(cpu, "working_params", watch)
    gc.disable()  # a reference cycle would keep them until the collector runs
    try:
        fast.encode_text(harsh_params(dtype=np.float16), many(10))
        assert len(widened) == len(PARAMS) - 1
        assert all(matrix() is None for matrix in widened)
    finally:
        gc.enable()


def test_float32_parameters_are_not_copied():
    working = cpu.working_params(PARAMS)
    assert all(working[name] is array for name, array in PARAMS.items())


MEMORY = """
import resource, sys
import numpy as np
from minclip import fast
from minclip.fast import cpu, tree, twigs
from minclip.params import end_of_text
from tests.unit.fast.test_fast import harsh_params, many
params, texts = harsh_params(), np.tile(many(4000, length=20, ids=50), (20, 1))
texts[:, 1] = np.arange(len(texts)) % 90  # most of them different
fast.encode_text(params, texts[:10])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
features = fast.encode_text(params, texts)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - features.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
def test_memory_does_not_grow_with_the_corpus():
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 250e6  # all activations of these 80,000 texts would be 600 MB a layer
