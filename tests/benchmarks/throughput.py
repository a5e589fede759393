"""Time minclip.fast on a CPU against torch, transformers, onnxruntime and the floor that matmul sets.

    python -m tests.benchmarks.throughput [prompts] [captions] [one] [memory] [growth]

Random weights at ViT-B/32's text size, float32. The prompts are ImageNet's, 1000 names in 80 templates,
read from open_clip_torch: installed, or a wheel named by --open-clip (`pip download --no-deps
open_clip_torch`). A peer that is not installed is left out and named. The floor is the time that the
multiplications of the prefix tree take at the best matmul rate seen in the run, before, between and after.
"""

import argparse
import importlib.util
import io
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import minclip
from minclip import fast, tokenizer
from minclip.fast.tree import sort
from minclip.params import count_layers, end_of_text
from tests.benchmarks.peers import peak_memory
from tests.support.oracles import SIZES, openai_model, random_params, transformers_model

SIZE = SIZES["ViT-B/32"]
BATCH = 64  # texts a call of the peers


def imagenet_prompts(wheel):
    """The 80,000 zero-shot prompts as tokens, or None where open_clip_torch is not to be found."""
    spec = importlib.util.find_spec("open_clip")
    if wheel:
        source = zipfile.ZipFile(wheel).read("open_clip/zero_shot_metadata.py")
    elif spec:
        source = Path(spec.origin).with_name("zero_shot_metadata.py").read_bytes()
    else:
        return None
    metadata = {}
    exec(source, metadata)
    templates = metadata["OPENAI_IMAGENET_TEMPLATES"]
    return minclip.tokenize([t(name) for name in metadata["IMAGENET_CLASSNAMES"] for t in templates])


def captions(count=5000, seed=0):
    """Captions of 3 to 16 words that share no template: the vocabulary's own words, at random."""
    words = [w[:-4] for w in tokenizer.spellings() if w.endswith("</w>") and w[:-4].isalpha()]
    draw = random.Random(seed)
    return minclip.tokenize([" ".join(draw.choices(words, k=draw.randint(3, 16))) for _ in range(count)])


def needed_flops(params, tokens):
    """What the matmuls of the prefix tree cost, attention and the trimmed last layer included."""
    texts = sort(tokens, end_of_text(params, tokens))
    D, E = params["text_projection"].shape
    F = 4 * D
    nodes, count = texts.new_nodes.sum(), len(texts.rows)

    def seen(a, b):
        return ((b * (b + 1) - a * (a + 1)) // 2).sum()  # positions a to b attend to 1 + ... + b - a of them

    block = nodes * (8 * D * D + 4 * D * F) + 4 * D * seen(texts.shared, texts.lengths)
    last = nodes * 4 * D * D + count * (4 * D * D + 4 * D * F) + 4 * D * texts.lengths.sum()
    return (count_layers(params) - 1) * block + last + count * 2 * D * E


def matmul_rate():
    """The best float32 rate in flops a second, BLAS on its own threads or one on each of ours."""
    rng, threads = np.random.default_rng(0), len(os.sched_getaffinity(0))
    return max(
        rate
        for M, K, N in ((2048, 512, 2048), (2048, 2048, 512), (2048, 2048, 2048))
        for rate in matmul_rates(
            rng.standard_normal((threads, M, K), np.float32), rng.standard_normal((K, N), np.float32)
        )
    )


def matmul_rates(stack, w):
    """Rates of stack[i] @ w for all i: one after another by BLAS's threads, then side by side on ours."""
    out = np.empty((*stack.shape[:2], w.shape[1]), np.float32)
    flops = 2 * stack.size * w.shape[1]

    def multiply(i):
        np.matmul(stack[i], w, out=out[i])

    each = range(len(stack))
    for _ in range(5):
        yield flops / timed(lambda: [multiply(i) for i in each])[0]
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(len(stack)) as pool:
        for _ in range(5):
            yield flops / timed(lambda: list(pool.map(multiply, each)))[0]


def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def sorted_and_trimmed(encode):
    """encode, called on batches of texts of like length without the padding that none of them needs."""

    def whole(tokens):
        lengths = tokens.argmax(axis=-1) + 1
        order, features = lengths.argsort(kind="stable"), None
        for a in range(0, len(tokens), BATCH):
            batch = order[a : a + BATCH]
            found = encode(tokens[batch, : lengths[batch].max()])
            features = np.empty((len(tokens), found.shape[1]), found.dtype) if features is None else features
            features[batch] = found
        return features

    return whole


def peers(params):
    """Name → (encode, how many texts are enough to time it), of those that are installed."""
    found, missing = {}, []
    for name, make in (
        ("torch padded", torch_padded),
        ("transformers", transformers_text),
        ("onnxruntime", onnx),
    ):
        try:
            encode = make(params)
        except ImportError as error:
            missing.append(f"{name} ({error.name})")
        else:
            found[name] = (encode, 128) if name == "torch padded" else (sorted_and_trimmed(encode), 1600)
    if missing:
        print("not installed:", ", ".join(missing))
    return found


def torch_padded(params):
    """OpenAI's own clip/model.py, every text padded to 77."""
    import torch

    model = openai_model(params)

    def encode(tokens):
        with torch.no_grad():
            return np.concatenate(
                [model.encode_text(part).numpy() for part in torch.from_numpy(tokens).split(BATCH)]
            )

    return encode


def transformers_text(params):
    import torch

    model = transformers_model(params)

    def encode(tokens):
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(tokens).long()).text_embeds.numpy()

    return encode


