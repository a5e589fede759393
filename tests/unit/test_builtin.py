"""The built-in model is whole, is the file that its card names, and means something. Nothing is trained."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import minclip
from minclip import builtin

TESTS = Path(__file__).parents[1]
START, END = 49406, 49407


@pytest.fixture(scope="module")
def params():
    return minclip.load()


@pytest.fixture(scope="module")
def table():
    emoji, names, features = minclip.pictures()
    return emoji, names, features


@pytest.fixture(scope="module")
def scenes():
    return minclip.scenes()


@pytest.fixture(scope="module")
def held_out():
    return json.loads((TESTS / "train_builtin" / "held_out.json").read_text(encoding="utf-8"))


def encode(params, texts):
    return minclip.normalize(minclip.encode_text(params, minclip.tokenize(texts)))


def rank(params, table, text, name):
    """How many pictures are nearer to the text than the one of that name."""
    _, names, features = table
    scores = features @ encode(params, [text])[0]
    return int((scores > scores[names.index(name)]).sum())


def test_the_card_names_this_very_file():
    digest = hashlib.sha256(builtin.MODEL.read_bytes()).hexdigest()
    assert digest in builtin.MODEL.with_name("MODEL_CARD.md").read_text(encoding="utf-8")


def test_the_file_is_at_most_6_mb():
    assert builtin.MODEL.stat().st_size <= 6_000_000


def test_names_shapes_and_dtypes_are_openais(params):
    D, E = params["text_projection"].shape
    shapes = {
        "token_embedding.weight": (49408, D),
        "positional_embedding": (77, D),
        "text_projection": (D, E),
        "ln_final.weight": (D,),
        "ln_final.bias": (D,),
    }
    for i in range(6):
        block = f"transformer.resblocks.{i}."
        shapes |= {
            block + "ln_1.weight": (D,),
            block + "ln_1.bias": (D,),
            block + "attn.in_proj_weight": (3 * D, D),
            block + "attn.in_proj_bias": (3 * D,),
            block + "attn.out_proj.weight": (D, D),
            block + "attn.out_proj.bias": (D,),
            block + "ln_2.weight": (D,),
            block + "ln_2.bias": (D,),
            block + "mlp.c_fc.weight": (4 * D, D),
            block + "mlp.c_fc.bias": (4 * D,),
            block + "mlp.c_proj.weight": (D, 4 * D),
            block + "mlp.c_proj.bias": (D,),
        }
    assert {name: array.shape for name, array in params.items()} == shapes
    assert {array.dtype for array in params.values()} == {np.dtype(np.float32)}
    assert (params.activation, params.heads) == ("quick_gelu", D // 64)


def test_every_number_is_finite_and_no_row_is_zero(params):
    for name, array in params.items():
        assert np.isfinite(array).all(), name
        if array.ndim == 2:
            assert (np.abs(array).max(axis=1) > 0).all(), name


def test_start_and_end_tokens_have_full_rows_of_their_own(params):
    with builtin.safe_open(builtin.MODEL, framework="np") as file:
        assert {START, END} <= set(file.get_tensor("token_embedding.full_ids").tolist())
    norms = np.linalg.norm(params["token_embedding.weight"], axis=1)
    assert (norms[[START, END]] > np.median(norms) / 5).all()
    assert not np.allclose(params["token_embedding.weight"][START], params["token_embedding.weight"][END])


def test_few_token_rows_are_alike(params):
    rows = np.round(params["token_embedding.weight"] * 1000).astype(np.int32)
    assert len(np.unique(rows, axis=0)) > 0.97 * len(rows)


def test_the_picture_table_is_unit_rows_with_names(table):
    emoji, names, features = table
    assert len(emoji) == len(names) == len(features) > 1600
    assert len(set(emoji)) == len(emoji)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("test", "k", "bar"),
    [
        ("seen names", 1, 0.90),
        ("seen names", 5, 0.98),
        ("shortcodes", 5, 0.80),
        ("held-out keywords", 10, 0.40),
    ],
)
def test_retrieval_on_a_sample(params, table, held_out, test, k, bar):
    """Bars for 150 queries; the card has the figures for all of them."""
    emoji, _, features = table
    index = {e: i for i, e in enumerate(emoji)}
    scores = encode(params, [text for text, _, _ in held_out[test]]) @ features.T
    found = 0
    for row, (_, right, aside) in zip(scores, held_out[test], strict=True):
        best = row[[index[e] for e in right]].max()
        row[[index[e] for e in aside]] = -1
        found += (row > best).sum() < k
    assert found / len(scores) >= bar


def test_held_out_phrases_are_ordered_as_by_the_teacher(params, held_out):
    features = encode(params, held_out["held phrases"])
    mine = (features @ features.T)[np.triu_indices(len(features), 1)]
    theirs = np.array(held_out["teacher cosines, in hundredths, upper triangle by rows"])
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (mine, theirs)]
    assert np.corrcoef(ranks)[0, 1] > 0.55


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("a horse and an astronaut", "horse", "astronaut"),
        ("a cat with an umbrella", "cat", "umbrella"),
        ("a guitar and a rocket", "guitar", "rocket"),
    ],
)
def test_two_things_in_one_sentence_both_count(params, table, text, first, second):
    assert rank(params, table, text, first) < 15
    assert rank(params, table, text, second) < 15


def test_the_scene_table_is_unit_rows_with_structure(scenes):
    descriptions, features = scenes
    assert len(descriptions) == len(features) >= 500
    assert all(
        scene.keys() == {"picture", "sentence", "relation", "first", "second"} for scene in descriptions
    )
    assert len({scene["sentence"] for scene in descriptions}) == len(descriptions)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_the_sentence_of_a_scene_finds_the_scene(params, scenes):
    descriptions, features = scenes
    said = encode(params, [scene["sentence"] for scene in descriptions])
    assert ((said @ features.T).argmax(axis=1) == np.arange(len(said))).mean() > 0.85


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("🐱 above 🐶", "🐶 above 🐱"),
        ("a red cube and a blue sphere", "a blue cube and a red sphere"),
        ("a dog bites a man", "a man bites a dog"),
        ("a cat with a dog", "a cat without a dog"),
    ],
)
def test_two_sentences_of_the_same_words_find_their_own_scenes(params, scenes, text, other):
    descriptions, features = scenes
    nearest = (encode(params, [text, other]) @ features.T).argmax(axis=1)
    found = [descriptions[i] for i in nearest]
    words = [{*text.replace("🐱", "a cat").replace("🐶", "a dog").split()} for text in (text, other)]
    assert found[0] != found[1]
    for scene, said in zip(found, words, strict=True):
        assert said <= {*scene["sentence"].split()}, (scene, said)


def test_an_emoji_typed_alone_finds_its_own_picture(params, table):
    emoji, _, features = table
    said = encode(params, emoji)
    assert ((said @ features.T).argmax(axis=1) == np.arange(len(emoji))).mean() > 0.9


def test_a_long_text_does_not_drift(params):
    """A text said again and again, up to the last position, stays nearer to itself than to others."""
    texts = ["a dog in the park", "the stock market fell", "a bowl of hot soup", "rain and thunder at night"]
    short = encode(params, texts)
    long = encode(params, [". ".join([text] * 11) for text in texts])
    cosines = long @ short.T
    assert (cosines.argmax(axis=1) == np.arange(len(texts))).all()
    assert np.diag(cosines).min() > 0.6
