"""Test and measure minclip on the GPU at hand, beside torch on the same GPU, and write all of it as Markdown.

    python -m tests.benchmarks.gpu [tests] [uses] [speed] [knobs] [--open-clip WHEEL] [--record FILE.md]

tests   `pytest -m gpu tests/unit/gpu`
uses    each use of a GPU once, checked against the CPU: see gpu_uses.py
speed   at the text sizes of ViT-B/32 and ViT-L/14: precision, encode_text, a corpus, and the largest kernels
knobs   the corpus at ViT-B/32's size with other numbers of nodes and texts at once

Weights are random float16 numbers. The corpus is ImageNet's 80,000 prompts, from open_clip_torch: installed,
or a wheel of it. torch is OpenAI's own clip/model.py as clip.load makes it on a GPU. Times are medians
between events on the GPU, after a warm-up, each round on data it has not seen: the corpus in another order,
other tokens. The needed flops are counted by throughput.needed_flops. A part that fails is recorded, and the
next one runs. Planned for under eight minutes on a fast card; the file says how long each part took.
"""

import argparse
import importlib.metadata
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np

import minclip
from minclip import fast, model
from minclip.gpu import device
from tests.benchmarks import gpu_uses
from tests.benchmarks.throughput import imagenet_prompts, needed_flops
from tests.support.oracles import (
    SIZES,
    openai_model,
    random_params,
    random_tokens,
    relative,
    torch_encode_text,
)

try:
    cupy = device.working_cupy()
except ValueError as error:
    sys.exit(f"nothing was measured: {error}")

ROOT = Path(__file__).parents[2]
ROUNDS = 3
BATCH = 1024  # texts that torch takes at once


def seconds(call):
    """Time between two events on the default stream, which is torch's too, around call()."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    call()
    end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1e3


def medians(ways, fresh, rounds=ROUNDS):
    """Return {name: median seconds of ways[name](data)}, in turns, with data = fresh(round).

    Round 0 warms up.
    """
    spent = {name: [] for name in ways}
    for i in range(rounds + 1):
        data = fresh(i)
        for name, way in ways.items():
            spent[name].append(seconds(lambda way=way, data=data: way(data)))
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


def matmul_rate(size=8192):
    """The best float16 rate in flops a second, over square matrices and over those of the MLP."""
    rates = []
    for M, K, N in ((size, size, size), (4 * size, size // 16, size // 4), (4 * size, size // 4, size // 16)):
        rng = np.random.default_rng(M + N)
        a, b = (cupy.asarray(rng.standard_normal(s, np.float32).astype("f2")) for s in ((M, K), (K, N)))
        times = [seconds(lambda a=a, b=b: model.matmul(a, b)) for _ in range(ROUNDS + 3)]
        rates.append(2 * M * K * N / statistics.median(times[3:]))
    return max(rates)


def torch_peers(params, where):
    """Padded, and sorted by length and trimmed: float16 features of tokens, which stay where they are."""
    import torch

    model = openai_model(params, "float16").to(where)

    def encode(tokens, trimmed):
        lengths = tokens.argmax(axis=-1) + 1
        order, found = lengths.argsort(kind="stable"), []
        for a in range(0, len(tokens), BATCH):
            rows = order[a : a + BATCH]
            L = lengths[rows].max() if trimmed else tokens.shape[1]
            cut(model, L)
            ids = torch.from_numpy(np.ascontiguousarray(tokens[rows, :L])).to(where).long()
            found.append(model.encode_text(ids))
        cut(model, tokens.shape[1])
        return torch.cat(found)[torch.from_numpy(order.argsort()).to(where)]

    whole = [block.attn_mask.to(where) for block in model.transformer.resblocks]
    positions = model.positional_embedding.data

    def cut(model, L):
        """OpenAI's model takes its one length only, so its mask and positions are cut to L."""
        model.positional_embedding.data = positions[:L]
        for block, mask in zip(model.transformer.resblocks, whole, strict=True):
            block.attn_mask = mask[:L, :L]

    return torch.no_grad()(encode)


