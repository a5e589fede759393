"""Record a live torch model, by hooks on its modules."""

from __future__ import annotations

import re
import sys
from typing import Any

from minclip.arrays import as_array


def trace_torch(torch_model: Any, tokens: Any, *, grad: Any = None) -> dict[str, Any]:
    """Run a live torch model on tokens [B, L] and return the outputs of its modules, name to array.

    torch_model   OpenAI's CLIP, OpenCLIP's, Hugging Face's CLIPModel, CLIPTextModelWithProjection and
                  CLIPTextModel, or any module that is called as module(tokens)
    grad          [B, E]: return the gradients of (features * grad).sum() instead, with respect to the same
                  tensors and, under their own names, to the parameters. Their .grad stays as it is

    The names are the model's own module names, which `minclip.compare` knows. A tensor made between
    modules and passed to one, such as the residual stream, has that module's name and ".input". Tensors
    inside a fused attention are not recorded: q, k, v of nn.MultiheadAttention, scores, and weights
    where it returns none. The model's output is also there as "text_features", or as "hidden_states"
    where it has a row for each position.

    The hooks are removed again, and minclip itself never imports torch.

    >>> from torch.nn import Embedding, Linear, Sequential
    >>> stages = trace_torch(Sequential(Embedding(9, 4), Linear(4, 3)), [[1, 2]])
    >>> stages["0"].shape, stages["1"].shape
    ((1, 2, 4), (1, 2, 3))
    """
    if not hasattr(torch_model, "named_modules"):
        raise TypeError(f"the model must be a torch.nn.Module, not {type(torch_model).__name__}")
    torch = sys.modules["torch"]  # imported already, or there were no torch model
    recorder = Recorder(torch.Tensor)
    ids = torch.as_tensor(as_array(tokens)).long().to(next(torch_model.parameters()).device)
    hooks = [
        hook for name, module in torch_model.named_modules() if name for hook in recorder.hook(name, module)
    ]
    try:
        with torch.set_grad_enabled(grad is not None):
            output = call(torch_model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(output, dict):
        recorder.keep("", output)
        if "text_embeds" in output:  # under this name too where a module has returned it already
            recorder.stages["text_features"] = as_array(output["text_embeds"]).copy()
    else:  # of a tuple the first; under this name also where a module has returned it already
        output = output[0] if isinstance(output, tuple) else output
        name = "text_features" if output.ndim < 3 else "hidden_states"
        recorder.stages[name] = as_array(output).copy()
        recorder.tensors[name] = output
    return recorder.stages if grad is None else gradients_of(recorder.tensors, torch_model, output, grad)


def gradients_of(tensors: dict[str, Any], torch_model: Any, output: Any, grad: Any) -> dict[str, Any]:
    """Return the gradients of (features * grad).sum() by tensors, where they have one, and by parameters.

    A parameter of the text tower that the features do not depend on has zeros.
    """
    torch = sys.modules["torch"]
    if isinstance(output, dict):
        output = output["text_embeds"] if "text_embeds" in output else output["pooler_output"]
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    parameters = {
        name: p
        for name, p in torch_model.named_parameters()
        if p.requires_grad and not re.search("visual|vision|logit_scale", name)
    }
    wanted = [*tensors.values(), *parameters.values()]
    start = torch.as_tensor(as_array(grad)).to(output).reshape(output.shape)
    found = torch.autograd.grad(output, wanted, start, allow_unused=True)
    arrays = {name: array for name, array in zip(tensors, found, strict=False) if array is not None}
    for (name, p), array in zip(parameters.items(), found[len(tensors) :], strict=True):
        arrays[name] = torch.zeros_like(p) if array is None else array
    return {name: as_array(array) for name, array in arrays.items()}


def call(torch_model: Any, ids: Any) -> Any:
    """Return what a model's text encoder returns for ids."""
    if hasattr(torch_model, "encode_text"):
        return torch_model.encode_text(ids)
    if hasattr(torch_model, "get_text_features"):
        return torch_model.get_text_features(input_ids=ids)
    return torch_model(ids)


class Recorder:
    """Keeps every float tensor that it sees, once, under the first name it has."""

    def __init__(self, tensor_type: Any):
        self.tensor_type = tensor_type
        self.stages: dict[str, Any] = {}
        self.tensors: dict[str, Any] = {}
        self.seen: dict[tuple[int, int], Any] = {}

    def hook(self, name: str, module: Any) -> tuple[Any, Any]:
        """Record the first input and the outputs of a module; return the hooks."""
        before = module.register_forward_pre_hook(
            lambda _, inputs: self.keep(f"{name}.input", inputs[0]) if inputs else None
        )
        return before, module.register_forward_hook(lambda _, inputs, output: self.keep(name, output))

    def keep(self, name: str, value: Any) -> None:
        """Record a tensor, or the tensors of a dict or tuple."""
        if isinstance(value, dict):  # Hugging Face's models return one
            for key, part in value.items():
                self.keep(f"{name}.{key}".lstrip("."), part)
        elif isinstance(value, (tuple, list)):
            for number, part in enumerate(value):
                self.keep(f"{name}.{number}", part)
        elif isinstance(value, self.tensor_type) and value.is_floating_point() and value.ndim:
            version = 0 if value.is_inference() else value._version  # counts writes in place
            if (id(value), version) not in self.seen:
                self.seen[id(value), version] = value  # kept alive, or another tensor could get its id
                self.tensors[name] = value
                self.stages[name] = as_array(value).copy()
