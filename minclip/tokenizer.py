"""CLIP's tokenizer: text to ids by byte-pair encoding, with the same ids as clip.tokenize.

A text becomes ids in five steps:

clean      repair broken Unicode (ftfy), unescape HTML, collapse white space, lower-case
split      find words, contractions, single digits and runs of other characters, with a regular expression
bytes      write each byte of a word's UTF-8 as a printable character, and append </w> to the last one
merge      join the two neighbors that come first in the list of merges, until no neighbors are in the list
number     look up each piece in the vocabulary: 256 bytes, 256 bytes with </w>,
           48,894 merges, start of text (49406), end of text (49407)

The merges are OpenAI's: lines 2 to 48,895 of bpe_simple_vocab_16e6.txt.gz.
Ids of mojibake depend on the version of ftfy, in OpenAI's tokenizer too. minclip requires ftfy 6.3.
"""

from __future__ import annotations

import functools
import gzip
import heapq
import html
import itertools
from collections.abc import Iterable
from importlib import resources
from typing import Any

import numpy as np
import regex
from numpy.typing import ArrayLike

from minclip.params import Tokens, as_ids, check_int

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# The regex module, not re: the reference relies on its \p{L} and \p{N}, its \s, and its IGNORECASE, for which
# ſ is an s.
PIECES = regex.compile(
    r"<\|(?:start|end)oftext\|>|'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
SPACES = regex.compile(r"\s+")
LONGEST_REMEMBERED = 32  # characters; longer words rarely repeat


def tokenize(
    texts: str | Iterable[str], context_length: int = 77, truncate: bool = False, pad: int = 0
) -> Tokens:
    """Return the token ids of one text or of several: int32 [B, context_length].

    Each row holds the start id 49406, the ids of the text, the end id 49407, and padding.

    texts            a str, or an iterable or NumPy array of str
    context_length   the length of a row; 77 in OpenAI's models
    truncate         whether to cut a text that is too long. Its row then still ends with the end id
    pad              the id of padding: 0 as in clip.tokenize, or 49407 as in Hugging Face's tokenizer and
                     Stable Diffusion

    Raises TypeError for anything but str, and ValueError for a text that is too long, with the remedy.
    Follows `tokenize` of clip/clip.py and clip/simple_tokenizer.py of openai/CLIP.

    >>> tokenize("a photo of a cat")[0, :8].tolist()
    [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    """
    texts = as_texts(texts)
    check_row(context_length, pad)
    tokens = np.full((len(texts), context_length), pad, dtype=np.int32)
    start, end = vocabulary()[START], vocabulary()[END]
    for i, text in enumerate(texts):
        ids = [start, *encode(text, i), end]
        if len(ids) > context_length:
            if not truncate:
                shown = text if len(text) <= 60 else text[:57] + "..."
                raise ValueError(
                    f"text {i} is {len(ids)} tokens long, start and end included, but the context holds "
                    f"{context_length}: shorten it or pass truncate=True: {shown!r}"
                )
            ids[context_length - 1 :] = [end]
        tokens[i, : len(ids)] = ids
    return tokens


def as_texts(texts: Any) -> list[str]:
    """Return texts as a list. Raise TypeError for anything but a str, or an iterable or array of str."""
    if isinstance(texts, np.ndarray) and texts.ndim == 0:
        texts = texts.item()
    if isinstance(texts, bytes | bytearray) or not hasattr(texts, "__iter__"):
        raise TypeError(f"texts must be a str or a list of str, not {type(texts).__name__}")
    return [texts] if isinstance(texts, str) else list(texts)


def check_row(context_length: Any, pad: Any) -> None:
    """Raise TypeError or ValueError unless rows of that length can be made with that padding."""
    if isinstance(context_length, str):
        raise TypeError("context_length must be an int, not str: give several texts as a list")
    check_int("context_length", context_length)
    check_int("pad", pad)
    if context_length < 2:
        raise ValueError(
            f"context_length must be at least 2, for the start and end ids, not {context_length}"
        )
    if not 0 <= pad < 2**31:
        raise ValueError(f"pad must be the id of a token, not {pad}")


def decode(tokens: ArrayLike) -> list[str]:
    """Return the texts of token ids [L] or [B, L].

    The inverse of `tokenize`, except for cleaning: texts come back in lower case, with a space after each
    piece. Each row is read up to its first end id. Bytes that are not UTF-8 become U+FFFD.
    Raises ValueError for tokens that are no integers, or an id outside the vocabulary.

    >>> decode(tokenize(["A photo", "of a cat!"]))
    ['a photo', 'of a cat !']
    """
    pieces, byte_of = spellings(), {c: b for b, c in byte_characters().items()}
    start, end = vocabulary()[START], vocabulary()[END]
    texts = []
    for row in np.atleast_2d(as_ids(tokens)).tolist():
        ids = row[: row.index(end)] if end in row else row
        wrong = [id for id in ids if not 0 <= id < len(pieces)]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary, 0 to {len(pieces) - 1}")
        spelled = "".join(pieces[id] for id in ids if id != start).replace(WORD_END, " ")
        raw = b"".join(b" " if c == " " else bytes([byte_of[c]]) for c in spelled)
        texts.append(raw.decode("utf-8", errors="replace").strip())
    return texts


def encode(text, position=0):
    """Return the ids of one text, without start and end, as a list.

    position is the place of the text in its batch. The TypeError for anything but a str names it.
    """
    if not isinstance(text, str):
        raise TypeError(f"text {position} must be a str, not {type(text).__name__}")
    ids = []
    for run in clean(text).split(" "):  # no piece contains white space, so each run has ids of its own
        ids += remembered_ids(run) if len(run) <= LONGEST_REMEMBERED else run_ids(run)
    return ids


def clean(text):
    """Return text as the reference cleans it: repaired, unescaped, single-spaced and in lower case.

    >>> clean("  It\u2019s  AT&amp;T ")
    "it's at&t"
    """
    # ftfy takes most of the time. It leaves printable ASCII without "&" unchanged, where the only white space
    # is the space itself.
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split()).lower()
    import ftfy  # here, because it takes time to import

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return SPACES.sub(" ", text).strip().lower()


