"""The reference tokenizer as a chain of small steps, each of which a port may have got wrong.

`REFERENCE` holds the steps that make OpenAI's ids: how text is cleaned and split, how words become bytes,
how they are merged and numbered, and how a row is made. A `TokenizerPort` is the reference with some
steps replaced. Without faults its ids are those of `minclip.tokenize`.
"""

import dataclasses
import functools
import html
import itertools

import regex

from minclip import tokenizer
from minclip.tokenizer import END, START, WORD_END

START_ID, END_ID = 49406, 49407
CONTEXT = 77  # OpenAI's context length
SPECIAL_IDS = {START: (START_ID,), END: (END_ID,)}


def same(value):
    """Return value as it is: a step left out."""
    return value


def unescape_twice(text):
    return html.unescape(html.unescape(text))


def single_spaces(text):
    return tokenizer.SPACES.sub(" ", text).strip()


def spell_bytes(word):
    """Return the printable characters of a word's UTF-8 bytes, as a list."""
    letters = tokenizer.byte_characters()
    return [letters[b] for b in word.encode("utf-8", errors="surrogatepass")]


def end_word(symbols):
    """Return symbols with </w> appended to the last one."""
    return [*symbols[:-1], symbols[-1] + WORD_END] if symbols else symbols


def merge_by_rank(symbols):
    return tokenizer.merge(symbols)


def number_piece(piece):
    """Return the ids of a piece: one, or none where the vocabulary does not hold it."""
    id = tokenizer.vocabulary().get(piece)
    return () if id is None else (id,)


def cut_keeping_end(ids, end, limit):
    """Return ids, cut to limit so that they still end with the end ids."""
    return ids if len(ids) <= limit else [*ids[: limit - len(end)], *end]


def fix_text(text):
    import ftfy  # here, because it takes time to import

    return ftfy.fix_text(text)


CLEAN = {
    "repair": fix_text,
    "unescape": unescape_twice,
    "normalize": same,  # a Unicode normalization form
    "mark": same,  # for steps that tell capitals apart after lower-casing
    "spaces": single_spaces,
    "fold": str.lower,
    "accents": same,
    "wrap": same,
}
SPLIT = {
    "special_pattern": r"<\|startoftext\|>|<\|endoftext\|>",
    "contractions": r"'s|'t|'re|'ve|'m|'ll|'d",
    "letters": r"\p{L}+",
    "digits": r"\p{N}",
    "others": r"[^\s\p{L}\p{N}]+",
    "white": r"\s",  # what \s stands for in the patterns above, inside brackets
    "ignore_case": True,
    "engine": regex,
}
WORDS = {
    "special": SPECIAL_IDS.get,  # word -> the ids of a special token, or None
    "spell": spell_bytes,
    "end_word": end_word,
    "merge": merge_by_rank,
    "number": number_piece,
}
ROW = {
    "shift": same,  # id -> id, of every id but the padding
    "start": (START_ID,),
    "end": (END_ID,),
    "pad": 0,
    "side": "right",  # "right", "left", or "before the end"
    "cut": cut_keeping_end,
}
STAGES = {"clean": CLEAN, "split": SPLIT, "words": WORDS, "row": ROW}
REFERENCE = {**CLEAN, **SPLIT, **WORDS, **ROW}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Results of steps that several ports share, so that a search repeats no work."""

    results: dict = dataclasses.field(default_factory=dict)

    def of(self, stage, faults):
        """Return the dict of a stage's results with those faults that change the stage."""
        key = (stage, *(fault.id for fault in faults if not STAGES[stage].keys().isdisjoint(fault.change)))
        return self.results.setdefault(key, {})


class TokenizerPort:
    """The reference tokenizer with faults put in.

    faults   objects with an `id` and a `change`, a dict from names of steps to what replaces them
    memory   the `Memory` shared with other ports, if any

    >>> TokenizerPort().row("a cat", 5)
    [49406, 320, 2368, 49407, 0]
    """

    def __init__(self, faults=(), memory=None):
        memory = memory or Memory()
        self.steps = dict(REFERENCE)
        for fault in faults:
            self.steps.update(fault.change)
        self.cleaned, self.split, self.numbered = (
            memory.of(name, faults) for name in STAGES if name != "row"
        )

    def row(self, text, length=0, limit=CONTEXT):
        """Return the ids of a text with start and end, cut to limit, padded to length at least."""
        steps, end = self.steps, self.around("end")
        content = map(steps["shift"], self.content(text))
        ids = steps["cut"]([*self.around("start"), *content, *end], end, limit)
        padding = [steps["pad"]] * (length - len(ids))
        if steps["side"] == "left":
            return [*padding, *ids]
        if steps["side"] == "before the end" and end:
            return [*ids[: -len(end)], *padding, *end]
        return [*ids, *padding]

    def around(self, name):
        """Return the "start" or the "end" ids, as a list."""
        return [self.steps["shift"](id) for id in self.steps[name]]

    def unpadded(self, row):
        """Return a row without its padding."""
        pad, side, end = self.steps["pad"], self.steps["side"], self.around("end")
        if side == "left":
            return list(itertools.dropwhile(pad.__eq__, row))
        if side == "before the end" and end:
            return [*strip_right(row[: -len(end)], pad), *row[-len(end) :]]
        stripped = strip_right(row, pad)
        # Where the padding is the end id itself, the first of the padding is the end.
        return [*stripped, *end] if end and end[-1] == pad and len(stripped) < len(row) else stripped

    def content(self, text):
        """Return the ids of a text without start and end."""
        return [id for word in self.words(text) for id in self.word_ids(word)]

    def clean(self, text):
        """Return the cleaned text."""
        if text not in self.cleaned:
            cleaned = text
            for step in CLEAN:
                cleaned = self.steps[step](cleaned)
            self.cleaned[text] = cleaned
        return self.cleaned[text]

    def words(self, text):
        """Return the words of a text: the matches of the regular expression in the cleaned text."""
        cleaned = self.clean(text)
        if cleaned not in self.split:
            parts = ("special_pattern", "contractions", "letters", "digits", "others")
            pattern = "|".join(self.steps[part] for part in parts if self.steps[part])
            pattern = pattern.replace(r"\s", self.steps["white"])
            compiled = compile_pattern(self.steps["engine"], pattern, self.steps["ignore_case"])
            self.split[cleaned] = compiled.findall(cleaned)
        return self.split[cleaned]

    def word_ids(self, word):
        """Return the ids of a word, as a tuple."""
        if word not in self.numbered:
            steps = self.steps
            ids = steps["special"](word)
            if ids is None:
                pieces = steps["merge"](steps["end_word"](steps["spell"](word)))
                ids = tuple(id for piece in pieces for id in steps["number"](piece))
            self.numbered[word] = ids
        return self.numbered[word]


def strip_right(row, pad):
    """Return a row without the ids at its end that are pad."""
    return list(itertools.dropwhile(pad.__eq__, row[::-1]))[::-1]


@functools.cache
def compile_pattern(engine, pattern, ignore_case):
    return engine.compile(pattern, engine.IGNORECASE if ignore_case else 0)
