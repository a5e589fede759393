"""A corpus that is interrupted resumes, and loses nothing but the chunk that was being computed."""

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

import minclip
from tests.support.corpora import (
    TEXTS,
    count_encoded,
    encode_file,
    ended,
    expected,
    files,
    finished,
    start,
    stop_after,
)

# Kills its process in the middle of a write, or before a step that makes a write last.
KILLER = """
import os, pathlib, signal
from minclip.corpus.resumable_npy import ResumableNpy
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
ResumableNpy.write = dies_before(ResumableNpy.write, "write")
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
def test_killed_at_any_step_it_resumes(
    params, model, captions, output, tmp_path, monkeypatch, kind, number, kept
):
    killer = KILLER.format(kind=kind, number=number)
    process = start("--file", captions, "-o", output, "--model", model, before=killer)
    assert ended(process)[0] == -signal.SIGKILL
    assert output.exists() == (kind == "renamed")
    assert finished(output) == kept
    counts = count_encoded(monkeypatch)
    features = encode_file(minclip.load(model), captions, output)
    assert sum(counts) == 50 - kept
    np.testing.assert_allclose(features, expected(params, TEXTS), atol=1e-5)
    assert files(tmp_path) == ["captions.txt", "features.npy"]


@pytest.mark.deep
def test_killed_at_twenty_random_moments_it_loses_nothing(params, model, tmp_path, monkeypatch):
    """Each run starts afresh, and dies at any moment between the start of its process and its end."""
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
                counts = count_encoded(patch)
                features = encode_file(minclip.load(model), path, output, chunk=512)
            assert sum(counts) == len(texts) - kept
            np.testing.assert_allclose(features, np.load(whole), atol=1e-5)
        output.unlink()
    assert files(tmp_path) == ["captions.txt", "whole.npy"]
    print(f"\nkilled with these rows done, of {len(texts)}: {sorted(moments)}")
    assert len(set(moments)) > 5


def test_a_changed_input_model_or_option_is_refused(params, captions, output, tmp_path):
    stop_after(params, captions, output, 3)
    before = Path(f"{output}.partial").read_bytes()
    other = minclip.Params(
        {**params, "ln_final.bias": params["ln_final.bias"] + 1}, activation="gelu", heads=1
    )
    for options, what in [
        (dict(params=minclip.Params(params, activation="quick_gelu", heads=1, eot=7)), "model"),
        (dict(normalize=True), "normalize"),
        (dict(truncate=True), "truncate"),
        (dict(dtype="float16"), "dtype"),
        (dict(params=other), "model"),
        (dict(params=minclip.Params(params, activation="gelu", heads=1)), "model"),
        (dict(params={**params, "ln_final.bias": params["ln_final.bias"] + 1}), "model"),
    ]:
        with pytest.raises(ValueError, match=f"begun with another {what}: .* to start over"):
            encode_file(options.pop("params", params), captions, output, **options)
    captions.write_text(captions.read_text().replace("1 cats", "2 cats"))
    with pytest.raises(ValueError, match=r"begun with another input: .* to start over"):
        encode_file(params, captions, output)
    assert Path(f"{output}.partial").read_bytes() == before
    assert files(tmp_path) == ["captions.txt", "features.npy.journal", "features.npy.partial"]


def test_a_pipe_is_resumed_by_the_same_text(model, params, output):
    args = ("--file", "-", "-o", output, "--model", model)
    killer = KILLER.format(kind="fsync", number=6)
    text = "\n".join(TEXTS).encode()
    assert ended(start(*args, before=killer, stdin=subprocess.PIPE), input=text)[0] == -signal.SIGKILL
    status, _, err = ended(start(*args, stdin=subprocess.PIPE), input=text + b"\nmore")
    assert status == 1
    assert "another input, shape: give the same again" in err
    assert finished(output) == 24
    assert ended(start(*args, stdin=subprocess.PIPE), input=text)[0] == 0
    np.testing.assert_allclose(np.load(output), expected(params, TEXTS), atol=1e-5)


def test_rows_that_the_disk_lost_are_made_again(params, captions, output):
    stop_after(params, captions, output, 4)
    partial = Path(f"{output}.partial")
    os.truncate(partial, partial.stat().st_size - 100)
    features = encode_file(params, captions, output)
    np.testing.assert_allclose(features, expected(params, TEXTS), atol=1e-5)


def test_an_output_that_is_there_stays_until_the_new_one_is_complete(params, captions, output):
    output.write_bytes(b"old")
    stop_after(params, captions, output, 4)
    assert output.read_bytes() == b"old"
    assert encode_file(params, captions, output).shape == (50, 16)


def test_two_at_once_do_not_mix(params, captions, output):
    def encode_chunks(chunks):
        with pytest.raises(OSError, match="being written by another process"):
            encode_file(params, captions, output)
        for tokens in chunks:
            yield minclip.fast.encode_text(params, tokens)

    features = encode_file(params, captions, output, encode_chunks=encode_chunks)
    np.testing.assert_allclose(features, expected(params, TEXTS), atol=1e-5)


# The disk


def test_a_full_disk_costs_only_time(params, model, captions, output, tmp_path):
    args = ("--file", captions, "-o", output, "--model", model)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))"
    status, out, err = ended(start(*args, before=limit))
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        f"minclip: {output}: {os.strerror(errno.EFBIG)}; 24 of 50 rows are kept; "
        "run the same command again to resume"
    ]
    assert not output.exists()
    assert ended(start(*args))[0] == 0
    np.testing.assert_allclose(np.load(output), expected(params, TEXTS), atol=1e-5)
    assert files(tmp_path) == ["captions.txt", "features.npy"]


def test_a_disk_without_room_is_known_at_once(params, captions, output, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(OSError, match=r"features.npy needs 0.00 GB more, its disk has 0.00 GB free"):
        encode_file(params, captions, output)
    assert files(tmp_path) == ["captions.txt"]


@pytest.mark.parametrize("where", ["missing/features.npy", ""])
def test_an_output_that_cannot_be_is_known_before_the_input_is_read(params, captions, tmp_path, where):
    with pytest.raises(OSError, match="folder"):
        encode_file(params, captions, tmp_path / where)
    assert files(tmp_path) == ["captions.txt"]
