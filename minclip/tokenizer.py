"""CLIP's tokenizer: text to ids by byte-pair encoding, id for id what clip.tokenize gives.

clean      mend broken Unicode (ftfy), undo HTML entities, one space between words, lower case
split      words, contractions, single digits and runs of anything else, by a regular expression
bytes      a word's UTF-8 bytes, each written as a printable character; the last one ends in </w>
merge      the two neighbours that come first in the list of merges, again and again
number     each piece by its place in the vocabulary: 256 bytes, 256 bytes with </w>,
           48,894 merges, start of text (49406), end of text (49407)

The merges are OpenAI's (bpe_simple_vocab_16e6.txt.gz, of which CLIP uses lines 2 to 48,895).
Parity is with ftfy 6.3: what becomes of mojibake depends on ftfy's version, upstream too.
"""

import functools
import gzip
import heapq
import html
import itertools
from collections.abc import Iterable
from importlib import resources

import ftfy
import numpy as np
import regex
from numpy.typing import ArrayLike

from minclip.params import Tokens

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# regex and not re: \p{L} and \p{N}, and its \s and its IGNORECASE (ſ is an s) are the reference's.
PIECES = regex.compile(
    r"<\|(?:start|end)oftext\|>|'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
SPACES = regex.compile(r"\s+")


def tokenize(
    texts: str | Iterable[str], context_length: int = 77, truncate: bool = False, pad: int = 0
) -> Tokens:
    """Return token ids of one text or of an iterable of texts: int32 [B, context_length], padded with pad.

    Each row is the start id 49406, the ids of the text, the end id 49407, and padding: 0 as OpenAI pads,
    pad=49407 as Hugging Face and Stable Diffusion pad. A text that is too long for the context raises
    ValueError; with truncate=True it loses its tail and keeps the end id.
    Follows clip.tokenize and clip/simple_tokenizer.py of openai/CLIP.

    >>> tokenize("a photo of a cat")[0, :8].tolist()
    [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    """
    if isinstance(texts, bytes | bytearray) or not hasattr(texts, "__iter__"):
        raise TypeError(f"texts must be a str or a list of str, not {type(texts).__name__}")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if context_length < 2:
        raise ValueError(f"context_length must hold at least a start and an end, not {context_length}")
    tokens = np.full((len(texts), context_length), pad, dtype=np.int32)
    start, end = vocabulary()[START], vocabulary()[END]
    for i, text in enumerate(texts):
        ids = [start, *encode(text, i), end]
        if len(ids) > context_length:
            if not truncate:
                shown = text if len(text) <= 60 else text[:57] + "..."
                raise ValueError(
                    f"text {i} is {len(ids)} tokens long, start and end included, and the context holds "
                    f"{context_length}: shorten it or pass truncate=True: {shown!r}"
                )
            ids[context_length - 1 :] = [end]
        tokens[i, : len(ids)] = ids
    return tokens


def decode(tokens: ArrayLike) -> list[str]:
    """The texts of token ids [L] or [B, L], as a list of str: the inverse of `tokenize`, up to its cleaning.

    Reads from the start id, if there is one, to the first end id. Bytes that are not UTF-8 become U+FFFD.

    >>> decode(tokenize(["A photo", "of a cat!"]))
    ['a photo', 'of a cat !']
    """
    pieces, byte_of = spellings(), {c: b for b, c in byte_characters().items()}
    start, end = vocabulary()[START], vocabulary()[END]
    texts = []
    for ids in np.atleast_2d(np.asarray(tokens)).tolist():
        ids = ids[: ids.index(end)] if end in ids else ids
        if not all(0 <= id < len(pieces) for id in ids):
            raise ValueError(f"token ids must be from 0 to {len(pieces) - 1}, not {min(ids)} to {max(ids)}")
        spelled = "".join(pieces[id] for id in ids if id != start).replace(WORD_END, " ")
        raw = b"".join(b" " if c == " " else bytes([byte_of[c]]) for c in spelled)
        texts.append(raw.decode("utf-8", errors="replace").strip())
    return texts


def encode(text, position=0):
    """The ids of one text, without start and end. position is its place in the batch, for the error."""
    if not isinstance(text, str):
        raise TypeError(f"text {position} must be a str, not {type(text).__name__}")
    return [id for word in PIECES.findall(clean(text)) for id in known_ids(word)]


def clean(text):
    """text as the reference sees it: mended, unescaped, single-spaced, lower case."""
    # ftfy is most of the time spent here, and leaves plain printable ASCII as it is.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return SPACES.sub(" ", text.strip()).strip().lower()


def known_ids(word):
    """The ids of one piece of text, remembered if it is of a length that comes again."""
    return remembered_ids(word) if len(word) <= 32 else word_ids(word)


def word_ids(word):
    """The ids of one piece of text: its bytes, merged."""
    ids = vocabulary()
    if word in (START, END):
        return (ids[word],)
    letters = byte_characters()
    symbols = [letters[b] for b in word.encode("utf-8")]
    symbols[-1] += WORD_END
    return tuple(ids[symbol] for symbol in merge(symbols))


remembered_ids = functools.lru_cache(maxsize=2**16)(word_ids)


def merge(symbols):
    """Join neighbours by rank, the lowest first and of equals the leftmost, until no pair has a rank.

    A joined pair only ever makes pairs of higher rank, so one heap of candidates does it in n log n steps.

    >>> merge(["c", "a", "t</w>"])
    ['cat</w>']
    """
    rank = ranks()
    symbols, n = list(symbols), len(symbols)
    left, right = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(rank[pair], i, pair) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in rank]
    heapq.heapify(heap)
    while heap:
        _, i, pair = heapq.heappop(heap)
        j = right[i]
        if j == n or (symbols[i], symbols[j]) != pair:
            continue  # one of the two has been joined to something else since
        symbols[i], symbols[j] = symbols[i] + symbols[j], None
        right[i] = right[j]
        if right[j] < n:
            left[right[j]] = i
        for a, b in ((left[i], i), (i, right[i])):
            if a >= 0 and b < n and (symbols[a], symbols[b]) in rank:
                pair = symbols[a], symbols[b]
                heapq.heappush(heap, (rank[pair], a, pair))
    return [symbol for symbol in symbols if symbol is not None]


@functools.cache
def byte_characters():
    """A printable character for each of the 256 bytes: Latin-1's where it is one, else from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in own]
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def ranks():
    """Each pair of the list of merges, by its place in it."""
    packed = resources.files(__package__).joinpath("merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return {tuple(line.split(" ")): i for i, line in enumerate(lines)}


@functools.cache
def spellings():
    """The vocabulary, id by id: 49,408 strings."""
    letters = list(byte_characters().values())
    merged = [a + b for a, b in ranks()]
    return [*letters, *(c + WORD_END for c in letters), *merged, START, END]


@functools.cache
def vocabulary():
    """The id of each spelling."""
    return {spelling: id for id, spelling in enumerate(spellings())}
