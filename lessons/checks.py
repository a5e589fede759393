"""The exercises' self-checks: each looks at one mechanism, and says in one line what is likely wrong.

A check is a function that takes the reader's answer and stops at the first thing amiss:

    @exercise
    def check_layer_norm(layer_norm):
        x, w, b = ...
        y = call(layer_norm, x, w, b)               # also sees to it that the inputs are unchanged
        like(y, x, "keepdims=True keeps ...")       # shape and dtype
        equal(y, truth, {"the variance is biased: divide by D, not D - 1": the value that gives})

In a notebook check_layer_norm(answer) prints ✓, ✗ and the likely cause, or that nothing was
attempted yet; it never raises, so that Run all passes. The truth is a slow loop or a constant from
elsewhere, not only minclip. check_layer_norm.verdict(answer) gives the line to a test.
"""

import contextlib
import copy
import functools
import itertools
import math
import operator
import os
import sys
import timeit
import traceback
import types
from typing import ClassVar

import numpy as np

import minclip
from minclip import model, tokenizer
from minclip.params import BLOCK, count_layers, keep
from minclip.porting import probe
from minclip.porting.catalogue import CATALOGUE
from minclip.porting.port import Port


class Wrong(Exception):
    """The answer is not right; the message names the likely cause."""


def exercise(body):
    """Make of a body that raises Wrong a check that prints one line."""
    name = body.__name__.removeprefix("check_").replace("_", " ")

    def verdict(answer):
        if answer is ...:
            return f"○ {name}: not attempted yet"
        try:
            said = body(answer)
        except NotImplementedError:
            return f"○ {name}: not attempted yet"
        except Wrong as wrong:
            return f"✗ {name}: {wrong}"
        except Exception as error:  # whatever the answer is, the reader gets one line and no traceback
            return f"✗ {name}: {slip(error)}"
        return f"✓ {name}: {said or 'right'}"

    @functools.wraps(body)
    def check(answer):
        print(verdict(answer))

    check.verdict = verdict
    return check


LIKELY = (  # (error, words of its message, likely cause)
    (TypeError, "NoneType", "a function without return gives None"),
    (TypeError, "argument", "compare the arguments with those of the stub"),
    (TypeError, "not callable", "a function is wanted here, not a value"),
    (TypeError, "", "print type(...) of what stands on this line"),
    (ValueError, "broadcast", "print both shapes; keepdims=True keeps an axis that was summed"),
    (ValueError, "matmul", "the inner sizes differ: weights are (out, in), so x @ weight.T"),
    (ValueError, "reshape", "a reshape keeps the count of numbers: print the shape before it"),
    (ValueError, "unpack", "print how many values stand at the right of ="),
    (ValueError, "truth value", "an array has many truth values: .all() or .any() makes one"),
    (ValueError, "inhomogeneous", "rows of different lengths make no array"),
    (ValueError, "", "print the shape and dtype of each array on this line"),
    (IndexError, "", "an index runs from 0 to the length minus 1: print the shape"),
    (KeyError, "", "there is no such key: print the keys"),
    (NameError, "", "a name is misspelled, or its cell has not been run"),
    (AttributeError, "NoneType", "a function without return gives None"),
    (AttributeError, "", "print type(...) of what stands before the dot"),
    (ZeroDivisionError, "", "print what you divide by"),
    (RecursionError, "", "the function calls itself without an end"),
    (Exception, "", "run the function on a small example of your own"),
)


