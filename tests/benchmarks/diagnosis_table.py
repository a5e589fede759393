"""Try minclip.diagnose on broken ports and write the table of what it said.

    python -m tests.benchmarks.diagnosis_table [-o tests/benchmarks/diagnosis.md]

The ports are those of tests/broken_port.py, which shares no code with the catalogue. A bug counts as
visible where it moves the features by more than VISIBLE, in float64; a pair, where each of its bugs does
so on top of the other. A bug is named first where the first finding is that bug and nothing else.

The ports of the three small models are diagnosed side by side, a process with one BLAS thread to each
core. Those of ViT-B/32's size come last, one after another with the whole machine, for their times.
"""

import argparse
import functools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import minclip
from tests.support.broken_port import HARMLESS, SINGLES, BrokenPort
from tests.support.oracles import random_params

VISIBLE = 1e-4
WEIGHTS = "\n## Weights, "  # the file goes on with the tables of weights_table from here

PAIRS = (
    ("erf", "eps_1e-6"),
    ("erf", "no_mask"),
    ("erf", "projection_transposed"),
    ("silu", "pool_last"),
    ("tanh", "scale_heads"),
    ("no_mask", "no_positions"),
    ("no_mask", "padded_with_end"),
    ("no_mask", "pool_mean"),
    ("mask_minus_one", "no_scale"),
    ("kqv", "projection_transposed"),
    ("interleaved", "erf"),
    ("heads_double", "unbiased"),
    ("heads_half", "out_transposed"),
    ("scale_width", "no_final_norm"),
    ("qkv_transposed", "pool_before"),
    ("no_qkv_bias", "no_mlp_bias"),
    ("eps_1e-3", "no_out_bias"),
    ("post_norm", "erf"),
    ("rms", "positions_from_one"),
    ("stream_normed", "split_straight"),
    ("norms_swapped", "projection_missing"),
    ("penultimate", "no_final_norm"),
    ("no_start", "scale_twice"),
    ("embedding_scaled", "kqv"),
    ("std_plus_eps", "pool_row_zero"),
    ("erf", "normalized"),
    ("no_mask", "logit_scale"),
    ("pool_count", "padded_with_end"),
    ("softmax_queries", "no_out_bias"),
    ("parallel", "relu"),
)

TEXTS = (
    "a heron standing in shallow water",
    "!",
    "three red bicycles! leaning against a wall",
    "the menu of a small restaurant, written by hand on a blackboard in chalk",
    "fog",
    "an old map of the harbour with every street and every pier named, drawn in ink, coloured by hand, "
    "folded many times, torn at one corner and mended with tape, and signed below by its first owner",
    "rain! on a tin roof",
    "word " * 90,
)


SIZES = {
    "3 layers, 2 heads, 128 to 96": (1, 128, 2, 3, 96),
    "12 layers, 8 heads, 256 to 256": (2, 256, 8, 12, 256),
    "ViT-B/32's size": (3, 512, 8, 12, 512),
}
LARGE = list(SIZES)[-1]
SMALL = (*list(SIZES)[:-1], "built-in")
TIMED = (("kqv",), ("eps_1e-6",), ("pool_last",), ("normalized",), *PAIRS[:3], *PAIRS[15:18])


def random_model(seed, width, heads, layers, embed, activation="quick_gelu"):
    params = random_params(width, layers, embed, seed=seed)
    return minclip.from_state_dict(params, activation=activation, heads=heads)


@functools.cache
def model(name):
    return minclip.load() if name == "built-in" else random_model(*SIZES[name])


def tokens_for(params, end_padded):
    """Ids of TEXTS [8, L]; the rows named are padded with the end of text."""
    tokens = minclip.tokenize(TEXTS, context_length=len(params["positional_embedding"]), truncate=True)
    tokens[6, 3] = 0  # "!" that is not the end of a word, as in "!=", for bugs that take id 0 for padding
    for row in end_padded:
        tokens[row, tokens[row].argmax() :] = tokens.max()
    return tokens


