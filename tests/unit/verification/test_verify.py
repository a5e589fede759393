"""`verify` tells the published model from any other, and names what is wrong, checked on a stand-in tower."""

import dataclasses
import json
import re

import numpy as np
import pytest

import minclip
from minclip import cli
from minclip.params import Params
from minclip.verification import causes, checking, figures
from minclip.verification.figures import Printed, Vectors
from minclip.verification.published import HALF, Model
from tests.support.make_published import pack
from tests.support.oracles import random_params

WORDS = (
    "cat dog apple traffic-light umbrella ox tower boat zebra kite car spoon bed vase clock bus cup".split()
)
EXACT = Vectors("exact", "Stand-in", "here", 1e-4, "float32")
COARSE = Vectors("coarse", "Stand-in", "here", HALF, "float16 on a GPU", templates=("a {}",))
# Two prompts a word: more than FEW, and so through minclip.fast.
UNIT = Vectors("unit", "Stand-in", "here", HALF, "unit rows", templates=("a {}", "the {}"), unit=True)
OTHER = Vectors("other", "Other", "elsewhere", HALF, "float16", templates=("a {}",))


@pytest.fixture(scope="module")
def tower():
    return Params(random_params(), activation="quick_gelu", heads=2)


@pytest.fixture(scope="module")
def another():
    return Params(random_params(seed=1), activation="quick_gelu", heads=2)


@pytest.fixture(autouse=True)
def budget(monkeypatch):
    """Give the search of known bugs no time, unless a test asks for it: where none fits, it is long."""
    monkeypatch.setattr(causes, "BUDGET", 0.0)


def printed(params, text="a picture of a puppy."):
    """Return a source of digits as a notebook would print them."""
    states, pooled, features = minclip.hidden_states(params, minclip.tokenize(text, pad=49407), pooled=True)
    rows = [("states", 2, 0, states[0, 2, :3]), ("states", -1, -3, states[0, -1, -3:])]
    rows += [("pooled", 0, 1, pooled[0, 1:4]), ("features", 0, 0, features[0, :4])]
    rows = tuple((name, at, first, tuple(np.round(v.astype(float), 4))) for name, at, first, v in rows)
    return Printed("printed", "Stand-in", "a notebook", 1e-4, "printed to four digits", text, rows, pad=49407)


@pytest.fixture
def publish(monkeypatch, tower, another):
    """Return a function that publishes the stand-in's vectors, each changed as told by source id."""

    def publish(**changes):
        def vectors(source, params):
            compute = changes.get(source.id, lambda source, params: source.compute(params))
            return source.id, WORDS, np.asarray(compute(source, params)), 4, "float32"

        sources = [(EXACT, tower), (COARSE, tower), (UNIT, tower), (OTHER, another)]
        monkeypatch.setattr(figures, "word_lists", lambda: dict.fromkeys([s.id for s, _ in sources], WORDS))
        arrays = pack([vectors(*each) for each in sources])
        monkeypatch.setattr(figures, "archive", lambda: arrays)
        monkeypatch.setattr(checking, "SOURCES", (EXACT, COARSE, UNIT, OTHER, printed(tower)))
        model = Model("a test", 2, 128, 96)
        models = {"Stand-in": model, "Other": model, "Silent": model, "Wider": Model("a test", 2, 256, 96)}
        monkeypatch.setattr(checking, "MODELS", models)

    return publish


def test_the_published_model_agrees_and_is_recognized_among_others_of_its_shapes(publish, tower, another):
    publish()
    certificate = minclip.verify(tower)
    assert (certificate.verdict, certificate.model, certificate.cause) == ("agrees", "Stand-in", "")
    assert certificate.sentence == "this is Stand-in of a test: 55 of 55 vectors agree"
    assert [(c.id, c.vectors, c.agreeing) for c in certificate.sources] == [
        ("exact", 17, 17),
        ("coarse", 17, 17),
        ("unit", 17, 17),
        ("printed", 4, 4),
    ]
    assert all(c.largest <= c.allowed for c in certificate.sources)
    assert "Other, Silent have the same shapes" in certificate.notes[0]
    assert minclip.verify(another).sentence == "this is Other of a test: 17 of 17 vectors agree"
    assert minclip.verify(tower, "Stand-in").verdict == "agrees"
    differs = minclip.verify(tower, "Other")
    assert (differs.verdict, differs.cause[:25]) == ("differs", "the weights are different")


def with_activation(source, params):
    return source.compute(Params(params, activation="gelu", heads=2))


def in_half(source, params):
    return source.compute(params.astype("float16"))


