"""A corpus from file to features: each text's own features, mistakes reported, bounded memory."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minclip
from minclip.corpus import encoding, workers
from minclip.corpus.lines import surely_fits
from tests.support.corpora import (
    TEXTS,
    count_encoded,
    encode_file,
    encode_stream,
    ended,
    expected,
    files,
    finished,
    start,
)

# What is read and what is written


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_every_line_is_a_text_and_every_text_a_row(params, tmp_path, output, ending, last):
    texts = ["", "naïve café", "", "\ta cat\r", " ", *TEXTS, "end"]
    path = tmp_path / "captions.txt"
    path.write_bytes((ending.join(texts) + ending * last).encode())
    features = encode_file(params, path, output)
    np.testing.assert_allclose(features, expected(params, texts), atol=1e-5)
    assert isinstance(np.load(output, mmap_mode="r"), np.memmap)
    assert files(tmp_path) == ["captions.txt", "features.npy"]


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
@pytest.mark.parametrize("normalize", [False, True])
def test_dtype_and_normalize(params, captions, output, dtype, normalize):
    features = encode_file(params, captions, output, dtype=dtype, normalize=normalize)
    assert features.dtype == (dtype or "float32")
    truth = expected(params, TEXTS)
    truth = minclip.normalize(truth) if normalize else truth
    np.testing.assert_allclose(features, truth, atol=2e-3 if dtype == "float16" else 1e-5)


def test_a_file_without_lines_has_no_features(params, tmp_path, output):
    (tmp_path / "empty.txt").touch()
    assert encode_file(params, tmp_path / "empty.txt", output).shape == (0, 16)
    assert np.load(output, mmap_mode="r").shape == (0, 16)


def test_a_pipe_is_read_to_its_end_and_leaves_no_copy(model, params, tmp_path, output):
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
        features = encode_file(params, file, output)
    np.testing.assert_allclose(features, expected(params, ["a cat", "a dog"]), atol=1e-5)


def test_a_stream_of_texts_is_taken_as_it_is_needed(params):
    taken = []
    stream = encode_stream(params, (taken.append(n) or TEXTS[n % 50] for n in range(10**9)))
    rows = np.concatenate([next(stream) for _ in range(7)])
    stream.close()
    np.testing.assert_allclose(rows[:50], expected(params, TEXTS), atol=1e-5)
    assert len(taken) <= (7 + 2 * workers.PROCESSES) * 8
    assert list(encode_stream(params, [])) == []


# Mistakes in the input


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"word " * 76, "78 tokens long, start and end included, but the context holds 77"),
        ("é̂".encode() * 70, "tokens long"),
        (b"pi\xf1ata", "not UTF-8 at byte 2"),
        (b"x" * 2**19, "longer than"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_encoded(params, tmp_path, output, monkeypatch, line, says):
    path = tmp_path / "captions.txt"
    path.write_bytes(b"a cat\n" * 36 + line + b"\na dog\n")
    counts = count_encoded(monkeypatch)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 37\\b.*{re.escape(says)}"):
        encode_file(params, path, output)
    assert counts == []
    assert files(tmp_path) == ["captions.txt"]


def test_truncate_cuts_what_is_too_long(params, tmp_path, output):
    path = tmp_path / "captions.txt"
    path.write_text("word " * 500 + "\na cat\n")
    features = encode_file(params, path, output, truncate=True)
    np.testing.assert_allclose(features, expected(params, ["word " * 500, "a cat"]), atol=1e-5)


@given(st.text(alphabet=st.characters(max_codepoint=0x17F) | st.sampled_from("&;<|>lt "), max_size=40))
def test_a_text_that_surely_fits_does_fit(text):
    for context in (8, 16, 30):
        if surely_fits(text, context):
            minclip.tokenize(text, context_length=context)


def test_a_stream_says_which_text_is_too_long(params):
    texts = [*TEXTS, "word " * 99]
    with pytest.raises(ValueError, match="from text 48 on: text 2 is 101 tokens long"):
        list(encode_stream(params, texts))


def test_a_file_that_changes_meanwhile_is_noticed(params, captions, output):
    def encode_chunks(chunks):
        for tokens in chunks:
            captions.write_text("other\n" * 50)
            yield minclip.fast.encode_text(params, tokens)

    with pytest.raises(ValueError, match="changed while it was being encoded"):
        encode_file(params, captions, output, encode_chunks=encode_chunks)
    assert finished(output) == 0


# Memory and processes


@pytest.mark.parametrize("kind", ["short", "long"])
def test_memory_stays_below_the_model_and_500_MB(model, tmp_path, output, kind):
    path = tmp_path / "captions.txt"
    line = {"short": "a photo of {} cats\n", "long": "{} words " * 20_000 + "\n"}[kind]
    path.write_text("".join(line.replace("{}", str(n)) for n in range({"short": 20_000, "long": 60}[kind])))
    peak = """
    import atexit, pathlib, re, resource
    from minclip.corpus import workers
    def peak():
        # VmHWM begins with the program; ru_maxrss would begin with what the tests, torch and all, hold.
        ours = int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
        theirs = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest
        print((ours + workers.PROCESSES * theirs) * 1024)
    atexit.register(peak)
    """
    args = ("--file", path, "-o", output, "--model", model, "--truncate")
    status, out, err = ended(start(*args, before=peak, chunk=encoding.CHUNK))
    assert (status, err) == (0, "")
    assert int(out.splitlines()[-1]) < os.path.getsize(model) + 500e6


def test_a_tokenizing_process_that_dies_is_named_and_none_is_left_behind(params, monkeypatch):
    children = []
    popen = subprocess.Popen

    def remember(*args, **options):
        children.append(popen(*args, **options))
        return children[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", remember)
    stream = encode_stream(params, TEXTS * 20)
    next(stream)
    children[0].kill()
    with pytest.raises(OSError, match="a process that tokenizes ended early"):
        list(stream)
    assert all(child.poll() is not None for child in children)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_ctrl_c_does_not_reach_a_process_that_tokenizes_even_while_it_starts():
    with workers.tokenizing_process() as child:
        assert os.getpgid(child.pid) != os.getpgid(0)
