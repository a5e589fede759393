"""tokenize gives the ids of clip.tokenize for every string."""

import functools
import gzip
import hashlib
import importlib.util
import random
import sys
import unicodedata
from pathlib import Path

import ftfy
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import minclip
from minclip import tokenizer
from tests.support.oracles import openai

# Published or well-known sequences without start and end. Each was run again with OpenAI's tokenizer.
KNOWN = {
    "a diagram": [320, 22697],
    "Hello World!": [3306, 1002, 256],
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A Photo of a TREE!": [320, 1125, 539, 320, 2677, 256],
    "it's a cat's toy, running   fast": [585, 568, 320, 2368, 568, 5988, 267, 2761, 1953],
    "2 dogs and 3 cats": [273, 3255, 537, 274, 3989],
    "I can't believe it's not butter": [328, 753, 713, 2649, 585, 568, 783, 6952],
    "email: user@example.com": [4462, 281, 7031, 287, 6228, 269, 2464],
    "3.14 is pi": [274, 269, 272, 275, 533, 5357],
    "MacBook Pro 16-inch": [20617, 2630, 272, 277, 268, 6523],
    "!!!": [995],
    "mobileclip": [9451, 944, 8546],
    "hatbox": [3447, 2063],
    "hat box": [3801, 2063],
    "café": [15304],
    "🐶": [10631],
    "": [],
    "     ": [],
    "Hello Båstad": [3306, 65, 23176, 16485],
    "Han likes eating pizza": [3565, 4724, 4371, 4474],
    "Jina rocks": [73, 1366, 6135],
    "A picture of a puppy.": [320, 1674, 539, 320, 6829, 269],
}

# Each string shows a known mistake of ports: no </w>, greedy matching, no lower-casing, contractions split,
# digits grouped, \w for letters, no byte encoder, no ftfy, no unescaping, special tokens split, case
# folding, IGNORECASE dropped, NFKC, separators that only `re` takes for white space, and more.
KILLERS = [
    "electroencephalography supercalifragilistic",
    "A photo of a Cat!",
    "You should've hello,world",
    "A123B 2023",
    "snake_case label",
    "x²y Ⅷa 2ⅷ ①②③",
    "½ ⅷ ²",
    "naïve café",
    "âœ” schÃ¶n",
    "it’s “quoted”",
    "ﬁne ｆｕｌｌ",
    "<b> AT&amp;T </b>",
    "a < b &amp;amp; c",
    "&lt;|endoftext|&gt;",
    "<|endoftext|> cat",
    "<|ENDOFTEXT|>cat<|startoftext|>",
    "<|ſtartoftext|>",
    "'ſ x'S 'LL",
    "İstanbul STRASSE straße",
    "\x1ca\x1fb\x00c\x85d\u2028e\u3000f",
    "\x1b[31mred\x1b[0m",
    "👩‍👩‍👧 🏳️‍🌈 é",
    "</w> a</w>b",
    "lone \ud800 surrogate",
    "a" * 301,
    "donaudampfschifffahrtsgesellschaftskapitänsmütze",
]


@functools.cache
def reference_tokenizer():
    """Return OpenAI's own tokenizer."""
    return openai("simple_tokenizer").SimpleTokenizer()


@pytest.fixture
def reference():
    return reference_tokenizer()


@pytest.mark.parametrize("text", KNOWN)
def test_published_sequences(text):
    ids = KNOWN[text]
    expected = [49406, *ids, 49407] + [0] * (75 - len(ids))
    assert minclip.tokenize(text).tolist() == [expected]


@pytest.mark.parametrize("text", KILLERS)
def test_strings_that_expose_a_wrong_tokenizer(text, reference):
    assert tokenizer.encode(text) == reference.encode(text)


def test_the_vocabulary_is_the_references(reference):
    assert len(tokenizer.spellings()) == 49408
    assert tokenizer.vocabulary() == reference.encoder


