"""Time `minclip encode --file` against its parts, and one and two Dask workers against the plain command.

    python -m tests.benchmarks.corpus [--model NAME|PATH] [--texts 65536]

Prints texts/s of each, and as ratios to the plain command, all from the same captions and the same run.
Workers have one BLAS thread each, as Dask's own do by default; the plain command has all of the machine's.
Commands are timed as a person waits for them, the start of Python and of the scheduler left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import minclip
from minclip import corpus
from minclip.corpus import cluster
from minclip.corpus.lines import check_lines
from tests.benchmarks.tokenizing import captions, seconds


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="builtin")
    options.add_argument("--texts", type=int, default=65_536)
    args = options.parse_args()
    texts = captions(args.texts)
    params = minclip.load(args.model)
    print(f"{args.texts:,} captions, model {args.model}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.txt"
        path.write_text("\n".join(texts))
        plain = command(folder, texts, args.model)

        def show(what, texts_a_second):
            print(f"{what:34} {texts_a_second:12,.0f} texts/s {texts_a_second / plain:9.2f}", flush=True)

        show("plain command", plain)
        for count in (1, 2):
            show(f"command with --dask, workers: {count}", with_workers(folder, texts, args.model, count))
        show("check the lines", check(path, params))
        show("tokenize in one process", rate(texts, minclip.tokenize, texts))
        show("encode tokens", rate(texts, minclip.fast.encode_text, params, minclip.tokenize(texts)))
        for chunk in (1024, 8192, 16384):
            show(f"encode_file, {chunk} texts at once", encode(path, params, chunk))


def rate(texts, function, *args):
    return len(texts) / seconds(function, *args)


def check(path, params):
    with open(path, "rb") as file:
        start = time.perf_counter()
        count, _ = check_lines(file, len(params["positional_embedding"]), False, False)
        return count / (time.perf_counter() - start)


def encode(path, params, chunk):
    output = path.with_suffix(".npy")
    start = time.perf_counter()
    return len(corpus.encode_file(params, path, output, chunk=chunk)) / (time.perf_counter() - start)


def command(folder, texts, model, *more):
    """texts/s of the command line, less the time it takes for a single text."""

    def run(count):
        path = Path(folder) / "part.txt"
        path.write_text("\n".join(texts[:count]))
        minclip_encode = [sys.executable, "-m", "minclip", "encode", "--file", str(path), "--model", model]
        return seconds(subprocess.check_output, [*minclip_encode, "-o", f"{folder}/part.npy", *more])

    return len(texts) / (run(len(texts)) - run(1))


def with_workers(folder, texts, model, count):
    where = Path(folder) / f"scheduler-{count}.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    dask = [sys.executable, "-m", "dask"]
    processes = [
        subprocess.Popen(
            [*dask, "scheduler", "--no-dashboard", "--port", "0", "--scheduler-file", str(where)], **quiet
        )
    ]
    try:
        while not where.exists() or not where.read_text().endswith("}"):
            time.sleep(0.05)
        address = json.loads(where.read_text())["address"]
        worker = [*dask, "worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
        processes += [subprocess.Popen(worker, **quiet, env=environment) for _ in range(count)]
        from distributed import Client

        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(count)
            client.run(cluster.parameters, model, "cpu", "float32")  # loaded once, however long the corpus
        return command(folder, texts, model, "--dask", address)
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
