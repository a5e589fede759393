"""The mistakes that people make first: each is answered in one line, with the place and the remedy."""

import io

import numpy as np
import pytest
import torch

import minclip

PARAMS = minclip.load()
TOKENS = minclip.tokenize(["a cat", "two dogs"])
FEATURES = minclip.encode_text(PARAMS, TOKENS)
TRACE = minclip.trace(PARAMS, TOKENS)

MISTAKES = {
    "text for tokens": (
        lambda: minclip.encode_text(PARAMS, "a cat"),
        "tokens must be integers, such as minclip.tokenize returns, not text: give minclip.tokenize(texts)",
    ),
    "no tokens": (
        lambda: minclip.encode_text(PARAMS, None),
        "tokens must be integers, such as minclip.tokenize returns, not NoneType",
    ),
    "ragged tokens": (
        lambda: minclip.encode_text(PARAMS, [[49406, 320, 49407], [49406, 49407]]),
        "not rows of different lengths: pad them",
    ),
    "tokens that were divided": (
        lambda: minclip.encode_text(PARAMS, TOKENS / 1),
        "tokens must be integers, such as minclip.tokenize returns, not float64",
    ),
    "tokens first": (
        lambda: minclip.encode_text(TOKENS, PARAMS),
        "params must be a mapping from names to arrays, such as minclip.load returns, not ndarray",
    ),
    "a name for params": (
        lambda: minclip.fast.Encoder("ViT-B/32"),
        "params must be a mapping from names to arrays, such as minclip.load returns, not str",
    ),
    "a state_dict of torch": (
        lambda: minclip.encode_text({name: torch.tensor(a) for name, a in PARAMS.items()}, TOKENS),
        "params must hold float arrays, not torch.Tensor: minclip.from_state_dict converts",
    ),
    "a weight that was not found": (
        lambda: minclip.encode_text(PARAMS | {"token_embedding.weight": None}, TOKENS),
        "params must hold float arrays, not None (token_embedding.weight)",
    ),
    "a weight of a block that was not found, for an Encoder": (
        lambda: minclip.fast.Encoder(PARAMS | {"transformer.resblocks.0.mlp.c_fc.weight": None}),
        "params must hold float arrays, not None (transformer.resblocks.0.mlp.c_fc.weight)",
    ),
    "a projection that was not found, for diagnose": (
        lambda: minclip.diagnose(PARAMS | {"text_projection": None}, TOKENS, np.zeros((2, 128))),
        "params must hold float arrays, not None (text_projection)",
    ),
    "a weight as a list": (
        lambda: minclip.hidden_states(PARAMS | {"positional_embedding": [[1.0, 2.0]]}, TOKENS),
        "params must hold float arrays, not builtins.list: minclip.from_state_dict converts (positional_emb",
    ),
    "texts as separate arguments": (
        lambda: minclip.tokenize("a cat", "a dog"),
        "context_length must be an int, not str: give several texts as a list",
    ),
    "a fraction of a context": (
        lambda: minclip.tokenize("a cat", context_length=76.5),
        "context_length must be an int, not float",
    ),
    "a padding that is no id": (lambda: minclip.tokenize("a", pad="<eot>"), "pad must be an int, not str"),
    "a padding below 0": (lambda: minclip.tokenize("a", pad=-1), "pad must be the id of a token, not -1"),
    "a large id": (
        lambda: minclip.decode([320, 49408]),
        "token id 49408 is outside the vocabulary, 0 to 49407",
    ),
    "one id": (
        lambda: minclip.encode_text(PARAMS, 49407),
        "tokens must have the shape [..., L], L from 1 to the context length 77, not []",
    ),
    "integer parameters": (
        lambda: minclip.encode_text(PARAMS.astype("int8"), TOKENS),
        "params must hold float arrays, not int8",
    ),
    "part of a stage's name": (
        lambda: TRACE["transformer.resblocks.0.attn.weight"],
        "resblocks.0.attn.weight'; did you mean 'transformer.resblocks.0.attn.weights'?",
    ),
    "part of a parameter's name": (
        lambda: PARAMS["token_embedding"],
        "no parameter 'token_embedding'; did you mean 'token_embedding.weight'?",
    ),
    "a layer's name for a number": (
        lambda: minclip.hidden_states(PARAMS, TOKENS, skip="last"),
        "skip must be an int, not str",
    ),
    "a fraction of a block": (
        lambda: minclip.hidden_states(PARAMS, TOKENS, skip=0.5),
        "skip must be an int, not float",
    ),
    "no heads": (lambda: minclip.load(heads=0), "builtin: 0 heads do not divide width 128"),
    "lists for a loss": (
        lambda: minclip.contrastive_loss([[1.0]], [[1.0]], 1),
        "features must be an array of floats, such as encode_text returns, not list",
    ),
    "params for probe tokens": (
        lambda: minclip.probe_tokens(PARAMS),
        "context_length must be an int, not Params",
    ),
    "arrays for a LoRA": (
        lambda: minclip.apply_lora(PARAMS, {}),
        "path must be that of a LoRA, not dict",
    ),
    "an empty state_dict": (
        lambda: minclip.from_state_dict({}),
        "no name ends in token_embedding.weight; there are no tensors at all",
    ),
    "another model's state_dict": (
        lambda: minclip.from_state_dict({f"fc{n}": FEATURES for n in range(5)}),
        "no name ends in token_embedding.weight; the names are fc0, fc1, fc2 and 2 more",
    ),
    "an empty dump": (
        lambda: minclip.compare(TRACE, {}),
        "no array was recognized as a stage, by its name or by its numbers: the port has none",
    ),
    "no name": (lambda: minclip.load(""), "no file, folder or model ''. The models are builtin, RN50"),
    "bytes": (lambda: minclip.tokenize(b"a cat"), "texts must be a str or a list of str, not bytes"),
    "a missing caption": (lambda: minclip.tokenize(["a cat", None]), "text 1 must be a str, not NoneType"),
    "a long caption": (
        lambda: minclip.tokenize(["a cat", "cat " * 99]),
        "text 1 is 101 tokens long, start and end included, but the context holds 77: shorten it or pass "
        "truncate=True: 'cat cat",
    ),
    "features for tokens": (
        lambda: minclip.decode(FEATURES),
        "tokens must be integers, such as minclip.tokenize returns, not float32",
    ),
    "a model's name without its slash": (lambda: minclip.load("ViT-B32"), "did you mean ViT-B/32?"),
    "a repository's name with a hyphen too many": (
        lambda: minclip.load("openai/clip-vit-base-patch-32"),
        "did you mean ViT-B/32?",
    ),
    "a repository's name without its owner": (
        lambda: minclip.load("clip-vit-large-patch14"),
        "did you mean ViT-L/14?",
    ),
    "another repository": (
        lambda: minclip.load("laion/CLIP-ViT-H-14"),
        "hf:laion/CLIP-ViT-H-14 downloads it from the Hugging Face hub",
    ),
    "torch's name of a device": (
        lambda: minclip.load("builtin", "cuda:0"),
        "device must be 'cpu' or 'cuda', not 'cuda:0'",
    ),
    "an abbreviated dtype": (
        lambda: minclip.load(dtype="fp16"),
        "dtype must be 'float16', 'float32' or 'float64', not 'fp16'",
    ),
    "loaded twice": (
        lambda: minclip.load(PARAMS),
        "source must be the name of a model or a path, not Params",
    ),
    "another spelling of an activation": (
        lambda: minclip.load(activation="quickgelu"),
        "activation must be one of quick_gelu, gelu, not 'quickgelu'",
    ),
    "a path for a state_dict": (
        lambda: minclip.from_state_dict("ViT-B-32.pt"),
        "state_dict must be a mapping from names to tensors (minclip.load reads files), not str",
    ),
    "swapped arguments of save": (
        lambda: minclip.save("model.safetensors", PARAMS),
        "give minclip.save(params, path): params must be a mapping from names to arrays, not str",
    ),
    "torch's suffix": (lambda: minclip.save(PARAMS, "model.pt"), "let it end in .safetensors"),
    "a negative tolerance": (
        lambda: minclip.compare(TRACE, TRACE, rtol=-1e-4),
        "rtol must be at least 0, not -0.0001",
    ),
    "features for traces": (
        lambda: minclip.compare(FEATURES, FEATURES),
        "the reference must be a mapping from stages to arrays, as minclip.trace returns, not ndarray",
    ),
    "features for a port's stages": (
        lambda: minclip.compare(TRACE, FEATURES),
        "the port must be a mapping from stages to arrays (minclip.diagnose takes features), not ndarray",
    ),
    "weights for traces": (
        lambda: minclip.compare(PARAMS, PARAMS),
        "the reference holds parameters, not stages: minclip.check_weights compares weights",
    ),
    "params for a torch model": (
        lambda: minclip.trace_torch(PARAMS, TOKENS),
        "the model must be a torch.nn.Module, not Params",
    ),
    "text to diagnose": (
        lambda: minclip.diagnose(PARAMS, "a cat", FEATURES),
        "tokens must be integers, such as minclip.tokenize returns, not text: give minclip.tokenize(texts)",
    ),
    "features for a trace": (
        lambda: minclip.backward(FEATURES, FEATURES),
        "the trace must be one that minclip.trace returned, not ndarray",
    ),
    "a list of floats": (
        lambda: minclip.normalize([[3.0, 4.0]]),
        "features must be an array of floats, such as encode_text returns, not list",
    ),
    "texts for a file": (
        lambda: minclip.corpus.encode_file(PARAMS, ["a cat"], "features.npy"),
        "source must be a path or an open binary file, not list: encode_stream takes texts",
    ),
    "one text for many": (
        lambda: next(minclip.corpus.encode_stream(PARAMS, "a cat")),
        "texts must be an iterable of str, not one text: give a list",
    ),
    "no texts for a loss": (
        lambda: minclip.contrastive_loss(FEATURES[:0], FEATURES[:0], 1),
        "the same shape [N, E], not [0, 128] and [0, 128]",
    ),
    "a factor for its logarithm": (
        lambda: minclip.contrastive_loss(FEATURES, FEATURES, 100.0),
        "logit_scale is a logarithm: give math.log(100.0), not 100.0",
    ),
    "the first factor of training": (
        lambda: minclip.contrastive_loss(FEATURES, FEATURES, np.float32(1 / 0.07)),
        "logit_scale is a logarithm: give math.log(14.28",
    ),
    "text for a scale": (
        lambda: minclip.contrastive_loss(FEATURES, FEATURES, "4.6"),
        "logit_scale must be a number or an array, not str",
    ),
    "ids that are objects": (
        lambda: minclip.encode_text(PARAMS, TOKENS.astype(object)),
        "tokens must be integers, such as minclip.tokenize returns, not ndarray of objects",
    ),
    "text for heads": (lambda: minclip.load(heads="2"), "builtin: heads must be an int, not '2'"),
    "the address of a model on the hub": (
        lambda: minclip.load("https://huggingface.co/laion/CLIP-ViT-H-14/tree/main"),
        "hf:laion/CLIP-ViT-H-14 downloads it from the Hugging Face hub",
    ),
    "another address": (
        lambda: minclip.load("https://example.com/clip.pt"),
        "clip.pt. Download the file, and give its path. The models are",
    ),
    "a file open for text": (
        lambda: minclip.corpus.encode_file(PARAMS, io.StringIO("a cat"), "features.npy"),
        "source must be a path or an open binary file: open it with mode 'rb'",
    ),
    "bytes in memory": (
        lambda: minclip.corpus.encode_file(PARAMS, io.BytesIO(b"a cat"), "features.npy"),
        "source must be a path or an open binary file, not BytesIO: encode_stream takes texts",
    ),
    "a tap that forgets to return": (
        lambda: minclip.encode_text(PARAMS, TOKENS, tap=lambda name, array: None),
        "the tap returned None at 'token_embedding': return the array, changed or not",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line(mistake):
    call, answer = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError, OSError, KeyError)) as raised:
        call()
    assert answer in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_weights_or_without_a_config_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither config\.json with model\.safetensors"):
        minclip.load(tmp_path)
    np.savez(tmp_path / "model.npz", **PARAMS)
    with pytest.raises(ValueError, match="no config tells the activation: pass activation="):
        minclip.load(tmp_path)


