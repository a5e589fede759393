"""minclip beside the others that give CLIP's text features: a Markdown table, every cell measured here.

    git clone https://github.com/99991/NPCLIP some/folder
    python -m tests.benchmarks.peers --npclip some/folder

Run it where the test extra and onnx are installed. The script makes a fresh virtual environment for each
peer, which pip fills. It times each peer in a process of its own, on one text tower of ViT-B/32's size with
random float32 weights, which each peer reads in its own format. The peers take turns, so that other load on
the machine falls on all of them. A time is the best of all rounds. If a peer cannot be installed or imported,
the last line says why.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import warnings
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BATCH = 64
HOSTILE = 8000
TORCH = "torch==2.13.0"  # as in pyproject.toml: an open range can take gigabytes of CUDA packages
# What pip is asked for, with or without what that depends on in its turn.
INSTALL = {
    "minclip": [[str(ROOT)]],
    "openai": [[TORCH, "numpy", "ftfy", "regex", "tqdm"], ["--no-deps", "openai-clip==1.0.1"]],
    "open_clip": [["torch==2.14.1", "torchvision==0.29.1", "open_clip_torch"]],  # it needs a matching pair
    "transformers": [[TORCH, "transformers"]],
    "clippie": [["mossblaser-clippie"]],
    "npclip": [["numpy", "pillow"]],
    "onnxruntime": [["onnxruntime"]],
}
PACKAGE = {"openai": "openai-clip", "open_clip": "open_clip_torch", "clippie": "mossblaser-clippie"}
IMPORTS = {
    "openai": "import peers; peers.openai()",
    "transformers": "from transformers import CLIPTextModelWithProjection, CLIPTokenizer",  # lazy ones
}
NOTES = {
    "minclip": "fast.Encoder for one text, fast.encode_text for the captions",
    "openai": "clip/model.py and simple_tokenizer.py without torchvision, which `import clip` would add",
    "clippie": "called with texts, which it tokenizes, in the same order; loaded from an .npz of ours",
    "npclip": "copied from a clone; texts padded to 77; converts every weight anew in each call",
    "transformers": "texts sorted by length, batches without needless padding",
    "open_clip": "with torch 2.14.1 and torchvision, on Linux the build with CUDA",
    "onnxruntime": "our own export of the encoder; sorted and trimmed too; it has no tokenizer",
}


# The workers: each gives (encode lists of ids, tokenize one text, number of intermediates that a call gives).


def minclip(folder):
    import numpy as np

    import minclip
    from minclip import fast, tokenizer

    params = minclip.load(folder / "minclip.safetensors")
    encoder = fast.Encoder(params)

    def encode(rows):
        tokens = np.array(rows, dtype=np.int32)
        return encoder(tokens) if len(rows) == 1 else fast.encode_text(params, tokens)

    return encode, tokenizer.encode, lambda: len(minclip.trace(params, minclip.tokenize("a cat")))


def openai():
    """clip/model.py and clip/simple_tokenizer.py, by path."""
    package, modules = Path(importlib.util.find_spec("clip").origin).parent, []
    for name in ("model", "simple_tokenizer"):
        spec = importlib.util.spec_from_file_location(f"clip_{name}", package / f"{name}.py")
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
    return modules


def openai_text(folder):
    import torch

    model, tokenizer = openai()
    text = model.CLIP(512, 32, 1, 64, 16, 77, 49408, 512, 8, 12)  # with the smallest image tower
    text.load_state_dict(torch.load(folder / "text.pt"), strict=False)
    return padded(text), tokenizer.SimpleTokenizer().encode, lambda: 0


def open_clip(folder):
    import open_clip
    import torch

    smallest = {"layers": 1, "width": 64, "image_size": 32, "patch_size": 32}
    text = open_clip.CLIP(512, smallest, {"width": 512, "heads": 8, "layers": 12}, quick_gelu=True)
    text.load_state_dict(torch.load(folder / "text.pt"), strict=False)

    def intermediates():
        return len(text.forward_intermediates(text=torch.zeros(1, 77, dtype=int))["text_intermediates"])

    return padded(text), open_clip.SimpleTokenizer().encode, intermediates


def padded(text):
    """encode of a torch model whose encode_text takes whole rows of 77 ids."""
    import torch

    text.eval()

    def encode(rows):
        with torch.no_grad():
            return torch.cat([text.encode_text(part) for part in torch.tensor(rows).split(BATCH)])

    return encode


def by_length(rows, encode):
    """encode, called on batches of texts of like length without the padding that none of them needs."""
    rows = sorted((row[: row.index(49407) + 1] for row in rows), key=len)
    for a in range(0, len(rows), BATCH):
        batch = rows[a : a + BATCH]
        features = encode([row + [0] * (len(batch[-1]) - len(row)) for row in batch])
    return features  # of the last batch


def transformers(folder):
    import torch
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    model = CLIPTextModelWithProjection.from_pretrained(folder / "transformers").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "transformers")

    def once(rows, **options):
        with torch.no_grad():
            return model(input_ids=torch.tensor(rows), **options)

    def intermediates():
        model.set_attn_implementation("eager")  # the one that returns its weights
        found = once([[49406, 49407]], output_hidden_states=True, output_attentions=True)
        return sum(len(found[name] or ()) for name in ("hidden_states", "attentions") if name in found)

    def encode(rows):
        return by_length(rows, lambda batch: once(batch).text_embeds)

    return encode, lambda text: tokenizer(text)["input_ids"][1:-1], intermediates


def clippie(folder):
    import clippie.model as model
    import numpy as np
    from clippie import tokeniser

    p = np.load(folder / "text.npz")
    p = {name: p[name] for name in p.files}

    def norm(name):
        return model.LayerNormalisationWeights(p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def layer(name, joint="."):  # it keeps matrices [in, out]
        return np.ascontiguousarray(p[f"{name}{joint}weight"].T), p[f"{name}{joint}bias"]

    heads, layers = len(p["ln_final.weight"]) // 64, sum(name.endswith("ln_1.weight") for name in p)

    def block(b):
        qkv, out = layer(f"{b}.attn.in_proj", "_"), layer(f"{b}.attn.out_proj")
        c_fc, c_proj = layer(f"{b}.mlp.c_fc"), layer(f"{b}.mlp.c_proj")
        return model.ResidualAttentionBlockWeights(
            norm(f"{b}.ln_1"), heads, *qkv, *out, True, norm(f"{b}.ln_2"), *c_fc, *c_proj
        )

    weights = model.TextEncoderWeights(
        p["token_embedding.weight"],
        p["positional_embedding"],
        [block(f"transformer.resblocks.{i}") for i in range(layers)],
        norm("ln_final"),
        p["text_projection"],
    )

    def encode(rows):
        texts = [tokeniser.decode(row[1 : row.index(49407)]).decode() for row in rows]
        return np.concatenate(
            [model.encode_text(texts[a : a + BATCH], weights) for a in range(0, len(texts), BATCH)]
        )

    return encode, lambda text: list(tokeniser.encode(text)), lambda: 0


def npclip(folder):
    import npclip
    import numpy as np
    from simple_tokenizer import SimpleTokenizer

    model, _ = npclip.load("ViT-B/32", str(folder))  # reads data/ViT-B-32.json of the working directory, ours
    os.chdir(Path(npclip.__file__).parent)  # where the tokenizer finds the other files of data/

    def encode(rows):
        rows = np.array(rows)
        return np.concatenate([model.encode_text(rows[a : a + BATCH]) for a in range(0, len(rows), BATCH)])

    return encode, SimpleTokenizer().encode, lambda: 0


def onnxruntime(folder):
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "text.onnx", providers=["CPUExecutionProvider"])

    def once(rows):
        return session.run(None, {"tokens": np.array(rows, dtype=np.int64)})[0]

    return lambda rows: by_length(rows, once), None, lambda: len(session.get_outputs()) - 1


def peak_memory():
    """The most bytes that this process has held."""
    # Not ru_maxrss, which counts what the parent held when it started this process.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def work(name, folder, turn):
    """Print, as JSON, what one peer measures of itself in a turn. The hostile strings come in turn 0 only."""
    start = time.perf_counter()
    encode, tokenize, intermediates = WORKERS[name](folder)
    load = time.perf_counter() - start
    given = json.loads((folder / "given.json").read_text())
    one, corpus = given["one"], given["corpus"]

    def timed(rows):
        start = time.perf_counter()
        encode(rows)
        return time.perf_counter() - start

    for _ in range(3):
        timed(one)
    latency = min(timed(one) for _ in range(30))
    if timed(corpus[:BATCH]) > 5:  # to the slow a part is enough: they go from batch to batch
        corpus = corpus[: 4 * BATCH]
    rate = len(corpus) / min(timed(corpus) for _ in range(2))
    features = encode(one).tolist()[0]
    assert math.dist(features, given["features"]) < 1e-5 * math.hypot(*given["features"]), "other features"
    found = dict(load=load, latency=latency, rate=rate)
    if turn == 0:
        exact = exact_ids(tokenize, given["hostile"]) if tokenize else None
        found |= dict(exact=exact, peak=peak_memory(), intermediates=intermediates())
    print(json.dumps(found))


def exact_ids(tokenize, hostile):
    """Return the share of hostile texts for which tokenize gives OpenAI's ids."""
    exact = 0
    for text, ids in hostile:
        try:
            exact += list(tokenize(text)) == ids
        except Exception:  # whatever it is, these are not the ids
            continue
    return exact / len(hostile)


