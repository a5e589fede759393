"""Dialects: the names that other people give to the parameters of CLIP's text tower.

A dialect is a table from OpenAI's names to its own. A model may be wrapped in others ("module.", "text.",
"cond_stage_model.transformer." ...): the wrappers are found as a prefix, since only a text tower has a name
that ends in token_embedding.weight. Other tensors beside the tower, such as a classifier's, are ignored.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from minclip.params import BLOCK

# OpenAI's name, {block} for transformer.resblocks.i and a dot: its shape, in the letters of model.py.
SHAPES = {
    "token_embedding.weight": "V D",
    "positional_embedding": "L D",
    "{block}ln_1.weight": "D",
    "{block}ln_1.bias": "D",
    "{block}attn.in_proj_weight": "3D D",
    "{block}attn.in_proj_bias": "3D",
    "{block}attn.out_proj.weight": "D D",
    "{block}attn.out_proj.bias": "D",
    "{block}ln_2.weight": "D",
    "{block}ln_2.bias": "D",
    "{block}mlp.c_fc.weight": "4D D",
    "{block}mlp.c_fc.bias": "4D",
    "{block}mlp.c_proj.weight": "D 4D",
    "{block}mlp.c_proj.bias": "D",
    "ln_final.weight": "D",
    "ln_final.bias": "D",
    "text_projection": "D E",
}


class Dialect(NamedTuple):
    """A way to name the parameters.

    names   OpenAI's name -> this dialect's, with {qkv} where query, key and value are kept apart
    block   the prefix of the blocks
    own     the prefixes of all its names: another tensor behind the same prefix belongs to another module
    """

    title: str
    names: dict[str, str]
    block: str
    own: tuple[str, ...]

    @property
    def separate(self) -> bool:
        """Whether query, key and value are kept apart, and the projection as a linear layer, [E, D]."""
        return "{qkv}" in self.names["{block}attn.in_proj_weight"]


def dialect_like(title: str, block: str, words: Mapping[str, str], own: tuple[str, ...]) -> Dialect:
    """Return the dialect whose names are OpenAI's with the words replaced."""
    names = {}
    for ours in SHAPES:
        theirs = ours
        for word, other in words.items():
            theirs = theirs.replace(word, other)
        names[ours] = theirs
    return Dialect(title, names, block, own)


