"""Time one text and a few, against onnxruntime, transformers and OpenVINO, and draw how the time grows.

    python -m tests.benchmarks.latency [start] [sizes] [growth] [--python openvino=PATH] [--rounds N]

Random float32 weights at the text sizes of ViT-B/32, ViT-L/14 and the built-in model. Every way runs in a
process of its own. The processes take turns, a few calls each, so that other load on the machine falls on all
of them, and none finds the cores held by another one's waiting threads. A figure is the best call of all
rounds. Peers get their tokens trimmed to the longest text, and in batches sorted by length where that is
faster. A peer that is not installed is left out, with its reason. `--python` names its interpreter.

start    from the start of the process to the first features: import, load ViT-B/32's size, encode one text
sizes    1 text of 7 tokens, with a warm template too, and 8, 32 and 64 texts of mixed length
growth   latency against the number of texts and against their length, drawn to latency.svg
"""

import argparse
import json
import os
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
    return lambda tokens: minclip.encode_text(params, tokens)


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


WAYS = {
    "encode_text": encode_text,
    "fast.encode_text": fast_encode_text,
    "Encoder": encoder,
    "Encoder, warm": warm_encoder,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "transformers": transformers,
    "transformers, compiled": compiled_transformers,
}


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
            print(json.dumps(encode(tokens)[:1].tolist()), flush=True)
        else:
            print(json.dumps(min(timed(encode, tokens) for _ in range(request["calls"]))), flush=True)


class Worker:
    """A process that runs one way."""

    def __init__(self, name, folder, python):
        command = [python, "-W", "ignore", "-m", "tests.benchmarks.latency", "--worker", name, str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
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


def prepare(folder, params, formats=("onnx", "transformers")):
    """Write a tower in every format to folder."""
    import minclip
    from tests.benchmarks.throughput import onnx_file
    from tests.support.oracles import transformers_model

    minclip.save(params, folder / "text.safetensors")
    if "onnx" in formats:
        onnx_file(params, folder / "text.onnx")
    if "transformers" in formats:
        transformers_model(params).save_pretrained(folder / "transformers")


def cases(V=49408):
    """Return tokens by name: one text, mixed texts by their number, one text by its length."""
    import minclip

    rng = np.random.default_rng(0)

    def texts(lengths):
        tokens = np.zeros((len(lengths), 77), np.int32)
        for row, length in zip(tokens, lengths, strict=True):
            row[:length] = [V - 2, *rng.integers(1000, 40000, length - 2), V - 1]
        return tokens

    found = {"one": minclip.tokenize("a photo of a cat")}
    found |= {f"texts {count}": texts(rng.integers(5, 19, count)) for count in COUNTS}
    return found | {f"length {length}": texts([length]) for length in LENGTHS}


def start_workers(folder, pythons, names):
    """Return {name: Worker} of the ways that run and give the reference's features, and print the others."""
    workers, expected = {}, None
    for name in names:
        worker = Worker(name, folder, pythons.get(name.partition(",")[0], sys.executable))
        try:
            features = np.array(worker.ask(case="one", features=True))
        except RuntimeError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        expected = features if expected is None else expected
        apart = np.linalg.norm(features - expected) / np.linalg.norm(expected)
        assert apart < 1e-5, f"{name} gives other features ({apart:.1e})"
        workers[name] = worker
    return workers


def measure(workers, names, rounds, budget=0.4):
    """Return {way: {case: milliseconds}}: the best call of all rounds, the ways in turn."""
    best = {way: {} for way in workers}
    for case in names:
        for turn in range(rounds):
            for way, worker in workers.items():
                calls = 3 if not turn else max(1, min(20, int(budget * 1e3 / best[way][case])))
                ms = 1e3 * worker.ask(case=case, calls=calls)
                best[way][case] = min(ms, best[way].get(case, ms))
    return best


def table(best, names, titles):
    print("\n| ms | " + " | ".join(titles) + " |\n|---" + "|---" * len(titles) + "|")
    for way, found in best.items():
        print(f"| {way} | " + " | ".join(f"{found[name]:.1f}" for name in names) + " |")
    for peer in ("onnxruntime", "transformers"):
        if peer in best:
            ratios = [best[peer][name] / best["Encoder"][name] for name in names]
            print(f"| {peer} / Encoder | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    if {"onnxruntime", "Encoder, warm"} <= best.keys():
        ratio = best["onnxruntime"]["one"] / best["Encoder, warm"]["one"]
        print(f"\nonnxruntime / Encoder, warm, one text: {ratio:.2f}")
    if "transformers" in best:
        ratios = [best["transformers"][name] / best["encode_text"][name] for name in names]
        print("transformers / encode_text: " + " ".join(f"{ratio:.2f}" for ratio in ratios), flush=True)


def start_table(folder, pythons, rounds):
    print("\n| from the start of the process to the first features | s |\n|---|---|")
    for name in ("encode_text", "Encoder", "onnxruntime", "openvino", "transformers"):
        try:
            seconds = min(timed(first_features, folder, pythons, name) for _ in range(rounds))
        except RuntimeError as error:
            print(f"| {name} | {error} |")
        else:
            print(f"| {name} | {seconds:.2f} |", flush=True)


def first_features(folder, pythons, name):
    worker = Worker(name, folder, pythons.get(name, sys.executable))
    worker.ask(case="one", features=True)
    worker.process.kill()
    worker.process.wait()


def plot(best, path):
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no plot: matplotlib is not installed")
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    for axis, prefix, values, label in (
        (axes[0], "texts", COUNTS, "texts of 5 to 18 tokens"),
        (axes[1], "length", LENGTHS, "tokens of one text"),
    ):
        for way, found in best.items():
            axis.loglog(values, [found[f"{prefix} {value}"] for value in values], ".-", label=way)
        axis.set_xlabel(label)
        axis.set_xticks(values, values)
        axis.minorticks_off()
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize="small")
    figure.savefig(path)
    print("drawn to", path)


def towers():
    """Yield (name, params) of the three sizes."""
    import minclip
    from tests.support.oracles import SIZES, random_params

    for name in ("ViT-B/32", "ViT-L/14"):
        yield name, random_params(**SIZES[name])
    yield "built-in", minclip.load()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="any of start, sizes, growth")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--size", choices=["ViT-B/32", "ViT-L/14", "built-in"], help="this size only")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="these ways only")
    parser.add_argument("--rounds", type=int, default=6)
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
    parts = options.parts or ["start", "sizes", "growth"]
    for size, params in towers():
        wanted = parts if size == "ViT-B/32" else [part for part in parts if part == "sizes"]
        if not wanted or options.size not in (None, size):
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, params)
            np.savez(folder / "cases.npz", **cases())
            print(f"\n## {size}, {threads()} threads, numpy {np.__version__}", flush=True)
            if "start" in wanted:
                start_table(folder, pythons, options.rounds)
            workers = start_workers(folder, pythons, options.ways)
            if "sizes" in wanted:
                names = ["one", "texts 8", "texts 32", "texts 64"]
                table(measure(workers, names, options.rounds), names, ["1 text", "8", "32", "64"])
            if "growth" in wanted:
                names = [f"texts {n}" for n in COUNTS] + [f"length {n}" for n in LENGTHS]
                plot(measure(workers, names, max(2, options.rounds // 2)), options.plot)
            for worker in workers.values():
                worker.close()


if __name__ == "__main__":
    main()
