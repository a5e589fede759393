"""The English that users meet: no turns that a reader stumbles over, and sentences of a bearable length."""

import re
from pathlib import Path

import pytest

from tests.support import documents

ROOT = Path(__file__).parents[2]
PAGES = [
    *documents.PAGES,
    *("CONTRIBUTING.md", "lessons/README.md", "tests/README.md", "minclip/builtin/MODEL_CARD.md"),
]
LONGEST = 30  # words
BANNED = {
    "mend": r"\bmend(s|ed|ing)?\b",
    "hold against": r"\b(hold|holds|held|holding) (\S+ ){1,4}against\b",
    "turned over": r"\bturn(s|ed|ing)? over\b",
    "passed over": r"\bpassed over\b",
    "carries off": r"\bcarr(y|ies|ied) off\b",
    "what it is": r"\bwhat (it|they|the \w+) (\w+ ){0,2}(is|are)\b",
    "only when whole": r"\bonly when whole\b",
    "one a matrix": r"\bone (\w+ ){0,2}an? (GPU|core|row|matrix|process|machine)\b",
    "British spelling": r"\b(colour|behaviour|neighbour|favour|centre|grey|modelled|labelled)"
    r"|\b(normal|initial|recogn|quant|optim|serial|organ|token)is(e|ed|es|ing|ation)\b",
}


def sources():
    return [*sorted((ROOT / "minclip").rglob("*.py")), *(ROOT / page for page in PAGES)]


@pytest.mark.parametrize("turn", BANNED)
def test_no_banned_turn_is_left(turn):
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in sources()
        for match in re.finditer(BANNED[turn], " ".join(path.read_text("utf-8").split()), re.IGNORECASE)
    ]
    assert not found, f"say it plainly: {found}"


def sentences(markdown):
    """Yield the sentences of paragraphs, headings, list items and cells, without blocks of code."""
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    prose = re.sub(r"`[^`]*`", "code", prose)
    for part in re.split(r"\n\s*\n|^\s*[-*] |^\s*\d+\. |^#+ |\||\n(?=\s*[-*] )", prose, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?])[)*]*\s+", " ".join(part.split()))


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    found = [s for s in sentences((ROOT / page).read_text("utf-8")) if len(s.split()) > LONGEST]
    assert not found, f"over {LONGEST} words: {found}"


def test_long_sentences_and_banned_turns_would_be_found():
    page = "# A title\n\nOne. Two\nlines, [a link](to/a/page) and `much of code`.\n\n- " + "word " * 31 + "\n"
    assert [len(s.split()) for s in sentences(page) if s] == [2, 1, 6, 31]
    examples = {
        "mend": "It mends itself.",
        "hold against": "a reference to hold a port against",
        "turned over": "when it is turned over",
        "passed over": "Memory is passed over.",
        "carries off": "The mean carries off any shift.",
        "what it is": "what the file really is",
        "only when whole": "it has its name only when whole",
        "one a matrix": "one scale a matrix",
        "British spelling": "normalised in colour",
    }
    assert all(re.search(BANNED[turn], text) for turn, text in examples.items())
    assert examples.keys() == BANNED.keys()
