"""minclip.check_weights recognizes a port's arrays by value and names every slip in full."""

import numpy as np
import pytest

import minclip
from minclip.porting.quantization import FORMATS
from minclip.porting.rounding import round_to
from tests.support import foreign_weights, oracles, weight_slips

NAMELESS = {(foreign_weights.onnx_legacy, weight_slips.q_and_k_swapped)}  # two matrices, neither with a name
INT8 = next(kind for kind in FORMATS if kind.id == "int8-row")
Q8_0 = next(kind for kind in FORMATS if kind.id == "q8_0")
FINE = {weight_slips.fine_tuned, weight_slips.special_rows_altered}  # as small as int8's own rounding


@pytest.fixture(scope="module")
def params():
    arrays = oracles.random_params(64, 4, 64, vocabulary=300, seed=3)
    return minclip.from_state_dict(arrays, activation="quick_gelu", heads=foreign_weights.HEADS)


def coarse(params, precision):
    """Return the arrays of params at a precision: a float format's name, or a quantizer for the matrices."""
    if isinstance(precision, str):
        return {name: round_to(array, precision) for name, array in params.items()}
    return {name: precision(array) if array.ndim == 2 else array for name, array in params.items()}


def not_named(check, wanted):
    """Return the findings that a check lacks and those that it has beyond the wanted ones."""
    spare, lacking = list(check.findings), []
    for kinds, place, found in wanted:
        named = [f for f in spare if f.kind in kinds and (f.wanted or f.found) == place and f.found == found]
        lacking += [] if named else [(kinds, place, found)]
        spare = [f for f in spare if f not in named]
    return lacking, spare


def check_slip(params, slip, dialect, precision="float32"):
    arrays = {name: array.copy() for name, array in params.items()}
    slip(arrays)
    check = minclip.check_weights(params, dialect(coarse(arrays, precision)))
    assert not_named(check, weight_slips.SLIPS[slip]) == ([], []), (dialect.__name__, check)
    assert check.verdict == ("incomplete" if all(f.kind == "missing" for f in check.findings) else "wrong")


@pytest.mark.parametrize("dialect", foreign_weights.DIALECTS)
def test_a_correct_conversion_agrees(params, dialect):
    for precision in ("float32", "float64", "float16", "bfloat16", INT8, Q8_0):
        check = minclip.check_weights(params, dialect(coarse(params, precision)))
        assert check.verdict == "agrees", (precision, check)
        assert {match.found for match in check.matches} >= {"text_projection", "token_embedding.weight"}


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.id)
def test_quantized_weights_agree_and_the_format_is_named(params, kind):
    check = minclip.check_weights(params, foreign_weights.hugging_face(coarse(params, kind)))
    assert check.verdict == "agrees", check
    named = [match.rounding for match in check.matches if match.found.endswith("mlp.c_fc.weight")]
    assert named == [kind.summary] * 4


def test_a_model_with_equal_tensors_raises_no_alarm_and_hides_no_slip(params):
    """A fresh model has biases of zeros and norms of ones in every layer."""
    arrays = {n: a if a.ndim == 2 else np.full_like(a, n.endswith("weight")) for n, a in params.items()}
    fresh = params.with_arrays(arrays)
    for dialect in foreign_weights.DIALECTS:
        assert minclip.check_weights(fresh, dialect(fresh)).verdict == "agrees", dialect
    wrong = {name: array.copy() for name, array in fresh.items()}
    weight_slips.k_from_q(wrong)
    check = minclip.check_weights(fresh, foreign_weights.keras(wrong))
    assert not_named(check, weight_slips.SLIPS[weight_slips.k_from_q]) == ([], [])


@pytest.mark.parametrize("slip", weight_slips.SLIPS, ids=lambda slip: slip.__name__)
def test_a_slip_is_named_with_its_tensor_in_every_layout_and_nothing_else_is(params, slip):
    for dialect in foreign_weights.DIALECTS:
        if (dialect, slip) not in NAMELESS:
            check_slip(params, slip, dialect)


@pytest.mark.parametrize(
    "slip", [s for s in weight_slips.SLIPS if s not in FINE], ids=lambda slip: slip.__name__
)
def test_a_slip_is_named_in_bfloat16_and_int8(params, slip):
    check_slip(params, slip, foreign_weights.keras, "bfloat16")
    check_slip(params, slip, foreign_weights.openai, INT8)
