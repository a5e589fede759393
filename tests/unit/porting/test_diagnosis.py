"""minclip.diagnose names the bugs of ports that share no code with its catalogue, and no others."""

import gc
import weakref

import numpy as np
import pytest
import torch

import minclip
from minclip.cli import main
from minclip.porting.catalogue import CATALOGUE
from minclip.porting.dump import StagewiseSearch
from minclip.porting.faults import port_with
from minclip.porting.port import Port
from minclip.porting.probe import tokens_for
from minclip.porting.runs import Runs
from minclip.porting.search import Search
from minclip.porting.target import Target
from tests.benchmarks import diagnosis_table as table
from tests.support import oracles
from tests.support.broken_port import HARMLESS, SINGLES


@pytest.fixture(scope="module")
def params():
    return table.random_model(5, 64, 2, 3, 64)


@pytest.fixture(scope="module")
def tokens(params):
    return table.tokens_for(params, end_padded=(2, 4))


@pytest.fixture(scope="module")
def clean(params, tokens):
    return table.port_features(params, tokens)


@pytest.mark.parametrize("bug", sorted(SINGLES))
def test_a_single_bug_is_named_first(params, tokens, bug):
    if not table.visible(params, tokens, (bug,)):
        assert bug == "lexicographic"  # of three blocks, 0, 1, 2 is every order
        return
    diagnosis, _, place = table.trial(params, tokens, (bug,))
    assert diagnosis.verdict == "known"
    assert place == 1, diagnosis


@pytest.mark.parametrize(
    "bugs",
    [("erf", "no_mask"), ("kqv", "projection_transposed"), ("post_norm", "erf"), ("erf", "normalized")],
)
def test_two_bugs_are_named_together(params, tokens, bugs):
    diagnosis, _, place = table.trial(params, tokens, bugs)
    assert place == 1, diagnosis


def test_candidates_are_tried_on_a_text_that_shows_the_bug(params):
    tokens = tokens_for(params)
    port = port_with([fault for fault in CATALOGUE if fault.id == "M8"], params, tokens)
    target = Target(params, tokens, port.run())
    assert (target.tokens[target.rows[0], : target.length[target.rows[0]]] == 0).any()


def test_pairs_are_tried_in_parts_and_each_once(params, tokens):
    search = Search(target := Target(params, tokens, table.port_features(params, tokens, ("no_mask",))), None)
    search.runs = Runs(target, [fault for fault in CATALOGUE if fault.id[0] in "ATN"])
    tried = []
    search.try_pair = lambda pair: tried.append(pair)
    for most in (5, 5, 9):
        search.pairs(most)
    assert len(tried) == 9
    search.pairs()
    assert len(tried) == len(set(tried)) == len(search.pair_order) > 100


def test_features_of_another_width_are_tried_only_with_faults_that_give_that_width(tokens):
    params = table.random_model(5, 64, 2, 3, 48)
    features = table.port_features(params, tokens, ("projection_missing", "erf"))
    search = Search(target := Target(params, tokens, features), Runs(target))
    assert search.pair_order
    assert all("N8-missing" in {fault.id for fault in pair} for pair in search.pair_order)
    other = Target(params, tokens, features[:, :50])
    assert Search(other, Runs(other)).pair_order == []


@pytest.mark.parametrize("fault", CATALOGUE, ids=lambda fault: fault.id)
def test_a_port_frees_its_arrays_once_it_has_run(params, tokens, fault):
    """A search makes thousands of ports, each with weights of its own: none may wait for the collector."""
    if not fault.fits(Port(params, tokens)):
        return
    gc.disable()
    try:
        port = port_with([fault] if fault.change else [], params, tokens)
        alive = weakref.ref(port)
        port.run()
        del port
        assert alive() is None
    finally:
        gc.enable()


def test_no_alarm_on_ports_without_a_bug(params, tokens):
    for port, features in table.clean_ports(params, tokens).items():
        diagnosis = minclip.diagnose(params, tokens, features)
        assert diagnosis.verdict == "agrees", (port, diagnosis)
        assert not diagnosis.findings


def test_every_fault_moves_the_features_of_some_text(params, tokens):
    """All but the two paddings, which are there for what they do together with other faults."""
    other = table.random_model(6, 64, 4, 11, 48, activation="gelu")
    tokens = tokens[[2, 6, 7]]  # padded with the end of text; with an id 0; full
    for model in (params, other):
        reference = minclip.encode_text(model, tokens)
        for fault in CATALOGUE:
            port = Port(model, tokens)
            if fault.fits(port):
                fault.change(port)
                features = port.run()
                assert fault.id.startswith("D1-") or not np.array_equal(features, reference), fault.id
                assert features.dtype == np.float32, fault.id


