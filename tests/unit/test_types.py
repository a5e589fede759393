"""The types that a user's own type checker sees."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minclip

SCRIPT = """
import minclip
params = minclip.load()
tokens = minclip.tokenize(["a cat"])
features = minclip.encode_text(params, tokens)
comparison = minclip.compare(minclip.trace(params, tokens), minclip.trace(params, tokens))
diagnosis = minclip.diagnose(params, tokens, features)
reveal_type(params)
reveal_type(tokens)
reveal_type(features)
reveal_type(minclip.normalize(features))
reveal_type(minclip.hidden_states(params, tokens))
reveal_type(comparison)
reveal_type(comparison.first)
reveal_type(diagnosis)
reveal_type(diagnosis.verdict)
"""


# minclip as it is for a user who installed it with NumPy alone; mypy would spend 20 s on torch and others.
SETTINGS = """
[mypy]
strict = True
follow_imports = skip
[mypy-minclip.*,numpy.*]
follow_imports = silent
"""


def test_a_users_script_passes_strict_mypy_and_meets_no_any(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    env = {**os.environ, "MYPYPATH": str(Path(minclip.__file__).parents[1])}
    command = [sys.executable, "-m", "mypy", "--no-incremental", "script.py"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    revealed = [line for line in run.stdout.splitlines() if "Revealed type" in line]
    ours = [line for line in run.stdout.splitlines() if line.startswith("script.py") and "error" in line]
    assert len(revealed) == 9, run.stdout + run.stderr
    assert not ours, run.stdout
    assert not [line for line in revealed if "Any" in line], "\n".join(revealed)


PUBLIC = [getattr(room, name) for room in (minclip, minclip.fast, minclip.corpus) for name in room.__all__]


@pytest.mark.parametrize(
    "function", [item for item in PUBLIC if callable(item)], ids=lambda f: f.__qualname__
)
def test_help_shows_the_names_of_types_and_not_their_definitions(function):
    signature = str(inspect.signature(function))
    assert "numpy.dtype[" not in signature
    assert len(signature) < 400
