"""A corpus of any size: the features of a file's lines, in bounded memory, resumed where they stopped.

A file is read twice. First every line is checked: a line that is too long must be known in the first
minutes, since mending it later would change the input that the finished rows belong to. Then its texts
are tokenized by other processes, a chunk or more ahead of this one, which encodes.

Beside the output features.npy, features.npy.partial holds the rows so far, and features.npy.journal
says of what input, model and options they are (its first line) and how many are safely on the disk
(its last whole line). A row is counted after it has reached the disk, so that being killed, at whatever
moment, costs at most the chunk being made. The output gets its name once every row is there.
"""

import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minclip import tokenizer
from minclip.arrays import as_array
from minclip.arrays import normalize as normalize_rows
from minclip.fast import encode_text
from minclip.params import TEXT_TOWER, architecture

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHUNK = 8192  # texts encoded together: the more, the more beginnings they share
CHUNK_CHARACTERS = 2**22  # and fewer of them where texts are long, to keep memory bounded
LONGEST_LINE = 2**18  # bytes
BLOCK = 2**18  # bytes read at once
TOKENIZERS = max(1, min(4, (os.cpu_count() or 1) - 1))  # processes
LOG_SECONDS = 60
ENDED_EARLY = "a process that tokenizes has ended early: was it killed, or out of memory?"


def encode_file(
    params,
    source,
    output,
    *,
    dtype=None,
    normalize=False,
    truncate=False,
    progress=False,
    encode_chunks=None,
):
    """Write the features of a text file's lines to a .npy, and return it as `numpy.load(mmap_mode="r")` does.

    params         as `encode_text` takes them
    source         path of a UTF-8 file, one text a line, an empty line being a text; or an open binary file.
                   What cannot be read twice, such as a pipe, is first copied to the output's folder
    output         path of the features [texts, E]. It appears only when whole. Stopped half way, the same
                   call goes on from output.partial, and its finished rows are never made again
    dtype          of the features written: "float16", "float32"; by default that of params
    normalize      write rows of length 1
    truncate       cut texts that are too long for the model
    progress       show a bar on a terminal; elsewhere, write one line a minute to standard error
    encode_chunks  turns an iterator of tokens [n, L] into one of features [n, E], in order;
                   `minclip.cluster.encoder` gives one. By default, this process encodes

    Before anything is encoded, raises ValueError with the line's number where one is not UTF-8, or too
    long without truncate. Raises ValueError where output.partial is of another input, model or options,
    OSError where files cannot be read or written, or the disk has no room for the features.
    """
    dtype = np.dtype(dtype or params["text_projection"].dtype)
    if dtype.kind != "f":
        raise ValueError(f"features are float16, float32 or float64, not {dtype}")
    options = {"normalize": normalize, "truncate": truncate}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(readable_twice(source, output))
        before = state(file)
        texts, digest = check_lines(file, len(params["positional_embedding"]), truncate, progress)
        shape = [texts, params["text_projection"].shape[1]]
        job = {"input": digest, "model": fingerprint(params), "dtype": dtype.name, "shape": shape, **options}
        rows = stack.enter_context(contextlib.closing(Rows(output, job)))
        left = itertools.islice(read_texts(file), rows.done, None)
        stream = encode_stream(params, left, **options, encode_chunks=encode_chunks)
        stack.enter_context(contextlib.closing(stream))
        advance = stack.enter_context(report(progress, texts, rows.done, "texts"))
        for features in stream:
            if state(file) != before:
                raise ValueError(f"{name_of(file)} changed while it was being encoded")
            rows.append(as_array(features.astype(dtype, copy=False)))
            advance(len(features))
        rows.finish()
    return np.load(output, mmap_mode="r")


def encode_stream(params, texts, *, normalize=False, truncate=False, encode_chunks=None):
    """The features of any iterable of str, as an iterator of arrays [n, E], in order.

    For a corpus that is no file, or features that go elsewhere than to one. Memory stays bounded: texts
    are taken as they are needed, a few thousand at a time. Arrays are in the dtype and on the device of
    params; the other arguments are those of `encode_file`. A text too long for the model raises
    ValueError when its chunk is reached, unless truncate.

    >>> import minclip
    >>> texts = (f"{n} cats" for n in range(5000))
    >>> sum(len(features) for features in encode_stream(minclip.load(), texts))
    5000
    """
    tokens = tokenize_ahead(in_chunks(texts), len(params["positional_embedding"]), truncate)
    if encode_chunks is None:
        chunks = (encode_text(params, each) for each in tokens)
    else:
        chunks = encode_chunks(tokens)
    for features in chunks:
        yield normalize_rows(features) if normalize else features


