"""Wrong answers to the lessons' exercises: each must be turned down with a message of its own.

WRONG[check name] lists (answer, words that the message must hold); tests/test_lessons.py tries them.
At least two for each check. The messages of one check must differ from each other.
"""

from itertools import pairwise

import numpy as np
import regex

WRONG = {}

# 01 Turn text into tokens


def merge_step_highest(pieces, ranks):
    pairs = [p for p in pairwise(pieces) if p in ranks]
    return join(pieces, max(pairs, key=ranks.get)) if pairs else pieces


def merge_step_first(pieces, ranks):
    pairs = [p for p in pairwise(pieces) if p in ranks]
    return join(pieces, pairs[0]) if pairs else pieces


def merge_step_all(pieces, ranks):
    pieces = list(pieces)
    while pairs := [p for p in pairwise(pieces) if p in ranks]:
        pieces = join(pieces, min(pairs, key=ranks.get))
    return pieces


def merge_step_in_place(pieces, ranks):
    pairs = [p for p in pairwise(pieces) if p in ranks]
    if pairs:
        pieces[:] = join(pieces, min(pairs, key=ranks.get))
    return pieces


def join(pieces, pair):
    at = next(i for i in range(len(pieces) - 1) if (pieces[i], pieces[i + 1]) == pair)
    return [*pieces[:at], "".join(pair), *pieces[at + 2 :]]


def bpe_with(letters, step):
    from minclip import tokenizer

    def bpe(word):
        pieces = step(letters(word), tokenizer.ranks())
        return [tokenizer.vocabulary()[piece] for piece in pieces]

    return bpe


def bytes_of(word):
    from minclip import tokenizer

    letters = [tokenizer.byte_characters()[b] for b in word.encode("utf-8")]
    return [*letters[:-1], letters[-1] + "</w>"]


def longest_match(pieces, ranks):
    from minclip import tokenizer

    word, out, vocabulary = "".join(pieces), [], tokenizer.vocabulary()
    while word:
        end = next(n for n in range(len(word), 0, -1) if word[:n] in vocabulary)
        out, word = [*out, word[:end]], word[end:]
    return out


WRONG["check_merge_step"] = [
    (merge_step_highest, "highest rank"),
    (merge_step_first, "first pair"),
    (merge_step_all, "more than one step"),
    (merge_step_in_place, "writes into its input"),
]
WRONG["check_bpe"] = [
    (bpe_with(lambda word: [*bytes_of(word)[:-1], bytes_of(word)[-1][0]], merge_step_all), "needs its </w>"),
    (bpe_with(lambda word: [*word[:-1], word[-1] + "</w>"], merge_step_all), "UTF-8 bytes"),
    (bpe_with(bytes_of, longest_match), "longest match"),
    (bpe_with(bytes_of, merge_step_first), "repeat the step"),
    (bytes_of, "look pieces up"),
]
WRONG["check_fit"] = [
    (lambda ids, n: (ids + [0] * n)[:n], "end id was cut off"),
    (lambda ids, n: ids if len(ids) <= n else [*ids[: n - 1], 49407], "pad with 0"),
    (lambda ids, n: [*ids[: n - 1], *[49407] * max(1, n - len(ids))], "not with the end id"),
    (lambda ids, n: [*ids, 49407][:n] + [0] * (n - len(ids)), "pad with 0"),
]
WRONG["check_split"] = [
    (str.split, "full stop"),
    (lambda text: regex.findall(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", text), "contractions"),
    (lambda text: regex.findall(r"'s|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+", text), "one at a time"),
    (lambda text: regex.findall(r"'s|[a-z]+|[0-9]|[^\sa-z0-9]+", text), r"\p{L}"),
    (lambda text: regex.findall(r"'s|\p{L}+|\p{N}|[^\s\p{L}\p{N}]", text), "run of signs"),
]

# 02 Look up embeddings


def one_hot(tokens, V, dtype=np.float32):
    return (tokens[:, None] == np.arange(V)).astype(dtype)


def add_in_place(x, positions):
    x += positions
    return x


def add_and_forget(x, positions):
    x + positions


def embed_with(pick, places):
    return lambda table, positions, tokens: pick(table, tokens) + places(positions, tokens)


WRONG["check_one_hot_lookup"] = [
    (lambda table, tokens: one_hot(tokens, len(table), float) @ table, "float64"),
    (lambda table, ids: (one_hot(ids, len(table)) * ids[:, None].astype("f")) @ table, "not the id"),
    (lambda table, tokens: table[tokens[0]], "one row of the table for each token"),
]
WRONG["check_embed"] = [
    (lambda table, positions, ids: table[ids] + positions, "slice"),
    (lambda table, positions, tokens: table[tokens], "positions are not in it"),
    (lambda table, positions, ids: table[ids] + positions[-ids.shape[1] :], "last rows"),
    (lambda table, positions, ids: table[ids] + positions[ids % 6], "looked up by token id"),
    (
        lambda table, positions, ids: table[ids] + positions[np.arange(1, ids.shape[1] + 1) % 6],
        "start at row 1",
    ),
]
WRONG["check_add_positions"] = [
    (add_in_place, "was written into"),
    (add_and_forget, "returns None"),
    (lambda x, positions: (x + positions).astype(float), "float64"),
]

# 03 Normalise a vector


# 04 Let tokens attend


# 05 Split into heads


# 06 Think at each position


# 07 Add it to the stream


# 08 Read out the sentence


# 09 Compare sentences


# 10 Choose a precision and a device


# 11 Make it fast


# 12 Debug a port
