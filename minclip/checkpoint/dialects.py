"""What other people call the parameters of CLIP's text tower, and what their configs say of it.

A dialect is a table from OpenAI's names to its own. Whatever else a model is wrapped in ("module.",
"text.", "cond_stage_model.transformer." ...) is found as a prefix, since only a text tower has a name
that ends in token_embedding.weight.
"""

import difflib

import numpy as np

from minclip.params import ACTIVATIONS

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

OPENAI = {name: name for name in SHAPES}  # OpenCLIP's names too
OPENAI_BLOCK = "transformer.resblocks."

# Hugging Face keeps q, k and v apart, and the projection as a linear layer, [E, D].
HUGGING_FACE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "{block}ln_1.weight": "{block}layer_norm1.weight",
    "{block}ln_1.bias": "{block}layer_norm1.bias",
    "{block}attn.in_proj_weight": "{block}self_attn.{qkv}_proj.weight",
    "{block}attn.in_proj_bias": "{block}self_attn.{qkv}_proj.bias",
    "{block}attn.out_proj.weight": "{block}self_attn.out_proj.weight",
    "{block}attn.out_proj.bias": "{block}self_attn.out_proj.bias",
    "{block}ln_2.weight": "{block}layer_norm2.weight",
    "{block}ln_2.bias": "{block}layer_norm2.bias",
    "{block}mlp.c_fc.weight": "{block}mlp.fc1.weight",
    "{block}mlp.c_fc.bias": "{block}mlp.fc1.bias",
    "{block}mlp.c_proj.weight": "{block}mlp.fc2.weight",
    "{block}mlp.c_proj.bias": "{block}mlp.fc2.bias",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
HUGGING_FACE_BLOCK = "text_model.encoder.layers."

# Neighbours of the text tower that are no part of it.
BESIDE = ("visual.", "vision_model.", "visual_projection.", "logit_scale", "logit_bias")
BESIDE += ("input_resolution", "context_length", "vocab_size")
BUFFERS = ("attn_mask", "position_ids")  # computed, not learned

# What a tensor's name gives away about a tower that only looks like CLIP's.
FOREIGN = {
    "cls_emb": "CoCa's class token: this tower pools there, not at the end of text",
    "text_projection.bias": "a projection with a bias, as SigLIP has",
    "head.": "SigLIP's head: it attends both ways and pools at the last position",
    "ls_1.": "layer scale",
    "ls_2.": "layer scale",
    "attn.ln_": "a layer norm inside attention",
    "attn.q_norm": "normalised queries",
    "attn.k_norm": "normalised keys",
    "ln_attn.": "a layer norm after attention",
    "mlp.ln.": "a layer norm inside the MLP",
    "attn.logit_scale": "cosine attention",
    "attn.head_scale": "scaled heads",
}
OTHERS = {
    "word_embeddings.weight": "a BERT-like text tower",
    "relative_attention_bias.weight": "a T5 text tower",
    "patch_embedding.weight": "an image tower alone",
    "visual.conv1.weight": "an image tower alone",
}


