"""CLIP's text encoder as explicit array operations, on NumPy or CuPy.

Begin with `load`, `tokenize` and `encode_text`. `trace` keeps every stage. `compare` and `diagnose` check a
port. `corpus` and `fast` encode many texts. In a terminal, `minclip --help` lists the commands.

>>> import minclip
>>> params = minclip.load()
>>> minclip.encode_text(params, minclip.tokenize("a photo of a cat")).shape
(1, 128)
"""

from minclip import corpus, fast
from minclip.arrays import normalize
from minclip.attribution import attribute
from minclip.backward import backward
from minclip.builtin import pictures, scenes
from minclip.checkpoint import apply_lora, available_models, from_state_dict, load, save
from minclip.explorer import show
from minclip.losses import contrastive_loss, normalize_backward
from minclip.model import encode_text, hidden_states
from minclip.params import Params
from minclip.porting import (
    check_weights,
    compare,
    diagnose,
    diagnose_tokens,
    probe_texts,
    probe_tokens,
    trace_onnx,
    trace_torch,
)
from minclip.tokenizer import decode, tokenize
from minclip.tracing import trace
from minclip.verification import verify

__version__ = "0.2.0.dev0"

__all__ = [
    "Params",
    "apply_lora",
    "attribute",
    "available_models",
    "backward",
    "check_weights",
    "compare",
    "contrastive_loss",
    "corpus",
    "decode",
    "diagnose",
    "diagnose_tokens",
    "encode_text",
    "fast",
    "from_state_dict",
    "hidden_states",
    "load",
    "normalize",
    "normalize_backward",
    "pictures",
    "probe_texts",
    "probe_tokens",
    "save",
    "scenes",
    "show",
    "tokenize",
    "trace",
    "trace_onnx",
    "trace_torch",
    "verify",
]


def __dir__() -> list[str]:
    """Return the public names alone."""
    return [*__all__, "__version__"]
