"""The command line: `minclip encode "a photo of a cat"`, and tools for those who port CLIP.

Read in this order: options (the parser, and the options that several commands share), texts (texts from
arguments, a file or a pipe), encoding (encode), looking (tokenize, inspect, show), ports (probe, compare,
diagnose, check-weights, diagnose-tokens, verify).
"""

import os
import sys
import warnings

from minclip import __version__
from minclip.cli import encoding, looking, ports
from minclip.cli.options import Parser

EXAMPLES = """
examples:
  minclip encode "a photo of a cat" "a photo of a dog"
  minclip encode --file captions.txt -o features.npy
  minclip show "a black cat" -o page.html
  minclip probe -o probe.npz && minclip compare probe.npz port.npz
  minclip COMMAND --help
"""


def main(argv=None):
    """Run the command line, and return the exit status. Errors are one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no stream at all, or a StringIO, of a caller in Python
            stream.reconfigure(errors="replace")  # a terminal that has no emoji shows ? and goes on
    usual, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"minclip: {message}\n"
    try:
        top = parser()
        args = top.parse_args(argv)
        if "run" not in args:
            top.print_help()
            return 0
        status = args.run(args)
        if sys.stdout:  # None where the caller closed it
            sys.stdout.flush()
        return status
    except SystemExit as wrong_usage:
        return wrong_usage.code
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, ImportError, Warning) as error:
        print(f"minclip: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"minclip: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = usual


def one_line(error):
    """Return an error's message as one line that begins with the user's file, where the error has one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def parser():
    """Return the parser of the command line, with a function `run` for each command."""
    top = Parser(prog="minclip", description="CLIP's text encoder on NumPy or CuPy.", epilog=EXAMPLES)
    top.add_argument(
        "-V", "--version", action="version", version=f"minclip {__version__}", help="print the version"
    )
    commands = top.add_subparsers(metavar="COMMAND")
    encoding.add_encode(commands)
    looking.add_tokenize(commands)
    looking.add_show(commands)
    looking.add_inspect(commands)
    ports.add_verify(commands)
    ports.add_probe(commands)
    ports.add_compare(commands)
    ports.add_diagnose(commands)
    ports.add_check_weights(commands)
    ports.add_diagnose_tokens(commands)
    return top
