"""What the documentation shows is what happens: docstring examples, and the README's code and output."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import minclip
from minclip import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
MODULES = [
    "minclip",
    *(f"minclip.{m.name}" for m in pkgutil.iter_modules(minclip.__path__) if m.name != "__main__"),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name):
    if name in ("minclip.gpu", "minclip.fast_gpu"):
        pytest.importorskip("cupy", reason="imports CuPy, as the modules of the GPU alone do")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_the_readmes_python_runs_in_order():
    namespace = {}
    for language, code in BLOCKS:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, "README.md", "exec"), namespace)


def test_the_readmes_first_output_is_what_the_first_command_prints(capsys):
    command = BLOCKS[0][1].splitlines()[0].partition("&& minclip ")[2]
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().out == BLOCKS[1][1]


def test_the_readmes_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(__file__).parents[1] / target).exists(), target