def slip(error):
    """One line on an error that an answer raised: where, what, and the likely cause."""
    ours = (__file__, os.path.dirname(minclip.__file__), os.path.dirname(np.__file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    said = str(error).splitlines()[0] if str(error) else "no message"
    if not frames:
        return f"the answer does not have the form that the exercise asks for ({said})"
    cause = next(why for kind, part, why in LIKELY if isinstance(error, kind) and part in said)
    return f"line {frames[-1].lineno} of {frames[-1].name} raised {type(error).__name__}: {said}; {cause}"


def expect(condition, cause):
    """Stop, naming the likely cause, unless the condition holds."""
    if not condition:
        raise Wrong(cause)


def call(function, *inputs, slips=()):
    """function(*inputs), with a word if it gives nothing back or writes into its inputs.

    slips maps a word of an error's message to the likely cause of that error.
    """
    given = copy.deepcopy(inputs)
    expect(callable(function), f"a function was wanted, not {type(function).__name__}")
    try:
        with np.errstate(all="ignore"):
            result = function(*inputs)
    except Exception as error:
        for word, cause in dict(slips).items():
            expect(word not in f"{type(error).__name__}: {error}", cause)
        raise
    for before, after in zip(given, inputs, strict=True):
        same = np.array_equal if isinstance(before, np.ndarray) else operator.eq
        expect(
            same(before, after),
            "your function writes into its input: make a new array (x = x + y, not x += y)",
        )
    expect(result is not None, "your function returns None: does it end in return?")
    return result


def attempt(function, *inputs, slips):
    """call, where slips maps words of an error's message to the likely cause."""
    try:
        return call(function, *inputs)
    except (ValueError, IndexError, TypeError) as error:
        for words, cause in slips.items():
            expect(words not in str(error), cause)
        raise


def numbers(answer, count=None):
    """answer as an array of float64: one number, or a list of count numbers."""
    wanted = "one number was wanted" if count is None else f"a list of {count} numbers was wanted"
    told = f"{wanted}, not {' '.join(repr(answer).split())[:60]}"
    try:
        array = np.asarray(answer, dtype=float)
    except (TypeError, ValueError):
        raise Wrong(told) from None
    expect(array.shape == (() if count is None else (count,)), told)
    return array


def keyed(answer, keys):
    """answer must be a dict with these keys, none of them left as it was."""
    expect(
        isinstance(answer, dict) and set(answer) == set(keys),
        f"a dict with the keys {', '.join(keys)} was wanted",
    )
    open_ = [key for key in keys if answer[key] is None or answer[key] is ...]
    expect(not open_, f"still to do: {', '.join(open_)}")
    return answer


def like(result, shape, dtype=None, cause=""):
    """result must be an array of this shape, and of this dtype if one is given."""
    expect(isinstance(result, np.ndarray), f"an array was wanted, not {type(result).__name__}")
    hint = f": {cause}" if cause else ""
    expect(result.shape == tuple(shape), f"the shape is {result.shape} and should be {tuple(shape)}{hint}")
    if dtype is not None:
        expect(result.dtype == dtype, f"the dtype is {result.dtype} and should be {np.dtype(dtype)}{hint}")


def equal(result, truth, misses=(), tolerance=1e-5):
    """result must be truth. misses maps the likely cause of a wrong answer to the value that it gives."""
    result, truth = np.asarray(result), np.asarray(truth)
    if close(result, truth, tolerance):
        return
    for cause, value in dict(misses).items():
        expect(not close(result, value, tolerance), cause)
    expect(result.shape == truth.shape, f"the shape is {result.shape} and should be {truth.shape}")
    expect(not np.isnan(result.astype(float)).any() or np.isnan(truth).any(), "there is a NaN in your result")
    at = tuple(int(i) for i in np.argwhere(~np.isclose(result, truth, tolerance, tolerance))[0])
    where = f" at {list(at)}" if at else ""
    raise Wrong(f"the first difference is{where}: {result[at]:.6g}, and {truth[at]:.6g} was wanted")


def match(said, right, probes):
    """said must be right, both dicts from letter to fault. probes maps each fault to a test that shows it."""
    letters, known = sorted(right), sorted(probes)
    expect(isinstance(said, dict) and set(said) == set(right), f"a dict with the keys {', '.join(letters)}")
    for letter in letters:
        expect(said[letter] in known, f"{letter}: {said[letter]!r} is none of {', '.join(known)}")
    for letter in letters:
        expect(said[letter] == right[letter], f"{letter} is not {said[letter]!r}: {probes[right[letter]]}")


def close(a, b, tolerance=1e-5):
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and np.allclose(a, b, tolerance, tolerance, equal_nan=True)


def agree(by_hand, package, tolerance=1e-5):
    """Print that what was worked out by hand is what the package gives; AssertionError if it is not."""
    by_hand, package = np.asarray(by_hand), np.asarray(package)
    np.testing.assert_allclose(by_hand, package, rtol=tolerance, atol=tolerance)
    print(f"the same to rounding: shape {package.shape}, {package.dtype}")


# 00 Watch it work

QUESTIONS = {  # a sentence, and the names of three pictures
    1: ("a kitten asleep on a couch", ("cat face", "couch and lamp", "sleeping face")),
    2: ("it tells you the time", ("microphone", "frog", "watch")),
    3: ("it is raining cats and dogs", ("cloud with rain", "cat", "umbrella")),
    4: ("she is not angry", ("angry face", "smiling face", "banana")),
    5: ("a vehicle that flies to the moon", ("rocket", "fly", "full moon")),
}
DENIALS = {"no", "not", "without", "never", "nothing", "neither", "nor"}


@functools.cache
def picture_table():
    """The built-in model, its pictures' names, and their features."""
    _, names, features = minclip.pictures()
    return minclip.load(), names, features


def order_of(text):
    """The names of all pictures, the nearest to text first."""
    params, names, features = picture_table()
    cosines = features @ minclip.normalize(minclip.encode_text(params, minclip.tokenize(text)))[0]
    return [names[i] for i in np.argsort(-cosines)]


def best_letters():
    """The letter of the nearest of the three pictures, for each of QUESTIONS."""
    orders = {number: order_of(text) for number, (text, _) in QUESTIONS.items()}
    ranks = {number: [orders[number].index(name) for name in QUESTIONS[number][1]] for number in QUESTIONS}
    return {number: "ABC"[np.argmin(ranks[number])] for number in QUESTIONS}


@exercise
def check_guesses(guesses):
    expect(isinstance(guesses, dict), 'write a letter for each sentence: {1: "A", 2: "B", ...}')
    missing = [number for number in QUESTIONS if number not in guesses]
    expect(not missing, f"sentences without a guess: {missing}")
    odd = [number for number in QUESTIONS if guesses[number] not in ("A", "B", "C")]
    expect(not odd, f'the guesses are "A", "B" or "C": look at {odd}')
    right = best_letters()
    wrong = [number for number in QUESTIONS if guesses[number] != right[number]]
    if wrong:
        text, options = QUESTIONS[wrong[0]]
        yours, its = (options["ABC".index(letters[wrong[0]])] for letters in (guesses, right))
        score = f"{len(QUESTIONS) - len(wrong)} of {len(QUESTIONS)} guesses agree with the model"
        raise Wrong(f"{score}. For {text!r} it prefers {its!r} to {yours!r}. Which word may be the cause?")
    return "you chose as the model does, in all five"


def plain_words(text):
    return [word.strip(".,;:!?\"'()").lower() for word in text.split()]


def alike(a, b):
    """Whether two words are forms of one word, as far as their first letters tell."""
    return a == b or (min(len(a), len(b)) > 2 and (a.startswith(b[:4]) or b.startswith(a[:4])))


@exercise
def check_riddle(riddle):
    pair = isinstance(riddle, tuple) and len(riddle) == 2 and all(isinstance(part, str) for part in riddle)
    expect(pair, 'write your sentence and a name: ("a sentence", "name")')
    sentence, name = riddle
    order = order_of(sentence)
    expect(name in order, f"no picture is called {name!r}: the list `names` has all of them")
    expect(len(sentence.split()) >= 4, "write at least four words: one word is no riddle")
    own = [word for word in plain_words(name) if word not in ("with", "and", "the", "of", "in", "on")]
    said = [word for word in plain_words(sentence) if any(alike(word, other) for other in own)]
    expect(not said, f"{', '.join(said)} gives the name away: find other words")
    rank = 1 + order.index(name)
    expect(rank == 1, f"the model finds {order[0]!r} first; {name!r} is number {rank} of {len(order)}")
    return f"{name!r} found, without a word of its name"


@exercise
def check_failure(failure):
    expect(isinstance(failure, str), 'write a sentence, such as "no dogs allowed"')
    said = plain_words(failure)
    at = [i for i, word in enumerate(said) if word in DENIALS or word.endswith(("n't", "n’t"))]
    expect(at, f"your sentence denies nothing: use one of {', '.join(sorted(DENIALS))}")
    found = order_of(failure)[0]
    names = [word for word in plain_words(found) if word not in DENIALS]
    shown = [i for i, word in enumerate(said) if any(alike(word, other) for other in names)]
    expect(shown, f"the model finds {found!r}, which your sentence does not name: no failure yet")
    expect(
        max(shown) > at[0],
        f"the model finds {found!r}, and rightly so: what you deny comes after {said[at[0]]!r}",
    )
    return f"you say {said[at[0]]!r}, and the model finds {found!r} first all the same"


# 01 Turn text into tokens


def toy_ranks():
    """The toy list of merges of lesson 01: pair to rank."""
    lines = ["l o", "n e", "lo w", "e r</w>", "w er</w>", "ne w"]
    return {tuple(line.split()): rank for rank, line in enumerate(lines)}


@exercise
def check_toy_merges(pieces):
    expect(isinstance(pieces, dict) and set(pieces) == {"lower", "newer"}, "a dict: lower and newer")
    spaced = {word: " ".join(str(text).split()) for word, text in pieces.items()}
    for word, text in spaced.items():
        expect(text.endswith("</w>"), f"{word}: the last piece keeps its </w>")
        expect(text.replace(" ", "") == f"{word}</w>", f"{word}: {text} does not spell it")
    for word, wrong, cause in (
        ("lower", "lower</w>", "low + er</w> is not on the list: it stays two pieces"),
        ("lower", "lo wer</w>", "after l + o, the lowest rank is lo + w (2), not e + r</w> (3)"),
        ("lower", "lo w er</w>", "after l + o, the lowest rank is lo + w (2), not e + r</w> (3)"),
        ("lower", "low e r</w>", "one more pair is on the list: e + r</w>"),
        ("lower", "lo w e r</w>", "that is one step; lo + w is on the list too"),
        ("newer", "new er</w>", "w + er</w> (4) comes before ne + w (5)"),
        ("newer", "newer</w>", "ne + wer</w> is not on the list: it stays two pieces"),
        ("newer", "ne w er</w>", "one more pair is on the list: w + er</w>"),
        ("newer", "ne w e r</w>", "that is one step; e + r</w> is on the list too"),
    ):
        expect(spaced[word] != wrong, f"{word}: {cause}")
    for word, right in (("lower", "low er</w>"), ("newer", "ne wer</w>")):
        expect(spaced[word] == right, f"{word}: {spaced[word]} is not it; write every step on paper")
    return "the lowest rank goes first, at every step"


@exercise
def check_split(split):
    contractions = "'s is one piece, and so are 't 'm 'd 're 've 'll: they come before the other rules"
    for text, pieces, cause in (
        ("a photo of a cat", ["a", "photo", "of", "a", "cat"], "a run of letters is one piece"),
        ("a photo of a cat.", ["a", "photo", "of", "a", "cat", "."], "a full stop is a piece of its own"),
        ("a cat's toy", ["a", "cat", "'s", "toy"], contractions),
        ("we've i'm", ["we", "'ve", "i", "'m"], contractions),
        ("they're don't", ["they", "'re", "don", "'t"], contractions),
        ("he'd she'll", ["he", "'d", "she", "'ll"], contractions),
        ("'hello", ["'", "hello"], "an apostrophe that starts no contraction is an ordinary sign"),
        ("room 101", ["room", "1", "0", "1"], "CLIP's rule takes digits one at a time"),
        ("wow!!! ok", ["wow", "!!!", "ok"], "a run of signs is one piece"),
        ("(cat)", ["(", "cat", ")"], "a run of signs ends before a letter"),
        ("#1", ["#", "1"], "a run of signs ends before a digit"),
        ("snake_case", ["snake", "_", "case"], "_ is a sign, not a letter"),
        ("naïve café", ["naïve", "café"], "letters are more than a to z: \\p{L}"),
        ("m²³", ["m", "²", "³"], "digits are more than 0 to 9: \\p{N}"),
        ("one\ttab", ["one", "tab"], "white space is more than the space: \\s"),
    ):
        got = list(call(split, text))
        groups = any(isinstance(piece, tuple) or piece == "" for piece in got)
        expect(not groups, "with a group (...), findall returns only the group: write (?:...)")
        expect(got == pieces, f"{text!r} became {got}, and {pieces} was wanted: {cause}")
    for text in (" ".join(tokenizer.spellings()[i::997]) for i in range(0, 997, 100)):
        wanted, got = tokenizer.PIECES.findall(text), list(call(split, text))
        wrong = next((pair for pair in itertools.zip_longest(got, wanted) if pair[0] != pair[1]), None)
        expect(not wrong, f"in a long text a piece is {wrong and wrong[0]!r}, not {wrong and wrong[1]!r}")
    return "the pieces of every text are CLIP's"


@exercise
def check_merge(merge):
    toy, lowest = toy_ranks(), "of all pairs on the list, the one with the lowest rank goes first"
    for before, ranks, after, misses in (
        ("w o", toy, "w o", {}),
        ("lo lo n e", toy, "lo lo ne", {}),
        ("l o w e r</w>", toy, "low er</w>",
         {"lo w e r</w>": "that is one step: repeat until no pair is on the list",
          "lo wer</w>": "the highest rank went first: take the lowest"}),
        ("n e w e r</w>", toy, "ne wer</w>", {"new er</w>": f"that joins from left to right: {lowest}"}),
        ("o o o", {("o", "o"): 0}, "oo o", {"o oo": "of equal pairs, the leftmost goes first"}),
        ("l o o l o", toy, "lo o lo", {}),
        ("h a t b o x</w>", tokenizer.ranks(), "hat box</w>", {}),
        ("b a c k p a c k e r s</w>", tokenizer.ranks(), "back packers</w>", {}),
        (" ".join("electroencephalography") + "</w>", tokenizer.ranks(),
         "electro ence ph alo graphy</w>",
         {"electro ence phal ography</w>": f"that is the longest match: {lowest}"}),
    ):  # fmt: skip
        got = call(merge, before.split(), ranks)
        expect(isinstance(got, list), f"a list of pieces was wanted, not {type(got).__name__}")
        got = " ".join(map(str, got))
        expect(got not in misses, f"{before} became {got}: {misses.get(got)}")
        expect(got == after, f"{before} became {got}, and {after} was wanted")
    return "the lowest rank first, until no pair is on the list"


@exercise
def check_row(row):
    for text, context, wanted, misses in (
        ("cat", 6, [49406, 2368, 49407, 0, 0, 0],
         {(49406, 1481, 49407, 0, 0, 0): "the last byte needs its </w> before the first merge",
          (2368, 49407, 0, 0, 0, 0): "the row begins with the start id 49406",
          (2368, 0, 0, 0, 0, 0): "the start id 49406 and the end id 49407 stand around the text",
          (49406, 2368, 0, 0, 0, 0): "the end id 49407 comes after the text",
          (49406, 2368, 49407, 49407, 49407, 49407): "CLIP pads with 0, not with the end id",
          (49406, 2368, 49407): "pad with 0 up to context_length"}),
        ("a photo of a cat.", 8, [49406, 320, 1125, 539, 320, 2368, 269, 49407],
         {(49406, 320, 1125, 539, 320, 1481, 269, 49407): "split the text first: the full stop is a word"}),
        ("a photo of a cat", 5, [49406, 320, 1125, 539, 49407],
         {(49406, 320, 1125, 539, 320): "the end id was cut off: a cut row keeps its end",
          (49406, 320, 1125, 539, 320, 2368, 49407): "cut the row at context_length ids"}),
        ("café", 4, [49406, 15304, 49407, 0],
         {(49406, 3471, 421, 49407): "write UTF-8 bytes: é is two bytes"}),
        ("A CAT", 5, [49406, 320, 2368, 49407, 0], {}),
        ("cat &amp; me", 6, [49406, 2368, 261, 614, 49407, 0], {}),
    ):  # fmt: skip
        slips = {"KeyError": "a piece is not in the vocabulary: write bytes by byte_characters()"}
        got = [int(id) for id in call(row, text, context, slips=slips)]
        expect(tuple(got) not in misses, f"{text!r} became {got}: {misses.get(tuple(got))}")
        cause = "" if text == tokenizer.clean(text) else ": clean the text first"
        expect(got == wanted, f"{text!r} became {got}, and {wanted} was wanted{cause}")
    for text in ("room 101!!!", "don't  (panic)", "great!😀", "Ünïcode " * 9, ""):
        wanted, got = (
            minclip.tokenize(text, context_length=16, truncate=True)[0].tolist(),
            call(row, text, 16),
        )
        expect(list(got) == wanted, f"{text!r} became {list(got)}, and {wanted} was wanted")
    return "this is CLIP's tokenizer, id for id"


# 02 Look up embeddings


def small_table():
    """A table [V, D] and positions [context, D] with round numbers: a row is told at a glance."""
    table = (100 * np.arange(10)[:, None] + np.arange(4)).astype(np.float32)
    positions = (np.arange(1, 7)[:, None] / np.array([8, 4, 2, 1])).astype(np.float32)
    return table, positions


@exercise
def check_multiplications(counts):
    L, V, D = 77, 49408, 512
    pair = isinstance(counts, (tuple, list)) and len(counts) == 2
    expect(pair and all(isinstance(n, (int, float, np.number)) for n in counts), "two numbers: (all, by one)")
    every, ones = counts
    for wrong, cause in (
        (L * V, "each number of the one-hot matrix is multiplied by D numbers"),
        (V * D, "that is one token: there are L of them"),
        (L * D, "all: the multiplications by 0 count too"),
        (2 * L * V * D, "additions do not count here"),
    ):
        expect(every != wrong, cause)
    expect(every == L * V * D, f"all: {every:,} is not it; a sum over V for each of the L × D results")
    for wrong, cause in (
        (L, "by one: each 1 is multiplied by D numbers"),
        (D, "by one: that is one token"),
        (L * V, "by one: a one-hot row has a single 1, not V"),
        (every - L * D, "those are the multiplications by 0"),
        (1 / V, "by one: a count was wanted, not a share"),
    ):
        expect(ones != wrong, cause)
    expect(ones == L * D, f"by one: {ones:,} is not it; how many ones are there, and what does each meet?")
    return "of 49,408 multiplications, one is by 1"


@exercise
def check_one_hot_lookup(one_hot_lookup):
    table, _ = small_table()
    tokens = np.array([3, 0, 3, 7])
    slips = {"matmul": "the product does not fit: it is (L, V) @ (V, D), so the one-hot matrix is (L, V)"}
    rows = call(one_hot_lookup, table, tokens, slips=slips)
    like(rows, (4, 4), cause="one row of the table for each token: (L, V) @ (V, D)")
    misses = {
        "the rows are scaled by the ids: a one-hot row holds a 1, not the id": table[tokens] * tokens[:, None]
    }
    equal(rows, table[[3, 0, 3, 7]], misses)
    like(rows, (4, 4), np.float32, "make the one-hot matrix float32, or the product is float64")
    table = np.tile(table, (2, 1))
    table[19] = np.inf  # no token picks this row, but a product multiplies it by 0, and 0 times inf is NaN
    rows = call(one_hot_lookup, table, tokens, slips=slips)
    expect(np.isnan(rows).all(), "that is an indexed lookup: write the one-hot matrix, and multiply")
    return "a lookup is a product with a one-hot matrix"


@exercise
def check_embed(embed):
    table, positions = small_table()
    slips = {
        "broadcast": "rows and positions do not add: slice the first L positions, L = tokens.shape[1]",
        "IndexError": "an index is out of bounds: positions are looked up by place, not by token id",
    }
    for tokens in (np.array([[3, 0, 7], [1, 1, 2]]), np.array([[5, 4, 3, 2, 1, 0]]), np.array([[9]] * 3)):
        B, L = tokens.shape
        x = call(embed, table, positions, tokens, slips=slips)
        like(x, (B, L, 4), cause="tokens (B, L) pick rows of the table: (B, L, D)")
        truth = np.zeros((B, L, 4))
        for b, i, d in np.ndindex(B, L, 4):
            truth[b, i, d] = table[tokens[b, i], d] + positions[i, d]
        rows = table[tokens]
        misses = {
            "the positions are not in it": rows,
            "the tokens are not in it": np.broadcast_to(positions[:L], rows.shape),
            "the positions start at row 1: they start at row 0": rows + np.roll(positions, -1, 0)[:L],
            "the last rows of the positions were taken, not the first L": rows + positions[-L:],
            "the positions were looked up by token id, not by place": rows + positions[tokens % 6],
            "every token got position 0": rows + positions[0],
        }
        equal(x, truth, misses)
        like(x, (B, L, 4), np.float32, "float32 in, float32 out")
    return "any length up to the context"


@exercise
def check_add_positions(add_positions):
    table, positions = small_table()
    first = table[np.array([3, 0, 7])]
    y = add_positions(first, positions[:3])
    expect(y is not None, "your function returns None: does it end in return?")
    expect(
        np.array_equal(first, table[np.array([3, 0, 7])]),
        "x was written into: x += y changes the caller's array",
    )
    view = table[2:5]
    y = call(add_positions, view, positions[:3])
    expect(
        not np.shares_memory(y, view),
        "what came back is a view of the table: the next writer changes the table",
    )
    like(y, (3, 4), np.float32)
    equal(y, view + positions[:3])
    return "the table is as it was"


# 03 Normalize a vector


def normed(x, weight=1, bias=0, *, eps=1e-5, ddof=0, outside=False, center=True, axis=-1):
    """Layer norm with every known slip as an option."""
    if axis is None:
        mean, variance = x.mean(), x.var()
    else:
        mean, variance = x.mean(axis=axis, keepdims=True), x.var(axis=axis, keepdims=True, ddof=ddof)
    if not center:
        mean, variance = 0, (x * x).mean(axis=-1, keepdims=True)
    spread = variance**0.5 + eps if outside else (variance + eps) ** 0.5
    return (x - mean) / spread * weight + bias


def encode_with_norm(params, tokens, **slips):
    """The features of an encoder whose every layer norm is `normed` with these slips."""
    stream = [None]

    def tap(name, array):
        if name.endswith(("ln_1", "ln_2", "ln_final")):
            weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
            return normed(stream[0], weight, bias, **slips).astype(array.dtype)
        if name == "embedding" or name.endswith("residual") or name.count(".") == 2:
            stream[0] = array
        return array

    return minclip.encode_text(params, tokens, tap=tap)


@exercise
def check_scaled(scaled):
    expect(np.shape(scaled) == (8,), "a list of eight numbers was wanted")
    x = np.array([2, 4, 4, 4, 5, 5, 7, 9])
    misses = {
        "that is the centered row: divide it by the root of the variance": x - 5,
        "divide by the root of the variance, not by the variance": (x - 5) / 4,
        "the mean is not subtracted": x / 2,
        "the variance is the sum of the squares divided by 8, not by 7": normed(x, ddof=1),
        "the sum of the squares is divided by 8 before the root": (x - 5) / 32**0.5,
        "weight and bias come later": normed(x) * [1, 1, 2, 1, 1, 1, 0, 1] + [0, 0, 0, 0, 1, 0, 0, -1],
    }
    equal(scaled, [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2], misses, 1e-3)
    return "mean 0 and variance 1"


@exercise
def check_layer_norm(layer_norm):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((2, 3, 8)) * [[[2], [0.01], [0.003]]] + 1).astype(np.float32)
    weight, bias = (rng.standard_normal(8).astype(np.float32) + shift for shift in (2, 0))
    keepdims = "keepdims=True keeps the mean and the variance as (..., 1)"
    y = call(layer_norm, x, weight, bias, slips={"broadcast": keepdims})
    like(y, x.shape, cause=keepdims)
    truth = np.zeros(x.shape)
    for b, i in np.ndindex(2, 3):
        row = [float(value) for value in x[b, i]]
        mean = sum(row) / 8
        variance = sum((value - mean) ** 2 for value in row) / 8
        for d in range(8):
            truth[b, i, d] = (row[d] - mean) / (variance + 1e-5) ** 0.5 * weight[d] + bias[d]
    x = x.astype(float)
    misses = {
        "the variance divides by D, not by D - 1": normed(x, weight, bias, ddof=1),
        "eps belongs inside the root: sqrt(variance + eps)": normed(x, weight, bias, outside=True),
        "eps outside the root, and D - 1: the Annotated Transformer's": normed(
            x, weight, bias, outside=True, ddof=1
        ),
        "eps is missing": normed(x, weight, bias, eps=0),
        "the mean is not subtracted": normed(x, weight, bias, center=False),
        "you normalized over the tokens: the axis is -1": normed(x, weight, bias, axis=-2),
        "one mean for everything: each row has its own": normed(x, weight, bias, axis=None),
        "divide by the root of the variance, not by the variance": (x - x.mean(-1, keepdims=True))
        / (x.var(-1, keepdims=True) + 1e-5) * weight + bias,
        "the weight is not in it": normed(x, 1, bias),
        "the bias is not in it": normed(x, weight),
        "weight and bias come after the scaling": normed(x * weight + bias),
        "the bias is added before the weight": (normed(x) + bias) * weight,
        "the mean of the squares is the variance only after centering": (x - x.mean(-1, keepdims=True))
        / ((x * x).mean(-1, keepdims=True) + 1e-5) ** 0.5 * weight + bias,
    }  # fmt: skip
    equal(y, truth, misses, 3e-4)
    like(y, x.shape, np.float32, "float32 in, float32 out")
    short = x[0, :, :5].astype(np.float32)
    wanted = normed(short, weight[:5], bias[:5])
    equal(call(layer_norm, short, weight[:5], bias[:5]), wanted, tolerance=3e-4)
    flat = call(layer_norm, np.full((1, 8), 3, dtype=np.float32), weight, bias)
    expect(not np.isnan(flat).any(), "a row of equal numbers gives NaN: eps keeps the root above 0")
    equal(flat, bias[None])
    return "mean, root of variance plus eps, weight, bias"


@exercise
def check_unchanged(unchanged):
    known = {"shift", "double", "negate", "reverse", "both", "stretch"}
    expect(isinstance(unchanged, (set, list, tuple)), "a set of names was wanted, such as {'shift'}")
    unchanged = set(unchanged)
    expect(unchanged <= known, f"the names are {', '.join(sorted(known))}")
    expect("negate" not in unchanged, "a spread is never negative, so -x comes out negated")
    expect(
        "reverse" not in unchanged, "the row read backwards comes out backwards: each number keeps its column"
    )
    expect("stretch" not in unchanged, "one column times 10 changes the direction of the row")
    expect("shift" in unchanged, "the mean of x + 5 is 5 more, and the mean is subtracted")
    expect("double" in unchanged, "2 * x has twice the spread, and the row is divided by its spread")
    expect("both" in unchanged, "3 * x - 7 is a positive factor and a shift: both are removed")
    return "the mean and the size of a row are forgotten"


SUSPECTS = {
    "A": ("outside", {"outside": True}), "B": ("unbiased", {"ddof": 1}),
    "C": ("mean", {"center": False}), "D": ("eps", {"eps": 1e-7}),
}  # fmt: skip


def suspect(letter, x):
    """One of four layer norms with a fault, for exercise 3 of lesson 03. (Reading on spoils it.)"""
    return normed(np.asarray(x, dtype=float), **SUSPECTS[letter][1])


@exercise
def check_suspects(culprits):
    probes = {
        "unbiased": "compare its spread with 1 on an ordinary row",
        "mean": "look at the mean of what it gives",
        "outside": "try rows of variance 1e-8",
        "eps": "try rows of variance 1e-8",
    }
    match(culprits, {letter: fault for letter, (fault, _) in SUSPECTS.items()}, probes)
    return "four near-misses told apart by what they do"


# 04 Let tokens attend


def shares(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@exercise
def check_possible(possible):
    """Which of four points can be a mean of values in a softmax's shares; asked by red, cat and the end."""
    expect(isinstance(possible, dict) and set(possible) == {"red", "cat", "end"}, "a dict: red, cat and end")
    said = {word: set(letters) for word, letters in possible.items()}
    for word, letters in said.items():
        expect(letters <= set("ABCD"), f"{word}: the letters are A to D, such as 'AB'")
    for word, wrong, cause in (
        ("red", "ACD", "red has two shares, so its mean is on the line between ⟨start⟩ and red"),
        ("cat", "B", "on this edge the share of cat would be 0, and a softmax gives no share of exactly 0"),
        ("cat", "CD", "it is outside of the triangle of ⟨start⟩, red and cat, and ⟨end⟩ is masked"),
        ("end", "B", "on this edge two shares would be 0, and a softmax gives no share of exactly 0"),
        ("end", "D", "it is outside of all values, and a mean is never outside"),
    ):
        for letter in sorted(said[word] & set(wrong)):
            raise Wrong(f"{word}: {letter} is not possible: {cause}")
    for word, right in (("red", "B"), ("cat", "A"), ("end", "AC")):
        missing = sorted(set(right) - said[word])
        expect(not missing, f"{word}: {' and '.join(missing)} is possible: draw the values that it can see")
    return "a weighted mean lies between the values"


@exercise
def check_softmax(softmax):
    x = np.array([[[1, 2, 3], [0, 0, 0]], [[-1, 4, 2], [5, 5, -5]]], dtype=np.float32)
    keepdims = "keepdims=True keeps the maximum and the sum as (..., 1)"
    y = call(softmax, x, slips={"broadcast": keepdims})
    like(y, x.shape, cause=keepdims)
    truth = np.zeros(x.shape)
    for i in np.ndindex(2, 2):
        e = [math.exp(value) for value in x[i].tolist()]
        truth[i] = [value / sum(e) for value in e]
    misses = {
        "the shares sum to 1 down the columns: the axis is -1": shares(x, -2),
        "one sum for everything: each row has its own": np.exp(x) / np.exp(x).sum(),
        "the exponentials are not divided by their sum": np.exp(x),
        "only the maximum is subtracted: exp and the division are missing": x - x.max(-1, keepdims=True),
    }  # fmt: skip
    equal(y, truth, misses)
    like(y, x.shape, np.float32, "float32 in, float32 out")
    large = call(softmax, np.array([[1000, 999, 0], [-1000, -1001, -1000]], dtype=np.float32))
    expect(not np.isnan(large).any(), "NaN: subtract the row maximum before exponentiating")
    rows = [[0.7310586, 0.2689414, 0], [0.4223188, 0.1553624, 0.4223188]]
    equal(large, rows, {"one maximum for everything: each row has its own": [rows[0], [0, 0, 0]]})
    hidden = call(softmax, np.array([[2, -np.inf, -np.inf]], dtype=np.float32))
    equal(hidden, [[1, 0, 0]])
    return "shares of sum 1, and no overflow"


@exercise
def check_attend(attend):
    rng = np.random.default_rng(4)
    q, k, v = (2 * rng.standard_normal((3, 5, 4))).astype(np.float32)
    slips = {
        "broadcast": "keepdims=True keeps the maximum and the sum as (L, 1)",
        "matmul": "scores are q @ k.T, and the result is weights (L, L) @ v (L, K)",
    }
    context = call(attend, q, k, v, slips=slips)
    like(context, (5, 4), cause="(L, L) weights @ (L, K) values")
    expect(not np.isnan(context).any(), "NaN: 0 times inf is not a number, and neither is the softmax of a "
           "row of -inf; build the mask with np.where or np.triu(..., 1)")  # fmt: skip
    truth = np.zeros((5, 4))
    for i in range(5):
        e = [math.exp(sum(float(q[i, d]) * float(k[j, d]) for d in range(4)) / 2) for j in range(i + 1)]
        for j in range(i + 1):
            truth[i] += e[j] / sum(e) * v[j]
    scores, mask = q @ k.T / 2, np.triu(np.full((5, 5), -np.inf), 1)
    misses = {
        "later tokens are seen: add the mask": shares(scores) @ v,
        "the mask is applied after the softmax, so the shares do not sum to 1": np.tril(shares(scores)) @ v,
        "the scores are not divided by the root of K": shares(2 * scores + mask) @ v,
        "divide by the root of K, not by K": shares(scores / 2 + mask) @ v,
        "divide by the root of K, not of L": shares(scores * 2 / 5**0.5 + mask) @ v,
        "the softmax runs down the columns: the axis is -1": shares(scores + mask, 0)
        @ v,
        "q and k are exchanged: scores are q @ k.T": shares(scores.T + mask) @ v,
        "the wrong triangle is forbidden": shares(scores + mask.T) @ v,
        "the values are not in it: weights @ v": shares(scores + mask) @ k,
        "each token must also attend to itself: the diagonal is not masked": shares(
            np.where(np.tri(5, k=-1, dtype=bool), scores, -1e9)
        ) @ v,
        "the mask starts one diagonal too late": shares(scores + np.triu(np.full((5, 5), -np.inf), 2)) @ v,
        "masked scores must be -inf: 0 still gets a share": shares(np.tril(scores)) @ v,
    }  # fmt: skip
    equal(context, truth, misses)
    q, k, v = rng.standard_normal((3, 3, 9)).astype(np.float32)
    scores, mask = q @ k.T, np.triu(np.full((3, 3), -np.inf), 1)
    halved = {"divide by the root of K for any K: K is q.shape[-1]": shares(scores / 2 + mask) @ v}
    equal(call(attend, q, k, v, slips=slips), shares(scores / 3 + mask) @ v, halved)
    large = call(attend, 100 * q, 100 * k, v)
    expect(not np.isnan(large).any(), "NaN for large scores: subtract the row maximum before exp")
    like(context, (5, 4), np.float32, "a float64 mask or np.sqrt(4) makes the result float64")
    return "scores, mask, softmax, weighted mean"


@exercise
def check_rows_changed(rows_changed):
    expect(
        isinstance(rows_changed, (set, list, tuple, range)), "a set of positions was wanted, such as {0, 1}"
    )
    rows = set(rows_changed)
    expect(rows <= set(range(7)), "positions run from 0 to 6")
    expect(not rows & {0, 1, 2}, "rows 0 to 2 come earlier, and the mask hides position 3 from them")
    expect(3 in rows, "row 3 itself changes: its query, key and value are those of the new token")
    expect(rows == {3, 4, 5, 6}, "every later row may attend to position 3, also the last one")
    return "a change flows to later rows only"


# 05 Split into heads


def placed(B, L, D):
    """[B, L, D] whose every number tells its place: 104 is in row 1, column 4."""
    x = 1000 * np.arange(B)[:, None, None] + 100 * np.arange(L)[:, None] + np.arange(D)
    return x.astype(np.float32)


@exercise
def check_reshapes(predicted):
    keyed(predicted, "ABC")
    said = {letter: tuple(numbers(predicted[letter], 3).tolist()) for letter in "ABC"}
    slips = {
        ("A", (0, 1, 2)): "that is row 0 of head 0; row 1 was asked for",
        ("A", (13, 14, 15)): "that is sheets[1, 1]: the first index is the head",
        ("B", (0, 2, 4)): "that is row 0 of head 0; row 1 was asked for",
        ("B", (11, 13, 15)): "that is head 1: head 0 takes the first number of each pair",
        ("C", (0, 10, 20)): "that is row 0 of head 0; row 1 was asked for",
        ("C", (4, 14, 24)): "that is sheets[1, 1]: the first index is the head",
    }
    moves = {
        "A": ((3, 4, 5), "reshape reads 0, 1, 2, 3, 4, 5, 10 ... in order, three numbers per row"),
        "B": ((10, 12, 14), "row 1 of x is cut into the pairs 10 11, 12 13, 14 15"),
        "C": ((1, 11, 21), "row 1 of x.T is column 1 of x"),
    }
    for letter, (truth, cause) in moves.items():
        expect(said[letter] != (10, 11, 12), f"{letter}: that is what we want, and not what this move gives")
        slip = slips.get((letter, said[letter]))
        expect(slip is None, f"{letter}: {slip}")
        expect(said[letter] == truth, f"{letter}: {cause}")
    return "tokens mixed, columns interleaved, tokens and columns exchanged"


@exercise
def check_split_heads(split_heads):
    B, L, H, K = 2, 3, 4, 5
    x = placed(B, L, H * K)
    slips = {
        "cannot reshape": "a reshape must keep the count of numbers: there is a batch axis B in front",
        "axes don't match": "transpose needs a place for each of the four axes: (B, L, H, K) has four",
    }
    y = attempt(split_heads, x, H, slips=slips)
    like(y, np.shape(y))
    cut = x.reshape(B, L, H, K)
    expect(y.shape != cut.shape, "the columns are cut; now the heads must come before the tokens: transpose")
    like(y, (B, H, L, K), cause="(B, H, L, K) with K = D // H")
    truth = np.zeros((B, H, L, K))
    for b, h, i, d in np.ndindex(B, H, L, K):
        truth[b, h, i, d] = x[b, i, h * K + d]
    misses = {
        "right shape, wrong numbers: one reshape mixes tokens; cut the last axis, then transpose": x.reshape(
            B, H, L, K
        ),
        "each head took every H-th column: head h gets K neighbors, so cut D into (H, K)": x.reshape(
            B, L, K, H
        ).transpose(0, 3, 1, 2),
        "the heads come in reverse": truth[:, ::-1],
    }
    equal(y, truth, misses)
    like(y, truth.shape, np.float32)
    return "each head has its K columns of every token"


@exercise
def check_merge_heads(merge_heads):
    B, L, H, K = 2, 3, 4, 5
    x = placed(B, L, H * K)
    sheets = np.ascontiguousarray(np.stack(np.split(x, H, axis=-1), axis=1))
    slips = {"axes don't match": "transpose needs a place for each of the four axes of (B, H, L, K)"}
    y = attempt(merge_heads, sheets, slips=slips)
    like(y, np.shape(y))
    expect(y.shape != (B, L, H, K), "the tokens come first again; now join the last two axes: reshape")
    like(y, (B, L, H * K), cause="(B, L, D) with D = H * K")
    misses = {
        "right shape, wrong numbers: bring the tokens before the heads, then reshape": sheets.reshape(
            B, L, H * K
        ),
        "the heads' columns are interleaved: K comes last": sheets.transpose(0, 2, 3, 1).reshape(B, L, H * K),
        "the heads come in reverse": sheets[:, ::-1].transpose(0, 2, 1, 3).reshape(B, L, H * K),
    }
    equal(y, x, misses)
    like(y, x.shape, np.float32)
    return "every column is back in its place"


@exercise
def check_unpack(unpack):
    B, L, H, K = 2, 3, 4, 5
    packed = placed(B, L, 3 * H * K)
    slips = {
        "cannot reshape": "a reshape must keep the count of numbers: D is a third of the columns",
        "axes don't match": "transpose needs a place for each of the five axes of (B, L, 3, H, K)",
    }
    got = attempt(unpack, packed, H, slips=slips)
    expect(isinstance(got, (tuple, list, np.ndarray)), f"three arrays were wanted, not {type(got).__name__}")
    expect(len(got) == 3, f"three arrays were wanted, q, k and v, and {len(got)} came")
    for part in got:
        like(part, np.shape(part))
    shapes = {part.shape for part in got}
    expect(len(shapes) == 1, f"q, k and v should have one shape, not {', '.join(map(str, sorted(shapes)))}")
    truth = np.zeros((3, B, H, L, K))
    for which, b, h, i, d in np.ndindex(*truth.shape):
        truth[which, b, h, i, d] = packed[b, i, which * H * K + h * K + d]
    misses = {
        "that reads q, k and v of each head in turn: in CLIP all of q comes first": packed.reshape(
            B, L, H, 3, K
        ).transpose(3, 0, 2, 1, 4),
        "q, k and v are right, but not in this order": truth[[1, 0, 2]],
        "q, k and v come in reverse": truth[::-1],
        "the split into heads mixes tokens: cut the last axis, then transpose": np.stack(
            [part.reshape(B, H, L, K) for part in np.split(packed, 3, axis=-1)]
        ),
        "each head took every H-th column: cut D into (H, K)": packed.reshape(B, L, 3, K, H).transpose(
            2, 0, 4, 1, 3
        ),
        "the heads are not split off: each is (B, H, L, K)": np.stack(np.split(packed, 3, axis=-1)),
        "tokens come before heads: transpose to (B, H, L, K)": truth.transpose(0, 1, 3, 2, 4),
    }
    equal(np.stack(list(got)), truth, misses)
    like(got[0], truth.shape[1:], np.float32)
    return "q, k and v, head by head"


def stages_with(bug, params, tokens):
    """Every stage, by name, of an encoder with one bug of minclip's catalogue."""
    port, kept = Port(params, tokens), {}
    next(fault for fault in CATALOGUE if fault.id == bug).change(port)

    def tap(name, array):
        kept[name] = port.tap(name, array)
        return kept[name]

    port.run(tap)
    return kept


# 06 Think at each position


def bend(x, slope=1.702):
    return x / (1 + np.exp(-slope * x))


def exact_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5))


