"""Record a live torch model, by hooks on its modules."""

import sys

from minclip.arrays import as_array


def trace_torch(torch_model, tokens):
    """Run a live torch model on tokens [B, L] and keep what its modules put out: a dict of arrays.

    For OpenAI's CLIP, OpenCLIP's, Hugging Face's CLIPModel, CLIPTextModelWithProjection and
    CLIPTextModel, or any module that is called as module(tokens). The names are the model's own module
    names, which `minclip.compare` knows. A tensor that was made between modules and goes into one is
    kept under that module's name and ".input": the residual stream is. What a fused attention never
    shows is not there: q, k, v of nn.MultiheadAttention, scores, and weights where it returns none.

    The hooks are taken away again, and minclip itself never imports torch.

    >>> from torch.nn import Embedding, Linear, Sequential
    >>> stages = trace_torch(Sequential(Embedding(9, 4), Linear(4, 3)), [[1, 2]])
    >>> stages["0"].shape, stages["1"].shape
    ((1, 2, 4), (1, 2, 3))
    """
    torch = sys.modules["torch"]  # or there were no torch model
    dump, seen = {}, {}

    def keep(name, value):
        if isinstance(value, dict):  # what Hugging Face's models return
            for key, part in value.items():
                keep(f"{name}.{key}".lstrip("."), part)
        elif isinstance(value, (tuple, list)):
            for number, part in enumerate(value):
                keep(f"{name}.{number}", part)
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
            version = 0 if value.is_inference() else value._version  # counts what is written in place
            if (id(value), version) not in seen:
                seen[id(value), version] = value  # kept alive, or another tensor could get its id
                dump[name] = as_array(value).copy()

    def hooks_of(name, module):
        before = module.register_forward_pre_hook(
            lambda _, inputs: keep(f"{name}.input", inputs[0]) if inputs else None
        )
        return before, module.register_forward_hook(lambda _, inputs, output: keep(name, output))

    ids = torch.as_tensor(as_array(tokens)).long().to(next(torch_model.parameters()).device)
    hooks = [hook for name, module in torch_model.named_modules() if name for hook in hooks_of(name, module)]
    try:
        with torch.no_grad():
            if hasattr(torch_model, "encode_text"):
                output = torch_model.encode_text(ids)
            elif hasattr(torch_model, "get_text_features"):
                output = torch_model.get_text_features(input_ids=ids)
            else:
                output = torch_model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(output, dict):
        keep("", output)
    else:  # of a tuple the first; under this name also where a module has put it out already
        dump["text_features"] = as_array(output[0] if isinstance(output, tuple) else output).copy()
    return dump
