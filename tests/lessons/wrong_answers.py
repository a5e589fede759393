"""Wrong answers to the lessons' exercises: each must be turned down with a message of its own.

WRONG[check name] lists (answer, words that the message must hold); tests/test_lessons.py tries them.
At least three for each check, one of them nearly right: it has the right form, and one thing is wrong.
"""

import math
from itertools import pairwise

import checks
import numpy as np
import regex

import minclip
from minclip import tokenizer

WRONG = {}

# 00 Watch it work

RIGHT_GUESSES = checks.best_letters()
NEXT_LETTER = {"A": "B", "B": "C", "C": "A"}
SHORT_NAMES = [name for name in minclip.pictures()[1][::40] if name.isalpha()]
WORDS = [name for name in SHORT_NAMES if checks.order_of(f"a {name}")[0] == name]

WRONG["check_guesses"] = [
    ({number: NEXT_LETTER[letter] for number, letter in RIGHT_GUESSES.items()}, "0 of 5 guesses agree"),
    ({**RIGHT_GUESSES, 4: NEXT_LETTER[RIGHT_GUESSES[4]]}, "4 of 5 guesses agree"),
    ({number: RIGHT_GUESSES[number] for number in range(1, 5)}, "without a guess: [5]"),
    ({**RIGHT_GUESSES, 2: "watch"}, "look at [2]"),
    ("ABCAB", "write a letter for each sentence"),
]
WRONG["check_riddle"] = [
    (("these are two good words", WORDS[0] + "x"), "no picture is called"),
    (("a " + WORDS[0], WORDS[0]), "at least four words"),
    ((f"a photo of two {WORDS[0]}s", WORDS[0]), "gives the name away"),
    ((f"a photo of a {WORDS[0]}", WORDS[-1]), "first; "),
    ("a small pet that says meow", "write your sentence and a name"),
]
NOT_DENIED = next(
    text for text in (f"a {name}, no doubt about it" for name in WORDS) if checks.order_of(text)[0] in text
)
WRONG["check_failure"] = [
    (f"a {WORDS[0]}", "denies nothing"),
    (NOT_DENIED, "and rightly so"),
    ("nothing", "which your sentence does not name"),
    (("no dogs", "dog"), "write a sentence"),
]

# 01 Turn text into tokens


