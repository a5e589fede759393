"""A corpus from file to features: nothing wrong, nothing lost, nothing unbounded."""

import errno
import os
import pty
import random
import re
import signal
import subprocess
import sys
import termios
import textwrap
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minclip
from minclip import checkpoint, corpus
from tests.support.oracles import random_params

SHIPPED_CHUNK = corpus.CHUNK  # most tests make it smaller
TEXTS = [f"a photo of {n} cats" if n % 5 else "" for n in range(50)]


@pytest.fixture(scope="module")
def params():
    return checkpoint.from_state_dict(
        random_params(width=64, layers=1, embed=16), activation="quick_gelu", heads=1
    )


@pytest.fixture(scope="module")
def model(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    minclip.save(params, path)
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 8)


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("".join(text + "\n" for text in TEXTS))
    return path


@pytest.fixture
def output(tmp_path):
    return tmp_path / "features.npy"


def expected(params, texts):
    return minclip.encode_text(params, minclip.tokenize(texts, truncate=True))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def finished(output):
    """How many rows the journal counts."""
    path = Path(f"{output}.journal")
    counts = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return int(counts[-1]) if counts else 0


def count_encoded(monkeypatch):
    """A list that gets the number of texts of each call of encode_text."""
    counts, encode_text = [], corpus.encode_text
    monkeypatch.setattr(
        corpus,
        "encode_text",
        lambda params, tokens: counts.append(len(tokens)) or encode_text(params, tokens),
    )
    return counts


def start(*args, chunk=8, before="", **options):
    """The command line in a process of its own, with small chunks."""
    script = f"import sys\nfrom minclip import cli, corpus\ncorpus.CHUNK = {chunk}\n"
    script += f"{textwrap.dedent(before)}\nsys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-W", "error", "-c", script, "encode", *map(str, args)]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


def ended(process, **options):
    out, err = process.communicate(timeout=300, **options)
    return process.returncode, out.decode(), err.decode()


# What is read and what is written


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_every_line_is_a_text_and_every_text_a_row(params, tmp_path, output, ending, last):
    texts = ["", "naïve café", "", "\ta cat\r", " ", *TEXTS, "end"]
    path = tmp_path / "captions.txt"
    path.write_bytes((ending.join(texts) + ending * last).encode())
    features = corpus.encode_file(params, path, output)
    np.testing.assert_allclose(features, expected(params, texts), atol=1e-5)
    assert isinstance(np.load(output, mmap_mode="r"), np.memmap)
    assert files(tmp_path) == ["captions.txt", "features.npy"]


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
@pytest.mark.parametrize("normalize", [False, True])
def test_dtype_and_normalize(params, captions, output, dtype, normalize):
    features = corpus.encode_file(params, captions, output, dtype=dtype, normalize=normalize)
    assert features.dtype == (dtype or "float32")
    truth = expected(params, TEXTS)
    truth = minclip.normalize(truth) if normalize else truth
    np.testing.assert_allclose(features, truth, atol=2e-3 if dtype == "float16" else 1e-5)


def test_a_file_without_lines_has_no_features(params, tmp_path, output):
    (tmp_path / "empty.txt").touch()
    assert corpus.encode_file(params, tmp_path / "empty.txt", output).shape == (0, 16)
    assert np.load(output, mmap_mode="r").shape == (0, 16)


def test_a_pipe_is_read_whole_and_leaves_no_copy(model, params, tmp_path, output):
    process = start("--file", "-", "-o", output, "--model", model, stdin=subprocess.PIPE)
    status, out, err = ended(process, input="\n".join(TEXTS).encode())
    assert (status, err) == (0, "")
    assert "50 texts, [50, 16] float32" in out
    np.testing.assert_allclose(np.load(output), expected(params, TEXTS), atol=1e-5)
    assert files(tmp_path) == ["features.npy"]


def test_an_open_file_is_read_from_where_it_stands(params, output):
    with open(os.memfd_create("captions"), "w+b") as file:
        file.write(b"heading\na cat\na dog\n")
        file.seek(8)
        features = corpus.encode_file(params, file, output)
    np.testing.assert_allclose(features, expected(params, ["a cat", "a dog"]), atol=1e-5)


