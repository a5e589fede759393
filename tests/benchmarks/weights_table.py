"""Measure what is said of weights, of slips in one layer and of quantized ports; write it into diagnosis.md.

    python -m tests.benchmarks.weights_table [-o tests/benchmarks/diagnosis.md] [--models NAME ...]
        [--formats ID ...]    the formats that every bug is tried beside; none leaves that out
        [--slips]             only the table of slips is made again, in its place
        [--noise]             only the lines on quantized ports are made again, in their place

Everything after the heading HEADING is replaced; the rest of the file is diagnosis_table's. A bug counts
beside int8 weights where it moves the features by at least twice as much as the weights do. Clean quantized
ports are minclip's formats in three sets of matrices, blocks of the gguf package and graphs of ONNX Runtime's
quantize_dynamic.
"""

import argparse
import itertools
import re
import sys
import time
from pathlib import Path

import numpy as np

import minclip
from minclip.params import count_layers
from minclip.porting.noise import PARTS, Candidate
from minclip.porting.quantization import FORMATS
from tests.benchmarks import diagnosis_table as table
from tests.support import foreign_weights, oracles, quantized, weight_slips
from tests.support.broken_port import SINGLES
from tests.unit.porting import test_slips
from tests.unit.porting.weights.test_checking import NAMELESS, coarse, not_named

HEADING = "## Weights, slips in one layer, quantized ports"
MODELS = ["3 layers, 2 heads, 128 to 96", "built-in"]
SLIPS = "| model | slip in one layer | full dump | block outputs | features alone |"
FORMAT = {kind.id: kind for kind in FORMATS}


def check_rows():
    """Yield lines on check_weights: planted slips, correct conversions, and ViT-L/14's size."""
    arrays = oracles.random_params(64, 4, 64, vocabulary=300, seed=3)
    params = minclip.from_state_dict(arrays, activation="quick_gelu", heads=foreign_weights.HEADS)
    named = planted = 0
    for slip, wanted in weight_slips.SLIPS.items():
        for dialect in foreign_weights.DIALECTS:
            if (dialect, slip) in NAMELESS:
                continue
            wrong = {name: array.copy() for name, array in params.items()}
            slip(wrong)
            named += not_named(minclip.check_weights(params, dialect(wrong)), wanted) == ([], [])
            planted += 1
    precisions = ("float32", "float16", "bfloat16", *FORMATS)
    alarms = [
        (dialect.__name__, str(precision))
        for dialect in foreign_weights.DIALECTS
        for precision in precisions
        if minclip.check_weights(params, dialect(coarse(params, precision))).verdict != "agrees"
    ]
    layouts = len(foreign_weights.DIALECTS)
    yield f"- `check_weights` names {named} of {planted} planted slips, in {layouts} layouts."
    count = layouts * len(precisions)
    yield f"- {count} correct conversions: {len(alarms)} false alarms {alarms or ''}".rstrip()
    yield from large_rows()


def large_rows():
    """Yield lines on the time that check_weights takes at ViT-L/14's size."""
    heads = foreign_weights.HEADS
    params = minclip.from_state_dict(oracles.random_params(768, 12, 768), activation="quick_gelu", heads=12)
    foreign_weights.HEADS = 12
    for precision in ("float32", "bfloat16", FORMAT["int8-row"]):
        arrays = foreign_weights.flax(coarse(params, precision))
        start = time.process_time()
        verdict = minclip.check_weights(params, arrays).verdict
        name = getattr(precision, "id", precision)
        seconds = time.process_time() - start
        yield f"- ViT-L/14's size, Flax's layout, {name}: {verdict} in {seconds:.1f} s of CPU."
    foreign_weights.HEADS = heads


def slip_rows(model):
    """Yield lines on nine slips in one layer, told from a full dump, from block outputs and from features."""
    params = table.model(model)
    tokens = minclip.probe_tokens(77, len(params["token_embedding.weight"]))
    for slip, sentence in test_slips.NINE.items():
        wrong = params.copy()
        slip(wrong)
        dump = dict(minclip.trace(wrong, tokens))
        blocks = {n: a for n, a in dump.items() if re.fullmatch(r"transformer\.resblocks\.\d+", n)}
        said = []
        for shown in (dump, blocks, None):
            start = time.process_time()
            diagnosis = minclip.diagnose(params, tokens, dump["text_features"], trace=shown)
            found = " and ".join(f.summary for finding in diagnosis.findings[:1] for f in finding.faults)
            verdict = "named" if sentence in found else diagnosis.verdict
            if verdict == "unknown" and any(points_at(note, sentence) for note in diagnosis.notes):
                verdict = "unknown, but the block is told"
            said.append(f"{verdict}, {time.process_time() - start:.1f} s")
        yield f"| {model} | {slip.__name__} | {' | '.join(said)} |"


def points_at(note, sentence):
    """Tell whether a note on the one block that differs, or on the nearest slip, names the right block."""
    block = re.search(r"transformer\.resblocks\.\d+", sentence)[0]
    return note.startswith(("Only ", "The nearest slip")) and block in note


