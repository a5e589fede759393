"""Sources: find the file that a name, path or folder means, and its kind.

`open_tower` finds the text tower of a source, and its config. No number is read yet.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minclip import builtin
from minclip.checkpoint import dialects, formats
from minclip.checkpoint.configs import activation_in, config_beside
from minclip.checkpoint.download import available_models, download
from minclip.checkpoint.gguf_file import read_gguf
from minclip.checkpoint.ranges import download_from_hub, download_text_tower, text_file
from minclip.checkpoint.recompose import recomposed, without_wrappers
from minclip.checkpoint.tensor_files import read_safetensors
from minclip.checkpoint.torch_archive import TorchFile, read_archive, read_legacy
from minclip.checkpoint.zip_archive import MOST_UNPACKED, ZipArchive, read_npz
from minclip.params import ACTIVATIONS

Source = str | os.PathLike[str]


class Contents(NamedTuple):
    """The contents of a file or of several shards.

    metadata   of "activation", "heads", "eot" and "projection", those that the file itself says
    room       the most bytes that its tensors can have
    foreign    the globals of a pickle that no tensor needs; none of them is ever called
    """

    tensors: Mapping[str, Any]
    metadata: dict[str, Any]
    room: int
    foreign: list[str]


class OpenTower(NamedTuple):
    """A text tower, the config that its source gives, and the foreign globals of its file."""

    tower: dialects.Tower
    config: dict[str, Any]
    foreign: list[str]


def fetched(source: Source, text_only: bool | None = None) -> Source:
    """Return source, or the path of the model that it names, downloaded.

    text_only   whether to download the text tower alone. None means $MINCLIP_TEXT_ONLY; without it, a text
                tower that is there already is used, and else the complete file is downloaded
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be the name of a model or a path, not {type(source).__name__}")
    if str(source).startswith("hf:"):
        return from_hub(str(source))
    if source not in available_models():
        return source
    name = str(source)
    if text_only is None:
        text_only = os.environ.get("MINCLIP_TEXT_ONLY", "0") not in ("", "0")
        text_only |= text_file(name).is_file()
    return download_text_tower(name) if text_only else download(name)


def from_hub(source: str) -> Path:
    """Return the folder of a model of the hub. An error suggests the nearest name that is known."""
    try:
        return download_from_hub(source)
    except OSError as error:
        near = nearest_on_hub(source.removeprefix("hf:"))
        if near in (None, source.removeprefix("hf:")):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{error}; did you mean hf:{near}?") from None


def open_tower(source: Source, activation: str | None, heads: int | None) -> OpenTower:
    """Find the text tower of "builtin", a file or a folder.

    activation, heads   as the user gives them, which count in place of a config's; None where not given
    Raises ValueError where there is no tower of CLIP's, OSError where there is no file.
    """
    given = {"activation": activation, "heads": heads}
    chosen = {name: value for name, value in given.items() if value is not None}
    if source == "builtin":  # unpacked first: its file keeps the matrices in a way of its own
        tower = dialects.Tower(builtin.load_builtin(), "")
        return OpenTower(tower, {"activation": "quick_gelu", "heads": 2} | chosen, [])
    path, wanted = split_prefix(source)
    weights, wanted = find_weights(path, wanted)
    contents = read_contents(weights)
    tensors = recomposed(without_wrappers(contents.tensors))
    prefix = dialects.choose_prefix(dialects.find_towers(tensors), wanted)
    tower = dialects.Tower(tensors, prefix, projection=contents.metadata.get("projection"))
    check_room(tower, contents.room)
    config = {key: value for key, value in contents.metadata.items() if key != "projection"}
    if "activation" not in config:
        config = config_of(weights, tower, chosen) | config
    return OpenTower(tower, config | chosen, contents.foreign)


