"""Configs beside weights: the activation, heads and end-of-text rule of Hugging Face and OpenCLIP.

A config is read as the library that wrote it reads it. A value that it leaves out is the default of the
library's class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from minclip.checkpoint.dialects import shown
from minclip.params import ACTIVATIONS


class Config(NamedTuple):
    """A text tower's config. eot is that of `minclip.Params`; sizes are by letter, as in minclip/model.py."""

    activation: str
    heads: int
    eot: int | None
    sizes: dict[str, int]


# transformers 5.24: CLIPTextConfig, CLIPSegTextConfig, OwlViTTextConfig, Owlv2TextConfig.
HUGGING_FACE: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
SAME_TOWER = ("clip", "clip_text_model", "clipseg", "clipseg_text_model")
AT_LARGEST_ID = ("owlvit", "owlvit_text_model", "owlv2", "owlv2_text_model")  # whatever eos_token_id says
OTHER_TOWERS = {
    "xclip": "its text features are changed by the video's",
    "groupvit": "its text projection has several layers",
    "altclip": "its text tower is XLM-RoBERTa's",
    "chinese_clip": "its text tower is BERT's",
    "siglip": "it attends both ways and pools at the last position",
    "siglip2": "it attends both ways and pools at the last position",
    "align": "its text tower is BERT's",
    "blip": "its text tower is BERT's",
    "flava": "its text tower is BERT-like",
    "t5": "it is a T5 encoder",
    "clip_vision_model": "it is an image tower alone",
}


def of_hugging_face(config: dict[str, Any], chosen: dict[str, Any] | None = None) -> Config:
    """Return the text tower's config in a config.json of Hugging Face.

    chosen   the activation or heads that the user gives, which count in place of the config's
    Raises ValueError for a tower that is not CLIP's, and where two blocks contradict each other.
    """
    kind = config.get("model_type", "clip")
    if kind not in (*SAME_TOWER, *AT_LARGEST_ID):
        reason = OTHER_TOWERS.get(kind, "its text tower is not CLIP's") if type(kind) is str else "not a name"
        raise ValueError(f"config.json: model_type {kind!r:.80} is not a CLIP text tower: {reason}")
    blocks = [config[name] for name in ("text_config", "text_config_dict") if config.get(name)]
    found = [of_text_config(block, kind)._replace(**chosen or {}) for block in blocks or [config]]
    # CLIPModel completes text_config_dict with the defaults and then prefers it. The classes for text alone
    # read text_config. So the same folder is two models where the blocks differ.
    for name in ("activation", "heads", "eot"):
        ours, theirs = getattr(found[0], name), getattr(found[-1], name)
        if ours != theirs:
            remedy = f"choose with {name}= (--{name})" if name != "eot" else "correct its eos_token_id"
            raise ValueError(
                f"config.json contradicts itself: text_config says {name} {ours!r:.80}, and text_config_dict "
                f"{theirs!r:.80}, completed with the defaults. transformers' CLIPModel uses the second, its "
                f"text-only classes the first: {remedy}"
            )
    return found[-1]


def of_text_config(text: dict[str, Any], kind: str) -> Config:
    text_kind = text.get("model_type", "clip_text_model")
    if text_kind not in (*SAME_TOWER, *AT_LARGEST_ID):
        raise ValueError(f"config.json: model_type {text_kind!r:.80} is not a CLIP text tower")
    text = HUGGING_FACE | ({"max_position_embeddings": 16} if kind in AT_LARGEST_ID else {}) | text
    activation = text["hidden_act"]
    if activation not in ACTIVATIONS:
        allowed = " nor ".join(ACTIVATIONS)
        raise ValueError(f"config.json: hidden_act {activation!r:.80} is neither {allowed}")
    if text["layer_norm_eps"] != 1e-5:
        raise ValueError(f"config.json: layer_norm_eps {text['layer_norm_eps']!r:.80}, CLIP's is 1e-05")
    names = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers")
    sizes = {letter: text[name] for letter, name in zip(("V", "L", "D", "layers"), names, strict=True)}
    eot = None if kind in AT_LARGEST_ID else end_of_text(text["eos_token_id"], text["vocab_size"])
    return Config(activation, text["num_attention_heads"], eot, sizes)


def end_of_text(eos: Any, vocabulary: int) -> int | None:
    """Return `Params.eot` for the eos_token_id of a Hugging Face config.

    transformers pools at the first occurrence of the id, but for 2 at the largest id: configs from before
    transformers 4.31 have 2, and mean the end of text. The last id of a vocabulary is always the largest.
    """
    if eos is None or eos == 2 or eos == vocabulary - 1:
        return None
    if type(eos) is not int:
        raise ValueError(f"config.json: eos_token_id {eos!r:.80} is not one id")
    return eos if 0 <= eos < vocabulary else None


