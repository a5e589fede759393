"""minclip.diagnose sees through output that a port repeats, and says that it is repeated."""

import numpy as np
import pytest

import minclip
from minclip.porting.repetition import find_repetition
from tests.support.oracles import random_params, random_tokens

L = 24


@pytest.fixture(scope="module")
def params():
    arrays = random_params(width=64, context=L, vocabulary=97, layers=2, embed=48)
    return minclip.from_state_dict(arrays, activation="quick_gelu", heads=2)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens([7, 12, 9, L], context=L, vocabulary=97, pad=0)


@pytest.fixture(scope="module")
def clean(params, tokens):
    return dict(minclip.trace(params, tokens))


REPEATED = {
    "over positions, B L E": lambda x: np.repeat(x[:, None], L, 1),
    "over positions, L B E": lambda x: np.repeat(x[None], L, 0),
    "over positions, B E L": lambda x: np.repeat(x[:, :, None], L, 2),
    "over positions, rows": lambda x: np.repeat(x, L, 0),
    "images of a text": lambda x: np.repeat(x, 2, 0),
    "batch after batch": lambda x: np.tile(x, (3, 1)),
    "stacked": lambda x: np.stack([x, x]),
    "along the width": lambda x: np.tile(x, (1, 2)),
    "over positions and texts": lambda x: np.tile(x[:, None], (2, L, 1)),
    "float16": lambda x: np.repeat(x[:, None], L, 1).astype(np.float16),
}


def ids(diagnosis):
    return [fault.id for fault in diagnosis.findings[0].faults]


@pytest.mark.parametrize("how", REPEATED)
def test_repeated_features_are_named(params, tokens, clean, how):
    unit = minclip.normalize(clean["text_features"])
    diagnosis = minclip.diagnose(params, tokens, REPEATED[how](unit))
    assert diagnosis.verdict == "known"
    assert ids(diagnosis) == ["N10", "X2-repeated"]
    count = REPEATED[how](unit).size // unit.size
    assert f"every row of the output is repeated {count} times" in str(diagnosis)
    diagnosis = minclip.diagnose(params, tokens, REPEATED[how](clean["text_features"]))
    assert ids(diagnosis) == ["X2-repeated"]
    assert diagnosis.findings[0].explanation == "one copy agrees"


def test_a_bug_in_repeated_features_is_named(params, tokens):
    port = minclip.Params(params, activation="gelu", heads=2)
    features = np.repeat(minclip.encode_text(port, tokens)[:, None], L, 1)
    assert ids(minclip.diagnose(params, tokens, features)) == ["A1", "X2-repeated"]


def test_repeated_logits_pooled_rows_and_states_are_named(params, tokens, clean):
    unit = minclip.normalize(clean["text_features"])
    assert ids(minclip.diagnose(params, tokens, np.tile(100 * unit @ unit.T, (2, 1)))) == [
        "X1-logits",
        "X2-repeated",
    ]
    pooled = np.repeat(clean["pooled"][:, None], L, 1)
    assert ids(minclip.diagnose(params, tokens, pooled)) == ["N9-pooled"]
    twice = np.concatenate([clean["ln_final"]] * 2)
    diagnosis = minclip.diagnose(params, tokens, twice)
    assert ids(diagnosis) == ["X2-repeated"]
    assert diagnosis.headline == "known: this explains the port's hidden states"


def test_an_unknown_port_says_how_often_its_rows_are_there(params, tokens, clean, monkeypatch):
    monkeypatch.setattr("minclip.porting.search.Search.pairs", lambda search, *_: [])
    wrong = np.repeat(clean["text_features"][:, None, ::-1], L, 1)
    diagnosis = minclip.diagnose(params, tokens, wrong, budget=1)
    assert diagnosis.verdict == "unknown"
    assert diagnosis.notes[0] == f"Every row is there {L} times; one copy was diagnosed."


def test_what_is_not_repeated_is_left_alone(params, tokens, clean):
    square = minclip.from_state_dict(random_params(width=64, context=L, layers=1), activation="gelu", heads=2)
    for output in (
        clean["text_features"],
        clean["ln_final"],
        clean["transformer.resblocks.1"].transpose(1, 0, 2),
        np.tile(clean["text_features"][:1], (4, 1)),  # every text has the first text's features
        np.zeros((4, L, 64), np.float32),
        np.full((4, L, 64), np.nan, np.float32),
    ):
        assert find_repetition(params, tokens, output) is None
    eight = np.tile(tokens, (2, 1))
    equal = np.ones((8, 1), np.float32) * np.arange(64, dtype=np.float32)
    assert find_repetition(square, eight, equal) is None  # one row has the size of eight texts' logits