def noise_rows(model, formats):
    """Yield lines on clean quantized ports of a model, and on ports with a bug beside quantized weights."""
    params, tokens = table.model(model), table.tokens_for(table.model(model), (2, 4))
    for maker, ports in (
        ("minclip's formats", own_ports),
        ("the gguf package's blocks", gguf_ports),
        ("ONNX Runtime's quantize_dynamic", onnx_ports),
    ):
        said = {port: minclip.diagnose(params, tokens, f).verdict for port, f in ports(params, tokens)}
        print(model, maker, said, file=sys.stderr, flush=True)
        wrong = [f"{port} ({verdict})" for port, verdict in said.items() if verdict != "noise"]
        count = f"{len(said) - len(wrong)} of {len(said)} clean ports are noise"
        yield f"- {model}, {maker}: {count}. Not: {', '.join(wrong) or 'none'}."
    for kind in formats:
        yield beside(model, params, tokens, FORMAT[kind])


def own_ports(params, tokens):
    """Yield (name, features) of ports in each format and each set of matrices."""
    for kind, parts in itertools.product(FORMATS, PARTS):
        candidate = Candidate(kind, parts)
        yield candidate.key, table.port_features(candidate.apply(params, tokens), tokens)


def gguf_ports(params, tokens):
    """Yield (name, features) of ports with the gguf package's blocks, of all matrices and of the blocks'."""
    outside = [name for name in params if not name.startswith("transformer.")]
    for kind, but in itertools.product(quantized.GGUF, ((), outside)):
        features = table.port_features(quantized.with_gguf_blocks(params, kind, but), tokens)
        yield f"{kind}{' in the blocks' if but else ''}", features


def onnx_ports(params, tokens):
    """Yield (name, features) of transformers' graph as ONNX Runtime quantizes it."""
    for name, options in quantized.ONNX.items():
        yield name, quantized.onnx_features(params, tokens, options)


def beside(model, params, tokens, kind):
    """Return a line on every single bug of the broken port beside a format."""
    rounded = Candidate(kind, PARTS[1]).apply(params, tokens)
    clean, noisy = table.port_features(params, tokens), table.port_features(rounded, tokens)
    noise = np.linalg.norm(noisy - clean) / np.linalg.norm(clean)
    large = named = 0
    missed = []
    for bug in SINGLES:
        if not table.fits(params, (bug,)) or table.change(params, tokens, (bug,)) < 2 * noise:
            continue
        large += 1
        diagnosis = minclip.diagnose(params, tokens, table.port_features(rounded, tokens, (bug,)))
        ids = {fault.id for finding in diagnosis.findings[:4] for fault in finding.faults}
        if ids & SINGLES[bug]:
            named += 1
        else:
            missed.append(f"{bug} ({' '.join([diagnosis.verdict, *sorted(ids)])})")
        print(model, kind.id, bug, diagnosis.verdict, *ids, file=sys.stderr, flush=True)
    return (
        f"- {model}: {kind.summary} make {noise:.2g}; of {large} bugs of at least twice that, {named} are "
        f"named. Not: {', '.join(missed) or 'none'}."
    )


def slip_table(models):
    """Return the lines of the table of slips."""
    lines = [SLIPS, "|---|---|---|---|---|"]
    for model in models:
        if count_layers(table.model(model)) > 3:  # a slip is in block 3
            lines += slip_rows(model)
    return lines


def section(models, formats):
    """Return the section of diagnosis.md."""
    lines = [
        HEADING,
        "",
        "Made by `python -m tests.benchmarks.weights_table -o tests/benchmarks/diagnosis.md`.",
        "",
        *check_rows(),
        "",
        *slip_table(models),
        "",
    ]
    return "\n".join([*lines, *noise_lines(models, formats)]) + "\n"


def noise_lines(models, formats):
    """Return the lines on quantized ports, which end the section."""
    known = "The built-in model's blocks hold int8 numbers, one scale per row: there, such a port agrees."
    return [known, "", *(line for model in models for line in noise_rows(model, formats))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", dest="output", type=Path)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--formats", nargs="*", default=["int8-row", "q4_0"], choices=FORMAT)
    parser.add_argument("--slips", action="store_true", help="make only the table of slips again")
    parser.add_argument("--noise", action="store_true", help="make only the lines on quantized ports again")
    args = parser.parse_args()
    old = args.output.read_text() if args.output else ""
    if args.slips:
        text = "\n".join(slip_table(args.models))
        before, _, rest = old.partition(SLIPS)
        new = f"{before}{text}\n\n{rest.partition(chr(10) * 2)[2]}"
    elif args.noise:
        text = "\n".join(noise_lines(args.models, args.formats))
        before, _, rest = old.partition(SLIPS)
        new = f"{before}{SLIPS}{rest.partition(chr(10) * 2)[0]}\n\n{text}\n"
    else:
        text = section(args.models, args.formats)
        new = f"{old.partition(HEADING)[0].rstrip(chr(10))}\n\n{text}"
    if args.output:
        args.output.write_text(new)
    print(text)


if __name__ == "__main__":
    main()
