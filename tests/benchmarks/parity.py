"""Print how near minclip, torch and transformers are to each other and to float64 truth.

    python -m tests.benchmarks.parity

Random weights at the real sizes, 40 rows of 2 to 77 random ids. Figures are relative L2 distances. For
float16 both start from the same float16 weights, and the truth is those in float64.
"""

import platform

import numpy as np

import minclip
from tests.support.oracles import (
    SIZES,
    random_params,
    random_tokens,
    relative,
    torch_encode_text,
    transformers_encode_text,
)


def main():
    import torch
    import transformers

    tokens = random_tokens([2, 3, 9, 20, 77] * 8)
    print(
        f"numpy {np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}\n"
    )
    print(
        "| text tower of | minclip − torch | minclip − transformers | minclip − truth | torch − truth "
        "| minclip − torch, float64 | float16: error / torch's |\n" + "|---" * 7 + "|"
    )
    for name, size in SIZES.items():
        params = random_params(**size)
        wide = {key: array.astype(np.float64) for key, array in params.items()}
        truth = torch_encode_text(params, tokens, "float64")
        ours, theirs = minclip.encode_text(params, tokens), torch_encode_text(params, tokens)
        row = [
            relative(ours, theirs),
            relative(ours, transformers_encode_text(params, tokens)),
            relative(ours, truth),
            relative(theirs, truth),
            relative(minclip.encode_text(wide, tokens), truth),
        ]
        half = {key: array.astype(np.float16) for key, array in params.items()}
        truth = torch_encode_text(half, tokens, "float64")
        error = relative(minclip.encode_text(half, tokens), truth)
        error_of_torch = relative(torch_encode_text(half, tokens, "float16"), truth)
        figures = [f"{value:.1e}" for value in row] + [f"{error / error_of_torch:.2f}"]
        print(f"| {name} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