class Tower:
    """A text tower among tensors: where it lies, in which dialect, how big it is. Nothing is read yet.

    dialect   "OpenAI", "OpenCLIP" (only where it differs from OpenAI's) or "Hugging Face"
    prefix    what stands before all its names
    sources   OpenAI's name -> the names of the tensors it is made from, one or q, k and v
    sizes     V, L, D, E as in minclip/model.py, and layers
    Raises ValueError for a tensor that is missing, of another shape, or not a text tower's.
    """

    def __init__(self, tensors, prefix, *, projection=None):
        self.tensors, self.prefix = tensors, prefix
        self.names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        if "token_embedding.weight" in self.names:
            self.dialect = "OpenCLIP" if prefix.endswith("text.") else "OpenAI"
            self.table, self.block = OPENAI, OPENAI_BLOCK
        else:
            self.dialect, self.table, self.block = "Hugging Face", HUGGING_FACE, HUGGING_FACE_BLOCK
            if "embeddings.token_embedding.weight" in self.names:
                self.table = {ours: theirs.removeprefix("text_model.") for ours, theirs in self.table.items()}
                self.block = self.block.removeprefix("text_model.")
        if projection is None:  # Hugging Face's CLIPTextModel has none; a model with an image tower must
            alone = not any(name.startswith(BESIDE) for name in self.names)
            projection = self.dialect != "Hugging Face" or not alone or "text_projection.weight" in self.names
        self.projection = projection
        self.sizes = self.measure()
        self.sources = self.expected()
        self.check_names()
        self.check_shapes()

    def measure(self):
        """Sizes by letter. Of the width, what most tensors say, so that a wrong one is found out."""
        numbers = {n.removeprefix(self.block).split(".")[0] for n in self.names if n.startswith(self.block)}
        layers = len({number for number in numbers if number.isascii() and number.isdecimal()})
        own = [name for name in self.names if not name.startswith(BESIDE)]
        shapes = {name: self.tensors[self.prefix + name].shape for name in own}
        widths = [
            shape[-1]
            for name, shape in shapes.items()
            if len(shape) == 1 and ("ln_" in name or "norm" in name)
        ]
        for ours in ("token_embedding.weight", "positional_embedding"):
            widths += shapes.get(self.table[ours], ())[1:]
        V, L = (
            next(iter(shapes.get(self.table[ours], ())), 0)
            for ours in ("token_embedding.weight", "positional_embedding")
        )
        P = shapes.get(self.table["text_projection"], ())
        E = P[0 if self.dialect == "Hugging Face" else -1] if P else 0
        return {"V": V, "L": L, "D": max(widths, key=widths.count, default=0), "E": E, "layers": layers}

    def expected(self):
        """OpenAI's name -> the names of what it is made from here."""
        sources = {}
        for ours, theirs in self.table.items():
            names = [theirs.replace("{qkv}", letter) for letter in ("qkv" if "{qkv}" in theirs else "q")]
            for i in range(self.sizes["layers"]) if "{block}" in ours else (0,):
                name = ours.replace("{block}", f"{OPENAI_BLOCK}{i}.")
                sources[name] = [theirs.replace("{block}", f"{self.block}{i}.") for theirs in names]
        if not self.projection:
            del sources["text_projection"]
        return sources

    def check_names(self):
        """Raise ValueError for a tensor that is missing, or one that is left over."""
        expected = {name for names in self.sources.values() for name in names}
        present = set(self.names)
        spare = [
            name
            for name in self.names
            if name not in expected and not name.startswith(BESIDE) and not name.endswith(BUFFERS)
        ]
        spare = [name for name in spare if not (name == "positional_embedding_res" and self.table is OPENAI)]
        for name in spare:
            for sign, meaning in FOREIGN.items():
                if sign in name:
                    raise ValueError(f"{shown(self.prefix + name)} is {meaning}: no CLIP text tower")
        for ours, names in self.sources.items():
            for name in names:
                if name not in present:
                    shape = list(self.shape_of(ours))
                    raise ValueError(f"{self.prefix}{name}, {shape}, is missing{self.nearest(name, spare)}")
        if spare:
            what = shown(self.prefix + spare[0])
            raise ValueError(f"{what} is no parameter of CLIP's text tower{self.nearest(spare[0], expected)}")

    def nearest(self, name, names):
        near = difflib.get_close_matches(name[:200], [n[:200] for n in list(names)[:2000]], n=1)
        return f"; the nearest name is {self.prefix}{near[0]}" if near else ""

    def check_shapes(self):
        for ours, names in self.sources.items():
            for name in names:
                shape, expected = tuple(self.tensors[self.prefix + name].shape), self.shape_of(ours)
                if shape != expected:
                    raise ValueError(f"{self.prefix}{name} is {list(shape)}, expected {list(expected)}")

    def shape_of(self, ours):
        """The shape that each source of one of OpenAI's parameters must have."""
        if ours.startswith(OPENAI_BLOCK):
            ours = "{block}" + ours.removeprefix(OPENAI_BLOCK).partition(".")[2]
        letters = SHAPES[ours].replace("3D", "D") if "{qkv}" in self.table[ours] else SHAPES[ours]
        shape = tuple(int(letter[:-1] or 1) * self.sizes[letter[-1]] for letter in letters.split())
        return shape[::-1] if self.table is not OPENAI and ours == "text_projection" else shape

    def full(self, names):
        """Those names with the prefix, as the file has them."""
        return [self.prefix + name for name in names]

    def arrays(self, as_floats):
        """OpenAI's parameters, each read with as_floats from the tensor or tensors it is made from."""
        for ours, names in self.sources.items():
            read = [as_floats(self.tensors[self.prefix + name], self.prefix + name) for name in names]
            array = np.concatenate(read) if len(read) > 1 else read[0]
            if ours == "text_projection" and self.table is not OPENAI:
                array = np.ascontiguousarray(array.T)
            if ours == "positional_embedding" and "positional_embedding_res" in self.names:
                array = self.long_clip(array, as_floats)
            yield ours, array

    def long_clip(self, positions, as_floats):
        """Long-CLIP's own files keep CLIP's first 20 positions, and learned the others beside them."""
        name = f"{self.prefix}positional_embedding_res"
        learned = as_floats(self.tensors[name], name)
        if learned.shape != positions.shape:
            raise ValueError(f"{name} is {list(learned.shape)}, expected {list(positions.shape)}")
        return np.concatenate([positions[:20], learned[20:].astype(positions.dtype)])


