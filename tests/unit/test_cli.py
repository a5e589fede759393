"""The command line, run as a person would."""

import os
import subprocess
import sys

import numpy as np
import pytest

import minclip


def run(*args, stdin=None, env=None):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "minclip", *args],
        capture_output=True,
        encoding="utf-8",
        input=stdin,
        env={**os.environ, "PYTHONUTF8": "1", **(env or {})},
        timeout=120,
    )


def test_encode_shows_tokens_similarities_and_pictures_in_80_columns():
    done = run("encode", "a photo of a cat", "a photo of a dog", "a red sports car")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "  1      7  a photo of a cat" in lines
    assert "  3      6  a red sports car" in lines
    assert "built-in" in lines[0]
    assert any(line.startswith("  1  1.00") for line in lines)
    cat, dog = lines.index("  1  a photo of a cat"), lines.index("  2  a photo of a dog")
    assert any("🐱" in line or "🐈" in line for line in lines[cat:dog])
    assert "\x1b" not in done.stdout


def test_many_or_long_or_empty_texts_still_fit():
    done = run("encode", *["", "word " * 60, "line\nbreak", *map(str, range(20))])
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "of the first 12 texts" in done.stdout


@pytest.mark.parametrize("flags", [[], ["--normalize"]])
def test_encode_writes_the_features_of_a_file(tmp_path, flags):
    texts = ["a photo of a cat", "", "naïve café"]
    (tmp_path / "captions.txt").write_bytes("\r\n".join(texts).encode() + b"\n")
    out = tmp_path / "features.npy"
    done = run("encode", "--file", str(tmp_path / "captions.txt"), "-o", str(out), *flags)
    assert (done.returncode, done.stderr) == (0, "")
    features = minclip.encode_text(minclip.load(), minclip.tokenize(texts))
    expected = minclip.normalize(features) if flags else features
    np.testing.assert_allclose(np.load(out, mmap_mode="r"), expected, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captions.txt", "features.npy"]


def test_encode_writes_the_features_of_texts(tmp_path):
    out = tmp_path / "features.npy"
    done = run("encode", "a cat", "two dogs", "-o", str(out), "--normalize", "--dtype", "float16")
    assert (done.returncode, done.stderr) == (0, "")
    unit = minclip.normalize(minclip.encode_text(minclip.load(), minclip.tokenize(["a cat", "two dogs"])))
    assert np.load(out).dtype == np.float16
    np.testing.assert_allclose(np.load(out), unit, atol=1e-3)
    assert list(tmp_path.iterdir()) == [out]


def test_a_reader_that_has_had_enough_gets_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", "-m", "minclip", "encode", "a cat"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, encoding="utf-8", timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_interrupt_is_one_line_and_status_130(monkeypatch, capsys):
    from minclip import checkpoint, cli

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load", interrupted)
    assert cli.main(["encode", "a cat"]) == 130
    assert capsys.readouterr().err == "minclip: interrupted\n"


def test_encode_with_a_saved_model(tmp_path):
    path = tmp_path / "model.safetensors"
    minclip.save(minclip.load(), path)
    done = run("encode", "a cat", "--model", str(path))
    assert done.returncode == 0
    assert str(path) in done.stdout
    assert "pictures" not in done.stdout


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["encode", "cat " * 99], 1, "text 0 is 101 tokens long"),
        (["encode", "--file", "nowhere.txt"], 1, "nowhere.txt"),
        (["encode", "a", "--model", "nowhere.safetensors"], 1, "nowhere.safetensors"),
        (["encode", "a", "-o", "no/such/folder/f.npy"], 1, "no/such/folder"),
        (["encode"], 2, "give texts or --file"),
        (["encode", "a", "--dask", "tcp://nowhere:1"], 2, "--dask goes with --file and -o"),
        ([], 2, "COMMAND"),
        (["encode", "a", "--device", "tpu"], 2, "invalid choice"),
    ],
)
def test_errors_are_one_line_and_a_status(args, status, says):
    done = run(*args)
    assert done.returncode == status
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if status == 1:
        assert len(done.stderr.splitlines()) == 1


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"fine\ncaf\xe9\n")
    done = run("encode", "--file", str(path))
    assert done.returncode == 1
    assert f"{path}, line 2: not UTF-8 at byte 3" in done.stderr


def test_a_terminal_without_emoji_still_gets_its_answer():
    done = run("encode", "a cat", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0
    assert "?" in done.stdout


def test_importing_minclip_is_light():
    """No framework, no GPU library, no drawing library, and nothing read but code."""
    code = (
        "import sys, numpy\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import minclip\n"
        "heavy = {'torch', 'cupy', 'matplotlib', 'scipy', 'transformers', 'dask'} & set(sys.modules)\n"
        "data = [p for p in opened if 'minclip' in p and not p.endswith(('.py', '.pyc'))]\n"
        "print(heavy or '', data or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")