WORKERS = {
    "minclip": minclip,
    "openai": openai_text,
    "transformers": transformers,
    "onnxruntime": onnxruntime,
    "open_clip": open_clip,
    "clippie": clippie,
    "npclip": npclip,
}


# The command: what the workers need, their environments, the table.


def prepare(folder, names):
    """Write the tower in each format, and the texts, to folder."""
    import numpy

    import minclip
    from minclip import tokenizer
    from tests.benchmarks import throughput
    from tests.support import oracles
    from tests.unit import test_tokenizer

    (folder / "code").mkdir()
    shutil.copy(__file__, folder / "code" / "peers.py")
    params = oracles.random_params(**throughput.SIZE)
    minclip.save(params, folder / "minclip.safetensors")
    if {"openai", "open_clip"} & set(names):
        import torch

        state = {name: torch.from_numpy(array) for name, array in params.items()}
        torch.save(state, folder / "text.pt")
    if "clippie" in names:
        numpy.savez(folder / "text.npz", **params)
    if "npclip" in names:
        npclip_file(params, folder)
    if "transformers" in names:
        oracles.transformers_model(params).save_pretrained(folder / "transformers")
        vocabulary = json.dumps(tokenizer.vocabulary())
        (folder / "transformers" / "vocab.json").write_text(vocabulary)
        merges = "\n".join(" ".join(pair) for pair in tokenizer.ranks())
        (folder / "transformers" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    if "onnxruntime" in names:
        throughput.onnx_file(params, folder / "text.onnx")
    draw, reference = random.Random(0), oracles.openai("simple_tokenizer").SimpleTokenizer()
    hostile = [test_tokenizer.hostile(draw) for _ in range(HOSTILE)]
    hostile = [text for text in hostile if not re.search("[\ud800-\udfff]", text)]
    one = minclip.tokenize("a photo of a cat")
    given = {
        "one": one.tolist(),
        "features": minclip.encode_text(params, one)[0].tolist(),
        "corpus": throughput.captions(1280).tolist(),
        "hostile": [(text, reference.encode(text)) for text in hostile],
    }
    (folder / "given.json").write_text(json.dumps(given))


def npclip_file(params, folder):
    """Write params as NPCLIP reads them: a zip archive, and a list of the arrays in it."""
    arrays = {}
    with zipfile.ZipFile(folder / "ViT-B-32.pt", "w") as archive:
        for name, array in params.items():
            arrays[name] = {"shape": array.shape, "dtype": str(array.dtype), "path": name}
            arrays[name] |= {"start": 0, "end": array.nbytes}
            archive.writestr(name, array.tobytes())
            if name.endswith("in_proj_weight"):
                arrays[name.replace("in_proj_weight", "num_heads")] = {"value": array.shape[1] // 64}
    (folder / "data").mkdir()
    (folder / "data" / "ViT-B-32.json").write_text(json.dumps(arrays))


def npclip_copy(clone, site):
    """Copy a clone of NPCLIP, which is no package, to site-packages as if it were one."""
    shutil.copytree(clone, site, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    commit = subprocess.run(
        ["git", "-C", clone, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    metadata = site / "npclip.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Name: npclip\nVersion: {commit.stdout.strip() or 'unknown'}\n")


def install(name, home):
    """Make the virtual environment of a peer; gives pip's last words where it cannot."""
    venv.create(home, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "--quiet"]
    for packages in INSTALL[name]:
        done = subprocess.run([*pip, "install", *packages], capture_output=True, encoding="utf-8")
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]


class Peer:
    """A peer in its own environment. `found` holds the figures, and under "missing" why some are missing."""

    def __init__(self, name, folder, home, clone):
        self.name, self.folder, self.python = name, folder, home / "bin" / "python"
        self.found = {"version": ""}
        fresh = not home.exists()
        if name == "npclip" and clone is None:
            self.found["missing"] = "needs --npclip"
        elif fresh and (failed := install(name, home)):
            self.found["missing"] = f"not installable here: {failed}"
        else:
            site = next(home.glob("lib/python*/site-packages"))
            if name == "npclip" and fresh:
                npclip_copy(clone, site)
            self.describe(site)

    def describe(self, site):
        """Find the version, the number of packages and their size on disk."""
        count = (
            "import importlib.metadata as m; print(len({d.name for d in m.distributions()}), m.version('%s'))"
        )
        packages, version = self.run("-c", count % PACKAGE.get(self.name, self.name)).split()
        files = [path for path in site.rglob("*") if path.is_file() and not path.is_symlink()]
        size = sum(path.stat().st_size for path in files)
        self.found |= {"version": version, "size": size, "packages": int(packages)}

    def run(self, *arguments):
        """Return the output of the peer's Python. Raises RuntimeError with the last line of an error."""
        code = str(
            self.folder / "code"
        )  # holds peers.py alone: no other script here hides a package of its name
        environment = {**os.environ, "PYTHONPATH": code, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        command = [self.python, *arguments]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", env=environment, cwd=self.folder
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
        return done.stdout

    def measure(self, turn):
        """Measure the peer once, and keep the best times so far."""
        start = time.perf_counter()
        self.run("-c", IMPORTS.get(self.name, f"import {self.name}"))
        now = {"import": time.perf_counter() - start}
        now |= json.loads(
            self.run(
                str(self.folder / "code" / "peers.py"), "--worker", self.name, str(self.folder), str(turn)
            )
        )
        for name, figure in now.items():
            best = {"import": min, "load": min, "latency": min, "rate": max}.get(name)
            self.found[name] = best(figure, self.found.get(name, figure)) if best else figure


ROWS = {
    "installed, MB": lambda c: f"{c['size'] / 1e6:,.0f}",
    "packages": lambda c: f"{c['packages']}",
    "import, s": lambda c: f"{c['import']:.2f}",
    "load the tower, s": lambda c: f"{c['load']:.2f}",
    "one short text, ms": lambda c: f"{1e3 * c['latency']:.1f}",
    "1,280 captions, texts/s": lambda c: f"{c['rate']:.0f}",
    "peak memory, MB": lambda c: f"{c['peak'] / 1e6:,.0f}",
    "hostile strings with OpenAI's ids": lambda c: "–" if c["exact"] is None else f"{c['exact']:.1%}",
    "intermediates a call gives": lambda c: f"{c['intermediates']}",
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="peer", help="any of " + ", ".join(INSTALL))
    parser.add_argument("--npclip", metavar="FOLDER", help="a clone of https://github.com/99991/NPCLIP")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--envs", metavar="FOLDER", help="keep the environments there, or use those that are")
    options = parser.parse_args(arguments)
    names = options.peers or list(INSTALL)
    peers = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(folder, names)
        for name in names:
            home = Path(options.envs or folder).resolve() / f"env-{name}"
            peers[name] = Peer(name, folder, home, options.npclip)
        for turn in range(options.rounds):
            for name, peer in peers.items():
                if "missing" not in peer.found:
                    try:
                        peer.measure(turn)
                    except RuntimeError as error:
                        peer.found["missing"] = f"fails here: {error}"
                print(turn, name, peer.found, file=sys.stderr, flush=True)
    columns = {name: peer.found for name, peer in peers.items()}
    print("| | " + " | ".join(f"{name} {c['version']}" for name, c in columns.items()) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for row, cell in ROWS.items():
        cells = []
        for c in columns.values():
            try:
                cells.append(cell(c))
            except KeyError:
                cells.append("not measured")
        print(f"| {row} | " + " | ".join(cells) + " |")
    cores = len(os.sched_getaffinity(0))
    print(f"\nPython {platform.python_version()}, {platform.machine()}, {cores} cores.", end="")
    for name, c in columns.items():
        if note := c.get("missing") or NOTES.get(name):
            print(f" {name}: {note}.", end="")
    print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