@exercise
def check_fit_slope(slope):
    keyed(slope, ("gate", "product"))
    said = {name: float(numbers(slope[name])) for name in slope}
    x = np.linspace(-6, 6, 2401)
    phi = np.array([0.5 * (1 + math.erf(value / 2**0.5)) for value in x.tolist()])
    truths = {"gate": 1.7017, "product": 1.7733}  # the minimax slopes; 1.702 is in the GELU paper
    for name, factor in (("gate", 1), ("product", x)):
        a, truth = said[name], truths[name]
        other = truths["product" if name == "gate" else "gate"]
        expect(abs(a - 1) > 0.01, f"{name}: that is SiLU, with no stretch at all")
        expect(
            abs(a - (8 / math.pi) ** 0.5) > 0.002,
            f"{name}: 1.596 makes the two gates equally steep at 0, but far out they differ more",
        )
        expect(abs(a - other) > 0.002, f"{name}: that is the slope of the other one")
        with np.errstate(over="ignore"):
            off, least = (abs(factor * (1 / (1 + np.exp(-t * x)) - phi)).max() for t in (a, truth))
        expect(abs(a - truth) < 0.002, f"{name}: {a:.4g} is off by up to {off:.5f}; {least:.5f} can be had")
    return "1.702 fits the gate, 1.773 the product"


@exercise
def check_quick_gelu(quick_gelu):
    x = np.array([[-4, -2.25, -1], [0, 0.5, 3]], dtype=np.float32)
    scalar = "np.where and math.exp aside, one formula serves the whole array: np.exp takes arrays"
    y = attempt(quick_gelu, x, slips={"only": scalar, "ambiguous": scalar})
    like(y, x.shape)
    truth = np.array([value / (1 + math.exp(-1.702 * value)) for value in x.ravel().tolist()]).reshape(2, 3)
    misses = {
        "that is the exact GELU: CLIP's gate is the sigmoid of 1.702 x": exact_gelu(x),
        "that is SiLU: the 1.702 is missing": bend(x, 1),
        "the constant is 1.702, not 1.773": bend(x, 1.773),
        "the constant is 1.702, not 1.7": bend(x, 1.7),
        "that is the gate alone: multiply it with x": 1 / (1 + np.exp(-1.702 * x)),
        "the sign of the exponent is wrong: the gate opens for positive x": bend(x, -1.702),
        "that is ReLU: the gate is soft": np.maximum(x, 0),
    }
    equal(y, truth, misses)
    like(y, x.shape, np.float32, "float32 in, float32 out")
    far = call(quick_gelu, np.array([-1000, 1000], dtype=np.float32))
    expect(not np.isnan(far).any(), "NaN far out: write it so that no inf is divided by inf")
    equal(far, [0, 1000])
    return "a soft gate, and no NaN"


@exercise
def check_mlp(mlp):
    rng = np.random.default_rng(6)
    shapes = ((2, 3, 4), (16, 4), (16,), (4, 16), (4,))
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    x, W, b, V, c = inputs
    slips = {
        "matmul": "the product does not fit: weights are (out, in), so x @ weight.T",
        "broadcast": "a bias does not fit: c_fc's has F numbers, c_proj's has D",
    }
    y = attempt(mlp, *inputs, slips=slips)
    like(y, np.shape(y))
    expect(y.shape != (2, 3, 16), "those are the F numbers in the middle: c_proj maps them back to D")
    like(y, x.shape, cause="D in, D out")
    truth = np.zeros(x.shape)
    for i in np.ndindex(2, 3):
        h = [sum(float(x[i][d]) * float(W[f, d]) for d in range(4)) + float(b[f]) for f in range(16)]
        h = [value / (1 + math.exp(-1.702 * value)) for value in h]
        for d in range(4):
            truth[i][d] = sum(h[f] * float(V[d, f]) for f in range(16)) + float(c[d])
    h = x @ W.T + b
    misses = {
        "there is no activation between the two maps": h @ V.T + c,
        "that is the exact GELU: CLIP was trained with QuickGELU": exact_gelu(h) @ V.T + c,
        "that is SiLU: the 1.702 is missing": bend(h, 1) @ V.T + c,
        "that is ReLU: CLIP's gate is soft": np.maximum(h, 0) @ V.T + c,
        "the activation comes before c_fc: it stands between the two": (bend(x) @ W.T + b) @ V.T + c,
        "there is a second activation at the end": bend(bend(h) @ V.T + c),
        "c_fc's bias is not in it": bend(x @ W.T) @ V.T + c,
        "c_fc's bias comes before the activation": (bend(x @ W.T) + b) @ V.T + c,
        "c_proj's bias is not in it": bend(h) @ V.T,
        "the stream is not added here: that is lesson 07": x + bend(h) @ V.T + c,
    }
    equal(y, truth, misses, 1e-4)
    like(y, x.shape, np.float32, "float32 in, float32 out")
    return "out, bend, back"


@exercise
def check_worst(worst):
    x = float(numbers(worst))
    if 0.015 < abs(x) < 0.025:
        raise Wrong("that is the size of the difference: the place was wanted")
    expect(abs(x - 2.27) > 0.02, "a difference as large is there too, but a place below 0 was asked for")
    expect(-5 <= x <= 0, "a place between -5 and 0 was wanted")
    off = abs(bend(x) - exact_gelu(x))
    expect(abs(x + 0.7) > 0.25, f"there both curves have their dip, and they differ by {off:.4f} only")
    expect(abs(x + 2.27) < 0.02, f"the difference at {x:.2f} is {off:.4f}; 0.0203 can be had")
    return "0.0203 at -2.27: try an activation there"


# 07 Add it to the stream


@exercise
def check_block(block):
    x = np.array([[1, 2, 4], [3, 0, -1]], dtype=np.float32)

    def ln_1(x):
        return x - x.mean(axis=-1, keepdims=True)

    def attention(h):
        return h.cumsum(axis=0)

    def ln_2(x):
        return x / (1 + abs(x).max(axis=-1, keepdims=True))

    def mlp(h):
        return h * h + 1

    slips = {
        "positional argument": "ln_1, attention, ln_2 and mlp are functions of one array",
        "unsupported operand": "a function was added to the stream: call it first, as in attention(...)",
    }
    y = attempt(block, x, ln_1, attention, ln_2, mlp, slips=slips)
    like(y, x.shape, cause="(L, D) in, (L, D) out")
    # On paper: the centered rows are (-4, -1, 5) / 3 and (7, -2, -5) / 3, their running sum is attention's.
    after = [[-1 / 3, 5 / 3, 17 / 3], [4, -1, -1]]
    truth = np.zeros((2, 3))
    for i, d in np.ndindex(2, 3):
        truth[i, d] = after[i][d] + (after[i][d] / (1 + max(map(abs, after[i])))) ** 2 + 1
    h, mid = ln_1(x), x + attention(ln_1(x))
    misses = {
        "the MLP reads the stream after attention was added, not before": mid + mlp(ln_2(x)),
        "add to the stream x, not to its normalized copy": h + attention(h) + mlp(ln_2(h + attention(h))),
        "that is post-norm: the norm belongs before the stage": ln_2(
            ln_1(x + attention(x)) + mlp(ln_1(x + attention(x)))
        ),
        "the first plus is missing: attention's result is added to x": attention(h) + mlp(ln_2(attention(h))),
        "the second plus is missing: the MLP's result is added to the stream": mlp(ln_2(mid)),
        "there is no plus: results are added to the stream": mlp(ln_2(attention(h))),
        "ln_1 and ln_2 are exchanged": x + attention(ln_2(x)) + mlp(ln_1(x + attention(ln_2(x)))),
        "the stages read normalized copies, and no norm is in it": x + attention(x) + mlp(x + attention(x)),
        "the MLP reads a normalized copy: ln_2 is missing": mid + mlp(mid),
        "attention reads a normalized copy: ln_1 is missing": x
        + attention(x) + mlp(ln_2(x + attention(x))),
    }  # fmt: skip
    equal(y, truth, misses)
    like(y, x.shape, np.float32, "float32 in, float32 out")
    return "two proposals, two sums"


@exercise
def check_states(states_of):
    embedding = np.array([[3, 1], [0, 2]], dtype=np.float32)
    updates = np.array([[[1, 0], [0, 1]], [[0, -2], [5, 0]], [[1, 1], [-1, 0]]], dtype=np.float32)
    states = call(states_of, embedding, updates)
    expect(isinstance(states, np.ndarray), "one array was wanted: np.stack makes one of a list")
    truth = np.array([[[3, 1], [0, 2]], [[4, 1], [0, 3]], [[4, -1], [5, 3]], [[5, 0], [4, 3]]])
    expect(states.shape != (3, 2, 2), "N updates give N + 1 states: the embedding is one")
    like(states, (4, 2, 2), cause="(N + 1, L, D)")
    misses = {
        "all states are the last one: x += update changed the array that the list already holds": np.stack(
            [truth[3]] * 4
        ),
        "those are the updates themselves: add them up": np.concatenate([embedding[None], updates]),
        "each update was added to the embedding alone: add it to the state before": np.concatenate(
            [embedding[None], embedding + updates]
        ),
        "the embedding is not in the later states": np.concatenate([embedding[None], updates.cumsum(0)]),
    }
    equal(states, truth, misses)
    like(states, (4, 2, 2), np.float32, "float32 in, float32 out")
    return "every state is an array of its own"


