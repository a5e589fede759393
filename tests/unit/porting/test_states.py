"""diagnose names the states that a port gives, and the mistake in them, from the states alone."""

import numpy as np
import pytest
import torch

import minclip
from minclip.cli import main
from minclip.porting.port import Port
from minclip.porting.which_states import STATE_CATALOGUE, STATE_FAULTS, Which, states_of
from tests.support.broken_port import BrokenPort
from tests.support.oracles import random_params, random_tokens, relative

V, L, END = 97, 24, 96
SIZES = dict(width=64, context=L, vocabulary=V)

# A port of SD 1.5's text encoder (no projection, padded with the end of text, the last states, normed) with
# ten mistakes: what is wrong in it, the blocks that it skips, and what diagnose must say.
MISTAKES = {
    "the last block is skipped": ((), 1, ["N7"]),
    "the states are not normed": (("no_final_norm",), 0, ["N5"]),
    "the states are those of SDXL": (("no_final_norm",), 1, ["N7", "N5"]),
    "padded with 0": (("padded_with_zero",), 0, ["D1-zero"]),
    "padding is masked": (("padding_masked",), 0, ["M7"]),
    "no causal mask": (("no_mask",), 0, ["M1"]),
    "erf GELU": (("erf",), 0, ["A1"]),
    "epsilon of layer norm": (("eps_1e-6",), 0, ["N1"]),
    "weight of attention's output transposed": (("out_transposed",), 0, ["T6-out"]),
    "positions counted from 1": (("positions_from_one",), 0, ["E2"]),
}


@pytest.fixture(scope="module")
def params():
    arrays = random_params(**SIZES, layers=3, embed=8)
    del arrays["text_projection"]
    return minclip.Params(arrays, activation="quick_gelu", heads=2)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens([7, 12, 9, L], context=L, vocabulary=V, pad=END)


def port_states(params, tokens, *bugs, skip=0):
    """The states of a port that shares no code with the catalogue."""
    state = {name: torch.from_numpy(array) for name, array in params.items()}
    return BrokenPort(state, params.heads, bugs=bugs).hidden_states(tokens, skip).numpy()


def ids(diagnosis):
    return [fault.id for fault in diagnosis.findings[0].faults] if diagnosis.findings else []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_port_of_sd_1s_text_encoder_is_named(params, tokens, mistake):
    bugs, skip, expected = MISTAKES[mistake]
    diagnosis = minclip.diagnose(params, tokens, port_states(params, tokens, *bugs, skip=skip))
    assert diagnosis.verdict == "known", diagnosis
    assert ids(diagnosis) == expected, diagnosis
    assert str(diagnosis).startswith("known: this explains the port's hidden states\n")


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_wanted_states_agree_and_the_call_that_gives_them_is_said(params, tokens, skip, norm):
    states = port_states(params, tokens, *[] if norm else ["no_final_norm"], skip=skip)
    diagnosis = minclip.diagnose(params, tokens, states, skip=skip, norm=norm)
    assert diagnosis.verdict == "agrees", diagnosis
    call = f"minclip.{Which(skip, norm).call}"
    assert any(f"{call}." in note for note in diagnosis.notes)
    ours = eval(call, {"minclip": minclip, "params": params, "tokens": tokens})
    assert relative(ours, states) < 1e-5


def test_wanted_states_of_sdxl_that_are_those_of_sd_1_are_a_finding(params, tokens):
    diagnosis = minclip.diagnose(params, tokens, port_states(params, tokens), skip=1, norm=False)
    assert ids(diagnosis) == ["N7-kept", "N5-normed"]
    remedy = diagnosis.findings[0].faults[0].remedy
    assert "minclip.hidden_states(params, tokens, skip=1, norm=False)" in remedy


