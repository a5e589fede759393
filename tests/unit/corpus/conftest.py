"""A small model, a file of captions and a place for the features."""

import pytest

import minclip
from tests.support.corpora import TEXTS
from tests.support.oracles import random_params


@pytest.fixture(scope="package")
def params():
    return minclip.from_state_dict(
        random_params(width=64, layers=1, embed=16), activation="quick_gelu", heads=1
    )


@pytest.fixture(scope="package")
def model(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    minclip.save(params, path)
    return path


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("".join(text + "\n" for text in TEXTS))
    return path


@pytest.fixture
def output(tmp_path):
    return tmp_path / "features.npy"
