"""`minclip encode`: texts to features, shown as similarities or written to a file."""

import contextlib
import itertools

import numpy as np

from minclip import arrays, builtin, corpus, fast, model, tokenizer
from minclip.arrays import as_array
from minclip.checkpoint.tensor_files import only_when_complete
from minclip.cli.options import (
    add_command,
    add_model,
    add_which_states,
    check_output,
    columns,
    load_model,
    print_wrapped,
)
from minclip.cli.texts import (
    BUILTIN_IN_WORDS,
    add_texts,
    add_truncate,
    fitted,
    given_texts,
    note_on_rare_words,
    opened,
    piped,
    tokenized,
)
from minclip.corpus import cluster
from minclip.corpus.lines import name_of, read_texts
from minclip.params import architecture

SHOWN = 12  # texts whose similarities fit an 80-column terminal side by side
SCENE_SHARE = 0.75  # a scene is shown if its similarity is at least this part of the nearest picture's
NEAREST = 3
EMPTY = "(empty)"  # shown for a text without words

EXAMPLES = """
minclip encode "a photo of a cat" "a photo of a dog"
minclip encode --file captions.txt -o features.npy
cat captions.txt | minclip encode -o features.npy
minclip encode "a photo of a cat" --model ViT-B/32
"""


def add_encode(commands):
    encode = add_command(commands, "encode", run_encode, "turn texts into features", EXAMPLES)
    add_texts(encode, "a text to encode")
    encode.add_argument(
        "--file",
        metavar="captions.txt",
        help="read texts from a UTF-8 file, one per line; - is standard input",
    )
    encode.add_argument(
        "-o",
        dest="output",
        metavar="features.npy",
        help="write the features [texts, E] to this file; if interrupted, run the same command to resume",
    )
    add_model(encode)
    encode.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="compute on the CPU, or on an NVIDIA GPU"
    )
    encode.add_argument(
        "--dtype",
        choices=["float16", "float32"],
        help="dtype of the features; by default float32 on the CPU and float16 on the GPU",
    )
    encode.add_argument("--normalize", action="store_true", help="write features of length 1")
    add_truncate(encode)
    encode.add_argument(
        "--dask", metavar="ADDRESS", help="encode on the workers of a Dask scheduler, tcp://host:8786"
    )
    add_states(encode)


def add_states(encode):
    states = encode.add_argument_group("hidden states", "as Stable Diffusion's models read them")
    states.add_argument(
        "--states", action="store_true", help="write the states [texts, L, D] of all positions, as float16"
    )
    add_which_states(states)
    states.add_argument(
        "--pad", type=int, default=0, metavar="ID", help="pad texts with this id: 49407 for SD 1, 0 for SD 2"
    )


def run_encode(args):
    """Encode texts, one per TEXT or per line of a file. Show their similarities, or write their features."""
    if not args.texts and args.file is None and piped():
        args.file = "-"
    if wrong := wrong_usage(args):
        args.parser.error(wrong)
    if args.output is not None:
        check_output(args.parser, args.output, ".npy")
    if args.file and args.output:
        write_file(args)
        return 0
    params = load_model(args, device=args.device, dtype=working_dtype(args))
    if args.output:
        write_texts(args, params, list(given_texts(args)))
    elif args.file:
        with opened(args.file) as file:
            texts = list(itertools.islice(read_texts(file), SHOWN + 1))
            show(args, params, texts[:SHOWN], f"{name_of(file)}, line")
        if len(texts) > SHOWN:
            print_wrapped(
                f"\nThese are the first {SHOWN} texts. For the features of all, add -o features.npy"
            )
    else:
        show(args, params, list(given_texts(args)))
    return 0


