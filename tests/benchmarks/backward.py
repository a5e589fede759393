"""Check and time minclip.backward beside torch: gradients, speed, memory, and which word mattered.

    python -m tests.benchmarks.backward [parity] [speed] [memory] [words] [training]

parity   relative L2 errors of every parameter's gradient against torch's autograd, and against float64
speed    forward and backward of minclip, of OpenAI's model in torch and of transformers, in turns
memory   the peak of a process that does one forward and one backward pass, beside that before it
training a step of the built-in model's text tower, beside the torch tower of tests/train_builtin
words    relevance and gradient times embedding, beside the drop of the cosine when a word is left out

Random weights, except for `words`, which uses the built-in model. --rounds repeats the timings. minclip
runs once with all stages kept and once with stages="blocks".
"""

import argparse
import ctypes
import gc
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import minclip
from tests.support.oracles import (
    SIZES,
    openai_model,
    random_params,
    random_tokens,
    relative,
    torch_gradients,
    transformers_gradients,
    transformers_model,
)

CASES = {  # name -> (size, length of the texts, how many)
    "ViT-B/32, 32 texts of 16": (SIZES["ViT-B/32"], 16, 32),
    "ViT-B/32, 32 texts of 77": (SIZES["ViT-B/32"], 77, 32),
    "built-in, 256 texts of 16": (dict(width=128, layers=4, embed=128), 16, 256),
}

PASSES = ("minclip", "minclip, blocks", "minclip, stages only", "OpenAI's clip", "transformers")


def inputs(size, length, texts):
    """Return params, tokens without padding, and a gradient of the features."""
    params = random_params(**size, context=length)
    grad = np.random.default_rng(1).standard_normal((texts, size["embed"])).astype(np.float32)
    return params, random_tokens([length] * texts, context=length), grad


def one_pass(name, params, tokens, grad):
    """Return a function that does one forward and one backward pass of the implementation called name."""
    if name.startswith("minclip"):
        stages = "blocks" if name == "minclip, blocks" else "all"
        parameters = name != "minclip, stages only"
        return lambda: minclip.backward(
            minclip.trace(params, tokens, stages=stages), grad, parameters=parameters
        )
    import torch

    ids, start = torch.from_numpy(tokens).long(), torch.from_numpy(grad)
    model = openai_model(params) if name == "OpenAI's clip" else transformers_model(params)

    def run():
        model.zero_grad(set_to_none=True)
        features = model.encode_text(ids) if name == "OpenAI's clip" else model(input_ids=ids).text_embeds
        features.backward(start)

    return run


def parity():
    """Print how near the gradients are, the worst parameter and the median over the parameters."""
    tokens = random_tokens([2, 3, 9, 20, 77])
    print(
        "| text tower of | float64: minclip − torch, worst | minclip − transformers, worst "
        "| float32: minclip − truth, median | torch − truth, median | error / torch's, median | largest |\n"
        + "|---" * 7
        + "|"
    )
    for name, size in SIZES.items():
        for activation in ("quick_gelu", "gelu"):
            params, heads = random_params(**size), size["width"] // 64
            grad = np.random.default_rng(1).standard_normal((len(tokens), size["embed"]))
            tower = minclip.Params(params, activation=activation, heads=heads)
            truth = torch_gradients(params, tokens, grad, "float64", activation=activation)
            others = transformers_gradients(params, tokens, grad, "float64", activation=activation)
            wide = minclip.backward(minclip.trace(tower.astype("float64"), tokens), grad)
            worst = [max(relative(wide[key], o[key]) for key in wide) for o in (truth, others)]
            ours = minclip.backward(minclip.trace(tower, tokens), grad)
            theirs = torch_gradients(params, tokens, grad, activation=activation)
            errors = [[relative(g[key], truth[key]) for key in truth] for g in (ours, theirs)]
            ratios = [a / b for a, b in zip(*errors, strict=True)]
            figures = [f"{x:.1e}" for x in (*worst, *map(statistics.median, errors))]
            figures += [f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}"]
            print(f"| {name}, {activation} | {' | '.join(figures)} |", flush=True)


def speed(rounds, only):
    """Print milliseconds, and the median ratio of each round to OpenAI's model, of wall and of CPU time."""
    import torch

    print(f"{torch.get_num_threads()} threads of torch, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| | pass | ms, median | wall / OpenAI's | CPU / OpenAI's | wall / transformers |\n"
        + "|---" * 6
        + "|"
    )
    for case, (size, length, texts) in CASES.items():
        if only not in case:
            continue
        given = inputs(size, length, texts)
        run = {name: one_pass(name, *given) for name in PASSES}
        times = {name: [] for name in run}
        for name in run:
            run[name]()
        for _ in range(rounds):
            for name, pass_of in run.items():
                wall, cpu = time.perf_counter(), time.process_time()
                pass_of()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        for name, taken in times.items():
            cells = [f"{1e3 * statistics.median(wall for wall, _ in taken):.0f}"]
            for peer, of in (("OpenAI's clip", 0), ("OpenAI's clip", 1), ("transformers", 0)):
                pairs = zip(taken, times[peer], strict=True)
                cells.append(f"{statistics.median(a[of] / b[of] for a, b in pairs):.2f}")
            print(f"| {case} | {name} | {' | '.join(cells)} |", flush=True)


