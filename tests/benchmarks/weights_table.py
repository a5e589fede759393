"""Measure what is said of weights, of slips in one layer and of quantized ports; write it into diagnosis.md.

    python -m tests.benchmarks.weights_table [-o tests/benchmarks/diagnosis.md] [--models NAME ...]
        [--formats ID ...]    the formats that every bug is tried beside; none leaves that out
        [--slips]             only the table of slips is made again, in its place

Everything after the heading HEADING is replaced; the rest of the file is diagnosis_table's. A bug counts
beside int8 weights where it moves the features by at least twice as much as the weights do.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np

import minclip
from minclip.porting.noise import PARTS, Candidate
from minclip.porting.quantization import FORMATS
from tests.benchmarks import diagnosis_table as table
from tests.support import foreign_weights, oracles, weight_slips
from tests.support.broken_port import SINGLES
from tests.unit.porting import test_slips
from tests.unit.porting.weights.test_checking import NAMELESS, coarse, not_named

HEADING = "## Weights, slips in one layer, quantized ports"
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
            said.append(f"{verdict}, {time.process_time() - start:.1f} s")
        yield f"| {model} | {slip.__name__} | {' | '.join(said)} |"


def noise_rows(model, formats):
    """Yield lines on clean quantized ports of a model, and on ports with a bug beside int8 weights."""
    params, tokens = table.model(model), table.tokens_for(table.model(model), (2, 4))
    verdicts = []
    for kind in FORMATS:
        for parts in PARTS:
            features = table.port_features(Candidate(kind, parts).apply(params, tokens), tokens)
            verdicts.append(minclip.diagnose(params, tokens, features).verdict)
    counts = {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))}
    yield f"- {model}: {len(verdicts)} clean quantized ports: {counts}."
    for kind in formats:
        yield beside(model, params, tokens, FORMAT[kind])


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
        print(model, kind.id, bug, diagnosis.verdict, *ids, flush=True)
    return (
        f"- {model}: {kind.summary} make {noise:.2g}; of {large} bugs of at least twice that, {named} are "
        f"named. Not: {', '.join(missed) or 'none'}."
    )


def slip_table(models):
    """Return the lines of the table of slips."""
    lines = [SLIPS, "|---|---|---|---|---|"]
    for model in models:
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
    for model in models:
        lines += noise_rows(model, formats)
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", dest="output", type=Path)
    parser.add_argument("--models", nargs="*", default=["built-in"])
    parser.add_argument("--formats", nargs="*", default=["int8-row", "q4_0"], choices=FORMAT)
    parser.add_argument("--slips", action="store_true", help="make only the table of slips again")
    args = parser.parse_args()
    if args.slips:
        table_of_slips = "\n".join(slip_table(args.models))
        if args.output:
            before, _, rest = args.output.read_text().partition(SLIPS)
            args.output.write_text(f"{before}{table_of_slips}\n\n{rest.partition(chr(10) * 2)[2]}")
        print(table_of_slips)
        return
    text = section(args.models, args.formats)
    if args.output:
        before = args.output.read_text().partition(HEADING)[0].rstrip("\n")
        args.output.write_text(f"{before}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
