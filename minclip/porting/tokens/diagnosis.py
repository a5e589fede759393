"""Name a tokenizer's bug: which known mistakes turn OpenAI's ids into a port's.

`diagnose_tokens` first reads the rows: start, end, padding, numbering. It then puts the faults of
minclip/porting/tokens/faults.py into the reference tokenizer, one, two and three at a time, and looks for
those that give every row of the port. Most are ruled out by the first text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from minclip import tokenizer
from minclip.porting.tokens.faults import CATALOGUE, TokenFault
from minclip.porting.tokens.port import START_ID, Memory, TokenizerPort
from minclip.porting.tokens.probe import probe_texts
from minclip.porting.tokens.rows import overlapping, read_frames, read_rows, row_limit
from minclip.porting.verdict import Diagnosis, Finding

TOGETHER = 3  # faults tried together, in every combination
CHAIN = 8  # faults that are added one by one where no combination fits
SEARCHED = 90  # texts that are searched on; the findings are checked on all
LONGEST, LONGEST_WORD = 2000, 200  # characters of a text that faults are tried on, and of its words
SHOWN = 5  # findings that fit equally well
PLACE = {fault.id: i for i, fault in enumerate(CATALOGUE)}


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where a port's ids leave the reference's.

    index      the place of the text among the texts
    text       the text
    part       the words that the differing ids spell, cleaned
    expected   the reference's pieces there
    found      the port's pieces there
    """

    index: int
    text: str
    part: str
    expected: tuple[str, ...]
    found: tuple[str, ...]

    def __str__(self) -> str:
        expected, found = ("|".join(pieces) or "nothing" for pieces in (self.expected, self.found))
        return (
            f"text {self.index}, {shorten(self.text)}: {found!r} in the port, {expected!r} in the reference"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the divergence as plain values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, repr=False)
class TokenDiagnosis(Diagnosis):
    """The result of `diagnose_tokens`: a `Diagnosis` whose error is the share of texts with other ids.

    first      the first text and pieces that diverge, or None
    smallest   the smallest part of a text that no known mistake explains, or None
    """

    first: Divergence | None = None
    smallest: Divergence | None = None

    subject: ClassVar[str] = "ids"

    def to_dict(self) -> dict[str, Any]:
        """Return verdict, error, findings, notes and both divergences as plain values."""
        places = {"first": self.first, "smallest": self.smallest}
        return super().to_dict() | {name: place and place.to_dict() for name, place in places.items()}


def diagnose_tokens(
    texts: str | Iterable[str], ids: Iterable[Sequence[int] | None] | Sequence[int], *, pad: int = 0
) -> TokenDiagnosis:
    """Name the known mistakes that turn OpenAI's ids into those of a port.

    texts   the texts that the port was given; `probe_texts` has those on which every known mistake shows
    ids     the port's ids: a row for each text, as lists, ragged or padded, or as an array. None stands for
            a text that the port refused
    pad     the id that the port is meant to pad with: 0 as in OpenAI's CLIP, or 49407

    Rows without start or end, padded otherwise, or with shifted ids are read too, and the finding says so.
    Returns a `TokenDiagnosis`. Raises ValueError or TypeError where texts or ids cannot be read.

    >>> port = [[49406, 64, 1153, 49407], [49406, 64, 1481, 49407]]
    >>> diagnosis = diagnose_tokens(["a photo", "a cat"], port)
    >>> diagnosis.verdict, diagnosis.findings[0].faults[0].id
    ('known', 'K1')
    """
    texts, rows = read_rows(texts, ids)
    return Search(texts, rows, pad).diagnose()