@exercise
def check_lengths(lengths):
    names = ("along", "across", "against", "cosine 0.5")
    said = {name: float(numbers(value)) for name, value in keyed(lengths, names).items()}
    truths = {
        "along": (7, "both point the same way: their lengths add up"),
        "across": (5, "right angles: Pythagoras, the root of 9 + 16"),
        "against": (1, "4 back from 3 ends at -1, and a length is never negative"),
        "cosine 0.5": (37**0.5, "the square is 9 + 2 * 3 * 4 * 0.5 + 16"),
    }
    for name, (truth, cause) in truths.items():
        expect(abs(said[name] - truth**2) > 0.01 or truth == 1, f"{name}: that is the square of the length")
        expect(abs(said[name] - truth) < 0.01, f"{name}: {said[name]:.4g} is not right: {cause}")
    return "7, 5, 1 and the root of 37"


FAULTS = {"A": "from norm", "B": "parallel", "C": "no sum", "D": "post"}


def broken_block(letter, x, attention, mlp):
    """One of four blocks with a fault, for exercise 4 of lesson 07. (Reading on spoils it.)"""
    x = np.asarray(x, dtype=float)
    if FAULTS[letter] == "from norm":
        x = normed(x) + attention(normed(x))
        return normed(x) + mlp(normed(x))
    if FAULTS[letter] == "parallel":
        return x + attention(normed(x)) + mlp(normed(x))
    if FAULTS[letter] == "no sum":
        return mlp(normed(attention(normed(x))))
    x = normed(x + attention(x))
    return normed(x + mlp(x))


@exercise
def check_broken_blocks(culprits):
    probes = {
        "no sum": "let both functions return zeros: what should come back?",
        "parallel": "with zeros it gives x back, so it does add to the stream; what does its MLP read?",
        "post": "let both functions add 1 in one column: the row's mean tells whether a norm came last",
        "from norm": "let both functions add 1 in one column: the row's mean tells whether a norm came last",
    }
    match(culprits, FAULTS, probes)
    return "four faults told apart by two probes"


# 08 Read out the sentence


@exercise
def check_find_eot(find_eot):
    tokens = np.array(
        [
            [49406, 0, 0, 320, 49407, 0, 0],
            [49406, 2368, 49407, 49407, 49407, 49407, 49407],
            [49406, 320, 1125, 539, 320, 2368, 49407],
            [49406, 49407, 0, 0, 0, 0, 0],
        ],
        dtype=np.int32,
    )
    eot = call(find_eot, tokens)
    expect(np.shape(eot) != (), "one number for the whole batch: argmax needs axis=-1")
    expect(np.shape(eot) != (7,), "that is one number for each column: the axis of the positions is -1")
    expect(
        np.shape(eot) != (4, 7), "that is a number for each position: one position for each text was wanted"
    )
    like(np.asarray(eot), (4,), cause="one position for each text")
    expect(np.asarray(eot).dtype.kind in "iu", "positions are integers: argmax gives them as such")
    truth = [next(i for i in range(7) if row[i] == 49407) for row in tokens.tolist()]
    misses = {
        "that is the last end of text: padding may be 49407 as well, and the first one counts": [4, 6, 6, 1],
        "that is the last position, not the end of text": [6, 6, 6, 6],
        "counting ids above 0 fails: 0 is also the id of '!' within a text": (tokens > 0).sum(-1) - 1,
        "those are the ids, not their positions: argmax, not max": tokens.max(-1),
        "that is one too far: positions count from 0": np.add(truth, 1),
        "that is one too early: the row of the end itself is read": np.subtract(truth, 1),
    }
    equal(eot, truth, misses)
    return "the first of the largest ids"


@exercise
def check_read_out(read_out):
    rng = np.random.default_rng(8)
    for E in (4, 3):
        x = rng.standard_normal((3, 5, 4)).astype(np.float32)
        P = rng.standard_normal((4, E)).astype(np.float32)
        eot = np.array([1, 4, 2])
        slips = {
            "matmul": "the product does not fit: text_projection is (D, E), so pooled @ text_projection",
            "shape mismatch": "the two arrays of indices need the same length: np.arange(B) beside eot",
        }
        features = attempt(read_out, x, eot, P, slips=slips)
        like(features, np.shape(features))
        expect(
            np.shape(features) != (3, 3, E),
            "(B, B, E): x[:, eot] takes every end's row from every text; pair them with np.arange(B)",
        )
        expect(np.shape(features) != (3, 5, E), "every position is still there: take the row of the end")
        like(features, (3, E), cause="(B, D) @ (D, E)")
        truth = np.zeros((3, E))
        for b, e in np.ndindex(3, E):
            truth[b, e] = sum(float(x[b, eot[b], d]) * float(P[d, e]) for d in range(4))
        misses = {
            "that is the last position: use eot": x[:, -1] @ P,
            "that is the first position, which has seen nothing of the sentence": x[:, 0] @ P,
            "that is the mean over all positions: CLIP takes the row of the end": x.mean(1) @ P,
            "every text is read at the first one's end": x[:, eot[0]] @ P,
            "the rows come from text 0 alone: pair eot with np.arange(B)": x[0, eot] @ P,
        }
        if E == 4:
            misses["no .T here: text_projection is (D, E), and as D = E the shape did not warn you"] = (
                x[np.arange(3), eot] @ P.T
            )
            misses["the projection is not in it"] = x[np.arange(3), eot]
        equal(features, truth, misses, 1e-4)
        like(features, (3, E), np.float32, "float32 in, float32 out")
    return "a row of each text, times (D, E)"


@exercise
def check_moved_by_padding(moved):
    known = {"start", "end", "last", "mean", "max"}
    expect(isinstance(moved, (set, list, tuple)), "a set of names was wanted, such as {'mean'}")
    moved = set(moved)
    expect(moved <= known, f"the names are {', '.join(sorted(known))}")
    expect("start" not in moved, "⟨start⟩ sees itself alone: nothing of the padding, nothing of the sentence")
    expect("end" not in moved, "⟨end⟩ stands before the padding, and the mask hides what comes later")
    expect("last" in moved, "the last position is a padding row itself, unless the text fills the context")
    expect("mean" in moved, "a mean over all rows takes the padding's rows in")
    expect("max" in moved, "the largest number of a column may stand in a row of padding")
    return "only what reads rows after the end"


@exercise
def check_missing_end(position):
    names = ("largest id", "equal to 49407", "last")
    position = {name: float(numbers(value)) for name, value in keyed(position, names).items()}
    expect(position["largest id"] != 3, "1929 is the last word, but not the largest id: look at position 0")
    expect(position["largest id"] != 2, "2368 is the largest id of a word, but ⟨start⟩ is 49406")
    expect(position["largest id"] == 0, "the largest id is 49406, ⟨start⟩")
    expect(
        position["equal to 49407"] != -1, "argmax of six times False is no error code: it gives a position"
    )
    expect(position["equal to 49407"] == 0, "no id is equal: six times False, and argmax gives the first")
    expect(position["last"] == 5, "six positions, counted from 0")
    return "twice ⟨start⟩, once padding: nobody reads the sentence"


# 09 Write the encoder


def clumsy_encoder(params, tokens, stages):
    """Somebody's first try, for the lesson to look at: one factor is wrong. (Reading on spoils it.)"""
    port = Port(params, tokens)
    K = params["ln_final.weight"].size // params.heads
    port.replace("attn.scores", lambda at: at["attn.scores"] * (K / params.heads) ** 0.5)

    def tap(name, array):
        stages[name] = port.tap(name, array).copy()
        return stages[name]

    return port.run(tap)


@exercise
def check_clumsy(mistake):
    told = {
        "not scaled": "then the ratio to the right scores would be √K",
        "by K": "then the scores would be smaller than the right ones",
        "by √L": "then the ratio would change with the length of the batch",
    }
    expect(mistake in (*told, "by √H"), f"{mistake!r} is none of not scaled, by K, by √H, by √L")
    expect(mistake == "by √H", f"{mistake}: {told.get(mistake)}; divide the wrong scores by the right ones")
    return "the ratio is √(K / H): the number of heads stands where their width belongs"


def progress(encode, params, tokens):
    """The comparison of the stages that encode shows with the reference's, or None if it shows none."""
    stages, reference = {}, minclip.trace(params, tokens)
    with contextlib.suppress(NotImplementedError):
        encode(params, tokens, stages)
    shown = {name: array for name, array in stages.items() if name in reference}
    return minclip.compare(reference, shown) if shown else None


def report(found):
    """One line on a comparison: where the first divergence is, after which stage that agrees."""
    if found.first is None:
        return f"all {len(found.stages)} stages that you show agree"
    before = [name for name in found.stages if found.stages[name].state == "agrees"]
    order = found.order
    before = [name for name in before if order.index(name) < order.index(found.first)]
    after = f"; {short(before[-1])} still agrees" if before else ""
    if found.stages[found.first].state == "shape":
        after = ", which has another shape" + after
    return f"your first divergence is {short(found.first)}{after}"


def short(name):
    """block 0 attn.scores, for transformer.resblocks.0.attn.scores."""
    if not name.startswith(BLOCK):
        return name
    i, _, part = name.removeprefix(BLOCK).partition(".")
    return f"block {i} {part or 'output'}"


@functools.cache
def small_tower():
    """Params of two blocks whose sizes are all different, and tokens [3, 9] for them."""
    rng = np.random.default_rng(9)
    D, F, V, E = 24, 96, 60, 20

    def normal(*shape, mean=0.0, std=0.3):
        return (mean + std * rng.standard_normal(shape)).astype(np.float32)

    arrays = {
        "token_embedding.weight": normal(V, D), "positional_embedding": normal(11, D),
        "ln_final.weight": normal(D, mean=1), "ln_final.bias": normal(D), "text_projection": normal(D, E),
    }  # fmt: skip
    for i in range(2):
        sizes = {
            "attn.in_proj_": (3 * D, D),
            "attn.out_proj.": (D, D),
            "mlp.c_fc.": (F, D),
            "mlp.c_proj.": (D, F),
        }
        for norm in ("ln_1", "ln_2"):
            arrays[f"{BLOCK}{i}.{norm}.weight"] = normal(D, mean=1)
            arrays[f"{BLOCK}{i}.{norm}.bias"] = normal(D)
        for layer, (out, into) in sizes.items():
            arrays[f"{BLOCK}{i}.{layer}weight"], arrays[f"{BLOCK}{i}.{layer}bias"] = (
                normal(out, into),
                normal(out),
            )
    params = minclip.Params(arrays, activation="quick_gelu", heads=3)
    tokens = np.array(
        [[58, 3, 7, 59, 0, 0, 0, 0, 0], [58, 0, 5, 0, 9, 59, 59, 59, 59], [58, *range(20, 27), 59]], np.int32
    )
    return params, tokens


def nearest_fault(answer, truths):
    """The cause whose value the answer is, or None."""
    return next((cause for cause, value in truths.items() if close(answer, value, 1e-4)), None)


@exercise
def check_heads(attention):
    params, tokens = small_tower()
    reference = minclip.trace(params, tokens)
    for i in range(2):
        x, truth = reference[f"{BLOCK}{i}.ln_1"], reference[f"{BLOCK}{i}.attn"]
        y = call(attention, x, params, f"{BLOCK}{i}")
        like(y, truth.shape, np.float32, "(B, L, D) in, (B, L, D) out")
        if not close(y, truth, 1e-4):
            raise Wrong(attention_fault(y, x, params, f"{BLOCK}{i}"))
    return "three heads of 8, two blocks"


def attention_fault(y, x, params, block):
    """What is likely wrong with an attention that gave y."""

    def variant(**how):
        return attention_by_loops(x, params, block, **how)

    causes = {
        "the future is not masked": variant(causal=False),
        "the scores are not divided by √K": variant(scale=1.0),
        "K is the head's width, D / H, not D": variant(scale=x.shape[-1] ** -0.5),
        "W.T: the matrices are (out, in), and the square ones do not warn you": variant(turned=True),
        "the heads are cut without a transpose: reshape (B, L, H, K), then transpose": variant(straight=True),
        "the heads are not put back: transpose, then reshape": variant(unmerged=True),
        "the output layer is missing": variant(out=False),
        "the biases are missing": variant(bias=False),
        "one head only: H is params.heads": variant(heads=1),
    }
    return nearest_fault(y, causes) or "the numbers differ: show q, k, v and scores one by one and compare"


def attention_by_loops(
    x, params, block, *, causal=True, scale=None, turned=False, straight=False, unmerged=False, out=True,
    bias=True, heads=None,
):  # fmt: skip
    """Attention, one head and one text at a time, with mistakes to order."""
    (B, L, D), H = x.shape, heads or params.heads
    K = D // H
    W, b = params[f"{block}.attn.in_proj_weight"], params[f"{block}.attn.in_proj_bias"] * bias
    parts = [x @ (w.T if not turned else w) + v for w, v in zip(np.split(W, 3), np.split(b, 3), strict=True)]
    cut = [p.reshape(B, H, L, K) if straight else p.reshape(B, L, H, K).transpose(0, 2, 1, 3) for p in parts]
    context = np.empty((B, H, L, K))
    for t, h in np.ndindex(B, H):
        q, k, v = (part[t, h] for part in cut)
        scores = q @ k.T * (K**-0.5 if scale is None else scale)
        if causal:
            scores = np.where(np.tri(L, dtype=bool), scores, -np.inf)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        context[t, h] = e / e.sum(-1, keepdims=True) @ v
    merged = (context if unmerged else context.transpose(0, 2, 1, 3)).reshape(B, L, D)
    W, b = params[f"{block}.attn.out_proj.weight"], params[f"{block}.attn.out_proj.bias"] * bias
    return merged @ (W if turned else W.T) + b if out else merged


@exercise
def check_whole_block(block):
    params, tokens = small_tower()
    reference = minclip.trace(params, tokens)
    name = f"{BLOCK}0"
    x, truth = reference["embedding"], reference[name]
    y = call(block, x, params, name)
    like(y, truth.shape, np.float32, "(B, L, D) in, (B, L, D) out")
    mid, mlp = reference[f"{name}.residual"], reference[f"{name}.mlp"]
    inner = reference[f"{name}.mlp.c_fc"]
    exact = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / 2**0.5)))(inner)
    W, b = params[f"{name}.mlp.c_proj.weight"], params[f"{name}.mlp.c_proj.bias"]
    causes = {
        "the MLP's result is not added to the stream": mlp,
        "the MLP is missing: that is the stream after attention": mid,
        "the second addition is to the block's input, not to the stream after attention": x + mlp,
        "the gate is QuickGELU, x * sigmoid(1.702 x), not the exact GELU": mid + exact @ W.T + b,
        "the MLP's second bias is missing": truth - b,
    }
    cause = None if close(y, truth, 1e-4) else nearest_fault(y, causes)
    expect(cause is None, cause)
    equal(y, truth, tolerance=1e-4)
    second = call(block, truth, params, f"{BLOCK}1")
    expect(close(second, reference[f"{BLOCK}1"], 1e-4), "block 1 differs: does your code say 0 somewhere?")
    return "two blocks, to rounding"


@contextlib.contextmanager
def own_code():
    """Stop if the package's model computes anything."""
    called = set()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code) if event == "call" else None)
    try:
        yield
    finally:
        sys.setprofile(before)
    borrowed = sorted(code.co_name for code in called if code.co_filename == model.__file__)
    expect(not borrowed, f"you call minclip's own {borrowed[:1]}: write it with np and your functions")


@exercise
def check_encoder(encode):
    for params, tokens in (small_tower(), (minclip.load(), minclip.probe_tokens())):
        stages = {}
        with np.errstate(all="ignore"), own_code():
            features = encode(params, tokens, stages)
        expect(features is not None, "your function returns None: does it end in return?")
        expect(isinstance(stages, dict) and features is not stages, "return the features, not the stages")
        reference = minclip.trace(params, tokens)
        known = {name: array for name, array in stages.items() if name in reference}
        strange = [name for name in stages if name not in reference]
        expect(not strange, f"no stage is called {strange[:1]}: the names are those of the table above")
        shown = {**known, "text_features": np.asarray(features)}
        found = minclip.compare(reference, shown)
        expect(found.first is None, report(found))
    return f"{len(stages)} stages shown, all agree, and so do the features of two models"


# 10 Compare sentences


def unit(x):
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True))


@exercise
def check_similarity(similarity):
    a = np.array([[3, 4, 0], [1, 2, 2]], dtype=np.float32)
    b = np.array([[0, 0, 5], [6, 8, 0], [-2, -1, 2], [4, -3, 0]], dtype=np.float32)
    cosines = attempt(similarity, a, b, slips={"matmul": "the inner sizes differ: transpose the second"})
    like(cosines, (2, 4), cause="(N, E) @ (E, M): the second is transposed")
    truth = [[0, 1, -2 / 3, 0], [2 / 3, 22 / 30, 0, -2 / 15]]
    misses = {
        "those are plain products: divide each row by its length": a @ b.T,
        "only one of the two was normalized": unit(a) @ b.T,
        "only the second was normalized": a @ unit(b).T,
        "divide by the length, not by its square": (a / (a * a).sum(-1, keepdims=True))
        @ (b / (b * b).sum(-1, keepdims=True)).T,
        "divide by the root of the sum of squares, not by the sum of the numbers' sizes": (
            a / abs(a).sum(-1, keepdims=True)
        ) @ (b / abs(b).sum(-1, keepdims=True)).T,
        "divide by the root of the sum of squares, not by the numbers' sum": (a / a.sum(-1, keepdims=True))
        @ (b / b.sum(-1, keepdims=True)).T,
        "you divided by column lengths: the axis is -1": unit(a.T).T @ unit(b.T),
        "one length for everything: each row has its own": a @ b.T / np.linalg.norm(a) / np.linalg.norm(b),
    }  # fmt: skip
    equal(cosines, truth, misses)
    like(cosines, (2, 4), np.float32, "float32 in, float32 out")
    return "1 for one direction, 0 for right angles"


