"""A corpus of fifty texts, the command line in a process of its own, and what lies on the disk after it."""

import functools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import minclip
from minclip import corpus
from minclip.corpus import encoding

TEXTS = [f"a photo of {n} cats" if n % 5 else "" for n in range(50)]
encode_file = functools.partial(corpus.encode_file, chunk=8)
encode_stream = functools.partial(corpus.encode_stream, chunk=8)


def expected(params, texts):
    """The features of texts by the reference."""
    return minclip.encode_text(params, minclip.tokenize(texts, truncate=True))


def files(folder):
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def finished(output):
    """How many rows the journal counts."""
    path = Path(f"{output}.journal")
    counts = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return int(counts[-1]) if counts else 0


def count_encoded(monkeypatch):
    """A list to which each call of encode_text adds its number of texts."""
    counts, encode_text = [], encoding.encode_text
    monkeypatch.setattr(
        encoding,
        "encode_text",
        lambda params, tokens: counts.append(len(tokens)) or encode_text(params, tokens),
    )
    return counts


def start(*args, chunk=8, before="", **options):
    """Start `minclip encode` in a process of its own, with small chunks."""
    script = "import functools, sys\nfrom minclip import cli, corpus\n"
    script += f"corpus.encode_file = functools.partial(corpus.encode_file, chunk={chunk})\n"
    script += f"{textwrap.dedent(before)}\nsys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-W", "error", "-c", script, "encode", *map(str, args)]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


def ended(process, **options):
    """The status, output and errors of a process once it ends."""
    out, err = process.communicate(timeout=300, **options)
    return process.returncode, out.decode(), err.decode()


def stop_after(params, captions, output, count, **options):
    """Encode a file, interrupted after `count` chunks."""

    def encode_chunks(chunks):
        for number, tokens in enumerate(chunks):
            if number == count:
                raise KeyboardInterrupt
            yield minclip.fast.encode_text(params, tokens)

    with pytest.raises(KeyboardInterrupt):
        encode_file(params, captions, output, encode_chunks=encode_chunks, **options)