def onnx(params):
    import onnxruntime

    file = io.BytesIO()
    onnx_file(params, file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda tokens: session.run(None, {"tokens": tokens.astype(np.int64)})[0]


def onnx_file(params, file):
    """Export the encoder, in plain torch operations, with free batch and length to a path or open file."""
    import torch

    tokens = torch.tensor([[49406, 320, 2368, 49407]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            exportable(params), (tokens,), file, input_names=["tokens"], output_names=["features"],
            dynamic_axes={"tokens": {0: "B", 1: "L"}}, opset_version=17, dynamo=False,
        )  # fmt: skip


def exportable(params):
    import torch
    from torch.nn import functional

    state = {name: torch.from_numpy(array) for name, array in params.items()}
    D, layers = params["text_projection"].shape[0], count_layers(params)
    mask = torch.full((77, 77), -torch.inf).triu(1)

    class Text(torch.nn.Module):
        def forward(self, tokens):
            B, L = tokens.shape
            x = state["token_embedding.weight"][tokens] + state["positional_embedding"][:L]
            for i in range(layers):
                p = {
                    k.split(".", 3)[3]: v
                    for k, v in state.items()
                    if k.startswith(f"transformer.resblocks.{i}.")
                }
                h = functional.layer_norm(x, (D,), p["ln_1.weight"], p["ln_1.bias"])
                qkv = functional.linear(h, p["attn.in_proj_weight"], p["attn.in_proj_bias"])
                q, k, v = qkv.reshape(B, L, 3, D // 64, 64).permute(2, 0, 3, 1, 4)
                weights = (q @ k.transpose(2, 3) / 8 + mask[:L, :L]).softmax(-1)
                h = (weights @ v).transpose(1, 2).reshape(B, L, D)
                x = x + functional.linear(h, p["attn.out_proj.weight"], p["attn.out_proj.bias"])
                h = functional.layer_norm(x, (D,), p["ln_2.weight"], p["ln_2.bias"])
                h = functional.linear(h, p["mlp.c_fc.weight"], p["mlp.c_fc.bias"])
                h = functional.linear(
                    h * torch.sigmoid(1.702 * h), p["mlp.c_proj.weight"], p["mlp.c_proj.bias"]
                )
                x = x + h
            x = x[torch.arange(B), tokens.argmax(-1)]
            x = functional.layer_norm(x, (D,), state["ln_final.weight"], state["ln_final.bias"])
            return x @ state["text_projection"]

    return Text()


def corpus_table(params, others, title, tokens, rounds=3):
    """Print milliseconds a text, medians of interleaved rounds, and how minclip.fast compares."""
    ways = {"minclip.fast": (lambda tokens: fast.encode_text(params, tokens), None), **others}
    seconds, rates = {name: [] for name in ways}, [matmul_rate()]
    for _ in range(rounds):
        for name, (encode, enough) in ways.items():
            some = tokens[:enough]
            spent, features = timed(lambda encode=encode, some=some: encode(some))
            seconds[name].append(spent / len(some))
            expected = minclip.encode_text(params, some[:50])
            apart = np.linalg.norm(features[:50] - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert apart.max() < 1e-5, f"{name} is {apart.max():.1e} off"
        rates.append(matmul_rate())
    floor = needed_flops(params, tokens) / max(rates) / len(tokens)
    ours = statistics.median(seconds["minclip.fast"])
    nodes = sort(tokens, end_of_text(params, tokens)).new_nodes.sum() / len(tokens)
    speeds = " ".join(f"{rate / 1e9:.0f}" for rate in rates)
    print(f"\n{title}: {nodes:.1f} nodes a text, matmul at {speeds} GFLOP/s")
    print("\n| | ms a text | minclip.fast is |\n|---|---|---|")
    for name, spent in seconds.items():
        ms = statistics.median(spent)
        print(f"| {name} | {ms * 1e3:.2f} | {ms / ours:.2f}× as fast |")
    print(f"| matmul floor | {floor * 1e3:.2f} | {ours / floor:.2f}× the floor |")


def one_text(params, others):
    """Print the latency of one short text, medians of 30 in a row."""
    # By turns, each way would find the cores held by the last one's threads, which spin for a while.
    tokens = minclip.tokenize("a photo of a cat")
    ways = {"encode_text": (lambda t: minclip.encode_text(params, t), None), **others}
    ms = {}
    for name, (encode, _) in ways.items():
        time.sleep(1)
        spent = [timed(lambda encode=encode: encode(tokens))[0] for _ in range(33)]
        ms[name] = 1e3 * statistics.median(spent[3:])
    print("\n| one short text | ms | encode_text is |\n|---|---|---|")
    for name, value in ms.items():
        print(f"| {name} | {value:.1f} | {value / ms['encode_text']:.2f}× as fast |")


def memory(tokens):
    """Print the peak of a process of its own that encodes tokens, beside parameters and output."""
    if os.environ.get("THROUGHPUT_MEMORY") is None:
        environment = {**os.environ, "THROUGHPUT_MEMORY": "1"}
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.throughput", *sys.argv[1:]], env=environment, check=True
        )
        return
    params = random_params(**SIZE)
    features = fast.encode_text(params, tokens)
    own = sum(array.nbytes for array in params.values()) + features.nbytes
    print(
        f"\n{len(tokens):,} prompts: at most {(peak_memory() - own) / 1e6:.0f} MB "
        f"beside the {own / 1e6:.0f} MB of parameters and output"
    )


def growth(params, tokens, picture):
    """Print, and draw to the file picture, the time a text takes against the size of the corpus."""
    sizes = [10**2, 10**3, 10**4, len(tokens)]
    ms, floor = [], []
    for size in sizes:
        spent = [
            timed(lambda n=size: fast.encode_text(params, tokens[:n]))[0]
            for _ in range(3 if size < 10**4 else 1)
        ]
        ms.append(1e3 * statistics.median(spent) / size)
        floor.append(1e3 * needed_flops(params, tokens[:size]) / matmul_rate() / size)
    print("\n| texts | ms a text | floor |\n|---|---|---|")
    print("\n".join(f"| {n:,} | {a:.2f} | {b:.2f} |" for n, a, b in zip(sizes, ms, floor, strict=True)))
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no plot: matplotlib is not installed")
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.loglog(sizes, ms, "o-", label="minclip.fast")
    axes.loglog(sizes, floor, "o--", color="grey", label="matmul floor")
    axes.set(
        xlabel="prompts in the corpus", ylabel="ms a prompt", title="The more texts, the more they share"
    )
    axes.set_yticks([1, 2, 3, 5], ["1", "2", "3", "5"])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(picture)
    print("drawn to", picture)


def main():
    parts = ["prompts", "captions", "one", "memory", "growth"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="any of " + ", ".join(parts))
    parser.add_argument("--open-clip", metavar="WHEEL")
    parser.add_argument("--plot", default=Path(__file__).with_name("throughput.svg"))
    options = parser.parse_args()
    wanted = options.parts or parts
    prompts = imagenet_prompts(options.open_clip)
    if os.environ.get("THROUGHPUT_MEMORY"):
        return memory(prompts)
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    print(platform.machine(), *[line.split(": ")[1] for line in cpu[:1]], end=", ")
    print(
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, numpy {np.__version__}",
        end="",
    )
    params = random_params(**SIZE)
    others = peers(params) if {"prompts", "captions", "one"} & set(wanted) else {}
    print(
        "".join(
            f", {n} {sys.modules[n].__version__}"
            for n in ("torch", "transformers", "onnxruntime")
            if n in sys.modules
        )
    )
    if prompts is None:
        print("without ImageNet's prompts: open_clip_torch is not installed, and no --open-clip given")
    else:
        mixed = prompts[np.random.default_rng(0).permutation(len(prompts))]
        if "prompts" in wanted:
            corpus_table(params, others, "4,800 of ImageNet's prompts, mixed", mixed[:4800])
    if "captions" in wanted:
        corpus_table(params, others, "5,000 varied captions", captions(), rounds=2)
    if "one" in wanted:
        one_text(params, others)
    if "memory" in wanted and prompts is not None:
        memory(prompts)
    if "growth" in wanted and prompts is not None:
        growth(params, mixed, options.plot)


if __name__ == "__main__":
    main()
