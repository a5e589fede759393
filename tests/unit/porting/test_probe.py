"""The probe: its tokens see every known bug, and its file is all that a port in any language needs."""

import json

import numpy as np
import pytest

import minclip
from minclip import cli
from minclip.porting import probe, rounding, stages
from minclip.porting.catalogue import CATALOGUE
from minclip.porting.port import Port
from tests.support.oracles import random_params, relative, transformers_model

PARAMS = random_params(width=128, layers=11, embed=128)
TOKENS = minclip.probe_tokens()
REFERENCE = minclip.trace(PARAMS, TOKENS)
END = 49407


def test_the_probe_tokens_are_what_their_docstring_says():
    assert TOKENS.shape == (7, 77)
    assert TOKENS.dtype == np.int32
    end = TOKENS.argmax(axis=-1)
    assert (TOKENS[:, 0] == END - 1).all()
    assert (TOKENS[np.arange(7), end] == END).all()
    assert len(set(end)) == 6  # ragged
    assert (TOKENS[[0, 1, 3, 5], -1] == 0).all()
    assert (TOKENS[[2, 4], -1] == END).all()
    assert (TOKENS[3, 1 : end[3]] == 0).sum() == 3
    assert TOKENS[4, 1] == 0
    assert {1, 2, 49405} <= set(TOKENS[1])
    assert 41 < end[5] < 76
    assert end[6] == 76
    assert TOKENS.max() < 49408
    assert TOKENS.min() == 0


@pytest.mark.parametrize(("context", "vocabulary"), [(8, 16), (77, 512), (64, 1000), (76, 49408)])
def test_probe_tokens_fit_any_context_and_vocabulary(context, vocabulary):
    tokens = minclip.probe_tokens(context, vocabulary)
    assert tokens.shape == (7, context)
    assert tokens.min() == 0
    assert tokens.max() == vocabulary - 1
    assert (tokens.argmax(axis=-1)[6]) == context - 1
    assert (tokens[:, 0] == vocabulary - 2).all()
    ordinary = tokens[[0, 2, 5, 6]]
    assert not (stages.up_to_end(ordinary) & (ordinary == 0)).any()


def test_probe_tokens_need_room():
    with pytest.raises(ValueError, match="context of 8 and a vocabulary of 16"):
        minclip.probe_tokens(7, 49408)


def encode(tap):
    """Features of the probe with stages replaced: tap(name, array, stages so far)."""
    at = {}

    def replace(name, array):
        at[name] = tap(name, array, at)
        return at[name]

    with np.errstate(all="ignore"):
        return minclip.encode_text(PARAMS, TOKENS, tap=replace)


def pooled_at(index):
    return lambda name, x, at: index if name == "eot" else x


def hidden(keys, low=-np.inf):
    """Scores of masked keys [B, L] are low, beside the causal mask."""
    return lambda name, x, at: (
        x + np.where(keys, np.float32(low), 0)[:, None, None] if "masked" in name else x
    )


def positions(rows):
    return lambda name, x, at: x[rows] if name == "positional_embedding" else x


# What a single short text, an unpadded batch or arange(77) cannot see: port-bugs by the input that sees them.
SUBTLE = {
    "pooled at the last position": pooled_at(np.full(7, 76)),
    "pooled at the last of several ends": pooled_at(76 - TOKENS[:, ::-1].argmax(-1)),
    "pooled at the first row's end": pooled_at(np.full(7, TOKENS[0].argmax())),
    "argmax of float16 ids": pooled_at(TOKENS.astype(np.float16).argmax(-1)),
    "argmax of int16 ids": pooled_at(TOKENS.astype(np.int16).argmax(-1)),
    "pooled by counting ids that are not 0": pooled_at((TOKENS != 0).sum(-1) - 1),
    "pooled by counting ids that are not the end's": pooled_at((TOKENS != END).sum(-1) - 1),
    "pooled at the legacy end id, 2": pooled_at((TOKENS == 2).argmax(-1)),
    "id 0 masked as padding": hidden(TOKENS == 0),
    "the end id masked as padding": hidden(TOKENS == END),
    "position 41 is a copy of 40": positions(np.r_[:41, 40, 42:77]),
    "positions from 1": positions(np.r_[1:77, 76]),
    "no causal mask": lambda name, x, at: at[name.replace("masked", "scores")] if "masked" in name else x,
}
HARMLESS = {
    "nothing at all": lambda name, x, at: x,
    "a mask of -1e4": lambda name, x, at: np.maximum(x, np.float32(-1e4)) if "masked" in name else x,
    "the lowest number as mask": lambda name, x, at: np.nan_to_num(x) if "masked" in name else x,
    "padding masked after the end": hidden(~stages.up_to_end(TOKENS)),
    "garbage after the end": lambda name, x, at: (
        np.where(stages.up_to_end(TOKENS)[..., None], x, np.float32(3)) if name == "embedding" else x
    ),
}


ALLOWED = rounding.ALLOWANCE * rounding.rounding_of(REFERENCE, "float32")["text_features"][0]


def moved(features):
    """How many times what rounding allows features are away, by the text that is furthest."""
    if features.shape != REFERENCE["text_features"].shape:
        return np.inf
    return max(map(relative, features, REFERENCE["text_features"])) / ALLOWED


@pytest.mark.parametrize("bug", SUBTLE)
def test_the_probe_sees_the_bugs_that_common_checks_miss(bug):
    assert not moved(encode(SUBTLE[bug])) < 100


@pytest.mark.parametrize("change", HARMLESS)
def test_a_harmless_change_moves_no_feature(change):
    assert moved(encode(HARMLESS[change])) < 1