class Rows:
    """The rows of a .npy in the making, and the journal that says which of them are done.

    job is what must not change between one run and the next; its "dtype" and "shape" are the array's.
    """

    def __init__(self, output, job):
        self.output, self.partial = Path(output), Path(f"{output}.partial")
        self.journal_path = Path(f"{output}.journal")
        self.job, (self.total, width) = job, job["shape"]
        self.row_bytes = width * np.dtype(job["dtype"]).itemsize
        self.header = npy_header(job)
        self.rows = None
        if not self.journal_path.exists():
            self.check_room(0)
        self.journal = open(self.journal_path, "a+b", buffering=0)
        try:
            self.lock()
            self.done = self.resume()
        except BaseException:
            self.close()
            raise

    def lock(self):
        """Keep a second run of the same command from writing between our rows; the lock ends with us."""
        try:
            if fcntl is not None:
                fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{self.output} is being written by another process") from None

    def resume(self):
        """Open the partial file where its finished rows end, and return how many they are."""
        self.journal.seek(0)
        *lines, torn = self.journal.read().split(b"\n")
        self.journal.truncate(self.journal.tell() - len(torn))
        done = 0
        if lines:
            self.check_same(json.loads(lines[0]))
            done = int(lines[-1]) if len(lines) > 1 else 0
            if done == self.total and self.output.exists() and not self.partial.exists():
                return done  # stopped between the last two steps of finish
        self.rows = open(self.partial, "a+b", buffering=0)
        whole = (self.partial.stat().st_size - len(self.header)) // self.row_bytes
        done = max(0, min(done, whole))
        self.check_room(done)
        self.rows.truncate(len(self.header) + done * self.row_bytes if done else 0)
        if not done:
            self.write(self.rows, self.header)
        if not lines:
            self.write(self.journal, json.dumps(self.job).encode() + b"\n")
        return done

    def check_same(self, begun):
        changed = [name for name in self.job if begun.get(name) != self.job[name]]
        if changed:
            raise ValueError(
                f"{self.partial} was begun with another {', '.join(changed)}: give what it was begun with, "
                f"or delete it and {self.journal_path.name} to start over"
            )

    def check_room(self, done):
        """A disk that is too small is better known now than when it is full."""
        needed = len(self.header) + (self.total - done) * self.row_bytes
        free = shutil.disk_usage(self.output.parent).free
        if needed > free:
            raise OSError(
                f"{self.output} needs {needed / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB free"
            )

    def append(self, features):
        """Add rows [n, E], and count them once they are on the disk."""
        self.write(self.rows, np.ascontiguousarray(features))
        os.fsync(self.rows.fileno())
        self.done += len(features)
        self.write(self.journal, b"%d\n" % self.done)
        os.fsync(self.journal.fileno())

    def write(self, file, data):
        view = memoryview(data).cast("B")
        try:
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            raise OSError(
                f"{file.name}: {error.strerror}; {self.done:,} of {self.total:,} rows are kept, "
                "and the same command goes on from there"
            ) from None

    def finish(self):
        """Give the output its name. Raises ValueError where rows are missing."""
        if self.done != self.total:
            raise ValueError(f"{self.done} of {self.total} rows came")
        if self.rows is not None:
            self.rows.close()
            os.replace(self.partial, self.output)
        self.close()
        self.journal_path.unlink()

    def close(self):
        for file in (self.rows, self.journal):
            if file is not None:
                file.close()


def npy_header(job):
    header = io.BytesIO()
    described = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(job["dtype"])),
        "fortran_order": False,
        "shape": tuple(job["shape"]),
    }
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def fingerprint(params):
    """A SHA-256 of what the features depend on: the architecture and every array of the text tower."""
    digest = hashlib.sha256(repr(architecture(params)).encode())
    for name in sorted(name for name in params if name.startswith(TEXT_TOWER)):
        array = np.ascontiguousarray(as_array(params[name]))
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()


@contextlib.contextmanager
def readable_twice(source, output):
    """source as a binary file that can go back to where it stands: itself, or a copy in output's folder."""
    folder = Path(output).parent
    if not folder.is_dir() or Path(output).is_dir():
        raise OSError(f"{output}: {'is a folder' if Path(output).is_dir() else 'its folder does not exist'}")
    with contextlib.ExitStack() as stack:
        file = source if hasattr(source, "read") else stack.enter_context(open(source, "rb"))
        if not file.seekable():
            copy = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # has no name, so leaves no trace
            shutil.copyfileobj(file, copy)
            copy.seek(0)
            file = copy
        yield file


def state(file):
    """What changes when a file is written to."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def name_of(file):
    """A file's path, for an error."""
    return file.name if isinstance(file.name, str) and file.name != "<stdin>" else "standard input"