def joined(pieces, i):
    return [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def merge_by(choose, once=False):
    """A merge that joins the place that choose takes from a list of (rank, place)."""

    def merge(pieces, ranks):
        while ranked := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
            pieces = joined(pieces, choose(ranked)[1])
            if once:
                break
        return list(pieces)

    return merge


right_merge = merge_by(min)


def merge_in_place(pieces, ranks):
    pieces[:] = right_merge(pieces, ranks)
    return pieces


def longest_match(pieces, ranks):
    word, out, known = "".join(pieces), [], set(map("".join, ranks)) | set(pieces)
    while word:
        end = next(n for n in range(len(word), 0, -1) if word[:n] in known)
        out, word = [*out, word[:end]], word[end:]
    return out


def bytes_of(word):
    return [tokenizer.byte_characters()[b] for b in word.encode("utf-8")]


def with_end(symbols):
    return [*symbols[:-1], symbols[-1] + "</w>"]


def row_with(symbols=lambda word: with_end(bytes_of(word)), split=tokenizer.PIECES.findall, start=(49406,),
             end=(49407,), pad=0, clean=tokenizer.clean, keep_end=True):  # fmt: skip
    """row(text, context_length) with every slip as an option."""

    def row(text, context_length):
        ids = list(start)
        for word in split(clean(text)):
            merged = right_merge(symbols(word), tokenizer.ranks())
            ids += [tokenizer.vocabulary()[piece] for piece in merged]
        if keep_end:
            ids = ids[: context_length - 1]
        ids = [*ids, *end][:context_length]
        return ids + [pad] * (context_length - len(ids))

    return row


def split_by(pattern):
    return lambda text: regex.findall(pattern, text)


WRONG["check_toy_merges"] = [
    ({"lower": "low er</w>", "newer": "new er</w>"}, "w + er</w> (4) comes before"),
    ({"lower": "lo wer</w>", "newer": "ne wer</w>"}, "lo + w (2), not"),
    ({"lower": "lower</w>", "newer": "newer</w>"}, "low + er</w> is not on the list"),
    ({"lower": "low er</w>", "newer": "ne w er</w>"}, "one more pair"),
    ({"lower": "low er", "newer": "ne wer"}, "keeps its </w>"),
    ({"lower": "low er</w>"}, "lower and newer"),
    ({"lower": ["low", "er</w>"], "newer": "ne wer</w>"}, "keeps its </w>"),
    ("low er</w>", "lower and newer"),
]
WRONG["check_split"] = [
    (str.split, "full stop"),
    (split_by(r"'s|\p{L}+|\p{N}|\S+"), "starts no contraction"),
    (split_by(r"'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|\S+"), "starts no contraction"),
    (split_by(r"'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}']+|'"), "ends before a digit"),
    (split_by(r"'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{N}']+|'"), "ends before a letter"),
    (split_by(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "'s is one piece"),
    (split_by(r"'s|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "and so are 't"),
    (split_by(r"'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+"), "one at a time"),
    (split_by(r"'(?:[stmd]|re|ve|ll)|[a-z]+|\p{N}|[^\sa-z\p{N}]+"), r"\p{L}"),
    (split_by(r"'(?:[stmd]|re|ve|ll)|\p{L}+|\d|[^\s\p{L}\d]+"), r"\p{N}"),
    (split_by(r"'(?:[stmd]|re|ve|ll)|\w+|[^\s\w]+"), "one at a time"),
    (split_by(r"'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^ \p{L}\p{N}]+"), "white space"),
    (split_by(r"'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]"), "run of signs is one"),
    (split_by(r"'([stmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "write (?:...)"),
    (lambda text: 5, "does not have the form"),
]
WRONG["check_merge"] = [
    (merge_by(max), "highest rank"),
    (merge_by(lambda ranked: ranked[0]), "from left to right"),
    (merge_by(lambda ranked: min(ranked, key=lambda pair: (pair[0], -pair[1]))), "the leftmost"),
    (merge_by(min, once=True), "repeat until"),
    (longest_match, "became"),
    (lambda pieces, ranks: longest_match(pieces, ranks) if len(pieces) > 9 else right_merge(pieces, ranks),
     "longest match"),
    (merge_in_place, "writes into its input"),
    (lambda pieces, ranks: " ".join(right_merge(pieces, ranks)), "a list of pieces"),
    (lambda pieces, ranks: pieces[5], "IndexError"),
]  # fmt: skip
WRONG["check_row"] = [
    (row_with(symbols=bytes_of), "needs its </w>"),
    (row_with(symbols=lambda word: with_end(list(word))), "UTF-8 bytes"),
    (row_with(symbols=lambda word: [word + "</w>"]), "not in the vocabulary"),
    (row_with(split=str.split), "split the text first"),
    (row_with(start=()), "start id"),
    (row_with(start=(), end=()), "stand around"),
    (row_with(end=()), "comes after the text"),
    (row_with(keep_end=False), "cut row keeps its end"),
    (row_with(pad=49407), "not with the end id"),
    (lambda text, n: [i for i in row_with()(text, n) if i], "pad with 0"),
    (lambda text, n: row_with()(text, max(n, 7)), "became"),
    (row_with(clean=str), "clean the text first"),
    (row_with(clean=str.lower), "&amp;"),
    (lambda text, n: [], "became"),
    (lambda text, n: "row", "does not have the form"),
]

# 02 Look up embeddings


def one_hot(tokens, V, dtype=np.float32):
    return (tokens[:, None] == np.arange(V)).astype(dtype)


def add_in_place(x, positions):
    x += positions
    return x


def add_and_forget(x, positions):
    x + positions


WRONG["check_multiplications"] = [
    ((77 * 49408, 77), "multiplied by D"),
    ((49408 * 512, 512), "one token: there are L"),
    ((77 * 512, 77 * 512), "by 0 count too"),
    ((2 * 77 * 49408 * 512, 77 * 512), "additions"),
    ((77 * 49408 * 512, 77), "each 1 is multiplied"),
    ((77 * 49408 * 512, 77 * 49407 * 512), "by 0"),
    ((77 * 49408 * 512, 1 / 49408), "not a share"),
    ((77 * 49407 * 512, 77 * 512), "is not it"),
    (77 * 49408 * 512, "two numbers"),
    (("many", "few"), "two numbers"),
]
WRONG["check_one_hot_lookup"] = [
    (lambda table, tokens: table[tokens], "indexed lookup"),
    (lambda table, tokens: np.take(table, tokens, axis=0), "indexed lookup"),
    (lambda table, tokens: one_hot(tokens, len(table), float) @ table, "float64"),
    (lambda table, ids: (one_hot(ids, len(table)) * ids[:, None].astype("f")) @ table, "not the id"),
    (lambda table, tokens: table[tokens[0]], "one row of the table for each token"),
    (lambda table, tokens: one_hot(tokens, len(table)).T @ table, "does not fit"),
    (lambda table, tokens: one_hot(tokens, len(tokens)) @ table, "does not fit"),
    (lambda table, tokens: one_hot(tokens, 10) @ table, "does not fit"),
]
WRONG["check_embed"] = [
    (lambda table, positions, ids: table[ids] + positions, "slice"),
    (lambda table, positions, ids: table[ids] + positions[: len(ids)], "L = tokens.shape[1]"),
    (lambda table, positions, ids: table[ids] + positions[ids], "not by token id"),
    (lambda table, positions, tokens: table[tokens], "positions are not in it"),
    (lambda table, positions, ids: np.stack([positions[: ids.shape[1]]] * len(ids)), "tokens are not in it"),
    (lambda table, positions, ids: table[ids] + positions[0], "every token got position 0"),
    (lambda table, positions, ids: table[ids] + positions[-ids.shape[1] :], "last rows"),
    (lambda table, positions, ids: table[ids] + positions[ids % 6], "looked up by token id"),
    (
        lambda table, positions, ids: table[ids] + positions[np.arange(1, ids.shape[1] + 1) % 6],
        "start at row 1",
    ),
    (lambda table, positions, ids: table[ids[0]] + positions[: ids.shape[1]], "(B, L, D)"),
    (lambda table, positions, ids: table[ids].astype(float) + positions[: ids.shape[1]], "float64"),
]
WRONG["check_add_positions"] = [
    (add_in_place, "was written into"),
    (add_and_forget, "returns None"),
    (lambda x, positions: (x + positions).astype(float), "float64"),
]

# 03 Normalize a vector


def normed(*inputs, **slips):
    return checks.normed(*inputs, **slips)


def layer_norm_with(**slips):
    def layer_norm(x, weight, bias):
        return normed(x.astype(float), weight, bias, **slips).astype(x.dtype)

    return layer_norm


def layer_norm_in_place(x, weight, bias):
    x -= x.mean(axis=-1, keepdims=True)
    return normed(x, weight, bias)


def layer_norm_without_keepdims(x, weight, bias):
    return (x - x.mean(axis=-1)) / np.sqrt(x.var(axis=-1) + 1e-5) * weight + bias


def layer_norm_of_eight(x, weight, bias):
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered * centered).sum(axis=-1, keepdims=True) / 8 + 1e-5) * weight + bias


def layer_norm_of_squares(x, weight, bias):
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias


WRONG["check_scaled"] = [
    ([-3, -1, -1, -1, 0, 0, 2, 4], "that is the centered row"),
    ([-0.75, -0.25, -0.25, -0.25, 0, 0, 0.5, 1], "not by the variance"),
    ([1, 2, 2, 2, 2.5, 2.5, 3.5, 4.5], "mean is not subtracted"),
    ([-1.403, -0.468, -0.468, -0.468, 0, 0, 0.935, 1.871], "not by 7"),
    ([-1.5, -0.5, -1, -0.5, 1, 0, 0, 1], "come later"),
    ([-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2.5], "first difference"),
    ([-1.5, -0.5, 0, 1, 2], "eight numbers"),
]
WRONG["check_layer_norm"] = [
    (layer_norm_with(ddof=1), "not by D - 1"),
    (layer_norm_with(outside=True), "inside the root"),
    (layer_norm_with(outside=True, ddof=1), "Annotated Transformer"),
    (layer_norm_with(eps=0), "eps is missing"),
    (layer_norm_with(center=False), "mean is not subtracted"),
    (layer_norm_with(axis=-2), "the axis is -1"),
    (layer_norm_with(axis=None), "each row has its own"),
    (lambda x, weight, bias: normed(x, weight), "bias is not in it"),
    (lambda x, weight, bias: normed(x, 1, bias), "weight is not in it"),
    (lambda x, weight, bias: normed(x * weight + bias), "come after the scaling"),
    (lambda x, weight, bias: normed(x.astype(float), weight, bias), "float64"),
    (lambda x, weight, bias: normed(x[0], weight, bias), "shape"),
    (layer_norm_in_place, "writes into its input"),
    (layer_norm_without_keepdims, "keepdims=True"),
    (layer_norm_of_eight, "first difference"),
    (layer_norm_of_squares, "only after centering"),
    (lambda x, weight, bias: (normed(x.astype(float)) + bias) * weight, "before the weight"),
]
WRONG["check_unchanged"] = [
    ({"shift", "double", "both", "negate"}, "never negative"),
    ({"shift", "double", "both", "reverse"}, "backwards"),
    ({"shift", "double", "both", "stretch"}, "direction"),
    ({"double", "both"}, "mean is subtracted"),
    ({"shift"}, "divided by its spread"),
    ({"shift", "double"}, "both are removed"),
]
WRONG["check_suspects"] = [
    ({"A": "eps", "B": "unbiased", "C": "mean", "D": "outside"}, "A is not 'eps': try rows"),
    ({"A": "outside", "B": "mean", "C": "unbiased", "D": "eps"}, "B is not 'mean'"),
    ({"A": "outside", "B": "outside", "C": "mean", "D": "eps"}, "compare its spread with 1"),
    ({"A": "epsilon", "B": "unbiased", "C": "mean", "D": "eps"}, "is none of"),
    ({"A": "outside"}, "the keys A, B, C, D"),
]


# 04 Let tokens attend


def shares(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def triangle(L, dtype=np.float32):
    return np.triu(np.full((L, L), -np.inf, dtype=dtype), 1)


def shares_after(x):
    e = np.exp(x)
    return e / np.maximum(e.sum(axis=-1, keepdims=True), 1e-30)


def softmax_in_place(x):
    x -= x.max(axis=-1, keepdims=True)
    return shares(x)


def attend_without_keepdims(q, k, v):
    e = np.exp(q @ k.T / 2 + triangle(5))
    return (e @ v) / e.sum(axis=-1)


def attend_without_maximum(q, k, v):
    e = np.exp(q @ k.T / q.shape[-1] ** 0.5 + triangle(len(q)))
    return e / e.sum(axis=-1, keepdims=True) @ v


WRONG["check_possible"] = [
    ({"red": "B", "cat": "AB", "end": "AC"}, "the share of cat would be 0"),
    ({"red": "B", "cat": "A", "end": "ABC"}, "two shares would be 0"),
    ({"red": "AB", "cat": "A", "end": "AC"}, "red has two shares"),
    ({"red": "B", "cat": "AC", "end": "AC"}, "⟨end⟩ is masked"),
    ({"red": "B", "cat": "A", "end": "ACD"}, "never outside"),
    ({"red": "", "cat": "A", "end": "AC"}, "red: B is possible"),
    ({"red": "B", "cat": "A", "end": "C"}, "end: A is possible"),
    ({"red": "E", "cat": "A", "end": "C"}, "letters are A to D"),
    ("ABC", "a dict"),
]
WRONG["check_softmax"] = [
    (lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True), "NaN: subtract the row maximum"),
    (lambda x: shares(x, -2), "down the columns"),
    (lambda x: np.exp(x) / np.exp(x).sum(), "each row has its own"),
    (lambda x: np.exp(x), "not divided"),
    (lambda x: shares(x.astype(float)), "float64"),
    (lambda x: shares(x)[0], "shape"),
    (lambda x: np.exp(x - x.max(axis=-1, keepdims=True)) / np.exp(x - x.max()).sum(axis=-1), "keepdims=True"),
    (lambda x: shares_after(x - x.max()), "one maximum for everything"),
    (lambda x: x - x.max(axis=-1, keepdims=True), "the division are missing"),
    (softmax_in_place, "writes into its input"),
]
WRONG["check_attend"] = [
    (lambda q, k, v: shares(q @ k.T / 2) @ v, "add the mask"),
    (lambda q, k, v: np.tril(shares(q @ k.T / 2)) @ v, "after the softmax"),
    (lambda q, k, v: shares(q @ k.T + triangle(5)) @ v, "not divided"),
    (lambda q, k, v: shares(q @ k.T / 4 + triangle(5)) @ v, "not by K"),
    (lambda q, k, v: shares(k @ q.T / 2 + triangle(5)) @ v, "exchanged"),
    (lambda q, k, v: shares(q @ k.T / 2 + triangle(5), 0) @ v, "down the columns"),
    (lambda q, k, v: shares(q @ k.T / 2 + triangle(5).T) @ v, "wrong triangle"),
    (lambda q, k, v: shares(q @ k.T / q.shape[-1] ** 0.5 + triangle(len(q), float)) @ v, "float64"),
    (lambda q, k, v: shares(q @ k.T / 2 + triangle(5)), "weights @ (L, K) values"),
    (lambda q, k, v: shares(q @ k.T / 2 + np.triu(np.ones((5, 5), "f"), 1) * -np.inf) @ v, "0 times inf"),
    (lambda q, k, v: shares(q @ k.T / 2 + np.triu(np.full((5, 5), -np.inf, "f"))) @ v, "row of "),
    (lambda q, k, v: shares(q @ k.T / 2 + np.triu(np.full((5, 5), -1e9, "f"))) @ v, "diagonal is not masked"),
    (lambda q, k, v: shares(q @ k.T / 2 + np.triu(np.full((5, 5), -np.inf, "f"), 2)) @ v, "too late"),
    (lambda q, k, v: shares(np.tril(q @ k.T / 2)) @ v, "0 still gets a share"),
    (lambda q, k, v: shares(q @ k / 2) @ v, "q @ k.T"),
    (attend_without_keepdims, "keepdims"),
    (lambda q, k, v: shares(q @ k.T / 2 + triangle(len(q))) @ v, "for any K"),
    (attend_without_maximum, "large scores"),
]
WRONG["check_rows_changed"] = [
    ({3}, "every later row"),
    ({4, 5, 6}, "row 3 itself"),
    (set(range(7)), "the mask hides"),
    ({0, 1, 2, 3}, "the mask hides"),
]


# 05 Split into heads


def halves(x, H):
    """(B, L, D) to (B, L, H, K): cut, and not yet moved."""
    return x.reshape(*x.shape[:2], H, -1)


RIGHT_MOVES = {"A": [3, 4, 5], "B": [10, 12, 14], "C": [1, 11, 21]}
WRONG["check_reshapes"] = [
    ({**RIGHT_MOVES, "A": [10, 11, 12]}, "A: that is what we want"),
    ({**RIGHT_MOVES, "A": [0, 1, 2]}, "A: that is row 0"),
    ({**RIGHT_MOVES, "A": (6, 7, 8)}, "A: reshape reads"),
    ({**RIGHT_MOVES, "B": [11, 13, 15]}, "B: that is head 1"),
    ({**RIGHT_MOVES, "B": [10, 13, 11]}, "B: row 1 of x is cut"),
    ({**RIGHT_MOVES, "C": np.array([10, 11, 12])}, "C: that is what we want"),
    ({**RIGHT_MOVES, "C": [0, 10, 20]}, "C: that is row 0"),
    ({**RIGHT_MOVES, "C": [1, 11]}, "a list of 3 numbers was wanted"),
    ({**RIGHT_MOVES, "C": "1 11 21"}, "not '1 11 21'"),
    ({**RIGHT_MOVES, "C": ...}, "still to do: C"),
    ([[3, 4, 5], [10, 12, 14]], "a dict with the keys A, B, C"),
]
WRONG["check_split_heads"] = [
    (halves, "now the heads must come before"),
    (lambda x, H: x.reshape(x.shape[0], H, x.shape[1], -1), "one reshape mixes tokens"),
    (lambda x, H: x.reshape(*x.shape[:2], -1, H).transpose(0, 3, 1, 2), "every H-th column"),
    (lambda x, H: halves(x, H).transpose(2, 0, 1, 3), "(B, H, L, K)"),
    (lambda x, H: halves(x, H).transpose(0, 2, 1, 3)[:, ::-1], "in reverse"),
    (lambda x, H: x.reshape(x.shape[1], H, -1, 3), "keep the count of numbers"),
    (lambda x, H: halves(x, H).transpose(1, 0, 2), "each of the four axes"),
    (lambda x, H: np.split(x, H, axis=-1), "an array was wanted, not list"),
    (lambda x, H: halves(x, H).transpose(0, 2, 1, 3).astype(float), "the dtype is float64"),
]
WRONG["check_merge_heads"] = [
    (lambda x: x.reshape(x.shape[0], x.shape[2], -1), "bring the tokens before"),
    (lambda x: x.transpose(0, 2, 3, 1).reshape(x.shape[0], x.shape[2], -1), "interleaved"),
    (lambda x: x.transpose(0, 2, 1, 3), "now join the last two axes"),
    (lambda x: x[:, ::-1].transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1), "in reverse"),
    (lambda x: x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1] * x.shape[3]), "(B, L, D)"),
    (lambda x: x.transpose(1, 0, 2), "each of the four axes"),
    (lambda x: None, "does it end in return"),
]
WRONG["check_unpack"] = [
    (lambda x, H: x.reshape(*x.shape[:2], H, 3, -1).transpose(3, 0, 2, 1, 4), "of each head in turn"),
    (lambda x, H: [halves(x, 3 * H).transpose(0, 2, 1, 3)[:, n * H : n * H + H] for n in (1, 0, 2)], "order"),
    (
        lambda x, H: [p.reshape(x.shape[0], H, x.shape[1], -1) for p in np.split(x, 3, axis=-1)],
        "mixes tokens",
    ),
    (lambda x, H: x.reshape(*x.shape[:2], 3, -1, H).transpose(2, 0, 4, 1, 3), "every H-th column"),
    (lambda x, H: np.split(x, 3, axis=-1), "heads are not split off"),
    (lambda x, H: [halves(p, H) for p in np.split(x, 3, axis=-1)], "tokens come before heads"),
    (lambda x, H: halves(x, 3 * H).transpose(0, 2, 1, 3), "three arrays"),
    (lambda x, H: [x[..., :20], x[..., 20:40], x[..., 40:59]], "should have one shape"),
    (lambda x, H: x.reshape(*x.shape[:2], 3, H, 20).transpose(2, 0, 3, 1, 4), "a third of the columns"),
    (lambda x, H: "q k v", "three arrays were wanted, not str"),
]


# 06 Think at each position


def bend(x, slope=1.702):
    return x / (1 + np.exp(-slope * x))


def exact_gelu(h):
    return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / 2**0.5)))(h)


