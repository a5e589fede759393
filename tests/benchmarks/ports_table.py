"""Try compare and diagnose on ports of others' making, and write the table of the results.

    python -m tests.benchmarks.ports_table [-o tests/benchmarks/ports.md] [--layers 3] [--width 64] [--quick]
    python -m tests.benchmarks.ports_table --frameworks [-o FILE]    only the last section

Correct ports: Hugging Face's model through hooks, both of torch's ONNX exporters, open_clip where it is
installed, and tests/support/broken_port.py without a bug, in several precisions, layouts and partial dumps.
Broken ports: every bug of broken_port.py, from its features and from its dump, and pairs of bugs. The last
section holds the ports of tests/foreign/test_ports.py, in the frameworks that are installed.
"""

import argparse
import contextlib
import importlib.metadata
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import minclip
from minclip.porting.probe import write_probe
from minclip.porting.rounding import round_to
from tests.benchmarks import diagnosis_table as table
from tests.foreign import test_ports
from tests.support.broken_port import HARMLESS, SINGLES, BrokenPort
from tests.support.oracles import transformers_model

HEADING = "## Ports in other frameworks"
DISTRIBUTIONS = {"open_clip": "open_clip_torch"}
PACKAGES = ("numpy", "torch", "transformers", "onnx", "onnxruntime", "open_clip_torch")


