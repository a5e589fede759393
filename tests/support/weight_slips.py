"""Conversion slips: each changes OpenAI's arrays as a wrong conversion would, and says what is then wrong.

A slip is (function, findings): the function writes into a dict of copied arrays; each finding is (kinds that
name it, the place, the tensor that is there or None). Kinds are those of `WeightFinding`.
"""

import numpy as np

B0, B1, B2, B3 = (f"transformer.resblocks.{i}." for i in range(4))
IN, IN_BIAS = "attn.in_proj_weight", "attn.in_proj_bias"


def rows(array, part):
    """Return the q, k or v rows of a packed array, to write into."""
    return np.split(array, 3)["qkv".index(part)]


def copy_rows(p, name, part, other, source=None):
    rows(p[name], part)[:] = rows(p[source or name].copy(), other)


def k_from_q(p):
    copy_rows(p, B1 + IN, "k", "q")


def q_from_v(p):
    copy_rows(p, B2 + IN, "q", "v")


def q_and_k_swapped(p):
    q = rows(p[B1 + IN], "q").copy()
    copy_rows(p, B1 + IN, "q", "k")
    rows(p[B1 + IN], "k")[:] = q


def q_of_another_layer(p):
    copy_rows(p, B2 + IN, "q", "q", B0 + IN)


def q_bias_from_k(p):
    copy_rows(p, B1 + IN_BIAS, "q", "k")


def q_bias_zero(p):
    rows(p[B1 + IN_BIAS], "q")[:] = 0


def layer_twice(p):
    for name in [name for name in p if name.startswith(B2)]:
        p[name] = p[name.replace(B2, B1)].copy()


def layers_swapped(p):
    for name in [name for name in p if name.startswith(B1)]:
        other = name.replace(B1, B2)
        p[name], p[other] = p[other], p[name]


def out_transposed(p):
    p[B1 + "attn.out_proj.weight"] = p[B1 + "attn.out_proj.weight"].T.copy()


def k_transposed(p):
    rows(p[B3 + IN], "k")[:] = rows(p[B3 + IN], "k").T.copy()


def ln_2_from_ln_1(p):
    for kind in ("weight", "bias"):
        p[f"{B1}ln_2.{kind}"] = p[f"{B1}ln_1.{kind}"].copy()


def ln_1_plain(p):
    p[B2 + "ln_1.weight"][:] = 1
    p[B2 + "ln_1.bias"][:] = 0


def ln_final_from_ln_2(p):
    p["ln_final.weight"] = p[B3 + "ln_2.weight"].copy()


def bias_of_another_layer(p):
    p[B0 + "mlp.c_fc.bias"] = p[B1 + "mlp.c_fc.bias"].copy()


def biases_swapped(p):
    a, b = B2 + "attn.out_proj.bias", B2 + "mlp.c_proj.bias"
    p[a], p[b] = p[b], p[a]


def out_bias_zero(p):
    p[B3 + "attn.out_proj.bias"][:] = 0


def not_finite(p):
    p[B1 + "mlp.c_fc.weight"][3, 5] = np.nan


def scale_forgotten(p):
    p[B2 + "mlp.c_proj.weight"] *= 448


def sign_lost(p):
    p[B0 + "attn.out_proj.weight"] *= -1


def last_layer_not_loaded(p):
    rng = np.random.default_rng(7)
    for name in [name for name in p if name.startswith(B3)]:
        p[name] = (0.02 * rng.standard_normal(p[name].shape)).astype(np.float32)


def positions_from_one(p):
    p["positional_embedding"] = np.roll(p["positional_embedding"], -1, axis=0)


def special_rows_altered(p):
    p["token_embedding.weight"][-2:] = 0.01


def fine_tuned(p):
    weight = p[B1 + "mlp.c_fc.weight"]
    weight += (1e-3 * np.random.default_rng(8).standard_normal(weight.shape)).astype(np.float32)


def heads_interleaved(p):
    for name in (B1 + IN, B1 + IN_BIAS):
        part = rows(p[name], "q")
        part[:] = part.reshape(2, len(part) // 2, *part.shape[1:]).swapaxes(0, 1).reshape(part.shape).copy()


def tensor(place, found):
    return {"tensor"}, place, found


TURNED = {"transposed", "reshaped"}
UNITS = [f"{part} of {{}}{kind}" for kind in (IN, IN_BIAS) for part in "qkv"]
NORMS_AND_LINEAR = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
UNITS += [f"{{}}{name}.{kind}" for name in NORMS_AND_LINEAR for kind in ("weight", "bias")]

SLIPS = {
    k_from_q: [tensor(f"k of {B1}{IN}", f"q of {B1}{IN}")],
    q_from_v: [tensor(f"q of {B2}{IN}", f"v of {B2}{IN}")],
    q_and_k_swapped: [tensor(f"{a} of {B1}{IN}", f"{b} of {B1}{IN}") for a, b in ("qk", "kq")],
    q_of_another_layer: [tensor(f"q of {B2}{IN}", f"q of {B0}{IN}")],
    q_bias_from_k: [tensor(f"q of {B1}{IN_BIAS}", f"k of {B1}{IN_BIAS}")],
    q_bias_zero: [({"zero"}, f"q of {B1}{IN_BIAS}", None)],
    layer_twice: [({"layer"}, B2[:-1], B1[:-1])],
    layers_swapped: [({"layer"}, B2[:-1], B1[:-1]), ({"layer"}, B1[:-1], B2[:-1])],
    out_transposed: [(TURNED, f"{B1}attn.out_proj.weight", f"{B1}attn.out_proj.weight")],
    k_transposed: [(TURNED, f"k of {B3}{IN}", f"k of {B3}{IN}")],
    ln_2_from_ln_1: [tensor(f"{B1}ln_2.{kind}", f"{B1}ln_1.{kind}") for kind in ("weight", "bias")],
    ln_1_plain: [({"one"}, f"{B2}ln_1.weight", None), ({"zero"}, f"{B2}ln_1.bias", None)],
    ln_final_from_ln_2: [tensor("ln_final.weight", f"{B3}ln_2.weight")],
    bias_of_another_layer: [tensor(f"{B0}mlp.c_fc.bias", f"{B1}mlp.c_fc.bias")],
    biases_swapped: [
        tensor(f"{B2}attn.out_proj.bias", f"{B2}mlp.c_proj.bias"),
        tensor(f"{B2}mlp.c_proj.bias", f"{B2}attn.out_proj.bias"),
    ],
    out_bias_zero: [({"zero"}, f"{B3}attn.out_proj.bias", None)],
    not_finite: [({"not finite"}, f"{B1}mlp.c_fc.weight", f"{B1}mlp.c_fc.weight")],
    scale_forgotten: [({"scale"}, f"{B2}mlp.c_proj.weight", f"{B2}mlp.c_proj.weight")],
    sign_lost: [({"scale"}, f"{B0}attn.out_proj.weight", f"{B0}attn.out_proj.weight")],
    last_layer_not_loaded: [({"altered", "missing"}, unit.format(B3), None) for unit in UNITS],
    positions_from_one: [({"rows"}, "positional_embedding", "positional_embedding")],
    special_rows_altered: [({"altered"}, "token_embedding.weight", "token_embedding.weight")],
    fine_tuned: [({"altered"}, f"{B1}mlp.c_fc.weight", f"{B1}mlp.c_fc.weight")],
    heads_interleaved: [
        ({"heads", "reshaped"}, f"q of {B1}{kind}", f"q of {B1}{kind}") for kind in (IN, IN_BIAS)
    ],
}