@exercise
def check_shares_of(shares_of):
    cosines = np.array([[0.30, 0.25, 0.20], [0.10, 0.10, 0.31]], dtype=np.float32)
    for logit_scale in (math.log(100), math.log(20)):
        given = call(shares_of, cosines, logit_scale)
        like(given, (2, 3), cause="keepdims=True keeps the sum as (N, 1)")
        truth = np.zeros((2, 3))
        for i in range(2):
            e = [math.exp(value * math.exp(logit_scale)) for value in cosines[i].tolist()]
            truth[i] = [value / sum(e) for value in e]
        misses = {
            "logit_scale is a logarithm: multiply by its exp": shares(cosines * logit_scale),
            "the cosines are not scaled: multiply by exp(logit_scale)": shares(cosines),
            "the logits are multiplied, not divided: the scale is one over the temperature": shares(
                cosines / math.exp(logit_scale)
            ),
            "the shares sum to 1 down the columns: the axis is -1": shares(
                cosines * math.exp(logit_scale), 0
            ),
            "those are the logits: now the softmax": cosines * math.exp(logit_scale),
        }
        equal(given, truth, misses, 1e-4)
    large = call(shares_of, cosines * 3, math.log(100))
    expect(not np.isnan(large).any(), "NaN for large logits: take each row's maximum off before exp")
    equal(large.sum(axis=-1), [1, 1])
    like(given, (2, 3), np.float32, "np.exp gives a float64 scalar: float(...) of it keeps float32")
    return "scaled by e to the logit scale, shared out by row"


@exercise
def check_ensemble(ensemble):
    features = np.array(
        [[[9, 0, 0], [0, 2, 0]], [[0, 1, 0], [0, 0, 4]], [[0, 0, 2], [0, 3, 0]]], dtype=np.float32
    )
    rows = call(ensemble, features)
    expect(np.shape(rows) != (3, 2, 3), "the mean over the templates is missing: one row for each word")
    expect(np.shape(rows) != (3, 3), "that is a mean over the words: the templates are the first axis")
    like(rows, (2, 3), cause="(N, E): one row for each word")
    third, fifth = 1 / 3**0.5, 1 / 5**0.5  # a word's directions: one each of x, y, z; two of y and one of z
    truth = [[third, third, third], [0, 2 * fifth, fifth]]
    misses = {
        "a long feature weighs more: normalize before the mean as well": unit(features.mean(0)),
        "the mean of unit vectors is shorter than 1: normalize after it as well": unit(features).mean(0),
        "nothing is normalized: unit, mean, unit": features.mean(0),
    }
    equal(rows, truth, misses)
    like(rows, (2, 3), np.float32, "float32 in, float32 out")
    return "unit, mean, unit"


@exercise
def check_nearest(nearest):
    table = unit(np.array([[1, 0], [3, 4], [4, 3], [0, 1], [-1, 0], [1, 9]], dtype=np.float32))
    query = np.array([10, 1], dtype=np.float32)
    for k, truth in ((3, [0, 2, 1]), (1, [0])):
        got = call(nearest, query, table, k)
        expect(np.ndim(got) == 1, "a list of places was wanted, also for k = 1")
        got = np.asarray(got)
        expect(got.dtype.kind in "iu", "those are cosines: the places were wanted, argsort instead of sort")
        expect(len(got) == k, f"{k} places were wanted, and {len(got)} came")
        expect(
            not np.array_equal(got, abs(table @ query - 1).argsort()[:k]),
            "the largest products are the nearest, not those close to 1: the query's length is not 1",
        )
        misses = {
            "those are the farthest: argsort sorts upwards, turn it round": [4, 3, 5][:k],
            "the best comes first: turn the order round": truth[::-1] if k > 1 else [-1],
        }
        equal(got, truth, misses)
    return "the best first"


# 11 Say what right means


def loss_of(texts, pictures, logit_scale, *, normalized=True, exponential=True, both=True, axis=-1):
    """The contrastive loss in float64, one pair at a time, with mistakes to order."""
    a, b = (unit(np.float64(x)) if normalized else np.float64(x) for x in (texts, pictures))
    factor = math.exp(logit_scale) if exponential else logit_scale
    logits = factor * (a @ b.T)
    B, total = len(logits), 0.0
    for x in (logits, logits.T) if both else (logits if axis == -1 else logits.T,):
        for i in range(B):
            total += math.log(sum(math.exp(v - x[i].max()) for v in x[i])) + x[i].max() - x[i, i]
    return total / (2 * B if both else B)


@exercise
def check_contrastive_loss(contrastive_loss):
    rng = np.random.default_rng(11)
    texts, pictures = (2 * rng.standard_normal((5, 7)).astype(np.float32) for _ in range(2))
    scale = 1.5
    loss = call(contrastive_loss, texts, pictures, scale)
    expect(
        np.ndim(loss) == 0, f"one number was wanted, not shape {np.shape(loss)}: take the mean over the batch"
    )
    truth = loss_of(texts, pictures, scale)
    misses = {
        "the features are not normalized: cosines are wanted": loss_of(
            texts, pictures, scale, normalized=False
        ),
        "the factor is e to the logit_scale": loss_of(texts, pictures, scale, exponential=False),
        "only the texts look for their pictures: the columns count too": loss_of(
            texts, pictures, scale, both=False
        ),
        "only the pictures look for their texts: the rows count too": loss_of(
            texts, pictures, scale, both=False, axis=0
        ),
        "that is the sum of the two directions: half of it": 2 * truth,
        "that is the sum over the batch: take the mean": len(texts) * truth,
        "the sign: a log of a share is negative": -truth,
    }
    equal(loss, truth, misses, 1e-4)
    large = call(contrastive_loss, texts, texts[::-1].copy(), math.log(1000.0))
    expect(np.isfinite(large), "a large factor overflows: take the row's maximum off before exp")
    return "both directions, and a factor of 1000 as well"


@exercise
def check_chance(losses):
    expect(isinstance(losses, dict) and sorted(losses) == list("abcd"), "a dict with the keys a, b, c, d")
    expect(... not in losses.values(), "a number for each was wanted")
    cause = {
        "a": "equal cosines: each share is 1/32, and the surprise is its logarithm with a minus",
        "b": "e^(-200) of the share goes elsewhere: nothing that counts",
        "c": "in 2 rows of 32, and 2 columns, a twin takes half the share",
        "d": "whoever is alone has the whole share",
    }
    truth = {"a": math.log(32), "b": 0.0, "c": 2 / 32 * math.log(2), "d": 0.0}
    for letter, value in truth.items():
        expect(abs(float(losses[letter]) - value) < 0.01 + 0.02 * value, f"{letter}: {cause[letter]}")
    return "log B for chance, 0 for perfection, a little more for twins"


@exercise
def check_temperature(best):
    expect(best in (1, 10, 100, 1000), "one of 1, 10, 100, 1000 was wanted")
    rng = np.random.default_rng(5)
    fixed = unit(rng.standard_normal((100, 32)))
    noisy = unit(fixed + 0.2 * rng.standard_normal((100, 32)))
    values = {factor: loss_of(noisy, fixed, math.log(factor)) for factor in (1, 10, 100, 1000)}
    right = min(values, key=values.get)
    expect(best >= right, "with so small a factor all shares are nearly equal")
    expect(best <= right, "so large a factor punishes every row whose right answer is not first")
    return "sharp, but not so sharp that one mistake costs everything"


SUSPECT_LOSSES = {  # (reading on spoils exercise 4 of lesson 11)
    "A": {"both": False}, "B": {"exponential": False}, "C": {}, "D": {"normalized": False},
}  # fmt: skip
FAULT_OF_LOSS = {"A": "one side", "B": "log scale", "C": "right", "D": "unnormalized"}


def suspect_losses(texts, pictures, logit_scale):
    """The losses of four training scripts on these features, by letter."""
    found = {letter: loss_of(texts, pictures, logit_scale, **how) for letter, how in SUSPECT_LOSSES.items()}
    return {letter: round(float(value), 6) for letter, value in found.items()}


@exercise
def check_loss_suspects(faults):
    tests = {
        "one side": "exchange texts and pictures: it changes",
        "log scale": "double the factor, and look how much it changes",
        "right": "lengths and roles change nothing in it",
        "unnormalized": "make the texts three times as long: it changes",
    }
    match(faults, FAULT_OF_LOSS, tests)
    return "three faults, and none of them crashes"


# 12 Send the error back


def nudge(function, x, dy, h=1e-6):
    """The gradient of (function(x) * dy).sum() by x, each number nudged both ways."""
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[at] = h
        gradient[at] = ((function(x + moved) - function(x - moved)) * dy).sum() / (2 * h)
    return gradient


@exercise
def check_linear_backward(linear_backward):
    rng = np.random.default_rng(12)
    dy, x, W, b = (rng.standard_normal(shape) for shape in ((5, 3), (5, 4), (3, 4), (3,)))
    result = call(linear_backward, dy, x, W)
    expect(isinstance(result, tuple) and len(result) == 3, "three arrays were wanted: dx, dW, db")
    dx, dW, db = result
    like(dx, (5, 4), cause="dx has the shape of x")
    like(dW, (3, 4), cause="dW has the shape of W")
    like(np.asarray(db), (3,), cause="db has the shape of b: add up the rows")
    equal(dx, nudge(lambda x: x @ W.T + b, x, dy))
    misses = {"the rows' gradients are added, not averaged": dy.T @ x / 5}
    equal(dW, nudge(lambda W: x @ W.T + b, W, dy), misses)
    equal(db, nudge(lambda b: x @ W.T + b, b, dy), {"the rows are added, not averaged": dy.mean(0)})
    x, W = rng.standard_normal((2, 4, 4))
    dy = rng.standard_normal((4, 4))
    dx, dW, _ = call(linear_backward, dy, x, W)
    expect(not close(dx, dy @ W.T), "dx = dy @ W without .T; a square W hides it")
    expect(not close(dW, x.T @ dy), "dW is dy.T @ x: you have its transpose, and a square W hides it")
    equal(dx, dy @ W)
    equal(dW, dy.T @ x)
    return "dx, dW and db agree with nudging"


@exercise
def check_softmax_backward(softmax_backward):
    rng = np.random.default_rng(13)
    x, dy = rng.standard_normal((2, 2, 3, 5))
    y = shares(x)
    dx = call(softmax_backward, dy, y)
    like(dx, x.shape, cause="dx has the shape of x")
    misses = {
        "y (1 - y) dy is only the diagonal: each share depends on every score": dy * y * (1 - y),
        "the mean is taken under the shares, (dy * y).sum, not over the row": y
        * (dy - dy.mean(-1, keepdims=True)),
        "the sum goes over the last axis, with keepdims=True": y * (dy - (dy * y).sum()),
        "the factor y is missing": dy - (dy * y).sum(-1, keepdims=True),
        "the sign: the mean is subtracted": y * (dy + (dy * y).sum(-1, keepdims=True)),
    }
    equal(dx, nudge(shares, x, dy), misses)
    x[..., 3:] = -np.inf
    dx = call(softmax_backward, dy, shares(x))
    expect((dx[..., 3:] == 0).all(), "a key that the mask hides must get exactly 0")
    return "as by nudging, and 0 behind the mask"


@exercise
def check_layer_norm_backward(layer_norm_backward):
    rng = np.random.default_rng(14)
    x, dy = 0.05 * rng.standard_normal((2, 3, 6))
    dy, weight = 20 * dy, rng.standard_normal(6)

    def norm(x, eps=1e-5):
        centered = x - x.mean(-1, keepdims=True)
        return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * weight

    dx = call(layer_norm_backward, dy, x, weight)
    like(dx, x.shape, cause="dx has the shape of x")
    centered = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    n, dn = centered / deviation, dy * weight
    shift, stretch = dn.mean(-1, keepdims=True), n * (dn * n).mean(-1, keepdims=True)
    bare = (dy - dy.mean(-1, keepdims=True) - n * (dy * n).mean(-1, keepdims=True)) / deviation
    misses = {
        "mean and deviation are no constants: both terms are missing": dn / deviation,
        "the deviation depends on x too: the term with n is missing": (dn - shift) / deviation,
        "the mean depends on x too: mean(dn) is missing": (dn - stretch) / deviation,
        "the weight is missing: dn = dy * weight": bare,
        "the division by the deviation is missing": dn - shift - stretch,
        "ε belongs into the deviation: here it is not small": nudge(lambda x: norm(x, 0), x, dy, 1e-7),
    }
    equal(dx, nudge(norm, x, dy, 1e-7), misses, 1e-4)
    return "as by nudging: nothing that shifts or stretches a row is left"


SUSPECT_GRADIENTS = {"A": "no 1.702", "B": "right", "C": "gate constant", "D": "right"}


def suspect_gradient(letter, dy, x):
    """dx of QuickGELU as one of four people wrote it, for exercise 4 of lesson 12. (Reading on spoils it.)"""
    gate = 1 / (1 + np.exp(-1.702 * x))
    inner = {"no 1.702": 1, "right": 1.702, "gate constant": 0}[SUSPECT_GRADIENTS[letter]]
    return dy * (gate + inner * x * gate * (1 - gate))


@exercise
def check_gelu_suspects(faults):
    tests = {
        "no 1.702": "near x = 0 it is nearly right; compare it with nudging near x = 1",
        "right": "nudging gives the same at every x",
        "gate constant": "it is dy * sigmoid(1.702 x): the product rule has a second part",
    }
    match(faults, SUSPECT_GRADIENTS, tests)
    return "two faults, and far from 0 neither shows"


@exercise
def check_rows(no_gradient):
    expect(
        isinstance(no_gradient, dict) and set(no_gradient) == {"a", "b"}, 'a dict with the keys "a" and "b"'
    )
    a, b = (set(no_gradient[key]) for key in "ab")
    expect(a | b <= set(range(10)), "positions are 0 to 9")
    expect(6 not in a, "a: ⟨end⟩ itself, at position 6, is where the gradient comes from")
    expect(not a & set(range(6)), "a: ⟨end⟩ attends to every position before it")
    expect({7, 8, 9} <= a, "a: padding comes after ⟨end⟩, which never sees it")
    expect(b == set(), "b: without the mask ⟨end⟩ attends to the padding too, and sends it a gradient")
    return "the gradient goes where something came from"


# 13 Train your own


def adam_step(param, grad, m, v, t, rate, beta1=0.9, beta2=0.98, eps=1e-8):
    m, v = m + (1 - beta1) * (grad - m), v + (1 - beta2) * (grad**2 - v)
    return param - rate * m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


def train_tower(params, tokens, pictures, steps, rate, batch=48, *, positions=True, paired=True, seed=0):
    """(trained params, the loss of every step), with mistakes to order. (Reading on spoils exercise 2.)"""
    rng, params, values = np.random.default_rng(seed), params.copy(), []
    if not positions:
        params["positional_embedding"] = 0 * params["positional_embedding"]
    m, v = ({name: np.zeros_like(array) for name, array in params.items()} for _ in range(2))
    for t in range(1, steps + 1):
        rows = rng.permutation(len(tokens))[:batch]
        partners = rows if paired else rng.permutation(rows)
        trace = minclip.trace(params, tokens[rows])
        loss, (dfeatures, _, _) = minclip.contrastive_loss(trace["text_features"], pictures[partners], 3.0)
        for name, grad in minclip.backward(trace, dfeatures).items():
            if positions or name != "positional_embedding":
                params[name], m[name], v[name] = adam_step(params[name], grad, m[name], v[name], t, rate)
        values.append(float(loss))
    return params, values


def yours(check, function, otherwise):
    """function if it passes its check, else the course's own, so that Run all needs no answers."""
    passed = check.verdict(function).startswith("✓")
    print("with your own function" if passed else "with the course's own function, until yours passes")
    return function if passed else otherwise


@exercise
def check_adam(adam):
    rng = np.random.default_rng(15)
    param, m, v = rng.standard_normal((3, 4)), np.zeros((3, 4)), np.zeros((3, 4))
    first = rng.standard_normal((3, 4))
    result = call(adam, param, first, m, v, 1, 0.1)
    expect(isinstance(result, tuple) and len(result) == 3, "three arrays were wanted: param, m, v")
    new = result[0]
    expect(
        not close(new, param + 0.1 * np.sign(first)), "the step goes *down*: param minus rate times the step"
    )
    expect(
        not close(new, param - 0.1 * (0.1 * first) / (np.sqrt(0.02 * first**2) + 1e-8)),
        "m and v begin at 0: divide them by 1 - beta ** t",
    )
    equal(new, param - 0.1 * np.sign(first), {"the root of v is missing": param - 0.1 / first}, 1e-4)
    still, *_ = call(adam, param, np.zeros((3, 4)), m, v, 1, 0.1)
    expect(not np.isnan(still).any(), "0 / 0 where a gradient is 0: add eps to the root")
    tiny, *_ = call(adam, param, np.full((3, 4), 1e-9), m, v, 1, 0.1)
    expect(not close(tiny, param, 1e-4), "eps is added to the root of v, not to v inside it")
    truth, state = param, (m, v)
    got, mine = param, (m, v)
    for t in range(1, 6):
        grad = rng.standard_normal((3, 4))
        truth, *state = adam_step(truth, grad, *state, t, 0.1)
        got, *mine = call(adam, got, grad, *mine, t, 0.1)
        if not close(got, truth, 1e-6):
            expect(
                not close(mine[1], mine[0] ** 2, 1e-6),
                "v is the mean of the squares, not the square of the mean",
            )
            raise Wrong(f"step {t} differs: are beta1 and beta2 each where they belong?")
    return "five steps, as the formula has it"


