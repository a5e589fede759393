"""`minclip tokenize`, `show` and `inspect`: look at tokens, at the encoder's run, and into a checkpoint."""

import os
import sys
from pathlib import Path

from minclip import checkpoint, explorer, tokenizer
from minclip.cli.options import (
    add_architecture,
    add_command,
    add_model,
    check_output,
    load_model,
    print_wrapped,
)
from minclip.cli.texts import (
    BUILTIN_IN_WORDS,
    add_texts,
    add_truncate,
    given_texts,
    note_on_rare_words,
    tokenized,
)


def add_tokenize(commands):
    tokenize = add_command(
        commands,
        "tokenize",
        run_tokenize,
        "show the ids and pieces of texts",
        'minclip tokenize "a photo of a cat"\nhead captions.txt | minclip tokenize',
    )
    add_texts(tokenize, "a text to tokenize")


def run_tokenize(args):
    """Show the ids of each text and their pieces, with the start and end of text. `</w>` ends a word."""
    pieces = tokenizer.spellings()
    start, end = (tokenizer.vocabulary()[word] for word in (tokenizer.START, tokenizer.END))
    for text in given_texts(args):
        ids = [start, *tokenizer.encode(text), end]
        print(f"{text!r}: {len(ids)} tokens")
        print_wrapped(f"  ids     {' '.join(map(str, ids))}")
        print_wrapped(f"  pieces  {' '.join(pieces[id] for id in ids)}")
    return 0


def add_show(commands):
    page = add_command(
        commands,
        "show",
        run_show,
        "write a page to explore the encoder's run",
        'minclip show "a black cat sits on a chair" -o page.html\n'
        'minclip show "a black cat" "a white cat" -o page.html',
    )
    add_texts(page, "a text to encode; the first two are shown side by side")
    page.add_argument("-o", dest="output", metavar="page.html", required=True, help="the file to write")
    add_truncate(page)
    add_model(page)


def run_show(args):
    """Run the encoder on each text and write every stage to one HTML page, which opens in any browser."""
    check_output(args.parser, args.output, ".html")
    params = load_model(args)
    texts = list(given_texts(args))
    tokens = tokenized(params, texts, "text", args.truncate)
    name = BUILTIN_IN_WORDS if args.model == "builtin" else Path(args.model).name
    explorer.show(params, tokens, model=name).save(args.output)
    print(f"{args.output}: {os.path.getsize(args.output) / 1e6:.1f} MB, open it in a browser")
    note = note_on_rare_words(texts) if args.model == "builtin" else None
    if note:
        print(f"minclip: {note}", file=sys.stderr)
    return 0


def add_inspect(commands):
    inspect = add_command(
        commands,
        "inspect",
        run_inspect,
        "show what a file of weights holds",
        "minclip inspect builtin\nminclip inspect ViT-B-32.pt",
    )
    inspect.add_argument("source", metavar="SOURCE", help="a model's name, or a file or folder of weights")
    add_architecture(inspect)


def run_inspect(args):
    """Print a checkpoint's dialect, sizes, activation, dtype and tensors.

    If it does not load, the first line says why, and the exit status is 1.
    """
    inspected = checkpoint.inspect(args.source, activation=args.activation, heads=args.heads)
    print_wrapped(inspected.text)
    return int(not inspected.loads)
