"""See inside: every intermediate of the encoder by name, and the tokens that bring bugs to light."""

import numpy as np

from minclip import model


class Trace(dict):
    """Every stage of one run: a dict from stage name to array, in the order of computation.

    params   the parameters it was made with
    tokens   the tokens it was made of
    """

    def __init__(self, stages, *, params=None, tokens=None):
        super().__init__(stages)
        self.params = params
        self.tokens = tokens


def trace(params, tokens):
    """Run the encoder and keep every stage: a `Trace`, from stage name to array, in order.

    All L positions given are computed at every stage, those after the end of text too. Each array is
    a copy of its own, on the device and in the dtype of params; B is the product of the leading axes
    of tokens [..., L]. Raises ValueError where tokens or params do not fit, as `encode_text` does.
    """
    stages = {}

    def record(name, array):
        stages[name] = array.copy()
        return array

    model.encode_text(params, tokens, tap=record)
    return Trace(stages, params=params, tokens=tokens.copy() if hasattr(tokens, "copy") else np.array(tokens))


def probe_tokens(context_length=77, vocabulary=49408):
    """Tokens that tell a wrong port from a right one: int32 [7, context_length].

    What each row is for (some bugs show only where texts are padded with the end-of-text id, hold
    id 0 or are longer than 41 tokens; many checks in use are a single short text and see little):

        0  one ordinary id, padded with 0, as clip.tokenize pads
        1  the ids at the edges of the vocabulary, padded with 0
        2  padded with the end-of-text id, as Hugging Face pads
        3  id 0 ("!") inside and at the end of the text, padded with 0
        4  id 0 at its start, padded with the end-of-text id
        5  more than 41 tokens, but not full
        6  full: the end of text is the last position

    Seven rows, since a mask that only fits one row, or as many rows as there are heads, shows then.
    Raises ValueError for a context or a vocabulary too small to hold them.
    """
    C, V = context_length, vocabulary
    if C < 8 or V < 16:
        raise ValueError(f"probe tokens need a context of 8 and 16 ids, not {C} and {V}")
    start, end = V - 2, V - 1
    # Ordinary ids by a fixed rule, spread over the vocabulary: the same in any language and release.
    ids = [1 + (7919 * (n + 1)) % (V - 3) for n in range(C)]
    texts = (
        (ids[:1], 0),
        ([1, V - 3, 2, V - 4], 0),
        (ids[1:4], end),
        ([ids[4], 0, ids[5], 0, 0], 0),
        ([0, ids[6], 0, ids[7]], end),
        (ids[8 : 8 + max(C * 2 // 3 - 2, 1)], 0),
        (ids[: C - 2][::-1], 0),
    )
    tokens = np.empty((len(texts), C), dtype=np.int32)
    for row, (text, padding) in zip(tokens, texts, strict=True):
        row[:] = padding
        row[: len(text) + 2] = [start, *text, end]
    return tokens
