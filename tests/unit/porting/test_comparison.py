"""compare: true ports agree, each planted divergence is found at its stage, any dump can be read."""

import functools

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import minclip
from minclip.model import softmax
from minclip.params import as_params
from minclip.porting import layouts, names, probe, rounding, stages
from minclip.porting.noise import PARTS, Candidate
from minclip.porting.quantization import FORMATS
from minclip.porting.rounding import host_params
from tests.support.oracles import openai_model, random_params, random_tokens, transformers_model

SIZES = dict(width=128, layers=3, embed=48, context=20, vocabulary=99)
PARAMS = random_params(**SIZES)
TOKENS = random_tokens([5, 20, 2, 11, 7], context=20, vocabulary=99)  # B = 5 is no other axis
REFERENCE = minclip.trace(PARAMS, TOKENS)
BLOCK = "transformer.resblocks.1."
TOWERS = {"transformers": transformers_model, "openai": openai_model}


@functools.cache
def torch_dump(tower, dtype="float32"):
    return minclip.trace_torch(TOWERS[tower](PARAMS, dtype=dtype), TOKENS)


def port(params=PARAMS, tokens=TOKENS, **stages):
    """A dump of the reference with some stages put in place of its own as it runs."""
    dump = {}

    def tap(name, array):
        short = name.removeprefix(BLOCK)
        if short in stages or name in stages:
            array = (stages.get(short) or stages[name])(array, dump)
        dump[name] = array
        return array

    minclip.encode_text(params, tokens, tap=tap)
    return dump


# True ports.


@pytest.mark.parametrize(
    ("tower", "dtype"),
    [
        *(("transformers", dtype) for dtype in ("float32", "float16", "bfloat16", "float64")),
        *(("openai", dtype) for dtype in ("float32", "float16")),  # its LayerNorm computes in float32
    ],
)
def test_a_torch_port_traced_through_hooks_agrees_at_every_shared_stage(tower, dtype):
    reference = REFERENCE
    if dtype == "float64":
        reference = minclip.trace({name: array.astype("f8") for name, array in PARAMS.items()}, TOKENS)
    compared = minclip.compare(reference, torch_dump(tower, dtype))
    assert compared.first is None, compared
    assert {stage.state for stage in compared.stages.values()} == {"agrees"}, compared
    assert compared.stages["text_features"].precision == dtype
    assert len(compared.stages) == {"transformers": 42, "openai": 28}[tower]
    shown = [name for name in REFERENCE if name not in compared.missing]
    assert list(compared.stages) == shown
    # The measured tolerance is no generous one: what these ports need of it.
    assert max(s.error / s.tolerance for s in compared.stages.values() if s.tolerance) > 0.1


def test_the_reference_agrees_with_itself_at_every_stage():
    compared = minclip.compare(REFERENCE, REFERENCE)
    assert compared.first is None
    assert compared.verdict.startswith("agrees: 52 of 52 stages")
    assert compared.missing == compared.new == []


def test_a_float16_reference_is_held_to_float16():
    half = minclip.trace({name: array.astype("f2") for name, array in PARAMS.items()}, TOKENS)
    compared = minclip.compare(half, REFERENCE)
    assert compared.first is None, compared
    assert compared.stages["text_features"].precision == "float16"


def test_float16_numbers_in_float32_arrays_are_known_by_their_digits():
    dump = {name: np.float32(array) for name, array in torch_dump("transformers", "float16").items()}
    compared = minclip.compare(REFERENCE, dump)
    assert compared.first is None, compared
    assert compared.stages["text_features"].precision == "float16"


def test_a_mask_of_large_negative_numbers_is_no_divergence():
    for low in (-1e4, np.finfo(np.float32).min):
        dump = port(**{"attn.masked": lambda masked, at, low=low: np.where(np.isneginf(masked), low, masked)})
        assert minclip.compare(REFERENCE, dump).first is None


# Planted divergences.


