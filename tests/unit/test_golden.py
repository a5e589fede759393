"""Figures made by others: OpenAI's own code on small random weights, and what publishers of CLIP printed."""

import os
from pathlib import Path

import numpy as np
import pytest

import minclip
from tests.support.oracles import relative

GOLDEN = Path(__file__).parents[1] / "support" / "golden" / "golden.npz"


def test_openais_own_code_gave_these_features():
    """Made by tests/golden/make_golden.py with clip/model.py of openai/CLIP."""
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    tokens, expected = arrays.pop("tokens"), arrays.pop("features")
    params = {name: array.astype(np.float32) for name, array in arrays.items()}
    assert relative(minclip.encode_text(params, tokens), expected) <= 2e-6


# First eight of 512 numbers, then the norm where it was published; ViT-B/32, float32, not normalised.
# jina-ai/jina-hub, encoders/nlp/CLIPTextEncoder/tests/expected_batch.npy: four decimals.
JINA = {
    "Han likes eating pizza": [
        [-0.06970279, -0.3367502, 0.23307952, 0.2571733, 0.01415831, -0.08524475, 0.12703097, -0.7486258],
        8.8314,
    ],
    "Han likes pizza": [
        [-0.03746231, -0.34144455, 0.21300158, 0.28470248, 0.05246674, -0.10674948, 0.1304547, -0.81602544],
        None,
    ],
    "Jina rocks": [
        [0.2292834, 0.0928176, -0.22975892, -0.00666326, -0.15742496, 0.03052422, -0.1647004, -1.9134818],
        None,
    ],
}


@pytest.fixture(scope="module")
def vit_b_32():
    """The real ViT-B/32, where it is at hand."""
    named = os.environ.get("MINCLIP_TEST_VIT_B_32")
    cached = Path.home() / ".cache" / "clip" / "ViT-B-32.pt"
    if not named and not cached.exists():
        pytest.skip(f"no real weights: neither {cached} nor MINCLIP_TEST_VIT_B_32 is there")
    return minclip.load(named or cached)


@pytest.mark.parametrize("text", JINA)
def test_vit_b_32_gives_what_jina_published(vit_b_32, text):
    numbers, norm = JINA[text]
    (features,) = minclip.encode_text(vit_b_32, minclip.tokenize(text))
    np.testing.assert_allclose(features[:8], numbers, atol=1e-4)
    if norm:
        assert abs(np.linalg.norm(features) - norm) < 1e-3


def test_vit_b_32_gives_the_cosines_jina_published(vit_b_32):
    unit = minclip.normalize(minclip.encode_text(vit_b_32, minclip.tokenize(list(JINA))))
    np.testing.assert_allclose((unit @ unit.T)[[0, 0, 1], [1, 2, 2]], [0.98942, 0.70508, 0.70540], atol=1e-4)


def test_vit_b_32_gives_what_bumblebee_and_vespa_published(vit_b_32):
    """elixir-nx/bumblebee, test/bumblebee/text/clip_text_test.exs, tolerance 1e-4;
    vespa-engine/sample-apps, text-image-search, ModelsTest.java, tolerance 1e-5."""
    stages = {}
    tokens = minclip.tokenize("a photo of a cat")
    minclip.encode_text(vit_b_32, tokens, tap=lambda name, array: stages.setdefault(name, array))
    rows = [[-0.5844, 0.3685, -2.0744], [-0.9600, 1.0018, -0.2415], [-0.5957, -0.1719, 0.4689]]
    np.testing.assert_allclose(stages["ln_final"][0, 1:4, 1:4], rows, atol=1e-4)
    np.testing.assert_allclose(stages["pooled"][0, 1:4], [0.1658, 0.8876, 10.6313], atol=1e-4)
    np.testing.assert_allclose(stages["text_features"][0, 1:4], [0.0733, -0.2448, -0.2212], atol=1e-4)
    (diagram,) = minclip.encode_text(vit_b_32, minclip.tokenize("a diagram"))
    assert abs(diagram[0] - 5.4698e-02) < 1e-5


def test_vit_b_32_gives_what_detic_published(vit_b_32):
    """facebookresearch/Detic, datasets/metadata/coco_clip_a+cname.npy, kept in float16."""
    tokens = minclip.tokenize(["a cat", "a dog", "a airplane"])
    features = minclip.encode_text(vit_b_32, tokens)
    expected = [0.1984, -0.204, -0.1536, -0.2708, -0.04517, 0.1987, -0.3105, -0.954]
    np.testing.assert_allclose(features[0, :8], expected, atol=2e-3)
    unit = minclip.normalize(features)
    assert abs(np.linalg.norm(features[0]) - 11.020) < 0.01
    np.testing.assert_allclose([unit[0] @ unit[1], unit[0] @ unit[2]], [0.9361, 0.8476], atol=1e-3)
