"""The command line, run as a person would."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from ftfy.formatting import monospaced_width

import minclip
from minclip import cli
from minclip.cli import texts

try:
    import pty
    import termios
except ImportError:  # Windows
    pty = None

HERE = os.path.dirname(__file__)
ROOT = Path(__file__).parents[2]
needs_a_terminal = pytest.mark.skipif(pty is None, reason="Windows has no pseudo-terminals")


def run(*args, stdin=None, env=None):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "minclip", *args],
        capture_output=True,
        encoding="utf-8",
        input=stdin,
        env={**os.environ, "PYTHONUTF8": "1", **(env or {})},
        timeout=120,
    )


def test_buffers_of_a_caller_in_python_take_the_output():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert cli.main(["encode", "a cat", "two dogs"]) == 0
        assert cli.main(["encode", "a cat", "--model", "no.pt"]) == 1
    assert "a cat" in out.getvalue()
    assert err.getvalue().startswith("minclip: no file")


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
    from minclip import checkpoint

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load", interrupted)
    assert cli.main(["encode", "a cat"]) == 130
    assert capsys.readouterr().err == "minclip: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process for os.kill")
def test_an_interrupt_during_the_import_is_one_line_and_status_130(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["minclip"].partition(":")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    script += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += f"from {module} import {function}; sys.exit({function}())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "minclip: interrupted\n")


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
        (["encode", "a cat", "cat " * 99], 1, "text 2 is 101 tokens long"),
        (["encode", "--file", "nowhere.txt"], 1, "minclip: nowhere.txt: No such file or directory"),
        (["encode", "--file", "."], 1, "minclip: .: Is a directory"),
        (["encode", "--file", os.devnull], 1, f"minclip: {os.devnull} is empty: give one text per line"),
        (["encode", "--file", os.devnull, "-o", "f.npy"], 1, f"{os.devnull} is empty"),
        (["encode", "a", "-o", HERE], 1, f"minclip: {HERE}: Is a directory"),
        (["encode", "a", "-o", f"{__file__}/f.npy"], 1, f"minclip: {__file__}/f.npy: Not a directory"),
        (["encode", "a", "--model", "nowhere.safetensors"], 1, "nowhere.safetensors"),
        (["encode", "a", "-o", "no/such/folder/f.npy"], 1, "no/such/folder"),
        (["encode"], 1, "standard input is empty"),
        (["encode", "a", "--file", "b.txt"], 2, "give TEXT or --file, not both"),
        (["encode", "a", "--file", ""], 2, "--file takes the name of a file"),
        (["encode", "a", "-o", ""], 2, "-o takes the name of a file"),
        (["encode", "a", "-o", "-"], 2, "-o takes the name of a file"),
        (["show", "a", "-o", "page.pdf"], 2, "-o writes a .html file, and page.pdf ends in .pdf"),
        (["probe", "-o", "probe.npy"], 2, "-o writes a .npz file, and probe.npy ends in .npy"),
        (["probe", "--texts", "-o", "texts.txt"], 2, "-o writes a .json file, and texts.txt ends in .txt"),
        (["compare", "a.npz", "b.npz", "--html", "c.png"], 2, "--html writes a .html file"),
        (["encode", "a", "--pad", "49407"], 2, "--skip, --no-norm and --pad go with --states"),
        (["encode", "a", "--skip", "1"], 2, "go with --states"),
        (["encode", "a", "-o", "features.csv"], 2, "-o writes a .npy file"),
        (["encode", "a", "--dask", "tcp://nowhere:1"], 2, "--dask goes with --file and -o"),
        (["encod", "a"], 2, "unknown command 'encod'; did you mean encode?"),
        (["a cat"], 2, "unknown command 'a cat'; to encode a text: minclip encode \"a cat\""),
        (["help"], 2, "unknown command 'help'; did you mean --help?"),
        (["version"], 2, "unknown command 'version'; did you mean --version?"),
        (["--model", "builtin", "encode", "a"], 2, "unknown option --model; a command comes first"),
        (["encode", "a", "--modle=builtin"], 2, "unknown option --modle=builtin; did you mean --model?"),
        (["encode", "a", "--device", "tpu"], 2, "invalid choice"),
    ],
)
def test_errors_are_one_line_and_a_status(args, status, says):
    done = run(*args, stdin="")
    assert done.returncode == status
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"fine\ncaf\xe9\n")
    done = run("encode", "--file", str(path))
    assert done.returncode == 1
    assert f"{path}, line 2: not UTF-8 at byte 3: save the file as UTF-8" in done.stderr


def on_a_terminal(*args, interrupt_after=None, env=None):
    """Return the status and the output of a command whose standard streams are a terminal of 80 columns."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    command = [sys.executable, "-W", "error", "-m", "minclip", *args]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
    # A shell starts a background job with SIGINT ignored, which the command would inherit from these tests.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, **streams, start_new_session=True, env={**os.environ, **(env or {})})
    signal.signal(signal.SIGINT, usual)
    os.close(slave)
    output = b""
    with contextlib.suppress(OSError):  # the end of a terminal's output is an OSError on Linux
        while part := os.read(master, 2**16):
            output += part
            if interrupt_after and interrupt_after in output:
                os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
                interrupt_after = None
    os.close(master)
    return process.wait(timeout=60), output.decode().replace("\r\n", "\n")


