"""diagnose_tokens names the mistakes that turn OpenAI's ids into a port's."""

import itertools
import json
import random

import numpy as np
import pytest

import minclip
from minclip import cli, tokenizer
from minclip.porting.tokens.diagnosis import diagnose_tokens
from minclip.porting.tokens.faults import CATALOGUE
from minclip.porting.tokens.port import REFERENCE, Memory, TokenizerPort
from minclip.porting.tokens.rows import overlapping
from tests.support.oracles import openai
from tests.unit.test_tokenizer import KILLERS, hostile

TEXTS = minclip.probe_texts()
FAULTS = {fault.id: fault for fault in CATALOGUE}


def port_rows(*ids, texts=TEXTS, length=77):
    """Return a port's rows of texts, with these faults put in."""
    port = TokenizerPort([FAULTS[id] for id in ids])
    return [port.row(text, length) for text in texts]


def named(diagnosis):
    """Return the ids of the faults of the first finding, as a set."""
    return {fault.id for fault in diagnosis.findings[0].faults} if diagnosis.findings else set()


def hostile_texts(count, seed):
    draw = random.Random(seed)
    return [hostile(draw) for _ in range(count)]


# The reference in steps, and mistakes as others published them.


def test_the_reference_in_steps_gives_openais_ids():
    port, reference = TokenizerPort(), openai("simple_tokenizer").SimpleTokenizer()
    for text in [*KILLERS, *TEXTS, *hostile_texts(1500, seed=11)]:
        assert port.content(text) == reference.encode(text), ascii(text)


@pytest.mark.parametrize(
    ("fault", "text", "ids"),
    [
        # CrispEmbed#30
        ("K1-gpt2", "a photo of a fox", [64, 220, 1153, 220, 684, 220, 64, 220, 5007]),
        # diffusers#4153
        ("K10-pad", "! !! !!!", [0] * 6),
        # openai/CLIP#8, with the start of text before it
        (
            "K17",
            "The key is What will be Covid-19's long-term global economic impact?",
            [
                *(49406, 518, 1458, 533, 768, 751, 655, 622, 9284, 268, 272, 280, 568, 1538, 268),
                *(4780, 2779, 5259, 3844, 30, 27, 347, 40786, 4160, 91, 285),
            ],
        ),
    ],
)
def test_a_fault_gives_the_ids_that_were_reported(fault, text, ids):
    assert TokenizerPort([FAULTS[fault]]).content(text) == ids


def test_padding_before_the_end_gives_the_row_that_was_reported():
    """The row is that of keras-hub#2018."""
    (row,) = port_rows("P10", texts=["a cat sitting on the table"])
    assert row == [49406, 320, 2368, 4919, 525, 518, 2175, *[0] * 69, 49407]


# The catalogue.


def test_the_catalogue_is_complete_and_changes_only_steps_that_exist():
    assert len(FAULTS) == len(CATALOGUE) >= 35
    for fault in CATALOGUE:
        assert all((fault.summary, fault.source, fault.remedy, fault.change))
        assert fault.change.keys() <= REFERENCE.keys()


@pytest.mark.parametrize("id", FAULTS)
def test_each_mistake_alone_is_named_first_on_the_probes_texts(id):
    diagnosis = diagnose_tokens(TEXTS, port_rows(id))
    assert diagnosis.verdict == "known"
    assert named(diagnosis) == {id}
    assert diagnosis.error > 0


def test_no_fault_raises_on_hostile_strings():
    texts = [*hostile_texts(60, seed=14), "\ud800", "\udc36 x", "\0", "\ufdd0", "\ue000<|ENDOFTEXT|>"]
    for fault in CATALOGUE:
        port = TokenizerPort([fault, FAULTS["K8-none"]] if "repair" not in fault.change else [fault])
        assert all(isinstance(id, int) for text in texts for id in port.row(text)), fault.id


def equivalent(a, b):
    """Return whether two sets of faults give the same ids for every text tried."""
    a, b = TokenizerPort(a), TokenizerPort(b)
    return all(a.row(text) == b.row(text) for text in TEXTS)


