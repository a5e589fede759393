"""The shipped figures are small, belong to known models, and agree among their publishers."""

from importlib import resources

import numpy as np
import pytest

import minclip
from minclip.verification.figures import Printed, Vectors, norms_of
from minclip.verification.published import HALF, MODELS, SOURCES

BY_ID = {source.id: source for source in SOURCES}
VECTORS = [source for source in SOURCES if isinstance(source, Vectors)]
# Published beside the figures, by others than minclip's tokenizer.
IDS = {
    "deep-dive": [320, 1674, 539, 320, 6829, 269],
    "onnxruntime": [1078, 320, 1674, 539, 1901, 2677, 593, 4023, 1630, 585, 537, 320, 736, 2390],
    "wethinkin": [272, 1611, 267, 1215],
    "bumblebee": [320, 1125, 539, 320, 2368],
    "vespa": [320, 22697],
}


def test_the_shipped_file_stays_under_400_kb():
    assert len(resources.files("minclip.verification").joinpath("published.npz").read_bytes()) < 400_000


def test_there_are_hundreds_of_vectors_and_each_fits_its_model():
    count = {}
    for source in VECTORS:
        figures = source.figures
        assert figures.shape == (len(source.words), MODELS[source.model].embedding), source.id
        assert not np.isnan(figures[:2]).any()
        assert (~np.isnan(figures)).any(axis=1).all(), "a vector of which nothing is shipped"
        count[source.model] = count.get(source.model, 0) + len(figures)
    assert count["ViT-B/32"] == 3 + 3 + 80 + 620 + 2
    assert count["ViT-B/16"] == 191
    assert count["RN50"] == 100
    assert len({source.model for source in SOURCES}) == 17
    assert len(BY_ID) == len(SOURCES)


@pytest.mark.parametrize("source", VECTORS, ids=lambda source: source.id)
def test_every_column_is_checked_by_some_vector_and_norms_are_of_the_complete_ones(source):
    figures, norms = source.figures, norms_of(source.id)
    assert (~np.isnan(figures)).any(axis=0).all()
    complete = ~np.isnan(figures).any(axis=1)
    np.testing.assert_allclose(np.linalg.norm(figures[complete], axis=1), norms[complete], rtol=1e-3)
    assert bool(np.allclose(norms, 1, atol=2e-3)) == source.unit


@pytest.mark.parametrize("name", IDS)
def test_the_printed_texts_have_the_published_ids(name):
    tokens = minclip.tokenize(BY_ID[name].text, pad=49407)[0]
    assert [i for i in tokens.tolist() if i < 49406] == IDS[name]


def vector(source, text):
    return BY_ID[source].figures[BY_ID[source].labels().index(text)]


@pytest.mark.parametrize("text", ["a dog", "a cat"])
def test_detic_and_npclip_agree_within_what_is_allowed(text):
    coarse, fine = vector("detic-coco", text), vector("npclip", text)
    kept = ~np.isnan(coarse)
    assert np.linalg.norm((coarse - fine)[kept]) / np.linalg.norm(fine[kept]) < HALF / 2


@pytest.mark.parametrize(("source", "words"), [("zegclip", 14), ("vlpart", 16)])
def test_the_reruns_of_one_publisher_agree_within_half_of_what_is_allowed(source, words):
    source = BY_ID[source]
    labels, figures = source.labels(), source.figures
    errors = []
    for second in range(len(labels) - 20, len(labels)):
        first = labels.index(labels[second])
        both = ~np.isnan(figures[first]) & ~np.isnan(figures[second])
        if first < second and both.any():
            scale = np.sqrt(both.mean()) * norms_of(source.id)[first]
            errors.append(np.linalg.norm((figures[first] - figures[second])[both]) / scale)
    assert 0 < len(errors) <= words
    assert max(errors) <= source.allowed / 2


def test_two_publishers_print_the_same_digits():
    (queryable,), bumblebee = BY_ID["queryable"].figures, BY_ID["bumblebee"].figures[-1]
    np.testing.assert_array_equal(queryable[1:4], bumblebee)
    np.testing.assert_allclose(vector("npclip", "a diagram")[0], BY_ID["vespa"].figures[0][0], atol=1e-6)


def test_three_publishers_print_the_same_start_of_text():
    starts = [np.concatenate(BY_ID[name].figures[:2]) for name in ("deep-dive", "onnxruntime", "wethinkin")]
    np.testing.assert_array_equal(starts[0], starts[1])
    np.testing.assert_array_equal(starts[0], starts[2])


def test_every_vector_has_a_prompt_to_name_it_by():
    for source in SOURCES:
        labels = source.labels()
        assert len(labels) == len(source.figures)
        assert not any("{" in label for label in labels)
    assert BY_ID["clipself"].labels()[4] == "There is an airplane in the scene."
    assert len(set(BY_ID["clipself"].templates)) == 63  # as many as ViLD's


def test_every_source_says_where_it_is_from_and_why_its_tolerance():
    for source in SOURCES:
        assert len(source.origin) > 10
        assert len(source.basis) > 10
        assert 0 < source.allowed <= 2e-2
        assert isinstance(source, Printed | Vectors)