def bend_by_quotient(x):
    e = np.exp(1.702 * x)
    return x * (e / (1 + e))


def mlp_with(activation, first=1, second=1):
    return lambda x, W, b, V, c: activation(x @ W.T + first * b) @ V.T + second * c


def bend_by_loop(x):
    return x / (1 + math.exp(-1.702 * x))


RIGHT_SLOPES = {"gate": 1.702, "product": 1.773}
WRONG["check_fit_slope"] = [
    ({**RIGHT_SLOPES, "gate": 1.773}, "gate: that is the slope of the other"),
    ({**RIGHT_SLOPES, "product": 1.702}, "product: that is the slope of the other"),
    ({**RIGHT_SLOPES, "gate": 1.596}, "equally steep at 0"),
    ({**RIGHT_SLOPES, "gate": 1}, "SiLU"),
    ({**RIGHT_SLOPES, "gate": 1.71}, "can be had"),
    ({**RIGHT_SLOPES, "product": 1.78}, "product: 1.78 is off"),
    ({**RIGHT_SLOPES, "product": [1.773]}, "one number was wanted"),
    ({"gate": 1.702}, "a dict with the keys gate, product"),
    (1.702, "a dict with the keys gate, product"),
]
WRONG["check_quick_gelu"] = [
    (bend_by_quotient, "NaN far out"),
    (bend_by_loop, "np.exp takes arrays"),
    (lambda x: bend(x, 1), "SiLU"),
    (lambda x: bend(x, 1.773), "not 1.773"),
    (lambda x: bend(x, 1.7), "not 1.7"),
    (lambda x: bend(x, -1.702), "sign of the exponent"),
    (lambda x: 1 / (1 + np.exp(-1.702 * x)), "gate alone"),
    (lambda x: np.maximum(x, 0), "ReLU"),
    (lambda x: bend(x.astype(float)), "float64"),
    (lambda x: x[0], "the shape is"),
]
WRONG["check_mlp"] = [
    (mlp_with(lambda h: h), "no activation"),
    (mlp_with(lambda h: np.maximum(h, 0)), "ReLU"),
    (mlp_with(lambda h: bend(h, 1)), "SiLU"),
    (mlp_with(exact_gelu), "exact GELU"),
    (mlp_with(bend, first=0), "c_fc's bias is not"),
    (mlp_with(bend, second=0), "c_proj's bias is not"),
    (lambda x, W, b, V, c: (bend(x @ W.T) + b) @ V.T + c, "c_fc's bias comes before"),
    (lambda x, W, b, V, c: (bend(x) @ W.T + b) @ V.T + c, "comes before c_fc"),
    (lambda x, W, b, V, c: bend(mlp_with(bend)(x, W, b, V, c)), "second activation"),
    (lambda x, W, b, V, c: x + mlp_with(bend)(x, W, b, V, c), "lesson 07"),
    (lambda x, W, b, V, c: bend(x @ W + b) @ V + c, "x @ weight.T"),
    (lambda x, W, b, V, c: bend(x @ W.T + c), "a bias does not fit"),
    (lambda x, W, b, V, c: bend(x @ W.T + b), "maps them back to D"),
]
WRONG["check_worst"] = [
    (0.0203, "size of the difference"),
    (-0.0203, "size of the difference"),
    (2.27, "below 0"),
    (-0.75, "dip"),
    (-1.5, "the difference at -1.50 is"),
    (-2.2, "0.0203 can be had"),
    (-7, "between -5 and 0"),
    ("left", "one number was wanted"),
    ([-2.27, 2.27], "one number was wanted"),
]


# 07 Add it to the stream


def block_post(x, ln_1, attention, ln_2, mlp):
    x = ln_1(x + attention(x))
    return ln_2(x + mlp(x))


def block_from_norm(x, ln_1, attention, ln_2, mlp):
    h = ln_1(x)
    x = h + attention(h)
    return x + mlp(ln_2(x))


def block_in_place(x, ln_1, attention, ln_2, mlp):
    x += attention(ln_1(x))
    return x + mlp(ln_2(x))


def block_one_norm(x, ln_1, attention, ln_2, mlp):
    x = x + attention(ln_1(x))
    return x + mlp(x)


def states_aliased(embedding, updates):
    x = embedding.copy()
    states = [x]
    for update in updates:
        x += update
        states.append(x)
    return np.stack(states)


def states_in_place(embedding, updates):
    states = [embedding]
    for update in updates:
        embedding += update
        states.append(embedding.copy())
    return np.stack(states)


WRONG["check_block"] = [
    (block_post, "post-norm"),
    (block_from_norm, "not to its normalized copy"),
    (lambda x, ln_1, attend, ln_2, mlp: x + attend(ln_1(x)) + mlp(ln_2(x)), "not before"),
    (lambda x, ln_1, attend, ln_2, mlp: mlp(ln_2(attend(ln_1(x)))), "no plus"),
    (lambda x, ln_1, attend, ln_2, mlp: mlp(ln_2(x + attend(ln_1(x)))), "second plus"),
    (block_one_norm, "ln_2 is missing"),
    (block_in_place, "writes into its input"),
    (lambda x, ln_1, attend, ln_2, mlp: x + attend(ln_1(x), x), "functions of one array"),
    (lambda x, ln_1, attend, ln_2, mlp: x + attend, "call it first"),
    (lambda x, ln_1, attend, ln_2, mlp: x + attend(ln_2(x)) + mlp(ln_1(x + attend(ln_2(x)))), "exchanged"),
    (lambda x, ln_1, attend, ln_2, mlp: x + attend(x) + mlp(ln_2(x + attend(x))), "ln_1 is missing"),
]
RIGHT_LENGTHS = {"along": 7, "across": 5, "against": 1, "cosine 0.5": 6.0828}
WRONG["check_lengths"] = [
    ({**RIGHT_LENGTHS, "along": 12}, "along: 12 is not right"),
    ({**RIGHT_LENGTHS, "across": 7}, "Pythagoras"),
    ({**RIGHT_LENGTHS, "across": 25}, "across: that is the square"),
    ({**RIGHT_LENGTHS, "against": -1}, "never negative"),
    ({**RIGHT_LENGTHS, "cosine 0.5": 37}, "cosine 0.5: that is the square"),
    ({**RIGHT_LENGTHS, "cosine 0.5": 6}, "9 + 2 * 3 * 4 * 0.5 + 16"),
    ({**RIGHT_LENGTHS, "cosine 0.5": "root"}, "one number was wanted"),
    ({"along": 7, "across": 5, "against": 1}, "a dict with the keys"),
]
WRONG["check_states"] = [
    (states_aliased, "all states are the last one"),
    (states_in_place, "writes into its input"),
    (lambda x, updates: x + updates.cumsum(0), "N + 1 states"),
    (lambda x, updates: np.concatenate([x[None], x + updates]), "embedding alone"),
    (lambda x, updates: np.concatenate([x[None], updates.cumsum(0)]), "not in the later states"),
    (lambda x, updates: np.concatenate([x[None], updates]), "the updates themselves"),
    (lambda x, updates: [x, *(x + updates.cumsum(0))], "np.stack makes one"),
    (lambda x, updates: np.concatenate([x[None], x + updates.cumsum(0)]).astype(float), "float64"),
]
WRONG["check_broken_blocks"] = [
    ({"A": "post", "B": "parallel", "C": "no sum", "D": "from norm"}, "A is not 'post'"),
    ({"A": "from norm", "B": "no sum", "C": "parallel", "D": "post"}, "B is not 'no sum'"),
    ({"A": "post", "B": "post", "C": "no sum", "D": "post"}, "A is not 'post'"),
    ({"A": "from norm", "B": "parallel", "C": "no sum", "D": "from norm"}, "D is not 'from norm'"),
    ({"A": "post"}, "the keys A, B, C, D"),
]