@functools.cache
def small_task():
    """Params of the small tower, tokens [12, 6] and pictures [12, 20] for it."""
    rng = np.random.default_rng(16)
    tokens = np.array([[58, *rng.integers(0, 57, 3), 59, 0] for _ in range(12)], np.int32)
    pictures = rng.standard_normal((12, 20)).astype(np.float32)
    params = small_tower()[0].map(lambda array: array * np.float32(0.3) if array.ndim > 1 else array)
    return params, tokens, pictures


@exercise
def check_train(train):
    params, tokens, pictures = small_task()
    before = {name: array.copy() for name, array in params.items()}
    result = train(params, tokens, pictures, 60, 5e-3, 8)
    expect(
        all(np.array_equal(before[name], params[name]) for name in before),
        "the given params have changed: begin with params.copy(), and make new arrays",
    )
    expect(isinstance(result, tuple) and len(result) == 2, "two results were wanted: params, and the losses")
    trained, values = result
    expect(len(values) == 60, f"one loss for each of 60 steps was wanted, not {len(values)}")
    expect(np.isfinite(values).all(), "the loss is not finite: is the rate applied, and the mask in place?")
    start = np.mean(values[:3])
    expect(
        abs(values[0] - values[1]) > 0 or abs(values[0] - values[-1]) > 1e-6,
        "the loss never changes: do the new arrays go back into params?",
    )
    expect(
        np.mean(values[-5:]) < start,
        f"the loss went up, from {start:.2f} to {np.mean(values[-5:]):.2f}: the sign?",
    )
    expect(
        np.mean(values[-5:]) < 0.3 * start,
        f"only from {start:.2f} to {np.mean(values[-5:]):.2f}: is it all arrays?",
    )
    moved = [name for name in before if not np.array_equal(trained[name], before[name])]
    still = sorted(set(before) - set(moved))
    expect(not still, f"{still[:1]} was not trained: a step for every name that backward gives")
    unit = minclip.normalize(minclip.encode_text(trained, tokens))
    share = ((unit @ minclip.normalize(pictures).T).argmax(-1) == np.arange(12)).mean()
    expect(
        share > 0.9, "the losses fall, but the trained params do not find the pictures: are they returned?"
    )
    alone = train(params, tokens, pictures, 2, 5e-3, 1)[1]
    expect(close(alone, [0, 0]), "with batch=1 the loss must be 0: draw `batch` rows in each step")
    return "the loss falls, and every text finds its picture"


@exercise
def check_first_test(learns_by_heart):
    def frozen(params, tokens, pictures, steps, rate, *batch):
        return train_tower(params, tokens, pictures, steps, 0.0, *batch)

    def uphill(params, tokens, pictures, steps, rate, *batch):
        return train_tower(params, tokens, pictures, steps, -rate, *batch)

    def overflowing(params, tokens, pictures, steps, *others):
        return params, [math.nan] * steps

    def mispaired(*inputs):
        return train_tower(*inputs, paired=False)

    for train, wanted, cause in (
        (overflowing, False, "a loss of NaN passes: every comparison with NaN is False"),
        (frozen, False, "a rate of 0 passes: what must the loss do?"),
        (uphill, False, "a loop that steps uphill passes: what must the loss do?"),
        (mispaired, False, "random pairs pass: their loss falls to chance, log B, and no further"),
        (train_tower, True, "the right loop does not pass: more steps, a rate of 0.005, or a larger limit"),
    ):
        said = learns_by_heart(train, *small_task())
        expect(isinstance(said, (bool, np.bool_)), f"True or False was wanted, not {type(said).__name__}")
        expect(bool(said) == wanted, cause)
    return "four broken loops are found, and the right one passes"


@exercise
def check_outcomes(outcomes):
    names, known = {"rate x 10", "no positions", "batch of one"}, {"about as well", "worse", "nothing"}
    expect(isinstance(outcomes, dict) and set(outcomes) == names, f"a dict with the keys {sorted(names)}")
    expect(set(outcomes.values()) <= known, f"the outcomes are {sorted(known)}")
    expect(
        outcomes["rate x 10"] == "worse", "rate x 10: every step jumps across the valley that it looks for"
    )
    expect(
        outcomes["no positions"] == "about as well",
        "no positions: which two names differ only in their order?",
    )
    expect(
        outcomes["batch of one"] == "nothing",
        "batch of one: who is alone has the whole share, and no gradient",
    )
    return "now run them"


# 15 Break it


@exercise
def check_is_swap(is_swap):
    for a, b, wanted, cause in (
        ("a dog bites a man", "a man bites a dog", True, "the same ids in another order"),
        ("a dog bites a man", "a dog bites a boy", False, "boy is not an id of the first text"),
        ("a dog bites a man", "a dog bites a man", False, "a text is no swap of itself"),
        ("a dog, a man", "a man, a dog", True, "a comma is a token of its own: compare ids, not split()"),
        ("A Dog bites a man", "a man bites a dog", True, "A and a are one id: compare ids, not strings"),
        ("a cat and two dogs and two dogs", "a cat and a cat and two dogs", False,
         "the same ids, but not as often: a set does not count"),
        ("a cat", "a act", False, "the letters are the same, but not the tokens: cat and act"),
        ("a dog", "a dog a dog", False, "one text is longer"),
    ):  # fmt: skip
        said = call(is_swap, a, b)
        expect(isinstance(said, bool | np.bool_), f"True or False was wanted, not {type(said).__name__}")
        expect(said == wanted, f"{a!r} and {b!r}: {bool(said)}, and {wanted} was wanted; {cause}")
    return "eight pairs"


TRIPLE = ("the text", "the paraphrase", "the foil")


@exercise
def check_tells_apart(tells_apart):
    for rows, wanted, cause in (
        (((2, 0), (3, 1), (2, 2)), True, "0.95 for the paraphrase is above 0.71 for the foil"),
        (((2, 0), (2, 2), (3, 1)), False, "the foil is nearer than the paraphrase"),
        (((1, 0), (1, 2), (1, -1)), False, "compare both with the text, not with each other"),
        (((1, 0), (3, 1), (10, 10)), True, "the foil is only longer: divide by the lengths"),
        (((1, 0), (30, 10), (1, 1)), True, "the paraphrase is only longer: compare angles, not distances"),
        (((1, 0), (-1, 9), (-5, 9)), True, "-0.11 is above -0.49: do not drop the sign"),
        (((1, 0), (3, 1), (6, 2)), False, "a tie: equal cosines tell nothing apart"),
    ):  # fmt: skip
        table = dict(zip(TRIPLE, np.array(rows, np.float32), strict=True))

        def encode(texts, table=table):
            expect(not isinstance(texts, str), "encode takes a list of texts: [text, paraphrase, foil]")
            return np.stack([table[text] for text in texts])

        said = call(lambda *triple, encode=encode: tells_apart(encode, *triple), *TRIPLE)
        expect(np.ndim(said) == 0 and np.asarray(said).dtype == bool, "one True or False was wanted")
        expect(bool(said) == wanted, f"features {rows} gave {bool(said)}, and {wanted} was wanted: {cause}")
    return "seven triplets, a tie among them"


NEGATIONS = {"no", "not", "without", "never", "nobody", "nothing", "none", "neither", "nor"}


def text_cosines(text, *others):
    """The built-in model's cosines of a text with others."""
    features = minclip.encode_text(minclip.load(), minclip.tokenize([text, *others], truncate=True))
    features = minclip.normalize(features.astype(float))
    return features[1:] @ features[0]


@exercise
def check_minimal_pairs(minimal_pairs):
    families = ("order", "negation", "binding")
    expect(isinstance(minimal_pairs, dict), f"a dict with the keys {', '.join(families)} was wanted")
    expect(set(minimal_pairs) == set(families), f"the keys are {', '.join(families)}")
    for family in families:
        entry = minimal_pairs[family]
        expect(
            isinstance(entry, tuple | list)
            and len(entry) == 4
            and all(isinstance(t, str) for t in entry[:3]),
            f"{family}: (text, paraphrase, foil, your prediction) was wanted, three texts and True or False",
        )
        expect(isinstance(entry[3], bool), f"{family}: the prediction is True or False, not {entry[3]!r}")
        text, paraphrase, foil = rows = minclip.tokenize(entry[:3], 300, truncate=True)
        expect(max(row.argmax() for row in rows) < 77, f"{family}: at most 75 tokens, or the end is cut off")
        expect((text != paraphrase).any(), f"{family}: the paraphrase has the same ids as the text")
        expect((text != foil).any(), f"{family}: the foil has the same ids as the text")
        swap = sorted(text.tolist()) == sorted(foil.tolist())
        if family == "negation":
            said = [bool(NEGATIONS & set(words.lower().replace(".", " ").split())) for words in entry[:3]]
            expect(said[0] != said[2], "negation: exactly one of text and foil says no, not or without")
            continue
        expect(swap, f"{family}: text and foil need the same tokens, in another order")
        moved = int((text != foil).sum())
        expect(family == "order" or moved == 2, f"binding: two words change places, not {moved}")
    wrong = []
    for family in families:
        *texts, said = minimal_pairs[family]
        same, other = text_cosines(*texts)
        if bool(same > other) != said:
            wrong.append(f"{family} (paraphrase {same:.3f}, foil {other:.3f})")
    expect(not wrong, f"valid triplets, but the model says otherwise: {', '.join(wrong)}")
    return "three valid triplets, three predictions that hold"


@exercise
def check_cut_off(cut_off):
    numbers = " ".join("0123456789" * 9)  # 90 tokens
    for text in (
        "a photo of a cat",
        numbers,
        numbers[:149],  # 75 tokens
        numbers[:151],  # 76 tokens
        "strawbery " * 50,  # two tokens a word
    ):
        row = minclip.tokenize(text, 1000)[0].tolist()
        own = row[1 : row.index(49407)]
        truth = [id for place, id in enumerate(own) if place > 74]
        said = call(cut_off, text)
        expect(isinstance(said, list | tuple | np.ndarray), "a list of ids was wanted")
        said = list(said)
        expect(not any(isinstance(id, str) for id in said), "ids were wanted, not words")
        expect(49407 not in said, "the end id and the padding are no part of the text")
        for place, cause in (
            (77, "start and end take two of the 77 places"),
            (76, "the end id needs a place too"),
            (74, "75 tokens of a text fit: that is one too early"),
        ):
            expect(not said == own[place:] != truth, f"{len(said)} ids, not {len(truth)}: {cause}")
        expect(said == truth, f"{len(own)} tokens: {len(said)} ids came back, not the last {len(truth)}")
    return "75 tokens count, the rest is never read"


# 14 Look inside


def run_patched(params, tokens, other, stage, position):
    """The features, with one row of a stage from the trace other. (Reading on spoils exercise 3.)"""
    return run_with(params, tokens, stage, lambda x: put(x, np.s_[:, position], other[stage][:, position]))


def run_hidden(params, tokens, block, head, position):
    """The features when ⟨end⟩ cannot attend to position in one head. (Reading on spoils exercise 5.)"""
    end, stage = tokens[0].argmax(), f"{BLOCK}{block}.attn.masked"
    return run_with(params, tokens, stage, lambda x: put(x, np.s_[:, head, end, position], -np.inf))


def run_with(params, tokens, stage, change):
    return minclip.encode_text(params, tokens, tap=lambda name, x: change(x) if name == stage else x)


def put(x, at, value):
    x = x.copy()
    x[at] = value
    return x


def cut(text):
    """The ids of one text without its padding: (1, L)."""
    tokens = minclip.tokenize(text)
    return tokens[:, : 1 + tokens[0].argmax()]


def way(features, start, goal):
    """How far features are on the way from start to goal: 0 is start, 1 is goal."""
    here, start, goal = (minclip.normalize(np.ravel(part)) for part in (features, start, goal))
    return float((here - start) @ (goal - start) / ((goal - start) @ (goal - start)))


def apart(a, b):
    """1 - cosine of two rows of features, at least 0."""
    return max(0.0, 1 - float(minclip.normalize(np.ravel(a)) @ minclip.normalize(np.ravel(b))))


@exercise
def check_lens(lens):
    params, tokens = small_tower()
    trace = minclip.trace(params, tokens)
    for stage in ("embedding", f"{BLOCK}0", f"{BLOCK}1"):
        x = trace[stage][2]
        y = call(lambda x: lens(params, x), x)
        like(y, (len(x), 20), cause="one row of E features for each position: (L, E)")
        truth, P = np.zeros((len(x), 20)), params["text_projection"]
        n = [list(normed(row, params["ln_final.weight"], params["ln_final.bias"])) for row in x.astype(float)]
        for i, e in np.ndindex(*truth.shape):
            truth[i, e] = sum(n[i][d] * P[d, e] for d in range(24))
        long = truth.copy()
        truth /= np.sqrt((truth**2).sum(axis=-1, keepdims=True))
        last = trace["text_features"][2] / np.linalg.norm(trace["text_features"][2])
        misses = {
            "the rows do not have length 1: minclip.normalize comes last": long,
            "ln_final is missing: the read-out never sees a stream that is not normalized": minclip.normalize(
                x @ P
            ),
            "ln_final's weight and bias are missing": minclip.normalize(normed(x) @ P),
            "one length for all rows: each row has its own": long / np.linalg.norm(long),
            "that is the norm before block 0, ln_1: the read-out uses ln_final": minclip.normalize(
                normed(x, params[f"{BLOCK}0.ln_1.weight"], params[f"{BLOCK}0.ln_1.bias"]) @ P
            ),
            "every row is the features of the text: read out each position": np.tile(last, (len(x), 1)),
        }
        equal(y, truth, misses, 1e-4)
    return "every position read out as if it were the end, after any block"


PATCHES = {  # stage, word, and why
    "a": ("embedding", "cat", "the embeddings differ in this row alone: with it, the input is the dog's"),
    "b": ("embedding", "end", "both texts have the same end at the same position: both rows hold the same"),
    "c": ("each block", "photo", "photo stands before the animal, so the mask keeps its row the same"),
    "d": ("last block", "cat", "after the last block no row but that of ⟨end⟩ is read"),
    "e": ("last block", "end", "this row is all that the read-out reads"),
}  # fmt: skip


@functools.cache
def patch_effects():
    """The effect of each of PATCHES, "all", "none" or "some", from runs of the built-in model."""
    params, tokens = minclip.load(), cut("a photo of a cat")
    other = minclip.trace(params, cut("a photo of a dog"))
    start, blocks = minclip.encode_text(params, tokens), count_layers(params)
    stages = {"embedding": ["embedding"], "last block": [f"{BLOCK}{blocks - 1}"]}
    stages["each block"] = [f"{BLOCK}{i}" for i in range(blocks)]
    effects = {}
    for letter, (where, word, _) in PATCHES.items():
        position = {"photo": 2, "cat": 5, "end": 6}[word]
        found = [run_patched(params, tokens, other, stage, position) for stage in stages[where]]
        shares = {round(way(features, start, other["text_features"]), 3) for features in found}
        effects[letter] = {(0.0,): "none", (1.0,): "all"}.get(tuple(shares), "some")
    return effects


@exercise
def check_effects(effects):
    keys = isinstance(effects, dict) and set(effects) == set(PATCHES)
    expect(keys, 'a dict with the keys "a" to "e" was wanted')
    odd = [letter for letter in PATCHES if effects[letter] not in ("all", "none", "some")]
    expect(not odd, f'the effects are "all", "none" and "some": look at {odd}')
    for letter, effect in patch_effects().items():
        expect(effects[letter] == effect, f"{letter} is not {effects[letter]!r}: {PATCHES[letter][2]}")
    return "each follows from the mask and the read-out, whatever the weights are"


@exercise
def check_patched(patched):
    params, _ = small_tower()
    tokens, others = np.array([[[58, 3, 7, 9, 59]], [[58, 4, 20, 10, 59]]], np.int32)
    here, other = minclip.trace(params, tokens), minclip.trace(params, others)
    for stage, blocks in (("embedding", (0, 1)), (f"{BLOCK}0", (1,)), (f"{BLOCK}1", ())):
        for position in (2, 3, 4):

            def rest(x, blocks=blocks):
                return model.read_out(model.transformer(x, params, blocks, keep), tokens, params, keep)[1]

            given = {name: array.copy() for name, array in other.items()}
            y = patched(params, tokens, given, stage, position)
            expect(y is not None, "your function returns None: does it end in return?")
            expect(np.array_equal(given[stage], other[stage]), "your function writes into the other trace")
            x = here[stage].copy()
            x[0, position] = other[stage][0, position]
            back = other[stage].copy()
            back[0, position] = here[stage][0, position]
            misses = {
                "nothing was patched: does the tap return the new array, for this stage's name?": here[
                    "text_features"
                ],
                "the whole stage was patched: copy one row, [:, position]": other["text_features"],
                "that is the other text, patched with this one": rest(back),
            }
            truth = rest(x)
            apart_from = {cause: value for cause, value in misses.items() if not close(value, truth, 1e-4)}
            like(np.asarray(y), (1, 20), cause="the features of the one text: (1, E)")
            equal(y, truth, apart_from, 1e-4)
    return "three stages, three positions"


