"""Processes that tokenize the next chunks of texts while this process encodes."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from minclip import tokenizer
from minclip.params import Tokens

PROCESSES = max(1, min(4, (os.cpu_count() or 1) - 1))
CHUNK_CHARACTERS = 2**22  # a chunk of long texts ends here, to keep memory bounded
ENDED_EARLY = "a process that tokenizes ended early: was it killed, or out of memory?"


def in_chunks(texts: Iterable[str], size: int) -> Iterator[tuple[int, list[str]]]:
    """Yield lists of `size` texts, or of fewer where texts are long, each with its first text's number."""
    first, chunk, characters = 0, [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == size or characters > CHUNK_CHARACTERS:
            yield first, chunk
            first, chunk, characters = first + len(chunk), [], 0
    if chunk:
        yield first, chunk


def tokenize_ahead(
    chunks: Iterable[tuple[int, list[str]]], context: int, truncate: bool, pad: int = 0
) -> Iterator[Tokens]:
    """Yield the tokens [n, L] of each chunk of texts, in order; other processes make the next ones meanwhile.

    This process tokenizes the first chunk itself, so a short list of texts starts no other process.
    Raises ValueError where a text is too long and truncate is False, OSError where a process dies.
    """
    requests = ((first, texts, context, truncate, pad) for first, texts in chunks)
    with contextlib.ExitStack() as stack:
        first = list(itertools.islice(requests, 1))
        working: collections.deque[subprocess.Popen[bytes]] = collections.deque()
        for request in itertools.islice(requests, PROCESSES):
            working.append(stack.enter_context(tokenizing_process()))
            send(request, working[-1].stdin)
        yield from itertools.starmap(tokenized, first)
        while working:
            child = working.popleft()
            tokens = receive(child.stdout)
            for request in itertools.islice(requests, 1):
                send(request, child.stdin)
                working.append(child)
            yield tokens


def tokenized(first, texts, context, truncate, pad):
    """Return tokenizer.tokenize without the columns that hold only padding: less to send."""
    try:
        tokens = tokenizer.tokenize(texts, context, truncate, pad)
        return tokens[:, : 1 + tokens.argmax(axis=-1).max(initial=0)]
    except (TypeError, ValueError) as error:
        raise type(error)(f"from text {first} on: {error}") from None


@contextlib.contextmanager
def tokenizing_process():
    """Start a process that runs `answer_requests`, and end it in any case."""
    # multiprocessing would run the caller's script in that process too. In a session of its own, Ctrl-C does
    # not reach the process: this one ends it.
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    child = subprocess.Popen(
        [sys.executable, "-c", "from minclip.corpus.workers import answer_requests; answer_requests()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )
    try:
        yield child
    except BrokenPipeError:
        raise OSError(ENDED_EARLY) from None
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(BrokenPipeError):  # nobody needs the unsent requests now
                pipe.close()


def answer_requests() -> None:
    """Tokenize the requests on standard input until it ends, and write the answers to standard output."""
    answers = sys.stdout.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            try:
                answer = tokenized(*pickle.load(sys.stdin.buffer))
            except (TypeError, ValueError) as error:
                answer = error
            send(answer, answers)


def send(value, pipe):
    """Write a value to a pipe."""
    pickle.dump(value, pipe)
    pipe.flush()


def receive(pipe):
    """Return the next value of a pipe; raise it where it is an error."""
    try:
        value = pickle.load(pipe)
    except (EOFError, pickle.UnpicklingError):
        raise OSError(ENDED_EARLY) from None
    if isinstance(value, Exception):
        raise value
    return value
