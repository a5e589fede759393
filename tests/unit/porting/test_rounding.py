"""How far rounding moves each stage, which decides how far a correct port may be from the reference."""

import numpy as np
import torch

import minclip
from minclip.porting import rounding
from tests.support.oracles import random_params, random_tokens, relative

PARAMS = random_params(width=128, layers=3, embed=48, context=20, vocabulary=99)
TOKENS = random_tokens([5, 20, 2, 11], context=20, vocabulary=99)


def test_rounding_is_measured_where_it_arises():
    moved = rounding.measure_rounding(PARAMS, TOKENS, "float32")
    unit = 2**-24
    for name, (inherited, own) in moved.items():
        assert own <= 40 * unit, name
        assert inherited <= 100 * unit, name
    assert moved["token_embedding"] == moved["eot"] == (0, 0)
    assert moved["text_features"][0] > 2 * moved["transformer.resblocks.0.ln_1"][0]
    half = rounding.measure_rounding(PARAMS, TOKENS, "float16")["text_features"][0]
    brain = rounding.measure_rounding(PARAMS, TOKENS, "bfloat16")["text_features"][0]
    assert 3 < brain / half < 20  # three bits fewer
    features = minclip.encode_text(PARAMS, TOKENS).astype(np.float64)
    exact = minclip.encode_text({name: array.astype(np.float64) for name, array in PARAMS.items()}, TOKENS)
    np.testing.assert_allclose(moved["text_features"][0], relative(features, exact), rtol=0.5)


def test_bfloat16_is_rounded_as_torch_rounds_it():
    numbers = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 10.0 ** np.arange(
        -30, 30
    ).repeat(10_000 // 60 + 1)[:10_000].astype(np.float32)
    expected = torch.from_numpy(numbers).bfloat16().float().numpy()
    np.testing.assert_array_equal(rounding.round_to(numbers, "bfloat16"), expected)