def run_ids(run):
    """Return the ids of a run of characters without white space, as a tuple."""
    return tuple(id for word in PIECES.findall(run) for id in word_ids(word))


remembered_ids = functools.lru_cache(maxsize=2**16)(run_ids)


def word_ids(word):
    """Return the ids of one match of PIECES, as a tuple: its bytes, merged.

    >>> word_ids("hatbox")
    (3447, 2063)
    """
    ids = vocabulary()
    if word in (START, END):
        return (ids[word],)
    letters = byte_characters()
    symbols = [letters[b] for b in word.encode("utf-8")]
    symbols[-1] += WORD_END
    return tuple(ids[symbol] for symbol in merge(symbols))


def merge(symbols):
    """Return symbols with neighbors joined, in the order of the list of merges, until no neighbors are in it.

    Of equal pairs the leftmost is joined first. Joining a pair only creates pairs that come later in the
    list, so a heap of candidates merges n symbols in n log n steps.

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
            continue  # one of the two has since been joined to another neighbor
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
    """Return the printable character of each of the 256 bytes, as a dict.

    A byte that is a printable character of Latin-1 is that character. The others are U+0100 and following.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in own]
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def ranks():
    """Return the position of each pair in the list of merges, as a dict."""
    packed = resources.files(__package__).joinpath("merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return {tuple(line.split(" ")): i for i, line in enumerate(lines)}


@functools.cache
def spellings():
    """Return the vocabulary in the order of its ids, as a list of 49,408 strings."""
    letters = list(byte_characters().values())
    merged = [a + b for a, b in ranks()]
    return [*letters, *(c + WORD_END for c in letters), *merged, START, END]


@functools.cache
def vocabulary():
    """Return the id of each string of the vocabulary, as a dict."""
    return {spelling: id for id, spelling in enumerate(spellings())}