@pytest.mark.parametrize(
    ("bugs", "skip", "expected"),
    [
        (("no_final_norm", "erf"), 1, ["N7", "N5", "A1"]),
        (("erf", "padded_with_zero"), 0, ["A1", "D1-zero"]),
        (("kqv", "padding_masked"), 1, ["N7", "T1-kqv", "M7"]),
    ],
)
def test_a_bug_is_found_in_other_states_and_with_other_padding(params, tokens, bugs, skip, expected):
    diagnosis = minclip.diagnose(params, tokens, port_states(params, tokens, *bugs, skip=skip))
    assert sorted(ids(diagnosis)) == sorted(expected), diagnosis


def test_layouts_order_scale_and_precision_are_seen_through(params, tokens):
    states = port_states(params, tokens)
    layouts = {
        "L B D": states.transpose(1, 0, 2),
        "B D L": states.transpose(0, 2, 1),
        "(B L) D": states.reshape(-1, 64),
    }
    for layout, array in layouts.items():
        diagnosis = minclip.diagnose(params, tokens, array)
        assert diagnosis.verdict == "agrees"
        assert f"The states were read as {layout}." in diagnosis.notes
    assert minclip.diagnose(params, tokens, states.astype(np.float16)).verdict == "agrees"
    assert minclip.diagnose(params, tokens[1], states[1]).verdict == "agrees"
    assert ids(minclip.diagnose(params, tokens, states[[1, 0, 3, 2]])) == ["R1"]
    assert ids(minclip.diagnose(params, tokens, 3 * states)) == ["N11"]
    cropped = minclip.diagnose(params, tokens[:3], states[:3, :12])
    assert cropped.verdict == "agrees"
    assert "The port gives the first 12 of 24 positions, and only these are compared." in cropped.notes


def test_states_without_a_finite_number_do_not_show_which_they_are(params, tokens):
    diagnosis = minclip.diagnose(params, tokens, np.full((*tokens.shape, 64), np.nan, np.float32))
    named = [[fault.id for fault in finding.faults] for finding in diagnosis.findings]
    assert named == [["M3"], ["M3-all"], ["M4-inverted"]]
    assert "the port's choice of states cannot be seen" in str(diagnosis)


def test_the_unknown_is_described(params, tokens):
    after = np.arange(L) > tokens.argmax(axis=-1)[:, None]
    states = port_states(params, tokens, skip=1)
    states[after] += 0.1
    diagnosis = minclip.diagnose(params, tokens, states)
    assert diagnosis.verdict == "unknown"
    assert "The nearest are the states after the last block but one, normed" in diagnosis.notes[0]
    assert any("Only positions after the end of text differ" in note for note in diagnosis.notes)
    later = port_states(params, tokens)
    later[:, 5:] *= 1.1
    notes = minclip.diagnose(params, tokens, later).notes
    assert any("Positions from 5 on differ, those before agree." in note for note in notes)


def bfloat16_states(params, tokens, *bugs):
    """The states, in float32, of a port that computes in bfloat16 inside."""
    state = {name: torch.from_numpy(array).bfloat16() for name, array in params.items()}
    return BrokenPort(state, params.heads, bugs=bugs).hidden_states(tokens).float().numpy()


def test_bfloat16_inside_hides_no_large_bug_and_excuses_no_error_at_some_positions(params, tokens):
    clean = bfloat16_states(params, tokens)
    assert minclip.diagnose(params, tokens, clean).verdict == "agrees"
    assert ids(minclip.diagnose(params, tokens, bfloat16_states(params, tokens, "no_mask"))) == ["M1"]
    some = port_states(params, tokens)
    some[:, 5:] *= 1.03  # as small as the rounding of bfloat16, but not everywhere
    diagnosis = minclip.diagnose(params, tokens, some)
    assert diagnosis.verdict == "unknown", diagnosis


def test_a_budget_ends_the_search(params, tokens):
    states = port_states(params, tokens) + 0.1
    diagnosis = minclip.diagnose(params, tokens, states, budget=0)
    assert diagnosis.verdict == "unknown"
    assert "The search stopped at its budget; a larger budget= extends the search." in diagnosis.notes


