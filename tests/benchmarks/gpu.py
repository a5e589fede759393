"""Measure minclip on the GPU at hand against torch on the same GPU, and write what was measured as Markdown.

    python -m tests.benchmarks.gpu [--open-clip WHEEL] [--record FILE.md]

Random float16 weights at the text sizes of ViT-B/32 and ViT-L/14. The corpus is ImageNet's 80,000 prompts,
from open_clip_torch: installed, or a wheel of it. torch is OpenAI's own clip/model.py as clip.load makes it
on a GPU. Times are medians between events on the GPU, after a warm-up, each round on data it has not seen:
the corpus in another order, other tokens. What is needed in flops is counted by throughput.needed_flops.
About ten minutes of a fast card; the first minute compiles kernels.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np

import minclip
from minclip import fast, model
from minclip.gpu import device
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

ROUNDS = 5
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
    """Name → median seconds of ways[name](data), in turns, fresh(round) the data; round 0 warms up."""
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


def measure(name, size, prompts, rate, where="cuda", full=256):
    """The lines of one size's section."""
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

    pool = cupy.get_default_memory_pool()
    corpus = medians(
        {
            "minclip.fast": lambda tokens: fast.encode_text(half, tokens),
            "torch, sorted and trimmed": lambda tokens: peers(tokens, trimmed=True),
            "torch, padded": lambda tokens: peers(tokens, trimmed=False),
        },
        lambda i: prompts[np.random.default_rng(i).permutation(len(prompts))],
    )
    ours = corpus["minclip.fast"]
    yield f"\n| {len(prompts):,} ImageNet prompts | seconds | minclip.fast is | to reach |\n|---|---|---|---|"
    for way, reach in zip(corpus, ("", "3×", "10×"), strict=True):
        yield f"| {way} | {corpus[way]:.3f} | {corpus[way] / ours:.1f}× as fast | {reach} |"
    share = needed_flops(params, prompts) / ours / rate
    yield f"\nminclip.fast uses {share:.0%} of the matmul rate on the flops it needs (to reach: 40%);"
    yield f"CuPy's pool holds {pool.total_bytes() / 1e9:.2f} GB, parameters and features included."


def heading(rate):
    import torch

    runtime = cupy.cuda.runtime
    card = runtime.getDeviceProperties(0)["name"].decode()
    yield f"# minclip on {card}\n"
    yield f"CUDA driver {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()}, CuPy "
    yield f"{cupy.__version__}, torch {torch.__version__}, numpy {np.__version__}, Python "
    yield f"{sys.version.split()[0]}. float16 matmul: {rate / 1e12:.0f} TFLOP/s. Medians of {ROUNDS} rounds."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--open-clip", metavar="WHEEL")
    parser.add_argument("--record", metavar="FILE.md", default=Path(__file__).with_name("gpu.md"), type=Path)
    options = parser.parse_args()
    prompts = imagenet_prompts(options.open_clip)
    if prompts is None:
        sys.exit("no ImageNet prompts: install open_clip_torch or give --open-clip WHEEL")
    lines, rate = [], matmul_rate()
    measured = (measure(name, SIZES[name], prompts, rate) for name in ("ViT-B/32", "ViT-L/14"))
    for part in (heading(rate), *measured):
        for line in part:
            print(line, flush=True)
            lines.append(line)
            options.record.write_text("\n".join(lines) + "\n")  # what is measured so far, if the loan ends


if __name__ == "__main__":
    main()