# 08 Read out the sentence


WRONG["check_find_eot"] = [
    (lambda tokens: tokens.argmax(), "needs axis=-1"),
    (lambda tokens: tokens.argmax(axis=0), "each column"),
    (lambda tokens: tokens.shape[1] - 1 - tokens[:, ::-1].argmax(axis=-1), "last end of text"),
    (lambda tokens: (tokens > 0).sum(axis=-1) - 1, "id of '!'"),
    (lambda tokens: np.full(len(tokens), tokens.shape[1] - 1), "last position"),
    (lambda tokens: tokens.max(axis=-1), "argmax, not max"),
    (lambda tokens: tokens.argmax(axis=-1) + 1, "one too far"),
    (lambda tokens: tokens.argmax(axis=-1) - 1, "one too early"),
    (lambda tokens: tokens == 49407, "a number for each position"),
    (lambda tokens: tokens.argmax(axis=-1).astype(float), "positions are integers"),
]
WRONG["check_read_out"] = [
    (lambda x, eot, P: x[np.arange(len(x)), eot] @ P.T, "no .T here"),
    (lambda x, eot, P: x[:, eot] @ P, "pair them with np.arange(B)"),
    (lambda x, eot, P: x @ P, "every position is still there"),
    (lambda x, eot, P: x[:, -1] @ P, "last position"),
    (lambda x, eot, P: x[:, 0] @ P, "first position"),
    (lambda x, eot, P: x.mean(axis=1) @ P, "mean over all positions"),
    (lambda x, eot, P: x[0, eot] @ P, "text 0 alone"),
    (lambda x, eot, P: x[np.arange(len(x)), eot], "projection is not in it"),
    (lambda x, eot, P: x[:, eot[0]] @ P, "the first one's end"),
    (lambda x, eot, P: x[np.arange(5), eot] @ P, "np.arange(B) beside eot"),
    (lambda x, eot, P: x[np.arange(len(x)), eot] @ P[:2], "text_projection is (D, E)"),
]
WRONG["check_moved_by_padding"] = [
    ({"last", "mean", "max", "end"}, "mask hides"),
    ({"last", "mean", "max", "start"}, "sees itself alone"),
    ({"last", "max"}, "a mean over all rows"),
    ({"last", "mean"}, "largest number of a column"),
    (set(), "padding row itself"),
]
WRONG["check_missing_end"] = [
    ({"largest id": 3, "equal to 49407": 0, "last": 5}, "last word"),
    ({"largest id": 2, "equal to 49407": 0, "last": 5}, "largest id of a word"),
    ({"largest id": 0, "equal to 49407": 3, "last": 5}, "no id is equal"),
    ({"largest id": 0, "equal to 49407": 0, "last": 6}, "counted from 0"),
    ({"largest id": 0, "equal to 49407": -1, "last": 5}, "no error code"),
    ({"largest id": 0, "equal to 49407": None, "last": 5}, "still to do: equal to 49407"),
    ({"largest id": 0, "equal to 49407": "none", "last": 5}, "one number was wanted"),
    ({"last": 5}, "the keys"),
]


# 09 Write the encoder


def heads_with(**how):
    return lambda x, params, block: checks.attention_by_loops(x, params, block, **how).astype(np.float32)


right_heads = heads_with()

WRONG["check_clumsy"] = [
    ("not scaled", "the ratio to the right scores"),
    ("by K", "smaller than the right ones"),
    ("by √L", "change with the length"),
    ("by D", "is none of"),
]
WRONG["check_heads"] = [
    (heads_with(causal=False), "the future is not masked"),
    (heads_with(scale=1.0), "not divided by"),
    (heads_with(scale=24**-0.5), "D / H, not D"),
    (heads_with(straight=True), "without a transpose"),
    (heads_with(unmerged=True), "not put back"),
    (heads_with(out=False), "the output layer is missing"),
    (heads_with(bias=False), "the biases are missing"),
    (heads_with(heads=1), "one head only"),
    (lambda x, params, block: right_heads(x, params, "transformer.resblocks.0"), "the numbers differ"),
    (lambda x, params, block: None, "does it end in return"),
]


def own_norm(x, params, name):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return (scaled * params[f"{name}.weight"] + params[f"{name}.bias"]).astype(np.float32)


def whole_block(x, params, name, *, gate=None, second=1, keep=True, read="stream", fixed=None):
    name = fixed or name
    mid = x + right_heads(own_norm(x, params, f"{name}.ln_1"), params, name)
    inner = own_norm(mid, params, f"{name}.ln_2") @ params[f"{name}.mlp.c_fc.weight"].T
    inner = inner + params[f"{name}.mlp.c_fc.bias"]
    gated = (gate or (lambda h: h / (1 + np.exp(-1.702 * h))))(inner)
    mlp = gated @ params[f"{name}.mlp.c_proj.weight"].T + second * params[f"{name}.mlp.c_proj.bias"]
    return ((x if read == "input" else mid if keep else 0) + mlp).astype(np.float32)


WRONG["check_whole_block"] = [
    (lambda x, params, name: whole_block(x, params, name, keep=False), "not added to the stream"),
    (lambda x, params, name: whole_block(x, params, name, read="input"), "not to the stream after attention"),
    (lambda x, params, name: whole_block(x, params, name, gate=exact_gelu), "not the exact GELU"),
    (lambda x, params, name: whole_block(x, params, name, second=0), "second bias is missing"),
    (
        lambda x, params, name: x + right_heads(own_norm(x, params, f"{name}.ln_1"), params, name),
        "MLP is missing",
    ),
    (
        lambda x, params, name: whole_block(x, params, name, fixed="transformer.resblocks.0"),
        "does your code say 0",
    ),
]


def encoder(params, tokens, stages, *, positions=True, order=None, norm=True, row=None, turned=False):
    x = params["token_embedding.weight"][tokens]
    x = stages["embedding"] = x + params["positional_embedding"][: tokens.shape[1]] * np.float32(positions)
    layers = sum(name.endswith(".ln_1.weight") for name in params)
    for i in order or range(layers):
        x = stages[f"transformer.resblocks.{i}"] = whole_block(x, params, f"transformer.resblocks.{i}")
    x = stages["ln_final"] = own_norm(x, params, "ln_final") if norm else x
    end = tokens.argmax(-1) if row is None else np.full(len(tokens), row)
    pooled = stages["pooled"] = x[np.arange(len(x)), end]
    P = params["text_projection"]
    return pooled @ (P[:, ::-1] if turned else P)


def silent(params, tokens, stages):
    """A wrong encoder that shows nothing."""
    return encoder(params, tokens, {}, norm=False)


def misnamed(params, tokens, stages):
    features = encoder(params, tokens, {})
    stages["embeddings"] = features
    return features


WRONG["check_encoder"] = [
    (lambda p, t, s: encoder(p, t, s, positions=False), "your first divergence is embedding"),
    (lambda p, t, s: encoder(p, t, s, order=[0, 0]), "your first divergence is block 0 output"),
    (lambda p, t, s: encoder(p, t, s, norm=False), "ln_final; block 1 output still agrees"),
    (lambda p, t, s: encoder(p, t, s, row=-1), "your first divergence is pooled; ln_final still agrees"),
    (lambda p, t, s: encoder(p, t, s, turned=True), "your first divergence is text_features"),
    (silent, "your first divergence is text_features"),
    (misnamed, "no stage is called ['embeddings']"),
    (lambda p, t, s: None, "does it end in return"),
    (lambda p, t, s: minclip.encode_text(p, t), "you call minclip's own"),
]

# 10 Compare sentences


def unit(x, axis=-1):
    return x / np.sqrt((x * x).sum(axis=axis, keepdims=True))