def test_pairs_of_mistakes_are_named():
    pairs = [pair for pair in itertools.combinations(CATALOGUE, 2) if not overlapping(pair)]
    tried = random.Random(5).sample(pairs, 25)
    right = 0
    for pair in tried:
        diagnosis = diagnose_tokens(TEXTS, port_rows(*(fault.id for fault in pair)))
        assert diagnosis.verdict == "known"
        assert equivalent(diagnosis.findings[0].faults, pair)
        right += named(diagnosis) == {fault.id for fault in pair}
    assert right >= 0.85 * len(tried)


@pytest.mark.parametrize(
    "ids",
    [("K8-none", "K9-none", "K12"), ("K1", "K3", "K6-underscore"), ("D6-no-start", "K5", "K11-casefold")],
)
def test_three_mistakes_together_are_named(ids):
    assert named(diagnose_tokens(TEXTS, port_rows(*ids))) == set(ids)


def test_five_mistakes_of_a_real_port_are_named():
    ids = {"K8-NFC", "K9-none", "K11-sigma", "K12", "K10-case"}  # of transformers 5
    assert named(diagnose_tokens(TEXTS, port_rows(*ids))) == ids


# Rows.


@pytest.mark.parametrize("length", [0, 77, 100])
def test_ragged_and_padded_rows_of_a_correct_tokenizer_agree(length):
    diagnosis = diagnose_tokens(TEXTS, port_rows(length=length))
    assert (diagnosis.verdict, diagnosis.findings, diagnosis.error) == ("agrees", [], 0)
    assert diagnosis.first is diagnosis.smallest is None


def test_arrays_and_single_texts_are_read():
    tokens = minclip.tokenize(TEXTS[:9])
    assert diagnose_tokens(TEXTS[:9], tokens).verdict == "agrees"
    assert diagnose_tokens(TEXTS[:9], tokens.astype(np.float64)).verdict == "agrees"
    assert diagnose_tokens("a cat", [49406, 320, 2368, 49407]).verdict == "agrees"
    assert diagnose_tokens("a cat", minclip.tokenize("a cat")).verdict == "agrees"


def test_any_id_of_padding_is_read_and_named():
    diagnosis = diagnose_tokens(TEXTS, [[*row, *[7] * (90 - len(row))] for row in port_rows("K3", length=0)])
    assert named(diagnosis) == {"D1-other", "K3"}
    assert "padded with the id 7" in str(diagnosis)


def test_padding_that_is_meant_is_no_mistake():
    rows = port_rows("D1-end")
    assert named(diagnose_tokens(TEXTS, rows)) == {"D1-end"}
    assert diagnose_tokens(TEXTS, rows, pad=49407).verdict == "agrees"
    assert diagnose_tokens(TEXTS, minclip.tokenize(TEXTS, truncate=True, pad=49407), pad=49407).error == 0


def test_a_text_that_the_port_refused_is_left_out():
    rows = port_rows("K5", length=0)
    rows[-1] = None
    diagnosis = diagnose_tokens(TEXTS, rows)
    assert named(diagnosis) == {"K5"}
    assert f"The port gave no ids for 1 of {len(TEXTS)} texts." in diagnosis.notes


@pytest.mark.parametrize(
    ("texts", "ids", "message"),
    [
        (["a", "b"], [[1]], "rows of ids: 1, texts: 2"),
        ([], [], "rows of ids: 0, texts: 0"),
        (["a"], [["b"]], "row 0 of ids holds 'b'"),
        (["a"], [[1.5]], r"row 0 of ids holds 1\.5"),
        (["a"], [[float("nan")]], "row 0 of ids holds nan"),
        (["a"], [[True]], "row 0 of ids holds True"),
        (["a"], [[2**31]], "holds 2147483648, which is no 32-bit id"),
        (["a"], ["1"], "row 0 of ids must be a list of integers, not str"),
        (["a"], [None], "no ids for any text"),
    ],
)
def test_ids_that_cannot_be_read_are_refused_with_the_place(texts, ids, message):
    with pytest.raises(ValueError, match=message):
        diagnose_tokens(texts, ids)