@pytest.mark.parametrize("stage", list(REFERENCE))
def test_a_divergence_is_found_at_its_stage_and_nowhere_else(stage):
    def disturb(array, at):
        if stage == "eot":
            return array - 1
        noise = np.random.default_rng(0).standard_normal(array.shape).astype("f4")
        return array + np.float32(1e-4) * abs(array[np.isfinite(array)]).max() * noise

    compared = minclip.compare(REFERENCE, port(**{stage: disturb}))
    assert compared.first == stage
    assert compared.new == [stage]  # what follows has inherited it
    assert compared.verdict.startswith(f"diverges first at {stage}")
    assert compared.stages["text_features"].state in ("inherits", "diverges")


def weights(name, change):
    return lambda: port(PARAMS | {name: change(PARAMS[name])})


def stage(name, function):
    return lambda: port(**{name: function})


REAL = {
    "positions off by one": (
        stage("positional_embedding", lambda x, at: np.roll(x, -1, axis=0)),
        "positional_embedding",
    ),
    "no positions": (stage("embedding", lambda x, at: at["token_embedding"]), "embedding"),
    "layer norm with eps 1e-6": (
        stage("ln_1", lambda x, at: x * np.float32(1 + 1e-5)),
        BLOCK + "ln_1",
    ),
    "q and k swapped": (
        weights(BLOCK + "attn.in_proj_weight", lambda w: w[np.r_[128:256, :128, 256:384]]),
        BLOCK + "attn.q",
    ),
    "no scale": (stage("attn.scores", lambda x, at: x * 8), BLOCK + "attn.scores"),
    "no causal mask": (stage("attn.masked", lambda x, at: at[BLOCK + "attn.scores"]), BLOCK + "attn.masked"),
    "softmax over the wrong axis": (
        stage("attn.weights", lambda x, at: softmax(at[BLOCK + "attn.scores"].swapaxes(-1, -2))),
        BLOCK + "attn.weights",
    ),
    "heads merged without a transpose": (
        stage(
            "attn.context", lambda x, at: x.reshape(5, 20, 2, 64).transpose(0, 2, 1, 3).reshape(5, 20, 128)
        ),
        BLOCK + "attn.context",
    ),
    "output projection transposed": (
        weights(BLOCK + "attn.out_proj.weight", lambda w: w.T),
        BLOCK + "attn",
    ),
    "no residual": (stage("residual", lambda x, at: at[BLOCK + "attn"]), BLOCK + "residual"),
    "bias left out": (weights(BLOCK + "mlp.c_fc.bias", np.zeros_like), BLOCK + "mlp.c_fc"),
    "ln_final left out": (stage("ln_final", lambda x, at: at["transformer.resblocks.2"]), "ln_final"),
    "pooled at the last position": (stage("eot", lambda x, at: 0 * x + 19), "eot"),
    "normalized": (
        stage("text_features", lambda x, at: minclip.normalize(x)),
        "text_features",
    ),
}


@pytest.mark.parametrize("fault", REAL)
def test_a_real_mistake_is_found_where_it_is_made(fault):
    make, where = REAL[fault]
    assert minclip.compare(REFERENCE, make()).first == where


def test_two_mistakes_are_told_apart_from_what_they_hand_down():
    params = PARAMS | {BLOCK + "attn.out_proj.weight": PARAMS[BLOCK + "attn.out_proj.weight"].T}
    compared = minclip.compare(REFERENCE, port(params, ln_final=lambda x, at: at["transformer.resblocks.2"]))
    assert compared.new == [BLOCK + "attn", "ln_final"]
    assert compared.stages[BLOCK + "residual"].state == "inherits"
    assert "errors of their own are also in ln_final" in compared.notes


def test_the_wrong_activation_of_a_hugging_face_model_is_found():
    dump = minclip.trace_torch(transformers_model(PARAMS, activation="gelu"), TOKENS)
    compared = minclip.compare(REFERENCE, dump)
    assert compared.first == "transformer.resblocks.0.mlp.gelu"
    assert compared.new == [f"transformer.resblocks.{i}.mlp.gelu" for i in range(3)]


def test_an_error_between_the_stages_a_port_shows_is_said_to_lie_between():
    dump = port(**{"attn.scores": lambda x, at: x * 8})
    dump = {name: array for name, array in dump.items() if ".attn." not in name}
    compared = minclip.compare(REFERENCE, dump)
    assert compared.first == BLOCK + "attn"
    assert f"{BLOCK}attn.q" in compared.notes[0]