characters = st.characters(codec="utf-8")
fragments = st.one_of(
    st.text(characters),
    st.text("aAbB 'sStTſ&;<>|#0123456789\t\n\u00a0", max_size=40),
    st.sampled_from(["&amp;", "&lt;", "&#39;", "<|endoftext|>", "<|startoftext|>", "Ã©", "â€™", "’", "…"]),
)


@pytest.mark.parametrize("table", ["byte_characters", "ranks", "spellings", "vocabulary"])
def test_a_table_is_made_once(table):
    assert getattr(tokenizer, table)() is getattr(tokenizer, table)()


@pytest.mark.parametrize("spaces", ["  ", "\t", "\x1c", "\u3000", " \x85 "])
def test_words_that_repeat_keep_their_ids_whatever_separates_them(spaces, reference):
    text = spaces.join(["Cats'", "don't", "cats'", "<|endoftext|>", "don't", "x" * 40, "A1", ""] * 2)
    assert tokenizer.encode(text) == reference.encode(text)


@given(st.lists(fragments, max_size=8).map("".join))
def test_any_text_gives_the_references_ids(text):
    assert tokenizer.encode(text) == reference_tokenizer().encode(text)


ENTITIES = "&amp; &amp;amp; &lt;|endoftext|&gt; &#39; &#x27 &#0; &#xD800; &#128; &#1114112; &NoSuch; &"
WRECKS = (
    "Ã© â€™ â€œ ï»¿ Ã¢â‚¬Å“ Ð¿Ñ€Ð¸Ð²ÐµÑ‚ ‚±‚ñ‚É‚¿‚Í Â½ \u0092 ﬁ ﷺ ½ "
    "\x1b[1m <|startoftext|> <|EndOfText|> </w> 'ſ 'LL İ ß"
)
ODD = [*ENTITIES.split(), *WRECKS.split(), *"\0 \t \x1c \x85 \u2028 \u200d \ufeff \ufffd".split(" ")]


@functools.cache
def categories():
    """Return the characters of each general category, unassigned, private and surrogate ones included."""
    found = {}
    for code in range(sys.maxunicode + 1):
        found.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    return found


def hostile(draw):
    """Return a random string of up to six parts, each of a kind that breaks tokenizers."""
    kinds, marks = list(categories()), categories()["Mn"]
    parts = []
    for _ in range(draw.randrange(1, 7)):
        some = range(draw.randrange(1, 8))
        words = "".join(draw.choice("abcdefgh 'sS019&;.") for _ in some)
        match draw.randrange(8):
            case 0:
                parts.append(words)
            case 1:
                parts.append(draw.choice(ODD))
            case 2:
                parts += [draw.choice(categories()[draw.choice(kinds)]) for _ in some]
            case 3:
                parts.append("".join(c + draw.choice(marks) for c in words))
            case 4:  # UTF-8 decoded as another encoding, once or twice
                wreck = "".join(chr(draw.randrange(0xA0, 0x2100)) for _ in some)
                for _ in range(draw.randrange(1, 3)):
                    wreck = wreck.encode("utf-8").decode(
                        draw.choice(["latin-1", "cp1252", "cp1251"]), "replace"
                    )
                parts.append(wreck)
            case 5:  # a lone surrogate, or a pair that Python keeps as two characters
                parts.append(chr(draw.randrange(0xD800, 0xE000)) + draw.choice(["", "\udc36"]))
            case 6:
                parts += [chr(draw.randrange(draw.choice([128, 0x250, 0x3000, 0x110000]))) for _ in some]
            case 7:
                parts.append(f"&#{draw.choice(['', 'x'])}{draw.randrange(2**21):x}{draw.choice([';', ''])}")
    return "".join(parts)


def fuzz(count, seed):
    draw, reference = random.Random(seed), openai("simple_tokenizer").SimpleTokenizer()
    for _ in range(count):
        text = hostile(draw)
        assert tokenizer.encode(text) == reference.encode(text), ascii(text)


