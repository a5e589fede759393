"""The catalogue of tokenizer mistakes, each as a small change of the reference tokenizer's steps.

`change` names the steps of minclip/porting/tokens/port.py that a port replaced, and what it put there:

    TokenFault("K3", "no lower-casing", ..., {"fold": same})

A fault's source names a project and a thread (`#n` is an issue or pull request there) or a file.
"no public thread known" marks mistakes that are easily made, but that we have not seen in a thread or a file.
Ids are those of the port-bug catalogue: K tokenizer, D padding and special ids, P position of the end.
"""

import functools
import html
import re
import struct
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import regex

from minclip import tokenizer
from minclip.porting.faults import Fault
from minclip.porting.tokens.port import (
    END_ID,
    SPECIAL_IDS,
    START_ID,
    end_word,
    number_piece,
    same,
    spell_bytes,
)
from minclip.tokenizer import END, START, WORD_END


@dataclass(frozen=True)
class TokenFault(Fault):
    """A mistake of the tokenizer. Its change is a dict from names of steps to what replaces them."""

    change: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # type: ignore[assignment]


# Steps that ports put in place of the reference's.


def fix_encoding(text):
    import ftfy  # here, because it takes time to import

    return ftfy.fix_encoding(text)


def basic_clean(text):
    """Clean text as BERT's BasicTokenizer does: no control characters, spaces around CJK ideographs."""
    cleaned = []
    for c in unicodedata.normalize("NFC", text):
        if c in "\t\n\r " or unicodedata.category(c) == "Zs":
            cleaned.append(" ")
        elif not unicodedata.category(c).startswith("C") and c != "\ufffd":
            cleaned.append(f" {c} " if is_ideograph(c) else c)
    return "".join(cleaned)


def is_ideograph(c):
    ranges = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2CEAF), (0x2F800, 0x2FA1F))
    return any(first <= ord(c) <= last for first, last in ranges)


ASCII_SPACES = r"\t-\r "


def spaces_among(white):
    """Return the step that collapses white space of these characters alone."""
    pattern = regex.compile(f"[{white}]+")
    return lambda text: pattern.sub(" ", text).strip(" ")


def without_newlines(text):
    """Keep the first character of each run of white space, then delete line breaks."""
    return regex.sub(r"(\s)\s+", r"\1", text).strip().replace("\n", "").replace("\r", "")


def lower_ascii(text):
    return "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in text)


def lower_each(text):
    """Lower-case character by character, so that a final sigma becomes an ordinary one."""
    return "".join(map(str.lower, text))


def lower_one_to_one(text):
    """Lower-case character by character with Unicode's simple mapping: İ becomes i without its dot."""
    return "".join(c.lower()[0] for c in text)


def strip_accents(text):
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def spell_latin1(word):
    """Take each character below U+0100 for a byte and drop the others."""
    letters = tokenizer.byte_characters()
    return [letters[ord(c)] for c in word if ord(c) < 256]


def spell_utf16(word):
    """Write each UTF-16 code unit as UTF-8, so that an emoji becomes six bytes."""
    encoded = word.encode("utf-16-le", errors="surrogatepass")
    units = struct.unpack(f"<{len(encoded) // 2}H", encoded)
    letters = tokenizer.byte_characters()
    return [letters[b] for unit in units for b in chr(unit).encode("utf-8", errors="surrogatepass")]


def spell_unshifted(word):
    """Write each byte as the character of the same number, where GPT-2's table shifts 68 of them."""
    return [chr(b) for b in word.encode("utf-8", errors="surrogatepass")]


def number_unshifted(piece):
    """Number pieces of `spell_unshifted`. Only single bytes can hold a character that the table shifts."""
    base, suffix = (piece[:-4], WORD_END) if piece.endswith(WORD_END) else (piece, "")
    if len(base) == 1 and ord(base) < 256:
        base = tokenizer.byte_characters()[ord(base)]
    return (tokenizer.vocabulary()[base + suffix],)


def number_or_end(piece):
    """Number a piece, or give the end id where the vocabulary does not hold it."""
    return (tokenizer.vocabulary().get(piece, END_ID),)


def number_bytes_in_order(piece):
    """Number single bytes by their value, where the reference begins with the printable ones."""
    byte_of = {c: b for b, c in tokenizer.byte_characters().items()}
    return tuple(id if id >= 512 else byte_of[piece[0]] + 256 * (id >= 256) for id in number_piece(piece))


