"""What the documentation shows is what happens: docstring examples, and every page from top to bottom."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minclip
from minclip.porting.probe import read_probe
from tests.support import documents
from tests.support.oracles import random_params

ROOT = Path(__file__).parents[2]
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in documents.PAGES}
README = PAGES["README.md"]
MODULES = [
    "minclip",
    *(m.name for m in pkgutil.walk_packages(minclip.__path__, "minclip.") if m.name != "minclip.__main__"),
]
FUNCTIONS = {*minclip.__all__} - {"corpus", "fast"}
FUNCTIONS |= {f"corpus.{name}" for name in minclip.corpus.__all__ if name != "cluster"}
FUNCTIONS |= {f"fast.{name}" for name in minclip.fast.__all__ if name[0].islower()}
PROGRAMS = ("minclip ", "pip ", "pytest", "python ", "dask ")
HEADING = re.compile(r"^#+ (.*)$", flags=re.MULTILINE)
END = "\n--- end of a block of Python ---\n"

# Commands of the pages that the walk leaves out, and why.
LEFT_OUT = {
    "pip install .": "installs; test_a_newcomer_gets_this_far does it, in the deeper mode",
    'pip install -e ".[test]"': "fetches torch; .ci/run does it",
    "pip install transformers torch": "fetches torch",
    "pytest": "this is pytest",
    "pytest -m deep tests/unit/corpus": "takes minutes, by its name",
    "pytest -m gpu tests/unit/gpu": "needs a GPU",
    'pip install ".[cuda13]"': "fetches CuPy, for a GPU",
    'pip install ".[dask]"': "fetches Dask",
    'pip install ".[gguf]"': "fetches gguf",
    'pip install ".[lessons]"': "fetches JupyterLab",
    "jupyter lab lessons": "opens a browser",
    "python -m tests.benchmarks.gpu": "needs a GPU; test_benchmark.py rehearses it",
    "python -m tests.benchmarks.throughput prompts --open-clip WHEEL": "a benchmark, with a download",
    "python -m tests.benchmarks.latency sizes": "a benchmark",
    "python -m tests.benchmarks.corpus --model NAME": "a benchmark",
    "python -m tests.benchmarks.peers --rounds 2 --npclip FOLDER": "a benchmark, with downloads",
    "python -m tests.benchmarks.backward parity": "minutes, for the same reason as the next",
    "python -m tests.benchmarks.tokenizers": "a benchmark",
    "python -m tests.benchmarks.parity": "computes three full-size towers in float64, a minute",
    "minclip verify ViT-B/32": "downloads 178 MB; test_ranges.py does the same from a server of its own",
    "minclip verify": "needs real weights; test_verify.py runs it on stand-ins",
    "minclip verify path/to/ViT-B-32.pt": "needs real weights",
    "minclip verify my_clip.safetensors": "needs real weights",
    "dask scheduler": "runs until it is stopped; test_dask.py starts such a cluster",
    "dask worker tcp://HOST:8786 --nworkers 2 --nthreads 1": "the same",
    "minclip encode --file captions.txt -o features.npy --dask tcp://HOST:8786": "the same",
}
# What a reader would put in, or what stands for a download.
STAND_INS = {"--model ViT-B/32": "--model builtin", "inspect SOURCE": "inspect builtin"}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name):
    if name in ("minclip.gpu.steps", "minclip.fast.gpu"):
        pytest.importorskip("cupy", reason="imports CuPy, as the modules of the GPU alone do")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_public_function_has_an_example(name):
    public = minclip
    for part in name.split("."):
        public = getattr(public, part)
    assert doctest.DocTestFinder(recurse=False).find(public, name)[0].examples


def blocks_of(page):
    """Return the [(language, content)] of a page's blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def commands(page):
    """Yield every command of a page in its order: those of blocks, line by line, and those in a sentence."""
    places = r"^```\w*\n(.*?)^```|`((?:minclip|python|pytest|pip|dask) [^`]*)`"
    for block, sentence in re.findall(places, page, flags=re.DOTALL | re.MULTILINE):
        lines = (block or sentence).splitlines()
        if lines[0].startswith(PROGRAMS):
            for line in lines:
                yield from (part.strip() for part in line.partition("  #")[0].split("&&"))


def write_sdxl(folder):
    """Write the two text encoders of a small SDXL, in place of the reader's own."""
    for name, activation, embed in (("text_encoder", "quick_gelu", 1), ("text_encoder_2", "gelu", 64)):
        params = random_params(width=64, layers=2, embed=embed)
        if embed == 1:
            del params["text_projection"]
        (folder / name).mkdir(parents=True)
        minclip.save(
            minclip.Params(params, activation=activation, heads=1), folder / name / "model.safetensors"
        )