def test_every_fault_that_only_states_show_changes_them(params, tokens):
    full = minclip.Params(random_params(**SIZES, layers=3, embed=64), activation="quick_gelu", heads=2)
    for pad in (0, END):
        padded = random_tokens([7, 12, 9, L], context=L, vocabulary=V, pad=pad)
        clean = states_of(Port(full, padded))
        for fault in STATE_FAULTS:
            port = Port(full, padded)
            if fault.fits(port):
                fault.change(port)
                assert not np.array_equal(states_of(port)[Which()], clean[Which()]), fault.id
    assert len({fault.id for fault in STATE_CATALOGUE}) == len(STATE_CATALOGUE)


def test_an_output_of_no_layout_is_refused(params, tokens):
    with pytest.raises(ValueError, match=r"no layout of hidden states \[4, 24, 64\]"):
        minclip.diagnose(params, tokens, np.ones((4, 24, 63), np.float32))


def test_the_command_line_diagnoses_hidden_states(params, tokens, tmp_path, capsys):
    minclip.save(params, tmp_path / "tower.safetensors")
    port = tmp_path / "port.npz"
    np.savez(port, tokens=tokens, hidden_states=port_states(params, tokens, "no_final_norm", skip=1))
    command = ["diagnose", str(port), "--model", str(tmp_path / "tower.safetensors")]
    assert main(command) == 1
    assert "N7: the last block is skipped" in capsys.readouterr().out
    assert main([*command, "--skip", "1", "--no-norm"]) == 0
    assert "agrees: the port gives the reference's hidden states" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("skip", "norm", "expected"), [(1, True, ["N7"]), (0, False, ["N5"]), (2, False, ["N7", "N5"])]
)
@pytest.mark.parametrize("name", ["last_hidden_state", "hidden_states"])
def test_compare_says_which_states_a_port_gives(params, tokens, skip, norm, expected, name):
    states = port_states(params, tokens, *[] if norm else ["no_final_norm"], skip=skip)
    comparison = minclip.compare(minclip.trace(params, tokens), {name: states})
    assert comparison.first == "ln_final"
    assert [fault.id for fault in comparison.faults] == expected
    assert f"{expected[0]} explains every difference" in str(comparison)


def test_compare_says_that_padding_counts_in_hidden_states(params, tokens):
    states = port_states(params, tokens, "padded_with_zero")
    comparison = minclip.compare(minclip.trace(params, tokens), {"last_hidden_state": states})
    assert comparison.first is None
    assert any("as hidden states they count" in note for note in comparison.notes)


def test_a_tower_without_projection_has_a_probe(params, tmp_path, capsys):
    tower, probe, port = (str(tmp_path / name) for name in ("tower.safetensors", "probe.npz", "port.npz"))
    minclip.save(params, tower)
    assert main(["probe", "-o", probe, "--model", tower]) == 0
    with np.load(probe) as file:
        tokens = file["tokens"]
    padding = {int(row[-1]) for row in tokens if row.argmax() < L - 1}
    assert padding == {0, END}
    np.savez(port, tokens=tokens, last_hidden_state=port_states(params, tokens, skip=1))
    capsys.readouterr()
    assert main(["compare", probe, port, "--model", tower]) == 1
    assert "N7 explains every difference" in capsys.readouterr().out
    np.savez(port, tokens=tokens, last_hidden_state=port_states(params, tokens))
    assert main(["compare", probe, port, "--model", tower]) == 0


def test_the_pooled_rows_of_a_port_of_flux_are_diagnosed_without_a_projection(params, tokens):
    states = port_states(params, tokens)
    rows, end = np.arange(len(tokens)), tokens.argmax(axis=-1)
    assert minclip.diagnose(params, tokens, states[rows, end]).verdict == "agrees"
    assert ids(minclip.diagnose(params, tokens, states[rows, end - 1])) == ["P12-before"]
    erf = port_states(params, tokens, "erf")
    assert ids(minclip.diagnose(params, tokens, erf[rows, end])) == ["A1"]
