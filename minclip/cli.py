"""The command line: `minclip encode "a photo of a cat"`, and tools for those who port CLIP."""

import argparse
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from minclip import (
    __version__,
    arrays,
    builtin,
    checkpoint,
    corpus,
    explorer,
    fast,
    model,
    tokenizer,
    verification,
)
from minclip.arrays import as_array
from minclip.checkpoint.tensor_files import only_when_whole
from minclip.corpus import cluster
from minclip.corpus.lines import read_texts
from minclip.params import ACTIVATIONS, architecture
from minclip.porting import comparison, diagnosis, port_files, probe, recipes, tokens, weights
from minclip.porting.names import rename
from minclip.porting.tokens import probe as token_probe
from minclip.porting.weights.files import read_weights

SHOWN = 12  # texts whose similarities fit an 80-column terminal side by side
NEAREST = 3
BUILTIN_IN_WORDS = "built-in, a small CLIP-style one, not CLIP"


def main(argv=None):
    """Run the command line, and return the exit status. Errors are one line on standard error."""
    args = parser().parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal that has no emoji shows ? and goes on
    usual, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"minclip: {message}\n"
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, ImportError) as error:
        print(f"minclip: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minclip: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = usual


def parser():
    """Return the parser of the command line, with a function `run` for each command."""
    top = argparse.ArgumentParser(prog="minclip", description="CLIP's text encoder on NumPy or CuPy.")
    top.add_argument("--version", action="version", version=f"minclip {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    add_encode(commands)
    add_inspect(commands)
    add_probe(commands)
    add_diagnose(commands)
    add_check_weights(commands)
    add_compare(commands)
    add_token_commands(commands)
    add_show(commands)
    add_verify(commands)
    return top


def add_encode(commands):
    encode = commands.add_parser("encode", help="turn texts into features", description=run_encode.__doc__)
    encode.set_defaults(run=run_encode)
    encode.add_argument("texts", nargs="*", metavar="TEXT")
    encode.add_argument(
        "--file",
        metavar="captions.txt",
        help="read texts from a UTF-8 file, a line each; - is standard input",
    )
    encode.add_argument(
        "-o",
        dest="output",
        metavar="features.npy",
        help="write the features [texts, E] there; if interrupted, the same command resumes",
    )
    add_model(encode)
    encode.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    encode.add_argument(
        "--dtype", choices=["float16", "float32"], help="of the features; by default the device's"
    )
    encode.add_argument("--normalize", action="store_true", help="write features of length 1")
    encode.add_argument("--truncate", action="store_true", help="cut texts that are too long for the model")
    add_states(encode)
    encode.add_argument(
        "--dask", metavar="ADDRESS", help="encode on the workers of a Dask scheduler, tcp://host:8786"
    )


def add_inspect(commands):
    inspect = commands.add_parser("inspect", help="tell what a file holds", description=run_inspect.__doc__)
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("source", metavar="SOURCE", help="a model's name, or a file or folder of weights")
    add_architecture(inspect)


def add_probe(commands):
    write = commands.add_parser(
        "probe",
        help="write what to run a port on",
        description=run_probe.__doc__,
        epilog=recipes.text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    write.set_defaults(run=run_probe)
    write.add_argument("-o", dest="output", metavar="probe.npz", required=True, help="the file to write")
    write.add_argument(
        "--texts", action="store_true", help="write texts alone, as JSON, to run a tokenizer on"
    )
    write.add_argument(
        "--stages",
        choices=["all", "blocks"],
        default="all",
        help="blocks writes a smaller file, with the blocks' outputs alone",
    )
    add_model(write)


def add_diagnose(commands):
    diagnose = commands.add_parser(
        "diagnose", help="name the bug that a port has", description=run_diagnose.__doc__
    )
    diagnose.set_defaults(run=run_diagnose)
    diagnose.add_argument(
        "port",
        metavar="PORT",
        help="the port's tokens, and text_features or hidden_states, in a file, or an ONNX graph",
    )
    add_port_options(diagnose)
    add_which_states(diagnose)
    diagnose.add_argument(
        "--budget",
        type=float,
        default=diagnosis.BUDGET,
        metavar="SECONDS",
        help="search no longer than this; %(default)g by default",
    )
    add_model(diagnose)


def add_check_weights(commands):
    check = commands.add_parser(
        "check-weights", help="tell which tensor is which", description=run_check_weights.__doc__
    )
    check.set_defaults(run=run_check_weights)
    check.add_argument("port", metavar="PORT", help="the port's weights: a file or folder of any framework")
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    add_model(check)


def add_compare(commands):
    compare = commands.add_parser(
        "compare", help="find where a port diverges", description=run_compare.__doc__
    )
    compare.set_defaults(run=run_compare)
    compare.add_argument("probe", metavar="probe.npz", help="what minclip probe wrote")
    compare.add_argument(
        "port",
        metavar="PORT",
        help="the port's arrays, as .npz, .safetensors, .gguf or .json, or an ONNX graph",
    )
    add_port_options(compare)
    compare.add_argument("--html", metavar="page.html", help="write the comparison as a page to explore, too")
    compare.add_argument("--rtol", type=float, help="relative error allowed, in place of measured rounding")
    compare.add_argument(
        "--model", metavar="NAME|PATH", help="the probe's model, to tell new error from inherited"
    )
    add_architecture(compare)


def add_port_options(command):
    command.add_argument(
        "--names",
        metavar="names.json",
        help='minclip\'s names for the port\'s: {"layers.{i}.fc1": "transformer.resblocks.{i}.mlp.c_fc"}',
    )
    command.add_argument(
        "--port-dtype", metavar="DTYPE", help="what the port computes in: float32, tf32, float16 or bfloat16"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def add_states(encode):
    states = encode.add_argument_group("hidden states, as Stable Diffusion's models read them")
    states.add_argument(
        "--states", action="store_true", help="write the states [texts, L, D] of all positions, as float16"
    )
    add_which_states(states)
    states.add_argument(
        "--pad", type=int, default=0, metavar="ID", help="pad texts with this id: 49407 for SD 1, 0 for SD 2"
    )


def add_token_commands(commands):
    tokenize = commands.add_parser(
        "tokenize", help="show the ids and pieces of texts", description=run_tokenize.__doc__
    )
    tokenize.set_defaults(run=run_tokenize)
    tokenize.add_argument("texts", nargs="+", metavar="TEXT")

    diagnose = commands.add_parser(
        "diagnose-tokens", help="name the bug that a tokenizer has", description=run_diagnose_tokens.__doc__
    )
    diagnose.set_defaults(run=run_diagnose_tokens)
    diagnose.add_argument("ids", metavar="ids.json", help="the tokenizer's ids")
    diagnose.add_argument("--json", action="store_true", help="print the diagnosis as JSON")


def add_which_states(command):
    command.add_argument("--skip", type=int, default=0, metavar="N", help="states without the last N blocks")
    command.add_argument("--no-norm", action="store_true", help="states without the final layer norm")


def add_show(commands):
    page = commands.add_parser(
        "show", help="write a page to explore the encoder's run", description=run_show.__doc__
    )
    page.set_defaults(run=run_show)
    page.add_argument("texts", nargs="+", metavar="TEXT", help="the first two are shown side by side")
    page.add_argument("-o", dest="output", metavar="page.html", required=True, help="the file to write")
    add_model(page)


def add_verify(commands):
    verify = commands.add_parser(
        "verify", help="check real weights against published figures", description=run_verify.__doc__
    )
    verify.set_defaults(run=run_verify)
    verify.add_argument("source", metavar="SOURCE", help="a model's name, or a file or folder of weights")
    verify.add_argument(
        "--model-name", metavar="NAME", help="the model that it should be; by default it is recognized"
    )
    add_architecture(verify)
    verify.add_argument("--json", action="store_true", help="print the certificate as JSON")


def add_model(command):
    command.add_argument(
        "--model", default="builtin", metavar="NAME|PATH", help="a model's name or file; built-in by default"
    )
    add_architecture(command)


def add_architecture(command):
    """Add the options for a model whose file does not name its activation or heads."""
    command.add_argument(
        "--activation", choices=ACTIVATIONS, help="of the model, where no config beside its file says it"
    )
    command.add_argument(
        "--heads", type=int, metavar="N", help="attention heads of the model, where not width // 64"
    )


def load_model(args, **options):
    """Return the `Params` of the model that the arguments of a command name."""
    return checkpoint.load(args.model, activation=args.activation, heads=args.heads, **options)


def run_encode(args):
    """Encode each TEXT, or each line of a file, and show similarities or write the features."""
    if bool(args.texts) == bool(args.file):
        print("minclip encode: give texts or --file, one of the two", file=sys.stderr)
        return 2
    if args.states and (args.normalize or not args.output):
        print("minclip encode: --states goes with -o and without --normalize", file=sys.stderr)
        return 2
    if args.file and args.output:
        return run_encode_file(args)
    if args.dask:
        print("minclip encode: --dask goes with --file and -o", file=sys.stderr)
        return 2
    with source(args.file) as file:
        texts = args.texts or list(read_texts(file))
    params = load_model(args, device=args.device, dtype=working_dtype(args))
    context = len(params["positional_embedding"])
    tokens = tokenizer.tokenize(texts, context_length=context, truncate=args.truncate, pad=args.pad)
    if args.states:
        features = model.hidden_states(params, tokens, skip=args.skip, norm=not args.no_norm)
        args.dtype = args.dtype or "float16"
    else:
        features = fast.encode_text(params, tokens)
    if args.output:
        features = as_array(arrays.normalize(features) if args.normalize else features)
        features = features.astype(args.dtype or features.dtype, copy=False)
        with only_when_whole(args.output) as partial, open(partial, "wb") as file:
            np.save(file, features)
        print_written(args.output, features)
    else:
        show(args.model, params, texts, tokens, as_array(arrays.normalize(features)))
    return 0


def run_show(args):
    """Run the encoder on each TEXT and write every stage to one HTML page, which opens in any browser."""
    params = load_model(args)
    tokens = tokenizer.tokenize(args.texts, context_length=len(params["positional_embedding"]))
    name = BUILTIN_IN_WORDS if args.model == "builtin" else Path(args.model).name
    explorer.show(params, tokens, model=name).save(args.output)
    print(f"{args.output}: {os.path.getsize(args.output) / 1e6:.1f} MB, open it in a browser")
    return 0


def run_inspect(args):
    """Tell a checkpoint's dialect, sizes, activation, dtype and tensors; of one that does not load, why."""
    print(checkpoint.inspect(args.source, activation=args.activation, heads=args.heads))
    return 0


def run_verify(args):
    """Compare weights with every figure that others have published for their model.

    Exit status 0 if all strong sources agree, 1 if one disagrees or nothing is published for the model.
    """
    named = args.source if args.source in checkpoint.available_models() else None
    params = checkpoint.load(args.source, activation=args.activation, heads=args.heads)
    certificate = verification.verify(params, args.model_name or named)
    print(json.dumps(certificate.to_dict(), indent=2) if args.json else certificate)
    return int(certificate.verdict != "agrees")


def run_probe(args):
    """Write probe tokens and every stage of the reference on them, for a port in any language to match."""
    if args.texts:
        token_probe.write_texts(args.output)
        print(f"{args.output}: {len(token_probe.TEXTS)} texts; give a tokenizer's ids to diagnose-tokens")
        return 0
    traced = probe.write_probe(args.output, load_model(args), stages=args.stages)
    size = os.path.getsize(args.output) / 1e6
    print(f"{args.output}: tokens {list(traced.tokens.shape)} and {len(traced)} stages, {size:.1f} MB")
    return 0


def run_tokenize(args):
    """Show the ids of each TEXT and the pieces that they stand for, start and end included."""
    pieces = tokenizer.spellings()
    start, end = (tokenizer.vocabulary()[word] for word in (tokenizer.START, tokenizer.END))
    for text in args.texts:
        ids = [start, *tokenizer.encode(text), end]
        print(f"{text!r}: {len(ids)} tokens")
        print("  ids    ", *ids)
        print("  pieces ", *(pieces[id] for id in ids))
    return 0


def run_diagnose_tokens(args):
    """Name the known mistakes that explain a tokenizer's ids. Exit status 1 unless they are OpenAI's.

    The file is JSON: a list with the ids of each text that `minclip probe --texts` wrote, null where the
    tokenizer refused the text; or an object with the lists "texts" and "ids". Rows may be padded or not.
    """
    diagnosed = tokens.diagnose_tokens(*token_probe.read_ids(args.ids))
    print(json.dumps(diagnosed.to_dict(), indent=2) if args.json else diagnosed)
    return int(diagnosed.verdict != "agrees")


def run_compare(args):
    """Compare a port's arrays with a probe, stage by stage. Exit status 1 where they diverge."""
    names = read_names(args.names) if args.names else {}
    params = load_model(args) if args.model else None
    compared = comparison.compare_files(
        args.probe, args.port, names=names, params=params, rtol=args.rtol, dtype=args.port_dtype
    )
    print(json.dumps(finite(compared.to_dict()), indent=1) if args.json else compared)
    if args.html:
        explorer.compare_page(compared).save(args.html)
    return int(compared.first is not None)


def run_check_weights(args):
    """Tell which of the model's tensors each of a port's arrays holds. Exit status 1 unless all are right.

    PORT is anything that --model takes, an ONNX graph, a Keras or other HDF5 file, or a Flax msgpack file.
    """
    arrays = read_weights(args.port)
    check = weights.check_weights(load_model(args), arrays)
    print(json.dumps(check.to_dict(), indent=1) if args.json else check)
    return int(check.verdict != "agrees")


def run_diagnose(args):
    """Name the known bug that explains a port's features. Exit status 1 unless they agree with the model's.

    PORT is a file with `tokens` [B, L] and the port's `text_features` [B, E] for them, or its `hidden_states`
    [B, L, D], and, better still, other stages under any names; or an ONNX graph, which is run on the probe's
    tokens. --skip and --no-norm say which hidden states the port should give.
    """
    params = load_model(args)
    dump = port_files.read_port(args.port, probe.tokens_for(params))
    dump = rename(dump, read_names(args.names) if args.names else {})
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
    print(json.dumps(finite(diagnosed.to_dict()), indent=1) if args.json else diagnosed)
    return int(diagnosed.verdict != "agrees")


def finite(value):
    """Return plain values with "inf" and "nan" as text, which JSON does not have as numbers."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def read_names(path):
    """Return the object of a JSON file, from the port's names to minclip's."""
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object of names: {error}") from None
    if not isinstance(names, dict):
        raise ValueError(f'{path} is not a JSON object of names, {{"theirs": "ours"}}')
    return names


def run_encode_file(args):
    """Write the features or states of each line of a file, and resume a run that was interrupted."""
    # With Dask it is the workers that have the device.
    device = "cpu" if args.dask else args.device
    params = load_model(args, device=device, dtype=working_dtype(args))
    states = {"skip": args.skip, "norm": not args.no_norm} if args.states else None
    write = corpus.encode_file
    options = {"dtype": args.dtype, "truncate": args.truncate, "progress": True}
    if states:
        write = corpus.write_states
        options |= {**states, "pad": args.pad, "dtype": args.dtype or "float16"}
    else:
        options["normalize"] = args.normalize
    with contextlib.ExitStack() as stack:
        if args.dask:
            options["encode_chunks"] = stack.enter_context(
                cluster.encoder(
                    args.dask,
                    params,
                    args.model,
                    device=args.device,
                    activation=args.activation,
                    heads=args.heads,
                    states=states,
                )
            )
        written = write(params, stack.enter_context(source(args.file)), args.output, **options)
    print_written(args.output, written)
    return 0


def working_dtype(args):
    """Return the dtype to compute in: the device's own, or float32 where that is asked for."""
    return "float32" if args.dtype == "float32" or args.device == "cpu" else "float16"


def source(path):
    """Return the binary file at path, standard input for "-", or None for no path, in a context."""
    if not path:
        return contextlib.nullcontext()
    return contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")


def print_written(path, written):
    kind = "states" if written.ndim == 3 else "features"
    print(f"{path}: {kind} of {len(written):,} texts, {list(written.shape)} {written.dtype}")


def show(name, params, texts, tokens, features):
    """Print texts, their similarities, and the built-in pictures nearest to each."""
    layers, _, _ = architecture(params)
    kind = BUILTIN_IN_WORDS if name == "builtin" else name
    print(f"model: {kind} ({layers} layers, width {params['ln_final.weight'].size})\n")
    print("    tokens  text")
    for i, text in enumerate(texts, 1):
        print(f"{i:3} {1 + tokens[i - 1].argmax():6}  {one_line(text, 67)}")

    shown = min(len(texts), SHOWN)
    of = "" if shown == len(texts) else f" of the first {shown} texts"
    print(f"\nsimilarity (cosine){of}")
    print("   " + "".join(f"{j:6}" for j in range(1, shown + 1)))
    for i, row in enumerate(features[:shown] @ features[:shown].T, 1):
        print(f"{i:3}" + "".join(f"{value:6.2f}" for value in row))

    if name == "builtin":
        show_nearest(texts, features)


def show_nearest(texts, features):
    """Print the pictures of the built-in table whose features are nearest to each text's."""
    emoji, names, pictures = builtin.pictures()
    print(f"\nnearest of the built-in model's {len(emoji)} pictures")
    for i, (text, similarity) in enumerate(zip(texts, features @ pictures.T, strict=True), 1):
        print(f"{i:3}  {one_line(text, 74)}")
        for j in similarity.argsort()[::-1][:NEAREST]:
            print(f"       {similarity[j]:5.2f}  {emoji[j]}  {names[j]}")


def one_line(text, width):
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
