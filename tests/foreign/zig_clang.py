"""Take clang's arguments as tinygrad passes them, and compile with `zig cc` of the pip package ziglang.

zig has another name for the target, adds debug sections, and does not write an object to standard output.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = ("-target", "x86_64-freestanding-none", "-g0", "-fno-sanitize=all", "-fno-stack-protector")


def main(arguments):
    given = [
        option for option in arguments if option not in ("-", "-o") and not option.startswith("--target")
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "kernel.c"), Path(folder, "kernel.o")
        source.write_bytes(sys.stdin.buffer.read())
        command = [sys.executable, "-m", "ziglang", "cc", *given, *OPTIONS, str(source), "-o", str(made)]
        subprocess.run(command, check=True)
        sys.stdout.buffer.write(made.read_bytes())


if __name__ == "__main__":
    main(sys.argv[1:])
