"""Time one text and a few, against every other library, and draw how the time grows.

    python -m tests.benchmarks.latency sizes [--size ViT-L/14] [--python openvino=PATH]
    python -m tests.benchmarks.latency start
    python -m tests.benchmarks.latency growth

Random float32 weights at ViT-B/32's text size, or that of --size. Every way runs in a process of its own. The
processes take turns, a few calls each, so that other load on the machine falls on all of them, and none finds
the cores held by another one's waiting threads. A figure is the best call of all rounds; no round starts
after --minutes. Peers and encode_text get their tokens trimmed to the longest text, and in batches sorted by
length where that is faster. clippie is called with texts, which it tokenizes. NPCLIP pads every text to 77
tokens; it has no package, so PYTHONPATH must lead to a clone of 99991/NPCLIP. A peer that is not installed is
left out, with its reason. --python names the interpreter of a peer, if that is another one.

sizes    1 text of 7 tokens, with a warm template too, and 8, 32 and 64 texts of mixed length
start    from the start of the process to the first features: import, load ViT-B/32's size, encode one text
growth   latency against the number of texts and against their length, drawn to latency.svg
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
LATENCY = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
}  # OpenVINO computes in bfloat16 by default
SORTED = 16  # texts per batch where a peer sorts them by length
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (3, 5, 7, 10, 14, 20, 30, 45, 60, 77)


# The ways: each returns a function from tokens [B, 77] to features [B, E].


def encode_text(folder):
    import minclip

    params = minclip.load(folder / "text.safetensors")
    return quicker_batches(lambda tokens: minclip.encode_text(params, tokens))


def fast_encode_text(folder):
    import minclip

    params = minclip.load(folder / "text.safetensors")
    return lambda tokens: minclip.fast.encode_text(params, tokens)


def encoder(folder):
    import minclip

    return minclip.fast.Encoder(minclip.load(folder / "text.safetensors"))


def warm_encoder(folder):
    warmed = encoder(folder)
    warmed.warm("a photo of a")
    return warmed


def onnxruntime(folder):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(folder / "text.onnx", options, providers=["CPUExecutionProvider"])
    return quicker_batches(lambda tokens: session.run(None, {"tokens": tokens.astype(np.int64)})[0])


def openvino(folder):
    import openvino

    config = {**LATENCY, "INFERENCE_NUM_THREADS": threads()}
    model = openvino.Core().compile_model(folder / "text.onnx", "CPU", config)
    return quicker_batches(lambda tokens: model(tokens.astype(np.int64))[0])


def transformers(folder):
    import torch
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection.from_pretrained(folder / "transformers").eval()

    def encode(tokens):
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(tokens).long()).text_embeds.numpy()

    return quicker_batches(encode)


def compiled_transformers(folder):
    import torch
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection.from_pretrained(folder / "transformers").eval()
    compiled = torch.compile(model, dynamic=True)

    def encode(tokens):
        with torch.no_grad():
            return compiled(input_ids=torch.from_numpy(tokens).long()).text_embeds.numpy()

    return quicker_batches(encode)


def clippie(folder):
    from tests.benchmarks import peers

    encode, _, _ = peers.clippie(folder)
    return lambda tokens: encode(tokens.tolist())


def npclip(folder):
    import npclip

    class Tower(dict):
        def get_int(self, name):
            return len(self["ln_final.weight"]) // 64  # heads

    with np.load(folder / "text.npz") as arrays:
        tower = Tower(arrays)
    return lambda tokens: npclip.encode_text(tokens.astype(np.int64), tower)


WAYS = {
    "encode_text": encode_text,
    "fast.encode_text": fast_encode_text,
    "Encoder": encoder,
    "Encoder, warm": warm_encoder,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "transformers": transformers,
    "transformers, compiled": compiled_transformers,
    "clippie": clippie,
    "npclip": npclip,
}
PACKAGES = {"clippie": "mossblaser-clippie"} | {
    name: name for name in ("onnxruntime", "openvino", "transformers", "torch")
}
STARTED = ("encode_text", "Encoder", "onnxruntime", "openvino", "transformers")  # from a file of their own
PADDED = ("npclip",)  # whose time does not grow with the length
OURS = ("encode_text", "fast.encode_text", "Encoder", "Encoder, warm")
SLOW = 2000  # a case that takes more milliseconds is timed once


def quicker_batches(encode):
    """Return encode on trimmed tokens, in one batch or in batches sorted by length, as is faster."""
    faster = {}

    def in_batches(tokens, size):
        lengths = tokens.argmax(axis=-1) + 1
        order = lengths.argsort(kind="stable")
        parts = [order[a : a + size] for a in range(0, len(order), size)]
        found = np.concatenate([encode(np.ascontiguousarray(tokens[p, : lengths[p].max()])) for p in parts])
        return found[order.argsort()]

    def whole(tokens):
        if len(tokens) not in faster:
            sizes = {len(tokens), min(SORTED, len(tokens))}
            for size in sizes:
                in_batches(tokens, size)
            faster[len(tokens)] = min(
                sizes, key=lambda size: min(timed(in_batches, tokens, size) for _ in "123")
            )
        return in_batches(tokens, faster[len(tokens)])

    return whole


def threads():
    """Return how many threads each way may use."""
    return int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def timed(function, *args):
    """Return the seconds that a call takes: of the CPU where one thread computes, else of the clock."""
    clock = time.process_time if threads() == 1 else time.perf_counter
    start = clock()
    function(*args)
    return clock() - start


def work(name, folder):
    """Answer requests on standard input, a line of JSON each: {"case": name, "calls": n} -> seconds."""
    encode = WAYS[name](folder)
    cases = np.load(folder / "cases.npz")
    for line in sys.stdin:
        request = json.loads(line)
        tokens = cases[request["case"]]
        if request.get("features"):
            answer = {"features": encode(tokens)[:1].tolist(), "version": version(name)}
        else:
            answer = min(timed(encode, tokens) for _ in range(request["calls"]))
        print(json.dumps(answer), flush=True)


def version(way):
    """Return the version of a way's package, or nothing."""
    package = PACKAGES.get(way.partition(",")[0])
    return importlib.metadata.version(package) if package else ""