def test_ids_are_unique_and_every_fault_says_what_to_do():
    assert len({fault.id for fault in CATALOGUE}) == len(CATALOGUE)
    for fault in CATALOGUE:
        assert fault.summary
        assert fault.remedy
        assert fault.source


def test_nothing_is_written_into_what_is_given(params, tokens, clean):
    arrays = {name: array.copy() for name, array in params.items()}
    ids, features = tokens.copy(), clean * 2
    minclip.diagnose(params, tokens, features)
    assert all(np.array_equal(params[name], array) for name, array in arrays.items())
    assert np.array_equal(ids, tokens)
    assert np.array_equal(features, clean * 2)


def test_normalized_shuffled_scaled_and_missing_rows_are_seen_through(params, tokens, clean):
    def ids(features):
        return [fault.id for fault in minclip.diagnose(params, tokens, features).findings[0].faults]

    broken = table.port_features(params, tokens, ("erf",))
    assert ids(minclip.normalize(clean)) == ["N10"]
    assert ids(minclip.normalize(broken)) == ["A1", "N10"]
    assert ids(clean[::-1]) == ["R1"]
    assert ids(broken[::-1]) == ["A1", "R1"]
    assert ids(100 * clean) == ["N11"]
    assert ids(100 * broken) == ["A1", "N11"]
    assert ids(broken[[1, 3, 6]]) == ["A1"]
    assert ids(table.port_features(params, tokens, ("no_mask",)).astype(np.float16))[0] == "M1"
    some = minclip.diagnose(params, tokens, clean[[0, 3, 6]])
    assert some.verdict == "agrees"
    assert "Rows of features: 3; texts: 8." in str(some)


def test_what_cannot_be_told_apart_is_said_with_the_probe_that_would(params, tokens):
    diagnosis, *_ = table.trial(params, tokens, ("pool_first",))
    said = [fault.id for finding in diagnosis.findings for fault in finding.faults]
    assert said[:2] == ["P1", "P4"]
    assert (
        'a text that holds id 2, "#", between words would tell it from P1'
        in diagnosis.findings[1].explanation
    )
    tied = str(diagnosis).split("cannot tell:\n")[1].splitlines()
    assert [line.split(":")[0] for line in tied] == said[1:]  # a line each


def test_the_unknown_is_described(params, tokens, clean, monkeypatch):
    monkeypatch.setattr("minclip.porting.search.Search.pairs", lambda search, most=None: [])
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0].astype(np.float32)
    lengths = np.linspace(1, 2, len(clean), dtype=np.float32)[:, None]
    some = clean.copy()
    some[2:] = np.nan
    full = tokens.argmax(axis=-1, keepdims=True) == tokens.shape[1] - 1
    cases = {
        "All inner products between texts agree": clean @ rotation,
        "only their lengths differ": clean * lengths,
        "NaN from row 2 on": some,
        "in another order: the columns": clean[:, ::-1],
        "plus the same vector": clean + clean[:1],
        "All rows are equal": np.tile(clean[3] + 1, (len(clean), 1)),
        "Texts with padding differ, those that fill the row agree": np.where(full, clean, clean[:, ::-1]),
        "Texts that fill the row differ, those with padding agree": np.where(full, clean[:, ::-1], clean),
    }
    for words, features in cases.items():
        diagnosis = minclip.diagnose(params, tokens, features)
        assert diagnosis.verdict == "unknown"
        assert words in str(diagnosis), (words, str(diagnosis))


@pytest.mark.parametrize("shape", [(64,), (48,), (None, 64)])
def test_an_output_of_zeros_is_no_known_bug(params, tokens, shape):
    zeros = np.zeros((len(tokens), *(size or tokens.shape[1] for size in shape)), np.float32)
    diagnosis = minclip.diagnose(params, tokens, zeros)
    assert (diagnosis.verdict, diagnosis.findings) == ("unknown", [])
    assert "the port never wrote its output" in str(diagnosis)