TOWER = ("token_embedding.", "positional_embedding", "ln_final.", "text_projection")
OPENAI = dialect_like("OpenAI", BLOCK, {}, (*TOWER, "transformer."))  # OpenCLIP's names too
OPENCLIP = OPENAI._replace(title="OpenCLIP")
SEPARATE = {"attn.in_proj_": "self_attn.{qkv}_proj.", "attn.out_proj": "self_attn.out_proj"}
SEPARATE |= {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
SEPARATE |= {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
SEPARATE |= {"positional_embedding": "embeddings.position_embedding.weight"}
SEPARATE |= {"text_projection": "text_projection.weight"}
SHORT_OWN = ("embeddings.", "encoder.", "final_layer_norm.", "text_projection")
HUGGING_FACE_SHORT = dialect_like("Hugging Face", "encoder.layers.", SEPARATE, SHORT_OWN)
HUGGING_FACE = Dialect(
    "Hugging Face",
    {
        ours: theirs if theirs.startswith(("text_projection", "{block}")) else f"text_model.{theirs}"
        for ours, theirs in HUGGING_FACE_SHORT.names.items()
    },
    "text_model.encoder.layers.",
    ("text_model.", "text_projection"),
)
# clip.cpp's GGUF files: models/convert_hf_to_gguf.py in github.com/monatis/clip.cpp. fc1 is "down" there.
CLIP_CPP_WORDS = {"attn.in_proj_": "attn_{qkv}.", "attn.out_proj": "attn_out", "ln_1": "ln1", "ln_2": "ln2"}
CLIP_CPP_WORDS |= {"mlp.c_fc": "ffn_down", "mlp.c_proj": "ffn_up", "token_embedding": "t.token_embd"}
CLIP_CPP_WORDS |= {"positional_embedding": "t.position_embd.weight", "ln_final": "t.post_ln"}
CLIP_CPP_WORDS |= {"text_projection": "text_projection.weight"}
CLIP_CPP = dialect_like("clip.cpp", "t.blk.", CLIP_CPP_WORDS, ("t.", "text_projection"))

IMAGE_TOWER = ("visual.", "vision_model.", "visual_projection.", "v.")
BUFFERS = ("attn_mask", "position_ids")  # computed, not learned
MOST_LAYERS = 1000  # each makes sixteen names; this bounds the memory
LONG_CLIP = "positional_embedding_res"

# A tensor's name may show that a tower only looks like CLIP's. Behind the tower's prefix, in any module:
FOREIGN_BESIDE = {
    "cls_emb": "CoCa's class token: this tower pools there, not at the end of text",
    "prompts_generator.": "X-CLIP's: it changes the text features by the video's",
}
FOREIGN = {  # and in the tower itself
    **FOREIGN_BESIDE,
    "text_projection.bias": "a projection with a bias, as SigLIP has",
    "text_projection.0.": "a projection of several layers, as GroupViT has",
    "head.": "SigLIP's head: it attends both ways and pools at the last position",
    "ls_1.": "layer scale",
    "ls_2.": "layer scale",
    "attn.ln_": "a layer norm inside attention",
    "attn.q_norm": "normalized queries",
    "attn.k_norm": "normalized keys",
    "ln_attn.": "a layer norm after attention",
    "mlp.ln.": "a layer norm inside the MLP",
    "attn.logit_scale": "cosine attention",
    "attn.head_scale": "scaled heads",
}
OTHERS = {  # how names end in files without CLIP's text tower
    "word_embeddings.weight": "a BERT-like text tower",
    "relative_attention_bias.weight": "a T5 text tower",
    "patch_embedding.weight": "an image tower alone",
    "visual.conv1.weight": "an image tower alone",
}
ADAPTERS = {  # and the words in the names of adapters
    "lokr_": "a LoKr adapter",
    "hada_": "a LoHa adapter",
    ".oft_": "an OFT adapter",
    "lora_": "a LoRA",  # last: the names of all of kohya's adapters begin with lora_
}
EMBEDDINGS = {"clip_l", "clip_g", "string_to_param", "emb_params"}  # the keys of textual inversion files
# Prefixes of Stable Diffusion's and Flux's files, and the short name of the tower behind each.
SHORT_NAMES = {
    "cond_stage_model.transformer.": "clip_l",
    "conditioner.embedders.0.transformer.": "clip_l",
    "conditioner.embedders.0.model.": "clip_g",
    "conditioner.embedders.1.model.": "clip_g",
    "cond_stage_model.model.": "clip_h",
}


class Tower:
    """A text tower among tensors: its prefix, dialect and sizes. No number is read yet.

    prefix    the beginning of all its names
    dialect   its table of names
    sources   OpenAI's name -> the names of the tensors that it is made from: one, or query, key and value
    sizes     V, L, D, E as in minclip/model.py, and layers
    projection   whether it has a text projection

    Raises ValueError for a tensor that is missing, has another shape, or belongs to another architecture.
    """

    def __init__(self, tensors: Mapping[str, Any], prefix: str, *, projection: bool | None = None):
        self.tensors, self.prefix = tensors, prefix
        behind = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        self.dialect = find_dialect(set(behind), prefix)
        self.names = [name for name in behind if name.startswith(self.dialect.own)]
        if projection is None:
            # Hugging Face's CLIPTextModel has none. OpenAI's models do, and models with an image tower do.
            # Files of Stable Diffusion 2 may leave out OpenCLIP's projection, which it does not use.
            alone = not any(name.startswith(IMAGE_TOWER) for name in behind)
            optional = alone and (self.dialect.separate or short_name(prefix) is not None)
            projection = not optional or self.dialect.names["text_projection"] in self.names
        self.projection = projection
        self.sizes = self.find_sizes()
        self.sources = self.expected()
        self.check_names(behind)
        self.check_shapes()

    def find_sizes(self) -> dict[str, int]:
        """Return the sizes by letter. The width is that of most tensors, so that a wrong one is found out."""
        names, block = self.dialect.names, self.dialect.block
        numbers = {n.removeprefix(block).partition(".")[0] for n in self.names if n.startswith(block)}
        layers = sum(number.isascii() and number.isdecimal() for number in numbers)
        if layers > MOST_LAYERS:
            raise ValueError(f"{layers} blocks, more than any text tower has")
        shapes = {name: tuple(self.tensors[self.prefix + name].shape) for name in self.names}
        tokens, positions = (
            shapes.get(names[ours], ()) for ours in ("token_embedding.weight", "positional_embedding")
        )
        norms = [shape for name, shape in shapes.items() if len(shape) == 1 and is_norm(name)]
        widths = Counter([*(shape[0] for shape in norms), *tokens[1:2], *positions[1:2]])
        P = shapes.get(names["text_projection"], ())
        return {
            "V": tokens[0] if tokens else 0,
            "L": positions[0] if positions else 0,
            "D": widths.most_common(1)[0][0] if widths else 0,
            "E": P[0 if self.dialect.separate else -1] if P else 0,
            "layers": layers,
        }

    def expected(self) -> dict[str, list[str]]:
        """Return OpenAI's name -> the names of its sources in this dialect."""
        sources = {}
        for ours, theirs in self.dialect.names.items():
            names = [theirs.replace("{qkv}", letter) for letter in ("qkv" if "{qkv}" in theirs else "q")]
            for i in range(self.sizes["layers"]) if "{block}" in ours else (0,):
                name = ours.replace("{block}", f"{BLOCK}{i}.")
                sources[name] = [theirs.replace("{block}", f"{self.dialect.block}{i}.") for theirs in names]
        if not self.projection:
            del sources["text_projection"]
        return sources

    def check_names(self, behind: list[str]) -> None:
        """Raise ValueError for a tensor that is missing, left over, or another architecture's."""
        expected = {name for names in self.sources.values() for name in names}
        own = set(self.names)
        known = expected | ({LONG_CLIP} if self.dialect.names is OPENAI.names else set())
        spare = [name for name in self.names if name not in known and not name.endswith(BUFFERS)]
        adapter = next((name for name in self.names if any(word in name for word in ADAPTERS)), None)
        if adapter:
            raise ValueError(
                f"{shown(self.prefix + adapter)} belongs to an adapter that is not merged into its tower: "
                "call PEFT's model.merge_and_unload(), and save again"
            )
        for name in behind:
            signs = FOREIGN_BESIDE if name not in own else FOREIGN if name not in expected else {}
            for sign, meaning in signs.items():
                if sign in name:
                    raise ValueError(f"{shown(self.prefix + name)} is {meaning}: no CLIP text tower")
        for ours, names in self.sources.items():
            for name in names:
                if name not in own:
                    shape = ", ".join(str(n or "any size") for n in self.shape_of(ours))
                    raise ValueError(
                        f"{shown(self.prefix + name)}, [{shape}], is missing{self.nearest(name, spare)}"
                    )
        if spare:
            name = shown(self.prefix + spare[0])
            raise ValueError(
                f"{name} is not a parameter of CLIP's text tower{self.nearest(spare[0], expected)}"
            )

    def nearest(self, name: str, names: Iterable[str]) -> str:
        """Return words that suggest the nearest name. Long names and lists are cut, to bound the time."""
        candidates = {other[-100:]: other for other in list(names)[:500]}
        near = difflib.get_close_matches(name[-100:], candidates, n=1)
        return f"; the nearest name is {shown(self.prefix + candidates[near[0]])}" if near else ""

    def check_shapes(self) -> None:
        for ours, names in self.sources.items():
            expected = self.shape_of(ours)
            for name in names:
                shape = tuple(self.tensors[self.prefix + name].shape)
                if shape != expected:
                    raise ValueError(
                        f"{shown(self.prefix + name)} is {list(shape)}, expected {list(expected)}"
                    )

    def shape_of(self, ours: str) -> tuple[int, ...]:
        """Return the shape that each source of one of OpenAI's parameters must have."""
        if ours.startswith(BLOCK):
            ours = "{block}" + ours.removeprefix(BLOCK).partition(".")[2]
        separate = "{qkv}" in self.dialect.names[ours]
        letters = SHAPES[ours].replace("3D", "D") if separate else SHAPES[ours]
        shape = tuple(int(letter[:-1] or 1) * self.sizes[letter[-1]] for letter in letters.split())
        return shape[::-1] if self.dialect.separate and ours == "text_projection" else shape

    def tensor_names(self) -> list[str]:
        """Return the complete names of all tensors that the parameters are made from."""
        names = [self.prefix + name for names in self.sources.values() for name in names]
        return names + [self.prefix + LONG_CLIP] * (LONG_CLIP in self.names)

    def array(self, ours: str, read: Callable[[Any, str], np.ndarray]) -> np.ndarray:
        """Return one of OpenAI's parameters, read with read(tensor, name) from its sources."""
        arrays = [read(self.tensors[self.prefix + name], self.prefix + name) for name in self.sources[ours]]
        array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        if ours == "text_projection" and self.dialect.separate:
            array = np.ascontiguousarray(array.T)
        if ours == "positional_embedding" and LONG_CLIP in self.names:
            array = self.long_clip(array, read)
        return array

    def long_clip(self, positions: np.ndarray, read: Callable[[Any, str], np.ndarray]) -> np.ndarray:
        """Return Long-CLIP's positions: CLIP's first 20, and the others from the tensor beside them."""
        name = self.prefix + LONG_CLIP
        learned = read(self.tensors[name], name)
        if learned.shape != positions.shape:
            raise ValueError(f"{name} is {list(learned.shape)}, expected {list(positions.shape)}")
        return np.concatenate([positions[:20], learned[20:].astype(positions.dtype)])


def is_norm(name: str) -> bool:
    return "ln_" in name or "norm" in name or ".ln" in name


def find_dialect(names: set[str], prefix: str) -> Dialect:
    """Return the dialect of the names behind a tower's prefix."""
    if "token_embedding.weight" in names:
        return OPENCLIP if prefix.endswith("text.") else OPENAI
    for dialect in (HUGGING_FACE, HUGGING_FACE_SHORT):
        if dialect.names["token_embedding.weight"] in names:
            return dialect
    return CLIP_CPP


def find_towers(tensors: Iterable[str]) -> list[str]:
    """Return the prefixes of all text towers among the names. Raises ValueError where there are none."""
    tensors = list(tensors)
    prefixes = set()
    for end in ("token_embedding.weight", "t.token_embd.weight"):
        stems = [name.removesuffix(end) for name in tensors if name == end or name.endswith(f".{end}")]
        prefixes |= {stem.removesuffix("embeddings.").removesuffix("text_model.") for stem in stems}
    if prefixes:
        return sorted(prefixes)
    raise ValueError(why_no_tower(tensors))


def why_no_tower(names: list[str]) -> str:
    """Return the reason why no text tower is among the names."""
    for word, kind in ADAPTERS.items():
        of_adapter = [name for name in names if word in name]
        if of_adapter:
            remedy = " (minclip.apply_lora)" if kind == "a LoRA" else ""
            return (
                f"{kind}, to be merged into the weights of {adapted(of_adapter)}{remedy}, and no tower itself"
            )
    if names and all(name.partition(".")[0] in EMBEDDINGS for name in names):
        return (
            "a textual inversion embedding: rows to append to token_embedding.weight of the tower it was "
            "trained with, and no tower itself"
        )
    for sign, meaning in OTHERS.items():
        for name in names:
            if name.endswith(sign):
                return f"{shown(name)}: {meaning}, no CLIP text tower"
    few = f"the names are {', '.join(map(shown, names[:3]))}" if names else "there are no tensors at all"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"no CLIP text tower: no name ends in token_embedding.weight; {few}{more}"


def adapted(names: list[str]) -> str:
    """Return the model that an adapter of these names belongs to."""
    towers = {
        "lora_te1_": "the first text tower, CLIP's ViT-L/14",
        "lora_te2_": "the second text tower, ViT-bigG/14 in Stable Diffusion XL",
        "lora_te": "a text tower",
        "text_": "a text tower",
    }
    found = [tower for sign, tower in towers.items() if any(sign in name for name in names)]
    return found[0] if found else "a U-Net or an image tower"


def choose_prefix(prefixes: list[str], wanted: str | None) -> str:
    """Return the one prefix, or the one that a user wants: by its name, its last words, or a short name."""
    if wanted is None:
        if len(prefixes) == 1:
            return prefixes[0]
        which = "choose one, as FILE#PREFIX (in a state_dict, keep only one)"
        raise ValueError(f"{len(prefixes)} text towers: {which}; {listed(prefixes)}")
    wanted = wanted.strip(".")
    for fits in (
        lambda prefix: prefix.strip(".") == wanted,
        lambda prefix: f".{wanted}." in f".{prefix}",
        lambda prefix: short_name(prefix) == wanted,
    ):
        found = [prefix for prefix in prefixes if fits(prefix)]
        if len(found) == 1:
            return found[0]
    number = f"{len(prefixes)} text towers" if len(prefixes) > 1 else "one text tower"
    raise ValueError(f"#{shown(wanted)} names none of its {number}; {listed(prefixes)}")


def short_name(prefix: str) -> str | None:
    """Return the short name of the tower behind a prefix of Stable Diffusion, or None for another prefix."""
    return SHORT_NAMES.get(prefix.removeprefix("state_dict."))


def listed(prefixes: list[str]) -> str:
    names = ", ".join(shown(found) if found else "none at all" for found in prefixes[:8])
    return f"the prefixes are {names}" if len(prefixes) > 1 else f"the prefix is {names}"


def shown(name: str) -> str:
    """Return a name from a file, short and printable enough for one line."""
    return name if len(name) <= 120 and name.isprintable() else f"{name[:120]!r:.120}"