def test_hostile_strings_give_the_references_ids():
    fuzz(4000, seed=0)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(1, 21))
def test_a_million_hostile_strings_give_the_references_ids(seed):
    fuzz(50_000, seed)


def test_single_characters_of_the_first_plane_give_the_references_ids(reference):
    assert len(categories()) == 30
    for code in range(0, 0x10000, 7):  # every seventh; the deep test tries all
        assert tokenizer.encode(chr(code)) == reference.encode(chr(code)), hex(code)


@pytest.mark.deep
def test_every_single_character_gives_the_references_ids(reference):
    for code in range(sys.maxunicode + 1):
        text = f"a{chr(code)}b {chr(code)}"
        assert tokenizer.encode(text) == reference.encode(text), hex(code)


@pytest.mark.deep
@pytest.mark.parametrize(
    "part", ["a", "é", "!", "1", "\0", "ab ", "Ã©", "&amp;", "\ud800", "e\u0301", "\u200d", "東"]
)
def test_a_megabyte_gives_the_references_ids(part, reference):
    text = part * (2**20 // len(part))
    assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.deep
def test_a_megabyte_of_hostile_strings_gives_the_references_ids(reference):
    draw, parts, size = random.Random(0), [], 0
    while size < 2**20:
        parts.append(hostile(draw))
        size += len(parts[-1])
    assert tokenizer.encode(" ".join(parts)) == reference.encode(" ".join(parts))


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\ud83d\udc36 dog", "&#xD83D;", "&amp;#55357;x"])
def test_a_lone_surrogate_becomes_the_replacement_character_as_in_the_reference(text, reference):
    """ftfy and html.unescape replace a lone surrogate by U+FFFD, and a pair by its character."""
    assert tokenizer.encode(text) == reference.encode(text)
    assert ("\ufffd" in minclip.decode(minclip.tokenize(text))[0]) == ("dog" not in text)


def test_long_words_are_merged_as_in_the_reference(reference):
    draw = random.Random(1)
    for letters in ("ab", "aeinrst", "abcdefghijklmnopqrstuvwxyz"):
        word = "".join(draw.choices(letters, k=2000))
        assert tokenizer.encode(word) == reference.encode(word)


def test_tokens_are_int32_rows_of_the_context_length():
    tokens = minclip.tokenize(["a cat", ""], context_length=5)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[49406, 320, 2368, 49407, 0], [49406, 49407, 0, 0, 0]]
    assert minclip.tokenize([]).shape == (0, 77)
    assert minclip.tokenize(("a", "b")).shape == minclip.tokenize(c for c in "ab").shape == (2, 77)


def test_an_array_of_texts_is_a_list_and_an_array_of_no_axes_is_one_text():
    expected = minclip.tokenize(["a cat", "a dog"])
    np.testing.assert_array_equal(minclip.tokenize(np.array(["a cat", "a dog"])), expected)
    np.testing.assert_array_equal(minclip.tokenize(np.array("a cat")), expected[:1])


def test_padding_is_any_id_that_int32_holds():
    for pad in (0, 49407, 2**31 - 1):
        assert minclip.tokenize("", context_length=3, pad=pad).tolist() == [[49406, 49407, pad]]
    for pad in (-1, 2**31):
        with pytest.raises(ValueError, match=f"pad must be the id of a token, not {pad}"):
            minclip.tokenize("", pad=pad)


def test_a_text_of_75_ids_fits_and_one_of_76_does_not():
    assert minclip.tokenize("cat " * 75)[0, 76] == 49407
    with pytest.raises(
        ValueError, match=r"text 1 is 78 tokens long.*holds 77: .*truncate=True: 'cat cat.*\.\.\.'"
    ):
        minclip.tokenize(["a", "cat " * 76])


