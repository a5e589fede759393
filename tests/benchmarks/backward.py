"""Check and time minclip.backward beside torch: gradients, speed, memory, and which word mattered.

    python -m tests.benchmarks.backward [parity] [speed] [memory] [words]

parity   relative L2 errors of every parameter's gradient against torch's autograd, and against float64
speed    forward and backward of minclip, of OpenAI's model in torch and of transformers, in turns
memory   the peak of a process that does one forward and one backward pass, beside that before it
words    relevance and gradient times embedding, beside the drop of the cosine when a word is left out

Random weights, except for `words`, which uses the built-in model. --rounds repeats the timings. minclip
runs once with all stages kept and once with stages="blocks".
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

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


def inputs(size, length, texts):
    """Return params, tokens without padding, and a gradient by the features."""
    params = random_params(**size, context=length)
    grad = np.random.default_rng(1).standard_normal((texts, size["embed"])).astype(np.float32)
    return params, random_tokens([length] * texts, context=length), grad


def passes(params, tokens, grad):
    """Return {name: a function that does one forward and one backward pass}."""
    import torch

    ids, start = torch.from_numpy(tokens).long(), torch.from_numpy(grad)
    openai, hugging_face = openai_model(params), transformers_model(params)

    def of_torch(model, features):
        model.zero_grad(set_to_none=True)
        features().backward(start)

    return {
        "minclip": lambda: minclip.backward(minclip.trace(params, tokens), grad),
        "minclip, blocks": lambda: minclip.backward(minclip.trace(params, tokens, stages="blocks"), grad),
        "minclip, stages only": lambda: minclip.backward(
            minclip.trace(params, tokens), grad, parameters=False
        ),
        "OpenAI's clip": lambda: of_torch(openai, lambda: openai.encode_text(ids)),
        "transformers": lambda: of_torch(hugging_face, lambda: hugging_face(input_ids=ids).text_embeds),
    }


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
        run = passes(*inputs(size, length, texts))
        times = {name: [] for name in run}
        for name in run:
            run[name]()
        for _ in range(rounds):
            for name, one_pass in run.items():
                wall, cpu = time.perf_counter(), time.process_time()
                one_pass()
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
    """Print the peak of this process after one pass, less its memory before, in MiB."""
    size, length, texts = CASES[case]
    params, tokens, grad = inputs(size, length, texts)
    run = passes(params, tokens, grad)[name]
    passes(*inputs(dict(width=64, layers=1, embed=8), 4, 2))[name]()  # libraries allocate buffers once
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    run()
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before:.0f}")


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
        }[part]()
        print()


if __name__ == "__main__":
    main()