def memory():
    """Print the MiB that one forward and one backward pass adds to a process's peak."""
    print("| | pass | MiB over the parameters |\n|---|---|---|")
    for case in CASES:
        for name in ("minclip", "minclip, blocks", "OpenAI's clip", "transformers"):
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.backward",
                "peak",
                "--case",
                case,
                "--of",
                name,
            ]
            print(f"| {case} | {name} | {subprocess.check_output(command, text=True).strip()} |", flush=True)


def peak(case, name):
    """Print how much one pass raises the peak memory of this process, in MiB."""
    run = one_pass(name, *inputs(*CASES[case]))
    one_pass(name, *inputs(dict(width=64, layers=1, embed=8), 4, 2))()  # libraries allocate buffers once
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    run()
    print(f"{status('VmHWM') - before:.0f}")


def status(field):
    """Return a field of Linux's account of this process, in MiB."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


TEMPLATES = (
    "a photo of a {} on the beach",
    "two people and a {} in the kitchen",
    "my friend drew a small {} with a pencil",
    "a cat looks at the {} under the tree",
    "the {} on the red car in the rain",
)


def words():
    """Print how well each measure agrees with leaving words out, over texts that name a picture."""
    params, (_, names, pictures) = minclip.load(), minclip.pictures()
    chosen = [name for name in names if " " not in name and name.isalpha()][::40]
    scores = {"relevance": [], "gradient x embedding": []}
    for name in chosen:
        target = pictures[names.index(name)]
        for template in TEMPLATES:
            text = template.format(name)
            pieces, tokens = text.split(), minclip.tokenize(text)
            end = int(tokens[0].argmax())
            if end != len(pieces) + 1:  # a word of several tokens
                continue
            shorter = [" ".join(pieces[:i] + pieces[i + 1 :]) for i in range(len(pieces))]
            unit = minclip.normalize(minclip.encode_text(params, minclip.tokenize([text, *shorter])))
            drop = (unit[0] - unit[1:]) @ target
            trace = minclip.trace(params, tokens)
            start = minclip.normalize_backward(target[None], trace["text_features"])
            gradients = minclip.backward(trace, start, parameters=False)
            product = (gradients["token_embedding"] * trace["token_embedding"]).sum(axis=-1)[0]
            found = {
                "relevance": minclip.attribute(params, tokens, target)[0],
                "gradient x embedding": product,
            }
            for measure, value in found.items():
                value = value[1:end]
                scores[measure].append((np.corrcoef(value, drop)[0, 1], value.argmax() == drop.argmax()))
    for measure, found in scores.items():
        correlation, top = np.mean(found, axis=0)
        print(
            f"{measure}: mean correlation {correlation:.2f}, same top word in {top:.0%} of {len(found)} texts"
        )


def training(rounds):
    """Time a step of the built-in model's text tower, on a batch as tests/train_builtin makes it.

    Both sides do forward, unit features, and backward by a given gradient. torch runs the tower that
    tests/train_builtin trains, in bfloat16 as there and in float32; minclip runs in float32.
    """
    import torch

    from tests.train_builtin import train

    names = minclip.pictures()[1]
    texts = ([*names[:300], *(f"a photo of a {name} and a {name}" for name in names[300:560])])[:554]
    ragged = sorted(train.ragged(texts), key=len)
    cuts = [int(len(ragged) * part) for part in (0, 0.5, 0.8, 0.92, 0.98, 1)]
    groups = [ragged[a:b] for a, b in itertools.pairwise(cuts)]
    padded = [torch.nn.utils.rnn.pad_sequence(group, batch_first=True) for group in groups]
    tower = train.TextTower(torch.randn(train.VOCABULARY, train.WIDTH), torch.arange(train.FULL))
    params = minclip.from_state_dict(tower.parameters_by_name(), activation="quick_gelu", heads=2)
    start = [torch.randn(len(group), train.EMBED) for group in groups]

    def of_torch(bfloat16):
        tower.train(bfloat16)
        tower.zero_grad(set_to_none=True)
        loss = sum((tower.features(ids) * g).sum() for ids, g in zip(padded, start, strict=True))
        loss.backward()

    def of_minclip():
        for ids, g in zip(padded, start, strict=True):
            trace = minclip.trace(params, ids.numpy())
            minclip.backward(trace, minclip.normalize_backward(g.numpy(), trace["text_features"]))

    run = {
        "minclip": of_minclip,
        "torch, float32": lambda: of_torch(False),
        "torch, bfloat16": lambda: of_torch(True),
    }
    times = {name: [] for name in run}
    for _ in range(rounds + 1):
        for name, step in run.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, taken in times.items():
        pairs = list(zip(taken, times["minclip"], strict=True))[1:]
        walls, cpus = (statistics.median(b[of] / a[of] for a, b in pairs) for of in (0, 1))
        wall = 1e3 * statistics.median(t[0] for t in taken[1:])
        print(f"{name}: {wall:.0f} ms; minclip's time / its own: wall {walls:.2f}, CPU {cpus:.2f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["parity", "speed", "memory", "words"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="a word of the names of the cases to time")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.parts == ["peak"]:
        return peak(options.case, options.of)
    print(f"numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}\n")
    for part in options.parts:
        print(f"## {part}\n")
        {
            "parity": parity,
            "speed": lambda: speed(options.rounds, options.only),
            "memory": memory,
            "words": words,
            "training": lambda: training(options.rounds),
        }[part]()
        print()


if __name__ == "__main__":
    main()
