"""encode_text is CLIP's, to rounding: against two independent torch implementations at real sizes."""

import numpy as np
import pytest

import minclip
from tests.support.oracles import (
    SIZES,
    openai,
    random_params,
    random_tokens,
    relative,
    torch_encode_text,
    transformers_encode_text,
)

TORCH = {"torch": torch_encode_text, "transformers": transformers_encode_text}
TOKENS = random_tokens([2, 3, 9, 20, 77])


@pytest.fixture(scope="module", params=SIZES)
def tower(request):
    """(params, features in float64 by torch, and by minclip) at one real size."""
    params = random_params(**SIZES[request.param])
    wide = {name: array.astype(np.float64) for name, array in params.items()}
    return params, torch_encode_text(params, TOKENS, "float64"), minclip.encode_text(wide, TOKENS)


@pytest.mark.parametrize("oracle", TORCH)
def test_float32_equals_torch_and_is_as_near_the_truth(tower, oracle):
    params, truth, _ = tower
    ours = minclip.encode_text(params, TOKENS)
    theirs = TORCH[oracle](params, TOKENS)
    assert ours.dtype == np.float32
    assert relative(ours, theirs) <= 1e-5
    assert relative(ours, truth) <= 3 * relative(theirs, truth)


@pytest.mark.parametrize("oracle", TORCH)
def test_float64_equals_torch(tower, oracle):
    params, by_torch, ours = tower
    theirs = by_torch if oracle == "torch" else TORCH[oracle](params, TOKENS, "float64")
    assert relative(ours, theirs) <= 1e-12


@pytest.fixture(scope="module")
def half():
    """(params in float16, tokens, features in float64 by torch, and in float16 by minclip)."""
    params = {name: array.astype(np.float16) for name, array in random_params(width=256, layers=12).items()}
    tokens = random_tokens([2, 3, 9, 20, 77] * 8)  # of a few texts the ratio is what chance makes it
    return params, tokens, torch_encode_text(params, tokens, "float64"), minclip.encode_text(params, tokens)


@pytest.mark.parametrize("oracle", TORCH)
def test_float16_is_no_further_from_the_truth_than_torch(half, oracle):
    """Both start from the same float16 parameters; the truth is those in float64."""
    params, tokens, truth, ours = half
    assert ours.dtype == np.float16
    assert relative(ours, truth) <= relative(TORCH[oracle](params, tokens, "float16"), truth)


@pytest.mark.parametrize("oracle", TORCH)
@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-5), ("float64", 1e-12)])
def test_exact_gelu_and_other_heads_equal_torch(oracle, dtype, bar):
    params = random_params(width=144, layers=3, dtype=dtype)
    ours = minclip.from_state_dict(params, activation="gelu", heads=9)
    theirs = TORCH[oracle](params, TOKENS, dtype, activation="gelu", heads=9)
    assert relative(minclip.encode_text(ours, TOKENS), theirs) <= bar


def test_openais_own_class_and_its_state_dict():
    import torch

    torch.manual_seed(0)
    model = openai("model").CLIP(64, 32, 1, 64, 16, 77, 49408, 128, 2, 3).eval()
    with torch.no_grad():
        theirs = model.encode_text(torch.from_numpy(TOKENS).long()).numpy()
    plain = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert relative(minclip.encode_text(plain, TOKENS), theirs) <= 1e-5
    params = minclip.from_state_dict(model.state_dict(), activation="quick_gelu")
    assert not any(name.startswith("visual") for name in params)
    np.testing.assert_array_equal(minclip.encode_text(params, TOKENS), minclip.encode_text(plain, TOKENS))
