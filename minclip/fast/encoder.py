"""`minclip.fast.Encoder`: parameters prepared once, to answer one text or a few quickly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip import tokenizer
from minclip.fast import cpu
from minclip.fast.blas import one_blas_thread
from minclip.fast.twigs import Prefixes, grow
from minclip.params import END_OF_TEXT, Floats, architecture, check_projection, check_tokens, trim

START_OF_TEXT = 49406  # the first id of each row of minclip.tokenize


class Encoder:
    """A text tower that answers one text or a few as quickly as NumPy can.

    `encoder(tokens)` returns the features of `minclip.encode_text(params, tokens)`, to rounding.

    The technique: one text has few rows, so a product mainly reads the weights from memory. Each core reads
    a share of them: some heads of attention, some columns of the MLP. BLAS would copy each weight before it
    multiplies, so few rows are multiplied in small products or one by one, which copy nothing. Several texts
    are one tree: their common beginnings are computed once, and nothing is padded. Attention is causal, so
    the keys and values of a known beginning need not be computed at all: `warm` keeps those of a template,
    and the Encoder itself those of the start of text.

    params   as `minclip.encode_text` takes them, on the CPU. float32 and float64 arrays are shared, not
             copied: do not change them. For float16 parameters, an Encoder keeps a float32 copy and the token
             embedding: the originals may be deleted

    Several threads may call an Encoder at once. It keeps no threads and no locks between calls, so it can
    be forked and pickled, and there is nothing to close. A pickle holds the parameters.

    Raises ValueError where params has no text_projection, or lives on a GPU.

    >>> import minclip
    >>> encoder = Encoder(minclip.load())
    >>> encoder.warm("a photo of a")
    >>> encoder(minclip.tokenize("a photo of a cat")).shape
    (1, 128)
    """

    def __init__(self, params: Mapping[str, Any]):
        check_projection(params)
        layers, _, _ = architecture(params)
        if not isinstance(params["text_projection"], np.ndarray):
            raise ValueError("an Encoder needs params on the CPU: on a GPU call minclip.fast.encode_text")
        self.params = cpu.working_params(params)
        self.dtype = params["text_projection"].dtype
        self.prefixes = no_prefixes(layers, self.params)
        if len(params["token_embedding.weight"]) > START_OF_TEXT:
            self.warm("")

    def __repr__(self) -> str:
        return f"Encoder of {self.params!r}, features in {self.dtype}"

    def __call__(self, tokens: Any) -> Floats:
        """Return features [..., E] of tokens [..., L], as `minclip.encode_text` does."""
        tokens, leading = check_tokens(self.params, tokens)
        features = cpu.encode_corpus(
            self.params, trim(self.params, tokens), self.dtype, prefixes=self.prefixes
        )
        return features.reshape(*leading, features.shape[1])

    def warm(self, beginning: str) -> None:
        """Compute the keys and values of a beginning of texts once, such as "a photo of a".

        Features stay the same, to rounding. A beginning takes 8 bytes per id, layer and unit of width:
        250 KB for "a photo of a" at ViT-B/32's size. If two threads warm at once, one beginning may be
        forgotten, which costs time only.

        Raises ValueError where the text is too long, or the vocabulary is not that of minclip.tokenize.
        """
        ids = [START_OF_TEXT, *tokenizer.encode(beginning)]
        check_tokens(self.params, [*ids, END_OF_TEXT if self.params.eot is None else self.params.eot])
        row, length = np.array([ids]), np.array([len(ids)])
        prefixes = self.prefixes
        if prefixes.match(row)[0] == length:
            return
        tree = grow(row, length, np.array([0]), prefixes)
        kv = np.empty((*prefixes.kv.shape[:2], len(tree.ids), prefixes.kv.shape[3]), prefixes.kv.dtype)
        with one_blas_thread() as threads:
            cpu.encode_tree(self.params, tree, threads, prefixes, kv)
        self.prefixes = prefixes.extended(ids, tree.known, kv[:, :, : len(ids) - len(tree.known)])


def no_prefixes(layers, params):
    """Return Prefixes that know nothing yet."""
    L, D = params["positional_embedding"].shape
    kv = np.empty((layers, 2, 0, D), params["text_projection"].dtype)
    return Prefixes(np.full((1, L), -2), np.zeros((1, L), int), kv)
