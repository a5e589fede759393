"""write_states and `minclip encode --states` write hidden_states of every line, and resume."""

import signal

import numpy as np
import pytest

import minclip
from minclip import cli, corpus
from minclip.corpus import encoding
from tests.support.corpora import TEXTS, ended, files, finished, start
from tests.unit.corpus.test_resumable_npy import KILLER


def expected(params, pad=0, **options):
    return minclip.hidden_states(params, minclip.tokenize(TEXTS, pad=pad), **options)


@pytest.mark.parametrize("options", [{}, {"skip": 1, "norm": False, "pad": 49407}, {"dtype": "float32"}])
def test_every_text_has_its_states_at_all_positions(params, captions, output, options):
    written = corpus.write_states(params, captions, output, chunk=8, **options)
    dtype = options.pop("dtype", "float16")
    assert (written.shape, written.dtype) == ((50, 77, 64), dtype)
    np.testing.assert_allclose(
        written, expected(params, **options), atol=1e-5 if dtype == "float32" else 4e-3
    )


def test_a_tower_without_projection_writes_states_but_no_features(params, captions, output, tmp_path):
    bare = params.with_arrays({name: a for name, a in params.items() if name != "text_projection"})
    with pytest.raises(ValueError, match="no 'text_projection'"):
        corpus.encode_file(bare, captions, output)
    assert files(tmp_path) == ["captions.txt"]
    np.testing.assert_array_equal(
        corpus.write_states(bare, captions, output),
        corpus.write_states(params, captions, output.with_name("full.npy")),
    )


def test_killed_it_resumes_with_the_same_command(params, model, captions, output, monkeypatch):
    args = ("--states", "--skip", 1, "--no-norm", "--pad", 49407)
    small = "corpus.write_states = functools.partial(corpus.write_states, chunk=8)\n"
    killer = small + KILLER.format(kind="fsync", number=6)
    command = ("--file", captions, "-o", output, "--model", model, *args)
    assert ended(start(*command, before=killer))[0] == -signal.SIGKILL
    assert finished(output) == 24
    with pytest.raises(ValueError, match=r"begun with another states: .* to start over"):
        corpus.write_states(params, captions, output, skip=1, norm=False)
    with pytest.raises(ValueError, match=r"begun with another dtype, shape, normalize, states"):
        corpus.encode_file(params, captions, output)
    counts, states = [], encoding.hidden_states
    monkeypatch.setattr(
        encoding,
        "hidden_states",
        lambda params, tokens, **options: counts.append(len(tokens)) or states(params, tokens, **options),
    )
    assert cli.main(["encode", *map(str, command)]) == 0
    assert counts == [26]
    written = np.load(output)
    np.testing.assert_allclose(written, expected(params, 49407, skip=1, norm=False), atol=4e-3)


def test_a_few_texts_are_written_too(model, params, output, capsys):
    texts = ["a cat", "two dogs"]
    args = ["encode", *texts, "-o", str(output), "--model", str(model), "--states", "--dtype", "float32"]
    assert cli.main(args) == 0
    assert capsys.readouterr().out == f"{output}: states of 2 texts, [2, 77, 64] float32\n"
    np.testing.assert_array_equal(np.load(output), minclip.hidden_states(params, minclip.tokenize(texts)))


@pytest.mark.parametrize("extra", [[], ["--normalize", "-o", "x.npy"]])
def test_states_that_cannot_be_shown_or_normalized_are_wrong_usage(extra, capsys):
    assert cli.main(["encode", "a cat", "--states", *extra]) == 2
    assert "--states goes with -o and without --normalize" in capsys.readouterr().err


def test_a_skip_beyond_the_blocks_is_known_before_the_input_is_read(params, captions, output, tmp_path):
    with pytest.raises(ValueError, match="skip must be from 0 to 1"):
        corpus.write_states(params, captions, output, skip=2)
    assert files(tmp_path) == ["captions.txt"]