def port_features(params, tokens, bugs=(), dtype=torch.float32):
    state = {name: torch.from_numpy(array).to(dtype) for name, array in params.items()}
    features = BrokenPort(state, params.heads, params.activation, bugs).encode_text(tokens)
    return (features.float() if dtype is torch.bfloat16 else features).numpy()


def change(params, tokens, bugs, without=()):
    """Relative L2 by which bugs move the features that the port has with the bugs of `without` alone."""
    a, b = (port_features(params, tokens, set_, torch.float64) for set_ in (bugs, without))
    if a.shape != b.shape or not np.isfinite(a).all():
        return np.inf
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def visible(params, tokens, bugs):
    return all(change(params, tokens, bugs, set(bugs) - {bug}) > VISIBLE for bug in bugs)


def names(finding, bugs):
    """Whether a finding is these bugs and nothing else."""
    wanted = [SINGLES.get(bug, {"D1-end"}) for bug in bugs]
    ids = [fault.id for fault in finding.faults]
    return len(ids) == len(wanted) and all(any(i in want for i in ids) for want in wanted)


def trial(params, tokens, bugs):
    """(diagnosis, CPU seconds, place of the bugs among the findings counted from 1, or 0)."""
    features = port_features(params, tokens, bugs)
    start = time.process_time()
    diagnosis = minclip.diagnose(params, tokens, features)
    seconds = time.process_time() - start
    places = [i for i, finding in enumerate(diagnosis.findings, 1) if names(finding, bugs)]
    return diagnosis, seconds, places[0] if places else 0


def try_case(name, bugs):
    """A row of the table, and CPU seconds; None where this model's shape lets no port make them."""
    params = model(name)
    # The port's own padding shows only where ours is another.
    tokens = tokens_for(params, () if "padded_with_end" in bugs else (2, 4))
    if not fits(params, bugs):
        return None
    if not visible(params, tokens, bugs):
        return (name, bugs, "", "not visible on these texts", ""), 0
    diagnosis, seconds, place = trial(params, tokens, bugs)
    said = " or ".join(" + ".join(f.id for f in finding.faults) for finding in diagnosis.findings[:4])
    return (name, bugs, f"{diagnosis.error:.1e}", said or diagnosis.verdict, place == 1), seconds


def run_table(cases):
    """(rows, totals): a row for each model and case, and model -> (named first, visible, slowest)."""
    rows, totals = [], dict.fromkeys(SMALL, (0, 0, 0.0))
    with side_by_side() as pool:
        tried = [pool.submit(try_case, name, bugs) for name in SMALL for bugs in cases]
        for row, seconds in filter(None, (future.result() for future in tried)):
            rows.append(row)
            print(*row, f"{seconds:.1f} s", flush=True)
            first, seen, slowest = totals[row[0]]
            totals[row[0]] = first + (row[-1] is True), seen + (row[-1] != ""), max(slowest, seconds)
    return rows, totals


def run_large():
    """Lines on ports of ViT-B/32's size and eight texts: what was said, and how long it took."""
    params = model(LARGE)
    tokens = tokens_for(params, end_padded=())
    clean = port_features(params, tokens)
    noise = np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    ports = {" + ".join(bugs): port_features(params, tokens, bugs) for bugs in TIMED}
    ports |= {"none": clean, "nothing known: a tenth of noise": clean + 0.1 * abs(clean).mean() * noise}
    for port, features in ports.items():
        start = time.perf_counter()
        diagnosis = minclip.diagnose(params, tokens, features)
        seconds = time.perf_counter() - start
        said = [" + ".join(fault.id for fault in finding.faults) for finding in diagnosis.findings[:1]]
        yield f"| {port} | {', '.join([diagnosis.verdict, *said])} | {seconds:.1f} s |"