def config_of(weights: Path, tower: dialects.Tower, chosen: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a file that says nothing itself: of a config beside it, or of its name."""
    hugging_face = tower.dialect.title == "Hugging Face"
    config = config_beside(weights, hugging_face=hugging_face, sizes=tower.sizes, chosen=chosen)
    if config is not None:
        return {"activation": config.activation, "heads": config.heads, "eot": config.eot}
    named = None if hugging_face else activation_in(weights.stem)
    return {"activation": named} if named else {}


def check_room(tower: dialects.Tower, room: int) -> None:
    """Raise ValueError where the tensors are larger than the file, and so overlap."""
    needed = sum(getattr(tower.tensors[name], "nbytes", 0) for name in tower.tensor_names())
    if needed > room:
        raise ValueError(f"its tensors overlap: they have {needed} bytes, in a file of {room}")


def split_prefix(source: Source) -> tuple[Path, str | None]:
    """Return (path, prefix) of FILE#PREFIX. Raises FileNotFoundError where there is no such path."""
    path, _, prefix = os.fspath(source).rpartition("#")
    if not path or os.path.exists(source):
        path, prefix = os.fspath(source), ""
    if not os.path.exists(path):
        raise FileNotFoundError(why_missing(path))
    return Path(path), prefix or None


HUB_NAMES = {  # OpenAI's models on the Hugging Face hub
    "openai/clip-vit-base-patch32": "ViT-B/32",
    "openai/clip-vit-base-patch16": "ViT-B/16",
    "openai/clip-vit-large-patch14": "ViT-L/14",
    "openai/clip-vit-large-patch14-336": "ViT-L/14@336px",
}


def nearest_on_hub(name: str) -> str | None:
    """Return the repository of one of OpenAI's models whose name is nearest, or None where none is near."""
    near = difflib.get_close_matches(name.lower(), HUB_NAMES, n=1, cutoff=0.8)
    return near[0] if near else None


def why_missing(name: str) -> str:
    """Return one line for a name that is no file: the nearest name that works, and how to get the files."""
    name = re.sub(r"^https?://(www\.)?huggingface\.co/([\w.-]+/[\w.-]+).*", r"\2", name)
    models = ["builtin", *available_models()]
    on_hub = nearest_on_hub(name)
    hint = nearest_file(name) or (HUB_NAMES[on_hub] if on_hub else nearest_model(name, models))
    shown = dialects.shown(name) or "''"
    line = f"no file, folder or model {shown}{f'; did you mean {hint}?' if hint else '.'}"
    if name.lower() in HUB_NAMES or (
        re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not hint and Path(name).suffix not in SUFFIXES
    ):
        line += by_hand(name)
    elif "://" in name:
        line += " Download the file, and give its path."
    return f"{line} The models are {', '.join(models)}"


def nearest_file(name: str) -> str | None:
    """Return the path of the file of weights whose name is nearest, in the same folder, or None."""
    path = Path(name)
    if path.suffix not in SUFFIXES or not path.parent.is_dir():
        return None
    files = [file.name for file in path.parent.iterdir() if file.suffix in SUFFIXES]
    near = difflib.get_close_matches(path.name, files, n=1, cutoff=0.8)
    return str(path.with_name(near[0])) if near else None


def nearest_model(name: str, models: list[str]) -> str | None:
    """Return the model whose name differs from this one only in its punctuation or a letter or two."""

    def letters(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    plain = {letters(model): model for model in models}
    typed = letters(name.removesuffix(".pt"))
    near = difflib.get_close_matches(typed, plain, n=1, cutoff=0.65) if len(typed) < 40 else []
    return plain[near[0]] if near else None


def by_hand(name: str) -> str:
    """Return a sentence on how to get a model of the Hugging Face hub."""
    cached = Path("~/.cache/huggingface/hub", f"models--{name.replace('/', '--')}").expanduser()
    if cached.is_dir():
        return f" The Hugging Face hub's files are on this machine: give {cached}."
    return (
        f" hf:{name} downloads it from the Hugging Face hub. By hand, put config.json and model.safetensors "
        f"from huggingface.co/{name} into a folder, and give the folder's path."
    )


# The files of weights in a folder, best first. The second is a pattern for variants such as fp16.
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".gguf"}
VARIANTS = (
    "model.*.safetensors",
    "model.safetensors.index.*.json",
    "pytorch_model.*.bin",
    "pytorch_model.bin.index.*.json",
    *(f"*{suffix}" for suffix in sorted(SUFFIXES)),
)
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.(safetensors|bin)")


def find_weights(path: Path, wanted: str | None) -> tuple[Path, str | None]:
    """Return (the file of weights, the prefix wanted in it). A folder's own folders may be named as #NAME."""
    if path.is_dir():
        if wanted and (path / wanted).is_dir() and ".." not in wanted:
            return find_weights(path / wanted, None)
        return find_weights(weights_in(path), wanted)
    shard = SHARD.fullmatch(path.name)
    if shard:
        index = path.with_name(f"{shard[1]}.{shard[2]}.index.json")
        if not index.is_file():
            raise ValueError(
                f"it is one of several shards, and {index.name} with their names is not beside it"
            )
        return index, wanted
    return path, wanted


def weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder, or the folder inside that holds the text tower."""
    names = sorted(entry.name for entry in folder.iterdir())
    for name in WEIGHTS:
        if name in names:
            return folder / name
    inner = folders_inside(folder, names)
    if len(inner) > 1:
        listed = " or ".join(str(found) for found in inner)
        raise ValueError(f"a pipeline of {len(inner)} text towers: give {listed}")
    if inner:
        return inner[0]
    for pattern in VARIANTS:
        found = [path for path in sorted(folder.glob(pattern)) if not path.name.startswith("adapter_model")]
        shards = {SHARD.sub(r"\1", path.name) for path in found}
        if len(found) == 1 or (found and len(shards) == 1):
            return found[0]
        if found:
            few = ", ".join(path.name for path in found[:6])
            raise ValueError(f"{len(found)} files of weights: choose one, as FOLDER/FILE, from {few}")
    kind = formats.what_folder_it_is(names)
    if kind:
        raise ValueError(f"the folder holds {kind}")
    raise FileNotFoundError(
        f"{folder} holds neither config.json with model.safetensors (Hugging Face) "
        "nor open_clip_config.json with open_clip_model.safetensors (OpenCLIP)"
    )


def folders_inside(folder: Path, names: list[str]) -> list[Path]:
    """Return the folders in which a hub cache or a pipeline keep the text towers."""
    if "snapshots" in names:
        main = folder / "refs" / "main"
        commit = main.read_text(encoding="utf-8").strip()[:200] if main.is_file() else ""
        chosen = folder / "snapshots" / commit
        snapshots = [chosen] if commit and ".." not in commit and chosen.is_dir() else []
        return snapshots or sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    inner = [folder / name for name in names if name.startswith("text_encoder") or name == "0_CLIPModel"]
    return [path for path in inner if path.is_dir() and not of_another_kind(path)]


def of_another_kind(folder: Path) -> bool:
    """Tell whether the config in a folder is that of T5 or another model without CLIP's text tower."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return not str(config.get("model_type", "clip")).startswith("clip")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def read_contents(path: Path) -> Contents:
    """Return the contents of a file, or of all shards that an index lists."""
    if path.name.endswith(".json") and ".index." in path.name:
        return read_shards(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(formats.HEAD)
    if head.startswith(b"PK\3\4"):
        return read_zip(path, size)
    if head.startswith(b"GGUF"):
        tensors, metadata = read_gguf(path)
        return Contents(tensors, gguf_metadata(metadata), size, [])
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return torch_contents(read_legacy(path), size)
    if head[8:9] == b"{" and head[:1] not in (b"{", b"<"):
        tensors, metadata = read_safetensors(path)
        return Contents(tensors, saved_metadata(metadata), size, [])
    raise ValueError(formats.what_it_is(head))


def read_zip(path: Path, size: int) -> Contents:
    archive = ZipArchive(path)
    names = list(archive.entries)
    if any(name.endswith("/data.pkl") for name in names):
        return torch_contents(read_archive(archive), size)
    if names and all(name.endswith(".npy") for name in names):
        return Contents(read_npz(archive), {}, size * MOST_UNPACKED, [])
    raise ValueError(formats.what_archive_it_is(names))


def torch_contents(file: TorchFile, size: int) -> Contents:
    if not file.tensors and file.foreign:
        few = ", ".join(dialects.shown(name) for name in file.foreign[:3])
        raise ValueError(
            f"its pickle holds no tensors. It would call {few} in another reader; nothing was run"
        )
    return Contents(file.tensors, openai_activation(file.classes), size, file.foreign)


def read_shards(index: Path) -> Contents:
    """Return the contents of all shards that an index of Hugging Face lists, which lie beside it."""
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} is not an index of shards: {error!s:.200}") from None
    tensors: dict[str, Any] = {}
    room = 0
    for name in files:
        if type(name) is not str or not re.fullmatch(r"[^/\\:]+\.(safetensors|bin)", name):
            raise ValueError(f"{index.name} lists a shard that is not a file beside it")
        shard = index.with_name(name)
        if not shard.is_file():
            raise FileNotFoundError(f"the shard {dialects.shown(name)} is missing beside {index}")
        contents = read_contents(shard)
        if contents.tensors.keys() & tensors.keys():
            raise ValueError(f"the shard {dialects.shown(name)} repeats tensors of another one")
        tensors |= contents.tensors
        room += contents.room
    return Contents(tensors, {}, room, [])


def openai_activation(classes: Mapping[str, str]) -> dict[str, Any]:
    """Return OpenAI's activation for a TorchScript archive of OpenAI's code, unless that has a GELU."""
    blocks = [
        kind
        for name, kind in classes.items()
        if "resblocks" in name and "visual." not in name and kind.startswith("__torch__")
    ]
    exact = any("torch.nn.modules.activation." in kind and kind.endswith(".GELU") for kind in blocks)
    return {"activation": "quick_gelu"} if blocks and not exact else {}


def saved_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata that `minclip.save` wrote, or {} for another program's file."""
    if metadata.get("format") != "minclip":
        return {}
    heads, eot = metadata.get("heads", ""), metadata.get("eot")
    numbers = [number for number in (heads, eot) if number is not None]
    if metadata.get("activation") not in ACTIVATIONS or not all(
        n.isdecimal() and len(n) < 10 for n in numbers
    ):
        raise ValueError("saved by minclip, but its activation, heads or end-of-text id are damaged")
    return {
        "activation": metadata["activation"],
        "heads": int(heads),
        "eot": None if eot is None else int(eot),
        "projection": metadata.get("projection") != "none",
    }


def gguf_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that clip.cpp wrote to a GGUF file."""
    config: dict[str, Any] = {}
    if type(metadata.get("clip.use_gelu")) is bool:
        config["activation"] = "gelu" if metadata["clip.use_gelu"] else "quick_gelu"
    if type(metadata.get("clip.text.attention.head_count")) is int:
        config["heads"] = metadata["clip.text.attention.head_count"]
    return config