@exercise
def check_relevance(relevance):
    params, tokens = small_tower()
    params, tokens = params.astype("float64"), tokens[2:3]
    target = minclip.normalize(np.random.default_rng(14).standard_normal(20))
    trace, h = minclip.trace(params, tokens), 1e-5
    y = relevance(params, tokens, target)
    expect(y is not None, "your function returns None: does it end in return?")
    like(np.asarray(y), (9,), cause="one number for each position: sum over D, and drop the batch axis")
    truth = np.zeros(9)
    for i in range(9):

        def cosine(factor, i=i):
            row = trace["embedding"][:, i] * factor
            features = run_with(params, tokens, "embedding", lambda x: put(x, np.s_[:, i], row))
            return float(minclip.normalize(features)[0] @ target)

        truth[i] = (cosine(1 + h) - cosine(1 - h)) / (2 * h)
    dfeatures = minclip.normalize_backward(target[None], trace["text_features"])
    gradient = minclip.backward(trace, dfeatures, parameters=False)["embedding"][0]
    product = minclip.backward(trace, target[None], parameters=False)["embedding"][0]
    words, sums = trace["token_embedding"][0], trace["embedding"][0]
    misses = {
        "the input is missing: multiply by the embedding, then sum": gradient.sum(axis=-1),
        "that is the length of the gradient: multiply by the embedding, and sum": np.linalg.norm(
            gradient, axis=-1
        ),
        "that is the gradient of a product, not of the cosine: minclip.normalize_backward": (
            product * sums
        ).sum(axis=-1),
        "the positions are part of the input: the stage is embedding, not token_embedding": (
            gradient * words
        ).sum(axis=-1),
        "the signs are gone: a word may also lower the cosine": abs((gradient * sums).sum(axis=-1)),
        "sum the products, not their sizes": abs(gradient * sums).sum(axis=-1),
        "the sign is turned: a word that helps has a number above 0": -(gradient * sums).sum(axis=-1),
    }
    equal(y, truth, misses, 1e-4)
    return "what stretching each row by a little does to the cosine"


@functools.cache
def shares_and_moves():
    """For "a photo of a cat": ⟨end⟩'s shares, and how far hiding each moves the features: two (N, H, L)."""
    params, tokens = minclip.load(), cut("a photo of a cat")
    trace = minclip.trace(params, tokens)
    shares = np.stack([trace[f"{BLOCK}{i}.attn.weights"][0, :, -1] for i in range(count_layers(params))])
    moves = np.zeros_like(shares)
    for at in np.ndindex(*shares.shape):
        moves[at] = apart(run_hidden(params, tokens, *at), trace["text_features"])
    return shares, moves


@exercise
def check_refutation(refutation):
    shares, moves = shares_and_moves()
    N, H, L = shares.shape
    pair = isinstance(refutation, tuple) and len(refutation) == 2
    places = pair and all(np.size(at) == 3 for at in refutation)
    expect(places, "two places were wanted: ((block, head, position), (block, head, position))")
    a, b = (tuple(int(i) for i in at) for at in refutation)
    for at in (a, b):
        inside = all(0 <= i < size for i, size in zip(at, shares.shape, strict=True))
        expect(inside, f"{at} is out of range: {N} blocks, {H} heads, {L} positions, all from 0")
    said = f"{shares[a]:.3f} against {shares[b]:.3f}"
    expect(shares[a] > shares[b], f"the first place must have the larger share: it is {said}")
    told = f"hiding the first moves the features by {moves[a]:.4f}, the second by {moves[b]:.4f}"
    expect(moves[b] >= 0.01, f"{told}: the second must matter, by at least 0.01")
    expect(moves[a] <= moves[b], f"{told}: these two are in order, and refute nothing")
    expect(10 * moves[a] <= moves[b], f"{told}: right, but not yet a tenth")
    return f"shares {said}, but {told}"


# 16 Choose a precision and a device


@exercise
def check_upcasts(upcasts):
    expect(isinstance(upcasts, (set, list, tuple)), "a set of letters was wanted, such as {'A', 'C'}")
    said = set(upcasts)
    expect(said <= set("ABCDEF"), "the letters are A to F")
    for letter, cause in (
        ("A", "0.5 is a Python number, and gives way to the array's dtype"),
        ("C", "the mean of a float32 array is a float32"),
        ("E", "math.sqrt gives a Python float, which gives way"),
    ):
        expect(letter not in said, f"{letter} stays float32: {cause}")
    for letter, cause in (
        ("B", "np.sqrt(64) is a np.float64, not a Python number"),
        ("D", "np.zeros(8) is float64 unless you say otherwise"),
        ("F", "np.arange(8) is int64, and float32 with int64 makes float64"),
    ):
        expect(letter in said, f"{letter} gives float64: {cause}")
    return "only Python numbers leave a dtype alone"


@exercise
def check_overflows(overflows):
    known = {"product", "score", "exp11", "exp12", "squares", "add"}
    expect(isinstance(overflows, (set, list, tuple)), "a set of names was wanted, such as {'add'}")
    said = set(overflows)
    expect(said <= known, f"the names are {', '.join(sorted(known))}")
    expect("score" not in said, "64 * 30 * 30 is 57600, which float16 still holds")
    expect("exp11" not in said, "e to the 11 is 59874: just below 65504")
    expect("add" not in said, "65512 is rounded to the nearest float16, and that is 65504")
    expect("product" in said, "300 * 300 is 90000, above 65504")
    expect("exp12" in said, "e to the 12 is 162755: softmax takes the maximum off for that reason")
    expect("squares" in said, "512 * 144 is 73728, above 65504, though each number is only 12")
    return "65504 is nearer than one thinks"


@exercise
def check_half_layer_norm(half_layer_norm):
    rng = np.random.default_rng(10)
    x = (rng.standard_normal((2, 3, 8)) * [[[1], [400], [0.004]]]).astype(np.float16)
    weight, bias = (rng.standard_normal(8).astype(np.float16) + np.float16(shift) for shift in (2, 0))
    y = call(half_layer_norm, x, weight, bias)
    like(y, x.shape, cause="keepdims=True keeps the mean as (..., 1)")
    truth = np.zeros(x.shape)
    for i in np.ndindex(2, 3):
        row = [float(value) for value in x[i]]
        mean = sum(row) / 8
        variance = sum((value - mean) ** 2 for value in row) / 8
        truth[i] = [(v - mean) / (variance + 1e-5) ** 0.5 for v in row] * weight.astype(float) + bias
    expect(y.dtype != np.float32, "float16 in, float16 out: narrow at the very end")
    expect(not np.isnan(y).any(), "there is a NaN: inf / inf; widen x before it is squared")
    expect(
        not np.array_equal(y[:, 1], np.broadcast_to(bias, (2, 8))),
        "the large rows come out as the bias alone: their squares overflow, so widen x first",
    )
    wide = x.astype(float)
    misses = {
        "the weight is not in it": normed(wide, 1, bias),
        "the bias is not in it": normed(wide, weight),
        "eps is 1e-5": normed(wide, weight, bias, eps=0),
        "the variance divides by D, not by D - 1": normed(wide, weight, bias, ddof=1),
    }
    equal(y, truth, misses, 6e-3)
    like(y, x.shape, np.float16)
    return "kept in float16, computed in float32"


@exercise
def check_array_module(array_module):
    real = sys.modules.get("cupy")
    sys.modules["cupy"] = None  # as where nobody has it: import cupy fails
    try:
        try:
            expect(array_module(np.ones(3)) is np, "for a NumPy array the module is numpy itself")
        except ImportError:
            raise Wrong("cupy is imported even for NumPy's arrays: not everybody has it") from None
        sys.modules["cupy"] = module = types.ModuleType("cupy")
        module.ndarray = type("ndarray", (), {"__module__": "cupy", "dtype": np.dtype(np.float32)})
        module.get_array_module = lambda x: module if isinstance(x, module.ndarray) else np
        said = array_module(module.ndarray())
    finally:
        sys.modules.pop("cupy", None)
        if real is not None:
            sys.modules["cupy"] = real
    expect(said is not None, "your function returns None: does it end in return?")
    expect(said is not np, "np for an array that is not NumPy's: np.exp would not have it")
    expect(isinstance(said, types.ModuleType), f"a module was wanted, not {type(said).__name__}")
    expect(said.__name__ == "cupy", f"for a CuPy array the module is cupy, not {said.__name__}")
    return "the array says where it lives"


# 17 Shrink it


def int8_rows(W):
    """(whole numbers, scale [out, 1]) of each row, one number at a time; a zero row has the scale 1."""
    whole, scale = np.zeros(W.shape), np.ones((len(W), 1))
    for i, row in enumerate(W.tolist()):
        largest = max(abs(w) for w in row)
        scale[i] = largest / 127 if largest else 1
        whole[i] = [round(w / scale[i, 0]) for w in row]
    return whole, scale


@exercise
def check_quantize_rows(quantize_rows):
    rng = np.random.default_rng(17)
    W = (rng.standard_normal((5, 7)) * [[1], [0.01], [30], [2], [0]]).astype(np.float32)
    W[3, 2] = -8  # the largest number of this row is negative
    result = call(quantize_rows, W)
    expect(isinstance(result, tuple | list) and len(result) == 2, "two arrays were wanted: (q, scale)")
    q, scale = (np.asarray(array) for array in result)
    expect(scale.shape != (), "that is one scale for the matrix: each row has its own")
    expect(scale.shape != (1, 7), "that is a scale for each column: the maximum of a row is over its columns")
    like(scale, (5, 1), cause="keepdims=True keeps the scale as (out, 1)")
    like(q, (5, 7))
    expect(np.isfinite(scale).all() and (scale > 0).all(), "a row of zeros has the scale 0: take 1 for it")
    expect(q.dtype == np.int8, f"q is {q.dtype} and should be int8")
    truth, wanted = int8_rows(W)
    scale_misses = {
        "127 and not 128 is the largest whole number of this grid": wanted[:4] * 127 / 128,
        "the largest *absolute* value of a row decides: some rows' largest number is negative":
            W.max(axis=-1, keepdims=True)[:4] / 127,
        "the scale is the step, the largest absolute value over 127": 1 / wanted[:4],
        "the range is -127 to 127, so divide the largest absolute value by 127": wanted[:4] * 127 / 255,
    }  # fmt: skip
    equal(scale[:4], wanted[:4], scale_misses, 1e-3)
    q_misses = {
        "the numbers are cut, not rounded: astype drops the fraction, np.rint rounds": np.trunc(W / wanted),
        "the numbers are rounded down: np.rint rounds to the nearest": np.floor(W / wanted),
        "the matrix was not divided by the scale": np.rint(W),
    }
    equal(q, truth, q_misses)
    return "each row on its own grid of 255 steps"


@exercise
def check_bits(bits):
    known = {"int8 rows": (8, 16, 512), "Q8_0": (8, 16, 32), "Q4_0": (4, 16, 32), "MLX": (4, 32, 64)}
    expect(isinstance(bits, dict) and set(bits) == set(known), f"a dict with the keys {', '.join(known)}")
    for name, (number, shared, group) in known.items():
        said = bits[name]
        expect(isinstance(said, int | float | np.number), f"{name}: one number was wanted")
        true = number + shared / group
        for cause, value in {
            "that is without what the group shares": number,
            "that is bytes: 8 bits are a byte": true / 8,
            "every number pays for the whole scale here: the group shares it": number + shared,
            "that is the number of bits of a whole group: divide by its size": number * group + shared,
            "a float16 has 16 bits, not 2 (these are bytes)": number + shared / 8 / group,
            "MLX stores two float16 numbers for each group": number + shared / 2 / group,
        }.items():
            expect(not math.isclose(said, value, rel_tol=1e-6), f"{name}: {cause}")
        expect(math.isclose(said, true, rel_tol=1e-3), f"{name}: not {said:g}; bits of a group over its size")
    return "int8 by row is nearly free; groups of 4 bits cost half a bit more"


def zero_share(outlier, scales):
    """The share of ordinary numbers that int8 rounds to 0 where one row or column is 1000 times as large."""
    W = np.random.default_rng(18).standard_normal((24, 40))
    ordinary = np.ones(W.shape, bool)
    place = (5, slice(None)) if outlier == "row" else (slice(None), 7)
    W[place] *= 1000
    ordinary[place] = False
    scale = abs(W).max(axis={"tensor": None, "row": 1, "column": 0}[scales], keepdims=True) / 127
    return (np.rint(W / scale)[ordinary] == 0).mean()


@exercise
def check_lost(lost):
    kinds = {"tensor", "row", "column"}
    expect(isinstance(lost, dict) and set(lost) == {"row", "column"}, "a dict with the keys row and column")
    for outlier, said in lost.items():
        expect(isinstance(said, set | list | tuple), f"{outlier}: a set was wanted, such as {{'tensor'}}")
        said = set(said)
        expect(said <= kinds, f"{outlier}: the scales are by {', '.join(sorted(kinds))}")
        for scales in sorted(kinds):
            share = zero_share(outlier, scales)
            told = f"one large {outlier}, a scale by {scales}: {share:.0%} of the others become 0"
            why = "each scale sees the large one" if share > 0.5 else "only its own scale sees the large one"
            expect((scales in said) == (share > 0.5), f"{told}; {why}")
    return "a scale of its own must hold the large ones, or they take the grid from all others"


@exercise
def check_rescue(rescue):
    rng = np.random.default_rng(19)
    for at in (3, 8):
        W = rng.standard_normal((6, 9)).astype(np.float32)
        W[:, at] *= 500
        W[2, at] = 0.1  # the largest number of this row is elsewhere
        result = call(rescue, W)
        expect(
            isinstance(result, tuple | list) and len(result) == 4, "four were wanted: (q, scale, at, column)"
        )
        q, scale, said, column = result
        expect(np.ndim(said) == 0 and int(said) == said, "at is the number of one column")
        rows = {int(i) for i in abs(W).max(axis=1).argsort()[-1:]}
        expect(int(said) == at or int(said) not in rows, "at is a row: the maximum is over the rows, axis 0")
        expect(int(said) == at, f"column {int(said)} was kept, and column {at} has the largest numbers")
        column = np.asarray(column)
        expect(column.size == 6, f"column has shape {column.shape}: one number for each row")
        equal(
            column.ravel(),
            W[:, at],
            {"the column is kept as it is, not rounded": np.rint(column.ravel())},
            1e-6,
        )
        q, scale = np.asarray(q), np.asarray(scale)
        like(q, (6, 9), np.int8)
        like(scale, (6, 1))
        expect(not q[:, at].any(), f"q[:, {at}] must be 0: its numbers are in column, and would count twice")
        others = W.copy()
        others[:, at] = 0
        truth, wanted = int8_rows(others)
        equal(scale, wanted, {
            "the scale still sees the large column: take it out first": int8_rows(W)[1],
        }, 1e-3)  # fmt: skip
        equal(q, truth)
    return "one column in float32, and the grid is fine again for all others"


# 18 Make it fast

START, END = 49406, 49407


@exercise
def check_trim_batch(trim_batch):
    for tokens, width, cause in (
        ([[START, 5, 6, END, 0, 0], [START, END, 0, 0, 0, 0]], 4, "the last end of text is at 3"),
        ([[START, 5, 6, END, END, END], [START, 7, END, END, END, END]], 4,
         "padding may be 49407 too: the first one is the end"),
        ([[START, 5, 0, 6, END, 0], [START, 0, 0, END, 0, 0]], 5,
         "id 0 may be a ! in a text: look for the end, not for zeros"),
        ([[START, 5, 6, 7, 8, END], [START, 5, END, 0, 0, 0]], 6, "a full row leaves nothing to cut"),
    ):  # fmt: skip
        tokens = np.array(tokens)
        y = call(trim_batch, tokens)
        expect(isinstance(y, np.ndarray) and y.ndim == 2, "an array (B, L) was wanted: slice the columns")
        ends = tokens.argmax(axis=-1)
        expect(y.shape[1] != ends.max(), "the last end of text is itself cut off: its position plus 1")
        expect(
            y.shape[1] != ends.min() + 1 or ends.min() == ends.max(),
            "that is the shortest text's end: the longest decides",
        )
        expect(y.shape == (2, width), f"{tokens.shape} became {y.shape}, not (2, {width}): {cause}")
        equal(y, tokens[:, :width])
    return "nothing behind the last end, and the end stays"


@exercise
def check_next_token(attend_next):
    rng = np.random.default_rng(18)
    H, L, K = 3, 5, 4
    q, k, v = (2 * rng.standard_normal((3, L, H, K))).astype(np.float32)
    cache = {name: np.zeros((H, 0, K), np.float32) for name in "kv"}
    for i in range(L):
        context = attend_next(q[i], k[i], v[i], cache)
        expect(context is not None, "your function returns None: does it end in return?")
        length = np.shape(cache["k"])[1]
        expect(length > 0, "the cache stays empty: put the new k and v into it")
        expect(length == i + 1, f"after {i + 1} tokens the cache holds {length}: it grows by one per token")
        like(context, (H, K), np.float32, "one row for each head, float32 in, float32 out")
        truth, scores = np.zeros((H, K)), np.einsum("hk,jhk->hj", q[i], k[: i + 1])
        for h in range(H):
            e = [math.exp(sum(float(a) * float(b) for a, b in zip(q[i, h], k[j, h], strict=True)) / 2)
                 for j in range(i + 1)]  # fmt: skip
            truth[h] = sum(e[j] / sum(e) * v[j, h] for j in range(i + 1))
        values = v[: i + 1].transpose(1, 0, 2)
        misses = {
            "the scores are not divided by the root of K": np.einsum("hj,hjk->hk", shares(scores), values),
            "divide by the root of K, not by K": np.einsum("hj,hjk->hk", shares(scores / 4), values),
            "the shares must sum to 1 over the tokens, not over the heads": np.einsum(
                "hj,hjk->hk", shares(scores / 2, 0), values
            ),
            "the new token attends to itself, too: add its k and v first": 0 * truth,
        }
        equal(context, truth, misses, 1e-4)
    return "five tokens, and no row was computed twice"


