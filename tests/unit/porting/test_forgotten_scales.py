"""minclip.diagnose names codes without their scales: which codes, and how their scales lay."""

import numpy as np
import pytest
import torch

import minclip
from minclip.porting.forgotten_scales import find_forgotten_scales
from minclip.porting.runs import Runs
from minclip.porting.search import Search
from minclip.porting.target import Target
from tests.support import oracles

FLOATS = {"fp8 (e4m3)": (torch.float8_e4m3fn, 448), "fp8 (e5m2)": (torch.float8_e5m2, 57344)}
CASES = [
    ("fp8 (e4m3)", "packed", False),
    ("fp8 (e4m3)", "rows", True),
    ("fp8 (e5m2)", "apart", False),
    ("fp8 (e5m2)", "packed", True),
    ("int8", "rows", False),
    ("int8", "apart", True),
]
TOLD = {"apart": "", "packed": ", one for q, k and v together,", "rows": ", one per row,"}


@pytest.fixture(scope="module")
def params():
    arrays = oracles.random_params(64, 2, 48, vocabulary=300, seed=9)
    return minclip.from_state_dict(arrays, activation="quick_gelu", heads=2)


@pytest.fixture(scope="module")
def tokens():
    return minclip.probe_tokens(24, 300)[:4]


def codes(matrix, kind, by_row):
    """Return the codes of a matrix as torch rounds them."""
    x = torch.from_numpy(np.ascontiguousarray(matrix))
    largest = x.abs().amax(1, keepdim=True) if by_row else x.abs().max()
    if kind == "int8":
        return torch.round(x / (largest / 127)).numpy()
    dtype, top = FLOATS[kind]
    return (x / (largest / top)).to(dtype).float().numpy()


def without_scales(params, kind, layout, projection):
    """Return params whose matrices are codes without their scales."""
    wrong = params.copy()
    for name, array in params.items():
        if name.startswith("transformer.") and array.ndim == 2:
            parts = np.split(array, 3) if "in_proj" in name and layout != "packed" else [array]
            wrong[name] = np.concatenate([codes(part, kind, layout == "rows") for part in parts])
    if projection:
        wrong["text_projection"] = codes(params["text_projection"].T, kind, layout == "rows").T
    return wrong


@pytest.mark.parametrize(("kind", "layout", "projection"), CASES)
def test_the_codes_and_the_layout_of_their_scales_are_named(params, tokens, kind, layout, projection):
    features = minclip.encode_text(without_scales(params, kind, layout, projection), tokens)
    diagnosis = minclip.diagnose(params, tokens, features)
    where = "the blocks' matrices" + " and the projection" * projection
    said = [fault.summary for fault in diagnosis.findings[0].faults]
    assert said == [f"{where} are {kind} codes whose scales{TOLD[layout]} were forgotten"], diagnosis


def test_a_dump_bears_out_forgotten_scales(params, tokens):
    dump = dict(minclip.trace(without_scales(params, "fp8 (e4m3)", "packed", False), tokens))
    diagnosis = minclip.diagnose(params, tokens, dump["text_features"], trace=dump)
    assert [fault.id for fault in diagnosis.findings[0].faults] == ["Q1-fp8-packed"]
    assert "The finding explains every stage of the dump." in diagnosis.notes


def test_codes_rounded_the_other_way_here_and_there_are_still_recognized(params, tokens):
    wrong = without_scales(params, "fp8 (e4m3)", "packed", False)
    matrix = wrong["transformer.resblocks.1.mlp.c_fc.weight"]
    matrix[::40, 5] *= np.float32(1.125)  # to the next code or so
    features = minclip.encode_text(wrong, tokens)
    assert [fault.id for fault in found(params, tokens, features)] == ["Q1-fp8-packed"]


ORDERS = (
    lambda x, most: x / (most / 127),
    lambda x, most: x * (127 / most),  # torch multiplies by most.reciprocal()
    lambda x, most: x * (127 / most.numpy()),
    lambda x, most: x * (1 / (most / 127)),
    lambda x, most: 127 * (x / most),
)


@pytest.mark.parametrize("divide", ORDERS)
def test_codes_are_exact_in_whatever_order_the_quantizer_divides(params, tokens, divide):
    right, wrong = params.copy(), params.copy()
    for name in [name for name in params if name.startswith("transformer.") and params[name].ndim == 2]:
        most = abs(params[name]).max()
        between_codes = np.floor(params[name] / most * 120) + np.float32(0.5)
        between_codes[0, 0] = 127
        x = torch.from_numpy(between_codes * most / np.float32(127))
        right[name], wrong[name] = x.numpy(), torch.round(divide(x, x.abs().max())).numpy()
    findings = minclip.diagnose(right, tokens, minclip.encode_text(wrong, tokens)).findings
    assert [fault.id for fault in findings[0].faults] == ["Q1-int8-packed"]
    assert findings[0].error < 1e-6


def test_matrices_that_are_too_large_but_no_codes_are_not_called_codes(params, tokens):
    wrong = params.copy()
    for name in [name for name in params if name.startswith("transformer.") and params[name].ndim == 2]:
        wrong[name] = params[name] * np.float32(448 / abs(params[name]).max())
    assert found(params, tokens, minclip.encode_text(wrong, tokens)) == ()


def found(params, tokens, features):
    """Return the faults that the search for forgotten scales finds."""
    search = Search(target := Target(params, tokens, features), Runs(target))
    findings = find_forgotten_scales(search, "float32")
    return findings[0].faults if findings else ()
