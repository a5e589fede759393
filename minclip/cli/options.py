"""The parser, the options that several commands share, and output that fits the terminal."""

import argparse
import difflib
import inspect
import re
import shutil
import sys
import textwrap
from pathlib import Path

from minclip import checkpoint
from minclip.params import ACTIVATIONS

WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}
# Suffixes that tell of a format: a file that a command writes must not have the wrong one.
TABLES = {".csv", ".h5", ".json", ".npy", ".npz", ".parquet", ".pkl", ".pt", ".safetensors", ".tsv", ".txt"}
SUFFIXES = TABLES | {".html", ".md", ".pdf", ".png", ".svg"}
NARROWEST = 24  # columns: less is no use to a table


class Help(argparse.HelpFormatter):
    """Help whose paragraphs are wrapped, except those with indented lines, such as examples."""

    def _fill_text(self, text, width, indent):
        paragraphs = re.split(r"\n\n", inspect.cleandoc(text))
        return "\n\n".join(
            paragraph if re.search(r"^ ", paragraph, re.MULTILINE) else textwrap.fill(paragraph, width)
            for paragraph in paragraphs
        )


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with the nearest right name.

    Texts may also follow an option: `minclip encode "a cat" --normalize "a dog"`.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        if self._subparsers and args and self.is_misplaced(args[0]):
            self.error(f"unknown option {args[0]}; a command comes first, and then its options")
        args, left = super().parse_known_args(args, namespace)
        if left and getattr(args, "texts", None) and not any(text.startswith("-") for text in left):
            args.texts += left
        elif left:
            remedy = f"; a text that begins with - goes after --: {self.prog} -- {left[0]}"
            self.error(
                f"unknown option {left[0]}", self._option_string_actions, remedy if "texts" in args else ""
            )
        return args, []

    def is_misplaced(self, typed):
        """Tell whether an option of a command, or a misspelled one, was typed before the command."""
        name = typed.partition("=")[0]
        return name.startswith("-") and not any(
            known.startswith(name) for known in self._option_string_actions
        )

    def error(self, message, known=(), otherwise=""):
        """Exit with status 2 and one line: the message, and the nearest of the known names, or otherwise."""
        command = re.search(r"COMMAND: invalid choice: '(.*?)'.*\(choose from (.*)\)", message, re.DOTALL)
        if command:
            message = f"unknown command {command[1]!r}"
            known = [*re.findall(r"[\w-]+", command[2]), *self._option_string_actions]
        typed = command[1] if command else message.split()[-1].partition("=")[0]
        near = difflib.get_close_matches(typed, known, n=1)
        if near:
            message += f"; did you mean {near[0]}?"
        elif command:
            message += f'; to encode a text: minclip encode "{typed}"'
        else:
            message += otherwise
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_command(commands, name, run, summary, examples):
    """Add a command, described by the docstring of its function `run` and by examples. Return its parser."""
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    command = commands.add_parser(name, help=summary, description=run.__doc__, epilog=f"\nexamples:\n{lines}")
    command.set_defaults(run=run, parser=command)
    return command


def add_model(command):
    command.add_argument(
        "--model", default="builtin", metavar="NAME|PATH", help="a model's name or file; built-in by default"
    )
    add_architecture(command)


def add_architecture(command):
    """Add the options for a model whose file does not name its activation or heads."""
    command.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        metavar="A",
        help="the model's activation, quick_gelu or gelu, if no config beside its file gives it",
    )
    command.add_argument(
        "--heads", type=int, metavar="N", help="the model's number of attention heads, if not width // 64"
    )


def add_which_states(command):
    command.add_argument(
        "--skip", type=int, default=0, metavar="N", help="leave out the last N blocks of the hidden states"
    )
    command.add_argument(
        "--no-norm", action="store_true", help="leave out the final layer norm of the hidden states"
    )


def check_output(parser, path, suffix, option="-o"):
    """Exit with status 2 where path is no name of a file, or has the suffix of another format."""
    if path in ("", "-"):
        parser.error(f"{option} takes the name of a file")
    given = Path(path).suffix.lower()
    if given in SUFFIXES and given != suffix:
        parser.error(f"{option} writes a {suffix} file, and {path} ends in {given}")


def load_model(args, **options):
    """Return the `Params` of the model that the arguments of a command name."""
    return checkpoint.load(args.model, activation=args.activation, heads=args.heads, **options)


def columns(fallback=80):
    """Return the width of the terminal, which $COLUMNS overrides, but no less than NARROWEST."""
    return max(NARROWEST, shutil.get_terminal_size((fallback, 24)).columns)


def print_wrapped(text):
    """Print text with its sentences wrapped to the terminal. Rows of a table are printed as they are."""
    width = columns(fallback=10**6)
    for line in str(text).splitlines():
        indent = " " * len(re.match(r"[- ]*", line)[0])
        table = re.search(r"\S {2,}\S", line)
        wrapped = [] if table else textwrap.wrap(line, width, subsequent_indent=indent, **WHOLE_WORDS)
        print("\n".join(wrapped or [line]))
