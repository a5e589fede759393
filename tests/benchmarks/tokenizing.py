"""Time minclip.tokenize against OpenAI's own tokenizer on 100,000 captions, and what importing minclip adds.

    python -m tests.benchmarks.tokenizing

Captions are made of the vocabulary's own words, every tenth with an accent or a curly quote.
"""

import random
import statistics
import subprocess
import sys
import time

from minclip import tokenizer
from tests.support.oracles import openai


def captions(count=100_000, seed=0):
    words = [
        w[:-4] for w in tokenizer.spellings() if w.endswith("</w>") and w[:-4].isascii() and w[:-4].isalpha()
    ]
    draw = random.Random(seed)
    common = draw.sample(words, 8000)
    return [
        " ".join(["a photo of", *draw.choices(common, k=7), "’s café" if i % 10 == 0 else "."])
        for i in range(count)
    ]


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def main():
    texts = captions()
    reference = openai("simple_tokenizer").SimpleTokenizer()
    assert [tokenizer.encode(text) for text in texts[:2000]] == [
        reference.encode(text) for text in texts[:2000]
    ]
    ratios = []
    for _ in range(3):
        tokenizer.remembered_ids.cache_clear()
        reference.cache = dict(list(reference.cache.items())[:2])
        ours = seconds(tokenizer.tokenize, texts)
        theirs = seconds(lambda: [reference.encode(text) for text in texts])
        ratios.append(theirs / ours)
    faster = statistics.median(ratios)
    print(f"{len(texts):,} captions: minclip {faster:.1f} times as fast as OpenAI's tokenizer")

    def importing(what):
        return seconds(subprocess.run, [sys.executable, "-c", f"import {what}"])

    added = [importing("numpy, minclip") - importing("numpy") for _ in range(7)]
    print(f"import minclip adds {statistics.median(added):.2f} s to import numpy")


if __name__ == "__main__":
    main()