@exercise
def check_count_prefixes(count_prefixes):
    texts = ([1, 2, 3], [1, 2, 4, 9], [1, 2, 3], [5, 2, 3], [5], [1, 2, 3, 4])
    tokens = np.array([([START, *text, END] + 4 * [0])[:7] for text in texts])
    count = call(count_prefixes, tokens)
    expect(np.ndim(count) == 0, "one number was wanted")
    ended = [row[: row.index(END) + 1] for row in tokens.tolist()]
    misses = {
        "that is every position: count a beginning once": sum(map(len, ended)),
        "the padding is counted too: stop at the end of text": len(
            {tuple(row[: i + 1]) for row in tokens.tolist() for i in range(7)}
        ),
        "that counts ids at places: after another beginning, the same id is another row": len(
            {(i, row[i]) for row in ended for i in range(len(row))}
        ),
        "that counts whole texts: each of their beginnings is a row": len(set(map(tuple, ended))),
        "the end of text needs its row too: it is the one that is read out": len(
            {tuple(row[: i + 1]) for row in ended for i in range(len(row) - 1)}
        ),
    }
    equal(count, 15, misses)
    expect(call(count_prefixes, tokens[:1]) == 5, "one text of 3 words has 5 beginnings")
    return "15 rows in place of 30"


@exercise
def check_by_length(encode_by_length):
    texts = [[9] * n for n in (5, 1, 4, 2, 3, 1, 5)]
    tokens = np.array([([START, *text, END] + 6 * [0])[:8] for text in texts])
    tokens[:, 1] = np.arange(1, 8)  # so that no two texts are alike
    shapes = []

    def encode(batch):
        shapes.append(batch.shape)
        ends = batch.argmax(axis=-1)
        expect((batch.max(axis=-1) == END).all(), "a batch was cut before the end of one of its texts")
        return np.stack([batch[:, 1], ends], axis=1).astype(np.float32)

    features = call(encode_by_length, encode, tokens, 3)
    expect(shapes, "encode was never called")
    expect(max(rows for rows, _ in shapes) <= 3, f"a batch had {max(shapes)[0]} texts, and 3 are allowed")
    like(features, (7, 2), np.float32, "one row for each text")
    truth = np.stack([tokens[:, 1], tokens.argmax(axis=-1)], axis=1).astype(np.float32)
    order = truth[:, 1].argsort(kind="stable")
    expect(
        not np.array_equal(features, truth[order[order]]),
        "that is the order applied twice, not undone: features[order] = found",
    )
    expect(
        sorted(map(tuple, features)) != sorted(map(tuple, truth)) or np.array_equal(features, truth),
        "the features come in another order than the texts: undo the sorting",
    )
    equal(features, truth)
    work = sum(rows * columns for rows, columns in shapes)
    expect(work != 7 * 8, "padding was computed: trim each batch")
    ends = np.sort(truth[:, 1].astype(int)) + 1
    least = sum(len(ends[i : i + 3]) * ends[i : i + 3].max() for i in range(0, 7, 3))
    expect(work <= least + 2, f"{work} positions were computed and {least} will do: sort by length first")
    return f"{work} positions in place of {7 * 8}, and each text has its own features"


class Watched(np.ndarray):
    """An array that notes each product made with it, by function and number of axes."""

    notes: ClassVar[list] = []

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if ufunc is np.matmul:
            Watched.notes.append(("product", max(np.ndim(x) for x in inputs[:1])))
        plain = [np.asarray(x) if isinstance(x, Watched) else x for x in inputs]
        return getattr(ufunc, method)(*plain, **options).view(Watched)

    def __array_function__(self, function, types, inputs, options):
        if function is np.einsum:
            Watched.notes.append(("einsum", 0))
        if function is np.dot:
            Watched.notes.append(("product", np.ndim(inputs[0])))
        return super().__array_function__(function, types, inputs, options)


@exercise
def check_four_products(ways):
    expect(isinstance(ways, (list, tuple)) and len(ways) == 4, "a list of four functions was wanted")
    rng = np.random.default_rng(11)
    x, W = rng.standard_normal((2, 3, 4)).astype(np.float32), rng.standard_normal((4, 4)).astype(np.float32)
    truth = np.zeros((2, 3, 4))
    for b, i, e in np.ndindex(2, 3, 4):
        truth[b, i, e] = sum(float(x[b, i, d]) * float(W[e, d]) for d in range(4))
    kinds = (
        ([("product", 1)] * 6, "6 products of a vector with W.T, one per row"),
        ([("product", 3)], "one @ on the array of three axes"),
        ([("product", 2)], "one @ on a matrix of all 6 rows"),
        ([("einsum", 0)], "one np.einsum"),
    )
    for way, (wanted, told) in zip(ways, kinds, strict=True):
        y = call(way, x, W)
        name = way.__name__
        expect(np.shape(y) != (6, 4), f"{name}: put the rows back into (B, L, out) at the end")
        like(y, (2, 3, 4), cause=name)
        equal(y, truth, {f"{name}: W is (out, in), so W.T; a square W hides it": x @ W})
        like(y, (2, 3, 4), np.float32, name)
        Watched.notes = []
        way(x.view(Watched), W.view(Watched))
        expect(Watched.notes == wanted, f"{name}: right, but another way was asked for: {told}")
    x, W = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 12, 256), (512, 256)))
    times = {way.__name__: min(timeit.repeat(lambda way=way: way(x, W), number=1, repeat=5)) for way in ways}
    best = min(times.values())
    told = ", ".join(f"{name} {time / best:.1f}" for name, time in sorted(times.items(), key=lambda t: t[1]))
    return f"all four are right; times as multiples of the best: {told}"


# 19 Debug a port

SIX = {  # letter: ids in the catalogue, first stage to diverge (reading on spoils exercises 1 and 3 to 5)
    "A": ({"A1"}, "mlp.gelu"), "B": ({"T6-out"}, "attn"), "C": ({"M3-late"}, "attn.masked"),
    "D": ({"N8"}, "text_features"), "E": ({"P3"}, "eot"), "F": ({"E2", "N5"}, "positional_embedding"),
}  # fmt: skip


def broken(letter, params, tokens):
    """One of six broken encoders: .run() gives its features, .tap its stages."""
    port = Port(params, tokens)
    for fault in CATALOGUE:
        if fault.id in SIX[letter][0]:
            fault.change(port)
    return port


def letters_of(answers):
    expect(isinstance(answers, dict) and answers, "a dict with the keys A to F was wanted")
    expect(set(answers) <= set(SIX), f"the letters are A to F, not {sorted(set(answers) - set(SIX))}")
    return sorted(answers)


def all_six(right):
    """Stop if some are still to be done."""
    missing = sorted(set(SIX) - set(right))
    expect(not missing, f"{', '.join(right)} right so far; still to do: {', '.join(missing)}")


KINDS = {"A": "function", "B": "step", "C": "mask", "D": "step", "E": "end", "F": "step"}
SYMPTOMS = {
    "A": "its error is small on all texts, and padding changes nothing: no matrix is wrong",
    "B": "its error is large on all texts, and padding changes nothing",
    "C": "its features change with the padding: what keeps later tokens from being seen?",
    "D": "its error is large on all texts, and padding changes nothing",
    "E": "ordinary texts are right and some probe texts are not: which row is read?",
    "F": "its error is large on all texts, and padding changes nothing",
}


@exercise
def check_hypotheses(hypotheses):
    letters = letters_of(hypotheses)
    for letter in letters:
        said = hypotheses[letter]
        expect(said in KINDS.values(), f"{letter}: {said!r} is none of end, function, mask, step")
        expect(said == KINDS[letter], f"{letter}: {said!r} does not fit: {SYMPTOMS[letter]}")
    all_six(letters)
    return "six hypotheses that fit the symptoms; now look inside"


@exercise
def check_first_divergence(first_divergence):
    rng = np.random.default_rng(12)
    right = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in ("a", "b", "c", "d")}
    small, nan = {**right, "b": right["b"] / 1000}, {**right, "c": right["c"] * np.nan}
    noise, hole = np.float32([[1, -1, 0], [0, 1, -1]]), np.float32([[1, 1, 0], [1, 1, 1]])
    for cause, reference, port, wanted in (
        ("b and c differ: the first counts, in the reference's order",
         right, {**right, "c": -right["c"], "b": right["b"] + noise}, "b"),
        ("c is 1.5 times what it should be: a cosine does not see that",
         right, {**right, "c": 1.5 * right["c"]}, "c"),
        ("c is NaN: every comparison with NaN is False", right, nan, "c"),
        ("the numbers of b are small, and so is the difference: divide by the reference's length",
         small, {**small, "b": small["b"] + noise / 10000}, "b"),
        ("the numbers of d are large, and differ by rounding alone: divide by the reference's length",
         {**right, "d": right["d"] * 10000}, {**right, "d": right["d"] * 10000 + noise / 10}, None),
        ("one number of d is nearly 0, and its own error is large: measure the array, not each number",
         {**right, "d": right["d"] * hole}, {**right, "d": right["d"] * hole + 1e-4 * (1 - hole)}, None),
        ("the port does not show a: go on with the next", right, {**right, "d": -right["d"], "a": None}, "d"),
        ("nothing differs: None", right, right, None),
    ):  # fmt: skip
        port = {name: array for name, array in port.items() if array is not None}
        with np.errstate(all="ignore"):
            try:
                said = first_divergence(dict(reference), port, 1e-3)
            except KeyError as error:
                raise Wrong(f"the port does not show {error}: go on with the next") from None
        expect(said is None or isinstance(said, str), "a stage's name or None was wanted")
        expect(said == wanted, f"{said!r} was given and {wanted!r} wanted: {cause}")
    return "eight cases: order, scale, NaN, small, large, near 0, missing, none"


@exercise
def check_stages(stages):
    order = [name.removeprefix(f"{BLOCK}0.") for name in minclip.trace(minclip.load(), [[END]])]
    letters = letters_of(stages)
    for letter in letters:
        said, wanted = str(stages[letter]).removeprefix(f"{BLOCK}0."), SIX[letter][1]
        expect(said in order or letter != "E", "E: agrees on ordinary texts; try minclip.probe_tokens()")
        expect(said in order, f"{letter}: no stage is called {said!r}; without the block, such as 'mlp.gelu'")
        expect(order.index(said) <= order.index(wanted), f"{letter}: an earlier stage than {said} is wrong")
        expect(said == wanted, f"{letter}: {said} still agrees; the first divergence is later")
    all_six(letters)
    return "six first divergences"


@exercise
def check_bugs(bugs):
    known = {fault.id: fault.summary for fault in CATALOGUE}
    letters = letters_of(bugs)
    for letter in letters:
        said, wanted = bugs[letter], SIX[letter][0]
        said = {said} if isinstance(said, str) else set(said)
        for id in sorted(said):
            expect(id in known, f"{letter}: the catalogue has no {id!r}; an id is such as 'T4'")
            expect(id in wanted, f"{letter}: it is not {id}, {known[id]}")
        expect(said == wanted, f"{letter}: {', '.join(said) or 'nothing'} is not all of it")
    all_six(letters)
    return "six encoders, seven bugs"


@exercise
def check_fixes(fixes):
    params, tokens = minclip.load(), probe.probe_tokens()
    reference, fixed = minclip.trace(params, tokens), []
    for letter in letters_of(fixes):
        port, kept = broken(letter, params, tokens), {}
        try:
            fixes[letter](port)
        except NotImplementedError:
            continue

        def tap(name, array, port=port, kept=kept):
            kept[name] = port.tap(name, array)
            return kept[name]

        port.run(tap)
        wrong = [name for name in reference if not close(kept[name], reference[name], 1e-3)]
        if wrong and "text_features" not in wrong:
            raise Wrong(f"{letter}: the features are right, but not {wrong[0]}: fix where it is born")
        if wrong:
            raise Wrong(f"{letter}: still wrong from {wrong[0]} on")
        fixed.append(letter)
    if not fixed:
        raise NotImplementedError
    all_six(fixed)
    return "six encoders, every stage of each"


# 20 Feed a diffusion model


def without_mask():
    """A tap that lets every position see all others."""
    kept = {}

    def tap(name, array):
        if name.endswith("scores"):
            kept["scores"] = array
        return kept["scores"] if name.endswith("masked") else array

    return tap


@exercise
def check_rows_after(rows_after):
    params = minclip.load()
    tokens = minclip.tokenize(["a cat", "two dogs in the rain"], pad=49407)[:, :12]
    stages = minclip.trace(params, tokens)
    blocks = ["embedding", *(name for name in stages if name.removeprefix(BLOCK).isdigit())]
    final = [params[f"ln_final.{name}"].astype(float) for name in ("weight", "bias")]

    def after(skip, norm):
        x = stages[blocks[len(blocks) - 1 - skip]].astype(float)
        return normed(x, *final) if norm else x

    for skip, norm in ((0, True), (1, False), (1, True), (2, False), (len(blocks) - 1, False)):
        told = f"skip={skip}, norm={norm}"
        try:
            x = call(rows_after, params, tokens, skip, norm)
        except KeyError as error:
            raise Wrong(
                f"{told}: no stage is called {error}; skip all blocks, and the embedding is left"
            ) from None
        like(x, stages["embedding"].shape, cause=f"{told}; every row is wanted, the padding's too")
        misses = {
            f"{told}: ln_final is missing": after(skip, False),
            f"{told}: no ln_final is wanted": after(skip, True),
        }
        for other, cause in (
            (skip + 1, "that is one block too few"),
            (skip - 1, "that is one block too many"),
        ):
            if 0 <= other < len(blocks):
                misses |= {
                    f"{told}: {cause}": after(other, norm),
                    f"{told}: {cause}, and norm": after(other, not norm),
                }
        right = after(skip, norm)
        equal(
            x, right, {cause: value for cause, value in misses.items() if not close(value, right, 1e-4)}, 1e-3
        )
        like(x, stages["embedding"].shape, np.float32)
    return "five states of one tower"


PADDING = {  # what may change: the stage, the rows, and whether the mask is there
    "features": ("text_features", slice(None), True),
    "states of the words": ("ln_final", slice(0, 7), True),
    "states of the padding": ("ln_final", slice(7, None), True),
    "features without the mask": ("text_features", slice(None), False),
    "states of the words without the mask": ("ln_final", slice(0, 7), False),
}


@exercise
def check_padding(changes):
    expect(isinstance(changes, set | list | tuple), "a set of names was wanted, such as {'features'}")
    said, params = set(changes), minclip.load()
    expect(said <= set(PADDING), f"the names are: {', '.join(PADDING)}")
    zero, end = (minclip.tokenize("a photo of a cat", pad=pad) for pad in (0, 49407))
    for name, (stage, rows, mask) in PADDING.items():
        tap = None if mask else without_mask()
        a, b = (minclip.trace(params, tokens, tap=tap)[stage][0, ..., rows, :] if stage == "ln_final"
                else minclip.trace(params, tokens, tap=tap)[stage] for tokens in (zero, end))  # fmt: skip
        changed = not close(a, b, 1e-4)
        why = {
            ("features", False): "the end of text sees no padding",
            ("states of the words", False): "no word sees what comes after it",
            ("states of the padding", True): "each of these rows starts from the padding's own embedding",
            ("features without the mask", True): "now the end of text reads the padding",
            ("states of the words without the mask", True): "now each word reads the padding",
        }[name, changed]
        expect((name in said) == changed, f"the {name} {'change' if changed else 'do not change'}: {why}")
    return "padding is free if one row is read, and not if all are"


@exercise
def check_to_skip(to_skip):
    for tool, setting, wanted, cause in (
        ("diffusers SD 1", None, 0, "without a setting nothing is skipped: the last state"),
        ("diffusers SD 1", 1, 1, "entry -(1 + 1) of the list is one block before the last"),
        ("diffusers SD 1", 2, 2, "entry -(2 + 1) is two blocks before the last"),
        ("webui SD 1", None, 0, "its setting starts at 1, the last state"),
        ("webui SD 1", 1, 0, "it counts states from the end, and 1 is the last: nothing is skipped"),
        ("webui SD 1", 2, 1, "2 is the second-to-last"),
        ("diffusers SDXL", None, 1, "without a setting it takes entry -2, the second-to-last"),
        ("diffusers SDXL", 1, 2, "entry -(1 + 2) is two blocks before the last"),
        ("diffusers SDXL", 2, 3, "entry -(2 + 2) is three blocks before the last"),
    ):
        said = call(to_skip, tool, setting)
        expect(isinstance(said, int | np.integer), f"a number of blocks was wanted, not {said!r}")
        expect(said == wanted, f"{tool}, {setting}: {said}, and {wanted} was wanted; {cause}")
    return "three tools, one number"


@exercise
def check_patches(patches):
    rng = np.random.default_rng(20)
    for size, side in ((2, 6), (4, 8)):
        images = rng.standard_normal((2, 3, side, side)).astype(np.float32)
        count = side // size
        x = call(patches, images, size)
        like(x, (2, count**2, 3 * size**2), cause="(B, patches, numbers of a patch)")
        truth = np.zeros(x.shape)
        for b, row, column in np.ndindex(2, count, count):
            numbers = [
                images[b, c, row * size + i, column * size + j]
                for c in range(3) for i in range(size) for j in range(size)
            ]  # fmt: skip
            truth[b, row * count + column] = numbers
        grid = images.reshape(2, 3, count, size, count, size)
        misses = {
            "a reshape alone cuts strips, not squares: split both sides first": images.reshape(x.shape),
            "the patches go column by column: row by row is wanted": grid.transpose(0, 4, 2, 1, 3, 5),
            "within a patch the colors come last: all of one color first": grid.transpose(0, 2, 4, 3, 5, 1),
            "each patch is turned on its side: rows before columns": grid.transpose(0, 2, 4, 1, 5, 3),
            "split a side into (patches, size), not into (size, patches)":
                images.reshape(2, 3, size, count, size, count).transpose(0, 3, 5, 1, 2, 4),
            "the colors come before the patches: move their axis":
                images.reshape(2, 3, count, size, count, size).transpose(0, 1, 2, 4, 3, 5),
        }  # fmt: skip
        equal(x, truth, {cause: value.reshape(x.shape) for cause, value in misses.items()})
        like(x, truth.shape, np.float32)
    return "squares, row by row: an image is a sentence of patches"