WRONG["check_similarity"] = [
    (lambda a, b: a @ b.T, "plain products"),
    (lambda a, b: unit(a) @ b.T, "only one of the two"),
    (lambda a, b: a @ unit(b).T, "only the second"),
    (lambda a, b: a @ b.T / ((a * a).sum(-1)[:, None] * (b * b).sum(-1)), "not by its square"),
    (lambda a, b: unit(a, 0) @ unit(b, 0).T, "column lengths"),
    (lambda a, b: unit(a.astype(float)) @ unit(b.astype(float)).T, "float64"),
    (lambda a, b: unit(b) @ unit(a).T, "the second is transposed"),
    (lambda a, b: unit(a) @ unit(b), "the inner sizes differ"),
    (lambda a, b: a @ b.T / np.linalg.norm(a) / np.linalg.norm(b), "each row has its own"),
    (lambda a, b: a / a.sum(-1, keepdims=True) @ (b / b.sum(-1, keepdims=True)).T, "the numbers' sum"),
]
WRONG["check_shares_of"] = [
    (lambda x, scale: shares(x * scale), "is a logarithm"),
    (lambda x, scale: shares(x), "not scaled"),
    (lambda x, scale: shares(x / float(np.exp(scale))), "not divided"),
    (lambda x, scale: shares(x * float(np.exp(scale)), 0), "down the columns"),
    (lambda x, scale: x * float(np.exp(scale)), "now the softmax"),
    (
        lambda x, scale: (
            np.exp(x * np.float32(np.exp(scale)))
            / np.exp(x * np.float32(np.exp(scale))).sum(axis=-1, keepdims=True)
        ),
        "NaN for large logits",
    ),
]
WRONG["check_ensemble"] = [
    (lambda features: unit(features.mean(axis=0)), "before the mean"),
    (lambda features: unit(features).mean(axis=0), "after it as well"),
    (lambda features: features.mean(axis=0), "nothing is normalized"),
    (lambda features: unit(unit(features).mean(axis=1)), "mean over the words"),
    (lambda features: unit(unit(features.astype(float)).mean(axis=0)), "float64"),
    (lambda features: unit(features), "mean over the templates is missing"),
    (lambda features: unit(unit(features).max(axis=0)), "the first difference"),
]
WRONG["check_nearest"] = [
    (lambda query, table, k: (table @ query).argsort()[:k], "the farthest"),
    (lambda query, table, k: (table @ query).argsort()[-k:], "best comes first"),
    (lambda query, table, k: np.sort(table @ query)[::-1][:k], "places were wanted, argsort"),
    (lambda query, table, k: (table @ query).argsort()[::-1], "places were wanted, and 6 came"),
    (lambda query, table, k: (table @ query).argmax(), "also for k = 1"),
    (lambda query, table, k: abs(table @ query - 1).argsort()[:k], "the query's length"),
    (lambda query, table, k: table[(table @ query).argsort()[::-1][:k]], "a list of places was wanted"),
]


# 11 Say what right means


def loss_with(**how):
    return lambda texts, pictures, scale: checks.loss_of(texts, pictures, scale, **how)


def overflowing(texts, pictures, scale):
    """Right until e to the logits no longer fits."""
    a, b = (np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in (texts, pictures))
    e = np.exp(np.exp(np.float32(scale)) * (a @ b.T))
    return -np.log(np.diagonal(e) ** 2 / e.sum(0) / e.sum(1)).mean() / 2


WRONG["check_contrastive_loss"] = [
    (loss_with(normalized=False), "the features are not normalized"),
    (loss_with(exponential=False), "e to the logit_scale"),
    (loss_with(both=False), "only the texts look for"),
    (loss_with(both=False, axis=0), "only the pictures look for"),
    (lambda a, b, s: 2 * checks.loss_of(a, b, s), "half of it"),
    (lambda a, b, s: -checks.loss_of(a, b, s), "the sign"),
    (lambda a, b, s: checks.loss_of(a, b, s) * np.ones(len(a)), "one number was wanted"),
    (overflowing, "overflows"),
]
RIGHT_LOSSES = {"a": math.log(32), "b": 0, "c": math.log(2) / 16, "d": 0}
WRONG["check_chance"] = [
    ({**RIGHT_LOSSES, "a": 1 / 32}, "a: equal cosines"),
    ({**RIGHT_LOSSES, "a": math.log2(32)}, "a: equal cosines"),
    ({**RIGHT_LOSSES, "b": 0.5}, "b: e^(-200)"),
    ({**RIGHT_LOSSES, "c": 0}, "c: in 2 rows of 32"),
    ({**RIGHT_LOSSES, "d": 1}, "d: whoever is alone"),
    ({"a": 1}, "a dict with the keys"),
]
WRONG["check_temperature"] = [
    (1, "all shares are nearly equal"),
    (1000, "punishes every row"),
    (20, "one of 1, 10, 100, 1000"),
]
RIGHT_FAULTS = {"A": "one side", "B": "log scale", "C": "right", "D": "unnormalized"}
WRONG["check_loss_suspects"] = [
    ({**RIGHT_FAULTS, "A": "right"}, "exchange texts and pictures"),
    ({**RIGHT_FAULTS, "B": "right"}, "double the factor"),
    ({**RIGHT_FAULTS, "C": "one side"}, "lengths and roles change nothing"),
    ({**RIGHT_FAULTS, "D": "log scale"}, "three times as long"),
    ({**RIGHT_FAULTS, "D": "wrong"}, "is none of"),
]

# 12 Send the error back

WRONG["check_linear_backward"] = [
    (lambda dy, x, W: (dy @ W, dy.T @ x, dy), "db has the shape of b"),
    (lambda dy, x, W: (dy @ W, dy.T @ x / len(x), dy.sum(0)), "added, not averaged"),
    (lambda dy, x, W: (dy @ W, dy.T @ x, dy.mean(0)), "the rows are added, not averaged"),
    (lambda dy, x, W: (dy @ W, x.T @ dy, dy.sum(0)), "dW has the shape of W"),
    (
        lambda dy, x, W: (dy @ (W.T if W.shape[0] == W.shape[1] else W), dy.T @ x, dy.sum(0)),
        "a square W hides it",
    ),
    (
        lambda dy, x, W: (dy @ W, x.T @ dy if W.shape[0] == W.shape[1] else dy.T @ x, dy.sum(0)),
        "you have its transpose",
    ),
    (lambda dy, x, W: dy @ W, "three arrays were wanted"),
]
WRONG["check_softmax_backward"] = [
    (lambda dy, y: dy * y * (1 - y), "only the diagonal"),
    (lambda dy, y: y * (dy - dy.mean(-1, keepdims=True)), "under the shares"),
    (lambda dy, y: y * (dy - (dy * y).sum()), "with keepdims=True"),
    (lambda dy, y: dy - (dy * y).sum(-1, keepdims=True), "the factor y is missing"),
    (lambda dy, y: y * (dy + (dy * y).sum(-1, keepdims=True)), "the mean is subtracted"),
    (lambda dy, y: y * (dy - (dy * y).sum(-1, keepdims=True)) + 1e-9, "must get exactly 0"),
]


def norm_backward(dy, x, weight, eps=1e-5, *, shift=1, stretch=1, weighted=True, divided=True):
    centered = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
    n, dn = centered / deviation, dy * (weight if weighted else 1)
    dx = dn - shift * dn.mean(-1, keepdims=True) - stretch * n * (dn * n).mean(-1, keepdims=True)
    return dx / deviation if divided else dx


WRONG["check_layer_norm_backward"] = [
    (lambda dy, x, w: norm_backward(dy, x, w, shift=0, stretch=0), "both terms are missing"),
    (lambda dy, x, w: norm_backward(dy, x, w, stretch=0), "the term with n is missing"),
    (lambda dy, x, w: norm_backward(dy, x, w, shift=0), "mean(dn) is missing"),
    (lambda dy, x, w: norm_backward(dy, x, w, weighted=False), "the weight is missing"),
    (lambda dy, x, w: norm_backward(dy, x, w, divided=False), "the division by the deviation"),
    (lambda dy, x, w: norm_backward(dy, x, w, eps=0), "ε belongs into the deviation"),
]
RIGHT_GRADIENTS = {"A": "no 1.702", "B": "right", "C": "gate constant", "D": "right"}
WRONG["check_gelu_suspects"] = [
    ({**RIGHT_GRADIENTS, "A": "right"}, "compare it with nudging near x = 1"),
    ({**RIGHT_GRADIENTS, "C": "no 1.702"}, "the product rule has a second part"),
    ({**RIGHT_GRADIENTS, "D": "no 1.702"}, "the same at every x"),
    ({**RIGHT_GRADIENTS, "B": "wrong"}, "is none of"),
]
WRONG["check_rows"] = [
    ({"a": {6, 7, 8, 9}, "b": set()}, "where the gradient comes from"),
    ({"a": set(range(6)) | {7, 8, 9}, "b": set()}, "attends to every position before it"),
    ({"a": set(), "b": set()}, "which never sees it"),
    ({"a": {7, 8, 9}, "b": {7, 8, 9}}, "without the mask"),
    ({"a": {7, 8, 9}}, "a dict with the keys"),
]

# 13 Train your own


def adam_with(
    param,
    grad,
    m,
    v,
    t,
    rate,
    *,
    sign=-1,
    corrected=True,
    root=True,
    swap=False,
    square=True,
    inside=0,
    outside=1e-8,
):
    b1, b2 = (0.98, 0.9) if swap and t > 1 else (0.9, 0.98)
    m = m + (1 - b1) * (grad - m)
    v = v + (1 - b2) * (grad**2 - v) if square else m**2 / (1 - 0.9**t) ** 2 * (1 - 0.98**t)
    c1, c2 = (1 - 0.9**t, 1 - 0.98**t) if corrected else (1, 1)
    size = np.sqrt(v / c2 + inside) if root else v / c2
    return param + sign * rate * m / c1 / (size + outside * (not inside)), m, v


WRONG["check_adam"] = [
    (lambda *a: adam_with(*a, sign=1), "the step goes *down*"),
    (lambda *a: adam_with(*a, corrected=False), "m and v begin at 0"),
    (lambda *a: adam_with(*a, root=False), "the root of v is missing"),
    (lambda *a: adam_with(*a, swap=True), "each where they belong"),
    (lambda *a: adam_with(*a)[0], "three arrays were wanted"),
    (lambda *a: adam_with(*a, inside=1e-8), "not to v inside it"),
    (lambda *a: adam_with(*a, outside=0), "0 / 0 where a gradient is 0"),
]