def find_towers(tensors):
    """The prefixes of all text towers among the tensors. Raises ValueError, with the reason, for none."""
    end = "token_embedding.weight"
    stems = [name.removesuffix(end) for name in tensors if name == end or name.endswith(f".{end}")]
    prefixes = [stem.removesuffix("embeddings.").removesuffix("text_model.") for stem in stems]
    if prefixes:
        return sorted(set(prefixes))
    for sign, meaning in OTHERS.items():
        for name in tensors:
            if name.endswith(sign):
                raise ValueError(f"{shown(name)}: {meaning}, no CLIP text tower")
    few = ", ".join(shown(name) for name in list(tensors)[:3]) or "nothing"
    raise ValueError(f"no CLIP text tower: no name ends in token_embedding.weight, there is {few}")


def shown(name):
    """A name from a file, short enough for one line."""
    return name if len(name) <= 120 and name.isprintable() else f"{name!r:.120}"


def of_hugging_face(config):
    """(activation, heads, sizes) that a config.json of Hugging Face tells. Raises ValueError, by name,
    for a tower that is not CLIP's."""
    text = config
    if isinstance(config.get("text_config"), dict):
        # Older files say again, in text_config_dict, what text_config should be: that is what counts.
        text = {**config["text_config"], **(config.get("text_config_dict") or {})}
    for of in (config, text):
        kind = of.get("model_type", "clip")
        if kind not in ("clip", "clip_text_model"):
            raise ValueError(f"config.json: model_type {kind!r:.80} is no CLIP text tower")
    activation = text.get("hidden_act", "quick_gelu")  # a config leaves out what is the class's default
    if activation not in ACTIVATIONS:
        allowed = " nor ".join(ACTIVATIONS)
        raise ValueError(f"config.json: hidden_act {activation!r:.80} is neither {allowed}")
    if text.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"config.json: layer_norm_eps {text['layer_norm_eps']!r:.80}, CLIP's is 1e-05")
    # 2 stands for the largest id, which is what configs written before transformers 4.31 mean by it.
    last = text.get("vocab_size", 49408) - 1
    if text.get("eos_token_id", last) not in (None, 2, last):
        ends = text["eos_token_id"]
        raise ValueError(
            f"config.json: eos_token_id {ends!r:.80}: it pools there, CLIP at the largest id, {last}"
        )
    known = {
        "V": "vocab_size",
        "L": "max_position_embeddings",
        "D": "hidden_size",
        "layers": "num_hidden_layers",
    }
    sizes = {size: text[name] for size, name in known.items() if name in text}
    return activation, text.get("num_attention_heads", 8), sizes


# What open_clip_config.json may say of a text tower that is CLIP's: key -> the values that are.
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
# What it may say in any way: sizes, the tokenizer's business, and what changes nothing we compute.
OPEN_CLIP_FREE = (
    "context_length vocab_size width heads layers pad_id eos_id output_tokens final_ln_after_pool"
)
OPEN_CLIP_FREE += (
    " hf_tokenizer_name tokenizer_mode tokenizer_kwargs hf_model_pretrained hf_proj_type hf_pooler_type"
)


def of_open_clip(config, name=""):
    """(activation, heads, sizes) that an open_clip_config.json tells, with the model's name where it
    leaves the activation open. Raises ValueError, by name, for a tower that is not CLIP's."""
    model = config.get("model_cfg", config)
    text = model.get("text_cfg")
    if not isinstance(text, dict):
        raise ValueError("open_clip_config.json has no text_cfg")
    for key, value in text.items():
        ends_last = (
            key == "pool_type"
            and value == "eos"
            and text.get("eos_id", 2) == text.get("vocab_size", 49408) - 1
        )
        if key in OPEN_CLIP_FREE.split() or value in OPEN_CLIP.get(key, ()) or ends_last:
            continue
        allowed = (
            f"; CLIP's is {OPEN_CLIP[key][0]!r}" if key in OPEN_CLIP else ", which minclip does not know"
        )
        raise ValueError(f"open_clip_config.json: {shown(key)} {value!r:.80}{allowed}")
    quick = model.get("quick_gelu", activation_in(name) == "quick_gelu")
    known = {"V": "vocab_size", "L": "context_length", "D": "width", "layers": "layers"}
    sizes = {size: text[key] for size, key in known.items() if key in text}
    return "quick_gelu" if quick else "gelu", text.get("heads", 8), sizes


def activation_in(name):
    """ "quick_gelu" if an OpenCLIP model's name says so, as `-quickgelu` or by OpenAI's weights, or None."""
    words = name.lower().replace(".", "-").replace("_", "-").split("-")
    return "quick_gelu" if "quickgelu" in words or words[-1] == "openai" else None