def test_what_only_padding_shows_is_no_divergence_and_is_said():
    tokens = np.where(stages.up_to_end(TOKENS), TOKENS, 98)  # padded with the end-of-text id
    compared = minclip.compare(REFERENCE, port(tokens=tokens))
    assert compared.first is None
    assert compared.stages["ln_final"].state == "padding"
    assert compared.stages["text_features"].state == "agrees"
    assert any("only positions after the end of text" in note for note in compared.notes)


def test_nan_is_a_divergence_and_its_share_is_told():
    nan = np.where(np.arange(5) == 1, np.float32(np.nan), 0)[:, None, None]
    reference = minclip.trace(PARAMS, TOKENS)  # with as many BLAS threads as the port
    stage = minclip.compare(reference, port(ln_2=lambda x, at: x + nan)).stages[BLOCK + "ln_2"]
    assert stage.state == "diverges"
    assert stage.nan == 1 / 5
    assert stage.relative_l2 == np.inf
    assert stage.max_abs == 0  # of what can be compared


def test_the_note_says_which_texts_and_positions_differ():
    one = np.zeros((5, 20, 128), "f4")
    one[3, 7] = np.random.default_rng(0).standard_normal(128)
    notes = minclip.compare(REFERENCE, port(embedding=lambda x, at: x + one)).notes
    assert "in text 3 of 0 to 4 only" in notes
    assert "in position 7 of 0 to 19 only" in notes


def test_a_scale_is_called_a_scale():
    compared = minclip.compare(REFERENCE, port(text_features=lambda x, at: x * 100))
    assert any("100 times the reference's" in note for note in compared.notes)


def test_float16_arithmetic_behind_float32_numbers_is_suspected():
    dump = port({name: np.float32(np.float16(array)) for name, array in PARAMS.items()})
    compared = minclip.compare(REFERENCE, dump)
    assert compared.agrees
    assert any("float16 or TF32" in note for note in compared.notes)