def test_a_stream_of_texts_is_taken_as_it_is_needed(params):
    taken = []
    stream = corpus.encode_stream(params, (taken.append(n) or TEXTS[n % 50] for n in range(10**9)))
    rows = np.concatenate([next(stream) for _ in range(7)])
    stream.close()
    np.testing.assert_allclose(rows[:50], expected(params, TEXTS), atol=1e-5)
    assert len(taken) <= (7 + 2 * corpus.TOKENIZERS) * 8
    assert list(corpus.encode_stream(params, [])) == []


# Mistakes in the input


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"word " * 76, "78 tokens long, start and end included, and the context holds 77"),
        ("é̂".encode() * 70, "tokens long"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
        (b"x" * 2**19, "longer than"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_encoded(params, tmp_path, output, monkeypatch, line, says):
    path = tmp_path / "captions.txt"
    path.write_bytes(b"a cat\n" * 36 + line + b"\na dog\n")
    counts = count_encoded(monkeypatch)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 37: .*{re.escape(says)}"):
        corpus.encode_file(params, path, output)
    assert counts == []
    assert files(tmp_path) == ["captions.txt"]


def test_truncate_cuts_what_is_too_long(params, tmp_path, output):
    path = tmp_path / "captions.txt"
    path.write_text("word " * 500 + "\na cat\n")
    features = corpus.encode_file(params, path, output, truncate=True)
    np.testing.assert_allclose(features, expected(params, ["word " * 500, "a cat"]), atol=1e-5)


@given(st.text(alphabet=st.characters(max_codepoint=0x17F) | st.sampled_from("&;<|>lt "), max_size=40))
def test_a_text_that_surely_fits_does_fit(text):
    for context in (8, 16, 30):
        if corpus.surely_fits(text, context):
            minclip.tokenize(text, context_length=context)


def test_a_stream_says_which_text_is_too_long(params):
    texts = [*TEXTS, "word " * 99]
    with pytest.raises(ValueError, match="from text 48 on: text 2 is 101 tokens long"):
        list(corpus.encode_stream(params, texts))


def test_a_file_that_changes_meanwhile_is_noticed(params, captions, output):
    def encode_chunks(chunks):
        for tokens in chunks:
            captions.write_text("other\n" * 50)
            yield corpus.encode_text(params, tokens)

    with pytest.raises(ValueError, match="changed while it was being encoded"):
        corpus.encode_file(params, captions, output, encode_chunks=encode_chunks)
    assert finished(output) == 0


# Stopped and resumed

# Kills its process in the middle of a write, or before a step that keeps what was written.
KILLER = """
import os, pathlib, signal
kind, number = {kind!r}, {number}
seen = 0
def dies_before(step, name, after=False):
    def watched(*args, **options):
        global seen
        seen += name == kind
        if name == kind and seen == number:
            if name == "write":
                args[1].write(memoryview(args[2]).cast("B")[: memoryview(args[2]).nbytes // 2])
            if name == "renamed":
                step(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **options)
    return watched
corpus.Rows.write = dies_before(corpus.Rows.write, "write")
os.fsync = dies_before(os.fsync, "fsync")
os.replace = dies_before(os.replace, {kind!r})
"""


@pytest.mark.parametrize(
    ("kind", "number", "kept"),
    [
        ("write", 1, 0),  # the header of the array
        ("write", 2, 0),  # the first line of the journal
        ("write", 3, 0),  # the first rows
        ("write", 7, 16),  # the third chunk's rows
        ("write", 8, 16),  # the count that makes them three
        ("fsync", 5, 16),  # the third chunk's rows, not yet safe
        ("fsync", 6, 24),
        ("rename", 1, 50),  # all rows are there, the name is not
        ("renamed", 1, 50),  # the name is there, the journal too
    ],
)
def test_killed_at_any_step_it_goes_on(
    params, model, captions, output, tmp_path, monkeypatch, kind, number, kept
):
    killer = KILLER.format(kind=kind, number=number)
    process = start("--file", captions, "-o", output, "--model", model, before=killer)
    assert ended(process)[0] == -signal.SIGKILL
    assert output.exists() == (kind == "renamed")
    assert finished(output) == kept
    counts = count_encoded(monkeypatch)
    features = corpus.encode_file(minclip.load(model), captions, output)
    assert sum(counts) == 50 - kept
    np.testing.assert_allclose(features, expected(params, TEXTS), atol=1e-5)
    assert files(tmp_path) == ["captions.txt", "features.npy"]


@pytest.mark.deep
def test_killed_at_twenty_random_moments_it_loses_nothing(params, model, tmp_path, monkeypatch):
    """From a fresh start each time, anywhere between the start of the process and its end."""
    draw = random.Random(time.time_ns())
    texts = [f"{n} {'very ' * (n % 30)}small cats" for n in range(40_000)]
    path, whole = tmp_path / "captions.txt", tmp_path / "whole.npy"
    path.write_text("\n".join(texts))
    args = ("--file", path, "--model", model)
    began = time.monotonic()
    assert ended(start(*args, "-o", whole, chunk=512))[0] == 0
    duration, moments = time.monotonic() - began, []
    while len(moments) < 20:
        output = tmp_path / f"{len(moments)}.npy"
        process = start(*args, "-o", output, chunk=512)
        time.sleep(draw.uniform(0, duration))
        process.kill()
        ended(process)
        kept = finished(output)
        if not output.exists():  # else it was done before
            moments.append(kept)
            assert kept % 512 == 0
            with monkeypatch.context() as patch:
                patch.setattr(corpus, "CHUNK", 512)
                counts = count_encoded(patch)
                features = corpus.encode_file(minclip.load(model), path, output)
            assert sum(counts) == len(texts) - kept
            np.testing.assert_allclose(features, np.load(whole), atol=1e-5)
        output.unlink()
    assert files(tmp_path) == ["captions.txt", "whole.npy"]
    print(f"\nkilled with these rows done, of {len(texts)}: {sorted(moments)}")
    assert len(set(moments)) > 5


def stop_after(params, captions, output, count, **options):
    """Encode, and fail after count chunks."""

    def encode_chunks(chunks):
        for number, tokens in enumerate(chunks):
            if number == count:
                raise KeyboardInterrupt
            yield corpus.encode_text(params, tokens)

    with pytest.raises(KeyboardInterrupt):
        corpus.encode_file(params, captions, output, encode_chunks=encode_chunks, **options)


def test_a_changed_input_model_or_option_is_refused(params, captions, output, tmp_path):
    stop_after(params, captions, output, 3)
    before = Path(f"{output}.partial").read_bytes()
    other = checkpoint.Params(
        {**params, "ln_final.bias": params["ln_final.bias"] + 1}, activation="gelu", heads=1
    )
    for options, what in [
        (dict(normalize=True), "normalize"),
        (dict(truncate=True), "truncate"),
        (dict(dtype="float16"), "dtype"),
        (dict(params=other), "model"),
        (dict(params=checkpoint.Params(params, activation="gelu", heads=1)), "model"),
        (dict(params={**params, "ln_final.bias": params["ln_final.bias"] + 1}), "model"),
    ]:
        with pytest.raises(ValueError, match=f"begun with another {what}: .* to start over"):
            corpus.encode_file(options.pop("params", params), captions, output, **options)
    captions.write_text(captions.read_text().replace("1 cats", "2 cats"))
    with pytest.raises(ValueError, match=r"begun with another input: .* to start over"):
        corpus.encode_file(params, captions, output)
    assert Path(f"{output}.partial").read_bytes() == before
    assert files(tmp_path) == ["captions.txt", "features.npy.journal", "features.npy.partial"]


def test_a_pipe_is_resumed_by_the_same_text(model, params, output):
    args = ("--file", "-", "-o", output, "--model", model)
    killer = KILLER.format(kind="fsync", number=6)
    text = "\n".join(TEXTS).encode()
    assert ended(start(*args, before=killer, stdin=subprocess.PIPE), input=text)[0] == -signal.SIGKILL
    status, _, err = ended(start(*args, stdin=subprocess.PIPE), input=text + b"\nmore")
    assert status == 1
    assert "another input, shape: give what it was begun with" in err
    assert finished(output) == 24
    assert ended(start(*args, stdin=subprocess.PIPE), input=text)[0] == 0
    np.testing.assert_allclose(np.load(output), expected(params, TEXTS), atol=1e-5)


def test_rows_that_the_disk_lost_are_made_again(params, captions, output):
    stop_after(params, captions, output, 4)
    partial = Path(f"{output}.partial")
    os.truncate(partial, partial.stat().st_size - 100)
    features = corpus.encode_file(params, captions, output)
    np.testing.assert_allclose(features, expected(params, TEXTS), atol=1e-5)


def test_an_output_that_is_there_stays_until_the_new_one_is_whole(params, captions, output):
    output.write_bytes(b"old")
    stop_after(params, captions, output, 4)
    assert output.read_bytes() == b"old"
    assert corpus.encode_file(params, captions, output).shape == (50, 16)


def test_two_at_once_do_not_mix(params, captions, output):
    def encode_chunks(chunks):
        with pytest.raises(OSError, match="being written by another process"):
            corpus.encode_file(params, captions, output)
        for tokens in chunks:
            yield corpus.encode_text(params, tokens)

    features = corpus.encode_file(params, captions, output, encode_chunks=encode_chunks)
    np.testing.assert_allclose(features, expected(params, TEXTS), atol=1e-5)


# The disk


def test_a_full_disk_costs_only_time(params, model, captions, output, tmp_path):
    args = ("--file", captions, "-o", output, "--model", model)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))"
    status, out, err = ended(start(*args, before=limit))
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        f"minclip: {output}.partial: {os.strerror(errno.EFBIG)}; 24 of 50 rows are kept, "
        "and the same command goes on from there"
    ]
    assert not output.exists()
    assert ended(start(*args))[0] == 0
    np.testing.assert_allclose(np.load(output), expected(params, TEXTS), atol=1e-5)
    assert files(tmp_path) == ["captions.txt", "features.npy"]