def wrong_usage(args):
    """Return what is wrong with a combination of options, or None."""
    if args.file == "":
        return "--file takes the name of a file"
    if args.texts and args.file:
        return "give TEXT or --file, not both"
    if args.states and (args.normalize or not args.output):
        return "--states goes with -o and without --normalize"
    if not args.states and (args.skip or args.no_norm or args.pad):
        return "--skip, --no-norm and --pad go with --states"
    if args.dask and not (args.file and args.output):
        return "--dask goes with --file and -o"
    return None


def working_dtype(args):
    """Return the dtype to compute in: the device's own, or float32 where that is asked for."""
    return "float32" if args.dtype == "float32" or args.device == "cpu" else "float16"


def write_texts(args, params, texts):
    """Write the features or states of the texts of the command line."""
    tokens = tokenized(params, texts, "text", args.truncate, args.pad)
    dtype = args.dtype
    if args.states:
        features = model.hidden_states(params, tokens, skip=args.skip, norm=not args.no_norm)
        dtype = dtype or "float16"
    else:
        features = fast.encode_text(params, tokens)
    features = as_array(arrays.normalize(features) if args.normalize else features)
    features = features.astype(dtype or features.dtype, copy=False)
    with only_when_complete(args.output) as partial, open(partial, "wb") as file:
        np.save(file, features)
    print_written(args.output, features)


def write_file(args):
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
        written = write(params, stack.enter_context(opened(args.file)), args.output, **options)
    print_written(args.output, written)


def print_written(path, written):
    kind = "states" if written.ndim == 3 else "features"
    texts = "1 text" if len(written) == 1 else f"{len(written):,} texts"
    print(f"{path}: {kind} of {texts}, {list(written.shape)} {written.dtype}")


def show(args, params, texts, where="text"):
    """Print texts, their similarities, and the built-in pictures and scenes nearest to each."""
    tokens = tokenized(params, texts, where, args.truncate)
    features = as_array(arrays.normalize(fast.encode_text(params, tokens)))
    layers, _, _ = architecture(params)
    name = BUILTIN_IN_WORDS if args.model == "builtin" else args.model
    print_wrapped(f"model: {name}, {layers} layers, width {params['ln_final.weight'].size}")
    print("\n    tokens  text")
    for i, text in enumerate(texts, 1):
        print(f"{i:3} {1 + tokens[i - 1].argmax():6}  {fitted(text, columns() - 13) or EMPTY}")

    shown = max(1, min(len(texts), SHOWN, (columns() - 3) // 6))
    of = "" if shown == len(texts) else f" of the first {shown} texts"
    print_wrapped(f"\nsimilarity (cosine){of}")
    print("   " + "".join(f"{j:6}" for j in range(1, shown + 1)))
    for i, row in enumerate(features[:shown] @ features[:shown].T, 1):
        print(f"{i:3}" + "".join(f"{value:6.2f}" for value in row))

    if args.model == "builtin":
        show_nearest(texts, features)


def show_nearest(texts, features):
    """Print the pictures and scenes of the built-in model whose features are nearest to each text's."""
    emoji, names, pictures = builtin.pictures()
    descriptions, scenes = builtin.scenes()
    print_wrapped(f"\nnearest of the built-in model's {len(emoji)} pictures and {len(scenes)} scenes")
    pairs = zip(texts, features @ pictures.T, features @ scenes.T, strict=True)
    for i, (text, similarity, to_scenes) in enumerate(pairs, 1):
        print(f"{i:3}  {fitted(text, columns() - 6) or EMPTY}")
        if not tokenizer.clean(text):
            continue  # nothing is near to no words
        for j in similarity.argsort()[::-1][:NEAREST]:
            print(f"       {similarity[j]:5.2f}  {emoji[j]}  {fitted(names[j], columns() - 18)}")
        best = to_scenes.argmax()
        if to_scenes[best] >= SCENE_SHARE * similarity.max():
            label = f"{descriptions[best]['picture']}: {descriptions[best]['sentence']}"
            print(f"       {to_scenes[best]:5.2f}  {fitted(label, columns() - 14)}")
    if note := note_on_rare_words(texts):
        print_wrapped(f"\n{note}")