def test_truncation_keeps_the_start_of_the_text_and_the_end_id():
    tokens = minclip.tokenize("dog " + "cat " * 200, truncate=True)
    assert tokens.tolist() == [[49406, 1929, *[2368] * 74, 49407]]
    short = minclip.tokenize("a cat", truncate=True)
    assert short.tolist() == minclip.tokenize("a cat").tolist()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], "text 1 must be a str, not NoneType"),
        ([b"a"], "text 0 must be a str, not bytes"),
        (["a", ["b"]], "text 1 must be a str, not list"),
        ([[["a"]]], "text 0 must be a str, not list"),
        (["a", "b", float("nan")], "text 2 must be a str, not float"),
        (np.array([["a"]]), "text 0 must be a str, not ndarray"),
        (b"a cat", "texts must be a str or a list of str, not bytes"),
        (None, "texts must be a str or a list of str, not NoneType"),
        (3, "texts must be a str or a list of str, not int"),
    ],
)
def test_an_argument_that_is_not_text_raises_and_names_its_position(texts, message):
    with pytest.raises(TypeError, match=message):
        minclip.tokenize(texts)


def test_one_text_is_text_0_in_an_error():
    with pytest.raises(TypeError, match="text 0 must be a str, not NoneType"):
        tokenizer.encode(None)


def test_the_error_for_a_long_text_quotes_only_its_beginning():
    with pytest.raises(ValueError, match="text 2 is 1048578 tokens long") as raised:
        minclip.tokenize(["a", "b", "1" * 2**20])
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(("length", "shown"), [(9, 9), (60, 60), (61, 57)])
def test_the_error_for_a_long_text_quotes_up_to_60_characters(length, shown):
    text = ("a b c d " * 8)[:length]
    with pytest.raises(ValueError, match="truncate=True") as raised:
        minclip.tokenize(text, context_length=5)
    assert str(raised.value).endswith(f": {text[:shown] + '...' * (shown < length)!r}")


def test_a_context_that_cannot_hold_start_and_end_is_refused():
    assert minclip.tokenize("", context_length=2).tolist() == [[49406, 49407]]
    with pytest.raises(ValueError, match="not 1"):
        minclip.tokenize("a", context_length=1)


@pytest.mark.parametrize("text", ["a photo of a cat", "naïve café 🐶", "東京 tower", ""])
def test_decode_is_the_inverse(text):
    assert minclip.decode(minclip.tokenize(text)) == [text]
    assert minclip.decode(minclip.tokenize(text)[0]) == [text]


@given(st.lists(st.text(characters, max_size=15), max_size=4))
def test_decoding_and_tokenizing_again_gives_the_same_text(texts):
    tokens = minclip.tokenize(texts, context_length=300)
    again = minclip.decode(tokens)
    assume(all(ftfy.fix_text(a) == a for a in again))  # the space after a word can turn it into mojibake
    assert [a.split() for a in minclip.decode(minclip.tokenize(again, context_length=300))] == [
        a.split() for a in again
    ]


def test_decode_stops_at_the_first_end_id_and_replaces_broken_bytes():
    assert minclip.decode([[49406, 320, 49407, 2368, 49407], [320, 2368, 0, 0, 0]]) == ["a", "a cat !!!"]
    half = minclip.tokenize("東")[0, 1]
    assert "\ufffd" in minclip.decode([[half]])[0]
    with pytest.raises(ValueError, match="token id 49408 is outside the vocabulary, 0 to 49407"):
        minclip.decode([[3, 49408]])
    with pytest.raises(ValueError, match="token id -1 is outside the vocabulary"):
        minclip.decode([[-1, 3]])


def test_the_merges_are_rebuilt_from_the_public_file():
    public = Path(importlib.util.find_spec("clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    packed = public.read_bytes()
    assert hashlib.sha256(packed).hexdigest() == (
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    )
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + 48894]
    ours = Path(tokenizer.__file__).with_name("merges.txt.gz").read_bytes()
    assert gzip.decompress(ours).decode("utf-8") == "\n".join(lines) + "\n"
    assert len(ours) < 220_000