FAULTS = [fault for fault in CATALOGUE if fault.fits(Port(PARAMS, TOKENS))]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_the_probe_sees_every_bug_of_the_catalogue(fault):
    port = Port(PARAMS, TOKENS)
    fault.change(port)
    if fault.id in ("D1-end", "D1-zero"):  # another padding is a bug only beside one that looks at padding
        assert moved(port.run()) < 1
    elif fault.id in ("N1-final-1e-6", "N1-final-1e-12"):  # at the edge of float32's rounding
        assert not moved(port.run()) < 1
    else:
        assert not moved(port.run()) < 10


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small model's file, its probe, and a folder to put ports in."""
    folder = tmp_path_factory.mktemp("probe")
    params = random_params(width=128, layers=2, embed=48, context=20, vocabulary=99)
    minclip.save(params, folder / "model.safetensors")
    assert (
        cli.main(["probe", "-o", str(folder / "probe.npz"), "--model", str(folder / "model.safetensors")])
        == 0
    )
    return params, folder


def test_the_probe_file_holds_tokens_and_every_stage(files):
    params, folder = files
    expected = minclip.trace(params, minclip.probe_tokens(20, 99))
    with np.load(folder / "probe.npz") as file:
        np.testing.assert_array_equal(file["tokens"], expected.tokens)
        np.testing.assert_array_equal(file["text_features"], expected["text_features"])
        assert "a photo of a cat" in file["texts"]
    assert not list(folder.glob("*.partial"))
    read = probe.read_probe(folder / "probe.npz")
    assert list(read) == list(expected)
    text = stages.up_to_end(expected.tokens)
    for name in expected:
        assert read[name].shape == expected[name].shape
        a, b = stages.entries(name, expected[name], read[name], text)
        finite = np.isfinite(a)  # of the scores, those that the mask hides
        np.testing.assert_allclose(b[finite], a[finite], rtol=1e-4, atol=1e-5)
    assert minclip.compare(read, expected).agrees
    assert {stage.state for stage in minclip.compare(read, expected).stages.values()} == {"agrees"}
    for precision in ("float32", "float16", "bfloat16"):
        assert rounding.rounding_of(read, precision).keys() == expected.keys()


def test_a_probe_of_blocks_is_smaller_and_finds_the_block(files):
    params, folder = files
    probe.write_probe(folder / "blocks.npz", params, stages="blocks")
    assert (folder / "blocks.npz").stat().st_size < 0.5 * (folder / "probe.npz").stat().st_size
    read = probe.read_probe(folder / "blocks.npz")
    assert list(read)[3:6] == ["transformer.resblocks.0", "transformer.resblocks.1", "ln_final"]
    assert minclip.compare(read, minclip.trace(params, read.tokens)).agrees
    name = "transformer.resblocks.1.mlp.c_proj.weight"
    port = minclip.trace(dict(params) | {name: params[name] * 2}, read.tokens)
    assert minclip.compare(read, port).first == "transformer.resblocks.1"


def test_a_probe_keeps_padding_for_ports_whose_states_count_it(files):
    _, folder = files
    read = probe.read_probe(folder / "probe.npz")
    after = ~stages.up_to_end(read.tokens)
    known = np.isfinite(read["ln_final"]).all(-1)
    assert (known & after).any(axis=-1).tolist() == [False, False, True, True, False, False, False]


def test_a_port_in_another_language_is_compared_from_its_file(files, capsys):
    params, folder = files
    with np.load(folder / "probe.npz") as probe:
        tokens = probe["tokens"]
    np.savez(folder / "port.npz", **minclip.trace_torch(transformers_model(params), tokens))
    assert cli.main(["compare", str(folder / "probe.npz"), str(folder / "port.npz")]) == 0
    assert capsys.readouterr().out.startswith("agrees: 30 of 37 stages")

    wrong = minclip.trace_torch(transformers_model(params, activation="gelu"), tokens)
    np.savez(folder / "wrong.npz", **wrong)
    command = ["compare", str(folder / "probe.npz"), str(folder / "wrong.npz")]
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert out.startswith("diverges first at transformer.resblocks.0.mlp.gelu")
    assert "errors of their own" not in out  # without the model nothing is shadowed
    assert cli.main([*command, "--model", str(folder / "model.safetensors")]) == 1
    assert "errors of their own are also in transformer.resblocks.1.mlp.gelu" in capsys.readouterr().out
    assert cli.main([*command, "--rtol", "0.5"]) == 0


def test_names_of_the_users_own_are_read_from_a_file(files, capsys):
    _, folder = files
    with np.load(folder / "probe.npz") as probe:
        np.savez(folder / "port.npz", out=probe["text_features"])
    (folder / "names.json").write_text(json.dumps({"out": "text_features"}))
    command = ["compare", str(folder / "probe.npz"), str(folder / "port.npz"), "--names"]
    assert cli.main([*command, str(folder / "names.json")]) == 0
    (folder / "names.json").write_text("{out: text_features}")
    assert cli.main([*command, str(folder / "names.json")]) == 1
    assert "names.json is not a JSON object of names" in capsys.readouterr().err


def test_a_file_that_is_no_probe_or_another_models_is_an_error_of_one_line(files, capsys):
    params, folder = files
    probe, model = str(folder / "probe.npz"), str(folder / "model.safetensors")
    other = str(folder / "other.safetensors")
    minclip.save({name: array * 2 for name, array in params.items()}, other)
    capsys.readouterr()
    for command, said in (
        (["compare", model, probe], "is not a probe"),
        (["compare", str(folder / "none.npz"), probe], "none.npz"),
        (["compare", probe, probe, "--model", other], "was written with another model"),
    ):
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_probe_that_cannot_be_written_leaves_nothing(files, monkeypatch):
    params, folder = files

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        probe.write_probe(folder / "never.npz", params)
    assert not list(folder.glob("never*"))