def shift_merges(piece, by):
    """Number a piece where all merges lie a few places further on in the vocabulary."""
    return tuple(id + by * (id >= 512) for id in number_piece(piece))


def mark_end_in_text(symbols):
    """Append </w> as four symbols of its own."""
    return [*symbols, *WORD_END]


def end_word_of_several(symbols):
    return end_word(symbols) if len(symbols) > 1 else symbols


def longest_pieces(symbols):
    """Take the longest piece of the vocabulary, again and again from the left."""
    pieces, known = [], tokenizer.vocabulary()
    longest = max(map(len, known))
    while symbols:
        for n in range(min(len(symbols), longest), 0, -1):
            if n == 1 or "".join(symbols[:n]) in known:
                pieces.append("".join(symbols[:n]))
                symbols = symbols[n:]
                break
    return pieces


def word_or_longest_pieces(symbols):
    """Look the word up with </w>, and only where that fails take the longest pieces, without </w>."""
    if "".join(symbols) in tokenizer.vocabulary():
        return ["".join(symbols)]
    return longest_pieces([symbol.removesuffix(WORD_END) for symbol in symbols])


def merge_leftmost(symbols):
    """Join the leftmost pair that is in the list of merges, whatever its rank."""
    ranks = tokenizer.ranks()
    while True:
        for i in range(len(symbols) - 1):
            if (symbols[i], symbols[i + 1]) in ranks:
                symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
                break
        else:
            return symbols