def test_a_disk_without_room_is_known_at_once(params, captions, output, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(OSError, match=r"features.npy needs 0.00 GB more, its disk has 0.00 GB free"):
        corpus.encode_file(params, captions, output)
    assert files(tmp_path) == ["captions.txt"]


@pytest.mark.parametrize("where", ["missing/features.npy", ""])
def test_an_output_that_cannot_be_is_known_before_the_input_is_read(params, captions, tmp_path, where):
    with pytest.raises(OSError, match="folder"):
        corpus.encode_file(params, captions, tmp_path / where)
    assert files(tmp_path) == ["captions.txt"]


# Memory and processes


@pytest.mark.parametrize("kind", ["short", "long"])
def test_memory_stays_below_the_model_and_500_MB(model, tmp_path, output, kind):
    path = tmp_path / "captions.txt"
    line = {"short": "a photo of {} cats\n", "long": "{} words " * 20_000 + "\n"}[kind]
    path.write_text("".join(line.replace("{}", str(n)) for n in range({"short": 20_000, "long": 60}[kind])))
    peak = """
    import atexit, pathlib, re, resource
    def peak():
        # VmHWM begins with the program; ru_maxrss would begin with what the tests, torch and all, hold.
        ours = int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
        theirs = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest
        print((ours + corpus.TOKENIZERS * theirs) * 1024)
    atexit.register(peak)
    """
    args = ("--file", path, "-o", output, "--model", model, "--truncate")
    status, out, err = ended(start(*args, before=peak, chunk=SHIPPED_CHUNK))
    assert (status, err) == (0, "")
    assert int(out.splitlines()[-1]) < os.path.getsize(model) + 500e6


def test_a_tokenizing_process_that_dies_is_named_and_none_is_left_behind(params, monkeypatch):
    children = []
    popen = subprocess.Popen

    def remember(*args, **options):
        children.append(popen(*args, **options))
        return children[-1]

    monkeypatch.setattr(corpus.subprocess, "Popen", remember)
    stream = corpus.encode_stream(params, TEXTS * 20)
    next(stream)
    children[0].kill()
    with pytest.raises(OSError, match="a process that tokenizes has ended early"):
        list(stream)
    assert all(child.poll() is not None for child in children)


# Progress


def test_a_log_gets_a_line_now_and_then(params, captions, output, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "LOG_SECONDS", 0)
    stop_after(params, captions, output, 3)
    corpus.encode_file(params, captions, output, progress=True)
    lines = capsys.readouterr().err.splitlines()
    said = [re.fullmatch(r"(\d+) of 50 texts, [\d,]+ texts/s, 00:\d\d left", line) for line in lines]
    assert [int(line.group(1)) for line in said if line] == [32, 40, 48, 50]


def test_a_terminal_gets_a_bar_with_rate_and_time_left(model, captions, output):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = start("--file", captions, "-o", output, "--model", model, stderr=theirs)
    process.communicate(timeout=100)
    os.close(theirs)
    shown = os.read(ours, 2**16).decode()
    os.close(ours)
    assert process.returncode == 0
    assert re.search(r"100%.*50.*/50.* \[\d\d:\d\d<\d\d:\d\d, .*texts/s\]", shown)