def test_texts_that_are_no_strings_are_refused():
    with pytest.raises(TypeError, match="text 1 must be a str, not int"):
        diagnose_tokens(["a", 3], [[1], [2]])


# Verdicts.


def test_no_correct_ids_of_hostile_strings_raise_an_alarm():
    texts = hostile_texts(3000, seed=12)
    assert diagnose_tokens(texts, minclip.tokenize(texts, truncate=True)).verdict == "agrees"


@pytest.mark.deep
def test_no_correct_ids_of_100_000_hostile_strings_raise_an_alarm():
    texts = hostile_texts(100_000, seed=13)
    assert diagnose_tokens(texts, minclip.tokenize(texts, truncate=True)).verdict == "agrees"


def test_an_unknown_tokenizer_is_unknown():
    draw = random.Random(2)
    rows = [[draw.randrange(32000) for _ in range(len(text) // 3)] + [1] for text in TEXTS]
    diagnosis = diagnose_tokens(TEXTS, rows)
    assert (diagnosis.verdict, diagnosis.findings, diagnosis.error) == ("unknown", [], 1)
    assert diagnosis.smallest.part == "a"


def test_the_smallest_part_that_no_mistake_explains_is_shown():
    texts = ["a photo of a cat in Paris", "two dogs and a café", "a dog"]
    rows = minclip.tokenize(texts).tolist()
    rows[1][5:7] = [66, 49407]  # "c" in place of "café</w>", and the end
    diagnosis = diagnose_tokens(texts, rows)
    assert diagnosis.verdict == "unknown"
    assert (diagnosis.smallest.index, diagnosis.smallest.part) == (1, "café")
    assert diagnosis.smallest.expected == ("cafÃ©</w>",)
    assert diagnosis.smallest.found == ("c",)
    assert "'c' in the port, 'cafÃ©</w>' in the reference" in str(diagnosis)


def test_long_texts_are_compared_but_no_mistakes_are_tried_on_them():
    texts = ["a" * 5000, "word " * 10_000]
    rows = minclip.tokenize(texts, truncate=True)
    assert diagnose_tokens(texts, rows).verdict == "agrees"
    rows[1, 5] = 7
    diagnosis = diagnose_tokens(texts, rows)
    assert diagnosis.verdict == "unknown"
    assert "No mistakes were tried on 1 of the texts that differ" in str(diagnosis)


def test_the_first_difference_is_shown_as_pieces():
    diagnosis = diagnose_tokens(TEXTS, port_rows("K7-dropped", length=0))
    first = diagnosis.first
    assert (first.index, first.text) == (12, TEXTS[12])
    assert first.expected[:3] == ("Â²</w>", "y</w>", "Â½</w>")
    assert first.found[:3] == ("²</w>", "y</w>", "½</w>")
    assert "text 12, 'x²y" in str(diagnosis)


def test_known_mistakes_that_explain_only_some_texts_are_told():
    rows = port_rows("K5", "K3")
    rows[2] = [49406, 5, 5, 5, 49407, *[0] * 72]
    diagnosis = diagnose_tokens(TEXTS, rows)
    assert diagnosis.verdict == "unknown"
    assert diagnosis.smallest.text == TEXTS[2]
    assert any("K3, " in note and "K5, " in note for note in diagnosis.notes)


def test_mistakes_that_the_texts_cannot_tell_apart_are_told_with_a_text_that_would():
    diagnosis = diagnose_tokens("A123B", port_rows("K5", texts=["A123B"])[0])
    assert named(diagnosis) == {"K5"}
    tied = [finding for finding in diagnosis.findings[1:] if "would tell it from K5" in finding.explanation]
    assert len(tied) == len(diagnosis.findings) - 1


def test_a_diagnosis_never_prints_control_characters_of_a_text():
    texts = ["\x1b[31mRed\x07\u202e", "a cat"]
    diagnosis = diagnose_tokens(texts, [[49406, 5, 49407], [49406, 320, 2368, 49407]])
    assert diagnosis.verdict == "unknown"
    assert not set("\x1b\x07\u202e") & set(str(diagnosis))
    assert "\\x1b[31mRed" in str(diagnosis)


def test_a_diagnosis_becomes_plain_values():
    told = diagnose_tokens(TEXTS, port_rows("K5", "D7")).to_dict()
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(told))
    assert {fault["id"] for fault in told["findings"][0]["faults"]} == {"K5", "D7"}
    assert told["first"]["text"] in TEXTS


def test_ports_that_share_a_memory_keep_their_own_ids():
    memory = Memory()
    for id, fault in FAULTS.items():
        alone, together = TokenizerPort([fault]), TokenizerPort([fault], memory)
        for text in ("Straße 123", "<|endoftext|> it's", "naïve café ½"):
            assert alone.row(text) == together.row(text), id


# Beside features.


def test_diagnose_says_first_that_the_ids_of_a_dump_already_differ():
    params = minclip.load()
    tokens = np.array(port_rows("K3", texts=["A cat", "Two dogs", "a bird"]))
    features = minclip.encode_text(params, tokens)
    texts = np.array(["A cat", "Two dogs", "a bird"])
    diagnosis = minclip.diagnose(params, tokens, features, trace={"texts": texts})
    assert diagnosis.verdict == "agrees"
    assert diagnosis.notes[0].startswith("Your ids already differ from OpenAI's: K3, no lower-casing.")

    probe = {"texts": np.array(TEXTS), "ids": np.array(port_rows("K5"))}
    assert "K5, " in minclip.diagnose(params, tokens, features, trace=probe).notes[0]
    right = {"texts": np.array(TEXTS), "ids": np.array(port_rows("D1-end"))}  # only padded otherwise
    notes = minclip.diagnose(params, tokens, features, trace=right).notes
    assert not any("ids" in note for note in notes)


def test_texts_and_ids_in_a_dump_do_not_disturb_compare_and_diagnose():
    params, tokens = minclip.load(), minclip.tokenize(["a cat", "two dogs", "it"])
    reference = minclip.trace(params, tokens)
    port = {**reference, "texts": np.array(TEXTS), "ids": np.array(port_rows())}
    assert minclip.compare(reference, port).first is None
    diagnosis = minclip.diagnose(params, tokens, port["text_features"], trace=port)
    assert diagnosis.verdict == "agrees"


# The command line.


def test_diagnose_tokens_from_the_command_line(tmp_path, capsys):
    texts, ids = tmp_path / "texts.json", tmp_path / "ids.json"
    assert cli.main(["probe", "--texts", "-o", str(texts)]) == 0
    written = json.loads(texts.read_text(encoding="utf-8"))
    assert written == {"texts": TEXTS}

    ids.write_text(json.dumps(port_rows(length=0)), encoding="utf-8")
    assert cli.main(["diagnose-tokens", str(ids)]) == 0
    ids.write_text(json.dumps(written | {"ids": port_rows("K5")}), encoding="utf-8")
    assert cli.main(["diagnose-tokens", str(ids)]) == 1
    assert "K5: digits are grouped" in capsys.readouterr().out
    assert cli.main(["diagnose-tokens", str(ids), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "known"


@pytest.mark.parametrize(
    "content", ["{", "[" * 10**5, "3", '{"ids": 3}', '{"ids": [], "texts": [3]}', "[[1]]"]
)
def test_a_file_that_holds_no_ids_is_one_line_of_error(tmp_path, capsys, content):
    path = tmp_path / "ids.json"
    path.write_text(content, encoding="utf-8")
    assert cli.main(["diagnose-tokens", str(path)]) == 1
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("minclip: ")
    assert error.count("\n") == 1


def test_tokenize_from_the_command_line_shows_ids_and_pieces(capsys):
    assert cli.main(["tokenize", "a Café", "\x1b[31mred"]) == 0
    out = capsys.readouterr().out
    assert "'a Café': 4 tokens\n  ids     49406 320 15304 49407\n" in out
    assert "  pieces  <|startoftext|> a</w> cafÃ©</w> <|endoftext|>\n" in out
    assert "\x1b" not in out
    assert tokenizer.spellings()[15304] == "cafÃ©</w>"