def without_texts(trace: Mapping[str, Any] | None, tokens: Any) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Return a port's dump without its texts and ids, and a note where these ids are not OpenAI's.

    trace    the dump. It may hold "texts" and "ids", the port's ids of them
    tokens   the ids of the texts where the dump has no "ids"
    """
    if trace is None or "texts" not in trace:
        return trace, []
    texts, ids = np.ravel(trace["texts"]).tolist(), trace.get("ids", tokens)
    rest = {name: array for name, array in trace.items() if name not in ("texts", "ids")} or None
    if len(ids) != len(texts):
        return rest, []  # tokens of other texts
    diagnosis = diagnose_tokens(texts, ids)
    faults = [fault for finding in diagnosis.findings[:1] for fault in finding.faults]
    if diagnosis.verdict == "agrees" or (faults and all(fault.id.startswith("D1-") for fault in faults)):
        return rest, []  # padding changes no features
    why = "; ".join(f"{fault.id}, {fault.summary}" for fault in faults) or "no known mistake explains it"
    return rest, [f"Your ids already differ from OpenAI's: {why}. First difference: {diagnosis.first}."]


class Search:
    """A port's rows, the ways to read them, and the mistakes tried so far."""

    def __init__(self, texts, rows, pad):
        self.texts, self.rows = texts, rows
        self.given = [i for i, row in enumerate(rows) if row is not None]
        if not self.given:
            raise ValueError("the port gave no ids for any text")
        self.memory = Memory()
        present = [rows[i] for i in self.given]
        self.limit = row_limit(present)
        self.frames = read_frames(present[:SEARCHED], pad)
        self.frame = self.frames[0]  # the expected way to make rows
        self.wrong = self.differing((), self.frame, self.given)

    def diagnose(self):
        """Return the `TokenDiagnosis`."""
        if not self.wrong:
            return self.result("agrees", [], self.remarks())
        self.choose()
        if all(is_long(self.texts[i]) for i in self.wrong):
            return self.unknown((), self.wrong)
        found = self.explanations()
        if found:
            return self.known(found)
        chain, left = self.chain()
        return self.unknown(chain, left) if left else self.known([(chain, self.likeliest)])

    # Trying faults.

    def differing(self, faults, frame, indices):
        """Return those texts of indices whose rows differ from the reference's with faults, as a list."""
        port = TokenizerPort((*frame.faults, *faults), self.memory)
        return [i for i in indices if not self.same(port, i)]

    def same(self, port, i):
        """Return whether a port with faults gives the row of text i."""
        return port.row(self.texts[i], len(self.rows[i]), self.limit) == self.rows[i]

    def fits(self, faults, frame):
        """Return whether faults explain all rows that are searched on."""
        port = TokenizerPort((*frame.faults, *faults), self.memory)
        return all(self.same(port, i) for i in self.sample)

    def shows(self, fault, frame):
        """Return whether a fault changes any row that is searched on."""
        with_it = TokenizerPort((*frame.faults, fault), self.memory)
        without = TokenizerPort(frame.faults, self.memory)
        texts = [self.texts[i] for i in self.sample]
        return any(with_it.row(text) != without.row(text) for text in texts)

    def choose(self):
        """Choose the likeliest frame and the texts to search on.

        Short texts that differ come first, since they rule out most faults.
        """
        few = self.given[:SEARCHED]
        self.likeliest = min(self.frames, key=lambda frame: len(self.differing((), frame, few)))
        self.own = self.differing((), self.likeliest, self.given)
        self.tried = [i for i in self.given if not is_long(self.texts[i])]
        own = set(self.own)
        by_length = sorted(self.tried, key=lambda i: len(self.texts[i]))
        differ = [i for i in by_length if i in own][: SEARCHED * 2 // 3]
        agree = [i for i in by_length if i not in own][-SEARCHED // 3 :]
        self.sample = differ + agree

    def explanations(self):
        """Return the smallest sets of faults that explain every row, as pairs of faults and frame."""
        for n in range(TOGETHER + 1):
            frames = self.frames if n < TOGETHER else dict.fromkeys([self.likeliest, self.frame])
            found = [(faults, frame) for frame in frames for faults in self.combinations(frame, n)]
            found = [pair for pair in found if not self.differing(*pair, self.tried)]
            if found:
                fewest = min(len(faults) + len(frame.faults) for faults, frame in found)
                return [(f, frame) for f, frame in found if len(f) + len(frame.faults) == fewest]
        return []

    def combinations(self, frame, n) -> Iterator[tuple[TokenFault, ...]]:
        """Yield the sets of n faults that fit a frame and explain the rows that are searched on."""
        candidates = self.candidates(frame)
        if n == TOGETHER:  # of so many, each must show by itself
            candidates = [fault for fault in candidates if self.shows(fault, frame)]
        for faults in itertools.combinations(candidates, n):
            if not overlapping(faults) and self.fits(faults, frame):
                yield faults

    def candidates(self, frame):
        """Return the faults of a text's own ids, and those of the rows that a frame leaves open."""
        taken = {name for fault in frame.faults for name in fault.change}
        read = {"shift", "side", "pad", "start", "end"}  # what frames are read from
        return [
            fault
            for fault in CATALOGUE
            if not taken & fault.change.keys() and ("wrap" in fault.change or not read & fault.change.keys())
        ]

    def chain(self):
        """Add faults one by one, each the one that explains most rows, in the likeliest frame.

        Returns the faults, and the texts that they leave unexplained.
        """
        frame, chain = self.likeliest, ()
        left = len(self.differing(chain, frame, self.sample))
        while left and len(chain) < CHAIN:
            longer = [(*chain, fault) for fault in self.candidates(frame) if fault not in chain]
            longer = [faults for faults in longer if not overlapping(faults)]
            counts = [len(self.differing(faults, frame, self.sample)) for faults in longer]
            if min(counts, default=left) >= left:
                break
            left = min(counts)
            chain = longer[counts.index(left)]
        return chain, self.differing(chain, frame, self.tried)

    # Wording.

    def result(self, verdict, findings, notes, smallest=None):
        error = len(self.wrong) / len(self.given)
        first = self.first() if self.wrong else None
        notes = [f"First difference: {first}.", *notes] if first else notes
        return TokenDiagnosis(verdict, findings, notes, error, first, smallest)

    def remarks(self):
        """Return what must be said of the rows, whatever the verdict, as a list."""
        notes = []
        missing = len(self.rows) - len(self.given)
        if missing:
            notes.append(f"The port gave no ids for {missing} of {len(self.rows)} texts.")
        lengths = {len(self.rows[i]) for i in self.given}
        if len(lengths) > 1:
            notes.append("The rows are not padded to one length.")
        long = sum(is_long(self.texts[i]) for i in self.wrong)
        if long:
            notes.append(
                f"No mistakes were tried on {long} of the texts that differ: they have more than {LONGEST:,} "
                f"characters, or a word of more than {LONGEST_WORD}."
            )
        return notes

    def known(self, found):
        """Return the verdict with sets of faults that explain every row."""
        sets = sorted({(*frame.faults, *faults) for faults, frame in found}, key=simplicity)
        mistakes = "this mistake" if len(sets[0]) == 1 else "these mistakes"
        evidence = (
            f"{len(self.wrong)} of {len(self.given)} texts have other ids than the reference; "
            f"with {mistakes} put into it, none"
        )
        findings = [Finding(sets[0], 0.0, evidence)]
        findings += [Finding(other, 0.0, self.telling_apart(sets[0], other)) for other in sets[1:SHOWN]]
        notes = self.remarks()
        if len(sets) > SHOWN:
            notes.append(f"{len(sets) - SHOWN} more sets of mistakes explain these texts.")
        if len(sets) > 1:
            notes.append("Run the port on the texts of minclip.probe_texts() to tell them apart.")
        return self.result("known", findings, notes)

    def telling_apart(self, first, other):
        """Return a sentence: a text of the probe that tells two sets of faults apart."""
        a, b = TokenizerPort(first, self.memory), TokenizerPort(other, self.memory)
        ids = " + ".join(fault.id for fault in first)
        for text in probe_texts():
            if a.row(text) != b.row(text):
                return f"the text {shorten(text)} would tell it from {ids}"
        return f"no text of the probe tells it from {ids}"

    def unknown(self, chain, left):
        """Return the verdict where faults leave rows unexplained: what comes nearest, and what is left."""
        faults = (*self.likeliest.faults, *chain)
        notes = self.remarks()
        if faults and len(left) < len(self.wrong):
            explained = f"{len(self.wrong) - len(left)} of the {len(self.wrong)} texts that differ"
            ids = "; ".join(f"{fault.id}, {fault.summary}" for fault in faults)
            notes.append(f"Known mistakes explain {explained}: {ids}.")
        else:
            faults, left = self.frame.faults, self.wrong
        smallest = self.divergence(left, faults)
        notes.append(f"The smallest difference that is left: {smallest.part!r} in {smallest}.")
        return self.result("unknown", [], notes, smallest)

    def first(self):
        """Return the first `Divergence` of a text's own ids, or else of a row."""
        return self.divergence(self.own[:1], self.likeliest.faults) or self.divergence(self.wrong[:1])

    def divergence(self, indices, faults=None):
        """Return the smallest `Divergence` of texts from the reference with faults, or None for no text."""
        port = TokenizerPort(self.frame.faults if faults is None else faults, self.memory)
        found = []
        for i in indices:
            expected = port.row(self.texts[i], limit=self.limit)
            a, b = differing_parts(expected, port.unpadded(self.rows[i]))
            part = tokenizer.decode([[id for id in a if 0 <= id < START_ID]])[0]
            found.append(Divergence(i, self.texts[i], part, tuple(map(piece, a)), tuple(map(piece, b))))
        return min(found, key=lambda d: (not d.part, len(d.part), len(d.found)), default=None)


def is_long(text):
    """Return whether the slowest faults would take too long on a text: they are quadratic in its words."""
    return len(text) > LONGEST or any(len(word) > LONGEST_WORD for word in text.split())


def simplicity(faults):
    """Return a key that puts faults first which change few steps, then those early in the catalogue."""
    return sum(len(fault.change) for fault in faults), [PLACE.get(fault.id, 0) for fault in faults]


def differing_parts(a, b):
    """Return what is left of two rows without their common beginning and end, to whole words of the first."""
    n = min(len(a), len(b))
    head = next((i for i in range(n) if a[i] != b[i]), n)
    tail = next((i for i in range(n - head) if a[-1 - i] != b[-1 - i]), n - head)
    while head and not ends_word(a[head - 1]):
        head -= 1
    while tail and not ends_word(a[len(a) - tail - 1]):
        tail -= 1
    return a[head : len(a) - tail], b[head : len(b) - tail]


def ends_word(id):
    return not 0 <= id < START_ID or piece(id).endswith(tokenizer.WORD_END)


def piece(id):
    """Return the spelling of an id, or its number where the vocabulary does not hold it."""
    pieces = tokenizer.spellings()
    return pieces[id] if 0 <= id < len(pieces) else f"[{id}]"


def shorten(text):
    """Return a text in quotes, on one line, with control characters escaped."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