def side_by_side():
    """A pool of as many processes as there are cores, each with one thread."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn, one_thread)


def one_thread():
    torch.set_num_threads(1)
    threadpool_limits(1)


def fits(params, bugs):
    """Whether this model's shape lets a port make these mistakes."""
    D, E = params["text_projection"].shape
    return D == E or "projection_transposed" not in bugs


def clean_ports(params, tokens):
    """name -> features of ports without a bug."""
    clean = port_features(params, tokens)
    rounded = {name: array.astype(np.float16).astype(np.float32) for name, array in params.items()}
    rounded = minclip.Params(rounded, activation=params.activation, heads=params.heads)
    return {
        "clean": clean,
        "stored in float16": clean.astype(np.float16),
        "float64 throughout": port_features(params, tokens, dtype=torch.float64),
        "float16 throughout": port_features(params, tokens, dtype=torch.float16),
        "float16 weights, float32 otherwise": port_features(rounded, tokens),
        "bfloat16 throughout": port_features(params, tokens, dtype=torch.bfloat16),
        **{switch: port_features(params, tokens, {switch}) for switch in HARMLESS},
    }


def try_clean(name):
    """[(model, port, diagnosis)] of ports of one model without a bug."""
    params, tokens = model(name), tokens_for(model(name), end_padded=(2, 4))
    ports = clean_ports(params, tokens).items()
    return [(name, port, minclip.diagnose(params, tokens, features)) for port, features in ports]


def run_clean():
    """[(model, port, diagnosis)] of ports without a bug."""
    with side_by_side() as pool:
        rows = [row for rows in pool.map(try_clean, SMALL) for row in rows]
    for name, port, diagnosis in rows:
        print(name, port, diagnosis.verdict, *diagnosis.notes[:1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", dest="output", type=Path)
    args = parser.parse_args()
    singles, pairs = run_table([(bug,) for bug in SINGLES]), run_table(PAIRS)
    text = report(run_clean(), *singles, *pairs, list(run_large()))
    if args.output:
        args.output.write_text(text + other_tables(args.output))
    print(text)


def other_tables(path):
    """What weights_table wrote into the file; nothing if it has not."""
    _, heading, rest = path.read_text().partition(WEIGHTS) if path.exists() else ("", "", "")
    return heading + rest


def report(clean, singles, single_totals, pairs, pair_totals, large):
    lines = [
        "# What minclip.diagnose says of broken ports",
        "",
        "Made by `python -m tests.benchmarks.diagnosis_table -o tests/benchmarks/diagnosis.md`; the script",
        f"says how. Small models have one BLAS thread each, {os.cpu_count()} at a time.",
        "",
        "| model | single bugs named first | pairs named first | most CPU for a single, a pair |",
        "|---|---|---|---|",
    ]
    for model in single_totals:
        (f1, n1, s1), (f2, n2, s2) = single_totals[model], pair_totals[model]
        lines.append(f"| {model} | {f1} of {n1} | {f2} of {n2} | {s1:.1f} s, {s2:.1f} s |")
    f1, n1, f2, n2 = (
        sum(total[i] for total in totals.values()) for totals in (single_totals, pair_totals) for i in (0, 1)
    )
    lines.append(f"| all | {f1} of {n1} ({f1 / n1:.1%}) | {f2} of {n2} ({f2 / n2:.1%}) | |")
    alarms = [row for row in clean if row[2].verdict != "agrees"]
    lines += ["", f"{len(clean)} ports without a bug, {len(alarms)} false alarms."]
    lines += [f"- {model}: {port}: {diagnosis.verdict}" for model, port, diagnosis in alarms]
    lines += ["", f"Ports of {LARGE} and eight texts, one at a time with all of the machine:", ""]
    lines += ["| bugs | what was said | time |", "|---|---|---|", *large]
    lines += ["", "| model | bugs | relative error | what was said | first |", "|---|---|---|---|---|"]
    for model, bugs, error, said, first in singles + pairs:
        lines.append(
            f"| {model} | {' + '.join(bugs)} | {error} | {said} | {'yes' if first else 'no' * bool(error)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
