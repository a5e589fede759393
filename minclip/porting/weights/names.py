"""The place that a port's own name for an array tells: which of the reference's tensors belongs there.

Two sources, in this order: the words that frameworks use, and the names' own pattern. Where
"tower.3.mix.a" holds q of layer 3, and so on for most layers, "tower.#.mix.a" is the place of q.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from minclip.params import BLOCK
from minclip.porting.names import LAYER, plain
from minclip.porting.weights.layouts import Unit

WEIGHT = {"weight", "kernel", "w", "scale", "gamma", "g", "embedding", "embeddings"}
WEIGHT |= {"mat_mul", "mat_mul_integer", "gemm", "qgemm", "gather"}  # of ONNX nodes
BIAS = {"bias", "beta", "b", "offset"}

# The end of a name, without its last word, and the role that it stands for. ".{}" takes "weight" or "bias".
INSIDE = (
    (r"ln_?1|layer_?norm_?1|norm_?1|input_layernorm|attn_norm|attn_ln", "ln_1.{}", ""),
    (r"ln_?2|layer_?norm_?2|norm_?2|post_attention_layernorm|mlp_norm|mlp_ln", "ln_2.{}", ""),
    (r"in_proj|qkv|c_attn|attn_qkv|qkv_proj", "attn.in_proj_{}", "qkv"),
    (r"q|q_proj|query|query_proj|query_dense|queries|wq|to_q|attn_q", "attn.in_proj_{}", "q"),
    (r"k|k_proj|key|key_proj|key_dense|keys|wk|to_k|attn_k", "attn.in_proj_{}", "k"),
    (r"v|v_proj|value|value_proj|value_dense|values|wv|to_v|attn_v", "attn.in_proj_{}", "v"),
    (
        r"out_proj|o_proj|to_out|attn_out|attn_output|attention_output|output_dense"
        r"|(?:self_)?att(?:n|ention)\.(?:c_proj|proj|out|output|output\.dense)",
        "attn.out_proj.{}",
        "",
    ),
    (r"c_fc|fc_?1|linear_?1|lin1|intermediate\.dense", "mlp.c_fc.{}", ""),
    (r"mlp\.c_proj|fc_?2|linear_?2|lin2", "mlp.c_proj.{}", ""),
)
OUTSIDE = (
    (
        r"token_embedding|token_embeddings?|token_embd|tok_emb|tok_embeddings|wte|embed_tokens",
        "token_embedding.weight",
    ),
    (
        r"positional_embedding|position_embeddings?|pos_emb|pos_embed|pos_embedding|position_embd|wpe",
        "positional_embedding",
    ),
    (r"ln_final|final_layer_?norm|final_norm|post_ln|ln_f", "ln_final.{}"),
    (r"text_projection|text_proj", "text_projection"),
)
IMAGE = re.compile(r"visual|vision|image|(?:^|\.)v\.blk")


def ends_with(words: str, name: str) -> bool:
    """Tell whether name is one of the words, or ends in a dot and one of them."""
    return re.search(rf"(?:^|\.)(?:{words})$", name) is not None


def place_by_words(name: str, base: int) -> tuple[Unit, str] | None:
    """Return the unit that a name tells in the words of known frameworks, and "qkv" where it is packed.

    base is the number of the first layer in these names, 0 or 1. None where the words are not known.
    """
    name = plain(name)
    if IMAGE.search(name):
        return None
    stem, _, last = name.rpartition(".")
    if re.search(r"_(weight|bias)$", last) and last not in WEIGHT | BIAS:
        stem, last = f"{stem}.{last.rpartition('_')[0]}".strip("."), last.rpartition("_")[2]
    kind = "weight" if last in WEIGHT else "bias" if last in BIAS else ""
    if not kind:
        stem, kind = name, "weight"
    layer = LAYER.search(name)
    if not layer:
        found = next((ours for words, ours in OUTSIDE if ends_with(words, stem)), None)
        return (Unit(found.format(kind)), "") if found else None
    if stem == name:
        return None
    for words, ours, part in INSIDE:
        if ends_with(words, stem):
            full = f"{BLOCK}{int(layer[1]) - base}.{ours.format(kind)}"
            return Unit(full, part if len(part) == 1 else ""), part
    return None


def first_layer(names: Iterable[str]) -> int:
    """Return 1 where the layers in names count from 1, and 0 otherwise."""
    numbers = [int(found[1]) for found in map(LAYER.search, map(plain, names)) if found]
    return min(1, min(numbers, default=0))


def numbered(names: Iterable[str]) -> dict[str, str]:
    """Return name -> name with 0 where a framework leaves the first number out: "dense", "dense_1"."""
    names = list(names)
    words = {word for name in names for word in plain(name).split(".")}
    return {
        name: ".".join(f"{word}_0" if f"{word}_1" in words else word for word in plain(name).split("."))
        for name in names
    }


def places_by_pattern(found: Mapping[str, Unit | None]) -> dict[str, Unit]:
    """Return name -> the unit that belongs there, from the units that most names of the same pattern hold.

    found maps each name to the unit that its array holds, or None. A pattern needs two layers that agree,
    and more than half of its arrays.
    """
    groups: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, full in numbered(found).items():
        words = re.split(r"(\d+)", full)
        for where in range(1, len(words), 2):
            pattern = (*words[:where], "#", *words[where + 1 :])
            groups[pattern].append((name, int(words[where])))
    places: dict[str, tuple[int, Unit]] = {}
    for members in groups.values():
        base = min(number for _, number in members)
        held = [(found[name], number - base) for name, number in members]
        roles = Counter(unit.role for unit, layer in held if unit and unit.layer == layer)
        if not roles or roles.most_common(1)[0][1] < max(2, len(members) // 2 + 1):
            continue
        (role, agree), *_ = roles.most_common(1)
        for name, number in members:
            place = Unit(f"{BLOCK}{number - base}.{role[0]}", role[1])
            places[name] = max(places.get(name, (0, place)), (agree, place), key=lambda choice: choice[0])
    return {name: place for name, (_, place) in places.items()}
