"""The commands for those who port CLIP: probe, compare, diagnose, check-weights, diagnose-tokens, verify."""

import json
import os
from pathlib import Path

import numpy as np

from minclip import checkpoint, explorer, verification
from minclip.cli.options import (
    add_architecture,
    add_command,
    add_model,
    add_which_states,
    check_output,
    columns,
    load_model,
    print_wrapped,
)
from minclip.porting import comparison, diagnosis, display, port_files, probe, recipes, tokens, weights
from minclip.porting.names import rename
from minclip.porting.tokens import probe as token_probe
from minclip.porting.weights.files import read_weights


def add_verify(commands):
    verify = add_command(
        commands,
        "verify",
        run_verify,
        "check real weights against published figures",
        "minclip verify ViT-B/32\nminclip verify my_clip.safetensors",
    )
    verify.add_argument("source", metavar="SOURCE", help="a model's name, or a file or folder of weights")
    verify.add_argument(
        "--model-name", metavar="NAME", help="the model that it should be; by default it is recognized"
    )
    add_architecture(verify)
    add_json(verify)


def run_verify(args):
    """Compare weights with every figure that others have published for their model.

    Exit status 0 if all strong sources agree, 1 if one disagrees or nothing is published for the model.
    """
    named = args.source if args.source in checkpoint.available_models() else None
    params = checkpoint.load(args.source, activation=args.activation, heads=args.heads)
    return report(args, verification.verify(params, args.model_name or named))


def report(args, result):
    """Print a result, as JSON where that is asked for. Return the status: 0 if it agrees, 1 otherwise."""
    if args.json:
        print(json.dumps(finite(result.to_dict()), indent=1))
    else:
        print_wrapped(result)
    return int(result.verdict != "agrees")


def finite(value):
    """Return plain values with "inf" and "nan" as text, which JSON does not have as numbers."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def add_json(command):
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def add_probe(commands):
    write = add_command(
        commands,
        "probe",
        run_probe,
        "write the inputs and stages to check a port against",
        "minclip probe -o probe.npz --model ViT-B/32\nminclip probe --texts -o texts.json",
    )
    write.epilog += f"\n\n{recipes.text()}"
    write.add_argument("-o", dest="output", metavar="probe.npz", required=True, help="the file to write")
    write.add_argument(
        "--texts", action="store_true", help="write only texts, as JSON, to check a tokenizer with"
    )
    write.add_argument(
        "--stages",
        choices=["all", "blocks"],
        default="all",
        help="blocks writes a smaller file, which holds no stages inside the blocks",
    )
    add_model(write)


def run_probe(args):
    """Write a probe, to check a port in any language: tokens, and the reference's stages for them.

    Run the port on the tokens, save its stages, and run minclip compare. The recipes below show how.
    """
    check_output(args.parser, args.output, ".json" if args.texts else ".npz")
    if args.texts:
        token_probe.write_texts(args.output)
        print(f"{args.output}: {len(token_probe.TEXTS)} texts; give a tokenizer's ids to diagnose-tokens")
        return 0
    traced = probe.write_probe(args.output, load_model(args), stages=args.stages)
    size = os.path.getsize(args.output) / 1e6
    print(f"{args.output}: tokens {list(traced.tokens.shape)} and {len(traced)} stages, {size:.1f} MB")
    return 0


def add_compare(commands):
    compare = add_command(
        commands,
        "compare",
        run_compare,
        "find where a port diverges",
        "minclip compare probe.npz port.npz\nminclip compare probe.npz model.onnx --html page.html",
    )
    compare.add_argument("probe", metavar="probe.npz", help="the file that minclip probe wrote")
    compare.add_argument(
        "port",
        metavar="PORT",
        help="the port's arrays, as .npz, .safetensors, .gguf or .json, or an ONNX graph",
    )
    add_port_options(compare)
    compare.add_argument("--html", metavar="page.html", help="also write the comparison as a page to explore")
    compare.add_argument(
        "--rtol", type=float, help="allow this relative error, instead of the measured rounding error"
    )
    compare.add_argument(
        "--model", metavar="NAME|PATH", help="the probe's model, to tell new error from inherited error"
    )
    add_architecture(compare)


def run_compare(args):
    """Compare a port's arrays with a probe, stage by stage. Exit status 1 if they diverge."""
    if args.html is not None:
        check_output(args.parser, args.html, ".html", "--html")
    compared = comparison.compare_files(
        args.probe,
        args.port,
        names=read_names(args.names),
        params=load_model(args) if args.model else None,
        rtol=args.rtol,
        dtype=args.port_dtype,
    )
    if args.html:
        explorer.compare_page(compared).save(args.html)
    if args.json:
        print(json.dumps(finite(compared.to_dict()), indent=1))
    else:
        print_wrapped(display.text(compared, columns(fallback=10**6)))
    return int(compared.first is not None)


