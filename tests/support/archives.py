"""Write small PyTorch archives for the tests of loading."""

import io
import struct
import warnings
import zipfile

import torch

from tests.support.oracles import openai


def openai_model(dtype="float16", **sizes):
    """Return OpenAI's own CLIP with random weights. The text tower has the sizes of test_loading.PARAMS."""
    torch.manual_seed(0)
    given = {"embed_dim": 48, "image_resolution": 32, "vision_layers": 3, "vision_width": 128}
    given |= {"vision_patch_size": 16, "context_length": 16, "vocab_size": 100}
    given |= {"transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2}
    module = openai("model")
    model = module.CLIP(**given | sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if dtype == "float16":
        module.convert_weights(model)
    return model


def save_traced(model, path):
    """Trace and save a model as OpenAI's archives were made, with the three sizes that they carry."""
    for name in ("input_resolution", "context_length", "vocab_size"):
        value = model.visual.input_resolution if name == "input_resolution" else getattr(model, name)
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    image = torch.zeros(1, 3, int(model.input_resolution), int(model.input_resolution))
    text = torch.zeros(1, int(model.context_length), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, (image.to(model.dtype), text), check_trace=False), path)


def repacked(path, data_pkl=None, **entries):
    """Return an archive's bytes with another data.pkl, and with entries added, or removed where None."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        folder = next(n for n in old.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
        changes = {f"{folder}{name}": content for name, content in entries.items()}
        if data_pkl is not None:
            changes[f"{folder}data.pkl"] = data_pkl
        for name in old.namelist():
            if name not in changes:
                new.writestr(name, old.read(name))
        for name, content in changes.items():
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


def tensor_pickle(offset=0, shape=(2,), strides=(1,), count=4, key="0", name="token_embedding.weight"):
    """Return a pickle of {name: one tensor}, with the given layout over a float32 storage."""

    def text(string):
        return b"X" + struct.pack("<I", len(string)) + string.encode()

    def whole(number):
        return b"\x8a\x08" + struct.pack("<q", number)

    def many(numbers):
        return b"(" + b"".join(map(whole, numbers)) + b"t"

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + whole(count) + b"tQ"
    )
    arguments = (
        b"(" + storage + whole(offset) + many(shape) + many(strides) + b"\x89ccollections\nOrderedDict\n)Rt"
    )
    return b"\x80\x02}" + text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."