def parity(params, tokens, where):
    """Rows of the parity table, of float16 parameters as numbers of every precision."""
    wide = {name: array.astype(np.float64) for name, array in params.items()}
    single = {name: array.astype(np.float32) for name, array in params.items()}
    truth = torch_encode_text(wide, tokens, "float64")
    half = device.to_gpu(params)
    cpu = minclip.encode_text(single, tokens)
    return {
        "float32, GPU − CPU": relative(minclip.encode_text(device.to_gpu(single), tokens).get(), cpu),
        "float16, encode_text − truth": relative(minclip.encode_text(half, tokens).get(), truth),
        "float16, fast − truth": relative(fast.encode_text(half, tokens).get(), truth),
        "float16, torch − truth": relative(torch_encode_text(params, tokens, "float16", device=where), truth),
    }


def speed(name, size, prompts, rate, where="cuda", full=256):
    """Yield the lines of one size's section."""
    params = random_params(**size, dtype=np.float16)
    half, peers = device.to_gpu(params), torch_peers(params, where)
    apart = parity(params, random_tokens([2, 3, 9, 20, 40, 77] * 4), where)
    yield f"\n## Text tower of {name}\n\n| relative L2 distance | |\n|---|---|"
    yield from (f"| {what} | {value:.2e} |" for what, value in apart.items())

    plain = medians(
        {
            "minclip.encode_text": lambda tokens: minclip.encode_text(half, tokens),
            "torch": lambda tokens: peers(tokens, trimmed=False),
        },
        lambda i: random_tokens([77] * full, seed=i),
    )
    ratio = plain["torch"] / plain["minclip.encode_text"]
    yield f"\n{full} texts of 77 tokens: " + ", ".join(f"{n} {s * 1e3:.2f} ms" for n, s in plain.items())
    yield f"(minclip {ratio:.2f}× as fast; to reach: 0.8×)."
    if prompts is None:
        yield "\nNo corpus: install open_clip_torch or give --open-clip WHEEL."
        return
    corpus = medians(
        {
            "minclip.fast": lambda tokens: fast.encode_text(half, tokens),
            "torch, sorted and trimmed": lambda tokens: peers(tokens, trimmed=True),
            "torch, padded": lambda tokens: peers(tokens, trimmed=False),
        },
        lambda i: shuffled(prompts, i),
    )
    ours = corpus["minclip.fast"]
    yield f"\n| {len(prompts):,} ImageNet prompts | seconds | minclip.fast is | to reach |\n|---|---|---|---|"
    for way, reach in zip(corpus, ("", "3×", "10×"), strict=True):
        yield f"| {way} | {corpus[way]:.3f} | {corpus[way] / ours:.1f}× as fast | {reach} |"
    share = needed_flops(params, prompts) / ours / rate
    pool = cupy.get_default_memory_pool()
    yield f"\nminclip.fast uses {share:.0%} of the matmul rate on the flops it needs (to reach: 40%);"
    yield f"CuPy's pool holds {pool.total_bytes() / 1e9:.2f} GB, parameters and features included."
    yield from profile(lambda: fast.encode_text(half, shuffled(prompts, ROUNDS + 1)))


def shuffled(prompts, seed):
    return prompts[np.random.default_rng(seed).permutation(len(prompts))]


def profile(call, shown=8):
    """Yield a table of the kernels that take the most time, as torch's profiler sees all of the process."""
    from torch.profiler import profile, supported_activities

    with profile(activities=supported_activities()) as seen:
        call()
        cupy.cuda.get_current_stream().synchronize()
    kernels = [kernel for kernel in seen.key_averages() if kernel.self_device_time_total]
    kernels.sort(key=lambda kernel: -kernel.self_device_time_total)
    total = sum(kernel.self_device_time_total for kernel in kernels)
    yield f"\n| largest of {len(kernels)} kernels in minclip.fast | calls | ms | share |\n|---|---|---|---|"
    for kernel in kernels[:shown]:
        spent = kernel.self_device_time_total
        yield f"| `{kernel.key[:60]}` | {kernel.count} | {spent / 1e3:.1f} | {spent / total:.0%} |"


