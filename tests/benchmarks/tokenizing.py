"""Time minclip.tokenize beside other tokenizers on 100,000 captions, in one run on one core.

    python -m tests.benchmarks.tokenizing

Captions are made of 8,000 of the vocabulary's own words, so that words repeat. In the second table every
tenth caption has an accent and a curly quote. These go through ftfy, which the other tokenizers lack, all but
OpenAI's. Times are CPU times, so that other programs disturb them little.
"""

import functools
import html
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ftfy

from minclip import tokenizer
from tests.foreign import tokenizer_ports
from tests.support.oracles import openai

RUNS = 3


def captions(count=100_000, seed=0, plain=False):
    """Return captions of ten words and marks, in ASCII alone if plain."""
    words = [
        w[:-4] for w in tokenizer.spellings() if w.endswith("</w>") and w[:-4].isascii() and w[:-4].isalpha()
    ]
    draw = random.Random(seed)
    common = draw.sample(words, 8000)
    return [
        " ".join(["a photo of", *draw.choices(common, k=7), "." if plain or i % 10 else "’s café"])
        for i in range(count)
    ]


def seconds(function, *args, clock=time.perf_counter):
    start = clock()
    function(*args)
    return clock() - start


def before(texts):
    """Tokenize as minclip did before it looked up whole runs: the pattern splits every text into words."""
    remembered = functools.lru_cache(maxsize=2**16)(tokenizer.word_ids)
    ids = []
    for text in texts:
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = tokenizer.SPACES.sub(" ", text.strip()).strip().lower()
        ids.append([id for word in tokenizer.PIECES.findall(text) for id in remembered(word)])
    return ids


def now(texts):
    tokenizer.remembered_ids.cache_clear()
    return [tokenizer.encode(text) for text in texts]


def rivals(folder):
    """Return the tokenizers to time: a dict of functions of a list of texts."""
    reference = openai("simple_tokenizer").SimpleTokenizer()
    found = {
        "minclip": now,
        "minclip before it looked up whole runs of characters": before,
        "OpenAI's SimpleTokenizer": lambda texts: [reference.encode(text) for text in texts],
    }
    for name in ("transformers_fast", "instant_clip"):
        try:
            found[tokenizer_ports.PORTS[name].title] = batch_of(name, folder)
        except ImportError as error:
            print(f"{tokenizer_ports.PORTS[name].title}: not timed, {error}")
    return found


def batch_of(name, folder):
    """Return a tokenizer of others as a function of many texts, called in its own quickest way."""
    tokenizer_ports.write_vocabulary(folder)
    if name == "instant_clip":
        from instant_clip_tokenizer import Tokenizer

        return Tokenizer().tokenize_batch
    from transformers import CLIPTokenizer

    fast = CLIPTokenizer.from_pretrained(str(folder / "pretrained"))
    return lambda texts: fast(texts, truncation=True, max_length=77, padding="max_length")["input_ids"]


def table(title, texts, functions):
    """Print the rate of each tokenizer on texts, and minclip's rate as a multiple of it."""
    ours, others = functions["minclip"], {name: f for name, f in functions.items() if name != "minclip"}
    assert ours(texts[:1000]) == others["OpenAI's SimpleTokenizer"](texts[:1000])
    print(f"\n{len(texts):,} {title}, one core, the median of {RUNS} pairs of runs\n")
    print("| tokenizer | texts/s | minclip's rate / its rate |")
    print("|---|---|---|")
    for name, function in others.items():
        pairs = [[seconds(f, texts, clock=time.process_time) for f in (ours, function)] for _ in range(RUNS)]
        rate = len(texts) / statistics.median(theirs for _, theirs in pairs)
        print(f"| {name} | {rate:,.0f} | {statistics.median(b / a for a, b in pairs):.2f} |", flush=True)
    print(f"| minclip | {len(texts) / statistics.median(a for a, _ in pairs):,.0f} | 1 |")


def main():
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        functions = rivals(Path(folder))
    table("plain captions", captions(plain=True), functions)
    table("captions of which every tenth goes through ftfy", captions(), functions)

    def importing(what):
        return seconds(subprocess.run, [sys.executable, "-c", f"import {what}"])

    added = [importing("numpy, minclip") - importing("numpy") for _ in range(7)]
    print(f"\nimport minclip adds {statistics.median(added):.2f} s to import numpy")


if __name__ == "__main__":
    main()
