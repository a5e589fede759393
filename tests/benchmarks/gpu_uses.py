"""Each use of a GPU once, checked against the CPU: the rows of a table that `tests.benchmarks.gpu` writes.

A use is a function of a folder for its files. It returns what was compared, the figure, and its bound; it
raises where the figure is beyond the bound.
"""

import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

import minclip
from minclip import cli
from minclip.corpus import cluster
from minclip.gpu import device
from tests.support import corpora
from tests.support.oracles import SIZES, random_params, random_tokens, relative

LENGTHS = [2, 9, 20, 77]
HALF = 5e-3  # float16 on the GPU from float32 on the CPU
SIZE = SIZES["ViT-B/32"]
SMALL = dict(width=128, layers=2, embed=96)  # comparing and diagnosing run many ports on the host


def tower(dtype, size=SMALL):
    """Return the same tower on the host in float32 and on the GPU, and tokens."""
    host = minclip.Params(random_params(**size), activation="quick_gelu", heads=size["width"] // 64)
    return host, host.with_arrays(device.to_gpu(host.astype(dtype))), random_tokens(LENGTHS)


def load(folder):
    tokens = minclip.tokenize(corpora.TEXTS)
    ours = minclip.encode_text(minclip.load(device="cuda"), tokens).get()
    return "features of the built-in model, float16", relative(ours, expected()), HALF


def hidden_states(folder):
    host, gpu, tokens = tower("float16", SIZE)
    truth = minclip.hidden_states(host, tokens, skip=1, norm=False)
    both = minclip.hidden_states, minclip.fast.hidden_states
    ours = [compute(gpu, tokens, skip=1, norm=False).get() for compute in both]
    return "states before the last block, page and fast, float16", *worst(ours, [truth, truth], HALF)


def trace(folder):
    host, gpu, tokens = tower("float32", SIZE)
    ours, truth = minclip.trace(gpu, tokens), minclip.trace(host, tokens)
    assert list(ours) == list(truth)
    kept = [name for name in truth if np.isfinite(truth[name]).all()]
    found = worst([ours[name].get() for name in kept], [truth[name] for name in kept], 1e-4)
    return f"the worst of {len(kept)} stages, float32", *found


def compare(folder):
    host, gpu, tokens = tower("float16")
    one, other = minclip.trace(gpu, tokens), minclip.trace(host, tokens)
    firsts = minclip.compare(one, other).first, minclip.compare(other, one).first
    return "stages where float16 on the GPU diverges, either as the port", 2 - firsts.count(None), 0


def diagnose(folder):
    host, gpu, tokens = tower("float32")
    wrong = minclip.Params(dict(host), activation="gelu", heads=host.heads)
    port = minclip.encode_text(wrong.with_arrays(device.to_gpu(wrong)), tokens)
    found = minclip.diagnose(gpu, tokens, port)
    names = [[fault.id for fault in finding.faults] for finding in found.findings]
    return "diagnoses of a port with the other GELU but A1", int(names != [["A1"]]), 0


def backward(folder):
    host, gpu, tokens = tower("float32", SIZE)
    gradient = np.random.default_rng(1).standard_normal((len(tokens), host["text_projection"].shape[1]))
    ours, truth = (minclip.backward(minclip.trace(params, tokens), gradient) for params in (gpu, host))
    found = worst([ours[name].get() for name in truth], truth.values(), 1e-4)
    return f"the worst of the gradients of {len(truth)} parameters, float32", *found


def resume(folder):
    """Interrupt a job after four chunks, and finish it by the command line."""
    captions, output = folder / "captions.txt", folder / "features.npy"
    captions.write_text("\n".join(corpora.TEXTS))
    corpora.stop_after(minclip.load(device="cuda"), captions, output, 4)
    assert corpora.finished(output) == 32
    assert cli.main(["encode", "--file", str(captions), "-o", str(output), "--device", "cuda"]) == 0
    return "features of 50 lines, 32 from before an interruption", relative(np.load(output), expected()), HALF


def dask_cuda(folder):
    from dask_cuda import LocalCUDACluster

    captions, output = folder / "captions.txt", folder / "features.npy"
    captions.write_text("\n".join(corpora.TEXTS))
    cluster.parameters.cache_clear()
    with LocalCUDACluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as workers:
        command = ["encode", "--file", str(captions), "-o", str(output), "--device", "cuda"]
        assert cli.main([*command, "--dask", workers.scheduler_address]) == 0
    return "features of 50 lines by one worker", relative(np.load(output), expected()), HALF


USES = {
    '`load(device="cuda")`, `encode_text`': load,
    "`hidden_states`": hidden_states,
    "`trace`": trace,
    "`compare`": compare,
    "`diagnose`": diagnose,
    "`backward`": backward,
    "`minclip encode --device cuda`, resumed": resume,
    "`minclip encode --dask`, dask-cuda": dask_cuda,
}


def expected():
    return corpora.expected(minclip.load(), corpora.TEXTS)


def worst(arrays, truths, bound):
    """Return the largest relative distance of some arrays from the truths, and the bound."""
    return max(relative(a, b) for a, b in zip(arrays, truths, strict=True)), bound


def lines():
    """Yield the lines of the table, a row as soon as its use has run. A use that fails does not end it."""
    yield "\n## Each use once\n\n| use | compared with the CPU | figure | bound | s |\n|---|---|---|---|---|"
    failures = []
    for name, use in USES.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                what, figure, bound = use(Path(folder))
            except ImportError as error:
                yield f"| {name} | not run: {error} | | | |"
                continue
            except Exception:
                failures.append(traceback.format_exc())
                yield f"| {name} | **fails**, see below | | | |"
                continue
        verdict = "" if figure <= bound else " **too far**"
        yield f"| {name} | {what} | {figure:.2g}{verdict} | {bound:g} | {time.perf_counter() - start:.1f} |"
    for failure in failures:
        yield f"\n```\n{failure}```"