def test_minclip_alone_shows_help_with_examples():
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert '  minclip encode "a photo of a cat" "a photo of a dog"\n' in done.stdout


@needs_a_terminal
@pytest.mark.parametrize("command", [["encode"], ["tokenize"], ["show", "-o", "page.html"]])
def test_a_command_without_texts_shows_help_with_examples(command):
    status, output = on_a_terminal(*command)
    assert status == 2
    assert f"\nexamples:\n  minclip {command[0]} " in output


def parsers():
    top = cli.parser()
    (commands,) = (action for action in top._actions if action.metavar == "COMMAND")
    return [top, *commands.choices.values()]


def test_every_option_has_help_and_every_command_examples():
    for parser in parsers():
        assert "examples:\n  minclip" in parser.format_help()
        assert all(action.help for action in parser._actions if action.metavar != "COMMAND"), parser.prog


@pytest.mark.parametrize("width", [60, 80])
def test_help_and_output_fit_the_columns(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    for parser in parsers():
        prose = parser.format_help().partition("examples:")[0]  # a command that is wrapped cannot be copied
        assert all(len(line) <= width for line in prose.splitlines()), parser.prog
    assert cli.main(["encode", *"abcdefghijklm", "a photo of " + "🐱 " * 40]) == 0
    assert max(map(monospaced_width, capsys.readouterr().out.splitlines())) <= width


def test_a_comparison_fits_the_columns(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    params = minclip.load()
    tokens = minclip.probe_tokens()
    np.savez(
        "port.npz", tokens=tokens, **minclip.trace(minclip.Params(params, activation="gelu", heads=2), tokens)
    )
    assert cli.main(["probe", "-o", "probe.npz"]) == 0
    capsys.readouterr()
    for width in (60, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        assert cli.main(["compare", "probe.npz", "port.npz"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        assert "! transformer.resblocks.0.mlp.gelu" in "\n".join(lines)


@pytest.mark.parametrize("command", ["encode", "tokenize"])
def test_texts_are_read_from_a_pipe(command):
    done = run(command, stdin="a cat\ntwo dogs")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run(command, "a cat", "two dogs").stdout


def test_texts_may_follow_an_option():
    assert run("encode", "a cat", "--truncate", "a dog").stdout == run("encode", "a cat", "a dog").stdout


def test_a_name_of_a_file_in_place_of_a_text_is_pointed_out(tmp_path):
    (tmp_path / "captions.txt").write_text("a cat")
    done = run("tokenize", str(tmp_path / "captions.txt"))
    assert done.returncode == 0
    assert done.stderr.endswith(f"to read its lines: minclip tokenize < {tmp_path / 'captions.txt'}\n")


def test_every_command_that_asks_to_truncate_can_do_so(tmp_path):
    page = tmp_path / "page.html"
    assert "(--truncate)" in run("show", "cat " * 99, "-o", str(page)).stderr
    assert run("show", "cat " * 99, "-o", str(page), "--truncate").returncode == 0
    assert page.exists()


def test_a_picture_in_place_of_a_text_is_pointed_out(tmp_path):
    (tmp_path / "cat.PNG").write_bytes(b"")
    done = run("encode", str(tmp_path / "cat.PNG"), "no-such.png", "a" * 300 + ".txt", "--truncate")
    assert done.returncode == 0
    note = f"{tmp_path / 'cat.PNG'} is a file, but is taken as a text; minclip has no image encoder"
    assert done.stderr == f"minclip: {note}\n"


def test_a_hyphen_in_place_of_a_text_is_pointed_out():
    done = run("encode", "-", stdin="a cat")
    assert done.returncode == 0
    assert done.stderr == "minclip: - is taken as a text; without TEXT, standard input is read\n"


def test_a_byte_order_mark_is_no_part_of_the_first_text():
    done = run("tokenize", stdin="\ufeffa cat\n\ufeffa dog\n")
    assert done.stdout.startswith("'a cat': 4 tokens\n")
    assert "'\\ufeffa dog'" in done.stdout


def test_a_file_without_output_shows_its_first_twelve_lines(tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"{n} cats\n" for n in range(12)) + "cat " * 99)
    done = run("encode", "--file", str(captions))
    assert (done.returncode, done.stderr) == (0, "")
    assert " 12      4  11 cats" not in done.stdout  # "11" is two tokens
    assert " 12      5  11 cats" in done.stdout
    assert done.stdout.endswith(
        "These are the first 12 texts. For the features of all, add -o features.npy\n"
    )


def test_no_more_of_a_pipe_is_read_than_is_shown():
    endless = subprocess.Popen(["yes", "a cat"], stdout=subprocess.PIPE)
    command = [sys.executable, "-m", "minclip", "encode"]
    done = subprocess.run(command, stdin=endless.stdout, capture_output=True, encoding="utf-8", timeout=60)
    endless.kill()
    endless.wait()
    endless.stdout.close()
    assert done.returncode == 0
    assert "first 12 texts" in done.stdout


@needs_a_terminal
def test_an_interrupted_corpus_says_where_it_stopped_and_how_to_resume(tmp_path):
    captions, output = tmp_path / "captions.txt", tmp_path / "features.npy"
    captions.write_text("".join(f"{n} cats\n" for n in range(30_000)))
    command = ["encode", "--file", str(captions), "-o", str(output)]
    status, shown = on_a_terminal(*command, interrupt_after=b"27%")
    assert status == 130
    assert "0%|" in shown  # the bar, before the first chunk is done
    assert shown.endswith("minclip: stopped at 8,192 of 30,000; run the same command again to resume\n")
    assert len(shown.splitlines()) < 10  # the processes that tokenize say nothing
    done = run(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(np.load(output)) == 30_000


def test_words_that_the_built_in_model_hardly_knows_are_named():
    done = run("encode", "a zzyzx near the 犬", "a photo of a cat")
    assert done.stdout.endswith("note: rare or absent in the built-in model's training: zzyzx, 犬\n")
    assert "note" not in run("encode", "a photo of a cat").stdout


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("eine Katze", "eine, katze"),  # common pieces, but no English words
        ("a quokka", "quokka"),
        ("🐱🐶🐭", "🐱🐶🐭"),  # one word, for want of spaces
        ("a fleur-de-lis", None),  # the pictures' own names and emoji are known, of whatever pieces
        ("👨‍👩‍👧‍👦 🏳️‍🌈 🐱 above 🐶", None),
        ("it is raining outside", "raining"),
    ],
)
def test_a_word_is_rare_by_its_pieces_or_for_having_several(text, named):
    note = texts.note_on_rare_words([text])
    assert note == (named and f"note: rare or absent in the built-in model's training: {named}")


def test_an_empty_text_has_no_nearest_pictures():
    done = run("encode", "", "  \t")
    assert done.stdout.count("(empty)") == 4
    assert done.stdout.rstrip().splitlines()[-2:] == ["  1  (empty)", "  2  (empty)"]


@pytest.mark.parametrize("name", ["features.npy.partial", "features.npy.journal"])
def test_an_error_names_the_users_file_where_another_one_could_not_be_written(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=r"Is a directory: '[^']*features.npy'"):
        minclip.corpus.encode_file(minclip.load(), __file__, tmp_path / "features.npy", truncate=True)


@pytest.mark.parametrize("columns", ["1", "10", "24", "33"])
def test_a_narrow_terminal_gets_narrow_output(columns):
    done = run("encode", "a photo of a cat on a sofa", "🐱 " * 30, env={"COLUMNS": columns})
    assert done.returncode == 0
    assert max(map(monospaced_width, done.stdout.splitlines())) <= max(24, int(columns))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sh")
def test_a_closed_output_is_no_error():
    command = [f'"{sys.executable}" -W error -m minclip tokenize "a cat" >&-']
    done = subprocess.run(command, shell=True, capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_text_that_begins_with_a_hyphen_is_answered_with_the_remedy():
    done = run("encode", "-x")
    assert done.returncode == 2
    assert "a text that begins with - goes after --: minclip encode -- -x" in done.stderr
    assert "goes after" not in run("inspect", "builtin", "-x").stderr
    assert "  1      4  -x" in run("encode", "--", "-x").stdout


@pytest.mark.parametrize(
    ("content", "answer"),
    [(b"", "the file is empty"), (b"\x80\x04K*.", "its first bytes are those of another format")],
)
def test_a_file_that_holds_no_arrays_is_named_without_advice_to_unpickle_it(tmp_path, content, answer):
    (tmp_path / "port.npz").write_bytes(content)
    done = run("diagnose", str(tmp_path / "port.npz"))
    assert done.returncode == 1
    assert done.stderr.endswith(f"port.npz is not an .npz or .safetensors file of plain arrays: {answer}\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
@pytest.mark.parametrize(
    "command", ["encode", "encode --file", "encode --states", "show", "probe", "probe --texts"]
)
def test_no_file_takes_the_place_of_a_device_or_a_pipe(tmp_path, command):
    """As root, `-o /dev/null` would otherwise replace the device."""
    pipe, captions = tmp_path / "pipe", tmp_path / "captions"
    os.mkfifo(pipe)
    captions.write_text("a cat\n")
    texts = {"encode --file": [str(captions)], "probe": [], "probe --texts": []}.get(command, ["a cat"])
    done = run(*command.split(), *texts, "-o", str(pipe))
    assert (done.returncode, done.stderr) == (
        1,
        f"minclip: {pipe} is a device or a pipe: give the name of a file\n",
    )
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == [captions, pipe]


def test_a_link_stays_a_link_to_the_new_file(tmp_path):
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    for _ in range(2):
        assert run("show", "a cat", "-o", str(tmp_path / "link.html")).returncode == 0
        assert (tmp_path / "link.html").is_symlink()
        assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")


def test_a_probe_agrees_with_itself(tmp_path):
    probe = str(tmp_path / "probe.npz")
    assert run("probe", "-o", probe).returncode == 0
    done = run("compare", probe, probe)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("agrees: 97 of 97 stages were compared")


def test_check_weights_takes_the_name_of_a_model():
    assert run("check-weights", "builtin").stdout.startswith("agrees: all 101 tensors")
    assert "did you mean ViT-B/32?" in run("check-weights", "ViT-B-32").stderr


def test_texts_are_utf8_in_any_locale():
    plain = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    ids = " ".join(map(str, minclip.tokenize("naïve 🍕")[0, :6]))
    assert f"  ids     {ids}\n" in run("tokenize", "naïve 🍕", env=plain).stdout


def test_a_terminal_without_emoji_still_gets_its_answer():
    done = run("encode", "a cat", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0
    assert "?" in done.stdout


def test_importing_minclip_is_light():
    """No framework, no GPU library, no drawing library, no network library, and nothing read but code."""
    code = (
        "import sys, numpy\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import minclip\n"
        "heavy = {'torch', 'cupy', 'matplotlib', 'scipy', 'transformers', 'dask', 'ftfy', 'tqdm'}\n"
        "heavy |= {'http.client', 'urllib.request', 'ssl', 'concurrent.futures', 'pickletools'}\n"
        "heavy &= set(sys.modules)\n"
        "data = [p for p in opened if 'minclip' in p and not p.endswith(('.py', '.pyc'))]\n"
        "print(heavy or '', data or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")