def knobs(size, prompts):
    """Yield a table of the corpus's time by the numbers of nodes and texts at once."""
    half = device.to_gpu(random_params(**size, dtype=np.float16))
    choices = [(nodes, None) for nodes in (4096, 8192, 16384, 32768, 65536)]
    choices += [(None, texts) for texts in (2**14, 2**15, 2**16)]
    ways = {
        (nodes or "default", texts or "default"): (
            lambda tokens, nodes=nodes, texts=texts: fast.encode_text(half, tokens, nodes=nodes, texts=texts)
        )
        for nodes, texts in choices
    }
    yield "\n## Knobs\n\n| nodes | texts | seconds |\n|---|---|---|"
    for (nodes, texts), spent in medians(ways, lambda i: shuffled(prompts, i)).items():
        yield f"| {nodes} | {texts} | {spent:.3f} |"


def suite():
    """Yield what pytest says of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-rfEs", "--tb=short", "-m", "gpu"]
    done = subprocess.run([*command, "tests/unit/gpu"], capture_output=True, text=True, cwd=ROOT)
    yield "\n## `pytest -m gpu tests/unit/gpu`\n\n```"
    yield from (done.stdout + done.stderr).strip().splitlines()[-60 if done.returncode else -8 :]
    yield "```"


def heading(rate):
    runtime = cupy.cuda.runtime
    card = runtime.getDeviceProperties(0)["name"].decode()
    yield f"# minclip on {card}\n"
    yield f"Driver {driver()} (CUDA {runtime.driverGetVersion()}), runtime {runtime.runtimeGetVersion()}, "
    yield f"CuPy {cupy.__version__}, torch {version('torch')}, numpy {np.__version__}, Python "
    yield f"{platform.python_version()}. minclip {minclip.__version__}, float16 matmul: {rate / 1e12:.0f} "
    yield f"TFLOP/s. Medians of {ROUNDS} rounds."


def driver():
    """Return the version of NVIDIA's driver."""
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def parts(wanted, prompts, rate):
    """Yield (title, lines) of the parts, in the order of their importance."""
    yield "heading", heading(rate)
    if "tests" in wanted:
        yield "tests", suite()
    if "uses" in wanted:
        yield "uses", gpu_uses.lines()
    if "speed" in wanted:
        for name in ("ViT-B/32", "ViT-L/14"):
            yield f"speed of {name}", speed(name, SIZES[name], prompts, rate)
    if "knobs" in wanted and prompts is not None:
        yield "knobs", knobs(SIZES["ViT-B/32"], prompts)


def record(parts, path):
    """Print and write the lines of each part as they come. A part that fails does not end the next."""
    written = []

    def write(line):
        print(line, flush=True)
        written.append(line)
        path.write_text("\n".join(written) + "\n")  # if the run is cut short, what is measured remains

    for title, lines in parts:
        start = time.perf_counter()
        try:
            for line in lines:
                write(line)
        except Exception:
            write(f"\n**{title} failed:**\n\n```\n{traceback.format_exc()}```")
        write(f"\n({title}: {time.perf_counter() - start:.0f} s)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="any of tests, uses, speed, knobs")
    parser.add_argument("--open-clip", metavar="WHEEL")
    parser.add_argument("--record", metavar="FILE.md", default=Path(__file__).with_name("gpu.md"), type=Path)
    options = parser.parse_args()
    wanted = options.parts or ["tests", "uses", "speed", "knobs"]
    record(parts(wanted, imagenet_prompts(options.open_clip), matmul_rate()), options.record)


if __name__ == "__main__":
    main()