def test_the_measures_are_what_they_are_called():
    ours, theirs = REFERENCE["text_features"], 2 * REFERENCE["text_features"]
    theirs[0, 0] += 1
    stage = minclip.compare(REFERENCE, {"text_features": theirs}).stages["text_features"]
    a, b = np.float64(ours).ravel(), np.float64(theirs).ravel()
    np.testing.assert_allclose(stage.max_abs, abs(b - a).max())
    np.testing.assert_allclose(stage.relative_l2, np.linalg.norm(b - a) / np.linalg.norm(a))
    np.testing.assert_allclose(stage.cosine, a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    np.testing.assert_allclose(stage.norm_ratio, np.linalg.norm(b) / np.linalg.norm(a))


def test_rtol_takes_the_place_of_the_measured_tolerance():
    dump = port(text_features=lambda x, at: x * 1.001)
    assert minclip.compare(REFERENCE, dump).first == "text_features"
    assert minclip.compare(REFERENCE, dump, rtol=1e-2).first is None


def test_without_params_the_tolerance_is_said_to_be_a_guess():
    compared = minclip.compare(dict(REFERENCE), torch_dump("transformers"))
    assert compared.first is None
    assert any("no params" in note for note in compared.notes)


# Names and layouts.


@pytest.mark.parametrize("prefix", ["module.", "clip_model.text.", "cond_stage_model/model/"])
def test_words_in_front_of_a_name_do_not_matter(prefix):
    dump = {prefix + name: array for name, array in torch_dump("openai").items()}
    assert set(minclip.compare(REFERENCE, dump).stages) == set(
        minclip.compare(REFERENCE, torch_dump("openai")).stages
    )


def test_openclips_names_are_known():
    names = {"attn.0": "ls_1", "mlp.c_proj": "ls_2"}
    dump = {}
    for name, array in torch_dump("openai").items():
        for theirs, openclips in names.items():
            name = name.replace(theirs, openclips)
        dump["text." + name] = array.swapaxes(0, 1) if array.shape[:2] == (20, 5) else array  # batch first
    compared = minclip.compare(REFERENCE, dump)
    assert compared.first is None
    assert {BLOCK + "attn", BLOCK + "mlp"} <= set(compared.stages)


def test_hugging_faces_outputs_are_known():
    torch_model = transformers_model(PARAMS)
    torch_model.set_attn_implementation("eager")
    import torch

    with torch.no_grad():
        out = torch_model(torch.from_numpy(TOKENS).long(), output_hidden_states=True, output_attentions=True)
    compared = minclip.compare(REFERENCE, dict(out))
    assert compared.first is None, compared
    blocks = [f"transformer.resblocks.{i}" for i in range(3)]
    weights = [f"{block}.attn.weights" for block in blocks]
    assert set(compared.stages) == {"embedding", *blocks, *weights, "ln_final", "text_features"}
    stacked = {"hidden_states": np.stack([x.numpy() for x in out.hidden_states])}
    assert set(minclip.compare(REFERENCE, stacked).stages) == {"embedding", *blocks}


def arranged(name, how):
    x = REFERENCE[BLOCK + name]
    if x.ndim == 3:
        return {
            "B L D": x,
            "L B D": x.transpose(1, 0, 2),
            "(B L) D": x.reshape(-1, x.shape[-1]),
            "(L B) D": x.transpose(1, 0, 2).reshape(-1, x.shape[-1]),
            "B D L": x.transpose(0, 2, 1),
        }[how]
    return {
        "B H L K": x,
        "B L (H K)": x.transpose(0, 2, 1, 3).reshape(5, 20, 128),
        "L B (H K)": x.transpose(2, 0, 1, 3).reshape(20, 5, 128),
        "(B H) L K": x.reshape(10, 20, 64),
        "B L H K": x.transpose(0, 2, 1, 3),
        "L B H K": x.transpose(2, 0, 1, 3),
    }[how]


@pytest.mark.parametrize("how", ["B L D", "L B D", "(B L) D", "(L B) D", "B D L"])
@pytest.mark.parametrize("name", ["ln_1", "mlp.c_fc"])
def test_layouts_of_the_stream_are_recognized(name, how):
    compared = minclip.compare(REFERENCE, {BLOCK + name: arranged(name, how)})
    assert compared.first is None
    assert compared.stages[BLOCK + name].layout == how
    assert (how == "B L D") != any(f"read {how} as B L D" in note for note in compared.notes)


@pytest.mark.parametrize("how", ["B H L K", "B L (H K)", "L B (H K)", "(B H) L K", "B L H K", "L B H K"])
def test_heads_split_or_merged_are_recognized(how):
    compared = minclip.compare(REFERENCE, {f"{BLOCK}attn.{q}": arranged(f"attn.{q}", how) for q in "qkv"})
    assert compared.first is None
    assert compared.stages[BLOCK + "attn.k"].layout == how


@pytest.mark.parametrize("how", ["B L (P H K)", "L B (P H K)", "P B H L K", "B L (H P K)"])
def test_packed_qkv_is_unpacked(how):
    packed = np.stack([REFERENCE[f"{BLOCK}attn.{q}"] for q in "qkv"])  # P B H L K
    axes = layouts.groups(how)
    flat = [axis for group in axes for axis in group]
    sizes = dict(P=3, B=5, H=2, L=20, K=64)
    array = packed.transpose(["PBHLK".index(axis) for axis in flat])
    array = array.reshape([int(np.prod([sizes[axis] for axis in group])) for group in axes])
    compared = minclip.compare(REFERENCE, {BLOCK + "attn.qkv": array})
    assert compared.first is None
    assert set(compared.stages) == {BLOCK + "attn.q", BLOCK + "attn.k", BLOCK + "attn.v"}
    assert compared.stages[BLOCK + "attn.v"].layout == how


def test_where_batch_and_length_are_equal_the_layout_that_fits_is_taken_and_said():
    tokens = random_tokens([3, 4, 5, 6, 7, 8, 3], context=20, vocabulary=99)[:, :8]
    reference = minclip.trace(PARAMS, np.vstack([tokens, tokens[:1]]))
    assert reference["embedding"].shape == (8, 8, 128)
    dump = {"embedding": reference["embedding"].swapaxes(0, 1), "ln_final": reference["ln_final"]}
    compared = minclip.compare(reference, dump)
    assert compared.first is None
    assert compared.stages["embedding"].layout == "L B D"
    assert compared.stages["ln_final"].layout == "B L D"
    assert any("the same shape as B L D, but only this fits" in note for note in compared.notes)


def test_a_batch_of_one_may_be_squeezed():
    reference = minclip.trace(PARAMS, TOKENS[1])
    compared = minclip.compare(
        reference, {name: array.squeeze() for name, array in reference.items() if name != "eot"}
    )
    assert compared.first is None
    assert len(compared.stages) == 51


def test_a_port_that_leaves_positions_out_is_compared_at_those_it_has():
    tokens = TOKENS[[0, 2, 3]]
    reference = minclip.trace(PARAMS, tokens)
    compared = minclip.compare(reference, minclip.trace(PARAMS, tokens[:, :11]))
    assert compared.first is None, compared
    assert len(compared.stages) == 52
    assert any("the first 11 of 20 positions" in note for note in compared.notes)


def test_a_shape_that_is_none_of_a_stages_is_where_it_diverges():
    names = list(REFERENCE)
    dump = {name: REFERENCE[name] for name in names[: names.index(BLOCK + "attn.q")]}
    dump[BLOCK + "attn.q"] = REFERENCE[BLOCK + "attn.q"].reshape(5, 4, 20, 32)
    compared = minclip.compare(REFERENCE, dump)
    assert compared.first == BLOCK + "attn.q"
    assert compared.stages[compared.first].state == "shape"
    assert "[5, 4, 20, 32], no layout of [5, 2, 20, 64]" in " ".join(compared.notes)
    assert repr(compared)
    assert compared._repr_html_()


def test_names_no_dialect_knows_are_given_by_the_user():
    dump = {"enc.7": REFERENCE["ln_final"], "out": REFERENCE["text_features"]}
    renamed = names.rename(dump, {"enc.7": "ln_final", "out": "text_features"})
    assert set(minclip.compare(REFERENCE, renamed).stages) == {"ln_final", "text_features"}
    with pytest.raises(ValueError, match=r"the port has no 'enc.8'; the nearest is 'enc.7'"):
        names.rename(dump, {"enc.8": "ln_final"})


def test_what_cannot_be_matched_is_said():
    with pytest.raises(ValueError, match=r"no array was recognized .*bogus.*rename"):
        minclip.compare(REFERENCE, {"bogus": TOKENS, "visual.ln_post": TOKENS})
    with pytest.raises(TypeError, match=r"must be a mapping from stages to arrays .*not list"):
        minclip.compare(REFERENCE, [1])
    compared = minclip.compare(REFERENCE, {"bogus": TOKENS, "text_features": REFERENCE["text_features"]})
    assert "1 of the port's arrays is not a stage of the encoder: bogus" in compared.notes


def test_a_run_on_other_tokens_is_refused():
    dump = dict(REFERENCE) | {"tokens": TOKENS + (TOKENS == TOKENS[0, 1])}
    with pytest.raises(ValueError, match=r"other tokens: \d+ at \[0, 1\], not \d+"):
        minclip.compare(REFERENCE, dump)
    assert minclip.compare(REFERENCE, dict(REFERENCE) | {"tokens": TOKENS}).first is None


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_dumps_are_read_from_files(tmp_path, kind):
    path = tmp_path / f"port.{kind}"
    dump = {name: np.ascontiguousarray(array) for name, array in torch_dump("transformers").items()}
    np.savez(path, **dump) if kind == "npz" else safetensors.numpy.save_file(dump, path)
    read = probe.read_dump(path)
    assert set(read) == set(dump)
    for name in dump:
        np.testing.assert_array_equal(read[name], dump[name])


def test_bfloat16_is_read_from_safetensors(tmp_path):
    x = torch.randn(3, 4).bfloat16()
    tensors = {"x": x, "ids": torch.arange(3), "yes": torch.tensor([True])}
    safetensors.torch.save_file(tensors, tmp_path / "port.safetensors")
    read = probe.read_dump(tmp_path / "port.safetensors")
    np.testing.assert_array_equal(read["x"], x.float().numpy())
    assert read["ids"].tolist() == [0, 1, 2]
    assert read["yes"].tolist() == [True]


@pytest.mark.parametrize("name", ["port.npz", "port.safetensors", "port.txt"])
def test_a_file_that_is_no_dump_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no arrays here, but more than eight bytes of text")
    with pytest.raises(ValueError, match=r"port\.\w+ is not an \.npz or \.safetensors file"):
        probe.read_dump(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        probe.read_dump(tmp_path / ("no" + name))


# What is shown.


def test_the_table_starts_with_the_verdict_and_fits_a_terminal():
    params = random_params(width=64, layers=12, embed=32, context=10, vocabulary=50)
    tokens = random_tokens([4, 10, 6], context=10, vocabulary=50)
    reference = minclip.trace(params, tokens)
    name = "transformer.resblocks.10.mlp.c_proj.weight"
    compared = minclip.compare(reference, minclip.trace(params | {name: -params[name]}, tokens))
    lines = repr(compared).splitlines()
    assert lines[0] == compared.verdict
    assert lines[0].startswith("diverges first at transformer.resblocks.10.mlp: relative error ")
    assert max(map(len, lines)) <= 100
    assert sum("resblocks.10" in line for line in lines[1:]) == 15  # its block in full
    assert sum("resblocks.3" in line for line in lines) == 1  # of the others the output
    assert "! transformer.resblocks.10.mlp " in repr(compared)
    assert "> text_features" in repr(compared)


def test_the_picture_has_a_shape_for_every_stage():
    compared = minclip.compare(REFERENCE, torch_dump("openai"))
    page = compared._repr_html_()
    assert page.count("<title>") == len(REFERENCE)
    assert "currentColor" in page  # words and frame follow the page, light or dark
    for state in ("agrees", "not in the port"):
        assert f">{state}</text>" in page


# What is allowed follows the port's coarseness.


def coarse_port(round_all, bug=None):
    """A dump of a port with coarse weights or arithmetic, float32 outside, with a stage replaced."""
    params, tap_through = round_all
    kept = {}

    def tap(name, array):
        array = bug(name, array, kept) if bug else array
        kept[name] = tap_through(array)
        return kept[name]

    minclip.encode_text(params, TOKENS, tap=tap)
    kept["text_features"] = kept["pooled"] @ params["text_projection"]
    return kept


def in_bfloat16():
    def round_it(array):
        return rounding.round_to(array, "bfloat16")

    return as_params(PARAMS).map(round_it), round_it


def with_int8_weights():
    kind = next(kind for kind in FORMATS if kind.id == "int8-row")
    return Candidate(kind, PARTS[1]).apply(host_params(PARAMS), TOKENS), lambda array: array


def no_mask(name, array, kept):
    return kept[name.replace("masked", "scores")] if name.endswith("attn.masked") else array


def one_norm_left_out(name, array, kept):
    return kept[f"{BLOCK}residual"] if name == f"{BLOCK}ln_2" else array


@pytest.mark.parametrize("coarse", [in_bfloat16, with_int8_weights])
def test_correct_stages_of_a_coarse_port_are_not_called_wrong(coarse):
    compared = minclip.compare(REFERENCE, coarse_port(coarse()))
    assert compared.agrees, compared
    assert {stage.state for stage in compared.stages.values()} == {"agrees"}, compared
    said = {in_bfloat16: "the rounding of bfloat16", with_int8_weights: "int8 weights, one scale per row"}
    assert said[coarse] in compared.verdict


@pytest.mark.parametrize("coarse", [in_bfloat16, with_int8_weights])
def test_a_bug_of_a_coarse_port_is_found_at_its_stage(coarse):
    compared = minclip.compare(REFERENCE, coarse_port(coarse(), one_norm_left_out))
    assert compared.first == f"{BLOCK}ln_2", compared
    states = [stage.state for stage in compared.stages.values()]
    assert set(states[: states.index("diverges")]) == {"agrees"}


def test_the_bug_beside_quantized_weights_is_named():
    compared = minclip.compare(REFERENCE, coarse_port(with_int8_weights(), no_mask))
    assert compared.first.endswith(("attn.masked", "attn.weights")), compared
    assert any("M1" in note for note in compared.notes)
    assert any("int8 weights" in note for note in compared.notes)