# Values that open_clip_config.json may have for a text tower that is CLIP's. The first is CLIP's own.
OPEN_CLIP = {
    "no_causal_mask": (False,),
    "pool_type": ("argmax",),
    "embed_cls": (False,),
    "proj_type": ("linear",),
    "proj_bias": (False,),
    "mlp_ratio": (4,),
    "ls_init_value": (None,),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "hf_model_name": (None,),
}
# Keys that may have any value: sizes, the tokenizer's options, and options that change nothing we compute.
OPEN_CLIP_FREE = set(
    "context_length vocab_size width heads layers pad_id eos_id output_tokens final_ln_after_pool "
    "hf_tokenizer_name tokenizer_mode tokenizer_kwargs hf_model_pretrained hf_proj_type "
    "hf_pooler_type".split()
)
OPEN_CLIP_DEFAULTS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}


def of_open_clip(config: dict[str, Any], name: str = "") -> Config:
    """Return the text tower's config in an open_clip_config.json.

    name   the model's name, which tells the activation where the config has no quick_gelu
    Raises ValueError, with the key, for a tower that is not CLIP's.
    """
    model = config.get("model_cfg", config)
    text = model.get("text_cfg")
    if not isinstance(text, dict):
        raise ValueError("open_clip_config.json has no text_cfg")
    full = OPEN_CLIP_DEFAULTS | text
    at_eos = text.get("pool_type") == "eos"
    eos = text.get("eos_id", 2)
    for key, value in text.items():
        if key in OPEN_CLIP_FREE or value in OPEN_CLIP.get(key, ()):
            continue
        if key == "pool_type" and at_eos and type(eos) is int and 2 < eos < full["vocab_size"]:
            continue
        allowed = (
            f"; CLIP's is {OPEN_CLIP[key][0]!r}" if key in OPEN_CLIP else ", which minclip does not know"
        )
        raise ValueError(f"open_clip_config.json: {shown(key)} {value!r:.80}{allowed}")
    quick = model.get("quick_gelu", activation_in(name) == "quick_gelu")
    names = ("vocab_size", "context_length", "width", "layers")
    sizes = {letter: full[key] for letter, key in zip(("V", "L", "D", "layers"), names, strict=True)}
    eot = end_of_text(eos, full["vocab_size"]) if at_eos else None
    return Config("quick_gelu" if quick else "gelu", full["heads"], eot, sizes)


def activation_in(name: str) -> str | None:
    """Return "quick_gelu" if an OpenCLIP model's name ends so or says that OpenAI trained it, else None."""
    words = name.lower().replace(".", "-").replace("_", "-").split("-")
    return "quick_gelu" if "quickgelu" in words or words[-1] == "openai" else None


NAMES = ("config.json", "open_clip_config.json")
SIZES = {"V": "vocabulary", "L": "context length", "D": "width", "layers": "layers"}


def config_beside(
    weights: Path, *, hugging_face: bool, sizes: dict[str, int], chosen: dict[str, Any]
) -> Config | None:
    """Return the config beside a file of weights, or None where there is none.

    hugging_face   whether the weights have Hugging Face's names: then config.json counts first
    sizes          the tower's own, which the config must have too
    chosen         the activation or heads that the user gives, which count in place of the config's
    Raises ValueError where the config is another architecture's, or contradicts the tensors or a config.
    """
    first, second = NAMES if hugging_face else NAMES[::-1]
    config = read_config(weights, first, chosen)
    try:
        other = read_config(weights, second, chosen)
    except ValueError:  # the other library's file, whose model need not be a text tower
        other = None
    if config is None:
        return other if other is not None and other.sizes.items() <= sizes.items() else None
    for letter, size in config.sizes.items():
        if sizes[letter] != size:
            raise ValueError(
                f"{first} beside it contradicts the tensors: it says {SIZES[letter]} {size!r:.80}, and they "
                f"have {sizes[letter]}. Put the config of these weights there, or move it away"
            )
    if other is not None and other.activation != config.activation:
        raise ValueError(
            f"{first} beside it says {config.activation}, and {second} {other.activation}: choose with "
            "activation= (--activation)"
        )
    return config


def read_config(weights: Path, name: str, chosen: dict[str, Any]) -> Config | None:
    """Return the config of a name beside a file of weights, or None where there is none."""
    path = weights.parent / name
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if name == "config.json":
            return of_hugging_face(config, chosen)
        return of_open_clip(config, weights.parent.name)._replace(**chosen)
    except (
        TypeError,
        AttributeError,
        KeyError,
        RecursionError,
        json.JSONDecodeError,
        UnicodeDecodeError,
    ) as error:
        raise ValueError(f"{name} beside it is not a model's config: {error!s:.200}") from None