class Worker:
    """A process that runs one way."""

    def __init__(self, name, folder, python):
        command = [python, "-W", "ignore", "-m", "tests.benchmarks.latency", "--worker", name, str(folder)]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def ask(self, **request):
        """Return the answer to a request. Raises RuntimeError with the last line of an error."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise RuntimeError((self.errors.read().strip().splitlines() or ["no answer"])[-1])
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def prepare(folder, params):
    """Write a tower in every format, and the cases, to folder."""
    import minclip
    from tests.benchmarks.throughput import onnx_file
    from tests.support.oracles import transformers_model

    minclip.save(params, folder / "text.safetensors")
    np.savez(folder / "text.npz", **params)
    onnx_file(params, folder / "text.onnx")
    transformers_model(params).save_pretrained(folder / "transformers")
    np.savez(folder / "cases.npz", **cases())


def cases():
    """Return tokens by name: one text, mixed texts by their number, one text by its length.

    Texts are of words that are one token each, so that a library that takes texts sees the same tokens.
    """
    import minclip
    from minclip import tokenizer

    words = (w[:-4] for w in tokenizer.spellings() if w.endswith("</w>") and w[:-4].isalpha() and w.isascii())
    words = [word for word in words if len(tokenizer.encode(word)) == 1]
    rng = np.random.default_rng(0)

    def texts(lengths):
        return minclip.tokenize([" ".join(rng.choice(words, length - 2)) for length in lengths])

    found = {"one": minclip.tokenize("a photo of a cat")}
    found |= {f"texts {count}": texts(rng.integers(5, 19, count)) for count in COUNTS}
    return found | {f"length {length}": texts([length]) for length in LENGTHS}


def start_workers(folder, pythons, names):
    """Return {name: Worker} of the ways that run and give the reference's features, and print the others.

    A worker's `title` is its name and version.
    """
    workers, expected = {}, None
    for name in names:
        worker = Worker(name, folder, pythons.get(name.partition(",")[0], sys.executable))
        try:
            answer = worker.ask(case="one", features=True)
        except RuntimeError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        features = np.array(answer["features"])
        expected = features if expected is None else expected
        apart = np.linalg.norm(features - expected) / np.linalg.norm(expected)
        if not apart < 1e-5:
            print(f"{name} is left out: its features differ ({apart:.1e})", flush=True)
            worker.close()
            continue
        way, _, how = name.partition(",")
        worker.title = f"{way} {answer['version']}".rstrip() + (f",{how}" if how else "")
        workers[name] = worker
    return workers


def measure(workers, names, rounds, deadline, budget=0.4):
    """Return {way: {case: milliseconds}}: the best call of all rounds, the ways in turn."""
    best = {way: {} for way in workers}
    for turn in range(rounds):
        if turn and time.perf_counter() > deadline:
            print(f"\n{turn} of {rounds} rounds: the time is over", flush=True)
            break
        for case in names:
            for way, worker in workers.items():
                before = best[way].get(case)
                if before is None:
                    worker.ask(case=case, calls=1)  # compiles or chooses batches
                    best[way][case] = 1e3 * worker.ask(case=case, calls=1)
                elif before < SLOW:
                    calls = max(1, min(20, int(budget * 1e3 / before)))
                    best[way][case] = min(before, 1e3 * worker.ask(case=case, calls=calls))
    return best


def table(workers, best, names, titles):
    """Print the table of a size, and how many times as fast we are."""
    print("\n| ms | " + " | ".join(titles) + " |\n|---" + "|---" * len(titles) + "|")
    for way, found in best.items():
        print(f"| {workers[way].title} | " + " | ".join(f"{found[name]:.1f}" for name in names) + " |")
    print("\n| times as fast | " + " | ".join(titles) + " |\n|---" + "|---" * len(titles) + "|")
    for ours, peer in (
        *(("Encoder", peer) for peer in best if peer.partition(",")[0] in (*PACKAGES, "npclip")),
        ("Encoder, warm", "onnxruntime"),
        ("encode_text", "transformers"),
    ):
        if {ours, peer} <= best.keys():
            ratios = [best[peer][name] / best[ours][name] for name in names]
            print(f"| {ours} as {peer} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    print(flush=True)


def start_table(folder, pythons, names, rounds, deadline):
    """Print the seconds from the start of a process to its first features: the best of all rounds."""
    best, reasons = {}, {}
    for turn in range(rounds):
        for name in names if not turn or time.perf_counter() < deadline else ():
            begin = time.perf_counter()
            try:
                first_features(folder, pythons, name)
            except RuntimeError as error:
                reasons[name] = error
            else:
                best[name] = min(time.perf_counter() - begin, best.get(name, float("inf")))
    print("\n| from the start of the process to the first features | s |\n|---|---|")
    for name in names:
        print(f"| {name} | " + (f"{best[name]:.2f}" if name in best else f"left out: {reasons[name]}") + " |")
    print(flush=True)


def first_features(folder, pythons, name):
    worker = Worker(name, folder, pythons.get(name, sys.executable))
    try:
        worker.ask(case="one", features=True)
    finally:
        worker.process.kill()
        worker.process.wait()


def machine():
    """Return the processor, the threads, BLAS's kernels, the versions, and how busy the machine is."""
    from threadpoolctl import threadpool_info

    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if "model name" in line]
    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    kernels = {library.get("architecture", library["internal_api"]) for library in libraries}
    return (
        f"{names[0] if names else platform.machine()}, {threads()} threads, {' and '.join(kernels)} kernels, "
        f"numpy {np.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )


def plot(workers, best, path):
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no plot: matplotlib is not installed")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    for axis, prefix, values, label in (
        (axes[0], "texts", COUNTS, "texts of 5 to 18 tokens"),
        (axes[1], "length", LENGTHS, "tokens of one text"),
    ):
        for way, found in best.items():
            style = "-" if way in OURS else "--"
            times = [found[f"{prefix} {value}"] for value in values]
            axis.loglog(values, times, style, marker=".", label=workers[way].title)
        axis.set_xlabel(label)
        axis.set_xticks(values, values)
        axis.minorticks_off()
    axes[0].set_ylabel("ms")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path)
    print("drawn to", path)