def walk(page, folder, environment, skip=()):
    """Run the commands and the Python of a page in a folder, and return {index of the block: its output}.

    The output of the first command stands under -1.
    """

    def run(*command):
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    (folder / "captions.txt").write_text("a photo of a cat\ntwo dogs\n", encoding="utf-8")
    write_sdxl(folder / "sdxl")
    printed = {}
    for command in commands(page):
        if command in LEFT_OUT:
            continue
        for shown, used in STAND_INS.items():
            command = command.replace(shown, used)
        output = run("bash", "-ec", command)
        printed.setdefault(-1, output)
        if command.startswith("minclip probe --texts"):  # the reader's part: a tokenizer, run on the texts
            texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))["texts"]
            ids = minclip.tokenize(texts, truncate=True).tolist()
            (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
        elif command.startswith("minclip probe"):  # the reader's part: a port, run on the probe
            stages = read_probe(folder / "probe.npz")
            np.savez(folder / "port.npz", tokens=stages.tokens, **stages)
    code = [(i, block) for i, (language, block) in enumerate(blocks_of(page)) if language == "python"]
    if code and "python" not in skip:
        outputs = run("python", "-c", f"print({END!r})\n".join(block for _, block in code)).split(f"{END}\n")
        printed |= {i: output for (i, _), output in zip(code, outputs, strict=True)}
    return printed


def shown_lines(block):
    """A block of output as regular expressions, line by line: "..." is anything, 3.1e-07 any such number."""
    for line in block.splitlines():
        line = re.sub(r"\\\.\\\.\\\.$", ".*", re.escape(line.rstrip()))
        yield re.sub(r"\d\\\.\de(\\[-+]|\+)\d\d", r"(\\d\\.\\de[-+]\\d\\d)", line)


def assert_shown(block, printed):
    """Each line that the block shows is printed, in this order; rounding may differ fourfold."""
    lines = iter(printed.splitlines())
    for shown, pattern in zip(block.splitlines(), shown_lines(block), strict=True):
        found = next((match for line in lines if (match := re.fullmatch(pattern, line.rstrip()))), None)
        assert found, f"the page shows {shown!r}, which is not printed there:\n{printed}"
        for ours, theirs in zip(re.fullmatch(pattern, shown.rstrip()).groups(), found.groups(), strict=True):
            assert 1 / 4 < float(ours) / float(theirs) < 4, (shown, found.group())


def environment(folder):
    """One in which `minclip` and `python` are this interpreter's and this copy's, with warnings as errors."""
    for name, arguments in {"minclip": "-W error -m minclip", "python": ""}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.skipif(not shutil.which("bash"), reason="the pages' commands are bash's")
@pytest.mark.parametrize("name", PAGES)
def test_a_page_from_top_to_bottom_prints_what_it_shows(name, tmp_path):
    """In a fresh folder, each command and all the Python in a process of its own."""
    for folder in ("bin", "here"):
        (tmp_path / folder).mkdir()
    blocks = blocks_of(PAGES[name])
    printed = walk(PAGES[name], tmp_path / "here", environment(tmp_path / "bin"))
    first = 0
    if name == "README.md":
        first = 1
        assert printed[-1] == blocks[1][1]
    for i, (language, block) in enumerate(blocks):
        if not language and not block.startswith((*PROGRAMS, "export ")) and i > first:
            source = max(python for python in printed if python < i)
            assert_shown(block, printed[source])
    if name == "minclip/corpus/README.md":
        array = np.load(tmp_path / "here" / "features.npy")
        assert (array.shape, array.dtype) == ((2, 128), np.float16)


def test_what_the_walk_leaves_out_is_still_in_a_page():
    shown = [command for page in PAGES.values() for command in commands(page)]
    assert set(LEFT_OUT) <= set(shown)
    assert all(any(stand_in in command for command in shown) for stand_in in STAND_INS)


@pytest.mark.parametrize("name", PAGES)
def test_the_walk_installs_nothing(name):
    installs = [command for command in commands(PAGES[name]) if command.startswith("pip ")]
    assert set(installs) <= set(LEFT_OUT)


def test_the_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 1300


@pytest.mark.deep
def test_a_newcomer_gets_this_far(tmp_path):
    """A fresh clone, a fresh environment with nothing but minclip: all of the README that needs no torch."""
    venv, clone = tmp_path / "venv", tmp_path / "minclip"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean["PATH"] = os.pathsep.join([str(venv / "bin"), clean["PATH"]])
    pip = [venv / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "."], cwd=clone, check=True, env=clean)
    clean["PYTHONWARNINGS"] = "error"
    (tmp_path / "here").mkdir()
    assert walk(README, tmp_path / "here", clean, skip=["python"])[-1] == blocks_of(README)[1][1]
    code = "".join(
        block for language, block in blocks_of(README) if language == "python" and "torch" not in block
    )
    subprocess.run([venv / "bin" / "python", "-c", code], cwd=tmp_path / "here", check=True, env=clean)
    count = "from importlib.metadata import distributions; print(*sorted(d.name for d in distributions()))"
    run = subprocess.run([venv / "bin" / "python", "-c", count], check=True, env=clean, capture_output=True)
    assert len({*run.stdout.decode().split()} - {"pip", "setuptools"}) == 9  # as the README says


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name):
    headings = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in HEADING.findall(PAGES[name])
    }
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", PAGES[name]):
        if not target:
            assert anchor in headings, anchor
        elif not target.startswith("http"):
            assert (ROOT / name).parent.joinpath(target).exists(), target
