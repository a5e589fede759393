"""Ports that resemble minclip in nothing but their numbers: what their dumps are called and how they lie."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minclip
from minclip.porting.names import stage_of, stages_of
from minclip.porting.port import Port
from minclip.porting.rounding import round_to
from minclip.porting.stages import STREAM
from tests.support.oracles import random_params

PARAMS = minclip.from_state_dict(
    random_params(width=64, layers=3, embed=48, context=20, vocabulary=99), activation="quick_gelu", heads=2
)
TOKENS = minclip.probe_tokens(20, 99)
REFERENCE = minclip.trace(PARAMS, TOKENS)
FEATURES = REFERENCE["text_features"]
BLOCK = "transformer.resblocks."


def verdicts(dump, params=PARAMS):
    """Return what compare and diagnose say of a dump, and both results."""
    compared = minclip.compare(REFERENCE, dump)
    diagnosed = minclip.diagnose(params, TOKENS, dump["text_features"], trace=dump)
    return compared, diagnosed


def assert_agrees(dump):
    compared, diagnosed = verdicts(dump)
    assert compared.agrees, compared
    assert diagnosed.verdict == "agrees", diagnosed
    return compared, diagnosed


def test_a_token_lookup_called_embedding_is_recognized_by_its_numbers():
    dump = {
        "embedding": REFERENCE["token_embedding"],
        "embedding_1": REFERENCE["positional_embedding"][None],
        "add": REFERENCE["embedding"],
        "text_features": FEATURES,
    }
    compared, diagnosed = assert_agrees(dump)
    said = "embedding is not embedding: it holds token_embedding"
    assert any(said in note for note in compared.notes)
    assert any(said in note for note in diagnosed.notes)


def test_a_dump_never_makes_the_verdict_worse_than_the_features_alone():
    port = PARAMS.copy()
    for name in PARAMS:
        if ".attn.in_proj_" in name:  # the scale is folded into q, and the framework scales again
            port[name] = PARAMS[name].copy()
            port[name][:64] *= 32**-0.5
    dump = dict(minclip.trace(port, TOKENS))
    for trace in (None, dump):
        diagnosis = minclip.diagnose(PARAMS, TOKENS, dump["text_features"], trace=trace)
        assert [fault.id for fault in diagnosis.findings[0].faults] == ["T5-twice"], diagnosis
    assert "attn.q, which is 0.17678 times the reference's" in str(diagnosis)


def test_positions_broadcast_over_the_batch_are_a_layout():
    positions = np.broadcast_to(REFERENCE["positional_embedding"], (7, 20, 64))
    assert_agrees({"embeddings/position_embedding": positions, "text_features": FEATURES})


def test_hidden_states_without_the_embedding_are_counted_from_the_first_block():
    states = [REFERENCE[f"{BLOCK}{i}"] for i in range(3)]
    compared, _ = assert_agrees({"hidden_states": states, "text_features": FEATURES})
    assert {f"{BLOCK}{i}" for i in range(3)} <= set(compared.stages)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_hidden_states_may_have_the_blocks_before_or_after_the_batch(axis):
    states = np.stack([REFERENCE[f"{BLOCK}{i}"] for i in range(3)], axis=axis)
    compared, _ = assert_agrees({"hidden_states": states, "text_features": FEATURES})
    assert {f"{BLOCK}{i}" for i in range(3)} <= set(compared.stages)


@pytest.mark.parametrize("broken", [False, True])
def test_a_scan_over_the_blocks_stacks_every_stage_of_them(broken):
    port = broken_at("mlp.c_fc.bias", 1)[0] if broken else REFERENCE
    shown = ("ln_1", "attn.q", "attn", "ln_2", "mlp.c_fc", "mlp.gelu", "mlp", "")
    dump = {"text_features": port["text_features"]}
    for stage in shown:
        stack = [port[f"{BLOCK}{i}.{stage}".rstrip(".")] for i in range(3)]
        dump[f"encoder/layers/{stage}"] = np.stack(stack)
    compared = minclip.compare(REFERENCE, dump)
    assert compared.new == [f"{BLOCK}1.mlp.c_fc"] * broken
    assert len(compared.stages) == 3 * len(shown) + 1


def test_states_of_all_positions_are_no_features_of_another_shape():
    dump = {
        **{f"{BLOCK}{i}": REFERENCE[f"{BLOCK}{i}"] for i in range(3)},
        "text_features": REFERENCE["ln_final"],
    }
    assert minclip.compare(REFERENCE, dump).agrees
    assert minclip.diagnose(PARAMS, TOKENS, dump["text_features"], trace=dump).verdict == "agrees"


def test_a_port_that_ends_in_hidden_states_is_recognized_after_its_divergence():
    port, stage = broken_at("mlp.c_fc.bias", 1)
    order = list(REFERENCE)
    shown = [name for name in port if name != "eot" and order.index(name) <= order.index("ln_final")]
    dump = {f"val_{i}": port[name] for i, name in enumerate(shown)}
    compared = minclip.compare(REFERENCE, dump)
    assert compared.new == [stage]
    assert compared.missing == ["eot", "pooled", "text_features"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [  # of students' ports of Stable Diffusion, torchtune, CLIP_JAX, refiners, and a slip of the pen
        ("layers.1.layernorm_2.input", "1.residual"),
        ("layers.1.attention.in_proj", "1.attn.qkv"),
        ("layers.1.attetion.out_proj.input", "1.attn.context"),
        ("layers.1.linear_2.input", "1.mlp.gelu"),
        ("layers.1.attn.output_proj", "1.attn"),
        ("layers.1.mlp.w2", "1.mlp"),
        ("clip/~/transformer/resblocks1/attn/out_proj", "1.attn"),
        ("TransformerLayer_1.Residual_2.FeedForward.Linear_1", "1.mlp.c_fc"),
        ("TransformerLayer_1.Residual_1.SelfAttention.Distribute.Linear_1", None),
    ],
)
def test_names_of_public_ports_are_known(theirs, ours):
    assert stage_of(theirs, layers=3) == (None if ours is None else f"{BLOCK}{ours}")


def test_blocks_may_be_counted_from_1():
    names = [f"TransformerLayer_{i}.FeedForward.Linear_2" for i in (1, 2, 3)]
    assert [*stages_of(names, layers=3).values()] == [f"{BLOCK}{i}.mlp" for i in range(3)]
    assert stages_of(names[:2], layers=3)[names[0]] == f"{BLOCK}1.mlp"


def test_a_dump_whose_last_arrays_are_not_recognized_agrees_only_so_far():
    dump = {"x": REFERENCE["embedding"], "y": np.full_like(REFERENCE["embedding"], np.nan)}
    compared = minclip.compare(REFERENCE, dump)
    assert compared.verdict.startswith("agrees as far as recognized: 1 of ")
    assert "y, which is none of the stages, holds NaN or infinity" in compared.notes
    assert minclip.compare(REFERENCE, {"x": dump["x"]}).verdict.startswith("agrees: ")


def test_a_second_copy_of_a_stage_is_not_reported():
    port, _ = broken_at("attn.out_proj.weight", 0)
    copies = {f"layers.{i}.self_attn.out_proj": port[f"{BLOCK}{i}.attn"].copy() for i in range(3)}
    notes = minclip.compare(REFERENCE, {**port, **copies, "z": port["ln_final"].copy()}).notes
    assert not any("left out" in note or "port's arrays" in note for note in notes), notes


def test_another_shape_does_not_hide_the_first_divergence():
    port = PARAMS | {"ln_final.weight": PARAMS[f"{BLOCK}1.ln_1.weight"]}
    dump = dict(minclip.trace(port, TOKENS))
    dump["position_embedding"] = np.broadcast_to(dump.pop("positional_embedding"), (7, 20, 64))
    assert minclip.compare(REFERENCE, dump).first == "ln_final"


def coarse_dump(params, precision):
    """Return the stages of a port whose every parameter and stage is rounded."""
    kept = {}

    def tap(name, array):
        kept[name] = round_to(array, precision)
        return kept[name]

    minclip.encode_text(params.map(lambda array: round_to(array, precision)), TOKENS, tap=tap)
    return kept


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("outside", ["digits", "float32"])
def test_a_correct_coarse_port_agrees_whatever_it_shows(precision, outside):
    dump = coarse_dump(PARAMS, precision)
    if outside == "float32":  # the projection runs in float32
        dump["text_features"] = dump["pooled"] @ PARAMS["text_projection"]
    _, diagnosed = assert_agrees(dump)
    assert minclip.diagnose(PARAMS, TOKENS, dump["text_features"]).verdict == "agrees"
    assert precision in str(diagnosed)


def test_a_bug_that_coarse_rounding_does_not_hide_is_named_with_and_without_a_dump():
    params = minclip.load()  # a trained model, whose activations reach where erf and QuickGELU differ
    tokens = minclip.probe_tokens()
    kept = {}

    def tap(name, array):
        kept[name] = round_to(array, "bfloat16")
        return kept[name]

    port = minclip.Params(params, activation="gelu", heads=params.heads)
    minclip.encode_text(port.map(lambda array: round_to(array, "bfloat16")), tokens, tap=tap)
    for trace in (None, kept):
        diagnosis = minclip.diagnose(params, tokens, kept["text_features"], trace=trace)
        assert [fault.id for fault in diagnosis.findings[0].faults] == ["A1"], diagnosis
    assert not minclip.compare(minclip.trace(params, tokens), kept).agrees


def test_what_coarse_rounding_hides_is_listed():
    features = coarse_dump(PARAMS, "bfloat16")["text_features"]
    assert "Too small to see at bfloat16:" in str(minclip.diagnose(PARAMS, TOKENS, features))


def test_a_dump_in_float32_shows_that_more_is_left_than_coarse_rounding():
    def change(port):  # a bug, and one of a kind that the catalogue does not have
        port.mask(lambda i, j, at: j <= i, 1)
        port.replace("ln_final", lambda at: at["ln_final"] + np.float32(0.004) * at["x"])

    port = Port(PARAMS, TOKENS)
    change(port)
    kept = {}
    port.run(lambda name, array: kept.setdefault(name, port.tap(name, array)))
    for trace in (None, kept):
        diagnosis = minclip.diagnose(PARAMS, TOKENS, kept["text_features"], trace=trace, budget=5)
        assert [fault.id for fault in diagnosis.findings[0].faults] == ["M4-plus-one"], diagnosis
        assert ("too exact for float16: another bug remains" in str(diagnosis)) == (trace is not None)


def test_a_given_precision_decides():
    noise = np.random.default_rng(0).standard_normal(FEATURES.shape).astype("f4") * FEATURES.std()
    features = FEATURES + np.float32(2e-3) * noise
    assert minclip.diagnose(PARAMS, TOKENS, features, dtype="bfloat16").verdict == "agrees"
    assert minclip.diagnose(PARAMS, TOKENS, features, dtype="float32", budget=1).verdict == "unknown"
    dump = {"text_features": features}
    assert minclip.compare(REFERENCE, dump, dtype="bfloat16").agrees
    assert not minclip.compare(REFERENCE, dump, dtype="float32").agrees


@pytest.mark.parametrize("how", ["transposed features", "reversed axes", "reversed shapes"])
def test_julia_and_ggml_list_axes_in_reverse(how):
    dump = {f"x{i}": array for i, (name, array) in enumerate(REFERENCE.items()) if array.ndim > 1}
    if how == "transposed features":
        dump = {**dump, "text_features": FEATURES.T.copy()}
    elif how == "reversed axes":
        dump = {name: np.ascontiguousarray(array.T) for name, array in dump.items()}
    else:
        dump = {name: array.reshape(array.shape[::-1]) for name, array in dump.items()}
    compared = minclip.compare(REFERENCE, dump)
    assert compared.agrees, compared
    assert len(compared.stages) >= 48


def packed_k_as_q(weight):
    q, _, v = np.split(weight, 3)
    return np.concatenate([q, q, v])


WRONG = {  # the parameter that a conversion broke, how, and the stage that it breaks
    "ln_1.weight": (np.ones_like, "ln_1"),
    "attn.in_proj_weight": (packed_k_as_q, "attn.k"),
    "attn.out_proj.weight": (lambda weight: weight.T.copy(), "attn"),
    "ln_2.weight": (np.ones_like, "ln_2"),
    "mlp.c_fc.bias": (np.zeros_like, "mlp.c_fc"),
    "mlp.c_proj.weight": (lambda weight: np.float32(1.1) * weight, "mlp"),
}


def broken_at(parameter, layer):
    """Return the trace of a port whose conversion broke a parameter, and the stage that breaks."""
    change, stage = WRONG[parameter]
    name = f"{BLOCK}{layer}.{parameter}"
    return minclip.trace(PARAMS | {name: change(PARAMS[name])}, TOKENS), f"{BLOCK}{layer}.{stage}"


def nameless(port, kept):
    """Return some stages of a port as a dump without names, but for its features."""
    dump = {f"val_{i}": array for i, (name, array) in enumerate(port.items()) if name in kept}
    return {**dump, "text_features": port["text_features"]}


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("parameter", WRONG)
def test_every_stage_after_a_divergence_is_recognized_without_any_name(parameter, layer):
    port, stage = broken_at(parameter, layer)
    shown = [name for name in port if name not in ("eot", "text_features")]
    compared = minclip.compare(REFERENCE, nameless(port, shown))
    assert compared.new == [stage]
    assert compared.missing == ["eot"]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("parameter", WRONG)
def test_a_divergence_is_bracketed_by_what_a_port_without_names_shows(parameter, layer):
    port, stage = broken_at(parameter, layer)
    order = list(REFERENCE)
    wrong = order.index(stage)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        kept = [name for name in port if rng.random() < 0.5 and name not in ("eot", "text_features")]
        compared = minclip.compare(REFERENCE, nameless(port, kept))
        stream = [s for s in kept if STREAM.search(s) and order.index(s) >= wrong]
        before = [s for s in kept if order.index(s) < wrong]
        assert wrong <= order.index(compared.first) <= order.index([*stream, "text_features"][0]), compared
        assert all(compared.stages[s].state == "agrees" for s in before)


def test_packed_q_k_v_after_a_divergence_need_no_name():
    port, _ = broken_at("attn.out_proj.weight", 0)
    packed = np.concatenate([flat(port[f"{BLOCK}1.attn.{part}"]) for part in "qkv"], axis=-1)
    shown = [name for name in port if ".1.attn." not in name and name not in ("eot", "text_features")]
    dump = {**nameless(port, shown), "packed": packed}
    compared = minclip.compare(REFERENCE, dump)
    assert compared.new == [f"{BLOCK}0.attn"]
    assert {compared.stages[f"{BLOCK}1.attn.{part}"].name for part in "qkv"} == {"packed"}


def flat(heads):
    """Return heads [B, H, L, K] as [B, L, D]."""
    return heads.transpose(0, 2, 1, 3).reshape(len(heads), heads.shape[2], -1)


ORDERS = {3: [(1, 0, 2), (2, 1, 0), (0, 2, 1)], 4: [(1, 0, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)]}
DEEP = settings.default.max_examples == 100_000  # the profile of tests/conftest.py


@settings(max_examples=1000 if DEEP else 25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_correct_dump_agrees_however_it_is_renamed_reordered_dropped_and_transposed(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    names = [name for name in REFERENCE if name not in ("eot", "text_features")]
    kept = [name for name in names if rng.random() < data.draw(st.sampled_from([0.2, 0.9]))]
    arrays = {name: REFERENCE[name] for name in kept}
    mode = data.draw(st.sampled_from(["own", "shuffled names", "no names"]))
    labels = list(arrays)
    if mode == "shuffled names":
        labels = list(rng.permutation(labels))
    elif mode == "no names":
        labels = [f"val_{i}" for i in range(len(labels))]
    dump = {}
    for label, name in zip(labels, arrays, strict=True):
        array = arrays[name]
        if rng.random() < 0.3 and array.ndim in ORDERS:
            array = array.transpose(rng.permutation(ORDERS[array.ndim])[0])
        dump[str(label)] = np.ascontiguousarray(array)
    order = rng.permutation(len(dump))
    dump = {list(dump)[i]: list(dump.values())[i] for i in order}
    if dump and not only_swaps(labels, arrays, "attn.q", "attn.k", "attn.v"):
        compared = minclip.compare(REFERENCE, dump)
        assert compared.agrees, compared
    dump["text_features"] = FEATURES
    compared = minclip.compare(REFERENCE, dump)
    assert compared.agrees, compared
    assert minclip.diagnose(PARAMS, TOKENS, FEATURES, trace=dump).verdict == "agrees"


def only_swaps(labels, names, *parts):
    """Whether labels are names with only these stages in each other's places, as a bug may leave them."""
    moved = {name for label, name in zip(labels, names, strict=True) if label in names and label != name}
    return bool(moved) and all(name.endswith(parts) for name in moved)


@pytest.mark.parametrize(("one", "other"), [("q", "k"), ("k", "v")])
def test_projections_in_each_others_places_are_a_bug_and_no_mixed_up_names(one, other):
    prefix = f"{BLOCK}0.attn."
    dump = {"embedding": REFERENCE["embedding"], f"{BLOCK}0.ln_1": REFERENCE[f"{BLOCK}0.ln_1"]}
    dump |= {prefix + one: REFERENCE[prefix + other], prefix + other: REFERENCE[prefix + one]}
    assert minclip.compare(REFERENCE, dump).first == prefix + one