def tower(size):
    import minclip
    from tests.support.oracles import SIZES, random_params

    return minclip.load() if size == "built-in" else random_params(**SIZES[size])


def run(part, folder, pythons, options):
    """Run one part in the time it is given."""
    deadline = time.perf_counter() + 60 * options.minutes
    if part == "start":
        names = [name for name in STARTED if name in options.ways]
        return start_table(folder, pythons, names, options.rounds, deadline)
    ways = [way for way in options.ways if part == "sizes" or way not in PADDED]
    workers = start_workers(folder, pythons, ways)
    if part == "sizes":
        names = ["one", "texts 8", "texts 32", "texts 64"]
        best = measure(workers, names, options.rounds, deadline)
        table(workers, best, names, ["1 text", "8", "32", "64"])
    else:
        names = [f"texts {n}" for n in COUNTS] + [f"length {n}" for n in LENGTHS]
        plot(workers, measure(workers, names, options.rounds, deadline, budget=0.1), options.plot)
    for worker in workers.values():
        worker.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="any of start, sizes, growth")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--size", choices=["ViT-B/32", "ViT-L/14", "built-in"], default="ViT-B/32")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="these ways only")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=3, help="of each part")
    parser.add_argument(
        "--one-thread", action="store_true", help="CPU time of one thread, for a busy machine"
    )
    parser.add_argument("--plot", default=Path(__file__).with_name("latency.svg"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker[0], Path(options.worker[1]))
    if options.one_thread:
        os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    pythons = dict(pair.split("=", 1) for pair in options.python)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), tower(options.size))
        print(f"\n## {options.size}\n\n{machine()}", flush=True)
        for part in options.parts or ["sizes", "start", "growth"]:
            run(part, Path(name), pythons, options)
        print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