def check_lines(file, context, truncate, progress):
    """(count, SHA-256) of the lines ahead in file, each of which can be encoded; file stays where it is."""
    start = place = file.tell()
    count = 0
    with report(progress, state(file)[0] - start, 0, "B") as advance:
        for count, text in enumerate(read_texts(file), 1):
            if not truncate and not surely_fits(text, context):
                ids = len(tokenizer.encode(text)) + 2
                if ids > context:
                    raise ValueError(
                        f"{name_of(file)}, line {count}: {ids} tokens long, start and end included, and the "
                        f"context holds {context}: shorten it or truncate"
                    )
            if count % CHUNK == 0:
                advance(file.tell() - place)
                place = file.tell()
    file.seek(start)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(start)
    return count, digest


def surely_fits(text, context):
    """Whether a text fits the context by its looks alone, as most do: much cheaper than to tokenize it.

    A token takes a letter at least, and cleaning lengthens nothing that is ASCII and has no entity.
    """
    return text.isascii() and "&" not in text and len(text) - text.count(" ") <= context - 2


def read_texts(file):
    """The lines of a binary file as str, without their ends. Raises ValueError for one that is not UTF-8."""
    for number, line in enumerate(read_lines(file), 1):
        try:
            yield line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"{name_of(file)}, line {number}"
            raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from None


def read_lines(file):
    """The lines of a binary file, split at b"\\n". One that is no caption's length raises ValueError."""
    rest, count = b"", 0
    while block := file.read(BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        count += len(lines)
        if len(rest) > LONGEST_LINE:
            raise ValueError(f"{name_of(file)}, line {count + 1}: longer than {LONGEST_LINE:,} bytes")
    if rest:
        yield rest


def in_chunks(texts):
    """Lists of CHUNK texts, or of fewer where they are long, each with the number of its first text."""
    first, chunk, characters = 0, [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == CHUNK or characters > CHUNK_CHARACTERS:
            yield first, chunk
            first, chunk, characters = first + len(chunk), [], 0
    if chunk:
        yield first, chunk


def tokenize_ahead(chunks, context, truncate):
    """The tokens [n, L] of each chunk of texts, in order; other processes make the next ones meanwhile.

    The first chunk is tokenized here, so that a short list of texts starts no process.
    """
    requests = ((first, texts, context, truncate) for first, texts in chunks)
    with contextlib.ExitStack() as stack:
        first = list(itertools.islice(requests, 1))
        working = collections.deque()
        for request in itertools.islice(requests, TOKENIZERS):
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


def tokenized(first, texts, context, truncate):
    """tokenizer.tokenize without the columns that hold only padding, which need not travel."""
    try:
        tokens = tokenizer.tokenize(texts, context, truncate)
        return tokens[:, : 1 + tokens.argmax(axis=-1).max(initial=0)]
    except (TypeError, ValueError) as error:
        raise type(error)(f"from text {first} on: {error}") from None


@contextlib.contextmanager
def tokenizing_process():
    """A process that runs `answer_requests`. multiprocessing would run the caller's script anew as well."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    child = subprocess.Popen(
        [sys.executable, "-c", "from minclip.corpus.files import answer_requests; answer_requests()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        yield child
    except BrokenPipeError:
        raise OSError(ENDED_EARLY) from None
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(BrokenPipeError):  # what was not sent is not wanted any more
                pipe.close()


def answer_requests():
    """Tokenize what is asked on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    answers = sys.stdout.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            try:
                answer = tokenized(*pickle.load(sys.stdin.buffer))
            except (TypeError, ValueError) as error:
                answer = error
            send(answer, answers)


def send(value, pipe):
    pickle.dump(value, pipe)
    pipe.flush()


def receive(pipe):
    """What came through a pipe; an error that came is raised."""
    try:
        value = pickle.load(pipe)
    except (EOFError, pickle.UnpicklingError):
        raise OSError(ENDED_EARLY) from None
    if isinstance(value, Exception):
        raise value
    return value


@contextlib.contextmanager
def report(progress, total, done, unit):
    """A function to tell how many more are done: a bar on a terminal, else a line a minute, or nothing."""
    if not progress:
        yield lambda count: None
    elif sys.stderr.isatty():
        with tqdm(total=total, initial=done, unit=f" {unit}", unit_scale=True) as bar:
            yield bar.update
    else:
        yield Log(total, done, unit).advance


class Log:
    """Says on standard error, once a minute, how far the work is."""

    def __init__(self, total, done, unit):
        self.total, self.done, self.unit = total, done, unit
        self.first, self.start = done, time.monotonic()
        self.said = self.start

    def advance(self, count):
        self.done += count
        now = time.monotonic()
        if now - self.said >= LOG_SECONDS:
            self.said = now
            rate = (self.done - self.first) / (now - self.start)
            left = tqdm.format_interval((self.total - self.done) / rate)
            print(
                f"{self.done:,} of {self.total:,} {self.unit}, {rate:,.0f} {self.unit}/s, {left} left",
                file=sys.stderr,
                flush=True,
            )
