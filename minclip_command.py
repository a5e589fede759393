"""The command `minclip`, apart from the package, so that Ctrl-C also ends its import without a traceback."""

import os
import signal


def main():
    """Run the command line, and return the exit status."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # not in a background job, which ignores Ctrl-C
        signal.signal(signal.SIGINT, stop)
    from minclip import cli

    signal.signal(signal.SIGINT, usual)
    return cli.main()


def stop(*_):
    """End the process at once: NumPy's import would turn a KeyboardInterrupt into an error of its own."""
    os.write(2, b"minclip: interrupted\n")
    os._exit(130)