class Features(torch.nn.Module):
    """Hugging Face's model, from ids to features."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).text_embeds


def run_port(params, tokens, bugs=(), dtype=torch.float32):
    """Return (features, dump) of the broken port."""
    state = {name: torch.from_numpy(array).to(dtype) for name, array in params.items()}
    port = BrokenPort(state, params.heads, params.activation, bugs)
    features = port.encode_text(tokens).float().numpy()
    return features, {name: x.float().numpy() for name, x in port.kept.items()}


def framework_ports(params, tokens):
    """Yield (name, dump) of correct ports in torch and ONNX."""
    model = transformers_model(params, heads=params.heads).eval()
    yield "transformers, trace_torch", minclip.trace_torch(model, tokens)
    half = transformers_model(params, heads=params.heads, dtype="bfloat16")
    yield "transformers in bfloat16, trace_torch", minclip.trace_torch(half, tokens)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield "transformers under autocast to bfloat16", minclip.trace_torch(model, tokens)
    ids = torch.from_numpy(tokens).long()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dynamo in (True, False):
            path = str(Path(folder) / f"{dynamo}.onnx")
            torch.onnx.export(
                Features(model), (ids,), path, dynamo=dynamo, input_names=["input_ids"], verbose=False
            )
            yield f"transformers -> ONNX, dynamo={dynamo}", minclip.trace_onnx(path, tokens)


def variants(params, tokens, seed=0):
    """Yield (name, dump) of correct ports: harmless rewritings, precisions, layouts and partial dumps."""
    rng = np.random.default_rng(seed)
    for switch in ("", *HARMLESS):
        features, dump = run_port(params, tokens, [switch] if switch else [])
        if switch in ("one_by_one", "cropped"):
            dump = {}
        for how in (
            "all",
            "some",
            "no names",
            "batch first",
            "reversed",
            "float16",
            "bfloat16",
            "float16 outside",
        ):
            yield (
                f"{switch or 'clean'}, {how}",
                form(dump, features, how, rng),
            )
    for dtype in (torch.float16, torch.bfloat16):
        features, dump = run_port(params, tokens, dtype=dtype)
        for how in ("all", "some", "no names"):
            yield f"computed in {dtype}, {how}", form(dump, features, how, rng)
        yield f"computed in {dtype}, features alone", {"text_features": features}
        rounded = params.map(lambda array, dtype=dtype: round_to(array, str(dtype)[6:]))
        features, dump = run_port(rounded, tokens)
        yield f"weights in {dtype}", {**dump, "text_features": features}


def form(dump, features, how, rng):
    """Return a dump in another form, with the features."""
    outside = features.astype(np.float16) if how == "float16 outside" else features
    return {**changed(dump, how, rng), "text_features": outside}


def changed(dump, how, rng):
    """Return a dump in another form that a port might have."""
    if how == "some":
        return {name: x for name, x in dump.items() if rng.random() < 0.3}
    if how == "no names":
        return {f"val_{i}": x for i, x in enumerate(dump.values())}
    if how == "batch first":
        return {name: np.ascontiguousarray(x.swapaxes(0, 1)) for name, x in dump.items()}
    if how == "reversed":
        return {name: np.ascontiguousarray(x.T) for name, x in dump.items()}
    if how in ("float16", "bfloat16"):
        return {name: round_to(x, how) for name, x in dump.items()}
    return dump


def judge(params, reference, tokens, dump):
    """Return (compare's verdict, diagnose's from features, with the dump, CPU seconds)."""
    start = time.process_time()
    features = dump["text_features"] if "text_features" in dump else dump["text_embeds"]
    compared = "agrees" if minclip.compare(reference, dump).agrees else "diverges"
    alone = minclip.diagnose(params, tokens, features).verdict
    return (
        compared,
        alone,
        minclip.diagnose(params, tokens, features, trace=dump).verdict,
        time.process_time() - start,
    )


def correct(params, tokens):
    """Return a row for each correct port."""
    reference = minclip.trace(params, tokens)
    rows = []
    for name, dump in (*framework_ports(params, tokens), *variants(params, tokens)):
        rows.append((name, *judge(params, reference, tokens, dump)))
        if set(rows[-1][1:4]) != {"agrees"}:
            print(*rows[-1], flush=True)
    return rows


def broken(params, tokens, cases):
    """Return a row for each case: whether its bugs are named first, from features and with a dump."""
    rows = []
    for bugs in cases:
        if not table.fits(params, bugs) or not table.visible(params, tokens, bugs):
            continue
        features, dump = run_port(params, tokens, bugs)
        row = [" + ".join(bugs)]
        for trace in (None, dump):
            start = time.process_time()
            diagnosis = minclip.diagnose(params, tokens, features, trace=trace)
            first = diagnosis.findings[0] if diagnosis.findings else None
            said = " + ".join(f.id for f in first.faults) if first else diagnosis.verdict
            row += [bool(first) and table.names(first, bugs), said, time.process_time() - start]
        rows.append(row)
        print(*row, flush=True)
    return rows


def frameworks():
    """Yield the lines of the section on ports in other frameworks, each through its recipe."""
    yield HEADING
    yield ""
    yield "Made by `python -m tests.benchmarks.ports_table --frameworks`, for 2 layers of width 64."
    yield ""
    yield "| correct port | compare | stages | diagnose: features | with dump |"
    yield "|---|---|---|---|---|"
    ports = {name: port[:2] for name, port in test_ports.PORTS.items()}
    ports["keras-hub"] = test_ports.keras_hub_port, "keras"
    for name, (make, recipe) in ports.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            reference = write_probe("probe.npz", test_ports.PARAMS)
            try:
                dump = test_ports.dump_of(make, recipe)
            except pytest.skip.Exception as reason:
                yield f"| {name} | not run: {' '.join(str(reason).split())} | | | |"
                continue
        yield framework_row(f"{name} {installed(DISTRIBUTIONS.get(name, name.split()[0]))}", reference, dump)


def framework_row(label, reference, dump):
    """Return a line of the section."""
    features, tokens = dump["text_features"], reference.tokens
    compared = minclip.compare(reference, dump)
    said = "agrees" if compared.agrees else f"diverges at {compared.first}"
    verdicts = []
    for trace in (None, dump):
        diagnosis = minclip.diagnose(test_ports.PARAMS, tokens, features, trace=trace)
        ids = " + ".join(fault.id for finding in diagnosis.findings[:1] for fault in finding.faults)
        verdicts.append(ids or diagnosis.verdict)
    return f"| {label} | {said} | {len(compared.stages)} of {len(reference)} | {' | '.join(verdicts)} |"


def share(rows, column):
    return f"{sum(row[column] for row in rows)} of {len(rows)}"


def report(size, right, singles, pairs):
    alarms = [row for row in right if set(row[1:4]) != {"agrees"}]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if installed(name))
    lines = [
        "# Ports of others' making",
        "",
        f"Made by `python -m tests.benchmarks.ports_table` with {versions}, on a random model of {size}.",
        "",
        f"- Correct ports: {len(right) - len(alarms)} of {len(right)} agree in compare and in diagnose, from "
        "features and with a dump.",
        f"- Single bugs named first: {share(singles, 1)} from features, {share(singles, 4)} with a dump.",
        f"- Pairs of bugs named first: {share(pairs, 1)} from features, {share(pairs, 4)} with a dump.",
        "",
        "| correct port | compare | diagnose: features | with dump | CPU |",
        "|---|---|---|---|---|",
        *(f"| {name} | {c} | {f} | {d} | {s:.1f} s |" for name, c, f, d, s in right),
        "",
        "| bugs | from features | CPU | with a dump | CPU |",
        "|---|---|---|---|---|",
        *(f"| {bugs} | {a} | {s:.1f} s | {b} | {t:.1f} s |" for bugs, _, a, s, _, b, t in singles + pairs),
    ]
    return "\n".join(lines) + "\n"


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", dest="output", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="no pairs")
    parser.add_argument("--frameworks", action="store_true", help="only the ports in other frameworks")
    args = parser.parse_args()
    others = "\n".join(frameworks()) + "\n"
    if args.frameworks:
        if args.output:
            before = args.output.read_text().partition(HEADING)[0].rstrip("\n")
            args.output.write_text(f"{before}\n\n{others}")
        print(others)
        return
    params = table.random_model(5, args.width, args.width // 32, args.layers, args.width)
    tokens = table.tokens_for(params, end_padded=(2, 4))
    right = correct(params, minclip.probe_tokens())
    singles = broken(params, tokens, [(bug,) for bug in SINGLES])
    pairs = [] if args.quick else broken(params, tokens, table.PAIRS)
    text = report(f"{args.layers} layers, width {args.width}", right, singles, pairs) + f"\n{others}"
    if args.output:
        args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