def merge_with(ranks, symbols, rightmost=False):
    """Join neighbors by rank, of equals the leftmost or the rightmost."""
    while True:
        places = range(len(symbols) - 1, -1, -1) if rightmost else range(len(symbols) - 1)
        pairs = [(ranks.get((symbols[i], symbols[i + 1])), i) for i in places if i + 1 < len(symbols)]
        known = [(rank, i) for rank, i in pairs if rank is not None]
        if not known:
            return symbols
        i = min(known, key=lambda pair: pair[0])[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


@functools.cache
def ranks_without(kind):
    """Return the ranks without the first merge, the last merge, or merges that begin with #."""
    ranks = tokenizer.ranks()
    lost = {"first": lambda i, pair: i == 0, "last": lambda i, pair: i == len(ranks) - 1}
    drop = lost.get(kind, lambda i, pair: pair[0].startswith("#"))
    return {pair: i for pair, i in ranks.items() if not drop(i, pair)}


def merge_rightmost(symbols):
    return merge_with(tokenizer.ranks(), symbols, rightmost=True)


def merge_without_first(symbols):
    return merge_with(ranks_without("first"), symbols)


def merge_without_last(symbols):
    return merge_with(ranks_without("last"), symbols)


def merge_without_comments(symbols):
    return merge_with(ranks_without("#"), symbols)


def to_float16(id):
    return int(struct.unpack("e", struct.pack("e", id))[0])


def to_int16(id):
    return id - 65536 if id >= 32768 else id


# Two noncharacters stand for special tokens that were in lower case before lower-casing.
IN_LOWER_CASE = {START: "\ufdd0", END: "\ufdd1"}


def mark_lower_case(text):
    """Replace special tokens in lower case by the characters of IN_LOWER_CASE."""
    return text.replace(START, IN_LOWER_CASE[START]).replace(END, IN_LOWER_CASE[END])


def spell_without_space(word):
    """Drop the space that GPT-2's pattern leaves at the beginning of a word."""
    return spell_bytes(word.replace(" ", ""))


def special_characters(word):
    """Give a special token as the ids of its characters."""
    return tuple(tokenizer.vocabulary()[c] for c in word) if word in SPECIAL_IDS else None


def specials(ids):
    """Return the step that gives these ids to these words, and None to any other."""
    return ids.get


def cut_end_too(ids, end, limit):
    return ids[:limit]


def cut_head(ids, end, limit):
    """Keep the start id and the tail."""
    return ids if len(ids) <= limit else [ids[0], *ids[len(ids) - limit + 1 :]]


def cut_nothing(ids, end, limit):
    return ids


# Letters, digits and the rest, for patterns that differ in all of them.
ASCII_PATTERN = {"letters": "[a-zA-Z]+", "digits": "[0-9]"}
NO_SPECIALS = {"special_pattern": "", "special": {}.get}

CATALOGUE = (
    # clean
    TokenFault(
        "K8-none",
        "ftfy.fix_text is missing",
        "instant-clip-tokenizer lib.rs; mlx-examples tokenizer.py; clip-bpe-js mod.js; pytorch/text#1692",
        "call ftfy.fix_text (6.3) on the text first, or port what it does to your texts",
        {"repair": same},
    ),
    TokenFault(
        "K8-NFC",
        "NFC normalization in place of ftfy.fix_text",
        "transformers tokenization_clip.py, the normalizer of the fast tokenizer",
        "call ftfy.fix_text (6.3) on the text first, or port what it does to your texts",
        {"repair": functools.partial(unicodedata.normalize, "NFC")},
    ),
    TokenFault(
        "K8-basic",
        "BERT's BasicTokenizer in place of ftfy.fix_text",
        "transformers 4 tokenization_clip.py, where ftfy is not installed; transformers#22166",
        "install ftfy, or port ftfy.fix_text",
        {"repair": basic_clean},
    ),
    TokenFault(
        "K8-encoding",
        "ftfy.fix_encoding in place of ftfy.fix_text: curly quotes, ligatures and wide letters stay",
        "no public thread known",
        "call ftfy.fix_text, which also straightens quotes and widths",
        {"repair": fix_encoding},
    ),
    TokenFault(
        "K9-none",
        "html.unescape is missing",
        "transformers tokenization_clip.py; instant-clip-tokenizer lib.rs",
        "unescape HTML twice after ftfy, which unescapes only texts without <",
        {"unescape": same},
    ),
    TokenFault(
        "K9-once",
        "html.unescape is called once",
        "no public thread known; OpenAI's basic_clean calls it twice",
        "call html.unescape twice: &amp;amp; becomes &",
        {"unescape": html.unescape},
    ),
    TokenFault(
        "K3",
        "no lower-casing",
        "clip.cpp clip.cpp:608",
        "lower-case the text after cleaning it",
        {"fold": same},
    ),
    TokenFault(
        "K3-ascii",
        "only ASCII letters are lower-cased",
        "stable-diffusion.cpp clip_tokenizer.cpp (std::tolower on bytes)",
        "lower-case by Unicode, with the final sigma: Python's str.lower",
        {"fold": lower_ascii},
    ),
    TokenFault(
        "K11-casefold",
        "case folding in place of lower-casing",
        "no public thread known",
        "lower-case: case folding turns ß into ss",
        {"fold": str.casefold},
    ),
    TokenFault(
        "K11-sigma",
        "lower-casing character by character: a final Σ becomes σ, not ς",
        "Hugging Face tokenizers, normalizers.Lowercase",
        "lower-case the whole text at once, by a function that knows the final sigma",
        {"fold": lower_each},
    ),
    TokenFault(
        "K11-simple",
        "lower-casing one character to one: İ becomes i without its dot, a final Σ becomes σ",
        "onnxruntime-extensions bpe_kernels.cc (ToLower of each char32_t)",
        "lower-case the whole text by Unicode's full mapping: Python's str.lower",
        {"fold": lower_one_to_one},
    ),
    TokenFault(
        "K11-accents",
        "accents are stripped",
        "the habit of BERT's uncased models; transformers 4 passes strip_accents=False on purpose",
        "keep accents: é is two bytes of its own",
        {"accents": strip_accents},
    ),
    TokenFault(
        "K11-NFKC",
        "NFKC normalization: ½ becomes 1⁄2, ² becomes 2",
        "the habit of SentencePiece models; no public thread known",
        "do not normalize beyond ftfy, which composes (NFC)",
        {"normalize": functools.partial(unicodedata.normalize, "NFKC")},
    ),
    TokenFault(
        "K11-NFD",
        "NFD normalization: é becomes e and a combining accent",
        "macOS file names and Swift's decomposed strings; no public thread known",
        "compose the text: ftfy.fix_text ends with NFC",
        {"normalize": functools.partial(unicodedata.normalize, "NFD")},
    ),
    TokenFault(
        "K16",
        "line breaks are deleted, so that words on both sides run together",
        "onnxruntime-extensions#574, bpe_kernels.cc",
        "replace each run of white space, line breaks included, by one space",
        {"spaces": without_newlines},
    ),
    TokenFault(
        "K18",
        "only ASCII's white space counts: U+00A0, U+3000 and others are characters",
        "stable-diffusion.cpp clip_tokenizer.cpp; \\s of Go and of std::regex",
        "treat Unicode's White_Space as white space",
        {"spaces": spaces_among(ASCII_SPACES), "white": ASCII_SPACES},
    ),
    TokenFault(
        "K17",
        "start and end are written into the text, so that a last punctuation mark swallows <|",
        "openai/CLIP#8",
        "encode the text alone and put the ids 49406 and 49407 around its ids",
        {"wrap": lambda text: f"{START}{text}{END}", "start": (), "end": ()},
    ),
    # split
    TokenFault(
        "K4-spaces",
        "words are split at white space alone, after contractions: punctuation stays on them",
        "tinygrad extra/models/clip.py ([^\\s]+)",
        "split letters, single digits and runs of other characters from each other",
        {"letters": "", "digits": "", "others": r"[^\s]+"},
    ),
    TokenFault(
        "K4-split",
        "words are split at white space alone, contractions too",
        "ml-stable-diffusion BPETokenizer.swift",
        "use the reference's regular expression",
        {"contractions": "", "letters": "", "digits": "", "others": r"[^\s]+"},
    ),
    TokenFault(
        "K4-gpt2",
        "GPT-2's pattern: digits are grouped, and a space before ' hides the contraction",
        "onnxruntime-extensions bpe_kernels.cc",
        "use CLIP's pattern, in which no word begins with a space",
        {
            "letters": r" ?\p{L}+",
            "digits": r" ?\p{N}+",
            "others": r" ?[^\s\p{L}\p{N}]+|[\s]+",
            "spell": spell_without_space,
        },
    ),
    TokenFault(
        "K4-contractions",
        "contractions are not matched: 's becomes ' and s",
        "transformers#22166, #12648",
        "match 's 't 're 've 'm 'll 'd before letters",
        {"contractions": ""},
    ),
    TokenFault(
        "K4-punctuation",
        "each punctuation mark is a word of its own",
        "transformers#22166 (BasicTokenizer with do_split_on_punc)",
        "keep runs of other characters together: [^\\s\\p{L}\\p{N}]+",
        {"others": r"[^\s\p{L}\p{N}]"},
    ),
    TokenFault(
        "K5",
        "digits are grouped",
        "clip.cpp ([[:digit:]]+); CLIP#343",
        "make each digit a word: \\p{N} without +",
        {"digits": r"\p{N}+"},
    ),
    TokenFault(
        "K6-words",
        "\\w+ takes letters, digits and underscores together",
        "tokenizers.pre_tokenizers.Whitespace, put around CLIP's merges",
        "use \\p{L}+, \\p{N} and [^\\s\\p{L}\\p{N}]+",
        {"contractions": "", "letters": r"\w+", "digits": "", "others": r"[^\w\s]+", "engine": re},
    ),
    TokenFault(
        "K6-underscore",
        "underscores are dropped: [^\\s\\w]+ does not match them",
        "refiners#453",
        "let other characters include the underscore: [^\\s\\p{L}\\p{N}]+",
        {"others": r"[^\s\p{L}\p{N}_]+"},
    ),
    TokenFault(
        "K6-dropped",
        "letters and digits outside ASCII are dropped, underscores too",
        "refiners tokenizer.py ([a-zA-Z]+|[0-9]|[^\\s\\w]+)",
        "use \\p{L}+ and \\p{N} of the regex module, or tables of Unicode's categories",
        {**ASCII_PATTERN, "others": r"[^\s\w]+", "engine": re},
    ),
    TokenFault(
        "K6-ascii",
        "letters and digits outside ASCII are split like punctuation",
        "stable-diffusion.cpp clip_tokenizer.cpp; std::regex in other C++ ports",
        "split by Unicode's categories L and N",
        {**ASCII_PATTERN, "others": r"[^\sa-zA-Z0-9]+"},
    ),
    TokenFault(
        "K6-numbers",
        "numbers such as ² ½ Ⅷ are matched by \\w as letters",
        "refiners#453, the pattern without the regex module",
        "match \\p{N}, of which \\d is only a part",
        {"letters": r"[^\W\d_]+", "digits": r"\d", "others": r"(?:[^\s\w]|_)+", "engine": re},
    ),
    TokenFault(
        "K6-digits",
        "\\d in place of \\p{N}: numbers such as ² ½ Ⅷ are split like punctuation",
        "no public thread known",
        "match \\p{N}, of which \\d is only a part",
        {"digits": r"\d", "others": r"[^\s\p{L}\d]+"},
    ),
    TokenFault(
        "K6-marks",
        "combining marks are taken for letters",
        "the pattern of newer tokenizers ([\\p{L}\\p{M}]+); no public thread known",
        "use \\p{L}+: marks belong to the other characters",
        {"letters": r"[\p{L}\p{M}]+", "others": r"[^\s\p{L}\p{M}\p{N}]+"},
    ),
    TokenFault(
        "K12",
        "the regular expression does not ignore case, so 'ſ is no contraction",
        "instant-clip-tokenizer lib.rs:176; transformers tokenization_clip.py",
        "compile the pattern with IGNORECASE",
        {"ignore_case": False},
    ),
    TokenFault(
        "K10-none",
        "<|startoftext|> and <|endoftext|> in a text are ordinary words",
        "stable-diffusion.cpp clip_tokenizer.cpp; ml-stable-diffusion BPETokenizer.swift",
        "match both before anything else and give them the ids 49406 and 49407",
        NO_SPECIALS,
    ),
    TokenFault(
        "K10-names",
        "the special tokens are spelled <start_of_text> and <end_of_text>",
        "open_clip#453; instant-clip-tokenizer lib.rs",
        "spell them <|startoftext|> and <|endoftext|>",
        {
            "special_pattern": "<start_of_text>|<end_of_text>",
            "special": specials({"<start_of_text>": (START_ID,), "<end_of_text>": (END_ID,)}),
        },
    ),
    TokenFault(
        "K10-pipe",
        "| is not escaped in the pattern of the special tokens",
        "no public thread known",
        "escape the special tokens: <\\|endoftext\\|>",
        {"special_pattern": "<|startoftext|>|<|endoftext|>"},
    ),
    TokenFault(
        "K10-split",
        "special tokens are matched, but split into their characters",
        "mlx-examples tokenizer.py (the cached special token is a str, not a list)",
        "give <|startoftext|> and <|endoftext|> their ids before merging",
        {"special": special_characters},
    ),
    TokenFault(
        "K10-case",
        "special tokens count only in lower case; <|ENDOFTEXT|> is ordinary text",
        "transformers tokenization_clip.py (added tokens are found before lower-casing)",
        "lower-case the text before looking for special tokens",
        {
            "mark": mark_lower_case,
            "special_pattern": "[\ufdd0\ufdd1]",
            "special": specials({IN_LOWER_CASE[word]: ids for word, ids in SPECIAL_IDS.items()}),
            "others": r"[^\s\p{L}\p{N}\ufdd0\ufdd1]+",
        },
    ),
    TokenFault(
        "K10-merged",
        "special tokens are matched as words, but spelled and merged like any other",
        "no public thread known",
        "give <|startoftext|> and <|endoftext|> their ids before merging",
        {"special": {}.get},
    ),
    TokenFault(
        "K10-pad",
        "! is the padding token, so that each ! in a text becomes id 0",
        "diffusers#4153; transformers#24925 (the tokenizers of Stable Diffusion 2 and XL)",
        "pad with the id 0 without making ! a special token",
        {
            "special_pattern": r"<\|startoftext\|>|<\|endoftext\|>|!",
            "special": specials({**SPECIAL_IDS, "!": (0,)}),
            "others": r"[^\s\p{L}\p{N}!]+",
        },
    ),
    # bytes
    TokenFault(
        "K7-dropped",
        "characters in place of bytes; those the vocabulary lacks are dropped",
        'mlx-examples tokenizer.py:43; clip.cpp#107 ("unknown token")',
        "write a word's UTF-8 bytes by GPT-2's table of 256 characters",
        {"spell": list},
    ),
    TokenFault(
        "K7-unknown",
        "characters in place of bytes; those the vocabulary lacks become the end id",
        "ml-stable-diffusion BPETokenizer.swift (unknownToken)",
        "write a word's UTF-8 bytes by GPT-2's table of 256 characters",
        {"spell": list, "number": number_or_end},
    ),
    TokenFault(
        "K7-latin1",
        "characters below U+0100 are taken for bytes, others are dropped",
        "clip-bpe-js mod.js (charCodeAt)",
        "encode the word as UTF-8 first (TextEncoder in JavaScript)",
        {"spell": spell_latin1},
    ),
    TokenFault(
        "K7-utf16",
        "each UTF-16 code unit is encoded by itself, so that emoji become six bytes",
        "JavaScript, Java and C# strings; no public thread known",
        "encode code points, not code units, as UTF-8",
        {"spell": spell_utf16},
    ),
    TokenFault(
        "K7-unshifted",
        "bytes are written as the characters of their number: merges of 68 of them never apply",
        "refiners tokenizer.py (get_bytes_to_unicode_mapping)",
        "write bytes outside the printable ones as the characters from U+0100 on",
        {"spell": spell_unshifted, "number": number_unshifted},
    ),
    TokenFault(
        "K1",
        "no </w> at the end of words",
        "transformers.js#74; huggingface-tokenizer-in-cxx#24",
        "append </w> to the last symbol of each word before merging",
        {"end_word": same},
    ),
    TokenFault(
        "K1-gpt2",
        "GPT-2's conventions: a space before a word belongs to it, and there is no </w>",
        "CrispEmbed#30",
        "drop white space and append </w> to the last symbol of each word",
        {
            "letters": r" ?\p{L}+",
            "digits": r" ?\p{N}",
            "others": r" ?[^\s\p{L}\p{N}]+",
            "end_word": same,
        },
    ),
    TokenFault(
        "K1-text",
        "</w> is appended as four characters",
        "no public thread known",
        "append </w> to the last symbol, as one string with it",
        {"end_word": mark_end_in_text},
    ),
    TokenFault(
        "K1-single",
        "words of one byte get no </w>",
        "no public thread known; OpenAI's bpe() returns early for them",
        "append </w> before the early return",
        {"end_word": end_word_of_several},
    ),
    # merge
    TokenFault(
        "K2",
        "the longest known piece is taken from the left, in place of merging",
        "no public thread known; WordPiece's rule",
        "merge neighbors in the order of the list of merges",
        {"merge": longest_pieces},
    ),
    TokenFault(
        "K2-bare",
        "words that the vocabulary lacks are cut into the longest pieces, without </w>",
        "clip.cpp clip.cpp:655-668",
        "merge neighbors in the order of the list of merges, </w> included",
        {"merge": word_or_longest_pieces},
    ),
    TokenFault(
        "K2-left",
        "the leftmost pair is merged first, whatever its rank",
        "no public thread known",
        "merge the pair of the lowest rank first",
        {"merge": merge_leftmost},
    ),
    TokenFault(
        "K2-right",
        "of equal pairs the rightmost is merged first",
        "refiners tokenizer.py (min over a set of positions)",
        "merge equal pairs from left to right",
        {"merge": merge_rightmost},
    ),
    TokenFault(
        "K13-lost",
        "the first merge, i n, is missing",
        "nurl#335 (off-by-one counts of merges)",
        "skip one line of the merges file, its header",
        {"merge": merge_without_first},
    ),
    TokenFault(
        "K13-skip",
        "the merges begin one line late: the first is missing and ids from 512 on are one too low",
        "nurl#335 (off-by-one counts of merges)",
        "take lines 2 to 48,895 of bpe_simple_vocab_16e6.txt: merges[1:49152-256-2+1]",
        {"merge": merge_without_first, "number": functools.partial(shift_merges, by=-1)},
    ),
    TokenFault(
        "K13-header",
        "the header of the merges file is counted as a merge: ids from 512 on are one too high",
        "nurl#335 (off-by-one counts of merges)",
        "take lines 2 to 48,895 of bpe_simple_vocab_16e6.txt: merges[1:49152-256-2+1]",
        {"merge": merge_without_last, "number": functools.partial(shift_merges, by=1)},
    ),
    TokenFault(
        "K13-short",
        "one merge too few: start and end are 49405 and 49406",
        "nurl#335 (off-by-one counts of merges)",
        "take 48,894 merges, so that start and end are 49406 and 49407",
        {
            "merge": merge_without_last,
            "start": (START_ID - 1,),
            "end": (END_ID - 1,),
            "special": specials({START: (START_ID - 1,), END: (END_ID - 1,)}),
        },
    ),
    TokenFault(
        "K13-long",
        "one merge too many: start and end are 49407 and 49408",
        "nurl#335 (off-by-one counts of merges)",
        "take 48,894 merges, so that start and end are 49406 and 49407",
        {
            "start": (START_ID + 1,),
            "end": (END_ID + 1,),
            "special": specials({START: (START_ID + 1,), END: (END_ID + 1,)}),
        },
    ),
    TokenFault(
        "K20",
        "merges that begin with # are skipped as comments",
        "no public thread known; merges.txt has one header line and no comments",
        "skip the first line alone",
        {"merge": merge_without_comments},
    ),
    # number
    TokenFault(
        "D5-plus",
        "all ids are one too high",
        "arrays that begin at 1, in Julia, Lua or MATLAB",
        "subtract 1 before saving or embedding the ids",
        {"shift": lambda id: id + 1},
    ),
    TokenFault(
        "D5-minus",
        "all ids are one too low",
        "arrays that begin at 1, in Julia, Lua or MATLAB",
        "do not subtract 1: OpenAI's ids begin at 0",
        {"shift": lambda id: id - 1},
    ),
    TokenFault(
        "D5-bytes",
        "single bytes are numbered by their value, not by GPT-2's table",
        "no public thread known",
        "begin the vocabulary with the printable bytes, as bytes_to_unicode orders them",
        {"number": number_bytes_in_order},
    ),
    TokenFault(
        "P7",
        "ids went through float16: above 2048 they are rounded, 49407 to 49408",
        "diffusers#2008; ailia-models#1389",
        "keep ids in int32 or int64",
        {"shift": to_float16},
    ),
    TokenFault(
        "P8",
        "ids went through int16: those from 32768 on became negative",
        "no public thread known; instant-clip-tokenizer gives uint16",
        "keep ids in int32 or int64, or at least uint16",
        {"shift": to_int16},
    ),
    TokenFault(
        "D2",
        "start and end are 0 and 2, the defaults of CLIPTextConfig",
        "transformers#24773",
        "start with 49406 and end with 49407",
        {"start": (0,), "end": (2,), "special": specials({START: (0,), END: (2,)})},
    ),
    TokenFault(
        "D8",
        "start and end are swapped",
        "no public thread known",
        "start with 49406 and end with 49407",
        {"start": (END_ID,), "end": (START_ID,)},
    ),
    # pad
    TokenFault(
        "D6-neither",
        "no start and no end",
        "encode of the tokenizer classes; Hugging Face with add_special_tokens=False",
        "put 49406 before the ids and 49407 after them",
        {"start": (), "end": ()},
    ),
    TokenFault(
        "D6-no-start", "no start", "no public thread known", "put 49406 before the ids", {"start": ()}
    ),
    TokenFault(
        "D6-no-end",
        "no end",
        "open_clip#1151 (no end of text)",
        "put 49407 after the ids: the features are pooled there",
        {"end": ()},
    ),
    TokenFault(
        "D6-twice",
        "start and end are added twice",
        "Hugging Face, where special tokens are added to ids that have them",
        "add the special tokens once",
        {"start": (START_ID, START_ID), "end": (END_ID, END_ID)},
    ),
    TokenFault(
        "D1-end",
        "padded with the end id 49407, as Hugging Face and Stable Diffusion 1 pad",
        "diffusers#2201; ComfyUI#9849; keras-hub#2051",
        "pad with 0 as OpenAI does. The features are the same; hidden states after the end differ",
        {"pad": END_ID},
    ),
    TokenFault(
        "D1-one",
        "padded with 1, the default of CLIPTextConfig",
        "transformers#24773 (pad_token_id)",
        "pad with 0 as OpenAI does. The features are the same; hidden states after the end differ",
        {"pad": 1},
    ),
    TokenFault(
        "D7",
        "padded on the left",
        'no public thread known; padding_side="left" of decoder-only models',
        "pad on the right: positions count from the start of the text",
        {"side": "left"},
    ),
    TokenFault(
        "P10",
        "the padding comes before the end id",
        "keras-hub#2018",
        "put the end id right after the text, then pad",
        {"side": "before the end"},
    ),
    TokenFault(
        "P11",
        "truncation drops the end id",
        "open_clip#130; ImageBind#82; facebookresearch/multimodal#291",
        "cut the text to 75 ids, so that the end id stays",
        {"cut": cut_end_too},
    ),
    TokenFault(
        "P11-head",
        "truncation keeps the tail of a text",
        'no public thread known; truncation_side="left"',
        "keep the first 75 ids",
        {"cut": cut_head},
    ),
    TokenFault(
        "P11-none",
        "texts are not truncated to the context",
        "sentence-transformers#3210",
        "cut the text to 75 ids",
        {"cut": cut_nothing},
    ),
)