def without_final_norm(source, params):
    tokens = minclip.tokenize(source.labels())
    states = minclip.hidden_states(params, tokens, norm=False)
    return states[np.arange(len(tokens)), tokens.argmax(axis=1)] @ params["text_projection"]


def without_mask(source, params):
    def tap(name, array):
        return array[..., :] if not name.endswith("attn.masked") else scores[0]

    scores = [None]

    def record(name, array):
        if name.endswith("attn.scores"):
            scores[0] = array
        return tap(name, array)

    return minclip.encode_text(params, minclip.tokenize(source.labels()), tap=record)


def with_prompt(source, params):
    return dataclasses.replace(source, templates=("a photo of a {}",)).compute(params)


def normalized(source, params):
    return minclip.normalize(source.compute(params))


def doubled(source, params):
    return 2 * source.compute(params)


def with_one_other_text(source, params):
    vectors = source.compute(params)
    vectors[5] = vectors[6]
    return vectors


def fine_tuned(source, params):
    rng = np.random.default_rng(0)
    return source.compute(
        params.map(lambda a: a + 0.1 * a.std() * rng.standard_normal(a.shape).astype(a.dtype))
    )


def of_other_weights(source, params):
    return source.compute(Params(random_params(seed=2), activation="quick_gelu", heads=2))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (with_activation, "the figures agree with activation='gelu', not 'quick_gelu'"),
        (without_final_norm, "a known porting bug is put into the model: N"),
        (without_mask, "a known porting bug is put into the model: "),
        (with_prompt, "the prompt is wrong: the figures agree with 'a photo of a {}', not 'a {}'"),
        (normalized, "the published vectors are normalized"),
        (doubled, "the published vectors are scaled"),
        (with_one_other_text, "only 'a ox' do not: their prompts or token ids are others"),
        (fine_tuned, "the weights were fine-tuned, merged or changed"),
        (of_other_weights, "the weights are different"),
    ],
)
def test_each_planted_change_of_the_figures_fails_with_its_cause(publish, tower, change, cause, monkeypatch):
    if "bug" in cause:
        monkeypatch.setattr(causes, "BUDGET", 1000.0)
    publish(coarse=change)
    certificate = minclip.verify(tower, "Stand-in")
    assert certificate.verdict == "differs"
    assert cause in certificate.cause
    failing = [check.id for check in certificate.sources if not check.agrees]
    assert failing == ["coarse"]


def test_figures_rounded_to_half_precision_fail_where_single_was_promised(publish, tower):
    publish(exact=in_half)
    certificate = minclip.verify(tower)
    assert certificate.verdict == "differs"
    assert "as small as float16 rounding" in certificate.cause


def test_a_tower_in_half_precision_is_told_to_load_in_single(publish, tower):
    publish()
    certificate = minclip.verify(tower.astype("float16"))
    assert certificate.verdict == "differs"
    assert "load them in float32" in certificate.cause
    assert certificate.sentence.startswith("Stand-in's shapes, but not its figures: ")


def test_a_wrong_activation_or_number_of_heads_of_the_weights_is_named(publish, tower):
    publish()
    wrong = minclip.verify(Params(tower, activation="gelu", heads=2))
    assert "agree with activation='quick_gelu', not 'gelu'" in wrong.cause
    wrong = minclip.verify(Params(tower, activation="quick_gelu", heads=4))
    assert "agree with 2 heads, not 4" in wrong.cause


def test_a_fine_tuned_tower_is_told_from_the_original(publish, tower):
    publish()
    rng = np.random.default_rng(3)
    tuned = tower.map(lambda a: a + 0.05 * a.std() * rng.standard_normal(a.shape).astype(a.dtype))
    certificate = minclip.verify(tuned)
    assert certificate.verdict == "differs"
    assert certificate.model == "Stand-in"
    assert 0.9 < certificate.cosine < 0.9999
    assert "fine-tuned, merged or changed" in certificate.cause


def test_an_untrained_layer_norm_is_named(publish, tower):
    publish()
    ones = tower | {"ln_final.weight": np.ones(128, np.float32), "ln_final.bias": np.zeros(128, np.float32)}
    assert "ln_final.weight is all ones, as before training" in minclip.verify(ones).cause


def test_a_tower_that_nobody_published_is_none_of_those_with_its_shapes(publish):
    publish()
    certificate = minclip.verify(Params(random_params(seed=7), activation="quick_gelu", heads=2))
    assert (certificate.verdict, certificate.model) == ("differs", None)
    assert "the shapes are those of" in certificate.sentence
    assert "the weights of none of them" in certificate.sentence
    assert any("nobody has published figures for Silent" in note for note in certificate.notes)