def add_port_options(command):
    command.add_argument(
        "--names",
        metavar="names.json",
        help='minclip\'s names for the port\'s: {"layers.{i}.fc1": "transformer.resblocks.{i}.mlp.c_fc"}',
    )
    command.add_argument(
        "--port-dtype",
        metavar="DTYPE",
        help="the precision that the port computes in: float32, tf32, float16 or bfloat16",
    )
    add_json(command)


def read_names(path):
    """Return the object of a JSON file, from the port's names to minclip's; {} for no file."""
    if not path:
        return {}
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object of names: {error}") from None
    if not isinstance(names, dict):
        raise ValueError(f'{path} is not a JSON object of names, {{"theirs": "ours"}}')
    return names


def add_diagnose(commands):
    diagnose = add_command(
        commands,
        "diagnose",
        run_diagnose,
        "name the bug in a port",
        "minclip diagnose port.npz\nminclip diagnose model.onnx --model ViT-B/32",
    )
    diagnose.add_argument(
        "port",
        metavar="PORT",
        help="a file with the port's tokens and its text_features or hidden_states, or an ONNX graph",
    )
    add_port_options(diagnose)
    add_which_states(diagnose)
    diagnose.add_argument(
        "--budget",
        type=float,
        default=diagnosis.BUDGET,
        metavar="SECONDS",
        help="search for at most this time; %(default)g by default",
    )
    add_model(diagnose)


def run_diagnose(args):
    """Name the known bug that explains a port's features. Exit status 1 unless they agree with the model's.

    PORT is a file with `tokens` [B, L] and the port's `text_features` [B, E] for them, or its `hidden_states`
    [B, L, D]. Other stages, under any names, make the diagnosis more certain. An ONNX graph is run on the
    probe's tokens. If the hidden states are not those after the last block and the final norm, say so with
    --skip and --no-norm.
    """
    params = load_model(args)
    dump = port_files.read_port(args.port, probe.tokens_for(params))
    dump = rename(dump, read_names(args.names))
    if str(args.port).endswith(".onnx"):
        dump["tokens"] = probe.tokens_for(params)
    given = [name for name in ("text_features", "hidden_states") if name in dump]
    if not given or "tokens" not in dump:
        missing = "tokens" if given else "text_features"
        raise ValueError(
            f"{args.port} has no {missing!r}: it needs the port's tokens, and text_features or hidden_states"
        )
    tokens, output = dump.pop("tokens"), dump.pop(given[0])
    diagnosed = diagnosis.diagnose(
        params,
        tokens,
        output,
        trace=dump or None,
        dtype=args.port_dtype,
        budget=args.budget,
        skip=args.skip,
        norm=not args.no_norm,
    )
    return report(args, diagnosed)


def add_check_weights(commands):
    check = add_command(
        commands,
        "check-weights",
        run_check_weights,
        "find which tensor is which",
        "minclip check-weights port.safetensors --model ViT-B/32",
    )
    check.add_argument("port", metavar="PORT", help="the port's weights: a file or folder of any framework")
    add_json(check)
    add_model(check)


def run_check_weights(args):
    """Tell which of the model's tensors each of a port's arrays holds. Exit status 1 unless all are right.

    PORT is anything that --model takes, an ONNX graph, a Keras or other HDF5 file, or a Flax msgpack file.
    """
    arrays = read_weights(args.port)
    return report(args, weights.check_weights(load_model(args), arrays))


def add_diagnose_tokens(commands):
    diagnose = add_command(
        commands,
        "diagnose-tokens",
        run_diagnose_tokens,
        "name the bug in a tokenizer",
        "minclip probe --texts -o texts.json\nminclip diagnose-tokens ids.json",
    )
    diagnose.add_argument("ids", metavar="ids.json", help="the tokenizer's ids")
    add_json(diagnose)


def run_diagnose_tokens(args):
    """Name the known mistakes that explain a tokenizer's ids. Exit status 1 unless they are OpenAI's.

    The file is JSON: a list with the ids of each text that `minclip probe --texts` wrote, or null where the
    tokenizer refused the text. Or it is an object with the lists "texts" and "ids". Rows may be padded. The
    output counts texts from 0, as the list does.
    """
    return report(args, tokens.diagnose_tokens(*token_probe.read_ids(args.ids)))
