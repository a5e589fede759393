"""Make golden.npz with OpenAI's own clip/model.py: small random parameters, tokens, the features it gives.

    python -m tests.support.golden.make_golden

The file lets a machine without torch check encode_text against the reference itself. Parameters are kept in
float16, from which the reference computes in float32.
"""

from pathlib import Path

import numpy as np
import torch

from tests.support.oracles import openai_model, random_params, random_tokens

CONTEXT, VOCABULARY, WIDTH, LAYERS, EMBED = 77, 300, 128, 2, 48


def main():
    params = random_params(WIDTH, LAYERS, EMBED, CONTEXT, VOCABULARY, seed=7, dtype=np.float16)
    tokens = random_tokens([2, 3, 8, 41, 77], CONTEXT, VOCABULARY, seed=7)
    with torch.no_grad():
        features = openai_model(params).encode_text(torch.from_numpy(tokens).long()).numpy()
    np.savez_compressed(
        Path(__file__).with_name("golden.npz"), tokens=tokens.astype(np.int16), features=features, **params
    )


if __name__ == "__main__":
    main()
