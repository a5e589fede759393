"""`minclip.fast.encode_text`: check the inputs and choose the CPU or the GPU."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.arrays import array_module
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

    On the CPU, one thread per core computes a part of the corpus, and BLAS is limited to one thread
    meanwhile. Beside params, tokens and features this takes one more copy of the blocks' parameters and the
    working memory of one part per thread. float16 parameters are computed in float32.

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
    if len(tokens) == 0:
        features = array_module(P).empty((0, P.shape[1]), P.dtype)
    elif isinstance(P, np.ndarray):
        features = cpu.encode_corpus(params, trim(params, tokens), progress, nodes)
    else:
        from minclip.fast import gpu  # imports CuPy

        features = gpu.encode_corpus(params, trim(params, tokens), progress, nodes, texts)
    return features.reshape(*leading, P.shape[1])