def test_the_device_may_be_the_second_argument():
    with pytest.raises(ValueError, match="device"):
        minclip.load("ViT-B/32", "tpu")
    assert minclip.load("builtin", "cpu") == PARAMS


def test_no_texts_are_no_rows_at_all():
    assert minclip.tokenize([]).shape == (0, 77)
    for encode in (minclip.encode_text, minclip.fast.encode_text):
        assert encode(PARAMS, []).shape == (0, 128)
    assert minclip.hidden_states(PARAMS, []).shape == (0, 77, 128)
    assert minclip.fast.Encoder(PARAMS)([]).shape == (0, 128)


@pytest.mark.parametrize("dtype", [torch.float16, np.float16, "float16", "half"])
def test_a_dtype_may_be_torchs(dtype):
    assert minclip.load(dtype=dtype)["ln_final.weight"].dtype == np.float16


def test_a_port_before_its_probe_is_pointed_out(tmp_path):
    np.savez(tmp_path / "port.npz", tokens=minclip.probe_tokens(), text_features=np.ones((7, 128)))
    minclip.porting.probe.write_probe(tmp_path / "probe.npz", PARAMS, stages="blocks")
    with pytest.raises(ValueError, match=r"probe\.npz is a probe: give it first, and then the port"):
        minclip.porting.comparison.compare_files(tmp_path / "port.npz", tmp_path / "probe.npz")


