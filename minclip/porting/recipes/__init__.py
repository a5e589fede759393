"""How to run a port in another framework on the probe's tokens and save its stages: a few lines for each.

`minclip probe --help` prints the recipes, and tests/foreign runs them.
"""

from importlib.resources import files

TITLES = {
    "jax": "JAX with Flax: `module` and `variables` are the port's; calling the module returns the features",
    "keras": "Keras and KerasHub: `model` takes the tokens and returns the features",
    "mlx": "MLX, as mlx-examples: `model` takes the tokens and returns the features",
    "tinygrad": "tinygrad: `model` takes the tokens and returns the features",
    "openvino": "OpenVINO: `path` is the port's .xml or .onnx file",
    "ggml": "C and ggml: call save() for each tensor; then minclip compare probe.npz port.json",
}


def read(name: str) -> str:
    """Return the text of a recipe."""
    return files(__package__).joinpath(f"{name}.txt").read_text(encoding="utf-8")


def text() -> str:
    """Return all recipes, as `minclip probe --help` prints them."""
    head = (
        "For PyTorch, call minclip.trace_torch(model, tokens). For ONNX, run minclip compare probe.npz\n"
        "model.onnx. For another framework, run its recipe, and then minclip compare probe.npz port.npz\n"
    )
    return head + "".join(f"\n{title}\n\n{indented(read(name))}" for name, title in TITLES.items())


def indented(code: str) -> str:
    """Return code with each line indented by four spaces."""
    return "".join(f"    {line}".rstrip() + "\n" for line in code.splitlines())