def trainer(params, tokens, pictures, steps, rate, batch=48, logit_scale=3.0, seed=0, *, sign=1, only=None,
            returned=True, forget=False):  # fmt: skip
    rng, given = np.random.default_rng(seed), params
    params, values = params.copy(), []
    m, v = ({name: np.zeros_like(array) for name, array in params.items()} for _ in range(2))
    for t in range(1, steps + 1):
        rows = rng.permutation(len(tokens))[:batch] if not forget else np.arange(batch)
        trace = minclip.trace(params, tokens[rows])
        loss, (dfeatures, _, _) = minclip.contrastive_loss(
            trace["text_features"], pictures[rows], logit_scale
        )
        for name, grad in minclip.backward(trace, sign * dfeatures).items():
            if (only is None or only(name)) and not forget:
                params[name], m[name], v[name] = checks.adam_step(
                    params[name], grad, m[name], v[name], t, rate
                )
        values.append(float(loss))
    return params if returned else given, values


WRONG["check_train"] = [
    (lambda *a, **k: trainer(*a, **k, sign=-1), "the sign?"),
    (lambda *a, **k: trainer(*a, **k, forget=True), "the loss never changes"),
    (lambda *a, **k: trainer(*a, **k, only=lambda name: "ln_1" not in name), "was not trained"),
    (lambda *a, **k: trainer(*a, **k, returned=False), "was not trained"),
    (lambda *a, **k: trainer(*a, **k)[1], "two results were wanted"),
    (
        lambda p, t, i, steps, rate, batch: trainer(p, t, i, steps // 2, rate, batch),
        "one loss for each of 60",
    ),
    (lambda p, t, i, steps, rate, batch: trainer(p, t, i, steps, rate, 8), "with batch=1"),
]


def by_heart(passes, steps=150, rate=5e-3):
    """A first test that trains and says passes(losses)."""
    return lambda train, *task: bool(passes(train(*task, steps, rate, len(task[1]))[1]))


WRONG["check_first_test"] = [
    (by_heart(lambda losses: not losses[-1] > 0.2), "NaN passes"),
    (by_heart(lambda losses: losses[-1] <= losses[0] + 0.1), "a rate of 0 passes"),
    (by_heart(lambda losses: losses[-1] < losses[0] - 0.5), "random pairs pass"),
    (by_heart(lambda losses: losses[-1] > losses[0] + 0.5), "steps uphill passes"),
    (by_heart(lambda losses: losses[-1] < 0.2, steps=5), "the right loop does not pass"),
    (lambda train, *task: train(*task, 9, 5e-3, 12)[1][-1], "True or False was wanted"),
]
RIGHT_OUTCOMES = {"rate x 10": "worse", "no positions": "about as well", "batch of one": "nothing"}
WRONG["check_outcomes"] = [
    ({**RIGHT_OUTCOMES, "rate x 10": "about as well"}, "jumps across the valley"),
    ({**RIGHT_OUTCOMES, "no positions": "worse"}, "differ only in their order"),
    ({**RIGHT_OUTCOMES, "batch of one": "worse"}, "no gradient"),
    ({**RIGHT_OUTCOMES, "batch of one": "bad"}, "the outcomes are"),
    ({"rate x 10": "worse"}, "a dict with the keys"),
]

# 15 Break it


def token_ids(text):
    row = minclip.tokenize(text, 1000)[0].tolist()
    return row[1 : row.index(49407)]


def told(encode, triple, measure, better=lambda same, other: bool(same > other)):
    text, same, other = encode(list(triple)).astype(float)
    return better(measure(text, same), measure(text, other))


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def right_pairs(**changed):
    """Valid triplets with the predictions that hold, changed."""
    triples = {
        "order": ("a dog bites a man", "a man is bitten by a dog", "a man bites a dog"),
        "negation": ("a street with no cars", "an empty street", "a street with cars"),
        "binding": ("a red cube and a blue sphere", "a blue sphere and a red cube",
                    "a blue cube and a red sphere"),
    }  # fmt: skip
    right = {}
    for family, triple in triples.items():
        same, other = checks.text_cosines(*triple)
        right[family] = (*triple, bool(same > other))
    return {**right, **changed}


WRONG["check_is_swap"] = [
    (lambda a, b: sorted(a.split()) == sorted(b.split()) and a != b, "compare ids, not split()"),
    (lambda a, b: set(token_ids(a)) == set(token_ids(b)) and token_ids(a) != token_ids(b), "does not count"),
    (lambda a, b: sorted(token_ids(a)) == sorted(token_ids(b)), "no swap of itself"),
    (lambda a, b: sorted(a.replace(" ", "").lower()) == sorted(b.replace(" ", "").lower()) and a != b,
     "cat and act"),
    (lambda a, b: minclip.tokenize(a) != minclip.tokenize(b), "True or False was wanted"),
]  # fmt: skip
WRONG["check_tells_apart"] = [
    (lambda encode, *t: told(encode, t, np.dot), "divide by the lengths"),
    (
        lambda encode, *t: told(encode, t, lambda a, b: -np.linalg.norm(a - b)),
        "compare angles, not distances",
    ),
    (lambda encode, *t: told(encode, t, cosine, lambda same, other: bool(same >= other - 1e-9)), "a tie"),
    (lambda encode, *t: told(encode, t, lambda a, b: abs(cosine(a, b))), "do not drop the sign"),
    (lambda encode, *t: told(encode, t, cosine, lambda same, other: bool(same < other)), "0.95"),
    (
        lambda encode, *t: bool(cosine(*encode([t[0], t[1]])) > cosine(*encode([t[1], t[2]]))),
        "with each other",
    ),
    (lambda encode, *t: encode(t[0]) > 0, "a list of texts"),
]
WRONG["check_minimal_pairs"] = [
    (
        right_pairs(order=(*right_pairs()["order"][:3], not right_pairs()["order"][3])),
        "says otherwise: order",
    ),
    (right_pairs(binding=("a red cube", "a cube that is red", "a blue cube", True)), "the same tokens"),
    (
        right_pairs(
            binding=(
                "a red cube and a blue sphere",
                "a cube that is red",
                "a blue sphere and a red cube",
                True,
            )
        ),
        "two words change places, not 4",
    ),
    (right_pairs(negation=("a street", "a road", "a street with cars", True)), "says no, not or without"),
    (right_pairs(order=("a cat", "A CAT", "cat a", True)), "the same ids"),
    (right_pairs(order=("a cat", "one cat", True)), "your prediction"),
    ({"order": right_pairs()["order"]}, "the keys are"),
]
WRONG["check_cut_off"] = [
    (lambda text: token_ids(text)[77:], "take two of the 77 places"),
    (lambda text: token_ids(text)[76:], "needs a place too"),
    (lambda text: [*token_ids(text), 49407][75:], "no part of the text"),
    (lambda text: text.split()[75:], "ids were wanted, not words"),
    (lambda text: token_ids(text)[75:] if len(text.split()) > 75 else [], "the last"),
]

# 14 Look inside


def lens_with(params, x, *, norm="ln_final", project=True, unit=lambda y: minclip.normalize(y)):
    x = normed(x, params[f"{norm}.weight"], params[f"{norm}.bias"]) if norm else x
    return unit(x @ params["text_projection"] if project else x).astype(np.float32)


def patched_with(params, tokens, other, stage, position, *, at=lambda position: np.s_[:, position]):
    def tap(name, array):
        if name == stage:
            array = array.copy()
            array[at(position)] = other[stage][at(position)]
        return array

    return minclip.encode_text(params, tokens, tap=tap)


def patched_in_place(params, tokens, other, stage, position):
    other[stage][:, position] = minclip.trace(params, tokens)[stage][:, position]
    return patched_with(params, tokens, other, stage, position)


def patched_backwards(params, tokens, other, stage, position):
    others = np.array([[58, 4, 20, 10, 59]])
    return patched_with(params, others, minclip.trace(params, tokens), stage, position)


def relevance_with(
    params, tokens, target, *, stage="embedding", unit=True, times=lambda g, x: (g * x).sum(-1)
):
    trace = minclip.trace(params, tokens)
    start = minclip.normalize_backward(target[None], trace["text_features"]) if unit else target[None]
    gradient = minclip.backward(trace, start, parameters=False)["embedding"]
    return times(gradient[0], trace[stage][0])


def refutations():
    """Pairs of places that are a counterexample, nearly one, or none."""
    shares, moves = checks.shares_and_moves()
    places = list(np.ndindex(shares.shape))
    most = max(places, key=moves.__getitem__)
    first = max(places, key=lambda at: (shares[at] > shares[most], -moves[at]))
    if shares[first] <= shares[most]:  # what matters most has the largest share: take a lesser second
        most = min((at for at in places if moves[at] >= 0.01), key=shares.__getitem__)
        first = min((at for at in places if shares[at] > shares[most]), key=moves.__getitem__)
    dull = sorted(places, key=moves.__getitem__)[:2]
    return first, most, sorted(dull, key=shares.__getitem__, reverse=True)


COUNTER, NEEDED, DULL = refutations()
EFFECTS = checks.patch_effects()
WRONG["check_lens"] = [
    (lambda params, x: lens_with(params, x, norm=None), "ln_final is missing"),
    (lambda params, x: lens_with(params, x, unit=lambda y: y), "length 1"),
    (lambda params, x: lens_with(params, x, unit=lambda y: y / np.linalg.norm(y)), "one length for all rows"),
    (lambda params, x: lens_with(params, x, norm="transformer.resblocks.0.ln_1"), "the norm before block 0"),
    (lambda params, x: lens_with(params, x, project=False), "one row of E features"),
    (lambda params, x: lens_with(params, x)[-1], "one row of E features for each position"),
]
WRONG["check_effects"] = [
    ({**EFFECTS, "a": "some"}, "with it, the input is the dog's"),
    ({**EFFECTS, "b": "some"}, "the same end at the same position"),
    ({**EFFECTS, "c": "some"}, "the mask keeps its row the same"),
    ({**EFFECTS, "d": "some"}, "no row but that of"),
    ({**EFFECTS, "e": "some"}, "all that the read-out reads"),
    ({**EFFECTS, "e": "much"}, "look at ['e']"),
    ({"a": "all"}, "a dict with the keys"),
]
WRONG["check_patched"] = [
    (lambda *a: patched_with(*a, at=lambda position: np.s_[:]), "the whole stage was patched"),
    (lambda params, tokens, *rest: minclip.encode_text(params, tokens), "nothing was patched"),
    (lambda *a: patched_with(*a, at=lambda position: np.s_[:, position - 1]), "the first difference is"),
    (patched_backwards, "the other text, patched with this one"),
    (patched_in_place, "writes into the other trace"),
    (lambda *a: patched_with(*a)[0], "the features of the one text"),
    (lambda *a: None, "does it end in return?"),
]
WRONG["check_relevance"] = [
    (lambda *a: relevance_with(*a, times=lambda g, x: g.sum(-1)), "the input is missing"),
    (
        lambda *a: relevance_with(*a, times=lambda g, x: np.linalg.norm(g, axis=-1)),
        "the length of the gradient",
    ),
    (lambda *a: relevance_with(*a, unit=False), "not of the cosine"),
    (lambda *a: relevance_with(*a, stage="token_embedding"), "the positions are part of the input"),
    (lambda *a: relevance_with(*a, times=lambda g, x: abs((g * x).sum(-1))), "the signs are gone"),
    (lambda *a: relevance_with(*a, times=lambda g, x: abs(g * x).sum(-1)), "not their sizes"),
    (lambda *a: relevance_with(*a, times=lambda g, x: g * x), "one number for each position"),
]
WRONG["check_refutation"] = [
    ((NEEDED, COUNTER), "must have the larger share"),
    ((COUNTER, COUNTER), "the first place must"),
    (tuple(DULL), "the second must matter"),
    ((COUNTER, (*NEEDED[:2], 7)), "out of range"),
    (COUNTER, "two places were wanted"),
]

# 16 Choose a precision and a device


def half_norm_with(**slips):
    return lambda x, weight, bias: normed(x.astype(np.float32), weight, bias, **slips).astype(x.dtype)


def module_with_import(x):
    import cupy

    return np if isinstance(x, np.ndarray) else cupy


WRONG["check_upcasts"] = [
    ({"B", "D"}, "F gives float64: np.arange"),
    ({"D", "F"}, "B gives float64: np.sqrt"),
    ({"B", "F"}, "D gives float64: np.zeros"),
    ({"A", "B", "D", "F"}, "A stays float32"),
    ({"B", "C", "D", "F"}, "C stays float32"),
    ({"B", "D", "E", "F"}, "E stays float32"),
]
WRONG["check_overflows"] = [
    ({"product", "exp12"}, "73728"),
    ({"product", "squares"}, "162755"),
    ({"exp12", "squares"}, "90000"),
    ({"product", "exp12", "squares", "add"}, "rounded to the nearest"),
    ({"product", "exp12", "squares", "score"}, "57600"),
    ({"product", "exp11", "exp12", "squares"}, "59874"),
]
WRONG["check_half_layer_norm"] = [
    (normed, "squares overflow"),
    (lambda x, weight, bias: normed(x.astype(np.float32), weight, bias), "narrow at the very end"),
    (lambda x, weight, bias: half_norm_with()(x, 1, bias), "weight is not in it"),
    (lambda x, weight, bias: half_norm_with()(x, weight, 0), "bias is not in it"),
    (half_norm_with(eps=0), "eps is 1e-5"),
    (half_norm_with(ddof=1), "not by D - 1"),
]
WRONG["check_array_module"] = [
    (lambda x: np, "not NumPy's"),
    (module_with_import, "even for NumPy's arrays"),
    (lambda x: type(x).__module__ if not isinstance(x, np.ndarray) else np, "a module was wanted"),
    (lambda x: np if isinstance(x, np.ndarray) else None, "returns None"),
]

# 17 Shrink it


def quantized(W, *, axis=-1, top=127, rounding=np.rint, dtype=np.int8, size=abs, keep=True, zero=1):
    with np.errstate(all="ignore"):
        scale = size(W).max(axis=axis, keepdims=keep) / top
        if zero is not None:
            scale = np.where(scale == 0, zero, scale)
        whole = W / (scale if keep or axis is None else scale[:, None])
        return rounding(np.nan_to_num(whole)).clip(-128, 127).astype(dtype), scale.astype(np.float32)


WRONG["check_quantize_rows"] = [
    (lambda W: quantized(W, rounding=np.asarray), "cut, not rounded"),
    (lambda W: quantized(W, axis=0), "a scale for each column"),
    (lambda W: quantized(W, axis=None, keep=False), "one scale for the matrix"),
    (lambda W: quantized(W, keep=False), "keepdims=True"),
    (lambda W: quantized(W, zero=None), "a row of zeros"),
    (lambda W: quantized(W, top=128), "127 and not 128"),
    (lambda W: quantized(W, size=np.asarray), "largest *absolute* value"),
    (lambda W: quantized(W, dtype=np.int16), "should be int8"),
    (lambda W: quantized(W)[0], "two arrays were wanted"),
]
BITS = {"int8 rows": 8 + 16 / 512, "Q8_0": 8.5, "Q4_0": 4.5, "MLX": 4.5}
WRONG["check_bits"] = [
    ({**BITS, "int8 rows": 8}, "without what the group shares"),
    ({**BITS, "Q4_0": 20}, "pays for the whole scale"),
    ({**BITS, "Q8_0": 8.5 / 8}, "that is bytes"),
    ({**BITS, "MLX": 4.25}, "two float16 numbers"),
    ({**BITS, "Q4_0": 4 + 2 / 32}, "16 bits, not 2"),
    ({"Q4_0": 4.5}, "a dict with the keys"),
]
WRONG["check_lost"] = [
    ({"row": {"tensor"}, "column": {"tensor", "row"}}, "one large row, a scale by column"),
    ({"row": {"tensor", "column"}, "column": {"tensor"}}, "one large column, a scale by row"),
    ({"row": {"tensor", "row"}, "column": {"tensor", "row"}}, "of the others become 0"),
    ({"row": {"column"}, "column": {"row"}}, "a scale by tensor"),
    ({"row": {"columns"}, "column": {"row"}}, "the scales are by"),
    ({"row": {"tensor"}}, "the keys row and column"),
]


def rescued(W, *, at=None, before=True, zero=True, column=lambda column: column):
    at = int(abs(W).max(axis=0).argmax()) if at is None else at(W)
    rest = W.copy()
    rest[:, at] = 0
    q, scale = quantized(rest if before else W)
    if zero and not before:
        q[:, at] = 0
    if not zero:
        q = np.where(np.arange(W.shape[1]) == at, 1, q).astype(np.int8)
    return q, scale, at, column(W[:, at])


WRONG["check_rescue"] = [
    (lambda W: rescued(W, before=False), "still sees the large column"),
    (lambda W: rescued(W, zero=False), "would count twice"),
    (lambda W: rescued(W, at=lambda W: int(abs(W).max(axis=1).argmax())), "at is a row"),
    (lambda W: rescued(W, at=lambda W: int(W.argmax() % 9 == 0)), "has the largest numbers"),
    (lambda W: rescued(W, column=np.rint), "not rounded"),
    (lambda W: rescued(W)[:2], "four were wanted"),
]

# 18 Make it fast


def upto(row):
    return row[: row.index(49407) + 1]


def lengthwise(encode, tokens, size, sort=True, trim=True, back=lambda found, order: found):
    ends = tokens.argmax(axis=-1)
    order = ends.argsort(kind="stable") if sort else np.arange(len(ends))
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    found = [encode(tokens[part, : ends[part].max() + 1] if trim else tokens[part]) for part in parts]
    return back(np.concatenate(found), order)


def undone(found, order):
    features = np.empty_like(found)
    features[order] = found
    return features


def rows_one_by_one(x, W):
    return np.stack([np.stack([row @ W.T for row in text]) for text in x])


def at_once(x, W):
    return (x.reshape(-1, x.shape[-1]) @ W.T).reshape(*x.shape[:-1], len(W))


def four_with(way):
    return [rows_one_by_one, lambda x, W: x @ W.T, way, lambda x, W: np.einsum("bld,ed->ble", x, W)]


WRONG["check_trim_batch"] = [
    (lambda tokens: tokens[:, : tokens.argmax(axis=-1).max()], "itself cut off"),
    (lambda tokens: tokens[:, : tokens.argmax(axis=-1).min() + 1], "the longest decides"),
    (lambda tokens: tokens[:, : (tokens != 0).sum(axis=-1).max()], "padding may be 49407"),
    (
        lambda tokens: tokens[
            :, : max(next((i for i, id in enumerate(row) if id in (0, 49407)), 6) for row in tokens) + 1
        ],
        "look for the end",
    ),
    (lambda tokens: [row[: row.argmax() + 1] for row in tokens], "slice the columns"),
    (lambda tokens: tokens, "the last end of text is at 3"),
]


def next_token(q, k, v, cache, *, scale=0.5, axis=-1, first=True, grows=True):
    def grown():
        return {
            name: np.concatenate([cache[name], new[:, None]], axis=1) for name, new in (("k", k), ("v", v))
        }

    seen = grown() if first else dict(cache)
    if grows:
        cache.update(grown())
    scores = np.float32(scale) * np.einsum("hk,hjk->hj", q, seen["k"])
    return np.einsum("hj,hjk->hk", shares(scores, axis) if scores.size else scores, seen["v"])


WRONG["check_next_token"] = [
    (lambda *a: next_token(*a, scale=1), "not divided by the root of K"),
    (lambda *a: next_token(*a, scale=0.25), "not by K"),
    (lambda *a: next_token(*a, axis=0), "not over the heads"),
    (lambda *a: next_token(*a, first=False), "attends to itself, too"),
    (lambda *a: next_token(*a, grows=False), "the cache stays empty"),
    (lambda *a: next_token(*a)[None], "the shape is"),
]
WRONG["check_count_prefixes"] = [
    (lambda tokens: sum(len(upto(row)) for row in tokens.tolist()), "count a beginning once"),
    (
        lambda tokens: len({tuple(row[: i + 1]) for row in tokens.tolist() for i in range(len(row))}),
        "stop at the end of text",
    ),
    (
        lambda tokens: len({(i, id) for row in tokens.tolist() for i, id in enumerate(upto(row))}),
        "ids at places",
    ),
    (lambda tokens: len(set(map(tuple, tokens.tolist()))), "whole texts"),
    (
        lambda tokens: len({tuple(row[: i + 1]) for row in tokens.tolist() for i in range(row.index(49407))}),
        "the end of text needs its row",
    ),
    (lambda tokens: 15, "one text of 3 words"),
]
WRONG["check_by_length"] = [
    (lengthwise, "another order than the texts"),
    (lambda *inputs: lengthwise(*inputs, back=lambda found, order: found[order]), "applied twice"),
    (lambda *inputs: lengthwise(*inputs, sort=False), "sort by length first"),
    (lambda *inputs: lengthwise(*inputs, trim=False, back=undone), "trim each batch"),
    (lambda encode, tokens, size: encode(tokens), "3 are allowed"),
    (lambda encode, tokens, size: lengthwise(encode, tokens[:, :4], size), "cut before the end"),
]
WRONG["check_four_products"] = [
    (four_with(lambda x, W: x @ W), "a square W hides it"),
    (four_with(lambda x, W: x.reshape(-1, 4) @ W.T), "put the rows back"),
    (four_with(lambda x, W: x.astype(float) @ W.T), "float64"),
    ([lambda x, W: x @ W.T], "four functions"),
    ([lambda x, W: x @ W.T] * 4, "one per row"),
    (four_with(lambda x, W: x @ W.T), "one @ on a matrix of all 6 rows"),
    ([*four_with(at_once)[:3], at_once], "one np.einsum"),
]


# 19 Debug a port


def divergence_by(differs, order=lambda reference: reference):
    def first_divergence(reference, port, tolerance):
        names = [name for name in order(reference) if name in port]
        return next((name for name in names if differs(reference[name], port[name], tolerance)), None)

    return first_divergence


def relative(a, b):
    return np.linalg.norm(b - a) / np.linalg.norm(a)


def strict_keys(reference, port, tolerance):
    return next((name for name in reference if not relative(reference[name], port[name]) <= tolerance), None)


SIX_STAGES = {
    "A": "mlp.gelu", "B": "attn", "C": "attn.masked", "D": "text_features", "E": "eot",
    "F": "positional_embedding",
}  # fmt: skip
SIX_BUGS = {"A": "A1", "B": "T6-out", "C": "M3-late", "D": "N8", "E": "P3", "F": {"E2", "N5"}}


def features_from_elsewhere(port):
    import minclip

    right = minclip.encode_text(minclip.load(), port.tokens)
    port.replace("text_features", lambda at: right)


SIX_KINDS = {"A": "function", "B": "step", "C": "mask", "D": "step", "E": "end", "F": "step"}
WRONG["check_hypotheses"] = [
    ({**SIX_KINDS, "A": "step"}, "no matrix is wrong"),
    ({**SIX_KINDS, "C": "step"}, "keeps later tokens"),
    ({**SIX_KINDS, "E": "mask"}, "which row is read"),
    ({**SIX_KINDS, "F": "function"}, "its error is large"),
    ({**SIX_KINDS, "B": "bug"}, "is none of"),
    ({"A": "function"}, "still to do"),
]
WRONG["check_first_divergence"] = [
    (divergence_by(lambda a, b, t: relative(a, b) > t), "every comparison with NaN"),
    (
        divergence_by(lambda a, b, t: not (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) > 1 - t),
        "a cosine does not see",
    ),
    (divergence_by(lambda a, b, t: not abs(b - a).max() <= t), "and so is the difference"),
    (divergence_by(lambda a, b, t: not np.allclose(b, a, rtol=t)), "not each number"),
    (divergence_by(lambda a, b, t: not relative(a, b) <= t, lambda names: list(names)[::-1]), "first counts"),
    (strict_keys, "the port does not show"),
]
WRONG["check_stages"] = [
    ({**SIX_STAGES, "A": "mlp"}, "an earlier stage than mlp"),
    ({**SIX_STAGES, "B": "attn.context"}, "attn.context still agrees"),
    ({**SIX_STAGES, "E": None}, "try minclip.probe_tokens"),
    ({**SIX_STAGES, "C": "mask"}, "no stage is called"),
    ({"A": "mlp.gelu", "B": "attn"}, "still to do: C, D, E, F"),
    (["mlp.gelu"], "a dict"),
]
WRONG["check_bugs"] = [
    ({**SIX_BUGS, "A": "A3"}, "it is not A3, tanh GELU"),
    ({**SIX_BUGS, "F": "E2"}, "not all of it"),
    ({**SIX_BUGS, "D": "transposed"}, "the catalogue has no"),
    ({"A": "A1"}, "still to do: B, C"),
]
WRONG["check_fixes"] = [
    ({"A": features_from_elsewhere}, "fix where it is born"),
    ({"B": lambda port: port.weights("attn.in_proj_bias", lambda bias: 0 * bias)}, "still wrong from"),
    ({"D": lambda port: port.weights("text_projection", lambda weight: weight.T)}, "still to do: A, B, C"),
    ({"G": features_from_elsewhere}, "the letters are A to F"),
]

# 20 Feed a diffusion model


def tower_states(params, tokens, skip, norm, *, off=0, final=True, names=None):
    stages = minclip.trace(params, tokens)
    names = names or ["embedding", *(name for name in stages if name.split(".")[-1].isdigit())]
    x = stages[names[max(0, len(names) - 1 - skip + off)]]
    return checks.normed(x, params["ln_final.weight"], params["ln_final.bias"]) if norm and final else x


def cut_patches(images, size, order=(0, 2, 4, 1, 3, 5), swap=False):
    B, C, side, _ = images.shape
    n = side // size
    shape = (B, C, size, n, size, n) if swap else (B, C, n, size, n, size)
    return images.reshape(shape).transpose(order).reshape(B, n * n, -1)


def skip_by(n_of):
    def to_skip(tool, setting):
        return n_of[tool](setting)

    return to_skip


RIGHT_SKIP = {
    "diffusers SD 1": lambda n: n or 0,
    "webui SD 1": lambda n: (n or 1) - 1,
    "diffusers SDXL": lambda n: (n or 0) + 1,
}
WRONG["check_rows_after"] = [
    (lambda p, t, skip, norm: tower_states(p, t, skip, norm, off=-1), "one block too few"),
    (lambda p, t, skip, norm: tower_states(p, t, skip, norm, final=False), "ln_final is missing"),
    (lambda p, t, skip, norm: tower_states(p, t, skip, True), "no ln_final is wanted"),
    (lambda p, t, skip, norm: tower_states(p, t, skip, norm)[:, :5], "every row is wanted"),
    (
        lambda p, t, skip, norm: (
            tower_states(p, t, skip, norm) if skip < 3 else minclip.trace(p, t)[f"transformer.resblocks.{-1}"]
        ),
        "the embedding is left",
    ),
    (lambda p, t, skip, norm: tower_states(p, t, skip, norm, off=skip > 1), "one block too many"),
]
WRONG["check_padding"] = [
    ({"states of the padding"}, "features without the mask change"),
    ({"features", "states of the padding", "features without the mask"}, "features do not change"),
    (
        {"states of the words", "states of the padding", "features without the mask",
         "states of the words without the mask"},
        "no word sees what comes after",
    ),
    ({"features without the mask", "states of the words without the mask"}, "states of the padding change"),
    ({"states of the padding", "features without the mask"}, "each word reads the padding"),
    ({"states"}, "the names are"),
]  # fmt: skip
WRONG["check_to_skip"] = [
    (skip_by({**RIGHT_SKIP, "diffusers SDXL": lambda n: n or 0}), "entry -2, the second-to-last"),
    (skip_by({**RIGHT_SKIP, "diffusers SDXL": lambda n: n or 1}), "entry -(1 + 2)"),
    (skip_by({**RIGHT_SKIP, "webui SD 1": lambda n: n or 0}), "1 is the last"),
    (skip_by({**RIGHT_SKIP, "diffusers SD 1": lambda n: (n or 0) + 1}), "nothing is skipped"),
    (skip_by({**RIGHT_SKIP, "diffusers SD 1": lambda n: -(n or 0)}), "entry -(1 + 1)"),
    (skip_by({**RIGHT_SKIP, "diffusers SD 1": lambda n: n}), "returns None"),
]
WRONG["check_patches"] = [
    (lambda images, size: images.reshape(len(images), -1, 3 * size**2), "cuts strips"),
    (lambda images, size: cut_patches(images, size, (0, 4, 2, 1, 3, 5)), "column by column"),
    (lambda images, size: cut_patches(images, size, (0, 2, 4, 3, 5, 1)), "the colors come last"),
    (lambda images, size: cut_patches(images, size, (0, 2, 4, 1, 5, 3)), "on its side"),
    (
        lambda images, size: cut_patches(images, size, (0, 3, 5, 1, 2, 4), swap=True),
        "not into (size, patches)",
    ),
    (lambda images, size: cut_patches(images, size, (0, 1, 2, 4, 3, 5)), "move their axis"),
    (lambda images, size: cut_patches(images, size)[:, :, ::-1][:, 1:], "(B, patches, numbers of a patch)"),
]