def test_a_dump_without_names_is_answered_with_the_remedy(tmp_path):
    np.save(tmp_path / "features.npy", FEATURES)
    with pytest.raises(
        ValueError, match=r"features\.npy .*one array without a name, so write it with numpy\.savez"
    ):
        minclip.porting.port_files.read_port(tmp_path / "features.npy", TOKENS)


def test_a_misspelled_file_is_answered_with_the_one_in_its_folder(tmp_path):
    minclip.save(PARAMS, tmp_path / "my-tower.safetensors")
    with pytest.raises(FileNotFoundError, match=r"did you mean \S*/my-tower\.safetensors\?"):
        minclip.load(tmp_path / "my_tower.safetensors")


def test_numpy_scalars_and_arrays_of_str_are_welcome():
    heads, skip, length = np.int64(2), np.int8(1), np.uint16(9)
    assert minclip.load(heads=heads).heads == 2
    assert minclip.hidden_states(PARAMS, TOKENS, skip=skip).shape == (2, 77, 128)
    for texts in (np.array("a cat"), np.array(["a cat"]), np.str_("a cat"), np.array(["a cat"], object)):
        assert (minclip.tokenize(texts, length) == minclip.tokenize("a cat", 9)).all()


def test_an_encoder_says_what_it_encodes():
    shown = repr(minclip.fast.Encoder(PARAMS.astype("float16")))
    assert shown == f"Encoder of {PARAMS!r}, features in float16"
