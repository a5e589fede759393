"""How well diagnose_tokens names mistakes, and what it says of tokenizers that others wrote: a table.

    python -m tests.benchmarks.tokenizers --install FOLDER    once: the packages of others, 300 MB
    python -m tests.benchmarks.tokenizers --packages FOLDER   prints the table; tests/benchmarks/tokenizers.md

Without --packages only those tokenizers run that are importable here.
"""

import argparse
import itertools
import os
import random
import tempfile
import time
from pathlib import Path

import minclip
from minclip import tokenizer
from minclip.porting.tokens.diagnosis import diagnose_tokens
from minclip.porting.tokens.faults import CATALOGUE
from minclip.porting.tokens.port import Memory, TokenizerPort
from minclip.porting.tokens.rows import overlapping
from tests.foreign import tokenizer_ports
from tests.unit.test_tokenizer import hostile

TEXTS = minclip.probe_texts()
PAIRS, TRIPLES, CORRECT, HOSTILE = 500, 100, 100_000, 4000


def hostile_texts(count, seed):
    """Return hostile strings that any tokenizer can be given: without lone surrogates."""
    draw = random.Random(seed)
    drawn = (hostile(draw).encode("utf-8", "ignore").decode("utf-8") for _ in itertools.count())
    return list(itertools.islice(drawn, count))


def named_first(sets, memory):
    """Return how many sets of faults are named first, how many give the same ids, and the slowest time."""
    right, equivalent, slowest = 0, 0, 0.0
    for faults in sets:
        port = TokenizerPort(faults, memory)
        rows = [port.row(text, 77) for text in TEXTS]
        start = time.perf_counter()
        diagnosis = diagnose_tokens(TEXTS, rows)
        slowest = max(slowest, time.perf_counter() - start)
        first = diagnosis.findings[0].faults if diagnosis.findings else ()
        if {fault.id for fault in first} == {fault.id for fault in faults}:
            right += 1
        else:
            equivalent += bool(first) and same_ids(first, faults)
    return right, equivalent, slowest


def same_ids(first, faults):
    """Return whether two sets of faults give the same ids for 1,500 hostile strings."""
    texts = hostile_texts(1500, seed=3)
    a, b = TokenizerPort(first), TokenizerPort(faults)
    return all(a.row(text) == b.row(text) for text in texts)


def sets_of(n, count):
    """Return sets of n faults that can act together, chosen at random."""
    sets = [faults for faults in itertools.combinations(CATALOGUE, n) if not overlapping(faults)]
    return random.Random(n).sample(sets, min(count, len(sets)))


def bars():
    """Print how many mistakes are named first, and how many alarms are false."""
    print(f"On the {len(TEXTS)} texts of the probe, with {len(CATALOGUE)} mistakes in the catalogue:\n")
    print("| mistakes | tried | named first | the first finding gives the same ids | slowest, s |")
    print("|---|---|---|---|---|")
    memory = Memory()
    for n, count in ((1, len(CATALOGUE)), (2, PAIRS), (3, TRIPLES)):
        sets = sets_of(n, count)
        right, equivalent, slowest = named_first(sets, memory)
        shares = f"{right / len(sets):.1%} | {(right + equivalent) / len(sets):.1%}"
        print(f"| {n} | {len(sets)} | {shares} | {slowest:.1f} |", flush=True)

    texts = hostile_texts(CORRECT, seed=4)
    alarms = diagnose_tokens(texts, minclip.tokenize(texts, truncate=True)).error * len(texts)
    print(f"\nFalse alarms on {CORRECT:,} hostile strings with correct ids: {alarms:.0f}.")
    for title, (given, rows) in {
        "a unigram tokenizer like T5's": (TEXTS, like_t5()),
        "one text with one difference": ("A photo of a cat", [49406, 288, 1125, 539, 320, 2368, 49407]),
        "one text with an unknown difference": ("a photo of a cat", [49406, 320, 5, 539, 320, 2368, 49407]),
    }.items():
        start = time.perf_counter()
        verdict = diagnose_tokens(given, rows).verdict
        print(f"{title[0].upper()}{title[1:]}: {verdict!r} in {time.perf_counter() - start:.2f} s.")


def like_t5():
    """Return ids of the probe's texts by a unigram model with T5's special ids, trained on CLIP's words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=8000, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    words = [word.removesuffix("</w>") for word in tokenizer.spellings() if word.isascii()]
    unigram.train_from_iterator([*TEXTS, *words], trainer)
    return [[*unigram.encode(text).ids, 1] for text in TEXTS]


def table():
    """Print what is found in each tokenizer of others."""
    print(f"\nHostile strings: {HOSTILE:,}, made to break tokenizers; they say nothing of everyday text.\n")
    print("| tokenizer | hostile strings right | probe's texts right | mistakes named | of the probe |")
    print("|---|---|---|---|---|")
    texts = hostile_texts(HOSTILE, seed=5)
    expected = [TokenizerPort().row(text) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder)
        tokenizer_ports.write_vocabulary(vocabulary)
        for name, port in tokenizer_ports.PORTS.items():
            if reason := tokenizer_ports.why_not(name):
                print(f"| {port.title} | not run: {reason} | | | |")
                continue
            diagnosis = diagnose_tokens(TEXTS, tokenizer_ports.ids_of(name, TEXTS, vocabulary))
            rows = tokenizer_ports.ids_of(name, texts, vocabulary)
            print(f"| {port.title} | {share(rows, expected):.1%} | {in_words(diagnosis)} |", flush=True)


def share(rows, expected):
    """Return the share of rows with the expected ids, padding and the lack of start and end aside."""
    bare = [row and TokenizerPort().unpadded(row) for row in rows]
    return sum(row in (ids, ids[1:-1]) for row, ids in zip(bare, expected, strict=True)) / len(rows)


def in_words(diagnosis):
    """Return a diagnosis as the last three cells of a row."""
    if diagnosis.verdict == "agrees":
        return f"{1 - diagnosis.error:.0%} | none | agrees"
    faults = diagnosis.findings[0].faults if diagnosis.findings else ()
    names = "; ".join(f"{fault.id} {fault.summary}" for fault in faults).replace("|", r"\|")
    return f"{1 - diagnosis.error:.0%} | {names} | {diagnosis.verdict}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", type=Path, metavar="FOLDER")
    parser.add_argument("--packages", metavar="FOLDER")
    args = parser.parse_args()
    if args.install:
        tokenizer_ports.install(args.install.resolve())
        return
    if args.packages:
        os.environ[tokenizer_ports.INSTALLED] = args.packages
    bars()
    table()


if __name__ == "__main__":
    main()
