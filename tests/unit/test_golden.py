"""Figures made by others: OpenAI's own code on small random weights, and what publishers of CLIP printed."""

import os
from pathlib import Path

import numpy as np
import pytest

import minclip
from minclip.checkpoint.download import MODELS
from minclip.verification.published import SOURCES
from tests.support.oracles import relative

GOLDEN = Path(__file__).parents[1] / "support" / "golden" / "golden.npz"


def test_openais_own_code_gave_these_features():
    """Made by tests/support/golden/make_golden.py with clip/model.py of openai/CLIP."""
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    tokens, expected = arrays.pop("tokens"), arrays.pop("features")
    params = {name: array.astype(np.float32) for name, array in arrays.items()}
    assert relative(minclip.encode_text(params, tokens), expected) <= 2e-6


def real_weights():
    """Return (label, source, model name or None) of the real weights that are at hand.

    MINCLIP_TEST_WEIGHTS lists files or folders, with os.pathsep between them. The cache of OpenAI's clip
    is searched for OpenAI's files.
    """
    listed = filter(None, os.environ.get("MINCLIP_TEST_WEIGHTS", "").split(os.pathsep))
    found = [(Path(path).name, path, None) for path in listed]
    cache = Path("~/.cache/clip").expanduser()
    for name, (_, filename) in MODELS.items():
        for path in (cache / filename, cache / f"{Path(filename).stem}.text.safetensors"):
            if path.is_file():
                found.append((path.name, path, name))
    return found


WEIGHTS = real_weights() or [
    pytest.param(
        *("none", None, None),
        marks=pytest.mark.skip(
            reason="no real weights: ~/.cache/clip has none, MINCLIP_TEST_WEIGHTS names none"
        ),
    )
]


@pytest.mark.parametrize(("label", "source", "name"), WEIGHTS)
def test_real_weights_give_the_published_figures(label, source, name):
    if name in ("RN101", "RN50x4", "RN50x16", "RN50x64"):
        pytest.skip(f"nobody has published figures for {name}")
    certificate = minclip.verify(minclip.load(source), name)
    assert certificate.verdict == "agrees", str(certificate)
    if name == "ViT-B/32":
        check_numbers(minclip.load(source))


def check_numbers(params):
    """Assert that single numbers of Jina's and Detic's vectors are as near as vectors are."""
    jina, detic = (next(s for s in SOURCES if s.id == name) for name in ("jina", "detic-coco"))
    np.testing.assert_allclose(jina.compute(params), jina.figures, atol=1e-4)
    off = np.nan_to_num(np.abs(detic.compute(params) - detic.figures))
    assert off.max() <= 4e-3  # Detic's own reruns differ by up to 3.9e-3
    assert off[detic.labels().index("a cat")].max() <= 2e-3
