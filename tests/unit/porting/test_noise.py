"""minclip.diagnose tells quantization from bugs, names the format, and names a bug beside it."""

import numpy as np
import pytest

import minclip
from minclip.porting.noise import PARTS, Candidate, NoiseSearch
from minclip.porting.quantization import FORMATS
from minclip.porting.runs import Runs
from minclip.porting.search import Search
from minclip.porting.target import Target
from tests.benchmarks.diagnosis_table import port_features
from tests.support import oracles

FORMAT = {kind.id: kind for kind in FORMATS}


@pytest.fixture(scope="module")
def params():
    arrays = oracles.random_params(64, 3, 64, vocabulary=600, seed=8)
    return minclip.from_state_dict(arrays, activation="quick_gelu", heads=2)


@pytest.fixture(scope="module")
def tokens():
    return minclip.probe_tokens(77, 600)


def rounded_features(params, tokens, kind, bugs=(), parts=PARTS[1]):
    """Return the features of a port with quantized weights that shares no code with the catalogue."""
    return port_features(Candidate(FORMAT[kind], parts).apply(params, tokens), tokens, bugs)


@pytest.mark.parametrize("kind", FORMAT)
def test_quantized_weights_are_noise_and_the_format_is_named(params, tokens, kind):
    diagnosis = minclip.diagnose(params, tokens, rounded_features(params, tokens, kind))
    assert diagnosis.verdict == "noise", diagnosis
    assert diagnosis.findings == []
    summary = FORMAT[kind].summary
    assert diagnosis.notes[0].startswith(summary[0].upper() + summary[1:])


@pytest.mark.parametrize("parts", PARTS)
def test_the_matrices_that_are_quantized_are_named(params, tokens, parts):
    diagnosis = minclip.diagnose(params, tokens, rounded_features(params, tokens, "q8_0", parts=parts))
    assert f"in {parts}, explain" in diagnosis.notes[0]


@pytest.mark.parametrize(
    ("kind", "bug", "id"),
    [
        ("int8-row", "erf", "A1"),
        ("int8-row", "normalized", "N10"),
        ("int8-tensor", "no_mask", "M1"),
        ("q4_0", "kqv", "T1-kqv"),
        ("mlx-4", "eps_1e-6", "N1"),
    ],
)
def test_a_bug_beside_quantization_is_named(params, tokens, kind, bug, id):
    diagnosis = minclip.diagnose(params, tokens, rounded_features(params, tokens, kind, (bug,)))
    assert diagnosis.verdict == "known", diagnosis
    assert [fault.id for fault in diagnosis.findings[0].faults] == [id]
    assert "quantization explains" in diagnosis.findings[0].explanation


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_blocks_of_the_gguf_package_are_noise(params, tokens, kind):
    quantized = pytest.importorskip("tests.support.quantized")
    outside = [name for name in params if not name.startswith("transformer.")]
    features = port_features(quantized.with_gguf_blocks(params, kind, outside), tokens)
    diagnosis = minclip.diagnose(params, tokens, features)
    assert diagnosis.verdict == "noise"
    assert f"{kind.lower()} weights" in diagnosis.notes[0].lower()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_onnxruntimes_own_dynamic_quantization_is_noise(params, tokens, activation):
    quantized = pytest.importorskip("tests.support.quantized")
    options = quantized.ONNX["the products"]
    features = quantized.onnx_features(params, tokens, options, activation)
    diagnosis = minclip.diagnose(params, tokens, features)
    assert "dynamic quantization" in diagnosis.notes[0]
    if activation == "quick_gelu":
        assert diagnosis.verdict == "noise", diagnosis
    else:  # the erf GELU moves these features by a third of the noise
        named = [fault.id for finding in diagnosis.findings for fault in finding.faults]
        assert named == ["A1"] or "A1" in diagnosis.notes[-1]


def test_errors_of_the_same_size_are_not_noise(params, tokens):
    """Neither random numbers, nor a bug, nor the rounding of float16 passes for quantization."""
    clean = port_features(params, tokens)
    rng = np.random.default_rng(0)
    random = clean + 0.012 * np.std(clean) * rng.standard_normal(clean.shape).astype(np.float32)
    rounded = port_features(params.astype(np.float16).astype(np.float32), tokens)
    for features in (random, rounded, port_features(params, tokens, ("erf",)), clean):
        search = Search(target := Target(params, tokens, features), Runs(target))
        assert NoiseSearch(search).find() is None


def test_under_coarse_noise_the_bugs_that_cannot_be_excluded_are_named(params, tokens):
    """Codes of a format that is not in the list: 4 bits with groups of 16."""
    kind = FORMAT["q4_0"]
    q = Candidate(kind, PARTS[1]).apply(params, tokens)
    rng = np.random.default_rng(1)
    other = q.map(
        lambda a: (
            a + 0.3 * np.std(a) * 0.1 * rng.standard_normal(a.shape).astype(np.float32) if a.ndim == 2 else a
        )
    )
    diagnosis = minclip.diagnose(params, tokens, port_features(other, tokens))
    assert diagnosis.verdict == "noise", diagnosis
    assert "Too small to be excluded under it: " in diagnosis.notes[-1]
    assert "A1" in diagnosis.notes[-1]