def test_a_dump_leads_from_bug_to_bug(params, tokens):
    port = Port(params, tokens)
    for fault in CATALOGUE:
        if fault.id in ("A1", "T1-kqv", "N8"):
            fault.change(port)
    stages = {}

    def tap(name, array):
        stages[name] = port.tap(name, array)
        return stages[name]

    features = port.run(tap)
    dump = {name: stage for name, stage in stages.items() if name.endswith(("attn.q", "mlp.gelu", "pooled"))}
    diagnosis = minclip.diagnose(params, tokens, features, trace=dump)
    assert {fault.id for fault in diagnosis.findings[0].faults} == {"A1", "T1-kqv", "N8"}
    assert "diverges at its first stage, transformer.resblocks.0.attn.q" in str(diagnosis)


def erf(model):
    for layer in text_model(model).encoder.layers:
        layer.mlp.activation_fn = torch.nn.GELU()


def keys_for_queries(model):
    for layer in text_model(model).encoder.layers:
        attention = layer.self_attn
        attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj


def no_positions(model):
    torch.nn.init.zeros_(text_model(model).embeddings.position_embedding.weight)


def text_model(model):
    return getattr(model, "text_model", model)


@pytest.mark.parametrize(
    ("break_it", "name", "stage"),
    [
        (erf, "A1", "transformer.resblocks.0"),
        (keys_for_queries, "T1-kqv", "transformer.resblocks.0"),
        (no_positions, "E1", "embedding"),
    ],
)
def test_a_dump_of_hugging_face_names_the_bug_and_later_ones_are_not_tried(
    params, tokens, monkeypatch, break_it, name, stage
):
    model = oracles.transformers_model(params, heads=params.heads)
    break_it(model)
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(tokens).long(), output_hidden_states=True)
    dump = {"hidden_states": output.hidden_states}
    diagnosis = minclip.diagnose(params, tokens, output.text_embeds, trace=dump)
    assert [fault.id for fault in diagnosis.findings[0].faults] == [name]
    assert f"diverges at {stage}." in str(diagnosis) or f"first stage, {stage}." in str(diagnosis)
    assert "explains every stage of the dump" in str(diagnosis)

    tried = set()
    error_at = StagewiseSearch.error_at

    def note(search, place, faults):
        tried.update(faults)
        return error_at(search, place, faults)

    monkeypatch.setattr(StagewiseSearch, "error_at", note)
    target = Target(params, tokens, output.text_embeds)
    chains, _ = StagewiseSearch(Search(target, Runs(target)), dump).chains
    assert name in {fault.id for fault in chains[0]}
    later = {"P1", "N5", "N8-missing", "N10"} | ({"A1", "M1", "T4"} if stage == "embedding" else set())
    assert not later & {fault.id for fault in tried}
    assert name in {fault.id for fault in tried}


def test_errors_name_what_does_not_fit(params, tokens, clean):
    with pytest.raises(ValueError, match="rows of features: 9, texts: 8"):
        minclip.diagnose(params, tokens, np.concatenate([clean, clean[:1]]))
    with pytest.raises(ValueError, match="must be floats"):
        minclip.diagnose(params, tokens, clean.astype(int))
    with pytest.raises(ValueError, match="dtype must be one of"):
        minclip.diagnose(params, tokens, clean, dtype="int8")


def test_the_command_line_prints_it_and_tells_by_its_status(tmp_path, capsys):
    model = minclip.load()
    tokens = minclip.tokenize(["a heron in shallow water", "three bicycles", "fog"])
    for bugs, status, words in (((), 0, "agrees"), (("erf",), 1, "A1: erf GELU")):
        np.savez(tmp_path / "port.npz", tokens=tokens, text_features=table.port_features(model, tokens, bugs))
        assert main(["diagnose", str(tmp_path / "port.npz")]) == status
        assert words in capsys.readouterr().out
    np.savez(tmp_path / "port.npz", tokens=tokens)
    assert main(["diagnose", str(tmp_path / "port.npz")]) == 1
    assert "text_features" in capsys.readouterr().err


@pytest.mark.deep
def test_the_whole_table_holds():
    assert len(SINGLES) >= 35
    assert len(table.PAIRS) >= 15
    assert HARMLESS
    assert all(diagnosis.verdict == "agrees" for *_, diagnosis in table.run_clean())
    for cases, share in (([(bug,) for bug in SINGLES], 0.95), (table.PAIRS, 0.8)):
        first, seen = np.sum([total[:2] for total in table.run_table(cases)[1].values()], axis=0)
        assert first >= share * seen
