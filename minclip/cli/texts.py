"""The texts of a command, from its arguments, a file or a pipe, and how they are shown."""

import contextlib
import os
import sys
import unicodedata

from minclip import builtin, tokenizer
from minclip.corpus.lines import check_length, name_of, read_texts

BUILTIN_IN_WORDS = "built-in (small, English only, not CLIP)"
REMEDIES = dict.fromkeys((".txt", ".csv", ".tsv"), "to read its lines: {} < {}")  # ending: for such a file
REMEDIES |= dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif"), "minclip has no image encoder")
MOST_WORDS = 6  # words that one note lists


def add_texts(command, summary):
    command.add_argument(
        "texts", nargs="*", metavar="TEXT", help=f"{summary}; without TEXT, the lines of standard input"
    )


def add_truncate(command):
    command.add_argument("--truncate", action="store_true", help="truncate texts too long for the model")


def piped():
    """Tell whether standard input is a pipe or a file, not a terminal."""
    return sys.stdin is not None and not sys.stdin.isatty()


@contextlib.contextmanager
def opened(path):
    """Yield the binary file at path, or standard input for "-". Raise ValueError where it is empty."""
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        if not file.peek(1):
            raise ValueError(f"{name_of(file)} is empty: give one text per line")
        yield file


def given_texts(args):
    """Yield the texts of the arguments, or the lines of standard input. Without either, exit with help."""
    if args.texts:
        warn_about_texts(args.texts, args.parser.prog)
        yield from map(as_typed, args.texts)
    elif piped():
        with opened("-") as file:
            yield from read_texts(file)
    else:
        args.parser.print_help(sys.stderr)
        sys.exit(2)


def as_typed(text):
    """Return an argument as the user typed it, where a locale without UTF-8 made surrogates of its bytes."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"a text is not UTF-8: {text!a}") from None


def warn_about_texts(texts, command):
    """Tell the user of texts that are -, or names of files: probably the file itself was meant."""
    if "-" in texts:
        print("minclip: - is taken as a text; without TEXT, standard input is read", file=sys.stderr)
    for text in texts:
        ending = os.path.splitext(text)[1].lower()
        if ending in REMEDIES and os.path.isfile(text):
            note = f"{text} is a file, but is taken as a text; {REMEDIES[ending].format(command, text)}"
            print(f"minclip: {note}", file=sys.stderr)


def tokenized(params, texts, where, truncate=False, pad=0):
    """Return the tokens of texts. Raise ValueError that names a text as `where` and its number from 1 on."""
    context = len(params["positional_embedding"])
    if not truncate:
        for number, text in enumerate(texts, 1):
            check_length(text, context, f"{where} {number}")
    return tokenizer.tokenize(texts, context_length=context, truncate=truncate, pad=pad)


def note_on_rare_words(texts):
    """Return a line that names the words that were rare in the built-in model's training, or None.

    A word is rare if one of its pieces is, or if it has several pieces and names no picture or scene.
    Of the training's 107,000 words that are rare by this rule, half occur in at most 3 of its texts and 90%
    in at most 14. Half of the other 13,000 words occur in 68 or more.
    """
    common, named = builtin.common_ids(), named_words()
    pieces = {word: tokenizer.word_ids(word) for word in words_of(texts)}
    rare = [w for w, ids in pieces.items() if not common.issuperset(ids) or (len(ids) > 1 and w not in named)]
    if not rare:
        return None
    more = f" and {len(rare) - MOST_WORDS} more" if len(rare) > MOST_WORDS else ""
    shown = ", ".join(fitted(word, 20) for word in rare[:MOST_WORDS])
    return f"note: rare or absent in the built-in model's training: {shown}{more}"


def named_words():
    """Return the words of the built-in model's pictures and scenes, as a set."""
    (emoji, names, _), (scenes, _) = builtin.pictures(), builtin.scenes()
    return {*words_of(emoji), *words_of(names), *words_of(scene["sentence"] for scene in scenes)}


def words_of(texts):
    """Return the words of texts as the tokenizer splits them, in order."""
    return [word for text in texts for word in tokenizer.PIECES.findall(tokenizer.clean(text))]


def fitted(text, width):
    """Return text as one printable line of at most `width` columns of a terminal."""
    from ftfy.formatting import monospaced_width  # here, because it takes time to import

    text = " ".join(text.split())
    text = "".join("?" if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)
    if monospaced_width(text) <= width:
        return text
    while monospaced_width(text) > width - 3:
        text = text[: width - 3] if len(text) > width else text[:-1]
    return text + "..."