def test_a_tower_without_projection_is_checked_by_its_states(publish, tower):
    publish()
    bare = tower.with_arrays({name: a for name, a in tower.items() if name != "text_projection"})
    certificate = minclip.verify(bare)
    assert certificate.sentence == "this is Stand-in of a test: 3 of 3 vectors agree"


def test_only_a_weak_source_may_disagree(publish, tower, monkeypatch):
    publish(coarse=doubled)
    weak = dataclasses.replace(COARSE, strong=False)
    monkeypatch.setattr(checking, "SOURCES", (EXACT, weak))
    certificate = minclip.verify(tower)
    assert certificate.verdict == "agrees"
    assert "~ coarse" in str(certificate)
    assert "coarse: weak: float16" in str(certificate)


def test_a_model_with_weak_sources_alone_is_not_blamed(publish, tower, monkeypatch):
    publish(coarse=doubled)
    weak = dataclasses.replace(COARSE, strong=False)
    monkeypatch.setattr(checking, "SOURCES", (weak,))
    certificate = minclip.verify(tower, "Stand-in")
    assert certificate.verdict == "unknown"
    assert certificate.sentence.startswith("Stand-in has only weak sources, and 0 of 17 vectors agree")
    publish()
    monkeypatch.setattr(checking, "SOURCES", (weak,))
    certificate = minclip.verify(tower)
    assert certificate.verdict == "agrees"
    assert "only weak sources were compared" in certificate.notes[0]


def test_printed_numbers_alone_tell_a_model_from_others(publish, tower, another, monkeypatch):
    publish()
    monkeypatch.setattr(checking, "SOURCES", (printed(tower),))
    assert minclip.verify(tower).sentence == "this is Stand-in of a test: 4 of 4 vectors agree"
    assert minclip.verify(another).verdict == "differs"
    assert minclip.verify(another, "Stand-in").verdict == "differs"


def test_errors_just_above_the_allowance_are_told_from_clear_ones(publish, tower):
    def slightly_off(source, params):
        vectors = source.compute(params)
        rng = np.random.default_rng(0)
        noise = rng.standard_normal(vectors.shape)
        return vectors + 2 * HALF * noise * np.linalg.norm(vectors, axis=1, keepdims=True) / 96**0.5

    publish(coarse=slightly_off)
    certificate = minclip.verify(tower)
    assert certificate.verdict == "differs"
    assert re.match(r"all errors are within 2\.\d times the tolerance", certificate.cause)


def test_names_and_shapes_that_do_not_fit_are_refused(publish, tower):
    publish()
    with pytest.raises(ValueError, match="no model 'Stand-on': did you mean Stand-in"):
        minclip.verify(tower, "Stand-on")
    with pytest.raises(ValueError, match="nobody has published figures for Silent; there are some for"):
        minclip.verify(tower, "Silent")
    small = Params(random_params(layers=1), activation="quick_gelu", heads=2)
    with pytest.raises(ValueError, match="have 1 layers, width 128, embedding 96, but Stand-in has 2"):
        minclip.verify(small, "Stand-in")


def test_the_certificate_prints_shows_and_converts(publish, tower):
    publish(coarse=doubled)
    certificate = minclip.verify(tower)
    text, page, facts = str(certificate), certificate._repr_html_(), certificate.to_dict()
    assert text.startswith("differs: Stand-in's shapes, but not its figures: 38 of 55 vectors agree")
    assert repr(certificate) == text
    assert "! coarse" in text
    assert "float16 on a GPU" in text
    assert "<table>" in page
    assert "float16 on a GPU" in page
    assert json.loads(json.dumps(facts))["sources"][1]["agreeing"] == 0
    broken = tower | {"ln_final.bias": np.full(128, np.nan, np.float32)}
    assert minclip.verify(broken, "Stand-in").to_dict()["sources"][0]["largest"] is None


def test_the_command_ends_with_0_1_or_2(publish, tower, another, tmp_path, capsys):
    publish()
    minclip.save(tower, tmp_path / "tower.safetensors")
    assert cli.main(["verify", str(tmp_path / "tower.safetensors")]) == 0
    assert capsys.readouterr().out.startswith("agrees: this is Stand-in of a test: 55 of 55 vectors agree\n")
    arguments = ["verify", str(tmp_path / "tower.safetensors"), "--model-name", "Other", "--json"]
    assert cli.main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "differs"
    assert cli.main(["verify", "builtin"]) == 1
    assert "unknown: no model with published figures" in capsys.readouterr().out
    assert cli.main(["verify"]) == 2
