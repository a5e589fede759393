"""The command `minclip`, apart from the package, so that Ctrl-C also ends its import without a traceback."""

import sys


def main():
    """Run the command line, and return the exit status."""
    try:
        from minclip import cli

        return cli.main()
    except KeyboardInterrupt:
        print("minclip: interrupted", file=sys.stderr)
        return 130
