"""`minclip.fast.encode_text`: check the inputs and choose the CPU or the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.fast import cpu
from minclip.params import Floats, architecture, check_projection, check_tokens, trim


def encode_text(
    params: Mapping[str, Any],
    tokens: Any,
    *,
    progress: bool = False,
    nodes: int | None = None,
    texts: int | None = None,
) -> Floats:
    """Return the features of `minclip.encode_text`, to rounding, for a corpus of any size.

    params, tokens   as `minclip.encode_text` takes them
    progress         whether to show a progress bar on standard error
    nodes            how many different beginnings of texts to compute at once: 4096 per thread by default,
                     16384 on the GPU. Fewer take less memory: a beginning takes about 20 bytes per unit of
                     width on the GPU in float16 (170 MB by default at width 512)
    texts            on the GPU, how many texts to sort at once: 131072 by default, which takes about 32
                     bytes per position (90 MB for texts of 22 tokens)

    On the CPU, all threads of BLAS are used, and BLAS is limited to one thread meanwhile: the chunks of a
    corpus are computed side by side, up to 512 nodes by all threads together. Beside params, tokens and
    features this takes the working memory of one chunk per thread. float16 parameters are computed in
    float32, of which the call makes a copy.

    Returns features [..., E], not normalized, in the dtype and on the device of params. Raises and warns
    as `minclip.encode_text` does. On the GPU, raises ValueError where 8 does not divide the head width.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize([f"{n} red balloons" for n in range(1000)])
    >>> encode_text(params, tokens).shape
    (1000, 128)
    """
    architecture(params)  # raises where params does not fit
    tokens, leading = check_tokens(params, tokens)
    check_projection(params)
    P = params["text_projection"]
    if isinstance(P, np.ndarray):
        working = cpu.working_params(params)
        features = cpu.encode_corpus(working, trim(params, tokens), P.dtype, progress, nodes)
    else:
        from minclip.fast import gpu  # imports CuPy

        features = gpu.encode_corpus(params, trim(params, tokens), progress, nodes, texts)
    return features.reshape(*leading, P.shape[1])
