"""The probe's texts: short strings on which every known tokenizer mistake shows."""

import json
from pathlib import Path
from typing import Any

from minclip.checkpoint.tensor_files import only_when_complete

TEXTS = (
    "",
    "a",
    "a photo of a cat",
    "A photo of a Cat!",
    "supercalifragilistic electroencephalography",
    "It's Bob's; we'll say they've, I'm, you're, he'd, can't",
    "hello,world (really?!) ...",
    "!",
    "! !! !!!",
    "wow!?",
    "call 555-0123 in A123B",
    "snake_case __init__ _",
    "x²y ½ ⅷ Ⅷa 2Ⅷ ①②③",
    "१२ ٣٤ 5６",
    "naïve café",
    "cafe\u0301 nai\u0308ve",
    "e\u0323\u0301x q\u0307",
    "हिन्दी ไม่",
    "Ελλάδα ΟΔΟΣ",
    "İstanbul",
    "STRASSE straße GROẞ",
    "ÀÉÎÕÜ Ž Я",
    "東京 tower 塔",
    "a東b",
    "🐶 🎉🎉🎉",
    "👩‍👩‍👧 🏳️‍🌈 ❤️",
    "¡hola! «oui» £5 §",
    "ł đ ŋ",
    "âœ” schÃ¶n",
    "it’s “quoted”",
    "ﬁne ｆｕｌｌ ２",
    "ﬅ ㎏ ™",
    "'ſ x'ſ 'S",
    "<b> AT&amp;T </b>",
    "a < b &amp;amp; c",
    "&lt;|endoftext|&gt;",
    "AT&amp;T",
    "<|endoftext|> cat",
    "dog <|startoftext|>",
    "<|ENDOFTEXT|>",
    "<start_of_text> a <end_of_text>",
    "startoftext <<|>>",
    "one\ntwo\r\nthree\tfour",
    "a\u00a0b\u3000c\u2028d",
    "a\x1cb\x1f c",
    "aaaa hahahaha bbbbbb",
    "### #: #... #@",
    "in thinking king",
    "the quick brown fox jumps",
    "jekyll",
    "~ ^ ` | $ % @",
    "</w> a</w>b",
    "  spaces   around  ",
    "'tis 'sup",
    " ".join("abcdefghijklmnopqrstuvwxyz" * 4),
)


def probe_texts() -> list[str]:
    """Return texts that tell a wrong tokenizer from a right one: at most 60 short strings.

    One text is longer than the context of 77 tokens, which `clip.tokenize` refuses unless told to truncate.
    Run a tokenizer on the texts and give its ids to `minclip.diagnose_tokens`. `minclip probe --texts`
    writes the texts as JSON, for a tokenizer in any language.

    >>> texts = probe_texts()
    >>> len(texts) <= 60
    True
    """
    return list(TEXTS)


def write_texts(path: str | Path) -> None:
    """Write the probe's texts to a JSON file: an object with the list "texts".

    The file appears at path only once it is complete.
    """
    with only_when_complete(path) as partial:
        Path(partial).write_text(json.dumps({"texts": probe_texts()}, indent=0) + "\n", encoding="ascii")


def read_ids(path: str | Path) -> tuple[list[str], list[Any]]:
    """Return the texts and a port's ids from a JSON file.

    The file holds an object with the lists "texts" and "ids", or "ids" alone for the probe's texts, or the
    list of ids itself. Raises OSError or ValueError where it cannot be read.
    """
    try:
        read = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {str(error)[:80]}") from None
    read = {"ids": read} if isinstance(read, list) else read
    if not isinstance(read, dict) or not isinstance(read.get("ids"), list):
        raise ValueError(f'{path} has no "ids": give a list with the ids of each text, or {{"texts", "ids"}}')
    texts = read.get("texts", probe_texts())
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'"texts" of {path} must be a list of strings')
    return texts, read["ids"]
